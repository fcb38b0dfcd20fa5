"""Attention on a TPU: a Pallas kernel that masks by position, for prompts and chunks alike.

Blocks of queries pass over blocks of keys with a running maximum and sum (Dao et al. 2022). Which
blocks meet follows from the lowest and highest position of each: keys that no query of a block sees
are neither fetched nor computed, and blocks of which every query sees every key need no mask. So
the time taken follows the context that there is, not the size of the cache, and it makes no
difference where a chunk of a prompt begins or how its tokens were dealt over devices.
"""

# B batch   T query tokens   S key tokens   N query heads   K key/value heads   G = N // K
# H head width   W lanes of a sum   Q, C queries and keys of a block   R = G * Q rows of a product

import functools

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from utils.model.config import Scores
from utils.model.layout import INVALID_POSITION

LANES = 128  # of a vector register
SUBLANES = 16  # rows of a register of bfloat16; those of float32, 8, divide it
KEY_BLOCK = 512
# Rows times bytes of an item. With more, the scores of a block of keys exceed the 16 MiB that a
# kernel may use on v4 and v5e.
ROW_BYTES = 3584


def flash(
    query: Array,
    kv: Array,
    row: Array | int,
    query_at: Array,
    key_at: Array,
    scores: Scores,
    *,
    interpret: bool = False,
) -> Array:
    """Causal grouped-query attention, softmax in float32; [B, T, N, H] in query's dtype.

    query: [B, T, N, H]; kv: [., K, S, 2H], each key followed by its value, so that heads of width
    64 fill the 128 lanes of a register instead of being padded to them, of whose rows those from
    `row` on, int32 scalar, are meant; query_at, key_at: positions, int32 [B, T] and [B, S], in any
    order, though neighbours should be near each other for blocks to be skipped. Keys at
    INVALID_POSITION are seen by nobody. A query sees the keys at or before its position, those
    within the window of `scores` if it has one; one that sees none gives 0. What a key or value
    holds that a query does not see, NaN included, does not reach it; one that is not finite and is
    seen makes the query's row not finite.

    bfloat16 is multiplied as it is, float32 to full precision. With `interpret`, runs on a CPU.
    """
    (B, T, N, H), (K, S) = query.shape, kv.shape[1:3]
    G = N // K
    Q, C = block_sizes(G, T, S, query.dtype.itemsize)
    # The arrays themselves are not padded: beyond their ends a block holds anything.
    query_at = jnp.pad(query_at, ((0, 0), (0, -T % Q)), "edge")
    query_at = jnp.minimum(query_at, INVALID_POSITION - 1)
    key_at = jnp.pad(key_at, ((0, 0), (0, -S % C)), constant_values=INVALID_POSITION)
    queries, keys = _blocks(query_at.reshape(B, -1, Q), key_at.reshape(B, -1, C), scores.window)
    steps = jnp.max(queries[1] - queries[0]) + 1

    # Where both fit into the lanes, keys are summed with the values, at no cost, and cut off at the
    # end: to move the values to the first lane in each step would take longer.
    W = 2 * H if 2 * H <= LANES else H

    def heads(b, k, i, j, *_):
        return b, k, 0, i, 0

    def cache(b, k, i, j, row, queries, keys):
        return row[0] + b, k, _key_block(queries, b, i, j), 0

    def rows(width):
        return pltpu.VMEM((G * Q, width), jnp.float32)

    y = pl.pallas_call(
        functools.partial(_kernel, scores),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=3,
            grid=(B, K, pl.cdiv(T, Q), steps),
            in_specs=[
                pl.BlockSpec((1, 1, G, Q, H), heads),
                pl.BlockSpec((1, 1, C, 2 * H), cache),
                pl.BlockSpec((1, Q, LANES), lambda b, k, i, j, *_: (b, i, 0)),
                pl.BlockSpec((1, 1, C), lambda *at: (at[0], 0, cache(*at)[2])),
            ],
            out_specs=pl.BlockSpec((1, 1, G, Q, H), heads),
            scratch_shapes=[rows(LANES), rows(LANES), rows(W)],
        ),
        out_shape=jax.ShapeDtypeStruct((B, K, G, T, H), query.dtype),
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "parallel", "parallel", "arbitrary")
        ),
        cost_estimate=cost(B, N, K, T, S, H, query.dtype.itemsize, scores),
        interpret=interpret,
        name="flash",
    )(
        jnp.asarray(row, jnp.int32).reshape(1),
        queries,
        keys,
        query.reshape(B, T, K, G, H).transpose(0, 2, 3, 1, 4),
        kv,
        jnp.broadcast_to(query_at[:, :, None], (*query_at.shape, LANES)),
        key_at[:, None],
    )
    return y.transpose(0, 3, 1, 2, 4).reshape(B, T, N, H)


def cost(
    B: int, N: int, K: int, T: int, S: int, H: int, itemsize: int, scores: Scores
) -> pl.CostEstimate:
    """What `flash` states to the compiler, whose cost analysis counts no kernel by itself.

    Exact, but for the keys that are masked within a block, where T = S. A chunk of T queries stands
    for an average one of the S / T that fill the cache, since where it begins is not known.
    """
    seen = min(scores.window or S, S)  # by the last query
    count = B * N * T * (seen * S - seen * (seen - 1) // 2) // S
    Q, _ = block_sizes(N // K, T, S, itemsize)
    fetched = count * K // N // Q  # keys, which a block of queries fetches once for a group
    return pl.CostEstimate(
        flops=4 * count * H,
        transcendentals=count if scores.softcap is None else 2 * count,
        bytes_accessed=2 * itemsize * H * (B * N * T + fetched),
    )


def block_sizes(G: int, T: int, S: int, itemsize: int) -> tuple[int, int]:
    """Queries and keys of a block; chunks and caches that are powers of two are filled."""
    most = 1 << (ROW_BYTES // itemsize // G).bit_length() - 1
    blocks = pl.cdiv(T, max(most, SUBLANES))
    return _whole(pl.cdiv(T, blocks), SUBLANES), min(KEY_BLOCK, _whole(S, LANES))


def _whole(size: int, unit: int) -> int:
    return pl.cdiv(size, unit) * unit


def _visible(q_low, q_high, k_low, k_high, window: int | None):
    """Whether any of the queries at [q_low, q_high] may see any of the keys at [k_low, k_high], and
    whether each of them sees each of those."""
    some, each = k_low <= q_high, k_high <= q_low
    if window is not None:
        some &= k_high > q_low - window
        each &= k_low > q_high - window
    return some, each


def _blocks(query_at: Array, key_at: Array, window: int | None) -> tuple[Array, Array]:
    """What the kernel knows of blocks before it fetches them.

    query_at: int32 [B, T / Q, Q]; key_at: int32 [B, S / C, C] -> int32 [4, B, T / Q]: first and
    last block of keys to pass over, lowest and highest position; int32 [2, B, S / C]: lowest and
    highest position. Nothing here grows with T * S: the scalar memory of a core is 1 MiB.
    """
    low, high = query_at.min(-1), query_at.max(-1)
    keys = jnp.stack([key_at.min(-1), key_at.max(-1)])
    some, _ = _visible(low[..., None], high[..., None], *keys[:, :, None], window)
    first = jnp.argmax(some, axis=-1).astype(jnp.int32)
    last = jnp.max(jnp.where(some, jnp.arange(some.shape[-1], dtype=jnp.int32), 0), axis=-1)
    return jnp.stack([first, last, low, high]), keys


def _key_block(queries, b, i, j):
    """The block of keys in step j; after the last one it stays, and nothing is fetched."""
    return jnp.minimum(queries[0, b, i] + j, queries[1, b, i])


def _kernel(
    scores, _, queries, keys, q_ref, kv_ref, q_at_ref, k_at_ref, y_ref, max_ref, total_ref, sum_ref
):
    """Step j of query block i: q_ref [1, 1, G, Q, H] against kv_ref [1, 1, C, 2H].

    queries, keys: as `_blocks` gives them. Between the steps of a block of queries max_ref and
    total_ref, float32 [R, LANES], hold the maximum of the scores and the sum of the weights, the
    same in each lane; sum_ref, float32 [R, W], the weighted sum of values.
    """
    b, i, j = pl.program_id(0), pl.program_id(2), pl.program_id(3)
    (G, Q, H), C, W = q_ref.shape[2:], kv_ref.shape[2], sum_ref.shape[1]
    # A process may have set another default, which bfloat16 does not take.
    exact = q_ref.dtype == jnp.float32
    precision = lax.Precision.HIGHEST if exact else lax.Precision.DEFAULT

    def product(a, b, axis):  # sums over the last axis of a and `axis` of b
        over = (((1,), (axis,)), ((), ()))
        return lax.dot_general(a, b, over, precision, preferred_element_type=jnp.float32)

    @pl.when(j == 0)
    def _():
        # Finite, so that a row that has seen nothing yet is not -inf - -inf.
        max_ref[...] = jnp.full_like(max_ref, jnp.finfo(jnp.float32).min)
        total_ref[...] = jnp.zeros_like(total_ref)
        sum_ref[...] = jnp.zeros_like(sum_ref)

    def step(masked: bool):
        key, value, scale = kv_ref[0, 0, :, :H], kv_ref[0, 0, :, -W:], scores.scale
        if masked:
            # A weight of 0 does not keep a NaN or inf away. So 0 takes its place among the values,
            # and whoever sees it has a score that is NaN.
            wide = value.astype(jnp.float32)
            sound = jnp.abs(wide) < jnp.inf
            value = jnp.where(sound, wide, 0).astype(value.dtype)
            spoilt = jnp.where(sound, 0, jnp.nan).astype(value.dtype)
            scale += product(jnp.ones((SUBLANES, W), value.dtype), spoilt, 1)[:1]
        found = product(q_ref[0, 0].reshape(G * Q, H), key, 1) * scale
        if scores.softcap is not None:
            found = scores.softcap * jnp.tanh(found / scores.softcap)
        if masked:
            q_at, k_at = jnp.tile(q_at_ref[0], (1, C // LANES)), k_at_ref[0]
            visible, _ = _visible(q_at, q_at, k_at, k_at, scores.window)
            found = jnp.where(visible, found.reshape(G, Q, C), -jnp.inf).reshape(G * Q, C)
        before = max_ref[...]
        highest = jnp.maximum(before, jnp.max(found, axis=-1, keepdims=True))
        weights = jnp.exp(found - _lanes(highest, C))
        fade = jnp.exp(before - highest)
        max_ref[...] = highest
        total_ref[...] = fade * total_ref[...] + jnp.sum(weights, axis=-1, keepdims=True)
        y = product(weights.astype(value.dtype), value, 0)
        sum_ref[...] = _lanes(fade, W) * sum_ref[...] + y

    at = _key_block(queries, b, i, j)
    some, each = _visible(
        queries[2, b, i], queries[3, b, i], keys[0, b, at], keys[1, b, at], scores.window
    )
    some &= queries[0, b, i] + j <= queries[1, b, i]
    pl.when(some & each)(lambda: step(masked=False))
    pl.when(some & jnp.logical_not(each))(lambda: step(masked=True))

    @pl.when(j == pl.num_programs(3) - 1)
    def _():
        total = total_ref[...]
        share = _lanes(jnp.where(total == 0, 0, 1 / total), W)
        y_ref[0, 0] = (sum_ref[...] * share)[:, -H:].astype(y_ref.dtype).reshape(G, Q, H)


def _lanes(x: Array, width: int) -> Array:
    """[R, LANES], the same in each lane -> [R, width]."""
    return jnp.tile(x, (1, pl.cdiv(width, LANES)))[:, :width]
