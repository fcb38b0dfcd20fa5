"""Where a run lies: a folder of a disk, or a folder of a bucket; read in the same way."""

import os
from pathlib import Path
from typing import BinaryIO, Protocol

from utils.errors import UserError
from utils.store.bucket import BucketFolder
from utils.store.uris import is_uri


class Place(Protocol):
    """Files by name. `str(place)` is how the user calls it. All raise UserError."""

    def names(self) -> list[str]: ...

    def read(self, name: str) -> bytes: ...

    def open(self, name: str) -> BinaryIO: ...


class LocalFolder:
    """A `Place` on a disk."""

    def __init__(self, path: str | Path):
        self.path = Path(path)

    def __str__(self) -> str:
        return str(self.path)

    def names(self) -> list[str]:
        try:
            return sorted(os.listdir(self.path))
        except OSError as error:
            raise UserError(f"cannot read {self.path}: {error.strerror}") from error

    def read(self, name: str) -> bytes:
        with self.open(name) as file:
            return file.read()

    def open(self, name: str) -> BinaryIO:
        try:
            return open(self.path / name, "rb")
        except OSError as error:
            raise UserError(f"cannot read {self.path / name}: {error.strerror}") from error


def place_of(path: str | Path) -> Place:
    """The folder at a local path, or at `gs://bucket/prefix`."""
    return BucketFolder(path) if is_uri(path) else LocalFolder(path)


def split(path: str | Path) -> tuple[Place, str]:
    """The folder of a file, and the file's name there."""
    if not is_uri(path):
        return LocalFolder(Path(path).parent), Path(path).name
    folder, _, name = str(path).rpartition("/")
    return BucketFolder(Path(folder) if isinstance(path, Path) else folder), name
