"""A run and its bucket: what arrives, in which order, and what is left when something fails."""

import json
import logging
import random
import shutil
import signal
import threading
import time
from pathlib import Path

import numpy as np
import pytest
from conftest import NoSignals, random_task, words
from forks import Script
from shard_crashes import item

import simple_extraction_inference as script
from utils.errors import UserError
from utils.plan.plan import plan_run
from utils.plan.request import Request
from utils.run import dry_run as storage
from utils.run.loop import run
from utils.shards import iter_items, load_shard, uploads
from utils.shards.manifest import read_manifest
from utils.shards.writer import RunFolder
from utils.store import bucket as cloud
from utils.store import errors

# Runs of this process store numbers that no model made; those of child processes are real.
pytestmark = pytest.mark.usefixtures("fake_model")
PREFIX = "some prefix/ü"
SHARD = "activations_batch_00000{}.pkl"


@pytest.fixture(scope="module")
def tasks(tmp_path_factory):
    """25 tasks, 29 test inputs."""
    rng = random.Random(1)
    made = {f"t{i:02}": random_task(rng, 1 + i % 3, 2 if i % 7 == 3 else 1) for i in range(25)}
    path = tmp_path_factory.mktemp("tasks") / "arc_format_train.json"
    path.write_text(json.dumps({name: task for name, (task, _) in made.items()}))
    return path


@pytest.fixture
def flags(tiny_model, tasks_file, tmp_path):
    """Of a run of eight samples in four small shards."""
    return {
        "model_path": tiny_model,
        "dataset_path": tasks_file,
        "output_path": tmp_path / "predictions.json",
        "activations_dir": tmp_path / "activations",
        "save_every_n_samples": 2,
        "max_output_tokens": 8,
        "upload_to_cloud": True,
        "cloud_bucket": f"gs://bucket/{PREFIX}/",
    }


def request_of(flags) -> Request:
    return Request.from_flags(script.build_parser().parse_args(words(flags)))


@pytest.fixture
def shell(in_shell, caplog):
    """Runs the script in this process; gives exit code and last line of stderr."""
    caplog.set_level(logging.INFO)

    def call(flags):
        caplog.clear()
        code, out, err = in_shell(script, words(flags))
        call.out, call.err = out, err + caplog.text
        lines = err.replace("\r", "\n").strip().splitlines() or [""]
        return code, lines[-1]

    return call


def start(flags, gcs, module=script, env=None):
    env = {"STORAGE_EMULATOR_HOST": gcs.url, **(env or {})}
    return Script(f"{module.__name__}.py", *words(flags), env=env)


def there(gcs, prefix=PREFIX) -> dict[str, bytes]:
    return gcs.objects(f"{prefix}/")


def assert_bucket_is_whole(gcs, flags, shards=4):
    """Every file of the run, byte for byte; each shard made once."""
    folder, objects = flags["activations_dir"], there(gcs)
    files = {path.name: path.read_bytes() for path in folder.iterdir()}
    files[flags["output_path"].name] = flags["output_path"].read_bytes()
    assert objects == files
    manifest = json.loads(objects["metadata.json"])
    assert manifest["status"] == "complete" and manifest["total_batches"] == shards
    for entry in manifest["files"]:
        (made,) = gcs.generations(f"{PREFIX}/{entry['filename']}")
        assert entry["uploaded"] == {
            "uri": f"gs://bucket/{PREFIX}/{entry['filename']}",
            "size": entry["size_bytes"],
            "crc32c": entry["crc32c"],
            "generation": int(made["generation"]),
        }
        assert made["crc32c"] == entry["crc32c"]


def assert_manifests_are_true(gcs, prefix=PREFIX):
    """What a manifest in the bucket lists is there, and so are its answers."""
    objects = there(gcs, prefix)
    for name, content in objects.items():
        if not name.startswith("metadata"):
            continue
        for entry in json.loads(content)["files"]:
            assert len(objects[entry["filename"]]) == entry["size_bytes"]
            host = entry["filename"].removeprefix("activations").partition("_batch")[0]
            answers = objects[f"answers{host}.jsonl"].decode()
            assert all(f'"task_id": "{task}"' in answers for task, _ in entry["samples"])


def sent(gcs, pattern="activations") -> list[str]:
    """Names of the objects that were begun to be sent, in order."""
    kinds = ("multipart", "start")
    names = [r.name.rpartition("/")[2] for r in gcs.requests if r.kind in kinds]
    return [name for name in names if name.startswith(pattern)]


# ------------------------------------------------------------------------------------- what arrives


def test_the_bucket_holds_the_run(gcs, flags, shell):
    code, _ = shell(flags)
    assert code == 0
    assert f"uploaded      gs://bucket/{PREFIX}" in shell.out
    assert_bucket_is_whole(gcs, flags)
    order = [r.name.rpartition("/")[2] for r in gcs.requests if r.kind in ("multipart", "start")]
    assert order[0].startswith(".arc-probe-") and order[1] == "metadata.json"
    assert order[-2:] == ["predictions.json", "metadata.json"]
    assert shell({**flags, "resume": True})[0] == 0
    assert "nothing to do" in shell.err
    assert_bucket_is_whole(gcs, flags)


def test_shards_are_sent_while_the_model_computes(gcs, flags, monkeypatch):
    """And what the manifest in the bucket lists is there, whenever one looks."""
    looks = []
    original = uploads.BucketUploads.wait_for_room

    def wait_for_room(self, check):
        time.sleep(0.3)
        assert_manifests_are_true(gcs)
        looks.append(len([name for name in there(gcs) if name.startswith("activations")]))
        original(self, check)

    monkeypatch.setattr(uploads.BucketUploads, "wait_for_room", wait_for_room)
    run(plan_run(request_of(flags)), NoSignals())
    assert 0 < looks[4] < 4
    assert_bucket_is_whole(gcs, flags)


def test_no_object_is_written_twice_within_a_second(gcs, flags, monkeypatch):
    """The last manifest, too, comes no sooner after the one before it."""
    monkeypatch.setattr(uploads, "MANIFEST_SECONDS", 0.4)
    written, put = [], cloud.BucketFolder.put

    def noted(self, source, name, *args, **options):
        written.append((name, time.monotonic()))
        return put(self, source, name, *args, **options)

    def wait_for_room(self, check):
        time.sleep(0.1)
        original(self, check)

    original = uploads.BucketUploads.wait_for_room
    monkeypatch.setattr(cloud.BucketFolder, "put", noted)
    monkeypatch.setattr(uploads.BucketUploads, "wait_for_room", wait_for_room)
    run(plan_run(request_of(flags)), NoSignals())
    for kind in ("metadata.json", "answers.jsonl"):
        times = [at for name, at in written if name == kind]
        assert len(times) >= 2 and np.diff(times).min() > 0.4, times
    assert_bucket_is_whole(gcs, flags)


def test_large_shards(gcs, flags, tasks, four_layers, shell):
    """Above 8 MiB a shard is sent in chunks; here several at once, on a bad day."""
    flags |= {
        "model_path": four_layers,
        "dataset_path": tasks,
        "layers_to_extract": "all",
        "hook_points": ["resid_pre", "resid_mid", "resid_post", "attn_out", "mlp_out"],
        "activation_dtype": "float32",
        "save_every_n_samples": 9,
        "max_output_tokens": 1,
    }
    chunk, last = lambda r: r.kind == "chunk" and not r.last, lambda r: r.kind == "chunk" and r.last
    faults = [
        *(gcs.fault(status, times=3) for status in (503, 429)),
        gcs.fault("midway", times=2),
        gcs.fault("short", chunk),
        gcs.fault("vanish", chunk),
        gcs.fault("lost", last),
    ]
    code, line = shell(flags)
    assert code == 0, line
    assert all(fault.times == 0 for fault in faults)
    assert_bucket_is_whole(gcs, flags)
    sizes = [entry["size_bytes"] for entry in read_manifest(flags["activations_dir"])["files"]]
    assert sum(size > 8 << 20 for size in sizes) >= 3


FAULTS = {
    "503 and 429": [(503, 4), (429, 3)],
    "resets": [("reset", 4)],
    "resets midway": [("midway", 3)],
    "lost replies": [("lost", 5)],
}


@pytest.mark.parametrize("kind", FAULTS)
def test_a_run_on_a_bad_network(gcs, flags, kind, monkeypatch):
    plan = plan_run(request_of(flags))
    faults = [gcs.fault(action, times=times) for action, times in FAULTS[kind]]
    run(plan, NoSignals())
    assert all(fault.times == 0 for fault in faults), faults
    assert_bucket_is_whole(gcs, flags)


def test_a_run_on_a_network_that_stalls(gcs, flags, monkeypatch):
    monkeypatch.setattr(cloud, "REQUEST_SECONDS", 1)
    plan = plan_run(request_of(flags))
    fault = gcs.fault("stall", lambda r: r.name.endswith(".pkl"), times=3)
    run(plan, NoSignals())
    assert fault.times == 0
    assert_bucket_is_whole(gcs, flags)


def test_without_extraction_the_results_go_up(gcs, flags, shell):
    del flags["activations_dir"]
    assert shell({**flags, "no_extraction": True})[0] == 0
    objects = there(gcs)
    assert set(objects) == {"metadata.json", "predictions.json"}
    assert objects["predictions.json"] == flags["output_path"].read_bytes()
    kept = Path(f"{flags['output_path']}.run") / "metadata.json"
    assert objects["metadata.json"] == kept.read_bytes()
    assert shell({**flags, "no_extraction": True, "resume": True})[0] == 0
    assert "nothing to do" in shell.err


# ------------------------------------------------------------------------ what does not, and resume


def test_an_endless_503(gcs, flags, shell):
    lost = gcs.fault(503, lambda r: r.name.endswith("2.pkl"), times=10**6)
    process = start(flags, gcs)  # of its own, so that none of its threads lives on
    message = process.communicate()[1].strip().splitlines()[-1]
    assert process.returncode == 1 and message.startswith("error: ")
    assert "1 shard (0.000 GB)" in message and "503 a fault to order" in message
    assert SHARD.format(2) in message and "--resume" in message
    assert lost.seen
    before = {path.name: path.read_bytes() for path in flags["activations_dir"].iterdir()}
    manifest = json.loads(before["metadata.json"])
    assert [bool(entry["uploaded"]) for entry in manifest["files"]] == [True, False, True, True]
    assert_manifests_are_true(gcs)
    assert json.loads(there(gcs)["metadata.json"])["status"] == "running"
    gcs.faults.clear()
    gcs.requests.clear()
    code, line = shell({**flags, "resume": True, "upload_timeout": 600})
    assert code == 0, line
    assert sent(gcs) == [SHARD.format(2)]
    assert_bucket_is_whole(gcs, flags)
    now = json.loads((flags["activations_dir"] / "metadata.json").read_text())
    assert now["seconds"] == manifest["seconds"], "it computed something again"


@pytest.fixture(autouse=True)
def short_of_time(request, flags):
    if "endless" in request.node.name or "damaged" in request.node.name:
        flags["upload_timeout"] = 3


def test_the_deadline_is_an_exit_code_and_a_line(gcs, flags, shell):
    gcs.fault(503, lambda r: "activations" in r.name, times=10**6)
    code, line = shell({**flags, "upload_timeout": 2})
    assert code == 1
    assert line.startswith("error: 4 shards (0.001 GB) could not be uploaded to gs://bucket/")
    assert shell.err.count("error: ") == 1


def test_a_shard_damaged_on_disk_becomes_no_object(gcs, flags, shell, monkeypatch):
    path, submit = flags["activations_dir"] / SHARD.format(2), uploads.BucketUploads._submit

    def damage(self, shard):
        if shard.filename == path.name:
            content = bytearray(path.read_bytes())
            content[1000] ^= 1
            path.write_bytes(content)
        submit(self, shard)

    monkeypatch.setattr(uploads.BucketUploads, "_submit", damage)
    code, line = shell(flags)
    assert code == 1
    assert f"{path} is damaged: its crc32c is" in line and "it was not uploaded" in line
    assert "--resume computes its samples again" in line
    assert path.name not in there(gcs)
    assert any(r.name.endswith("2.pkl") and r.kind == "multipart" for r in gcs.requests)
    assert shell({**flags, "resume": True})[0] == 0
    assert path.name not in there(gcs)
    assert_bucket_is_whole(gcs, flags)


@pytest.mark.parametrize("moment", ["shard", "between", "manifest", "last"])
def test_kill_while_uploading(gcs, flags, shell, moment):
    """Nothing twice, nothing missing: before a shard is there, after, and before the last file."""
    when = {
        "shard": lambda r: r.name.endswith("3.pkl"),
        "between": lambda r: r.name.endswith("answers.jsonl"),
        "manifest": lambda r: r.name.endswith("metadata.json") and "000001" in "".join(sent(gcs)),
        "last": lambda r: r.name.endswith("predictions.json") and r.kind == "multipart",
    }[moment]
    fault = gcs.fault("stall", when, times=10**6)
    process = start(flags, gcs)
    deadline = time.monotonic() + 100
    while not fault.seen:
        assert time.monotonic() < deadline and process.poll() is None, process.stderr.read()
        time.sleep(0.02)
    time.sleep(0.3)
    process.kill()
    process.communicate()
    gcs.recover()
    assert_manifests_are_true(gcs)
    code, line = shell({**flags, "resume": True})
    assert code == 0, line
    assert_bucket_is_whole(gcs, flags)


def test_sigterm_with_a_server_that_stalls(gcs, flags, shell):
    flags |= {"save_every_n_samples": 1, "max_output_tokens": 200}
    fault = gcs.fault("stall", lambda r: r.name.endswith(".pkl"), times=10**6)
    process = start(flags, gcs)
    while not fault.seen:
        assert process.poll() is None, process.stderr.read()
        time.sleep(0.02)
    begin = time.monotonic()
    process.send_signal(signal.SIGTERM)
    _, err = process.communicate(timeout=60)
    assert time.monotonic() - begin < 20
    assert process.returncode == 143
    assert "on this disk, and not yet in gs://bucket" in err
    gcs.recover()
    assert_manifests_are_true(gcs)
    assert shell({**flags, "resume": True})[0] == 0
    assert_bucket_is_whole(gcs, flags, shards=8)


def test_permission_lost_in_the_middle_ends_the_run(gcs, flags):
    plan = plan_run(request_of(flags))
    gcs.fault(403, lambda r: r.name.endswith("2.pkl"), times=10**6)
    with pytest.raises(UserError, match=r"no permission to write to .*objectUser") as error:
        run(plan, NoSignals())
    assert error.value.exit_code == 1


# --------------------------------------------------------------------------- a machine that is gone


def test_a_run_goes_on_from_the_bucket_alone(gcs, flags, shell, tmp_path):
    """The disk was lost with the machine, in the middle of the run."""
    gcs.fault("stall", lambda r: r.name.endswith("3.pkl"), times=10**6)
    process = start({**flags, "max_output_tokens": 8}, gcs)
    while not any(b'"total_batches": 2' in c or b'"total_batches": 3' in c
                  for n, c in there(gcs).items() if n == "metadata.json"):  # fmt: skip
        assert process.poll() is None, process.stderr.read()
        time.sleep(0.05)
    process.kill()
    process.communicate()
    gcs.recover()
    shutil.rmtree(flags["activations_dir"])
    flags["output_path"].unlink(missing_ok=True)
    listed = json.loads(there(gcs)["metadata.json"])["files"]
    code, line = shell({**flags, "resume": True})
    assert code == 0, line
    manifest = read_manifest(f"gs://bucket/{PREFIX}")
    samples = [tuple(sample) for entry in manifest["files"] for sample in entry["samples"]]
    assert len(samples) == len(set(samples)) == 8
    assert manifest["files"][: len(listed)] == listed
    local = {path.name for path in flags["activations_dir"].iterdir()}
    assert not local & {entry["filename"] for entry in listed}
    items = list(iter_items(flags["activations_dir"]))  # those of before, from the bucket
    assert [(item["task_id"], item["sample_idx"]) for item in items] == samples
    predictions = json.loads(flags["output_path"].read_text())
    assert all(s["attempts"] for sample in predictions.values() for s in sample)


def test_a_complete_run_comes_back_from_the_bucket(gcs, flags, shell):
    assert shell(flags)[0] == 0
    predictions = flags["output_path"].read_bytes()
    shutil.rmtree(flags["activations_dir"])
    flags["output_path"].unlink()
    gcs.requests.clear()
    assert shell({**flags, "resume": True})[0] == 0
    assert flags["output_path"].read_bytes() == predictions
    assert sent(gcs) == []


def test_shards_are_deleted_once_they_are_there(gcs, flags, shell):
    code, line = shell({**flags, "delete_after_upload": True})
    assert code == 0, line
    folder = flags["activations_dir"]
    assert sorted(path.name for path in folder.iterdir()) == ["answers.jsonl", "metadata.json"]
    objects = there(gcs)
    assert objects["metadata.json"] == (folder / "metadata.json").read_bytes()
    assert len([name for name in objects if name.endswith(".pkl")]) == 4
    assert len(list(iter_items(folder))) == len(list(iter_items(f"gs://bucket/{PREFIX}"))) == 8
    assert shell({**flags, "resume": True, "delete_after_upload": True})[0] == 0
    assert "nothing to do" in shell.err


def test_shards_that_were_sent_before_are_deleted_too(gcs, flags, shell):
    gcs.fault(503, lambda r: r.name.endswith("4.pkl"), times=10**6)
    assert shell({**flags, "upload_timeout": 2})[0] == 1
    gcs.faults.clear()
    assert len(list(flags["activations_dir"].glob("*.pkl"))) == 4
    assert shell({**flags, "resume": True, "delete_after_upload": True})[0] == 0
    assert list(flags["activations_dir"].glob("*.pkl")) == []
    assert len([name for name in there(gcs) if name.endswith(".pkl")]) == 4


def test_a_shard_is_kept_that_the_bucket_does_not_hold(gcs, flags, shell, monkeypatch):
    original = cloud.BucketFolder.check_holds

    def check_holds(self, name, size, crc32c):
        if name == SHARD.format(3):
            gcs.storage.objects["bucket"].pop(f"{PREFIX}/{name}")
        original(self, name, size, crc32c)

    monkeypatch.setattr(cloud.BucketFolder, "check_holds", check_holds)
    shell({**flags, "delete_after_upload": True})
    assert [p.name for p in flags["activations_dir"].glob("*.pkl")] == [SHARD.format(3)]
    assert "is kept" in shell.err
    monkeypatch.setattr(cloud.BucketFolder, "check_holds", original)
    assert shell({**flags, "resume": True})[0] == 0
    assert SHARD.format(3) in there(gcs)


def test_deleting_is_made_up_for(gcs, flags, shell):
    """Whole in the bucket, whole on the disk: the flag, added later, still frees the disk."""
    assert shell(flags)[0] == 0
    gcs.latency = 0.05
    assert shell({**flags, "resume": True, "delete_after_upload": True})[0] == 0
    assert list(flags["activations_dir"].glob("*.pkl")) == []
    assert len(list(iter_items(flags["activations_dir"]))) == 8


def test_a_foreign_output_is_not_replaced(gcs, flags, shell):
    gcs.store(f"{PREFIX}/predictions.json", b"of somebody else")
    for changed in ({}, {"resume": True}):
        code, line = shell({**flags, **changed})
        assert code == 2 and "holds predictions.json already" in line
    assert there(gcs) == {"predictions.json": b"of somebody else"}


def test_what_was_deleted_by_hand_is_put_back(gcs, flags, shell):
    """A manifest, and a shard that is on the disk still."""
    assert shell(flags)[0] == 0
    for name in ("metadata.json", SHARD.format(2)):
        del gcs.storage.objects["bucket"][f"{PREFIX}/{name}"]
        gcs.storage.history.pop(f"{PREFIX}/{name}")
        assert shell({**flags, "resume": True})[0] == 0
        assert "computed again" not in shell.err
        assert_bucket_is_whole(gcs, flags)


def test_progress_within_a_shard_counts(gcs, flags, four_layers, monkeypatch):
    """A slow network is not a dead one."""
    monkeypatch.setattr(cloud, "CHUNK_BYTES", 1 << 18)
    monkeypatch.setattr("google.cloud.storage.blob._MAX_MULTIPART_SIZE", 1 << 16)
    flags |= {"activation_dtype": "float32", "layers_to_extract": "all", "upload_timeout": 2}
    flags |= {"model_path": four_layers}
    plan = plan_run(request_of(flags))
    object.__setattr__(plan.request, "max_pending_gb", 0.0001)
    gcs.latency = 0.75
    try:
        run(plan, NoSignals())
    except UserError as error:  # at the end, where the deadline is, but not in between
        assert "could not be uploaded" in str(error)
    assert len(read_manifest(flags["activations_dir"])["files"]) == 4


def test_what_is_nowhere_any_more_is_computed_again(gcs, flags, shell):
    assert shell({**flags, "delete_after_upload": True})[0] == 0
    gcs.storage.objects["bucket"].pop(f"{PREFIX}/{SHARD.format(2)}")
    code, line = shell({**flags, "resume": True, "cloud_bucket": "gs://bucket/other"})
    assert code == 2 and f"it was sent to gs://bucket/{PREFIX}/" in line
    assert shell({**flags, "resume": True})[0] == 0
    assert f"computed again: {SHARD.format(2)}" in shell.err
    listed = [entry["filename"] for entry in read_manifest(f"gs://bucket/{PREFIX}")["files"]]
    assert listed == [SHARD.format(number) for number in (1, 3, 4, 5)]
    assert len({i["task_id"] for i in iter_items(f"gs://bucket/{PREFIX}")}) == 7


def test_a_lost_journal_comes_back_from_the_bucket(gcs, flags, shell):
    assert shell(flags)[0] == 0
    journal = flags["activations_dir"] / "answers.jsonl"
    answers = journal.read_bytes()
    flags["output_path"].unlink()  # so that there is something to do
    for content in (b"", answers[:100]):
        journal.write_bytes(content)
        assert shell({**flags, "resume": True})[0] == 0
        assert "computed again" not in shell.err and journal.read_bytes() == answers
        assert_bucket_is_whole(gcs, flags)


def test_fewer_answers_replace_no_journal(gcs, tmp_path):
    gcs.store(f"{PREFIX}/answers.jsonl", b"{}\n" * 9)
    bucket = cloud.BucketFolder(f"gs://bucket/{PREFIX}")
    with RunFolder(tmp_path, {}, {}) as folder:
        folder.clear()
        folder.begin()
        limits = {"max_pending_bytes": 1, "timeout": 1}
        sending = uploads.BucketUploads(bucket, folder, {}, bucket.listing(), **limits)
        with pytest.raises(UserError, match="holds fewer answers than gs://bucket/"):
            sending._put(folder.journal_path)
    assert there(gcs) == {"answers.jsonl": b"{}\n" * 9}


def test_a_run_that_was_kept_here_is_sent_later(gcs, flags, shell):
    alone = {k: v for k, v in flags.items() if k not in ("upload_to_cloud", "cloud_bucket")}
    assert shell(alone)[0] == 0
    assert there(gcs) == {}
    assert shell({**flags, "resume": True})[0] == 0
    assert_bucket_is_whole(gcs, flags)


# ------------------------------------------------------------------------------ other people's runs


def test_a_second_run_on_one_prefix_is_refused(gcs, flags, shell, tmp_path):
    assert shell(flags)[0] == 0
    before = there(gcs)
    other = {**flags, "activations_dir": tmp_path / "b", "output_path": tmp_path / "b.json"}
    for changed in ({}, {"overwrite": True}):
        code, line = shell({**other, **changed})
        assert code == 2
        assert "holds a run (complete, 8 samples): --resume continues a run" in line
        assert "choose another prefix" in line and "gcloud storage rm" not in line
    code, line = shell({**other, "resume": True, "max_output_tokens": 9})
    assert code == 2 and "holds another run: generation.max_output_tokens was 8, is 9" in line
    assert not (tmp_path / "b").exists()
    assert there(gcs) == before


@pytest.mark.parametrize("alike", [True, False])
def test_two_runs_that_start_at_once(gcs, flags, tmp_path, alike):
    """Both saw an empty bucket; equal or not, one of them ends before it computes."""
    other = {**flags, "activations_dir": tmp_path / "b", "output_path": tmp_path / "b.json"}
    if not alike:
        other["max_output_tokens"] = 9
    first, second = plan_run(request_of(flags)), plan_run(request_of(other))
    run(first, NoSignals())
    before = there(gcs)
    with pytest.raises(UserError, match="another run writes under this prefix"):
        run(second, NoSignals())
    assert not list((tmp_path / "b").glob("*.pkl"))
    assert there(gcs) == before


def test_a_run_that_is_overtaken_ends_loudly(gcs, flags, monkeypatch):
    """Somebody else's object has the name of a shard."""
    plan = plan_run(request_of(flags))
    cloud.BucketFolder(flags["cloud_bucket"]).put(
        b"other", SHARD.format(2), 5, uploads_crc(b"other"), stopping=threading.Event()
    )
    with pytest.raises(UserError, match="another run writes under this prefix") as error:
        run(plan, NoSignals())
    assert error.value.exit_code == 1
    assert str(flags["activations_dir"] / SHARD.format(2)) in str(error.value)
    assert there(gcs)[SHARD.format(2)] == b"other"


def uploads_crc(content: bytes) -> str:
    import io

    from utils.store.local import checksum

    return checksum(io.BytesIO(content))


def test_a_folder_that_is_not_the_buckets(gcs, flags, shell, tmp_path):
    """The same settings, so the same names, but shards of other samples."""
    assert shell({**flags, "save_every_n_samples": 3})[0] == 0
    other = {**flags, "activations_dir": tmp_path / "b", "output_path": tmp_path / "b.json"}
    alone = {k: v for k, v in other.items() if k not in ("upload_to_cloud", "cloud_bucket")}
    assert shell(alone)[0] == 0
    before = there(gcs)
    code, line = shell({**other, "resume": True})
    assert code == 2 and "does not know, or knows otherwise" in line
    assert there(gcs) == before


# ------------------------------------------------------------------------------------ back-pressure


def test_computing_waits_for_the_network(gcs, flags, caplog):
    flags |= {"save_every_n_samples": 1, "max_pending_gb": 0.001}
    flags |= {"activation_dtype": "float32", "layers_to_extract": "all"}
    plan = plan_run(request_of(flags))
    object.__setattr__(plan.request, "max_pending_gb", 0.0003)
    gcs.latency = 0.2
    caplog.set_level(logging.INFO)
    run(plan, NoSignals())
    assert "computing waits for the network" in caplog.text
    assert_bucket_is_whole(gcs, flags, shards=8)


def test_waiting_ends_with_the_deadline(gcs, flags):
    flags |= {"save_every_n_samples": 1, "upload_timeout": 2}
    plan = plan_run(request_of(flags))
    object.__setattr__(plan.request, "max_pending_gb", 0.0003)
    gcs.fault(503, lambda r: r.name.endswith(".pkl"), times=10**6)
    with pytest.raises(UserError, match=r"nothing could be uploaded .* for 2 s") as error:
        run(plan, NoSignals())
    assert "503" in str(error.value) and "--resume" in str(error.value)
    stored = len(read_manifest(flags["activations_dir"])["files"])
    assert 2 <= stored < 8


def test_what_is_sent_again_and_again_is_no_progress(gcs, flags, monkeypatch):
    """A server that refuses every attempt for longer than the deadline ends the run, however often
    the same file is read for it."""
    monkeypatch.setattr(cloud, "MAX_PAUSE_SECONDS", 0.2)
    monkeypatch.setattr(cloud, "retry", lambda seconds, *tell: errors.retry(0.2, *tell))
    flags |= {"save_every_n_samples": 1, "upload_timeout": 2}
    plan = plan_run(request_of(flags))
    object.__setattr__(plan.request, "max_pending_gb", 0.0003)
    fault = gcs.fault(503, lambda r: r.name.endswith(".pkl"), times=150)
    with pytest.raises(UserError, match=r"nothing could be uploaded .* for 2 s"):
        run(plan, NoSignals())
    assert fault.seen


def test_room_is_made_before_the_next_manifest_is_due(gcs, tmp_path, monkeypatch):
    """With deletion a shard takes room until a manifest lists it: nobody waits a minute for that,
    nor takes it for a network that stands still."""
    monkeypatch.setattr(uploads, "MANIFEST_SHARE", 1e-6)
    monkeypatch.setattr(uploads, "MANIFEST_SECONDS", 0.1)
    bucket = cloud.BucketFolder(f"gs://bucket/{PREFIX}")
    limits = {"max_pending_bytes": 1, "timeout": 1, "delete_after_upload": True}
    with RunFolder(tmp_path / "run", {}, {}, save_every_n_samples=1) as folder:
        folder.clear()
        folder.begin()
        sending = uploads.BucketUploads(bucket, folder, {}, {}, **limits)
        sending.start()
        for index in range(3):
            key = {"task_id": f"task{index // 2}", "sample_idx": index % 2}
            folder.add(item(index, tokens=5, width=4), key)
            sending.wait_for_room(lambda: None)
            assert not list((tmp_path / "run").glob("*.pkl"))
        assert sending.waited > 0 and not sending._hurry.is_set()
        last = tmp_path / "predictions.json"
        last.write_text("{}")
        sending.send(lambda: None, last)  # for which there are seconds, though the deadline is over
        assert there(gcs)[last.name] == b"{}"
        sending.stop(0)
    manifests = [r for r in gcs.requests if r.kind == "multipart" and "metadata" in r.name]
    assert len(manifests) == 4


def test_a_disk_that_will_fill(monkeypatch, caplog, tmp_path):
    free = iter([1000, 900, 800])
    monkeypatch.setattr(storage, "free_bytes", lambda folder: next(free) * 10**6)
    monkeypatch.setattr(storage, "LOOK_SECONDS", 0)
    outlook = storage.DiskOutlook(tmp_path)
    outlook.look(10, 100)  # 10 MB a row: 900 MB for 90 more, just enough
    assert caplog.text == ""
    outlook.look(15, 100)  # 13.3 MB a row: 1133 MB for 85 more
    assert "full after about 71% of what is left" in caplog.text
    outlook.look(20, 100)  # says it once, and does not look again
    assert caplog.text.count("will be full") == 1


def test_sending_goes_on_through_trouble_and_says_so(gcs, flags, monkeypatch, caplog):
    monkeypatch.setattr(uploads, "PATIENCE_SECONDS", 0)
    plan = plan_run(request_of(flags))
    gcs.fault(503, lambda r: r.name.endswith(".pkl"), times=8)
    run(plan, NoSignals())
    assert caplog.text.count("are tried again: 503 a fault to order") == 1  # once a minute
    assert_bucket_is_whole(gcs, flags)


# ------------------------------------------------------------------------------------------ reading


@pytest.fixture
def stored(gcs, flags, shell):
    assert shell(flags)[0] == 0
    return f"gs://bucket/{PREFIX}"


def test_shards_of_a_bucket_are_those_of_the_folder(gcs, flags, stored):
    folder = flags["activations_dir"]
    for here, remote in ((folder, stored), (folder, stored + "/")):
        pairs = list(zip(iter_items(here), iter_items(remote), strict=True))
        assert len(pairs) == 8
        for one, other in pairs:
            assert one["task_id"] == other["task_id"]
            for name, states in one["activations"].items():
                np.testing.assert_array_equal(states, other["activations"][name])
    one, other = (load_shard(f"{place}/{SHARD.format(2)}") for place in (folder, stored))
    assert [item["task_id"] for item in one] == [item["task_id"] for item in other]
    assert len(load_shard(f"{stored}/{SHARD.format(2)}", verify=False)) == 2
    assert len(load_shard(Path(stored) / SHARD.format(2))) == 2
    gcs.storage.objects["bucket"].clear()  # what is on the disk is read there
    assert len(list(iter_items(folder))) == 8


def test_what_a_bucket_holds_is_verified(gcs, stored):
    gcs.corrupt(f"{PREFIX}/{SHARD.format(2)}")
    with pytest.raises(UserError, match=r"2\.pkl"):
        load_shard(f"{stored}/{SHARD.format(2)}")
    with pytest.raises(UserError, match=r"2\.pkl"):
        list(iter_items(stored))
    gcs.storage.objects["bucket"].pop(f"{PREFIX}/{SHARD.format(3)}")
    with pytest.raises(UserError, match=r"3\.pkl does not exist"):
        load_shard(f"{stored}/{SHARD.format(3)}")


def test_the_example_shows_a_run_in_a_bucket(flags, stored, in_shell):
    import example_usage

    shown = {}
    for place in (stored, str(flags["activations_dir"])):
        code, out, _ = in_shell(example_usage, ["--activations_dir", place])
        assert code == 0
        shown[place] = out.replace(place, "PLACE")
    assert len(set(shown.values())) == 1
    assert "total samples      8" in out and "activations['resid_post.0']" in out
    code, _, err = in_shell(example_usage, ["--activations_dir", "gs://bucket/nowhere"])
    assert code == 2 and "gs://bucket/nowhere holds no metadata.json" in err


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("gs://bucket/nowhere", "gs://bucket/nowhere holds no metadata.json"),
        ("gs://nowhere/x", "the bucket gs://nowhere does not exist"),
        ("gs://Bad", "'Bad' is no name of a bucket"),
    ],
)
def test_places_that_hold_no_run(gcs, path, message):
    with pytest.raises(UserError, match=message):
        list(iter_items(path))


# ---------------------------------------------------------------------------------- what is refused


BAD = [
    ({"cloud_bucket": None}, "--upload_to_cloud needs --cloud_bucket gs://BUCKET/PREFIX"),
    ({"cloud_bucket": "bucket/x"}, "--cloud_bucket bucket/x is not gs://BUCKET/PREFIX"),
    ({"cloud_bucket": "gs://Bucket/x"}, "'Bucket' is no name of a bucket"),
    ({"cloud_bucket": "gs://bucket//x"}, "write gs://bucket/x"),
    ({"cloud_bucket": "gs://nowhere/x"}, "gcloud storage buckets create gs://nowhere"),
    ({"upload_to_cloud": None}, "--cloud_bucket: give --upload_to_cloud too"),
    ({"activations_dir": "gs://bucket/x"}, "--activations_dir gs://bucket/x is in a bucket"),
    ({"output_path": "gs://bucket/p.json"}, "--output_path gs://bucket/p.json is in a bucket"),
    ({"cloud_bucket": "s3://bucket/x"}, "s3://bucket/x is not gs://BUCKET/PREFIX"),
    ({"output_path": "answers.jsonl"}, "answers.jsonl is what a file of the run itself is called"),
]


@pytest.mark.parametrize(("changed", "message"), BAD, ids=lambda value: str(value)[:40])
def test_mistakes_are_a_line_each(gcs, flags, shell, tmp_path, monkeypatch, changed, message):
    monkeypatch.chdir(tmp_path)
    given = {key: value for key, value in {**flags, **changed}.items() if value is not None}
    begin = time.monotonic()
    code, line = shell(given)
    assert code == 2 and line.startswith("error: ") and message in line
    assert time.monotonic() - begin < 20
    assert not flags["activations_dir"].exists() and gcs.objects() == {}


@pytest.mark.parametrize("name", ["delete_after_upload", "upload_timeout", "max_pending_gb"])
def test_flags_that_need_uploading(gcs, flags, shell, name):
    del flags["upload_to_cloud"], flags["cloud_bucket"]
    code, line = shell({**flags, name: True if name.startswith("delete") else 7})
    assert (code, line) == (2, f"error: --{name}: give --upload_to_cloud too")


def test_forbidden_is_said_before_the_model_loads(gcs, flags, shell, monkeypatch):
    loaded = []
    monkeypatch.setattr("utils.run.loop.Computation", loaded.append)
    gcs.fault(403, times=99)
    code, line = shell(flags)
    assert not loaded
    assert code == 2 and "grant the account roles/storage.objectUser" in line


def test_the_dry_run_asks_the_bucket(gcs, flags, shell):
    assert shell({**flags, "dry_run": True})[0] == 0
    assert f"bucket        gs://bucket/{PREFIX}: can be written and read" in shell.out
    assert gcs.objects() == {}
    assert shell(flags)[0] == 0
    assert shell({**flags, "dry_run": True, "resume": True})[0] == 0
