"""Several processes of one run that is sent to a bucket."""

import json
import shutil
import signal
import time

import pytest
from processes import (
    LONG,
    assert_same,
    start,
)

from utils.shards import iter_items
from utils.shards.manifest import read_manifest

CLOUD = {"upload_to_cloud": True, "cloud_bucket": "gs://bucket/run"}


def assert_bucket_is_whole(gcs, folder, parts, reference, orphans=False):
    """One run under the prefix: every sample once, every shard made once, each file as on disk."""
    objects = gcs.objects("run/")
    files = {p.name: p.read_bytes() for part in parts for p in (folder / part).iterdir()}
    files["metadata.json"] = (folder / parts[0] / "metadata.json").read_bytes()
    files["submission.json"] = (folder / "submission.json").read_bytes()
    assert {name: objects[name] for name in files} == files
    manifest = read_manifest("gs://bucket/run")
    assert manifest["status"] == json.loads(objects["metadata.json"])["status"] == "complete"
    listed = [tuple(sample) for entry in manifest["files"] for sample in entry["samples"]]
    assert len(listed) == len(set(listed)) == 29
    names = {entry["filename"] for entry in manifest["files"]}
    shards = {name for name in objects if name.endswith(".pkl")}
    assert names <= shards if orphans else names == shards
    for entry in manifest["files"]:
        (made,) = gcs.generations(f"run/{entry['filename']}")
        assert made["crc32c"] == entry["crc32c"] == entry["uploaded"]["crc32c"]
    items = {(item["task_id"], item["sample_idx"]): item for item in iter_items("gs://bucket/run")}
    if reference:
        assert_same((items, json.loads(objects["submission.json"])), reference)


@pytest.mark.parametrize(
    ("count", "separate", "pretend"),
    [
        (2, True, 0),
        (2, False, None),
        pytest.param(4, True, 0, marks=pytest.mark.slow),
        (4, False, 0),
    ],
    ids=["2 separate", "2 shared, by the model", "4 separate", "4 shared"],
)
def test_processes_write_under_one_prefix(
    models, tasks, tmp_path, request, gcs, count, separate, pretend
):
    folder, devices = tmp_path / "run", 8 // count
    expected = request.getfixturevalue("reference" if pretend is None else "pretended")
    flags = {"mesh_shape": [count, devices], "pretend": pretend, **CLOUD}
    gcs.fault("lost", lambda r: r.kind == "multipart" and r.name.endswith("1.pkl"), times=count)
    start(models["14-2"], tasks, folder, count, devices, separate, **flags).finish()
    parts = [f"acts{i}" for i in range(count)] if separate else ["acts"]
    assert_bucket_is_whole(gcs, folder, parts, expected)
    again = start(*(models["14-2"], tasks, folder, count, devices, separate), resume=True, **flags)
    again.finish()
    assert "nothing to do" in again.text(0)
    other = start(models["14-2"], tasks, tmp_path / "other", count, devices, separate, **flags)
    other.finish(2)
    assert "gs://bucket/run holds a run (complete, 29 samples)" in other.last_line(0)
    assert_bucket_is_whole(gcs, folder, parts, expected)


@pytest.mark.parametrize("count", [1, 2])
def test_a_host_that_is_gone_with_its_disk(models, tasks, tmp_path, gcs, count):
    """What it had sent is in the bucket, and is not computed again."""
    folder = tmp_path / "run"
    flags = {"mesh_shape": [2, 1], "pretend": 1, **CLOUD, **LONG}
    gcs.fault("stall", lambda r: "host001_batch_00001" in r.name, times=10**6)  # it cannot end
    run = start(models["14-2"], tasks, folder, 2, 1, True, **flags)
    deadline = time.monotonic() + 120
    listed = []
    while len(listed) < 2:
        assert time.monotonic() < deadline, run.text(0)
        time.sleep(0.05)
        manifest = gcs.objects("run/").get("metadata_host001.json", b'{"files": []}')
        listed = json.loads(manifest)["files"]
    run.processes[1].kill()
    run.finish([1, -9])
    gcs.faults.clear()
    shutil.rmtree(folder / "acts1")
    listed = json.loads(gcs.objects("run/")["metadata_host001.json"])["files"]
    changed = {**flags, "mesh_shape": [count, 1], "pretend": 0, "resume": True}
    again = start(models["14-2"], tasks, folder, count, 1, True, **changed)
    again.finish()
    manifest = read_manifest("gs://bucket/run")
    kept = {entry["filename"]: entry["uploaded"] for entry in manifest["files"]}
    assert len(listed) >= 2
    assert all(kept[entry["filename"]] == entry["uploaded"] for entry in listed)
    parts = [f"acts{i}" for i in range(count)]
    # What it had sent a moment before its end is in no manifest, and is not replaced either.
    assert_bucket_is_whole(gcs, folder, parts, None, orphans=True)
    if len(gcs.objects("run/activations")) > len(manifest["files"]):
        assert "are in no manifest" in again.text(0)


@pytest.mark.parametrize("count", [1, 2])
def test_a_disk_lost_after_the_end(models, tasks, tmp_path, gcs, count):
    """The other host's manifest of all knows of its shards, but does not have them."""
    folder = tmp_path / "run"
    flags = {"mesh_shape": [2, 1], "pretend": 0, **CLOUD}
    start(models["14-2"], tasks, folder, 2, 1, True, **flags).finish()
    shutil.rmtree(folder / "acts1")
    before = {n: o for n, o in gcs.objects("run/").items() if n.endswith(".pkl")}
    flags |= {"mesh_shape": [count, 1], "resume": True}
    start(models["14-2"], tasks, folder, count, 1, True, **flags).finish()
    after = gcs.objects("run/")
    assert {n: o for n, o in after.items() if n.endswith(".pkl")} == before
    assert_bucket_is_whole(gcs, folder, [f"acts{i}" for i in range(count)], None)


def test_one_sends_what_two_left_and_its_disk_is_lost(models, tasks, tmp_path, gcs):
    folder = tmp_path / "run"
    start(models["14-2"], tasks, folder, 2, 1, pretend=0, mesh_shape=[2, 1]).finish()
    flags = {"mesh_shape": [1, 1], "pretend": 0, "resume": True, **CLOUD}
    start(models["14-2"], tasks, folder, 1, 1, **flags).finish()
    submission = (folder / "submission.json").read_bytes()
    shutil.rmtree(folder / "acts")
    (folder / "submission.json").unlink()
    start(models["14-2"], tasks, folder, 1, 1, **flags).finish()
    assert (folder / "submission.json").read_bytes() == submission
    assert_bucket_is_whole(gcs, folder, ["acts"], None)


def test_one_goes_on_after_two_and_its_disk_is_lost(models, tasks, tmp_path, gcs):
    folder = tmp_path / "run"

    def killed(count, name, **changed):
        flags = {"mesh_shape": [count, 1], "pretend": 1, **CLOUD, **LONG, **changed}
        run = start(models["14-2"], tasks, folder, count, 1, **flags)
        deadline = time.monotonic() + 120
        while len(listed(name)) < 2:
            assert time.monotonic() < deadline, run.text(0)
            time.sleep(0.05)
        for process in run.processes:
            process.kill()
            process.wait()

    def listed(name):
        found = json.loads(gcs.objects("run/").get(name, b'{"files": []}'))["files"]
        owner = name.removeprefix("metadata").removesuffix(".json")
        prefix = f"activations{owner}_batch"
        return [entry["filename"] for entry in found if entry["filename"].startswith(prefix)]

    killed(2, "metadata_host001.json")
    killed(1, "metadata.json", resume=True)
    before = {entry["filename"] for entry in read_manifest("gs://bucket/run")["files"]}
    shutil.rmtree(folder / "acts")
    flags = {"mesh_shape": [1, 1], "pretend": 0, "resume": True, **CLOUD, **LONG}
    start(models["14-2"], tasks, folder, 1, 1, **flags).finish()
    after = {entry["filename"] for entry in read_manifest("gs://bucket/run")["files"]}
    assert before <= after
    assert_bucket_is_whole(gcs, folder, ["acts"], None, orphans=True)


def test_told_to_stop_while_all_wait_for_the_network(models, tasks, tmp_path, gcs):
    folder = tmp_path / "run"
    gcs.fault("stall", lambda r: r.name.endswith(".pkl"), times=10**6)
    run = start(models["14-2"], tasks, folder, 2, 1, pretend=0, mesh_shape=[2, 1], **CLOUD)
    deadline = time.monotonic() + 120
    while not all("uploading" in run.text(i) for i in (0, 1)):
        assert time.monotonic() < deadline
        time.sleep(0.1)
    begin = time.monotonic()
    run.processes[1].send_signal(signal.SIGTERM)
    run.finish(143)
    assert time.monotonic() - begin < 40  # the one that was told within 20, the other after it


def test_runs_of_one_and_of_two_that_start_at_once(models, tasks, tmp_path, gcs):
    """One of them ends before it computes."""
    flags = {"pretend": 0.3, **CLOUD}
    runs = [
        start(models["14-2"], tasks, tmp_path / str(n), n, 1, mesh_shape=[n, 1], **flags)
        for n in (1, 2)
    ]
    codes = [{p.wait(200) for p in run.processes} for run in runs]
    assert sorted(map(max, codes)) in ([0, 1], [0, 2]), [run.text(0) for run in runs]
    won = codes.index({0})
    assert not list((tmp_path / str(2 - won)).glob("acts/*.pkl"))
    assert_bucket_is_whole(gcs, tmp_path / str(won + 1), ["acts"], None)


def test_what_one_process_cannot_send(models, tasks, tmp_path, gcs):
    folder = tmp_path / "run"
    flags = {"mesh_shape": [2, 1], "pretend": 0, **CLOUD, "upload_timeout": 3}
    gcs.fault(503, lambda r: r.name.endswith("host001_batch_000001.pkl"), times=10**6)
    run = start(models["14-2"], tasks, folder, 2, 1, **flags)
    run.finish([1, 1])
    assert "could not be uploaded to gs://bucket/run within 3 s" in run.last_line(1)
    assert "process 1" in run.last_line(0) and "could not be uploaded" in run.last_line(0)
    assert json.loads((folder / "acts" / "metadata.json").read_text())["status"] == "complete"
    assert json.loads(gcs.objects("run/")["metadata.json"])["status"] == "running"
    gcs.faults.clear()
    start(models["14-2"], tasks, folder, 2, 1, resume=True, **flags).finish()
    assert_bucket_is_whole(gcs, folder, ["acts"], None)
