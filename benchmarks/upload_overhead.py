"""What uploading costs a run, in time and memory, beside the same run that keeps its shards here.

    pip install -r requirements-dev.txt
    python benchmarks/upload_overhead.py --model_path MODEL \\
        --dataset_path arc_data/arc_format_train.json

Turn about, each run in a process of its own, to a storage server in one more process on loopback
(tests/gcs_server.py), which takes its share of the same cores. Extraction is teacher-forced. The
time is that of the run loop and of what comes after it, such as what was left to send.
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

sys.path.insert(0, str(Path(__file__).parents[1]))

from benchmarks import bench
from utils import cli
from utils.errors import UserError


def build_parser() -> cli.Parser:
    parser = bench.build_parser(__doc__)
    parser.add_argument("--model_path", required=bench.NEEDED, help="folder of the model")
    parser.add_argument("--dataset_path", required=bench.NEEDED, help="ARC tasks")
    parser.add_argument("--tasks", type=cli.int_at_least(1), default=8, help="tasks measured")
    parser.add_argument(
        "--max_model_len", type=cli.int_at_least(64), default=1000, help="tokens a sample"
    )
    parser.add_argument("--layers", nargs="+", default=["0", "11", "23"], help="extracted")
    parser.add_argument(
        "--save_every_n_samples", type=cli.int_at_least(1), default=2, help="in a shard"
    )
    parser.add_argument("--repeats", type=cli.int_at_least(1), default=3, help="median of so many")
    parser.add_argument(
        "--gigabytes",
        type=cli.float_at_least(0.1),
        default=1.0,
        help="of shards that the process writes whose memory is measured",
    )
    return parser


def main(args: argparse.Namespace, _: cli.Signals) -> None:
    tiny = {"tasks": 4, "max_model_len": 700, "layers": ["0"], "repeats": 1, "gigabytes": 0.1}
    with bench.scratch(args, **tiny):
        server = subprocess.Popen(
            [sys.executable, bench.ROOT / "tests" / "gcs_server.py", "bucket"],
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
    print(bench.processor())
    print(f"sent               {size / 1e6:.1f} MB in {shards} shards")
    print(f"without uploading  {plain:.2f} s, median of {[round(s, 2) for s in kept]}")
    print(f"uploading          {uploading:.2f} s, median of {[round(s, 2) for s in sent]}")
    print(f"cost in time       {uploading / plain - 1:+.1%}")
    for megabytes in (100, 8):
        alone, with_uploads = (memory(args, megabytes, to) for to in ("", url))
        print(f"memory, {megabytes:3} MB     {with_uploads - alone:+.0f} MB ({alone:.0f} without)")


def memory(args: argparse.Namespace, megabytes: int, url: str) -> float:
    """Peak resident MB of a process that writes shards of that size, and sends them to `url`."""
    process = subprocess.Popen(
        [sys.executable, __file__, "--write", str(args.gigabytes), str(megabytes), url]
    )
    _, status, usage = os.wait4(process.pid, 0)
    if status:
        raise UserError("writing failed, see above", exit_code=1)
    return usage.ru_maxrss * 1024 / 1e6  # it is in KiB


def write(gigabytes: float, megabytes: int, url: str) -> None:
    """So much in shards of that size, through the writer of a run; sent to `url` unless empty."""
    import numpy as np

    from utils.shards.uploads import BucketUploads, Uploads
    from utils.shards.writer import RunFolder
    from utils.store.bucket import BucketFolder

    def check() -> None:
        """Nothing ends this before its time."""

    states = np.random.default_rng(0).random((megabytes * 250, 1000), np.float32)
    with (
        tempfile.TemporaryDirectory() as scratch,
        RunFolder(scratch, {}, {}, activation_dtype="float32") as folder,
    ):
        uploads = Uploads()
        if url:
            os.environ["STORAGE_EMULATOR_HOST"] = url
            bucket = BucketFolder(f"gs://bucket/memory{megabytes}")
            there = bucket.check_access()
            limits = {"max_pending_bytes": 1e12, "timeout": 600}
            uploads = BucketUploads(bucket, folder, {}, there, **limits)
        folder.begin()
        uploads.start()
        for index in range(max(1, round(gigabytes * 1000) // megabytes)):
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
            folder.add(item, {"task_id": str(index), "sample_idx": 0})
            folder.seal()
            uploads.wait_for_room(check)
        folder.finish()
        uploads.drain(check)
        uploads.send(check, folder.journal_path, folder.manifest_path)
    os._exit(0)


def run(
    args: argparse.Namespace, environment: dict[str, str], *flags: str
) -> tuple[float, int, int]:
    """Seconds, bytes of shards, shards."""
    with tempfile.TemporaryDirectory() as folder:
        command = [
            *(sys.executable, bench.ROOT / "simple_extraction_inference.py"),
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
            raise UserError(f"the run failed:\n{log.decode()}", exit_code=1)
        metadata = Path(folder) / "activations" / "metadata.json"
        manifest = json.loads(metadata.read_text())
        seconds = manifest["seconds"]
        # From the last shard, when the loop ended, to the end of the process.
        shards = [Path(folder) / "activations" / e["filename"] for e in manifest["files"]]
        seconds += ended - max(path.stat().st_mtime for path in shards)
        size = sum(entry["size_bytes"] for entry in manifest["files"])
        return seconds, size, len(manifest["files"])


if __name__ == "__main__":
    if sys.argv[1:2] == ["--write"]:
        write(float(sys.argv[2]), int(sys.argv[3]), sys.argv[4])
    cli.run(main, build_parser())
