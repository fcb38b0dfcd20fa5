"""Prefill, chunk by chunk, and the decode loop. What is captured is captured in these same passes.

A batch has one cache. A pass of prefill takes a chunk of one row of every data group, whichever is
next there, so that long and short prompts cost what they are long; a token's slot is its position.
All rows are decoded together: generated tokens go to the slots behind the longest prompt, one slot
a step, at the position that follows their own prompt; the cache remembers each slot's position.
"""

# B batch   P rows of a pass of prefill, one a data group   C tokens of a chunk
# A answer tokens at most   D model width   V vocabulary

from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from flax import struct
from jax import Array
from jax.lax import dynamic_slice_in_dim, dynamic_update_slice_in_dim

from utils.model.capture import width_of
from utils.model.decoder import Cache, Changes, Decoder, captured, split_cache
from utils.model.layout import INVALID_POSITION

LOGIT_ROWS = 64  # answer positions a device whose vocabulary-wide logits exist at once


@dataclass(frozen=True)
class Shape:
    """What the programs of a batch are compiled for: its rows, the slots of its cache, and the
    tokens of a row that a pass of prefill takes."""

    rows: int
    slots: int
    chunk: int


@dataclass(frozen=True)
class Sampling:
    """How answers are made: of at most `max_tokens` tokens; `stop_ids` end one and belong to it."""

    max_tokens: int
    stop_ids: tuple[int, ...]


@struct.dataclass
class Chunk:
    """Of the rows of a pass of prefill, their tokens in the order of the prompt. captures: name ->
    [P, C, D]; logits: float32 [P, V] at the last prompt token, 0 where it is in another chunk, or
    None; logprobs: float32 [P, C], at each token that of the next, where that is of a forced
    answer, or None."""

    captures: dict[str, Array]
    logits: Array | None
    logprobs: Array | None


@struct.dataclass
class Decoded:
    """tokens: int32 [B, A]; counts: int32 [B], how many of them are real; logprobs: float32
    [B, A]; captures: name -> [B, A, D]; steps: int32, forward passes that were run."""

    tokens: Array
    counts: Array
    logprobs: Array
    captures: dict[str, Array]
    steps: Array


@struct.dataclass
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


def prefill(
    model: Decoder,
    params: Any,
    cache: Cache,
    logits: Array | None,
    tokens: Array,
    next_tokens: Array,
    row: Array,
    start: Array,
    prompt_lengths: Array,
    lengths: Array,
    any_ends: Array,
    changes: Changes,
    forced: bool,
) -> tuple[Chunk, Array | None, Cache]:
    """A chunk of one row of every data group, against what the cache holds of that row, its prompt
    or the forced answer behind it; then the logits of the batch so far, and the cache.

    tokens: int32 [P, C], those of the positions from `start` on, int32 [P], of the rows `row` of
    the data groups, int32 [P]; next_tokens: int32 [P, C], each token's successor. logits: float32
    [B, V] at the last prompt token of the rows whose prompts have ended, or None if nobody wants
    them. prompt_lengths, lengths: int32 [P], without and with the forced answer. any_ends: bool
    scalar, whether a prompt's last token is in its row's chunk. changes: see `Decoder`, tokens in
    the order of the prompt. forced: whether log-probabilities of forced answers are given.
    """
    layout = model.layout
    C = tokens.shape[1]
    positions = start[:, None] + jnp.arange(C, dtype=jnp.int32)

    def dealt(arrays: dict[str, Any] | None) -> dict[str, Any] | None:
        by_token = {"mask", "values"}
        return arrays and {
            name: layout.deal(value) if name in by_token else value
            for name, value in arrays.items()
        }

    (x, cache), variables = model.apply(
        {"params": params},
        layout.deal(tokens),
        layout.deal(positions),
        lengths,
        cache,
        row,
        start,
        tuple(map(dealt, changes)),
        mutable=["intermediates"],
    )

    def whole(value: Array) -> Array:
        """[P, C, D] with each row on one device, its tokens in order."""
        return layout.collect(layout.whole_rows(value))

    captures = {}
    if model.capture.in_prefill or forced:
        captures = {name: whole(value) for name, value in captured(variables).items()}
    new = logprobs = None
    if logits is not None or forced:
        x = whole(x)
    if logits is not None:
        last = positions == prompt_lengths[:, None] - 1
        here = last.any(axis=1)[:, None]

        def at_last(logits: Array) -> tuple[Array, Array]:
            found = _logits(model, params, jnp.sum(jnp.where(last[..., None], x, 0), axis=1))
            before = layout.read_rows(logits, row, len(row), "data", "model")
            found = jnp.where(here, found, before)
            return jnp.where(here, found, 0), layout.write_rows(logits, found, row, "data", "model")

        def nothing(logits: Array) -> tuple[Array, Array]:
            return jnp.zeros((len(row), logits.shape[1]), logits.dtype), logits

        new, logits = jax.lax.cond(any_ends, at_last, nothing, logits)
        new, logits = layout.whole_rows(new), layout.split(logits, "data", "model")
    if forced:
        wanted = (positions >= prompt_lengths[:, None] - 1) & (positions < lengths[:, None] - 1)
        logprobs = layout.whole_rows(_forced_logprobs(model, params, x, next_tokens, wanted))
    return Chunk(captures, new, logprobs), logits, split_cache(layout, cache)


def decode(
    model: Decoder,
    params: Any,
    cache: Cache,
    logits: Array,
    prompt_lengths: Array,
    first_slot: Array,
    sample_keys: Array,
    temperature: Array,
    changes: Changes,
    sampling: Sampling,
) -> tuple[Decoded, Cache]:
    """Generates until every row has ended.

    cache, logits: after a prefill of prompts that end before slot `first_slot`, int32 scalar; what
    the cache holds behind it, of an answer to the same prompts, is forgotten. prompt_lengths: int32
    [B]; sample_keys: uint32 [B], 0 for padding rows. temperature: float32 scalar, 0 is greedy. Each
    step feeds one token a row, so the last token of an answer has been through the model too when
    its states are captured. What a row draws depends on its own key and step alone. changes: see
    `Decoder`; each mask is bool [B, A], of the tokens of the answers.
    """
    layout = model.layout
    keys = jax.vmap(partial(jax.random.fold_in, jax.random.key(0)))(sample_keys)
    loop = _Loop(model, params, prompt_lengths, first_slot, keys, temperature, changes, sampling)
    slots = jnp.arange(cache["positions"].shape[1], dtype=jnp.int32)
    kept = jnp.where(slots < first_slot, cache["positions"], INVALID_POSITION)
    state = loop.first({**cache, "positions": kept}, logits, sample_keys != 0)
    state = jax.lax.while_loop(loop.unfinished, loop.step, state)
    names = "tokens", "counts", "logprobs"  # captures are whole rows already
    whole = {name: layout.whole_rows(getattr(state.result, name)) for name in names}
    return replace(state.result, **whole), split_cache(layout, state.cache)


@dataclass(frozen=True)
class _Loop:
    """What stays the same from step to step of `decode`, whose parts are the methods.

    keys: [B], a random key a row.
    """

    model: Decoder
    params: Any
    prompt_lengths: Array
    first_slot: Array
    keys: Array
    temperature: Array
    changes: Changes
    sampling: Sampling

    @property
    def names(self) -> tuple[str, ...]:
        """The captures that are kept of generated tokens."""
        return self.model.capture.names if self.model.capture.in_decode else ()

    def first(self, cache: Cache, logits: Array, real: Array) -> DecodeState:
        """Each row's first token, from the logits of its prompt; real: bool [B], no padding row."""
        B, A = len(real), self.sampling.max_tokens
        whole_rows = self.model.layout.whole_rows
        sizes = {name: (B, A, width_of(self.model.config, name)) for name in self.names}
        dtype = jax.tree.leaves(self.params)[0].dtype
        token, logprob = self.choose(logits, jnp.int32(0))
        result = Decoded(
            tokens=jnp.zeros((B, A), jnp.int32).at[:, 0].set(token),
            counts=real.astype(jnp.int32),
            logprobs=jnp.zeros((B, A), jnp.float32).at[:, 0].set(logprob),
            captures={name: whole_rows(jnp.zeros(size, dtype)) for name, size in sizes.items()},
            steps=jnp.int32(0),
        )
        return DecodeState(token, self.to_run(real, token), cache, result)

    def unfinished(self, state: DecodeState) -> Array:
        """Whether a row goes on; bool scalar."""
        last_step = self.sampling.max_tokens - (0 if self.names else 1)
        return (state.result.steps < last_step) & jnp.any(state.active)

    def step(self, state: DecodeState) -> DecodeState:
        """The newest tokens through the model, and the next ones chosen."""
        result, i, whole_rows = state.result, state.result.steps, self.model.layout.whole_rows
        A = self.sampling.max_tokens
        (x, cache), variables = self.model.apply(
            {"params": self.params},
            state.token[:, None],
            (self.prompt_lengths + i)[:, None],
            jnp.full_like(self.prompt_lengths, INVALID_POSITION),
            state.cache,
            jnp.zeros(self.model.layout.data, jnp.int32),
            jnp.full(self.model.layout.data, self.first_slot + i),
            tuple(
                arrays and {**arrays, "mask": dynamic_slice_in_dim(arrays["mask"], i, 1, axis=1)}
                for arrays in self.changes
            ),
            mutable=["intermediates"],
        )
        token, logprob = self.choose(_logits(self.model, self.params, x[:, 0]), i + 1)
        goes_on = state.active & ~self.ends(state.token) & (i + 1 < A)
        new = captured(variables)
        captures = {
            name: dynamic_update_slice_in_dim(states, whole_rows(new[name]), i, axis=1)
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

        def drawn(logits: Array) -> Array:
            keys = jax.vmap(lambda key: jax.random.fold_in(key, step))(self.keys)
            draw = partial(jax.random.gumbel, shape=logits.shape[1:], dtype=jnp.float32)
            return logits / self.temperature + jax.vmap(draw)(keys)

        scores = jax.lax.cond(self.temperature > 0, drawn, lambda logits: logits, logits)
        token = _argmax(scores).astype(jnp.int32)
        return token, _logprob(logits, token)

    def ends(self, token: Array) -> Array:
        return jnp.isin(token, jnp.array(self.sampling.stop_ids, jnp.int32))

    def to_run(self, going_on: Array, token: Array) -> Array:
        """The rows, bool [B], whose newest token has to go through the model: of those that go on,
        all where its states are captured, else those that a next token is wanted of."""
        return going_on if self.names else going_on & ~self.ends(token)


def _forced_logprobs(model: Decoder, params: Any, x: Array, targets: Array, wanted: Array) -> Array:
    """log p of targets, int32 [B, C], after hidden states x, [B, C, D]; float32 [B, C], 0 where it
    is not wanted, bool [B, C].

    In parts, because the logits of all tokens would outweigh everything else in memory, and of
    those only the ones that have a wanted token.
    """
    B, C = targets.shape
    size = max(1, min(C, LOGIT_ROWS * model.layout.mesh.size // B))
    missing = [(0, 0), (0, -C % size)]
    x = jnp.pad(x, [*missing, (0, 0)])
    targets, wanted = jnp.pad(targets, missing), jnp.pad(wanted, missing)

    def part(i: Array, logprobs: Array) -> Array:
        rows = dynamic_slice_in_dim(x, i * size, size, axis=1).reshape(B * size, -1)
        tokens = dynamic_slice_in_dim(targets, i * size, size, axis=1).reshape(-1)
        new = _logprob(_logits(model, params, rows), tokens).reshape(B, size)
        return dynamic_update_slice_in_dim(logprobs, new, i * size, axis=1)

    parts = wanted.any(axis=0).reshape(-1, size).any(axis=1)
    first = jnp.argmax(parts)
    stop = jnp.max(jnp.where(parts, jnp.arange(1, len(parts) + 1), 0))
    logprobs = jax.lax.fori_loop(first, stop, part, jnp.zeros(targets.shape, jnp.float32))
    return jnp.where(wanted, logprobs, 0)[:, :C]


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
