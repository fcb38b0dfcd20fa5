"""The processes of one run: starting together, agreeing, noticing who is gone, stopping together.

Speaks through the key-value store of JAX's coordination service, never through the devices, so that
a process whose devices wait for a dead one still hears of it, and so that whoever is missing can be
named. Of all modules this and `layout` alone know that there are several processes.
"""

import contextlib
import hashlib
import json
import logging
import os
import secrets
import socket
import threading
import time
import zlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import jax

from utils.cli import Interrupted
from utils.errors import UserError, some
from utils.model.weights import Checkpoint, fingerprint
from utils.plan.plan import Plan
from utils.plan.samples import tasks_hash
from utils.run.parent import ALONE, CONNECTED, tell_parent, unreachable
from utils.shards.manifest import differences
from utils.store.local import existing

log = logging.getLogger(__name__)

BEAT_SECONDS = 2.0
FAREWELL_SECONDS = 17.0  # more than a shard that is being written may take
CHUNK_BYTES = 1 << 20  # of what is gathered; a message of the store holds 4 MB at most


@dataclass(frozen=True)
class Sharing:
    """A folder: the first of the `members` that see the same one, and whether this is that one."""

    first: int
    members: int
    leader: bool


class Peers:
    """The only process of a run: nobody to wait for. `connect` gives the one of several."""

    index, count = 0, 1

    def exchange(self, name: str, value: Any) -> list[Any]:
        """What every process says, in their order; value: JSON. Waits for all."""
        return [value]

    @contextlib.contextmanager
    def together(self, step: str) -> Iterator[None]:
        """A step that all take: where it fails for one, it fails for all, naming the cause."""
        yield

    def gather(self, payload: bytes) -> list[bytes]:
        """The payloads of all for the first process; nothing for the others."""
        return [payload]

    def sharing(self, folder: Path) -> Sharing:
        return Sharing(0, 1, True)

    def check(self) -> None:
        """Raises what ends this process's part: Interrupted when another was told to stop,
        UserError when one failed or is gone."""

    def explain(self, error: BaseException) -> BaseException:
        """The cause of an error of the devices, which may be another process's end."""
        return error

    def leaving(self, error: BaseException) -> None:
        """Tells the others that this process ends, and why."""

    def farewell(self) -> None:
        """Before the process ends: the first stays until the others have heard."""


class ConnectedPeers(Peers):
    """One of several processes; see `Peers`. After `silence` seconds unheard, one is dead."""

    def __init__(self, client: Any, index: int, count: int, silence: float):
        self.index, self.count, self._silence = index, count, silence
        self._client = client
        self._sequence = 0
        self._ends: dict[int, dict[str, Any]] = {}
        self._hosts: dict[int, str] = {}
        now = time.monotonic()
        self._beats: dict[int, tuple[str, float]] = dict.fromkeys(range(count), ("", now))
        self._lost = False
        self._left = False
        threading.Thread(target=self._watch, name="peers", daemon=True).start()

    # ------------------------------------------------------------------ agreeing

    def exchange(self, name: str, value: Any) -> list[Any]:
        return [json.loads(part) for part in self._all(name, json.dumps(value).encode())]

    def gather(self, payload: bytes) -> list[bytes]:
        return self._all("gather", payload, readers=(0,))

    def _all(self, name: str, payload: bytes, readers: Sequence[int] | None = None) -> list[bytes]:
        self._sequence += 1
        key = f"arc/{self._sequence}/{name}"
        packed = zlib.compress(payload, 1)
        chunks = [packed[i : i + CHUNK_BYTES] for i in range(0, len(packed), CHUNK_BYTES)]
        for number, chunk in enumerate(chunks):
            self._client.key_value_set_bytes(f"{key}/{self.index}/{number}", chunk)
        self._client.key_value_set(f"{key}/{self.index}/count", str(len(chunks)))
        if readers is not None and self.index not in readers:
            return []
        parts = []
        for other in range(self.count):
            if other == self.index:
                parts.append(payload)
                continue
            get = self._client.blocking_key_value_get
            place = f"{key}/{other}"
            count = int(self._await(partial(get, f"{place}/count", 1000), name, other))
            get_bytes = self._client.blocking_key_value_get_bytes
            found = [
                self._await(partial(get_bytes, f"{place}/{n}", 1000), name, other)
                for n in range(count)
            ]
            parts.append(zlib.decompress(b"".join(found)))
        return parts

    def _await(self, get: Callable[[], Any], name: str, other: int) -> Any:
        """What another process publishes; that process's end ends the wait."""
        told = time.monotonic() + 60
        while True:
            try:
                return get()
            except jax.errors.JaxRuntimeError as error:
                if "DEADLINE_EXCEEDED" not in str(error):
                    self._lost = True
            self.check()
            if time.monotonic() > told:
                log.info("waiting for %s (%s)", self._name(other), name)
                told += 60

    @contextlib.contextmanager
    def together(self, step: str) -> Iterator[None]:
        try:
            yield
        except BaseException as error:
            self.leaving(error)
            raise
        self.exchange(step, None)

    def sharing(self, folder: Path) -> Sharing:
        """Folders are one where their paths are equal and a file made by one is seen by others."""
        place = existing(folder)
        probe = place / f".arc-probe-{secrets.token_hex(8)}"
        try:
            probe.touch()
            probes = self.exchange("folder", [str(folder.absolute()), str(probe)])
            same = [
                theirs[0] == str(folder.absolute()) and os.path.exists(theirs[1])
                for theirs in probes
            ]
            self.exchange("seen", None)
        finally:
            probe.unlink(missing_ok=True)
        first = same.index(True)
        return Sharing(first, same.count(True), first == self.index)

    # ------------------------------------------------------------------ watching

    def _watch(self) -> None:
        beat = 0
        while True:
            try:
                beat += 1
                self._client.key_value_set(
                    f"beat/{self.index}", f"{beat} {socket.gethostname()}", allow_overwrite=True
                )
                now = time.monotonic()
                for key, value in self._client.key_value_dir_get("beat/"):
                    other = int(key.rpartition("/")[2])
                    number, _, self._hosts[other] = value.partition(" ")
                    if self._beats[other][0] != number:
                        self._beats[other] = (number, now)
                for key, value in self._client.key_value_dir_get("end/"):
                    self._ends[int(key.rpartition("/")[2])] = json.loads(value)
                self._lost = False
            except jax.errors.JaxRuntimeError:
                self._lost = True
            time.sleep(BEAT_SECONDS)

    def _name(self, other: int) -> str:
        host = f" on {self._hosts[other]}" if other in self._hosts else ""
        return f"process {other}{host}"

    def check(self) -> None:
        for other, end in list(self._ends.items()):
            if other == self.index:
                continue
            if "signum" in end:
                log.info("%s was told to stop", self._name(other))
                raise Interrupted(end["signum"])
            raise UserError(f"{self._name(other)} failed: {end['error']}", end["exit_code"])
        now = time.monotonic()
        for other, (_, seen) in list(self._beats.items()):
            if now - seen > self._silence and other != self.index:
                raise UserError(
                    f"{self._name(other)} has not been heard of for {now - seen:.0f} s: it died, "
                    "or its network did; start all processes again with --resume",
                    exit_code=1,
                )
        if self._lost and now - self._beats[0][1] > BEAT_SECONDS * 4:
            raise UserError(
                f"{self._name(0)}, which the others meet at, does not answer: start all processes "
                "again with --resume",
                exit_code=1,
            )

    def explain(self, error: BaseException) -> BaseException:
        if not isinstance(error, jax.errors.JaxRuntimeError) or "RESOURCE_EXHAUSTED" in str(error):
            return error
        deadline = time.monotonic() + self._silence + 3 * BEAT_SECONDS
        while time.monotonic() < deadline:
            try:
                self.check()
            except (UserError, Interrupted) as cause:
                return cause
            time.sleep(0.2)
        return error

    # ------------------------------------------------------------------ leaving

    def leaving(self, error: BaseException) -> None:
        if self._left:
            return
        self._left = True
        end = {"error": str(error) or repr(error), "exit_code": getattr(error, "exit_code", 1)}
        if isinstance(error, Interrupted):
            end = {"signum": error.signum}
        with contextlib.suppress(jax.errors.JaxRuntimeError):
            self._client.key_value_set(f"end/{self.index}", json.dumps(end), allow_overwrite=True)

    def farewell(self) -> None:
        with contextlib.suppress(jax.errors.JaxRuntimeError):
            self._client.key_value_set(f"gone/{self.index}", "", allow_overwrite=True)
            deadline = time.monotonic() + FAREWELL_SECONDS
            while self.index == 0 and time.monotonic() < deadline:
                now = time.monotonic()
                beats, said = list(self._beats.items()), self._client.key_value_dir_get("gone/")
                dead = {other for other, (_, seen) in beats if now - seen > self._silence}
                gone = {int(key.rpartition("/")[2]) for key, _ in said}
                if len(gone | dead) >= self.count:
                    return
                time.sleep(0.1)


@contextlib.contextmanager
def parting(peers: Peers) -> Iterator[None]:
    """Tells the others what ended this process's part, and lets them hear it."""
    try:
        yield
    except BaseException as error:
        peers.leaving(error)
        raise
    finally:
        peers.farewell()


def connect(
    coordinator_address: str | None,
    num_processes: int | None,
    process_id: int | None,
    timeout: int,
    silence: int,
) -> Peers:
    """Joins the run's processes; alone where neither a flag nor the surroundings (a TPU pod, Slurm,
    GKE) say that there are several. Before anything touches a device.

    timeout: seconds to wait for the coordinator. silence: seconds after which a process that is not
    heard of counts as dead.
    """
    if num_processes == 1 or (coordinator_address is None and not _surrounded()):
        tell_parent(ALONE)
        return Peers()
    from jax._src import distributed  # the store has no public name yet

    # A process that dies is ours to notice; by default JAX would end the others at once.
    jax.config.update("jax_enable_recoverability", True)
    jax.config.update("jax_enable_preemption_service", False)
    try:
        jax.distributed.initialize(
            coordinator_address, num_processes, process_id, initialization_timeout=timeout
        )
    except (RuntimeError, ValueError, TypeError) as error:
        raise UserError(
            f"{unreachable(coordinator_address, process_id, timeout)} ({error!s:.200})"
        ) from error
    tell_parent(CONNECTED if jax.process_count() > 1 else ALONE)
    if jax.process_count() == 1:
        return Peers()
    client = distributed.global_state.client
    return ConnectedPeers(client, jax.process_index(), jax.process_count(), silence)


def _surrounded() -> bool:
    """Whether JAX recognises a cluster of several processes around this one."""
    from jax._src.clusters import ClusterEnv

    for kind in ClusterEnv._cluster_types:
        if not kind.opt_in_only_method and kind.is_env_present():
            return True
    return False


def agree(plan: Plan, peers: Peers) -> None:
    """Raises UserError where the processes of a run were not asked for the same, or do not read
    the same. The paths of model, tasks and results may differ."""
    request = plan.request
    own = {"process_id", "coordinator_address", "coordinator_timeout", "peer_timeout", "verbose"}
    said = {
        "arguments": {
            f"--{name}": value
            for name, value in request.arguments.items()
            if name not in own and not name.endswith(("_path", "_dir"))
        },
        "tasks": tasks_hash(plan.tasks),
        "prompt": plan.codec.fingerprint,
        "tokens": sum(sample.length.total for sample in plan.samples),
        "config": asdict(plan.config),
        "batches": hashlib.sha256(repr(plan.batches).encode()).hexdigest(),
    }
    everyone = peers.exchange("request", json.loads(json.dumps(said)))
    for index, theirs in enumerate(everyone):
        if changes := differences(everyone[0], theirs):
            changes = [change.removeprefix("arguments.") for change in changes]
            raise UserError(
                f"process {index} was started differently than process 0: {some(changes)}; start "
                "all with the same flags and files"
            )


def weights_hash(checkpoint: Checkpoint, peers: Peers) -> str:
    """The fingerprint of a checkpoint, of which each process reads its share.

    Raises UserError naming a process whose files differ.
    """
    said = peers.exchange("weights", checkpoint.digests(peers.index, peers.count))
    for index, (seen, _) in enumerate(said):
        if seen != said[0][0]:
            raise UserError(
                f"process {index} has other weights in {checkpoint.folder} than process 0: copy "
                "the model there again"
            )
    return fingerprint(share for _, share in said)
