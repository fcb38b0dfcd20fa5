"""Probes on shards whose states are known: what was planted is found, and nothing else is."""

import json

import numpy as np
import pytest
from runs import made_run

from examples import probe as script
from examples.probe import SHUFFLES, Sums, labelled_rows, one_hot, probe
from utils.errors import UserError
from utils.shards import iter_items
from utils.shards.manifest import read_manifest

D = 24


def states(random, item, task):
    """`resid_pre.0` is noise; in `resid_post.0` each color has a direction, columns have none, and
    whether a sample is solved has one in the prompt's last token."""
    directions = np.random.default_rng(7).standard_normal((11, D))
    noise = random.standard_normal((2, len(item["input_ids"]), D))
    planted = noise[1] + 2 * directions[np.minimum(item["input_ids"], 9)]
    planted[item["prompt_length"] - 1] = noise[1][0] + 2 * item["correct"] * directions[10]
    pairs = {"resid_pre.0": noise[0], "resid_post.0": 50 * planted + 3}
    return {name: rows.astype(np.float32) for name, rows in pairs.items()}


@pytest.fixture(scope="module")
def planted(tmp_path_factory):
    return made_run(tmp_path_factory.mktemp("planted") / "run", states)


def test_a_planted_direction_is_found_and_noise_is_not(planted):
    found = probe(planted, "color")
    assert found["resid_post.0"]["score"] > 0.95
    assert found["resid_post.0"]["highest_chance"] < 0.2
    assert found["resid_pre.0"]["score"] < 0.2
    assert found["resid_post.0"]["rows"] > 4 * found["resid_post.0"]["held_out_rows"] * 0.7 > 0
    assert found == probe(planted, "color")
    assert probe(planted, "correct")["resid_post.0"]["score"] == 1
    assert probe(planted, "col")["resid_post.0"]["score"] < 0.35


def test_labels_without_meaning_beat_chance_as_often_as_stated(planted, monkeypatch):
    """Noise is no label's cause: over targets and draws its score is the highest of 20 about one
    time in 20."""
    beaten = []
    for seed in range(10):
        for target in ("color", "row", "boundary"):
            line = probe(planted, target, max_rows=3000, seed=seed)["resid_pre.0"]
            beaten.append(line["score"] > line["highest_chance"])
    assert np.mean(beaten) <= 0.2, beaten  # of 30, 6: by chance once in 300


def test_it_fits_what_numpy_fits():
    random = np.random.default_rng(0)
    x, noise = random.standard_normal((400, 6)) * 3 + 5, random.standard_normal((400, 1))
    x = np.concatenate([x, np.full((400, 1), 7.0)], axis=1)  # one component never changes
    labels = (x[:, :1] + noise > 5).astype(int)
    y = one_hot(labels, 2).toarray()
    assert np.array_equal(y, labels == np.arange(2))
    sums = Sums(7, 2)
    for part in np.split(np.arange(400), 8):
        sums.add(x[part], one_hot(labels[part], 2))
    weights, constants = sums.fit(1)
    scaled = (x[:, :6] - x[:, :6].mean(axis=0)) / x[:, :6].std(axis=0)

    def ridge(penalty):
        hat = scaled @ np.linalg.solve(scaled.T @ scaled + 400 * penalty * np.eye(6), scaled.T)
        fitted = hat @ (y - y.mean(axis=0)) + y.mean(axis=0)
        error = ((y - fitted) ** 2).sum() / 400 / (1 - (1 + np.trace(hat)) / 400) ** 2
        return error, fitted

    best = min((ridge(penalty) for penalty in script.PENALTIES), key=lambda pair: pair[0])[1]
    np.testing.assert_allclose(x @ weights + constants, best, atol=1e-8)
    assert (weights[6] == 0).all()


def test_the_classes_of_an_item_are_those_of_its_cells():
    item = {
        "input_ids": np.arange(9),
        "prompt_length": 6,
        "correct": True,
        # A grid of 3 x 1 of which tokens 1 and 2 hold the first cell and token 3 the other two,
        # and an answer of one cell in tokens 6 and 7.
        "cells": np.array(
            [
                [-1, 0, 0, 0, 4, 1, 3],
                [-1, 0, 1, 0, 5, 3, 4],
                [-1, 0, 2, 0, 6, 3, 4],
                [-1, 1, 0, 0, 9, 6, 8],
            ]
        ),
    }
    want = {
        "color": [4, 4, 5, 9, 9],
        "row": [0, 0, 1, 0, 0],
        "col": [0, 0, 0, 0, 0],
        "role": [2, 2, 2, 3, 3],
        "boundary": [1, 1, 1, 1, 1],
    }
    for target, classes in want.items():
        rows, labels = labelled_rows(item, target)
        assert (rows.tolist(), labels.tolist()) == ([1, 2, 3, 6, 7], classes), target
    item["positions"] = np.array([2, 5, 6])
    assert [x.tolist() for x in labelled_rows(item, "color")] == [[0, 2], [4, 9]]
    assert [x.tolist() for x in labelled_rows(item, "correct")] == [[1], [1]]
    for silent in ({"correct": None}, {"view": {"number": 1}}):
        assert len(labelled_rows({**item, **silent}, "correct")[0]) == 0


def test_the_script_writes_what_it_says(planted, tmp_path, in_shell):
    flags = ["--activations_dir", planted, "--target", "boundary", "--output", tmp_path / "p.json"]
    code, out, _ = in_shell(script, [*flags, "--layers", 0])
    found = json.loads((tmp_path / "p.json").read_text())
    assert code == 0 and set(found) == {"resid_pre.0", "resid_post.0"}
    for name, line in found.items():
        assert {"score", "chance", "rows"} <= set(line) and 0 < line["chance"] < 1
        assert line["chance"] <= line["highest_chance"] and name in out
    assert f"highest of {SHUFFLES} shuffles" in out
    code, _, err = in_shell(script, flags)
    assert code == 2 and "p.json exists: add --overwrite to replace it" in err


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--layers", 3], "no layer 3 was captured; there are"),
        (["--target", "taste"], "choose from"),
        (["--activations_dir", "nowhere"], "cannot read nowhere"),
    ],
)
def test_a_mistake_is_one_line(planted, tmp_path, in_shell, flags, words):
    given = ["--activations_dir", planted, "--target", "color", "--output", tmp_path / "p.json"]
    code, _, err = in_shell(script, [*given, *flags])
    assert code == 2 and words in err and err.count("\n") == 1
    assert not (tmp_path / "p.json").exists()


def test_rows_that_are_drawn_are_of_those_that_are_stored(planted, tmp_path):
    """Of a run that keeps the states of answers alone, as many rows as are asked for are used."""

    def of_answers(random, item, task):
        tokens = len(item["input_ids"])
        item["positions"] = np.arange(item["prompt_length"], tokens, dtype=np.int32)
        return {name: rows[item["positions"]] for name, rows in states(random, item, task).items()}

    run = made_run(tmp_path / "run", of_answers, token_positions="answer")
    whole = probe(run, "color")["resid_post.0"]
    most = whole["rows"] + whole["held_out_rows"]
    part = probe(run, "color", max_rows=most // 2)["resid_post.0"]
    ends = sum(len(item["prediction"]) for item in iter_items(run))  # rows that hold no cell
    share = (most // 2) / (most + ends)
    assert abs((part["rows"] + part["held_out_rows"]) / most - share) < 0.05
    assert script.share_of_rows(run, read_manifest(run), 10**6) == 1
    assert not (run / "activation_stats.json").exists()  # it only reads
    all_stored = read_manifest(planted)
    assert script.share_of_rows(planted, all_stored, all_stored["total_tokens"] // 4) <= 0.25


def test_what_cannot_be_told_is_said(tmp_path):
    def forced(random, item, task):
        item["correct"] = item["prediction"] = None
        return states(random, {**item, "correct": False}, task)

    run = made_run(tmp_path / "run", forced, tasks=3)
    with pytest.raises(UserError, match="needs solved and failed samples"):
        probe(run, "correct")
    one = made_run(tmp_path / "one", states, tasks=1)
    with pytest.raises(UserError, match="of one task"):
        probe(one, "color")
