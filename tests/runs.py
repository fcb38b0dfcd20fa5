"""Runs in the test's own process: planned, computed by the model or by one that only pretends."""

from unittest import mock

import numpy as np
from conftest import NoSignals, words
from pretend import FakeComputation

import simple_extraction_inference as script
from utils.plan.plan import Plan, plan_run
from utils.plan.request import Request
from utils.run.loop import run


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
