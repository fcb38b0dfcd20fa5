"""Which layers and hook points a run captures."""

import pytest
from conftest import TINY

from utils.errors import UserError
from utils.model.capture import CaptureSpec, resolve_layers
from utils.model.config import ModelConfig
from utils.plan.flags import add_capture_flags

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
    assert spec.names == ("resid_post.0", "attn_out.0", "resid_post.3", "attn_out.3")
    assert spec.last_layer == 3


def test_unknown_hook_point():
    with pytest.raises(UserError, match="resid_mid"):
        CaptureSpec.from_flags(CONFIG, None, ["resid"], "all")


@pytest.mark.parametrize(
    ("positions", "prefill", "decode"),
    [("all", True, True), ("prompt", True, False), ("answer", False, True), ("last", True, False)],
)
def test_where_positions_are_captured(positions, prefill, decode):
    spec = CaptureSpec(("resid_post.0",), positions)
    assert (spec.in_prefill, spec.in_decode) == (prefill, decode)
    assert not CaptureSpec((), positions).in_prefill


def test_flags_offer_what_there_is():
    """The names are declared in two places, so that `--help` imports nothing heavy."""
    import argparse

    from utils.model.capture import HOOK_POINTS, TOKEN_POSITIONS

    parser = argparse.ArgumentParser()
    add_capture_flags(parser)
    choices = {action.dest: action.choices for action in parser._actions}
    assert tuple(choices["hook_points"]) == HOOK_POINTS
    assert tuple(choices["token_positions"]) == TOKEN_POSITIONS
