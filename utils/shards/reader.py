"""Reading shards, of a folder or of a bucket, with verification.

What is read is compared with the manifest beside it before it is unpickled, and unpickling runs
none of what a hostile file may hold.
"""

import os
import pickle
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, BinaryIO, TypeVar

from utils.errors import UserError
from utils.shards.int8 import dequantized_item
from utils.shards.items import load, sample_key
from utils.shards.manifest import read_manifest
from utils.store.bucket import is_uri
from utils.store.local import checksum
from utils.store.places import LocalFolder, Place, place_of, split

Entry, Content = TypeVar("Entry"), TypeVar("Content")


def load_shard(path: str | Path, verify: bool = True) -> list[dict[str, Any]]:
    """The items of a shard; loading one runs none of what a hostile file may hold.

    path: of a file, or `gs://bucket/prefix/activations_batch_000001.pkl`. verify: compare size and
    crc32c with the manifest beside it first, and its samples then. Items are as they are stored,
    with `scales` where activations are int8. Raises UserError with the file and the cause.
    """
    place, name = split(path)
    if not verify:
        with place.open(name) as file:
            return _items_in(file, f"{place}/{name}", None)
    for entry in read_manifest(str(place))["files"]:
        if entry["filename"] == name:
            return read_entry(str(place), entry)
    raise UserError(f"{path} is refused: the manifest beside it does not list it")


def iter_items(folder: str | Path) -> Iterator[dict[str, Any]]:
    """Every item of a run, verified, its activations as values: what is stored as int8 is float32
    here, and there are no `scales`. One shard is in memory at a time.

    folder: of a disk, or `gs://bucket/prefix`. Of a bucket, the next shard is fetched to a
    temporary file meanwhile. A shard that was deleted after its upload comes from the bucket.
    """
    place = place_of(folder)
    entries = read_manifest(folder)["files"]
    files = read_ahead(lambda e: _place_of(place, e).open(e["filename"]), entries)
    for entry, file in zip(entries, files, strict=True):
        with file:
            items = _items_in(file, f"{place}/{entry['filename']}", entry)
        yield from map(dequantized_item, items)


def read_ahead(read: Callable[[Entry], Content], entries: Sequence[Entry]) -> Iterator[Content]:
    """`read` of each entry, of the next one in a thread while this one is used."""
    pool = ThreadPoolExecutor(1, "read")
    try:
        ahead = [pool.submit(read, entry) for entry in entries[:1]]
        for number in range(len(entries)):
            content = ahead.pop().result()
            ahead = [pool.submit(read, entry) for entry in entries[number + 1 : number + 2]]
            yield content
    finally:
        pool.shutdown(wait=False, cancel_futures=True)


def read_entry(folder: str | Path, entry: dict[str, Any]) -> list[dict[str, Any]]:
    """The items of a shard that the manifest of `folder` lists as `entry`, verified."""
    place, name = _place_of(place_of(folder), entry), entry["filename"]
    with place.open(name) as file:
        return _items_in(file, f"{place}/{name}", entry)


def _place_of(place: Place, entry: dict[str, Any]) -> Place:
    """Where a shard lies: in its folder, or, deleted there, in the bucket that it was sent to."""
    sent, is_local = entry["uploaded"], isinstance(place, LocalFolder)
    if isinstance(sent, dict) and is_local and not (place.path / entry["filename"]).exists():
        return split(sent["uri"])[0]
    return place


def _items_in(file: BinaryIO, path: str, entry: dict[str, Any] | None) -> list[dict[str, Any]]:
    """Of a shard, which is compared with its `entry` of the manifest where that is given."""
    try:
        if entry:
            size, repair = os.fstat(file.fileno()).st_size, ""
            if not is_uri(path):
                repair = "; --resume of its run computes its samples again"
            if size != (written := entry["size_bytes"]):
                told = f"it has {size} bytes, not the {written} written{repair}"
                raise pickle.UnpicklingError(told)
            if (crc32c := checksum(file)) != (was := entry["crc32c"]):
                raise pickle.UnpicklingError(f"damaged: its crc32c is {crc32c}, not {was}{repair}")
            file.seek(0)
        items = load(file)
        if entry and [list(sample_key(item)) for item in items] != entry["samples"]:
            raise pickle.UnpicklingError("it holds other samples than its manifest says")
    except pickle.UnpicklingError as error:
        raise UserError(f"{path} is refused: {error}") from error
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}") from error
    return items
