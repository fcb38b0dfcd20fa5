"""Where each array of a forward pass lives on the (data, model) mesh.

Batches are split over `data`. Over `model` the mlp is split by its width and the vocabulary by its
rows (Megatron-LM, Shoeybi et al. 2019), and attention in one of two ways. `heads`: by heads, where
both query and key/value heads divide the axis. `sequence`: else by tokens, so that no work is
repeated; each device holds the queries of its tokens, and only the keys and values, few heads with
grouped queries, are gathered. In both, the residual stream of a prompt is split by tokens
(Korthikanti et al. 2022).

With `sequence`, the tokens of a prompt are dealt out in stripes: the prompt is cut into spans, and
each span is shared by all devices. Every device then has early and late tokens alike, and none
computes more of the causal triangle than another.
"""

# B batch   T prompt tokens   S key slots   M model axis   C stripes   U tokens of a stripe

from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from utils.model.config import ModelConfig

P = PartitionSpec
ROWS = ("data", "model")
MAX_STRIPES = 4


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
    def alignment(self) -> int:
        """Prompt slots and cache slots are multiples of it, in tokens."""
        return self.model * (1 if self.by_heads else MAX_STRIPES)

    @property
    def cache_blocks(self) -> int:
        """Parts that the slots of a cache are split into."""
        return 1 if self.by_heads else self.model

    def padded(self, size: int) -> int:
        """A width or vocabulary, with the zeros that make it divide the model axis."""
        return -(-size // self.model) * self.model

    def sharding(self, *spec: Any) -> NamedSharding:
        return NamedSharding(self.mesh, P(*spec))

    def split(self, x: jax.Array, *spec: Any) -> jax.Array:
        """x, its axes split as `spec` says; axes that it does not name are whole."""
        return jax.lax.with_sharding_constraint(x, self.sharding(*spec))

    def rows(self, batch: int) -> Any:
        """The mesh axes that a batch's rows are split over when they leave the mesh whole: all of
        them, or `data` alone for a batch that is too small, whose rows then have replicas."""
        return ROWS if batch % self.mesh.size == 0 else "data"

    def owned(self, batch: int, process: int | None = None) -> dict[jax.Device, range]:
        """The devices of a process (default: this one) -> the rows of a batch that they bring to
        its host, each row of the batch once in all processes."""
        process = jax.process_index() if process is None else process
        axes = self.rows(batch)
        size = batch // (self.mesh.size if axes == ROWS else self.data)
        devices = self.mesh.devices.flat if axes == ROWS else self.mesh.devices[:, 0]
        return {
            device: range(i * size, (i + 1) * size)
            for i, device in enumerate(devices)
            if device.process_index == process
        }

    def needed(self, batch: int) -> set[int]:
        """The rows of a batch that this process's devices compute with."""
        indices = self.sharding("data").addressable_devices_indices_map((batch,))
        return {i for (rows,) in indices.values() for i in range(*rows.indices(batch))}

    def put(self, x: np.ndarray) -> jax.Array:
        """A host array, split over `data` by its first axis; each process needs its own rows."""
        return jax.make_array_from_callback(x.shape, self.sharding("data"), lambda index: x[index])

    def stripes(self, tokens: int) -> int:
        """Into how many spans the tokens of a prompt are cut."""
        if self.by_heads or self.model == 1:
            return 1
        return next(c for c in (MAX_STRIPES, 2, 1) if tokens % (self.model * c) == 0)

    def deal(self, x: jax.Array) -> jax.Array:
        """[B, T, ...] in the order of the prompt -> the order in which devices hold it."""
        return self._swap(x, self.stripes(x.shape[1]), self.model)

    def collect(self, x: jax.Array) -> jax.Array:
        """The reverse of `deal`, for rows that are whole on a device."""
        return self._swap(x, self.model, self.stripes(x.shape[1]))

    def _swap(self, x: jax.Array, outer: int, inner: int) -> jax.Array:
        if 1 in (outer, inner) or self.stripes(x.shape[1]) == 1:
            return x
        B, T, *rest = x.shape
        return x.reshape(B, outer, inner, -1, *rest).swapaxes(1, 2).reshape(B, T, *rest)

    def look_up(self, table: jax.Array, tokens: jax.Array) -> jax.Array:
        """Rows of an embedding table that is split by its rows: tokens [B, T] -> [B, T, D], split
        by tokens where there are several. Only what was looked up moves, never the table."""

        def local(table: jax.Array, tokens: jax.Array) -> jax.Array:
            index = tokens - jax.lax.axis_index("model") * len(table)
            here = (index >= 0) & (index < len(table))
            found = jnp.where(here[..., None], table[jnp.where(here, index, 0)], 0)
            if tokens.shape[1] == 1:
                return jax.lax.psum(found, "model")
            return jax.lax.psum_scatter(found, "model", scatter_dimension=1, tiled=True)

        out = P("data") if tokens.shape[1] == 1 else P("data", "model")
        mapped = jax.shard_map(
            local, mesh=self.mesh, in_specs=(P("model"), P("data")), out_specs=out, check_vma=False
        )
        return mapped(table, tokens)

    def cache_size(self, prompt: int, answer: int) -> int:
        """Slots of a cache for so many tokens."""
        return prompt + self.cache_blocks * -(-answer // self.cache_blocks)

    def into_slots(self, x: jax.Array, size: int, axis: int, fill: Any = 0) -> jax.Array:
        """The prompt's entries along `axis`, each block's at its beginning, in `size` slots."""
        blocks = self.cache_blocks
        shape = x.shape
        x = x.reshape(*shape[:axis], blocks, shape[axis] // blocks, *shape[axis + 1 :])
        room = [(0, 0)] * x.ndim
        room[axis + 1] = (0, size // blocks - shape[axis] // blocks)
        x = jnp.pad(x, room, constant_values=fill)
        return x.reshape(*shape[:axis], size, *shape[axis + 1 :])

    def slot(self, step: jax.Array, prompt: int, size: int) -> jax.Array:
        """Where generated token `step` goes: to the blocks in turn, behind their prompt's part."""
        blocks = self.cache_blocks
        return step % blocks * (size // blocks) + prompt // blocks + step // blocks
