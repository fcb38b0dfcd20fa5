"""The compiled programs of a model: one for the chunks of prefill and one for decoding, of each
shape."""

import os
from collections.abc import Iterable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field, replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from utils.model.capture import width_of
from utils.model.decoder import Cache, Changes, Decoder
from utils.model.generate import Chunk, Decoded, Sampling, Shape, decode, prefill
from utils.model.layout import INVALID_POSITION

COMPILERS = min(4, os.cpu_count() or 1)  # programs that are compiled at once


_PREFILL = jax.jit(prefill, static_argnames=("model", "forced"), donate_argnames=("cache",))
_DECODE = jax.jit(decode, static_argnames=("model", "sampling"), donate_argnames=("cache",))


@dataclass
class Engine:
    """The compiled programs of one model, each compiled once.

    params: arrays, or their specs where nothing is to be run. logits, forced: whether prefill gives
    the logits at the last prompt token, and the log-probabilities of forced answers. sampling: None
    where nothing is generated. constants: of each of the model's edits the arrays that stay the
    same, on the devices. A batch begins with `begin`; each pass hands its state, cache and logits,
    to the next, and takes the cache away from whoever holds it still.
    """

    model: Decoder
    params: Any
    logits: bool
    forced: bool = False
    sampling: Sampling | None = None
    constants: Sequence[dict[str, Any]] = ()
    _programs: dict[Any, Any] = field(default_factory=dict)

    def begin(self, shape: Shape, used: Cache | None = None) -> tuple[Cache, Array | None]:
        """The state before a batch's first pass; used: the cache of a former batch of its shape."""
        cache, logits = self.state(shape)

        def full(spec: Any, value: int = 0) -> Array:
            return jnp.full(spec.shape, value, spec.dtype, device=spec.sharding)

        if used is None:
            positions = full(cache["positions"], INVALID_POSITION)
            used = {**jax.tree.map(full, cache), "positions": positions}
        return used, None if logits is None else full(logits)

    def prefill(
        self,
        state: tuple[Cache, Array | None],
        ids: np.ndarray,
        rows: Sequence[int],
        start: np.ndarray,
        prompt_lengths: np.ndarray,
        lengths: np.ndarray,
        shape: Shape,
        changes: Changes = (),
    ) -> tuple[Chunk, tuple[Cache, Array | None]]:
        """See `prefill`. ids: int32 [B, T], of the batch; rows: the row of each data group, by its
        place in the batch, whose chunk at `start`, int32 [P], is run. Lengths are those of all rows
        of the batch, in every process. The chunk has no logits where no prompt ends in it.
        changes: of each of the model's edits what differs from pass to pass: `mask`, bool [P, C],
        and `values`.
        """
        if max(start) + shape.chunk > shape.slots:
            raise ValueError(f"a chunk at {max(start)} does not fit in {shape}")
        tokens = np.zeros((len(rows), shape.chunk + 1), np.int32)
        for target, row, begin in zip(tokens, rows, start, strict=True):
            found = ids[row, begin : begin + shape.chunk + 1]
            target[: len(found)] = found
        local = np.array(rows, np.int32) % (shape.rows // self.model.layout.data)
        prompts = prompt_lengths[rows]
        ends = np.any((start < prompts) & (prompts <= start + shape.chunk))
        inputs = tokens[:, :-1], tokens[:, 1:], local, start, prompts, lengths[rows]
        cache, logits = state
        chunk, logits, cache = self.program("prefill", shape)(
            self.params,
            cache,
            logits,
            *map(self.model.layout.put, inputs),
            ends,
            self._changes(changes),
        )
        return chunk if ends else replace(chunk, logits=None), (cache, logits)

    def decode(
        self,
        state: tuple[Cache, Array],
        prompt_lengths: np.ndarray,
        sample_keys: np.ndarray,
        temperature: float,
        shape: Shape,
        changes: Changes = (),
    ) -> tuple[Decoded, tuple[Cache, Array]]:
        """See `decode`; prompt_lengths: of all rows, in every process."""
        first_slot = prompt_lengths.max()
        if first_slot + self.sampling.max_tokens > shape.slots:
            raise ValueError(f"answers behind {first_slot} tokens do not fit in {shape}")
        put = self.model.layout.put
        cache, logits = state
        decoded, cache = self.program("decode", shape)(
            self.params,
            cache,
            logits,
            put(prompt_lengths),
            np.int32(first_slot),
            put(sample_keys),
            np.float32(temperature),
            self._changes(changes),
        )
        return decoded, (cache, logits)

    def _changes(self, changes: Changes) -> Changes:
        """With the arrays that stay, on the devices."""
        put = self.model.layout.put
        return tuple(
            arrays and {**constants, **{name: put(value) for name, value in arrays.items()}}
            for constants, arrays in zip(self.constants, changes, strict=True)
        )

    def compiling(self, shapes: Iterable[Shape]) -> dict[Shape, list[Future[Any]]]:
        """The programs of each shape that differs, prefill and, where answers are generated,
        decoding: compiled in the background, in this order."""
        names = ["prefill", "decode"] if self.sampling else ["prefill"]
        pool = ThreadPoolExecutor(COMPILERS, "compile")
        found = {s: [pool.submit(self.program, n, s) for n in names] for s in dict.fromkeys(shapes)}
        pool.shutdown(wait=False)
        return found

    def program(self, name: str, shape: Shape) -> Any:
        """`prefill` or `decode`, compiled for a shape."""
        if (name, shape) not in self._programs:
            lower = {"prefill": self.lower_prefill, "decode": self.lower_decode}[name]
            with self.precision():
                self._programs[name, shape] = lower(shape).compile()
        return self._programs[name, shape]

    def precision(self) -> AbstractContextManager[Any]:
        """For what is compiled within, in this thread: a model in float32 multiplies float32, which
        accelerators by default do in fewer bits."""
        exact = self._dtype == jnp.float32
        return jax.default_matmul_precision("highest") if exact else nullcontext()

    def lower_prefill(self, shape: Shape) -> Any:
        """`prefill` before it is compiled."""
        rows = self.model.layout.data
        tokens, numbers = self._spec(rows, shape.chunk), [self._spec(rows)] * 4
        inputs = tokens, tokens, *numbers, self._spec(dtype=jnp.bool_, split=())
        changes = self._abstract_changes(rows, shape.chunk)
        before = self.model, self.params, *self.state(shape)
        return _PREFILL.lower(*before, *inputs, changes, forced=self.forced)

    def lower_decode(self, shape: Shape) -> Any:
        """`decode` before it is compiled."""
        lengths, keys = self._spec(shape.rows), self._spec(shape.rows, dtype=jnp.uint32)
        first_slot, temperature = (self._spec(dtype=d, split=()) for d in (jnp.int32, jnp.float32))
        inputs = lengths, first_slot, keys, temperature
        changes = self._abstract_changes(shape.rows, self.sampling.max_tokens)
        edits = zip(self.model.edits, changes, strict=True)
        changes = tuple(None if edit.op == "patch" else arrays for edit, arrays in edits)
        before = self.model, self.params, *self.state(shape)
        return _DECODE.lower(*before, *inputs, changes, sampling=self.sampling)

    def _abstract_changes(self, rows: int, tokens: int) -> Changes:
        """What `_changes` makes for so many rows and tokens."""
        found = []
        for edit, constants in zip(self.model.edits, self.constants, strict=True):
            arrays = {**constants, "mask": self._spec(rows, tokens, dtype=jnp.bool_)}
            if edit.op == "patch":
                width = width_of(self.model.config, edit.hook)
                arrays["values"] = self._spec(rows, tokens, width, dtype=jnp.float32)
            found.append(arrays)
        return tuple(found)

    def state(self, shape: Shape) -> tuple[dict[str, Any], Any]:
        """Shapes, dtypes and shardings of a batch's cache and logits, the latter None where they
        are not asked for.

        The cache holds of each layer that is run keys and values side by side, [R, K, S, 2 H], and
        `positions`, [R, S], INVALID_POSITION in slots without a token. What keys and values hold
        there makes no difference.
        """
        c, layout, R = self.model.config, self.model.layout, shape.rows
        size = R, c.num_kv_heads, shape.slots, 2 * c.head_dim
        cache = {
            f"layers_{i}": self._spec(*size, dtype=self._dtype, split=layout.slots)
            for i in range(self.model.depth)
        }
        cache["positions"] = self._spec(R, shape.slots)
        if not self.logits:
            return cache, None
        size = R, layout.padded(c.vocab_size)
        return cache, self._spec(*size, dtype=jnp.float32, split=("data", "model"))

    @property
    def _dtype(self) -> Any:
        return jax.tree.leaves(self.params)[0].dtype

    def _spec(
        self, *shape: int, dtype: Any = jnp.int32, split: tuple[Any, ...] = ("data",)
    ) -> jax.ShapeDtypeStruct:
        """Of an array; by default of what `Layout.put` makes of a host array."""
        return jax.ShapeDtypeStruct(shape, dtype, sharding=self.model.layout.sharding(*split))
