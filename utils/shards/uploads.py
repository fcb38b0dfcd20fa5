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
from collections.abc import Callable, Collection, Mapping
from dataclasses import asdict
from pathlib import Path

from tqdm import tqdm

from utils.cli import command_to_resume
from utils.errors import UserError, some
from utils.shards.manifest import JOURNAL, MANIFEST, Shard, whole_size
from utils.shards.writer import RunFolder
from utils.store.bucket import BucketFolder, Damaged, Receipt, Stopped, opened
from utils.store.deadline import within
from utils.store.local import checksum

THREADS = 4  # each holds a chunk of 8 MiB, twice for a file that goes in one request
MANIFEST_SECONDS = 1.0  # between two writes of one object, which a bucket asks for
MANIFEST_SHARE = 0.05  # of the time, at most, goes into sending manifests that grow,
MAX_MANIFEST_SECONDS = 60.0  # unless that would take longer pauses than this
CLAIM_SECONDS = 120
LAST_SECONDS = 5  # for the last files, at least, also where the shards took all of the time
PATIENCE_SECONDS = 10  # before trouble is spoken of, and then once in
TELL_SECONDS = 60

log = logging.getLogger(__name__)
Check = Callable[[], None]  # called time and again; what it raises ends a wait


class Uploads:
    """Of a run that goes to no bucket: nothing to do, ever. What each verb is for:"""

    waited = 0.0
    receipts: Mapping[str, dict] = {}

    def holds(self, *paths: Path) -> bool:
        """Whether the bucket has the shards, and these files as they are now."""
        return True

    def start(self) -> None:
        """Takes the prefix for this run's own, and begins to send."""

    def wait_for_room(self, check: Check) -> None:
        """Takes what was sealed, and waits while too many shards wait for the network."""

    def check(self) -> None:
        """Raises UserError when an upload failed for good; so do all that wait."""

    def drain(self, check: Check) -> None:
        """Returns when the bucket holds every shard, and raises UserError when it does not."""

    def send(self, check: Check, *paths: Path) -> None:
        """Sends what a run ends with, in this order."""

    def stop(self, seconds: float) -> None:
        """Sends what it can within so long, says what is left, and ends."""


class BucketUploads(Uploads):
    """Sends to `bucket` the shards that `folder` speaks for, and those that it seals.

    sent_before: receipts of those that the bucket holds. there: of all its objects.
    max_pending_bytes: of shards that may wait. timeout: seconds for what is left at the end, and
    seconds that a full backlog may stand still. listed: shards that the bucket's manifests list,
    for the `metadata.json` by which the first of several processes takes the prefix. shards:
    whether they are sent, or only what the run ends with.

    waited: seconds that computing waited. receipts: of the shards, as the manifest has them.
    """

    def __init__(
        self,
        bucket: BucketFolder,
        folder: RunFolder,
        sent_before: Mapping[str, Receipt],
        there: Mapping[str, Receipt],
        *,
        max_pending_bytes: float,
        timeout: float,
        delete_after_upload: bool = False,
        listed: Collection[Shard] = (),
        shards: bool = True,
    ):
        self.bucket, self.folder = bucket, folder
        self.waited = 0.0
        self.receipts = {name: asdict(receipt) for name, receipt in sent_before.items()}
        self._there = dict(there)
        self._max_pending, self._timeout = max_pending_bytes, timeout
        self._deletes, self._shards, self._joint = delete_after_upload, shards, list(listed)
        self._queue: queue.SimpleQueue[Shard | None] = queue.SimpleQueue()
        self._changed = threading.Condition()  # of the next three
        self._left: dict[str, int] = {}  # bytes of each shard that is in no manifest of the bucket
        self._sent: dict[str, dict] = {}  # receipts of those of them that have arrived there
        self._failure: BaseException | None = None
        self._damaged: list[str] = []
        self._trouble, self._told, self._healthy = "", float("-inf"), time.monotonic()
        self._told_waiting = float("-inf")
        self._deadline = 0.0  # of what is sent after the last sample
        self._given_up = False  # the time for what is left is over
        self._stopping, self._hurry = threading.Event(), threading.Event()
        self._put_at: dict[str, float] = {}  # when an object was last written
        self._threads = {"stopping": self._stopping, "trouble": self._tell}

    # ------------------------------------------------------------------------- the run's side

    def start(self) -> None:
        if self.receipts:
            self.folder.record(self.receipts)
        within(
            CLAIM_SECONDS,
            self._take_prefix,
            lambda: UserError(f"{self.bucket} took no manifest within {CLAIM_SECONDS} s: "
                              f"{self._trouble}; check the network, then --resume", exit_code=1),
        )  # fmt: skip
        if self._shards:
            for name in sorted(self.folder.speaks_for - self.receipts.keys()):
                self._submit(self.folder.shards[name])
        if self._deletes:
            self._sent = {n: r for n, r in self.receipts.items() if self._is_on_disk(n)}
            self._left |= {name: receipt["size"] for name, receipt in self._sent.items()}
        for name, work in [("manifests", self._keep_manifest)] + [("upload", self._send)] * THREADS:
            threading.Thread(target=self._guard, args=(work,), name=name, daemon=True).start()

    def holds(self, *paths: Path) -> bool:
        for path in paths:
            there = self._there.get(path.name)
            if not (there and path.exists() and there.holds(*_measured(path))):
                return False
        if self._deletes and any(map(self._is_on_disk, self.receipts)):
            return False
        return not self._shards or self.folder.speaks_for <= self.receipts.keys()

    def _is_on_disk(self, name: str) -> bool:
        return (self.folder.path / name).exists()

    def _submit(self, shard: Shard) -> None:
        with self._changed:
            self._left[shard.filename] = shard.size_bytes
        self._queue.put(shard)

    def _take_sealed(self) -> None:
        while self._shards and self.folder.sealed:
            self._submit(self.folder.sealed.popleft())

    def wait_for_room(self, check: Check) -> None:
        self._take_sealed()
        self.check()
        if self._pending() <= self._max_pending:
            return
        begin = still = time.monotonic()
        if begin > self._told_waiting + TELL_SECONDS:
            self._told_waiting = begin
            log.info(
                "computing waits for the network: %.2f GB of shards wait to be uploaded",
                self._pending() / 1e9,
            )
        if self._deletes:  # a shard that has arrived takes room until a manifest lists it
            self._hurry.set()
        read = self.bucket.bytes_read  # which grows also as a shard that takes long is sent
        while not self._settled_within(0.5, lambda: self._pending() <= self._max_pending):
            check()
            if read != self.bucket.bytes_read:
                read, still = self.bucket.bytes_read, time.monotonic()
            if time.monotonic() - still > self._timeout:
                self._given_up = True
                raise UserError(
                    f"nothing could be uploaded to {self.bucket} for {self._timeout:g} s, while"
                    f" {self._pending() / 1e9:.2f} GB wait ({self._trouble or 'no answer'}); they "
                    f"are intact in {self.folder.path}. To go on: {command_to_resume()}",
                    exit_code=1,
                )
        self._hurry.clear()
        self.waited += time.monotonic() - begin
        self.check()

    def _pending(self) -> int:
        """Bytes that fill the disk until they are sent, or until they are deleted."""
        with self._changed:
            gone = () if self._deletes else self._sent
            return sum(size for name, size in self._left.items() if name not in gone)

    def _settled_within(self, seconds: float, condition: Callable[[], bool]) -> bool:
        """Whether that holds, or an upload failed for good, after at most so long."""
        with self._changed:
            return self._changed.wait_for(lambda: condition() or self._failure is not None, seconds)

    def check(self) -> None:
        if self._failure is not None:
            raise self._failure

    def drain(self, check: Check) -> None:
        self._take_sealed()
        deadline = self._deadline = time.monotonic() + self._timeout
        self._hurry.set()
        if total := self._bytes_left():
            with tqdm(total=total, unit="B", unit_scale=True, desc="uploading") as bar:
                while not self._all_arrive_within(0.2) and time.monotonic() < deadline:
                    check()
                    bar.update(total - self._bytes_left() - bar.n)
                bar.update(total - self._bytes_left() - bar.n)
        self._given_up = True
        self.check()
        problems = [f"{words} (--resume computes its samples again)" for words in self._damaged]
        way_on = ""
        if self._left:
            problems.append(
                f"{self._amount_left()} could not be uploaded to {self.bucket} within "
                f"{self._timeout:g} s ({self._trouble or 'too slow'}): {some(sorted(self._left))}; "
                f"what is left is intact in {self.folder.path}, where metadata.json says "
                '"uploaded": false'
            )
            way_on = f". To send the rest: {command_to_resume()}"
        if problems:
            raise UserError("; ".join(problems) + way_on, exit_code=1)

    def send(self, check: Check, *paths: Path) -> None:
        def late() -> UserError:
            return UserError(
                f"{some([path.name for path in paths])} could not be uploaded to {self.bucket} "
                f"within {self._timeout:g} s ({self._trouble or 'no answer'}). To send the rest: "
                f"{command_to_resume()}",
                exit_code=1,
            )

        seconds = max(LAST_SECONDS, self._deadline - time.monotonic())
        within(seconds, lambda: list(map(self._put, paths)), late, check)

    def stop(self, seconds: float) -> None:
        self._take_sealed()
        self._hurry.set()
        if self._left and not self._given_up:
            log.info("sending %s for up to %d s", self._amount_left(), seconds)
            self._all_arrive_within(seconds)
        self._stopping.set()
        with self._changed:
            self._changed.notify_all()
        for _ in range(THREADS):
            self._queue.put(None)
        if self._left:
            log.info(
                "on this disk, and not yet in %s: %s; --resume sends the rest",
                *(self.bucket, self._amount_left()),
            )

    def _all_arrive_within(self, seconds: float) -> bool:
        return self._settled_within(seconds, lambda: not self._left)

    def _bytes_left(self) -> int:
        with self._changed:
            return sum(self._left.values())

    def _amount_left(self) -> str:
        count = len(self._left)
        return f"{count} shard{'s' * (count != 1)} ({self._bytes_left() / 1e9:.3f} GB)"

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
        while shard := self._queue.get():
            path, size = self.folder.path / shard.filename, shard.size_bytes
            try:
                receipt = self.bucket.put(path, path.name, size, shard.crc32c, **self._threads)
            except Damaged as error:
                log.error("%s", error)
                with self._changed:
                    self._damaged.append(str(error))
                    del self._left[path.name]
                    self._changed.notify_all()
                continue
            with self._changed:
                self._sent[path.name] = asdict(receipt)
                self._healthy = time.monotonic()
                self._changed.notify_all()

    def _keep_manifest(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._sent or self._stopping.is_set())
                sent = dict(self._sent)
            if not sent:
                return
            begin = time.monotonic()
            self.folder.record(sent)
            self.receipts |= sent
            self._send_manifest()
            if self._deletes:
                self._delete(sent)
            took = time.monotonic() - begin
            with self._changed:
                for name in sent:
                    del self._left[name], self._sent[name]
                self._changed.notify_all()
            pause = min(took / MANIFEST_SHARE, MAX_MANIFEST_SECONDS)
            self._hurry.wait(max(pause, MANIFEST_SECONDS))

    def _take_prefix(self) -> None:
        """By `metadata.json`, whatever the number of processes, and this process's manifest."""
        writer = self.folder.writer
        if writer.owner and writer.index == 0:
            self._put(self.folder.manifest_of((), self._joint), "metadata.json", always=True)
        if self._shards:
            for path in self.folder.absent_journals:
                self._put(path)
        if self._shards or not writer.owner:
            self._send_manifest(always=True)

    def _send_manifest(self, always: bool = False) -> None:
        """The answers first, so that none is missing that the manifest speaks of."""
        manifest = self.folder.manifest_of(self.receipts)
        if self.receipts:
            self._put(self.folder.journal_path, size=self.folder.journal_bytes)
        self._put(manifest, self.folder.manifest_path.name, always=always)

    def _put(
        self, source: Path | bytes, name: str = "", size: int | None = None, always: bool = False
    ) -> None:
        """Sends what changes in the course of a run, unless the bucket holds just that."""
        name = name or source.name
        size, crc32c = _measured(source, size)
        there = self._there.get(name)
        if there and there.holds(size, crc32c) and not always:
            return
        if there and JOURNAL.fullmatch(name) and size < there.size:
            raise UserError(
                f"{source} holds fewer answers than {self.bucket.uri_of(name)}: put the file back, "
                "or take the one of the bucket",
                exit_code=1,
            )
        since = time.monotonic() - self._put_at.get(name, float("-inf"))
        self._stopping.wait(max(0, MANIFEST_SECONDS - since))
        self._there[name] = self.bucket.put(
            source,
            name,
            size,
            crc32c,
            replaces=there.generation if there else 0,
            exclusive=bool(MANIFEST.fullmatch(name)),
            **self._threads,
        )
        self._healthy = self._put_at[name] = time.monotonic()

    def _delete(self, receipts: Mapping[str, dict]) -> None:
        for name, receipt in receipts.items():
            path = self.folder.path / name
            if not path.exists():
                continue
            try:
                self.bucket.check_holds(name, receipt["size"], receipt["crc32c"])
                path.unlink(missing_ok=True)
            except (UserError, OSError) as error:
                log.warning("%s is kept: %s", path, error)

    def _tell(self, trouble: str) -> None:
        """Remembers why an upload failed; says so when that goes on, once a minute."""
        now = time.monotonic()
        with self._changed:
            self._trouble = trouble
            if now < max(self._healthy + PATIENCE_SECONDS, self._told + TELL_SECONDS):
                return
            self._told = now
        log.warning("uploads do not get through, and are tried again: %s", trouble)


def _measured(source: Path | bytes, size: int | None = None) -> tuple[int, str]:
    """Bytes, of a journal those of whole lines, and their crc32c."""
    if size is None:
        size = len(source) if isinstance(source, bytes) else whole_size(source)
    with opened(source) as file:
        return size, checksum(file, size)
