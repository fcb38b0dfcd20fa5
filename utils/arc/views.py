"""Views of a task: turned or mirrored, recolored, its train pairs in another order; and back.

A rule that a grid shows is shown by its mirror image too. A model is asked once for each view, and
what it answers is mapped back to the task itself.
"""

# C cells

import random
from collections.abc import Iterable
from dataclasses import asdict, dataclass, replace
from math import factorial
from typing import Any

import numpy as np

from utils.arc.tasks import Grid, Pair, Task

DIHEDRAL = 8  # symmetries of the square
MOST_VIEWS = DIHEDRAL * factorial(9)  # of a task with one train pair; the others have more


@dataclass(frozen=True)
class View:
    """One way to show a task; view 0 is the task itself.

    dihedral: 0..7, d % 4 counter-clockwise quarter turns, after a transposition when d >= 4.
    colors: of each color of the task, the color shown; black, 0, stays. pair_order: of each train
    pair shown, its index in the task.
    """

    number: int
    dihedral: int
    colors: tuple[int, ...]
    pair_order: tuple[int, ...]

    def show(self, grid: Grid) -> Grid:
        shown = np.array(self.colors)[np.array(grid)]
        if self.dihedral >= 4:
            shown = shown.T
        return np.rot90(shown, self.dihedral % 4).tolist()

    def invert(self, grid: Grid) -> Grid:
        """The grid that `show` shows as this one."""
        original = np.rot90(np.array(grid), -(self.dihedral % 4))
        if self.dihedral >= 4:
            original = original.T
        return np.argsort(self.colors)[original].tolist()

    def show_task(self, task: Task) -> Task:
        """All its train pairs, in this view's order, and its test pairs, in theirs."""

        def shown(pair: Pair) -> Pair:
            return Pair(self.show(pair.input), pair.output and self.show(pair.output))

        train = tuple(shown(task.train[i]) for i in self.pair_order)
        return Task(task.task_id, train, tuple(map(shown, task.test)))

    def to_dict(self) -> dict[str, Any]:
        """As an item holds it, in ints and lists."""
        return {k: list(v) if isinstance(v, tuple) else v for k, v in asdict(self).items()}

    @classmethod
    def from_dict(cls, fields: dict[str, Any]) -> "View":
        """The view of `item["view"]`."""
        return cls(**{k: tuple(v) if isinstance(v, list) else v for k, v in fields.items()})


def views(task: Task, number: int, seed: int) -> list[View]:
    """The first `number` views of a task, at most MOST_VIEWS, no two the same.

    They depend on seed, task id and number of train pairs alone. Each eight in a row hold every
    symmetry once; colors and orders are drawn.
    """
    pairs = len(task.train)
    draw = random.Random(f"{seed}:{task.task_id}")

    def shuffled(values: Iterable[int]) -> tuple[int, ...]:
        # Of all draws, `random()` alone is the same in every version of Python.
        return tuple(sorted(values, key=lambda _: draw.random()))

    symmetries = (0, *shuffled(range(1, DIHEDRAL)))
    found = [View(0, 0, tuple(range(10)), tuple(range(pairs)))]
    seen = set(found)
    while len(found) < number:
        symmetry = symmetries[len(found) % DIHEDRAL]
        view = View(0, symmetry, (0, *shuffled(range(1, 10))), shuffled(range(pairs)))
        if view not in seen:
            seen.add(view)
            found.append(replace(view, number=len(found)))
    return found


def original_cells(cells: np.ndarray, view: View, dropped: int) -> np.ndarray:
    """The cells of a shown prompt, int32 [C, 7], row for row as cells of the original task.

    pair, row, col and color become those of the original; role and tokens stay. dropped: train
    pairs that the prompt leaves out at the front. Every cell of a grid must have a row, since its
    shape is taken from them.
    """
    pair, role, row, col, color = cells[:, :5].T
    grid = 2 * (pair + 1) + role
    heights = np.zeros(2 * (len(view.pair_order) + 1), np.int32)
    widths = heights.copy()
    np.maximum.at(heights, grid, row + 1)
    np.maximum.at(widths, grid, col + 1)
    height, width = heights[grid], widths[grid]
    for _ in range(view.dihedral % 4):  # a quarter turn back
        row, col, height, width = col, height - 1 - row, width, height
    if view.dihedral >= 4:
        row, col = col, row
    order = np.array([*view.pair_order, -1], np.int32)  # the test pair's -1 takes the last
    original = cells.copy()
    original[:, 0] = order[np.where(pair < 0, -1, pair + dropped)]
    original[:, 2:5] = np.stack([row, col, np.argsort(view.colors)[color]], axis=1)
    return original
