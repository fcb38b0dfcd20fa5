"""Fixtures shared by the tests: a tiny random model with a tokenizer, and a few tasks."""

import gc
import json
import os
import random
import subprocess
import sys
from pathlib import Path

import pytest

from utils import cli

# Before anything starts JAX: meshes are tested on virtual devices, of which a run on one device
# takes the first.
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["XLA_FLAGS"] = "--xla_force_host_platform_device_count=8"

ROOT = Path(__file__).parents[1]
SHARED = ROOT.parent / "shared"

TINY = {
    "model_type": "qwen2",
    "vocab_size": 288,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 1024,
    "rms_norm_eps": 1e-6,
    "rope_theta": 10000.0,
    "tie_word_embeddings": True,
}


def random_task(rng: random.Random, pairs: int, tests: int = 1) -> tuple[dict, list]:
    """A task that mirrors grids left to right, and its solutions."""

    def grid():
        rows, cols = rng.randint(1, 5), rng.randint(1, 5)
        return [[rng.randint(0, 9) for _ in range(cols)] for _ in range(rows)]

    def mirrored(g):
        return [row[::-1] for row in g]

    train = [grid() for _ in range(pairs)]
    test = [grid() for _ in range(tests)]
    task = {
        "train": [{"input": g, "output": mirrored(g)} for g in train],
        "test": [{"input": g} for g in test],
    }
    return task, [mirrored(g) for g in test]


@pytest.fixture(autouse=True, scope="module")
def forget_programs():
    """Each program that XLA compiles takes memory maps, of which a process may have 65,530 on
    Linux; one that runs out of them ends in a segmentation fault."""
    yield
    if "jax" in sys.modules:
        sys.modules["jax"].clear_caches()
        gc.collect()


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory) -> Path:
    """Folder of a random Qwen2 of four layers, one token a character."""
    from tokenizers_for_tests import character_tokenizer

    from utils.model.weights import write_random_checkpoint

    folder = tmp_path_factory.mktemp("tiny_model")
    tokenizer = character_tokenizer()
    write_random_checkpoint(folder, {**TINY, "vocab_size": len(tokenizer) + 3})
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def tasks_file(tmp_path_factory) -> Path:
    """Seven tasks, eight test inputs, with their solutions beside them."""
    folder = tmp_path_factory.mktemp("tasks")
    rng = random.Random(0)
    made = {f"task{i}": random_task(rng, 1 + i % 3, 2 if i == 3 else 1) for i in range(7)}
    path = folder / "arc_format_train.json"
    path.write_text(json.dumps({name: task for name, (task, _) in made.items()}))
    solutions = {name: grids for name, (_, grids) in made.items()}
    (folder / "test_outputs_train.json").write_text(json.dumps(solutions))
    return path


@pytest.fixture
def gcs(monkeypatch):
    """A server of Google Cloud Storage with the bucket `bucket`, for this test alone."""
    from gcs_server import GcsServer

    server = GcsServer()
    monkeypatch.setenv("STORAGE_EMULATOR_HOST", server.url)
    yield server
    server.close()


class NoSignals(cli.Signals):
    """For a run in the test's own process: leaves the test runner's signal handlers alone."""

    def __init__(self):
        self.signum = None

    def note(self, signum):
        self.signum = signum


@pytest.fixture
def in_shell(monkeypatch, capfd):
    """Call it with a script's module and flags: runs it in this process, its exit included; gives
    exit code, stdout and stderr."""

    def leave(code):
        raise SystemExit(code)

    def call(script, flags):
        capfd.readouterr()
        with pytest.raises(SystemExit) as stop:
            cli.run(script.main, script.build_parser(), list(map(str, flags)))
        return stop.value.code, *capfd.readouterr()

    monkeypatch.setattr(os, "_exit", leave)
    monkeypatch.setattr(cli, "Signals", NoSignals)
    monkeypatch.setattr(sys, "stderr", sys.stderr)  # which `cli.run` wraps
    return call


def words(flags: dict) -> list[str]:
    """{"a": 1, "b": [2, 3], "c": True} -> --a 1 --b 2 3 --c."""
    found = []
    for name, value in flags.items():
        values = value if isinstance(value, list) else [] if value is True else [value]
        found += [f"--{name}", *map(str, values)]
    return found


def run_script(*args, cwd=None, env=None, timeout=300) -> subprocess.CompletedProcess:
    """Runs a script of the project as a user would."""
    script, *rest = map(str, args)
    return subprocess.run(
        [sys.executable, str(ROOT / script), *rest],
        cwd=cwd,
        env={**os.environ, **(env or {})},
        capture_output=True,
        text=True,
        timeout=timeout,
    )
