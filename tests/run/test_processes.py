"""Several processes of one run, and the end of one."""

import json
import os
import shutil
import signal
import time

import pytest
from conftest import NoSignals, words
from processes import (
    FLAGS,
    LONG,
    PRETENDED_PEER_TIMEOUT,
    assert_same,
    in_process,
    result_of,
    start,
)

import distributed_inference_with_activations as script
from utils.errors import UserError
from utils.plan.plan import plan_run
from utils.plan.request import Request
from utils.plan.samples import shard_of
from utils.run.loop import run
from utils.shards.manifest import read_answers, read_manifest


@pytest.mark.parametrize(
    ("count", "shape", "separate", "pretend"),
    [
        pytest.param(2, [2, 4], False, None, marks=pytest.mark.slow),
        (2, [2, 4], True, None),
        pytest.param(4, [1, 8], False, None, marks=pytest.mark.slow),
        pytest.param(4, [1, 8], True, None, marks=pytest.mark.slow),
        (4, [1, 8], True, 0),
    ],
    ids=["2 shared", "2 separate", "4 shared", "4 separate", "4 separate, pretended"],
)
def test_processes_store_each_sample_once(
    request, models, tasks, tmp_path, count, shape, separate, pretend
):
    reference = request.getfixturevalue("reference" if pretend is None else "pretended")
    folder = tmp_path / "run"
    devices, flags = 8 // count, {"mesh_shape": shape, "pretend": pretend}
    run = start(models["14-2"], tasks, folder, count, devices, separate, **flags)
    run.finish()
    parts = [f"acts{i}" for i in range(count)] if separate else ["acts"]
    manifest = json.loads((folder / parts[0] / "metadata.json").read_text())
    assert (manifest["status"], manifest["processes"]) == ("complete", count)
    assert manifest["total_samples"] == 29
    listed = [tuple(sample) for entry in manifest["files"] for sample in entry["samples"]]
    assert len(listed) == len(set(listed)) == 29
    assert manifest["useful_slots"]["prefill"] > 0.4
    assert len({entry["filename"].split("_batch")[0] for entry in manifest["files"]}) == count
    if separate:  # collected into one folder, they are one run
        for part in parts[1:]:
            for path in (folder / part).iterdir():
                shutil.copy(path, folder / parts[0])
    assert_same(result_of(folder, parts[0]), reference)
    assert len(read_answers(folder / parts[0])) == 29
    again = start(models["14-2"], tasks, folder, count, devices, separate, resume=True, **flags)
    again.finish()
    assert "nothing to do" in again.text(0)


@pytest.mark.parametrize(
    ("which", "sent", "pretend"),
    [
        (0, signal.SIGKILL, 1),
        (1, signal.SIGKILL, None),  # the devices of process 0 wait for those of process 1
        (0, signal.SIGTERM, 1),
        (1, signal.SIGTERM, 1),
    ],
    ids=["0 killed", "1 killed", "0 told to stop", "1 told to stop"],
)
def test_the_end_of_one_is_the_end_of_all(models, tasks, tmp_path, which, sent, pretend):
    """And another number of processes, on another mesh, does the rest: each sample once."""
    folder = tmp_path / "run"
    flags = {"mesh_shape": [1, 2], "pretend": pretend, **LONG}
    if pretend is None:  # long enough, and not so long that optimising it pays
        flags["max_output_tokens"] = 100
    run = start(models["14-2"], tasks, folder, 2, 1, **flags)
    run.wait_for(folder, "acts/*_batch_000002.pkl")
    run.processes[which].send_signal(sent)
    begin = time.monotonic()
    if sent == signal.SIGTERM:
        run.finish(143)
        assert time.monotonic() - begin < 20
        assert "stopped by SIGTERM; what was written is intact" in run.last_line(1 - which)
    elif which == 1:
        run.finish([1, -9])
        assert "process 1" in run.last_line(0) and "--resume" in run.last_line(0)
    else:
        run.finish([-9, 1])
        assert run.last_line(1).startswith("error: ") and "process 0, is gone" in run.last_line(1)
    assert time.monotonic() - begin < 30  # --peer_timeout is 10 at most
    stored = read_manifest(folder / "acts")["files"]
    before = [tuple(sample) for entry in stored for sample in entry["samples"]]
    assert 2 <= len(before) < 29
    flags |= {"mesh_shape": [2, 1], "pretend": 0, "resume": True}
    start(models["14-2"], tasks, folder, 1, 2, **flags).finish()
    after, submission = result_of(folder)
    assert len(after) == 29 and len(submission) == 25
    kept = {entry["filename"]: entry["crc32c"] for entry in read_manifest(folder / "acts")["files"]}
    assert all(kept[entry["filename"]] == entry["crc32c"] for entry in stored)


@pytest.mark.parametrize("which", [0, 1])
def test_a_frozen_process_that_wakes_writes_nothing(models, tasks, tmp_path, which):
    """The others have given it up, and may have been started again in the same folder."""
    folder = tmp_path / "run"
    run = start(models["14-2"], tasks, folder, 2, 1, pretend=1, mesh_shape=[2, 1], **LONG)
    run.wait_for(folder, "acts/*_batch_000002.pkl")
    time.sleep(0.3)  # into the next pass, of a second: not while a shard is being listed
    frozen, other = run.processes[which], run.processes[1 - which]
    frozen.send_signal(signal.SIGSTOP)
    begin = time.monotonic()
    assert other.wait(60) == 1, run.text(1 - which)
    assert run.last_line(1 - which).startswith("error: ")
    time.sleep(max(0, begin + PRETENDED_PEER_TIMEOUT + 2 - time.monotonic()))
    before = {p: p.read_bytes() for p in folder.glob("acts/*")}
    frozen.send_signal(signal.SIGCONT)
    run.finish(1, timeout=30)
    assert run.last_line(which).startswith("error: ") and "--resume" in run.last_line(which)
    assert {p: p.read_bytes() for p in folder.glob("acts/*")} == before


def test_separate_folders_are_resumed(models, tasks, tmp_path):
    folder = tmp_path / "run"
    flags = {"mesh_shape": [2, 1], "pretend": 1, **LONG}
    run = start(models["14-2"], tasks, folder, 2, 1, True, **flags)
    run.wait_for(folder, "acts1/*_batch_000002.pkl")
    run.processes[1].send_signal(signal.SIGINT)
    run.finish(130)
    flags |= {"mesh_shape": [1, 2], "pretend": 0, "resume": True}
    start(models["14-2"], tasks, folder, 2, 1, True, **flags).finish()
    manifest = json.loads((folder / "acts0" / "metadata.json").read_text())
    listed = [tuple(sample) for entry in manifest["files"] for sample in entry["samples"]]
    assert len(listed) == len(set(listed)) == 29
    own = [read_manifest(folder / "acts1")["files"], manifest["files"]]
    assert {entry["filename"] for entry in own[0]} < {entry["filename"] for entry in own[1]}


def test_shards_of_the_tasks_are_joined(models, tasks, tmp_path, pretended, fake_model):
    """Disjoint, complete, stable; the folders and the submissions become one."""
    from utils.shards import __main__ as merge

    def join(*parts, **flags):
        argv = ["merge", *map(str, parts), *words(flags)]
        return merge.main(merge.build_parser().parse_args(argv), NoSignals())

    shape = {"mesh_shape": [4, 2], "num_shards": 3}
    folders = [tmp_path / str(i) for i in range(3)]
    parts = [
        in_process(models["14-2"], tasks, folder, shard_id=i, **shape)
        for i, folder in enumerate(folders)
    ]
    assert sum(len(items) for items, _ in parts) == 29
    activations = [folder / "acts" for folder in folders]
    with pytest.raises(UserError, match="of 3 parts these are missing: 2"):
        join(*activations[:2], into=tmp_path / "all")
    with pytest.raises(UserError, match="are both part 1"):
        join(*activations[:2], activations[1].parent / ".." / "1" / "acts", into=tmp_path / "all")
    assert not (tmp_path / "all").exists()
    (tmp_path / "all").mkdir()
    joint = {"into": tmp_path / "all" / "acts", "output_filepath": tmp_path / "all/submission.json"}
    assert join(*activations, verify=True, **joint) == 0
    assert_same(result_of(tmp_path / "all"), pretended)
    merged = read_manifest(tmp_path / "all" / "acts")
    assert merged["dataset"]["tasks"] == 25
    kept = [read_manifest(folder)["train_pairs"]["kept"] for folder in activations]
    assert merged["train_pairs"]["kept"] == sum(kept) > max(kept)
    join(*(f / "submission.json" for f in folders), output_filepath=tmp_path / "again.json")
    assert json.loads((tmp_path / "again.json").read_text()) == pretended[1]
    with pytest.raises(UserError, match="is there already"):
        join(*activations, into=tmp_path / "all" / "acts")
    with pytest.raises(UserError, match="holds tasks that another holds too"):
        join(*(2 * [folders[0] / "submission.json"]), output_filepath=tmp_path / "twice.json")
    os.truncate(next(activations[2].glob("*.pkl")), 100)
    with pytest.raises(UserError, match="lacks shards, or holds parts of them"):
        join(*activations, into=tmp_path / "more")
    manifest = json.loads((activations[0] / "metadata.json").read_text())
    (activations[0] / "metadata.json").write_text(json.dumps({**manifest, "status": "running"}))
    with pytest.raises(UserError, match="is not complete: finish its run"):
        join(*activations, into=tmp_path / "more")


def test_a_task_stays_in_its_shard():
    """By its id alone: adding tasks, or reading them in another order, moves none."""
    names = [f"task{i}" for i in range(1000)]
    parts = [[name for name in names if shard_of(name, 4) == i] for i in range(4)]
    assert sum(map(len, parts)) == 1000 and min(map(len, parts)) > 200
    assert [shard_of(name, 4) for name in ("007bbfb7", "00d62c1b", "017c7c7b")] == [0, 0, 3]


def test_folders_that_changed_hands(models, tasks, tmp_path):
    """What two processes left in folders of their own: swapped, with a copy, whole again."""
    folder = tmp_path / "run"
    flags = {"mesh_shape": [2, 1], "pretend": 0, **LONG}
    run = start(models["14-2"], tasks, folder, 2, 1, True, **flags | {"pretend": 1})
    run.wait_for(folder, "acts*/*_batch_000002.pkl")
    run.processes[0].send_signal(signal.SIGTERM)
    run.finish(143)
    before = {p: p.read_bytes() for p in folder.glob("acts*/*")}

    swapped = {i: {"activations_dir": folder / f"acts{1 - i}"} for i in (0, 1)}
    run = start(models["14-2"], tasks, folder, 2, 1, True, each=swapped, resume=True, **flags)
    run.finish(2)
    assert "give each process the folder that it had" in run.last_line(0)

    alone = tmp_path / "alone"
    shutil.copytree(folder / "acts0", alone / "acts0")
    one = {"activations_dir": alone / "acts0", "mesh_shape": [1, 1]}
    start(models["14-2"], tasks, alone, 1, 1, resume=True, **flags | one).finish()
    shutil.copytree(folder / "acts1", alone / "acts1")  # the host comes back with its disk
    (alone / "submission.json").unlink()
    run = start(models["14-2"], tasks, alone, 2, 1, True, resume=True, **flags)
    run.finish([2, 2])
    assert "acts1" in run.last_line(0) and "both hold" in run.last_line(0)

    assert {p: p.read_bytes() for p in folder.glob("acts*/*")} == before
    start(models["14-2"], tasks, folder, 2, 1, True, resume=True, **flags).finish()
    manifest = json.loads((folder / "acts0" / "metadata.json").read_text())
    assert manifest["total_samples"] == 29 and manifest["status"] == "complete"
    submission = (folder / "submission.json").read_bytes()
    (folder / "submission.json").unlink()
    start(models["14-2"], tasks, folder, 2, 1, True, resume=True, **flags).finish()
    assert (folder / "submission.json").read_bytes() == submission


def test_the_manifest_speaks_of_the_last_start(models, tasks, tmp_path):
    """One process began, two went on."""
    folder = tmp_path / "run"
    flags = {"mesh_shape": [2, 1], "pretend": 1, **LONG}
    run = start(models["14-2"], tasks, folder, 1, 2, **flags)
    run.wait_for(folder, "acts/*_batch_000002.pkl")
    run.processes[0].send_signal(signal.SIGTERM)
    run.finish(143)
    earlier = read_manifest(folder / "acts")["seconds"]
    flags |= {"mesh_shape": [1, 2], "pretend": 0, "resume": True}
    start(models["14-2"], tasks, folder, 2, 1, **flags).finish()
    manifest = read_manifest(folder / "acts")
    assert (manifest["processes"], manifest["mesh_shape"]) == (2, [1, 2])
    assert manifest["arguments"]["resume"] and len(manifest["devices"]) == 2
    assert manifest["status"] == "complete" and manifest["total_samples"] == 29
    assert manifest["seconds"] > earlier


def test_views_over_two_processes(models, tasks, tmp_path, fake_model):
    """Each view of each test input once, one of the processes killed on the way."""
    flags = {"augmentations": 3, **LONG}
    expected = in_process(models["14-2"], tasks, tmp_path / "one", mesh_shape=[8, 1], **flags)
    folder = tmp_path / "run"
    flags |= {"mesh_shape": [2, 1], "pretend": 0}
    run = start(models["14-2"], tasks, folder, 2, 1, **flags | {"pretend": 1})
    run.wait_for(folder, "acts/*_batch_000002.pkl")
    run.processes[1].kill()
    run.finish([1, -9])
    start(models["14-2"], tasks, folder, 2, 1, resume=True, **flags).finish()
    assert_same(result_of(folder), expected)
    assert read_manifest(folder / "acts")["total_samples"] == 3 * 29 == len(expected[0])


def test_parts_of_different_tasks_are_not_joined(models, tasks, tmp_path, fake_model):
    from utils.shards import __main__ as merge

    for i, most in enumerate((12, 25)):
        in_process(
            *(models["14-2"], tasks, tmp_path / str(i)),
            **{"mesh_shape": [8, 1], "num_shards": 2, "shard_id": i, "max_tasks": most},
        )
    argv = ["merge", *(str(tmp_path / str(i) / "acts") for i in (0, 1)), "--into", "all"]
    with pytest.raises(UserError, match=r"is of another run than .* dataset\.whole_hash"):
        merge.main(merge.build_parser().parse_args(argv), NoSignals())


def test_the_dry_run_counts_the_shards_of_the_run(models, tasks, tmp_path):
    from utils.run.dry_run import plan_storage

    flags = {**FLAGS, "max_output_tokens": 0, "mesh_shape": [8, 1], "save_every_n_batches": 1}
    paths = {"output_filepath": tmp_path / "s.json", "activations_dir": tmp_path / "acts"}
    words_ = words({"model_path": models["14-2"], "dataset_path": tasks, **paths, **flags})
    plan = plan_run(Request.from_flags(script.build_parser().parse_args(words_)))
    tokens, shards = plan_storage(plan)
    manifest = run(plan, NoSignals())
    assert tokens == manifest["total_tokens"]
    written = [(entry["num_samples"], entry["size_bytes"]) for entry in manifest["files"]]
    assert shards == written and len(shards) == len(plan.batches) > 1
