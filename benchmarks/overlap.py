"""What capture and storage cost a run, and how long the device waits between batches.

    python benchmarks/overlap.py --model_path MODEL --dataset_path arc_data/arc_format_train.json

Runs the same tasks with and without activations, turn about, in one process, compilation left out,
and takes a profile of one run with them: the device is idle where no compiled program executes.
"""

import argparse
import shutil
import statistics
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model_path", required=True)
    parser.add_argument("--dataset_path", required=True)
    parser.add_argument("--tasks", type=int, default=8)
    parser.add_argument("--batch_size", type=int, default=4)
    parser.add_argument("--max_model_len", type=int, default=1000)
    parser.add_argument("--new_tokens", type=int, default=64)
    parser.add_argument("--repeats", type=int, default=3)
    args = parser.parse_args()

    import jax

    from utils.cli import Signals
    from utils.plan.plan import prepare
    from utils.plan.request import Request
    from utils.run.loop import run

    class NoSignals(Signals):
        def __init__(self) -> None:
            self.signum = None

    def seconds(scratch: Path, extracts: bool) -> float:
        shutil.rmtree(scratch, ignore_errors=True)
        request = Request(
            args.model_path,
            args.dataset_path,
            str(scratch / "submission.json"),
            str(scratch / "activations") if extracts else None,
            max_tasks=args.tasks,
            batch_size=args.batch_size,
            max_model_len=args.max_model_len,
            max_output_tokens=args.new_tokens,
            distributed=True,
        )
        return run(prepare(request), NoSignals())["seconds"]

    with tempfile.TemporaryDirectory() as folder:
        scratch = Path(folder) / "run"
        times: dict[bool, list[float]] = {True: [], False: []}
        for _ in range(args.repeats):
            for extracts in times:
                times[extracts].append(seconds(scratch, extracts))
        options = jax.profiler.ProfileOptions()
        options.python_tracer_level = 0
        jax.profiler.start_trace(Path(folder) / "trace", profiler_options=options)
        seconds(scratch, True)
        jax.profiler.stop_trace()
        busy, span = device_time(Path(folder) / "trace")
    kept, plain = (statistics.median(times[extracts]) for extracts in (True, False))
    print(f"with activations     {kept:.2f} s, median of {args.repeats}: {times[True]}")
    print(f"without              {plain:.2f} s, median of {args.repeats}: {times[False]}")
    print(f"cost of extraction   {kept / plain - 1:+.1%}")
    print(f"device idle          {1 - busy / span:.1%} of {span:.2f} s, first program to last")


def device_time(trace: Path) -> tuple[float, float]:
    """Seconds in which a compiled program ran, and from the first one's start to the last's end."""
    from jax.profiler import ProfileData

    profile = ProfileData.from_file(str(max(trace.rglob("*.xplane.pb"))))
    spans = sorted(
        (event.start_ns, event.start_ns + event.duration_ns)
        for plane in profile.planes
        for line in plane.lines
        for event in line.events
        # of a CPU; of an accelerator, the line that shows whole programs
        if event.name == "ThunkExecutor::Execute (wait for completion)"
        or line.name == "XLA Modules"
    )
    busy, end = 0.0, 0.0
    for start, stop in spans:
        busy += max(0.0, stop - max(start, end))
        end = max(end, stop)
    return busy / 1e9, (end - spans[0][0]) / 1e9


if __name__ == "__main__":
    main()
