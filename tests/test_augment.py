"""Views of tasks and back again."""

import json
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from test_prompts import grids, tasks
from test_tokens import format_named, tokenizer_named

from utils.arc import Pair, Task
from utils.augment import View, original_cells, views
from utils.encodings import COLORS
from utils.prompts import GRID_ENCODINGS, PROMPT_FORMATS
from utils.tokens import encode, encode_answer

GRID = [[1, 2, 3], [4, 5, 6]]
SYMMETRIES = [  # of GRID, turned counter-clockwise; the second four of its transpose
    [[1, 2, 3], [4, 5, 6]],
    [[3, 6], [2, 5], [1, 4]],
    [[6, 5, 4], [3, 2, 1]],
    [[4, 1], [5, 2], [6, 3]],
    [[1, 4], [2, 5], [3, 6]],
    [[4, 5, 6], [1, 2, 3]],
    [[6, 3], [5, 2], [4, 1]],
    [[3, 2, 1], [6, 5, 4]],
]
SAME, SWAPPED = tuple(range(10)), (0, 2, 1, *range(3, 10))
TASK = Task("t", tuple(Pair([[k]], [[k, k]]) for k in (1, 2, 3)), (Pair([[1, 0]], [[2], [0]]),))


@st.composite
def any_view(draw, pairs):
    order = tuple(draw(st.permutations(range(pairs))))
    return View(7, draw(st.integers(0, 7)), (0, *draw(st.permutations(range(1, 10)))), order)


# -------------------------------------------------------------------------------------- views


@pytest.mark.parametrize("dihedral", range(8))
def test_the_eight_symmetries(dihedral):
    view = View(1, dihedral, SAME, (0,))
    assert view.show(GRID) == SYMMETRIES[dihedral]
    assert view.invert(SYMMETRIES[dihedral]) == GRID
    assert view.show([[5] * 3]) in ([[5] * 3], [[5]] * 3)


@given(grids(), any_view(2))
def test_what_is_shown_comes_back(grid, view):
    shown = view.show(grid)
    assert view.invert(shown) == grid and view.show(view.invert(grid)) == grid
    assert {type(cell) for row in shown for cell in row} == {int}
    assert View.from_dict(json.loads(json.dumps(view.to_dict()))) == view


def test_a_task_in_a_view():
    """A quarter turn, blue and red swapped, the last pair first."""
    assert View(1, 1, SWAPPED, (2, 0, 1)).show_task(TASK) == Task(
        "t",
        (Pair([[3]], [[3], [3]]), Pair([[2]], [[2], [2]]), Pair([[1]], [[1], [1]])),
        (Pair([[0], [2]], [[1, 0]]),),
    )
    unknown = replace(TASK, test=(Pair([[1, 0]], None),))
    assert View(1, 2, SAME, (0, 1, 2)).show_task(unknown).test == (Pair([[0, 1]], None),)


@given(st.integers(1, 30), st.integers(0, 5), st.integers(0, 3))
def test_views_of_a_task(number, seed, pairs):
    task = replace(TASK, train=TASK.train[:pairs])
    found = views(task, number, seed)
    assert found[0] == View(0, 0, SAME, tuple(range(pairs)))
    assert found[0].show_task(task) == task
    assert [view.number for view in found] == list(range(number))
    assert len({(v.dihedral, v.colors, v.pair_order) for v in found}) == number
    for start in range(0, number, 8):
        eight = [view.dihedral for view in found[start : start + 8]]
        assert len(set(eight)) == len(eight)
    for view in found:
        assert view.colors[0] == 0 and sorted(view.colors) == list(range(10))
        assert sorted(view.pair_order) == list(range(pairs))
    assert views(task, 31, seed)[:number] == found  # nor do the first depend on how many follow


def test_eight_views_hold_every_symmetry():
    assert sorted(view.dihedral for view in views(TASK, 8, 0)) == list(range(8))
    assert sorted(view.dihedral for view in views(TASK, 24, 0)) == sorted([*range(8)] * 3)


def test_views_depend_on_seed_and_task_id():
    one, other = views(TASK, 9, 0), views(replace(TASK, task_id="u"), 9, 0)
    assert one != other and one != views(TASK, 9, 1)
    assert views(replace(TASK, test=TASK.test * 2), 9, 0) == one
    assert len({view.pair_order for view in one}) > 2 and len({v.colors for v in one}) == 9


def test_the_draws_are_those_of_every_python():
    """Of another draw a resumed run would mix two sets of views."""
    assert views(TASK, 3, 0)[1:] == [
        View(1, 5, (0, 7, 2, 4, 5, 3, 9, 1, 8, 6), (0, 2, 1)),
        View(2, 3, (0, 3, 5, 8, 4, 9, 1, 7, 2, 6), (1, 0, 2)),
    ]


# ------------------------------------------------------------------------------ cells


def check_cells(cells, original, task, sample_idx, view, kept):
    """cells_original in the plainest words: every cell of the original once, and its tokens."""
    found = set()
    for shown, (pair, role, row, col, color, *tokens) in zip(cells, original.tolist(), strict=True):
        of = task.test[sample_idx] if pair == -1 else task.train[pair]
        assert (of.output if role else of.input)[row][col] == color
        assert shown[4] == view.colors[color]
        assert shown[1] == role and shown[5:].tolist() == tokens
        assert (shown[0] == -1) == (pair == -1)
        assert pair == -1 or kept[shown[0]] == pair
        found.add((pair, role, row, col))
    assert len(found) == len(original)
    return found


def places(grid, pair, role):
    return {(pair, role, row, col) for row in range(len(grid)) for col in range(len(grid[0]))}


@pytest.mark.parametrize("tokenizer_name", ["character", "merging", "word"])
@pytest.mark.parametrize("encoding", GRID_ENCODINGS)
@pytest.mark.parametrize("name", PROMPT_FORMATS)
def test_cells_speak_of_the_original_task(name, encoding, tokenizer_name):
    tokenizer = tokenizer_named(tokenizer_name)
    fmt = format_named(name, encoding, tokenizer_name)
    glyphs = COLORS if encoding == "words" else "0123456789"

    @settings(max_examples=12, deadline=None)
    @given(st.data())
    def check(data):
        task, target = data.draw(tasks()), data.draw(grids(st.integers(1, 6)))
        task = replace(task, test=(Pair(task.test[0].input, target),))
        view = data.draw(any_view(len(task.train)))
        dropped = data.draw(st.integers(0, len(task.train) - 1))
        kept = view.pair_order[dropped:]
        prompt = fmt.render(view.show_task(task), 0, len(kept))
        ids, cells = encode(prompt, tokenizer)
        answer, answer_cells = encode_answer(fmt, view.show(target), tokenizer, len(ids))
        ids, cells = np.concatenate([ids, answer]), np.concatenate([cells, answer_cells])
        original = original_cells(cells, view, dropped)
        assert original.dtype == np.int32
        found = check_cells(cells, original, task, 0, view, kept)
        expected = places(task.test[0].input, -1, 0) | places(target, -1, 1)
        for i in kept:
            expected |= places(task.train[i].input, i, 0) | places(task.train[i].output, i, 1)
        assert found == expected
        for *_, color, start, stop in original[:: max(1, len(original) // 20)].tolist():
            said = tokenizer.decode(ids[start:stop])
            assert glyphs[view.colors[color]].lower() in said.lower()

    check()


def test_no_cells():
    none = np.zeros((0, 7), np.int32)
    assert original_cells(none, View(1, 3, SWAPPED, (0, 1)), 0).shape == (0, 7)


def test_cells_of_a_quarter_turn():
    """[[1, 2]] shown as [[1], [2]] (blue and red swapped), the second pair of two, the other left
    out."""
    view = View(1, 1, SWAPPED, (1, 0))
    assert view.show([[1, 2]]) == [[1], [2]]
    cells = np.array([[0, 0, 0, 0, 1, 4, 5], [0, 0, 1, 0, 2, 6, 7], [-1, 0, 0, 0, 3, 9, 10]])
    assert original_cells(cells.astype(np.int32), view, 1).tolist() == [
        [0, 0, 0, 1, 2, 4, 5],
        [0, 0, 0, 0, 1, 6, 7],
        [-1, 0, 0, 0, 3, 9, 10],
    ]
