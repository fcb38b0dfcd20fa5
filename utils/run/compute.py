"""Batches through the engine, and what comes back as items: the model's side of the run loop.

Knows no folders; `loop` stores what this makes.
"""

# B batch   T prompt tokens, padded   A answer tokens   P prompt tokens   D model width
# R rows of a capture   V vocabulary

import time
import zlib
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from typing import Any

import jax
import numpy as np

from utils.arc import scores
from utils.arc.views import original_cells
from utils.model.decoder import Decoder
from utils.model.engine import Engine, for_every_shape
from utils.model.generate import Decoded, Outputs, Prefilled, Sampling, Shape
from utils.model.layout import use_compilation_cache
from utils.plan.batching import Batch, pad_rows
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


@dataclass(frozen=True, eq=False)
class Launched:
    """A batch on its way through the devices, and what of it is to be fetched.

    samples: place in the batch -> what stands there, of the places of this process. owned: device
    -> the places whose results it holds. prefilled: without the cache, and without logits that are
    not stored.
    """

    samples: dict[int, tuple[Sample, Encoded]]
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

    def __init__(self, plan: Plan, params: Any = None):
        self.plan = plan
        request, generates = plan.request, plan.request.generates
        with_logits, layers = generates or not request.no_logits, None
        if not with_logits and not request.teacher_forcing:
            layers = plan.capture.last_layer + 1
        self.layout = plan.layout
        if params is None:
            use_compilation_cache()
            params = plan.checkpoint.load(self.layout, np.dtype(plan.dtype))
        self.engine = Engine(Decoder(plan.config, self.layout, plan.capture, layers), params)
        self.outputs = Outputs(with_logits, request.max_output_tokens if generates else 0)
        several = len(request.temperatures) > 1
        # Of several predictions only the first is captured.
        self.samplings = [
            Sampling(request.max_output_tokens, plan.codec.stop_ids, temperature, k == 0, several)
            for k, temperature in enumerate(request.temperatures if generates else ())
        ]
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
        with self._precision():
            prefill = self.engine.prefill_program(rows, shape, self.outputs)
            decodes = [self.engine.decode_program(rows, shape, s) for s in self.samplings]
        return [prefill, *decodes]

    def _precision(self) -> AbstractContextManager[Any]:
        """For what is compiled within, in this thread: a float32 run multiplies float32, which
        accelerators by default do in fewer bits."""
        if self.plan.dtype == "float32":
            return jax.default_matmul_precision("highest")
        return nullcontext()

    def launch(self, batch: Batch) -> Launched:
        """Returns without waiting for the devices. The samples are tokenised here again, see
        `plan_samples`."""
        plan, request = self.plan, self.plan.request
        needed = self.layout.needed(len(batch.rows))
        samples = [
            plan.samples[i] if i >= 0 and b in needed else None for b, i in enumerate(batch.rows)
        ]
        encoded = [sample and plan.encode(sample) for sample in samples]
        ids = pad_rows([row and row.ids for row in encoded], batch.shape.length)
        prompts = np.array([row.prompt_length if row else 1 for row in encoded], np.int32)
        answers = [len(row.ids) - row.prompt_length if row else 0 for row in encoded]
        with self._precision():
            prefilled = self.engine.prefill(
                ids, prompts, np.array(answers, np.int32), batch.shape, self.outputs
            )
            decoded = []
            for k, sampling in enumerate(self.samplings):  # each from the one prefill
                keys = [_sample_key(request.seed, s, k) if s else 0 for s in samples]
                keys = np.array(keys, np.uint32)
                decoded.append(self.engine.decode(prefilled, prompts, keys, batch.shape, sampling))
        owned = self.layout.owned(len(batch.rows))
        mine = {b: (samples[b], encoded[b]) for span in owned.values() for b in span if samples[b]}
        self.usage.prefill += batch.shape.length * sum(map(len, owned.values()))
        self.usage.prefill_useful += sum(len(row.ids) for _, row in mine.values())
        keeps_logits = not request.no_logits and request.activations_dir is not None
        logits = prefilled.logits if keeps_logits else None
        return Launched(mine, owned, replace(prefilled, logits=logits, cache=None), decoded)

    def fetch(self, launched: Launched) -> list[Result]:
        """Waits for the batch; of the decode buffers only the steps that were run are copied."""

        def host(x: jax.Array | None, stop: int | None = None) -> dict[int, np.ndarray]:
            """Place in the batch -> that row, of the rows that this process keeps."""
            found = {}
            for shard in [] if x is None else x.addressable_shards:
                if (span := launched.owned.get(shard.device)) is not None:
                    block = np.asarray(shard.data if stop is None else shard.data[:, :stop])
                    found.update(zip(span, block, strict=True))
            return found

        plan, prefilled = self.plan, launched.prefilled
        prompt_captures = {name: host(value) for name, value in prefilled.captures.items()}
        logits, forced_logprobs = host(prefilled.logits), host(prefilled.logprobs)
        generated = []
        for result in launched.decoded:
            # Rounded up, so that slicing compiles for few sizes.
            steps = int(result.steps.addressable_data(0))
            stop = min(-(-steps // 128) * 128, result.tokens.shape[1])
            captures = {name: host(value, stop) for name, value in result.captures.items()}
            counts = host(result.counts)
            generated.append((counts, host(result.tokens), host(result.logprobs), captures))
            self.usage.decode += steps * sum(map(len, launched.owned.values()))
            self.usage.decode_useful += sum(min(int(counts[b]), steps) for b in launched.samples)
        results = []
        for b, (sample, encoded) in launched.samples.items():
            forced = len(encoded.ids) - encoded.prompt_length
            kept = len(plan.capture.rows(encoded.prompt_length, forced))
            parts = {name: [value[b][:kept]] for name, value in prompt_captures.items()}
            answers, logprobs = [], [forced_logprobs[b][:forced]] if forced else []
            for counts, ids, answer_logprobs, captures in generated:
                n = int(counts[b])
                answers.append(ids[b][:n])
                logprobs.append(answer_logprobs[b][:n])
                for name, value in captures.items():
                    parts.setdefault(name, []).append(value[b][:n])
            # Copies, so that a stored row does not keep the whole batch in memory.
            states = {name: np.concatenate(parts[name]) for name in plan.capture.names}
            last = logits[b][None, : plan.config.vocab_size].copy() if b in logits else None
            results.append(Result(sample, encoded, answers, logprobs, states, last))
        return results


def _sample_key(seed: int, sample: Sample, prediction: int) -> int:
    """What a sample draws does not depend on its place in the dataset or batch; never 0."""
    text = ":".join(map(str, (seed, *sample.key, prediction)))
    return zlib.crc32(text.encode()) or 1


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
