"""Which layers and hook points a run captures."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import TINY
from hypothesis import given
from hypothesis import strategies as st

import simple_extraction_inference as script
from utils.errors import UserError
from utils.model.capture import TOKEN_POSITIONS, CaptureSpec, resolve_layers
from utils.model.config import ModelConfig
from utils.model.decoder import Decoder, captured
from utils.model.layout import Layout, single_device_mesh

CONFIG = ModelConfig.from_dict(TINY)


@pytest.mark.parametrize(
    ("layers", "expected"),
    [
        (None, [0, 11, 23]),
        (["all"], list(range(24))),
        (["0", "11", "23"], [0, 11, 23]),
        (["-1", "0"], [0, 23]),
        (["23", "-1", "5"], [5, 23]),
    ],
)
def test_layers(layers, expected):
    assert resolve_layers(24, layers) == expected


def test_default_of_a_shallow_model():
    assert resolve_layers(1, None) == [0]
    assert resolve_layers(2, None) == [0, 1]


@pytest.mark.parametrize("layers", [["24"], ["-25"], ["x"], ["all", "3"], ["1.5"]])
def test_layers_that_do_not_exist(layers):
    with pytest.raises(UserError, match=r"layer"):
        resolve_layers(24, layers)


def test_names_go_by_layer_then_along_the_block():
    spec = CaptureSpec.from_flags(CONFIG, ["-1", "0"], ["resid_post", "attn_out"], "all")
    assert spec.names == ("resid_post.0", "attn_out.0", "resid_post.1", "attn_out.1")
    assert spec.last_layer == 1


def test_unknown_hook_point():
    with pytest.raises(UserError, match="resid_mid"):
        CaptureSpec.from_flags(CONFIG, None, ["resid"], "all")
    mixture = replace(CONFIG, num_experts=4)
    with pytest.raises(UserError, match="mlp_act does not exist in a mixture of experts"):
        CaptureSpec.from_flags(mixture, None, ["resid_post", "mlp_act"], "all")


@pytest.mark.parametrize(
    ("positions", "prefill", "decode"),
    [
        ("all", True, True),
        ("prompt", True, False),
        ("answer", False, True),
        ("last", True, False),
        ("cells", True, True),
    ],
)
def test_where_positions_are_captured(positions, prefill, decode):
    spec = CaptureSpec(("resid_post.0",), positions)
    assert (spec.in_prefill, spec.in_decode) == (prefill, decode)
    assert not CaptureSpec((), positions).in_prefill


@pytest.mark.parametrize(
    ("tokens", "alone", "with_answer"),
    [
        ("all", range(0, 5), range(0, 8)),
        ("prompt", range(0, 5), range(0, 5)),
        ("answer", range(5, 5), range(5, 8)),
        ("last", range(4, 5), range(4, 5)),
        ("cells", range(0, 5), range(0, 8)),
    ],
)
def test_which_tokens_are_captured(tokens, alone, with_answer):
    """Of a prompt of five tokens, and of one with an answer of three."""
    spec = CaptureSpec(("resid_post.0",), tokens)
    assert (spec.rows(5, 0), spec.rows(5, 3)) == (alone, with_answer)
    lengths = np.array([5, 9], np.int32)
    starts = np.broadcast_to(spec.start(lengths), (2,))
    assert starts.tolist() == [spec.rows(n, 3).start for n in lengths.tolist()]


# The cells of a prompt of ten tokens and an answer of four: two that share a token, one of two
# tokens, and one of the answer.
SPANS = np.array([[2, 3], [2, 3], [5, 7], [11, 12]])


@pytest.mark.parametrize(
    ("tokens", "expected"),
    [
        ("all", list(range(14))),
        ("prompt", list(range(10))),
        ("answer", [10, 11, 12, 13]),
        ("last", [9]),
        ("cells", [2, 5, 6, 11]),
    ],
)
def test_which_tokens_are_kept(tokens, expected):
    spec = CaptureSpec(("resid_post.0",), tokens)
    kept = spec.kept(10, 4, SPANS, ("task", 0))
    assert kept.dtype == np.int32 and kept.tolist() == expected
    assert spec.num_kept(10, 4, cell_tokens=4) == len(expected)
    assert spec.keeps_all == (tokens == "all")
    assert CaptureSpec((), "cells").kept(10, 4, SPANS[:0], ("task", 0)).tolist() == []


def drawn(count, tokens="all", seed=0, key=("task", 0), answer=4):
    spec = CaptureSpec(("resid_post.0",), tokens, max_rows=count, seed=seed)
    return spec.kept(10, answer, SPANS, key).tolist()


def test_some_tokens_are_drawn_by_seed_and_sample():
    assert drawn(3) == [3, 7, 9]  # for ever: a run may be resumed years later
    for other in ({"seed": 1}, {"key": ("task", 1)}, {"key": ("task", 0, 1)}, {"key": ("t", 0)}):
        assert drawn(3, **other) != [3, 7, 9]
    assert drawn(2, "cells") == [6, 11]
    assert drawn(14) == drawn(99) == list(range(14)) and drawn(9, "last") == [9]
    assert not CaptureSpec((), "all", max_rows=9).keeps_all


@given(st.sampled_from(TOKEN_POSITIONS), st.integers(1, 20), st.integers(), st.integers(0, 9))
def test_a_draw_takes_each_token_once_from_those_that_are_chosen(tokens, count, seed, answer):
    spans = SPANS[: 4 if answer > 2 else 3]
    every = CaptureSpec((), tokens).kept(10, answer, spans, ("a", 0)).tolist()
    spec = CaptureSpec((), tokens, max_rows=count, seed=seed)
    found = spec.kept(10, answer, spans, ("a", 0)).tolist()
    assert found == sorted(set(found)) and set(found) <= set(every)
    holding = len({token for start, stop in spans for token in range(start, stop)})
    assert len(found) == min(count, len(every)) == spec.num_kept(10, answer, holding)


def test_every_token_is_drawn_alike():
    times = np.zeros(14)
    for seed in range(2000):
        times[drawn(7, seed=seed)] += 1
    assert abs(times - 1000).max() < 5 * np.sqrt(2000 / 4)


def test_flags_offer_what_a_model_captures():
    """Each choice of --hook_points and --token_positions is one that the decoder gives."""
    parser = script.build_parser()
    choices = {action.dest: action.choices for action in parser._actions}
    layout = Layout.of(CONFIG, single_device_mesh())
    for tokens in choices["token_positions"]:
        spec = CaptureSpec.from_flags(CONFIG, ["1"], choices["hook_points"], tokens)
        model = Decoder(CONFIG, layout, spec)
        ids = jax.ShapeDtypeStruct((1, 16), jnp.int32)

        def pass_over(ids, model=model):
            return model.init_with_output(jax.random.key(0), ids, ids, mutable=True)[1]

        state = jax.eval_shape(pass_over, ids)
        assert set(captured(state)) == set(spec.names)
        assert spec.in_prefill or spec.in_decode
