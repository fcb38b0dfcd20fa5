"""Kills a writer of shards in every way; run by test_shards.py in a process of its own.

    python tests/shards/shard_crashes.py steps|moments FOLDER

Each writer is a forked child, so that dozens of kills take seconds. Ends with an AssertionError
unless every run, once resumed, equals one that nothing happened to.
"""

import os
import random
import shutil
import signal
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2]))

import numpy as np

from utils.shards import iter_items
from utils.shards.manifest import read_answers, read_manifest
from utils.shards.writer import RunFolder
from utils.store.local import Sink

SAMPLES = 23
SETTINGS = {"model": {"hash": "m"}, "activations": {}}


def item(index: int, tokens: int = 200, width: int = 300) -> dict:
    return {
        "task_id": f"task{index // 2}",
        "sample_idx": index % 2,
        "input_ids": np.arange(tokens),
        "prompt_length": tokens,
        "activations": {"resid_post.0": np.full((tokens, width), index, np.float32)},
        "output_logits": np.full((1, 9), index, np.float32),
        "output_logprobs": np.zeros(0),
        "cells": np.zeros((0, 7), np.int32),
        "num_train_pairs": 2,
        "prediction": None,
        "target": None,
        "correct": None,
        "teacher_forced": False,
    }


def write(folder: Path, samples: int = SAMPLES, pause: float = 0) -> None:
    with RunFolder(folder, SETTINGS, {}, save_every_n_samples=3, mode="resume") as run:
        if run.held.is_complete:
            return
        run.clear()
        run.begin()
        for index in range(samples):
            key = (f"task{index // 2}", index % 2)
            if key not in run.done:
                time.sleep(pause)
                run.add(
                    item(index), {"task_id": key[0], "sample_idx": key[1], "text": f"{index}\n"}
                )
        run.finish()


def contents(folder: Path) -> tuple:
    """All bytes but those of the journal, which may hold a line twice; what is read of that."""
    files = {path.name: path.read_bytes() for path in sorted(folder.iterdir())}
    files.pop("answers.jsonl")
    return files, read_answers(folder)


def check_consistent(folder: Path) -> None:
    """What the manifest lists is intact, each sample once, each with its answer."""
    if not (folder / "metadata.json").exists():  # killed before the first manifest
        assert not list(folder.glob("activations*.pkl"))
        return
    listed = [tuple(key) for f in read_manifest(folder)["files"] for key in f["samples"]]
    assert len(set(listed)) == len(listed)
    assert [(i["task_id"], i["sample_idx"]) for i in iter_items(folder)] == listed
    assert list(read_answers(folder)) == listed


def in_child(work, *args) -> int:
    if child := os.fork():
        return child
    try:
        work(*args)
        os._exit(0)
    except BaseException as error:
        print(f"child: {error!r}", file=sys.stderr, flush=True)
        os._exit(1)


def finished(child: int) -> int:
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def dying_at(step: int, work, *args) -> None:
    """Do `work`, and be gone at the `step`-th touch of the disk: before it, halfway, or after."""
    touches = 0

    def touch(original, halfway=None):
        def call(*call_args):
            nonlocal touches
            if touches == step:
                os._exit(9)
            touches += 1
            if halfway and touches == step:
                halfway(*call_args)
                os._exit(9)
            touches += bool(halfway)
            return original(*call_args)

        return call

    def half(sink, buffer):
        view = memoryview(buffer).cast("B")
        original_write(sink, bytes(view[: len(view) // 2]))

    original_write = Sink.write
    Sink.write = touch(original_write, half)
    os.fsync, os.replace, os.link = touch(os.fsync), touch(os.replace), touch(os.link)
    work(*args)


def steps(root: Path) -> int:
    """Die at every single touch of the disk in a run of two shards, then resume."""
    whole = root / "whole"
    assert finished(in_child(write, whole, 5)) == 0
    step = 0
    while True:
        folder = root / "run"
        code = finished(in_child(dying_at, step, write, folder, 5))
        check_consistent(folder)
        if code == 9:
            assert finished(in_child(write, folder, 5)) == 0
        assert contents(folder) == contents(whole), f"after step {step}"
        shutil.rmtree(folder)
        if code == 0:
            return step
        step += 1


def moments(root: Path) -> int:
    """kill -9 at random moments, time and again, until runs are complete."""
    whole, folder = root / "whole", root / "run"
    assert finished(in_child(write, whole)) == 0
    kills, generator = 0, random.Random(0)
    while kills < 40:
        code = -signal.SIGKILL
        while code:
            child = in_child(write, folder, SAMPLES, 0.001)
            time.sleep(generator.uniform(0, 0.02))  # a whole run takes longer
            os.kill(child, signal.SIGKILL)
            code = finished(child)
            assert code in (0, -signal.SIGKILL)
            kills += code != 0
            check_consistent(folder)
            if kills % 20 == 0:  # on a slow machine none would ever get to the end
                code = finished(in_child(write, folder))
        assert contents(folder) == contents(whole)
        shutil.rmtree(folder)
    return kills


if __name__ == "__main__":
    print({"steps": steps, "moments": moments}[sys.argv[1]](Path(sys.argv[2])))
