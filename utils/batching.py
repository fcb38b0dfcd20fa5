"""Length buckets, padding and row identity: which samples share a forward pass, and in what shape.

Knows lengths, not texts. A row is identified by the index of its sample, which travels with the
batch; padding rows have index -1 and are never stored.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

MAX_SHAPES = 12
MAX_PADDING = 0.10  # share of computed prompt tokens, unless MAX_SHAPES is reached first
COMPILE_TOKENS = 500  # tokens that could be computed while one more shape is compiled
ALIGNMENT = 16  # tokens; a shape's lengths are multiples of it


@dataclass(frozen=True)
class Length:
    """Tokens of a sample: its prompt, and the answer that is forced (0 when it is generated)."""

    prompt: int
    answer: int = 0

    @property
    def total(self) -> int:
        return self.prompt + self.answer


@dataclass(frozen=True)
class Bucket:
    """One compiled shape, in tokens a row: all of it, the longest prompt, the longest answer."""

    length: int
    prompt: int
    answer: int


@dataclass(frozen=True)
class Batch:
    """rows: sample indices, -1 for padding rows; every batch of a run has as many."""

    bucket: Bucket
    rows: tuple[int, ...]


def plan_batches(lengths: Sequence[Length], batch_size: int) -> list[Batch]:
    """Batches of samples of like length, longest first, in at most MAX_SHAPES shapes.

    Longest first, so that a run that does not fit in memory ends at its start. Only the batch of
    the shortest samples can have padding rows.
    """
    order = sorted(range(len(lengths)), key=lambda i: (-lengths[i].total, i))
    groups = [order[i : i + batch_size] for i in range(0, len(order), batch_size)]
    tops = _bucket_tops([lengths[group[0]].total for group in groups], batch_size)
    by_top: dict[int, list[list[int]]] = {}
    for group in groups:
        top = min(t for t in tops if t >= lengths[group[0]].total)
        by_top.setdefault(top, []).append(group)
    batches = []
    for top, members in by_top.items():
        rows = [i for group in members for i in group]
        bucket = Bucket(
            top,
            min(top, _aligned(max(lengths[i].prompt for i in rows))),
            _aligned(max(lengths[i].answer for i in rows)),
        )
        for group in members:
            padded = group + [-1] * (batch_size - len(group))
            batches.append(Batch(bucket, tuple(padded)))
    return batches


def padding_share(lengths: Sequence[Length], batches: Sequence[Batch]) -> float:
    """Share of the tokens that prefill computes which belong to no sample."""
    computed = sum(batch.bucket.length * len(batch.rows) for batch in batches)
    real = sum(lengths[i].total for batch in batches for i in batch.rows if i >= 0)
    return 1 - real / computed if computed else 0.0


def pad_rows(rows: Sequence[np.ndarray | None], length: int) -> np.ndarray:
    """Right-pads with 0: int32 [B, length]. None is a padding row."""
    padded = np.zeros((len(rows), length), np.int32)
    for target, row in zip(padded, rows, strict=True):
        if row is not None:
            target[: len(row)] = row
    return padded


def _aligned(tokens: int) -> int:
    return -(-tokens // ALIGNMENT) * ALIGNMENT


def _bucket_tops(totals: Sequence[int], batch_size: int) -> list[int]:
    """Bucket lengths that minimise padding plus compilation, over all ways to cut the lengths.

    Exact, by dynamic programming over the distinct lengths: best[k][j] is the least padding with
    which k buckets cover the j shortest lengths, the last of them ending at the j-th.
    """
    sizes, counts = np.unique([_aligned(t) for t in totals], return_counts=True)
    n = len(sizes)
    if n == 0:
        return []
    rows = np.concatenate([[0], np.cumsum(counts)]) * batch_size
    tokens = np.concatenate([[0], np.cumsum(counts * sizes)]) * batch_size
    best = np.full(n + 1, np.inf)
    best[0] = 0
    choices: list[np.ndarray] = []
    costs = []
    for _ in range(min(MAX_SHAPES, n)):
        new = np.full(n + 1, np.inf)
        cut = np.zeros(n + 1, int)
        for j in range(1, n + 1):
            padding = best[:j] + sizes[j - 1] * (rows[j] - rows[:j]) - (tokens[j] - tokens[:j])
            cut[j] = int(np.argmin(padding))
            new[j] = padding[cut[j]]
        best = new
        choices.append(cut)
        costs.append(best[n])
    computed = tokens[-1] + np.array(costs)
    within = 1 - (sum(totals) * batch_size) / computed <= MAX_PADDING
    penalised = np.array(costs) + COMPILE_TOKENS * np.arange(1, len(costs) + 1)
    k = int(np.argmin(np.where(within, penalised, np.inf))) if within.any() else len(costs) - 1
    tops, j = [], n
    for cut in reversed(choices[: k + 1]):
        tops.append(int(sizes[j - 1]))
        j = cut[j]
    return sorted(tops)
