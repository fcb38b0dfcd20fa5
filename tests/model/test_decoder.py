"""The decoder against torch transformers: stored references, and live where torch is there."""

import functools
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from parity import TOLERANCE, generate, load_engine, log_softmax, prefill, worst_error

from utils.model import attention
from utils.model.attention import (
    INVALID_POSITION,
    Past,
    attend,
    attend_cached,
    rope_frequencies,
)
from utils.model.capture import CaptureSpec
from utils.model.config import Scores
from utils.model.layout import Layout, single_device_mesh
from utils.model.rope import Rope

GOLDEN = Path(__file__).parents[1] / "golden"
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


@pytest.mark.parametrize("case", CASES)
def test_live_reference(case, tmp_path):
    """Other weights and a longer prompt than the stored ones, in several files on disk."""
    pytest.importorskip("torch", reason="torch is not installed: requirements-torch.txt")
    import reference
    import torch

    config, dtype = reference.CASES[case]
    model = reference.random_model(config, dtype, seed=7)
    reference.save(model, tmp_path, dtype, max_shard_size="20KB")
    prompt = np.random.default_rng(3).integers(3, config.vocab_size, 150)
    with torch.no_grad():
        ids = model.generate(
            torch.tensor(prompt)[None],
            attention_mask=torch.ones(1, len(prompt), dtype=torch.long),
            max_new_tokens=12,
            do_sample=False,
            eos_token_id=None,
            pad_token_id=0,
        )[0].numpy()
    states, logits = reference.hidden_states(model, ids)
    first, decoded = generate(load_engine(tmp_path), [prompt.tolist()], 160, 12)
    assert decoded.tokens[0].tolist() == ids[150:].tolist()
    for name, expected in states.items():
        found = np.concatenate([first.captures[name][0, :150], decoded.captures[name][0]])
        assert worst_error(found, expected) < TOLERANCE, name
    expected = log_softmax(logits)[np.arange(149, 161), ids[150:]]
    np.testing.assert_allclose(decoded.logprobs[0], expected, atol=TOLERANCE)


def test_the_text_model_of_one_of_text_and_images(tmp_path):
    """As the larger models of Gemma 3 are saved, with a vision tower that nobody reads."""
    pytest.importorskip("torch", reason="torch is not installed: requirements-torch.txt")
    import reference
    import torch
    import transformers

    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "image_size": 28}
    config = transformers.Gemma3Config(
        text_config=reference.CASES["gemma3_text"][0].to_dict(),
        vision_config={**sizes, "num_attention_heads": 2, "model_type": "siglip_vision_model"},
        mm_tokens_per_image=4,
    )
    model = transformers.Gemma3ForConditionalGeneration(config).eval()
    model.save_pretrained(tmp_path)
    ids = np.random.default_rng(2).integers(3, 150, 40).tolist()
    with torch.no_grad():
        expected = model(torch.tensor(ids)[None]).logits[0, -1].numpy()
    found = prefill(load_engine(tmp_path, ["resid_post.0"]), [ids], 40)
    np.testing.assert_allclose(
        log_softmax(found.logits[0, :160]), log_softmax(expected), atol=TOLERANCE
    )


@pytest.mark.parametrize("case", ["llama3", "qwen2_sliding_yarn"])
def test_a_prompt_of_nine_thousand_tokens(case, tmp_path):
    """In chunks of 1,024, with a full and with a sliding window, and an answer behind it."""
    pytest.importorskip("torch", reason="torch is not installed: requirements-torch.txt")
    import copy

    import reference

    config, length = copy.deepcopy(reference.CASES[case][0]), 9000
    config.max_position_embeddings = 16384
    if case == "qwen2_sliding_yarn":
        config.sliding_window = 3000
    model = reference.random_model(config, seed=5)
    reference.save(model, tmp_path)
    ids = np.random.default_rng(1).integers(3, config.vocab_size, length).tolist()
    states, logits = reference.hidden_states(model, ids)
    engine = load_engine(tmp_path)
    # The first layers' states, and the last one's after all the attention.
    names = [f"{point}.{i}" for i in (1, 2) for point in ("attn_out", "resid_post")]
    engine.model = engine.model.clone(capture=CaptureSpec(tuple(names)))
    result = prefill(engine, [ids[:-20]], length, [ids[-20:]], chunk=1024, slots=9216)
    for name in names:
        assert worst_error(result.captures[name][0], states[name]) < TOLERANCE, name
    expected = log_softmax(logits)[np.arange(length - 21, length - 1), ids[-20:]]
    np.testing.assert_allclose(result.logprobs[0], expected, atol=TOLERANCE)


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


@pytest.mark.parametrize("window", [None, 1, 70, 1000])
@pytest.mark.parametrize(
    ("start", "T"), [(0, 63), (0, 64), (0, 300), (511, 65), (700, 300), (9, 1)]
)
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
    plain = attend(query, key, value, query_at, at, scores)
    cache = np.full((4, 2, S, 16), np.nan, np.float32)
    cache[1:3, :, :end] = np.concatenate([key, value], axis=-1)
    new = cache[1:3, :, start:end].copy()
    cache[1:3, :, start:end] = cache[2, :, :3] = np.nan
    key_at = np.full((2, S), INVALID_POSITION)
    key_at[:, :end] = at
    past = Past(jnp.asarray(cache), key_at, jnp.array([1]), jnp.array([start]))
    layout = Layout(single_device_mesh(), True)
    tiled, written = attend_cached(query, jnp.asarray(new), past, query_at, scores, layout)
    np.testing.assert_array_equal(written[1:3, :, start:end], new)
    distance = query_at[..., None] - at[:, None]
    sees = ((distance >= 0) & (distance < (window or S))).any(-1)
    np.testing.assert_allclose(tiled[sees], plain[sees], atol=2e-6)
    np.testing.assert_array_equal(tiled[~sees], 0)
    assert sees.all() == (start > 0)


@pytest.mark.parametrize("start", [0, 512, 777])
def test_attention_of_a_gpu(start, monkeypatch):
    """The two parts that cuDNN is asked for, computed by XLA in its place, make the whole."""
    rng, T, S = np.random.default_rng(0), 300, 1536
    query = jnp.asarray(rng.standard_normal((1, T, 14, 64)), jnp.float32)
    cache = jnp.asarray(rng.standard_normal((2, 2, S, 128)), jnp.float32)
    new = cache[1:, :, start : start + T]
    at = np.arange(S, dtype=np.int32)[None]
    asked = []

    def by_xla(*arrays, implementation, **masks):
        asked.append((implementation, set(masks)))
        return original(*arrays, **masks)

    original = jax.nn.dot_product_attention
    monkeypatch.setattr(jax.nn, "dot_product_attention", by_xla)
    found = attention._by_cudnn(query, new, cache, jnp.int32(1), jnp.array([start]), 0.2)
    key, value = cache[1:, ..., :64], cache[1:, ..., 64:]
    expected = attend(query, key, value, at[:, start : start + T], at, Scores(0.2))
    np.testing.assert_allclose(found, expected, atol=2e-6)
    assert asked == [
        ("cudnn", {"scale", "return_residual", "key_value_seq_lengths"}),
        ("cudnn", {"scale", "return_residual", "is_causal"}),
    ]


def test_cudnn_is_asked_for_in_a_program_for_a_gpu(monkeypatch):
    """As far as it can be lowered without one: JAX asks for the library's version only."""
    from jax._src.cudnn import fused_attention_stablehlo

    monkeypatch.setattr(fused_attention_stablehlo, "check_cudnn_version", lambda: 91000)
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
