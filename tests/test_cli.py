"""What every script shares: signals, streams that cannot be written, the last line."""

import glob
import importlib.util
import io
import json
import os
import random
import signal
import subprocess
import sys
import textwrap
import threading
import time

import pytest
from conftest import ROOT, TINY, NoSignals, random_task, words
from jax.errors import JaxRuntimeError

from utils import cli
from utils.cli import Interrupted, LogStream, last_words
from utils.errors import UserError, one_line
from utils.run.peers import Peers
from utils.shards import load_shard
from utils.shards.manifest import read_manifest
from utils.store.deadline import within

SIMPLE = ROOT / "simple_extraction_inference.py"


def script(body: str) -> list[str]:
    """The command of a script whose `main(args, signals)` has this body."""
    return [
        sys.executable,
        "-c",
        "import gc, os, signal, sys, threading, time\nfrom utils import cli\n"
        "def main(args, signals):\n"
        + textwrap.indent(textwrap.dedent(body), "    ")
        + "\ncli.run(main, cli.Parser('a script'))",
    ]


def ended(body: str, **changed) -> subprocess.CompletedProcess:
    made = subprocess.run(
        script(body), cwd=ROOT, **{"capture_output": True, "text": True, "timeout": 60} | changed
    )
    return made


# ------------------------------------------------------------------------------------- devices


def without_platforms() -> dict[str, str]:
    """The surroundings of a user who has chosen no device, and asks libtpu for nothing."""
    return {k: v for k, v in os.environ.items() if k != "JAX_PLATFORMS" and "TPU" not in k}


@pytest.mark.skipif(
    importlib.util.find_spec("libtpu") is None or cli._has_tpu(),
    reason="for a machine with libtpu and without a TPU",
)
def test_libtpu_says_nothing_where_there_is_no_tpu(tiny_model, tasks_file, tmp_path):
    bare = [sys.executable, "-c", "import jax; jax.devices()"]
    alone = subprocess.run(bare, env=without_platforms(), capture_output=True, text=True)
    assert "TPU" in alone.stderr  # what is to be kept from the user
    found = ended("import jax; print(jax.devices()[0].platform)", env=without_platforms())
    assert found.stderr == "" and found.stdout.strip() in ("cpu", "gpu")
    command = [
        *(sys.executable, SIMPLE, "--model_path", tiny_model, "--dataset_path", tasks_file),
        *("--output_path", tmp_path / "out.json", "--activations_dir", tmp_path / "a", "--dry_run"),
        *("--max_output_tokens", "8"),
    ]
    dry = subprocess.run(command, env=without_platforms(), capture_output=True, text=True)
    assert dry.returncode == 0 and "TPU" not in dry.stderr, dry.stderr


@pytest.mark.parametrize(
    ("files", "has_tpu"),
    [
        ({}, False),
        ({"/dev/accel0": None}, True),
        ({"/dev/vfio/0": None}, True),
        ({"/dev/vfio/vfio": None}, False),  # is there on any machine that could pass a device on
        ({"/sys/bus/pci/devices/0/vendor": "0x1ae0", "class": "0xff0000"}, True),
        ({"/sys/bus/pci/devices/0/vendor": "0x1ae0", "class": "0x020000"}, False),  # Google's card
        ({"/sys/bus/pci/devices/0/vendor": "0x10de", "class": "0x030200"}, False),  # Nvidia's
    ],
)
def test_a_tpu_is_never_overlooked(files, has_tpu, tmp_path, monkeypatch):
    """A machine with a TPU is left as it is: no variable for libtpu may be set there."""
    for name, text in files.items():
        path = tmp_path / (name[1:] if name[0] == "/" else f"sys/bus/pci/devices/0/{name}")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(f"{text}\n")
    below = glob.glob
    monkeypatch.setattr(cli.glob, "glob", lambda pattern: below(f"{tmp_path}{pattern}"))
    assert cli._has_tpu() is has_tpu


@pytest.mark.parametrize(
    ("processor", "before", "after"),
    [
        ("fpu avx2 avx512f avx512dq", "", "--xla_cpu_prefer_vector_width=512"),
        ("fpu avx2 avx512f avx512dq", "--a=1", "--a=1 --xla_cpu_prefer_vector_width=512"),
        ("fpu avx2 avx512f avx512dq", "--xla_cpu_prefer_vector_width=256", None),
        ("fpu avx2 fma", "--a=1", None),
        (None, "--a=1", None),
    ],
)
def test_wide_vectors(tmp_path, monkeypatch, processor, before, after):
    if processor:
        (tmp_path / "cpuinfo").write_text(f"model name : P\nflags : {processor} \n")
    monkeypatch.setenv("XLA_FLAGS", before)
    cli._use_wide_vectors(str(tmp_path / "cpuinfo"))
    assert os.environ["XLA_FLAGS"] == (before if after is None else after)


# ------------------------------------------------------------------------------------ signals

STOPS = {signal.SIGINT: 130, signal.SIGTERM: 143, signal.SIGHUP: 129}


def last_line(stop: signal.Signals) -> str:
    return f"stopped by {stop.name}; what was written is intact\n"


@pytest.mark.parametrize("stop", STOPS)
@pytest.mark.parametrize("held", [False, True])
def test_a_signal_has_a_line_and_an_exit_code(stop, held):
    hold = "signals.hold()" if held else ""
    run = ended(f"""
        {hold}
        os.kill(os.getpid(), {int(stop)})
        while True:
            time.sleep(0.01)
            signals.check()
    """)
    assert (run.returncode, run.stderr) == (STOPS[stop], last_line(stop))


# What was raised here, the interpreter dropped, and the run went on for good.
ON_OUR_WAY = {
    "a callback of the garbage collector": """
        gc.callbacks.append(lambda *_: send())
        gc.collect()
    """,
    "a destructor": """
        class Object:
            def __del__(self):
                send()
        Object()
    """,
    "a sorting key": """
        try:
            sorted([1, 2], key=lambda _: send())
        except BaseException:
            pass
    """,
}


@pytest.mark.parametrize("where", ON_OUR_WAY)
@pytest.mark.parametrize("held", [False, True])
def test_a_signal_in_foreign_code_is_not_lost(where, held):
    setup = f"""
        {"signals.hold()" if held else ""}
        def send():
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(0.2)
    """
    run = ended(
        textwrap.dedent(setup)
        + textwrap.dedent(ON_OUR_WAY[where])
        + "\nfor _ in range(500):\n    time.sleep(0.01)\n    signals.check()\n"
    )
    assert run.returncode == 143, run.stderr
    assert run.stderr.endswith(last_line(signal.SIGTERM))


@pytest.mark.parametrize(
    "name", ["simple_extraction_inference", "distributed_inference_with_activations"]
)
def test_an_interrupt_while_a_script_imports_is_not_lost(tmp_path, name):
    """Python's exception is, where an import takes all exceptions or calls back."""
    taken = "try:\n    os.kill(os.getpid(), signal.SIGINT)\nexcept BaseException:\n    pass"
    (tmp_path / "ijson.py").write_text(f"import os, signal\n{taken}")
    env = {**os.environ, "PYTHONPATH": str(tmp_path)}
    run = subprocess.run([sys.executable, ROOT / f"{name}.py"], env=env, capture_output=True)
    assert (run.returncode, run.stderr) == (-signal.SIGINT, b"")


def test_who_does_not_ask_is_ended_all_the_same():
    run = ended("""
        cli.GRACE_SECONDS = 0.5
        signals.hold()
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(30)
    """)
    assert (run.returncode, run.stderr) == (143, last_line(signal.SIGTERM))


def test_a_second_signal_changes_nothing():
    run = ended("""
        signals.hold()
        os.kill(os.getpid(), signal.SIGTERM)
        for _ in range(300):
            os.kill(os.getpid(), signal.SIGINT)
        time.sleep(0.5)
        assert signals.signum == signal.SIGTERM
        for _ in range(300):
            os.kill(os.getpid(), signal.SIGINT)
        signals.check()
    """)
    assert (run.returncode, run.stderr) == (143, last_line(signal.SIGTERM))


def test_a_signal_is_answered_while_c_code_keeps_the_main_thread():
    run = ended("""
        import hashlib
        threading.Timer(0.3, os.kill, (os.getpid(), signal.SIGTERM)).start()
        # Without the interpreter's lock, as XLA compiles.
        hashlib.pbkdf2_hmac("sha256", b"", b"", 100_000_000)
    """)
    assert (run.returncode, run.stderr) == (143, last_line(signal.SIGTERM))


def test_a_child_that_is_stopped_does_not_stop_its_parent():
    run = ended("""
        child = os.fork()
        if child == 0:
            time.sleep(30)
            os._exit(0)
        time.sleep(0.5)
        os.kill(child, signal.SIGTERM)
        assert os.WTERMSIG(os.waitpid(child, 0)[1]) == signal.SIGTERM
        time.sleep(0.3)
    """)
    assert (run.returncode, run.stderr) == (0, "")


def test_under_nohup_a_lost_terminal_is_no_reason_to_stop():
    body = "os.kill(os.getpid(), signal.SIGHUP); time.sleep(0.3)"
    run = ended(body, preexec_fn=lambda: signal.signal(signal.SIGHUP, signal.SIG_IGN))
    assert run.returncode == 0, run.stderr


# ------------------------------------------------------------------------------------- ending


class Gone(Peers):
    """Of a process whose peer has failed."""

    told = None

    def _cause(self, seconds):
        return UserError("process 1 is gone", 1)

    def leaving(self, error):
        self.told = error


def test_a_signal_ends_a_wait():
    signals = NoSignals()
    threading.Timer(0.3, signals.note, (signal.SIGTERM,)).start()
    with pytest.raises(Interrupted):
        within(60, lambda: time.sleep(60), TimeoutError, Peers(signals=signals).check)


def test_the_end_of_a_run_has_a_cause_and_a_last_moment(monkeypatch):
    left, gone = [], Gone()
    gone.count = 2
    monkeypatch.setattr(cli, "GRACE_SECONDS", 0.1)
    monkeypatch.setattr(cli, "leave", lambda *words: left.append(words))
    monkeypatch.setattr("utils.run.peers.leave_later", cli.leave_later)
    cause = gone.ending(JaxRuntimeError("INTERNAL: connection reset"))
    assert str(cause) == "process 1 is gone" and gone.told is cause
    time.sleep(0.5)
    assert left == [("error: process 1 is gone", 1)]


# ------------------------------------------------------------------------------------ streams


class Full(io.StringIO):
    def write(self, *text):
        raise OSError(28, "No space left on device")

    flush = write


def test_a_log_stream_does_not_raise():
    stream = LogStream(Full())
    assert stream.write("text") == 4
    stream.flush()
    broken = io.StringIO()
    broken.close()
    print("text", file=LogStream(broken), flush=True)


def test_a_line_after_a_bar_begins_a_line():
    class Terminal(io.StringIO):
        def isatty(self):
            return True

    file, terminal = io.StringIO(), Terminal()
    for stream in (LogStream(file), LogStream(terminal)):
        for text in ("\rbar 0  ", "\rbar 1  ", "a line\n", "another\n", "\rbar 2", "\n", "end\n"):
            stream.write(text)
        stream.write("\rcleared")
        stream.write("\r       \r")
        stream.write("end\n")
    assert file.getvalue() == "bar 0\nbar 1\na line\nanother\nbar 2\nend\ncleared\nend\n"
    assert terminal.getvalue() == (
        "\rbar 0  \rbar 1  \na line\nanother\n\rbar 2\nend\n\rcleared\r       \rend\n"
    )


BAR = """
    from tqdm import tqdm
    signals.hold()
    bar = tqdm(total=400, desc="working")
    def work():
        for i in range(400):
            bar.update()
            bar.set_postfix_str(f"{i} tokens/s", refresh=i % 2 == 0)
            print("a line of a log that is long", file=sys.stderr)
    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    bar.close()
    print("the end")
"""


def test_a_reader_that_leaves_does_not_stop_the_work():
    """And the bar does not keep its lock, for which everybody would wait."""
    with (
        subprocess.Popen(
            script(BAR), cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE
        ) as run,
    ):
        run.stderr.read(40)
        run.stderr.close()
        assert run.stdout.read() == b"the end\n"
        assert run.wait(60) == 0


@pytest.mark.parametrize("stderr", ["full", "closed"])
def test_a_log_that_cannot_be_written_does_not_stop_the_work(tmp_path, stderr):
    where = {"full": "2>/dev/full", "closed": "2>&-"}[stderr]
    command = [*script(BAR + f"    open({str(tmp_path / 'data')!r}, 'w').write('data')\n")]
    run = subprocess.run(
        ["sh", "-c", f'"$@" {where}', "sh", *command], cwd=ROOT, stdout=subprocess.PIPE, timeout=60
    )
    assert (run.returncode, run.stdout) == (0, b"the end\n")
    assert (tmp_path / "data").read_text() == "data"


def test_a_full_stdout_is_told():
    with open("/dev/full", "w") as full:
        body = "signals.hold(); print('text')"
        run = ended(body, stdout=full, stderr=subprocess.PIPE, capture_output=False)
    assert run.returncode == 1
    assert run.stderr == "error: No space left on device; what was written is intact\n"


def test_what_a_terminal_cannot_show_is_escaped():
    run = ended("print('gr\\u00fcn \\ud800')", env={**os.environ, "PYTHONIOENCODING": "ascii"})
    assert (run.returncode, run.stdout) == (0, "gr\\xfcn \\ud800\n"), run.stderr


def test_a_bar_in_a_log_file_is_a_line_every_half_minute():
    run = ended("""
        from tqdm import tqdm
        for i in (bar := tqdm(range(300))):
            bar.set_postfix_str(f"{i}", refresh=False)
            time.sleep(0.002)
    """)
    assert run.returncode == 0
    assert len(run.stderr.splitlines()) == 2, run.stderr  # the first and the last


SCRIPTS = [path.stem for path in ROOT.glob("*.py")]


@pytest.mark.parametrize("name", SCRIPTS)
def test_a_script_does_not_import_tqdm_before_its_stderr_is_known(name):
    code = f"import sys, {name}; print('tqdm' in sys.modules)"
    assert subprocess.check_output([sys.executable, "-c", code], cwd=ROOT) == b"False\n"


# ------------------------------------------------------------------------------ the last line


class JaxError(RuntimeError):
    pass


JaxError.__module__ = "jaxlib._jax"
LINES = [
    (UserError("no\x1b[2Jthing\nhere \ud800", 2), r"error: no\x1b[2Jthing\nhere \ud800", 2),
    (
        FileNotFoundError(2, "No such file or directory", "a\nb"),
        r"error: No such file or directory: a\nb; what was written is intact",
        1,
    ),
    (MemoryError(), "error: this machine has not enough memory; what was written is intact", 1),
    (
        RecursionError("maximum recursion depth exceeded"),
        "error: something that was read is nested too deeply (--verbose says where)",
        1,
    ),
    (
        JaxError("INTERNAL: it broke\n  stack"),
        r"error: JAX failed: INTERNAL: it broke\n  stack; what was written is intact",
        1,
    ),
    (BrokenPipeError(32, "Broken pipe"), "", 141),
    (RuntimeError("a bug"), "", 1),
    (AssertionError("a bug"), "", 1),
    (Interrupted(signal.SIGHUP), "stopped by SIGHUP; what was written is intact", 129),
]


@pytest.mark.parametrize(("error", "line", "code"), LINES, ids=lambda v: type(v).__name__)
def test_last_words(error, line, code):
    assert last_words(error) == (line, code)
    if code == 1 and line:  # before anything was written
        found = last_words(error, begun=False)
        assert found == (line.removesuffix("; what was written is intact"), 2)


@pytest.mark.parametrize("raised", [RuntimeError("no backend"), AssertionError()])
def test_what_the_code_of_jax_raises_is_one_line(raised):
    """Not by its class, which is Python's own, but by where it comes from."""
    code = compile("def ask(error): raise error", "xla_bridge.py", "exec")
    exec(code, module := {"__name__": "jax._src.xla_bridge"})
    with pytest.raises(type(raised)) as caught:
        module["ask"](raised)
    line, code = last_words(caught.value, begun=False)
    assert code == 2 and line == f"error: JAX failed: {str(raised) or 'AssertionError'}"


def test_what_is_not_foreseen_is_a_traceback():
    run = ended("raise ValueError('a bug')")
    assert run.returncode == 1 and "Traceback" in run.stderr
    run = ended("open('/nowhere/at/all')")
    assert run.returncode == 2
    assert run.stderr == "error: No such file or directory: /nowhere/at/all\n"


def test_a_long_line_keeps_its_advice():
    line = one_line("begin " + "x" * 10_000 + " advice", most=100)
    assert line.startswith("begin xx") and line.endswith("x advice") and len(line) < 110


def test_our_log_lines_are_one_line():
    run = ended(r"""
        import logging
        logging.getLogger("utils.run").info("%s", "a\x1b[2J\nb")
        logging.getLogger("stranger").warning("two\nlines")
    """)
    assert run.stderr == "a\\x1b[2J\\nb\ntwo\nlines\n"


# ---------------------------------------------------------------------- signals at any moment


@pytest.fixture(scope="module")
def steady(tiny_model, tmp_path_factory) -> dict[str, object]:
    """Flags of a run that writes a shard a sample, and takes longer than ten seconds."""
    rng = random.Random(3)
    path = tmp_path_factory.mktemp("steady") / "tasks.json"
    path.write_text(json.dumps({f"task{i}": random_task(rng, 2)[0] for i in range(400)}))
    assert TINY["max_position_embeddings"] >= 1024
    return {
        "model_path": tiny_model,
        "dataset_path": path,
        "max_train_pairs": 1,
        "max_output_tokens": 300,
        "save_every_n_samples": 1,
    }


def stop_at_random(flags, folder, rng, env, writing) -> tuple[float, int]:
    """Starts a run and sends it one signal, in its first ten seconds or, when `writing`,
    within three of its first shard: the seconds until it ended, and the shards it had stored."""
    paths = {"output_path": folder / "predictions.json", "activations_dir": folder / "activations"}
    stop = rng.choice([signal.SIGTERM, signal.SIGINT])
    run = subprocess.Popen(
        [sys.executable, SIMPLE, *words(flags | paths)],
        env={**os.environ, **env},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )
    with run:
        while writing and run.poll() is None and not list(folder.glob("activations/*.pkl")):
            time.sleep(0.01)
        time.sleep(rng.uniform(0, 3 if writing else 10))
        assert run.poll() is None, run.stderr.read()
        run.send_signal(stop)
        sent = time.monotonic()
        try:
            _, stderr = run.communicate(timeout=20)
        except subprocess.TimeoutExpired:
            run.kill()
            raise
        seconds = time.monotonic() - sent
    if run.returncode != -stop:  # as it ends an interpreter that still imports; to a shell the same
        assert run.returncode == STOPS[stop], (run.returncode, stderr)
        assert stderr.endswith(last_line(stop)) and "Traceback" not in stderr, stderr
    assert not paths["output_path"].exists()
    listed = set()
    if (paths["activations_dir"] / "metadata.json").exists():
        manifest = read_manifest(paths["activations_dir"])
        assert manifest["status"] == "running"
        listed = {entry["filename"] for entry in manifest["files"]}
        for name in listed:
            load_shard(paths["activations_dir"] / name)
        there = {path.name for path in paths["activations_dir"].glob("*.pkl")}
        assert listed <= there and len(there - listed) <= 1
    return seconds, len(listed)


@pytest.mark.parametrize("trials", [4, pytest.param(200, marks=pytest.mark.slow)])
def test_signals_at_random_moments(steady, tmp_path, trials):
    """None is lost, whatever the process does just then."""
    rng = random.Random(trials)
    cache = os.environ.get("JAX_COMPILATION_CACHE_DIR", str(tmp_path / "cache"))
    env = {"JAX_COMPILATION_CACHE_DIR": cache, "XLA_FLAGS": ""}
    found = []
    for trial in range(trials):
        folder = tmp_path / str(trial)
        folder.mkdir()
        found.append(stop_at_random(steady, folder, rng, env, trial % 3 == 2))
    slowest, writing = max(seconds for seconds, _ in found), sum(shards > 0 for _, shards in found)
    print(f"{trials} signals, {writing} while it wrote: ended after {slowest:.1f} s at most")
    assert writing >= trials // 3
