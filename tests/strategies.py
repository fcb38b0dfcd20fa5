"""Random grids and tasks, every kind of tokenizer and format, and the plainest check of spans."""

import functools

import pytest
import tokenizers_for_tests as small
from conftest import SHARED
from hypothesis import strategies as st

from utils.arc.tasks import Pair, Task
from utils.prompt.codec import load_tokenizer
from utils.prompt.encodings import COLORS
from utils.prompt.formats import PROMPT_FORMATS, load_format
from utils.prompt.known import KNOWN

SMALL_TASK = Task(
    "small", (Pair([[1, 2], [3, 4]], [[5, 6], [7, 8]]),), (Pair([[0, 9], [9, 0]], None),)
)


SIDES = st.integers(1, 8) | st.integers(1, 30)
QWEN2 = SHARED / "tokenizers" / "qwen2"
BUILDERS = {
    "character": small.character_tokenizer,
    "merging": small.merging_tokenizer,
    "word": small.word_tokenizer,
    "sentencepiece": small.sentencepiece_tokenizer,
    "metaspace": functools.partial(small.sentencepiece_tokenizer, legacy=False),
}
FREE_FORMATS = [name for name in PROMPT_FORMATS if name not in KNOWN]  # in any grid encoding
ALL_TOKENIZERS = ["qwen2", *BUILDERS]


@st.composite
def grids(draw, sides=SIDES):
    rows, cols = draw(sides), draw(sides)
    cells = draw(st.binary(min_size=rows * cols, max_size=rows * cols))
    return [[cell % 10 for cell in cells[i * cols : (i + 1) * cols]] for i in range(rows)]


@st.composite
def tasks(draw):
    small_grids = grids(st.integers(1, 6))
    pairs = draw(st.lists(st.tuples(small_grids, small_grids), min_size=1, max_size=4))
    train = tuple(Pair(*pair) for pair in pairs)
    return Task("random", train, (Pair(draw(grids()), None),))


def written(grid, encoding):
    """An encoding once more, in the plainest words, to compare with."""
    if encoding == "words":
        return "\n".join(" ".join(COLORS[c] for c in row) for row in grid)
    rows = [(" " if encoding == "spaced" else "").join(str(c) for c in row) for row in grid]
    if encoding != "numbered":
        return "\n".join(rows)
    numbered = "".join(f"{i + 1} {row}\n" for i, row in enumerate(rows))
    return f"```grid shape: {len(grid)}x{len(grid[0])}\n{numbered}```"


def check_spans(text, cells, grid, pair, role, encoding, start=0, lead=""):
    """The rows of cells for one grid are exact; returns where the grid's text ends."""
    rows = cells[(cells[:, 0] == pair) & (cells[:, 1] == role)]
    assert rows[:, 2].tolist() == [i for i, row in enumerate(grid) for _ in row]
    assert rows[:, 3].tolist() == [j for row in grid for j, _ in enumerate(row)]
    assert rows[:, 4].tolist() == [c for row in grid for c in row]
    glyphs = [text[a:b] for a, b in rows[:, 5:]]
    assert glyphs == [COLORS[c] if encoding == "words" else str(c) for c in rows[:, 4]]
    assert (rows[1:, 5] >= rows[:-1, 6]).all()
    expected = written(grid, encoding)
    first = expected.index("\n1 ") + 3 if encoding == "numbered" else 0
    begin = rows[0, 5] - first
    assert begin >= start and text[begin : begin + len(expected)] == expected
    assert text[:begin].endswith(lead)
    assert rows[-1, 6] == begin + len(expected.removesuffix("\n```"))
    return begin + len(expected)


@functools.cache
def tokenizer_named(name):
    if name in BUILDERS:
        return BUILDERS[name]()
    if not QWEN2.is_dir():
        pytest.skip("the Qwen2 tokenizer is not beside this checkout")
    return load_tokenizer(QWEN2)


@functools.cache
def format_named(name, encoding, tokenizer_name):
    return load_format(name, encoding, tokenizer_named(tokenizer_name))
