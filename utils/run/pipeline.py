"""Batches on their way through the devices, while those before them are stored.

One thread launches batches and one fetches what they gave, so that devices, copies and disk
overlap; the caller stores. Two batches are on the devices at most: one computes while the last is
copied. What waits to be stored is bounded in bytes; when that bound is met, the devices wait for
the disk.
"""

import contextlib
import queue
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from typing import Generic, TypeVar

Job, OnDevice, Result = TypeVar("Job"), TypeVar("OnDevice"), TypeVar("Result")
MAX_WAITING_BYTES = 2 * 2**30
MAX_ON_DEVICES = 2
CHECK_SECONDS = 0.2


class Ahead(Generic[Job, Result]):
    """Iterating gives what `work` makes of each job, in their order; a thread makes it beforehand.

    most: the thread begins no job while the results that it made and that the caller is not done
    with are so many or more, each counted as its `size` says. check: called time and again while
    the caller waits; what it raises ends the iteration, and so does an error of the thread, which
    comes behind what was made before it. The thread ends with the iteration.

    waited: seconds that the thread has waited for the caller.
    """

    def __init__(
        self,
        jobs: Iterable[Job],
        work: Callable[[Job], Result],
        most: int,
        size: Callable[[Result], int] = lambda _: 1,
        check: Callable[[], None] = lambda: None,
    ):
        self.waited = 0.0
        self._jobs, self._work, self._most = jobs, work, most
        self._size, self._check = size, check
        self._made: queue.SimpleQueue = queue.SimpleQueue()
        self._changed = threading.Condition()  # of the next two
        self._held = 0  # by the caller and the queue
        self._ending = False

    def __iter__(self) -> Iterator[Result]:
        threading.Thread(target=self._run, daemon=True).start()
        try:
            while entry := self._next():
                result, size = entry
                yield result
                del entry, result  # what is on a device makes room there
                with self._changed:
                    self._held -= size
                    self._changed.notify()
        finally:
            with self._changed:
                self._ending = True
                self._changed.notify()

    def _next(self) -> tuple[Result, int] | None:
        """The next result and its size; None behind the last."""
        while True:
            self._check()
            with contextlib.suppress(queue.Empty):
                entry = self._made.get(timeout=CHECK_SECONDS)
                if isinstance(entry, BaseException):
                    raise entry
                return entry

    def _run(self) -> None:
        try:
            for job in self._jobs:
                start = time.perf_counter()
                with self._changed:
                    self._changed.wait_for(lambda: self._ending or self._held < self._most)
                    if self._ending:
                        return
                self.waited += time.perf_counter() - start
                result = self._work(job)
                with self._changed:
                    self._held += self._size(result)
                self._made.put((result, self._size(result)))
                del job, result
            self._made.put(None)
        except BaseException as error:
            self._made.put(error)


def pipelined(
    jobs: Iterable[Job],
    launch: Callable[[Job], OnDevice],
    fetch: Callable[[OnDevice], list[Result]],
    check: Callable[[], None],
) -> Ahead[OnDevice, list[Result]]:
    """The results of each job, in the order of the jobs; `waited` is for the caller to store them.

    launch: job -> what is on the device, returning early. fetch: that -> results on the host, each
    with its `nbytes`. Each is called by one thread alone. check: as of `Ahead`.
    """
    launched = Ahead(jobs, launch, MAX_ON_DEVICES)
    return Ahead(
        launched, fetch, MAX_WAITING_BYTES, lambda made: sum(each.nbytes for each in made), check
    )
