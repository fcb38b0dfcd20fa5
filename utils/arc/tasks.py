"""ARC tasks: grids, pairs, the files that hold them.

Knows nothing of datasets, prompts or models. A grid is a list of rows, 1..30 x 1..30 integers 0..9.
Files are read as streams: a set of tasks larger than memory is no special case.
"""

import contextlib
import hashlib
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import chain, islice
from pathlib import Path
from typing import BinaryIO

import ijson
import numpy as np
import orjson

from utils.errors import UserError, some
from utils.store import text
from utils.store.text import Guarded, parse

Grid = list[list[int]]
SampleKey = tuple[str, int] | tuple[str, int, int]  # task_id, sample_idx, number of the view
MAX_SIDE = 30
LINES = (".jsonl", ".ndjson", ".jsonl.gz", ".ndjson.gz")
SUFFIXES = (".json", ".json.gz", *LINES)


@dataclass(frozen=True)
class Pair:
    input: Grid
    output: Grid | None  # None: a test output that the source does not tell


@dataclass(frozen=True)
class Task:
    task_id: str
    train: tuple[Pair, ...]
    test: tuple[Pair, ...]


def to_grid(value: object) -> Grid:
    """`value` as a list of lists of Python ints.

    Takes lists, tuples and numpy arrays, cells as 1, 1.0 or numpy numbers. Raises ValueError with
    one of a few fixed reasons, so that they can be counted.
    """
    rows = value.tolist() if isinstance(value, np.ndarray) else value
    if not isinstance(rows, list | tuple):
        raise ValueError("not a grid")
    if set(map(type, rows)) - {list}:
        rows = [row.tolist() if isinstance(row, np.ndarray) else row for row in rows]
        if not all(isinstance(row, list | tuple) for row in rows):
            raise ValueError("not a grid")
        rows = [list(row) for row in rows]
    widths = set(map(len, rows))
    if not rows or 0 in widths:
        raise ValueError("empty grid")
    if len(widths) > 1:
        raise ValueError("rows of unequal length")
    height, width = len(rows), len(rows[0])
    if max(height, width) > MAX_SIDE:
        raise ValueError("grid larger than 30x30")
    # A grid of ints 0..9 is one digit a cell as JSON, which costs a tenth of looking at each cell
    # (True and 1.0 equal 1: nothing but their type or text tells them apart).
    with contextlib.suppress(TypeError):
        text = orjson.dumps(rows, option=orjson.OPT_PASSTHROUGH_SUBCLASS)
        digits = text.translate(None, b"[],")
        plain = len(text) == 2 * height * (width + 1) + 1 and len(digits) == height * width
        if plain and digits.isdigit():
            return list(rows)
    return [[_to_color(cell) for cell in row] for row in rows]


def _to_color(cell: object) -> int:
    whole = isinstance(cell, int | np.integer) and not isinstance(cell, bool)
    if not whole and not (isinstance(cell, float | np.floating) and float(cell).is_integer()):
        raise ValueError("cell is not an integer")
    if not 0 <= cell <= 9:
        raise ValueError("cell out of range 0..9")
    return int(cell)


def is_hidden(output: object) -> bool:
    """Whether this, where a test output belongs, says that the source does not tell it."""
    return output is None or (isinstance(output, list) and output in ([], [[]]))


def task_id_of(pairs: Iterable[Pair], num_test: int = 1) -> str:
    """16 hex digits from the content alone: the pairs in order, the last `num_test` being the test.

    64 bits: among a million different tasks the chance of one collision is 3e-8.
    """
    content = [num_test, [(pair.input, pair.output) for pair in pairs]]
    return hashlib.blake2b(orjson.dumps(content), digest_size=8).hexdigest()


def read_tasks(path: str | Path) -> Iterator[Task]:
    """The tasks of a Kaggle file, a JSONL file, a JSON list, one fchollet file, or a folder of
    such files and of folders of them, one by one.

    `.json`, `.jsonl` and `.ndjson`, also with `.gz`. Test outputs are kept where the file has them.
    Raises UserError naming file and task, once the reading gets there.
    """
    seen = set()
    for file, task_id, value in _raw_tasks(Path(path)):
        if task_id in seen:
            raise UserError(f"{file}: task {task_id} comes twice; remove one or rename it")
        seen.add(task_id)
        yield _to_task(f"{file}: task {task_id}", task_id, value)
    if not seen:
        form = '{"<task_id>": {"train", "test"}, ...}'
        raise UserError(f"{path} holds no tasks; expected {form}")


def read_solutions(path: str | Path) -> dict[str, list[Grid]]:
    """Task id -> its test outputs, from `{id: [grid, ...]}` or `{id: {"test": [pair, ...]}}`."""
    path, solutions = Path(path), {}
    with opened(path) as file:
        for task_id, value in _items(path, file):
            where = f"{path}: task {task_id}"
            if task_id in solutions:
                raise UserError(f"{where} comes twice; remove one")
            if isinstance(value, dict) and isinstance(value.get("test"), list):
                value = [p.get("output") if isinstance(p, dict) else None for p in value["test"]]
            if not isinstance(value, list) or not value:
                raise UserError(f"{where} has no grids; solutions are {{task_id: [grid, ...]}}")
            solutions[task_id] = [_grid_at(f"{where}, output {i}", v) for i, v in enumerate(value)]
    return solutions


def solutions_names(name: str) -> tuple[str, ...]:
    """What the ground truth beside a file of tasks may be called, first choice first."""
    stem, suffix = split_suffix(name)
    named = re.sub("^arc_format_", "test_outputs_", stem)
    if named == stem:
        named = re.sub("_challenges$", "_solutions", stem)
    return (named + suffix, f"{named}.json", f"{named}.json.gz") if named != stem else ()


def solutions_beside(dataset_path: str | Path) -> Path | None:
    """The ground truth beside a file of tasks, under the name that goes with it; None without."""
    paths = map(Path(dataset_path).with_name, solutions_names(Path(dataset_path).name))
    return next(filter(Path.is_file, paths), None)


def task_item(task: Task) -> bytes:
    """`"<task_id>":{"train":[...],"test":[...]}` for a file of tasks, without the test outputs."""
    train = [{"input": pair.input, "output": pair.output} for pair in task.train]
    test = [{"input": pair.input} for pair in task.test]
    return orjson.dumps({task.task_id: {"train": train, "test": test}})[1:-1]


def solution_item(task: Task) -> bytes | None:
    """`"<task_id>":[grid,...]` for a file of solutions; None where an output is unknown."""
    outputs = [pair.output for pair in task.test]
    return None if None in outputs else orjson.dumps({task.task_id: outputs})[1:-1]


def opened(path: Path) -> contextlib.AbstractContextManager[BinaryIO]:
    """A file of tasks or rows, as `utils.store.text.opened` opens it."""
    if path.is_file() and not split_suffix(path.name)[1]:
        kinds = ", ".join(SUFFIXES)
        raise UserError(f"{path}: unknown kind of file; expected {kinds}, .parquet of --dataset")
    return text.opened(path)


def first_byte(file: BinaryIO) -> bytes:
    """The first byte that is not space: what kind of JSON this is."""
    return file.peek(64).lstrip()[:1]


def top_keys(file: BinaryIO, limit: int = 8) -> list[str]:
    """The first keys of the JSON object that the rest of `file` holds; rewinds to where it was."""
    start = file.tell()
    events = ijson.parse(Guarded(file), use_float=True)  # a long integer would crash ijson
    keys = list(islice((k for at, event, k in events if not at and event == "map_key"), limit))
    file.seek(start)
    return keys


def split_suffix(name: str) -> tuple[str, str]:
    """The name of a file without the one of SUFFIXES that it ends in, in whatever case, and that
    one; nothing for another file."""
    suffix = next((s for s in SUFFIXES if name.lower().endswith(s)), "")
    return name[: len(name) - len(suffix)], suffix


def _items(path: Path, file: BinaryIO) -> Iterator[tuple[str, object]]:
    if first_byte(file) != b"{":
        raise UserError(f"{path} is not a JSON object; expected {{task_id: ...}} at the top")
    return ijson.kvitems(Guarded(file), "", use_float=True)


def _files(folder: Path) -> list[Path]:
    """The files of one task each in a folder and in those inside it, hidden ones left out."""
    files = sorted(
        file
        for file in folder.rglob("*")
        if split_suffix(file.name)[1] in (".json", ".json.gz")
        and not any(part[0] == "." or part == "__MACOSX" for part in file.relative_to(folder).parts)
    )
    if sets := [file.name for file in files if solutions_names(file.name)]:
        raise UserError(f"{folder} holds whole sets of tasks: give one of the files {some(sets)}")
    return files


def _raw_tasks(path: Path) -> Iterator[tuple[Path, str, object]]:
    """(file, task id, what stands there), whatever form the file or folder has."""
    if path.is_dir():
        yield from chain.from_iterable(map(_raw_tasks, _files(path)))
        return
    stem, suffix = split_suffix(path.name)
    with opened(path) as file:
        if suffix in LINES:
            for number, line in enumerate(text.lines(file), 1):
                where = f"{path}: line {number}"
                try:
                    if not line.isspace():
                        yield path, *_identified(where, parse(line))
                except orjson.JSONDecodeError as error:
                    if "UTF-8" in error.msg:
                        raise UserError(text.not_utf8(where)) from None
                    raise UserError(f"{where} is not JSON ({error.msg}); repair it") from None
        elif first_byte(file) == b"[":
            values = ijson.items(Guarded(file), "item", use_float=True)
            for number, value in enumerate(values):
                yield path, *_identified(f"{path}: item {number}", value)
        elif first_byte(file) == b"{" and {"train", "test"} & set(top_keys(file)):
            yield path, stem, parse(file.read(text.MOST_BYTES))
        else:
            yield from ((path, *item) for item in _items(path, file))


def _identified(where: str, value: object) -> tuple[str, object]:
    """The id that a task of a list says itself, and the task."""
    if isinstance(value, dict):
        task_id = value.get("task_id", value.get("id"))
        if isinstance(task_id, str) or type(task_id) is int:
            return str(task_id), value
        if {"input", "output"} <= value.keys():
            raise UserError(
                f"{where} is a pair, not a task: let transform_hf_to_arc.py make tasks of pairs"
            )
    raise UserError(f'{where} must be an object with a "task_id"')


def _to_task(where: str, task_id: str, value: object) -> Task:
    keys = '"train" and "test"'
    if not isinstance(value, dict):
        raise UserError(f"{where} is not an object with {keys}; is it a solutions file?")
    if not {"train", "test"} <= value.keys():
        raise UserError(f"{where} needs the keys {keys}, found: {some(list(value), 12)}")
    sides = {}
    for side in ("train", "test"):
        if not isinstance(value[side], list) or not value[side]:
            raise UserError(f'{where}: "{side}" must be a list of at least one pair')
        sides[side] = tuple(
            _to_pair(f"{where}, {side} pair {i}", pair, side == "test")
            for i, pair in enumerate(value[side])
        )
    return Task(task_id, **sides)


def _to_pair(where: str, value: object, is_test: bool) -> Pair:
    if not isinstance(value, dict) or "input" not in value or not (is_test or "output" in value):
        needs = '"input"' if is_test else '"input" and "output"'
        raise UserError(f"{where} must be an object with {needs}")
    shown, output = _grid_at(f"{where}, input", value["input"]), value.get("output")
    hidden = is_test and is_hidden(output)
    return Pair(shown, None if hidden else _grid_at(f"{where}, output", output))


def _grid_at(where: str, value: object) -> Grid:
    try:
        return to_grid(value)
    except ValueError as error:
        advice = (
            "a grid is 1..30 x 1..30 integers 0..9: correct it, drop the task, or let "
            "transform_hf_to_arc.py leave out every pair that has none"
        )
        raise UserError(f"{where}: {error}; {advice}") from None
