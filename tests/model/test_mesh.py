"""The same states and answers on every mesh: eight virtual devices against one."""

import numpy as np
import pytest
from conftest import TINY
from parity import TOLERANCE, generate, load_engine, prefill, worst_error

from utils.model.mesh import make_mesh
from utils.model.weights import write_random_checkpoint

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
    assert engine.model.layout.by_heads == (shape[1] < 4 or "llama" in str(engine.model))
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


def test_states_leave_a_mesh_with_each_row_on_one_device(checkpoint, prompts):
    engine = load_engine(checkpoint, mesh=make_mesh(2, 4))
    first, decoded = generate(engine, prompts, 96, 5)
    for value in (*first.captures.values(), *decoded.captures.values(), decoded.tokens):
        blocks = {str(shard.index) for shard in value.addressable_shards}
        assert len(blocks) == 8 and {shard.data.shape[0] for shard in value.addressable_shards} == {
            1
        }
        assert all(shard.data.shape[1:] == value.shape[1:] for shard in value.addressable_shards)
    half, _ = generate(engine, prompts[:4], 96, 5)  # too few rows for eight devices
    for value in half.captures.values():
        firsts = [shard for shard in value.addressable_shards if shard.replica_id == 0]
        assert len(firsts) == 2 and {shard.data.shape[0] for shard in firsts} == {2}
