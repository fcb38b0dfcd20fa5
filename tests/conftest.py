"""Fixtures shared by the tests: a tiny random model with a tokenizer, and a few tasks."""

import gc
import json
import os
import random
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
from hypothesis import settings
from tiny import TINY, random_task, write_model, write_tasks
from xdist.scheduler import LoadFileScheduling

from utils import cli

# Before anything starts JAX: meshes are tested on virtual devices, of which a run on one device
# takes the first.
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["XLA_FLAGS"] = "--xla_force_host_platform_device_count=8"
# Workers share the cores: threads of torch (OMP_NUM_THREADS) and XLA (NPROC) would wait, spinning,
# for cores that the other workers have.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("NPROC", "1")
# How long an example takes says how busy the machine is, not whether the code is right.
settings.register_profile("tests", deadline=None)
settings.load_profile("tests")
# One cache for a run of the tests: a program is compiled once, whichever process asks for it.
if "PYTEST_XDIST_WORKER" not in os.environ:
    PROGRAMS = tempfile.TemporaryDirectory(prefix="programs-of-tests-", ignore_cleanup_errors=True)
    os.environ["JAX_COMPILATION_CACHE_DIR"] = PROGRAMS.name
    os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0"

ROOT = Path(__file__).parents[1]
SHARED = ROOT.parent / "shared"


# Files that wait for processes and servers more than they compute: all in one worker, beside which
# two others have the processor's two cores.
WAITING = ("test_processes", "test_processes_with_bucket", "test_uploads", "test_bucket")
WAITING += ("test_peers", "test_histories")
# Files that take minutes, which the workers share best where they begin with them.
LONG = (*WAITING, "test_example_usage", "test_benchmarks", "test_bad_input", "test_meshes")
LONG += ("test_decoder", "test_sae", "test_references", "test_generate", "test_flash", "test_tpu")
LONG += ("test_mesh", "test_arc_inference", "test_codec", "test_views", "test_cli")


def pytest_collection_modifyitems(items):
    items.sort(key=lambda item: LONG.index(item.path.stem) if item.path.stem in LONG else len(LONG))


class ByFile(LoadFileScheduling):
    """A file stays in one worker, so that what its tests share is made once."""

    def _split_scope(self, nodeid: str) -> str:
        file = super()._split_scope(nodeid)
        return "waiting" if Path(file).stem in WAITING else file


def pytest_xdist_make_scheduler(config, log):
    return ByFile(config, log)


@pytest.fixture(autouse=True, scope="module")
def forget_programs():
    """Each program that XLA compiles takes memory maps, of which a process may have 65,530 on
    Linux; one that runs out of them ends in a segmentation fault."""
    yield
    if "jax" in sys.modules:
        sys.modules["jax"].clear_caches()
        gc.collect()


@pytest.fixture(autouse=True, scope="session")
def in_haste():
    """What this process compiles is not optimised, but where a test takes `optimised`."""
    import haste

    haste.optimise(False)
    yield
    haste.optimise(True)


@pytest.fixture
def optimised(in_haste):
    """What the test compiles is what a user's run compiles."""
    import haste

    haste.optimise(True)
    yield
    haste.optimise(False)


@pytest.fixture(autouse=True)
def stay(monkeypatch):
    """A run that fails in the test's own process does not end that process a little later."""
    monkeypatch.setattr("utils.run.peers.leave_later", lambda error: None)


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory) -> Path:
    """Folder of a random Qwen2 of two layers, one token a character."""
    return write_model(tmp_path_factory.mktemp("tiny_model"))


@pytest.fixture(scope="session")
def four_layers(tmp_path_factory) -> Path:
    """The same of four layers, for what reads several layers of a run that only pretends."""
    return write_model(tmp_path_factory.mktemp("four_layers"), num_hidden_layers=4)


@pytest.fixture(scope="session")
def tasks_file(tmp_path_factory) -> Path:
    """Seven tasks, eight test inputs, with their solutions beside them."""
    return write_tasks(tmp_path_factory.mktemp("tasks"))


@pytest.fixture(scope="module")
def run_folder(tmp_path_factory, four_layers, tasks_file) -> Path:
    """The shards of a pretended run of seven tasks with generated answers, for reading."""
    from runs import extracted

    return extracted(tmp_path_factory.mktemp("run"), four_layers, tasks_file)


@pytest.fixture(scope="session")
def models(tmp_path_factory):
    """Folders of a model of 14 heads and of one of 16."""
    from checkpoints import write_random_checkpoint
    from processes import HEADS
    from tokenizers_for_tests import character_tokenizer

    tokenizer = character_tokenizer()
    folders = {}
    for name, fields in HEADS.items():
        folder = folders[name] = tmp_path_factory.mktemp(name)
        size = {"vocab_size": len(tokenizer) + 3, "num_hidden_layers": 2}
        write_random_checkpoint(folder, {**TINY, **size, **fields})
        tokenizer.save_pretrained(folder)
    return folders


@pytest.fixture(scope="session")
def tasks(tmp_path_factory):
    """25 tasks, 29 test inputs: no multiple of any mesh."""
    rng = random.Random(1)
    made = {f"t{i:02}": random_task(rng, 1 + i % 2, 1 + (i % 7 == 3), 3) for i in range(25)}
    path = tmp_path_factory.mktemp("tasks") / "arc_format_train.json"
    path.write_text(json.dumps({name: task for name, (task, _) in made.items()}))
    solutions = {name: grids for name, (_, grids) in made.items()}
    (path.parent / "test_outputs_train.json").write_text(json.dumps(solutions))
    return path


@pytest.fixture(scope="session")
def reference(models, tasks, tmp_path_factory):
    """What one process makes of the tasks with the 14-headed model."""
    from processes import in_process

    return in_process(models["14-2"], tasks, tmp_path_factory.mktemp("one"), mesh_shape=[4, 2])


@pytest.fixture(scope="session")
def pretended(models, tasks, tmp_path_factory):
    """What a run makes of the same that only pretends."""
    from processes import in_process
    from runs import pretending

    with pretending():
        folder = tmp_path_factory.mktemp("pretended")
        return in_process(models["14-2"], tasks, folder, mesh_shape=[4, 2])


@pytest.fixture
def fake_model(monkeypatch):
    """Runs of this process are computed by `pretend.FakeComputation`, and so in milliseconds."""
    from pretend import FakeComputation

    # By monkeypatch, so that what a test patches on top of it is undone first.
    monkeypatch.setattr("utils.run.loop.Computation", FakeComputation)


@pytest.fixture
def gcs(monkeypatch):
    """A server of Google Cloud Storage with the bucket `bucket`, for this test alone."""
    from gcs_server import GcsServer

    server = GcsServer()
    monkeypatch.setenv("STORAGE_EMULATOR_HOST", server.url)
    monkeypatch.setenv("GCE_METADATA_HOST", "127.0.0.1:1")  # no test asks the machine it runs on
    monkeypatch.setattr("utils.shards.uploads.MANIFEST_SECONDS", 0.05)  # nor waits for its quota
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
