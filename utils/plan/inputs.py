"""Models and datasets that lie in a bucket, as files on this disk.

They are kept in `~/.cache/arc-activations/gs` (XDG_CACHE_HOME moves it) and compared, size and
crc32c, with what the bucket holds each time they are used.
"""

import contextlib
import fcntl
import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

from tqdm import tqdm

from utils.arc.tasks import SUFFIXES, solutions_names
from utils.errors import UserError
from utils.plan.request import Request
from utils.store.bucket import BucketFolder, Receipt
from utils.store.local import checksum, free_bytes
from utils.store.uris import is_uri

THREADS = 4
OTHER_WEIGHTS = (".bin", ".pt", ".pth", ".msgpack", ".h5", ".ot", ".onnx", ".gguf")


def localized(request: Request) -> tuple[Request, dict[str, str]]:
    """The request with local paths for what it reads from buckets, and local path -> URI of each.

    Raises UserError for what is not there, cannot be read, or does not fit on the disk.
    """
    found: dict[str, str] = {}
    for name in ("model_path", "dataset_path", "solutions_path"):
        uri = getattr(request, name)
        if uri is not None and is_uri(uri):
            local = str(model(uri) if name == "model_path" else tasks(uri, f"--{name}"))
            request, found[local] = replace(request, **{name: local}), uri
    return request, found


@contextlib.contextmanager
def speaking_of(uris: dict[str, str]) -> Iterator[None]:
    """Errors name the URI where they would name the local copy."""
    try:
        yield
    except UserError as error:
        words = str(error)
        for local, uri in uris.items():
            words = words.replace(local, uri)
        if words == str(error):
            raise
        raise UserError(words, error.exit_code) from error


def model(uri: str) -> Path:
    """The folder of a Hugging Face model; weights in other formats than safetensors are left."""
    bucket = BucketFolder(uri, "--model_path")
    listing = bucket.listing()
    if "config.json" not in listing:
        raise UserError(f"--model_path {uri} holds no config.json: check the path")
    wanted = {n: r for n, r in listing.items() if not n.endswith(OTHER_WEIGHTS)}
    return _fetched(bucket, wanted, "models")


def tasks(uri: str, flag: str) -> Path:
    """A file of tasks, with the ground truth beside it; or a folder of files."""
    if not uri.endswith(SUFFIXES):
        bucket = BucketFolder(uri, flag)
        wanted = {n: r for n, r in bucket.listing().items() if n.endswith(SUFFIXES)}
        if not wanted:
            raise UserError(f"{flag} {uri} holds no {' or '.join(SUFFIXES)} file: check the path")
        return _fetched(bucket, wanted, "tasks")
    parent, _, name = uri.rpartition("/")
    bucket = BucketFolder(parent, flag)
    listing = bucket.listing()
    if name not in listing:
        raise UserError(f"{flag} {uri} does not exist; check the path")
    names = {name, *solutions_names(name)} & listing.keys()
    return _fetched(bucket, {n: listing[n] for n in names}, f"files/{name}") / name


def _fetched(bucket: BucketFolder, wanted: dict[str, Receipt], kind: str) -> Path:
    """A local folder with these objects alone, each as it is in the bucket.

    kind: tells apart what may be fetched from one prefix.
    """
    cache = Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "arc-activations"
    folder = cache / "gs" / kind / bucket.bucket_name / bucket.prefix
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with open(folder / ".lock", "w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)  # another process may want the same
            stale = {n: r for n, r in wanted.items() if not _holds(folder / n, r)}
            need = sum(receipt.size for receipt in stale.values())
            if need > (free := free_bytes(folder)):
                raise UserError(
                    f"{bucket} takes {need / 1e9:.2f} GB in {folder}, where {free / 1e9:.2f} GB "
                    "are free: free space, or set XDG_CACHE_HOME to another disk"
                )
            for path in folder.iterdir():  # what the bucket holds no more would be read, too
                if path.is_file() and path.name not in {*wanted, ".lock"}:
                    path.unlink()
            with tqdm(
                total=need, unit="B", unit_scale=True, desc=f"fetching {bucket}", disable=not need
            ) as bar:
                pool = ThreadPoolExecutor(THREADS)
                try:
                    for size in pool.map(lambda item: _fetch(bucket, folder, *item), stale.items()):
                        bar.update(size)
                finally:  # after a signal nobody waits for the network
                    pool.shutdown(wait=False, cancel_futures=True)
    except OSError as error:
        raise UserError(
            f"cannot keep {bucket} in {folder}: {error.strerror}; set XDG_CACHE_HOME to another "
            "folder"
        ) from error
    return folder


def _fetch(bucket: BucketFolder, folder: Path, name: str, receipt: Receipt) -> int:
    partial = folder / f".{name}.partial"
    with open(partial, "wb") as file:
        bucket.save(name, file)
    if not _holds(partial, receipt):
        partial.unlink()
        raise UserError(f"{bucket.uri_of(name)} did not arrive as it is there: try again")
    os.replace(partial, folder / name)
    return receipt.size


def _holds(path: Path, receipt: Receipt) -> bool:
    if not path.is_file() or path.stat().st_size != receipt.size:
        return False
    with open(path, "rb") as file:
        return checksum(file) == receipt.crc32c
