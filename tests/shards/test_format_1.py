"""Runs that an earlier version wrote, kept as files: they load, go on, and are merged.

`one` and `two` were killed on their way, the one of one process, the other of two that shared a
folder. `apart` is a finished run of two processes with a folder each, `part0` and `part1` are those
of --num_shards 2. All are of the model and the seven samples beside them.
"""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from conftest import NoSignals, words

import distributed_inference_with_activations as distributed
import simple_extraction_inference as simple
from utils.plan.plan import plan_run
from utils.plan.request import Request
from utils.run.loop import run
from utils.shards import __main__ as merge
from utils.shards import iter_items
from utils.shards.items import sample_key
from utils.shards.manifest import read_answers, read_manifest

FILES = Path(__file__).with_name("format_1")
FLAGS = {
    "model_path": FILES / "model",
    "dataset_path": FILES / "arc_format_train.json",
    "layers_to_extract": [1],
    "max_output_tokens": 6,
    "save_every_n_samples": 2,
}


@pytest.fixture
def runs(tmp_path):
    """A copy that may be changed."""
    return shutil.copytree(FILES, tmp_path / "runs")


def items_of(*folders):
    items = {}
    for folder in folders:
        for item in iter_items(folder):
            assert items.setdefault(sample_key(item), item) is item
    return items


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """The samples as two processes stored them, whose folders were copied into one."""
    folder = tmp_path_factory.mktemp("finished")
    for number in (0, 1):
        shutil.copytree(FILES / "apart" / f"activations{number}", folder, dirs_exist_ok=True)
    return items_of(folder)


@pytest.mark.parametrize(
    ("name", "count", "status"),
    [("one", 4, "running"), ("two", 4, "running"), ("part0", 2, "complete")],
)
def test_shards_and_answers_load(name, count, status):
    manifest = read_manifest(FILES / name / "activations")
    assert (manifest["status"], manifest["total_samples"]) == (status, count)
    assert manifest["non_finite"] == 0
    items = items_of(FILES / name / "activations")
    assert set(items) == set(read_answers(FILES / name / "activations")) and len(items) == count
    for item in items.values():
        assert item["activations"]["resid_post.1"].shape == (len(item["input_ids"]), 16)


def test_folders_of_two_processes_become_one_by_copying(runs, finished):
    """The manifest of all lists, in one folder, what lies in the other."""
    assert len(finished) == 7
    one, other = runs / "apart" / "activations0", runs / "apart" / "activations1"
    listed = read_manifest(one)["files"]
    assert len(listed) == 4 and sum((one / entry["filename"]).exists() for entry in listed) == 2
    for path in other.iterdir():
        shutil.copy(path, one)
    assert read_manifest(one)["files"] == listed
    assert items_of(one).keys() == finished.keys()


@pytest.mark.parametrize("name", ["one", "two"])
def test_a_killed_run_goes_on(runs, finished, name):
    """What was stored stays as it is, and the rest is as one run would have made it."""
    folder = runs / name / "activations"
    before = {path.name: path.read_bytes() for path in folder.glob("*.pkl")}
    flags = {**FLAGS, "activations_dir": folder, "resume": True}
    script, more = simple, {"output_path": runs / "predictions.json"}
    if name == "two":
        more = {"output_filepath": runs / "submission.json", "extract_activations": True}
        script, more = distributed, {**more, "batch_size": 1, "mesh_shape": [8, 1]}
    request = Request.from_flags(script.build_parser().parse_args(words(flags | more)))
    manifest = run(plan_run(request), NoSignals())
    assert (manifest["status"], manifest["total_samples"]) == ("complete", 7)
    assert manifest["prompt"]["tokenizer_hash"] and manifest["interventions"] == []
    assert {name: (folder / name).read_bytes() for name in before} == before
    items = items_of(folder)
    assert items.keys() == finished.keys() == read_answers(folder).keys()
    for key, item in items.items():
        assert item["input_ids"].tolist() == finished[key]["input_ids"].tolist()
        states, expected = (i["activations"]["resid_post.1"] for i in (item, finished[key]))
        np.testing.assert_allclose(states, expected, atol=4e-3)
    if name == "two":
        made = json.loads((runs / "submission.json").read_text())
        assert made == json.loads((FILES / "apart" / "submission.json").read_text())


def test_parts_are_merged(runs, finished):
    """Their files have no number of their own yet, and get one."""
    into, output = runs / "all", runs / "submission.json"
    parts = [str(runs / f"part{i}" / "activations") for i in (0, 1)]
    argv = ["merge", *parts, "--into", str(into), "--output_filepath", str(output), "--verify"]
    assert merge.main(merge.build_parser().parse_args(argv), NoSignals()) == 0
    assert items_of(into).keys() == finished.keys() == read_answers(into).keys()
    assert {p.name for p in into.glob("*.pkl")} == {
        *(f"activations_host000_batch_00000{i}.pkl" for i in (1,)),
        *(f"activations_host001_batch_00000{i}.pkl" for i in (1, 2, 3)),
    }
    assert read_manifest(into)["dataset"]["tasks"] == 6
    made = json.loads(output.read_text())
    assert made == json.loads((FILES / "apart" / "submission.json").read_text())
