"""The shards of a run on their way to a bucket, while the model computes.

A shard is sent by one of a few threads; then one more thread puts its receipt into the manifest on
the disk, and sends the answers and this process's manifest. So what a manifest in the bucket lists
is there, whenever the machine may vanish. All threads are daemons: whoever waits for them does so
with a deadline of his own.
"""

import logging
import queue
import threading
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

from tqdm import tqdm

from utils.cli import command_to_resume
from utils.errors import UserError, some
from utils.shards.manifest import MANIFEST
from utils.shards.writer import ShardWriter
from utils.store.bucket import BucketFolder, Damaged, Receipt, Stopped, opened
from utils.store.deadline import within
from utils.store.local import checksum

THREADS = 4  # each holds a chunk of 8 MiB, twice for a file that goes in one request
MANIFEST_SHARE = 0.05  # of the time, at most, goes into sending manifests that grow
MANIFEST_SECONDS = 1.0  # between two writes of one object, which a bucket asks for
MAX_MANIFEST_SECONDS = 60.0  # the same, at most, of a manifest that took long to send
CLAIM_SECONDS = 120
LAST_SECONDS = 5  # for the last files, at least, also where the shards took all of the time
STOP_SECONDS = 15  # for uploads after a signal; a process is to be gone after 20
PATIENCE_SECONDS = 10  # before trouble is spoken of, and then once in
TELL_SECONDS = 60

log = logging.getLogger(__name__)


class Uploads:
    """Of a run that goes to no bucket: nothing to do, ever. See `BucketUploads`."""

    num_bytes = 0
    waited = 0.0
    receipts: dict[str, dict[str, Any]] = {}  # noqa: RUF012 (never written to)

    def start(self) -> None:
        """Takes the prefix for this process's own, and begins to send."""

    def make_room(self) -> None:
        """Waits while more than enough shards wait for the network."""

    def check(self) -> None:
        """Raises UserError when an upload failed for good."""

    def drain(self, check: Callable[[], None]) -> None:
        """Returns when the bucket holds every shard, and raises UserError when it does not.

        check: called time and again; what it raises ends the wait.
        """

    def finish(self, check: Callable[[], None], *paths: Path) -> None:
        """Sends what a run ends with, in this order."""

    def holds(self, entries: list[dict[str, Any]], *paths: Path) -> bool:
        """Whether there is nothing to send."""
        return True

    def release(self) -> None:
        """The run ends early: nobody waits for room from here on."""

    def stop(self) -> None:
        """Sends what it can within STOP_SECONDS of `release`, and says what is left."""

    def close(self) -> None:
        """Ends the threads, as soon as the request at hand is over."""


class BucketUploads(Uploads):
    """Sends what `writer` seals to `bucket`.

    known: receipts of objects that were there before. max_pending_bytes: of shards that may wait.
    timeout: seconds for what is left at the end, and seconds that a full backlog may stand still.
    claim: name of the manifest by which this process takes the prefix. joint_files: of the first of
        several, which takes `metadata.json` besides: what the bucket lists already. shards: whether
        they are sent, or only what the run ends with.
    num_bytes: sent so far, of all kinds. waited: seconds that computing waited. receipts:
        of the shards, as the manifest has them.
    """

    def __init__(
        self,
        bucket: BucketFolder,
        writer: ShardWriter,
        known: dict[str, Receipt],
        *,
        max_pending_bytes: float,
        timeout: float,
        delete_after_upload: bool = False,
        claim: str,
        joint_files: list[dict[str, Any]] | None = None,
        shards: bool = True,
    ):
        self.bucket, self.writer = bucket, writer
        self.num_bytes = 0
        self.waited = 0.0
        self.receipts: dict[str, dict[str, Any]] = {}
        self._there = dict(known)
        self._max_pending, self._timeout = max_pending_bytes, timeout
        self._deletes, self._claim, self._shards = delete_after_upload, claim, shards
        self._joint_files = joint_files
        self._changed = threading.Condition()  # of what follows
        self._queue: queue.SimpleQueue = queue.SimpleQueue()
        self._sizes: dict[str, int] = {}  # of what is sealed and not in the bucket's manifest
        self._pending: dict[str, int] = {}  # of what fills the disk until it is sent
        self._new: dict[str, Receipt] = {}  # sent, and not in a manifest
        self._damaged: dict[str, str] = {}
        self._failure: BaseException | None = None
        self._trouble, self._told, self._healthy = "", float("-inf"), time.monotonic()
        self._told_waiting = float("-inf")
        self._deadline = 0.0  # of what is sent after the last sample
        self._stop_by: float | None = None
        self._stopping, self._hurry = threading.Event(), threading.Event()

    # ------------------------------------------------------------------------- the run's side

    def start(self) -> None:
        files = self.writer.files
        known = {e["filename"]: self._there.get(e["filename"]) for e in files}
        self.receipts = {name: asdict(receipt) for name, receipt in known.items() if receipt}
        if self.receipts:
            self.writer.record_uploads(self.receipts)
        within(
            CLAIM_SECONDS,
            self._take_prefix,
            lambda: UserError(f"{self.bucket} took no manifest within {CLAIM_SECONDS} s: "
                              f"{self._trouble}; check the network, then --resume", exit_code=1),
        )  # fmt: skip
        if self._shards:
            for entry in files:
                if entry["filename"] not in self.receipts:
                    self.submit(entry)
            self.writer.on_sealed = self.submit
        if self._deletes:  # what an earlier run sent and left
            for entry in filter(self._is_left, files):
                self._sizes[entry["filename"]] = entry["size_bytes"]
                self._new[entry["filename"]] = self._there[entry["filename"]]
        for name, work in [("manifests", self._keep_manifest)] + [("upload", self._send)] * THREADS:
            threading.Thread(target=self._guard, args=(work,), name=name, daemon=True).start()

    def holds(self, entries: list[dict[str, Any]], *paths: Path) -> bool:
        """Whether the bucket holds these shards, and these files as they are now."""
        for path in paths:
            there = self._there.get(path.name)
            if there is None or not path.exists():
                return False
            with open(path, "rb") as file:
                if not there.holds(path.stat().st_size, checksum(file)):
                    return False
        if self._deletes and any(map(self._is_left, entries)):
            return False
        return all(entry["filename"] in self._there for entry in entries)

    def _is_left(self, entry: dict[str, Any]) -> bool:
        """Whether a shard that the bucket holds is still on the disk."""
        name = entry["filename"]
        return name in self._there and (self.writer.folder / name).exists()

    def submit(self, entry: dict[str, Any]) -> None:
        with self._changed:
            self._sizes[entry["filename"]] = entry["size_bytes"]
            self._pending[entry["filename"]] = entry["size_bytes"]
        self._queue.put(entry)

    def make_room(self) -> None:
        begin = still = time.monotonic()
        sent = self.num_bytes, self.bucket.bytes_read
        with self._changed:
            if self._has_room():
                return
            if begin > self._told_waiting + TELL_SECONDS:
                self._told_waiting = begin
                log.info(
                    "computing waits for the network: %.2f GB of shards wait to be uploaded",
                    sum(self._pending.values()) / 1e9,
                )
            while not self._has_room():
                self._changed.wait(0.5)
                if sent != (now := (self.num_bytes, self.bucket.bytes_read)):
                    sent, still = now, time.monotonic()
                if time.monotonic() - still > self._timeout:
                    self._stop_by = time.monotonic()
                    waiting = sum(self._pending.values()) / 1e9
                    raise UserError(
                        f"nothing could be uploaded to {self.bucket} for {self._timeout:g} s, while"
                        f" {waiting:.2f} GB wait ({self._trouble or 'no answer'}); they are intact "
                        f"in {self.writer.folder}. To go on: {command_to_resume()}",
                        exit_code=1,
                    )
        self.waited += time.monotonic() - begin

    def _has_room(self) -> bool:
        ending = self._stopping.is_set() or self._hurry.is_set() or self._failure is not None
        return ending or sum(self._pending.values()) <= self._max_pending

    def check(self) -> None:
        if self._failure is not None:
            raise self._failure

    def drain(self, check: Callable[[], None]) -> None:
        deadline = self._deadline = time.monotonic() + self._timeout
        self._hurry.set()
        with self._changed:
            total = sum(self._sizes.values())
        if total:
            with tqdm(total=total, unit="B", unit_scale=True, desc="uploading") as bar:
                while not self._settled(0.2) and time.monotonic() < deadline:
                    check()
                    bar.update(total - sum(self._left().values()) - bar.n)
                bar.update(total - sum(self._left().values()) - bar.n)
        self._stop_by = time.monotonic()
        self.check()
        problems = [
            f"{words} (restore the file, or start again with another --activations_dir and prefix)"
            for words in self._damaged.values()
        ]
        if left := self._left():
            problems.append(
                f"{_shards(left)} could not be uploaded to {self.bucket} within {self._timeout:g} s"
                f" ({self._trouble or 'too slow'}): {some(sorted(left))}; what is left is intact in"
                f' {self.writer.folder}, where metadata.json says "uploaded": false'
            )
        if problems:
            way_on = f". To send the rest: {command_to_resume()}" if left else ""
            raise UserError("; ".join(problems) + way_on, exit_code=1)

    def finish(self, check: Callable[[], None], *paths: Path) -> None:
        def late() -> UserError:
            return UserError(
                f"{some([path.name for path in paths])} could not be uploaded to {self.bucket} "
                f"within {self._timeout:g} s ({self._trouble or 'no answer'}). To send the rest: "
                f"{command_to_resume()}",
                exit_code=1,
            )

        def send() -> None:
            for path in paths:
                self._put(path, path.stat().st_size)

        within(max(LAST_SECONDS, self._deadline - time.monotonic()), send, late, check)

    def release(self) -> None:
        self._stop_by = self._stop_by or time.monotonic() + STOP_SECONDS
        self._hurry.set()
        with self._changed:
            self._changed.notify_all()

    def close(self) -> None:
        self._stopping.set()
        with self._changed:
            self._changed.notify_all()
        for _ in range(THREADS):
            self._queue.put(None)

    def stop(self) -> None:
        self.release()
        if (left := self._left()) and self._stop_by > time.monotonic():
            log.info("sending %s for up to %d s", _shards(left), STOP_SECONDS)
        while not self._settled(0.1) and time.monotonic() < self._stop_by:
            pass
        self._stopping.set()
        if left := self._left():
            log.info(
                "on this disk, and not yet in %s: %s; --resume sends the rest",
                *(self.bucket, _shards(left)),
            )

    def _settled(self, seconds: float) -> bool:
        with self._changed:
            return self._changed.wait_for(
                lambda: not self._left() or self._failure is not None, seconds
            )

    def _left(self) -> dict[str, int]:
        with self._changed:
            return {n: size for n, size in self._sizes.items() if n not in self._damaged}

    # ------------------------------------------------------------------------- in the threads

    def _guard(self, work: Callable[[], None]) -> None:
        try:
            work()
        except Stopped:
            pass
        except BaseException as error:
            with self._changed:
                self._failure = self._failure or error
                self._changed.notify_all()

    def _send(self) -> None:
        """Shards, one after the other, for as long as the process lives."""
        while entry := self._queue.get():
            name, size = entry["filename"], entry["size_bytes"]
            try:
                receipt = self.bucket.put(
                    self.writer.folder / name,
                    name,
                    size,
                    entry["crc32c"],
                    stopping=self._stopping,
                    trouble=self._tell,
                )
            except Damaged as error:
                log.error("%s", error)
                with self._changed:
                    self._damaged[name] = str(error)
                    del self._pending[name]
                    self._changed.notify_all()
                continue
            with self._changed:
                self._new[name] = receipt
                if not self._deletes:  # else once it is deleted
                    del self._pending[name]
                self._count(size)
                self._changed.notify_all()

    def _keep_manifest(self) -> None:
        due = earliest = 0.0
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._new or self._stopping.is_set())
            self._hurry.wait(max(0.0, due - time.monotonic()))
            time.sleep(max(0.0, earliest - time.monotonic()))
            with self._changed:
                new, self._new = self._new, {}
            if not new:
                return
            begin = time.monotonic()
            receipts = {name: asdict(receipt) for name, receipt in new.items()}
            self.writer.record_uploads(receipts)
            self.receipts |= receipts
            self._send_manifest()
            if self._deletes:
                self._delete(new)
            with self._changed:
                for name in new:
                    del self._sizes[name]
                    self._pending.pop(name, None)
                self._changed.notify_all()
            now = time.monotonic()
            pause = min((now - begin) / MANIFEST_SHARE, MAX_MANIFEST_SECONDS)
            earliest, due = now + MANIFEST_SECONDS, now + pause

    def _take_prefix(self) -> None:
        """By `metadata.json`, whatever the number of processes, and this process's manifest."""
        if self._joint_files is not None:
            manifest = self.writer.bucket_manifest((), self._joint_files)[0]
            self._put(manifest, len(manifest), "metadata.json", always=True)
        self._send_manifest(always=True)

    def _send_manifest(self, always: bool = False) -> None:
        """The answers first, so that none is missing that the manifest speaks of."""
        manifest, journal_bytes = self.writer.bucket_manifest(self.receipts)
        if self._shards:
            for path in self.writer.other_journals() if always else ():  # which do not change
                self._put(path, path.stat().st_size)
            if self.receipts:
                self._put(self.writer.journal_path, journal_bytes)
        self._put(manifest, len(manifest), self._claim, always)

    def _put(self, source: Path | bytes, size: int, name: str = "", always: bool = False) -> None:
        """Sends what changes in the course of a run, unless the bucket holds just that."""
        name = name or source.name
        with opened(source) as file:
            crc32c = checksum(file, size)
        there = self._there.get(name)
        if there and there.holds(size, crc32c) and not always:
            return
        self._there[name] = self.bucket.put(
            source,
            name,
            size,
            crc32c,
            replaces=there.generation if there else 0,
            exclusive=bool(MANIFEST.fullmatch(name)),
            stopping=self._stopping,
            trouble=self._tell,
        )
        with self._changed:
            self._count(size)

    def _delete(self, receipts: dict[str, Receipt]) -> None:
        for name, receipt in receipts.items():
            path = self.writer.folder / name
            if not path.exists():
                continue
            try:
                self.bucket.check_holds(name, receipt.size, receipt.crc32c)
                path.unlink(missing_ok=True)
            except (UserError, OSError) as error:
                log.warning("%s is kept: %s", path, error)

    def _count(self, size: int) -> None:
        self.num_bytes += size
        self._healthy = time.monotonic()

    def _tell(self, trouble: str) -> None:
        """Remembers why an upload failed; says so when that goes on, once a minute."""
        now = time.monotonic()
        with self._changed:
            self._trouble = trouble
            if now < max(self._healthy + PATIENCE_SECONDS, self._told + TELL_SECONDS):
                return
            self._told = now
        log.warning("uploads do not get through, and are tried again: %s", trouble)


def _shards(sizes: dict[str, int]) -> str:
    return f"{len(sizes)} shard{'s' * (len(sizes) != 1)} ({sum(sizes.values()) / 1e9:.3f} GB)"
