"""The run loop: what is computed, what is only sent, and what it says of its time."""

import json
import time
from types import SimpleNamespace

import numpy as np
import pytest
from conftest import NoSignals, words
from pretend import FakeComputation
from runs import planned

import distributed_inference_with_activations as distributed
from utils.errors import UserError
from utils.plan.plan import plan_run
from utils.plan.request import Request
from utils.run import conclude, loop, pipeline
from utils.run.dry_run import plan_storage
from utils.shards import uploads
from utils.shards.held import Writer
from utils.shards.manifest import read_manifest
from utils.shards.writer import RunFolder

TO_BUCKET = ["--upload_to_cloud", "--cloud_bucket", "gs://bucket/run"]


@pytest.fixture
def predicted(tiny_model, tasks_file, tmp_path, fake_model):
    """Call it with flags: makes the predictions of a run without extraction, or goes on with it."""
    more = ["--no_extraction", "--max_output_tokens", 4]

    def predict(*flags):
        plan = planned(tiny_model, tasks_file, tmp_path, *more, *flags)
        return loop.run(plan_run(plan.request), NoSignals())

    return predict


@pytest.mark.parametrize("ended", ["unsent", "without a bucket", "killed"])
def test_predictions_that_are_made_are_only_sent(predicted, tmp_path, gcs, monkeypatch, ended):
    """Whether sending them had failed, they were to go nowhere, or a kill came before the answers
    in shards were deleted."""
    monkeypatch.setattr(uploads, "LAST_SECONDS", 0.2)
    output, folder = tmp_path / "predictions.json", tmp_path / "predictions.json.run"
    if ended == "without a bucket":
        predicted()
    else:
        broken = gcs.fault(503, lambda r: r.name.endswith("predictions.json"), times=10**6)
        with monkeypatch.context() as changed:
            if ended == "killed":
                changed.setattr(loop, "tidy", lambda *args: 1 / 0)
            with pytest.raises((UserError, ZeroDivisionError), match=r"--resume|zero"):
                predicted(*TO_BUCKET, "--upload_timeout", 1)
        gcs.faults.remove(broken)
    assert (len(list(folder.iterdir())) == 1) is (ended != "killed")
    made = output.read_bytes()
    monkeypatch.setattr(FakeComputation, "__init__", lambda *args: pytest.fail("it computes"))
    manifest = predicted(*TO_BUCKET, "--resume")
    assert manifest["status"] == "complete" and manifest["total_samples"] == 8
    (kept,) = folder.iterdir()
    objects = {"predictions.json": made, "metadata.json": kept.read_bytes()}
    assert gcs.objects("run/") == objects and output.read_bytes() == made
    assert read_manifest(folder)["total_samples"] == 8  # though it lists no files any more
    assert predicted(*TO_BUCKET, "--resume") is None  # there is nothing to do


def test_what_is_overwritten_leaves_no_predictions(predicted, tmp_path, monkeypatch):
    """Which would be taken for those of the run that replaces it, and was stopped."""
    predicted()
    monkeypatch.setattr(FakeComputation, "launch", lambda *args: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        predicted("--overwrite")
    assert not (tmp_path / "predictions.json").exists()


@pytest.mark.parametrize("slow", ["network", "disk"])
def test_the_disk_is_not_blamed_for_the_network(
    slow, tiny_model, tasks_file, tmp_path, fake_model, gcs, monkeypatch, caplog
):
    def wait(self, *args):
        time.sleep(0.05)
        if slow == "network":
            self.waited += 0.05

    monkeypatch.setattr(uploads.BucketUploads, "wait_for_room", wait)
    monkeypatch.setattr(pipeline, "MAX_WAITING_BYTES", 1)
    plan = planned(tiny_model, tasks_file, tmp_path, "--max_output_tokens", 4, *TO_BUCKET)
    loop.run(plan, NoSignals())
    assert ("the disk was the bottleneck" in caplog.text) is (slow == "disk")


def test_a_shard_is_closed_at_its_size(tiny_model, tasks_file, tmp_path, fake_model):
    """In the run as in the dry run, where none of the other limits is met."""
    plan = planned(tiny_model, tasks_file, tmp_path, "--max_output_tokens", 0)
    object.__setattr__(plan.request, "max_shard_mb", 0.1)  # megabytes; a flag of at least 1
    manifest = loop.run(plan, NoSignals())
    written = [(entry["num_samples"], entry["size_bytes"]) for entry in manifest["files"]]
    assert written == plan_storage(plan)[1] and len(written) > 1


def test_a_shard_is_closed_after_so_many_batches(tiny_model, tasks_file, tmp_path, fake_model):
    flags = ["--max_output_tokens", 0, "--save_every_n_batches", 3]
    plan = planned(tiny_model, tasks_file, tmp_path, *flags)
    manifest = loop.run(plan, NoSignals())
    written = [(entry["num_samples"], entry["size_bytes"]) for entry in manifest["files"]]
    assert written == plan_storage(plan)[1] and [count for count, _ in written] == [3, 3, 2]


def test_what_nobody_was_asked_is_not_wrong(tiny_model, tasks_file, tmp_path, fake_model):
    """A sample that is left out counts as failed only where the others are answered."""
    flags = ["--max_output_tokens", 0]
    every = planned(tiny_model, tasks_file, tmp_path, *flags).samples
    flags += ["--max_model_len", min(sample.length.prompt for sample in every)]
    plan = planned(tiny_model, tasks_file, tmp_path, *flags)
    assert plan.skipped and plan.samples
    assert "scores" not in loop.run(plan, NoSignals())
    found = json.loads((tmp_path / "predictions.json").read_text())
    assert {sample["correct"] for samples in found.values() for sample in samples} == {None}


def test_rows_that_are_not_finite_are_said(
    tiny_model, tasks_file, tmp_path, fake_model, monkeypatch, caplog
):
    def spoilt(computation, *args):
        made = result(computation, *args)
        made.captures["resid_post.0"][0] = np.nan
        return made

    result = FakeComputation._result
    monkeypatch.setattr(FakeComputation, "_result", spoilt)
    flags = ["--max_output_tokens", 0]
    loop.run(planned(tiny_model, tasks_file, tmp_path, *flags), NoSignals())
    assert "8 rows hold a NaN or an infinity that the model itself made" in caplog.text


def test_a_process_that_computed_nothing_has_nothing_to_send(tmp_path):
    """Such as one more than wrote a run that is complete."""
    request = SimpleNamespace(output_path=tmp_path / "s.json", activations_dir=tmp_path)
    plan = SimpleNamespace(request=request)
    with RunFolder(tmp_path / "run", {}, {}, writer=Writer(1, 2)) as folder:
        assert folder.journal_path.exists()  # its lock
        assert conclude.last_files(plan, folder) == ([], [])
        for path in (folder.journal_path, folder.manifest_path):
            path.write_text("{}")
        sent = [folder.journal_path, folder.manifest_path]
        assert conclude.last_files(plan, folder) == (sent, [])


def test_shards_that_lie_on_another_disk_are_named(
    tiny_model, tasks_file, tmp_path, fake_model, caplog
):
    """Once the first process lists what all have written, and is started without them."""
    flags = ["--max_output_tokens", 0]
    loop.run(planned(tiny_model, tasks_file, tmp_path, *flags), NoSignals())
    path = tmp_path / "acts" / "metadata.json"
    manifest = json.loads(path.read_text())
    other = {**manifest["files"][0], "filename": "activations_host001_batch_000001.pkl"}
    manifest["files"].append({**other, "num_samples": 1, "samples": [["elsewhere", 0]]})
    path.write_text(json.dumps(manifest))
    again = planned(tiny_model, tasks_file, tmp_path, *flags, "--resume")
    assert loop.run(again, NoSignals()) is None
    assert "1 shards that the run lists are in none of these folders" in caplog.text


def test_one_goes_on_with_the_part_of_two(tiny_model, tasks_file, tmp_path, fake_model):
    """What it says in the end, and returns, is of all shards, those of the other process too."""
    paths = {"output_filepath": tmp_path / "submission.json", "activations_dir": tmp_path / "acts"}
    flags = {"model_path": tiny_model, "dataset_path": tasks_file, "max_output_tokens": 4, **paths}
    flags |= {"num_shards": 2, "extract_activations": True, "save_every_n_samples": 2}

    def computed(**more):
        argv = words({**flags, **more})
        request = Request.from_flags(distributed.build_parser().parse_args(argv))
        return loop.run(plan_run(request), NoSignals())

    whole = computed()
    for path in list((tmp_path / "acts").iterdir()):
        path.rename(path.with_name(path.name.replace("_host000", "_host001")))
    (tmp_path / "acts" / "metadata.json").unlink()
    other = tmp_path / "acts" / "metadata_host001.json"
    manifest = json.loads(other.read_text().replace("_host000", "_host001"))
    lost = manifest["files"].pop()
    other.write_text(json.dumps(manifest))
    (tmp_path / "acts" / lost["filename"]).unlink()
    found = computed(resume=True)
    for name in ("total_samples", "total_tokens", "total_batches"):
        assert found[name] == read_manifest(tmp_path / "acts")[name] == whole[name] > 1
    assert len(found["files"]) == whole["total_batches"]
