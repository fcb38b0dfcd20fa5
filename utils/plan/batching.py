"""Length buckets, padding and row identity: which samples share a forward pass, and in what shape.

Knows lengths, not texts. A row is identified by the index of its sample, which travels with the
batch; padding rows have index -1 and are never stored.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from utils.model.generate import Shape

MAX_SHAPES = 12
MAX_PADDING = 0.10  # share of computed prompt tokens, unless MAX_SHAPES is reached first
COMPILE_TOKENS = 500  # tokens that could be computed while one more shape is compiled
ALIGNMENT = 16  # tokens; a shape's lengths are multiples of it


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
    """rows: sample indices, -1 for padding rows."""

    shape: Shape
    rows: tuple[int, ...]


@dataclass(frozen=True)
class Limits:
    """What a batch can be.

    rows: the most rows of a batch by the length of its shape, for the aligned length of every
    sample; an int where it is the same for all. A batch has a multiple of `multiple` rows, and its
    lengths are multiples of `alignment` tokens.
    """

    rows: Mapping[int, int] | int
    multiple: int = 1
    alignment: int = 1

    def divide(self, groups: int | np.ndarray, length: int) -> tuple[Any, Any]:
        """(batches, rows of each) that hold so many groups of `multiple` rows: as few batches as
        the limits allow, with as few rows as then suffice."""
        rows = self.rows if isinstance(self.rows, int) else self.rows[int(length)]
        most = max(1, rows // self.multiple)
        batches = -(-groups // most)
        return batches, -(-groups // batches) * self.multiple


def aligned(tokens: int, alignment: int = 1) -> int:
    """The length of a shape that holds so many tokens, where lengths are multiples of `alignment`
    and of ALIGNMENT."""
    unit = math.lcm(ALIGNMENT, alignment)
    return -(-tokens // unit) * unit


def plan_batches(lengths: Sequence[Length], limits: Limits) -> list[Batch]:
    """Batches of samples of like length, longest first, in at most MAX_SHAPES shapes.

    Longest first, so that a run that does not fit in memory ends at its start. Within a shape,
    samples whose answers are expected to be of like length go together, so that no row waits long
    for another. The batches of a shape have the same number of rows; the fewest that hold it in as
    few batches as the limits allow.
    """
    order = sorted(range(len(lengths)), key=lambda i: (-lengths[i].total, i))
    groups = [order[i : i + limits.multiple] for i in range(0, len(order), limits.multiple)]
    real = sum(length.total for length in lengths)
    tops = _bucket_tops([lengths[group[0]].total for group in groups], real, limits)
    by_top: dict[int, list[int]] = {}
    for group in groups:
        top = min(t for t in tops if t >= lengths[group[0]].total)
        by_top.setdefault(top, []).extend(group)
    batches = []
    for top, members in by_top.items():
        shape = Shape(
            top,
            min(top, aligned(max(lengths[i].prompt for i in members), limits.alignment)),
            aligned(max(lengths[i].answer for i in members), limits.alignment),
        )
        members.sort(key=lambda i: (-lengths[i].expected, -lengths[i].total, i))
        _, size = limits.divide(math.ceil(len(members) / limits.multiple), top)
        for i in range(0, len(members), size):
            rows = members[i : i + size]
            batches.append(Batch(shape, tuple(rows + [-1] * (size - len(rows)))))
    return batches


def padding_share(lengths: Sequence[Length], batches: Sequence[Batch]) -> float:
    """Share of the tokens that prefill computes which belong to no sample."""
    computed = sum(batch.shape.length * len(batch.rows) for batch in batches)
    real = sum(lengths[i].total for batch in batches for i in batch.rows if i >= 0)
    return 1 - real / computed if computed else 0.0


def pad_rows(rows: Sequence[np.ndarray | None], length: int) -> np.ndarray:
    """Right-pads with 0: int32 [B, length]. None is a padding row."""
    padded = np.zeros((len(rows), length), np.int32)
    for target, row in zip(padded, rows, strict=True):
        if row is not None:
            target[: len(row)] = row
    return padded


def _bucket_tops(totals: Sequence[int], real: int, limits: Limits) -> list[int]:
    """Shape lengths that minimise padding plus compilation, over all ways to cut the lengths.

    totals: the longest of each group of `limits.multiple` rows; real: tokens of all samples. Exact,
    by dynamic programming over the distinct lengths: best[k][j] is the least padding with which k
    buckets cover the j shortest lengths, the last of them ending at the j-th.
    """
    sizes, counts = np.unique([aligned(t, limits.alignment) for t in totals], return_counts=True)
    n = len(sizes)
    if n == 0:
        return []
    groups = np.concatenate([[0], np.cumsum(counts)])
    tokens = np.concatenate([[0], np.cumsum(counts * sizes)]) * limits.multiple
    best = np.full(n + 1, np.inf)
    best[0] = 0
    choices: list[np.ndarray] = []
    costs = []
    for _ in range(min(MAX_SHAPES, n)):
        new = np.full(n + 1, np.inf)
        cut = np.zeros(n + 1, int)
        for j in range(1, n + 1):
            batches, rows = limits.divide(groups[j] - groups[:j], sizes[j - 1])
            padding = best[:j] + sizes[j - 1] * batches * rows - (tokens[j] - tokens[:j])
            cut[j] = int(np.argmin(padding))
            new[j] = padding[cut[j]]
        best = new
        choices.append(cut)
        costs.append(best[n])
    computed = tokens[-1] + np.array(costs)
    within = 1 - real / computed <= MAX_PADDING
    penalised = np.array(costs) + COMPILE_TOKENS * np.arange(1, len(costs) + 1)
    k = int(np.argmin(np.where(within, penalised, np.inf))) if within.any() else len(costs) - 1
    tops, j = [], n
    for cut in reversed(choices[: k + 1]):
        tops.append(int(sizes[j - 1]))
        j = cut[j]
    return sorted(tops)
