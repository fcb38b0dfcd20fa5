"""predictions.json, submission.json and the three conventions of accuracy."""

import json

import pytest

from utils.arc.scores import accuracy, answer, predictions, submission, vote
from utils.shards.items import sample_key
from utils.store.local import json_lines

A, B, C = [[1, 2]], [[3], [4]], [[5]]
WRONG = [[9]]
NAN, INF = float("nan"), float("inf")


def attempt(grid, text="text", logprob=-1.5):
    return {"grid": grid, "text": text, "logprob": logprob}


def answers(*found):
    return {sample_key(a): a for a in found}


TARGETS = {"t2": [A, B], "t1": [C], "t3": [None], "t4": [A]}
ANSWERS = answers(
    answer("t1", 0, [attempt(WRONG), attempt(C)], C),
    answer("t2", 0, [attempt(A), attempt(None, "no grid")], A),
    answer("t2", 1, [attempt(None), attempt(WRONG)], B),
    answer("t3", 0, [attempt(A)], None),
)


def test_an_answer_is_correct_when_any_attempt_is_exact():
    assert ANSWERS["t1", 0]["correct"] is True
    assert ANSWERS["t2", 1]["correct"] is False
    assert ANSWERS["t3", 0]["correct"] is None  # nobody knows
    assert answer("t", 0, [], A)["correct"] is None  # nothing was generated
    assert answer("t", 0, [attempt(None)], None)["correct"] is None  # no grid is not "no target"


def test_predictions_hold_every_test_input_in_the_order_of_the_tasks():
    found = predictions(TARGETS, ANSWERS)
    assert list(found) == ["t2", "t1", "t3", "t4"]
    assert found["t2"] == [
        {
            "sample_idx": 0,
            "attempts": [attempt(A), attempt(None, "no grid")],
            "target": A,
            "correct": True,
        },
        {
            "sample_idx": 1,
            "attempts": [attempt(None), attempt(WRONG)],
            "target": B,
            "correct": False,
        },
    ]
    assert found["t4"] == [{"sample_idx": 0, "attempts": [], "target": A, "correct": False}]


def test_an_unknown_logprob_changes_no_score():
    """NaN of a run, and null of its journal, from which it goes on: `write_json` says null."""
    for logprob in (float("nan"), None):
        found = answers(answer("t1", 0, [attempt(C, logprob=logprob)], C))
        written = predictions({"t1": [C]}, found)
        assert written["t1"][0]["correct"] is True
        assert accuracy(written)["tasks_solved"]["solved"] == 1
        assert submission({"t1": [C]}, found)["t1"][0]["attempt_1"] == C
        assert json.loads(json_lines(written))["t1"][0]["attempts"][0]["logprob"] is None


def test_nothing_generated_has_no_score():
    found = predictions(TARGETS, answers(answer("t1", 0, [], C)), generated=False)
    assert {s["correct"] for samples in found.values() for s in samples} == {None}
    assert [s["share"] for s in accuracy(found).values()] == [None, None, None]


def test_submission_holds_two_grids_for_every_output():
    empty = [[0, 0], [0, 0]]
    assert submission(TARGETS, ANSWERS) == {
        "t2": [{"attempt_1": A, "attempt_2": empty}, {"attempt_1": empty, "attempt_2": WRONG}],
        "t1": [{"attempt_1": WRONG, "attempt_2": C}],
        "t3": [{"attempt_1": A, "attempt_2": A}],  # a single prediction is repeated
        "t4": [{"attempt_1": empty, "attempt_2": empty}],  # skipped
    }


def test_a_third_attempt_is_in_no_submission_and_in_no_accuracy():
    found = answers(answer("t1", 0, [attempt(WRONG), attempt(None), attempt(C)], C))
    assert found["t1", 0]["correct"] is True
    assert submission({"t1": [C]}, found)["t1"][0] == {
        "attempt_1": WRONG,
        "attempt_2": [[0, 0], [0, 0]],
    }
    assert accuracy(predictions({"t1": [C]}, found))["outputs_solved"]["solved"] == 0


def test_the_three_conventions_disagree():
    assert accuracy(predictions(TARGETS, ANSWERS)) == {
        "outputs_solved": {"solved": 2, "total": 4, "share": 0.5},  # t2/0, t1/0 of t2, t1, t4
        "mean_task_share": {"solved": 1.5, "total": 3, "share": 0.5},  # 1/2, 1, 0
        "tasks_solved": {"solved": 1, "total": 3, "share": 1 / 3},  # t1
    }


def test_only_outputs_with_a_known_target_count():
    found = answers(answer("t", 0, [attempt(A)], A), answer("t", 1, [attempt(B)], None))
    scores = accuracy(predictions({"t": [A, None]}, found))
    assert [(s["solved"], s["total"]) for s in scores.values()] == [(1, 1)] * 3


# ------------------------------------------------------------------------------------- voting


def voted(*views, target=None):
    """The one answer to the attempts of each view, given as (grid, logprob); texts are `view.n`."""
    found = []
    for number, attempts in enumerate(views):
        attempts = [attempt(g, f"{number}.{n}", lp) for n, (g, lp) in enumerate(attempts)]
        found.append(answer("t", 0, attempts, target, number))
    (key, chosen), *others = vote(answers(*reversed(found))).items()  # whatever their order
    assert key == ("t", 0) and others == [] and "view" not in chosen
    assert all(a["text"].startswith(f"{a['view']}.") for a in chosen["attempts"])
    return [(a["grid"], a["text"], a["logprob"], a["votes"]) for a in chosen["attempts"]]


VOTES = {
    "the more votes": (
        ([(A, -1)], [(B, -4)], [(B, -2)], [(C, -9)], [(C, -9)], [(B, -3)]),
        [(B, "2.0", -3.0, 3), (C, "3.0", -9.0, 2)],
    ),
    "of equals the higher mean": (
        ([(A, -1)], [(A, -8)], [(B, -4)], [(B, -4)]),
        [(B, "2.0", -4.0, 2), (A, "0.0", -4.5, 2)],
    ),
    "then the earlier view": (
        ([(C, -3)], [(A, -1)], [(B, -1)], [(B, -3)], [(A, -3)]),
        [(A, "1.0", -2.0, 2), (B, "2.0", -2.0, 2)],
    ),
    "then the earlier attempt": (
        ([(WRONG, -3)], [(B, -1), (A, -1), (C, -1)]),
        [(B, "1.0", -1.0, 1), (A, "1.1", -1.0, 1)],
    ),
    "every attempt of a view is a vote": (
        ([(A, -1), (B, -5), (B, -7)], [(None, 0), (A, -3), (A, -2)]),
        [(A, "0.0", -2.0, 3), (B, "0.1", -6.0, 2)],
    ),
    "what did not parse has none": (
        ([(None, 0)], [(None, 0)], [(A, -6)]),
        [(A, "2.0", -6.0, 1)],
    ),
    "what is not finite decides nothing": (
        ([(A, NAN)], [(B, -9)], [(C, None)], [(WRONG, INF)], [(A, -8), (B, NAN)]),
        [(A, "4.0", -8.0, 2), (B, "1.0", -9.0, 2)],
    ),
    "of equals without a mean the earlier": (
        ([(C, None)], [(B, NAN)], [(A, -99)]),
        [(A, "2.0", -99.0, 1), (C, "0.0", None, 1)],
    ),
    "nothing parsed": (([(None, -5), (None, -1)], [(None, -2)]), [(None, "0.0", -5, 0)]),
    "nothing was generated": (([], []), []),
}


@pytest.mark.parametrize("name", VOTES)
def test_votes(name):
    views, expected = VOTES[name]
    assert voted(*views) == expected


def test_a_vote_is_correct_when_one_of_its_two_attempts_is():
    said = [answer("t", 0, [attempt(g)], C, i) for i, g in enumerate([A, A, A, B, B, C])]
    assert {a["correct"] for a in said[:5]} == {False} and said[5]["correct"] is True
    assert vote(answers(*said))["t", 0]["correct"] is False  # C comes third
    assert vote(answers(*said[2:4], said[5]))["t", 0]["correct"] is False
    assert vote(answers(*said[3:]))["t", 0]["correct"] is True
    assert vote(answers(answer("t", 0, [], C, 0)))["t", 0]["correct"] is None
    assert vote(answers(answer("t", 0, [attempt(C)], None, 3)))["t", 0]["correct"] is None


def test_votes_become_predictions_and_submission():
    """Of t2's second output the first view was skipped, of t4 every one."""
    said = [answer("t2", 0, [attempt(g)], A, i) for i, g in enumerate([B, A, A])]
    said += [answer("t2", 1, [attempt(g)], B, i) for i, g in ((1, None), (2, B))]
    chosen = vote(answers(*said))
    targets = {"t2": [A, B], "t4": [A]}
    found = predictions(targets, chosen)
    assert [[a["grid"] for a in s["attempts"]] for s in found["t2"]] == [[A, B], [B]]
    assert [s["correct"] for s in found["t2"]] == [True, True]
    assert found["t4"] == [{"sample_idx": 0, "attempts": [], "target": A, "correct": False}]
    assert accuracy(found)["outputs_solved"]["solved"] == 2
    assert submission(targets, chosen)["t2"] == [
        {"attempt_1": A, "attempt_2": B},
        {"attempt_1": B, "attempt_2": B},
    ]
