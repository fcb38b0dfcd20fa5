"""The decoder against stored references of torch transformers, and its attention by itself."""

import functools
import types
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax._src.cudnn import fused_attention_stablehlo as cudnn
from parity import TOLERANCE, generate, load_engine, log_softmax, prefill, worst_error

from utils.model import attention
from utils.model.attention import (
    INVALID_POSITION,
    Past,
    attend,
    attend_cached,
    rope_frequencies,
)
from utils.model.config import Scores
from utils.model.layout import Layout, single_device_mesh
from utils.model.rope import Rope

GOLDEN = Path(__file__).parents[1] / "golden"
in_one_piece = jax.jit(attend, static_argnames="scores")
in_tiles = jax.jit(attend_cached, static_argnames=("scores", "layout"))
CASES = sorted(path.parent.name for path in GOLDEN.glob("*/reference.npz"))


def test_every_family_has_a_stored_reference():
    families = {name.partition("_")[0] for name in CASES}
    assert families >= {"qwen2", "qwen3", "llama3", "llama", "mistral", "gemma2", "gemma3"}


@pytest.fixture(scope="module", params=CASES)
def stored(request):
    """A stored reference, the names of the states in it, and the engine with its checkpoint."""
    reference = np.load(GOLDEN / request.param / "reference.npz")
    names = set(reference.files) - {"ids", "prompt", "logits"}
    return reference, names, load_engine(GOLDEN / request.param, sorted(names))


def test_stored_reference(stored):
    """Prompt through prefill, answer through decode, beside batch mates and a padding row."""
    reference, names, engine = stored
    ids, P, mate = reference["ids"], int(reference["prompt"]), [5, 6, 7, 8, 9]
    first, decoded = generate(engine, [mate, ids[:P].tolist(), None], 32, len(ids) - P)
    assert decoded.tokens[1].tolist() == ids[P:].tolist()
    assert decoded.counts.tolist() == [len(ids) - P, len(ids) - P, 0]
    assert set(first.captures) == set(decoded.captures) == names
    for name in names:
        found = np.concatenate([first.captures[name][1, :P], decoded.captures[name][1]])
        assert worst_error(found, reference[name]) < TOLERANCE, name
    logprobs = log_softmax(reference["logits"])[np.arange(P - 1, len(ids) - 1), ids[P:]]
    np.testing.assert_allclose(decoded.logprobs[1], logprobs, atol=TOLERANCE)
    np.testing.assert_allclose(
        log_softmax(first.logits[1]), log_softmax(reference["logits"][P - 1]), atol=TOLERANCE
    )


def test_forced_answer(stored):
    """Prompt and answer in one pass say the same as the reference."""
    reference, names, engine = stored
    ids, P = reference["ids"].tolist(), int(reference["prompt"])
    result = prefill(engine, [[4, 5], ids[:P], None], 48, answers=[[6, 7, 8], ids[P:], []])
    for name in names:
        found = result.captures[name][1, : len(ids)]
        assert worst_error(found, reference[name]) < TOLERANCE, name
    expected = log_softmax(reference["logits"])[np.arange(P - 1, len(ids) - 1), ids[P:]]
    np.testing.assert_allclose(result.logprobs[1, : len(ids) - P], expected, atol=TOLERANCE)


def test_bfloat16_follows_float32():
    """bfloat16 has 8 bits: states agree to a few per cent, and are captured in bfloat16."""
    ids = np.load(GOLDEN / "qwen2" / "reference.npz")["ids"].tolist()
    exact = prefill(load_engine(GOLDEN / "qwen2"), [ids], 32)
    rough = prefill(load_engine(GOLDEN / "qwen2", dtype=jnp.bfloat16), [ids], 32)
    errors = []
    for name, value in rough.captures.items():
        assert value.dtype == jnp.bfloat16
        found = value[0, : len(ids)].astype(np.float32)
        errors.append(worst_error(found, exact.captures[name][0, : len(ids)]))
    assert 1e-3 < max(errors) < 0.1


def test_visible_keys():
    """Which keys a query sees, with one-hot values that name the key."""
    T = 5
    positions = jnp.arange(T)[None]
    zeros = jnp.zeros((1, T, 1, T))
    one_hot = jnp.eye(T)[None, None]
    keys = zeros.swapaxes(1, 2)
    causal = attend(zeros, keys, one_hot, positions, positions, Scores(T**-0.5))[0, :, 0] > 0
    windowed = attend(zeros, keys, one_hot, positions, positions, Scores(T**-0.5, 2))[0, :, 0] > 0
    assert causal.astype(int).tolist() == [
        [1, 0, 0, 0, 0],
        [1, 1, 0, 0, 0],
        [1, 1, 1, 0, 0],
        [1, 1, 1, 1, 0],
        [1, 1, 1, 1, 1],
    ]
    assert windowed.astype(int).tolist() == [
        [1, 0, 0, 0, 0],
        [1, 1, 0, 0, 0],
        [0, 1, 1, 0, 0],
        [0, 0, 1, 1, 0],
        [0, 0, 0, 1, 1],
    ]


AT_BORDERS = {(0, 63, 1), (0, 64, 70), (511, 65, None), (511, 65, 70), (9, 1, None), (9, 1, 1)}


def chunks_and_windows():
    """Long chunks with every window; short ones with a few, and with the others among the slow."""
    for start, T in ((0, 63), (0, 64), (0, 300), (511, 65), (700, 300), (9, 1)):
        for window in (None, 1, 70, 1000):
            slow = T < 300 and (start, T, window) not in AT_BORDERS
            yield pytest.param(start, T, window, marks=[pytest.mark.slow] * slow)


@pytest.mark.parametrize(("start", "T", "window"), [*chunks_and_windows()])
def test_tiles_change_nothing(start, T, window):
    """A chunk against rows of a cache in tiles is the plain attention, at and around the borders of
    tiles of queries and of keys, whatever lies in other rows and in slots that nobody sees."""
    rng = np.random.default_rng(T)
    S, end = 1536, start + T
    query = jnp.asarray(rng.standard_normal((2, T, 4, 8)), jnp.float32)
    key, value = rng.standard_normal((2, 2, 2, end, 8)).astype(np.float32)
    at = np.broadcast_to(np.arange(end, dtype=np.int32), (2, end)).copy()
    at[1, :3] = INVALID_POSITION  # the first slots of a row
    query_at = np.broadcast_to(np.arange(start, end, dtype=np.int32), (2, T))
    scores = Scores(0.3, window, softcap=1.5)
    plain = in_one_piece(query, key, value, query_at, at, scores)
    cache = np.full((4, 2, S, 16), np.nan, np.float32)
    cache[1:3, :, :end] = np.concatenate([key, value], axis=-1)
    new = cache[1:3, :, start:end].copy()
    cache[1:3, :, start:end] = cache[2, :, :3] = np.nan
    key_at = np.full((2, S), INVALID_POSITION)
    key_at[:, :end] = at
    past = Past(jnp.asarray(cache), key_at, jnp.array([1]), jnp.array([start]))
    layout = Layout(single_device_mesh(), True)
    tiled, written = in_tiles(query, new, past, query_at, scores, layout)
    np.testing.assert_array_equal(written[1:3, :, start:end], new)
    distance = query_at[..., None] - at[:, None]
    sees = ((distance >= 0) & (distance < (window or S))).any(-1)
    np.testing.assert_allclose(tiled[sees], plain[sees], atol=2e-6)
    np.testing.assert_array_equal(tiled[~sees], 0)
    assert sees.all() == (start > 0)


@pytest.mark.parametrize(
    ("start", "dtype", "high", "tolerance"),
    [(0, "float32", 1, 3e-6), (512, "float32", 1, 3e-6), (777, "bfloat16", 25, 1e-2)],
)
def test_attention_of_a_gpu(start, dtype, high, tolerance, monkeypatch):
    """The two parts that cuDNN is asked for, computed by XLA in its place, make the whole, also of
    scores so high that 16 bits do not tell the logarithms of their sums apart."""
    rng, T, S = np.random.default_rng(0), 300, 1536
    query = jnp.asarray(rng.standard_normal((1, T, 14, 64)), dtype).at[..., 0].set(high)
    cache = jnp.asarray(rng.standard_normal((2, 2, S, 128)), dtype).at[..., 0].set(high)
    cache = cache.at[..., 64].set(np.where(np.arange(S) < start, 1, -1))  # which part a value is of
    new = cache[1:, :, start : start + T]
    at = np.arange(S, dtype=np.int32)[None]
    asked = []

    def by_xla(*arrays, scale, mask_type, return_residual, q_seqlen=None, kv_seqlen=None):
        assert return_residual
        asked.append(mask_type)
        y, log_sum = jax.nn.dot_product_attention(
            *(x.astype(jnp.float32) for x in arrays),
            scale=scale,
            is_causal=mask_type == cudnn.MaskType.CAUSAL,
            query_seq_lengths=q_seqlen,
            key_value_seq_lengths=kv_seqlen,
            return_residual=True,
        )
        return y.astype(dtype), log_sum.swapaxes(1, 2)

    monkeypatch.setattr(cudnn, "dot_product_attention", by_xla)
    in_parts = jax.jit(functools.partial(attention._by_cudnn, scale=0.2))
    found = in_parts(query, new, cache, jnp.int32(1), jnp.array([start]))
    query, cache = query.astype(jnp.float32), cache.astype(jnp.float32)
    key, value = cache[1:, ..., :64], cache[1:, ..., 64:]
    expected = in_one_piece(query, key, value, at[:, start : start + T], at, Scores(0.2))
    np.testing.assert_allclose(found.astype(jnp.float32), expected, atol=tolerance)
    assert found.dtype == dtype and asked == [cudnn.MaskType.PADDING, cudnn.MaskType.CAUSAL]


@pytest.mark.parametrize(
    ("platform", "capability", "has"),
    [("gpu", "8.0", True), ("gpu", "7.5", False), ("gpu", "gfx942", False), ("cpu", None, False)],
)
def test_which_cards_have_fused_attention(platform, capability, has):
    device = types.SimpleNamespace(platform=platform)
    if capability:
        device.compute_capability = capability
    mesh = types.SimpleNamespace(devices=np.array([device], object))
    assert Layout(mesh, True).has_cudnn_attention == has


def test_cudnn_is_asked_for_in_a_program_for_a_gpu(monkeypatch):
    """As far as it can be lowered without one: JAX asks for the library's version only."""
    monkeypatch.setattr(cudnn, "check_cudnn_version", lambda: 91000)
    query = jax.ShapeDtypeStruct((1, 256, 14, 64), jnp.bfloat16)
    new = jax.ShapeDtypeStruct((1, 2, 256, 128), jnp.bfloat16)
    cache = jax.ShapeDtypeStruct((4, 2, 2048, 128), jnp.bfloat16)
    place = jax.ShapeDtypeStruct((), jnp.int32), jax.ShapeDtypeStruct((1,), jnp.int32)
    exported = jax.export.export(
        jax.jit(functools.partial(attention._by_cudnn, scale=0.125)),
        platforms=["cuda"],
        disabled_checks=[
            jax.export.DisabledSafetyCheck.custom_call("__cudnn$fmhaSoftmax"),
            jax.export.DisabledSafetyCheck.custom_call("__cudnn$fmhaSoftmaxBackward"),
        ],
    )(query, new, cache, *place)
    assert exported.mlir_module().count("__cudnn$fmhaSoftmax") == 2


@pytest.mark.parametrize(
    ("rope", "expected"),
    [
        (Rope(10000.0), [1.0, 0.1, 0.01, 0.001]),
        (Rope(10000.0, "linear", factor=4.0), [0.25, 0.025, 0.0025, 0.00025]),
        # wavelengths 6.3, 63, 628 and 6283 of a context of 64: kept, mixed, and divided
        (
            Rope(10000.0, "llama3", factor=8.0, original_max_position_embeddings=64),
            [1.0, 0.1 / 8 + 0.1 * (7 / 8) * (64 * 0.1 / 2 / np.pi - 1) / 3, 0.00125, 0.000125],
        ),
    ],
)
def test_rope_frequencies(rope, expected):
    np.testing.assert_allclose(rope_frequencies(rope, 8), expected, rtol=1e-6)
