"""Batches through the engine, pass by pass, and their results: the model's side of the run loop.

Knows no folders; `loop` stores what this makes.
"""

# B rows of a batch   T tokens of a row, padded   V vocabulary

import time
import zlib
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field, replace
from typing import Any

import jax
import numpy as np
from tqdm import tqdm

from utils.model.capture import width_of
from utils.model.decoder import Changes, Decoder
from utils.model.engine import Engine
from utils.model.generate import Chunk, Decoded, Sampling, Shape
from utils.model.layout import use_compilation_cache
from utils.plan.batching import Batch, Length, pad_rows, prefill_passes
from utils.plan.plan import Plan
from utils.plan.samples import Sample
from utils.prompt.codec import Encoded
from utils.run.result import Result


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
    """A pass on its way through the devices. part: what it gives, without what nobody keeps."""

    job: Pass
    batch: "_Batch"
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
            with_logits,
            request.teacher_forcing,
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
        self._state: Any = None  # the engine's, after the last of these passes
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
            chunks = prefill_passes(batch, lengths, self.layout.data)
            steps = [(tuple(each), None) for each in chunks]
            steps += [((), number) for number in range(len(self.temperatures))]
            passes += [
                Pass(batch, *step, first=i == 0, last=i + 1 == len(steps))
                for i, step in enumerate(steps)
            ]
        return passes

    def launch(self, job: Pass) -> Launched:
        """Returns without waiting for the devices. The samples are tokenised here again, see
        `plan_samples`."""
        plan, shape = self.plan, job.batch.shape
        if job.first:
            self._wait_for(shape)
            cache = self._state[0] if self._batch and self._batch.shape == shape else None
            self._state = None  # before a cache of another size is made
            self._state = self.engine.begin(shape, cache)
            self._batch = _Batch.of(plan, job.batch)
        batch = self._batch
        if job.prediction is None:
            part = self._prefill(job, batch)
        else:
            keys = np.zeros(shape.rows, np.uint32)
            for place, (sample, _) in batch.computed.items():
                keys[place] = _sample_key(plan.request.seed, sample, job.prediction)
            part, self._state = self.engine.decode(
                self._state,
                batch.prompts,
                keys,
                self.temperatures[job.prediction],
                shape,
                self._changes_of_answers(batch),
            )
            if job.prediction:  # of several predictions only the first is captured
                part = replace(part, captures={})
        self._launched += 1
        return Launched(job, batch, part)

    def _prefill(self, job: Pass, batch: "_Batch") -> Chunk:
        chunk = batch.shape.chunk
        places = [place for place, _ in job.chunks]
        start = np.array([number * chunk for _, number in job.chunks], np.int32)
        part, self._state = self.engine.prefill(
            self._state,
            batch.ids,
            places,
            start,
            batch.prompts,
            batch.totals,
            batch.shape,
            self._changes(batch, places, start),
        )
        kept = [
            _within(self.plan.capture.rows(*lengths_of(batch.kept[place][1])), begin, chunk)
            for place, begin in zip(places, start, strict=True)
            if place in batch.kept
        ]
        if not any(map(len, kept)):
            part = replace(part, captures={})
        return part if self.keeps_logits else replace(part, logits=None)

    def _changes(self, batch: "_Batch", places: Sequence[int], start: np.ndarray) -> Changes:
        """What the interventions need of the chunks of a pass."""
        chunk, found = batch.shape.chunk, []
        for one, masks in zip(self.plan.interventions, batch.masks, strict=True):
            here = [masks[place, b : b + chunk] for place, b in zip(places, start, strict=True)]
            arrays = {"mask": np.stack(here)}
            if one.donor:
                width = width_of(self.plan.config, one.edit.hook)
                arrays["values"] = np.zeros((*arrays["mask"].shape, width), np.float32)
                rows = zip(arrays["values"], here, places, start, strict=True)
                for target, mask, place, b in rows:
                    if mask.any():
                        tokens = np.flatnonzero(mask)
                        target[tokens] = one.donor.values(tokens + b, *batch.computed[place])
            found.append(arrays)
        return tuple(found)

    def _changes_of_answers(self, batch: "_Batch") -> Changes:
        """What they need of generated tokens, of which there are none to patch from."""
        tokens = batch.prompts[:, None] + np.arange(self.plan.request.room)
        return tuple(
            None if one.donor else {"mask": np.take_along_axis(masks, tokens, axis=1)}
            for one, masks in zip(self.plan.interventions, batch.masks, strict=True)
        )

    def fetch(self, launched: Launched) -> list[Result]:
        """Waits for the pass; the results of its batch, where it ends with it."""
        job, kept = launched.job, launched.batch.kept
        if job.first:
            self._unfinished = {place: _Unfinished() for place in kept}
            self.usage.prefill_useful += sum(len(encoded.ids) for _, encoded in kept.values())
        if job.prediction is None:
            self._fetch_chunk(launched)
        else:
            self._fetch_answers(launched)
        self._idle_since = time.perf_counter()
        self._fetched += 1
        if not job.last:
            return []
        unfinished, self._unfinished = self._unfinished, {}
        names = self.plan.capture.names
        return [unfinished[place].result(*of_sample, names) for place, of_sample in kept.items()]

    def _fetch_chunk(self, launched: Launched) -> None:
        part, batch, chunk = launched.part, launched.batch, launched.batch.shape.chunk
        begins = {place: number * chunk for place, number in launched.job.chunks}
        for held in batch.owned.values():
            self.usage.prefill += chunk * len(begins.keys() & held)
        row_of = {place: row for row, place in enumerate(begins)}
        for name, value in part.captures.items():
            for place, states in batch.on_host(value, row_of).items():
                span = self.plan.capture.rows(*lengths_of(batch.kept[place][1]))
                self._unfinished[place].add(name, begins[place], states, span)
        for place, logprobs in batch.on_host(part.logprobs, row_of).items():
            prompt, forced = lengths_of(batch.kept[place][1])
            # The first of the answer's tokens follows the prompt's last.
            span = range(prompt - 1, prompt - 1 + forced)
            self._unfinished[place].add("", begins[place], logprobs, span)
        for place, logits in batch.on_host(part.logits, row_of).items():
            if begins[place] < batch.kept[place][1].prompt_length <= begins[place] + chunk:
                last = logits[None, : self.plan.config.vocab_size].copy()
                self._unfinished[place].logits = last

    def _fetch_answers(self, launched: Launched) -> None:
        part, batch = launched.part, launched.batch
        row_of = {place: place for place in range(batch.shape.rows)}
        counts, tokens, logprobs = (
            batch.on_host(x, row_of) for x in (part.counts, part.tokens, part.logprobs)
        )
        steps = int(part.steps.addressable_data(0))
        self.usage.decode += steps * sum(map(len, batch.owned.values()))
        for place, count in counts.items():
            n, row = int(count), self._unfinished[place]
            self.usage.decode_useful += min(n, steps)
            row.answers.append(tokens[place][:n])
            row.logprobs.append(logprobs[place][:n])
        # Only the steps that were run are copied; rounded up, so that slices are of few sizes.
        stop = min(-(-steps // 128) * 128, part.tokens.shape[1])
        for name, value in part.captures.items():
            for place, states in batch.on_host(value, row_of, stop).items():
                P, n = batch.kept[place][1].prompt_length, int(counts[place])
                self._unfinished[place].add(name, P, states, range(P, P + n))


@dataclass(frozen=True, eq=False)
class _Batch:
    """A batch while its passes are on their way.

    ids: int32 [B, T] of the rows that the devices of this process compute with; prompts, totals:
    int32 [B], tokens of every row without and with a forced answer. computed: place in the batch ->
    what stands there, of those same rows without padding; kept: of those among them whose results
    this process brings to the host. owned: device -> the places whose results it holds. masks: of
    each intervention bool [B, T], the tokens that it means, generated ones included.
    """

    shape: Shape
    ids: np.ndarray
    prompts: np.ndarray
    totals: np.ndarray
    computed: dict[int, tuple[Sample, Encoded]]
    kept: dict[int, tuple[Sample, Encoded]]
    owned: dict[jax.Device, list[int]]
    masks: list[np.ndarray]

    @classmethod
    def of(cls, plan: Plan, batch: Batch) -> "_Batch":
        rows, needed = batch.rows, plan.layout.needed(len(batch.rows))
        lengths = [plan.samples[i].length if i >= 0 else Length(1) for i in rows]
        samples = {b: plan.samples[i] for b, i in enumerate(rows) if i >= 0 and b in needed}
        computed = {b: (sample, plan.encode(sample)) for b, sample in samples.items()}
        owned = plan.layout.owned(len(rows))
        ids = [computed[b][1].ids if b in computed else None for b in range(len(rows))]
        masks = [np.zeros((len(rows), batch.shape.slots), bool) for _ in plan.interventions]
        for one, mask in zip(plan.interventions, masks, strict=True):
            for b, of_sample in computed.items():
                meant = one.mask(*of_sample, plan.request.room)
                mask[b, : len(meant)] = meant
        return cls(
            batch.shape,
            pad_rows(ids, batch.shape.slots),
            np.array([length.prompt for length in lengths], np.int32),
            np.array([length.total for length in lengths], np.int32),
            computed,
            {b: computed[b] for held in owned.values() for b in held if b in computed},
            owned,
            masks,
        )

    def on_host(
        self, x: jax.Array | None, row_of: Mapping[int, int], stop: int | None = None
    ) -> dict[int, np.ndarray]:
        """Place in the batch -> its row of x, the first `stop` tokens of it, of the places that are
        kept. row_of: place -> row of x, of those that x has."""
        found = {}
        for shard in [] if x is None else x.addressable_shards:
            places = [b for b in self.owned[shard.device] if b in self.kept and b in row_of]
            if places:
                block = np.asarray(shard.data if stop is None else shard.data[:, :stop])
                first = shard.index[0].start or 0
                found.update({b: block[row_of[b] - first] for b in places})
        return found


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

    def add(self, name: str, begin: int, part: np.ndarray, span: range) -> None:
        """Of what a pass gave from position `begin` on, that of a span of positions; a copy, so
        that what is kept of a pass does not keep all of it in memory."""
        kept = _within(span, begin, len(part))
        self.parts.setdefault(name, {})[begin] = part[kept.start : kept.stop].copy()

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
