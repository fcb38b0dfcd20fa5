"""Files and folders that are whole or not there, and JSON without NaN."""

import errno
import io
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import ROOT

from utils.errors import UserError
from utils.shards.manifest import stem
from utils.store import local
from utils.store.local import (
    Draft,
    JsonFile,
    checksum,
    in_words,
    json_lines,
    new_folder,
    remove_partial,
    replacing,
    to_json,
    whole_name,
    write_json,
    write_result,
)


def names(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


def failing(call: str, number: int, only_folders: bool = False):
    """An `os.<call>` that fails with this errno."""
    real = getattr(os, call)

    def fail(*args):
        if only_folders and not Path(f"/proc/self/fd/{args[0]}").resolve().is_dir():
            return real(*args)
        raise OSError(number, os.strerror(number))

    return fail


# -------------------------------------------------------------------------------------- drafts


def test_a_file_has_its_name_when_it_is_whole(tmp_path):
    path = tmp_path / "x.pkl"
    path.write_bytes(b"earlier")
    with replacing(path) as sink:
        sink.write(b"later")
        (partial,) = names(tmp_path) - {"x.pkl"}
        assert whole_name(partial) == "x.pkl" and partial.endswith(".partial")
        assert path.read_bytes() == b"earlier"
    assert path.read_bytes() == b"later" and names(tmp_path) == {"x.pkl"}
    assert (sink.size, sink.crc32c) == (5, checksum(io.BytesIO(b"later")))


@pytest.mark.parametrize("error", [KeyboardInterrupt, OSError, SystemExit])
def test_an_error_leaves_the_earlier_file_alone(tmp_path, error):
    path = tmp_path / "x.pkl"
    path.write_bytes(b"earlier")
    with pytest.raises(error), replacing(path) as sink:
        sink.write(b"part")
        raise error
    assert path.read_bytes() == b"earlier" and names(tmp_path) == {"x.pkl"}


def test_two_writers_of_one_name_do_not_mix(tmp_path):
    path = tmp_path / "x"
    with replacing(path) as one, replacing(path) as two:
        one.write(b"1111")
        two.write(b"22")
        one.write(b"1111")
    assert path.read_bytes() == b"11111111" and names(tmp_path) == {"x"}


def test_no_link_of_a_strangers_is_followed(tmp_path, monkeypatch):
    victim, path = tmp_path / "victim", tmp_path / "x"
    victim.write_text("mine")
    monkeypatch.setattr(local.secrets, "token_hex", lambda count: "0" * 16)
    (tmp_path / f"x.{'0' * 16}.partial").symlink_to(victim)
    with pytest.raises(FileExistsError), replacing(path) as sink:
        sink.write(b"theirs")
    assert victim.read_text() == "mine" and not path.exists()


@pytest.mark.parametrize("device", ["/dev/null", "folder"])
def test_what_is_no_file_is_not_replaced(tmp_path, device):
    (tmp_path / "folder").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / device)  # a path from the root stays itself
    with pytest.raises(OSError, match="is not a file"), replacing(tmp_path / "link") as sink:
        sink.write(b"x")
    assert names(tmp_path) == {"folder", "link"}


def test_exclusive_replaces_nothing(tmp_path):
    path = tmp_path / "x"
    with replacing(path, exclusive=True) as sink:
        sink.write(b"first")
    with pytest.raises(FileExistsError), replacing(path, exclusive=True) as sink:
        sink.write(b"second")
    assert path.read_bytes() == b"first" and names(tmp_path) == {"x"}
    path.unlink()
    with pytest.raises(FileExistsError), replacing(path, exclusive=True) as sink:
        path.write_bytes(b"of another process, in between")
    assert path.read_bytes() == b"of another process, in between" and names(tmp_path) == {"x"}


@pytest.mark.parametrize("number", [errno.EPERM, errno.ENOTSUP, errno.ENOSYS])
def test_exclusive_without_hard_links(tmp_path, monkeypatch, number):
    monkeypatch.setattr(os, "link", failing("link", number))
    test_exclusive_replaces_nothing(tmp_path)


@pytest.mark.parametrize("number", [errno.EINVAL, errno.ENOTSUP, errno.ENOSYS])
def test_a_file_system_that_cannot_sync_folders(tmp_path, monkeypatch, number):
    monkeypatch.setattr(os, "fsync", failing("fsync", number, only_folders=True))
    write_json(tmp_path / "x.json", {"a": 1})
    with new_folder(tmp_path / "folder") as folder:
        (folder / "file").write_text("x")
    assert names(tmp_path) == {"x.json", "folder"}


@pytest.mark.parametrize("number", [errno.EIO, errno.ENOSPC])
@pytest.mark.parametrize("only_folders", [True, False])
def test_a_disk_that_cannot_sync(tmp_path, monkeypatch, number, only_folders):
    monkeypatch.setattr(os, "fsync", failing("fsync", number, only_folders))
    with pytest.raises(OSError):
        write_json(tmp_path / "x.json", {"a": 1})
    assert names(tmp_path) == ({"x.json"} if only_folders else set())


def test_names_of_partial_files():
    token = "0123456789abcdef"
    for name in ("activations_host003_batch_000001.pkl", "metadata.json", "answers.jsonl"):
        for partial in (name, f"{name}.partial", f"{name}.{token}.partial"):
            assert whole_name(partial) == stem(partial) == name
    assert stem(f"notes.txt.{token}.partial") is None
    assert stem("metadata.json.mine") is None


def test_leftovers_of_one_file_alone_are_removed(tmp_path):
    left = {f"a.json.{'0' * 16}.partial", "a.json.partial"}
    others = {"a.json", "a.json.mine.partial", f"b.json.{'0' * 16}.partial"}
    for name in left | others:
        (tmp_path / name).write_text("")
    remove_partial(tmp_path / "a.json")
    assert names(tmp_path) == others


def test_several_files_are_finished_before_the_first_has_its_name(tmp_path):
    with Draft(tmp_path / "a") as a, Draft(tmp_path / "b") as b:
        for draft in (a, b):
            draft.file.write(b"x")
            draft.finish()
        assert all(name.endswith(".partial") for name in names(tmp_path))
        a.commit()
    assert names(tmp_path) == {"a"}


# -------------------------------------------------------------------------------------- folders


def test_a_folder_has_its_name_when_it_is_whole(tmp_path):
    path = tmp_path / "results" / "sae"
    with new_folder(path) as folder:
        (folder / "below").mkdir()
        (folder / "below" / "x").write_text("x")
        assert not path.exists()
    assert (path / "below" / "x").read_text() == "x" and names(path.parent) == {"sae"}
    with pytest.raises(OSError), new_folder(path) as folder:
        (folder / "y").write_text("y")
    assert names(path.parent) == {"sae"} and names(path) == {"below"}


def left_of(folder: Path, machine: str = local._MACHINE) -> Path:
    """As a process that was killed has left of it."""
    partial = folder.with_name(f"{folder.name}.{machine}00000000.partial")
    partial.mkdir()
    (partial / "x").write_text("x")
    return partial


def test_what_a_kill_left_of_a_folder_goes_when_it_is_made_again(tmp_path):
    left, foreign = left_of(tmp_path / "sae"), left_of(tmp_path / "sae", "01234567")
    other = left_of(tmp_path / "other")
    (tmp_path / "sae.partial").mkdir()
    with new_folder(tmp_path / "sae"):
        assert not left.exists()
    assert names(tmp_path) == {"sae", foreign.name, other.name, "sae.partial"}


def test_a_folder_that_another_process_fills_is_left_alone(tmp_path):
    path = tmp_path / "sae"
    with pytest.raises(OSError), new_folder(path) as first:
        with new_folder(path):
            pass  # the other one has put nothing there yet
        (first / "x").write_text("x")
        path.rmdir()
        with new_folder(path) as second:
            (second / "y").write_text("y")
        assert names(first) == {"x"}
    assert names(tmp_path) == {"sae"} and names(path) == {"y"}


@pytest.mark.parametrize("kind", ["no such call", "windows"])
def test_without_locks_nobody_knows_whether_a_folder_is_in_use(tmp_path, monkeypatch, kind):
    def refuse(*args):
        raise OSError(errno.ENOSYS, os.strerror(errno.ENOSYS))

    left = left_of(tmp_path / "sae")
    if kind == "windows":
        monkeypatch.setattr("utils.store.local.fcntl", None)
    else:
        monkeypatch.setattr("fcntl.flock", refuse)
    with new_folder(tmp_path / "sae"):
        pass
    assert names(tmp_path) == {"sae", left.name}


# ----------------------------------------------------------------------------------------- JSON


def test_json_has_no_word_for_what_is_not_finite(tmp_path):
    nan, inf = float("nan"), float("inf")
    value = {"a": nan, "b": [1.5, -inf, {"c": (inf, "NaN", None, True, 2)}], "d": {"e": 1e308}}
    expected = {"a": None, "b": [1.5, None, {"c": [None, "NaN", None, True, 2]}], "d": {"e": 1e308}}

    def refuse(word):
        raise AssertionError(word)

    for text in (to_json(value), json_lines(value).decode()):
        assert json.loads(text, parse_constant=refuse) == expected
    with JsonFile(tmp_path / "list.json", b"[]") as file:
        file.write(to_json(value).encode())
        file.commit()
    assert json.loads((tmp_path / "list.json").read_text(), parse_constant=refuse) == [expected]


@pytest.mark.parametrize(
    ("way_on", "advice"),
    [
        ((), "free space, or choose another folder"),
        (("then --resume",), "free space, then --resume"),
    ],
)
def test_a_result_that_cannot_be_written_leaves_the_old_one(tmp_path, monkeypatch, way_on, advice):
    path = tmp_path / "new" / "predictions.json"
    write_result(path, json_lines({"a": [1, "ü"], "b": None}))
    assert json.loads(path.read_text()) == {"a": [1, "ü"], "b": None}
    before = path.read_bytes()
    assert len(before.splitlines()) == 4  # a task a line

    def fail(*args):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(
        UserError, match=rf"predictions\.json: No space left .*; {advice}$"
    ) as error:
        write_result(path, json_lines({"a": 2}), *way_on)
    assert error.value.exit_code == 1
    assert names(path.parent) == {path.name} and path.read_bytes() == before
    monkeypatch.undo()
    write_result(path, json_lines({}))
    assert json.loads(path.read_text()) == {}


def test_a_json_file_in_a_folder_that_is_not_there(tmp_path):
    with pytest.raises(UserError, match="cannot write") as error:
        JsonFile(tmp_path / "nowhere" / "x.json")
    assert error.value.exit_code == 2


@pytest.mark.parametrize(
    ("size", "words"),
    [(0, "0 bytes"), (7, "7 bytes"), (3e5, "0.30 MB"), (2.5e8, "0.25 GB"), (1.2e10, "12.00 GB")],
)
def test_no_size_is_told_as_nothing(size, words):
    assert in_words(size) == words


def test_a_folder_that_cannot_be_opened_is_written_to_all_the_same(tmp_path, monkeypatch):
    """As on Windows, where no folder can be."""
    opened = os.open

    def refuse(path, *args, **options):
        if Path(path).is_dir():
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))
        return opened(path, *args, **options)

    monkeypatch.setattr(os, "open", refuse)
    write_json(tmp_path / "x.json", {"a": 1})
    assert json.loads((tmp_path / "x.json").read_text()) == {"a": 1}


def test_what_reads_a_run_needs_no_locks():
    """Which Windows has in another module: a run is read there, and written elsewhere."""
    code = """
import signal, sys
sys.modules["fcntl"] = None
del signal.SIGHUP
import utils.shards, utils.dataset, utils.dataset.bridges, utils.dataset.contrast
"""
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)
