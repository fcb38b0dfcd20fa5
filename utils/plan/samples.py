"""Tasks as samples that fit the model: which test input, in which view, with how many train pairs.

What does not fit is skipped with a reason. Knows tokens, and nothing of devices or folders.
"""

import hashlib
import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Any

from tqdm import tqdm

from utils.arc import tasks as arc
from utils.arc.tasks import SampleKey
from utils.arc.views import View, views
from utils.errors import UserError, some
from utils.model.capture import tokens_in
from utils.plan.batching import Length
from utils.plan.request import Request
from utils.prompt.codec import Codec


@dataclass(frozen=True)
class Sample:
    """One test input of a task in one view, and how much of the task its prompt holds.

    original: the task as the dataset has it. cell_tokens: those of `length` that hold a cell.
    view: None where a run is not augmented.
    """

    original: arc.Task
    sample_idx: int
    num_train_pairs: int
    length: Length
    cell_tokens: int
    view: View | None = None

    @property
    def key(self) -> SampleKey:
        key = self.original.task_id, self.sample_idx
        return (*key, self.view.number) if self.view else key

    def skipped(self, reason: str) -> dict[str, Any]:
        """The manifest's entry of a sample that is not run."""
        view = {"view": self.view.number} if self.view else {}
        entry = {"task_id": self.original.task_id, "sample_idx": self.sample_idx}
        return {**entry, **view, "reason": reason}

    @property
    def task(self) -> arc.Task:
        """As the model is shown it; made anew, so that a dataset is in memory once."""
        return self.view.show_task(self.original) if self.view else self.original

    @property
    def target(self) -> arc.Grid | None:
        """As the model is expected to say it."""
        output = self.original.test[self.sample_idx].output
        return self.view.show(output) if self.view and output else output


def tasks_hash(tasks: Sequence[arc.Task]) -> str:
    """sha256 of the tasks with their ground truth."""
    digest = hashlib.sha256()
    for task in tasks:
        digest.update(json.dumps(asdict(task)).encode())
    return digest.hexdigest()


def read_tasks(request: Request) -> tuple[list[arc.Task], str]:
    """The first `max_tasks` tasks, those of `task_ids` and of this shard, with ground truth where a
    solutions file holds it; and a hash of those of all shards, without."""
    tasks = [
        replace(task, train=task.train[: request.max_train_pairs])
        for task in islice(arc.read_tasks(request.dataset_path), request.max_tasks)
        if not request.task_ids or task.task_id in request.task_ids
    ]
    if lacking := set(request.task_ids) - {task.task_id for task in tasks}:
        raise UserError(f"{request.dataset_path} has no task {some(sorted(lacking))}")
    whole, shards = tasks_hash(tasks), request.num_shards
    tasks = [task for task in tasks if shard_of(task.task_id, shards) == request.shard_id]
    if not tasks:
        raise UserError(
            f"shard {request.shard_id} of {shards} has no task: take fewer --num_shards"
        )
    path = request.solutions_path or arc.solutions_beside(request.dataset_path)
    if path is not None:
        solutions = arc.read_solutions(path)
        if request.solutions_path and not any(task.task_id in solutions for task in tasks):
            raise UserError(
                f"{path} has none of the {len(tasks)} tasks: give the --solutions_path of "
                f"{request.dataset_path}"
            )
        tasks = [_with_solutions(task, solutions, path) for task in tasks]
    known = any(pair.output is not None for task in tasks for pair in task.test)
    if request.teacher_forcing and not known:
        raise UserError(
            f"--teacher_forcing needs ground truth, and neither {request.dataset_path} nor "
            f"{path or 'a file beside it'} has any for these tasks: give its --solutions_path"
        )
    return tasks, whole


def shard_of(task_id: str, num_shards: int) -> int:
    """Which of the shards a task belongs to: by its id alone, so that hosts that do not talk to
    each other agree, whatever else their files hold."""
    return int.from_bytes(hashlib.sha256(task_id.encode()).digest()[:8]) % num_shards


def _with_solutions(
    task: arc.Task, solutions: dict[str, list[arc.Grid]], path: str | Path
) -> arc.Task:
    if (grids := solutions.get(task.task_id)) is None:
        return task
    if len(grids) != len(task.test):
        raise UserError(
            f"{path} has {len(grids)} grids for task {task.task_id}, which has {len(task.test)} "
            "test inputs: is it the ground truth of another dataset?"
        )
    pairs = zip(task.test, grids, strict=True)
    return replace(task, test=tuple(arc.Pair(pair.input, grid) for pair, grid in pairs))


def plan_samples(
    tasks: Sequence[arc.Task], codec: Codec, request: Request, max_model_len: int
) -> tuple[list[Sample], list[dict[str, Any]]]:
    """Every test input in every view as a sample, with as many train pairs as fit, or skipped with
    a reason.

    The token ids are counted and thrown away: those of a whole dataset would take gigabytes, and
    whoever needs a sample's makes them again.
    """
    samples, skipped = [], []
    count = request.augmentations
    bar = tqdm(tasks, "tokenising", unit=" tasks", disable=len(tasks) * count < 200)
    shown = ((t, v) for t in bar for v in (views(t, count, request.seed) if count > 1 else [None]))
    for original, view in shown:
        task = view.show_task(original) if view else original
        for index, pair in enumerate(task.test):
            number = {"view": view.number} if view else {}
            entry = {"task_id": task.task_id, "sample_idx": index, **number}
            if request.teacher_forcing and pair.output is None:
                skipped.append({**entry, "reason": "no ground truth to force"})
                continue
            expected = 0 if request.teacher_forcing else expected_cells(task, index)
            wanted = len(task.train)
            for pairs in range(wanted, min(wanted, 1) - 1, -1):
                encoded = codec.encode(task, index, pairs, request.teacher_forcing)
                prompt = encoded.prompt_length
                answer = len(encoded.ids) - prompt
                reserved = answer if request.teacher_forcing else request.max_output_tokens
                if prompt + reserved <= max_model_len:
                    length = Length(prompt, answer, expected)
                    cell_tokens = len(tokens_in(encoded.cells[:, 5:], prompt + answer))
                    samples.append(Sample(original, index, pairs, length, cell_tokens, view))
                    break
            else:
                reason = (
                    f"does not fit in {max_model_len} tokens: {prompt} of the prompt with the last "
                    f"train pair alone, {reserved} for the answer"
                )
                skipped.append({**entry, "reason": reason})
    return samples, skipped


def expected_cells(task: arc.Task, index: int) -> int:
    """Cells that the answer is likely to have: as many for each cell of its input as the train
    pairs have on average."""

    def cells(grid: arc.Grid) -> int:
        return len(grid) * len(grid[0])

    seen = sum(cells(pair.input) for pair in task.train)
    made = sum(cells(pair.output) for pair in task.train)
    return round(cells(task.test[index].input) * made / seen) if seen else 0


def skip_reasons(skipped: Sequence[dict[str, Any]]) -> list[tuple[str, int]]:
    """(reason in a few words, how many samples), the most frequent first."""
    return Counter(entry["reason"].partition(":")[0] for entry in skipped).most_common()
