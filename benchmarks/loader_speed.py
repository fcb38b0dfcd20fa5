"""Rows a second of the loaders, beside reading the same shards from the disk and doing no more.

    python benchmarks/loader_speed.py --gigabytes 2 --width 896

Writes a run of random activations in the shape of Qwen2-0.5B's (one layer, float16, prompts of 800
tokens), drops it from the page cache where that is allowed, and reads it: plainly with `read`, with
`pickle.load` as a script of one's own would, and with `ActivationDataset` in order, shuffled, and
selected by role. Verification of size and crc32c is part of what the loaders do.
"""

import argparse
import contextlib
import os
import pickle
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

from benchmarks import bench
from utils import cli
from utils.store.local import check_writable

TOKENS, ITEMS = 800, 100  # of a sample, of a shard


def build_parser() -> cli.Parser:
    parser = bench.build_parser(__doc__)
    parser.add_argument(
        "--gigabytes", type=cli.float_at_least(0.01), default=2.0, help="of activations"
    )
    parser.add_argument("--width", type=cli.int_at_least(1), default=896, help="of the model")
    parser.add_argument("--batch_size", type=cli.int_at_least(1), default=4096, help="rows a batch")
    parser.add_argument(
        "--shuffle_buffer", type=cli.int_at_least(1), default=200_000, help="rows mixed in memory"
    )
    parser.add_argument("--repeats", type=cli.int_at_least(1), default=3, help="best of so many")
    parser.add_argument(
        "--folder", type=Path, help="that is there, on the disk to measure (default: /tmp)"
    )
    return parser


def write_run(folder: Path, samples: int, width: int) -> None:
    import numpy as np

    from utils.shards.writer import RunFolder

    random = np.random.default_rng(0)
    settings = {"activations": {"resid_post.0": {"hook_point": "resid_post", "layer": 0}}}
    settings["activations"]["resid_post.0"]["width"] = width
    settings |= {"model": {}, "prompt": {}, "capture": {}}
    tokens = np.arange(TOKENS, dtype=np.int32)
    cells = np.zeros((TOKENS, 7), np.int32)
    cells[:, 1], cells[:, 4] = tokens // 100 % 2, tokens % 10
    cells[:, 5], cells[:, 6] = tokens, tokens + 1
    block = random.standard_normal((TOKENS, width), dtype=np.float32).astype(np.float16)
    with RunFolder(folder, settings, {}, save_every_n_samples=ITEMS) as run:
        run.begin()
        for i in range(samples):
            item = {
                "task_id": f"task{i}",
                "sample_idx": 0,
                "input_ids": tokens,
                "prompt_length": TOKENS,
                "activations": {"resid_post.0": np.roll(block, i, axis=0)},
                "output_logprobs": np.zeros(0, np.float32),
                "cells": cells,
                "num_train_pairs": 3,
                "prediction": None,
                "target": None,
                "correct": None,
                "teacher_forced": False,
            }
            run.add(item, {"task_id": f"task{i}", "sample_idx": 0, "attempts": []})
        run.finish()


def forget(folder: Path) -> None:
    """Ask the kernel to drop the files' pages, so that they come from the disk."""
    for path in folder.glob("*.pkl"):
        with open(path, "rb") as file, contextlib.suppress(OSError):
            os.fsync(file.fileno())
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def main(args: argparse.Namespace, _: cli.Signals) -> None:
    with bench.scratch(args, gigabytes=0.05, width=64, repeats=1, shuffle_buffer=10_000):
        measure(args)


def measure(args: argparse.Namespace) -> None:
    from utils.dataset import ActivationDataset, Selection

    check_writable(args.folder or Path(tempfile.gettempdir()))
    samples = max(1, round(args.gigabytes * 1e9 / (TOKENS * args.width * 2)))
    rows = samples * TOKENS
    with tempfile.TemporaryDirectory(dir=args.folder) as scratch:
        folder = Path(scratch) / "activations"
        write_run(folder, samples, args.width)
        size = sum(path.stat().st_size for path in folder.glob("*.pkl"))

        def disk() -> None:
            for path in folder.glob("*.pkl"):
                with open(path, "rb", buffering=0) as file:
                    while file.read(1 << 24):
                        pass

        def plain() -> None:
            for path in sorted(folder.glob("*.pkl")):
                with open(path, "rb") as file:
                    for item in pickle.load(file):
                        item["activations"]["resid_post.0"].astype("float32")

        def loader(buffer: int, **selection: str) -> None:
            dataset = ActivationDataset(folder, Selection(0, **selection))
            for _ in dataset.batches(args.batch_size, shuffle_buffer=buffer):
                pass

        ways = {
            "reading the files, no more": disk,
            "pickle.load and float32, unverified": plain,
            "ActivationDataset, in order": lambda: loader(0),
            f"shuffled in a buffer of {args.shuffle_buffer}": lambda: loader(args.shuffle_buffer),
            "output cells alone (half of the rows)": lambda: loader(0, role="output"),
        }
        best = dict.fromkeys(ways, float("inf"))
        for _ in range(args.repeats):
            for name, way in ways.items():
                forget(folder)
                start = time.perf_counter()
                way()
                best[name] = min(best[name], time.perf_counter() - start)
    print(bench.processor())
    print(f"{rows} rows of {args.width}, {size / 1e9:.2f} GB, best of {args.repeats}")
    print("| way | seconds | rows read a second | of the disk's speed |\n|---|---|---|---|")
    for name, seconds in best.items():
        share = best["reading the files, no more"] / seconds
        print(f"| {name} | {seconds:.2f} | {rows / seconds:,.0f} | {share:.0%} |")


if __name__ == "__main__":
    cli.run(main, build_parser())
