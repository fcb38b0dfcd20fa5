"""The distributed script on meshes of this process gives what one device gives."""

import json

import pytest
from conftest import NoSignals, words
from processes import (
    FLAGS,
    HEADS,
    assert_same,
    in_process,
    result_of,
    start,
)

import distributed_inference_with_activations as script
from utils.plan.plan import plan_run
from utils.plan.request import Request
from utils.run.loop import run
from utils.shards.manifest import read_manifest


@pytest.fixture(scope="module", params=HEADS)
def alone(request, models, tasks, tmp_path_factory):
    """A model, and what one device makes of the tasks."""
    folder = tmp_path_factory.mktemp("alone")
    import simple_extraction_inference as simple

    flags = {"model_path": models[request.param], "dataset_path": tasks, **FLAGS}
    del flags["extract_activations"]
    paths = {"output_path": folder / "predictions.json", "activations_dir": folder / "acts"}
    argv = words(flags | paths)
    run(plan_run(Request.from_flags(simple.build_parser().parse_args(argv))), NoSignals())
    predictions = json.loads((folder / "predictions.json").read_text())
    submission = {
        task: [
            {f"attempt_{k}": sample["attempts"][0]["grid"] or [[0, 0], [0, 0]] for k in (1, 2)}
            for sample in samples
        ]
        for task, samples in predictions.items()
    }
    (folder / "submission.json").write_text(json.dumps(submission))
    return models[request.param], result_of(folder)


@pytest.mark.parametrize("shape", [(8, 1), (4, 2), (2, 4), (1, 8)], ids=str)
def test_every_mesh_gives_what_one_device_gives(alone, tasks, tmp_path, shape):
    model, expected = alone
    assert_same(in_process(model, tasks, tmp_path, mesh_shape=list(shape)), expected)
    manifest = read_manifest(tmp_path / "acts")
    assert (manifest["mesh_shape"], manifest["processes"]) == (list(shape), 1)
    assert manifest["total_samples"] == 29


def test_sixty_four_devices(alone, tasks, tmp_path):
    model, expected = alone
    start(model, tasks, tmp_path, devices=64, mesh_shape=[8, 8]).finish()
    assert_same(result_of(tmp_path), expected)


def test_a_run_goes_on_where_another_mesh_left_it(alone, tasks, tmp_path):
    model, expected = alone
    in_process(model, tasks, tmp_path, mesh_shape=[2, 4])
    folder = tmp_path / "acts"
    manifest = json.loads((folder / "metadata.json").read_text())
    lost = manifest["files"].pop()
    assert manifest["files"] and lost["num_samples"]
    (folder / lost["filename"]).unlink()
    (folder / "metadata.json").write_text(json.dumps({**manifest, "status": "running"}))
    assert_same(in_process(model, tasks, tmp_path, mesh_shape=[8, 1], resume=True), expected)


def test_without_extraction_only_the_submission_is_kept(alone, tasks, tmp_path):
    model, expected = alone
    paths = {"output_filepath": tmp_path / "submission.json"}
    flags = {"model_path": model, "dataset_path": tasks, "max_output_tokens": 12, **paths}
    request = Request.from_flags(script.build_parser().parse_args(words(flags)))
    run(plan_run(request), NoSignals())
    assert json.loads((tmp_path / "submission.json").read_text()) == expected[1]
    assert sorted(path.name for path in tmp_path.rglob("*")) == [
        "metadata.json",
        "submission.json",
        "submission.json.run",
    ]


def test_shares_of_useful_slots(alone, tasks, tmp_path):
    model, _ = alone
    in_process(model, tasks, tmp_path, mesh_shape=[4, 2])
    manifest = read_manifest(tmp_path / "acts")
    useful = manifest["useful_slots"]
    assert 0.4 < useful["prefill"] <= 1 and 0.5 < useful["decode"] <= 1
