"""Rotary embedding, and causal grouped-query attention over a cache, masked by position."""

# B batch   T query tokens   S key tokens   R rows: the queries of one key/value head
# N query heads   K key/value heads   H head width

import math

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct
from jax import Array
from jax.sharding import PartitionSpec as P

from utils.model.config import Scores
from utils.model.layout import INVALID_POSITION, Layout
from utils.model.rope import Rope

Angles = tuple[Array, Array]  # as their cos and sin, float32 [B, T, 1, H / 2]
QUERY_TILE, KEY_TILE = 64, 512  # tokens of a tile of scores, which stays in a CPU's cache
LEAST_KEYS, TILE_BYTES = 64, 2**22  # fewer keys where they and their values would not stay there


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


def rotation(positions: Array, rope: Rope, head_dim: int) -> Angles:
    """Of positions, int32 [B, T]; in float32, since bfloat16 cannot tell position 257 from 256."""
    angles = positions[..., None, None].astype(jnp.float32) * rope_frequencies(rope, head_dim)
    return jnp.cos(angles) * rope.attention_factor, jnp.sin(angles) * rope.attention_factor


def rotate(x: Array, cos_sin: Angles) -> Array:
    """Rotary position embedding, half-split as in the Hugging Face checkpoints (Su et al. 2021).

    x: [B, T, N, H]. Computed in float32, returned as x's dtype.
    """
    cos, sin = cos_sin
    first, second = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    rotated = jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)
    return rotated.astype(x.dtype)


def scored(products: Array, scores: Scores) -> Array:
    """Scores of queries and keys from their products, in any shape."""
    return softcapped(products * scores.scale, scores.softcap)


def softcapped(x: Array, cap: float | None) -> Array:
    """x, bent to stay within plus and minus `cap` (Gemma 2)."""
    return x if cap is None else cap * jnp.tanh(x / cap)


def attend(
    query: Array, key: Array, value: Array, query_at: Array, key_at: Array, scores: Scores
) -> Array:
    """Causal grouped-query attention in one piece, softmax in float32; [B, T, N, H].

    query: [B, T, N, H]; key, value: [B, K, S, H]; query_at, key_at: positions, int32 [B, T] and
    [B, S]. A query sees the keys at or before its position, those within the window of `scores` if
    it has one. For training, which needs gradients, and what `attend_cached` is tested
    against.
    """
    B, T, N, H = query.shape
    K = key.shape[1]
    rows = query.reshape(B, T, K, N // K, H)
    products = jnp.einsum("BTKGH,BKSH->BKGTS", rows, key, preferred_element_type=jnp.float32)
    seen = _sees(query_at, key_at, scores.window)[:, None, None]
    weights = jax.nn.softmax(jnp.where(seen, scored(products, scores), -jnp.inf), axis=-1)
    weights = weights.astype(value.dtype)
    return jnp.einsum("BKGTS,BKSH->BTKGH", weights, value).reshape(B, T, N, H)


@struct.dataclass
class Past:
    """What a pass finds in one layer of the tokens before its own, and where its own go.

    cache: keys and values side by side, [R, K, S, 2 H], split as `Layout.slots` says. key_at: the
    positions in the slots of the rows of this pass, its own tokens included, int32 [B, S];
    INVALID_POSITION in a slot that nobody may see. row, slot: int32 [data], of each data group the
    first row of the cache that the pass concerns, and the slot of its first token there.
    """

    cache: Array
    key_at: Array
    row: Array
    slot: Array


def attend_cached(
    query: Array, new: Array, past: Past, query_at: Array, scores: Scores, layout: Layout
) -> tuple[Array, Array]:
    """`attend` of a chunk of a prompt, or of one generated token a row: [B, T, N, H], split like
    query; and the cache with the new keys and values in it.

    query: [B, T, N, H]; new: keys and values side by side, [B, K, T, 2 H]; query_at: positions,
    int32 [B, T]. What it costs follows the positions that are in the cache, not its size.
    """
    prompt = query.shape[1] > 1
    heads, slots = P(*layout.heads(prompt)), P(*layout.slots)
    at = P("data") if layout.by_heads or not prompt else P("data", "model")  # [B, T]
    # cuDNN takes 16 bits, heads of up to 128 on every card that has it, no window that moves with a
    # chunk, no soft cap, and tokens in the order of the prompt.
    by_cudnn = (
        (layout.has_cudnn_attention and prompt and query.dtype != jnp.float32)
        and (query.shape[3] <= 128 and query.shape[3] % 8 == 0)
        and (scores.window is None or scores.window >= past.cache.shape[2])
        and scores.softcap is None
        and (layout.by_heads or layout.model == 1)
    )
    # By tokens, every device has the whole cache. Each takes its tokens of a chunk over all of it;
    # of a single token, over the device's share of it.
    shared = "model" if not (layout.by_heads or prompt or layout.model == 1) else None

    data = P("data")

    @layout.on_each_device((heads, slots, Past(slots, data, data, data), at), (heads, slots))
    def attended(query: Array, new: Array, past: Past, query_at: Array) -> tuple[Array, Array]:
        row, zero = past.row[0], jnp.int32(0)
        cache = jax.lax.dynamic_update_slice(past.cache, new, (row, zero, past.slot[0], zero))
        given = query, cache, row, query_at, past.key_at, scores
        if layout.platform == "tpu" and prompt:
            # Pallas takes half a second to import, which no other start should wait for.
            from utils.model.flash import flash

            return flash(*given), cache
        if by_cudnn:
            return _by_cudnn(query, new, cache, row, past.slot, scores.scale), cache
        return _in_tiles(*given, shared, layout.platform), cache

    return attended(query, new, past, query_at)


def _by_cudnn(
    query: Array, new: Array, cache: Array, row: Array, slot: Array, scale: float
) -> Array:
    """A chunk of one row against the slots before `slot`, int32 [1], and against itself, each by
    cuDNN's fused attention, joined by the logarithms of their sums (Dao et al. 2022).

    query: [1, T, N, H]; new: [1, K, T, 2 H], which the cache holds already.
    """
    # Not public, so that only programs for a GPU depend on it.
    from jax._src.cudnn import fused_attention_stablehlo as cudnn

    T, H = query.shape[1], query.shape[3]

    def attended(kv: Array, mask: cudnn.MaskType, **lengths: Array) -> tuple[Array, Array]:
        key, value = kv[..., :H].swapaxes(1, 2), kv[..., H:].swapaxes(1, 2)
        # Not by `jax.nn`, which rounds the logarithms to the 16 bits of the query: then the shares
        # of the two parts would be wrong by a hundredth and more.
        y, log_sum = cudnn.dot_product_attention(
            query, key, value, scale=scale, mask_type=mask, return_residual=True, **lengths
        )
        return y, log_sum.swapaxes(1, 2)  # float32 [1, T, N]

    rows = jax.lax.dynamic_slice_in_dim(cache, row, 1, axis=0)
    # At least one key, since a softmax of none is not defined; the first chunk's weighs nothing.
    lengths = {"q_seqlen": jnp.full(1, T, jnp.int32), "kv_seqlen": jnp.maximum(slot, 1)}
    before, sum_before = attended(rows, cudnn.MaskType.PADDING, **lengths)
    sum_before = jnp.where(slot > 0, sum_before, -jnp.inf)
    chunk, sum_chunk = attended(new, cudnn.MaskType.CAUSAL)
    share = jax.nn.sigmoid(sum_chunk - sum_before)[..., None]
    return (chunk * share + jnp.where(share < 1, before, 0) * (1 - share)).astype(query.dtype)


def _sees(query_at: Array, key_at: Array, window: int | None) -> Array:
    """Which keys each query sees: [B, T], [B, S] -> bool [B, T, S]."""
    distance = query_at[:, :, None] - key_at[:, None, :]
    return distance >= 0 if window is None else (distance >= 0) & (distance < window)


def _in_tiles(
    query: Array,
    cache: Array,
    row: Array,
    query_at: Array,
    key_at: Array,
    scores: Scores,
    shared: str | None,
    platform: str,
) -> Array:
    """Tile by tile of queries and keys, in loops of one body (Dao et al. 2022, FlashAttention).

    The rows of the cache are those from `row` on. Tiles of keys that no query of a tile sees are
    left out. shared: the mesh axis whose devices share the tiles of keys.
    """
    (B, T, N, H), (_, K, S, W) = query.shape, cache.shape
    # Never the whole cache: XLA would read it before the loop, and copy it to do so.
    keys = min(S // 2, KEY_TILE)
    if platform == "cpu":
        while keys > LEAST_KEYS and B * K * keys * W * cache.dtype.itemsize > TILE_BYTES:
            keys //= 2
    if S % keys:
        raise ValueError(f"a cache of {S} slots cannot be read in tiles of {keys}")
    size = min(T, QUERY_TILE)
    tiles, blocks, R, zero = math.ceil(T / size), S // keys, size * N // K, jnp.int32(0)
    # Padding queries are at the last token's position.
    query = jnp.pad(query, ((0, 0), (0, tiles * size - T), (0, 0), (0, 0)))
    query_at = jnp.pad(query_at, ((0, 0), (0, tiles * size - T)), "edge")
    # The G heads of a key/value head become rows of one matrix product.
    rows = query.reshape(B, tiles, size, K, N // K, H).transpose(1, 0, 3, 2, 4, 5)
    rows = rows.reshape(tiles, B, K, R, H)
    at = query_at.reshape(B, tiles, size).swapaxes(0, 1)
    lowest, highest = at.min((1, 2))[:, None], at.max((1, 2))[:, None]
    of_block = key_at.reshape(B, blocks, keys)
    seen = of_block.min((0, 2)) <= highest  # [tiles, blocks]
    if scores.window is not None:
        real = jnp.where(of_block < INVALID_POSITION, of_block, -1)
        seen &= real.max((0, 2)) > lowest - scores.window
    first = jnp.argmax(seen, axis=1).astype(jnp.int32)
    stop = jnp.max(jnp.where(seen, jnp.arange(1, blocks + 1, dtype=jnp.int32), 0), axis=1)
    own, step = (jax.lax.axis_index(shared), jax.lax.axis_size(shared)) if shared else (0, 1)

    def tile(operands: tuple[Array, ...]) -> Array:
        rows, at, first, stop = operands

        def block(state: tuple[Array, ...]) -> tuple[Array, ...]:
            j, highest, total, sum_of_values = state
            here = jax.lax.dynamic_slice(cache, (row, zero, j * keys, zero), (B, K, keys, 2 * H))
            here_at = jax.lax.dynamic_slice_in_dim(key_at, j * keys, keys, axis=1)
            products = jnp.einsum(
                "BKRH,BKSH->BKRS", rows, here[..., :H], preferred_element_type=jnp.float32
            )
            sees = jnp.repeat(_sees(at, here_at, scores.window), N // K, axis=1)[:, None]
            masked = jnp.where(sees, scored(products, scores), -jnp.inf)
            new = jnp.maximum(highest, jnp.max(masked, axis=-1, keepdims=True))
            weights, keep = jnp.exp(masked - new), jnp.exp(highest - new)
            total = total * keep + jnp.sum(weights, axis=-1, keepdims=True)
            # A slot that nobody sees may hold anything, and 0 times NaN would be NaN.
            values = jnp.where((here_at < INVALID_POSITION)[:, None, :, None], here[..., H:], 0)
            y = jnp.einsum(
                "BKRS,BKSH->BKRH",
                weights.astype(values.dtype),
                values,
                preferred_element_type=jnp.float32,
            )
            return j + step, new, total, sum_of_values * keep + y

        low = jnp.full((B, K, R, 1), jnp.finfo(jnp.float32).min)
        nothing = jnp.zeros((B, K, R, 1), jnp.float32), jnp.zeros((B, K, R, H), jnp.float32)
        _, highest, total, sum_of_values = jax.lax.while_loop(
            lambda state: state[0] < stop, block, (first + own, low, *nothing)
        )
        if shared:
            new = jax.lax.pmax(highest, shared)
            keep = jnp.exp(highest - new)
            total, sum_of_values = jax.lax.psum((total * keep, sum_of_values * keep), shared)
        # A row that sees no key gets 0 instead of NaN.
        return (sum_of_values / jnp.where(total > 0, total, 1)).astype(query.dtype)

    y = jax.lax.map(tile, (rows, at, first, stop))  # [tiles, B, K, R, H]
    y = y.reshape(tiles, B, K, size, N // K, H).transpose(1, 0, 3, 2, 4, 5)
    return y.reshape(B, tiles * size, N, H)[:, :T]
