"""The (data, model) mesh that every run computes on."""

import jax
from jax.sharding import AxisType, Mesh

AXES = ("data", "model")


def single_device_mesh() -> Mesh:
    """A 1 x 1 mesh on the first device of this process."""
    return jax.make_mesh(
        (1, 1), AXES, devices=jax.local_devices()[:1], axis_types=(AxisType.Auto,) * 2
    )


def default_dtype() -> str:
    """bfloat16 where there is an accelerator, float32 on CPU."""
    return "float32" if jax.default_backend() == "cpu" else "bfloat16"
