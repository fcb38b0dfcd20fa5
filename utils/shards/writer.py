"""Shard files of a run: filling, closing, committing, resuming.

A kill at any moment leaves a manifest whose every shard is whole, and perhaps files that no
manifest lists; those are not part of the run. Knows nothing of models, meshes or buckets.
"""

import contextlib
import itertools
import json
import os
import threading
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from utils.arc.tasks import SampleKey
from utils.errors import UserError
from utils.shards.items import (
    CELL_COLUMNS,
    array_bytes,
    dump,
    float16_overflows,
    sample_key,
    sample_name,
    shard_bytes,
    stored_item,
)
from utils.shards.manifest import (
    FORMAT_VERSION,
    SHARD,
    Manifest,
    owner_of,
    read_manifests,
    resumable_run,
    stem,
    timing,
    totals,
)
from utils.store.local import Sink, check_writable, free_bytes, json_lines, replacing, write_json


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


@dataclass(frozen=True)
class Elsewhere:
    """What is known of a run from outside of its folder.

    manifests: file name -> manifest; of what it lists, this process is to look after. names: of
    files there, whose numbers are taken. journals: file name -> content, of the answers to those.
    listed: entries of all shards that are listed there.
    """

    manifests: dict[str, Manifest] = field(default_factory=dict)
    names: Collection[str] = ()
    journals: dict[str, bytes] = field(default_factory=dict)
    listed: list[dict[str, Any]] = field(default_factory=list)


class ShardWriter:
    """One process's shards, answers and manifest in the folder of a run.

    The constructor only checks; `start` is the first to change anything, so that whatever else can
    fail before a run begins leaves an older run as it is. `add`, `close_shard` and `finish` are for
    one thread at a time, shielded from signals; `record_uploads` and `bucket_manifest` for another.

    settings: top-level manifest entries that decide what is computed (`model`, `dataset`, `prompt`,
        `activations`, ...), nested dicts; a resumed run must have the same, but for keys named
        `path`. facts: entries that a resumed run may change (`arguments`, `versions`, `devices`,
        `mesh_shape`, `processes`).
    elsewhere: what a bucket holds of the run, and this folder does not.
    host: this process's number among `num_hosts`, None for the only one. In a folder that several
        share every process constructs, then the one that leads starts, then the others.
    done: samples of the shards in this folder, and those added since. hosts: processes that wrote
        some of them. here: manifest entries of them; files: of those that this process looks after.
    continues: a run that the folder holds is resumed. complete: that run is; there is nothing to
        start. on_sealed: called with the entry of each new shard, once it is in the manifest.
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
        elsewhere: Elsewhere | None = None,
    ):
        if resume and overwrite:
            raise UserError("--resume continues a run, --overwrite replaces it: give one of them")
        self.folder, self.host = Path(folder), host
        self.activation_dtype = activation_dtype
        self._overwrite = overwrite
        self._suffix = "" if host is None else f"_host{host:03d}"
        self._others = {f"_host{i:03d}" for i in range(num_hosts)} if host is not None else set()
        self.manifest_path = self.folder / f"metadata{self._suffix}.json"
        self.journal_path = self.folder / f"answers{self._suffix}.jsonl"
        settings = json.loads(json.dumps(settings))  # as the manifest gives them back
        self._static = {**facts, **settings}
        self._open = OpenShard(save_every_n_samples, max_shard_mb)
        self._answers: list[str] = []  # journal lines of the open shard
        self._timing = (0.0, 0.0, 0.0)
        self._failure: UserError | None = None
        self._lock = threading.RLock()
        self.elsewhere = elsewhere or Elsewhere()
        self._extra: dict[str, Any] = {}
        self.on_sealed: Callable[[dict[str, Any]], None] = lambda entry: None

        check_writable(self.folder)
        manifests = read_manifests(self.folder) if self.folder.exists() else {}
        manifests = {**self.elsewhere.manifests, **manifests}
        run = None if overwrite else resumable_run(self.folder, manifests, settings, resume)
        self.continues = run is not None
        run = run or {"status": "running", "files": []}
        own = {} if overwrite else manifests.get(self.manifest_path.name, {})
        earlier = run if host is None else own
        self.complete = run["status"] == "complete"
        # Those in the folders of other processes are theirs to look after.
        here = self.here = [entry for entry in run["files"] if not entry.get("elsewhere")]
        owners = {owner_of(entry["filename"]) for entry in here} - {""}
        self.hosts = sorted(int(owner.removeprefix("_host")) for owner in owners)
        self._listed = {entry["filename"] for entry in run["files"]}
        self.done: set[SampleKey] = {tuple(key) for entry in here for key in entry["samples"]}
        taken = filter(SHARD.fullmatch, {*self._listed, *self.elsewhere.names})
        named = [SHARD.fullmatch(name).groups() for name in taken]
        numbers = [int(number) for suffix, number in named if (suffix or "") == self._suffix]
        self._next_number = 1 + max(numbers, default=0)
        self.files: list[dict[str, Any]] = [
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
            if leads and self.host is not None:  # of processes that take no part any more
                known = {entry["filename"] for entry in self.files}
                others = self._others - {self._suffix}
                self.files += [
                    entry
                    for entry in self.here
                    if entry["filename"] not in known and owner_of(entry["filename"]) not in others
                ]
            self._write_journals()
            self._commit(self.files, "running")
            with open(self.journal_path, "a+b") as journal:
                journal.seek(0)  # a line that a kill cut short has no newline
                self._journal_bytes = journal.read().rfind(b"\n") + 1

    def _write_journals(self) -> None:
        """The answers that belong to shards which are in a bucket alone."""
        for name, content in self.elsewhere.journals.items():
            if not (self.folder / name).exists():
                with replacing(self.folder / name) as sink:
                    sink.write(content)

    def other_journals(self) -> list[Path]:
        """Of processes that take no part any more, and whose shards this one looks after."""
        owners = sorted({owner_of(entry["filename"]) for entry in self.files})
        paths = [self.folder / f"answers{owner}.jsonl" for owner in owners]
        return [path for path in paths if path != self.journal_path and path.exists()]

    def add(self, item: dict[str, Any], answer: dict[str, Any]) -> None:
        """Take a sample, once; commits a shard whenever one is full.

        item: see `utils.shards.items`; its arrays must not be changed afterwards. answer: what
        `predictions.json` is rebuilt from (`utils.arc.scores.answer`). Raises ValueError for a
        sample that was added before.
        """
        item = stored_item(item, self.activation_dtype)
        key = sample_key(item)
        if key in self.done or key != sample_key(answer):
            name = sample_name(key)
            raise ValueError(f"{name} is stored already, or the answer is another sample's")
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
                "samples": [list(sample_key(item)) for item in items],
                "uploaded": False,
            }
            self._append_answers()
            with self._lock:
                self._commit([*self.files, entry], "running")
                self.files = [*self.files, entry]
        self._next_number += 1
        self._answers = []
        self._open.clear()
        self.on_sealed(entry)

    def _append_answers(self) -> None:
        lines = "".join(self._answers).encode()
        with open(self.journal_path, "ab", buffering=0) as journal:
            journal.truncate(self._journal_bytes)  # drops what an append that failed left behind
            Sink(journal).write(lines)
            os.fsync(journal.fileno())
        self._journal_bytes += len(lines)

    def abandon(self) -> None:
        """Another thread is stuck in writing the open shard: from here on nothing is written."""
        self._failure = UserError(f"{self.folder} was given up", exit_code=1)

    def set_skipped(self, skipped: list[dict[str, Any]]) -> None:
        """All samples left out so far: `task_id`, `sample_idx`, `reason`, and with augmentations
        `view`."""
        self._skipped = skipped

    def update_timing(self, seconds: float, compile_seconds: float, tokens: int) -> None:
        """Since `start`: seconds of the run loop, of compiling; real tokens through the model."""
        self._timing = (seconds, compile_seconds, tokens)

    def finish(self, extra: dict[str, Any] | None = None) -> Manifest:
        """Close the last shard and mark the run complete, with `extra` entries such as scores."""
        self.close_shard()
        with self._disk(), self._lock:
            return self._commit(self.files, "complete", extra)

    def record_uploads(self, receipts: dict[str, dict[str, Any]]) -> None:
        """Commits what a bucket holds: file name -> `uri`, `size`, `crc32c`, `generation`."""
        with self._disk(), self._lock:
            files = [
                {**entry, "uploaded": receipts.get(entry["filename"], entry["uploaded"])}
                for entry in self.files
            ]
            self._commit(files, self._status, self._extra)
            self.files = files

    def bucket_manifest(
        self, names: Collection[str], others: Sequence[dict[str, Any]] = ()
    ) -> tuple[bytes, int]:
        """The manifest as a reader of the bucket is to find it while the run goes on, with those
        shards alone and the entries of `others`; and how many bytes of the journal hold the answers
        to them."""
        with self._lock:
            files = [entry for entry in self.files if entry["filename"] in names]
            files += others
            return json_lines(self._manifest(files, "running", {})), self._journal_bytes

    def _commit(
        self, files: list[dict[str, Any]], status: str, extra: dict[str, Any] | None = None
    ) -> Manifest:
        manifest = self._manifest(files, status, extra or {})
        write_json(self.manifest_path, manifest)
        self._status, self._extra = status, extra or {}
        return manifest

    def _manifest(
        self, files: list[dict[str, Any]], status: str, extra: dict[str, Any]
    ) -> Manifest:
        timings = zip(self._earlier, self._timing, strict=True)
        seconds, compile_seconds, tokens = map(sum, timings)
        return {
            "format_version": FORMAT_VERSION,
            "status": status,
            **totals(files),
            "cell_columns": list(CELL_COLUMNS),
            **self._static,
            "seconds": seconds,
            "compile_seconds": compile_seconds,
            "tokens_per_second": tokens / seconds if seconds else 0.0,
            **extra,
            "skipped": self._skipped,
            "files": files,
        }

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
