"""A plan: a request, checked, with everything that the user can get wrong, before a model loads.

`plan_run` reads the configuration, the tokenizer, the tasks and the headers of the weights, and
plans every sample and batch. It writes nothing, and of the device it knows the kind alone.
"""

import logging
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import jax
import numpy as np

from utils.arc import tasks as arc
from utils.arc.tasks import SampleKey
from utils.errors import UserError
from utils.model.capture import CaptureSpec, width_of
from utils.model.config import ModelConfig
from utils.model.layout import (
    Layout,
    check_shape,
    default_dtype,
    find_devices,
    make_mesh,
    shapes_of,
)
from utils.model.weights import Checkpoint, open_checkpoint
from utils.plan.batching import Batch, cache_slots, chunk_tokens, plan_batches
from utils.plan.inputs import localized
from utils.plan.interventions import Intervention, check_interventions, read_interventions
from utils.plan.memory import Workload, device_bytes, rows_that_fit
from utils.plan.request import Request
from utils.plan.samples import Sample, plan_samples, read_tasks, skip_reasons, tasks_hash
from utils.prompt.codec import Codec, Encoded, load_codec
from utils.shards.manifest import stem
from utils.store.bucket import BucketFolder, Receipt
from utils.store.local import check_file, check_writable
from utils.store.region import far_bucket

log = logging.getLogger(__name__)


@dataclass(frozen=True, eq=False)
class Plan:
    """A run that has been checked: what is computed, in which batches, and where it is stored.

    request: as the user made it. workload: what is computed of each batch. max_model_len: tokens of
    prompt and answer together. tasks: those of this shard; whole_hash: sha256 of those of all
    shards. samples: what is run; skipped: what is not, as the manifest lists it. batches: indices
    into samples, largest cache first, and of each cache the shortest answers. bucket: where the run
    is sent, or None; listing: file name -> what was there when the plan was made.
    """

    request: Request
    config: ModelConfig
    checkpoint: Checkpoint
    codec: Codec
    capture: CaptureSpec
    interventions: tuple[Intervention, ...]
    workload: Workload
    layout: Layout
    dtype: str
    max_model_len: int
    tasks: tuple[arc.Task, ...]
    whole_hash: str
    samples: tuple[Sample, ...]
    skipped: tuple[dict[str, Any], ...]
    batches: tuple[Batch, ...]
    bucket: BucketFolder | None
    listing: dict[str, Receipt]

    @property
    def run_folder(self) -> Path:
        """Where shards, answers and manifest go; without extraction, a folder beside the output
        that lets the run be resumed, and of which the manifest alone stays at its end."""
        request = self.request
        return Path(request.activations_dir or f"{request.output_path}.run")

    @property
    def train_pairs(self) -> dict[str, int]:
        """How many train pairs the samples' tasks have, how many their prompts keep, and how many
        samples keep fewer than there are, for want of room."""
        lost = [len(sample.original.train) - sample.num_train_pairs for sample in self.samples]
        kept = sum(sample.num_train_pairs for sample in self.samples)
        shortened = sum(map(bool, lost))
        return {"available": kept + sum(lost), "kept": kept, "samples_shortened": shortened}

    def encode(self, sample: Sample) -> Encoded:
        """The sample's prompt, and the answer that is forced."""
        forced = self.request.teacher_forcing
        return self.codec.encode(sample.task, sample.sample_idx, sample.num_train_pairs, forced)

    def without(self, done: set[SampleKey]) -> list[Batch]:
        """The batches with a sample still to do; their shapes stay, and samples that are done
        become padding."""
        todo = []
        for batch in self.batches:
            rows = tuple(
                i if i >= 0 and self.samples[i].key not in done else -1 for i in batch.rows
            )
            if max(rows) >= 0:
                todo.append(replace(batch, rows=rows))
        return todo

    def settings(self, weights_hash: str) -> dict[str, Any]:
        """The manifest entries that decide what is computed; a resumed run must have the same."""
        request, config, codec = self.request, self.config, self.codec
        adapter, quantization = self.checkpoint.adapter, self.checkpoint.quantization
        # A --model_path that is an adapter names the folder of the model.
        named = adapter is not None and request.adapter is None
        return {
            "model": {
                "path": str(self.checkpoint.folder) if named else request.model_path,
                "model_type": config.model_type,
                "num_layers": config.num_layers,
                "hidden_size": config.hidden_size,
                "vocab_size": config.vocab_size,
                "dtype": self.dtype,
                "hash": weights_hash,
                "adapter": adapter
                and {"path": request.adapter or request.model_path, "hash": adapter.hash},
                "quantization": quantization
                and {"method": quantization.method, "format": quantization.format},
            },
            "dataset": {
                "path": request.dataset_path,
                "hash": tasks_hash(self.tasks),
                "tasks": len(self.tasks),
                "whole_hash": self.whole_hash,
            },
            "prompt": {
                "format": codec.fmt.name,
                "encoding": codec.fmt.encoding,
                "template_hash": codec.fmt.template_hash,
                "tokenizer_hash": codec.tokenizer_hash,
                "stop_ids": list(codec.stop_ids),
                "max_train_pairs": request.max_train_pairs,
                "max_model_len": self.max_model_len,
                # Where there is but one view nothing is said, as in the manifests of earlier runs.
                **({"augmentations": request.augmentations} if request.augmentations > 1 else {}),
            },
            "interventions": [one.entry for one in self.interventions],
            "activations": {
                name: {
                    "hook_point": name.rpartition(".")[0],
                    "layer": int(name.rpartition(".")[2]),
                    "width": width_of(config, name),
                    "dtype": request.activation_dtype,
                }
                for name in self.capture.names
            },
            "capture": {
                "token_positions": request.token_positions,
                "max_rows_per_sample": request.max_rows_per_sample,
                "logits": not request.no_logits,
            },
            "generation": {
                "teacher_forcing": request.teacher_forcing,
                "max_output_tokens": request.max_output_tokens,
                "temperatures": request.temperatures,
                "seed": request.seed,
            },
        }


def plan_run(
    request: Request, devices: Sequence[jax.Device] | None = None, writes: bool = True
) -> Plan:
    """The plan of a run on the mesh that the request names, or on the best one; see `plan_meshes`.

    devices: what the run computes on (default: the first of this process, or with
    `request.distributed` those of all processes).
    """
    return next(plan_meshes(request, [request.mesh_shape], devices, writes))


def plan_meshes(
    request: Request,
    shapes: Sequence[tuple[int, int] | None],
    devices: Sequence[jax.Device] | None = None,
    writes: bool = True,
) -> Iterator[Plan]:
    """A plan for each (data, model) shape of the mesh, None for the best one; what does not depend
    on the mesh is read once. `request.mesh_shape` is not looked at.

    Reads and checks everything but the weights' values. Raises UserError; writes nothing. writes:
    whether a run is to follow, so that its paths and its bucket are checked too.
    """
    request.check()
    if devices is None:
        devices = find_devices(everywhere=request.distributed)
    for shape in filter(None, shapes):
        check_shape(*shape, devices)
    bucket, listing = None, {}
    if writes:
        check_paths(request)
        if request.upload_to_cloud:
            bucket = BucketFolder(request.cloud_bucket)
            listing = bucket.check_access()
            if jax.process_index() == 0 and (warning := far_bucket(bucket)):
                log.warning(warning)
    local = localized(request)
    checkpoint = open_checkpoint(local.model_path, local.adapter)
    config = checkpoint.config
    capture = CaptureSpec()
    if request.activations_dir is not None:
        capture = CaptureSpec.from_flags(
            config,
            request.layers_to_extract,
            request.hook_points,
            request.token_positions,
            request.max_rows_per_sample,
            request.seed,
        )
    interventions = read_interventions(request.interventions, config, request.generates)
    codec = load_codec(
        local.model_path,
        checkpoint.folder,
        request.prompt_format,
        request.grid_encoding,
        config.vocab_size,
    )
    tasks, whole_hash = read_tasks(local)
    max_model_len = _max_model_len(request, config)
    samples, skipped = plan_samples(tasks, codec, request, max_model_len)
    if not samples:
        raise UserError(
            f"none of the {len(skipped)} samples can be run: "
            + "; ".join(f"{reason} ({n})" for reason, n in skip_reasons(skipped)[:3])
            + ": lower --max_output_tokens, or raise --max_model_len where it is set"
        )
    if interventions:
        check_interventions(request, codec, samples, interventions)
    dtype = request.dtype or default_dtype(devices)
    # The memory of one of these devices, if possible of one that this process can ask.
    here = [device for device in devices if device.process_index == jax.process_index()]
    limit = device_bytes((here or devices)[0])
    for shape in shapes:
        tried = [shape] if shape else shapes_of(len(devices))
        layouts = (Layout.of(config, make_mesh(*mesh, devices)) for mesh in tried)
        work, layout, fitting, too_long = _fitting(
            request, config, capture, np.dtype(dtype), samples, layouts, limit
        )
        yield Plan(
            request=request,
            config=config,
            checkpoint=checkpoint,
            codec=codec,
            capture=capture,
            interventions=interventions,
            workload=work,
            layout=layout,
            dtype=dtype,
            max_model_len=max_model_len,
            tasks=tuple(tasks),
            whole_hash=whole_hash,
            samples=tuple(fitting),
            skipped=(*skipped, *too_long),
            batches=_batches(request, work, fitting, layout, limit),
            bucket=bucket,
            listing=listing,
        )


def _max_model_len(request: Request, config: ModelConfig) -> int:
    """Tokens that prompt and answer may take together."""
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
    return max_model_len


def _fitting(
    request: Request,
    config: ModelConfig,
    capture: CaptureSpec,
    dtype: np.dtype,
    samples: Sequence[Sample],
    layouts: Iterable[Layout],
    limit: int | None,
) -> tuple[Workload, Layout, list[Sample], list[dict[str, Any]]]:
    """The first layout on which every sample fits in `limit` bytes a device, or that on which most
    do; what is computed there, the samples that fit, and the others, as skipped with the reason.
    Raises UserError where none fits anywhere."""
    totals, best, needed = [sample.length.total for sample in samples], None, []
    for layout in layouts:
        chunk = chunk_tokens(totals, layout.platform == "cpu", layout.alignment)
        work = Workload(config, capture, chunk, request.room, dtype.itemsize)
        slots = [cache_slots(sample.length, chunk, work.room) for sample in samples]
        fits = rows_that_fit(work, layout, limit, layout.data, set(slots))
        fitting = [sample for sample, n in zip(samples, slots, strict=True) if fits[n]]
        if best is None or len(fitting) > len(best[2]):
            best = work, layout, fitting
        if len(fitting) == len(samples):
            break
        least = work.batch_bytes(layout, layout.data, min(slots))
        needed.append(work.parameter_bytes(layout) + least)
    work, layout, fitting = best
    if not fitting:
        raise UserError(
            f"not even the shortest sample, {min(totals)} tokens, fits on {layout.mesh.size} "
            f"devices of {limit / 1e9:.1f} GB: about {min(needed) / 1e9:.1f} GB each are needed; "
            "raise the second number of --mesh_shape, lower --max_output_tokens "
            "or the layers, or take more devices"
        )
    keys = {sample.key for sample in fitting}
    too_long = [
        sample.skipped(
            f"does not fit in {limit / 1e9:.1f} GB a device: {sample.length.total} tokens "
            f"on a mesh of {layout.data} x {layout.model}"
        )
        for sample in samples
        if sample.key not in keys
    ]
    return work, layout, fitting, too_long


def _batches(
    request: Request, work: Workload, samples: Sequence[Sample], layout: Layout, limit: int | None
) -> tuple[Batch, ...]:
    """The batches that fit in `limit` bytes a device, and in --max_batch_tokens. Raises UserError
    where the longest sample does not fit in the latter."""
    devices, lengths = layout.mesh.size, [sample.length for sample in samples]
    longest: dict[int, int] = {}  # slots of a cache -> tokens of the longest sample that needs them
    for length in lengths:
        slots = cache_slots(length, work.chunk, work.room)
        longest[slots] = max(longest.get(slots, 0), length.total)
    most = min(request.batch_size * devices, -(-len(lengths) // layout.data) * layout.data)
    rows = rows_that_fit(work, layout, limit, most, longest)
    if (budget := request.max_batch_tokens) is not None:
        rows = {slots: min(n, budget * devices // longest[slots]) for slots, n in rows.items()}
        if rows[max(rows)] < layout.data:
            raise UserError(
                f"the longest sample, {max(longest.values())} tokens, does not fit in "
                f"--max_batch_tokens {budget} on a mesh of {layout.data} x {layout.model}: raise "
                "it or the second number of --mesh_shape, or lower --max_model_len"
            )
    whole = {slots: max(1, n // layout.data) * layout.data for slots, n in rows.items()}
    return tuple(plan_batches(lengths, work.chunk, whole, work.room, layout.data))


def check_paths(request: Request) -> None:
    """Raises UserError where output could not be written, or would replace what the run reads."""
    output, flag = Path(request.output_path), request.output_flag
    try:
        check_file(output, flag)
        solutions = request.solutions_path or arc.solutions_beside(request.dataset_path)
        for path in filter(None, (request.dataset_path, solutions)):
            if output.exists() and Path(path).exists() and output.samefile(path):
                raise UserError(f"{path} is read by this run: choose another {flag}")
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
