"""What capture and storage cost a run, and how long the device waits between batches.

    python benchmarks/overlap.py --model_path MODEL --dataset_path arc_data/arc_format_train.json

Runs the same tasks with and without activations, turn about, in one process, compilation left out,
and takes a profile of one run with them: the device is idle where no compiled program executes.
"""

import argparse
import shutil
import statistics
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

from benchmarks import bench
from utils import cli


def build_parser() -> cli.Parser:
    parser = bench.build_parser(__doc__)
    parser.add_argument("--model_path", required=bench.NEEDED, help="folder of the model")
    parser.add_argument("--dataset_path", required=bench.NEEDED, help="ARC tasks")
    parser.add_argument("--tasks", type=cli.int_at_least(1), default=8, help="tasks measured")
    parser.add_argument("--batch_size", type=cli.int_at_least(1), default=4, help="rows a device")
    parser.add_argument(
        "--max_model_len", type=cli.int_at_least(64), default=1000, help="tokens a sample"
    )
    parser.add_argument(
        "--new_tokens", type=cli.int_at_least(1), default=64, help="tokens generated a row"
    )
    parser.add_argument("--repeats", type=cli.int_at_least(1), default=3, help="median of so many")
    return parser


def run_seconds(args: argparse.Namespace, folder: Path, extracts: bool, signals: cli.Signals):
    """Seconds of the run loop, loading and compiling left out."""
    from utils.plan.plan import plan_run
    from utils.plan.request import Request
    from utils.run.loop import run

    shutil.rmtree(folder, ignore_errors=True)
    request = Request(
        model_path=args.model_path,
        dataset_path=args.dataset_path,
        output_path=str(folder / "submission.json"),
        activations_dir=str(folder / "activations") if extracts else None,
        max_tasks=args.tasks,
        batch_size=args.batch_size,
        max_model_len=args.max_model_len,
        max_output_tokens=args.new_tokens,
        distributed=True,
    )
    return run(plan_run(request), signals)["seconds"]


def main(args: argparse.Namespace, signals: cli.Signals) -> None:
    import jax

    tiny = {"tasks": 4, "batch_size": 1, "max_model_len": 700, "new_tokens": 4, "repeats": 1}
    with bench.scratch(args, **tiny) as folder:
        times: dict[bool, list[float]] = {True: [], False: []}
        for _ in range(args.repeats):
            for extracts in times:
                times[extracts].append(run_seconds(args, folder / "run", extracts, signals))
        options = jax.profiler.ProfileOptions()
        options.python_tracer_level = 0
        jax.profiler.start_trace(folder / "trace", profiler_options=options)
        run_seconds(args, folder / "run", True, signals)
        jax.profiler.stop_trace()
        busy, span = device_time(folder / "trace")
    kept, plain = (statistics.median(times[extracts]) for extracts in (True, False))
    print(bench.processor())
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
    cli.run(main, build_parser())
