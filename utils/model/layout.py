"""The (data, model) mesh of a run's devices, and where each array of a forward pass lives on it.

Batches are split over `data`. Over `model` the mlp is split by its width and the vocabulary by its
rows (Megatron-LM, Shoeybi et al. 2019), and attention in one of two ways. `heads`: by heads, where
both query and key/value heads divide the axis. `sequence`: else by tokens, so that no work is
repeated; each device holds the queries of its tokens, and only the keys and values, few heads with
grouped queries, are gathered. In both, the residual stream of a prompt is split by tokens
(Korthikanti et al. 2022).

With `sequence`, the tokens of a chunk of a prompt are dealt out in stripes: the chunk is cut into
spans, and each span is shared by all devices. Every device then has early and late tokens alike,
and none computes more of the causal triangle than another.
"""

# B batch   T tokens of a chunk   S slots of a cache   M model axis

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.experimental import mesh_utils
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from utils.errors import UserError
from utils.model.config import ModelConfig

AXES = ("data", "model")
MAX_STRIPES = 4
INVALID_POSITION = 2**30  # of a slot that no query may see


@dataclass(frozen=True)
class Layout:
    """The mesh, and whether attention is split by heads; static under `jit`."""

    mesh: Mesh
    by_heads: bool

    @classmethod
    def of(cls, config: ModelConfig, mesh: Mesh) -> "Layout":
        model = mesh.shape["model"]
        return cls(mesh, config.num_heads % model == 0 and config.num_kv_heads % model == 0)

    @property
    def data(self) -> int:
        return self.mesh.shape["data"]

    @property
    def model(self) -> int:
        return self.mesh.shape["model"]

    @property
    def platform(self) -> str:
        """`cpu`, `gpu` or `tpu`, which need not be here."""
        return self.mesh.devices.flat[0].platform

    @property
    def has_cudnn_attention(self) -> bool:
        """Whether cuDNN's fused attention runs here: NVIDIA's cards, from Ampere on."""
        capability = getattr(self.mesh.devices.flat[0], "compute_capability", "")  # such as 9.0
        major = capability.partition(".")[0]
        return self.platform == "gpu" and major.isdigit() and int(major) >= 8

    @property
    def alignment(self) -> int:
        """The tokens of a chunk are a multiple of it."""
        return self.model * (1 if self.by_heads else MAX_STRIPES)

    @property
    def slots(self) -> tuple[Any, ...]:
        """How keys and values in a cache, [B, K, S, 2 H], are split: by heads, or else whole on
        every device of a data group, each of which needs those of all tokens."""
        return ("data", "model") if self.by_heads else ("data",)

    def padded(self, size: int) -> int:
        """A width or vocabulary, with the zeros that make it divide the model axis."""
        return -(-size // self.model) * self.model

    def sharding(self, *spec: Any) -> NamedSharding:
        return NamedSharding(self.mesh, P(*spec))

    def split(self, x: Array, *spec: Any) -> Array:
        """x, its axes split as `spec` says; axes that it does not name are whole."""
        return jax.lax.with_sharding_constraint(x, self.sharding(*spec))

    def on_each_device(self, in_specs: Any, out_specs: Any) -> Any:
        """Decorates a function of what each device holds of arrays that are split as `in_specs` and
        `out_specs` say."""
        specs = {"in_specs": in_specs, "out_specs": out_specs}
        return jax.shard_map(mesh=self.mesh, check_vma=False, **specs)

    def stream(self, prompt: bool) -> tuple[Any, ...]:
        """How a residual stream [B, T, D] is split: a prompt by its tokens too, a generated token
        by its row alone."""
        return ("data", "model") if prompt else ("data",)

    def heads(self, prompt: bool) -> tuple[Any, ...]:
        """How queries, keys, values and what attention gives, [B, T, N, H], are split."""
        return ("data", None, "model") if self.by_heads else self.stream(prompt)

    def gathers_mlp(self, batch: int, tokens: int, width: int) -> bool:
        """Whether the kernels of an mlp come to the tokens, or the tokens to the kernels: the one
        that moves less. The three kernels are 3 F D values, F being `width`; the residual stream of
        a data group moves on its way in and out, 2 (B / data) T D values."""
        return 2 * (batch // self.data) * tokens > 3 * width

    def kernel(self, x: Array, gather: bool) -> Array:
        """A parameter whole on every device, or as it is stored."""
        return self.split(x) if gather else x

    def whole_rows(self, x: Array) -> Array:
        """x, [B, ...], with each row whole on every device of its data group, as it leaves the
        mesh."""
        return self.split(x, "data")

    def owned(self, rows: int, process: int | None = None) -> dict[jax.Device, list[int]]:
        """The devices of a process (default: this one) -> the rows of a batch that they bring to
        its host, each row of the batch once in all processes: those of a data group in turns."""
        process = jax.process_index() if process is None else process
        size = rows // self.data
        return {
            device: list(range(group * size + number, (group + 1) * size, self.model))
            for (group, number), device in np.ndenumerate(self.mesh.devices)
            if device.process_index == process
        }

    def needed(self, batch: int) -> set[int]:
        """The rows of a batch that this process's devices compute with."""
        indices = self.sharding("data").addressable_devices_indices_map((batch,))
        return {i for (rows,) in indices.values() for i in range(*rows.indices(batch))}

    def put(self, x: np.ndarray) -> Array:
        """A host array, split over `data` by its first axis; each process needs its own rows."""
        return jax.make_array_from_callback(x.shape, self.sharding("data"), lambda index: x[index])

    def stripes(self, tokens: int) -> int:
        """Into how many spans the tokens of a prompt are cut."""
        if self.by_heads or 1 in (self.model, tokens):
            return 1
        return next(c for c in (MAX_STRIPES, 2, 1) if tokens % (self.model * c) == 0)

    def write_rows(self, stored: Array, new: Array, row: Array, *spec: Any) -> Array:
        """Rows of `stored`, both split as `spec` says, exchanged for new ones: those of each data
        group from its `row` on, int32 [data]."""

        @self.on_each_device((P(*spec), P(*spec), P("data")), P(*spec))
        def written(stored: Array, new: Array, row: Array) -> Array:
            return jax.lax.dynamic_update_slice_in_dim(stored, new, row[0], axis=0)

        return written(stored, new, row)

    def read_rows(self, stored: Array, row: Array, count: int, *spec: Any) -> Array:
        """`count` rows of `stored`: an equal share of each data group, from its `row` on."""

        @self.on_each_device((P(*spec), P("data")), P(*spec))
        def read(stored: Array, row: Array) -> Array:
            return jax.lax.dynamic_slice_in_dim(stored, row[0], count // self.data, axis=0)

        return read(stored, row)

    def deal(self, x: Array) -> Array:
        """[B, T, ...] in the order of the prompt -> the order in which devices hold it."""
        return self._swap(x, self.stripes(x.shape[1]), self.model)

    def collect(self, x: Array) -> Array:
        """The reverse of `deal`, for rows that are whole on a device."""
        return self._swap(x, self.model, self.stripes(x.shape[1]))

    def _swap(self, x: Array, outer: int, inner: int) -> Array:
        if 1 in (outer, inner):
            return x
        B, T, *rest = x.shape
        return x.reshape(B, outer, inner, -1, *rest).swapaxes(1, 2).reshape(B, T, *rest)

    def look_up(self, table: Array, tokens: Array) -> Array:
        """Rows of an embedding table that is split by its rows: tokens [B, T] -> [B, T, D], split
        by tokens where there are several. Only what was looked up moves, never the table."""

        prompt = tokens.shape[1] > 1

        @self.on_each_device((P("model"), P("data")), P(*self.stream(prompt)))
        def found(table: Array, tokens: Array) -> Array:
            index = tokens - jax.lax.axis_index("model") * len(table)
            here = (index >= 0) & (index < len(table))
            rows = jnp.where(here[..., None], table[jnp.where(here, index, 0)], 0)
            return summed(rows, prompt)

        return found(table, tokens)


def summed(x: Array, prompt: bool) -> Array:
    """On each device: the sum of x, [B, T, D], over the model axis, split as `Layout.stream`."""
    if prompt:
        return jax.lax.psum_scatter(x, "model", scatter_dimension=1, tiled=True)
    return jax.lax.psum(x, "model")


def find_devices(everywhere: bool) -> Sequence[jax.Device]:
    """The devices of all processes, or the first one of this process. Raises UserError where the
    platform that the environment names is not to be had."""
    try:
        return jax.devices() if everywhere else jax.local_devices()[:1]
    except (RuntimeError, AssertionError) as error:  # a platform that JAX was built without asserts
        reason = str(error).partition("\n")[0].partition(" (set JAX_PLATFORMS")[0].rstrip(".")
        raise UserError(
            f"JAX finds no device of JAX_PLATFORMS={jax.config.jax_platforms or ''}"
            f"{f' ({reason})' if reason else ''}: name one that this machine has and no other "
            "process holds, such as cpu, or none"
        ) from error


def make_mesh(data: int, model: int, devices: Sequence[jax.Device] | None = None) -> Mesh:
    """The devices (default: all of every process), ordered by their physical topology."""
    ordered = mesh_utils.create_device_mesh((data, model), devices, allow_split_physical_axes=True)
    return Mesh(ordered, AXES, axis_types=(AxisType.Auto,) * 2)


def single_device_mesh() -> Mesh:
    """A 1 x 1 mesh on the first device of this process."""
    return make_mesh(1, 1, find_devices(everywhere=False))


def use_compilation_cache() -> None:
    """Keeps compiled programs, so that a run that is resumed does not compile again.

    They are kept in JAX_COMPILATION_CACHE_DIR, else in ~/.cache/arc-activations where that can be
    written: those that took as many seconds as JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS says,
    else half a second.
    """
    if "JAX_COMPILATION_CACHE_DIR" not in os.environ:
        try:
            folder = Path("~/.cache/arc-activations").expanduser()
            folder.mkdir(parents=True, exist_ok=True)
        except (OSError, RuntimeError):  # no room or no permission; no home
            return
        if not os.access(folder, os.W_OK):
            return
        jax.config.update("jax_compilation_cache_dir", str(folder))
    if "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS" not in os.environ:
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
