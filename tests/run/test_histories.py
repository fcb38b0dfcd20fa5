"""Random histories of a run, in a process of its own; see histories.py."""

import os
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest


@pytest.mark.parametrize(
    ("count", "seed"), [(30, 0), pytest.param(1000, 1, marks=pytest.mark.slow)]
)
def test_every_sample_once_whatever_happens(count, seed):
    memory = "/dev/shm" if os.path.isdir("/dev/shm") else None  # where fsync takes no time
    with tempfile.TemporaryDirectory(dir=memory) as folder:
        script = Path(__file__).with_name("histories.py")
        command = [sys.executable, str(script), str(count), str(seed), folder]
        run = subprocess.run(command, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr[-5000:]
    assert int(run.stdout) == count
