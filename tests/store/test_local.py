"""The lock of a run folder: one process at a time."""

import subprocess
import sys

import pytest
from conftest import ROOT

from utils.errors import UserError
from utils.store.local import locked

HOLD = """
import sys
from pathlib import Path
from utils.store.local import locked
with locked(Path(sys.argv[1])):
    print("held", flush=True)
    sys.stdin.read()
"""


def test_a_folder_is_one_process_at_a_time(tmp_path):
    folder = tmp_path / "run"
    command = [sys.executable, "-c", HOLD, str(folder)]
    with subprocess.Popen(
        command, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as holder:
        assert holder.stdout.readline() == b"held\n"
        with pytest.raises(UserError, match="another process is writing"), locked(folder):
            pass
        holder.kill()
        holder.wait()
    with locked(folder):  # a process that was killed holds nothing
        assert folder.is_dir()
