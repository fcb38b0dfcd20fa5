"""Batches and passes: few sizes of cache, little that is computed in vain, every chunk once."""

import json
from collections import defaultdict

import numpy as np
import pytest
from conftest import SHARED
from hypothesis import given, settings
from hypothesis import strategies as st

from utils.model.generate import Shape
from utils.plan.batching import (
    MAX_CACHES,
    SLOT_UNIT,
    Batch,
    Length,
    cache_slots,
    chunk_tokens,
    pad_rows,
    padding_share,
    plan_batches,
    prefill_passes,
)

LENGTHS = st.lists(
    st.builds(Length, st.integers(1, 30000), st.integers(0, 1000), st.integers(0, 900)),
    min_size=1,
    max_size=60,
)


def always(rows):
    """So many, whatever the slots of a cache."""
    return defaultdict(lambda: rows)


@settings(max_examples=60)
@given(LENGTHS, st.integers(1, 9), st.sampled_from([1, 2, 8]), st.sampled_from([256, 2048, 96]))
def test_every_chunk_of_every_sample_once(lengths, batch_size, data, chunk):
    """Each sample in one batch whose cache holds it; its chunks in order, and all of them."""
    batches = plan_batches(lengths, chunk, always(batch_size * data), 400, data)
    rows = [i for batch in batches for i in batch.rows]
    assert sorted(i for i in rows if i >= 0) == list(range(len(lengths)))
    assert len({batch.shape for batch in batches}) <= MAX_CACHES
    slots = [batch.shape.slots for batch in batches]
    assert slots == sorted(slots, reverse=True) and not any(n % SLOT_UNIT for n in slots)
    for batch in batches:
        assert len(batch.rows) == batch.shape.rows <= batch_size * data
        assert batch.shape.rows % data == 0 and batch.shape.chunk == chunk
        longest = max(lengths[i].prompt for i in batch.rows if i >= 0)
        assert longest + 400 <= batch.shape.slots
        done: dict[int, list[int]] = {}
        for passed in prefill_passes(batch, lengths, data):
            assert len(passed) == data
            for group, (place, number) in enumerate(passed):
                assert place * data // batch.shape.rows == group
                assert (number + 1) * chunk <= batch.shape.slots
                if done.get(place, [-1])[-1] != number:  # else what it did last, again
                    done.setdefault(place, []).append(number)
        for place, i in enumerate(batch.rows):
            if i >= 0:
                assert done[place] == list(range(-(-lengths[i].total // chunk)))


def test_a_small_example():
    """Two data groups, chunks of 256 tokens: five chunks in one, three in the other."""
    lengths = [Length(300), Length(1000), Length(200), Length(20)]
    (batch,) = plan_batches(lengths, 256, always(6), 100, 2)
    assert batch == Batch(Shape(4, 1536, 256), (1, 3, 0, 2))
    assert prefill_passes(batch, lengths, 2) == [
        [(0, 0), (2, 0)],
        [(0, 1), (2, 1)],
        [(0, 2), (3, 0)],
        [(0, 3), (3, 0)],
        [(1, 0), (3, 0)],
    ]


def test_a_group_without_a_sample_runs_padding():
    batch = Batch(Shape(4, 512, 256), (1, 0, -1, -1))
    passes = prefill_passes(batch, [Length(300), Length(20)], 2)
    assert passes == [[(0, 0), (2, 0)], [(1, 0), (2, 0)], [(1, 1), (2, 0)]]


def test_answers_of_like_length_go_together():
    lengths = [Length(500, expected=e) for e in (9, 1, 8, 2)]
    batches = plan_batches(lengths, 256, always(2), 100)
    assert [set(batch.rows) for batch in batches] == [{3, 1}, {0, 2}]


def test_the_first_sample_is_the_shortest_of_the_largest_cache():
    lengths = [Length(n) for n in (700, 5000, 8000, 600, 900, 7000)]
    batches = plan_batches(lengths, 512, {8192: 1, 1024: 2})
    rows = [{i for i in batch.rows if i >= 0} for batch in batches]
    assert rows == [{1}, {5}, {2}, {3, 0}, {4}]


@pytest.mark.parametrize(
    ("length", "chunk", "room", "slots"),
    [
        (Length(1), 256, 0, 512),
        (Length(512), 256, 0, 512),
        (Length(513), 256, 0, 1024),
        (Length(500), 256, 100, 1024),  # answers begin behind the prompt, not behind its chunks
        (Length(410), 256, 100, 512),
        (Length(400, 200), 256, 0, 1024),
        (Length(1100), 2048, 0, 2048),
    ],
)
def test_slots_of_a_cache(length, chunk, room, slots):
    assert cache_slots(length, chunk, room) == slots


def test_chunks_suit_the_prompts():
    """Long ones take the largest, short ones less padding; a multiple of what the mesh asks."""
    assert chunk_tokens([30000] * 9, on_cpu=False) == 2048
    assert chunk_tokens([400] * 9, on_cpu=False) == 512
    assert chunk_tokens([697] * 4, on_cpu=True) == 704
    assert chunk_tokens([9000], on_cpu=True) == 1024
    assert chunk_tokens([30000], on_cpu=False, alignment=12) == 2052


def test_caches_of_several_sizes_where_that_saves_batches():
    """Of memory for 8,192 slots, the short prompts fill batches of eight."""
    lengths = [Length(8000)] * 2 + [Length(1000)] * 30 + [Length(3000)]
    rows = {n: 8192 // n for n in range(512, 8193, 512)}
    batches = plan_batches(lengths, 512, rows)
    # The one of 3,000 tokens saves no batch in a cache of its own.
    sizes = [(batch.shape.slots, batch.shape.rows) for batch in batches]
    assert sizes == [(8192, 1)] * 3 + [(1024, 8)] * 4
    assert {b.shape.slots for b in plan_batches(lengths, 512, always(4))} == {8192}


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


@pytest.mark.parametrize("batch_size", [1, 8, 64])
@pytest.mark.parametrize("mesh", [(1, 1), (1, 8), (2, 4), (8, 1)], ids=str)
def test_padding_on_the_public_tasks(public_lengths, batch_size, mesh):
    """One size of cache; short prompts beside long ones cost what they are long."""
    data, model = mesh
    for on_cpu, most in ((True, 0.20), (False, 0.23)):
        chunk = chunk_tokens([length.total for length in public_lengths], on_cpu, 4 * model)
        rows = always(batch_size * data * model)
        batches = plan_batches(public_lengths, chunk, rows, 1100, data)
        assert len({batch.shape for batch in batches}) == 1
        assert padding_share(public_lengths, batches, data) <= most
