"""Jitted prefill and decode loop. What is captured is captured in these same passes.

Prompts are padded on the right: slot and position agree in prefill, so a plain causal mask serves
every row. Generated tokens go to the slots behind the longest prompt, one slot a step for all
rows, at the position that follows their own prompt; the cache remembers each slot's position.
"""

# B batch   T prompt tokens, padded   A answer tokens at most   D model width   V vocabulary

from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array
from jax.lax import dynamic_slice_in_dim, dynamic_update_slice_in_dim

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
class Outputs:
    """What a prefill gives beside captures: whether the logits at the last prompt token, and a
    cache with room for `cache_room` tokens behind the prompts, or none where it is 0."""

    logits: bool
    cache_room: int = 0


@dataclass(frozen=True)
class Sampling:
    """How answers are made. temperature 0 is greedy; `stop_ids` end an answer and belong to it.

    captures: whether the model's captures are kept of generated tokens too. keep_cache: whether the
    prefill's cache is read again, for another answer to the same prompt; else it is given up to
    the loop.
    """

    max_tokens: int
    stop_ids: tuple[int, ...]
    temperature: float = 0.0
    captures: bool = True
    keep_cache: bool = False


@dataclass(frozen=True)
class Prefilled:
    """captures: name -> [B, rows, D]; logits: float32 [B, V] at the last prompt token, or None;
    logprobs: float32 [B, A] of the forced answer's tokens, or None; cache: or None."""

    captures: dict[str, Array]
    logits: Array | None = None
    logprobs: Array | None = None
    cache: Cache | None = None


@dataclass(frozen=True)
class Decoded:
    """tokens: int32 [B, A]; counts: int32 [B], how many of them are real; logprobs: float32
    [B, A]; captures: name -> [B, A, D]; steps: int32, forward passes that were run."""

    tokens: Array
    counts: Array
    logprobs: Array
    captures: dict[str, Array]
    steps: Array


@dataclass(frozen=True)
class DecodeState:
    """What one step of decoding hands to the next.

    token: int32 [B], the newest token of each row, which has not been through the model yet.
    active: bool [B], the rows whose newest token still has to go through it. result: what the rows
    have so far, their newest token included; its unwritten part is 0.
    """

    token: Array
    active: Array
    cache: Cache
    result: Decoded


for _tree in (Prefilled, Decoded, DecodeState):
    jax.tree_util.register_dataclass(_tree)


def prefill(
    model: Decoder,
    params: Any,
    tokens: Array,
    prompt_lengths: Array,
    answer_lengths: Array,
    shape: Shape,
    outputs: Outputs,
) -> Prefilled:
    """One pass over the prompts and, where `shape.answer` > 0, the forced answers behind them.

    tokens: int32 [B, T], right-padded; prompt_lengths, answer_lengths: int32 [B].
    """
    layout = model.layout
    B, T = tokens.shape
    positions = jnp.broadcast_to(jnp.arange(T, dtype=jnp.int32), (B, T))
    dealt = layout.deal(positions)
    (x, keys_values), variables = model.apply(
        {"params": params}, layout.deal(tokens), dealt, mutable=["intermediates"]
    )

    def whole(value: Array) -> Array:
        """[B, T, D] with each row on one device, its tokens in order."""
        return layout.collect(layout.split_rows(value))

    captures = {
        name: _select(whole(value), model.capture, prompt_lengths, shape)
        for name, value in captured(variables).items()
        if model.capture.in_prefill or shape.answer
    }
    logits = logprobs = cache = None
    if outputs.cache_room:
        cache = filled_cache(layout, keys_values, dealt, prompt_lengths, outputs.cache_room)
    last = (prompt_lengths - 1)[:, None]
    if outputs.logits or shape.answer:
        x = whole(x)
    if outputs.logits:
        logits = layout.split_rows(_logits(model, params, _tokens_at(x, last)[:, 0]))
    if shape.answer:
        steps = jnp.arange(shape.answer)
        targets = jnp.take_along_axis(tokens, jnp.minimum(last + 1 + steps, T - 1), axis=1)
        before = _tokens_at(x, last + steps)
        forced = _forced_logprobs(model, params, before, targets, answer_lengths.max())
        logprobs = layout.split_rows(forced)
    return Prefilled(captures, logits, logprobs, cache)


def decode(
    model: Decoder,
    params: Any,
    cache: Cache,
    logits: Array,
    prompt_lengths: Array,
    sample_keys: Array,
    prompt_slots: int,
    sampling: Sampling,
) -> tuple[Decoded, Cache]:
    """Generates until every row has ended.

    cache, logits: a prefill's, of prompts in `prompt_slots` slots. prompt_lengths: int32 [B];
    sample_keys: uint32 [B], 0 for padding rows. Each step feeds one token a row, so the last token
    of an answer has been through the model too when its states are captured. What a row draws
    depends on its own key and step alone. The cache is returned so that a donated one is updated
    in place.
    """
    layout = model.layout
    keys = jax.vmap(partial(jax.random.fold_in, jax.random.key(0)))(sample_keys)
    loop = _Loop(model, params, prompt_lengths, keys, prompt_slots, sampling)
    state = loop.first(cache, layout.split(logits, "data", "model"), sample_keys != 0)
    state = jax.lax.while_loop(loop.unfinished, loop.step, state)
    result = replace(
        state.result,
        tokens=layout.split_rows(state.result.tokens),
        counts=layout.split_rows(state.result.counts),
        logprobs=layout.split_rows(state.result.logprobs),
    )
    return result, state.cache


@dataclass(frozen=True)
class _Loop:
    """What stays the same from step to step of `decode`, whose parts are the methods.

    keys: [B], a random key a row.
    """

    model: Decoder
    params: Any
    prompt_lengths: Array
    keys: Array
    prompt_slots: int
    sampling: Sampling

    @property
    def names(self) -> tuple[str, ...]:
        """The captures that are kept of generated tokens."""
        return self.model.capture.names if self.model.capture.in_decode else ()

    def first(self, cache: Cache, logits: Array, real: Array) -> DecodeState:
        """Each row's first token, from the logits of its prompt; real: bool [B], no padding row."""
        B, A = len(real), self.sampling.max_tokens
        split_rows = self.model.layout.split_rows
        states = (B, A, self.model.config.hidden_size)
        dtype = jax.tree.leaves(self.params)[0].dtype
        token, logprob = self.choose(logits, jnp.int32(0))
        result = Decoded(
            tokens=jnp.zeros((B, A), jnp.int32).at[:, 0].set(token),
            counts=real.astype(jnp.int32),
            logprobs=jnp.zeros((B, A), jnp.float32).at[:, 0].set(logprob),
            captures={name: split_rows(jnp.zeros(states, dtype)) for name in self.names},
            steps=jnp.int32(0),
        )
        return DecodeState(token, self.to_run(real, token), cache, result)

    def unfinished(self, state: DecodeState) -> Array:
        """Whether a row goes on; bool scalar."""
        last_step = self.sampling.max_tokens - (0 if self.names else 1)
        return (state.result.steps < last_step) & jnp.any(state.active)

    def step(self, state: DecodeState) -> DecodeState:
        """The newest tokens through the model, and the next ones chosen."""
        result, i, split_rows = state.result, state.result.steps, self.model.layout.split_rows
        slots, A = state.cache["positions"].shape[1], self.sampling.max_tokens
        (x, cache), variables = self.model.apply(
            {"params": self.params},
            state.token[:, None],
            (self.prompt_lengths + i)[:, None],
            state.cache,
            self.model.layout.slot(i, self.prompt_slots, slots),
            mutable=["intermediates"],
        )
        token, logprob = self.choose(_logits(self.model, self.params, x[:, 0]), i + 1)
        goes_on = state.active & ~self.ends(state.token) & (i + 1 < A)
        new = captured(variables)
        captures = {
            name: dynamic_update_slice_in_dim(states, split_rows(new[name]), i, axis=1)
            for name, states in result.captures.items()
        }
        j = jnp.minimum(i + 1, A - 1)
        result = Decoded(
            tokens=result.tokens.at[:, j].set(jnp.where(goes_on, token, result.tokens[:, j])),
            counts=result.counts + goes_on,
            logprobs=result.logprobs.at[:, j].set(
                jnp.where(goes_on, logprob, result.logprobs[:, j])
            ),
            captures=captures,
            steps=i + 1,
        )
        return DecodeState(token, self.to_run(goes_on, token), cache, result)

    def choose(self, logits: Array, step: Array) -> tuple[Array, Array]:
        """Token number `step` of every row, int32 [B], and its log-probability at temperature 1,
        float32 [B]; logits: float32 [B, V]."""
        scores = logits
        if self.sampling.temperature:
            keys = jax.vmap(lambda key: jax.random.fold_in(key, step))(self.keys)
            draw = partial(jax.random.gumbel, shape=logits.shape[1:], dtype=jnp.float32)
            scores = logits / self.sampling.temperature + jax.vmap(draw)(keys)
        token = _argmax(scores).astype(jnp.int32)
        return token, _logprob(logits, token)

    def ends(self, token: Array) -> Array:
        return jnp.isin(token, jnp.array(self.sampling.stop_ids, jnp.int32))

    def to_run(self, going_on: Array, token: Array) -> Array:
        """The rows, bool [B], whose newest token has to go through the model: of those that go on,
        all where its states are captured, else those that a next token is wanted of."""
        return going_on if self.names else going_on & ~self.ends(token)


def _forced_logprobs(model: Decoder, params: Any, x: Array, targets: Array, count: Array) -> Array:
    """log p of targets, int32 [B, A], after hidden states x, [B, A, D]; float32 [B, A].

    In chunks of positions, because the logits of all of them would outweigh everything else in
    memory, and only as many as the longest answer, of `count` tokens, needs.
    """
    B, A = targets.shape
    size = max(1, min(A, LOGIT_ROWS * model.layout.mesh.size // B))
    missing = -A % size
    x = jnp.pad(x, ((0, 0), (0, missing), (0, 0)))
    targets = jnp.pad(targets, ((0, 0), (0, missing)))

    def chunk(i: Array, logprobs: Array) -> Array:
        rows = dynamic_slice_in_dim(x, i * size, size, axis=1).reshape(B * size, -1)
        wanted = dynamic_slice_in_dim(targets, i * size, size, axis=1).reshape(-1)
        new = _logprob(_logits(model, params, rows), wanted).reshape(B, size)
        return dynamic_update_slice_in_dim(logprobs, new, i * size, axis=1)

    chunks = (count + size - 1) // size
    return jax.lax.fori_loop(0, chunks, chunk, jnp.zeros(targets.shape, jnp.float32))[:, :A]


def _logprob(logits: Array, token: Array) -> Array:
    """log p of token, int32 [N], under logits [N, V]; the other V - 1 are never normalised."""
    chosen = jnp.take_along_axis(logits, token[:, None], axis=-1)[:, 0]
    return chosen - jax.nn.logsumexp(logits, axis=-1)


def _argmax(x: Array) -> Array:
    """Index of the first maximum of each row: [B, V] -> int32 [B].

    A NaN counts as infinity, as numpy and torch rank it, so that a model which makes NaN still
    chooses an id of its vocabulary; that token's log-probability is NaN. In two reductions, of
    which a mesh that splits V moves a number a row, where `jnp.argmax` moves indices as large
    as x.
    """
    x = jnp.where(jnp.isnan(x), jnp.inf, x)
    index = jax.lax.broadcasted_iota(jnp.int32, x.shape, 1)
    highest = x.max(axis=-1, keepdims=True)
    return jnp.where(x == highest, index, x.shape[-1]).min(axis=-1)


def _logits(model: Decoder, params: Any, x: Array) -> Array:
    return model.apply({"params": params}, x, method=Decoder.logits)


def _tokens_at(x: Array, index: Array) -> Array:
    """Other tokens of each row: x [B, T, D], index int [B, R] -> [B, R, D]; an index behind the end
    gives the last token."""
    return jnp.take_along_axis(x, jnp.minimum(index, x.shape[1] - 1)[..., None], axis=1)


def _select(value: Array, capture: CaptureSpec, prompt_lengths: Array, shape: Shape) -> Array:
    """The rows of a capture that are kept: [B, T, D] -> [B, R, D], R the most that any sample of
    the shape keeps. Behind a sample's own rows are those of tokens that are not kept."""
    start = capture.start(prompt_lengths)
    count = min(len(capture.rows(shape.prompt, shape.answer)), value.shape[1])
    if isinstance(start, int):
        return value[:, start : start + count]
    return _tokens_at(value, start[:, None] + jnp.arange(count))
