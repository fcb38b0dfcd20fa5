"""The distributed script: meshes in this process; several processes, and the end of one."""

import contextlib
import json
import os
import random
import shutil
import signal
import socket
import subprocess
import sys
import time

import numpy as np
import pytest
from conftest import ROOT, TINY, random_task
from parity import TOLERANCE, worst_error

import distributed_inference_with_activations as script
from utils.cli import Signals
from utils.extract import run
from utils.manifest import read_answers, read_manifest
from utils.prepare import prepare
from utils.request import Request
from utils.shards import iter_items

FLAGS = {
    "batch_size": 1,
    "extract_activations": True,
    "layers_to_extract": [0, 1],
    "activation_dtype": "float32",
    "max_output_tokens": 12,
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


class NoSignals(Signals):
    """Leaves the test runner's signal handlers alone."""

    def __init__(self):
        self._depth, self._pending = 0, None


def words(flags: dict) -> list[str]:
    """{"a": 1, "b": [2, 3], "c": True} -> --a 1 --b 2 3 --c."""
    found = []
    for name, value in flags.items():
        values = value if isinstance(value, list) else [] if value is True else [value]
        found += [f"--{name}", *map(str, values)]
    return found


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    from tokenizers_for_tests import character_tokenizer

    from utils.weights import write_random_checkpoint

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
    made = {f"t{i:02}": random_task(rng, 1 + i % 3, 2 if i % 7 == 3 else 1) for i in range(25)}
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
    run(prepare(request), NoSignals())
    return result_of(folder)


def result_of(folder, *parts):
    items = {}
    for part in parts or ("acts",):
        for item in iter_items(folder / part):
            key = (item["task_id"], item["sample_idx"])
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
    run(prepare(Request.from_flags(simple.build_parser().parse_args(argv))), NoSignals())
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
    run(prepare(request), NoSignals())
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


@pytest.mark.parametrize("separate", [False, True], ids=["shared", "separate"])
@pytest.mark.parametrize(("count", "shape"), [(2, [2, 4]), (4, [1, 8])], ids=["2", "4"])
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


@pytest.mark.parametrize("sent", [signal.SIGKILL, signal.SIGTERM], ids=["killed", "told to stop"])
@pytest.mark.parametrize("which", [0, 1])
def test_the_end_of_one_is_the_end_of_all(models, tasks, tmp_path, sent, which):
    """And another number of processes, on another mesh, does the rest: each sample once."""
    folder = tmp_path / "run"
    run = start(models["14-2"], tasks, folder, 2, 2, mesh_shape=[1, 4], **LONG)
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
    assert time.monotonic() - begin < 120
    stored = read_manifest(folder / "acts")["files"]
    before = [tuple(sample) for entry in stored for sample in entry["samples"]]
    assert 2 <= len(before) < 29
    start(models["14-2"], tasks, folder, 1, 2, mesh_shape=[2, 1], resume=True, **LONG).finish()
    after, submission = result_of(folder)
    assert len(after) == 29 and len(submission) == 25
    kept = {entry["filename"]: entry["crc32c"] for entry in read_manifest(folder / "acts")["files"]}
    assert all(kept[entry["filename"]] == entry["crc32c"] for entry in stored)


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
