"""A request, checked: everything that the user can get wrong, before a model loads.

`prepare` reads the configuration, the tokenizer, the tasks and the headers of the weights, and
plans every sample and batch. It writes nothing, and of the device it knows the kind alone.
"""

import collections
import hashlib
import json
import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace
from itertools import islice
from pathlib import Path
from typing import Any

import jax
import numpy as np
from tqdm import tqdm

from utils import arc, tokens
from utils.augment import View, views
from utils.batching import Batch, Length, Limits, plan_batches
from utils.capture import CaptureSpec
from utils.cloud import BucketFolder, Receipt
from utils.config import ModelConfig
from utils.disk import check_writable
from utils.errors import UserError
from utils.fetch import localized, speaking_of
from utils.items import SampleKey
from utils.layout import Layout
from utils.manifest import differences, some, stem
from utils.memory import Workload, choose_model_axis, device_bytes, rows_that_fit
from utils.mesh import check_shape, default_dtype, make_mesh
from utils.processes import Peers
from utils.prompts import PromptFormat, load_format
from utils.request import Request
from utils.weights import Checkpoint


@dataclass(frozen=True)
class Sample:
    """One test input of a task in one view, and how much of the task its prompt holds.

    original: the task as the dataset has it. view: None where a run is not augmented.
    """

    original: arc.Task
    sample_idx: int
    num_train_pairs: int
    length: Length
    view: View | None = None

    @property
    def key(self) -> SampleKey:
        key = self.original.task_id, self.sample_idx
        return (*key, self.view.number) if self.view else key

    @property
    def task(self) -> arc.Task:
        """As the model is shown it; made anew, so that a dataset is in memory once."""
        return self.view.show_task(self.original) if self.view else self.original

    @property
    def target(self) -> arc.Grid | None:
        """As the model is expected to say it."""
        output = self.original.test[self.sample_idx].output
        return self.view.show(output) if self.view and output else output


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
    whole_hash: str  # of the tasks of all shards
    samples: list[Sample]
    skipped: list[dict[str, Any]]
    dtype: str
    max_model_len: int
    layout: Layout
    batches: list[Batch]
    bucket: BucketFolder | None = None  # where the run is sent
    listing: dict[str, Receipt] = field(default_factory=dict)  # of what is there
    uris: dict[str, str] = field(default_factory=dict)  # of local copies of what is in buckets

    @property
    def workload(self) -> Workload:
        request = self.request
        answer = request.max_output_tokens if request.generates else 0
        return Workload(self.config, self.capture, answer, np.dtype(self.dtype).itemsize)

    @property
    def run_folder(self) -> Path:
        """Where shards, answers and manifest go; without extraction, a folder beside the output
        that lets the run be resumed, and of which the manifest alone stays at its end."""
        request = self.request
        return Path(request.activations_dir or f"{request.output_path}.run")


def prepare(
    request: Request, devices: Sequence[jax.Device] | None = None, writes: bool = True
) -> Prepared:
    """Reads and checks everything but the weights' values. Raises UserError; writes nothing.

    devices: what the run computes on (default: the first of this process, or with
    `request.distributed` those of all processes). writes: whether a run is to follow.
    """
    request.check()
    if devices is None:
        devices = jax.devices() if request.distributed else jax.local_devices()[:1]
    if request.mesh_shape is not None:
        check_shape(*request.mesh_shape, devices)
    bucket, listing = None, {}
    if writes:
        check_paths(request)
        if request.upload_to_cloud:
            bucket = BucketFolder(request.cloud_bucket)
            listing = bucket.check_access()
    request, uris = localized(request)
    with speaking_of(uris):
        prepared = _prepared(request, devices)
    prepared = replace(prepared, bucket=bucket, listing=listing, uris=uris)
    return on_mesh(prepared, request.mesh_shape, devices)


def _prepared(request: Request, devices: Sequence[jax.Device]) -> Prepared:
    """All but the mesh and its batches."""
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
    tasks, whole_hash = read_tasks(request)
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
        whole_hash,
        samples,
        skipped,
        request.dtype or default_dtype(devices),
        max_model_len,
        Layout.of(config, make_mesh(1, len(devices), devices)),
        [],
    )


def on_mesh(
    prepared: Prepared, shape: tuple[int, int] | None, devices: Sequence[jax.Device]
) -> Prepared:
    """The run on a mesh of that shape, or of the best one, with the batches that fit there."""
    request, work = prepared.request, prepared.workload
    here = [d for d in devices if d.process_index == jax.process_index()]
    limit = device_bytes((here or devices)[0])
    lengths = [sample.length for sample in prepared.samples]
    longest = max(length.total for length in lengths)

    def layout_of(model: int) -> Layout:
        mesh = make_mesh(len(devices) // model, model, devices)
        return Layout.of(prepared.config, mesh)

    model = shape[1] if shape else choose_model_axis(work, len(devices), longest, limit, layout_of)
    layout = layout_of(model)
    most = min(
        request.batch_size * len(devices), math.ceil(len(lengths) / layout.data) * layout.data
    )
    fitting = rows_that_fit(work, layout, limit, most)

    def rows(length: int) -> int:
        if request.max_batch_tokens is None:
            return fitting(length)
        budget = request.max_batch_tokens * len(devices) // length // layout.data * layout.data
        return min(fitting(length), budget)

    limits = Limits(rows, layout.data, layout.alignment)
    if not rows(limits.aligned(longest)):
        why = f"--max_batch_tokens {request.max_batch_tokens}"
        if not fitting(limits.aligned(longest)):
            why = f"{limit / 1e9:.1f} GB a device"
        raise UserError(
            f"the longest sample, {longest} tokens, does not fit in {why} on a mesh of "
            f"{layout.data} x {layout.model}: raise the second number of --mesh_shape, lower "
            "--max_model_len or the layers, or raise --max_batch_tokens where it is set"
        )
    return replace(prepared, layout=layout, batches=plan_batches(lengths, limits))


def agree(prepared: Prepared, peers: Peers) -> None:
    """Raises UserError where the processes of a run were not asked for the same, or do not read
    the same. The paths of model, tasks and results may differ."""
    request = prepared.request
    own = {"process_id", "coordinator_address", "coordinator_timeout", "peer_timeout", "verbose"}
    said = {
        "arguments": {
            f"--{name}": value
            for name, value in request.arguments.items()
            if name not in own and not name.endswith(("_path", "_dir"))
        },
        "tasks": tasks_hash(prepared.tasks),
        "prompt": prepared.fmt.template_hash,
        "tokens": [sum(sample.length.total for sample in prepared.samples), prepared.stop_ids],
        "config": asdict(prepared.config),
        "batches": hashlib.sha256(repr(prepared.batches).encode()).hexdigest(),
    }
    everyone = peers.exchange("request", json.loads(json.dumps(said)))
    for index, theirs in enumerate(everyone):
        if changes := differences(everyone[0], theirs):
            changes = [change.removeprefix("arguments.") for change in changes]
            raise UserError(
                f"process {index} was started differently than process 0: {some(changes)}; start "
                "all with the same flags and files"
            )


def tasks_hash(tasks: Sequence[arc.Task]) -> str:
    """sha256 of the tasks with their ground truth."""
    digest = hashlib.sha256()
    for task in tasks:
        digest.update(json.dumps(asdict(task)).encode())
    return digest.hexdigest()


def train_pairs(prepared: Prepared) -> dict[str, int]:
    """How many train pairs the samples' tasks have, how many their prompts keep, and how many
    samples keep fewer than there are, for want of room."""
    there = [len(sample.original.train) for sample in prepared.samples]
    kept = [sample.num_train_pairs for sample in prepared.samples]
    shortened = sum(k < n for k, n in zip(kept, there, strict=True))
    return {"available": sum(there), "kept": sum(kept), "samples_shortened": shortened}


def check_paths(request: Request) -> None:
    """Raises UserError where output could not be written, or would replace what the run reads."""
    output, flag = Path(request.output_path), request.output_flag
    try:
        if output.is_dir():
            raise UserError(f"{output} is a folder: give {flag} the path of a file")
        solutions = request.solutions_path or arc.solutions_beside(request.dataset_path)
        for path in filter(None, (request.dataset_path, solutions)):
            if output.exists() and Path(path).exists() and output.samefile(path):
                raise UserError(f"{path} is read by this run: choose another {flag}")
        check_writable(output.parent)
        if request.upload_to_cloud and stem(output.name):
            raise UserError(
                f"{output.name} is what a file of the run itself is called in the bucket: choose "
                f"another {flag}"
            )
        if request.activations_dir is None:
            return
        folder = Path(request.activations_dir)
        if output.absolute() in (folder.absolute(), *folder.absolute().parents):
            raise UserError(f"{output} is on the way to {folder}: choose another {flag}")
        if output.absolute().parent == folder.absolute() and stem(output.name):
            raise UserError(f"{output} is a file of the run itself: choose another {flag}")
        check_writable(folder)
    except OSError as error:  # of the paths themselves: too long a name, or no permission
        raise UserError(f"cannot write {output}: {error.strerror}; choose another path") from error


def read_tasks(request: Request) -> tuple[list[arc.Task], str]:
    """The first `max_tasks` tasks, those of this shard, with ground truth where a solutions file
    holds it; and a hash of those of all shards, without."""
    tasks = [
        replace(task, train=task.train[: request.max_train_pairs])
        for task in islice(arc.read_tasks(request.dataset_path), request.max_tasks)
    ]
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
    tasks: Sequence[arc.Task],
    fmt: PromptFormat,
    tokenizer: Any,
    request: Request,
    max_model_len: int,
) -> tuple[list[Sample], list[dict[str, Any]]]:
    """Every test input in every view as a sample, with as many train pairs as fit, or skipped with
    a reason."""
    samples, skipped = [], []
    few = len(tasks) * request.augmentations < 200
    for original, view in _shown(tqdm(tasks, "tokenising", unit=" tasks", disable=few), request):
        task = view.show_task(original) if view else original
        for index, pair in enumerate(task.test):
            reserved = request.max_output_tokens
            answer = 0
            if request.teacher_forcing:
                if pair.output is None:
                    reason = "no ground truth to force"
                    skipped.append(_skip(task, index, view, reason))
                    continue
                answer = reserved = len(tokens.encode_answer(fmt, pair.output, tokenizer)[0])
            wanted = len(task.train)
            for pairs in range(wanted, min(wanted, 1) - 1, -1):
                prompt = len(tokens.encode(fmt.render(task, index, pairs), tokenizer)[0])
                if prompt + reserved <= max_model_len:
                    expected = 0 if request.teacher_forcing else expected_cells(task, index)
                    length = Length(prompt, answer, expected)
                    samples.append(Sample(original, index, pairs, length, view))
                    break
            else:
                reason = (
                    f"does not fit in {max_model_len} tokens: {prompt} of the prompt with the last "
                    f"train pair alone, {reserved} for the answer"
                )
                skipped.append(_skip(task, index, view, reason))
    return samples, skipped


def _shown(tasks: Iterable[arc.Task], request: Request) -> Iterator[tuple[arc.Task, View | None]]:
    """Each task with each of its views; with None where a run is not augmented."""
    for task in tasks:
        if request.augmentations == 1:
            yield task, None
        else:
            yield from ((task, view) for view in views(task, request.augmentations, request.seed))


def expected_cells(task: arc.Task, index: int) -> int:
    """Cells that the answer is likely to have: as many for each cell of its input as the train
    pairs have on average."""

    def cells(grid: arc.Grid) -> int:
        return len(grid) * len(grid[0])

    seen = sum(cells(pair.input) for pair in task.train)
    made = sum(cells(pair.output) for pair in task.train)
    return round(cells(task.test[index].input) * made / seen) if seen else 0


def _skip(task: arc.Task, index: int, view: View | None, reason: str) -> dict[str, Any]:
    number = {"view": view.number} if view else {}
    return {"task_id": task.task_id, "sample_idx": index, **number, "reason": reason}


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


def settings(prepared: Prepared, peers: Peers) -> dict[str, Any]:
    """The manifest entries that decide what is computed; a resumed run must have the same."""
    request, config = prepared.request, prepared.config
    return {
        "model": {
            "path": prepared.uris.get(request.model_path, request.model_path),
            "model_type": config.model_type,
            "num_layers": config.num_layers,
            "hidden_size": config.hidden_size,
            "vocab_size": config.vocab_size,
            "dtype": prepared.dtype,
            "hash": prepared.checkpoint.fingerprint(peers),
        },
        "dataset": {
            "path": prepared.uris.get(request.dataset_path, request.dataset_path),
            "hash": tasks_hash(prepared.tasks),
            "tasks": len(prepared.tasks),
            "whole_hash": prepared.whole_hash,
        },
        "prompt": {
            "format": prepared.fmt.name,
            "encoding": prepared.fmt.encoding,
            "template_hash": prepared.fmt.template_hash,
            "max_train_pairs": request.max_train_pairs,
            "max_model_len": prepared.max_model_len,
            # Where there is but one view nothing is said, as in the manifests of earlier runs.
            **({"augmentations": request.augmentations} if request.augmentations > 1 else {}),
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
