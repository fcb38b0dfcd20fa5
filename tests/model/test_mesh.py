"""The same states and answers on every mesh, eight virtual devices against one; and its cache."""

import os
import subprocess
import sys

import jax
import numpy as np
import pytest
from checkpoints import write_random_checkpoint
from conftest import ROOT, TINY
from parity import TOLERANCE, generate, load_engine, prefill, worst_error

from utils.model.layout import make_mesh, use_compilation_cache

MESHES = [(8, 1), (4, 2), (2, 4), (1, 8)]
HEADS = {
    "14 heads, 2 key/value heads": {
        "hidden_size": 56,
        "head_dim": 4,
        "num_attention_heads": 14,
        "num_key_value_heads": 2,
        "intermediate_size": 84,  # neither it nor the vocabulary divides 8
    },
    "heads that divide": {
        "model_type": "llama",
        "num_attention_heads": 16,
        "num_key_value_heads": 8,
        "tie_word_embeddings": False,
    },
}
LENGTHS = [90, 3, 41, 64, 17, 96, 1, 33]


@pytest.fixture(scope="module", params=HEADS)
def checkpoint(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp("heads")
    fields = {**TINY, "vocab_size": 299, "num_hidden_layers": 2, **HEADS[request.param]}
    write_random_checkpoint(folder, fields, seed=3)
    return folder


@pytest.fixture(scope="module")
def prompts():
    rng = np.random.default_rng(0)
    return [rng.integers(1, 299, n).tolist() for n in LENGTHS]


@pytest.fixture(scope="module")
def alone(checkpoint, prompts):
    engine = load_engine(checkpoint)
    return generate(engine, prompts, 96, 13, stops=[7]), prefill(
        engine, [p[:60] for p in prompts], 96, [p[60:] for p in prompts]
    )


@pytest.mark.parametrize("shape", MESHES)
def test_a_mesh_changes_nothing(checkpoint, prompts, alone, shape):
    """Every hook point of every token, generated ones too; tokens; log-probabilities."""
    engine = load_engine(checkpoint, mesh=make_mesh(*shape))
    config, model_axis = engine.model.config, shape[1]
    divide = config.num_heads % model_axis == 0 and config.num_kv_heads % model_axis == 0
    assert divide == (model_axis <= 2 or config.model_type == "llama")
    assert engine.model.layout.by_heads == divide
    (first, decoded), forced = alone
    first_m, decoded_m = generate(engine, prompts, 96, 13, stops=[7])
    assert np.asarray(decoded_m.tokens).tolist() == np.asarray(decoded.tokens).tolist()
    np.testing.assert_array_equal(decoded_m.counts, decoded.counts)
    np.testing.assert_allclose(decoded_m.logprobs, decoded.logprobs, atol=TOLERANCE)
    np.testing.assert_allclose(first_m.logits[:, :299], first.logits, atol=TOLERANCE)
    counts = np.asarray(decoded.counts)
    for name, states in first.captures.items():
        for b, length in enumerate(LENGTHS):
            found = first_m.captures[name][b, :length]
            assert worst_error(found, states[b, :length]) < TOLERANCE, name
            found = decoded_m.captures[name][b, : counts[b]]
            assert worst_error(found, decoded.captures[name][b, : counts[b]]) < TOLERANCE, name
    again = prefill(engine, [p[:60] for p in prompts], 96, [p[60:] for p in prompts])
    for b, prompt in enumerate(prompts):
        n = len(prompt[60:])
        np.testing.assert_allclose(again.logprobs[b, :n], forced.logprobs[b, :n], atol=TOLERANCE)


@pytest.mark.parametrize("family", ["gemma2", "gemma3_text", "qwen3_moe"])
def test_a_mesh_says_what_the_reference_says(family):
    """Norms behind attention and mlp, soft caps and windows, and experts, on 2 x 2 devices."""
    folder = ROOT / "tests" / "golden" / family
    reference = np.load(folder / "reference.npz")
    ids, P = reference["ids"], int(reference["prompt"])
    engine = load_engine(folder, mesh=make_mesh(2, 2, jax.devices()[:4]))
    first, decoded = generate(engine, [ids[:P].tolist(), [5, 6, 7]], 32, len(ids) - P)
    assert np.asarray(decoded.tokens)[0].tolist() == ids[P:].tolist()
    for name in set(reference.files) - {"ids", "prompt", "logits"}:
        found = np.concatenate([first.captures[name][0, :P], decoded.captures[name][0]])
        assert worst_error(found, reference[name]) < TOLERANCE, name


def test_rows_leave_a_mesh_whole_and_each_is_fetched_once(checkpoint, prompts):
    engine = load_engine(checkpoint, mesh=make_mesh(2, 4))
    layout = engine.model.layout
    _, decoded = generate(engine, prompts, 96, 5, on_host=False)
    owned = layout.owned(8)
    assert sorted(row for rows in owned.values() for row in rows) == list(range(8))
    assert {len(rows) for rows in owned.values()} == {1}  # all devices take part
    for value in (*decoded.captures.values(), decoded.tokens, decoded.logprobs):
        for shard in value.addressable_shards:
            rows = range(*shard.index[0].indices(8))
            assert shard.data.shape == (4, *value.shape[1:]) and set(owned[shard.device]) < set(
                rows
            )


COMPILE_TIME = "jax_persistent_cache_min_compile_time_secs"


@pytest.fixture
def cache_settings():
    """JAX's settings of the compilation cache, as they were again after the test."""
    names = (COMPILE_TIME, "jax_compilation_cache_dir")
    before = {name: getattr(jax.config, name) for name in names}
    yield
    for name, value in before.items():
        jax.config.update(name, value)


@pytest.mark.parametrize(("said", "kept"), [(None, 0.5), ("3", 7.0)])
def test_the_user_says_which_programs_are_kept(monkeypatch, cache_settings, said, kept):
    jax.config.update(COMPILE_TIME, 7.0)  # what JAX read from the user's environment when it began
    if said is None:
        monkeypatch.delenv(COMPILE_TIME.upper(), raising=False)
    else:
        monkeypatch.setenv(COMPILE_TIME.upper(), said)
    use_compilation_cache()
    assert getattr(jax.config, COMPILE_TIME) == kept


def test_without_a_home_no_program_is_kept(monkeypatch, cache_settings):
    monkeypatch.delenv("JAX_COMPILATION_CACHE_DIR", raising=False)
    monkeypatch.setattr(os.path, "expanduser", lambda path: path)
    jax.config.update("jax_compilation_cache_dir", None)
    use_compilation_cache()
    assert jax.config.jax_compilation_cache_dir is None


@pytest.mark.parametrize("platforms", ["cuda", "nonsense"])
def test_a_device_that_is_not_to_be_had_is_one_line(platforms):
    code = """
from utils.errors import UserError
from utils.model.layout import find_devices
try:
    find_devices(everywhere=False)
except UserError as error:
    print(error)
"""
    result = subprocess.run(
        [sys.executable, "-c", code],
        cwd=ROOT,
        env={**os.environ, "JAX_PLATFORMS": platforms},
        capture_output=True,
        text=True,
    )
    assert f"JAX finds no device of JAX_PLATFORMS={platforms}" in result.stdout, result.stderr
    assert result.stdout.count("\n") == 1
