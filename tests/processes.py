"""Runs of the distributed script: on meshes of this process, and in several processes."""

import contextlib
import json
import socket
import time

import numpy as np
from conftest import NoSignals, words
from forks import Script
from parity import TOLERANCE, worst_error

import distributed_inference_with_activations as script
from utils.plan.plan import plan_run
from utils.plan.request import Request
from utils.run.loop import run
from utils.shards import iter_items
from utils.shards.items import sample_key

FLAGS = {
    "batch_size": 1,
    "extract_activations": True,
    "layers_to_extract": [0, 1],
    "activation_dtype": "float32",
    "max_output_tokens": 12,
    "prompt_format": "compact",  # prompts of tens of tokens, where chat takes hundreds
    "save_every_n_batches": 2,
}


LONG = {"max_output_tokens": 300, "save_every_n_samples": 1}
PEER_TIMEOUT, PRETENDED_PEER_TIMEOUT = 10, 6  # seconds

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


def start(
    model, tasks, folder, count=1, devices=2, separate=False, each=None, pretend=None, **changed
):
    """Starts a run of `count` processes; each: process -> its own changes of the flags. pretend:
    no model computes, and a pass takes so many seconds."""
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
                "peer_timeout": PEER_TIMEOUT if pretend is None else PRETENDED_PEER_TIMEOUT,
            }
        flags |= {**changed, **(each or {}).get(i, {})}
        logs.append(folder / f"log{i}.txt")
        logs[-1].write_text("")
        flags_of_xla = {"XLA_FLAGS": f"--xla_force_host_platform_device_count={devices}"}
        how = {"env": flags_of_xla, "log": logs[-1], "pretended": pretend}
        how["in_haste"] = flags["max_output_tokens"] < LONG["max_output_tokens"]
        processes.append(Script(f"{script.__name__}.py", *words(flags), **how))
    return Processes(processes, logs)
