"""The run loop that the inference scripts share: tasks in; predictions, shards and manifest out.

Batches are computed in a thread of their own, so that storing one overlaps with computing the next
and a signal is answered while the device is busy.
"""

import collections
import importlib.metadata
import logging
import platform
import shutil
import subprocess
import time
import zlib
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import numpy as np
from tqdm import tqdm

from utils import scoring, tokens
from utils.batching import Batch, pad_rows
from utils.cli import Interrupted, Signals
from utils.errors import UserError
from utils.generate import Decoded, Engine, Prefilled, Sampling
from utils.manifest import read_answers, write_json_atomic
from utils.mesh import single_device_mesh, use_compilation_cache
from utils.model import Decoder
from utils.prepare import Prepared, Sample, settings
from utils.shards import ShardWriter, free_bytes, planned_shards

log = logging.getLogger(__name__)


@dataclass
class Row:
    """What the model made of one sample: token ids int32 [T], captures name -> [rows, D]."""

    sample: Sample
    prompt_ids: np.ndarray
    prompt_cells: np.ndarray
    answers: list[np.ndarray]  # ids of each prediction
    logprobs: list[np.ndarray]
    captures: dict[str, np.ndarray]
    logits: np.ndarray | None


def encode_row(prepared: Prepared, sample: Sample) -> Row:
    """A sample's prompt, and the answer that is forced, before anything was computed."""
    prompt = prepared.fmt.render(sample.task, sample.sample_idx, sample.num_train_pairs)
    ids, cells = tokens.encode(prompt, prepared.tokenizer)
    forced = []
    if prepared.request.teacher_forcing:
        forced = [tokens.encode_answer(prepared.fmt, sample.target, prepared.tokenizer)[0]]
    return Row(sample, ids, cells, forced, [], {}, None)


class Computation:
    """Runs batches through the engine and brings what is kept to the host."""

    def __init__(self, prepared: Prepared):
        self.prepared = prepared
        request, capture = prepared.request, prepared.capture
        layers = None
        self.with_logits = request.generates or not request.no_logits
        if not self.with_logits and not request.teacher_forcing:
            layers = capture.last_layer + 1
        if prepared.dtype == "float32":  # accelerators multiply float32 in fewer bits by default
            jax.config.update("jax_default_matmul_precision", "highest")
        use_compilation_cache()
        params = prepared.checkpoint.load(single_device_mesh(), np.dtype(prepared.dtype))
        self.engine = Engine(Decoder(prepared.config, capture, layers), params)
        self.tokens = 0
        self.seconds = 0.0

    def __call__(self, batch: Batch) -> list[Row]:
        """The rows of a batch that hold samples, in order."""
        compiling = self.engine.compile_seconds
        start = time.perf_counter()
        rows = self._run(batch)
        compiling = self.engine.compile_seconds - compiling
        self.seconds += time.perf_counter() - start - compiling
        self.tokens += sum(
            len(row.prompt_ids) + sum(len(answer) for answer in row.answers) for row in rows
        )
        return rows

    def _run(self, batch: Batch) -> list[Row]:
        prepared, request = self.prepared, self.prepared.request
        samples = [prepared.samples[i] if i >= 0 else None for i in batch.rows]
        rows = [sample and encode_row(prepared, sample) for sample in samples]
        inputs = [row and np.concatenate([row.prompt_ids, *row.answers]) for row in rows]
        padded = pad_rows(inputs, batch.bucket.length)
        lengths = np.array([len(row.prompt_ids) if row else 1 for row in rows], np.int32)
        slots = batch.bucket.length + request.max_output_tokens if request.generates else 0
        prefilled = self.engine.prefill(
            padded, lengths, bucket=batch.bucket, cache_slots=slots, with_logits=self.with_logits
        )
        decoded = self._decode(prefilled, lengths, samples) if request.generates else []
        self._fetch(rows, prefilled, decoded)
        return [row for row in rows if row]

    def _decode(
        self, prefilled: Prefilled, lengths: np.ndarray, samples: Sequence[Sample | None]
    ) -> list[Decoded]:
        """Each prediction from the one prefill; only the first is captured."""
        request = self.prepared.request
        uncaptured = Decoder(self.prepared.config)
        decoded = []
        for k, temperature in enumerate(request.temperatures):
            model = uncaptured if k else self.engine.model
            keys = np.array([_sample_key(request.seed, s, k) if s else 0 for s in samples])
            sampling = Sampling(request.max_output_tokens, self.prepared.stop_ids, temperature)
            last = k + 1 == len(request.temperatures)
            result = self.engine.decode(
                model, prefilled, lengths, keys.astype(np.uint32), sampling, keep_cache=not last
            )
            decoded.append(result)
        prefilled.cache = None
        return decoded

    def _fetch(
        self, rows: Sequence[Row | None], prefilled: Prefilled, decoded: Sequence[Decoded]
    ) -> None:
        """Device to host: of the decode buffers only the steps that were run."""
        positions = self.prepared.capture.positions
        logits = None if self.prepared.request.no_logits else prefilled.logits
        prompt_captures, logits, logprobs = jax.device_get(
            (prefilled.captures, logits, prefilled.logprobs)
        )
        results = []
        for result in decoded:
            counts, ids, answer_logprobs = jax.device_get(
                (result.counts, result.tokens, result.logprobs)
            )
            # Rounded up, so that slicing compiles for few sizes.
            steps = min(-(-int(result.steps) // 128) * 128, ids.shape[1])
            captures = jax.device_get({n: v[:, :steps] for n, v in result.captures.items()})
            results.append((counts, ids, answer_logprobs, captures))
        for b, row in enumerate(rows):
            if row is None:
                continue
            P = len(row.prompt_ids)
            forced = len(row.answers[0]) if row.answers else 0
            take = {"all": P + forced, "prompt": P, "last": 1, "answer": forced}[positions]
            parts = {name: [value[b, :take]] for name, value in prompt_captures.items()}
            if forced:
                row.logprobs = [logprobs[b, :forced]]
            for counts, ids, answer_logprobs, captures in results:
                n = int(counts[b])
                row.answers.append(ids[b, :n])
                row.logprobs.append(answer_logprobs[b, :n])
                for name, value in captures.items():
                    parts.setdefault(name, []).append(value[b, :n])
            # Copies, so that a stored row does not keep the whole batch in memory.
            row.captures = {
                name: np.concatenate(parts[name]) for name in self.prepared.capture.names
            }
            row.logits = None if logits is None else logits[b : b + 1].copy()


def _sample_key(seed: int, sample: Sample, prediction: int) -> int:
    """What a sample draws does not depend on its place in the dataset or batch; never 0."""
    text = f"{seed}:{sample.task.task_id}:{sample.sample_idx}:{prediction}"
    return zlib.crc32(text.encode()) or 1


def to_item(row: Row, prepared: Prepared) -> tuple[dict[str, Any], dict[str, Any]]:
    """The item of a shard and the answer of `predictions.json`."""
    request, sample = prepared.request, row.sample
    P = len(row.prompt_ids)
    cells, attempts, prediction, correct = [row.prompt_cells], [], None, None
    if request.teacher_forcing:
        cells.append(tokens.encode_answer(prepared.fmt, sample.target, prepared.tokenizer, P)[1])
    elif request.generates:
        for ids, logprobs in zip(row.answers, row.logprobs, strict=True):
            said = tokens.answer_cells(ids, prepared.tokenizer, prepared.fmt, P, prepared.stop_ids)
            if not attempts:
                prediction = said.grid
                cells.append(said.cells)
            logprob = float(logprobs.sum(dtype=np.float64))
            attempts.append({"grid": said.grid, "text": said.text, "logprob": logprob})
        if sample.target is not None:
            correct = prediction == sample.target
    ids = np.concatenate([row.prompt_ids, *row.answers[:1]])
    item = {
        "task_id": sample.key[0],
        "sample_idx": sample.key[1],
        "input_ids": ids,
        "prompt_length": P,
        "activations": row.captures,
        "output_logprobs": row.logprobs[0] if row.logprobs else np.zeros(0, np.float32),
        "cells": np.concatenate(cells),
        "num_train_pairs": sample.num_train_pairs,
        "prediction": prediction,
        "target": sample.target,
        "correct": correct,
        "teacher_forced": request.teacher_forcing,
    }
    if row.logits is not None and request.activations_dir is not None:
        item["output_logits"] = row.logits
    if prepared.capture.positions != "all":
        item["positions"] = kept_positions(prepared.capture.positions, P, len(ids))
    answer = scoring.answer(*sample.key, attempts, sample.target)
    return item, answer


def kept_positions(positions: str, prompt_length: int, length: int) -> np.ndarray:
    """The tokens that a capture's rows belong to, int32 [R]."""
    start, stop = {
        "all": (0, length),
        "prompt": (0, prompt_length),
        "answer": (prompt_length, length),
        "last": (prompt_length - 1, prompt_length),
    }[positions]
    return np.arange(start, stop, dtype=np.int32)


def open_writer(prepared: Prepared) -> ShardWriter:
    """The run's folder, checked against what is there already; nothing is changed yet."""
    request = prepared.request
    output = Path(request.output_path)
    if output.exists() and not (request.resume or request.overwrite):
        raise UserError(
            f"{output} exists: continue its run with --resume, replace it with --overwrite, or "
            "choose another path"
        )
    facts = {
        "arguments": request.arguments,
        "versions": _versions(),
        "devices": [str(device) for device in jax.devices()],
        "mesh_shape": [1, 1],
        "processes": jax.process_count(),
    }
    writer = ShardWriter(
        prepared.run_folder,
        settings(prepared),
        facts,
        activation_dtype=request.activation_dtype,
        save_every_n_samples=request.save_every_n_samples,
        max_shard_mb=request.max_shard_mb,
        resume=request.resume,
        overwrite=request.overwrite,
    )
    if output.exists() and request.resume and not writer.continues:
        raise UserError(
            f"{output} exists, but there is no run to resume in {prepared.run_folder}: choose "
            "another --output_path, or replace it with --overwrite"
        )
    return writer


def run(prepared: Prepared, signals: Signals) -> dict[str, Any]:
    """Computes and stores what is not there yet, then writes `output_path`.

    Returns the finished manifest. Raises UserError (exit code 1 from the first write on) and
    Interrupted; in both cases what was committed stays, and `--resume` does the rest.
    """
    request = prepared.request
    output, folder = Path(request.output_path), prepared.run_folder
    ended = request.activations_dir is None and output.exists() and not folder.exists()
    if request.resume and ended:  # without extraction the folder ends with its run
        log.info("the run of %s is complete; there is nothing to do", output)
        return {}
    writer = open_writer(prepared)
    _check_disk(prepared, writer.done)
    if writer.complete and output.exists():
        log.info("the run in %s is complete; there is nothing to do", folder)
        return {}
    todo = _without_done(prepared, writer)
    pool = ThreadPoolExecutor(1, "compute")
    try:
        computation = pool.submit(Computation, prepared).result() if todo else None
        try:
            with signals.shielded():
                writer.set_skipped(prepared.skipped)
                writer.start()
            _run_batches(prepared, todo, computation, pool, writer, signals)
            with signals.shielded():
                return _finish(prepared, writer)
        except Interrupted:
            with signals.shielded():
                writer.close_shard()
            raise
        except UserError as error:
            error.exit_code = 1
            raise
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        raise UserError(
            "the device ran out of memory: lower --batch_size, --max_model_len or "
            "--max_output_tokens, then --resume",
            exit_code=1,
        ) from error
    finally:
        pool.shutdown(wait=False, cancel_futures=True)


def _without_done(prepared: Prepared, writer: ShardWriter) -> list[Batch]:
    """The batches with a row still to do; the shapes stay, rows that are done become padding."""
    todo = []
    for batch in prepared.batches:
        rows = tuple(
            i if i >= 0 and prepared.samples[i].key not in writer.done else -1 for i in batch.rows
        )
        if max(rows) >= 0:
            todo.append(Batch(batch.bucket, rows))
    return todo


def _run_batches(
    prepared: Prepared,
    todo: Sequence[Batch],
    computation: Computation | None,
    pool: ThreadPoolExecutor,
    writer: ShardWriter,
    signals: Signals,
) -> None:
    bar = tqdm(
        total=len(prepared.samples), initial=len(writer.done), unit=" samples", desc="inference"
    )
    waiting: collections.deque[Future[list[Row]]] = collections.deque()

    def store() -> None:
        rows = waiting.popleft().result()
        with signals.shielded():
            for row in rows:
                writer.update_timing(
                    computation.seconds, computation.engine.compile_seconds, computation.tokens
                )
                writer.add(*to_item(row, prepared))
            bar.update(len(rows))
            rate = computation.tokens / max(computation.seconds, 1e-9)
            bar.set_postfix_str(f"{rate:.0f} tokens/s")

    with bar:
        for batch in todo:
            waiting.append(pool.submit(computation, batch))
            if len(waiting) > 1:  # the next one computes while this one is stored
                store()
        while waiting:
            store()


def _finish(prepared: Prepared, writer: ShardWriter) -> dict[str, Any]:
    request = prepared.request
    writer.close_shard()
    answers = read_answers(prepared.run_folder)
    targets = {task.task_id: [pair.output for pair in task.test] for task in prepared.tasks}
    predictions = scoring.predictions(targets, answers, generated=request.generates)
    scores = scoring.accuracy(predictions)
    write_json_atomic(request.output_path, predictions)
    manifest = writer.finish({"scores": scores} if request.generates else None)
    if request.activations_dir is None:
        shutil.rmtree(prepared.run_folder)
    return manifest


def planned_items(prepared: Prepared) -> Iterator[dict[str, Any]]:
    """Items as the run will store them, in order, arrays zero: exact sizes unless it generates.

    A generated answer is taken at its longest, without a grid.
    """
    request, config = prepared.request, prepared.config
    for batch in prepared.batches:
        for i in (i for i in batch.rows if i >= 0):
            row = encode_row(prepared, prepared.samples[i])
            if request.generates:
                row.answers = [np.zeros(request.max_output_tokens, np.int32)]
            P, A = len(row.prompt_ids), sum(len(answer) for answer in row.answers)
            row.logprobs = [np.zeros(A, np.float32)] * len(row.answers)
            kept = len(kept_positions(prepared.capture.positions, P, P + A))
            zeros = np.zeros((kept, config.hidden_size), request.activation_dtype)
            row.captures = dict.fromkeys(prepared.capture.names, zeros)
            if not request.no_logits:
                row.logits = np.zeros((1, config.vocab_size), request.activation_dtype)
            yield to_item(row, prepared)[0]


def plan_storage(prepared: Prepared) -> tuple[int, list[tuple[int, int]]]:
    """Total tokens, and (samples, bytes) of each shard; see `planned_items`."""
    total = 0

    def counted() -> Iterator[dict[str, Any]]:
        nonlocal total
        for item in tqdm(planned_items(prepared), total=len(prepared.samples), desc="planning"):
            total += len(item["input_ids"])
            yield item

    request = prepared.request
    shards = planned_shards(
        counted(), request.activation_dtype, request.save_every_n_samples, request.max_shard_mb
    )
    shards = list(shards)
    return total, shards


def _check_disk(prepared: Prepared, done: set[tuple[str, int]]) -> None:
    """Raises UserError when even answers of one token would not fit on the disk."""
    request, need = prepared.request, 0
    item_size = np.dtype(request.activation_dtype).itemsize
    for sample in prepared.samples:
        if sample.key not in done:
            length = sample.length.total
            kept = kept_positions(prepared.capture.positions, sample.length.prompt, length)
            values = len(kept) * prepared.config.hidden_size * len(prepared.capture.names)
            if prepared.capture.names and not request.no_logits:
                values += prepared.config.vocab_size
            need += values * item_size
    if need > (free := free_bytes(prepared.run_folder)):
        raise UserError(
            f"{prepared.run_folder} needs at least {need / 1e9:.2f} GB and has {free / 1e9:.2f} GB "
            "free: free space, or take fewer layers, --token_positions or tasks"
        )


def _versions() -> dict[str, str | None]:
    """Of python, the libraries, and the project's git commit where it is a checkout."""
    packages = ("jax", "flax", "transformers", "numpy")
    found: dict[str, str | None] = {"python": platform.python_version()}
    found.update({name: importlib.metadata.version(name) for name in packages})
    try:
        commit = subprocess.run(
            ["git", "rev-parse", "HEAD"],
            cwd=Path(__file__).parent,
            capture_output=True,
            text=True,
            check=True,
        ).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        commit = None
    return {**found, "commit": commit}
