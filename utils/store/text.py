"""Text and JSON as people have them: one reader, for all that this project reads of others.

Text is UTF-8, with or without a byte order mark. A file of another kind is named for what it is,
with what to do about it. What nests deeper, or is longer, than any file here has a reason to be is
refused in a line, where a parser would take minutes or all the memory.
"""

import codecs
import contextlib
import gzip
import json
import stat
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

import ijson
import numpy as np
import orjson

from utils.errors import UserError

MOST_BYTES = 1 << 28  # of a text, or a line, that is read whole
MOST_DEPTH = 200  # of lists and objects inside one another, in a file that is read piece by piece

GIT_LFS = b"version https://git-lfs"  # which a pointer begins with
_FOREIGN = (  # what a file of another kind begins with, what it is, and what to do
    (GIT_LFS, "a pointer of Git LFS, not the file: fetch it with git lfs pull"),
    (b"\x00\x05\x16\x07", "a file that macOS puts beside the real one (AppleDouble): delete it"),
    (codecs.BOM_UTF16_LE, "UTF-16: save it as UTF-8"),
    (codecs.BOM_UTF16_BE, "UTF-16: save it as UTF-8"),
    (b"\x1f\x8b", "packed with gzip: give it a name that ends in .gz"),
    (b"PK\x03\x04", "a zip archive: unpack it"),
    (b"PAR1", "a Parquet file: give it a name that ends in .parquet"),
    (b"<!doctype html", "a web page: fetch the file itself"),
    (b"<html", "a web page: fetch the file itself"),
)
_BRACKETS = bytes.maketrans(b"[{]}", b"\2\2\0\0")  # one more than what each does to the depth
_NO_BRACKETS = bytes(set(range(256)) - set(b"[{]}"))


def foreign_kind(head: bytes) -> str | None:
    """What a file that begins with `head` is, and what to do, if it is no UTF-8 text at all."""
    for mark, kind in _FOREIGN:
        if head[: len(mark)].lower() == mark.lower():
            return kind
    letter = head[:2].replace(b"\0", b"")  # of UTF-16 without its mark
    return "UTF-16: save it as UTF-8" if len(head) > 1 == len(letter) and letter.isascii() else None


def read_text(path: Path) -> str:
    """A whole file. Raises UserError for one that is not there, no text, or of over 2^28 bytes."""
    with opened(path) as file:
        content = file.read(MOST_BYTES + 1)
        if len(content) > MOST_BYTES:
            raise UserError(f"{path} holds more than {MOST_BYTES >> 20} MB: it is no such file")
        return content.decode()


def read_json(path: Path) -> Any:
    """What a whole JSON file holds, NaN and Infinity too. Raises UserError, as `read_text` does."""
    text = read_text(path)
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise UserError(
            f"{path} cannot be read as JSON: {error}; correct it, or fetch it again"
        ) from error


@contextlib.contextmanager
def opened(path: Path) -> Iterator[BinaryIO]:
    """A file of text, in binary, unpacked where its name ends in .gz, behind its byte order mark.

    What goes wrong inside the block, in reading or in parsing JSON, is told as UserError.
    """
    try:
        if path.exists() and not stat.S_ISREG(path.stat().st_mode):  # a pipe would never end
            raise UserError(f"{path} is not a file: check the path")
        with gzip.open(path) if path.suffix.lower() == ".gz" else open(path, "rb") as file:
            head = file.peek(64)
            if not head:
                raise UserError(f"{path} is empty; make or fetch it again")
            if kind := foreign_kind(head):
                raise UserError(f"{path} is {kind}")
            if head.startswith(codecs.BOM_UTF8):
                file.read(len(codecs.BOM_UTF8))
            yield file
    except FileNotFoundError:
        broken = path.is_symlink()
        raise UserError(
            f"{path} is a link to a file that is not there: fetch it again"
            if broken
            else f"{path} does not exist; check the path"
        ) from None
    except UnicodeDecodeError as error:
        raise UserError(not_utf8(path)) from error
    except (ijson.JSONError, ValueError) as error:
        reason = str(error.args[0]) if error.args else type(error).__name__
        if "UTF" in reason:
            raise UserError(not_utf8(path)) from error
        reason = reason.strip().split("\n")[0]
        hint = "" if ".jsonl" in path.name else ", or name it .jsonl if it is that"
        raise UserError(f"{path} is not JSON ({reason}); repair it{hint}") from error
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise UserError(f"{path} is not a whole gzip file; fetch or pack it again") from error
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}; check the file") from error


def not_utf8(what: object) -> str:
    return f"{what} is not UTF-8: if it is Latin-1, `iconv -f latin1 -t utf-8` converts it"


def is_utf8(content: bytes) -> bool:
    try:
        content.decode()
    except UnicodeDecodeError:
        return False
    return True


def lines(file: BinaryIO) -> Iterator[bytes]:
    """The lines of a file. Raises ValueError for one that is longer than `MOST_BYTES`."""
    while line := file.readline(MOST_BYTES):
        if len(line) == MOST_BYTES and not line.endswith(b"\n"):
            raise ValueError(f"a line of more than {MOST_BYTES >> 20} MB")
        yield line


def parse(content: str | bytes) -> Any:
    """A JSON value without NaN, behind a byte order mark or not; ValueError for anything else."""
    mark = "\ufeff" if isinstance(content, str) else codecs.BOM_UTF8
    return orjson.loads(content.removeprefix(mark))


class Guarded:
    """A file that ijson reads; raises ValueError where it nests deeper than `MOST_DEPTH`.

    ijson has no limit of its own, and takes time that grows with the square of the depth.
    """

    def __init__(self, file: BinaryIO):
        self._file = file
        self._depth, self._in_string, self._escape = 0, 0, b""

    def read(self, size: int = -1) -> bytes:
        chunk = self._file.read(size)
        text = self._escape + chunk
        # A backslash at the end escapes what the next chunk begins with, unless it is escaped.
        odd = (len(text) - len(text.rstrip(b"\\"))) % 2
        self._escape = b"\\" * odd
        text = text[: len(text) - odd].replace(b"\\\\", b"").replace(b'\\"', b"")
        parts = text.split(b'"')
        outside = b"".join(parts[self._in_string :: 2])
        self._in_string = (self._in_string + len(parts) - 1) % 2
        steps = np.frombuffer(outside.translate(_BRACKETS, _NO_BRACKETS), np.uint8)
        depths = self._depth + np.cumsum(steps.astype(np.int64) - 1)
        if len(depths):
            self._depth = int(depths[-1])
            if depths.max() > MOST_DEPTH:
                raise ValueError(f"more than {MOST_DEPTH} lists or objects inside one another")
        return chunk
