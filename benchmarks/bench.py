"""What the benchmarks share: `--smoke` with its tiny inputs, and the processor at hand.

A figure means something on a quiet machine alone. A smoke run shows that the script still works:
it makes a random model of two layers and a few tasks, runs the whole path, and its figures mean
nothing. It needs no network and no file from outside the repository.
"""

import argparse
import contextlib
import json
import os
import platform
import random
import re
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "tests"))
sys.path.insert(0, str(ROOT))

from utils import cli  # noqa: E402

# Of options which a smoke run fills in: whether the parser has to ask for them.
NEEDED = "--smoke" not in sys.argv
if not NEEDED:
    import haste

    os.environ.update(haste.environment())


def build_parser(description: str) -> cli.Parser:
    """A parser with `--smoke`."""
    parser = cli.Parser(description)
    parser.add_argument(
        "--smoke",
        action="store_true",
        help="show in seconds that this script works, on tiny inputs that it makes itself; the "
        "figures mean nothing",
    )
    return parser


@contextlib.contextmanager
def scratch(args: argparse.Namespace, **tiny: object) -> Iterator[Path]:
    """A folder that is deleted at the end.

    In a smoke run the options `model_path` and `dataset_path` of `args`, where the script has them
    and they were not given, are set to a tiny model and its tasks; and those named in `tiny`.
    """
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        if args.smoke:
            import tiny as inputs

            print("smoke run: tiny inputs, the figures mean nothing", flush=True)
            if getattr(args, "model_path", "") is None:
                args.model_path = str(inputs.write_model(folder / "tiny_model"))
            if getattr(args, "dataset_path", "") is None:
                args.dataset_path = str(inputs.write_tasks(folder / "tiny_tasks"))
            vars(args).update(tiny)
        yield folder


def peak_bytes(process: int | str = "self") -> int:
    """The most memory that a process has held so far."""
    status = Path(f"/proc/{process}/status").read_text()
    return int(re.search(r"VmHWM:\s+(\d+)", status)[1]) * 1024


def processor() -> str:
    """The processor's name, its vector instructions, and how many cores this process may use."""
    name, flags = platform.processor() or platform.machine(), set()
    with contextlib.suppress(OSError), open("/proc/cpuinfo") as lines:
        for line in lines:
            key, _, value = (part.strip() for part in line.partition(":"))
            if key == "model name":
                name = value
            elif key == "flags":
                flags = set(value.split())
                break
    vectors = next((v for v in ("avx512f", "avx2", "avx") if v in flags), None)
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return f"{name}{f' ({vectors})' if vectors else ''}, {cores} cores"


def write_tasks(path: Path, lengths: Sequence[int]) -> Path:
    """A task of square grids for each of these lengths, with solutions beside them, whose prompt
    has about so many tokens: one a cell and one a row."""
    rng = random.Random(0)
    tasks, solutions = {}, {}
    for i, tokens in enumerate(lengths):
        side = max(1, min(30, round((tokens / 7.5) ** 0.5 - 0.5)))
        pairs = max(1, round((tokens / (side * (side + 1)) - 1) / 2))

        def grid(side: int = side) -> list[list[int]]:
            return [[rng.randint(0, 9) for _ in range(side)] for _ in range(side)]

        train = [{"input": grid(), "output": grid()} for _ in range(pairs)]
        tasks[f"task{i:03}"] = {"train": train, "test": [{"input": grid()}]}
        solutions[f"task{i:03}"] = [grid()]
    path.mkdir()
    (path / "test_outputs_train.json").write_text(json.dumps(solutions))
    file = path / "arc_format_train.json"
    file.write_text(json.dumps(tasks))
    return file
