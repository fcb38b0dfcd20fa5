"""The folder of a run, as one process writes to it: filling, closing, committing, resuming.

A kill at any moment leaves a manifest whose every shard is whole, and perhaps files that no
manifest lists; those are not part of the run. Knows nothing of models, meshes or buckets.
"""

import contextlib
import json
import os
import threading
from collections import deque
from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from utils.errors import UserError
from utils.shards import manifest as stored
from utils.shards.filling import OpenShard
from utils.shards.held import Mode, Writer, held_in, unsound_of
from utils.shards.int8 import quantized_item
from utils.shards.items import (
    CELL_COLUMNS,
    gave_nothing_finite,
    non_finite_rows,
    sample_key,
    sample_name,
    stored_item,
)
from utils.shards.manifest import FORMAT_VERSION, SHARD, Manifest, Shard
from utils.shards.pickles import dump, shard_bytes
from utils.store import local
from utils.store.locks import locked_file


class RunFolder(contextlib.AbstractContextManager):
    """One process's shards, answers and manifest in the folder of a run.

    The constructor takes the lock and reads; leaving the `with` block before `begin` leaves nothing
    behind. Of several processes all call `clear`, which removes what is not part of the run, and
    when all have, `begin`, which writes the first manifest. Then `add`, `seal` and `finish` are for
    one thread; `record` and `manifest_of` for others besides.

    settings: top-level manifest entries that decide what is computed; a resumed run must have the
        same, but for keys named `path`. facts: entries that a resumed run may change.
    restored: file name -> content of manifests and journals that a bucket holds and the folder has
        lost. taken: names of shards that are not to be given again.

    held: what was there. shards: all shards that this process knows of, by file name; done: their
    samples, and those added since. sealed: the shards that were committed, for `Uploads` to take.
    Raises UserError, exit code 2 from the constructor, 1 from `clear` on when the disk fails.
    """

    def __init__(
        self,
        path: str | Path,
        settings: dict[str, Any],
        facts: dict[str, Any],
        *,
        mode: Mode = "new",
        writer: Writer | None = None,
        activation_dtype: str = "float16",
        save_every_n_samples: int | None = None,
        max_shard_mb: float = 512,
        restored: Mapping[str, bytes] | None = None,
        taken: Collection[str] = (),
    ):
        self.path, self.writer, self.mode = Path(path), writer or Writer(), mode
        self.activation_dtype = activation_dtype
        settings = json.loads(json.dumps(settings))  # as the manifest gives them back
        self._static = {**facts, **settings}
        self._activations = self._static.pop("activations", {})
        self._restored = restored or {}
        self._open = OpenShard(save_every_n_samples, max_shard_mb, activation_dtype)
        self._timing = (0.0, 0.0, 0.0)
        self._status, self._extra = "running", {}
        self._skipped: list[dict[str, Any]] = []
        self._failure: UserError | None = None
        self._stamp: tuple[int, ...] = ()  # of the manifest as this process left it
        self._commits = threading.RLock()
        self.sealed: deque[Shard] = deque()
        local.check_writable(self.path)
        held_in(self.path, settings, mode, self._restored)  # refused before a file is made
        self._locks = contextlib.ExitStack()
        try:
            self._take_lock()
            held = held_in(self.path, settings, mode, self._restored)
            unsound = unsound_of(held, self.writer, self._restored)
            self.held = replace(held, unsound=unsound)
        except BaseException:
            self.close()
            raise
        self.shards = dict(self.held.shards)
        own = self.held.manifests.get(self.manifest_path.name)
        self._listed = set(self.shards)  # by the only process; one of several lists its own
        if self.writer.owner:
            self._listed = {entry["filename"] for entry in own["files"]} if own else set()
        self._earlier = stored.timing(own or {})
        if own is None and self.writer.index == 0 and self.held.manifests:  # of other processes
            self._earlier = stored.timing(stored.union_of(self.held.manifests))
        numbers = map(self._number, [*self.shards, *taken])
        self._next_number = 1 + max(numbers, default=0)
        self.settle(self.held.missing if self.writer.count == 1 else (), self.shards)

    # ------------------------------------------------------------------------------ opening

    @property
    def manifest_path(self) -> Path:
        return self.path / stored.manifest_name(self.writer.owner)

    @property
    def journal_path(self) -> Path:
        return self.journal_of(self.writer.owner)

    def journal_of(self, owner: str) -> Path:
        return self.path / stored.journal_name(owner)

    @property
    def absent_journals(self) -> list[Path]:
        """The journals here of processes that take no part any more, where this one speaks for
        shards of theirs."""
        owners = {self.shards[name].owner for name in self.speaks_for} - {self.writer.owner}
        return list(filter(Path.exists, map(self.journal_of, sorted(owners))))

    def __exit__(self, *exception: object) -> None:
        self.close()

    def close(self) -> None:
        """Gives the locks back; a folder and journals that were made for them alone go again."""
        self._locks.close()

    def _take_lock(self) -> None:
        """Locks this process's journal, and those of processes that take no part any more: one of
        those may be frozen, and wake."""
        names = [self.journal_path.name]
        if self.writer.index == 0 and self.path.exists():
            journals = filter(stored.JOURNAL.fullmatch, os.listdir(self.path))
            names += [n for n in journals if stored.owner_of(n) not in self.writer.owners]
        for name in names:
            self._locks.enter_context(locked_file(self.path / name))

    @property
    def share(self) -> float:
        """Of the samples of the run, those that are stored here, by one of the processes that share
        this folder: their locked journals are in it once all have opened it."""
        journals = map(self.journal_of, self.writer.owners)
        return sum(map(Path.exists, journals)) / self.writer.count

    def _number(self, name: str) -> int:
        """Of a shard of this process; 0 for any other file."""
        found = SHARD.fullmatch(name)
        return int(found[2]) if found and (found[1] or "") == self.writer.owner else 0

    def settle(self, lost: Collection[str], speaks_for: Iterable[str]) -> None:
        """lost: shards that are nowhere any more, whose samples are to be computed again.
        speaks_for: shards of which this process, and no other, sends answers and entries to the
        first and bytes to the bucket: its own, and some of processes that take no part any more."""
        self.shards = {name: s for name, s in self.shards.items() if name not in lost}
        self._listed -= set(lost)
        self.speaks_for = frozenset(speaks_for) - set(lost)
        self.done = {key for shard in self.shards.values() for key in shard.samples}

    def clear(self) -> None:
        """Removes what is not part of the run: all of an earlier one that is overwritten, else what
        a kill left of this process's own files."""
        with self._disk():
            for name in filter(stored.stem, os.listdir(self.path)):
                owner, is_partial = stored.owner_of(name), name != stored.stem(name)
                if self.mode == "overwrite":
                    stays = stored.JOURNAL.fullmatch(name) and owner in self.writer.owners  # locked
                else:
                    is_orphan = is_partial or (SHARD.fullmatch(name) and name not in self.shards)
                    stays = owner != self.writer.owner or not is_orphan
                if not stays:
                    (self.path / name).unlink(missing_ok=True)
            if self.mode == "overwrite":
                os.truncate(self.journal_path, 0)

    def begin(self, skipped: list[dict[str, Any]] | None = None) -> None:
        """Writes the first manifest. skipped: as it lists the samples that are left out."""
        self._skipped = skipped or []
        with self._disk():
            for name in sorted(self._restored):  # answers first, and then the list of the shards
                self._restore(self.path / name, self._restored[name])
            self._correct_other_manifests()
            self._commit()
            self.journal_bytes = stored.whole_size(self.journal_path)

    def _restore(self, path: Path, content: bytes) -> None:
        there = path.stat().st_size if path.exists() else 0
        if path.suffix == ".jsonl":
            if there < len(content):  # a kill may have cut it short as it was restored
                self._append(path, 0, content)
        elif not there:
            with local.replacing(path) as sink:
                sink.write(content)

    def _correct_other_manifests(self) -> None:
        """What is lost is listed by no manifest of a process that takes no part any more; nor does
        that of all say that a run is complete which goes on."""
        for name, manifest in self.held.manifests.items():
            if stored.owner_of(name) in self.writer.owners:
                continue
            files = [entry for entry in manifest["files"] if entry["filename"] in self.shards]
            status = "running" if name == "metadata.json" else manifest["status"]
            if (files, status) != (manifest["files"], manifest["status"]):
                left = stored.with_shards(manifest, map(Shard.from_json, files))
                local.write_json(self.path / name, {**left, "status": status})

    # ------------------------------------------------------------------------------ writing

    def add(self, item: dict[str, Any], answer: dict[str, Any]) -> None:
        """Take a sample, once; commits a shard whenever one is full.

        item: see `utils.shards.items`; its arrays must not be changed afterwards. answer: what
        `predictions.json` is rebuilt from (`utils.arc.scores.answer`). Raises ValueError for a
        sample that was added before, and UserError for one of which the model gave no finite row.
        """
        item, errors = quantized_item(item) if self.activation_dtype == "int8" else (item, {})
        item = stored_item(item, self.activation_dtype)
        key = sample_key(item)
        if key in self.done or key != sample_key(answer):
            name = sample_name(key)
            raise ValueError(f"{name} is stored already, or the answer is another sample's")
        non_finite = non_finite_rows(item)
        if gave_nothing_finite(item, non_finite):
            raise UserError(
                f"{sample_name(key)}: nothing that the model gives is finite, but NaN or "
                "infinities alone: check the weights, or take another --dtype",
                exit_code=1,
            )
        line = local.to_json(answer) + "\n"
        if self._open.lacks_room_for(item):
            self.seal()
        self.done.add(key)
        self._open.append(item, errors, line, non_finite)
        if self._open.is_full:
            self.seal()

    def seal(self) -> None:
        """Commit the samples added since the last shard; nothing where there are none."""
        if not (items := self._open.items):
            return
        name = f"activations{self.writer.owner}_batch_{self._next_number:06d}.pkl"
        with self._disk(items), self._commits:
            self._check_that_it_is_ours()
            with local.replacing(self.path / name, exclusive=True) as sink:
                dump(items, sink)
            shard = self._open.as_written(name, sink)
            lines = "".join(self._open.answers).encode()
            self.journal_bytes = self._append(self.journal_path, self.journal_bytes, lines)
            self.shards[name] = shard
            self._listed.add(name)
            try:
                self._commit()
            except BaseException:  # what no manifest lists is not stored
                del self.shards[name]
                self._listed.remove(name)
                raise
        self.speaks_for |= {name}
        self._next_number += 1
        self._open.clear()
        self.sealed.append(shard)

    def _append(self, journal: Path, size: int, lines: bytes) -> int:
        """Writes behind the first `size` bytes, in place because the file is locked; what an append
        that failed left there is dropped. Returns the new size."""
        with open(journal, "ab", buffering=0) as file:
            file.truncate(size)
            local.Sink(file).write(lines)
            os.fsync(file.fileno())
        return size + len(lines)

    @property
    def num_stored(self) -> int:
        """Samples in shards that a manifest lists."""
        return sum(shard.num_samples for shard in self.shards.values())

    def update_timing(self, seconds: float, compile_seconds: float, tokens: int) -> None:
        """Since `begin`: seconds of the run loop, of compiling; real tokens through the model."""
        self._timing = (seconds, compile_seconds, tokens)

    def finish(self, extra: dict[str, Any] | None = None) -> Manifest:
        """Close the last shard and mark the run complete, with `extra` entries such as scores."""
        self.seal()
        with self._disk(), self._commits:
            self._status, self._extra = "complete", extra or {}
            return self._commit()

    # ---------------------------------------------------------------------- other threads too

    def record(self, receipts: Mapping[str, dict[str, Any]]) -> None:
        """Lists what this process has sent: file name -> `uri`, `size`, `crc32c`, `generation`."""
        with self._disk(), self._commits:
            sent = {n: replace(self.shards[n], uploaded=r) for n, r in receipts.items()}
            self.shards |= sent
            self._listed |= sent.keys()
            self._commit()

    def manifest_of(self, names: Collection[str], others: Iterable[Shard] = ()) -> bytes:
        """The manifest as a reader of the bucket is to find it while the run goes on, with those
        shards alone and `others`. `journal_bytes` of the journal hold at least their answers."""
        with self._commits:
            files = [s for name, s in self.shards.items() if name in names and name in self._listed]
            return local.json_lines(self._manifest([*files, *others], "running", {}))

    def _commit(self) -> Manifest:
        self._check_that_it_is_ours()
        files = [shard for name, shard in self.shards.items() if name in self._listed]
        manifest = self._manifest(files, self._status, self._extra)
        local.write_json(self.manifest_path, manifest)
        if self.writer.owner and self.writer.count == 1:  # a part's, by which it is read alone
            joint = self._manifest(list(self.shards.values()), self._status, self._extra)
            local.write_json(self.path / "metadata.json", joint)
        self._stamp = self._read_stamp()
        return manifest

    def _read_stamp(self) -> tuple[int, ...]:
        if not self.manifest_path.exists():
            return ()
        found = self.manifest_path.stat()
        return found.st_ino, found.st_mtime_ns, found.st_size

    def _check_that_it_is_ours(self) -> None:
        """Raises UserError where another process has gone on with the run, as one does that was
        started after this one had been frozen on a disk that several machines share."""
        if self._stamp and self._stamp != self._read_stamp():
            raise UserError(
                f"{self.manifest_path} was changed by another process, which goes on with the run: "
                "this one ends, and has changed nothing since",
                exit_code=1,
            )

    def _manifest(self, files: list[Shard], status: str, extra: dict[str, Any]) -> Manifest:
        timings = zip(self._earlier, self._timing, strict=True)
        seconds, compile_seconds, tokens = map(sum, timings)
        return {
            "format_version": FORMAT_VERSION,
            "status": status,
            **stored.totals(files, self._activations),
            "cell_columns": list(CELL_COLUMNS),
            **self._static,
            "seconds": seconds,
            "compile_seconds": compile_seconds,
            "tokens_per_second": tokens / seconds if seconds else 0.0,
            **extra,
            "skipped": self._skipped,
            "files": [shard.to_json() for shard in files],
        }

    @contextlib.contextmanager
    def _disk(self, items: list[dict[str, Any]] | None = None) -> Iterator[None]:
        """A disk that fails ends the run; what is on it by then stays the last word."""
        if self._failure:
            raise self._failure
        try:
            yield
        except OSError as error:
            words = f"cannot write to {self.path}: {error.strerror}"
            if error.errno in local.NO_SPACE:
                need = f"the shard takes {shard_bytes(items) / 1e6:.1f} MB, " if items else ""
                words += f"; {need}{local.free_bytes(self.path) / 1e6:.1f} MB are free"
            way_on = f"What was written before is intact: {local.remedy(error)} and --resume"
            self._failure = UserError(f"{words}. {way_on}", exit_code=1)
            raise self._failure from error
