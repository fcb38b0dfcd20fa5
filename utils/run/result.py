"""What the model made of a sample, as the item of a shard and the answer of the journal."""

# A answer tokens   P prompt tokens   R rows of a capture   D model width   V vocabulary

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from utils.arc import scores
from utils.arc.views import original_cells
from utils.plan.plan import Plan
from utils.plan.samples import Sample
from utils.prompt.codec import Encoded
from utils.prompt.formats import Answer


@dataclass(frozen=True, eq=False)
class Result:
    """What the model made of one sample; made by `Computation.fetch`.

    answers: int32 ids of each generated answer, in the order of the predictions; none where the
    answer was forced, which `encoded` holds, or where there is none. logprobs: float32 [A] of each
    answer, the forced one included. captures: name -> [R, D], of the tokens of `CaptureSpec.rows`,
    from which `to_item` takes those of `CaptureSpec.kept`. logits: [1, V] at the last prompt token,
    or None.
    """

    sample: Sample
    encoded: Encoded
    answers: list[np.ndarray]
    logprobs: list[np.ndarray]
    captures: dict[str, np.ndarray]
    logits: np.ndarray | None

    @property
    def num_tokens(self) -> int:
        """That went through the model."""
        return len(self.encoded.ids) + sum(len(answer) for answer in self.answers)

    @property
    def nbytes(self) -> int:
        """Of the arrays that wait to be stored."""
        arrays = [*self.captures.values(), *([] if self.logits is None else [self.logits])]
        return sum(array.nbytes for array in arrays)


def to_item(
    result: Result, plan: Plan, said: Sequence[Answer] | None = None
) -> tuple[dict[str, Any], dict[str, Any]]:
    """The item of a shard, its grids as the view shows them, and the answer of the journal, its
    grids as the task has them.

    said: what each generated answer says (default: what its ids do).
    """
    request, sample, encoded = plan.request, result.sample, result.encoded
    view, P = sample.view, encoded.prompt_length
    if said is None:
        said = [plan.codec.read(ids, P) for ids in result.answers]
    attempts = []
    for answer, logprobs in zip(said, result.logprobs if said else [], strict=True):
        logprob = float(logprobs.sum(dtype=np.float64))
        grid = view.invert(answer.grid) if view and answer.grid else answer.grid
        attempts.append({"grid": grid, "text": answer.text, "logprob": logprob})
    prediction = said[0].grid if said else None
    correct = prediction == sample.target if said and sample.target is not None else None
    ids = np.concatenate([encoded.ids, *result.answers[:1]])
    cells = np.concatenate([encoded.cells, *(answer.cells for answer in said[:1])])
    span = plan.capture.rows(P, len(ids) - P)
    kept = plan.capture.kept(P, len(ids) - P, cells[:, 5:], sample.key)
    states = result.captures
    if len(kept) < len(span):
        states = {name: rows[kept - span.start] for name, rows in states.items()}
    item = {
        "task_id": sample.original.task_id,
        "sample_idx": sample.sample_idx,
        "input_ids": ids,
        "prompt_length": P,
        "activations": states,
        "output_logprobs": result.logprobs[0] if result.logprobs else np.zeros(0, np.float32),
        "cells": cells,
        "num_train_pairs": sample.num_train_pairs,
        "prediction": prediction,
        "target": sample.target,
        "correct": correct,
        "teacher_forced": request.teacher_forcing,
    }
    if result.logits is not None and request.activations_dir is not None:
        item["output_logits"] = result.logits
    if not plan.capture.keeps_all:
        item["positions"] = kept
    task_id, sample_idx, *number = sample.key
    if view:
        dropped = len(sample.original.train) - sample.num_train_pairs
        item["view"] = view.to_dict()
        item["cells_original"] = original_cells(item["cells"], view, dropped)
    target = sample.original.test[sample_idx].output
    return item, scores.answer(task_id, sample_idx, attempts, target, *number)
