"""What may end a run before its time, asked and told in one place."""

from concurrent.futures import Future, wait
from typing import TypeVar

from utils.cli import Interrupted, Signals, leave_later
from utils.run.peers import Peers

POLL_SECONDS = 0.2
Value = TypeVar("Value")


class Ending:
    """Asks for a signal, and for the end of another process of the run, on behalf of the run loop.

    `check` raises, in whichever thread asks; so what it interrupts is always a place that asked.
    """

    def __init__(self, signals: Signals, peers: Peers | None = None):
        self.peers = peers or Peers()
        self._signals = signals

    def hold(self) -> None:
        """From here on the run writes: a signal waits for the next `check`."""
        self._signals.hold()

    def check(self) -> None:
        """Raises what ends this process's part: Interrupted, when this process or another one was
        told to stop; UserError, when another failed or is gone; LeftBehind, a UserError, when the
        others have given this process up, which then must not write any more."""
        self._signals.check()
        self.peers.check()

    def wait(self, future: "Future[Value]") -> Value:
        """The result of `future`, or what `check` raises meanwhile; `future` then goes on alone."""
        while not wait([future], POLL_SECONDS).done:
            self.check()
        return future.result()

    def leaving(self, error: BaseException) -> BaseException:
        """To be called once the run ends by `error`: gives the cause, which may be the end of
        another process, and tells the others. From here on the process has GRACE_SECONDS left,
        whatever disk or server it waits for; after a signal, since that signal."""
        cause = self.peers.explain(error)
        if not isinstance(cause, Interrupted):
            leave_later(cause)
        self.peers.leaving(cause)
        return cause
