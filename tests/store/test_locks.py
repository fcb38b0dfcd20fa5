"""One process at a time for a folder, and for a file."""

import errno
import fcntl
import logging
import os
import subprocess
import sys
import threading
import time

import pytest
from conftest import ROOT

from utils.errors import UserError
from utils.store import locks
from utils.store.locks import claimed, locked

HOLD = """
import sys
from pathlib import Path
from utils.store.locks import claimed, locked
with globals()[sys.argv[1]](Path(sys.argv[2])):
    print("held", flush=True)
    sys.stdin.read()
"""


@pytest.mark.parametrize("lock", [locked, claimed])
def test_one_process_at_a_time(tmp_path, lock):
    path = tmp_path / "results" / "run"
    command = [sys.executable, "-c", HOLD, lock.__name__, str(path)]
    with subprocess.Popen(
        command, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as holder:
        assert holder.stdout.readline() == b"held\n"
        with pytest.raises(UserError, match=f"another process is writing to {path}"), lock(path):
            pass
        holder.kill()
        holder.wait()
    with lock(path):  # a process that was killed holds nothing
        assert path.is_dir() == (lock is locked)
    (tmp_path / "results").rmdir() if lock is claimed else path.rmdir()


@pytest.mark.parametrize("lock", [locked, claimed])
def test_nothing_is_left_of_a_folder_that_was_made_for_it(tmp_path, lock):
    with lock(tmp_path / "a" / "b" / "c"):
        pass
    assert not list(tmp_path.iterdir())
    with lock(tmp_path / "a" / "b"):
        (tmp_path / "a" / "notes.txt").write_text("")
    assert [path.name for path in (tmp_path / "a").iterdir()] == ["notes.txt"]


@pytest.mark.parametrize("lock", [locked, claimed])
def test_one_thread_at_a_time_while_the_lock_comes_and_goes(tmp_path, lock):
    """Also when the lock file is removed between another's opening and locking it."""
    inside, most, taken = [0], [0], [0]

    def work():
        for _ in range(300):
            try:
                with lock(tmp_path / "x"):
                    inside[0] += 1
                    most[0] = max(most[0], inside[0])
                    taken[0] += 1
                    time.sleep(0.0001)
                    inside[0] -= 1
            except UserError:
                pass

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert most == [1] and taken[0] >= 50


def test_a_claim_clears_away_what_a_kill_has_left(tmp_path):
    for name in ("x.json", f"x.json.{'0' * 16}.partial", ".x.json.lock"):
        (tmp_path / name).write_text("")
    with claimed(tmp_path / "x.json"):
        pass
    assert [path.name for path in tmp_path.iterdir()] == ["x.json"]


def test_a_device_cannot_be_claimed(tmp_path):
    (tmp_path / "null").symlink_to("/dev/null")
    with pytest.raises(UserError, match="is not a file"), claimed(tmp_path / "null"):
        pass


@pytest.mark.parametrize("lock", [locked, claimed])
def test_a_place_that_cannot_be_written(tmp_path, lock):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot write to"), lock(tmp_path / "file" / "x"):
        pass


def test_a_file_system_without_locks_is_said_once(tmp_path, monkeypatch, caplog):
    def no_locks(*args):
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr(fcntl, "flock", no_locks)
    monkeypatch.setattr(locks, "_without_locks", set())
    caplog.set_level(logging.WARNING)
    with locked(tmp_path / "run"), claimed(tmp_path / "x"), locked(tmp_path / "run"):
        pass
    assert [record.getMessage()[:28] for record in caplog.records] == [
        "the file system has no locks"
    ]
