"""predictions.json, submission.json and the three conventions of accuracy."""

from utils.scoring import accuracy, answer, predictions, submission

A, B, C = [[1, 2]], [[3], [4]], [[5]]
WRONG = [[9]]


def attempt(grid, text="text"):
    return {"grid": grid, "text": text, "logprob": -1.5}


def answers(*found):
    return {(a["task_id"], a["sample_idx"]): a for a in found}


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
