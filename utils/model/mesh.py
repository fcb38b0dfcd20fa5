"""The (data, model) mesh that every run computes on."""

import contextlib
import os
from collections.abc import Sequence
from pathlib import Path

import jax
from jax.experimental import mesh_utils
from jax.sharding import AxisType, Mesh

from utils.errors import UserError

AXES = ("data", "model")


def make_mesh(data: int, model: int, devices: Sequence[jax.Device] | None = None) -> Mesh:
    """The devices (default: all of every process), ordered by their physical topology."""
    ordered = mesh_utils.create_device_mesh((data, model), devices, allow_split_physical_axes=True)
    return Mesh(ordered, AXES, axis_types=(AxisType.Auto,) * 2)


def single_device_mesh() -> Mesh:
    """A 1 x 1 mesh on the first device of this process."""
    return make_mesh(1, 1, jax.local_devices()[:1])


def use_compilation_cache() -> None:
    """Keeps compiled programs in JAX_COMPILATION_CACHE_DIR, else ~/.cache/arc-activations, so that
    a run that is resumed does not compile again."""
    if "JAX_COMPILATION_CACHE_DIR" not in os.environ:
        folder = Path("~/.cache/arc-activations").expanduser()
        with contextlib.suppress(OSError):
            folder.mkdir(parents=True, exist_ok=True)
        if not os.access(folder, os.W_OK):
            return
        jax.config.update("jax_compilation_cache_dir", str(folder))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.5)


def default_dtype(devices: Sequence[jax.Device]) -> str:
    """bfloat16 where there is an accelerator, float32 on CPU."""
    return "float32" if devices[0].platform == "cpu" else "bfloat16"


def shapes_of(devices: int) -> list[tuple[int, int]]:
    """Every (data, model) that takes all devices."""
    return [(devices // m, m) for m in range(1, devices + 1) if devices % m == 0]


def check_shape(data: int, model: int, devices: Sequence[jax.Device]) -> None:
    """Raises UserError unless a mesh of data x model takes exactly these devices."""
    count = len(devices)
    if data * model == count:
        return
    kind = devices[0].device_kind
    note = ""
    if kind in ("TPU v2", "TPU v3", "TPU v4", "TPU v5", "TPU v5p") and data * model == 2 * count:
        note = "; the number in this slice's name counts cores, of which a chip has two"
    fitting = ", ".join(f"{d} {m}" for d, m in shapes_of(count))
    raise UserError(
        f"--mesh_shape {data} {model} takes {data * model} devices, and JAX sees {count} ({kind})"
        f"{note}: shapes that fit are {fitting}, or auto"
    )
