"""One process at a time for a folder, or for a file, from the check what is there to the end.

A lock ends with its process at the latest, however that ends.
"""

import contextlib
import errno
import fcntl
import logging
import os
from collections.abc import Iterator
from pathlib import Path

from utils.errors import UserError
from utils.store.local import remove_partial, unwritable

log = logging.getLogger(__name__)
_without_locks: set[int] = set()  # devices of which the log has said so


def locked(folder: Path) -> contextlib.AbstractContextManager[None]:
    """`folder`, made if need be, for this process alone.

    A folder that was made for it is removed again if it is empty in the end. Raises UserError while
    another process holds it, and where it cannot be made. On a file system without locks nothing is
    held, and the log says so, once.
    """
    return _owned(folder, folder)


@contextlib.contextmanager
def claimed(path: Path) -> Iterator[None]:
    """The file `path` to be written by this process alone, from the check whether it is there to
    the end; as `locked` does, by a file `.NAME.lock` beside it, which is gone at the end.

    What processes that were killed have left of the file is removed first. Raises UserError besides
    for what is there and is no file, such as a device.
    """
    if path.exists() and not path.is_file():
        raise UserError(f"{path} is there, and is not a file: choose another name")
    lock = path.with_name(f".{path.name}.lock")
    with _owned(path, lock, "name"):
        try:
            remove_partial(path)
            yield
        finally:
            lock.unlink(missing_ok=True)


@contextlib.contextmanager
def locked_file(path: Path) -> Iterator[None]:
    """The file `path`, made if need be, to be written in place by this process alone.

    One that was made for it and is empty in the end is removed again, with the folders that were
    made; else as `locked`.
    """
    made = not path.exists()
    with _owned(path.parent, path):
        try:
            yield
        finally:
            with contextlib.suppress(OSError):
                if made and not path.stat().st_size:
                    path.unlink()


@contextlib.contextmanager
def _owned(what: Path, lock: Path, other: str = "folder") -> Iterator[None]:
    """Holds the lock of `lock`, the folder `what` or a file, in the name of `what`.

    other: what the user may choose another of.
    """
    try:
        handle, made = _take(lock, is_folder=lock == what)
    except BlockingIOError:
        raise UserError(
            f"another process is writing to {what}: wait for its end, or choose another {other}"
        ) from None
    except OSError as error:
        raise unwritable(what, error) from error
    try:
        yield
    finally:
        with contextlib.suppress(OSError):  # of a folder that holds something
            for path in made:
                path.rmdir()
        os.close(handle)


def _take(lock: Path, is_folder: bool) -> tuple[int, list[Path]]:
    """A handle that holds the lock, and the folders that were made for it, the innermost first.

    Raises BlockingIOError while another process holds it, OSError where it cannot be made.
    """
    folder = lock if is_folder else lock.parent
    flags = os.O_DIRECTORY if is_folder else os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW
    for _ in range(100):  # whoever held the lock before may remove it after we have opened it
        missing = [path for path in (folder, *folder.parents) if not path.exists()]
        with contextlib.suppress(FileNotFoundError):
            folder.mkdir(parents=True, exist_ok=True)
            handle = os.open(lock, flags, 0o666)
            try:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                os.close(handle)
                raise
            except OSError as error:
                if (device := os.fstat(handle).st_dev) not in _without_locks:
                    _without_locks.add(device)
                    log.warning(
                        "the file system has no locks (%s: %s), which would keep two processes "
                        "apart: let no other one write there",
                        *(lock, error.strerror),
                    )
            if lock.exists() and os.path.samestat(os.fstat(handle), lock.stat()):
                return handle, missing
            os.close(handle)
    raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), str(lock))
