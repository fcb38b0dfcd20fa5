"""Seconds from the start of a run to its first stored sample, and the memory that the run takes.

    python benchmarks/first_sample.py --model_path MODEL --tokens 2000

The prompts are of eight lengths, from an eighth of --tokens on; or of one, with --lengths 1. Runs
simple_extraction_inference.py as its users do, a sample a batch and a shard, and ends it when the
first shard is there: once with no compiled programs at hand, once with those that were kept.
With --beside CHECKOUT another version of this project does the same in turns. The peak of the
process's memory stands beside what the plan expects of parameters, cache, captures and temporaries.
"""

import argparse
import os
import subprocess
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

from benchmarks import bench
from utils import cli
from utils.errors import UserError

SCRIPT = "simple_extraction_inference.py"


def build_parser() -> cli.Parser:
    parser = bench.build_parser(__doc__)
    parser.add_argument("--model_path", required=bench.NEEDED, help="folder of the model")
    parser.add_argument(
        "--tokens", type=cli.int_at_least(64), default=2000, help="of the longest prompt"
    )
    parser.add_argument(
        "--lengths", type=cli.int_at_least(1), default=8, help="of prompts, evenly spaced"
    )
    parser.add_argument(
        "--new_tokens", type=cli.int_at_least(1), default=16, help="tokens generated a row"
    )
    parser.add_argument("--beside", metavar="CHECKOUT", help="another version of this project")
    return parser


def first_sample(checkout: Path, flags: list[str], folder: Path) -> tuple[float, int]:
    """Seconds until the first shard is stored, and the peak memory in bytes until then."""
    folder.mkdir()
    own = ["--output_path", "predictions.json", "--activations_dir", "activations"]
    command = [sys.executable, checkout / SCRIPT, *flags, *own]
    with open(folder / "log.txt", "w") as log:
        start = time.perf_counter()
        process = subprocess.Popen(command, stdout=log, stderr=log, cwd=folder)
        try:
            while not list(folder.glob("activations/*.pkl")):
                if process.poll() is not None:
                    said = (folder / "log.txt").read_text().strip().splitlines()
                    raise UserError(
                        f"{checkout / SCRIPT} stored nothing: {said[-1] if said else ''}"
                    )
                time.sleep(0.01)
            return time.perf_counter() - start, bench.peak_bytes(process.pid)
        finally:
            process.kill()
            process.wait()


def main(args: argparse.Namespace, signals: cli.Signals) -> None:
    if args.beside is not None and not (Path(args.beside) / SCRIPT).is_file():
        raise UserError(f"--beside {args.beside} holds no {SCRIPT}: give a checkout's folder")
    with bench.scratch(args, tokens=200, new_tokens=4, lengths=2) as scratch:
        measure(args, scratch, signals)


def measure(args: argparse.Namespace, scratch: Path, signals: cli.Signals) -> None:
    import simple_extraction_inference as script
    from utils.plan.plan import plan_run
    from utils.plan.request import Request

    tasks = bench.write_tasks(
        scratch / "tasks", [args.tokens * (i + 1) // args.lengths for i in range(args.lengths)]
    )
    given = {
        "model_path": Path(args.model_path).absolute(),
        "dataset_path": tasks,
        "max_output_tokens": args.new_tokens,
        "save_every_n_samples": 1,
        "batch_size": 1,
    }
    flags = [str(word) for name, value in given.items() for word in (f"--{name}", value)]
    flags += ["--dtype", "float32"]
    own = ["--output_path", str(scratch / "predictions.json")]
    plan = plan_run(Request.from_flags(script.build_parser().parse_args([*flags, *own])))
    batch, work = max((b.shape for b in plan.batches), key=lambda s: s.slots), plan.workload
    expected = work.parameter_bytes(plan.layout)
    expected += work.batch_bytes(plan.layout, batch.rows, batch.slots)

    checkouts = {"this checkout": bench.ROOT}
    if args.beside is not None:
        checkouts["the other"] = Path(args.beside).absolute()
    longest = max(sample.length.prompt for sample in plan.samples)
    print(f"{bench.processor()}; {len(plan.samples)} prompts of up to {longest} tokens")
    print(f"planned: {expected / 1e9:.2f} GB, without Python and JAX themselves")
    print("| version | programs | seconds | peak, GB |\n|---|---|---|---|", flush=True)
    for programs in ("compiled", "from the cache"):
        for name, checkout in checkouts.items():
            os.environ["JAX_COMPILATION_CACHE_DIR"] = str(scratch / f"cache of {name}")
            folder = scratch / f"{name} {programs}"
            seconds, peak = first_sample(checkout, flags, folder)
            print(f"| {name} | {programs} | {seconds:.1f} | {peak / 1e9:.2f} |", flush=True)
            signals.check()


if __name__ == "__main__":
    cli.run(main, build_parser())
