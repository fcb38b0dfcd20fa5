"""The compiled programs of a model: `prefill` and `decode`, once for each shape."""

from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from tqdm import tqdm

from utils.model.capture import CaptureSpec
from utils.model.decoder import Decoder
from utils.model.generate import Decoded, Outputs, Prefilled, Sampling, Shape, decode, prefill

COMPILERS = 4  # shapes that are compiled at once


def specs(tree: Any) -> Any:
    """Shapes, dtypes and shardings of a tree of arrays or of what a program returns."""
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), tree)


_PREFILL = jax.jit(prefill, static_argnames=("model", "shape", "outputs"))
_DECODE, _DECODE_INTO_CACHE = (
    jax.jit(decode, static_argnames=("model", "prompt_slots", "sampling"), donate_argnames=donated)
    for donated in ((), ("cache",))
)


@dataclass
class Engine:
    """The compiled programs of one model; each shape is compiled once.

    params: arrays, or their specs where nothing is to be run.
    """

    model: Decoder
    params: Any
    _programs: dict[Any, Any] = field(default_factory=dict)

    def prefill(
        self,
        tokens: np.ndarray,
        prompt_lengths: np.ndarray,
        answer_lengths: np.ndarray,
        shape: Shape,
        outputs: Outputs,
    ) -> Prefilled:
        """See `prefill`; tokens: int32 [B, shape.length]."""
        program = self.prefill_program(len(tokens), shape, outputs)
        put = self.model.layout.put
        return program(self.params, put(tokens), put(prompt_lengths), put(answer_lengths))

    def decode(
        self,
        prefilled: Prefilled,
        prompt_lengths: np.ndarray,
        sample_keys: np.ndarray,
        shape: Shape,
        sampling: Sampling,
    ) -> Decoded:
        """See `decode`; prefilled: a prefill of that shape with logits, and a cache with room for
        `sampling.max_tokens`."""
        program = self.decode_program(len(prompt_lengths), shape, sampling)
        lengths, keys = map(self.model.layout.put, (prompt_lengths, sample_keys))
        return program(self.params, prefilled.cache, prefilled.logits, lengths, keys)[0]

    def prefill_program(self, batch: int, shape: Shape, outputs: Outputs) -> Any:
        """`prefill`, compiled for `batch` rows."""
        key = (batch, shape, outputs)
        if key not in self._programs:
            tokens, lengths = self._input(batch, shape.length), self._input(batch)
            lowered = _PREFILL.lower(
                self.model, specs(self.params), tokens, lengths, lengths, shape, outputs
            )
            self._programs[key] = lowered.compile()
        return self._programs[key]

    def decode_program(self, batch: int, shape: Shape, sampling: Sampling) -> Any:
        """`decode`, compiled for `batch` rows after the prefill of a shape."""
        key = (batch, shape, sampling)
        if key not in self._programs:
            outputs = Outputs(logits=True, cache_room=sampling.max_tokens)
            prefilled = specs(self.prefill_program(batch, shape, outputs).out_info)
            model = self.model
            if not sampling.captures:
                model = model.clone(capture=CaptureSpec())
            jitted = _DECODE if sampling.keep_cache else _DECODE_INTO_CACHE
            before = (specs(self.params), prefilled.cache, prefilled.logits)
            lengths, keys = self._input(batch), self._input(batch, dtype=jnp.uint32)
            lowered = jitted.lower(model, *before, lengths, keys, shape.length, sampling)
            self._programs[key] = lowered.compile()
        return self._programs[key]

    def _input(self, *shape: int, dtype: Any = jnp.int32) -> jax.ShapeDtypeStruct:
        """What `Layout.put` makes of a host array."""
        return jax.ShapeDtypeStruct(shape, dtype, sharding=self.model.layout.sharding("data"))


Figures = TypeVar("Figures")


def for_every_shape(
    shapes: Iterable[tuple[Shape, int]], compile: Callable[[Shape, int], Figures], label: str
) -> dict[tuple[Shape, int], Figures]:
    """`compile(shape, rows)` of each that differs, COMPILERS at once and under a bar, by shape."""
    distinct = list(dict.fromkeys(shapes))
    with (
        ThreadPoolExecutor(COMPILERS, "compile") as pool,
        tqdm(total=len(distinct), desc=label, unit=" shapes", disable=None) as bar,
    ):
        found = {}
        pending = [pool.submit(compile, *shape) for shape in distinct]
        for shape, future in zip(distinct, pending, strict=True):
            found[shape] = future.result()
            bar.update()
    return found
