"""The decoder against torch transformers: stored references, and live where torch is there."""

from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest
from parity import TOLERANCE, generate, load_engine, log_softmax, prefill, worst_error

from utils.model import attention
from utils.model.attention import attend, attend_prompt, rope_frequencies
from utils.model.layout import Layout, single_device_mesh
from utils.model.rope import Rope

GOLDEN = Path(__file__).parents[1] / "golden"
CASES = sorted(path.parent.name for path in GOLDEN.glob("*/reference.npz"))


def test_every_family_has_a_stored_reference():
    families = {name.partition("_")[0] for name in CASES}
    assert families >= {"qwen2", "qwen3", "llama3", "llama", "mistral"}


@pytest.mark.parametrize("case", CASES)
def test_stored_reference(case):
    """Prompt through prefill, answer through decode, beside batch mates and a padding row."""
    reference = np.load(GOLDEN / case / "reference.npz")
    ids, P = reference["ids"], int(reference["prompt"])
    mate = [5, 6, 7, 8, 9]
    first, decoded = generate(
        load_engine(GOLDEN / case), [mate, ids[:P].tolist(), None], 32, len(ids) - P
    )
    assert decoded.tokens[1].tolist() == ids[P:].tolist()
    assert decoded.counts.tolist() == [len(ids) - P, len(ids) - P, 0]
    names = set(reference.files) - {"ids", "prompt", "logits"}
    assert set(first.captures) == set(decoded.captures) == names
    for name in names:
        found = np.concatenate([first.captures[name][1, :P], decoded.captures[name][1]])
        assert worst_error(found, reference[name]) < TOLERANCE, name
    logprobs = log_softmax(reference["logits"])[np.arange(P - 1, len(ids) - 1), ids[P:]]
    np.testing.assert_allclose(decoded.logprobs[1], logprobs, atol=TOLERANCE)
    np.testing.assert_allclose(
        log_softmax(first.logits[1]), log_softmax(reference["logits"][P - 1]), atol=TOLERANCE
    )


@pytest.mark.parametrize("case", CASES)
def test_forced_answer(case):
    """Prompt and answer in one pass say the same as the reference."""
    reference = np.load(GOLDEN / case / "reference.npz")
    ids, P = reference["ids"].tolist(), int(reference["prompt"])
    engine = load_engine(GOLDEN / case)
    result = prefill(engine, [[4, 5], ids[:P]], 48, answers=[[6, 7, 8], ids[P:]])
    for name in set(reference.files) - {"ids", "prompt", "logits"}:
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
    causal = attend(zeros, keys, one_hot, positions, positions, None)[0, :, 0] > 0
    windowed = attend(zeros, keys, one_hot, positions, positions, 2)[0, :, 0] > 0
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
@pytest.mark.parametrize("T", [1, 63, 64, 65, 300])
def test_tiles_change_nothing(T, window, monkeypatch):
    """The tiled prompt attention is the plain one, at and around the borders of its tiles."""
    rng = np.random.default_rng(T)
    query = jnp.asarray(rng.standard_normal((2, T, 4, 8)), jnp.float32)
    key, value = (jnp.asarray(rng.standard_normal((2, 2, T, 8)), jnp.float32) for _ in range(2))
    positions = jnp.broadcast_to(jnp.arange(T), (2, T))
    plain = attend(query, key, value, positions, positions, window)
    tiled = attend_prompt(query, key, value, positions, window, Layout(single_device_mesh(), True))
    np.testing.assert_allclose(tiled, plain, atol=2e-6)
    monkeypatch.setattr(attention, "SCORE_BYTES", 2 * 4 * T * 4 * 17)  # 17 queries a tile
    large = attention._in_large_tiles(query, key, value, positions, positions, window)
    np.testing.assert_allclose(large, plain, atol=2e-6)


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
