"""ARC tasks: grids, pairs, the files that hold them.

Knows nothing of datasets, prompts or models. A grid is a list of rows, 1..30 x 1..30 integers 0..9.
Files are read as streams: a set of tasks larger than memory is no special case.
"""

import contextlib
import gzip
import hashlib
import re
import zlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import chain, islice
from pathlib import Path
from typing import BinaryIO

import ijson
import numpy as np
import orjson

from utils.errors import UserError

Grid = list[list[int]]
SampleKey = tuple[str, int] | tuple[str, int, int]  # task_id, sample_idx, number of the view
MAX_SIDE = 30
SUFFIXES = (".json", ".jsonl", ".json.gz", ".jsonl.gz")


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


def task_id_of(pairs: Iterable[Pair], num_test: int = 1) -> str:
    """16 hex digits from the content alone: the pairs in order, the last `num_test` being the test.

    64 bits: among a million different tasks the chance of one collision is 3e-8.
    """
    content = [num_test, [(pair.input, pair.output) for pair in pairs]]
    return hashlib.blake2b(orjson.dumps(content), digest_size=8).hexdigest()


def read_tasks(path: str | Path) -> Iterator[Task]:
    """The tasks of a Kaggle file, a JSONL file, one fchollet file or a folder of them, one by one.

    `.json` and `.jsonl`, also with `.gz`. Test outputs are kept where the file has them. Raises
    UserError naming file and task, once the reading gets there.
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
    stem, suffix = _split_suffix(Path(name))
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


@contextlib.contextmanager
def opened(path: Path) -> Iterator[BinaryIO]:
    """`path` in binary, unpacked; what goes wrong inside the block is told as UserError."""
    if path.is_file() and not _split_suffix(path)[1]:
        raise UserError(f"{path}: unknown kind of file; expected {', '.join(SUFFIXES)}")
    try:
        with gzip.open(path) if path.suffix == ".gz" else open(path, "rb") as file:
            if not file.peek(1):
                raise UserError(f"{path} is empty; make or fetch it again")
            yield file
    except FileNotFoundError:
        raise UserError(f"{path} does not exist; check the path") from None
    except (ijson.JSONError, orjson.JSONDecodeError, UnicodeDecodeError) as error:
        reason = str(error).strip().split("\n")[0]
        hint = "" if ".jsonl" in path.name else ", or name it .jsonl if it is that"
        raise UserError(f"{path} is not JSON ({reason}); repair it{hint}") from error
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise UserError(f"{path} is not a whole gzip file; fetch or pack it again") from error
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}; check the file") from error


def first_byte(file: BinaryIO) -> bytes:
    """The first byte that is not space: what kind of JSON this is."""
    return file.peek(64).lstrip()[:1]


def top_keys(file: BinaryIO, limit: int = 8) -> list[str]:
    """The first keys of the JSON object that `file` holds; rewinds the file."""
    keys = (k for prefix, event, k in ijson.parse(file) if not prefix and event == "map_key")
    keys = list(islice(keys, limit))
    file.seek(0)
    return keys


def listed(names: Iterable[object]) -> str:
    names = list(map(str, names))
    return ", ".join(names[:12]) + (", ..." if len(names) > 12 else "")


def _split_suffix(path: Path) -> tuple[str, str]:
    suffix = next((s for s in SUFFIXES if path.name.endswith(s)), "")
    return path.name.removesuffix(suffix), suffix


def _items(path: Path, file: BinaryIO) -> Iterator[tuple[str, object]]:
    if first_byte(file) != b"{":
        raise UserError(f"{path} is not a JSON object; expected {{task_id: ...}} at the top")
    return ijson.kvitems(file, "", use_float=True)


def _raw_tasks(path: Path) -> Iterator[tuple[Path, str, object]]:
    """(file, task id, what stands there), whatever form the file or folder has."""
    if path.is_dir():
        files = sorted([*path.glob("*.json"), *path.glob("*.json.gz")])
        yield from chain.from_iterable(map(_raw_tasks, files))
        return
    stem, suffix = _split_suffix(path)
    with opened(path) as file:
        if suffix.startswith(".jsonl"):
            for number, line in enumerate(file, 1):
                if line.isspace():
                    continue
                where = f"{path}: line {number}"
                try:
                    task = orjson.loads(line)
                except orjson.JSONDecodeError as error:
                    raise UserError(f"{where} is not JSON ({error.msg}); repair it") from None
                if not isinstance(task, dict) or not isinstance(task.get("task_id"), str):
                    raise UserError(f'{where} must be an object with a "task_id"')
                yield path, task["task_id"], task
        elif first_byte(file) == b"{" and {"train", "test"} & set(top_keys(file)):
            yield path, stem, orjson.loads(file.read())
        else:
            yield from ((path, *item) for item in _items(path, file))


def _to_task(where: str, task_id: str, value: object) -> Task:
    keys = '"train" and "test"'
    if not isinstance(value, dict):
        raise UserError(f"{where} is not an object with {keys}; is it a solutions file?")
    if not {"train", "test"} <= value.keys():
        raise UserError(f"{where} needs the keys {keys}, found: {listed(value)}")
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
    if output is not None or not is_test:
        output = _grid_at(f"{where}, output", output)
    return Pair(shown, output)


def _grid_at(where: str, value: object) -> Grid:
    try:
        return to_grid(value)
    except ValueError as error:
        advice = "a grid is 1..30 x 1..30 integers 0..9: correct it or drop the task"
        raise UserError(f"{where}: {error}; {advice}") from None
