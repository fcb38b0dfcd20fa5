"""Work that nobody waits for longer than so many seconds."""

import threading
import time
from collections.abc import Callable
from concurrent.futures import Future, wait
from typing import TypeVar

Result = TypeVar("Result")


def within(
    seconds: float,
    work: Callable[[], Result],
    late: Callable[[], BaseException],
    check: Callable[[], None] = lambda: None,
) -> Result:
    """What `work` returns or raises, in a thread that nobody waits for longer; then `late()`.

    check: called time and again; what it raises ends the wait.
    """
    outcome: Future[Result] = Future()

    def target() -> None:
        try:
            outcome.set_result(work())
        except BaseException as error:
            outcome.set_exception(error)

    threading.Thread(target=target, daemon=True).start()
    deadline = time.monotonic() + seconds
    while not outcome.done():
        if (left := deadline - time.monotonic()) <= 0:
            raise late()
        wait([outcome], min(left, 0.2))
        check()
    return outcome.result()
