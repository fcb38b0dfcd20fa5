"""What is sent to a bucket, sealed by its checksum, and what the server says of it."""

import io
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from utils.errors import UserError
from utils.store.local import checksum


@dataclass(frozen=True)
class Receipt:
    """What the server says of an object. crc32c: of its content, in base64."""

    uri: str
    size: int
    crc32c: str
    generation: int

    def holds(self, size: int, crc32c: str) -> bool:
        return (self.size, self.crc32c) == (size, crc32c)


class Stopped(Exception):
    """An upload was given up because its `stopping` was set."""


class NameTaken(UserError):
    """The object's name is taken by other content than that of the file."""


class Damaged(UserError):
    """A file does not hold what it held when it was sealed."""


@dataclass(frozen=True)
class Sealed:
    """The first `size` bytes of a file, or of bytes, as they were when `crc32c` was taken of them;
    on their way to the object `name`."""

    source: Path | bytes
    name: str
    size: int
    crc32c: str

    def __str__(self) -> str:
        return self.name if isinstance(self.source, bytes) else str(self.source)

    def check_undamaged(self) -> None:
        """Raises Damaged."""
        with opened(self.source) as file:
            now = checksum(file, self.size)
        if now != self.crc32c:
            raise Damaged(
                f"{self} is damaged: its crc32c is {now}, and was {self.crc32c} when it was "
                "written; it was not uploaded",
                exit_code=1,
            )


def opened(source: Path | bytes) -> BinaryIO:
    """A file, or bytes, to read from."""
    return io.BytesIO(source) if isinstance(source, bytes) else open(source, "rb")
