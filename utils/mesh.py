"""The (data, model) mesh that every run computes on."""

import contextlib
import os
from collections.abc import Sequence
from pathlib import Path

import jax
from jax.sharding import AxisType, Mesh

AXES = ("data", "model")


def make_mesh(data: int, model: int, devices: Sequence[jax.Device] | None = None) -> Mesh:
    """The devices (default: all of every process), ordered by their physical topology."""
    return jax.make_mesh((data, model), AXES, devices=devices, axis_types=(AxisType.Auto,) * 2)


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


def default_dtype() -> str:
    """bfloat16 where there is an accelerator, float32 on CPU."""
    return "float32" if jax.default_backend() == "cpu" else "bfloat16"
