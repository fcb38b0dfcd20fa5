"""Files and folders of a disk that are whole or not there, their checksums, and JSON; free space.

Whatever has a final name was written to a temporary file beside it, brought to the disk, and only
then renamed: see `Draft`, on which all that writes here is built.
"""

import base64
import contextlib
import errno
import io
import json
import os
import platform
import re
import secrets
import shutil
import tempfile
from collections.abc import Iterator
from hashlib import sha256
from pathlib import Path
from typing import Any, BinaryIO

import google_crc32c
import numpy as np

from utils.errors import UserError

try:
    import fcntl
except ImportError:  # Windows, where runs are read
    fcntl = None

PARTIAL = ".partial"  # ends the name of a file that is not whole yet
_PARTIAL_NAME = re.compile(rf"(.+?)(\.[0-9a-f]{{16}})?{re.escape(PARTIAL)}", re.DOTALL)
# In the names of unfinished folders: of some shared disks a machine sees its own locks alone.
_MACHINE = sha256(platform.node().encode()).hexdigest()[:8]
_CHUNK = 1 << 20  # bytes; checksummed, then written, while still in the cache
NO_SPACE = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}
_NO_SUCH_CALL = {errno.EINVAL, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS}
_NO_HARD_LINKS = _NO_SUCH_CALL | {errno.EPERM, errno.EMLINK}


class Draft(contextlib.AbstractContextManager):
    """A file on its way to the name `path`, which it has only once all of it is on the disk.

    Until `commit` it is a new file beside `path` with a random name, which ends in `.partial`; an
    earlier file at `path` stays as it is. Leaving the `with` block without a commit removes it.
    Several files that belong together are all brought to the disk by `finish` before the first is
    committed: a full disk then leaves none of them behind. All methods raise OSError.

    file: unbuffered, to be written to.
    """

    def __init__(self, path: Path):
        if path.exists() and not path.is_file():
            raise OSError(errno.EEXIST, "it is there, and is not a file", str(path))
        self.path = path
        self._temporary = path.with_name(f"{path.name}.{secrets.token_hex(8)}{PARTIAL}")
        # "x": the file is ours alone, and a symbolic link of that name is not followed.
        self.file = open(self._temporary, "xb", buffering=0)  # noqa: SIM115

    def finish(self) -> None:
        """Brings what was written to the disk, under the temporary name still."""
        if not self.file.closed:
            os.fsync(self.file.fileno())
            self.file.close()

    def commit(self, exclusive: bool = False) -> None:
        """Gives the file its name.

        exclusive: raise FileExistsError, and replace nothing, where a file has that name already.
        """
        self.finish()
        if exclusive:
            _rename_to_new(self._temporary, self.path)
        else:
            os.replace(self._temporary, self.path)
        _sync_folder(self.path.parent)

    def __exit__(self, *exception: object) -> None:
        with contextlib.suppress(OSError):  # of a disk that fails: what is left is thrown away
            self.file.close()
        with contextlib.suppress(OSError):
            self._temporary.unlink(missing_ok=True)


def remedy(error: OSError) -> str:
    """What cures a disk that cannot be written to, in the imperative."""
    if error.errno in NO_SPACE:
        return "free space"
    if error.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
        return "make it writable"
    return "put that right"


def whole_name(name: str) -> str:
    """The name that a partial file was to get; any other name as it is."""
    partial = _PARTIAL_NAME.fullmatch(name)
    return partial[1] if partial else name


def remove_partial(path: Path) -> None:
    """Removes what processes that were killed have left of the file `path`, which is locked."""
    with contextlib.suppress(OSError):  # what cannot be removed is in nobody's way
        for name in os.listdir(path.parent):
            if name != path.name and whole_name(name) == path.name:
                (path.parent / name).unlink(missing_ok=True)


def _rename_to_new(source: Path, target: Path) -> None:
    """Renames a file to a name that no file has; raises FileExistsError where one has it."""
    try:
        os.link(source, target)
    except OSError as error:
        if error.errno not in _NO_HARD_LINKS:
            raise
        # A file system without hard links cannot look and rename in one step.
        if os.path.lexists(target):
            raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST), str(target)) from None
        os.replace(source, target)
    else:
        os.unlink(source)


def _sync_folder(folder: Path) -> None:
    """Brings the names in a folder to the disk. Where the file system has no such call, or the
    folder cannot be opened, as on Windows, what the files hold is on the disk all the same."""
    try:
        handle = os.open(folder, os.O_RDONLY)
    except PermissionError:
        return
    try:
        os.fsync(handle)
    except OSError as error:
        if error.errno not in _NO_SUCH_CALL:
            raise
    finally:
        os.close(handle)


@contextlib.contextmanager
def replacing(path: Path, exclusive: bool = False) -> Iterator["Sink"]:
    """What goes into the sink has the name `path` once all of it is on the disk; see `Draft`."""
    with Draft(path) as draft:
        yield Sink(draft.file)
        draft.commit(exclusive)


@contextlib.contextmanager
def new_folder(path: Path) -> Iterator[Path]:
    """A folder to be filled, which is called `path` once the block has ended without an error.

    Until then it lies beside `path` under a random name that ends in `.partial`; an error removes
    it, and what a process that was killed leaves of it goes when the same machine makes `path`
    again. The parent of `path` is made. Raises OSError, also where `path` is there already and is
    not an empty folder.
    """
    path = path.absolute()
    path.parent.mkdir(parents=True, exist_ok=True)
    start = f"{path.name}.{_MACHINE}"
    for name in os.listdir(path.parent):
        if re.fullmatch(rf"{re.escape(start)}[0-9a-f]{{8}}{re.escape(PARTIAL)}", name):
            _remove_unless_in_use(path.parent / name)
    temporary = path.with_name(f"{start}{secrets.token_hex(4)}{PARTIAL}")
    temporary.mkdir()
    lock = _locked(temporary)
    try:
        yield temporary
        for file in filter(Path.is_file, temporary.rglob("*")):
            with open(file, "rb") as handle:
                os.fsync(handle.fileno())
        os.rename(temporary, path)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    finally:
        if lock is not None:
            os.close(lock)
    _sync_folder(path.parent)


def _remove_unless_in_use(partial: Path) -> None:
    """Removes a folder that nobody holds the lock of. One that is empty may be new, and its process
    about to lock it, before it puts anything there."""
    with contextlib.suppress(OSError):
        if any(partial.iterdir()) and (lock := _locked(partial)) is not None:
            shutil.rmtree(partial, ignore_errors=True)
            os.close(lock)


def _locked(folder: Path) -> int | None:
    """A handle that holds the lock of a folder until it is closed, at the latest by the end of the
    process; None where another one holds it, and where there are no locks."""
    with contextlib.suppress(OSError):
        handle = os.open(folder, os.O_RDONLY)
        with contextlib.suppress(OSError, AttributeError):
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return handle
        os.close(handle)
    return None


@contextlib.contextmanager
def scratch_file(what: str) -> Iterator[BinaryIO]:
    """A file without a name for the content of `what`, which the block fills: it stays open after
    it, at its beginning, and ends with its handle. Raises UserError where it cannot be written."""
    try:
        with contextlib.ExitStack() as unless_filled:
            file = unless_filled.enter_context(tempfile.TemporaryFile())
            yield file
            file.seek(0)
            unless_filled.pop_all()
    except OSError as error:
        raise UserError(
            f"cannot keep {what} in a temporary file: {error.strerror}; {remedy(error)}, or set "
            "TMPDIR to another folder"
        ) from error


class Sink:
    """Counts the bytes written to it; with an unbuffered `file`, checksums and writes them too."""

    def __init__(self, file: BinaryIO | None = None):
        self.file = file
        self.size = 0
        self._crc = google_crc32c.Checksum()

    def write(self, buffer: Any) -> None:
        view = np.frombuffer(buffer, np.uint8)
        self.size += view.size
        if self.file is None:
            return
        for start in range(0, view.size, _CHUNK):
            chunk = view[start : start + _CHUNK]
            self._crc.update(chunk)
            while chunk.size:  # a disk that fills up first takes a part
                chunk = chunk[self.file.write(chunk) :]

    @property
    def crc32c(self) -> str:
        return base64.b64encode(self._crc.digest()).decode()


def checksum(file: BinaryIO, most: int | None = None) -> str:
    """crc32c, in base64, of the rest of `file`, or of its next `most` bytes."""
    crc, buffer = google_crc32c.Checksum(), np.empty(_CHUNK, np.uint8)
    left = float("inf") if most is None else most
    while count := file.readinto(buffer[: min(_CHUNK, left)]):
        crc.update(buffer[:count])
        left -= count
    return base64.b64encode(crc.digest()).decode()


def to_json(value: Any) -> str:
    """JSON in one line; null for every number that is not finite, which JSON has no word for."""
    try:
        return json.dumps(value, allow_nan=False)
    except ValueError:  # it holds such a number
        return json.dumps(json.loads(json.dumps(value), parse_constant=lambda number: None))


def json_lines(value: dict[str, Any]) -> bytes:
    """A JSON object, a key a line; null for what is not finite."""
    lines = ",\n".join(f"{json.dumps(key)}: {to_json(entry)}" for key, entry in value.items())
    return f"{{\n{lines}\n}}\n".encode()


def write_json(path: Path, value: dict[str, Any]) -> None:
    """`json_lines`; `path` holds the old content or the new one, never a part. Raises OSError."""
    with replacing(path) as sink:
        sink.write(json_lines(value))


_WAY_ON = "or choose another folder"


@contextlib.contextmanager
def writing(path: Path, way_on: str = _WAY_ON, exit_code: int = 1) -> Iterator[None]:
    """Errors of the disk are raised as UserError: that `path` cannot be written, what cures that,
    and, as `way_on`, what to do then or instead."""
    try:
        yield
    except OSError as error:
        why = f"{error.strerror}; {remedy(error)}, {way_on}"
        raise UserError(f"cannot write {path}: {why}", exit_code) from error


def write_result(path: Path, content: bytes, way_on: str = _WAY_ON) -> None:
    """What a script has made, into a folder that is made if need be; `path` holds the old content
    or the new one. Raises UserError, exit code 1; way_on: as of `writing`."""
    with writing(path, way_on):
        path.parent.mkdir(parents=True, exist_ok=True)
        with replacing(path) as sink:
            sink.write(content)


class JsonFile(Draft):
    """A JSON object or list written item by item, one a line, as a `Draft` that raises UserError.

    brackets: `{}` of an object, whose items are `"key": value`, or `[]` of a list.
    """

    def __init__(self, path: Path, brackets: bytes = b"{}"):
        self.path, self._brackets, self._separator = path, brackets, b"\n"
        with writing(path, exit_code=2):
            super().__init__(path)
            self._file = io.BufferedWriter(self.file)
            self._file.write(brackets[:1])

    def write(self, item: bytes) -> None:
        """item: JSON without NaN or Infinity, as `orjson.dumps` and `to_json` write it."""
        with writing(self.path):
            self._file.write(self._separator + item)
        self._separator = b",\n"

    def finish(self) -> None:
        with writing(self.path):
            if not self._file.closed:
                self._file.write(b"\n" + self._brackets[1:] + b"\n")
                self._file.flush()
            super().finish()

    def commit(self, exclusive: bool = False) -> None:
        with writing(self.path):
            super().commit(exclusive)

    def __exit__(self, *exception: object) -> None:
        with contextlib.suppress(OSError):  # a full disk; what is left is thrown away
            self._file.close()
        super().__exit__()


def check_writable(folder: Path) -> None:
    """Raises UserError unless files can be written to `folder`, made if need be; leaves nothing."""
    try:
        if folder.exists() and not folder.is_dir():
            raise UserError(f"{folder} is a file: choose a folder")
        with tempfile.TemporaryFile(dir=existing(folder)) as probe:
            probe.write(b"x")
    except OSError as error:
        raise unwritable(folder, error) from error


def check_file(path: Path, flag: str) -> None:
    """Raises UserError where no file can be written, or would replace what is none."""
    if path.is_dir():
        raise UserError(f"{path} is a folder: give {flag} the path of a file")
    if path.exists() and not path.is_file():  # a device would be replaced by a file
        raise UserError(f"{path} is no regular file: give {flag} the path of one")
    check_writable(path.parent)


def check_output(path: Path, overwrite: bool) -> None:
    """`check_file` of a script's `--output`, which replaces a file only where it is told to."""
    check_file(path, "--output")
    if path.exists() and not overwrite:
        raise UserError(f"{path} exists: add --overwrite to replace it, or choose another --output")


def in_words(size: float) -> str:
    """Bytes in a unit in which they are not 0: `12.00 GB`, `0.30 MB`, `7 bytes`."""
    for unit, name in ((1e9, "GB"), (1e6, "MB")):
        if size >= unit / 10:
            return f"{size / unit:.2f} {name}"
    return f"{size:.0f} bytes"


def unwritable(folder: Path, error: OSError) -> UserError:
    room = "free space, or " if error.errno in NO_SPACE else ""
    return UserError(f"cannot write to {folder}: {error.strerror}; {room}choose another folder")


def free_bytes(folder: Path) -> int:
    """Free space of the disk that `folder` is or will be on."""
    return shutil.disk_usage(existing(folder)).free


def existing(folder: Path) -> Path:
    """`folder`, or the nearest above it that is there."""
    return next(path for path in [folder, *folder.absolute().parents] if path.exists())
