"""Shard files of a run: writing, closing, resuming, and reading with verification.

A kill at any moment leaves a manifest whose every shard is whole, and perhaps files that no
manifest lists; those are not part of the run. Knows nothing of models, meshes or buckets.
"""

import contextlib
import itertools
import json
import os
import pickle
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, BinaryIO

from utils.disk import check_writable, free_bytes
from utils.errors import UserError
from utils.items import (
    CELL_COLUMNS,
    Sink,
    array_bytes,
    checksum,
    dump,
    float16_overflows,
    load,
    shard_bytes,
    stored_item,
)
from utils.manifest import (
    FORMAT_VERSION,
    SHARD,
    Manifest,
    SampleKey,
    owner_of,
    read_manifest,
    read_manifests,
    replacing,
    resumable_run,
    stem,
    timing,
    totals,
    write_json,
)


class OpenShard:
    """The shard being filled, and the one rule, the dry run's too, of when it is closed.

    That is after `save_every_n_samples` samples, and before an item that would push its arrays past
    `max_shard_mb` megabytes (10^6 bytes); an item larger than that has a shard of its own.
    """

    def __init__(self, save_every_n_samples: int | None, max_shard_mb: float):
        self._max_samples = save_every_n_samples or float("inf")
        self._max_bytes = max_shard_mb * 1e6
        self.clear()

    def clear(self) -> None:
        self.items: list[dict[str, Any]] = []
        self._bytes = 0

    def lacks_room_for(self, item: dict[str, Any]) -> bool:
        return bool(self.items) and self._bytes + array_bytes(item) > self._max_bytes

    def append(self, item: dict[str, Any]) -> None:
        self.items.append(item)
        self._bytes += array_bytes(item)

    @property
    def is_full(self) -> bool:
        return len(self.items) >= self._max_samples


def planned_shards(
    items: Iterable[dict[str, Any] | None],
    activation_dtype: str,
    save_every_n_samples: int | None,
    max_shard_mb: float,
) -> Iterator[tuple[int, int]]:
    """(samples, file size in bytes) of each shard that `ShardWriter` would make of `items`.

    Arrays of `np.zeros` in the stored dtype take no memory. None stands for a `close_shard()`.
    """
    shard = OpenShard(save_every_n_samples, max_shard_mb)
    for item in itertools.chain(items, [None]):
        if item is not None:
            item = stored_item(item, activation_dtype)
        if shard.items and (item is None or shard.lacks_room_for(item)):
            yield len(shard.items), shard_bytes(shard.items)
            shard.clear()
        if item is not None:
            shard.append(item)
            if shard.is_full:
                yield len(shard.items), shard_bytes(shard.items)
                shard.clear()


class ShardWriter:
    """One process's shards, answers and manifest in the folder of a run.

    The constructor only checks; `start` is the first to change anything, so that whatever else can
    fail before a run begins leaves an older run as it is. For one thread at a time; `add`,
    `close_shard` and `finish` are to be shielded from signals.

    settings: top-level manifest entries that decide what is computed (`model`, `dataset`, `prompt`,
        `activations`, ...), nested dicts; a resumed run must have the same, but for keys named
        `path`. facts: entries that a resumed run may change (`arguments`, `versions`, `devices`,
        `mesh_shape`, `processes`).
    host: this process's number among `num_hosts`, None for the only one. In a folder that several
        share every process constructs, then the one that leads starts, then the others.
    done: samples of the shards in this folder, and those added since. hosts: processes that wrote
        some of them. continues: a run that
        the folder holds is resumed. complete: that run is; there is nothing to start.
    Raises UserError, exit code 2 from the constructor, 1 from `start` on when the disk fails.
    """

    def __init__(
        self,
        folder: str | Path,
        settings: dict[str, Any],
        facts: dict[str, Any],
        *,
        activation_dtype: str = "float16",
        save_every_n_samples: int | None = None,
        max_shard_mb: float = 512,
        resume: bool = False,
        overwrite: bool = False,
        host: int | None = None,
        num_hosts: int = 1,
    ):
        if resume and overwrite:
            raise UserError("--resume continues a run, --overwrite replaces it: give one of them")
        self.folder, self.host = Path(folder), host
        self.activation_dtype = activation_dtype
        self._overwrite = overwrite
        self._suffix = "" if host is None else f"_host{host:03d}"
        self._others = {f"_host{i:03d}" for i in range(num_hosts)} if host is not None else set()
        self._manifest_path = self.folder / f"metadata{self._suffix}.json"
        self._journal_path = self.folder / f"answers{self._suffix}.jsonl"
        settings = json.loads(json.dumps(settings))  # as the manifest gives them back
        self._static = {**facts, **settings}
        self._open = OpenShard(save_every_n_samples, max_shard_mb)
        self._answers: list[str] = []  # journal lines of the open shard
        self._timing = (0.0, 0.0, 0.0)
        self._failure: UserError | None = None

        check_writable(self.folder)
        manifests = read_manifests(self.folder) if self.folder.exists() else {}
        run = None if overwrite else resumable_run(self.folder, manifests, settings, resume)
        self.continues = run is not None
        run = run or {"status": "running", "files": []}
        own = {} if overwrite else manifests.get(self._manifest_path.name, {})
        earlier = run if host is None else own
        self.complete = run["status"] == "complete"
        # Those in the folders of other processes are theirs to look after.
        here = [entry for entry in run["files"] if not entry.get("elsewhere")]
        owners = {owner_of(entry["filename"]) for entry in here} - {""}
        self.hosts = sorted(int(owner.removeprefix("_host")) for owner in owners)
        self._listed = {entry["filename"] for entry in run["files"]}
        self.done: set[SampleKey] = {(t, i) for entry in here for t, i in entry["samples"]}
        named = [SHARD.fullmatch(name).groups() for name in self._listed]
        numbers = [int(number) for suffix, number in named if (suffix or "") == self._suffix]
        self._next_number = 1 + max(numbers, default=0)
        self._files: list[dict[str, Any]] = [
            entry for entry in earlier.get("files", []) if not entry.get("elsewhere")
        ]
        self._skipped: list[dict[str, Any]] = earlier.get("skipped", [])
        first = host == 0 and not own  # of several, after a run of one
        self._earlier = timing(run if first and "seconds" in run else earlier)

    def start(self, leads: bool = True) -> None:
        """Clear away what is not part of the run, and write the first manifest.

        leads: the first, or only, process that writes to this folder, which clears away after
        processes that take no part any more.
        """
        with self._disk():
            self.folder.mkdir(parents=True, exist_ok=True)
            for name in os.listdir(self.folder):
                if not (whole_name := stem(name)):
                    continue
                owner = owner_of(whole_name)
                mine = owner == self._suffix or (leads and owner not in self._others)
                orphan = SHARD.fullmatch(whole_name) and whole_name not in self._listed
                stale = name != whole_name or orphan
                if leads if self._overwrite else (mine and stale):
                    (self.folder / name).unlink()
            self._commit(self._files, "running")
            with open(self._journal_path, "a+b") as journal:
                journal.seek(0)  # a line that a kill cut short has no newline
                self._journal_bytes = journal.read().rfind(b"\n") + 1

    def add(self, item: dict[str, Any], answer: dict[str, Any]) -> None:
        """Take a sample, once; commits a shard whenever one is full.

        item: see `utils.items`; its arrays must not be changed afterwards. answer: what
        `predictions.json` is rebuilt from (`utils.scoring.answer`). Raises ValueError for a sample
        that was added before.
        """
        item = stored_item(item, self.activation_dtype)
        key = (item["task_id"], item["sample_idx"])
        if key in self.done or key != (answer["task_id"], answer["sample_idx"]):
            raise ValueError(f"{key} is stored already, or the answer is another sample's")
        line = json.dumps(answer) + "\n"
        if self._open.lacks_room_for(item):
            self.close_shard()
        self.done.add(key)
        self._open.append(item)
        self._answers.append(line)
        if self._open.is_full:
            self.close_shard()

    def close_shard(self) -> None:
        """Commit the samples added since the last shard; nothing where there are none."""
        if not (items := self._open.items):
            return
        name = f"activations{self._suffix}_batch_{self._next_number:06d}.pkl"
        with self._disk(items):
            with replacing(self.folder / name) as sink:
                dump(items, sink)
            entry = {
                "filename": name,
                "num_samples": len(items),
                "num_tokens": sum(len(item["input_ids"]) for item in items),
                "size_bytes": sink.size,
                "crc32c": sink.crc32c,
                "float16_overflows": sum(
                    float16_overflows(i, self.activation_dtype) for i in items
                ),
                "samples": [[item["task_id"], item["sample_idx"]] for item in items],
                "uploaded": False,
            }
            self._append_answers()
            self._commit([*self._files, entry], "running")
        self._files = [*self._files, entry]
        self._next_number += 1
        self._answers = []
        self._open.clear()

    def _append_answers(self) -> None:
        lines = "".join(self._answers).encode()
        with open(self._journal_path, "ab", buffering=0) as journal:
            journal.truncate(self._journal_bytes)  # drops what an append that failed left behind
            Sink(journal).write(lines)
            os.fsync(journal.fileno())
        self._journal_bytes += len(lines)

    def abandon(self) -> None:
        """Another thread is stuck in writing the open shard: from here on nothing is written."""
        self._failure = UserError(f"{self.folder} was given up", exit_code=1)

    def set_skipped(self, skipped: list[dict[str, Any]]) -> None:
        """All samples left out so far: `task_id`, `sample_idx`, `reason`."""
        self._skipped = skipped

    def update_timing(self, seconds: float, compile_seconds: float, tokens: int) -> None:
        """Since `start`: seconds of the run loop, of compiling; real tokens through the model."""
        self._timing = (seconds, compile_seconds, tokens)

    def finish(self, extra: dict[str, Any] | None = None) -> Manifest:
        """Close the last shard and mark the run complete, with `extra` entries such as scores."""
        self.close_shard()
        with self._disk():
            return self._commit(self._files, "complete", extra)

    def _commit(
        self, files: list[dict[str, Any]], status: str, extra: dict[str, Any] | None = None
    ) -> Manifest:
        timings = zip(self._earlier, self._timing, strict=True)
        seconds, compile_seconds, tokens = map(sum, timings)
        manifest = {
            "format_version": FORMAT_VERSION,
            "status": status,
            **totals(files),
            "cell_columns": list(CELL_COLUMNS),
            **self._static,
            "seconds": seconds,
            "compile_seconds": compile_seconds,
            "tokens_per_second": tokens / seconds if seconds else 0.0,
            **(extra or {}),
            "skipped": self._skipped,
            "files": files,
        }
        write_json(self._manifest_path, manifest)
        return manifest

    @contextlib.contextmanager
    def _disk(self, items: list[dict[str, Any]] | None = None) -> Iterator[None]:
        """A disk that fails ends the run; what is on it by then stays the last word."""
        if self._failure:
            raise self._failure
        try:
            yield
        except OSError as error:
            need = f"the shard takes {shard_bytes(items) / 1e6:.1f} MB, " if items else ""
            free = free_bytes(self.folder) / 1e6
            self._failure = UserError(
                f"cannot write to {self.folder}: {error.strerror}; {need}{free:.1f} MB are free. "
                "What was written before is intact: free space and --resume",
                exit_code=1,
            )
            raise self._failure from error


def load_shard(path: str | Path, verify: bool = True) -> list[dict[str, Any]]:
    """The items of a shard; loading one runs none of what a hostile file may hold.

    verify: compare size and crc32c with the manifest beside it first, and its samples then. Raises
    UserError with the file and the cause.
    """
    path = Path(path)
    if not verify:
        return _read_shard(path, None)
    entries = {entry["filename"]: entry for entry in read_manifest(path.parent)["files"]}
    if path.name not in entries:
        raise UserError(f"{path} is refused: the manifest beside it does not list it")
    return _read_shard(path, entries[path.name])


def iter_items(folder: str | Path) -> Iterator[dict[str, Any]]:
    """Every item of a run, verified; one shard in memory at a time."""
    for entry in read_manifest(folder)["files"]:
        yield from _read_shard(Path(folder) / entry["filename"], entry)


def _read_shard(path: Path, entry: dict[str, Any] | None) -> list[dict[str, Any]]:
    try:
        with open(path, "rb") as file:
            if entry:
                _verify(file, entry)
            items = load(file)
        if entry and [[item["task_id"], item["sample_idx"]] for item in items] != entry["samples"]:
            raise pickle.UnpicklingError("it holds other samples than its manifest says")
    except pickle.UnpicklingError as error:
        raise UserError(f"{path} is refused: {error}") from error
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}") from error
    return items


def _verify(file: BinaryIO, entry: dict[str, Any]) -> None:
    size = os.fstat(file.fileno()).st_size
    if size != entry["size_bytes"]:
        raise pickle.UnpicklingError(f"it has {size} bytes, not the {entry['size_bytes']} written")
    if (crc32c := checksum(file)) != entry["crc32c"]:
        raise pickle.UnpicklingError(f"damaged: its crc32c is {crc32c}, not {entry['crc32c']}")
    file.seek(0)


if __name__ == "__main__":  # python -m utils.shards merge DIR...
    from utils import cli, merge

    cli.run(merge.main, merge.build_parser())
