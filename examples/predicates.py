"""Predicates of a cell, each a line: what `features.py` tries on the latents of an autoencoder.

One of your own is one more line of PREDICATES: a name, and a function of a `Scene`.
"""

# A predicates   C cells of an item, or columns of a grid   R rows of a grid

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np

from utils.dataset.contrast import CELL_ROLES
from utils.prompt.encodings import COLORS

Array = np.ndarray


@dataclass(frozen=True, eq=False)
class Scene:
    """A grid as predicates see it. cells: int [R, C], colors; role: a place in CELL_ROLES; pair: of
    the train pairs in the prompt, from 0, or -1; given: int, the input grid of an output or of an
    answer, and None of an input.

    Objects are cells of one color other than black that touch, at corners too.
    """

    cells: Array
    role: int
    pair: int
    given: Array | None = None

    @cached_property
    def row(self) -> Array:
        return np.indices(self.cells.shape)[0]

    @cached_property
    def col(self) -> Array:
        return np.indices(self.cells.shape)[1]

    @cached_property
    def last(self) -> tuple[int, int]:
        """The last row and column."""
        return self.cells.shape[0] - 1, self.cells.shape[1] - 1

    @cached_property
    def edge(self) -> tuple[Array, Array]:
        """Whether a cell is in the first or last row, and in the first or last column."""
        rows, cols = self.last
        return (self.row == 0) | (self.row == rows), (self.col == 0) | (self.col == cols)

    @cached_property
    def objects(self) -> Array:
        """int [R, C]: the number of the object that the cell is of, 0 of none."""
        from scipy.ndimage import label

        found, count = np.zeros(self.cells.shape, int), 0
        for color in np.unique(self.cells[self.cells > 0]):
            numbers, more = label(self.cells == color, np.ones((3, 3)))
            found += np.where(numbers, numbers + count, 0)
            count += more
        return found

    @cached_property
    def size(self) -> Array:
        """int [R, C]: how many cells the cell's object has; 0 of none."""
        return np.where(self.objects, np.bincount(self.objects.ravel())[self.objects], 0)

    @cached_property
    def box(self) -> tuple[Array, Array]:
        """int [R, C] each: height and width of the box around the cell's object; 0 of none."""
        from scipy.ndimage import find_objects

        sides = [(0, 0)]
        sides += [(r.stop - r.start, c.stop - c.start) for r, c in find_objects(self.objects)]
        height, width = np.array(sides).T
        return height[self.objects], width[self.objects]

    @cached_property
    def solid(self) -> Array:
        """Whether the cell's object fills its box."""
        return (self.size > 0) & (self.size == self.box[0] * self.box[1])

    @cached_property
    def enclosed(self) -> Array:
        """Whether no way over black cells leads from a black cell to the edge of the grid."""
        from scipy.ndimage import binary_fill_holes

        return binary_fill_holes(self.cells > 0) & (self.cells == 0)

    @cached_property
    def common(self) -> tuple[int, int]:
        """The most and the least common color other than black; -1 where there is none."""
        colors, counts = np.unique(self.cells[self.cells > 0], return_counts=True)
        return (colors[counts.argmax()], colors[counts.argmin()]) if len(colors) else (-1, -1)

    def like(self, side: str) -> Array:
        """Whether the next cell on a side of _SIDES has the same color."""
        (down, right), (R, C) = _SIDES[side], self.cells.shape
        beside = np.pad(self.cells, 1, constant_values=-1)[1 + down :, 1 + right :][:R, :C]
        return beside == self.cells

    def first(self, axis: int, flip: bool = False) -> Array:
        """Whether a cell is the first of its row (axis 1) or column (0) that is not black; the last
        with `flip`."""
        filled = np.flip(self.cells > 0, axis) if flip else self.cells > 0
        first = filled & (filled.cumsum(axis) == 1)
        return np.flip(first, axis) if flip else first

    @cached_property
    def below(self) -> Array:
        """int [R, C]: the color of the input's cell at the same place; -1 where there is none."""
        found = np.full(self.cells.shape, -1)
        if self.given is not None:
            R, C = np.minimum(self.cells.shape, self.given.shape)
            found[:R, :C] = self.given[:R, :C]
        return found

    @cached_property
    def turned(self) -> Array:
        """int [R, C]: rows and columns exchanged; -1 of a grid that is not square."""
        R, C = self.cells.shape
        return self.cells.T if R == C else np.full(self.cells.shape, -1)


_SIDES = {"above": (-1, 0), "below": (1, 0), "to the left": (0, -1), "to the right": (0, 1)}
_ORDINALS = ("first", "second", "third", "fourth", "fifth", "sixth")
# Kind -> name -> which cells of a scene are so, bool [R, C], or one bool for all.
PREDICATES: dict[str, dict[str, Callable[[Scene], Any]]] = {
    "color": {
        **{name.lower(): lambda s, i=i: s.cells == i for i, name in enumerate(COLORS)},
        "of the grid's most common color": lambda s: s.cells == s.common[0],
        "of the grid's rarest color": lambda s: s.cells == s.common[1],
    },
    "role": {
        **{f"in the {role}": lambda s, i=i: s.role == i for i, role in enumerate(CELL_ROLES)},
        "in an output or the answer": lambda s: s.role % 2 == 1,
        **{f"in pair {i + 1}": lambda s, i=i: s.pair == i for i in range(4)},
        "in the test pair": lambda s: s.pair == -1,
    },
    "position": {
        **{f"in the {nth} row": lambda s, i=i: s.row == i for i, nth in enumerate(_ORDINALS)},
        **{f"in the {nth} column": lambda s, i=i: s.col == i for i, nth in enumerate(_ORDINALS)},
        "in the last row": lambda s: s.row == s.last[0],
        "in the last column": lambda s: s.col == s.last[1],
        "on the border": lambda s: s.edge[0] | s.edge[1],
        "in a corner": lambda s: s.edge[0] & s.edge[1],
        "on the diagonal": lambda s: s.row == s.col,
        "on the other diagonal": lambda s: s.row + s.col == s.last[1],
    },
    "object": {
        "an object of one cell": lambda s: s.size == 1,
        "in an object of 2 to 4 cells": lambda s: (s.size > 1) & (s.size < 5),
        "in an object of 5 cells or more": lambda s: s.size > 4,
        "in the largest object": lambda s: (s.size > 0) & (s.size == s.size.max()),
        "in a vertical line": lambda s: (s.box[1] == 1) & (s.box[0] > 1),
        "in a horizontal line": lambda s: (s.box[0] == 1) & (s.box[1] > 1),
        "in a solid rectangle": lambda s: s.solid & (np.minimum(*s.box) > 1),
        "in an object that does not fill its box": lambda s: (s.size > 0) & ~s.solid,
        "in an object in a square box": lambda s: (s.size > 1) & (s.box[0] == s.box[1]),
        "inside an object": lambda s: (s.size > 0) & np.all([*map(s.like, _SIDES)], axis=0),
        "in a hole": lambda s: s.enclosed,
    },
    "relation": {
        **{f"like the cell {side}": lambda s, side=side: s.like(side) for side in _SIDES},
        "like its mirror image left to right": lambda s: s.cells == s.cells[:, ::-1],
        "like its mirror image top to bottom": lambda s: s.cells == s.cells[::-1],
        "like its partner by half a turn": lambda s: s.cells == s.cells[::-1, ::-1],
        "like its partner across the diagonal": lambda s: s.cells == s.turned,
        "like the input's cell at its place": lambda s: s.cells == s.below,
        "unlike the input's cell at its place": lambda s: (s.below >= 0) & (s.cells != s.below),
        "first of its row that is not black": lambda s: s.first(1),
        "last of its row that is not black": lambda s: s.first(1, flip=True),
        "first of its column that is not black": lambda s: s.first(0),
        "last of its column that is not black": lambda s: s.first(0, flip=True),
    },
}


def labels() -> list[tuple[str, str]]:
    """Kind and name of every predicate, in order."""
    return [(kind, name) for kind, of_kind in PREDICATES.items() for name in of_kind]


def scenes(cells: Array) -> Iterator[tuple[Scene, Array]]:
    """Every grid of an item's cells, int [C, 7], and which of them are its own, bool [C]."""
    grids: dict[tuple[int, int], Array] = {}
    for pair, role in sorted({(int(p), int(r)) for p, r in cells[:, :2]}):
        own = (cells[:, 0] == pair) & (cells[:, 1] == role)
        row, col, color = cells[own, 2:5].T
        grid = grids[pair, role] = np.zeros((row.max() + 1, col.max() + 1), int)
        grid[row, col] = color
        yield Scene(grid, role + 2 * (pair < 0), pair, grids.get((pair, 0)) if role else None), own


def masks_of(cells: Array) -> Array:
    """bool [C, A]: which predicates hold of an item's cells, int [C, 7]."""
    predicates = [holds for of_kind in PREDICATES.values() for holds in of_kind.values()]
    found = np.zeros((len(cells), len(predicates)), bool)
    for scene, own in scenes(cells):
        table = np.zeros((len(predicates), *scene.cells.shape), bool)
        for number, holds in enumerate(predicates):
            table[number] = holds(scene)
        row, col = cells[own, 2:4].T
        found[own] = table[:, row, col].T
    return found
