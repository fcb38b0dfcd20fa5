"""Files of a disk: whole or not there, with their checksums; and folders: locks, and free space."""

import base64
import contextlib
import fcntl
import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

import google_crc32c
import numpy as np

from utils.errors import UserError

PARTIAL = ".partial"  # ends the name of a file that is not whole yet
_CHUNK = 1 << 20  # bytes; checksummed, then written, while still in the cache


def check_writable(folder: Path) -> None:
    """Raises UserError unless files can be written to `folder`, made if need be; leaves nothing."""
    try:
        if folder.exists() and not folder.is_dir():
            raise UserError(f"{folder} is a file: choose a folder")
        with tempfile.TemporaryFile(dir=existing(folder)) as probe:
            probe.write(b"x")
    except OSError as error:
        raise UserError(
            f"cannot write to {folder}: {error.strerror}; choose another folder"
        ) from error


@contextlib.contextmanager
def locked(folder: Path) -> Iterator[None]:
    """`folder`, made if need be, for this process alone; ends with the process at the latest.

    Raises UserError while another process holds it. A file system without locks has none.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        handle = os.open(folder, os.O_RDONLY)
    except OSError as error:
        raise UserError(f"cannot write to {folder}: {error.strerror}", exit_code=1) from error
    try:
        with contextlib.suppress(OSError):
            try:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise UserError(
                    f"another process is writing to {folder}: wait for its end, or choose another "
                    "folder"
                ) from None
        yield
    finally:
        os.close(handle)


def free_bytes(folder: Path) -> int:
    """Free space of the disk that `folder` is or will be on."""
    return shutil.disk_usage(existing(folder)).free


def existing(folder: Path) -> Path:
    """`folder`, or the nearest above it that is there."""
    return next(path for path in [folder, *folder.absolute().parents] if path.exists())


class Sink:
    """Counts the bytes written to it; with an unbuffered `file`, checksums and writes them too."""

    def __init__(self, file: BinaryIO | None = None):
        self.file = file
        self.size = 0
        self._crc = 0

    def write(self, buffer: Any) -> None:
        view = np.frombuffer(buffer, np.uint8)
        self.size += view.size
        if self.file is None:
            return
        for start in range(0, view.size, _CHUNK):
            chunk = view[start : start + _CHUNK]
            self._crc = google_crc32c.extend(self._crc, chunk)
            while chunk.size:  # a disk that fills up first takes a part
                chunk = chunk[self.file.write(chunk) :]

    @property
    def crc32c(self) -> str:
        return _base64(self._crc)


def checksum(file: BinaryIO, most: int | None = None) -> str:
    """crc32c, in base64, of the rest of `file`, or of its next `most` bytes."""
    crc, buffer, left = 0, np.empty(_CHUNK, np.uint8), float("inf") if most is None else most
    while count := file.readinto(buffer[: min(_CHUNK, left)]):
        crc = google_crc32c.extend(crc, buffer[:count])
        left -= count
    return _base64(crc)


def _base64(crc: int) -> str:
    """As Google Cloud Storage writes it."""
    return base64.b64encode(crc.to_bytes(4, "big")).decode()


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[Sink]:
    """What goes into the sink has the name `path` only once all of it is on the disk."""
    partial = path.with_name(path.name + PARTIAL)
    try:
        with open(partial, "wb", buffering=0) as file:
            yield Sink(file)
            os.fsync(file.fileno())
        os.replace(partial, path)
    except BaseException:
        with contextlib.suppress(OSError):
            partial.unlink()
        raise
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)


def write_json_atomic(path: str | Path, value: dict[str, Any]) -> None:
    """Write `value`, a key a line; `path` holds the old content or the new one, never a part.

    Its folder is made.
    Raises UserError (exit code 1) when it cannot be written.
    """
    try:
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        write_json(Path(path), value)
    except OSError as error:
        raise UserError(
            f"cannot write {path}: {error.strerror}; put that right, then --resume", exit_code=1
        ) from error


def write_json(path: Path, value: dict[str, Any]) -> None:
    """`write_json_atomic`, raising OSError."""
    with replacing(path) as sink:
        sink.write(json_lines(value))


def json_lines(value: dict[str, Any]) -> bytes:
    """A JSON object, a key a line."""
    lines = ",\n".join(f"{json.dumps(key)}: {json.dumps(entry)}" for key, entry in value.items())
    return f"{{\n{lines}\n}}\n".encode()


class JsonFile:
    """A JSON object or list written item by item, one a line, that gets its name when it is whole.

    Until `commit` it is a temporary file beside `path`, and an earlier file of that name stays.
    Leaving the `with` block without a commit removes the temporary file, and its folder again where
    that was made for it and is empty.
    """

    def __init__(self, path: str | Path, brackets: bytes = b"{}"):
        self.path, self._brackets, self._separator = Path(path), brackets, b"\n"
        self._temporary = self.path.with_name(f".{self.path.name}.tmp")
        folders = [self.path.parent, *self.path.parent.parents]
        with self._errors(exit_code=2):
            self._made = [folder for folder in folders if not folder.exists()]
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self._file = open(self._temporary, "wb")  # noqa: SIM115
            self._file.write(brackets[:1])

    @contextlib.contextmanager
    def _errors(self, exit_code: int = 1) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            hint = "make room or choose another folder"
            raise UserError(
                f"cannot write {self.path}: {error.strerror}; {hint}", exit_code
            ) from error

    def write(self, item: bytes) -> None:
        with self._errors():
            self._file.write(self._separator + item)
        self._separator = b",\n"

    def finish(self) -> None:
        """Bring everything to the disk, under the temporary name still.

        Of several files that belong together finish all before the first commit: a full disk then
        leaves none of them behind.
        """
        with self._errors():
            self._file.write(b"\n" + self._brackets[1:] + b"\n")
            self._file.flush()
            os.fsync(self._file.fileno())
            self._file.close()

    def commit(self) -> None:
        if not self._file.closed:
            self.finish()
        with self._errors():
            os.replace(self._temporary, self.path)
            folder = os.open(self.path.parent, os.O_RDONLY)
            os.fsync(folder)
            os.close(folder)

    def __enter__(self) -> "JsonFile":
        return self

    def __exit__(self, *exception: object) -> None:
        with contextlib.suppress(OSError):  # a full disk; what is left is thrown away
            self._file.close()
        self._temporary.unlink(missing_ok=True)
        with contextlib.suppress(OSError):  # of a folder that holds something
            for folder in self._made:
                folder.rmdir()
