"""Models and datasets that lie in a bucket."""

import json
import logging
import shutil
from functools import partial
from multiprocessing.pool import ThreadPool

import pytest
from conftest import NoSignals

import simple_extraction_inference as script
from utils.arc.tasks import read_tasks, solutions_beside
from utils.errors import UserError
from utils.plan.inputs import model, tasks
from utils.plan.plan import plan_run
from utils.plan.request import Request
from utils.run.loop import run
from utils.store.bucket import BucketFolder
from utils.store.copies import copied
from utils.store.local import _MACHINE


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "arc-activations" / "gs"


@pytest.fixture
def filled(gcs, tiny_model, tasks_file):
    for path in tiny_model.iterdir():
        gcs.store(f"models/tiny/{path.name}", path.read_bytes())
    gcs.store("models/tiny/pytorch_model.bin", b"the same weights again")
    gcs.store("models/tiny/checkpoint-1/config.json", b"not this one")
    for path in tasks_file.parent.glob("*.json"):
        gcs.store(f"data/{path.name}", path.read_bytes())
    return gcs


def test_a_run_with_everything_in_buckets(filled, cache, tiny_model, tasks_file, tmp_path):
    def results(name, model_path, dataset_path):
        request = Request(
            model_path=str(model_path),
            dataset_path=str(dataset_path),
            output_path=str(tmp_path / f"{name}.json"),
            activations_dir=str(tmp_path / name),
            max_output_tokens=4,
        )
        manifest = run(plan_run(request), NoSignals())
        return manifest, (tmp_path / f"{name}.json").read_bytes()

    here, expected = results("here", tiny_model, tasks_file)
    remote = ("gs://bucket/models/tiny/", f"gs://bucket/data/{tasks_file.name}")
    there, found = results("there", *remote)
    assert found == expected and '"target": [[' in found.decode()  # solutions beside, too
    assert (there["model"]["path"], there["dataset"]["path"]) == remote
    assert there["model"]["hash"] == here["model"]["hash"]
    (copy,) = (cache / "bucket/models/tiny").iterdir()
    names = {path.name for path in copy.iterdir()}
    assert names == {path.name for path in tiny_model.iterdir()}


def test_what_is_there_is_not_fetched_again_and_never_changed(filled, cache, tiny_model):
    folder = model("gs://bucket/models/tiny")
    reads = lambda: [r.name.rpartition("/")[2] for r in filled.requests if r.kind == "read"]  # noqa: E731
    assert sorted(reads()) == sorted(path.name for path in tiny_model.iterdir())
    filled.requests.clear()
    assert model("gs://bucket/models/tiny") == folder and reads() == []
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    filled.store("models/tiny/config.json", b"{}")
    changed = model("gs://bucket/models/tiny")
    assert changed != folder and (changed / "config.json").read_bytes() == b"{}"
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before


def test_a_copy_that_a_bad_disk_changed_is_refused(filled, cache):
    weights = model("gs://bucket/models/tiny") / "model.safetensors"
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1  # size and time tell nothing
    weights.write_bytes(content)
    with pytest.raises(UserError, match=rf"{weights} is damaged: delete {weights.parent}, and try"):
        model("gs://bucket/models/tiny")


def test_two_at_once_fetch_one_copy(filled, cache, tiny_model):
    with ThreadPool(4) as pool:
        (folder,) = set(pool.map(model, ["gs://bucket/models/tiny"] * 4))
    assert [path.name for path in folder.parent.iterdir()] == [folder.name]
    for path in tiny_model.iterdir():
        assert (folder / path.name).read_bytes() == path.read_bytes()


def test_an_object_that_is_replaced_meanwhile_is_not_taken(filled, cache):
    bucket = BucketFolder("gs://bucket/models/tiny")
    listing = bucket.listing()
    filled.store("models/tiny/config.json", b"{}")
    with pytest.raises(UserError, match=r"cannot read gs://bucket/models/tiny/config\.json: 412"):
        copied(bucket, listing)
    assert not any(cache.rglob("*.*"))


def test_tasks_and_their_solutions(filled, cache, tasks_file):
    path = tasks(f"gs://bucket/data/{tasks_file.name}", "--dataset_path")
    assert list(read_tasks(path)) == list(read_tasks(tasks_file))
    assert solutions_beside(path).name == "test_outputs_train.json"
    for name, task in json.loads(tasks_file.read_text()).items():
        filled.store(f"many/{name}.json", json.dumps(task).encode())
    folder = tasks("gs://bucket/many/", "--dataset_path")
    assert {task.task_id for task in read_tasks(folder)} == {f"task{i}" for i in range(7)}


def test_what_the_bucket_holds_no_more_is_not_read(filled, cache, tasks_file):
    name = tasks_file.name
    assert solutions_beside(tasks(f"gs://bucket/data/{name}", "")) is not None
    filled.storage.objects["bucket"].pop("data/test_outputs_train.json")
    assert solutions_beside(tasks(f"gs://bucket/data/{name}", "")) is None
    for task_id, task in json.loads(tasks_file.read_text()).items():
        filled.store(f"many/{task_id}.json", json.dumps(task).encode())
    assert len(list(read_tasks(tasks("gs://bucket/many", "")))) == 7
    filled.storage.objects["bucket"].pop("many/task3.json")
    assert len(list(read_tasks(tasks("gs://bucket/many", "")))) == 6


def test_a_fetch_on_a_bad_network(filled, cache, tiny_model):
    filled.fault(503, times=3)
    filled.fault("reset", times=2)
    filled.fault("lost", lambda r: r.kind == "read", times=2)
    folder = model("gs://bucket/models/tiny")
    for path in tiny_model.iterdir():
        assert (folder / path.name).read_bytes() == path.read_bytes()


BAD = [
    (model, "gs://bucket/nowhere", "--model_path gs://bucket/nowhere holds no config.json"),
    (
        partial(model, flag="--adapter"),
        "gs://bucket/x",
        "--adapter gs://bucket/x holds no adapter_",
    ),
    (model, "gs://nowhere/x", "the bucket gs://nowhere does not exist"),
    (model, "gs://Bad/x", "--model_path gs://Bad/x: 'Bad' is no name of a bucket"),
    (tasks, "gs://bucket/data/no.json", "--dataset_path gs://bucket/data/no.json does not exist"),
    (tasks, "gs://bucket/empty", "--dataset_path gs://bucket/empty holds no .json or"),
]


@pytest.mark.parametrize(
    ("what", "uri", "message"), BAD, ids=lambda value: value if isinstance(value, str) else ""
)
def test_what_is_not_there(filled, cache, what, uri, message):
    arguments = (uri,) if what is not tasks else (uri, "--dataset_path")
    with pytest.raises(UserError) as error:
        what(*arguments)
    assert message in str(error.value)


def test_a_damaged_object_is_refused(filled, cache):
    filled.corrupt("models/tiny/model.safetensors")
    with pytest.raises(UserError, match=r"tiny/model\.safetensors is refused: its bytes"):
        model("gs://bucket/models/tiny")
    assert not any(cache.rglob("*.*"))


def test_what_a_kill_left_of_a_copy_makes_room_for_it(filled, cache, monkeypatch):
    folder = model("gs://bucket/models/tiny")
    left = folder.rename(folder.with_name(f"{folder.name}.{_MACHINE}00000000.partial"))
    monkeypatch.setattr("utils.store.copies.free_bytes", lambda _: 0 if left.exists() else 1 << 30)
    assert model("gs://bucket/models/tiny") == folder
    assert list(folder.parent.iterdir()) == [folder]


def test_a_disk_that_is_too_small(filled, cache, monkeypatch):
    monkeypatch.setattr("utils.store.copies.free_bytes", lambda folder: 1000)
    words = r"takes \d+ bytes .* where 1000 bytes are free: .* set XDG_CACHE_HOME to another disk"
    with pytest.raises(UserError, match=words):
        model("gs://bucket/models/tiny")


def test_without_a_home_the_way_to_another_is_named(filled, monkeypatch):
    def no_home(path):
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.setattr("pathlib.Path.expanduser", no_home)
    with pytest.raises(UserError, match=r"no home folder to keep .*: set XDG_CACHE_HOME"):
        model("gs://bucket/models/tiny")


def test_errors_speak_of_the_copy_and_the_log_of_its_uri(filled, cache, in_shell, tmp_path, caplog):
    caplog.set_level(logging.INFO)
    filled.storage.objects["bucket"].pop("models/tiny/model.safetensors")
    shutil.rmtree(cache, ignore_errors=True)
    flags = ["--model_path", "gs://bucket/models/tiny", "--output_path", tmp_path / "p.json"]
    flags += ["--dataset_path", "gs://bucket/data/arc_format_train.json", "--dry_run"]
    code, _, err = in_shell(script, [*flags, "--activations_dir", tmp_path / "acts"])
    assert code == 2
    (copy,) = (cache / "bucket/models/tiny").iterdir()
    assert f"gs://bucket/models/tiny is read from its copy {copy}" in caplog.text
    assert err.splitlines()[-1].startswith(f"error: {copy} ") and ".safetensors" in err
