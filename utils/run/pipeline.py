"""Launch, fetch and store batches in a thread each, so that devices, copies and disk overlap.

Two batches are on the devices at most: one computes while the last is copied. What waits to be
stored is bounded in bytes; when that bound is met, the devices wait for the disk, and `disk_wait`
says how long.
"""

import queue
import threading
import time
from collections.abc import Callable, Sequence
from typing import Generic, TypeVar

Job, OnDevice, Stored = TypeVar("Job"), TypeVar("OnDevice"), TypeVar("Stored")
MAX_WAITING_BYTES = 2 * 2**30
MAX_ON_DEVICES = 2
_END = object()


class Pipeline(Generic[Job, OnDevice, Stored]):
    """launch: job -> what is on the device, returning early. fetch: that -> results on the host.
    store: results of a job. nbytes: of a result that waits. Each is called by one thread alone, in
    the order of the jobs.

    disk_wait: seconds that fetching has waited for the disk.
    """

    def __init__(
        self,
        jobs: Sequence[Job],
        launch: Callable[[Job], OnDevice],
        fetch: Callable[[OnDevice], list[Stored]],
        store: Callable[[list[Stored]], None],
        nbytes: Callable[[Stored], int],
        max_waiting_bytes: int = MAX_WAITING_BYTES,
    ):
        self.disk_wait = 0.0
        self._nbytes, self._max_bytes = nbytes, max_waiting_bytes
        self._failure: BaseException | None = None
        self._stopping = False
        self._changed = threading.Condition()  # of the counts below
        self._on_devices = 0
        self._waiting_bytes = 0
        self._running = 3
        self._launched: queue.Queue = queue.Queue()
        self._fetched: queue.Queue = queue.Queue()
        self._threads = [
            threading.Thread(target=self._guard, args=(stage, *args), name=name, daemon=True)
            for name, stage, args in (
                ("launch", self._launch, (jobs, launch)),
                ("fetch", self._fetch, (fetch,)),
                ("store", self._store, (store,)),
            )
        ]

    def start(self) -> None:
        for thread in self._threads:
            thread.start()

    def wait(self, seconds: float) -> bool:
        """Whether all is stored, after at most so long. Raises what a thread failed with."""
        with self._changed:
            self._changed.wait_for(lambda: self._failure or not self._running, seconds)
            if self._failure:
                raise self._failure
            return not self._running

    def stop(self, seconds: float) -> bool:
        """Ends storing after the result at hand; whether that was within so long. What the devices
        compute is dropped."""
        with self._changed:
            self._stopping = True
            self._changed.notify_all()
        store = self._threads[-1]
        if store.is_alive():
            store.join(seconds)
        return not store.is_alive()

    def _guard(self, stage: Callable[..., None], *args: object) -> None:
        try:
            stage(*args)
        except BaseException as error:
            with self._changed:
                self._failure = self._failure or error
        finally:
            with self._changed:
                self._running -= 1
                self._changed.notify_all()

    def _take(self, source: queue.Queue) -> object:
        while not self._ending():
            try:
                return source.get(timeout=0.1)
            except queue.Empty:
                continue
        return _END

    def _ending(self) -> bool:
        return self._stopping or self._failure is not None

    def _launch(self, jobs: Sequence[Job], launch: Callable[[Job], OnDevice]) -> None:
        for job in jobs:
            with self._changed:
                self._changed.wait_for(lambda: self._ending() or self._on_devices < MAX_ON_DEVICES)
                self._on_devices += 1
            if self._ending():
                return
            self._launched.put(launch(job))
        self._launched.put(_END)

    def _fetch(self, fetch: Callable[[OnDevice], list[Stored]]) -> None:
        while (launched := self._take(self._launched)) is not _END:
            results = fetch(launched)
            del launched  # its buffers make room for the next batch
            size = sum(map(self._nbytes, results))
            start = time.perf_counter()
            with self._changed:
                self._changed.wait_for(lambda size=size: self._ending() or self._has_room(size))
                self._on_devices -= 1
                self._waiting_bytes += size
                self._changed.notify_all()
            self.disk_wait += time.perf_counter() - start
            self._fetched.put((results, size))
        self._fetched.put(_END)

    def _has_room(self, size: int) -> bool:
        return not self._waiting_bytes or self._waiting_bytes + size <= self._max_bytes

    def _store(self, store: Callable[[list[Stored]], None]) -> None:
        while (entry := self._take(self._fetched)) is not _END:
            results, size = entry
            store(results)
            with self._changed:
                self._waiting_bytes -= size
                self._changed.notify_all()
