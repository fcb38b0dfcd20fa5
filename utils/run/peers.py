"""The processes of one run: agreeing, noticing who is gone, stopping together.

They speak through the key-value store of JAX's coordination service, which process 0 holds, and
never through the devices: so a process whose devices wait for a dead one still hears of it, and
whoever is missing can be named.
"""

import contextlib
import hashlib
import json
import logging
import math
import socket
import threading
import time
import zlib
from collections.abc import Iterator
from dataclasses import asdict
from typing import Any

import jax

from utils.cli import Interrupted, Signals, leave_later
from utils.errors import UserError, some
from utils.model.weights import Checkpoint
from utils.plan.plan import Plan
from utils.shards.manifest import differences
from utils.store.deadline import within

log = logging.getLogger(__name__)

BEAT_SECONDS = 1.0
FAREWELL_SECONDS = 17.0  # more than a shard that is being written may take
CHUNK_BYTES = 1 << 20  # of what is gathered; a message of the store holds 4 MB at most
AGAIN = "start all processes again with --resume"


class LeftBehind(UserError):
    """The others have given this process up, and may have been started again: it must not write."""


class Peers:
    """The processes of a run, as process `index` of `count` sees them; alone, nobody is waited for.

    Each process has one key in the store, its state: `beat`, a number that grows; `host`; `end`,
    how it ended (`{"signum"}`, or `{"error", "exit_code"}`); `gone`, once it does not ask any more.
    A thread writes that of this process and reads them all, every BEAT_SECONDS. After `silence`
    seconds without a new beat a process is dead; by the same rule this process knows that it is
    dead for the others, because it was frozen or cut off.
    """

    def __init__(
        self,
        client: Any = None,
        index: int = 0,
        count: int = 1,
        silence: float = 0,
        signals: Signals | None = None,
    ):
        self.index, self.count, self._silence = index, count, silence
        self._client, self._signals = client, signals
        self._sequence = 0
        self._state: dict[str, Any] = {"beat": 0, "host": socket.gethostname(), "gone": False}
        self._states: dict[int, dict[str, Any]] = {}
        self._round = time.monotonic()  # when the last look at all that came through began
        self._heard = dict.fromkeys(range(count), self._round)  # the round of the last new beat
        self._failure: BaseException | None = None  # of the thread
        self._publishing = threading.Lock()
        if count > 1:
            threading.Thread(target=self._watch, name="peers", daemon=True).start()

    # ------------------------------------------------------------------ agreeing

    def exchange(self, name: str, value: Any) -> list[Any]:
        """What every process says, in their order; value: JSON. Waits for all."""
        return self._all(name, value, self.count)

    def gather(self, value: Any) -> list[Any]:
        """What every process says, for the first one alone; nothing for the others."""
        return [value] if self.count == 1 else self._all("gather", value, readers=1)

    @contextlib.contextmanager
    def together(self, step: str) -> Iterator[None]:
        """A step that all take: where it fails for one, it fails for all, naming the cause."""
        try:
            yield
        except BaseException as error:
            self.leaving(error)
            raise
        self.exchange(step, None)

    def _all(self, name: str, value: Any, readers: int) -> list[Any]:
        """What all say, for the first `readers` of them."""
        text = json.dumps(value)
        if self.count == 1:
            return [json.loads(text)]
        self._sequence += 1
        key = f"arc/{self._sequence}/{name}"
        packed = zlib.compress(text.encode(), 1)
        chunks = [packed[i : i + CHUNK_BYTES] for i in range(0, len(packed), CHUNK_BYTES)]
        for number, chunk in enumerate([str(len(chunks)).encode(), *chunks]):
            self._client.key_value_set_bytes(f"{key}/{self.index}/{number}", chunk)
        if self.index >= readers:
            return []
        parts = []
        for other in range(self.count):
            count = int(self._await(f"{key}/{other}/0", name, other))
            numbers = range(1, count + 1)
            found = [self._await(f"{key}/{other}/{number}", name, other) for number in numbers]
            parts.append(json.loads(zlib.decompress(b"".join(found))))
        return parts

    def _await(self, key: str, name: str, other: int) -> bytes:
        """What another process publishes; that process's end ends the wait."""
        told = time.monotonic() + 60
        while True:
            try:
                return self._client.blocking_key_value_get_bytes(key, 1000)
            except jax.errors.JaxRuntimeError as error:
                if "DEADLINE_EXCEEDED" not in str(error):
                    time.sleep(0.2)  # the store does not answer, as `check` will say
            self.check()
            if time.monotonic() > told:
                log.info("waiting for %s (%s)", self._name(other), name)
                told += 60

    # ------------------------------------------------------------------ watching

    def _watch(self) -> None:
        """Ends, for good, when the last round is longer ago than the others wait."""
        try:
            while (begin := time.monotonic()) - self._round <= self._silence:
                with contextlib.suppress(jax.errors.JaxRuntimeError):
                    self._publish(beat=self._state["beat"] + 1)
                    self._read(begin)
                    self._round = begin
                time.sleep(BEAT_SECONDS)
        except BaseException as error:
            self._failure = error

    def _publish(self, **changes: Any) -> None:
        """This process's state, changed, by one thread at a time: once another has read that this
        one is gone, the store may be gone too, and who wrote later would wait for it in vain."""
        with self._publishing:
            self._state |= changes
            if self._signals.signum is not None:
                self._state.setdefault("end", {"signum": self._signals.signum})
            key = f"process/{self.index}"
            self._client.key_value_set(key, json.dumps(self._state), allow_overwrite=True)

    def _read(self, now: float) -> None:
        for key, text in self._client.key_value_dir_get("process/"):
            other, state = int(key.rpartition("/")[2]), json.loads(text)
            if state["beat"] != self._states.get(other, {}).get("beat"):
                self._heard[other] = now
            self._states[other] = state
            signum = state.get("end", {}).get("signum")
            if signum is not None and self._signals.signum is None and other != self.index:
                log.info("%s was told to stop", self._name(other))
                self._signals.note(signum)

    def _name(self, other: int) -> str:
        host = f" on {self._states[other]['host']}" if other in self._states else ""
        return f"process {other}{host}"

    def _dead(self) -> list[int]:
        return [i for i, heard in self._heard.items() if self._round - heard > self._silence]

    def check(self) -> None:
        """Raises, in whichever thread asks, what ends this process's part: Interrupted when one was
        told to stop, UserError when another failed or is gone, LeftBehind when the others have
        given this one up."""
        if self._signals is not None:
            self._signals.check()
        if self.count == 1:
            return
        if self._failure is not None:
            words = f"looking after the other processes failed: {self._failure!r}; {AGAIN}"
            raise UserError(words, exit_code=1)
        if (seconds := time.monotonic() - self._round) > self._silence:
            raise LeftBehind(
                f"this process has not been in touch with the others for {seconds:.0f} s: it stood "
                f"still, or {self._name(0)}, which all meet at, does not answer; {AGAIN}",
                exit_code=1,
            )
        for other, state in list(self._states.items()):
            if other != self.index and "error" in (end := state.get("end", {})):
                raise UserError(f"{self._name(other)} failed: {end['error']}", end["exit_code"])
        for other in self._dead():
            raise UserError(
                f"{self._name(other)} has not been heard of for {self._silence:g} s: it or its "
                f"network died, or it stands still; make sure that it has ended, and {AGAIN}",
                exit_code=1,
            )

    def _cause(self, seconds: float) -> BaseException | None:
        """What `check` raises within so long."""
        deadline = time.monotonic() + seconds
        while True:
            try:
                self.check()
            except (UserError, Interrupted) as cause:
                return cause
            if time.monotonic() > deadline:
                return None
            time.sleep(0.2)

    def aborted(self) -> BaseException:
        """Why JAX ends this process. Does not return where it ends by itself already."""
        if self._state["gone"]:
            time.sleep(FAREWELL_SECONDS)
        return self._cause(0) or UserError(
            "JAX has ended this process, for the reason above: perhaps the coordinator, process 0, "
            f"is gone; what was written is intact, {AGAIN}",
            exit_code=1,
        )

    # ------------------------------------------------------------------ leaving

    def __enter__(self) -> "Peers":
        return self

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        """Tells the others what ended this process's part, and lets them hear it."""
        if error is not None:
            self.leaving(error)
        self.farewell()

    def leaving(self, error: BaseException) -> None:
        """Tells the others that this process ends, and why."""
        if isinstance(error, Interrupted):
            end: dict[str, Any] = {"signum": error.signum}
        else:
            end = {"error": str(error) or repr(error), "exit_code": getattr(error, "exit_code", 1)}
        if self.count > 1 and self._state.setdefault("end", end) is end:
            with contextlib.suppress(jax.errors.JaxRuntimeError):
                self._publish()

    def ending(self, error: BaseException) -> BaseException:
        """To be called once the run ends by `error`: gives the cause, which of an error of the
        devices may be the end of another process, and tells the others. From here on the process
        has GRACE_SECONDS left, whatever disk or server it waits for; after a signal, since that
        signal."""
        cause, of_devices = error, isinstance(error, jax.errors.JaxRuntimeError)
        if self.count > 1 and of_devices and "RESOURCE_EXHAUSTED" not in str(error):
            cause = self._cause(self._silence + 3 * BEAT_SECONDS) or error
        if not isinstance(cause, Interrupted):
            leave_later(cause)
        self.leaving(cause)
        return cause

    def farewell(self) -> None:
        """Before the process ends: the first, where the others meet, stays until all are gone."""
        if self.count == 1:
            return
        deadline = time.monotonic() + FAREWELL_SECONDS
        with contextlib.suppress(jax.errors.JaxRuntimeError):
            self._publish(gone=True)
            while self.index == 0 and time.monotonic() < deadline:
                self._read(time.monotonic())
                gone = {other for other, state in self._states.items() if state["gone"]}
                if len(gone.union(self._dead())) == self.count:
                    return
                time.sleep(0.1)


def agree(plan: Plan, peers: Peers) -> None:
    """Raises UserError where the processes of a run were not asked for the same, or do not read
    the same. The paths of model, prompt, tasks and results may differ."""
    request, settings = plan.request, plan.settings("")
    own = {"process_id", "coordinator_address", "coordinator_timeout", "peer_timeout", "verbose"}
    said = {
        "arguments": {
            f"--{name}": value
            for name, value in request.arguments.items()
            if name not in own and not name.endswith(("_path", "_dir", "adapter", "prompt_format"))
        },
        "tasks": settings["dataset"]["hash"],
        "prompt": settings["prompt"],
        "interventions": {str(i): one.entry for i, one in enumerate(plan.interventions)},
        "tokens": sum(sample.length.total for sample in plan.samples),
        "config": asdict(plan.config),
        "adapter": settings["model"]["adapter"],
        "batches": hashlib.sha256(repr(plan.batches).encode()).hexdigest(),
    }
    everyone = peers.exchange("request", said)
    for index, theirs in enumerate(everyone):
        if changes := differences(everyone[0], theirs):
            changes = [change.removeprefix("arguments.") for change in changes]
            raise UserError(
                f"process {index} was started differently than process 0, whose values come first: "
                f"{some(changes)}; start all with the same flags and files"
            )


def weights_hash(checkpoint: Checkpoint, peers: Peers) -> str:
    """The fingerprint of a checkpoint, of which each process reads all.

    Raises UserError naming a process whose files differ.
    """
    own = within(math.inf, checkpoint.fingerprint, TimeoutError, peers.check)
    hashes = peers.exchange("weights", own)
    for index, other in enumerate(hashes):
        if other != hashes[0]:
            raise UserError(
                f"process {index} has other weights in {checkpoint.folder} than process 0: copy "
                "the model there again"
            )
    return hashes[0]
