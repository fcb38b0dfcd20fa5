"""Work that nobody waits for longer than so many seconds."""

import threading
import time
from collections.abc import Callable
from typing import Any, TypeVar

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
    outcome: list[Any] = []

    def target() -> None:
        try:
            outcome[:] = [work(), None]
        except BaseException as error:
            outcome[:] = [None, error]

    thread = threading.Thread(target=target, daemon=True)
    thread.start()
    deadline = time.monotonic() + seconds
    while thread.is_alive() and (left := deadline - time.monotonic()) > 0:
        thread.join(min(left, 0.2))
        check()
    if not outcome:
        raise late()
    result, error = outcome
    if error is not None:
        raise error
    return result
