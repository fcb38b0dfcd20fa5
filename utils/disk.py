"""Whether a folder can be written, and how much room it has, before anything is made there."""

import contextlib
import fcntl
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

from utils.errors import UserError


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
