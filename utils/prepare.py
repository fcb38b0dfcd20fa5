"""A request, checked: everything that the user can get wrong, before a model loads.

`prepare` reads the configuration, the tokenizer, the tasks and the headers of the weights, and
plans every sample and batch. It writes nothing, and of the device it knows the kind alone.
"""

import collections
import hashlib
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Any

from tqdm import tqdm

from utils import arc, tokens
from utils.batching import Batch, Length, plan_batches
from utils.capture import CaptureSpec
from utils.config import ModelConfig
from utils.disk import check_writable
from utils.errors import UserError
from utils.manifest import stem
from utils.mesh import default_dtype
from utils.prompts import PromptFormat, load_format
from utils.request import Request
from utils.weights import Checkpoint


@dataclass(frozen=True)
class Sample:
    """One test input of a task, and how much of the task its prompt holds."""

    task: arc.Task
    sample_idx: int
    num_train_pairs: int
    length: Length

    @property
    def key(self) -> tuple[str, int]:
        return self.task.task_id, self.sample_idx

    @property
    def target(self) -> arc.Grid | None:
        return self.task.test[self.sample_idx].output


@dataclass
class Prepared:
    """A run that has been checked: what will be computed, in which batches, and stored where."""

    request: Request
    config: ModelConfig
    checkpoint: Checkpoint
    tokenizer: Any
    fmt: PromptFormat
    capture: CaptureSpec
    stop_ids: tuple[int, ...]
    tasks: list[arc.Task]
    samples: list[Sample]
    skipped: list[dict[str, Any]]
    batches: list[Batch]
    dtype: str
    max_model_len: int

    @property
    def run_folder(self) -> Path:
        """Where shards, answers and manifest go; without extraction, a folder beside the output
        that lets the run be resumed, and of which the manifest alone stays at its end."""
        request = self.request
        return Path(request.activations_dir or f"{request.output_path}.run")


def prepare(request: Request) -> Prepared:
    """Reads and checks everything but the weights' values. Raises UserError; writes nothing."""
    request.check()
    check_paths(request)
    config = ModelConfig.from_hf(request.model_path)
    capture = CaptureSpec()
    if request.activations_dir is not None:
        capture = CaptureSpec.from_flags(
            config, request.layers_to_extract, request.hook_points, request.token_positions
        )
    checkpoint = Checkpoint(request.model_path, config)
    tokenizer = tokens.load_tokenizer(request.model_path)
    tokens.check_vocabulary(tokenizer, config.vocab_size)
    fmt = load_format(request.prompt_format, request.grid_encoding, tokenizer)
    eos = [
        _read_json(Path(request.model_path) / f) for f in ("generation_config.json", "config.json")
    ]
    tasks = read_tasks(request)
    max_model_len = request.max_model_len or config.max_position_embeddings
    if max_model_len > config.max_position_embeddings:
        raise UserError(
            f"--max_model_len {max_model_len} is more than the model's "
            f"{config.max_position_embeddings} positions"
        )
    if request.generates and request.max_output_tokens >= max_model_len:
        raise UserError(
            f"--max_output_tokens {request.max_output_tokens} leaves no room for a prompt within "
            f"{max_model_len} tokens (--max_model_len, or what the model allows): lower it"
        )
    samples, skipped = plan_samples(tasks, fmt, tokenizer, request, max_model_len)
    if not samples:
        reasons = collections.Counter(entry["reason"].partition(":")[0] for entry in skipped)
        raise UserError(
            f"none of the {len(skipped)} samples can be run: "
            + "; ".join(f"{reason} ({n})" for reason, n in reasons.most_common(3))
            + ": lower --max_output_tokens, or raise --max_model_len where it is set"
        )
    return Prepared(
        request,
        config,
        checkpoint,
        tokenizer,
        fmt,
        capture,
        tokens.stop_ids(tokenizer, eos, fmt),
        tasks,
        samples,
        skipped,
        plan_batches([sample.length for sample in samples], min(request.batch_size, len(samples))),
        request.dtype or default_dtype(),
        max_model_len,
    )


def train_pairs(prepared: Prepared) -> dict[str, int]:
    """How many train pairs the samples' tasks have, how many their prompts keep, and how many
    samples keep fewer than there are, for want of room."""
    there = [len(sample.task.train) for sample in prepared.samples]
    kept = [sample.num_train_pairs for sample in prepared.samples]
    shortened = sum(k < n for k, n in zip(kept, there, strict=True))
    return {"available": sum(there), "kept": sum(kept), "samples_shortened": shortened}


def check_paths(request: Request) -> None:
    """Raises UserError where output could not be written, or would replace what the run reads."""
    output = Path(request.output_path)
    try:
        if output.is_dir():
            raise UserError(f"{output} is a folder: give --output_path the path of a file")
        solutions = request.solutions_path or arc.solutions_beside(request.dataset_path)
        for path in filter(None, (request.dataset_path, solutions)):
            if output.exists() and Path(path).exists() and output.samefile(path):
                raise UserError(f"{path} is read by this run: choose another --output_path")
        check_writable(output.parent)
        if request.activations_dir is None:
            return
        folder = Path(request.activations_dir)
        if output.absolute() in (folder.absolute(), *folder.absolute().parents):
            raise UserError(f"{output} is on the way to {folder}: choose another --output_path")
        if output.absolute().parent == folder.absolute() and stem(output.name):
            raise UserError(f"{output} is a file of the run itself: choose another --output_path")
        check_writable(folder)
    except OSError as error:  # of the paths themselves: too long a name, or no permission
        raise UserError(f"cannot write {output}: {error.strerror}; choose another path") from error


def read_tasks(request: Request) -> list[arc.Task]:
    """The first `max_tasks` tasks, with ground truth where a solutions file holds it."""
    tasks = [
        replace(task, train=task.train[: request.max_train_pairs])
        for task in islice(arc.read_tasks(request.dataset_path), request.max_tasks)
    ]
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
    return tasks


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
    tasks: Sequence[arc.Task],
    fmt: PromptFormat,
    tokenizer: Any,
    request: Request,
    max_model_len: int,
) -> tuple[list[Sample], list[dict[str, Any]]]:
    """Every test input as a sample, with as many train pairs as fit, or skipped with a reason."""
    samples, skipped = [], []
    for task in tqdm(tasks, desc="tokenising", unit=" tasks", disable=len(tasks) < 200):
        for index, pair in enumerate(task.test):
            reserved = request.max_output_tokens
            answer = 0
            if request.teacher_forcing:
                if pair.output is None:
                    reason = "no ground truth to force"
                    skipped.append(_skip(task, index, reason))
                    continue
                answer = reserved = len(tokens.encode_answer(fmt, pair.output, tokenizer)[0])
            wanted = len(task.train)
            for pairs in range(wanted, min(wanted, 1) - 1, -1):
                prompt = len(tokens.encode(fmt.render(task, index, pairs), tokenizer)[0])
                if prompt + reserved <= max_model_len:
                    samples.append(Sample(task, index, pairs, Length(prompt, answer)))
                    break
            else:
                reason = (
                    f"does not fit in {max_model_len} tokens: {prompt} of the prompt with the last "
                    f"train pair alone, {reserved} for the answer"
                )
                skipped.append(_skip(task, index, reason))
    return samples, skipped


def _skip(task: arc.Task, index: int, reason: str) -> dict[str, Any]:
    return {"task_id": task.task_id, "sample_idx": index, "reason": reason}


def _read_json(path: Path) -> dict[str, Any] | None:
    try:
        value = json.loads(path.read_text())
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:
        raise UserError(f"{path} cannot be read as JSON: {error}") from error
    if not isinstance(value, dict):
        raise UserError(f"{path} does not hold a JSON object")
    return value


def settings(prepared: Prepared) -> dict[str, Any]:
    """The manifest entries that decide what is computed; a resumed run must have the same."""
    request, config = prepared.request, prepared.config
    tasks_hash = hashlib.sha256()
    for task in prepared.tasks:
        tasks_hash.update(json.dumps(asdict(task)).encode())
    return {
        "model": {
            "path": request.model_path,
            "model_type": config.model_type,
            "num_layers": config.num_layers,
            "hidden_size": config.hidden_size,
            "vocab_size": config.vocab_size,
            "dtype": prepared.dtype,
            "hash": prepared.checkpoint.fingerprint(),
        },
        "dataset": {
            "path": request.dataset_path,
            "hash": tasks_hash.hexdigest(),
            "tasks": len(prepared.tasks),
        },
        "prompt": {
            "format": prepared.fmt.name,
            "encoding": prepared.fmt.encoding,
            "template_hash": prepared.fmt.template_hash,
            "max_train_pairs": request.max_train_pairs,
            "max_model_len": prepared.max_model_len,
        },
        "activations": {
            name: {
                "hook_point": name.rpartition(".")[0],
                "layer": int(name.rpartition(".")[2]),
                "width": config.hidden_size,
                "dtype": request.activation_dtype,
            }
            for name in prepared.capture.names
        },
        "capture": {
            "token_positions": request.token_positions,
            "logits": not request.no_logits,
        },
        "generation": {
            "teacher_forcing": request.teacher_forcing,
            "max_output_tokens": request.max_output_tokens,
            "temperatures": request.temperatures,
            "seed": request.seed,
        },
    }
