"""Rows of activations on their way into batches: in order, or through a buffer that mixes them.

Knows nothing of shards or of how rows are selected.
"""

# N rows   D model width

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

import numpy as np

from utils.errors import UserError
from utils.shards.items import to_float32

NO_CELL = -2  # in all columns of a row whose token holds no cell


@dataclass(frozen=True)
class ActivationRows:
    """N rows and where they come from.

    activations: [N, D]. samples: int32 [N], places in `ActivationDataset.samples`. tokens: int32
    [N], places in the sample's `input_ids`; token_ids: int32 [N], what stands there. cells: int32
    [N, 5], columns pair, role, row, col, color of the cell that the token holds, the first of
    several that are selected; NO_CELL in all of them where it holds none.
    """

    activations: np.ndarray
    samples: np.ndarray
    tokens: np.ndarray
    token_ids: np.ndarray
    cells: np.ndarray

    def __len__(self) -> int:
        return len(self.tokens)

    def __getitem__(self, index: Any) -> "ActivationRows":
        """Rows of a slice, a mask or an array of places."""
        return ActivationRows(*(column[index] for column in self.columns()))

    def columns(self) -> list[np.ndarray]:
        return [getattr(self, f.name) for f in fields(self)]

    @staticmethod
    def joined(parts: Sequence["ActivationRows"]) -> "ActivationRows":
        columns = zip(*(part.columns() for part in parts), strict=True)
        return ActivationRows(*map(np.concatenate, columns))


def cast(states: np.ndarray, dtype: Any) -> np.ndarray:
    """Activations in another dtype. Raises UserError for a value that it cannot hold."""
    if np.dtype(dtype) == np.float32:
        return to_float32(states)
    with np.errstate(over="ignore"):
        cast = states.astype(dtype, copy=False)
    if not np.array_equal(np.isfinite(cast), np.isfinite(states)):
        raise UserError(f"a value is too large for {np.dtype(dtype)}: ask for float32")
    return cast


class Buffer:
    """Room for `size` rows, of which those at `free` are not taken."""

    def __init__(self, size: int, like: ActivationRows):
        empty = (np.empty((size, *column.shape[1:]), column.dtype) for column in like.columns())
        self.rows = ActivationRows(*empty)
        self.free = np.arange(size)

    def fill(self, block: ActivationRows) -> ActivationRows:
        """Takes in what it has room for, and returns the rest."""
        count = min(len(block), len(self.free))
        self.put(self.free[:count], block[:count])
        self.free = self.free[count:]
        return block[count:]

    def put(self, places: np.ndarray, block: ActivationRows) -> None:
        """Of places that are named twice, the last row stays."""
        if block.activations.dtype.itemsize > self.rows.activations.dtype.itemsize:
            # What was stored before this block is float16, and this is float32: float16 could not
            # hold a value of it, or it is of another run.
            wider = self.rows.activations.astype(block.activations.dtype)
            self.rows = replace(self.rows, activations=wider)
        for column, values in zip(self.rows.columns(), block.columns(), strict=True):
            column[places] = values

    def take(self, places: np.ndarray) -> ActivationRows:
        return ActivationRows(*(column.take(places, axis=0) for column in self.rows.columns()))


class Reservoir:
    """`most` rows drawn at random by `seed` from all that are added (Vitter 1985)."""

    def __init__(self, most: int, seed: int):
        self._most, self._random, self._seen = most, np.random.default_rng(seed), 0
        self._kept: Buffer | None = None

    def add(self, rows: ActivationRows) -> None:
        self._kept = self._kept or Buffer(self._most, rows)
        rest = self._kept.fill(rows)
        self._seen += len(rows) - len(rest)
        highest = np.arange(self._seen + 1, self._seen + 1 + len(rest))
        places = self._random.random(len(rest)) * highest
        chosen = places < self._most
        self._kept.put(places[chosen].astype(int), rest[chosen])
        self._seen += len(rest)

    def rows(self) -> ActivationRows:
        return self._kept.take(np.arange(self._most - len(self._kept.free)))


def mixed(
    blocks: Iterator[ActivationRows],
    size: int,
    batch_size: int,
    drop_last: bool,
    random: np.random.Generator,
) -> Iterator[ActivationRows]:
    """Batches through a buffer of `size` rows: once it is full, a random half of it leaves."""
    buffer = None
    for block in blocks:
        buffer = buffer or Buffer(size, block)
        while len(block := buffer.fill(block)) or not len(buffer.free):
            leaving = max(1, size // 2 // batch_size) * batch_size
            places = random.permutation(size)[:leaving]
            for start in range(0, leaving, batch_size):
                yield buffer.take(places[start : start + batch_size])
            buffer.free = places
    if buffer is None:
        return
    taken = np.ones(size, bool)
    taken[buffer.free] = False
    places = random.permutation(np.flatnonzero(taken))
    stop = len(places) // batch_size * batch_size if drop_last else len(places)
    for start in range(0, stop, batch_size):
        yield buffer.take(places[start : start + batch_size])


def in_order(
    blocks: Iterator[ActivationRows], batch_size: int, drop_last: bool
) -> Iterator[ActivationRows]:
    """Batches of `batch_size` rows; the last may be smaller, unless `drop_last`."""
    waiting: list[ActivationRows] = []
    count = 0
    for block in blocks:
        waiting.append(block)
        count += len(block)
        if count < batch_size:
            continue
        rows = ActivationRows.joined(waiting) if len(waiting) > 1 else block
        whole = count - count % batch_size
        for start in range(0, whole, batch_size):
            yield rows[start : start + batch_size]
        waiting, count = [rows[whole:]], count - whole
    if count and not drop_last:
        yield ActivationRows.joined(waiting)
