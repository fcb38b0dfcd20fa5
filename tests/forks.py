"""Scripts of the project in processes that are forked from one which has imported all: a start then
takes a tenth of a second of the processor instead of three.

Tests that ask how a script starts, and with what it imports, run it by `subprocess` instead.
"""

import contextlib
import functools
import multiprocessing.connection
import multiprocessing.forkserver
import os
import runpy
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
ALL = ["pretend", "datasets", "optax", "simple_extraction_inference", "example_usage"]


@functools.cache
def forks():
    """A process that has imported all and computed nothing: those forked from it start at once."""
    context, path = multiprocessing.get_context("forkserver"), f"{ROOT}{os.pathsep}{ROOT / 'tests'}"
    context.set_forkserver_preload(ALL)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", path)  # the server takes it from here alone
        multiprocessing.forkserver.ensure_running()
    return context


def _script(words, environment, folder, streams, pretended, in_haste):
    """What the process just forked does, and ends with."""
    changed = {name for name, _ in os.environ.items() ^ environment.items()}
    stale = {name for name in changed if name.startswith(("JAX_", "HF_"))}
    assert not stale, f"{stale} were read when the modules were imported"
    for number, stream in enumerate(streams, 1):
        if isinstance(stream, str):
            os.dup2(os.open(stream, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644), number)
        else:
            os.dup2(stream.fileno(), number)
            stream.close()
    sys.stdout = os.fdopen(1, "w", closefd=False)
    sys.stderr = os.fdopen(2, "w", buffering=1, errors="backslashreplace", closefd=False)
    os.environ.clear()
    os.environ.update(environment)
    os.chdir(folder)
    if pretended is not None:
        import pretend

        pretend.from_now_on(pretended)
    if in_haste:
        import haste

        haste.optimise(False)
    sys.argv = words
    runpy.run_path(words[0], run_name="__main__")


class Script:
    """A script and its flags in a process of its own, spoken to as to a `subprocess.Popen` whose
    output is text and goes into pipes.

    env: what is changed in the environment. log: a file that all output goes to instead. pretended:
    no model computes, and a pass takes so many seconds. in_haste: programs are not optimised, for
    those that run for moments.
    """

    def __init__(
        self, script, *flags, env=None, cwd=None, log=None, pretended=None, in_haste=False
    ):
        self.args = [str(ROOT / script), *map(str, flags)]
        pipes = [] if log else [multiprocessing.connection.Pipe(duplex=False) for _ in range(2)]
        streams = [str(log)] * 2 if log else [writer for _, writer in pipes]
        place = {**os.environ, **(env or {})}, str(cwd or os.getcwd())
        self._process = forks().Process(
            target=_script, args=(self.args, *place, streams, pretended, in_haste)
        )
        self._process.start()
        self.pid = self._process.pid
        for _, writer in pipes:
            writer.close()
        self._readers = [reader for reader, _ in pipes]  # which close what they hold
        files = [os.fdopen(r.fileno(), closefd=False) for r in self._readers]
        self.stdout, self.stderr = files or (None, None)

    @property
    def returncode(self) -> int | None:
        return self._process.exitcode

    def poll(self) -> int | None:
        return self.returncode

    def wait(self, timeout: float | None = None) -> int:
        self._process.join(timeout)
        if self.returncode is None:
            raise subprocess.TimeoutExpired(self.args, timeout)
        return self.returncode

    def communicate(self, timeout: float | None = None) -> tuple[str, str]:
        with ThreadPoolExecutor(2) as pool:
            read = [pool.submit(file.read) for file in (self.stdout, self.stderr)]
            try:
                self.wait(timeout)
            except subprocess.TimeoutExpired:
                self.kill()
                raise
        return read[0].result(), read[1].result()

    def send_signal(self, signum: int) -> None:
        if self.poll() is None:
            with contextlib.suppress(ProcessLookupError):  # it has ended since
                os.kill(self.pid, signum)

    def kill(self) -> None:
        self._process.kill()

    def __enter__(self) -> "Script":
        return self

    def __exit__(self, *_) -> None:
        """Ends with the block, whatever it still does."""
        self.kill()
        self.wait()
        for file in filter(None, (self.stdout, self.stderr)):
            file.close()
        for reader in self._readers:
            reader.close()


def run_forked(script, *flags, timeout=300, **how) -> subprocess.CompletedProcess:
    """As `conftest.run_script`, where starting is not what is asked about. how: of `Script`."""
    with Script(script, *flags, **how) as process:
        stdout, stderr = process.communicate(timeout)
    return subprocess.CompletedProcess(process.args, process.returncode, stdout, stderr)
