"""The estimate that decides the mesh and the rows: its parts by hand, and what follows from it."""

import jax
import pytest

from benchmarks.shapes import LLAMA_3_1_8B, QWEN2_0_5B, QWEN2_5_7B
from utils.model.capture import CaptureSpec
from utils.model.config import ModelConfig
from utils.model.layout import Layout, make_mesh
from utils.plan.memory import Workload, rows_that_fit

GB = 10**9
NAMES = ("resid_post.0", "resid_post.11", "resid_post.23")


def workload(fields, tokens="all", room=400):
    return Workload(ModelConfig.from_dict(fields), CaptureSpec(NAMES, tokens), 1024, room, 2)


def layout(work, data, model):
    return Layout.of(work.config, make_mesh(data, model, jax.devices()))


def test_parameters():
    """494 million of Qwen2-0.5B, 7.6 billion of Qwen2.5-7B, 8.0 of Llama-3.1-8B; bfloat16."""
    for fields, billions in ((QWEN2_0_5B, 0.494), (QWEN2_5_7B, 7.616), (LLAMA_3_1_8B, 8.030)):
        work = workload(fields)
        assert work.parameter_bytes(layout(work, 8, 1)) == pytest.approx(2e9 * billions, rel=2e-3)
        eighth = work.parameter_bytes(layout(work, 1, 8))
        assert eighth == pytest.approx(2e9 * billions / 8, rel=2e-2)


def test_cache():
    """24 layers, keys and values, 2 heads of 64, bfloat16: 12,288 bytes a slot. By tokens every
    device of a group has the whole cache; by heads, its share."""
    work = workload(QWEN2_0_5B)
    assert work.cache_bytes(layout(work, 8, 1), 64, 2048) == 64 // 8 * 2048 * 12288
    assert work.cache_bytes(layout(work, 1, 8), 64, 2048) == 64 * 2048 * 12288
    assert work.cache_bytes(layout(work, 4, 2), 64, 2048) == 64 // 4 * 2048 * 12288 // 2


@pytest.mark.parametrize(
    ("tokens", "room", "slots"),
    [
        ("all", 400, 8 * 400),
        ("all", 0, 1024),
        ("prompt", 400, 1024),
        ("last", 400, 1024),
        ("answer", 400, 8 * 400),
        ("answer", 0, 1024),
    ],
)
def test_captures_of_a_pass(tokens, room, slots):
    """Of a group with 8 rows: a chunk of one, or what all generate, whichever is more."""
    work = workload(QWEN2_0_5B, tokens, room)
    assert work.capture_bytes(layout(work, 8, 1), 64) == slots * 896 * 3 * 2


def test_longer_prompts_have_fewer_rows():
    work = workload(QWEN2_5_7B)
    on = layout(work, 4, 2)
    rows = rows_that_fit(work, on, 16 * 2**30, 64, (512, 8192, 32768))
    found = list(rows.values())
    assert found == sorted(found, reverse=True) and found[0] > found[2] > 0
    for slots, n in zip((512, 8192, 32768), found, strict=True):
        assert n % 4 == 0
        total = work.parameter_bytes(on) + work.batch_bytes(on, n, slots)
        assert total <= 0.9 * 16 * 2**30
    assert rows_that_fit(work, on, None, 64, [8192]) == {8192: 64}
    assert rows_that_fit(work, on, 7 * GB, 64, [512]) == {512: 0}
