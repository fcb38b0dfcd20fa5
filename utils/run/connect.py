"""How the processes of a run come together, and what is said when JAX ends one of them.

The private names of JAX that processes need stand here: the store of the coordination service and
the list of clusters, neither of which has a public name yet.
"""

import ctypes
import glob
import os
import re
import signal
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import jax
from jax._src import distributed
from jax._src.clusters import ClusterEnv

from utils.cli import Signals, last_words, leave
from utils.errors import UserError
from utils.run.peers import Peers
from utils.store.deadline import within


def check_flags(address: str | None, count: int | None, index: int | None) -> None:
    """Raises UserError for flags that do not make a process of several."""
    by_hand = (address, count, index)
    if all(value is None for value in by_hand):
        return
    if address is None or count is None or index is None:
        raise UserError(
            "--coordinator_address, --num_processes and --process_id belong together: give all "
            "three, or none where the surroundings tell (TPU pod, Slurm, GKE)"
        )
    host, _, port = address.rpartition(":")
    if not host or not (port.isascii() and port.isdigit()) or not 0 < int(port) < 65536:
        raise UserError(
            f"--coordinator_address {address} is not HOST:PORT: give the address of process 0 and "
            "a free port there"
        )
    if index >= count:
        raise UserError(
            f"--process_id {index} does not exist: of --num_processes {count} the ids are "
            f"0..{count - 1}"
        )


def connect(
    address: str | None,
    count: int | None,
    index: int | None,
    *,
    timeout: int,
    silence: int,
    signals: Signals,
) -> Peers:
    """Joins the run's processes; alone where neither a flag nor the surroundings (a TPU pod, Slurm,
    GKE) say that there are several. Before anything touches a device.

    timeout, silence: seconds to wait for all to come, and after which one that is not heard of
    counts as dead. A signal ends the process at once until all have come, and is held from there
    on. Raises UserError.
    """
    check_flags(address, count, index)
    if count == 1 or (address is None and not _surrounded()):
        return Peers(signals=signals)
    lost = UserError(
        f"the coordinator {address or 'that the surroundings name'} does not answer within "
        f"{timeout} s, or other processes do not come: does process 0 run, is its address right "
        f"and the port open?{_slurm_said() if address is None else ''}"
    )
    if index == 0:
        lost = UserError(
            f"not all processes came to {address} within {timeout} s, or the port is taken: start "
            "all with the same --coordinator_address, and each with its own --process_id"
        )
    peers: Peers | None = None
    _before_abort(lambda: lost if peers is None else peers.aborted())
    # A process that dies is ours to notice; by default JAX would end the others.
    jax.config.update("jax_enable_recoverability", True)
    jax.config.update("jax_enable_preemption_service", False)
    start = partial(
        jax.distributed.initialize,
        initialization_timeout=timeout + 60,  # `timeout` is ours to keep: JAX would abort
        heartbeat_timeout_seconds=silence,
        local_device_ids=local_devices(os.environ),
    )
    try:
        within(timeout, lambda: start(address, count, index), lambda: lost)
    except (RuntimeError, ValueError, TypeError) as error:
        raise UserError(f"{lost} ({error!s:.200})") from error
    state = distributed.global_state
    if state.num_processes > 1:
        signals.hold()
    peers = Peers(state.client, state.process_id, state.num_processes, silence, signals)
    return peers


def _surrounded() -> bool:
    """Whether JAX recognises a cluster of several processes around this one."""
    return any(
        not kind.opt_in_only_method and kind.is_env_present() for kind in ClusterEnv._cluster_types
    )


def _slurm_said() -> str:
    """What Slurm says of the number of processes, and the way to run without the others."""
    if (count := os.environ.get("SLURM_NTASKS")) is None:
        return ""
    return (
        f" Slurm says that there are {count}: start all of them with one `srun python ...`, or run "
        "this one alone with `env -u SLURM_STEP_NODELIST python ...`"
    )


def local_devices(environ: Mapping[str, str], files: str = "/dev/nvidia[0-9]*") -> list[int] | None:
    """Which of the GPUs that this process sees are its own: their numbers, none for all of them.
    files: those of the machine's GPUs, a pattern.

    By JAX's own rule, for which None stands, a process of Slurm's or Open MPI's has the GPU of its
    number on the host, however many GPUs there are for each. Here the processes of a host share
    what is there equally, and one that was given GPUs of its own has all that it sees.
    """
    if "JAX_LOCAL_DEVICE_IDS" in environ:
        return None
    if "OMPI_COMM_WORLD_LOCAL_SIZE" in environ:
        count = int(environ["OMPI_COMM_WORLD_LOCAL_SIZE"])
        number = int(environ["OMPI_COMM_WORLD_LOCAL_RANK"])
    elif "SLURM_STEP_TASKS_PER_NODE" in environ:  # `2(x3),1` for 2, 2, 2 and 1
        groups = re.findall(r"(\d+)(?:\(x(\d+)\))?", environ["SLURM_STEP_TASKS_PER_NODE"])
        tasks = [int(size) for size, times in groups for _ in range(int(times or 1))]
        count = tasks[int(environ.get("SLURM_NODEID", 0))]
        number = int(environ["SLURM_LOCALID"])
    else:
        return None
    seen = environ.get("CUDA_VISIBLE_DEVICES")
    if count == 1:
        return []
    given = int(environ.get("SLURM_GPUS_ON_NODE", 0))
    visible = len(seen.split(",")) if seen is not None else given or len(glob.glob(files))
    if seen is None and visible < count:
        return None
    if visible < given:
        return []
    return [number * (visible // count) + i for i in range(visible // count)]


def _before_abort(cause: Callable[[], BaseException]) -> None:
    """Puts an abort into a line, and an exit code of ours.

    JAX ends a process that loses the coordinator from a thread of its own, with a stack trace and
    SIGABRT, and nothing in Python can catch that. The handler is called in that thread, where it
    may wait and print, since abort() was called on purpose and in no lock.
    """
    global _abort_handler
    _abort_handler = ctypes.CFUNCTYPE(None, ctypes.c_int)(lambda _: leave(*last_words(cause())))
    ctypes.CDLL(None).signal(signal.SIGABRT, _abort_handler)


_abort_handler: Any = None  # which C calls; must not be collected
