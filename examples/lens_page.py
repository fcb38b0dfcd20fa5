"""The page of the logit lens: a film of one answer, layer by layer.

It is one file that fetches nothing. At the bottom stands what is said of the cell that one points
at or touches.
"""

# T tokens and C cells of an answer

import html
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from itertools import groupby
from typing import Any

import numpy as np

from examples.report import (
    COLOR_CODES,
    HEAT,
    as_grid,
    colored,
    figure,
    key,
    page,
    picture,
    scale,
    shade,
)
from utils.prompt.encodings import COLORS, NoGridError, read_grid

Text = Callable[[list[int]], str]  # of some tokens
Read = Callable[[tuple[int, ...]], list[int]]  # the colors that some tokens write

UNSAID = "#ffffff"  # of a cell of which a layer says no color
NOTE_STYLE = """
#note { position: fixed; left: 0; right: 0; bottom: 0; padding: 10px 16px; min-height: 44px;
  background: #1d1f24; color: #ffffff; font-size: .95rem; }
#note:empty { display: none; } [data-note]:hover { stroke: #e8590c; stroke-width: 2; }
"""
NOTE_SCRIPT = """
const note = document.getElementById('note');
for (const kind of ['pointerover', 'click']) document.addEventListener(kind, event => {
  const words = event.target.dataset && event.target.dataset.note;
  if (words) note.textContent = words;
});
"""


@dataclass(frozen=True, eq=False)
class Reading:
    """What one layer says of one answer, at each of its T tokens whose state was stored, and NaN or
    -1 at the others.

    logprob: float32 [T], of the token that was said; top: int32 [T], the token of the highest
    logit; top_logprob: float32 [T], of that.
    """

    logprob: np.ndarray
    top: np.ndarray
    top_logprob: np.ndarray


@dataclass(frozen=True, eq=False)
class Film:
    """One answer as every layer sees it: the item, without its activations, and layer -> what it
    says."""

    item: dict[str, Any]
    readings: dict[str, Reading]


def answer_cells(item: dict[str, Any]) -> np.ndarray:
    """int [C, 7]: the cells of an item's answer, their tokens counted from the answer's first."""
    cells = item["cells"]
    cells = cells[(cells[:, 0] == -1) & (cells[:, 1] == 1)].copy()
    cells[:, 5:] -= item["prompt_length"]
    return cells


def stored(cells: np.ndarray, reading: Reading) -> np.ndarray:
    """bool [C]: of which cells the states of all tokens were stored."""
    return np.array([np.isfinite(reading.logprob[i:j]).all() for i, j in cells[:, 5:]], bool)


def truth_of(item: dict[str, Any], cells: np.ndarray) -> np.ndarray | None:
    """int [C]: the true colors of an answer's cells; None where they are not known, or the answer
    has another shape."""
    target = item["target"]
    if target is None or not len(cells):
        return None
    if (len(target), len(target[0])) != tuple(cells[:, 2:4].max(axis=0) + 1):
        return None
    return np.array(target)[cells[:, 2], cells[:, 3]]


def reader(text: Text, encoding: str) -> Read:
    """Reads the cells of a row, written in one of GRID_ENCODINGS, however a token spells them."""
    encoding = "digits" if encoding == "numbered" else encoding  # of which a row alone is that

    @cache
    def read(tokens: tuple[int, ...]) -> list[int]:
        try:
            return read_grid(text(list(tokens)), encoding)[:, 2].tolist()
        except NoGridError:
            return []

    return read


def said_of(item: dict[str, Any], reading: Reading, read: Read) -> tuple[np.ndarray, np.ndarray]:
    """bool [C] and int [C], of the answer's cells in order: whether the layer says the tokens of
    the answer, and the color that it says, -1 where that is none. Cells that share their tokens are
    read together."""
    answer, same, colors = item["input_ids"][item["prompt_length"] :], [], []
    for (start, stop), group in groupby(answer_cells(item).tolist(), lambda cell: cell[5:]):
        own, tokens = [cell[4] for cell in group], reading.top[start:stop]
        found = own
        if not np.array_equal(tokens, answer[start:stop]):
            found = read(tuple(tokens.tolist())) if tokens.min() >= 0 else []
        same += [found is own] * len(own)
        colors += found if len(found) == len(own) else [-1] * len(own)
    return np.array(same, bool), np.array(colors, int)


def film_page(film: Film, read: Read, text: Text) -> bytes:
    """The page of one answer."""
    item, cells = film.item, answer_cells(film.item)
    target = truth_of(item, cells)
    head = [
        figure("test input", colored(_given(item))),
        figure("answer", colored(_grid(cells, cells[:, 4]))),
    ]
    if target is not None:
        head.append(figure("truth", colored(_grid(cells, target))))
    lines = "".join(
        _layer(name, reading, item, read, text) for name, reading in film.readings.items()
    )
    state = {True: "solved", False: "failed", None: "not known to be right or wrong"}
    words = state[item["correct"]]
    if item["teacher_forced"]:
        words = "the true answer, given to the model"
    return page(
        "What each layer would say",
        f"<h1>What each layer would say</h1><p>The answer to task {html.escape(item['task_id'])} "
        f"({words}), read off after every layer as if it were the last one: its "
        "state of the token before each cell goes through the final norm and the unembedding. On "
        "the left, what the layer would say of each cell, drawn the larger the surer it is, and "
        "white where that is no color; on the right, the probability that it gives to what was "
        f"said in the end. Point at a cell, or touch it, to read the numbers.</p>{key()}"
        f"{scale('p = 0', 'p = 1', HEAT)}"
        f'<div class="card"><div class="grids">{"".join(head)}</div></div>'
        f'<div class="card">{lines}</div>',
        f"<style>{NOTE_STYLE}</style><div id=note></div><script>{NOTE_SCRIPT}</script>",
    )


def _given(item: dict[str, Any]) -> list[list[int]]:
    cells = item["cells"]
    cells = cells[(cells[:, 0] == -1) & (cells[:, 1] == 0)]
    return _grid(cells, cells[:, 4])


def _grid(cells: np.ndarray, values: Any) -> list[list[Any]]:
    return as_grid(cells[:, 2:], np.asarray(values)).tolist()


def _layer(name: str, reading: Reading, item: dict[str, Any], read: Read, text: Text) -> str:
    """A line: the grid that a layer would say, and how likely it finds the answer's cells."""
    cells, (same, colors) = answer_cells(item), said_of(item, reading, read)
    fills, notes, sure, likely = [], [], [], []
    for said, (_, _, row, col, color, start, stop) in zip(colors, cells.tolist(), strict=True):
        tokens = reading.top[start:stop].tolist()
        top, final = reading.top_logprob[start:stop].sum(), reading.logprob[start:stop].sum()
        fills.append(COLOR_CODES[said] if said >= 0 else UNSAID)
        place = f"{name}, row {row + 1}, column {col + 1}: "
        if np.isfinite(final):
            words = COLORS[said].lower() if said >= 0 else repr(text(tokens))
            place += (
                f"would say {words}, log p {top:.2f}; log p of {COLORS[color].lower()} {final:.2f}"
            )
        else:
            place += "no state was stored"
        notes.append(place)
        sure.append(np.nan_to_num(np.exp(top)))
        likely.append(np.nan_to_num(np.exp(final)))
    same = same[stored(cells, reading)]
    share = same.mean() if len(same) else 0
    notes, sure, likely = (_grid(cells, values) for values in (notes, sure, likely))
    said = picture(_grid(cells, fills), 18, strength=np.array(sure), notes=notes, words=name)
    shades = [[shade(p) for p in row] for row in likely]
    grids = figure("would say", said) + figure("p of the answer", picture(shades, 18, notes=notes))
    return (
        f'<div class="layer"><div><h3>{html.escape(name)}</h3><p class="soft">{share:.0%} of '
        f'the cells as in the answer</p></div><div class="grids">{grids}</div></div>'
    )
