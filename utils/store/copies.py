"""Copies of objects of a bucket, in `~/.cache/arc-activations/gs` (XDG_CACHE_HOME moves it).

What was wanted at one time has a folder of its own, named by the names and generations of the
objects, that is whole or not there: nothing is ever changed under a program that reads it.
"""

import os
from hashlib import sha256
from multiprocessing.pool import ThreadPool
from pathlib import Path

from tqdm import tqdm

from utils.errors import UserError
from utils.store.bucket import BucketFolder, Receipt
from utils.store.local import checksum, free_bytes, in_words, new_folder

THREADS = 4


def copied(bucket: BucketFolder, wanted: dict[str, Receipt]) -> Path:
    """A local folder that holds these objects of `bucket`, and nothing else.

    A copy that was made before is compared with the crc32c of the objects. Raises UserError for
    what cannot be read, is damaged, or does not fit on the disk.
    """
    try:
        cache = Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser()
    except RuntimeError as error:
        raise UserError(f"no home folder to keep {bucket} in: set XDG_CACHE_HOME") from error
    objects = sorted((name, receipt.generation) for name, receipt in wanted.items())
    state = sha256(repr(objects).encode()).hexdigest()[:16]
    folder = cache / "arc-activations" / "gs" / bucket.bucket_name / bucket.prefix / state
    try:
        if not folder.is_dir():
            _fetch(bucket, wanted, folder)
        for name, receipt in wanted.items():
            with open(folder / name, "rb") as file:
                if checksum(file) != receipt.crc32c:
                    raise UserError(f"{folder / name} is damaged: delete {folder}, and try again")
    except OSError as error:
        hint = "set XDG_CACHE_HOME to another folder"
        raise UserError(f"cannot keep {bucket} in {folder}: {error.strerror}; {hint}") from error
    return folder


def _fetch(bucket: BucketFolder, wanted: dict[str, Receipt], folder: Path) -> None:
    need = sum(receipt.size for receipt in wanted.values())
    try:
        with new_folder(folder) as unfinished:  # which first removes what a kill left of it
            if need > (free := free_bytes(folder)):
                raise UserError(
                    f"{bucket} takes {in_words(need)} in {folder}, where {in_words(free)} are free:"
                    " free space, or set XDG_CACHE_HOME to another disk"
                )

            def fetch(name: str) -> int:
                with open(unfinished / name, "wb") as file:
                    bucket.save(name, file, wanted[name].generation)
                return wanted[name].size

            bar = tqdm(total=need, unit="B", unit_scale=True, desc=f"fetching {bucket}")
            with bar, ThreadPool(THREADS) as pool:
                for size in pool.imap_unordered(fetch, wanted):
                    bar.update(size)
    except OSError:
        if not folder.is_dir():  # which another process has made meanwhile
            raise
