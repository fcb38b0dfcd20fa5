"""ARC-like tasks of sixteen families, drawn at random, as rows in barc0's schema.

    python examples/generate_tasks.py --num_tasks 200 --num_composed 24 --output_path tasks.jsonl

Each row is `{"source": str, "examples": [[input, output], ...], "seeds": [seed]}`. Its `source` is
a program: `main(input_grid)` gives the output of each of its inputs. Rows come family by family in
turn, and the same seed gives the same rows. With `--num_composed` there follow rows of two rules,
one after the other, which the model that ships was not trained on.

Families are closed under the eight symmetries of the square and under permutations of the colors 1
to 9: a task seen in a mirror is one of them too.
"""

import argparse
import inspect
import itertools
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

sys.path.insert(0, str(Path(__file__).parents[1]))

from utils import cli
from utils.errors import UserError
from utils.prompt.encodings import COLORS
from utils.store.local import check_writable, replacing, writing

PAIRS = 4  # of a row: three to learn the rule from, and the test pair
Random = np.random.Generator
Parameters = dict[str, int]


# Rules: int [rows, cols] -> int [rows, cols]. Each is complete in itself but for numpy, since its
# text becomes the source of a row.


def recolor(grid, old, new):
    return np.where(grid == old, new, grid)


def swap(grid, first, second):
    return np.where(grid == first, second, np.where(grid == second, first, grid))


def keep(grid, color):
    return np.where(grid == color, grid, 0)


def flip(grid, axis):
    return np.flip(grid, axis)


def rotate(grid, turns):
    return np.rot90(grid, -turns)


def transpose(grid, anti):
    return np.rot90(grid, 2 * anti).T


def tile(grid, down, across):
    return np.tile(grid, (down, across))


def upscale(grid, factor):
    return grid.repeat(factor, axis=0).repeat(factor, axis=1)


def mirror(grid, axis, before):
    parts = [np.flip(grid, axis), grid] if before else [grid, np.flip(grid, axis)]
    return np.concatenate(parts, axis)


def crop(grid):
    rows, cols = np.nonzero(grid)
    return grid[rows.min() : rows.max() + 1, cols.min() : cols.max() + 1]


def fill(grid, color):
    outside = np.pad(grid == 0, 1, constant_values=True)
    reached = np.zeros_like(outside)
    reached[0] = True
    while True:
        grown = reached.copy()
        grown[1:] |= reached[:-1]
        grown[:-1] |= reached[1:]
        grown[:, 1:] |= reached[:, :-1]
        grown[:, :-1] |= reached[:, 1:]
        grown &= outside
        if (grown == reached).all():
            return np.where((grid == 0) & ~reached[1:-1, 1:-1], color, grid)
        reached = grown


def gravity(grid, turns):
    grid = np.rot90(grid, turns)
    order = np.argsort(grid != 0, axis=0, kind="stable")
    return np.rot90(np.take_along_axis(grid, order, axis=0), -turns)


def connect(grid):
    result = grid.copy()
    for color in range(1, 10):
        rows, cols = np.nonzero(grid == color)
        if len(rows) == 2 and (rows[0] == rows[1] or cols[0] == cols[1]):
            result[rows[0] : rows[1] + 1, cols[0] : cols[1] + 1] = color
    return result


def outline(grid, color):
    result = grid.copy()
    for row, col in np.argwhere(grid):
        around = result[max(row - 1, 0) : row + 2, max(col - 1, 0) : col + 2]
        around[around == 0] = color
    return result


def count(grid, across):
    bar = grid[grid != 0]
    return bar[None, :] if across else bar[:, None]


def frame(grid, color):
    result = grid.copy()
    result[0] = result[-1] = result[:, 0] = result[:, -1] = color
    return result


def _colors(random: Random, number: int) -> list[int]:
    """Different colors, none of them black."""
    return (random.permutation(9)[:number] + 1).tolist()


def _shape(random: Random, low: int, high: int) -> tuple[int, int]:
    rows, cols = random.integers(low, high + 1, 2).tolist()
    return rows, cols


def _scene(
    random: Random, low: int = 3, high: int = 5, wanted: tuple[int, ...] = (), filled: float = 0.6
) -> np.ndarray:
    """Cells of a few colors on black; those in `wanted` are among them."""
    shape = _shape(random, low, high)
    palette = np.array([*wanted, *_colors(random, 3)][: max(3, len(wanted) + 1)])
    grid = np.where(random.random(shape) < filled, random.choice(palette, shape), 0)
    cells = random.permutation(grid.size)
    for cell, color in zip(cells, wanted, strict=False):
        grid.flat[cell] = color
    return grid


def _object(random: Random) -> np.ndarray:
    """A full rectangle of two colors somewhere on black."""
    rows, cols = _shape(random, 4, 6)
    height, width = int(random.integers(2, rows)), int(random.integers(2, cols))
    grid = np.zeros((rows, cols), int)
    top, left = random.integers(rows - height + 1), random.integers(cols - width + 1)
    body = random.choice(np.array(_colors(random, 2)), (height, width))
    grid[top : top + height, left : left + width] = body
    return grid


def _rooms(random: Random, color: int) -> np.ndarray:
    """An outlined rectangle, empty inside, of another color than `color`."""
    rows, cols = _shape(random, 4, 6)
    grid = np.zeros((rows, cols), int)
    wall = next(c for c in _colors(random, 2) if c != color)
    height, width = int(random.integers(3, rows + 1)), int(random.integers(3, cols + 1))
    top, left = random.integers(rows - height + 1), random.integers(cols - width + 1)
    grid[top : top + height, left : left + width] = wall
    grid[top + 1 : top + height - 1, left + 1 : left + width - 1] = 0
    return grid


def _points(random: Random) -> np.ndarray:
    """Two cells of one color in one row or column, or two such couples that do not cross."""
    while True:
        rows, cols = _shape(random, 4, 6)
        grid = np.zeros((rows, cols), int)
        taken = np.zeros((rows, cols), int)
        for color in _colors(random, int(random.integers(1, 3))):
            if random.random() < 0.5:
                row = random.integers(rows)
                start, stop = np.sort(random.permutation(cols)[:2])
                line = (row, slice(start, stop + 1))
                ends = ([row, row], [start, stop])
            else:
                col = random.integers(cols)
                start, stop = np.sort(random.permutation(rows)[:2])
                line = (slice(start, stop + 1), col)
                ends = ([start, stop], [col, col])
            taken[line] += 1
            grid[ends] = color
        if taken.max() == 1:
            return grid


def _pixels(random: Random, color: int) -> np.ndarray:
    """One or two cells with room around them; not of `color`."""
    while True:
        shape = _shape(random, 4, 6)
        grid = np.zeros(shape, int)
        pixels = [c for c in _colors(random, 3) if c != color][: int(random.integers(1, 3))]
        cells = [random.integers(shape) for _ in pixels]
        if len(cells) == 2 and np.abs(cells[0] - cells[1]).max() < 3:
            continue
        for (row, col), pixel in zip(cells, pixels, strict=True):
            grid[row, col] = pixel
        return grid


def _scatter(random: Random) -> np.ndarray:
    """One to six cells of one color."""
    shape = _shape(random, 3, 5)
    grid = np.zeros(shape, int)
    grid.flat[random.permutation(grid.size)[: int(random.integers(1, 7))]] = _colors(random, 1)[0]
    return grid


@dataclass(frozen=True)
class Family:
    """rule: grid, parameters -> grid. parameters: what one task of the family fixes; draw: an
    input for them. about: what the rule does, in words, of its parameters."""

    rule: Callable[..., np.ndarray]
    about: Callable[[Parameters], str]
    parameters: Callable[[Random], Parameters]
    draw: Callable[[Random, Parameters], np.ndarray]

    @property
    def name(self) -> str:
        return self.rule.__name__


SIDES = {(0, 0): "below", (0, 1): "above", (1, 0): "to the right", (1, 1): "to the left"}


def _name(color: int) -> str:
    return COLORS[color].lower()


def _choice(**values: Any) -> Callable[[Random], Parameters]:
    return lambda random: {key: int(random.choice(of)) for key, of in values.items()}


def _distinct(*names: str) -> Callable[[Random], Parameters]:
    return lambda random: dict(zip(names, _colors(random, len(names)), strict=True))


def _tiles(random: Random) -> Parameters:
    return dict(zip(("down", "across"), ((1, 2), (2, 1), (2, 2))[random.integers(3)], strict=True))


FAMILIES = {
    family.name: family
    for family in (
        Family(
            recolor,
            lambda p: f"Every {_name(p['old'])} cell becomes {_name(p['new'])}.",
            _distinct("old", "new"),
            lambda random, p: _scene(random, wanted=(p["old"],)),
        ),
        Family(
            swap,
            lambda p: f"{_name(p['first']).capitalize()} and {_name(p['second'])} change places.",
            _distinct("first", "second"),
            lambda random, p: _scene(random, wanted=(p["first"], p["second"])),
        ),
        Family(
            keep,
            lambda p: f"Only the {_name(p['color'])} cells stay.",
            _distinct("color"),
            lambda random, p: _scene(random, wanted=(p["color"],)),
        ),
        Family(
            flip,
            lambda p: f"The grid is flipped {('upside down', 'left to right')[p['axis']]}.",
            _choice(axis=(0, 1)),
            lambda random, _: _scene(random),
        ),
        Family(
            rotate,
            lambda p: f"The grid is turned clockwise by {90 * p['turns']} degrees.",
            _choice(turns=(1, 2, 3)),
            lambda random, _: _scene(random),
        ),
        Family(
            transpose,
            lambda p: f"The grid is flipped about its {('main', 'other')[p['anti']]} diagonal.",
            _choice(anti=(0, 1)),
            lambda random, _: _scene(random),
        ),
        Family(
            tile,
            lambda p: f"The grid is repeated, {p['down']} down by {p['across']} across.",
            _tiles,
            lambda random, _: _scene(random, 2, 3),
        ),
        Family(
            upscale,
            lambda p: f"Every cell becomes a square of side {p['factor']}.",
            _choice(factor=(2,)),
            lambda random, _: _scene(random, 2, 3),
        ),
        Family(
            mirror,
            lambda p: f"The grid gets its mirror image {SIDES[p['axis'], p['before']]}.",
            _choice(axis=(0, 1), before=(0, 1)),
            lambda random, _: _scene(random, 2, 4),
        ),
        Family(
            crop,
            lambda _: "The object is cut out.",
            _choice(),
            lambda random, _: _object(random),
        ),
        Family(
            fill,
            lambda p: f"What is enclosed is filled with {_name(p['color'])}.",
            _distinct("color"),
            lambda random, p: _rooms(random, p["color"]),
        ),
        Family(
            gravity,
            lambda p: (
                f"All cells fall {('down', 'to the left', 'up', 'to the right')[p['turns']]}."
            ),
            _choice(turns=(0, 1, 2, 3)),
            lambda random, _: _scene(random, filled=0.4),
        ),
        Family(
            connect,
            lambda _: "Two cells of one color are joined by a straight line.",
            _choice(),
            lambda random, _: _points(random),
        ),
        Family(
            outline,
            lambda p: f"Every cell gets a {_name(p['color'])} border.",
            _distinct("color"),
            lambda random, p: _pixels(random, p["color"]),
        ),
        Family(
            count,
            lambda p: (
                f"A bar as long as there are colored cells, {('down', 'across')[p['across']]}."
            ),
            _choice(across=(0, 1)),
            lambda random, _: _scatter(random),
        ),
        Family(
            frame,
            lambda p: f"The outermost cells become {_name(p['color'])}.",
            _distinct("color"),
            lambda random, p: _scene(random),
        ),
    )
}


COLORING = ("recolor", "swap", "keep", "frame")
TURNING = ("flip", "rotate", "transpose")


def draw_row(family: Family, seed: tuple[int, ...], then: Family | None = None) -> dict[str, Any]:
    """A row of one task of `family`; the same seed gives the same row.

    then: a family whose rule is applied to what the first gives. No input is drawn twice, and none
    equals its output, so that each pair says something.
    """
    random = np.random.default_rng(seed)
    steps = [(f, f.parameters(random)) for f in (family, then) if f is not None]
    examples: list[list[list[list[int]]]] = []
    while len(examples) < PAIRS:
        grid = family.draw(random, steps[0][1])
        result = grid
        for step, parameters in steps:
            result = step.rule(result, **parameters)
        pair = [grid.tolist(), result.tolist()]
        if pair[0] != pair[1] and pair[0] not in (given for given, _ in examples):
            examples.append(pair)
    return {"source": source(steps), "examples": examples, "seeds": list(seed)}


def source(steps: Sequence[tuple[Family, Parameters]]) -> str:
    """A program whose `main` is the rules with these parameters, one after the other."""
    concepts = ", ".join(family.name for family, _ in steps)
    about = " Then: ".join(family.about(parameters) for family, parameters in steps)
    rules = "\n\n".join(inspect.getsource(family.rule) for family, _ in steps)
    lines = [
        f"    grid = {family.name}(grid{''.join(f', {n}={v}' for n, v in parameters.items())})\n"
        for family, parameters in steps
    ]
    return (
        f"# concepts: {concepts}\n# description: {about}\nimport numpy as np\n\n\n{rules}\n\n"
        f"def main(input_grid):\n    grid = input_grid\n{''.join(lines)}    return grid\n"
    )


def family_of(row: dict[str, Any]) -> str:
    """The family that the source of a row names; two, with a comma, of a composed one."""
    return row["source"].partition("\n")[0].removeprefix("# concepts: ")


def draw_rows(num_tasks: int, seed: int) -> Iterator[dict[str, Any]]:
    """Rows of all families in turn, no two of them alike."""
    seen = set()
    families = list(FAMILIES.values())
    index = 0
    while len(seen) < num_tasks:
        row = draw_row(families[len(seen) % len(families)], (seed, index))
        index += 1
        if (key := str(row["examples"])) not in seen:
            seen.add(key)
            yield row


def draw_composed(number: int, seed: int) -> Iterator[dict[str, Any]]:
    """Rows that change colors and then turn or mirror the grid, every couple of such rules in
    turn."""
    couples = list(itertools.product(COLORING, TURNING))
    for index in range(number):
        first, second = couples[index % len(couples)]
        yield draw_row(FAMILIES[first], (seed, index, 1), FAMILIES[second])


def build_parser() -> cli.Parser:
    parser = cli.Parser(__doc__)
    parser.add_argument(
        "--num_tasks", type=cli.int_at_least(1), default=200, help="rows, of all families in turn"
    )
    parser.add_argument(
        "--num_composed",
        type=cli.int_at_least(0),
        default=0,
        help="further rows, of two rules one after the other",
    )
    parser.add_argument(
        "--seed", type=cli.int_at_least(0), default=1, help="of the random draws, from 0"
    )
    parser.add_argument(
        "--output_path", type=Path, required=True, help="JSON lines; must not be there yet"
    )
    return parser


def main(args: argparse.Namespace, _: cli.Signals) -> None:
    import orjson

    path = args.output_path
    if args.seed >= 2**63:
        raise UserError(f"--seed {args.seed} does not fit in a row: give one below 2^63")
    if path.exists():
        raise UserError(f"{path} exists: give another --output_path")
    check_writable(path.absolute().parent)
    with writing(path), replacing(path, exclusive=True) as sink:
        rows = draw_rows(args.num_tasks, args.seed)
        for row in itertools.chain(rows, draw_composed(args.num_composed, args.seed)):
            sink.write(orjson.dumps(row) + b"\n")
    composed = f", {args.num_composed} of two rules" if args.num_composed else ""
    print(f"{args.num_tasks} tasks of {len(FAMILIES)} families{composed} in {path}")


if __name__ == "__main__":
    cli.run(main, build_parser())
