"""The distributed script: meshes in this process; several processes, and the end of one."""

import contextlib
import inspect
import json
import os
import random
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor

import jax
import numpy as np
import pytest
from conftest import ROOT, TINY, NoSignals, random_task, words
from parity import TOLERANCE, worst_error

import distributed_inference_with_activations as script
from utils.cli import Interrupted
from utils.errors import UserError
from utils.plan.plan import plan_run
from utils.plan.request import Request
from utils.plan.samples import shard_of
from utils.run import peers
from utils.run.loop import run
from utils.shards import iter_items
from utils.shards.items import sample_key
from utils.shards.manifest import read_answers, read_manifest

FLAGS = {
    "batch_size": 1,
    "extract_activations": True,
    "layers_to_extract": [0, 1],
    "activation_dtype": "float32",
    "max_output_tokens": 12,
    "prompt_format": "compact",  # prompts of tens of tokens, where chat takes hundreds
    "save_every_n_batches": 2,
}
HEADS = {
    "14-2": {
        "hidden_size": 56,
        "head_dim": 4,
        "num_attention_heads": 14,
        "num_key_value_heads": 2,
        "intermediate_size": 84,
    },
    "16-8": {"model_type": "llama", "num_attention_heads": 16, "num_key_value_heads": 8},
}


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    from checkpoints import write_random_checkpoint
    from tokenizers_for_tests import character_tokenizer

    tokenizer = character_tokenizer()
    folders = {}
    for name, fields in HEADS.items():
        folder = folders[name] = tmp_path_factory.mktemp(name)
        size = {"vocab_size": len(tokenizer) + 3, "num_hidden_layers": 2}
        write_random_checkpoint(folder, {**TINY, **size, **fields})
        tokenizer.save_pretrained(folder)
    return folders


@pytest.fixture(scope="module")
def tasks(tmp_path_factory):
    """25 tasks, 29 test inputs: no multiple of any mesh."""
    rng = random.Random(1)
    made = {f"t{i:02}": random_task(rng, 1 + i % 2, 1 + (i % 7 == 3), 3) for i in range(25)}
    path = tmp_path_factory.mktemp("tasks") / "arc_format_train.json"
    path.write_text(json.dumps({name: task for name, (task, _) in made.items()}))
    solutions = {name: grids for name, (_, grids) in made.items()}
    (path.parent / "test_outputs_train.json").write_text(json.dumps(solutions))
    return path


def in_process(model, tasks, folder, **changed):
    """Runs on virtual devices of this process; items by sample, and the submission."""
    paths = {"output_filepath": folder / "submission.json", "activations_dir": folder / "acts"}
    flags = {"model_path": model, "dataset_path": tasks, **paths, **FLAGS, **changed}
    request = Request.from_flags(script.build_parser().parse_args(words(flags)))
    run(plan_run(request), NoSignals())
    return result_of(folder)


def result_of(folder, *parts):
    items = {}
    for part in parts or ("acts",):
        for item in iter_items(folder / part):
            key = sample_key(item)
            assert key not in items, f"{key} is stored twice"
            items[key] = item
    return items, json.loads((folder / "submission.json").read_text())


def assert_same(found, expected):
    assert found[1] == expected[1]
    assert found[0].keys() == expected[0].keys()
    for key, item in expected[0].items():
        other = found[0][key]
        assert other["input_ids"].tolist() == item["input_ids"].tolist()
        np.testing.assert_allclose(other["output_logits"], item["output_logits"], atol=TOLERANCE)
        assert other["activations"].keys() == item["activations"].keys()
        for name, states in item["activations"].items():
            assert worst_error(other["activations"][name], states) < TOLERANCE


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


# ------------------------------------------------------------------------------------ meshes


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
    assert 0.5 < useful["prefill"] <= 1 and 0.5 < useful["decode"] <= 1


# ------------------------------------------------------------------------------- processes


class Processes:
    """Several processes of one run, their output and exit codes."""

    def __init__(self, processes, logs):
        self.processes, self.logs = processes, logs

    def finish(self, codes=0, timeout=200):
        deadline = time.monotonic() + timeout
        found = [p.wait(max(1, deadline - time.monotonic())) for p in self.processes]
        expected = codes if isinstance(codes, list) else [codes] * len(found)
        assert found == expected, "\n".join(map(self.text, range(len(found))))

    def text(self, index):
        return self.logs[index].read_text()

    def last_line(self, index):
        return self.text(index).replace("\r", "\n").strip().splitlines()[-1]

    def wait_for(self, folder, pattern):
        deadline = time.monotonic() + 120
        while not list(folder.glob(pattern)):
            assert time.monotonic() < deadline, self.text(0)
            assert all(p.poll() is None for p in self.processes), self.text(0)
            time.sleep(0.05)


def free_port() -> int:
    with contextlib.closing(socket.socket()) as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


def start(model, tasks, folder, count=1, devices=2, separate=False, each=None, **changed):
    """Starts a run of `count` processes; each: process -> its own changes of the flags."""
    folder.mkdir(exist_ok=True)
    port = free_port()
    processes, logs = [], []
    for i in range(count):
        flags = {
            "model_path": model,
            "dataset_path": tasks,
            "output_filepath": folder / "submission.json",
            "activations_dir": folder / (f"acts{i}" if separate else "acts"),
            **FLAGS,
        }
        if count > 1:
            flags |= {
                "coordinator_address": f"127.0.0.1:{port}",
                "num_processes": count,
                "process_id": i,
                "peer_timeout": 10,
            }
        flags |= {**changed, **(each or {}).get(i, {})}
        logs.append(folder / f"log{i}.txt")
        processes.append(
            subprocess.Popen(
                [sys.executable, ROOT / "distributed_inference_with_activations.py", *words(flags)],
                env={
                    **os.environ,
                    "XLA_FLAGS": f"--xla_force_host_platform_device_count={devices}",
                },
                stdout=open(logs[-1], "wb"),  # noqa: SIM115
                stderr=subprocess.STDOUT,
            )
        )
    return Processes(processes, logs)


@pytest.fixture(scope="module")
def reference(models, tasks, tmp_path_factory):
    """What one process makes of the tasks with the 14-headed model."""
    return in_process(models["14-2"], tasks, tmp_path_factory.mktemp("one"), mesh_shape=[4, 2])


@pytest.mark.parametrize(
    ("count", "shape", "separate"),
    [
        (2, [2, 4], False),
        (2, [2, 4], True),
        pytest.param(4, [1, 8], False, marks=pytest.mark.slow),
        (4, [1, 8], True),
    ],
    ids=["2 shared", "2 separate", "4 shared", "4 separate"],
)
def test_processes_store_each_sample_once(
    models, tasks, tmp_path, reference, count, shape, separate
):
    folder = tmp_path / "run"
    run = start(models["14-2"], tasks, folder, count, 8 // count, separate, mesh_shape=shape)
    run.finish()
    parts = [f"acts{i}" for i in range(count)] if separate else ["acts"]
    manifest = json.loads((folder / parts[0] / "metadata.json").read_text())
    assert (manifest["status"], manifest["processes"]) == ("complete", count)
    assert manifest["total_samples"] == 29
    listed = [tuple(sample) for entry in manifest["files"] for sample in entry["samples"]]
    assert len(listed) == len(set(listed)) == 29
    assert manifest["useful_slots"]["prefill"] > 0.5
    assert len({entry["filename"].split("_batch")[0] for entry in manifest["files"]}) == count
    if separate:  # collected into one folder, they are one run
        for part in parts[1:]:
            for path in (folder / part).iterdir():
                shutil.copy(path, folder / parts[0])
    assert_same(result_of(folder, parts[0]), reference)
    assert len(read_answers(folder / parts[0])) == 29
    again = start(
        models["14-2"], tasks, folder, count, 8 // count, separate, mesh_shape=shape, resume=True
    )
    again.finish()
    assert "nothing to do" in again.text(0)


LONG = {"max_output_tokens": 300, "save_every_n_samples": 1}


@pytest.mark.parametrize(
    ("which", "sent"),
    [
        (0, signal.SIGKILL),
        (1, signal.SIGKILL),
        (0, signal.SIGTERM),
        (1, signal.SIGTERM),
    ],
    ids=["0 killed", "1 killed", "0 told to stop", "1 told to stop"],
)
def test_the_end_of_one_is_the_end_of_all(models, tasks, tmp_path, sent, which):
    """And another number of processes, on another mesh, does the rest: each sample once."""
    folder = tmp_path / "run"
    run = start(models["14-2"], tasks, folder, 2, 1, mesh_shape=[1, 2], **LONG)
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
    assert time.monotonic() - begin < 30  # --peer_timeout is 10
    stored = read_manifest(folder / "acts")["files"]
    before = [tuple(sample) for entry in stored for sample in entry["samples"]]
    assert 2 <= len(before) < 29
    start(models["14-2"], tasks, folder, 1, 2, mesh_shape=[2, 1], resume=True, **LONG).finish()
    after, submission = result_of(folder)
    assert len(after) == 29 and len(submission) == 25
    kept = {entry["filename"]: entry["crc32c"] for entry in read_manifest(folder / "acts")["files"]}
    assert all(kept[entry["filename"]] == entry["crc32c"] for entry in stored)


@pytest.mark.parametrize("which", [0, 1])
def test_a_frozen_process_that_wakes_writes_nothing(models, tasks, tmp_path, which):
    """The others have given it up, and may have been started again in the same folder."""
    folder = tmp_path / "run"
    run = start(models["14-2"], tasks, folder, 2, 1, mesh_shape=[2, 1], **LONG)
    run.wait_for(folder, "acts/*_batch_000002.pkl")
    frozen, other = run.processes[which], run.processes[1 - which]
    frozen.send_signal(signal.SIGSTOP)
    begin = time.monotonic()
    assert other.wait(60) == 1, run.text(1 - which)
    assert run.last_line(1 - which).startswith("error: ")
    time.sleep(max(0, begin + 12 - time.monotonic()))  # --peer_timeout is 10
    before = {p: p.read_bytes() for p in folder.glob("acts/*")}
    frozen.send_signal(signal.SIGCONT)
    run.finish(1, timeout=30)
    assert run.last_line(which).startswith("error: ") and "--resume" in run.last_line(which)
    assert {p: p.read_bytes() for p in folder.glob("acts/*")} == before


class Store:
    """The key-value store of the coordination service, in memory; raises `error`, if set."""

    def __init__(self):
        self.values, self.error = {}, None

    def key_value_set(self, key, value, allow_overwrite=False):
        if self.error:
            raise self.error
        self.values[key] = value

    key_value_set_bytes = key_value_set

    def key_value_dir_get(self, key):
        if self.error:
            raise self.error
        return [pair for pair in self.values.items() if pair[0].startswith(key)]

    def blocking_key_value_get_bytes(self, key, timeout_in_ms):
        deadline = time.monotonic() + timeout_in_ms / 1000
        while key not in self.values:
            if time.monotonic() > deadline:
                raise jax.errors.JaxRuntimeError(f"DEADLINE_EXCEEDED: {key}")
            time.sleep(0.01)
        return self.values[key]


def two_peers(monkeypatch, silence=1.0):
    monkeypatch.setattr(peers, "BEAT_SECONDS", 0.05)
    store = Store()
    return store, [peers.Peers(store, i, 2, silence, NoSignals()) for i in (0, 1)]


def test_two_exchange(monkeypatch):
    monkeypatch.setattr(peers, "CHUNK_BYTES", 10)
    _, (first, second) = two_peers(monkeypatch)
    values = [os.urandom(99).hex(), {}]
    with ThreadPoolExecutor(1) as pool:
        other = pool.submit(lambda: (second.exchange("a", [2]), second.gather(values[1])))
        assert (first.exchange("a", [1]), first.gather(values[0])) == ([[1], [2]], values)
        assert other.result() == ([[1], [2]], [])


def test_what_one_is_told_all_are_told(monkeypatch):
    _, (first, second) = two_peers(monkeypatch)
    second._signals.note(signal.SIGTERM)  # before it asks
    time.sleep(0.5)
    for each in (first, second):
        with pytest.raises(Interrupted) as stop:
            each.check()
        assert stop.value.signum == signal.SIGTERM


def test_the_failure_of_one_is_told_to_the_other(monkeypatch):
    _, (first, second) = two_peers(monkeypatch)
    with pytest.raises(UserError), second.together("checking"):
        raise UserError("the disk is full", 1)
    with pytest.raises(UserError, match=r"process 1 on .* failed: the disk is full") as told:
        first.exchange("checking", None)
    assert told.value.exit_code == 1


def test_a_process_that_stood_still_or_was_cut_off_is_left_behind(monkeypatch):
    """For good: also once it could speak again."""
    store, (first, second) = two_peers(monkeypatch, silence=0.5)
    time.sleep(0.2)
    store.error = jax.errors.JaxRuntimeError("UNAVAILABLE: connection reset")
    time.sleep(0.8)
    store.error = None
    time.sleep(0.3)
    for each in (first, second):
        with pytest.raises(peers.LeftBehind, match="it stood still, or process 0"):
            each.check()


def test_the_watch_does_not_die_in_silence(monkeypatch):
    store, (first, _) = two_peers(monkeypatch)
    store.error = ValueError("a bug")
    time.sleep(0.3)
    with pytest.raises(UserError, match=r"looking after .* failed: ValueError\('a bug'\)"):
        first.check()


def test_the_private_names_of_jax_are_there():
    """Nothing public replaces them yet: whoever upgrades JAX learns here what has moved."""
    from jax._src import distributed
    from jax._src.clusters import ClusterEnv
    from jax._src.lib import _jax

    for name in ("client", "process_id", "num_processes"):
        assert hasattr(distributed.global_state, name), name
    for name in (
        "key_value_set",
        "key_value_set_bytes",
        "key_value_dir_get",
        "blocking_key_value_get_bytes",
    ):
        assert hasattr(_jax.DistributedRuntimeClient, name), name
    assert "allow_overwrite" in _jax.DistributedRuntimeClient.key_value_set.__doc__
    assert ClusterEnv._cluster_types
    for kind in ClusterEnv._cluster_types:
        assert isinstance(kind.opt_in_only_method, bool) and callable(kind.is_env_present)
    for flag in ("jax_enable_recoverability", "jax_enable_preemption_service"):
        assert flag in jax.config.values
    flags = inspect.signature(jax.distributed.initialize).parameters
    assert {"initialization_timeout", "heartbeat_timeout_seconds"} <= set(flags)


def test_separate_folders_are_resumed(models, tasks, tmp_path):
    folder = tmp_path / "run"
    run = start(models["14-2"], tasks, folder, 2, 1, True, mesh_shape=[2, 1], **LONG)
    run.wait_for(folder, "acts1/*_batch_000002.pkl")
    run.processes[1].send_signal(signal.SIGINT)
    run.finish(130)
    start(
        models["14-2"], tasks, folder, 2, 1, True, mesh_shape=[1, 2], resume=True, **LONG
    ).finish()
    manifest = json.loads((folder / "acts0" / "metadata.json").read_text())
    listed = [tuple(sample) for entry in manifest["files"] for sample in entry["samples"]]
    assert len(listed) == len(set(listed)) == 29
    own = [read_manifest(folder / "acts1")["files"], manifest["files"]]
    assert {entry["filename"] for entry in own[0]} < {entry["filename"] for entry in own[1]}


# ----------------------------------------------------------------------------- what is refused


DIFFERENT = {
    "flags": ({"max_output_tokens": 11}, r"--max_output_tokens was 12, is 11"),
    "tasks": ({"dataset_path": "other"}, "tasks was"),
    "weights": ({"model_path": "other"}, "process 1 has other weights"),
}


@pytest.mark.parametrize("kind", DIFFERENT)
def test_processes_that_were_started_differently(models, tasks, tmp_path, kind):
    changed, message = DIFFERENT[kind]
    if kind == "tasks":
        text = json.loads(tasks.read_text())
        text["t00"]["train"][0]["output"][0][0] ^= 1
        changed = {"dataset_path": tmp_path / "other.json"}
        changed["dataset_path"].write_text(json.dumps(text))
        shutil.copy(tasks.parent / "test_outputs_train.json", tmp_path / "test_outputs_other.json")
    if kind == "weights":
        changed = {"model_path": tmp_path / "other"}
        shutil.copytree(models["14-2"], changed["model_path"])
        with open(changed["model_path"] / "model.safetensors", "r+b") as file:
            file.seek(3000)
            byte = file.read(1)
            file.seek(3000)
            file.write(bytes([byte[0] ^ 1]))
    folder = tmp_path / "run"
    run = start(models["14-2"], tasks, folder, 2, 1, each={1: changed})
    run.finish(2)
    for i in (0, 1):
        assert run.last_line(i).startswith("error: ") and message in run.last_line(i), run.text(i)
    assert not (folder / "acts").exists()


def test_what_one_process_lacks_ends_all(models, tasks, tmp_path):
    folder = tmp_path / "run"
    run = start(models["14-2"], tasks, folder, 2, 1, each={1: {"dataset_path": "nowhere.json"}})
    run.finish(2)
    assert run.last_line(1) == "error: nowhere.json does not exist; check the path"
    assert "process 1" in run.last_line(0) and "nowhere.json does not exist" in run.last_line(0)
    assert not (folder / "acts").exists()


def test_a_coordinator_that_does_not_answer(models, tasks, tmp_path):
    nobody = {"coordinator_address": f"127.0.0.1:{free_port()}", "num_processes": 2}
    folder = tmp_path / "run"
    run = start(models["14-2"], tasks, folder, process_id=1, coordinator_timeout=3, **nobody)
    run.finish(2)
    assert run.last_line(0).startswith(
        f"error: the coordinator {nobody['coordinator_address']} does not answer"
    )
    run = start(models["14-2"], tasks, folder, process_id=0, coordinator_timeout=3, **nobody)
    run.finish(2)
    assert "not all processes came" in run.last_line(0)


BAD_VALUES = [
    ({"mesh_shape": [8, 8]}, r"--mesh_shape 8 8 takes 64 devices, and JAX sees 8 \(cpu\): .* 2 4"),
    ({"mesh_shape": [3, 2]}, "--mesh_shape 3 2 takes 6 devices"),
    ({"mesh_shape": ["x", 2]}, "--mesh_shape x 2 is not `auto` or two whole numbers"),
    ({"mesh_shape": [8]}, "--mesh_shape 8 is not `auto` or two whole numbers"),
    ({"mesh_shape": [0, 8]}, "--mesh_shape 0 8 is not"),
    ({"mesh_shape": [8, 1, 4, 2]}, "--mesh_shape 8 1 4 2 .* --plan"),
    ({"batch_size": 0}, "--batch_size: 0 is below 1"),
    ({"max_batch_tokens": 10}, r"the longest sample, \d+ tokens, .* --max_batch_tokens 10"),
    ({"save_every_n_batches": 0}, "--save_every_n_batches: 0 is below 1"),
    ({"shard_id": 3, "num_shards": 3}, r"--shard_id 3 does not exist: .* 0\.\.2"),
    ({"shard_id": -1}, "--shard_id: -1 is below 0"),
    ({"num_shards": 400, "shard_id": 7}, "shard 7 of 400 has no task"),
    ({"process_id": 0}, "--coordinator_address, --num_processes and --process_id belong together"),
    (
        {"coordinator_address": "host", "num_processes": 2, "process_id": 0},
        "--coordinator_address host is not HOST:PORT",
    ),
    (
        {"coordinator_address": "h:1", "num_processes": 2, "process_id": 2},
        r"--process_id 2 does not exist: .* 0\.\.1",
    ),
    ({"peer_timeout": 1}, "--peer_timeout: 1 is below 6"),
    ({"coordinator_timeout": 0}, "--coordinator_timeout: 0 is below 1"),
    ({"output_filepath": ""}, "--output_filepath is empty"),
    ({"output_filepath": "."}, "is a folder: give --output_filepath the path of a file"),
    ({"plan": "v5e-65"}, "--plan v5e-65 is not a slice: there are v4-8, .*v6e-256"),
    ({"plan": "v5e-64", "plan_json": "."}, r"\. is a folder: give --plan_json the path"),
    ({"plan": "v5e-64", "plan_json": "/dev/null"}, "no regular file: give --plan_json"),
    ({"plan_json": "p.json"}, "--plan_json needs --plan SLICE"),
]


@pytest.mark.parametrize(("changed", "message"), BAD_VALUES, ids=str)
def test_bad_values(in_shell, models, tasks, tmp_path, monkeypatch, changed, message):
    monkeypatch.chdir(tmp_path)
    paths = {"output_filepath": "submission.json", "activations_dir": "acts"}
    flags = {"model_path": models["14-2"], "dataset_path": tasks, **paths, **FLAGS, **changed}
    code, out, err = in_shell(script, words(flags))
    assert (code, out) == (2, ""), err
    assert re.fullmatch(r"error: \S.+\n", err) and re.search(message, err), err
    assert list(tmp_path.iterdir()) == []


def test_flags_of_extraction_without_it(in_shell, models, tasks, tmp_path):
    paths = {"output_filepath": tmp_path / "submission.json"}
    flags = {"model_path": models["14-2"], "dataset_path": tasks, **paths, "layers_to_extract": [0]}
    code, _, err = in_shell(script, words(flags))
    assert (code, err) == (2, "error: --layers_to_extract: give --extract_activations too\n")


@pytest.mark.parametrize("what", ["model", "tasks", "capture"])
def test_resuming_with_another(in_shell, models, tasks, tmp_path, what):
    in_process(models["14-2"], tasks, tmp_path, mesh_shape=[8, 1])
    before = {p: p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()}
    changed = {
        "model": {"model_path": models["16-8"]},
        "tasks": {"max_tasks": 24},
        "capture": {"layers_to_extract": [1]},
    }[what]
    paths = {"output_filepath": tmp_path / "submission.json", "activations_dir": tmp_path / "acts"}
    flags = {"model_path": models["14-2"], "dataset_path": tasks, **paths, **FLAGS, **changed}
    code, _, err = in_shell(script, words({**flags, "resume": True}))
    names = {"model": "model.", "tasks": "dataset.hash", "capture": "activations.resid_post.0"}
    assert code == 2 and "with other settings" in err and names[what] in err, err
    assert {p: p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()} == before


# -------------------------------------------------------------------------------- by hand


def test_shards_of_the_tasks_are_joined(models, tasks, tmp_path, reference, capsys):
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
    with pytest.raises(UserError, match="of 3 shards these are missing: 2"):
        join(*activations[:2], into=tmp_path / "all")
    with pytest.raises(UserError, match="both hold shard 1"):
        join(*activations[:2], activations[1].parent / ".." / "1" / "acts", into=tmp_path / "all")
    assert not (tmp_path / "all").exists()
    (tmp_path / "all").mkdir()
    joint = {"into": tmp_path / "all" / "acts", "output_filepath": tmp_path / "all/submission.json"}
    assert join(*activations, verify=True, **joint) == 0
    assert_same(result_of(tmp_path / "all"), reference)
    assert read_manifest(tmp_path / "all" / "acts")["dataset"]["tasks"] == 25
    join(*(f / "submission.json" for f in folders), output_filepath=tmp_path / "again.json")
    assert json.loads((tmp_path / "again.json").read_text()) == reference[1]
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


# ------------------------------------------------------------------------- separate folders


def test_folders_that_changed_hands(models, tasks, tmp_path):
    """What two processes left in folders of their own: swapped, with a copy, whole again."""
    folder = tmp_path / "run"
    flags = {"mesh_shape": [2, 1], **LONG}
    run = start(models["14-2"], tasks, folder, 2, 1, True, **flags)
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
    one = {"activations_dir": alone / "acts0", "mesh_shape": [1, 1], **LONG}
    start(models["14-2"], tasks, alone, 1, 1, resume=True, **one).finish()
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
    run = start(models["14-2"], tasks, folder, 1, 2, mesh_shape=[2, 1], **LONG)
    run.wait_for(folder, "acts/*_batch_000002.pkl")
    run.processes[0].send_signal(signal.SIGTERM)
    run.finish(143)
    earlier = read_manifest(folder / "acts")["seconds"]
    start(models["14-2"], tasks, folder, 2, 1, mesh_shape=[1, 2], resume=True, **LONG).finish()
    manifest = read_manifest(folder / "acts")
    assert (manifest["processes"], manifest["mesh_shape"]) == (2, [1, 2])
    assert manifest["arguments"]["resume"] and len(manifest["devices"]) == 2
    assert manifest["status"] == "complete" and manifest["total_samples"] == 29
    assert manifest["seconds"] > earlier


def test_views_over_two_processes(models, tasks, tmp_path):
    """Each view of each test input once, one of the processes killed on the way."""
    flags = {"augmentations": 3, **LONG}
    expected = in_process(models["14-2"], tasks, tmp_path / "one", mesh_shape=[8, 1], **flags)
    folder = tmp_path / "run"
    run = start(models["14-2"], tasks, folder, 2, 1, mesh_shape=[2, 1], **flags)
    run.wait_for(folder, "acts/*_batch_000002.pkl")
    run.processes[1].kill()
    run.finish([1, -9])
    start(models["14-2"], tasks, folder, 2, 1, mesh_shape=[2, 1], resume=True, **flags).finish()
    assert_same(result_of(folder), expected)
    assert read_manifest(folder / "acts")["total_samples"] == 3 * 29 == len(expected[0])


def test_told_to_stop_before_the_others_came(models, tasks, tmp_path):
    address = {"coordinator_address": f"127.0.0.1:{free_port()}", "num_processes": 2}
    run = start(models["14-2"], tasks, tmp_path / "run", process_id=1, **address)
    time.sleep(8)
    begin = time.monotonic()
    run.processes[0].send_signal(signal.SIGTERM)
    run.finish(143)
    assert time.monotonic() - begin < 5
    assert run.last_line(0) == "stopped by SIGTERM; what was written is intact"


def test_parts_of_different_tasks_are_not_joined(models, tasks, tmp_path):
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


# ---------------------------------------------------------------------------------- a bucket

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
    ("count", "separate"),
    [
        (2, True),
        (2, False),
        pytest.param(4, True, marks=pytest.mark.slow),
        (4, False),
    ],
)
def test_processes_write_under_one_prefix(models, tasks, tmp_path, reference, gcs, count, separate):
    folder, devices = tmp_path / "run", 8 // count
    flags = {"mesh_shape": [count, devices], **CLOUD}
    gcs.fault("lost", lambda r: r.kind == "multipart" and r.name.endswith("1.pkl"), times=count)
    start(models["14-2"], tasks, folder, count, devices, separate, **flags).finish()
    parts = [f"acts{i}" for i in range(count)] if separate else ["acts"]
    assert_bucket_is_whole(gcs, folder, parts, reference)
    again = start(*(models["14-2"], tasks, folder, count, devices, separate), resume=True, **flags)
    again.finish()
    assert "nothing to do" in again.text(0)
    other = start(models["14-2"], tasks, tmp_path / "other", count, devices, separate, **flags)
    other.finish(2)
    assert "gs://bucket/run holds a run (complete, 29 samples)" in other.last_line(0)
    assert_bucket_is_whole(gcs, folder, parts, reference)


@pytest.mark.parametrize("count", [1, 2])
def test_a_host_that_is_gone_with_its_disk(models, tasks, tmp_path, gcs, count):
    """What it had sent is in the bucket, and is not computed again."""
    folder = tmp_path / "run"
    flags = {"mesh_shape": [2, 1], **CLOUD, **LONG}
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
    changed = {**flags, "mesh_shape": [count, 1], "resume": True}
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
    start(models["14-2"], tasks, folder, 2, 1, True, mesh_shape=[2, 1], **CLOUD).finish()
    shutil.rmtree(folder / "acts1")
    before = {n: o for n, o in gcs.objects("run/").items() if n.endswith(".pkl")}
    flags = {"mesh_shape": [count, 1], "resume": True, **CLOUD}
    start(models["14-2"], tasks, folder, count, 1, True, **flags).finish()
    after = gcs.objects("run/")
    assert {n: o for n, o in after.items() if n.endswith(".pkl")} == before
    assert_bucket_is_whole(gcs, folder, [f"acts{i}" for i in range(count)], None)


def test_one_sends_what_two_left_and_its_disk_is_lost(models, tasks, tmp_path, gcs):
    folder = tmp_path / "run"
    start(models["14-2"], tasks, folder, 2, 1, mesh_shape=[2, 1]).finish()
    flags = {"mesh_shape": [1, 1], "resume": True, **CLOUD}
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
        run = start(
            models["14-2"],
            tasks,
            folder,
            count,
            1,
            mesh_shape=[count, 1],
            **CLOUD,
            **LONG,
            **changed,
        )
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
    flags = {"mesh_shape": [1, 1], "resume": True, **CLOUD, **LONG}
    start(models["14-2"], tasks, folder, 1, 1, **flags).finish()
    after = {entry["filename"] for entry in read_manifest("gs://bucket/run")["files"]}
    assert before <= after
    assert_bucket_is_whole(gcs, folder, ["acts"], None, orphans=True)


def test_told_to_stop_while_all_wait_for_the_network(models, tasks, tmp_path, gcs):
    folder = tmp_path / "run"
    gcs.fault("stall", lambda r: r.name.endswith(".pkl"), times=10**6)
    run = start(models["14-2"], tasks, folder, 2, 1, mesh_shape=[2, 1], **CLOUD)
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
    runs = [
        start(models["14-2"], tasks, tmp_path / str(n), n, 1, mesh_shape=[n, 1], **CLOUD)
        for n in (1, 2)
    ]
    codes = [{p.wait(200) for p in run.processes} for run in runs]
    assert sorted(map(max, codes)) in ([0, 1], [0, 2]), [run.text(0) for run in runs]
    won = codes.index({0})
    assert not list((tmp_path / str(2 - won)).glob("acts/*.pkl"))
    assert_bucket_is_whole(gcs, tmp_path / str(won + 1), ["acts"], None)


def test_what_one_process_cannot_send(models, tasks, tmp_path, gcs):
    folder = tmp_path / "run"
    flags = {"mesh_shape": [2, 1], **CLOUD, "upload_timeout": 3}
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
