"""What uploading costs a run, in time and memory, beside the same run that keeps its shards here.

    pip install -r requirements-dev.txt
    python benchmarks/upload_overhead.py --model_path MODEL \\
        --dataset_path arc_data/arc_format_train.json

Turn about, each run in a process of its own, to a storage server in one more process on loopback
(tests/gcs_server.py), which takes its share of the same cores. Extraction is teacher-forced. The
time is that of the run loop, and for the run that uploads, of what was left to send after it.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).parents[1]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model_path", required=True)
    parser.add_argument("--dataset_path", required=True)
    parser.add_argument("--tasks", type=int, default=8)
    parser.add_argument("--max_model_len", type=int, default=1000)
    parser.add_argument("--layers", nargs="+", default=["0", "11", "23"])
    parser.add_argument("--save_every_n_samples", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=3)
    args = parser.parse_args()
    server = subprocess.Popen(
        [sys.executable, ROOT / "tests" / "gcs_server.py", "bucket"],
        stdout=subprocess.PIPE,
        text=True,
    )
    try:
        measure(args, server.stdout.readline().strip())
    finally:
        server.kill()


def measure(args: argparse.Namespace, url: str) -> None:
    kept: list[tuple[float, float]] = []
    sent: list[tuple[float, float]] = []
    for number in range(args.repeats):
        kept.append(run(args, {})[:2])
        environment = {"STORAGE_EMULATOR_HOST": url}
        flags = ["--upload_to_cloud", "--cloud_bucket", f"gs://bucket/{number}"]
        *figures, size, shards = run(args, environment, *flags)
        sent.append(tuple(figures))
    plain, uploading = (statistics.median(s for s, _ in runs) for runs in (kept, sent))
    memory = [statistics.median(rss for _, rss in runs) for runs in (kept, sent)]
    print(f"sent               {size / 1e6:.1f} MB in {shards} shards")
    print(f"without uploading  {plain:.2f} s, median of {[round(s, 2) for s, _ in kept]}")
    print(f"uploading          {uploading:.2f} s, median of {[round(s, 2) for s, _ in sent]}")
    print(f"cost in time       {uploading / plain - 1:+.1%}")
    print(f"peak memory        {memory[0]:.0f} MB and {memory[1]:.0f} MB")
    print(f"cost in memory     {memory[1] - memory[0]:+.0f} MB")


def run(args: argparse.Namespace, environment: dict[str, str], *flags: str) -> tuple:
    """Seconds, peak resident MB, bytes of shards, shards."""
    with tempfile.TemporaryDirectory() as folder:
        command = [
            *(sys.executable, ROOT / "simple_extraction_inference.py"),
            *("--model_path", args.model_path, "--dataset_path", args.dataset_path),
            *("--output_path", f"{folder}/predictions.json"),
            *("--activations_dir", f"{folder}/activations", "--teacher_forcing"),
            *("--max_tasks", str(args.tasks), "--max_model_len", str(args.max_model_len)),
            *("--layers_to_extract", *args.layers),
            *("--save_every_n_samples", str(args.save_every_n_samples), *flags),
        ]
        process = subprocess.Popen(
            list(map(str, command)), env={**os.environ, **environment}, stderr=subprocess.PIPE
        )
        log = process.stderr.read()
        _, status, usage = os.wait4(process.pid, 0)
        ended = time.time()
        if status:
            raise SystemExit(log.decode())
        metadata = Path(folder) / "activations" / "metadata.json"
        manifest = json.loads(metadata.read_text())
        seconds = manifest["seconds"]
        if flags:  # from the last shard, when the loop ended, to the end of the process
            shards = [Path(folder) / "activations" / e["filename"] for e in manifest["files"]]
            seconds += ended - max(path.stat().st_mtime for path in shards)
        size = sum(entry["size_bytes"] for entry in manifest["files"])
        return seconds, usage.ru_maxrss / 1000, size, len(manifest["files"])


if __name__ == "__main__":
    main()
