"""Rows of a dataset, from the Hugging Face hub or local files -> tasks.

A row holds its pairs in one column (`examples`, or the one that `--column` names), or is a task
already (`train` and `test`). JSON is read as text and parsed here: Arrow gives a whole block of
rows one type, so that one 0.5 makes every cell of the block a float, and one word stops it all.
Which files a dataset has, its splits, its downloads and its cache are the `datasets` library's.
"""

import argparse
import contextlib
import json
import logging
import os
import re
import ssl
import urllib.error
import urllib.request
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import chain, islice
from pathlib import Path
from types import NoneType

import ijson
import orjson

from utils.arc import tasks as arc
from utils.arc.tasks import Grid, Pair, Task
from utils.errors import UserError, some
from utils.store import text
from utils.store.local import check_writable
from utils.store.text import Guarded, parse

DEFAULT_DATASET = "barc0/200k_HEAVY_gpt4o-description-gpt4omini-code_generated_problems"
DEFAULT_COLUMN = "examples"
BATCH_ROWS = 8  # few, since the garbage collector looks at every living list over and over
NOT_UTF8 = "not UTF-8"
LOCAL_HINT = "pass a local .jsonl, .json or .parquet file, or a folder of them, as --dataset"


@dataclass(frozen=True)
class Source:
    """A split of a dataset that is open to be read.

    rows: dicts, or what stands in the source where a row is something else. columns: name -> type,
    as the first rows have it. column: the one that holds the pairs; None where the rows are tasks,
    with train and test.
    """

    rows: Iterator[object]
    columns: dict[str, str]
    column: str | None


def add_flags(parser: argparse.ArgumentParser, default: str | None = None) -> None:
    """The flags that say what `open_rows` opens; without a default `--dataset` must be given."""
    add = parser.add_argument
    told = "name on the Hugging Face hub, or a local .json, .jsonl or .parquet file or a folder"
    given = {"default": default} if default else {"required": True}
    add("--dataset", help=told, **given)
    add("--split", default="train", help="split, or a slice such as train[:100]")
    add("--column", help="column that holds the pairs (default: examples, else train and test)")
    add("--streaming", action="store_true", help="read from the hub without downloading it first")


def open_rows(
    dataset: str, split: str = "train", column: str | None = None, streaming: bool = False
) -> Source:
    """The rows of `split`, as a stream, and where their pairs are; arguments as of the flags.

    Raises UserError for a dataset, split or column that is not there.
    """
    rows = _guarded(dataset, split, streaming)
    first = list(islice(rows, 100))
    columns: dict[str, str] = {}
    for row in first:
        if isinstance(row, dict):
            columns = {name: _type_name(value) for name, value in row.items()} | columns
    if not first:
        raise UserError(f"{dataset} holds no rows in split {split}; check the file or the split")
    if not columns:
        if any(to_task(row, column)[1] == [(None, NOT_UTF8)] for row in first):
            raise UserError(text.not_utf8(dataset))
        raise UserError(f"{dataset} holds no rows: its first lines are not JSON objects")
    if column is None and DEFAULT_COLUMN in columns:
        column = DEFAULT_COLUMN
    if column not in columns and (column or not {"train", "test"} <= columns.keys()):
        wanted = f"column {column!r}" if column else "column 'examples', nor 'train' and 'test'"
        found = f"no {wanted} in {dataset}; found: {some(list(columns), 12)}"
        raise UserError(f"{found}; name the one that holds the pairs with --column")
    return Source(chain(first, rows), columns, column)


def to_task(
    row: object, column: str | None, max_train_pairs: int | None = None
) -> tuple[Task | None, list[tuple[int | None, str]]]:
    """The task of a row, and what is wrong with the row as (pair, reason).

    The last valid pair is the test pair, the first `max_train_pairs` others are the train pairs; a
    row that holds train and test keeps its division, its pairs being counted from 0 through both.
    Pair None stands for the row; only then is there no task. The id comes from all valid pairs, so
    that `max_train_pairs` does not change it.
    """
    names = ("train", "test") if column is None else (column,)
    if not isinstance(row, dict):
        foreign = isinstance(row, bytes) and not text.is_utf8(row)
        return None, [(None, NOT_UTF8 if foreign else "not a JSON object")]
    sides = {name: _pairs_of(row.get(name)) for name in names}
    if bad := [name for name in names if sides[name] is None]:
        return None, [(None, f"{bad[0]} is not a list of pairs")]
    errors: list[tuple[int | None, str]] = []
    pairs: list[Pair] = []
    num_train = 0
    for name in names:
        num_train, is_test = len(pairs), column is None and name == "test"
        for value in sides[name]:
            try:
                pairs.append(_to_pair(value, output_needed=not is_test))
            except ValueError as error:
                errors.append((len(pairs) + len(errors), str(error)))
    num_test = len(pairs) - num_train if 0 < num_train < len(pairs) else 1
    train, test = tuple(pairs[:-num_test]), tuple(pairs[-num_test:])
    if not train or any(pair.output is None for pair in train):
        return None, [*errors, (None, "fewer than two valid pairs")]
    return Task(arc.task_id_of(pairs, num_test), train[:max_train_pairs], test), errors


def error_item(row: int, pair: int | None, reason: str) -> bytes:
    """An item of transformation_errors.json; rows and pairs are counted from 0 in the source."""
    return orjson.dumps({"row": row, "pair": pair, "reason": reason})


def _pairs_of(value: object) -> list | None:
    """What a column of pairs holds, as a list of them: also where the list is JSON in a string, and
    where `datasets` has stored it as two lists, of the inputs and of the outputs."""
    if isinstance(value, str):
        try:
            value = parse(value)
        except ValueError:
            return None
    if isinstance(value, dict):
        inputs, outputs = value.get("input"), value.get("output")
        if not isinstance(inputs, list) or not isinstance(outputs, list | NoneType):
            return None
        outputs = [None] * len(inputs) if outputs is None else outputs
        return list(zip(inputs, outputs, strict=True)) if len(inputs) == len(outputs) else None
    return value if isinstance(value, list) else None


def _to_pair(value: object, output_needed: bool) -> Pair:
    if isinstance(value, dict):
        grids = value.get("input"), value.get("output")
    elif isinstance(value, list | tuple) and len(value) == 2:
        grids = tuple(value)
    else:
        raise ValueError("not a pair of input and output")
    found: list[Grid | None] = []
    for side, grid in zip(("input", "output"), grids, strict=True):
        needed = side == "input" or output_needed or not arc.is_hidden(grid)
        try:
            found.append(arc.to_grid(grid) if needed else None)
        except ValueError as error:
            raise ValueError(f"{side}: {error}") from None
    return Pair(*found)


def _read(dataset: str, split: str, streaming: bool) -> Iterator[object]:
    path = Path(dataset).expanduser()
    sliced = re.fullmatch(r"[\w.-]+", split) is None  # train[:100], train+test
    if sliced and streaming:
        raise UserError(f"--streaming cannot read the slice {split}; use --max_samples instead")
    if not path.exists():
        local = path.suffix == ".parquet" or arc.split_suffix(path.name)[1]
        if local or dataset[:1] in "./~":
            raise UserError(f"{dataset} does not exist; check the path")
        if not re.fullmatch(r"[\w.-]+(/[\w.-]+)?", dataset):
            raise UserError(f"{dataset} is neither a local path nor a hub name; {LOCAL_HINT}")
        if not _hub_answers():
            os.environ["HF_HUB_OFFLINE"] = "1"  # what is in the local cache is found all the same
    import datasets

    try:
        check_writable(Path(datasets.config.HF_DATASETS_CACHE))  # where also local files go
    except UserError as error:
        raise UserError(f"{error} with HF_HOME") from error
    if not logging.getLogger().isEnabledFor(logging.DEBUG):
        for name in ("datasets", "huggingface_hub", "httpx", "httpx2"):
            logging.getLogger(name).setLevel(logging.CRITICAL)  # we say it in one line
    if path.is_file():
        kind = "parquet" if path.suffix.lower() == ".parquet" else "json"
        builder = datasets.load_dataset_builder(kind, data_files=str(path))
    else:
        builder = datasets.load_dataset_builder(str(path) if path.exists() else dataset)
    files = builder.config.data_files or {}
    splits = [str(name) for name in files or builder.info.splits or ()]
    named = set(re.findall(r"(?:^|\+)([\w.-]+)", split))
    if splits and not named <= set(splits):
        raise UserError(f"no split {split} in {dataset}; --split can be: {some(splits, 12)}")
    is_json = builder.name == "json"
    if builder.name in ("json", "parquet") and path.exists() and not sliced:
        return chain.from_iterable(map(_json_rows if is_json else _parquet_rows, files[split]))
    is_lines = is_json and all(_is_lines(file) for name in named for file in files[name])
    if is_lines:
        texts = {name: list(files[name]) for name in sorted(named)}
        builder = datasets.load_dataset_builder("text", data_files=texts)
    if streaming or (path.exists() and not sliced):
        loaded = builder.as_streaming_dataset(split)
    else:
        builder.download_and_prepare()
        loaded = builder.as_dataset(split)
    if is_lines:
        return _parsed(row["text"] for row in loaded)
    tables = loaded.with_format("arrow").iter(batch_size=BATCH_ROWS)
    return _arrow_rows(chain.from_iterable(table.to_batches() for table in tables))


def _guarded(dataset: str, split: str, streaming: bool) -> Iterator[object]:
    """The rows, with what `datasets` raises on the way told in one line."""
    begun = False
    try:
        for row in _read(dataset, split, streaming):
            yield row
            begun = True
    except UserError as error:
        raise UserError(str(error), exit_code=1 if begun else 2) from error
    except Exception as error:
        from datasets.exceptions import DatasetNotFoundError

        if isinstance(error, DatasetNotFoundError):
            message = f"{dataset} is not on the hub, or needs `hf auth login`; check the name"
        elif isinstance(error, ConnectionError):
            message = f"cannot reach the hub for {dataset}; check the network, or {LOCAL_HINT}"
        elif "corresponds to no data" in str(error):
            message = f"{dataset} has no rows in --split {split}: it ends before they begin"
        else:
            reason = " ".join(str(error.__cause__ or error).split())[:200]
            message = f"cannot read {dataset} ({type(error).__name__}: {reason}); {LOCAL_HINT}"
        raise UserError(message, exit_code=1 if begun else 2) from error


def _hub_answers() -> bool:
    """Whether the hub can be reached: `datasets` itself retries for half a minute."""
    if os.environ.get("HF_HUB_OFFLINE", "").upper() in ("1", "ON", "YES", "TRUE"):
        return True  # datasets knows, and does not try
    endpoint = os.environ.get("HF_ENDPOINT", "https://huggingface.co")
    try:
        urllib.request.urlopen(urllib.request.Request(endpoint, method="HEAD"), timeout=5).close()
    except urllib.error.HTTPError:
        return True
    except OSError as error:
        return isinstance(getattr(error, "reason", None), ssl.SSLError)
    return True


def _is_lines(path: str) -> bool:
    return arc.split_suffix(path)[1] in arc.LINES


def _json_rows(path: str) -> Iterator[object]:
    """Rows of a local file: one a line, a list of them, or one object that is a task; of a list of
    pairs, as RE-ARC has them for each task, one row."""
    with arc.opened(Path(path)) as file:
        start = file.tell()
        if _is_lines(path):
            yield from _parsed(text.lines(file))
        elif arc.first_byte(file) == b"[":
            values = ijson.items(Guarded(file), "item", use_float=True)
            first = list(islice(values, 1))
            if first and isinstance(first[0], dict) and {"input", "output"} <= first[0].keys():
                yield {DEFAULT_COLUMN: [*first, *values]}
            else:
                yield from chain(first, values)
        else:
            first = next(_parsed([file.readline(1 << 26)]), None)
            file.seek(start)
            tasks = isinstance(first, dict) and any(
                isinstance(value, dict) and "train" in value for value in first.values()
            )
            if isinstance(first, dict) and not tasks:
                yield from _parsed(text.lines(file))
            elif not tasks and "train" in arc.top_keys(file):
                yield parse(file.read(text.MOST_BYTES))
            else:
                what = "holds one JSON object, not rows; if these are ARC tasks they need no"
                raise UserError(f"{path} {what} transforming: give the file to --dataset_path")


def _parsed(lines: Iterable[str | bytes]) -> Iterator[object]:
    """One value a line; a line that is not JSON comes as it stands."""
    for line in lines:
        if not line.strip():
            continue
        try:
            yield parse(line)
        except ValueError:
            try:  # json knows NaN, so that the pair that holds it can be named
                yield json.loads(line.decode() if isinstance(line, bytes) else line)
            except (ValueError, RecursionError):
                yield line


def _parquet_rows(path: str) -> Iterator[dict]:
    """Rows of a local file. `datasets` decodes a whole row group at once, which can be the file."""
    from pyarrow.parquet import ParquetFile

    with ParquetFile(path) as file:
        yield from _arrow_rows(file.iter_batches(batch_size=BATCH_ROWS))


def _arrow_rows(batches: Iterable[object]) -> Iterator[dict]:
    """Rows of pyarrow record batches; cells of mixed types, which `datasets` keeps as JSON, parsed.

    Nothing else is decoded: an image stays the bytes that it is stored as.
    """
    import datasets
    import pyarrow as pa

    for batch in batches:
        has_json = pa.schema([field for field in batch.schema if "arrow.json" in str(field.type)])
        features = datasets.Features.from_arrow_schema(has_json)
        for row in batch.to_pylist():
            # A number of more than 64 bits cannot be parsed; its row is reported as it stands.
            with contextlib.suppress(ValueError):
                row |= features.decode_example({name: row[name] for name in has_json.names})
            yield row


def _type_name(value: object, depth: int = 6) -> str:
    if isinstance(value, list):
        return f"list[{_type_name(value[0], depth - 1)}]" if value and depth else "list"
    if isinstance(value, dict):
        fields = islice(value.items() if depth else (), 8)
        return "{" + ", ".join(f"{k}: {_type_name(v, depth - 1)}" for k, v in fields) + "}"
    return "null" if value is None else type(value).__name__
