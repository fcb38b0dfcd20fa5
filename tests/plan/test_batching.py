"""Buckets and batches: few shapes, little padding, every sample once."""

import json

import numpy as np
import pytest
from conftest import SHARED
from hypothesis import given, settings
from hypothesis import strategies as st

from utils.model.generate import Shape
from utils.plan.batching import (
    ALIGNMENT,
    MAX_SHAPES,
    Batch,
    Length,
    Limits,
    pad_rows,
    padding_share,
    plan_batches,
)

LENGTHS = st.lists(
    st.builds(Length, st.integers(1, 9000), st.integers(0, 1000)), min_size=1, max_size=60
)


@settings(max_examples=60)
@given(LENGTHS, st.integers(1, 9), st.sampled_from([1, 2, 8]), st.sampled_from([1, 12, 32]))
def test_every_sample_once_in_a_bucket_that_holds_it(lengths, batch_size, multiple, alignment):
    limits = Limits(batch_size * multiple, multiple, alignment)
    batches = plan_batches(lengths, limits)
    rows = [i for batch in batches for i in batch.rows]
    assert sorted(i for i in rows if i >= 0) == list(range(len(lengths)))
    assert rows.count(-1) < multiple * len(batches)
    for batch in batches:
        assert len(batch.rows) <= batch_size * multiple
        assert len(batch.rows) % multiple == batch.shape.length % alignment == 0
        for i in (i for i in batch.rows if i >= 0):
            assert lengths[i].total <= batch.shape.length
            assert lengths[i].prompt <= batch.shape.prompt <= batch.shape.length
            assert lengths[i].answer <= batch.shape.answer
    assert len({batch.shape for batch in batches}) <= MAX_SHAPES
    assert [b.shape.length for b in batches] == sorted(
        (b.shape.length for b in batches), reverse=True
    )


@settings(max_examples=30)
@given(st.lists(st.integers(1, 40), min_size=1, max_size=9))
def test_the_cut_is_the_best_one(sizes):
    """No other choice of as many shape lengths computes less; by trying all of them."""
    from itertools import combinations

    lengths = [Length(size * ALIGNMENT) for size in sizes]
    batches = plan_batches(lengths, Limits(1))
    tops = {batch.shape.length for batch in batches}
    distinct = sorted({length.prompt for length in lengths})

    def computed(chosen):
        return sum(min(top for top in chosen if top >= length.prompt) for length in lengths)

    best = min(
        computed(chosen)
        for chosen in combinations(distinct, len(tops))
        if chosen[-1] == distinct[-1]
    )
    assert sum(batch.shape.length for batch in batches) == best


def test_a_small_example():
    lengths = [Length(30, expected=4), Length(500, 20), Length(480), Length(20, expected=9)]
    assert plan_batches(lengths, Limits(2)) == [
        Batch(Shape(528, 512, 32), (1, 2)),
        Batch(Shape(32, 32, 0), (3, 0)),
    ]


def test_long_prompts_have_fewer_rows():
    lengths = [Length(64)] * 30 + [Length(640)] * 7
    batches = plan_batches(lengths, Limits({64: 20, 640: 2}))
    assert [(b.shape.length, len(b.rows)) for b in batches] == [(640, 2)] * 4 + [(64, 15)] * 2
    assert [row for b in batches for row in b.rows].count(-1) == 1


def test_pad_rows():
    padded = pad_rows([np.array([1, 2]), None, np.array([3])], 3)
    assert padded.tolist() == [[1, 2, 0], [0, 0, 0], [3, 0, 0]]
    assert padded.dtype == np.int32


@pytest.fixture(scope="module", params=[False, True], ids=["prompts", "forced"])
def public_lengths(request):
    """Of the 416 test inputs of the 400 ARC-AGI-1 training tasks, Qwen2 tokens."""
    tasks = SHARED / "data" / "arc_agi_1_training_challenges.json"
    if not tasks.exists():
        pytest.skip("the ARC-AGI-1 tasks are not here")
    from utils.arc.tasks import read_solutions, read_tasks, solutions_beside
    from utils.prompt import codec as tokens
    from utils.prompt.formats import load_format

    tokenizer = tokens.load_tokenizer(SHARED / "tokenizers" / "qwen2")
    fmt = load_format("chat", "digits", tokenizer)
    solutions = read_solutions(solutions_beside(tasks))
    lengths = []
    for task in read_tasks(tasks):
        for index in range(len(task.test)):
            prompt = len(tokens.encode_prompt(fmt.render(task, index), tokenizer)[0])
            answer = 0
            if request.param:
                grid = solutions[task.task_id][index]
                answer = len(tokens.encode_answer(fmt, grid, tokenizer)[0])
            lengths.append(Length(prompt, answer))
    assert len(lengths) == sum(map(len, json.loads(solutions_beside(tasks).read_text()).values()))
    return lengths


@pytest.mark.parametrize("batch_size", [1, 8, 16, 64])
@pytest.mark.parametrize("mesh", [(1, 1), (1, 8), (2, 4), (8, 1), (8, 8)], ids=str)
def test_padding_on_the_public_tasks(public_lengths, batch_size, mesh):
    """At most 12 shapes, and 12% padding whatever the batch size; 14% where rows come in eights, of
    which the eight longest of so few prompts differ by half."""
    data, model = mesh
    limits = Limits(batch_size * data * model, data, 4 * model)
    batches = plan_batches(public_lengths, limits)
    assert len({batch.shape for batch in batches}) <= 12
    assert padding_share(public_lengths, batches) <= (0.12 if data < 8 else 0.14)
