"""Words for what JAX says with an abort.

A process of several is ended by JAX itself, with a stack trace and SIGABRT, when it cannot reach
the coordinator, or loses it. Nothing in that process can stop it; so one that waits outside says in
a line what happened. Imports no JAX: it forks before that has threads.
"""

import contextlib
import ctypes
import os
import signal
import sys

from utils.errors import UserError

ALONE, CONNECTED = b"a", b"c"
_ABORTED = (
    "JAX has ended this process, for the reason above; what was written is intact, --resume goes on"
)
_LOST = (
    "JAX has ended this process: the coordinator, process 0, is gone; what was written is intact, "
    "start all processes again with --resume"
)
# Where several processes may be that JAX finds by itself: TPU pods, GKE, Slurm, Open MPI.
_SURROUNDINGS = (
    "JAX_COORDINATOR_ADDRESS",
    "MEGASCALE_COORDINATOR_ADDRESS",
    "OMPI_MCA_orte_hnp_uri",
    "SLURM_JOB_ID",
    "TPU_WORKER_HOSTNAMES",
    "TPU_WORKER_ID",
)
_TPU_DEVICES = ("/dev/accel0", "/dev/vfio/0")
_PR_SET_PDEATHSIG = 1
_told: int | None = None  # where the child says how far it came


def check_flags(
    coordinator_address: str | None, num_processes: int | None, process_id: int | None
) -> None:
    """Raises UserError for flags that do not make a process of several."""
    by_hand = (coordinator_address, num_processes, process_id)
    if all(value is None for value in by_hand):
        return
    if None in by_hand:
        raise UserError(
            "--coordinator_address, --num_processes and --process_id belong together: give all "
            "three, or none where the surroundings tell (TPU pod, Slurm, GKE)"
        )
    host, _, port = coordinator_address.rpartition(":")
    if not host or not (port.isascii() and port.isdigit()) or not 0 < int(port) < 65536:
        raise UserError(
            f"--coordinator_address {coordinator_address} is not HOST:PORT: give the address of "
            "process 0 and a free port there"
        )
    if process_id >= num_processes:
        raise UserError(
            f"--process_id {process_id} does not exist: of --num_processes {num_processes} the ids "
            f"are 0..{num_processes - 1}"
        )


def unreachable(coordinator_address: str | None, process_id: int | None, timeout: int) -> str:
    where = coordinator_address or "that the surroundings name"
    if process_id == 0:
        return (
            f"not all processes came to {where} within {timeout} s, or the port is taken: start "
            "all with the same --coordinator_address, and each with its own --process_id"
        )
    return (
        f"the coordinator {where} does not answer within {timeout} s, or other processes do not "
        "come: does process 0 run, is its address right and the port open?"
    )


def several_possible(*flags: object) -> bool:
    """Whether the flags or the surroundings speak of several processes."""
    return (
        any(flag is not None for flag in flags)
        or any(name in os.environ for name in _SURROUNDINGS)
        or any(map(os.path.exists, _TPU_DEVICES))
    )


def fork(unreachable: str) -> None:
    """Returns in a child; the parent waits for it, hands on signals, and leaves as it left, with
    one more line where it was aborted: `unreachable` until `tell_parent`, exit code 2, and after
    that what was lost, exit code 1. When the parent is killed, so is the child."""
    global _told
    reader, writer = os.pipe()
    parent, child = os.getpid(), os.fork()
    if child == 0:
        os.close(reader)
        _told = writer
        os.setpgid(0, 0)  # a terminal's Ctrl-C comes once, from the parent
        with contextlib.suppress(OSError, AttributeError):  # where there is no Linux
            ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
        if os.getppid() != parent:
            os._exit(1)
        return
    os.close(writer)
    os.set_blocking(reader, False)
    state = b""

    def heard() -> bytes:
        nonlocal state
        with contextlib.suppress(BlockingIOError):
            state = os.read(reader, 1) or state
        return state

    def hand_on(signum: int, frame: object) -> None:
        if heard():
            with contextlib.suppress(ProcessLookupError):
                os.kill(child, signum)
            return
        # It waits for the others inside of JAX, and has written nothing.
        os.kill(child, signal.SIGKILL)
        name = signal.Signals(signum).name
        print(f"stopped by {name}; nothing was written", file=sys.stderr, flush=True)
        os._exit(128 + signum)

    for signum in (signal.SIGINT, signal.SIGTERM):
        signal.signal(signum, hand_on)
    _, status = os.waitpid(child, 0)
    code = os.waitstatus_to_exitcode(status)
    if code >= 0:
        os._exit(code)
    words = {b"": unreachable, ALONE: _ABORTED, CONNECTED: _LOST}[heard()]
    if code != -signal.SIGABRT:
        name = signal.Signals(-code).name
        words = f"this process was ended by {name}; what was written is intact, --resume goes on"
        if code == -signal.SIGKILL:
            words += " (the system kills what takes too much memory)"
    print(f"error: {words}", file=sys.stderr, flush=True)
    if code == -signal.SIGABRT:
        os._exit(1 if state else 2)
    os._exit(128 - code)


def tell_parent(state: bytes) -> None:
    """CONNECTED: all processes are together, an abort means that one was lost. ALONE: there is
    this one."""
    if _told is not None:
        os.write(_told, state)
