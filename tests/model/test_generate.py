"""Prefill and decode: early exit, stops, sampling, capture selection, independence of the batch."""

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from checkpoints import write_random_checkpoint
from conftest import TINY
from parity import TOLERANCE, generate, load_engine, log_softmax, prefill, worst_error
from safetensors.numpy import load_file, save_file

from utils.model import generate as generation
from utils.model.generate import Outputs, Shape
from utils.model.layout import make_mesh

CHECKPOINT = Path(__file__).parents[1] / "golden" / "qwen2"
PROMPTS = [[5, 6, 7], list(range(10, 40)), [9], list(range(50, 120))]


@pytest.fixture(scope="module")
def engine():
    return load_engine(CHECKPOINT)


@pytest.fixture(scope="module")
def batch(engine):
    return generate(engine, PROMPTS, 80, 10)


@pytest.mark.parametrize("row", range(len(PROMPTS)))
def test_batch_mates_and_padding_change_nothing(engine, batch, row):
    prompt = PROMPTS[row]
    alone = generate(engine, [prompt], len(prompt), 10)
    assert alone[1].tokens[0].tolist() == batch[1].tokens[row].tolist()
    for name in engine.model.capture.names:
        found = batch[0].captures[name][row, : len(prompt)]
        assert worst_error(found, alone[0].captures[name][0]) < TOLERANCE
        assert worst_error(batch[1].captures[name][row], alone[1].captures[name][0]) < TOLERANCE
    np.testing.assert_allclose(batch[1].logprobs[row], alone[1].logprobs[0], atol=TOLERANCE)


def test_two_runs_are_equal_to_the_bit(engine, batch):
    again = generate(engine, PROMPTS, 80, 10)
    for one, other in zip(jax.tree.leaves(batch), jax.tree.leaves(again), strict=True):
        np.testing.assert_array_equal(one, other)


def test_states_are_those_of_one_pass_over_all_tokens(engine, batch):
    """What decode captures is what prefill would have, the last token's row included."""
    for row, prompt in enumerate(PROMPTS):
        ids = prompt + batch[1].tokens[row].tolist()
        whole = prefill(engine, [ids], len(ids))
        for name in engine.model.capture.names:
            expected = whole.captures[name][0, len(prompt) :]
            assert worst_error(batch[1].captures[name][row], expected) < TOLERANCE


def test_a_stop_ends_its_row_and_belongs_to_it(engine, batch):
    """Row 0 ends at a token it is known to generate; its mates go on; nothing else changes."""
    free = batch[1].tokens.tolist()
    stop = free[0][4]
    expected = [row.index(stop) + 1 if stop in row else 10 for row in free]
    _, decoded = generate(engine, PROMPTS, 80, 10, stops=[stop])
    assert decoded.counts.tolist() == expected
    for row, n in enumerate(expected):
        assert decoded.tokens[row].tolist() == free[row][:n] + [0] * (10 - n)
        for name in engine.model.capture.names:
            found = decoded.captures[name][row, :n]
            assert worst_error(found, batch[1].captures[name][row, :n]) < TOLERANCE


def test_the_loop_ends_with_the_last_row(engine, batch):
    """Steps are those of the longest answer, not of the room for it."""
    stops = {row[2] for row in batch[1].tokens.tolist()}
    _, decoded = generate(engine, PROMPTS, 80, 10, stops=stops)
    assert int(decoded.steps) == int(decoded.counts.max()) <= 3


def test_without_capture_the_last_token_is_not_run(engine, batch):
    _, decoded = generate(engine, PROMPTS, 80, 10, captures=False)
    assert decoded.tokens.tolist() == batch[1].tokens.tolist()
    assert (int(decoded.steps), int(batch[1].steps)) == (9, 10)
    stop = batch[1].tokens.tolist()[0][0]
    _, decoded = generate(engine, PROMPTS[:1], 80, 10, stops=[stop], captures=False)
    assert (int(decoded.steps), int(decoded.counts[0])) == (0, 1)


def test_padding_rows_generate_nothing(engine, batch):
    _, decoded = generate(engine, [PROMPTS[0], None], 80, 10)
    assert decoded.counts.tolist() == [10, 0]
    assert decoded.tokens[0].tolist() == batch[1].tokens[0].tolist()


def test_sampling_depends_on_its_own_key_alone(engine):
    def draw(prompts, keys):
        return generate(engine, prompts, 80, 10, temperature=1.5, keys=keys)[1].tokens.tolist()

    together = draw(PROMPTS, [11, 12, 13, 14])
    assert draw([PROMPTS[2], PROMPTS[0]], [13, 11]) == [together[2], together[0]]
    assert draw(PROMPTS, [21, 12, 13, 14])[0] != together[0]


def test_sampling_follows_the_distribution(engine):
    """2,000 first tokens against the softmax at that temperature, by total variation."""
    rows, temperature = 2000, 2.0
    first, decoded = generate(
        engine, [[5, 6, 7]] * rows, 16, 1, temperature=temperature, keys=range(1, rows + 1)
    )
    p = np.exp(log_softmax(np.asarray(first.logits[0]) / temperature))
    drawn = np.bincount(np.asarray(decoded.tokens[:, 0]), minlength=len(p)) / rows
    # For independent draws the expectation is about sum(sqrt(2 p (1 - p) / (pi n))) / 2.
    expected = np.sqrt(2 * p * (1 - p) / np.pi / rows).sum() / 2
    assert np.abs(drawn - p).sum() / 2 < 1.5 * expected
    # log p is that of the model itself, at temperature 1
    model_logprobs = log_softmax(first.logits[0])[np.asarray(decoded.tokens[:, 0])]
    np.testing.assert_allclose(decoded.logprobs[:, 0], model_logprobs, atol=TOLERANCE)


@pytest.mark.parametrize("positions", ["prompt", "answer", "last"])
def test_selected_positions(engine, batch, positions):
    """A selection is rows of what `all` captures, chosen before anything leaves the device."""
    names = ("resid_post.1",)
    chosen = load_engine(CHECKPOINT, names, positions)
    first, decoded = generate(chosen, PROMPTS, 80, 10)
    if positions == "answer":
        assert first.captures == {}
        found = decoded.captures["resid_post.1"]
        assert worst_error(found, batch[1].captures["resid_post.1"]) < TOLERANCE
        return
    assert decoded.captures == {}
    every = batch[0].captures["resid_post.1"]
    for row, prompt in enumerate(PROMPTS):
        P = len(prompt)
        expected = every[row, :P] if positions == "prompt" else every[row, P - 1 : P]
        found = first.captures["resid_post.1"][row, : len(expected)]
        assert worst_error(found, expected) < TOLERANCE
    assert first.captures["resid_post.1"].shape[1] == {"prompt": 80, "last": 1}[positions]


def test_layers_after_the_last_captured_are_not_run(engine):
    """Fewer layers, the same states, a cheaper program."""
    names = ("resid_post.0", "mlp_out.1")
    short = load_engine(CHECKPOINT, names)
    short.model = short.model.clone(num_layers_run=2)
    ids = PROMPTS[1]
    tokens, lengths = np.array([ids], np.int32), np.array([len(ids)], np.int32)
    none = np.zeros(1, np.int32)
    static = (Shape(len(ids), len(ids), 0), Outputs(logits=False))
    found = short.prefill(tokens, lengths, none, *static)
    full = prefill(engine, [ids], len(ids))
    assert found.logits is None
    for name in names:
        np.testing.assert_array_equal(found.captures[name], full.captures[name])

    def flops(e):
        return e.prefill_program(1, *static).cost_analysis()["flops"]

    assert flops(short) < 0.75 * flops(engine)  # two layers of three


def test_the_highest_logit_of_each_row():
    """The first of equals; a NaN counts as infinity, so that what is chosen is always an id."""
    nan, inf = np.nan, np.inf
    rows = np.array(
        [[1, 3, 3], [-inf, -inf, 0], [0, nan, 9], [nan, nan, nan], [-inf, -inf, -inf]], np.float32
    )
    assert generation._argmax(rows).tolist() == [1, 2, 1, 0, 0]


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize(
    "name", ["model.embed_tokens.weight", "model.norm.weight", "model.layers.1.mlp.up_proj.weight"]
)
def test_a_nan_among_the_weights_gives_no_id_outside_the_vocabulary(tmp_path, name, temperature):
    """On a mesh that pads the vocabulary too; the log-probabilities say that something is wrong."""
    fields = {**TINY, "vocab_size": 299}  # no multiple of 4
    write_random_checkpoint(tmp_path, fields)
    tensors = load_file(tmp_path / "model.safetensors")
    tensors[name] = tensors[name].copy()
    tensors[name].reshape(-1)[7] = np.nan
    save_file(tensors, tmp_path / "model.safetensors")
    for mesh in (None, make_mesh(2, 4)):
        broken = load_engine(tmp_path, mesh=mesh)
        _, decoded = generate(broken, PROMPTS, 80, 10, temperature=temperature)
        tokens, counts = np.asarray(decoded.tokens), np.asarray(decoded.counts)
        assert tokens.min() >= 0 and tokens.max() < 299
        for row, count in enumerate(counts):
            assert np.isnan(decoded.logprobs[row, :count]).all()


def test_64_bits_in_jax_change_nothing(batch):
    """JAX_ENABLE_X64=1, which another program on the machine may need."""
    sampled = generate(load_engine(CHECKPOINT), PROMPTS, 80, 10, temperature=1.5)
    with jax.enable_x64(True):
        assert jnp.arange(1).dtype == jnp.int64
        engine = load_engine(CHECKPOINT)
        wide = [generate(engine, PROMPTS, 80, 10, temperature=t) for t in (0.0, 1.5)]
        for one, other in zip(
            jax.tree.leaves([batch, sampled]), jax.tree.leaves(wide), strict=True
        ):
            assert one.dtype == other.dtype
            np.testing.assert_array_equal(one, other)
        prefill(engine, PROMPTS[:2], 80, [[3, 4], [5]])
