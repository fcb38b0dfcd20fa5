"""Rotary embedding and causal grouped-query attention, over prompts and over a cache."""

# B batch   T query tokens   S key tokens   R rows: the queries of one key/value head
# N query heads   K key/value heads   H head width

import itertools
import math

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.sharding import PartitionSpec as P

from utils.model.layout import Layout
from utils.model.rope import Rope

INVALID_POSITION = np.int32(2**30)  # key slots that no query may see
# Prompt attention goes tile by tile within spans of queries.
QUERY_TILE = 64
QUERY_SPANS = 4
SCORE_BYTES = 2**28  # that an accelerator holds at once


def rope_frequencies(rope: Rope, head_dim: int) -> np.ndarray:
    """Inverse wavelengths in radians per token, float32 [H / 2], scaled as `rope.type` says.

    linear: Chen et al. 2023; llama3: the Llama 3.1 release; yarn: Peng et al. 2023. Follows
    `transformers.modeling_rope_utils`, in float32 like it.
    """
    exponents = np.arange(0, head_dim, 2, dtype=np.float32) / np.float32(head_dim)
    frequencies = 1.0 / (np.float32(rope.theta) ** exponents)
    if rope.type == "linear":
        return frequencies / np.float32(rope.factor)
    if rope.type == "llama3":
        turns = rope.original_max_position_embeddings * frequencies / (2 * math.pi)
        smooth = (turns - rope.low_freq_factor) / (rope.high_freq_factor - rope.low_freq_factor)
        smooth = np.clip(smooth, 0, 1)
        return ((1 - smooth) * frequencies / rope.factor + smooth * frequencies).astype(np.float32)
    if rope.type == "yarn":

        def dimension(turns: float) -> float:  # of the pair that turns so often in the context
            length = rope.original_max_position_embeddings
            return head_dim * math.log(length / (turns * 2 * math.pi)) / (2 * math.log(rope.theta))

        low, high = dimension(rope.beta_fast), dimension(rope.beta_slow)
        if rope.truncate:
            low, high = math.floor(low), math.ceil(high)
        low, high = max(low, 0), min(high, head_dim - 1)
        high = high + 0.001 if low == high else high
        ramp = np.clip((np.arange(head_dim // 2, dtype=np.float32) - low) / (high - low), 0, 1)
        return (frequencies / rope.factor * ramp + frequencies * (1 - ramp)).astype(np.float32)
    return frequencies


def rotation(positions: Array, rope: Rope, head_dim: int) -> tuple[Array, Array]:
    """cos and sin, float32 [B, T, 1, H / 2]. positions: int32 [B, T].

    Angles are float32: bfloat16 cannot tell position 257 from 256.
    """
    angles = positions[..., None, None].astype(jnp.float32) * rope_frequencies(rope, head_dim)
    return jnp.cos(angles) * rope.attention_factor, jnp.sin(angles) * rope.attention_factor


def rotate(x: Array, cos_sin: tuple[Array, Array]) -> Array:
    """Rotary position embedding, half-split as in the Hugging Face checkpoints (Su et al. 2021).

    x: [B, T, N, H]; cos_sin: float32 [B, T, 1, H / 2] each. Computed in float32, returned as x's
    dtype.
    """
    cos, sin = cos_sin
    first, second = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    rotated = jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)
    return rotated.astype(x.dtype)


def attend(
    query: Array, key: Array, value: Array, query_at: Array, key_at: Array, window: int | None
) -> Array:
    """Causal grouped-query attention, softmax in float32; [B, T, N, H].

    query: [B, T, N, H]; key, value: [B, K, S, H]; query_at, key_at: positions, int32 [B, T] and
    [B, S]. A query sees the keys at or before its position, with `window` only the last `window` of
    them, itself included. Dividing by the softmax's sum comes after the weighted sum of values: one
    pass over the scores less.
    """
    B, T, N, H = query.shape
    K = key.shape[1]
    distance = query_at[:, :, None] - key_at[:, None, :]
    visible = distance >= 0
    if window is not None:
        visible &= distance < window
    # The G heads of a key/value head become rows of one matrix product.
    rows = query.reshape(B, T, K, N // K, H).swapaxes(1, 2).reshape(B, K, T * N // K, H)
    scores = jnp.einsum("BKRH,BKSH->BKRS", rows, key, preferred_element_type=jnp.float32)
    visible = jnp.repeat(visible, N // K, axis=1)[:, None]
    scores = jnp.where(visible, scores * H**-0.5, -jnp.inf)
    # A padding row may see no key at all: 0 instead of the -inf that would make it NaN.
    highest = jnp.maximum(jnp.max(scores, axis=-1, keepdims=True), jnp.finfo(jnp.float32).min)
    weights = jnp.exp(scores - highest)
    total = jnp.sum(weights, axis=-1, keepdims=True)
    y = jnp.einsum("BKRS,BKSH->BKRH", weights.astype(value.dtype), value)
    y = (y / total).astype(query.dtype)
    return y.reshape(B, K, T, N // K, H).swapaxes(1, 2).reshape(B, T, N, H)


def attend_prompt(
    query: Array, key: Array, value: Array, positions: Array, window: int | None, layout: Layout
) -> Array:
    """`attend` over a prompt that is split over the mesh; [B, T, N, H], split like query.

    positions: int32 [B, T], those of the queries in the order that `Layout.deal` gives.
    """
    T = query.shape[1]
    queries = P(*layout.heads(prompt=True))  # [B, T, N, H]
    keys = P("data", "model") if layout.by_heads else P("data", None, "model")  # [B, K, T, H]
    at = P("data") if layout.by_heads else P("data", "model")  # [B, T]
    spans = _spans(T, layout, window)
    on_cpu = layout.mesh.devices.flat[0].platform == "cpu"
    in_tiles = _in_small_tiles if on_cpu else _in_large_tiles

    def local(query: Array, key: Array, value: Array, at: Array) -> Array:
        if not layout.by_heads:
            key, value = (_gathered(x, layout.stripes(T)) for x in (key, value))
        outputs = []
        for (start, stop), (first, last) in spans:
            keys, values = key[:, :, first:last], value[:, :, first:last]
            key_at = jnp.broadcast_to(jnp.arange(first, last), (len(key), last - first))
            outputs.append(
                in_tiles(query[:, start:stop], keys, values, at[:, start:stop], key_at, window)
            )
        return jnp.concatenate(outputs, axis=1)

    specs = {"in_specs": (queries, keys, keys, at), "out_specs": queries}
    mapped = jax.shard_map(local, mesh=layout.mesh, **specs, check_vma=False)
    return mapped(query, key, value, positions)


def _gathered(x: Array, stripes: int) -> Array:
    """The tokens of all devices in the order of the prompt: [B, K, T / M, H] -> [B, K, T, H]."""
    B, K, _, H = x.shape
    x = jax.lax.all_gather(x, "model")  # [M, B, K, C U, H]
    M = len(x)
    x = x.reshape(M, B, K, stripes, -1, H).transpose(1, 2, 3, 0, 4, 5)
    return x.reshape(B, K, -1, H)


def _spans(T: int, layout: Layout, window: int | None) -> list[tuple[tuple[int, int], ...]]:
    """((start, stop) of the queries that a device holds, (first, last) of the keys they can see).

    More spans leave out more of the keys that lie in the future, and compile longer.
    """
    sharing = 1 if layout.by_heads else layout.model  # devices, in the queries of a span
    span = T // layout.stripes(T)
    if sharing == 1:
        span = QUERY_TILE * math.ceil(T / QUERY_SPANS / QUERY_TILE)
    spans = []
    for start in range(0, T, span):
        stop = min(start + span, T)
        first = 0 if window is None else max(0, start - window + 1)
        spans.append(((start // sharing, stop // sharing), (first, stop)))
    return spans


def _in_large_tiles(
    query: Array, key: Array, value: Array, query_at: Array, key_at: Array, window: int | None
) -> Array:
    """`attend` in as few tiles of queries as their scores fit in memory; not a loop, so that the
    compiler's figures count them all."""
    (B, T, N, _), S = query.shape, key.shape[2]
    tiles = min(T, math.ceil(B * T * N * S * 4 / SCORE_BYTES))
    bounds = [T * i // tiles for i in range(tiles + 1)]
    parts = [
        attend(query[:, i:j], key, value, query_at[:, i:j], key_at, window)
        for i, j in itertools.pairwise(bounds)
    ]
    return jnp.concatenate(parts, axis=1)


def _in_small_tiles(
    query: Array, key: Array, value: Array, query_at: Array, key_at: Array, window: int | None
) -> Array:
    """`attend` in tiles of QUERY_TILE queries, so that scores stay in a CPU's cache."""
    B, T, N, H = query.shape
    size = min(T, QUERY_TILE)
    tiles = math.ceil(T / size)
    missing = tiles * size - T

    def tiled(x: Array) -> Array:
        x = jnp.pad(x, [(0, 0), (0, missing)] + [(0, 0)] * (x.ndim - 2))
        return x.reshape(B, tiles, size, *x.shape[2:]).swapaxes(0, 1)

    y = jax.lax.map(
        lambda tile: attend(tile[0], key, value, tile[1], key_at, window),
        (tiled(query), tiled(query_at)),
    )
    return y.swapaxes(0, 1).reshape(B, -1, N, H)[:, :T]
