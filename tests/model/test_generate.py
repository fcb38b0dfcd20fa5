"""Prefill and decode: early exit, stops, sampling, capture selection, independence of the batch."""

from dataclasses import replace
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
from utils.model.decoder import Attention
from utils.model.engine import Engine
from utils.model.generate import Sampling, Shape
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


def test_without_capture_the_last_token_is_not_run(batch):
    engine = load_engine(CHECKPOINT, ())
    _, decoded = generate(engine, PROMPTS, 80, 10)
    assert decoded.tokens.tolist() == batch[1].tokens.tolist()
    assert (int(decoded.steps), int(batch[1].steps)) == (9, 10)
    stop = batch[1].tokens.tolist()[0][0]
    _, decoded = generate(engine, PROMPTS[:1], 80, 10, stops=[stop])
    assert (int(decoded.steps), int(decoded.counts[0])) == (0, 1)


def test_padding_rows_generate_nothing(engine, batch):
    _, decoded = generate(engine, [PROMPTS[0], None], 80, 10)
    assert decoded.counts.tolist() == [10, 0]
    assert decoded.tokens[0].tolist() == batch[1].tokens[0].tolist()


def test_sampling_depends_on_its_own_key_alone(engine):
    def draw(prompts, keys, temperature=1.5):
        decoded = generate(engine, prompts, 80, 10, temperature=temperature, keys=keys)[1]
        return decoded.tokens.tolist()

    together = draw(PROMPTS, [11, 12, 13, 14])
    assert draw([PROMPTS[2], PROMPTS[0]], [13, 11]) == [together[2], together[0]]
    assert draw(PROMPTS, [21, 12, 13, 14])[0] != together[0]
    # And on the step: where the logits decide nothing, no token comes at each.
    assert all(len(set(row)) > 7 for row in draw(PROMPTS, [11, 12, 13, 14], 1e6))


def test_sampling_follows_the_distribution(engine):
    """2,000 first tokens against the softmax at that temperature, by total variation."""
    rows, draws, temperature = 40, 50, 2.0
    engine = replace(engine, sampling=Sampling(1, ()), _programs={})
    first = prefill(engine, [[5, 6, 7]] * rows, 16)
    tokens, logprobs, state = [], [], first.state
    for draw in range(draws):  # each from the same prompts
        keys = np.arange(1, rows + 1, dtype=np.uint32) + draw * rows
        prompts = np.full(rows, 3, np.int32)
        decoded, state = engine.decode(state, prompts, keys, temperature, Shape(rows, 256, 32))
        tokens.append(decoded.tokens[:, 0])
        logprobs.append(decoded.logprobs[:, 0])
    tokens, logprobs = np.concatenate(tokens), np.concatenate(logprobs)
    p = np.exp(log_softmax(np.asarray(first.logits[0]) / temperature))
    drawn = np.bincount(tokens, minlength=len(p)) / len(tokens)
    # For independent draws the expectation is about sum(sqrt(2 p (1 - p) / (pi n))) / 2.
    expected = np.sqrt(2 * p * (1 - p) / np.pi / len(tokens)).sum() / 2
    assert np.abs(drawn - p).sum() / 2 < 1.5 * expected
    # log p is that of the model itself, at temperature 1
    model_logprobs = log_softmax(first.logits[0])[tokens]
    np.testing.assert_allclose(logprobs, model_logprobs, atol=TOLERANCE)


@pytest.mark.parametrize(("positions", "parts"), [("prompt", "p"), ("answer", "d"), ("last", "p")])
def test_nothing_is_captured_where_nothing_is_kept(batch, positions, parts):
    chosen = load_engine(CHECKPOINT, ("resid_post.1",), positions)
    chosen.forced = False
    first, decoded = generate(chosen, PROMPTS, 80, 10)
    assert (set(first.captures), set(decoded.captures)) == (
        ({"resid_post.1"}, set()) if parts == "p" else (set(), {"resid_post.1"})
    )
    found, every = (first, batch[0]) if parts == "p" else (decoded, batch[1])
    states = found.captures["resid_post.1"]
    for row, n in enumerate(map(len, PROMPTS) if parts == "p" else [10] * 4):
        expected = every.captures["resid_post.1"][row, :n]
        assert worst_error(states[row, :n], expected) < TOLERANCE


def test_layers_after_the_last_captured_are_not_run(engine):
    """Fewer layers, the same states, a cheaper program."""
    names, ids = ("resid_post.0", "mlp_out.1"), PROMPTS[1]
    short = load_engine(CHECKPOINT, names)
    short.model = short.model.clone(num_layers_run=2)
    short.logits = short.forced = False
    shape, length = Shape(1, 256, 32), np.array([len(ids)], np.int32)
    begin = np.zeros(1, np.int32)
    found, (cache, logits) = short.prefill(
        short.begin(shape), np.array([ids]), [0], begin, length, length, shape
    )
    full = prefill(engine, [ids], len(ids))
    assert logits is None and set(cache) == {"positions", "layers_0", "layers_1"}
    for name in names:
        np.testing.assert_array_equal(found.captures[name][:, : len(ids)], full.captures[name])

    def flops(e):
        return e.program("prefill", shape).cost_analysis()["flops"]

    assert flops(short) < 0.75 * flops(engine)  # two layers of three


def test_programs_do_not_grow_with_the_prompt(engine):
    """As many operations for a cache of 1,024 slots as for one of 16,384."""
    for chunk in (128, 512):
        small, large = (Shape(2, slots, chunk) for slots in (1024, 16384))
        programs = [engine.lower_prefill(shape).as_text().splitlines() for shape in (small, large)]
        assert len(programs[0]) == len(programs[1])


def test_layers_alike_are_traced_once(engine, monkeypatch):
    traced, call = [], Attention.__call__

    def counted(attention, *arguments):
        traced.append(attention.captured)
        return call(attention, *arguments)

    monkeypatch.setattr(Attention, "__call__", counted)
    jax.clear_caches()
    engine.lower_prefill(Shape(2, 1024, 96))
    assert engine.model.config.num_layers == 3 and len(traced) == 1
    spec = replace(engine.model.capture, names=("resid_post.1",))
    replace(engine, model=replace(engine.model, capture=spec)).lower_prefill(Shape(2, 1024, 96))
    assert traced[1:] == [(), ("resid_post",)]


@pytest.mark.usefixtures("optimised")
@pytest.mark.parametrize("slots", [512, pytest.param(1024, marks=pytest.mark.slow)])
def test_no_program_copies_the_cache(engine, slots):
    """What a pass needs besides what it is given does not grow with the rows of the batch."""
    engine, shape = replace(engine, sampling=Sampling(16, (0,))), Shape(128, slots, 192)
    cache = sum(np.prod(spec.shape) * 4 for spec in engine.state(shape)[0].values())
    for program in (engine.program("prefill", shape), engine.program("decode", shape)):
        memory = program.memory_analysis()
        assert memory.alias_size_in_bytes >= cache
        assert memory.temp_size_in_bytes < cache / 3


def test_chunks_change_nothing(engine, batch):
    """Prompts and answers over chunks of other lengths, and in the cache of a former batch."""
    for chunk in (16, 48, 128):
        first, decoded = generate(engine, PROMPTS, 80, 10, chunk=chunk)
        assert decoded.tokens.tolist() == batch[1].tokens.tolist()
        for name, states in batch[0].captures.items():
            for row, prompt in enumerate(PROMPTS):
                P = len(prompt)
                assert worst_error(first.captures[name][row, :P], states[row, :P]) < TOLERANCE
    rows, answers = PROMPTS[::-1], [[3, 4], [], [5], []]
    forced = prefill(engine, rows, 80, answers, used=first.state[0], chunk=128)
    fresh = prefill(engine, rows, 80, answers, chunk=128)
    for name, states in fresh.captures.items():
        for row, prompt in enumerate(rows):
            P = len(prompt)
            np.testing.assert_array_equal(forced.captures[name][row, :P], states[row, :P])
    np.testing.assert_array_equal(forced.logprobs, fresh.logprobs)


def test_a_second_answer_to_the_same_prompts(engine, batch):
    """The answer before it leaves nothing in the cache that the next one sees."""
    first, decoded = generate(engine, PROMPTS, 80, 10, temperature=1.5)
    prompts = np.array([len(prompt) for prompt in PROMPTS], np.int32)
    keys = np.arange(1, 5, dtype=np.uint32)
    again = Engine(engine.model, engine.params, True, True, Sampling(10, ()))
    decoded, _ = again.decode(first.state, prompts, keys, 0.0, Shape(4, 256, 32))
    assert decoded.tokens.tolist() == batch[1].tokens.tolist()


def test_the_highest_logit_of_each_row():
    """The first of equals; a NaN counts as infinity, so that what is chosen is always an id."""
    nan, inf = np.nan, np.inf
    rows = np.array(
        [[1, 3, 3], [-inf, -inf, 0], [0, nan, 9], [nan, nan, nan], [-inf, -inf, -inf]], np.float32
    )
    assert generation._argmax(rows).tolist() == [1, 2, 1, 0, 0]


NAMES = ("model.embed_tokens.weight", "model.norm.weight", "model.layers.1.mlp.up_proj.weight")


@pytest.mark.parametrize("shape", [None, (2, 4)])
def test_a_nan_among_the_weights_gives_no_id_outside_the_vocabulary(tmp_path, shape):
    """On a mesh that pads the vocabulary too; the log-probabilities say that something is wrong."""
    fields = {**TINY, "vocab_size": 299}  # no multiple of 4
    write_random_checkpoint(tmp_path, fields)
    mesh = make_mesh(*shape) if shape else None
    whole, engine = load_file(tmp_path / "model.safetensors"), load_engine(tmp_path, mesh=mesh)
    for name in NAMES:
        broken = whole[name].copy()
        broken.reshape(-1)[7] = np.nan
        save_file({**whole, name: broken}, tmp_path / "model.safetensors")
        engine.params = load_engine(tmp_path, mesh=mesh).params
        for temperature in (0.0, 1.0):
            _, decoded = generate(engine, PROMPTS, 80, 10, temperature=temperature)
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
