"""Runs in the test's own process: planned, computed by the model or by one that only pretends."""

from unittest import mock

import numpy as np
from conftest import NoSignals, words
from pretend import FakeComputation

import simple_extraction_inference as script
from utils.plan.plan import Plan, plan_run
from utils.plan.request import Request
from utils.run.loop import run
from utils.shards.writer import RunFolder


def pretending():
    """A context in which runs of this process are computed by `FakeComputation`."""
    return mock.patch("utils.run.loop.Computation", FakeComputation)


def planned(model, tasks, folder, *flags) -> Plan:
    argv = ["--model_path", model, "--dataset_path", tasks, "--dtype", "float32"]
    argv += ["--output_path", folder / "predictions.json", "--activations_dir", folder / "acts"]
    return plan_run(
        Request.from_flags(script.build_parser().parse_args([*map(str, argv), *map(str, flags)]))
    )


def extracted(folder, model, tasks, **more):
    """The shards of a pretended run, in a folder of `folder`: three layers, two samples a shard."""
    flags = {
        "model_path": model,
        "dataset_path": tasks,
        "output_path": folder / "predictions.json",
        "activations_dir": folder / "activations",
        "max_output_tokens": 6,
        "save_every_n_samples": 2,
        "layers_to_extract": [0, 2, 3],
        **more,
    }
    with pretending():
        request = Request.from_flags(script.build_parser().parse_args(words(flags)))
        run(plan_run(request), NoSignals())
    return folder / "activations"


def sorted_rows(rows):
    rows = np.asarray(rows, np.float32)
    return rows[np.lexsort(rows.T)]


def made_run(folder, states, tasks=40, activation_dtype="float32", token_positions="all"):
    """The shards of a run of random grids that no model has seen: of each task two train pairs, a
    test input and an answer, a token a cell and one behind each row, which is 10.

    states: (random, item, task's number) -> name -> what is stored of its tokens, [T, D]; where
    `token_positions` are not all, of those that it puts into the item's `positions`.
    """
    random, pairs = np.random.default_rng(0), [(0, 0), (0, 1), (1, 0), (1, 1), (-1, 0), (-1, 1)]
    run_folder = None
    for task in range(tasks):
        ids, cells, grids = [], [], {}
        for pair, role in pairs:
            if (pair, role) == (-1, 1):
                prompt_length = len(ids)
            grids[pair, role] = random.integers(0, 10, random.integers(3, 7, 2))
            for (row, col), color in np.ndenumerate(grids[pair, role]):
                cells.append([pair, role, row, col, color, len(ids), len(ids) + 1])
                ids += [color] if col + 1 < grids[pair, role].shape[1] else [color, 10]
        answer = grids[-1, 1].tolist()
        key = {"task_id": f"task{task:02}", "sample_idx": 0}
        item = {
            **key,
            "input_ids": np.array(ids, np.int32),
            "prompt_length": prompt_length,
            "output_logprobs": np.zeros(len(ids) - prompt_length),
            "cells": np.array(cells, np.int32),
            "num_train_pairs": 2,
            "prediction": answer,
            "target": answer if task % 2 else [[0]],
            "correct": bool(task % 2),
            "teacher_forced": False,
        }
        item["activations"] = states(random, item, task)
        if run_folder is None:
            about = {}
            for name, rows in item["activations"].items():
                hook_point, _, layer = name.rpartition(".")
                width = rows.shape[1]
                about[name] = {"hook_point": hook_point, "layer": int(layer), "width": width}
            settings = {key: {} for key in ("model", "dataset", "prompt", "arguments")}
            settings |= {"capture": {"token_positions": token_positions}, "activations": about}
            run_folder = RunFolder(folder, settings, {}, activation_dtype=activation_dtype)
            run_folder.clear()
            run_folder.begin()
        run_folder.add(item, key)
    run_folder.finish()
    run_folder.close()
    return folder
