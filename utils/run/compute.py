"""Batches through the engine, pass by pass, and their results: the model's side of the run loop.

Knows no folders; `loop` stores what this makes.
"""

# B rows of a batch   T tokens of a row, padded   V vocabulary

import time
import zlib
from collections.abc import Iterable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field, replace
from typing import Any

import jax
import numpy as np
from tqdm import tqdm

from utils.model.capture import width_of
from utils.model.decoder import Changes, Decoder
from utils.model.engine import Engine
from utils.model.generate import Chunk, Decoded, Outputs, Sampling, Shape
from utils.model.layout import use_compilation_cache
from utils.plan.batching import Batch, Length, pad_rows, prefill_passes
from utils.plan.plan import Plan
from utils.plan.samples import Sample
from utils.prompt.codec import Encoded
from utils.run.result import Result

ANSWER = 1 << 30  # where the parts of a row that are not of its prompt begin


@dataclass(frozen=True)
class Pass:
    """One pass of a batch through the model: chunks of prefill, or an answer.

    chunks: of every data group a row, by its place in the batch, and the number of its chunk.
    prediction: else the number of the answer. first, last: whether the batch begins or ends.
    """

    batch: Batch
    chunks: Sequence[tuple[int, int]] = ()
    prediction: int | None = None
    first: bool = False
    last: bool = False


@dataclass(frozen=True, eq=False)
class Launched:
    """A pass on its way through the devices, and what of it is to be fetched.

    job: the pass. rows: place in the batch -> what stands there, of the places that this process
    brings to the host. owned: device -> the places whose results it holds. part: what the pass
    gives, without what nobody keeps.
    """

    job: Pass
    rows: dict[int, tuple[Sample, Encoded]]
    owned: dict[jax.Device, list[int]]
    part: Chunk | Decoded


@dataclass
class Usage:
    """Slots computed for rows of this process, and those of them that a sample's token took."""

    prefill: int = 0
    prefill_useful: int = 0
    decode: int = 0
    decode_useful: int = 0


class Computation:
    """Passes through the engine: `launch` hands one to the devices, `fetch` brings what is kept of
    it to the host; each for one thread, in the order of `passes`. Every process launches the same
    passes in the same order.

    params: default, those of the checkpoint; or those of another computation of the same weights on
    the same mesh; or their specs, where nothing is to be run.
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
        abstract = not isinstance(jax.tree.leaves(params)[0], jax.Array)
        edits = tuple(one.edit for one in plan.interventions)
        self.engine = Engine(
            Decoder(plan.config, self.layout, plan.capture, layers, edits),
            params,
            Outputs(with_logits, request.teacher_forcing),
            Sampling(request.max_output_tokens, plan.codec.stop_ids) if generates else None,
            [self._on_devices(one.constants, abstract) for one in plan.interventions],
        )
        self.temperatures = request.temperatures if generates else []
        self.keeps_logits = not request.no_logits and request.activations_dir is not None
        self.usage = Usage()
        self.compile_seconds = 0.0  # that the devices had nothing to do but wait for programs
        self._launched = self._fetched = 0  # passes
        self._idle_since = 0.0  # when the last of them was fetched
        self._compiling: dict[Shape, Sequence[Future[Any]]] = {}
        self._batch: _Batch | None = None  # the one whose passes are being launched
        self._unfinished: dict[int, _Unfinished] = {}  # by place, the rows that are being fetched

    def _on_devices(self, arrays: dict[str, Any], abstract: bool) -> dict[str, Any]:
        """Whole on every device, or their specs."""
        sharding = self.layout.sharding()

        def put(x: Any) -> Any:
            x = np.asarray(x)
            if abstract:
                return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding)
            return jax.make_array_from_callback(x.shape, sharding, lambda index: x[index])

        return jax.tree.map(put, arrays)

    def compile(self, batches: Sequence[Batch]) -> None:
        """Begins to compile every program that the batches need, in their order, and waits for
        those of the first; the others are compiled while it is computed."""
        self._compiling = self.engine.compiling(batch.shape for batch in batches)
        self._wait_for(batches[0].shape)

    def _wait_for(self, shape: Shape) -> None:
        start = time.perf_counter()
        if programs := self._compiling.pop(shape, ()):
            for program in tqdm(programs, "compiling", unit=" programs", disable=None):
                program.result()
        if self._fetched == self._launched:  # else the devices have computed all the while
            self.compile_seconds += time.perf_counter() - max(start, self._idle_since)

    def passes(self, batches: Iterable[Batch]) -> list[Pass]:
        """What is launched for these batches, in this order."""
        lengths, passes = [sample.length for sample in self.plan.samples], []
        for batch in batches:
            own = [
                Pass(batch, tuple(chunks))
                for chunks in prefill_passes(batch, lengths, self.layout.data)
            ]
            own += [Pass(batch, prediction=k) for k in range(len(self.temperatures))]
            own[0] = replace(own[0], first=True)
            own[-1] = replace(own[-1], last=True)
            passes += own
        return passes

    def launch(self, job: Pass) -> Launched:
        """Returns without waiting for the devices. The samples are tokenised here again, see
        `plan_samples`."""
        plan, shape = self.plan, job.batch.shape
        if job.first:
            self._wait_for(shape)
            used, self._batch = self._batch, None
            cache = used.state[0] if used and used.shape == shape else None
            del used  # before a cache of another size is made
            self._batch = _Batch.of(plan, job.batch, self.engine.begin(shape, cache))
        batch = self._batch
        if job.prediction is None:
            part, batch.state = self._prefill(job, batch)
        else:
            keys = [
                _sample_key(plan.request.seed, s, job.prediction) if s else 0 for s in batch.samples
            ]
            part, batch.state = self.engine.decode(
                batch.state,
                batch.prompts,
                np.array(keys, np.uint32),
                self.temperatures[job.prediction],
                shape,
                self._changes_of_answers(batch),
            )
            if job.prediction:  # of several predictions only the first is captured
                part = replace(part, captures={})
        self._launched += 1
        return Launched(job, batch.rows, batch.owned, part)

    def _prefill(self, job: Pass, batch: "_Batch") -> tuple[Chunk, Any]:
        chunk = batch.shape.chunk
        places = [place for place, _ in job.chunks]
        start = np.array([number * chunk for _, number in job.chunks], np.int32)
        part, state = self.engine.prefill(
            batch.state,
            batch.ids,
            places,
            start,
            batch.prompts,
            batch.totals,
            batch.shape,
            self._changes(batch, places, start),
        )
        kept = [
            _within(self.plan.capture.rows(*lengths_of(batch.rows[place][1])), begin, chunk)
            for place, begin in zip(places, start, strict=True)
            if place in batch.rows
        ]
        if not any(map(len, kept)):
            part = replace(part, captures={})
        if not self.keeps_logits:
            part = replace(part, logits=None)
        return part, state

    def _changes(self, batch: "_Batch", places: Sequence[int], start: np.ndarray) -> Changes:
        """What the interventions need of the chunks of a pass."""
        rows, chunk, found = len(places), batch.shape.chunk, []
        for one in self.plan.interventions:
            arrays = {"mask": np.zeros((rows, chunk), bool)}
            if one.donor:
                width = width_of(self.plan.config, one.edit.hook)
                arrays["values"] = np.zeros((rows, chunk, width), np.float32)
            for number, (place, begin) in enumerate(zip(places, start, strict=True)):
                if (sample := batch.samples[place]) is None:
                    continue
                encoded = batch.encoded[place]
                mask = one.mask(sample, encoded)
                mask[:begin] = mask[begin + chunk :] = False
                here = slice(begin, begin + chunk)
                arrays["mask"][number, : len(mask[here])] = mask[here]
                if one.donor:
                    values = one.donor.values(mask, sample, encoded)[here]
                    arrays["values"][number, : len(values)] = values
            found.append(arrays)
        return tuple(found)

    def _changes_of_answers(self, batch: "_Batch") -> Changes:
        """What they need of generated tokens, of which there are none to patch from."""
        room, found = self.plan.request.max_output_tokens, []
        for one in self.plan.interventions:
            mask = np.zeros((len(batch.samples), room), bool)
            for place, sample in enumerate(batch.samples):
                if sample:
                    mask[place] = one.answer_mask(sample, int(batch.prompts[place]), room)
            found.append(None if one.donor else {"mask": mask})
        return tuple(found)

    def fetch(self, launched: Launched) -> list[Result]:
        """Waits for the pass; the results of its batch, where it ends with it."""
        job, rows = launched.job, launched.rows
        if job.first:
            self._unfinished = {b: _Unfinished() for b in rows}
            self.usage.prefill_useful += sum(len(encoded.ids) for _, encoded in rows.values())
        if job.prediction is None:
            self._fetch_chunk(launched)
        else:
            self._fetch_answers(launched)
        self._idle_since = time.perf_counter()
        self._fetched += 1
        if not job.last:
            return []
        unfinished, self._unfinished = self._unfinished, {}
        return [unfinished[b].result(*row, self.plan.capture.names) for b, row in rows.items()]

    def _fetch_chunk(self, launched: Launched) -> None:
        part, rows, chunk = launched.part, launched.rows, launched.job.batch.shape.chunk
        size = len(launched.job.batch.rows) // self.layout.data
        of_row = {place: number * chunk for place, number in launched.job.chunks}
        held = {place for places in launched.owned.values() for place in places}
        self.usage.prefill += chunk * len(held & of_row.keys())

        def host(x: jax.Array | None) -> dict[int, np.ndarray]:
            """Place in the batch -> what the pass gave of that row, of those kept here."""
            found = {}
            for shard in [] if x is None else x.addressable_shards:
                places = set(launched.owned.get(shard.device, ())) & of_row.keys() & rows.keys()
                for place in places:
                    if place // size == (shard.index[0].start or 0):
                        found[place] = np.asarray(shard.data)[0]
            return found

        for name, value in part.captures.items():
            for place, states in host(value).items():
                span = self.plan.capture.rows(*lengths_of(rows[place][1]))
                kept = _within(span, of_row[place], chunk)
                self._unfinished[place].add(name, of_row[place], states[kept.start : kept.stop])
        for place, logprobs in host(part.logprobs).items():
            prompt, forced = lengths_of(rows[place][1])
            # The first of the answer's tokens follows the prompt's last.
            kept = _within(range(prompt - 1, prompt - 1 + forced), of_row[place], chunk)
            self._unfinished[place].add("", of_row[place], logprobs[kept.start : kept.stop])
        for place, logits in host(part.logits).items():
            if of_row[place] < rows[place][1].prompt_length <= of_row[place] + chunk:
                last = logits[None, : self.plan.config.vocab_size].copy()
                self._unfinished[place].logits = last

    def _fetch_answers(self, launched: Launched) -> None:
        """Of the buffers of decoding only the steps that were run are copied."""
        part, rows = launched.part, launched.rows
        # Rounded up, so that slicing compiles for few sizes.
        steps = int(part.steps.addressable_data(0))
        stop = min(-(-steps // 128) * 128, part.tokens.shape[1])

        def host(x: jax.Array) -> dict[int, np.ndarray]:
            """Place in the batch -> that row, of the rows that this process keeps."""
            found = {}
            for shard in x.addressable_shards:
                places = [b for b in launched.owned.get(shard.device, ()) if b in rows]
                block = np.asarray(shard.data[:, :stop] if x.ndim == 3 else shard.data)
                first = shard.index[0].start or 0
                found.update({b: block[b - first] for b in places})
            return found

        counts, tokens, logprobs = map(host, (part.counts, part.tokens, part.logprobs))
        self.usage.decode += steps * sum(map(len, launched.owned.values()))
        for b in rows:
            n, row = int(counts[b]), self._unfinished[b]
            self.usage.decode_useful += min(n, steps)
            row.answers.append(tokens[b][:n])
            row.logprobs.append(logprobs[b][:n])
        for name, value in part.captures.items():
            for b, states in host(value).items():
                self._unfinished[b].add(name, ANSWER, states[: int(counts[b])])


@dataclass
class _Batch:
    """A batch while its passes are launched.

    ids: int32 [B, T] of the rows that the devices of this process compute with; prompts, totals:
    int32 [B], tokens of every row without and with a forced answer. samples, encoded: of the same
    rows, None for padding. rows, owned: see `Launched`. state: the engine's, after the last pass.
    """

    shape: Shape
    ids: np.ndarray
    prompts: np.ndarray
    totals: np.ndarray
    samples: list[Sample | None]
    encoded: list[Encoded | None]
    rows: dict[int, tuple[Sample, Encoded]]
    owned: dict[jax.Device, list[int]]
    state: Any

    @classmethod
    def of(cls, plan: Plan, batch: Batch, state: Any) -> "_Batch":
        needed, tokens = plan.layout.needed(len(batch.rows)), batch.shape.slots
        lengths = [plan.samples[i].length if i >= 0 else Length(1) for i in batch.rows]
        samples = [
            plan.samples[i] if i >= 0 and b in needed else None for b, i in enumerate(batch.rows)
        ]
        encoded = [sample and plan.encode(sample) for sample in samples]
        owned = plan.layout.owned(len(batch.rows))
        return cls(
            batch.shape,
            pad_rows([row and row.ids for row in encoded], tokens),
            np.array([length.prompt for length in lengths], np.int32),
            np.array([length.total for length in lengths], np.int32),
            samples,
            encoded,
            {b: (samples[b], encoded[b]) for held in owned.values() for b in held if samples[b]},
            owned,
            state,
        )


@dataclass
class _Unfinished:
    """What was fetched of a row so far.

    parts: capture name, "" for the forced answer's log-probabilities -> the position at which a
    pass began -> what it gave; a chunk that is repeated gives the same again.
    """

    parts: dict[str, dict[int, np.ndarray]] = field(default_factory=dict)
    answers: list[np.ndarray] = field(default_factory=list)
    logprobs: list[np.ndarray] = field(default_factory=list)
    logits: np.ndarray | None = None

    def add(self, name: str, start: int, part: np.ndarray) -> None:
        """A copy, so that what is kept of a pass does not keep all of it in memory."""
        self.parts.setdefault(name, {})[start] = part.copy()

    def result(self, sample: Sample, encoded: Encoded, names: Sequence[str]) -> Result:
        whole = {name: np.concatenate(list(parts.values())) for name, parts in self.parts.items()}
        forced = [whole[""]] if lengths_of(encoded)[1] else []
        captures = {name: whole[name] for name in names}
        return Result(sample, encoded, self.answers, forced or self.logprobs, captures, self.logits)


def lengths_of(encoded: Encoded) -> tuple[int, int]:
    """Tokens of the prompt, and of the answer that is forced behind it."""
    return encoded.prompt_length, len(encoded.ids) - encoded.prompt_length


def _within(span: range, start: int, chunk: int) -> range:
    """The part of a span of positions that lies in a chunk, counted from the chunk's beginning."""
    inside = range(max(span.start, start), min(span.stop, start + chunk))
    return range(inside.start - start, inside.start - start + len(inside))


def _sample_key(seed: int, sample: Sample, prediction: int) -> int:
    """What a sample draws does not depend on its place in the dataset or batch; never 0."""
    text = ":".join(map(str, (seed, *sample.key, prediction)))
    return zlib.crc32(text.encode()) or 1
