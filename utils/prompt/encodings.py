"""Grid encodings: how a grid is written as text and read back, with the span of every cell.

Knows nothing of prompts or of tokens. Cells come as int32 [C, 5], row by row, columns row, col,
color, start, stop: `text[start:stop]` is the cell.
"""

import itertools
import re

import numpy as np

GRID_ENCODINGS = ("digits", "spaced", "numbered", "words")
# Red, green and blue of the ARC viewer's colors, 0 to 9.
PALETTE = bytes.fromhex("000000 0074d9 ff4136 2ecc40 ffdc00 aaaaaa f012be ff851b 7fdbff 870c25")
COLORS = ("Black", "Blue", "Red", "Green", "Yellow", "Gray", "Pink", "Orange", "Purple", "Brown")
FENCE = "```grid shape: "  # how every `numbered` grid begins

COLOR_INDEX = {color.lower(): i for i, color in enumerate(COLORS)} | {"grey": 5}
COLOR_INDEX |= {str(i): i for i in range(10)}


class NoGridError(Exception):
    """A text holds no grid; the message is the reason, one of a few fixed phrases."""


def write_grid(grid: list[list[int]], encoding: str) -> tuple[str, np.ndarray]:
    """A grid's text and cells. [[1, 2], [3, 4]] is

    digits   `12\\n34`
    spaced   `1 2\\n3 4`
    numbered "```grid shape: 2x2\\n1 12\\n2 34\\n```" (rows by columns; rows counted from 1)
    words    `Blue Red\\nGreen Yellow`
    """
    glyphs = COLORS if encoding == "words" else "0123456789"
    gap = " " if encoding in ("spaced", "words") else ""
    head, labels, foot = "", [""] * len(grid), ""
    if encoding == "numbered":
        head, foot = f"{FENCE}{len(grid)}x{len(grid[0])}\n", "\n```"
        labels = [f"{i} " for i in range(1, len(grid) + 1)]
    rows = [gap.join([glyphs[color] for color in row]) for row in grid]
    lines = [label + row for label, row in zip(labels, rows, strict=True)]

    colors = np.array(grid, np.int32)
    widths = np.array([len(glyph) for glyph in glyphs], np.int32)[colors]
    ends = len(head) + np.cumsum([len(line) + 1 for line in lines]) - 1
    row_starts = ends - [len(row) for row in rows]
    stops = row_starts[:, None] + np.cumsum(widths + len(gap), axis=1) - len(gap)
    row, col = np.indices(colors.shape)
    cells = np.stack([row, col, colors, stops - widths, stops], axis=-1).reshape(-1, 5)
    return head + "\n".join(lines) + foot, cells.astype(np.int32)


def read_grid(text: str, encoding: str) -> np.ndarray:
    """The cells of the grid that text holds, prose around it or not. Raises NoGridError.

    `numbered`: the first fenced grid; its shape and its row numbers have to agree with its rows.

    The others: a line is a row (nothing but cells), mixed, blank, or prose (no cell in it). The
    grid is the first block of adjacent rows. With a mixed line next to them, or with a blank line
    and then more rows after them, there is no grid: a broken grid is never read as a smaller one.
    Fences count as prose, blanks around a line and the case of a color are ignored.
    """
    lines = text.split("\n")
    starts = itertools.accumulate((len(line) + 1 for line in lines), initial=0)
    lines = list(zip(starts, lines, strict=False))
    rows = _fenced_rows(lines) if encoding == "numbered" else _first_rows(lines, encoding)
    if len({len(row) for row in rows}) > 1:
        raise NoGridError("row lengths differ")
    cells = [
        (i, j, COLOR_INDEX[glyph.lower()], start, start + len(glyph))
        for i, row in enumerate(rows)
        for j, (start, glyph) in enumerate(row)
    ]
    return np.array(cells, np.int32)


def _first_rows(lines: list[tuple[int, str]], encoding: str) -> list[list[tuple[int, str]]]:
    """lines: (start, line) -> the rows of the first block, each a list of (start, glyph)."""
    words = encoding == "words"
    glyph = rf"\b(?:{'|'.join(COLORS)}|Grey)\b" if words else "[0-9]"
    gap = "" if encoding == "digits" else "[ \t]+"
    cell = re.compile(glyph, re.IGNORECASE)
    row = re.compile(rf"\s*{glyph}(?:{gap}{glyph})*\s*", re.IGNORECASE)
    kinds = "".join(  # one letter a line: row, mixed, prose, blank
        "r" if row.fullmatch(s) else "m" if cell.search(s) else "p" if s.strip() else "b"
        for _, s in lines
    )
    block = next((m for m in re.finditer("[rm]+", kinds) if "r" in m[0]), None)
    if "m" in (block[0] if block else kinds):
        raise NoGridError("cell is not a color" if words else "cell is not a digit")
    if block is None:
        raise NoGridError("no grid in the answer")
    if re.match("b+r", kinds[block.end() :]):
        raise NoGridError("blank line inside the grid")
    return [
        [(start + m.start(), m[0]) for m in cell.finditer(line)]
        for start, line in lines[block.start() : block.end()]
    ]


def _fenced_rows(lines: list[tuple[int, str]]) -> list[list[tuple[int, str]]]:
    """lines: (start, line) -> the rows of the first fenced grid, each a list of (start, digit)."""
    first = next((i for i, (_, s) in enumerate(lines) if s.strip().startswith(FENCE)), None)
    if first is None:
        raise NoGridError("no opening fence")
    last = next((i for i in range(first + 1, len(lines)) if lines[i][1].startswith("```")), None)
    if last is None:
        raise NoGridError("no closing fence")
    rows = []
    for number, (start, line) in enumerate(lines[first + 1 : last], 1):
        row = re.fullmatch(r"\s*([0-9]+) (\S+)\s*", line)
        if row is None or row[1] != str(number):
            raise NoGridError("wrong row number")
        if not re.fullmatch("[0-9]+", row[2]):
            raise NoGridError("cell is not a digit")
        rows.append([(start + row.start(2) + j, digit) for j, digit in enumerate(row[2])])
    shape = f"{len(rows)}x{len(rows[0]) if rows else 0}"
    if len({len(row) for row in rows}) == 1 and lines[first][1].strip() != FENCE + shape:
        raise NoGridError("shape differs from the rows")
    if not rows:
        raise NoGridError("no row in the fence")
    return rows
