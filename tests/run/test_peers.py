"""What processes of a run say to one another, and what they refuse."""

import inspect
import json
import os
import re
import shutil
import signal
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from types import SimpleNamespace

import jax
import pytest
from conftest import NoSignals, words
from processes import (
    FLAGS,
    free_port,
    in_process,
    start,
)
from runs import planned

import distributed_inference_with_activations as script
from utils.cli import Interrupted
from utils.errors import UserError
from utils.plan.interventions import Intervention
from utils.plan.plan import plan_run
from utils.plan.request import Request
from utils.run import peers
from utils.run.connect import connect, local_devices


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


def test_a_process_takes_its_leave_itself(monkeypatch):
    """Not by its watching thread: process 0, and with it the store, would be gone before it is."""
    store, (_, second) = two_peers(monkeypatch)
    gone, set_value = [], store.key_value_set

    def noted(key, value, **options):
        state = json.loads(value)
        if threading.current_thread() is threading.main_thread():
            time.sleep(0.3)  # in which the thread has six turns
        if key == "process/1" and state["gone"]:
            gone.append(threading.current_thread().name)
        set_value(key, value, **options)

    monkeypatch.setattr(store, "key_value_set", noted)
    second.farewell()
    assert gone == [threading.main_thread().name]


def test_the_watch_does_not_die_in_silence(monkeypatch):
    store, (first, _) = two_peers(monkeypatch)
    store.error = ValueError("a bug")
    time.sleep(0.3)
    with pytest.raises(UserError, match=r"looking after .* failed: ValueError\('a bug'\)"):
        first.check()


SLURM = {"SLURM_STEP_TASKS_PER_NODE": "1(x2),4", "SLURM_NODEID": "2", "SLURM_LOCALID": "1"}
FOUR = {"CUDA_VISIBLE_DEVICES": "0,1,2,3", "SLURM_GPUS_ON_NODE": "4"}


@pytest.mark.parametrize(
    ("environ", "expected"),
    [
        ({}, None),  # by hand, or on a pod: JAX takes all
        ({**SLURM, "SLURM_NODEID": "0", **FOUR}, []),  # one process has the node, and all its GPUs
        ({**SLURM, "SLURM_NODEID": "1"}, []),
        ({**SLURM, **FOUR}, [1]),  # one GPU each, as JAX has it
        ({**SLURM, "SLURM_STEP_TASKS_PER_NODE": "2(x3)", **FOUR}, [2, 3]),
        ({**SLURM, **FOUR, "CUDA_VISIBLE_DEVICES": "2"}, []),  # Slurm gave it one of its own
        ({**SLURM, **FOUR, "CUDA_VISIBLE_DEVICES": "0", "SLURM_GPUS_ON_NODE": "1"}, []),
        (SLURM, [2, 3]),  # of the eight that the machine has
        ({**SLURM, "SLURM_GPUS_ON_NODE": "4"}, [1]),
        ({**SLURM, "SLURM_STEP_TASKS_PER_NODE": "9(x3)"}, None),
        ({**SLURM, **FOUR, "JAX_LOCAL_DEVICE_IDS": "3"}, None),
        ({"OMPI_COMM_WORLD_LOCAL_SIZE": "1", "OMPI_COMM_WORLD_LOCAL_RANK": "0", **FOUR}, []),
    ],
)
def test_no_gpu_of_a_host_is_left_out(environ, expected, tmp_path):
    for name in (*map(str, range(8)), "ctl"):
        (tmp_path / f"nvidia{name}").touch()
    assert local_devices(environ, f"{tmp_path}/nvidia[0-9]*") == expected


def test_slurm_that_waits_for_more_processes_is_named(monkeypatch):
    """`srun --pty -n 4` opens a shell in which one command is one process."""

    def initialize(**kwargs):
        assert kwargs["local_device_ids"] == []
        raise RuntimeError("DEADLINE_EXCEEDED")

    one = {"SLURM_STEP_TASKS_PER_NODE": "1", "SLURM_LOCALID": "0", "SLURM_NTASKS": "4"}
    step = {"SLURM_JOB_ID": "7", "SLURM_STEP_NODELIST": "n1", "SLURM_PROCID": "0"}
    for name, value in (one | step).items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(jax.distributed, "initialize", lambda *args, **kw: initialize(**kw))
    monkeypatch.setattr("utils.run.connect._before_abort", lambda cause: None)
    with pytest.raises(UserError) as error:
        connect(None, None, None, timeout=5, silence=10, signals=NoSignals())
    assert "Slurm says that there are 4" in str(error.value)
    assert "env -u SLURM_STEP_NODELIST python" in str(error.value)


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
            file.seek(-1, os.SEEK_END)
            byte = file.read(1)
            file.seek(-1, os.SEEK_END)
            file.write(bytes([byte[0] ^ 1]))
    folder = tmp_path / "run"
    run = start(models["14-2"], tasks, folder, 2, 1, each={1: changed})
    run.finish(2)
    for i in (0, 1):
        assert run.last_line(i).startswith("error: ") and message in run.last_line(i), run.text(i)
    assert not (folder / "acts").exists()


def test_a_vector_that_is_another_on_another_host(tiny_model, tasks_file, tmp_path, monkeypatch):
    plan = planned(tiny_model, tasks_file, tmp_path, "--max_output_tokens", 0)
    entries = [{"op": "set", "vector": "v.npy", "sha256": digest} for digest in "ab"]
    plans = [replace(plan, interventions=(Intervention(entry, None),)) for entry in entries]
    _, (first, second) = two_peers(monkeypatch)
    with ThreadPoolExecutor(1) as pool:
        other = pool.submit(peers.agree, plans[1], second)
        message = r"process 1 .*, whose values come first: interventions\.0\.sha256 was 'a', is 'b'"
        with pytest.raises(UserError, match=message):
            peers.agree(plans[0], first)
        with pytest.raises(UserError, match=message):
            other.result()


def test_the_paths_of_one_template_may_differ(tiny_model, tasks_file, tmp_path):
    """What it says may not."""

    def plan_of(name, text):
        template = tmp_path / name
        pairs = "{% for pair in train %}{{ pair.input }}{{ pair.output }}{% endfor %}"
        template.write_text(text + pairs + "{{ test_input }}")
        flags = {"model_path": tiny_model, "dataset_path": tasks_file, "prompt_format": template}
        flags |= {"output_filepath": tmp_path / "s.json", "max_tasks": 1, "max_output_tokens": 9}
        return plan_run(Request.from_flags(script.build_parser().parse_args(words(flags))))

    said = []
    all_so_far = SimpleNamespace(exchange=lambda _, own: said.append(own) or said)
    peers.agree(plan_of("a.jinja", "Solve:"), all_so_far)
    peers.agree(plan_of("b.jinja", "Solve:"), all_so_far)
    with pytest.raises(UserError, match=r"process 2 was .*, prompt\.template_hash was"):
        peers.agree(plan_of("b.jinja", "Do it:"), all_so_far)


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
    (
        {"plan": "v5e-64", "dry_run": True, "process_id": 0},
        "--plan starts no run: leave out --dry_run, --process_id",
    ),
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


def test_told_to_stop_before_the_others_came(models, tasks, tmp_path):
    address = {"coordinator_address": f"127.0.0.1:{free_port()}", "num_processes": 2}
    run = start(models["14-2"], tasks, tmp_path / "run", process_id=1, **address)
    time.sleep(8)
    begin = time.monotonic()
    run.processes[0].send_signal(signal.SIGTERM)
    run.finish(143)
    assert time.monotonic() - begin < 5
    assert run.last_line(0) == "stopped by SIGTERM; what was written is intact"
