"""Batches through the engine, and what comes back as items: the model's side of the run loop.

Knows no folders and no other process; `extract` stores what this makes.
"""

# B batch   T prompt tokens, padded   A answer tokens   P prompt tokens   D model width

import time
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import numpy as np

from utils import scoring, tokens
from utils.batching import Batch, Bucket, pad_rows
from utils.generate import Decoded, Engine, Prefilled, Sampling
from utils.layout import Layout
from utils.mesh import single_device_mesh, use_compilation_cache
from utils.model import Decoder
from utils.prepare import Prepared, Sample


@dataclass
class Row:
    """What the model made of one sample: token ids int32 [T], captures name -> [rows, D].

    forced_cells: int32 [C, 7] of the answer that was forced, or None.
    """

    sample: Sample
    prompt_ids: np.ndarray
    prompt_cells: np.ndarray
    answers: list[np.ndarray]  # ids of each prediction
    logprobs: list[np.ndarray]
    captures: dict[str, np.ndarray]
    logits: np.ndarray | None
    forced_cells: np.ndarray | None


def encode_row(prepared: Prepared, sample: Sample) -> Row:
    """A sample's prompt, and the answer that is forced, before anything was computed."""
    prompt = prepared.fmt.render(sample.task, sample.sample_idx, sample.num_train_pairs)
    ids, cells = tokens.encode(prompt, prepared.tokenizer)
    if not prepared.request.teacher_forcing:
        return Row(sample, ids, cells, [], [], {}, None, None)
    answer, answer_cells = tokens.encode_answer(
        prepared.fmt, sample.target, prepared.tokenizer, len(ids)
    )
    return Row(sample, ids, cells, [answer], [], {}, None, answer_cells)


class Timing(NamedTuple):
    """Of all batches so far: seconds of computing, of compiling; real tokens through the model."""

    seconds: float
    compile_seconds: float
    tokens: int


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
        self.layout = Layout.of(prepared.config, single_device_mesh())
        params = prepared.checkpoint.load(self.layout, np.dtype(prepared.dtype))
        self.engine = Engine(Decoder(prepared.config, self.layout, capture, layers), params)
        self.tokens = 0
        self.seconds = 0.0

    def __call__(self, batch: Batch) -> tuple[list[Row], Timing]:
        """The rows of a batch that hold samples, in order, and the timing with it."""
        compiling = self.engine.compile_seconds
        start = time.perf_counter()
        rows = self._run(batch)
        compiling = self.engine.compile_seconds - compiling
        self.seconds += time.perf_counter() - start - compiling
        self.tokens += sum(
            len(row.prompt_ids) + sum(len(answer) for answer in row.answers) for row in rows
        )
        return rows, Timing(self.seconds, self.engine.compile_seconds, self.tokens)

    def _run(self, batch: Batch) -> list[Row]:
        prepared, request = self.prepared, self.prepared.request
        samples = [prepared.samples[i] if i >= 0 else None for i in batch.rows]
        rows = [sample and encode_row(prepared, sample) for sample in samples]
        inputs = [row and np.concatenate([row.prompt_ids, *row.answers]) for row in rows]
        padded = pad_rows(inputs, batch.bucket.length)
        lengths = np.array([len(row.prompt_ids) if row else 1 for row in rows], np.int32)
        answers = [sum(map(len, row.answers)) if row else 0 for row in rows]
        prefilled = self.engine.prefill(
            *(padded, lengths, np.array(answers, np.int32)),
            bucket=batch.bucket,
            answer_slots=request.max_output_tokens if request.generates else 0,
            with_logits=self.with_logits,
        )
        decoded = (
            self._decode(batch.bucket, prefilled, lengths, samples) if request.generates else []
        )
        self._fetch(rows, prefilled, decoded)
        return [row for row in rows if row]

    def _decode(
        self,
        bucket: Bucket,
        prefilled: Prefilled,
        lengths: np.ndarray,
        samples: Sequence[Sample | None],
    ) -> list[Decoded]:
        """Each prediction from the one prefill; only the first is captured."""
        request = self.prepared.request
        uncaptured = Decoder(self.prepared.config, self.layout)
        decoded = []
        for k, temperature in enumerate(request.temperatures):
            model = uncaptured if k else self.engine.model
            keys = np.array([_sample_key(request.seed, s, k) if s else 0 for s in samples])
            sampling = Sampling(request.max_output_tokens, self.prepared.stop_ids, temperature)
            result = self.engine.decode(
                *(model, prefilled, lengths, keys.astype(np.uint32)),
                prompt_slots=bucket.length,
                sampling=sampling,
                keep_cache=len(request.temperatures) > 1,
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
        cells.append(row.forced_cells)
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
