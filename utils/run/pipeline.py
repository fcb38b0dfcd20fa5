"""Batches on their way through the devices, while those before them are stored.

One thread launches batches and one fetches what they gave, so that devices, copies and disk
overlap; the caller stores. Two batches are on the devices at most: one computes while the last is
copied. What waits to be stored is bounded in bytes; when that bound is met, the devices wait for
the disk, and `disk_wait` says how long.
"""

import queue
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Generic, TypeVar

Job, OnDevice, Result = TypeVar("Job"), TypeVar("OnDevice"), TypeVar("Result")
MAX_WAITING_BYTES = 2 * 2**30
MAX_ON_DEVICES = 2
CHECK_SECONDS = 0.2


class Pipeline(Generic[Job, OnDevice, Result]):
    """Iterating gives the results of each job, in the order of the jobs.

    launch: job -> what is on the device, returning early. fetch: that -> results on the host, each
    with its `nbytes`. Each is called by one thread alone. check: called time and again while the
    caller waits; what it raises ends the iteration, and so does an error of a thread. What the
    devices compute is dropped then.

    disk_wait: seconds that fetching has waited for the caller.
    """

    def __init__(
        self,
        jobs: Sequence[Job],
        launch: Callable[[Job], OnDevice],
        fetch: Callable[[OnDevice], list[Result]],
        check: Callable[[], None],
        max_waiting_bytes: int = MAX_WAITING_BYTES,
    ):
        self.disk_wait = 0.0
        self._jobs, self._launch, self._fetch, self._check = jobs, launch, fetch, check
        self._max_bytes = max_waiting_bytes
        self._changed = threading.Condition()  # of the counts below
        self._ending = False
        self._on_devices = 0
        self._waiting_bytes = 0
        self._launched: queue.SimpleQueue = queue.SimpleQueue()
        self._fetched: queue.SimpleQueue = queue.SimpleQueue()

    def __iter__(self) -> Iterator[list[Result]]:
        for stage, told in ((self._launch_all, self._launched), (self._fetch_all, self._fetched)):
            threading.Thread(target=self._guard, args=(stage, told), daemon=True).start()
        try:
            for _ in self._jobs:
                results, size = self._next()
                yield results
                del results
                with self._changed:
                    self._waiting_bytes -= size
                    self._changed.notify_all()
        finally:
            with self._changed:
                self._ending = True
                self._changed.notify_all()
            self._launched.put(None)

    def _next(self) -> tuple[list[Result], int]:
        """What the next job gave, and its bytes."""
        while True:
            self._check()
            try:
                entry = self._fetched.get(timeout=CHECK_SECONDS)
            except queue.Empty:
                continue
            if isinstance(entry, BaseException):
                raise entry
            return entry

    def _guard(self, stage: Callable[[], None], told: queue.SimpleQueue) -> None:
        """An error goes the way of what the stage gives, behind what it gave before."""
        try:
            stage()
        except BaseException as error:
            told.put(error)

    def _launch_all(self) -> None:
        for job in self._jobs:
            with self._changed:
                self._changed.wait_for(lambda: self._ending or self._on_devices < MAX_ON_DEVICES)
                if self._ending:
                    return
                self._on_devices += 1
            self._launched.put(self._launch(job))

    def _fetch_all(self) -> None:
        while (launched := self._launched.get()) is not None:
            if isinstance(launched, BaseException):
                raise launched
            results = self._fetch(launched)
            del launched  # its buffers make room for the next batch
            size = sum(result.nbytes for result in results)
            start = time.perf_counter()
            with self._changed:
                self._changed.wait_for(lambda size=size: self._ending or self._has_room(size))
                if self._ending:
                    return
                self._on_devices -= 1
                self._waiting_bytes += size
                self._changed.notify_all()
            self.disk_wait += time.perf_counter() - start
            self._fetched.put((results, size))

    def _has_room(self, size: int) -> bool:
        return not self._waiting_bytes or self._waiting_bytes + size <= self._max_bytes
