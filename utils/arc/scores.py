"""Answers -> predictions.json, submission.json, and accuracy in the three conventions in use."""

import json
import math
from collections.abc import Mapping, Sequence
from typing import Any

from utils.arc.tasks import Grid, SampleKey

# task_id -> the true output of each test input, None where unknown; in the order of writing
Targets = Mapping[str, Sequence[Grid | None]]
Answers = Mapping[SampleKey, dict[str, Any]]
NOT_PARSED = [[0, 0], [0, 0]]  # in Kaggle's submission


def answer(
    task_id: str,
    sample_idx: int,
    attempts: list[dict[str, Any]],
    target: Grid | None,
    view: int | None = None,
) -> dict[str, Any]:
    """The answer to one test input, as the journal of a run keeps it.

    attempts: each `grid` (None where it did not parse), `text` and `logprob`, summed over the
    answer's tokens; none when nothing was generated, and then `correct` is None. view: number of
    the view in which an augmented run asked; grids are those of the task itself all the same, and
    `text` is what the model said.
    """
    correct = _solved(attempts, target) if attempts and target is not None else None
    asked = {"task_id": task_id, "sample_idx": sample_idx}
    asked |= {} if view is None else {"view": view}
    return {**asked, "attempts": attempts, "target": target, "correct": correct}


def vote(answers: Answers) -> Answers:
    """The answers in all views of an augmented run -> one to each (task_id, sample_idx).

    Each attempt in each view is a vote for its grid. The two grids with the most votes become the
    attempts; among equals the higher mean logprob comes first, then the earlier view. Their
    `logprob` is the mean over the votes, `text` that of the vote with the highest, as it was said
    in `view`, `votes` their number. A `logprob` that is not finite (journal: null) is unknown:
    no mean counts it, and among equals a grid without any comes last. Where nothing parsed, the
    attempt is that in the first view, with 0 votes.
    """
    by_sample: dict[SampleKey, list[dict[str, Any]]] = {}
    for key in sorted(answers):  # the views of a sample in their order
        by_sample.setdefault(key[:2], []).append(answers[key])
    voted = {}
    for key, said in by_sample.items():
        attempts = [{**a, "view": found["view"]} for found in said for a in found["attempts"]]
        votes: dict[str, list[dict[str, Any]]] = {}
        for attempt in attempts:
            if attempt["grid"] is not None:
                votes.setdefault(json.dumps(attempt["grid"]), []).append(attempt)
        # Sorting is stable, and the grids are in the order of their first votes.
        ranked = sorted(map(_elected, votes.values()), key=_rank)
        unparsed = [{**attempt, "votes": 0} for attempt in attempts[:1]]
        voted[key] = answer(*key, ranked[:2] or unparsed, said[0]["target"])
    return voted


def _elected(votes: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """The attempt that stands for all that gave the same grid."""
    known = [a for a in votes if a["logprob"] is not None and math.isfinite(a["logprob"])]
    best = max(known, key=lambda attempt: attempt["logprob"], default=votes[0])
    mean = sum(attempt["logprob"] for attempt in known) / len(known) if known else None
    return {**best, "logprob": mean, "votes": len(votes)}


def _rank(elected: dict[str, Any]) -> tuple[float, float]:
    logprob = elected["logprob"]
    return -elected["votes"], math.inf if logprob is None else -logprob


def predictions(
    targets: Targets, answers: Answers, generated: bool = True
) -> dict[str, list[dict[str, Any]]]:
    """`predictions.json`, every test input of every task.

    generated: whether the run made answers; if so, a sample without one was skipped and is wrong.
    """

    found: dict[str, list[dict[str, Any]]] = {}
    for task_id, outputs in targets.items():
        found[task_id] = []
        for index, target in enumerate(outputs):
            wrong = False if generated and target is not None else None
            given = answers.get((task_id, index), {"attempts": [], "correct": wrong})
            sample = {"sample_idx": index, "attempts": given["attempts"], "target": target}
            found[task_id].append({**sample, "correct": given["correct"]})
    return found


def submission(targets: Targets, answers: Answers) -> dict[str, list[dict[str, Grid]]]:
    """Kaggle's `submission.json`: the first two attempts at each output, the only one twice."""

    def attempts_at(*sample: str | int) -> dict[str, Grid]:
        found = answers.get(sample, {"attempts": []})["attempts"]
        grids = [attempt["grid"] or NOT_PARSED for attempt in found] or [NOT_PARSED]
        return {"attempt_1": grids[0], "attempt_2": [*grids, *grids][1]}

    return {
        task_id: [attempts_at(task_id, index) for index in range(len(outputs))]
        for task_id, outputs in targets.items()
    }


def accuracy(
    predictions: Mapping[str, Sequence[dict[str, Any]]],
) -> dict[str, dict[str, float | None]]:
    """`predictions.json` -> `{"solved", "total", "share"}` in each of three conventions.

    outputs_solved: test outputs solved within two attempts (Kaggle's). mean_task_share: mean over
    tasks of the share of their outputs solved. tasks_solved: tasks with all outputs solved. Only
    outputs whose `correct` is known count; `share` is None where there are none.
    """
    tasks = []
    for samples in predictions.values():
        scored = [sample for sample in samples if sample["correct"] is not None]
        if scored:
            tasks.append([_solved(s["attempts"][:2], s["target"]) for s in scored])
    return {
        "outputs_solved": _share(sum(map(sum, tasks)), sum(map(len, tasks))),
        "mean_task_share": _share(sum(sum(t) / len(t) for t in tasks), len(tasks)),
        "tasks_solved": _share(sum(map(all, tasks)), len(tasks)),
    }


def _solved(attempts: Sequence[dict[str, Any]], target: Grid | None) -> bool:
    return target is not None and any(attempt["grid"] == target for attempt in attempts)


def _share(solved: float, total: int) -> dict[str, float | None]:
    return {"solved": solved, "total": total, "share": solved / total if total else None}
