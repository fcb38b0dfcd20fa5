"""What a folder holds of a run before a process writes to it, and which process that is."""

import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from multiprocessing.pool import ThreadPool
from pathlib import Path
from typing import Any, Literal

from tqdm import tqdm

from utils.errors import UserError, some
from utils.shards import manifest as stored
from utils.shards.manifest import MANIFEST, SHARD, Manifest, Shard
from utils.store.local import checksum

Mode = Literal["new", "resume", "overwrite"]
THREADS = 4


@dataclass(frozen=True)
class Writer:
    """One of the processes that write a run: `index` of `count`, in part `part` of `parts`.

    Parts (`--shard_id`, `--num_shards`) are runs whose folders become one run later.
    """

    index: int = 0
    count: int = 1
    part: int = 0
    parts: int = 1

    @cached_property
    def owner(self) -> str:
        """What its files have in their names: `_host003`, or nothing for the only process."""
        return self.owners[self.index]

    @cached_property
    def owners(self) -> list[str]:
        """Of all processes of the run, in their order."""
        if self.count == self.parts == 1:
            return [""]
        return [f"_host{self.part * self.count + index:03d}" for index in range(self.count)]

    def looks_after(self, owner: str) -> bool:
        """Whether this process does what is left to do for the files of `owner`: they are its own,
        or those of a process that takes no part any more, and it is the first."""
        return owner == self.owner or (self.index == 0 and owner not in self.owners)


@dataclass(frozen=True)
class Held:
    """What a folder, and what was restored for it from a bucket, holds of a run.

    manifests: file name -> manifest. shards: of all that they list, by file name. unsound: those of
    them that are damaged, or whose answers are lost; see `unsound_of`.
    """

    path: Path
    manifests: dict[str, Manifest] = field(default_factory=dict)
    unsound: frozenset[str] = frozenset()

    @cached_property
    def shards(self) -> dict[str, Shard]:
        return stored.shards_of(self.manifests.values())

    @property
    def is_complete(self) -> bool:
        return bool(self.manifests) and stored.union_of(self.manifests)["status"] == "complete"

    @cached_property
    def there(self) -> set[str]:
        """The shards that are on the disk, or were sent to a bucket."""
        return {
            name
            for name, shard in self.shards.items()
            if self.has_file(shard) or (shard.uploaded and not (self.path / name).is_file())
        } - self.unsound

    def has_file(self, shard: Shard) -> bool:
        """Whether the shard's file is on the disk, of the right size."""
        path = self.path / shard.filename
        return path.is_file() and path.stat().st_size == shard.size_bytes

    @property
    def missing(self) -> set[str]:
        """The shards whose writer has a manifest here, but which are not there, or are unsound."""
        owners = set(map(stored.owner_of, self.manifests))
        mine = {n for n, shard in self.shards.items() if shard.owner in owners}
        return (mine - self.there) | self.unsound


def held_in(
    path: Path, settings: dict[str, Any], mode: Mode, restored: Mapping[str, bytes]
) -> Held:
    """What there is of the run that `mode` is to go on with; nothing for a new one.

    Raises UserError for a run that is not to be resumed or overwritten, and for one with other
    settings.
    """
    manifests = stored.read_manifests(path) if path.exists() else {}
    if mode == "overwrite":
        return Held(path)
    for name, content in restored.items():
        if MANIFEST.fullmatch(name) and name not in manifests:
            manifests[name] = stored.parse(name, content)
    if not manifests:
        if path.exists() and any(map(SHARD.fullmatch, os.listdir(path))):
            raise UserError(
                f"{path} holds files of a run but no metadata.json: put that back and --resume, "
                "replace the run with --overwrite, or choose another folder"
            )
        return Held(path)
    run = stored.union_of(manifests)
    if mode == "new":
        raise UserError(
            f"{path} holds a run ({run['status']}, {run['total_samples']} samples): "
            "--resume continues it, --overwrite replaces it"
        )
    if changes := stored.changed_settings(run, settings):
        raise UserError(
            f"cannot resume {path} with other settings: {some(changes)}; go back to the former, "
            "choose another folder, or --overwrite"
        )
    return Held(path, manifests)


def unsound_of(held: Held, writer: Writer, restored: Mapping[str, bytes]) -> frozenset[str]:
    """Of the shards that `writer` looks after, those whose file has not its checksum, and those of
    which answers are lost though their manifest or their file is here.

    Reads all of these shards, behind a bar. restored: as of `RunFolder`. Raises UserError for a
    file that cannot be read.
    """
    shards = [shard for shard in held.shards.values() if writer.looks_after(shard.owner)]
    files = list(filter(held.has_file, shards))
    found: set[str] = set()
    owners = {*map(stored.owner_of, held.manifests), *(shard.owner for shard in files)}
    for owner in filter(writer.looks_after, owners):
        journal = held.path / stored.journal_name(owner)
        content = journal.read_bytes() if journal.exists() else b""
        answered = set(stored.read_journal(max(content, restored.get(journal.name, b""), key=len)))
        of_owner = [shard for shard in shards if shard.owner == owner]
        found |= {s.filename for s in of_owner if not answered.issuperset(s.samples)}

    def is_damaged(shard: Shard) -> bool:
        path = held.path / shard.filename
        try:
            with open(path, "rb") as file:
                return checksum(file) != shard.crc32c
        except OSError as error:
            raise UserError(
                f"cannot read {path}: {error.strerror}; make it readable, or delete it, and its "
                "samples are computed again"
            ) from error

    size = sum(shard.size_bytes for shard in files)
    bar = tqdm(total=size, unit="B", unit_scale=True, desc="verifying shards", delay=1)
    with bar, ThreadPool(THREADS) as pool:
        for shard, damaged in zip(files, pool.imap(is_damaged, files), strict=True):
            found |= {shard.filename} if damaged else set()
            bar.update(shard.size_bytes)
    return frozenset(found)
