"""Which samples share a batch, and the shapes that their batches are compiled for.

Knows lengths, not texts. A row is identified by the index of its sample, which travels with the
batch; padding rows have index -1 and are never stored.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from utils.model.generate import Shape

MAX_CACHES = 3  # cache sizes of a run; each is two programs to compile
SLOT_UNIT = 512  # a cache's slots are a multiple of it: the keys of a tile of attention
# Tokens of a row that prefill takes at once, and how many could be computed in what a chunk costs
# whatever its length: on an accelerator that is the time in which it reads the parameters.
ACCELERATOR_CHUNKS, ACCELERATOR_OVERHEAD = (2048, 1024, 512, 256), 128
CPU_CHUNKS, CPU_OVERHEAD = tuple(range(1024, 0, -64)), 96


@dataclass(frozen=True)
class Length:
    """Tokens of a sample: its prompt, and the answer that is forced (0 when it is generated).

    expected: of a generated answer, a guess in any unit, so that like ones go together.
    """

    prompt: int
    answer: int = 0
    expected: int = 0

    @property
    def total(self) -> int:
        return self.prompt + self.answer


@dataclass(frozen=True)
class Batch:
    """rows: sample indices, -1 for padding rows; those of a data group are neighbours."""

    shape: Shape
    rows: tuple[int, ...]


def chunk_tokens(totals: Sequence[int], on_cpu: bool, alignment: int = 1) -> int:
    """The tokens of a chunk with which these samples, of so many tokens each, take the least time:
    longer chunks compute more padding behind the last token, shorter ones are more passes."""
    choices, overhead = (
        (CPU_CHUNKS, CPU_OVERHEAD) if on_cpu else (ACCELERATOR_CHUNKS, ACCELERATOR_OVERHEAD)
    )
    choices = [-(-chunk // alignment) * alignment for chunk in choices]
    tokens = np.array(totals)[:, None]
    costs = (-(-tokens // choices) * (np.array(choices) + overhead)).sum(axis=0)
    return choices[int(np.argmin(costs))]


def cache_slots(length: Length, chunk: int, room: int) -> int:
    """Of the smallest cache that a sample fits in: its chunks, or its prompt and the room for an
    answer."""
    chunks = _chunks(length, chunk) * chunk
    return -(-max(chunks, length.prompt + room) // SLOT_UNIT) * SLOT_UNIT


def plan_batches(
    lengths: Sequence[Length], chunk: int, rows: Mapping[int, int], room: int = 0, data: int = 1
) -> list[Batch]:
    """Batches of at most MAX_CACHES sizes of cache, the largest first, so that a run that does not
    fit in memory ends at its start; of each the shortest samples first, so that it soon has stored
    some.

    Samples whose answers are expected to be of like length go together, so that no row waits long
    for another. A batch's rows are dealt out to the data groups so that each has as many chunks.

    chunk: tokens of a chunk. rows: the most rows of a batch by the slots of its cache, for those of
    every sample; multiples of `data`, the groups of devices that share them. room: slots behind the
    prompts for generated answers.
    """
    batches = []
    for slots, members in _by_cache(lengths, chunk, rows, room).items():
        members.sort(key=lambda i: (lengths[i].expected, lengths[i].total, i))
        # As few batches as hold them, with as few rows as then suffice.
        count = math.ceil(len(members) / rows[slots])
        size = math.ceil(len(members) / count / data)
        shape = Shape(size * data, slots, chunk)
        for i in range(0, len(members), shape.rows):
            groups: list[list[int]] = [[] for _ in range(data)]
            work = [0] * data  # chunks of each group
            for member in sorted(members[i : i + shape.rows], key=lambda i: -lengths[i].total):
                with_room = (g for g, group in enumerate(groups) if len(group) < size)
                least = min(with_room, key=work.__getitem__)
                groups[least].append(member)
                work[least] += _chunks(lengths[member], chunk)
            places = [i for group in groups for i in group + [-1] * (size - len(group))]
            batches.append(Batch(shape, tuple(places)))
    return batches


def prefill_passes(
    batch: Batch, lengths: Sequence[Length], data: int
) -> list[list[tuple[int, int]]]:
    """The passes of a batch's prefill: in each, of every data group a row, by its place in the
    batch, and the number of its chunk. Each takes its rows one after the other; one that has ended
    before the others repeats what it did last, which changes nothing."""
    size = len(batch.rows) // data
    groups = []
    for first in range(0, len(batch.rows), size):
        places = range(first, first + size)
        todo = [(place, batch.rows[place]) for place in places if batch.rows[place] >= 0]
        needed = {place: _chunks(lengths[i], batch.shape.chunk) for place, i in todo}
        chunks = [(place, k) for place, count in needed.items() for k in range(count)]
        groups.append(chunks or [(first, 0)])
    passes = max(map(len, groups))
    return [[group[min(n, len(group) - 1)] for group in groups] for n in range(passes)]


def _chunks(length: Length, chunk: int) -> int:
    return -(-length.total // chunk)


def _by_cache(
    lengths: Sequence[Length], chunk: int, rows: Mapping[int, int], room: int
) -> dict[int, list[int]]:
    """Slots of a cache -> samples, largest first: a cache for the longest sample, one of half and
    one of a quarter of its size, each where it saves a batch because more rows fit."""
    needs = [cache_slots(length, chunk, room) for length in lengths]
    largest = max(needs, default=0)
    groups: list[list[int]] = [[] for _ in range(MAX_CACHES)]
    for i, need in enumerate(needs):
        groups[min(int(math.log2(largest / need)), MAX_CACHES - 1)].append(i)
    found: dict[int, list[int]] = {}
    for group in filter(None, groups):
        slots, larger = max(needs[i] for i in group), next(reversed(found), None)
        if larger is not None:
            count = len(found[larger])
            apart = math.ceil(count / rows[larger]) + math.ceil(len(group) / rows[slots])
            if math.ceil((count + len(group)) / rows[larger]) <= apart:
                found[larger] += group
                continue
        found[slots] = group
    return found


def padding_share(lengths: Sequence[Length], batches: Sequence[Batch], data: int) -> float:
    """Share of the tokens that prefill computes which belong to no sample, or are computed again
    while a data group waits for the others."""
    computed = sum(
        len(prefill_passes(batch, lengths, data)) * data * batch.shape.chunk for batch in batches
    )
    real = sum(lengths[i].total for batch in batches for i in batch.rows if i >= 0)
    return 1 - real / computed if computed else 0.0


def pad_rows(rows: Sequence[np.ndarray | None], length: int) -> np.ndarray:
    """Right-pads with 0: int32 [B, length]. None is a padding row."""
    padded = np.zeros((len(rows), length), np.int32)
    for target, row in zip(padded, rows, strict=True):
        if row is not None:
            target[: len(row)] = row
    return padded
