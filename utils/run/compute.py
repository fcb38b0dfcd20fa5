"""Batches through the engine, and what comes back as items: the model's side of the run loop.

Knows no folders; `extract` stores what this makes.
"""

# B batch   T prompt tokens, padded   A answer tokens   P prompt tokens   D model width

import time
import zlib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import jax
import numpy as np

from utils.arc import scores as scoring
from utils.arc.views import original_cells
from utils.model.decoder import Decoder
from utils.model.engine import Engine, for_every_shape
from utils.model.generate import Decoded, Outputs, Prefilled, Sampling, Shape
from utils.model.layout import use_compilation_cache
from utils.plan.batching import Batch, pad_rows
from utils.plan.plan import Prepared
from utils.plan.samples import Sample
from utils.prompt import codec as tokens


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

    @property
    def num_tokens(self) -> int:
        """That went through the model."""
        return len(self.prompt_ids) + sum(len(answer) for answer in self.answers)

    @property
    def nbytes(self) -> int:
        """Of the arrays that wait to be stored."""
        return sum(states.nbytes for states in self.captures.values()) + (
            0 if self.logits is None else self.logits.nbytes
        )


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


@dataclass
class Launched:
    """A batch on its way through the device; rows: place in the batch -> row of this process."""

    rows: dict[int, Row]
    owned: dict[jax.Device, range]
    prefilled: Prefilled
    decoded: list[Decoded]


@dataclass
class Usage:
    """Slots computed for rows of this process, and those of them that a sample's token took."""

    prefill: int = 0
    prefill_useful: int = 0
    decode: int = 0
    decode_useful: int = 0


class Computation:
    """Batches through the engine: `launch` hands one to the devices, `fetch` brings what is kept of
    it to the host; for one thread each. Every process launches the same batches in the same order.

    params: default, those of the checkpoint; their specs, where nothing is to be run.
    """

    def __init__(self, prepared: Prepared, params: Any = None):
        self.prepared = prepared
        request, capture = prepared.request, prepared.capture
        layers = None
        self.with_logits = request.generates or not request.no_logits
        if not self.with_logits and not request.teacher_forcing:
            layers = capture.last_layer + 1
        if prepared.dtype == "float32":  # accelerators multiply float32 in fewer bits by default
            jax.config.update("jax_default_matmul_precision", "highest")
        self.layout = prepared.layout
        if params is None:
            use_compilation_cache()
            params = prepared.checkpoint.load(self.layout, np.dtype(prepared.dtype))
        self.engine = Engine(Decoder(prepared.config, self.layout, capture, layers), params)
        several = len(request.temperatures) > 1
        # Of several predictions only the first is captured.
        self.samplings = [
            Sampling(request.max_output_tokens, tuple(prepared.stop_ids), t, k == 0, several)
            for k, t in enumerate(request.temperatures if request.generates else ())
        ]
        cache_room = request.max_output_tokens if request.generates else 0
        self.outputs = Outputs(self.with_logits, cache_room)
        self.usage = Usage()
        self.compile_seconds = 0.0

    def compile(self, batches: Sequence[Batch]) -> None:
        """Every shape that the batches need, before the first is launched."""
        start = time.perf_counter()
        shapes = ((batch.shape, len(batch.rows)) for batch in batches)
        for_every_shape(shapes, self.programs, "compiling")
        self.compile_seconds = time.perf_counter() - start

    def programs(self, shape: Shape, rows: int) -> list[Any]:
        """The compiled prefill of a shape, and the decoding of each prediction."""
        prefill = self.engine.prefill_program(rows, shape, self.outputs)
        decodes = [self.engine.decode_program(rows, shape, s) for s in self.samplings]
        return [prefill, *decodes]

    def launch(self, batch: Batch) -> Launched:
        """Returns without waiting for the devices."""
        prepared, request = self.prepared, self.prepared.request
        B = len(batch.rows)
        needed = self.layout.needed(B)
        samples = [
            prepared.samples[i] if i >= 0 and b in needed else None
            for b, i in enumerate(batch.rows)
        ]
        rows = [sample and encode_row(prepared, sample) for sample in samples]
        inputs = [row and np.concatenate([row.prompt_ids, *row.answers]) for row in rows]
        padded = pad_rows(inputs, batch.shape.length)
        lengths = np.array([len(row.prompt_ids) if row else 1 for row in rows], np.int32)
        answers = [sum(map(len, row.answers)) if row else 0 for row in rows]
        prefilled = self.engine.prefill(
            padded, lengths, np.array(answers, np.int32), batch.shape, self.outputs
        )
        decoded = self._decode(batch.shape, prefilled, lengths, samples)
        prefilled = replace(prefilled, cache=None)
        if request.no_logits or request.activations_dir is None:
            prefilled = replace(prefilled, logits=None)
        owned = self.layout.owned(B)
        mine = {b: rows[b] for span in owned.values() for b in span if rows[b]}
        self.usage.prefill += batch.shape.length * sum(map(len, owned.values()))
        self.usage.prefill_useful += sum(len(inputs[b]) for b in mine)
        return Launched(mine, owned, prefilled, decoded)

    def _decode(
        self,
        shape: Shape,
        prefilled: Prefilled,
        lengths: np.ndarray,
        samples: Sequence[Sample | None],
    ) -> list[Decoded]:
        """Each prediction from the one prefill."""
        decoded = []
        seed = self.prepared.request.seed
        for k, sampling in enumerate(self.samplings):
            keys = np.array([_sample_key(seed, s, k) if s else 0 for s in samples], np.uint32)
            decoded.append(self.engine.decode(prefilled, lengths, keys, shape, sampling))
        return decoded

    def fetch(self, launched: Launched) -> list[Row]:
        """Waits for the batch; of the decode buffers only the steps that were run are copied."""
        positions = self.prepared.capture.positions

        def host(x: jax.Array | None, stop: int | None = None) -> dict[int, np.ndarray]:
            """Place in the batch -> that row, of the rows that this process keeps."""
            found = {}
            for shard in [] if x is None else x.addressable_shards:
                if (span := launched.owned.get(shard.device)) is not None:
                    block = np.asarray(shard.data if stop is None else shard.data[:, :stop])
                    found.update(zip(span, block, strict=True))
            return found

        prompt_captures = {n: host(value) for n, value in launched.prefilled.captures.items()}
        logits, logprobs = host(launched.prefilled.logits), host(launched.prefilled.logprobs)
        results = []
        for result in launched.decoded:
            # Rounded up, so that slicing compiles for few sizes.
            steps = int(result.steps.addressable_data(0))
            stop = min(-(-steps // 128) * 128, result.tokens.shape[1])
            captures = {name: host(value, stop) for name, value in result.captures.items()}
            counts = host(result.counts)
            results.append((counts, host(result.tokens), host(result.logprobs), captures))
            self.usage.decode += steps * sum(map(len, launched.owned.values()))
            self.usage.decode_useful += sum(min(int(counts[b]), steps) for b in launched.rows)
        for b, row in launched.rows.items():
            P = len(row.prompt_ids)
            forced = len(row.answers[0]) if row.answers else 0
            take = {"all": P + forced, "prompt": P, "last": 1, "answer": forced}[positions]
            parts = {name: [value[b][:take]] for name, value in prompt_captures.items()}
            if forced:
                row.logprobs = [logprobs[b][:forced]]
            for counts, ids, answer_logprobs, captures in results:
                n = int(counts[b])
                row.answers.append(ids[b][:n])
                row.logprobs.append(answer_logprobs[b][:n])
                for name, value in captures.items():
                    parts.setdefault(name, []).append(value[b][:n])
            # Copies, so that a stored row does not keep the whole batch in memory.
            row.captures = {
                name: np.concatenate(parts[name]) for name in self.prepared.capture.names
            }
            row.logits = None
            if b in logits:
                row.logits = logits[b][None, : self.prepared.config.vocab_size].copy()
        return list(launched.rows.values())


def _sample_key(seed: int, sample: Sample, prediction: int) -> int:
    """What a sample draws does not depend on its place in the dataset or batch; never 0."""
    text = ":".join(map(str, (seed, *sample.key, prediction)))
    return zlib.crc32(text.encode()) or 1


def to_item(row: Row, prepared: Prepared) -> tuple[dict[str, Any], dict[str, Any]]:
    """The item of a shard, its grids as the view shows them, and the answer of the journal, its
    grids as the task has them."""
    request, sample, view = prepared.request, row.sample, row.sample.view
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
            grid = view.invert(said.grid) if view and said.grid else said.grid
            attempts.append({"grid": grid, "text": said.text, "logprob": logprob})
        if sample.target is not None:
            correct = prediction == sample.target
    ids = np.concatenate([row.prompt_ids, *row.answers[:1]])
    item = {
        "task_id": sample.original.task_id,
        "sample_idx": sample.sample_idx,
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
    task_id, sample_idx, *number = sample.key
    if view:
        dropped = len(sample.original.train) - sample.num_train_pairs
        item["view"] = view.to_dict()
        item["cells_original"] = original_cells(item["cells"], view, dropped)
    target = sample.original.test[sample_idx].output
    return item, scoring.answer(task_id, sample_idx, attempts, target, *number)


def kept_positions(positions: str, prompt_length: int, length: int) -> np.ndarray:
    """The tokens that a capture's rows belong to, int32 [R]."""
    start, stop = {
        "all": (0, length),
        "prompt": (0, prompt_length),
        "answer": (prompt_length, length),
        "last": (prompt_length - 1, prompt_length),
    }[positions]
    return np.arange(start, stop, dtype=np.int32)
