"""Where a run lies: a folder of a disk, or a folder of a bucket; read in the same way."""

import os
from pathlib import Path
from typing import BinaryIO

from utils.errors import UserError
from utils.store.bucket import BucketFolder, is_uri


class LocalFolder:
    """A folder of a disk, with the methods of a `BucketFolder` that read; all raise UserError."""

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


Place = LocalFolder | BucketFolder  # files by name; `str(place)` is how the user calls it


def place_of(path: str | Path) -> Place:
    """The folder at a local path, or at `gs://bucket/prefix`."""
    return BucketFolder(path) if is_uri(path) else LocalFolder(path)


def split(path: str | Path) -> tuple[Place, str]:
    """The folder of a file, and the file's name there."""
    if not is_uri(path):
        return LocalFolder(Path(path).parent), Path(path).name
    folder, _, name = str(path).rpartition("/")
    return BucketFolder(type(path)(folder)), name
