"""Jitted prefill and decode loop. What is captured is captured in these same passes.

Prompts are padded on the right: slot and position agree in prefill, so a plain causal mask serves
every row. Generated tokens go to the slots behind the longest prompt, one slot a step for all
rows, at the position that follows their own prompt; the cache remembers each slot's position.
"""

# B batch   T prompt tokens, padded   A answer tokens at most   D model width   V vocabulary

from dataclasses import dataclass, field
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from utils.model.capture import CaptureSpec
from utils.model.decoder import Cache, Decoder, captured, filled_cache

LOGIT_ROWS = 64  # answer positions a device whose vocabulary-wide logits exist at once


@dataclass(frozen=True)
class Shape:
    """One compiled shape, in tokens a row: all of it, the longest prompt, the longest answer."""

    length: int
    prompt: int
    answer: int


@dataclass(frozen=True)
class Sampling:
    """How answers are made. temperature 0 is greedy; `stop_ids` end an answer and belong to it."""

    max_tokens: int
    stop_ids: tuple[int, ...]
    temperature: float = 0.0


@dataclass
class Prefilled:
    """captures: name -> [B, rows, D]; logits: float32 [B, V] at the last prompt token, or None;
    logprobs: float32 [B, A] of the forced answer's tokens, or None; cache: or None."""

    captures: dict[str, jax.Array]
    logits: jax.Array | None = None
    logprobs: jax.Array | None = None
    cache: Cache | None = None


@dataclass
class Decoded:
    """tokens: int32 [B, A]; counts: int32 [B], how many of them are real; logprobs: float32
    [B, A]; captures: name -> [B, A, D]; steps: int32, forward passes that were run."""

    tokens: jax.Array
    counts: jax.Array
    logprobs: jax.Array
    captures: dict[str, jax.Array]
    steps: jax.Array


for _result in (Prefilled, Decoded):
    jax.tree_util.register_dataclass(_result)


def prefill(
    model: Decoder,
    params: Any,
    tokens: jax.Array,
    prompt_lengths: jax.Array,
    answer_lengths: jax.Array,
    *,
    shape: Shape,
    answer_slots: int,
    with_logits: bool,
) -> Prefilled:
    """One pass over the prompts and, where `shape.answer` > 0, the forced answers behind them.

    tokens: int32 [B, T], right-padded; prompt_lengths, answer_lengths: int32 [B]. The cache has
    room for `answer_slots` tokens behind the prompts; 0 keeps no cache.
    """
    layout = model.layout
    B, T = tokens.shape
    positions = jnp.broadcast_to(jnp.arange(T, dtype=jnp.int32), (B, T))
    dealt = layout.deal(positions)
    (x, keys_values), state = model.apply(
        {"params": params}, layout.deal(tokens), dealt, mutable=["intermediates"]
    )

    def whole(value: jax.Array) -> jax.Array:
        """[B, T, D] with each row on one device, its tokens in order."""
        return layout.collect(layout.split(value, layout.rows(B)))

    result = Prefilled(
        {
            name: _select(whole(value), model.capture, prompt_lengths, shape)
            for name, value in captured(state.get("intermediates", {})).items()
            if model.capture.in_prefill or shape.answer
        }
    )
    if answer_slots:
        result.cache = filled_cache(layout, keys_values, dealt, prompt_lengths, answer_slots)
    last = (prompt_lengths - 1)[:, None]
    if with_logits or shape.answer:
        x = whole(x)
    if with_logits:
        logits = _logits(model, params, _rows(x, last)[:, 0])
        result.logits = layout.split(logits, layout.rows(B))
    if shape.answer:
        steps = jnp.arange(shape.answer)
        x = _rows(x, last + steps)
        targets = jnp.take_along_axis(tokens, jnp.minimum(last + 1 + steps, T - 1), axis=1)
        logprobs = _forced_logprobs(model, params, x, targets, answer_lengths.max())
        result.logprobs = layout.split(logprobs, layout.rows(B))
    return result


def decode(
    model: Decoder,
    params: Any,
    cache: Cache,
    logits: jax.Array,
    prompt_lengths: jax.Array,
    sample_keys: jax.Array,
    *,
    prompt_slots: int,
    sampling: Sampling,
) -> tuple[Decoded, Cache]:
    """Generates until every row has ended; sample_keys: uint32 [B], 0 for padding rows;
    prompt_slots: T of the prefill.

    Each step feeds one token a row, so the last token of an answer has been through the model too
    when its states are captured. What a row draws depends on its own key and step alone.
    The cache is returned so that a donated one is updated in place.
    """
    layout = model.layout
    B, A = len(prompt_lengths), sampling.max_tokens
    S = cache["positions"].shape[1]
    logits = layout.split(logits, "data", "model")
    stops = jnp.array(sampling.stop_ids, jnp.int32)
    base = jax.random.key(0)
    keys = jax.vmap(partial(jax.random.fold_in, base))(sample_keys)

    def choose(logits: jax.Array, step: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Token [B] and its log-probability at temperature 1 [B]."""
        if sampling.temperature:
            step_keys = jax.vmap(lambda key: jax.random.fold_in(key, step))(keys)
            noise = jax.vmap(partial(jax.random.gumbel, shape=logits.shape[1:]))(step_keys)
            token = _argmax(logits / sampling.temperature + noise)
        else:
            token = _argmax(logits)
        return token.astype(jnp.int32), _logprob(logits, token)

    def rows(x: jax.Array) -> jax.Array:
        """Split as it will leave the mesh."""
        return layout.split(x, layout.rows(B))

    def ended(token: jax.Array) -> jax.Array:
        return jnp.isin(token, stops)

    token, logprob = choose(logits, 0)
    active = sample_keys != 0
    shape = (B, A, model.config.hidden_size)
    dtype = jax.tree.leaves(params)[0].dtype
    names = model.capture.names if model.capture.in_decode else ()
    state = {
        "result": Decoded(
            tokens=jnp.zeros((B, A), jnp.int32).at[:, 0].set(token),
            counts=active.astype(jnp.int32),
            logprobs=jnp.zeros((B, A), jnp.float32).at[:, 0].set(logprob),
            captures={name: rows(jnp.zeros(shape, dtype)) for name in names},
            steps=jnp.int32(0),
        ),
        "cache": cache,
        "token": token,
        # Rows whose current token still has to go through the model. Without capture the last
        # token of an answer does not.
        "active": active if names else active & ~ended(token),
    }
    last_step = A if names else A - 1

    def unfinished(state: dict[str, Any]) -> jax.Array:
        return (state["result"].steps < last_step) & jnp.any(state["active"])

    def step(state: dict[str, Any]) -> dict[str, Any]:
        result, token, active = state["result"], state["token"], state["active"]
        i = result.steps
        (x, cache), sown = model.apply(
            {"params": params},
            token[:, None],
            (prompt_lengths + i)[:, None],
            state["cache"],
            layout.slot(i, prompt_slots, S),
            mutable=["intermediates"],
        )
        new = captured(sown.get("intermediates", {}))
        captures = {
            name: jax.lax.dynamic_update_slice(result.captures[name], rows(new[name]), (0, i, 0))
            for name in names
        }
        next_token, logprob = choose(_logits(model, params, x[:, 0]), i + 1)
        goes_on = active & ~ended(token) & (i + 1 < A)
        j = jnp.minimum(i + 1, A - 1)
        tokens = jnp.where(goes_on, next_token, result.tokens[:, j])
        logprobs = jnp.where(goes_on, logprob, result.logprobs[:, j])
        return {
            "result": Decoded(
                tokens=result.tokens.at[:, j].set(tokens),
                counts=result.counts + goes_on,
                logprobs=result.logprobs.at[:, j].set(logprobs),
                captures=captures,
                steps=i + 1,
            ),
            "cache": cache,
            "token": next_token,
            "active": goes_on if names else goes_on & ~ended(next_token),
        }

    state = jax.lax.while_loop(unfinished, step, state)
    result = state["result"]
    for name in ("tokens", "counts", "logprobs"):
        setattr(result, name, rows(getattr(result, name)))
    return result, state["cache"]


def _forced_logprobs(
    model: Decoder, params: Any, x: jax.Array, targets: jax.Array, count: jax.Array
) -> jax.Array:
    """log p of targets, int32 [B, A], after hidden states x, [B, A, D]; float32 [B, A].

    In chunks of positions, because the logits of all of them would outweigh everything else in
    memory, and only as many as the longest answer, of `count` tokens, needs.
    """
    B, A = targets.shape
    size = max(1, min(A, LOGIT_ROWS * model.layout.mesh.size // B))
    missing = -A % size
    x = jnp.pad(x, ((0, 0), (0, missing), (0, 0)))
    targets = jnp.pad(targets, ((0, 0), (0, missing)))

    def chunk(i: jax.Array, logprobs: jax.Array) -> jax.Array:
        rows = jax.lax.dynamic_slice_in_dim(x, i * size, size, axis=1).reshape(B * size, -1)
        wanted = jax.lax.dynamic_slice_in_dim(targets, i * size, size, axis=1).reshape(-1)
        new = _logprob(_logits(model, params, rows), wanted).reshape(B, size)
        return jax.lax.dynamic_update_slice_in_dim(logprobs, new, i * size, axis=1)

    chunks = (count + size - 1) // size
    return jax.lax.fori_loop(0, chunks, chunk, jnp.zeros(targets.shape, jnp.float32))[:, :A]


def _logprob(logits: jax.Array, token: jax.Array) -> jax.Array:
    """log p of token, int32 [N], under logits [N, V]; the other V - 1 are never normalised."""
    chosen = jnp.take_along_axis(logits, token[:, None], axis=-1)[:, 0]
    return chosen - jax.nn.logsumexp(logits, axis=-1)


def _argmax(x: jax.Array) -> jax.Array:
    """Index of the first maximum of each row of [B, V]; in two reductions, of which a mesh that
    splits V moves a number a row, where `jnp.argmax` moves indices as large as x."""
    index = jax.lax.broadcasted_iota(jnp.int32, x.shape, 1)
    highest = x.max(axis=-1, keepdims=True)
    return jnp.where(x == highest, index, x.shape[-1]).min(axis=-1)


def _logits(model: Decoder, params: Any, x: jax.Array) -> jax.Array:
    return model.apply({"params": params}, x, method=Decoder.logits)


def _rows(x: jax.Array, index: jax.Array) -> jax.Array:
    """x: [B, T, D], index: int [B, R] -> [B, R, D]; an index behind the end gives the last row."""
    return jnp.take_along_axis(x, jnp.minimum(index, x.shape[1] - 1)[..., None], axis=1)


def _select(
    value: jax.Array, capture: CaptureSpec, prompt_lengths: jax.Array, shape: Shape
) -> jax.Array:
    """The rows of a capture that are kept: [B, T, D] -> [B, R, D], R the most that any sample of
    the shape keeps. Behind a sample's own rows are those of tokens that are not kept."""
    start = capture.start(prompt_lengths)
    count = min(len(capture.rows(shape.prompt, shape.answer)), value.shape[1])
    if isinstance(start, int):
        return value[:, start : start + count]
    return _rows(value, start[:, None] + jnp.arange(count))


def specs(tree: Any) -> Any:
    """Shapes, dtypes and shardings of a tree of arrays, for which a program is compiled."""
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), tree)


def result_specs(program: Any) -> Any:
    """Those of what a compiled program returns."""
    return jax.tree.map(
        lambda x, sharding: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding),
        program.out_info,
        program.output_shardings,
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
        **static: Any,
    ) -> Prefilled:
        """See `prefill`."""
        arrays = [self.model.layout.put(x) for x in (tokens, prompt_lengths, answer_lengths)]
        return self.prefill_program(*tokens.shape, **static)(self.params, *arrays)

    def prefill_program(self, batch: int, length: int, **static: Any) -> Any:
        """`prefill`, compiled for prompts of `length` slots in `batch` rows."""
        args = (self._rows((batch, length)), self._rows((batch,)), self._rows((batch,)))
        return self._program(prefill, (), self.model, args, static)

    def decode(
        self,
        model: Decoder,
        prefilled: Prefilled,
        prompt_lengths: np.ndarray,
        sample_keys: np.ndarray,
        **static: Any,
    ) -> Decoded:
        """See `decode`, and `decode_program` for `static`."""
        program = self.decode_program(model, specs((prefilled.cache, prefilled.logits)), **static)
        arrays = [self.model.layout.put(x) for x in (prompt_lengths, sample_keys)]
        return program(self.params, prefilled.cache, prefilled.logits, *arrays)[0]

    def decode_program(
        self,
        model: Decoder,
        cache_and_logits: Any,
        *,
        prompt_slots: int,
        sampling: Sampling,
        keep_cache: bool,
    ) -> Any:
        """`decode`, compiled for a prefill's cache and logits. Unless `keep_cache`, the cache is
        given up to the loop."""
        batch = cache_and_logits[1].shape[:1]
        args = (*cache_and_logits, self._rows(batch), self._rows(batch, jnp.uint32))
        static = {"prompt_slots": prompt_slots, "sampling": sampling}
        return self._program(decode, () if keep_cache else ("cache",), model, args, static)

    def _rows(self, shape: tuple[int, ...], dtype: Any = jnp.int32) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(shape, dtype, sharding=self.model.layout.sharding("data"))

    def _program(
        self,
        function: Any,
        donated: tuple[str, ...],
        model: Decoder,
        args: tuple[Any, ...],
        static: dict[str, Any],
    ) -> Any:
        shapes = tuple((x.shape, str(x.dtype)) for x in jax.tree.leaves(args))
        key = (function.__name__, donated, model, tuple(static.items()), shapes)
        if key not in self._programs:
            jitted = jax.jit(function, static_argnames=("model", *static), donate_argnames=donated)
            lowered = jitted.lower(model, specs(self.params), *args, **static)
            self._programs[key] = lowered.compile()
        return self._programs[key]
