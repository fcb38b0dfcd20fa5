"""Rows per second and peak memory of the transform script, on rows in barc0's schema.

python benchmarks/transform_rows.py --num_rows 50000
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

ROOT = Path(__file__).resolve().parents[1]


def write_rows(path: Path, num_rows: int, seed: int) -> None:
    """Rows of ten pairs, sides spread as in barc0: median 13, up to 29."""
    rng = np.random.default_rng(seed)
    with open(path, "w", encoding="utf-8") as file:
        for _ in range(num_rows):
            sides = np.clip(rng.normal(14, 5, (20, 2)).astype(int), 2, 29)
            grids = [rng.integers(0, 10, side).tolist() for side in sides]
            pairs = [grids[i : i + 2] for i in range(0, 20, 2)]
            file.write(json.dumps({"source": "", "examples": pairs, "seeds": []}) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--num_rows", type=int, default=50_000)
    parser.add_argument("--format", choices=("jsonl", "parquet"), default="jsonl")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "rows.jsonl"
        write_rows(path, args.num_rows, args.seed)
        if (
            args.format == "parquet"
        ):  # elsewhere: the child's peak would count what is imported here
            convert = "import sys, pyarrow.json as j, pyarrow.parquet as p; p.write_table("
            convert += "j.read_json(sys.argv[1], j.ReadOptions(block_size=1 << 27)), sys.argv[2])"
            target = path.with_suffix(".parquet")
            subprocess.run([sys.executable, "-c", convert, path, target], check=True)
            path = target
        command = [sys.executable, "transform_hf_to_arc.py", "--dataset", str(path)]
        command += ["--output_dir", f"{folder}/out"]
        started = time.perf_counter()
        child = subprocess.Popen(command, cwd=ROOT, stderr=subprocess.DEVNULL)
        _, status, usage = os.wait4(child.pid, 0)
        seconds = time.perf_counter() - started
        if status:
            raise SystemExit(f"the script failed: {' '.join(command)}")
        print(
            f"{args.num_rows} rows, {path.stat().st_size / 1e6:.0f} MB of {args.format}:"
            f" {seconds:.1f} s, {args.num_rows / seconds:.0f} rows/s with start-up,"
            f" peak memory {usage.ru_maxrss / 1024:.0f} MiB"
        )


if __name__ == "__main__":
    main()
