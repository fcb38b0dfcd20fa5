"""The estimate that decides the mesh and the rows: its parts by hand, and what follows from it."""

import jax
import pytest

from benchmarks.shapes import LLAMA_3_1_8B, QWEN2_0_5B, QWEN2_5_7B
from utils.errors import UserError
from utils.model.capture import CaptureSpec
from utils.model.config import ModelConfig
from utils.model.layout import Layout, make_mesh, shapes_of
from utils.plan.memory import Workload, first_that_fits, rows_that_fit

GB = 10**9
NAMES = ("resid_post.0", "resid_post.11", "resid_post.23")


def workload(fields, answer=400):
    return Workload(ModelConfig.from_dict(fields), CaptureSpec(NAMES), answer, 2)


def layout(work, data, model):
    return Layout.of(work.config, make_mesh(data, model, jax.devices()))


def test_parameters():
    """494 million of Qwen2-0.5B, 7.6 billion of Qwen2.5-7B, 8.0 of Llama-3.1-8B; bfloat16."""
    for fields, billions in ((QWEN2_0_5B, 0.494), (QWEN2_5_7B, 7.616), (LLAMA_3_1_8B, 8.030)):
        work = workload(fields)
        assert work.parameter_bytes(layout(work, 8, 1)) == pytest.approx(2e9 * billions, rel=2e-3)
        eighth = work.parameter_bytes(layout(work, 1, 8))
        assert eighth == pytest.approx(2e9 * billions / 8, rel=2e-2)


def test_cache_and_captures():
    work = workload(QWEN2_0_5B)
    # 24 layers, keys and values, 2 heads of 64, bfloat16: 12,288 bytes a slot
    assert work.cache_bytes(layout(work, 8, 1), 64, 1600) == 64 // 8 * 2000 * 12288
    assert work.cache_bytes(layout(work, 1, 8), 64, 1600) == 64 * 2000 * 12288 // 8
    assert work.capture_bytes(layout(work, 8, 1), 64, 1600) == 8 * 2000 * 896 * 3 * 2
    assert work.capture_bytes(layout(work, 2, 4), 4, 1600) == 2 * 2000 * 896 * 3 * 2


@pytest.mark.parametrize(
    ("tokens", "generated", "forced"),
    [("all", 1600 + 400, 1600), ("prompt", 1600, 1600), ("answer", 400, 90), ("last", 1, 1)],
)
def test_captures_are_those_of_the_tokens_that_are_kept(tokens, generated, forced):
    """8 rows of 1,600 slots on 8 devices, one row each, and answers that are generated in 400 slots
    more, or of which the longest that is forced takes 90 of the 1,600."""
    config, capture = ModelConfig.from_dict(QWEN2_0_5B), CaptureSpec(("resid_post.0",), tokens)
    for answer, forced_answer, slots in ((400, 0, generated), (0, 90, forced)):
        work = Workload(config, capture, answer, 2, forced_answer)
        assert work.capture_bytes(layout(work, 8, 1), 8, 1600) == slots * 896 * 2


def test_a_run_that_keeps_one_token_has_larger_batches():
    def rows(tokens):
        work = Workload(ModelConfig.from_dict(QWEN2_5_7B), CaptureSpec(NAMES, tokens), 400, 2)
        return rows_that_fit(work, layout(work, 4, 2), 16 * 2**30, 512, [2048])[2048]

    assert rows("last") > rows("all") > 0


def test_the_smallest_model_axis_that_fits():
    def choose(fields, limit):
        work = workload(fields)
        layouts = (layout(work, *shape) for shape in shapes_of(8))
        return first_that_fits(work, layouts, 2048, limit).model

    assert choose(QWEN2_0_5B, 16 * 2**30) == 1
    assert choose(QWEN2_5_7B, 16 * 2**30) == 2
    assert choose(QWEN2_5_7B, 8 * 2**30) == 4
    assert choose(QWEN2_5_7B, None) == 1
    with pytest.raises(UserError, match=r"does not fit on 8 devices of 1\.0 GB: about"):
        choose(QWEN2_5_7B, GB)


def test_longer_prompts_have_fewer_rows():
    work = workload(QWEN2_5_7B)
    on = layout(work, 4, 2)
    rows = rows_that_fit(work, on, 16 * 2**30, 64, (512, 2048, 8192))
    found = list(rows.values())
    assert found == sorted(found, reverse=True) and found[0] > found[2] > 0
    for length, n in zip((512, 2048, 8192), found, strict=True):
        assert n % 4 == 0
        total = work.parameter_bytes(on) + work.batch_bytes(on, n, length)
        assert total <= 0.9 * 16 * 2**30
    assert rows_that_fit(work, on, None, 64, [8192]) == {8192: 64}
    assert rows_that_fit(work, on, 7 * GB, 64, [512]) == {512: 0}
