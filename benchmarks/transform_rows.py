"""Rows per second and peak memory of the transform script, on rows in barc0's schema.

python benchmarks/transform_rows.py --num_rows 50000
"""

import argparse
import json
import os
import subprocess
import sys
import time
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).parents[1]))

from benchmarks import bench
from utils import cli
from utils.errors import UserError


def build_parser() -> cli.Parser:
    parser = bench.build_parser(__doc__)
    parser.add_argument("--num_rows", type=cli.int_at_least(1), default=50_000, help="transformed")
    parser.add_argument(
        "--format", choices=("jsonl", "parquet"), default="jsonl", help="of the rows' file"
    )
    parser.add_argument("--seed", type=cli.int_at_least(0), default=0, help="of the rows drawn")
    return parser


def write_rows(path: Path, num_rows: int, seed: int) -> None:
    """Rows of ten pairs, sides spread as in barc0: median 13, up to 29."""
    rng = np.random.default_rng(seed)
    with open(path, "w", encoding="utf-8") as file:
        for _ in range(num_rows):
            sides = np.clip(rng.normal(14, 5, (20, 2)).astype(int), 2, 29)
            grids = [rng.integers(0, 10, side).tolist() for side in sides]
            pairs = [grids[i : i + 2] for i in range(0, 20, 2)]
            file.write(json.dumps({"source": "", "examples": pairs, "seeds": []}) + "\n")


def to_parquet(path: Path) -> Path:
    """The same rows as Parquet. In a process of its own: the peak that is measured afterwards
    would count what is imported here."""
    target = path.with_suffix(".parquet")
    convert = "import sys, pyarrow.json as j, pyarrow.parquet as p; p.write_table("
    convert += "j.read_json(sys.argv[1], j.ReadOptions(block_size=1 << 27)), sys.argv[2])"
    subprocess.run([sys.executable, "-c", convert, path, target], check=True)
    return target


def main(args: argparse.Namespace, _: cli.Signals) -> None:
    with bench.scratch(args, num_rows=500) as folder:
        path = folder / "rows.jsonl"
        write_rows(path, args.num_rows, args.seed)
        if args.format == "parquet":
            path = to_parquet(path)
        command = [sys.executable, "transform_hf_to_arc.py", "--dataset", str(path)]
        command += ["--output_dir", f"{folder}/out"]
        started = time.perf_counter()
        child = subprocess.Popen(command, cwd=bench.ROOT, stderr=subprocess.DEVNULL)
        _, status, usage = os.wait4(child.pid, 0)
        seconds = time.perf_counter() - started
        if status:
            raise UserError(f"the script failed: {' '.join(command)}", exit_code=1)
        print(bench.processor())
        print(
            f"{args.num_rows} rows, {path.stat().st_size / 1e6:.0f} MB of {args.format}:"
            f" {seconds:.1f} s, {args.num_rows / seconds:.0f} rows/s with start-up,"
            f" peak memory {usage.ru_maxrss / 1024:.0f} MiB"
        )


if __name__ == "__main__":
    cli.run(main, build_parser())
