"""What uploading costs a run, in time and memory, beside the same run that keeps its shards here.

    pip install -r requirements-dev.txt
    python benchmarks/upload_overhead.py --model_path MODEL \\
        --dataset_path arc_data/arc_format_train.json

Turn about, each run in a process of its own, to a storage server in one more process on loopback
(tests/gcs_server.py), which takes its share of the same cores. Extraction is teacher-forced. The
time is that of the run loop, and for the run that uploads, of what was left to send after it.
Memory is that of a process which writes shards and does nothing else, since loading a model would
hide it: large shards, and small ones, which are sent in one request each.
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
    kept: list[float] = []
    sent: list[float] = []
    for number in range(args.repeats):
        kept.append(run(args, {})[0])
        environment = {"STORAGE_EMULATOR_HOST": url}
        flags = ["--upload_to_cloud", "--cloud_bucket", f"gs://bucket/{number}"]
        seconds, size, shards = run(args, environment, *flags)
        sent.append(seconds)
    plain, uploading = map(statistics.median, (kept, sent))
    print(f"sent               {size / 1e6:.1f} MB in {shards} shards")
    print(f"without uploading  {plain:.2f} s, median of {[round(s, 2) for s in kept]}")
    print(f"uploading          {uploading:.2f} s, median of {[round(s, 2) for s in sent]}")
    print(f"cost in time       {uploading / plain - 1:+.1%}")
    for megabytes in (100, 8):
        alone, with_uploads = (memory(megabytes, url if uploads else "") for uploads in (0, 1))
        print(f"memory, {megabytes:3} MB     {with_uploads - alone:+.0f} MB ({alone:.0f} without)")


def memory(megabytes: int, url: str) -> float:
    """Peak resident MB of a process that writes shards of that size, and sends them to `url`."""
    process = subprocess.Popen(
        [sys.executable, __file__, "--write", str(megabytes), *([url] if url else [])]
    )
    _, status, usage = os.wait4(process.pid, 0)
    if status:
        raise SystemExit("writing failed")
    return usage.ru_maxrss / 1000


def write(megabytes: int, url: str = "") -> None:
    """A gigabyte in shards of that size, through the writer of a run."""
    sys.path.insert(0, str(ROOT))
    import numpy as np

    from utils.shards.uploads import BucketUploads, Uploads
    from utils.shards.writer import ShardWriter

    states = np.random.default_rng(0).random((megabytes * 250, 1000), np.float32)
    with tempfile.TemporaryDirectory() as folder:
        writer = ShardWriter(Path(folder), {}, {}, activation_dtype="float32")
        uploads = Uploads()
        if url:
            os.environ["STORAGE_EMULATOR_HOST"] = url
            from utils.store.bucket import BucketFolder

            bucket = BucketFolder(f"gs://bucket/memory{megabytes}")
            known = bucket.check_access()
            limits = {"max_pending_bytes": 1e12, "timeout": 600, "claim": "metadata.json"}
            uploads = BucketUploads(bucket, writer, known, **limits)
        writer.start()
        uploads.start()
        for index in range(1000 // megabytes):
            item = {
                "task_id": str(index),
                "sample_idx": 0,
                "input_ids": np.zeros(len(states), np.int32),
                "prompt_length": len(states),
                "activations": {"resid_post.0": states},
                "output_logprobs": np.zeros(0, np.float32),
                "cells": np.zeros((0, 7), np.int32),
                "num_train_pairs": 1,
                **dict.fromkeys(("prediction", "target", "correct")),
                "teacher_forced": False,
            }
            writer.add(item, {"task_id": str(index), "sample_idx": 0})
            writer.close_shard()
        writer.finish()
        uploads.drain(lambda: None)
        uploads.finish(lambda: None, writer.journal_path, writer.manifest_path)
    os._exit(0)


def run(
    args: argparse.Namespace, environment: dict[str, str], *flags: str
) -> tuple[float, int, int]:
    """Seconds, bytes of shards, shards."""
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
            list(map(str, command)),
            env={**os.environ, **environment},
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
        )
        log = process.communicate()[1]
        ended = time.time()
        if process.returncode:
            raise SystemExit(log.decode())
        metadata = Path(folder) / "activations" / "metadata.json"
        manifest = json.loads(metadata.read_text())
        seconds = manifest["seconds"]
        if flags:  # from the last shard, when the loop ended, to the end of the process
            shards = [Path(folder) / "activations" / e["filename"] for e in manifest["files"]]
            seconds += ended - max(path.stat().st_mtime for path in shards)
        size = sum(entry["size_bytes"] for entry in manifest["files"])
        return seconds, size, len(manifest["files"])


if __name__ == "__main__":
    if sys.argv[1:2] == ["--write"]:
        write(int(sys.argv[2]), *sys.argv[3:])
    main()
