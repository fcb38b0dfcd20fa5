"""The generated tasks: solved by their own source, new with every seed, closed under symmetry."""

import json
from collections import Counter

import numpy as np
import pytest
from conftest import ROOT, run_script

from examples.generate_tasks import FAMILIES, draw_composed, draw_row, draw_rows, family_of
from utils.arc.rows import to_task


@pytest.mark.parametrize("name", FAMILIES)
def test_the_source_of_a_row_solves_its_pairs(name):
    for seed in range(20):
        row = draw_row(FAMILIES[name], (seed,))
        assert family_of(row) == name and len(row["examples"]) == 4
        program: dict = {}
        exec(row["source"], program)
        for given, wanted in row["examples"]:
            assert program["main"](np.array(given)).tolist() == wanted != given
        task, errors = to_task(row, "examples")
        assert not errors and len(task.train) == 3


def test_composed_rows_follow_both_rules():
    rows = list(draw_composed(24, 1))
    assert rows == list(draw_composed(24, 1)) and rows != list(draw_composed(24, 2))
    names = [family_of(row).split(", ") for row in rows]
    assert len(set(map(tuple, names))) == 12 and all(len(name) == 2 for name in names)
    for row in rows:
        program: dict = {}
        exec(row["source"], program)
        for given, wanted in row["examples"]:
            assert program["main"](np.array(given)).tolist() == wanted != given
        assert " Then: " in row["source"].splitlines()[1]


LITERAL = {  # family, parameters, input, output, what its description says
    "recolor": (
        {"old": 2, "new": 7},
        [[2, 1], [0, 2]],
        [[7, 1], [0, 7]],
        "red cell becomes orange",
    ),
    "swap": ({"first": 1, "second": 3}, [[1, 3, 4]], [[3, 1, 4]], "Blue and green"),
    "keep": ({"color": 4}, [[4, 1], [2, 4]], [[4, 0], [0, 4]], "yellow cells stay"),
    "flip": ({"axis": 1}, [[1, 2, 3]], [[3, 2, 1]], "left to right"),
    "rotate": ({"turns": 1}, [[1, 2], [3, 4]], [[3, 1], [4, 2]], "clockwise by 90"),
    "transpose": ({"anti": 1}, [[1, 2], [3, 4]], [[4, 2], [3, 1]], "other diagonal"),
    "tile": ({"down": 1, "across": 2}, [[1, 2]], [[1, 2, 1, 2]], "1 down by 2 across"),
    "upscale": ({"factor": 2}, [[1, 2]], [[1, 1, 2, 2]] * 2, "square of side 2"),
    "mirror": ({"axis": 1, "before": 1}, [[1, 2]], [[2, 1, 1, 2]], "to the left"),
    "crop": ({}, [[0, 0, 0], [0, 1, 2]], [[1, 2]], "cut out"),
    "fill": (
        {"color": 5},
        [[1, 1, 1, 0], [1, 0, 1, 0], [1, 1, 1, 0]],
        [[1, 1, 1, 0], [1, 5, 1, 0], [1, 1, 1, 0]],
        "filled with gray",
    ),
    "gravity": ({"turns": 1}, [[0, 1, 0, 2]], [[1, 2, 0, 0]], "to the left"),
    "connect": ({}, [[3, 0, 0, 3]], [[3, 3, 3, 3]], "straight line"),
    "outline": (
        {"color": 6},
        [[0, 0, 0], [0, 1, 0], [0, 0, 0]],
        [[6, 6, 6], [6, 1, 6], [6, 6, 6]],
        "pink border",
    ),
    "count": ({"across": 0}, [[0, 2], [2, 0]], [[2], [2]], "down"),
    "frame": ({"color": 8}, [[1, 1, 1]] * 3, [[8, 8, 8], [8, 1, 8], [8, 8, 8]], "purple"),
}


def test_every_family_has_a_literal_case():
    assert LITERAL.keys() == FAMILIES.keys() and len(FAMILIES) >= 12


@pytest.mark.parametrize("name", LITERAL)
def test_a_rule_does_what_its_description_says(name):
    parameters, given, wanted, words = LITERAL[name]
    family = FAMILIES[name]
    assert family.rule(np.array(given), **parameters).tolist() == wanted
    assert words in family.about(parameters)


def test_directions_are_those_of_the_words():
    column = np.array([[1], [0], [0]])
    gravity = FAMILIES["gravity"]
    for turns, (grid, end) in enumerate(
        [(column, (2, 0)), (column[::-1].T, (0, 0)), (column[::-1], (0, 0)), (column.T, (0, 2))]
    ):
        assert gravity.rule(grid, turns)[end] == 1, gravity.about({"turns": turns})


def test_rows_of_a_seed_repeat_differ_and_take_families_in_turn():
    rows = list(draw_rows(64, 5))
    assert rows == list(draw_rows(64, 5))
    texts = {json.dumps(row["examples"]) for row in rows}
    assert len(texts) == 64
    assert not texts & {json.dumps(row["examples"]) for row in draw_rows(64, 6)}
    assert Counter(map(family_of, rows)) == dict.fromkeys(FAMILIES, 4)


def test_the_rows_that_ship_are_what_the_generator_draws(tmp_path):
    path = ROOT / "examples" / "tasks.jsonl"
    assert path.stat().st_size < 1e6
    flags = ("--output_path", tmp_path / "made.jsonl", "--num_composed", 24)
    result = run_script("examples/generate_tasks.py", *flags)
    assert result.returncode == 0, result.stderr
    assert (tmp_path / "made.jsonl").read_bytes() == path.read_bytes()
    again = run_script("examples/generate_tasks.py", "--output_path", tmp_path / "made.jsonl")
    assert again.returncode == 2 and "made.jsonl exists: give another" in again.stderr


def test_training_leaves_out_what_is_held_out():
    from examples.train_arc_tiny import HELD_OUT, Rows, tiny_tokenizer
    from utils.prompt.formats import load_format

    tokenizer = tiny_tokenizer()
    rows = Rows(load_format("compact", None, tokenizer), tokenizer)
    shipped = (ROOT / "examples" / "tasks.jsonl").read_text().splitlines()
    examples = [str(json.loads(line)["examples"]) for line in shipped]
    assert set(examples[:200]) <= rows.held_out and len(examples) == 224
    assert len(rows.held_out) == sum(number for number, _ in HELD_OUT) == 700
    before = sum(float(weights.sum()) for _, weights in rows.pool(0, 0, 4096, 1))

    class Everything(set):
        def __contains__(self, value):
            return True

    rows.held_out = Everything()
    assert before > 0
    with pytest.raises(ValueError):  # of a pool that is empty there is no longest row
        rows.pool(0, 0, 4096, 1)


def test_the_loss_is_on_outputs_alone():
    from examples.train_arc_tiny import Rows, outputs_from, tiny_tokenizer
    from utils.prompt.formats import load_format

    tokenizer = tiny_tokenizer()
    rows = Rows(load_format("compact", None, tokenizer), tokenizer)
    pairs = [[[[1, 2]], [[2, 1]]], [[[3, 4]], [[4, 3]]], [[[5, 6]], [[6, 5]]]]
    ids = rows.ids({"examples": pairs})
    counted = outputs_from(ids, 1, rows.arrow, tokenizer.eos_token_id)
    assert tokenizer.decode(ids) == (
        "I12\n+/-=O21\n<|im_end|>I34\n+/-=O43\n<|im_end|>I56\n+/-=O65\n<|im_end|>"
    )
    assert tokenizer.decode(ids[counted]) == "43\n<|im_end|>65\n<|im_end|>"
    last = outputs_from(ids, 2, rows.arrow, tokenizer.eos_token_id)
    assert tokenizer.decode(ids[last]) == "65\n<|im_end|>"
