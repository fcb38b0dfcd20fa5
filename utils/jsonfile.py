"""A JSON file written item by item, that appears under its name only when it is whole."""

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path

from utils.errors import UserError


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
