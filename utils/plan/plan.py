"""A request, checked: everything that the user can get wrong, before a model loads.

`prepare` reads the configuration, the tokenizer, the tasks and the headers of the weights, and
plans every sample and batch. It writes nothing, and of the device it knows the kind alone.
"""

import collections
import json
import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import jax
import numpy as np

from utils.arc import tasks as arc
from utils.errors import UserError
from utils.model.capture import CaptureSpec
from utils.model.config import ModelConfig
from utils.model.layout import Layout, check_shape, default_dtype, make_mesh
from utils.model.weights import Checkpoint
from utils.plan.batching import Batch, Limits, plan_batches
from utils.plan.inputs import localized, speaking_of
from utils.plan.memory import Workload, choose_model_axis, device_bytes, rows_that_fit
from utils.plan.request import Request
from utils.plan.samples import Sample, plan_samples, read_tasks, tasks_hash
from utils.prompt import codec as tokens
from utils.prompt.formats import PromptFormat, load_format
from utils.shards.manifest import stem
from utils.store.bucket import BucketFolder, Receipt
from utils.store.local import check_writable


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


def settings(prepared: Prepared, weights_hash: str) -> dict[str, Any]:
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
            "hash": weights_hash,
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
