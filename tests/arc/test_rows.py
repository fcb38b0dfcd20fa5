import gzip
import io
import json
import ssl
from itertools import islice
from pathlib import Path
from urllib.error import HTTPError, URLError

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from datasets import Dataset
from hypothesis import given
from hypothesis import strategies as st

from utils.arc import rows
from utils.arc.rows import open_rows, to_task
from utils.arc.tasks import Pair
from utils.errors import UserError

SHARED = Path(__file__).parents[3] / "shared" / "data"
needs_shared = pytest.mark.skipif(not SHARED.is_dir(), reason=f"no {SHARED}")

A, B, C, D = ([[[k, k]], [[k]]] for k in range(4))
ROW = {"source": "s", "examples": [A, B, C]}


def pair(values: list) -> Pair:
    return Pair(*values)


def write_lines(path: Path, values: list) -> Path:
    path.write_text("".join(json.dumps(value) + "\n" for value in values))
    return path


def read(path: Path, **options) -> list:
    return list(open_rows(str(path), **options).rows)


def message_of(*args, **options) -> str:
    with pytest.raises(UserError) as caught:
        list(open_rows(*args, **options).rows)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_last_pair_is_the_test_pair():
    task, errors = to_task(ROW, "examples")
    assert (task.train, task.test, errors) == ((pair(A), pair(B)), (pair(C),), [])


def test_both_pair_forms_and_numpy_give_the_same_task():
    dicts = [{"output": o, "input": i, "extra": 1} for i, o in ROW["examples"]]
    floats = [[np.array(i, dtype=float), np.array(o)] for i, o in ROW["examples"]]
    tasks = [to_task({"x": value}, "x")[0] for value in (ROW["examples"], dicts, floats)]
    assert tasks[0] == tasks[1] == tasks[2]
    assert type(tasks[2].train[0].input[0][0]) is int


def test_max_train_pairs_keeps_the_first_and_the_id():
    row = {"examples": [A, B, C, D]}
    whole, short = to_task(row, "examples")[0], to_task(row, "examples", 2)[0]
    assert short.train == (pair(A), pair(B)) and short.test == (pair(D),)
    assert short.task_id == whole.task_id
    assert to_task(row, "examples", 9)[0] == whole


def test_invalid_pairs_are_named_and_the_rest_is_a_task():
    bad = [[[[11]], [[1]]], [[[1]], [["x"]]], [[[1]]], "pair", None, {"input": [[1]]}]
    row = {"examples": [bad[0], A, *bad[1:], B, [[[1]], [[1, 2], [3]]]]}
    task, errors = to_task(row, "examples")
    assert (task.train, task.test) == ((pair(A),), (pair(B),))
    assert errors == [
        (0, "input: cell out of range 0..9"),
        (2, "output: cell is not an integer"),
        (3, "not a pair of input and output"),
        (4, "not a pair of input and output"),
        (5, "not a pair of input and output"),
        (6, "output: not a grid"),
        (8, "output: rows of unequal length"),
    ]


@pytest.mark.parametrize(
    ("row", "errors"),
    [
        ({"examples": [A]}, [(None, "fewer than two valid pairs")]),
        ({"examples": []}, [(None, "fewer than two valid pairs")]),
        (
            {"examples": [A, [[], []]]},
            [(1, "input: empty grid"), (None, "fewer than two valid pairs")],
        ),
        ({"examples": None}, [(None, "examples is not a list of pairs")]),
        ({"other": [A, B]}, [(None, "examples is not a list of pairs")]),
        ({"examples": "[broken"}, [(None, "examples is not a list of pairs")]),
        (
            {"examples": {"input": [A[0]], "output": []}},
            [(None, "examples is not a list of pairs")],
        ),
        ({"examples": {"a": [A[0]]}}, [(None, "examples is not a list of pairs")]),
        ("{broken", [(None, "not a JSON object")]),
        ("é".encode("latin-1"), [(None, "not UTF-8")]),
        ([A, B], [(None, "not a JSON object")]),
    ],
)
def test_rows_without_a_task(row, errors):
    assert to_task(row, "examples") == (None, errors)


def as_dict(values: list) -> dict:
    return {"input": values[0], "output": values[1]}


def test_rows_that_are_tasks_keep_their_division():
    row = {"train": [as_dict(A), as_dict(B)], "test": [{"input": C[0]}, as_dict(D)]}
    task, errors = to_task(row, None)
    assert errors == [] and task.train == (pair(A), pair(B))
    assert task.test == (Pair(C[0], None), pair(D))
    other = to_task({"examples": [A, B, C, D]}, "examples")[0]
    same = to_task({"train": [A, B, C], "test": [as_dict(D)]}, None)[0]
    assert other.task_id == same.task_id != task.task_id


def test_pairs_as_datasets_and_pandas_store_them():
    """A struct of lists, which `datasets` makes of a list of structs, and JSON in a string."""
    train = {"input": [A[0], B[0]], "output": [A[1], B[1]]}
    expected = to_task({"train": [A, B], "test": [{"input": C[0]}]}, None)
    for test in ({"input": [C[0]]}, {"input": [C[0]], "output": None}, [{"input": C[0]}]):
        assert to_task({"train": train, "test": test}, None) == expected
        as_text = {"train": json.dumps(train), "test": json.dumps(test)}
        assert to_task(as_text, None) == expected
    for hidden in (None, [], [[]]):
        test = {"input": [C[0]], "output": [hidden]}
        assert to_task({"train": train, "test": test}, None) == expected
    assert to_task({"x": json.dumps([A, B, C])}, "x") == to_task({"x": [A, B, C]}, "x")


def test_a_task_row_with_no_valid_test_falls_back_to_its_last_pair():
    bad = {"input": [[99]]}
    task, errors = to_task({"train": [A, B], "test": [bad]}, None)
    assert (task.train, task.test) == ((pair(A),), (pair(B),))
    assert errors == [(2, "input: cell out of range 0..9")]
    task, errors = to_task({"train": [bad], "test": [{"input": [[1]]}, {"input": [[2]]}]}, None)
    assert task is None and errors[-1] == (None, "fewer than two valid pairs")


bad_pairs = st.sampled_from([[[[10]], [[1]]], [[[1]], [[True]]], 7, [], [[[1.5]], [[1]]]])
good_pairs = st.sampled_from([A, B, C, D, as_dict(A), [[[1.0, 2.0]], [[3]]]])


@given(st.lists(st.tuples(st.booleans(), good_pairs, bad_pairs), max_size=8))
def test_every_pair_is_either_kept_or_reported(drawn):
    examples = [good if keep else bad for keep, good, bad in drawn]
    task, errors = to_task({"examples": examples}, "examples")
    bad_indices = [i for i, (keep, _, _) in enumerate(drawn) if not keep]
    assert [i for i, _ in errors if i is not None] == bad_indices
    num_good = len(drawn) - len(bad_indices)
    assert (task is None) == (num_good < 2) == ((None, "fewer than two valid pairs") in errors)
    if task:
        assert (len(task.train), len(task.test)) == (num_good - 1, 1)


def test_json_lines_keep_types_and_order(tmp_path):
    values = [ROW, {"examples": [[[[1.0]], [[True]]], "x"]}, {"examples": 5}, [1]]
    path = write_lines(tmp_path / "r.jsonl", values)
    path.write_text(path.read_text() + '\n{"cut": \n{"examples": [[[[NaN]], [[1]]]]}\n')
    found = read(path)
    assert found[:4] == values and type(found[1]["examples"][0][0][0][0]) is float
    assert not isinstance(found[4], dict) and len(found) == 6
    assert to_task(found[5], "examples")[1][0] == (0, "input: cell is not an integer")


def test_every_local_form_gives_the_same_rows(tmp_path):
    values = [{"examples": [A, B, C]}, {"examples": [B, C]}, {"examples": []}]
    lines = write_lines(tmp_path / "r.jsonl", values)
    named_json = write_lines(tmp_path / "lines.json", values)
    array = tmp_path / "array.json"
    array.write_text(json.dumps(values, indent=1))
    packed = tmp_path / "r.jsonl.gz"
    packed.write_bytes(gzip.compress(lines.read_bytes()))
    parquet = tmp_path / "r.parquet"
    pq.write_table(pa.Table.from_pylist(values), parquet)
    folders = []
    for file in (lines, parquet):
        folder = tmp_path / f"folder_{file.suffix[1:]}"
        folder.mkdir()
        (folder / file.name).write_bytes(file.read_bytes())
        folders.append(folder)
    for path in (lines, named_json, array, packed, parquet, *folders):
        assert read(path) == values, path
        assert read(path, streaming=True) == values, path
    for path in (lines, parquet, folders[0]):
        assert read(path, split="train[1:2]") == values[1:2], path


def test_parquet_with_doubles_nulls_and_structs(tmp_path):
    values = [
        {"examples": [as_dict(A), as_dict(B)], "n": None},
        {"examples": None, "n": 1.5},
        {"examples": [{"input": [[1.0, 2.5]], "output": None}, None], "n": 2.0},
        {"examples": [], "n": 3.0},
    ]
    pq.write_table(pa.Table.from_pylist(values), tmp_path / "r.parquet")
    found = read(tmp_path / "r.parquet")
    assert found == values
    task, errors = to_task(found[0], "examples")
    assert errors == [] and task.train == (pair(A),)
    assert type(task.train[0].input[0][0]) is int


nested = st.recursive(
    st.none() | st.integers(-5, 5), lambda inner: st.lists(inner, max_size=3), max_leaves=6
)


def test_cells_of_mixed_types_and_images_in_arrow():
    """`datasets` keeps the former as JSON, alone or within lists and structs; an image is bytes."""
    texts = ["1", '"a"', None, "[2]", '{"b": null}', "1.5"]
    cells = pa.ExtensionArray.from_storage(pa.json_(), pa.array(texts))
    values = [1, "a", None, [2], {"b": None}, 1.5]
    offsets = pa.array([0, 3, 3, 6])
    named = pa.StructArray.from_arrays([cells, pa.array(list("uvwxyz"))], ["cell", "name"])
    batch = pa.RecordBatch.from_pydict(
        {
            "lists": pa.ListArray.from_arrays(offsets, cells),
            "structs": pa.ListArray.from_arrays(offsets, named),
            "image": pa.array([{"bytes": b"\x89PNG", "path": None}, None, None]),
            "grid": pa.array([[[1, 2]], None, [None, []]], pa.list_(pa.list_(pa.int8()))),
        }
    )
    structs = [{"cell": v, "name": name} for v, name in zip(values, "uvwxyz", strict=True)]
    assert list(rows._arrow_rows([batch])) == [
        {
            "lists": values[:3],
            "structs": structs[:3],
            "image": {"bytes": b"\x89PNG", "path": None},
            "grid": [[1, 2]],
        },
        {"lists": [], "structs": [], "image": None, "grid": None},
        {"lists": values[3:], "structs": structs[3:], "image": None, "grid": [None, []]},
    ]
    long = pa.ExtensionArray.from_storage(pa.json_(), pa.array(["[[1]]", f"[[{2**70}]]"]))
    assert list(rows._arrow_rows([pa.RecordBatch.from_pydict({"grid": long})])) == [
        {"grid": [[1]]},
        {"grid": f"[[{2**70}]]"},
    ]
    alone = pa.RecordBatch.from_pydict({"cell": cells})
    assert [row["cell"] for row in rows._arrow_rows([alone])] == values


def test_cells_of_mixed_types_in_a_dataset(tmp_path):
    made = Dataset.from_dict(
        {"examples": [[A, B], [A, [[["x"]], [[1]]]]]}, on_mixed_types="use_json"
    )
    made.to_parquet(tmp_path / "r.parquet")
    assert read(tmp_path / "r.parquet") == [
        {"examples": [A, B]},
        {"examples": [A, [[["x"]], [[1]]]]},
    ]


def test_columns_are_found(tmp_path):
    path = write_lines(
        tmp_path / "r.jsonl", [{"pairs": [A, B], "n": 1}, {"pairs": [], "note": "x"}]
    )
    text = message_of(str(path))
    assert "pairs" in text and "note" in text and "--column" in text
    assert "--column" in message_of(str(path), column="nope")
    source = open_rows(str(path), column="pairs")
    assert source.column == "pairs" and source.columns["n"] == "int"
    assert source.columns["pairs"] == "list[list[list[list[int]]]]"
    path = write_lines(tmp_path / "t.jsonl", [{"train": [A], "test": [B], "id": 1}])
    assert open_rows(str(path)).column is None
    path = write_lines(tmp_path / "t.jsonl", [{"train": [A], "test": [B], "examples": [A, B]}])
    assert open_rows(str(path)).column == "examples"
    assert "nope" in message_of(str(path), column="nope")


def test_an_fchollet_file_is_a_row_and_a_kaggle_file_is_explained(tmp_path):
    task = {"name": "n", "train": [as_dict(A), as_dict(B)], "test": [as_dict(C)]}
    for indent in (None, 1):
        path = tmp_path / "task.json"
        path.write_text(json.dumps(task, indent=indent))
        assert read(path) == [task]
        path = tmp_path / "kaggle.json"
        path.write_text(json.dumps({"0a": task, "0b": task}, indent=indent))
        assert "--dataset_path" in message_of(str(path))
    path.write_text("\n" + json.dumps(task))
    assert read(path) == [task]
    path.write_text('{"0a": {"train"')
    assert "not JSON" in message_of(str(path))


@pytest.mark.parametrize(
    ("name", "content", "word"),
    [
        ("r.jsonl", "", "empty"),
        ("r.jsonl", "\n \n", "no rows"),
        ("r.json", "[]", "no rows"),
        ("r.json", '[{"examples": ', "not JSON"),
        ("r.jsonl", "one\ntwo\n", "not JSON objects"),
        ("r.parquet", "PAR1 no", "cannot read"),
        ("r.jsonl.gz", "no gzip", "gzip"),
        ("r.txt", "a b", "unknown kind"),
        ("r.arrow", "ARROW1", ".parquet"),
        ("r.jsonl", "é\nü\n".encode("latin-1"), "iconv -f latin1"),
        ("r.json", '[{"a": "é"}]'.encode("latin-1"), "iconv -f latin1"),
        ("r.json", "[" * 9999, "inside one another"),
        ("r.json", '{"a": %s}' % ("9" * 9999), "not JSON"),
        ("r.jsonl", '{"examples": []}'.encode("utf-16"), "is UTF-16"),
        ("r.json", "version https://git-lfs.github.com/spec/v1\n", "Git LFS"),
    ],
)
def test_bad_files(tmp_path, name, content, word):
    path = tmp_path / name
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    text = message_of(str(path))
    assert word in text and str(path) in text


def test_missing_paths_folders_and_splits(tmp_path):
    assert "does not exist" in message_of(str(tmp_path / "none.jsonl"))
    assert "does not exist" in message_of("./none")
    assert "neither" in message_of("a b")
    assert "--dataset" in message_of(str(tmp_path))
    path = write_lines(tmp_path / "train.jsonl", [ROW])
    write_lines(tmp_path / "test.jsonl", [ROW, ROW])
    assert len(read(tmp_path, split="test")) == 2
    text = message_of(str(tmp_path), split="validation")
    assert "train" in text and "test" in text
    assert "train" in message_of(str(path), split="test")
    assert "train" in message_of(str(path), split="test[:1]")
    assert "ends before they begin" in message_of(str(path), split="train[500:600]")
    assert "--max_samples" in message_of(str(path), split="train[:1]", streaming=True)
    assert message_of(str(path), split="train[a:b]")


def test_a_fault_far_into_the_file_ends_a_run_that_had_begun(tmp_path):
    path = tmp_path / "r.jsonl.gz"
    lines = "".join(json.dumps({**ROW, "n": i}) + "\n" for i in range(5000))
    path.write_bytes(gzip.compress(lines.encode())[:-200])
    source = open_rows(str(path)).rows
    assert len(list(islice(source, 200))) == 200
    with pytest.raises(UserError, match="gzip") as caught:
        list(source)
    assert caught.value.exit_code == 1


def test_a_byte_order_mark_is_no_matter(tmp_path):
    texts = {
        "r.jsonl": json.dumps(ROW) + "\n\ufeff" + json.dumps(ROW),
        "r.json": json.dumps([ROW, ROW], indent=1),
    }
    for name, content in texts.items():
        path = tmp_path / name
        path.write_text(content, encoding="utf-8-sig")
        assert read(path) == [ROW, ROW]


def test_a_list_of_pairs_is_one_row(tmp_path):
    """As RE-ARC's files, one for each task, and a folder of them."""
    for name in "ab":
        (tmp_path / f"{name}.json").write_text(json.dumps([as_dict(A), as_dict(B), as_dict(C)]))
    expected = to_task({"examples": [A, B, C]}, "examples")
    for path, count in ((tmp_path / "a.json", 1), (tmp_path, 2)):
        source = open_rows(str(path))
        assert [to_task(row, source.column) for row in source.rows] == [expected] * count


def test_deep_columns_are_named_in_short(tmp_path):
    path = tmp_path / "r.jsonl"
    path.write_text('{"examples": ' + "[" * 900 + "]" * 900 + "}\n")
    assert open_rows(str(path)).columns == {"examples": "list[" * 6 + "list" + "]" * 6}


@needs_shared
def test_real_rows():
    source = open_rows(str(SHARED / "barc0_rows.jsonl"))
    tasks = [to_task(row, source.column) for row in source.rows]
    assert len(tasks) == 10 and all(errors == [] for _, errors in tasks)
    assert all((len(task.train), len(task.test)) == (9, 1) for task, _ in tasks)
    assert len({task.task_id for task, _ in tasks}) == 10


@pytest.mark.parametrize(
    ("error", "answers"),
    [
        (None, True),
        (HTTPError("https://hub", 405, "no HEAD here", None, None), True),
        (URLError(ssl.SSLError()), True),  # of which `datasets` says more
        (URLError(ConnectionRefusedError()), False),
        (TimeoutError(), False),
    ],
)
def test_whether_the_hub_can_be_reached(monkeypatch, error, answers):
    def urlopen(request, timeout):
        if error:
            raise error
        return io.BytesIO()

    monkeypatch.setenv("HF_HUB_OFFLINE", "")
    monkeypatch.setattr("urllib.request.urlopen", urlopen)
    assert rows._hub_answers() is answers


def test_a_cache_that_cannot_be_written_is_named(tmp_path, monkeypatch):
    """As in a container without a home folder."""
    (tmp_path / "rows.jsonl").write_text("{}\n")
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", "/proc/nowhere/datasets")
    words = r"cannot write to /proc/nowhere/datasets: .*; choose another folder with HF_HOME"
    with pytest.raises(UserError, match=words):
        open_rows(str(tmp_path / "rows.jsonl"), "train", None, False)
