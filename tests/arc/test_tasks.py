import codecs
import gzip
import json
import os
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from utils.arc import tasks as arc
from utils.arc.tasks import (
    Pair,
    Task,
    read_solutions,
    read_tasks,
    solutions_beside,
    task_id_of,
    to_grid,
)
from utils.errors import UserError
from utils.store.local import JsonFile

SHARED = Path(__file__).parents[3] / "shared" / "data"
needs_shared = pytest.mark.skipif(not SHARED.is_dir(), reason=f"no {SHARED}")

TASK = {
    "train": [{"input": [[1, 2]], "output": [[3]]}, {"input": [[4]], "output": [[5], [6]]}],
    "test": [{"input": [[0, 9]], "output": [[7]]}],
}
PARSED = Task(
    "a",
    (Pair([[1, 2]], [[3]]), Pair([[4]], [[5], [6]])),
    (Pair([[0, 9]], [[7]]),),
)

shapes = st.tuples(st.integers(1, 30), st.integers(1, 30))
grids = shapes.flatmap(
    lambda s: st.lists(
        st.lists(st.integers(0, 9), min_size=s[1], max_size=s[1]), min_size=s[0], max_size=s[0]
    )
)


def write(path: Path, content: object) -> Path:
    text = content if isinstance(content, str | bytes) else json.dumps(content)
    path.write_bytes(text.encode() if isinstance(text, str) else text)
    return path


def types_of(grid: list) -> set[type]:
    return {type(cell) for row in grid for cell in row} | {type(row) for row in grid}


@settings(max_examples=50)
@given(grids)
def test_grid_survives_every_form(grid):
    forms = [
        grid,
        tuple(map(tuple, grid)),
        [[float(cell) for cell in row] for row in grid],
        [[np.int8(cell) for cell in row] for row in grid],
        [[np.float32(cell) for cell in row] for row in grid],
        np.array(grid),
        np.array(grid, dtype=float),
        list(np.array(grid)),
    ]
    for form in forms:
        made = to_grid(form)
        assert made == grid
        assert types_of(made) == {int, list}


@pytest.mark.parametrize(
    ("value", "reason"),
    [
        (None, "not a grid"),
        ("12", "not a grid"),
        (5, "not a grid"),
        ({"a": 1}, "not a grid"),
        ([1, 2], "not a grid"),
        (["12", "34"], "not a grid"),
        ([[1], None], "not a grid"),
        (np.array(5), "not a grid"),
        (np.array([1, 2]), "not a grid"),
        ([], "empty grid"),
        ([[]], "empty grid"),
        ([[1], []], "empty grid"),
        (np.zeros((0, 3)), "empty grid"),
        ([[1, 2], [3]], "rows of unequal length"),
        ([[0]] * 31, "grid larger than 30x30"),
        ([[0] * 31], "grid larger than 30x30"),
        ([[10]], "cell out of range 0..9"),
        ([[0, 1], [2, -1]], "cell out of range 0..9"),
        ([[1e20]], "cell out of range 0..9"),
        ([[10**30]], "cell out of range 0..9"),
        ([[1.5]], "cell is not an integer"),
        ([[float("nan")]], "cell is not an integer"),
        ([[float("inf")]], "cell is not an integer"),
        ([[True]], "cell is not an integer"),
        ([[1, 0, False]], "cell is not an integer"),
        ([[np.bool_(True)]], "cell is not an integer"),
        (np.array([[True]]), "cell is not an integer"),
        ([["1"]], "cell is not an integer"),
        ([[None]], "cell is not an integer"),
        ([[[1], []]], "cell is not an integer"),
        ([[[1, 2]]], "cell is not an integer"),
        (np.zeros((1, 1, 1)), "cell is not an integer"),
    ],
)
def test_grid_refuses(value, reason):
    with pytest.raises(ValueError, match=f"^{reason}$"):
        to_grid(value)


@settings(max_examples=50)
@given(grids, st.data())
def test_one_bad_cell_is_never_overlooked(grid, data):
    row = data.draw(st.integers(0, len(grid) - 1))
    column = data.draw(st.integers(0, len(grid[0]) - 1))
    bad = data.draw(st.sampled_from([True, False, 10, -1, 0.5, "1", None, [1], [], [1, 2], "12"]))
    grid[row][column] = bad
    with pytest.raises(ValueError, match="cell"):
        to_grid(grid)


@settings(max_examples=25)
@given(st.lists(st.tuples(grids, grids), min_size=2, max_size=3))
def test_id_depends_on_the_content_alone(values):
    pairs = [Pair(a, b) for a, b in values]
    copy = [Pair(json.loads(json.dumps(a)), json.loads(json.dumps(b))) for a, b in values]
    assert task_id_of(pairs) == task_id_of(iter(copy))
    assert len(task_id_of(pairs)) == 16
    other = [*pairs[:-1], Pair(pairs[-1].output, [[9], *pairs[-1].input][:30])]
    assert task_id_of(pairs) != task_id_of(other)
    assert task_id_of(pairs) != task_id_of(pairs, num_test=2)
    assert task_id_of(pairs) != task_id_of([*pairs[:-1], Pair(pairs[-1].input, None)])


def test_ids_tell_shapes_apart():
    one, two = Pair([[1, 2]], [[3]]), Pair([[1], [2]], [[3]])
    assert task_id_of([one, one]) != task_id_of([one, two])


def test_reads_every_form_of_file(tmp_path):
    with_name = {"name": "an extra key", **TASK}
    files = [
        write(tmp_path / "kaggle.json", {"a": with_name}),
        write(tmp_path / "lines.jsonl", json.dumps({"task_id": "a", **with_name}) + "\n\n"),
        write(tmp_path / "LINES.NDJSON", json.dumps({"id": "a", **with_name})),
        write(tmp_path / "list.json", [{"id": "a", **with_name}]),
        write(tmp_path / "a.json", with_name),
        write(tmp_path / "spaced.json", "\n " + json.dumps({"a": TASK}, indent=2)),
    ]
    for file in list(files):
        marked = tmp_path / "marked" / file.name
        marked.parent.mkdir(exist_ok=True)
        marked.write_bytes(codecs.BOM_UTF8 + file.read_bytes())
        files.append(marked)
        if file.name != "a.json":
            packed = tmp_path / (file.name + ".gz")
            packed.write_bytes(gzip.compress(file.read_bytes()))
            files.append(packed)
    packed = tmp_path / "deeper" / "a.json.gz"
    packed.parent.mkdir()
    packed.write_bytes(gzip.compress(json.dumps(TASK).encode()))
    files += [packed, packed.parent]
    for file in files:
        assert list(read_tasks(file)) == [PARSED], file


def test_reads_a_folder_in_order_of_name(tmp_path):
    for name in ("b", "a", "c"):
        write(tmp_path / f"{name}.json", TASK)
    write(tmp_path / "README.md", "not a task")
    assert [task.task_id for task in read_tasks(tmp_path)] == ["a", "b", "c"]


def test_reads_folders_of_folders_without_what_is_hidden(tmp_path):
    for name in ("training/b", "training/a", "evaluation/c", "c/d/e", "__MACOSX/f", ".git/g"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        write(tmp_path / f"{name}.json", TASK)
    (tmp_path / "training" / "._a.json").write_bytes(b"\x00\x05\x16\x07")
    assert [task.task_id for task in read_tasks(tmp_path)] == ["e", "c", "a", "b"]


@pytest.mark.parametrize(
    "name", ["arc-agi_training_challenges.json", "arc_format_train.json", "x/arc_format_a.json.gz"]
)
def test_of_a_folder_of_whole_sets_one_has_to_be_named(tmp_path, name):
    (tmp_path / name).parent.mkdir(exist_ok=True)
    write(tmp_path / name, {"a": TASK})
    write(tmp_path / "sample_submission.json", {"a": [{"attempt_1": [[0, 0]]}]})
    with pytest.raises(UserError, match=f"whole sets of tasks: .* {Path(name).name}"):
        list(read_tasks(tmp_path))


def test_an_id_may_be_a_number(tmp_path):
    path = write(tmp_path / "t.jsonl", json.dumps({"id": "other", "task_id": 17, **TASK}))
    assert next(read_tasks(path)).task_id == "17"


@pytest.mark.parametrize("hidden", [{}, {"output": None}, {"output": []}, {"output": [[]]}])
def test_a_test_output_may_be_hidden(tmp_path, hidden):
    path = write(tmp_path / "t.json", {"a": {**TASK, "test": [{"input": [[1]], **hidden}]}})
    assert next(read_tasks(path)).test == (Pair([[1]], None),)


def with_train(pairs: object) -> dict:
    return {"abc": {"train": pairs, "test": TASK["test"]}}


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("t.json", "", ["is empty"]),
        ("t.json", "nonsense", ["not a JSON object"]),
        ("t.json", "[1, 2]", ["item 0", "task_id"]),
        ("t.json", [TASK["train"][0]], ["item 0 is a pair", "transform_hf_to_arc.py"]),
        ("t.json", '{"a": ' + "[" * 9999 + "]" * 9999 + "}", ["inside one another"]),
        ("t.json", '{"a": %s}' % ("9" * 9999), ["not JSON"]),
        ("t.json", '{"a": "\xe9"}'.encode("latin-1"), ["not UTF-8", "iconv"]),
        ("t.jsonl", '{"a": "\xe9"}'.encode("latin-1"), ["line 1", "not UTF-8", "iconv"]),
        ("t.jsonl", json.dumps(TASK).encode("utf-16-le"), ["UTF-16"]),
        ("t.json", "version https://git-lfs.github.com/spec/v1\n", ["Git LFS", "git lfs pull"]),
        ("t.json", b"\x00\x05\x16\x07\x00\x02", ["AppleDouble"]),
        ("t.json", gzip.compress(b"{}", mtime=0), ["gzip", ".gz"]),
        ("t.json", "<!DOCTYPE html><html>", ["web page"]),
        ("t.json", '{"a": {"train": [', ["not JSON"]),
        ("t.json", '{"a": {"train": [NaN]}}', ["not JSON"]),
        ("t.json", json.dumps({"x": 1}) + "\n" + json.dumps({"y": 2}), ["not JSON", ".jsonl"]),
        ("t.json", {}, ["no tasks"]),
        ("t.jsonl", "\n\n", ["no tasks"]),
        ("t.jsonl", '{"task_id": "a"\n', ["line 1", "not JSON"]),
        ("t.jsonl", "\n" + json.dumps(TASK), ["line 2", "task_id"]),
        ("t.jsonl", "[1]", ["line 1", "task_id"]),
        ("t.csv", "a,b", ["unknown kind", ".jsonl"]),
        ("t.json.gz", "plain text", ["gzip"]),
        ("t.json", {"abc": {"fewshots": [], "question": 1}}, ["abc", "fewshots, question"]),
        ("t.json", {"abc": {"train": TASK["train"]}}, ["abc", '"test"', "found: train"]),
        ("t.json", {"train": TASK["train"]}, ["task t", "found: train"]),
        ("t.json", {"abc": [[[1]]]}, ["abc", "solutions"]),
        ("t.json", with_train([]), ["abc", '"train"', "at least one"]),
        ("t.json", with_train({}), ["abc", '"train"']),
        ("t.json", with_train([{"input": [[1]]}]), ["abc", "train pair 0", '"output"']),
        ("t.json", with_train([[[[1]], [[2]]]]), ["abc", "train pair 0"]),
        (
            "t.json",
            with_train([TASK["train"][0], {"input": [[1]], "output": [[10]]}]),
            ["abc", "train pair 1, output", "out of range"],
        ),
        ("t.json", with_train([{"input": [[1]], "output": None}]), ["train pair 0", "not a grid"]),
        ("t.json", '{"a": %s, "a": %s}' % ((json.dumps(TASK),) * 2), ["task a", "twice"]),
        ("t.jsonl", (json.dumps({"task_id": "a", **TASK}) + "\n") * 2, ["task a", "twice"]),
    ],
)
def test_bad_tasks_are_one_line_naming_the_file(tmp_path, name, content, words):
    path = write(tmp_path / name, content)
    with pytest.raises(UserError) as caught:
        list(read_tasks(path))
    message = str(caught.value)
    assert "\n" not in message and str(path) in message and caught.value.exit_code == 2
    for word in words:
        assert word in message, message


def test_missing_file_and_empty_folder(tmp_path):
    with pytest.raises(UserError, match="does not exist"):
        list(read_tasks(tmp_path / "none.json"))
    with pytest.raises(UserError, match="no tasks"):
        list(read_tasks(tmp_path))


def test_a_pipe_is_no_file(tmp_path):
    os.mkfifo(tmp_path / "t.json")
    with pytest.raises(UserError, match="is not a file"):
        list(read_tasks(tmp_path / "t.json"))


def test_cut_gzip(tmp_path):
    path = tmp_path / "t.json.gz"
    path.write_bytes(gzip.compress(json.dumps({str(i): TASK for i in range(500)}).encode())[:-40])
    with pytest.raises(UserError, match=r"gzip|not JSON"):
        list(read_tasks(path))


def test_streams_tasks_before_a_later_fault(tmp_path):
    many = json.dumps({str(i): TASK for i in range(2000)})
    path = write(tmp_path / "t.json", many[:-1] + ', "bad": }')
    tasks = read_tasks(path)
    assert next(tasks).task_id == "0"
    with pytest.raises(UserError, match="not JSON"):
        list(tasks)


def test_solutions_in_both_forms(tmp_path):
    expected = {"a": [[[1]], [[2, 3]]]}
    path = write(tmp_path / "s.json", expected)
    assert read_solutions(path) == expected
    tests = [{"output": [[1]]}, {"input": [[5]], "output": [[2.0, 3]]}]
    assert read_solutions(write(tmp_path / "t.json", {"a": {"test": tests}})) == expected
    packed = tmp_path / "s.json.gz"
    packed.write_bytes(gzip.compress(path.read_bytes()))
    assert read_solutions(packed) == expected
    assert read_solutions(write(tmp_path / "none.json", {})) == {}


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("", ["is empty"]),
        ("[[1]]", ["not a JSON object"]),
        ('{"abc": %s' % ("[" * 999), ["inside one another"]),
        ({"abc": []}, ["abc", "no grids"]),
        ({"abc": 5}, ["abc", "no grids"]),
        ({"abc": [[[1], [11]]]}, ["abc", "output 0", "out of range"]),
        ({"abc": {"test": [{"input": [[1]]}]}}, ["abc", "output 0", "not a grid"]),
        ('{"abc": [[[1]]], "abc": [[[1]]]}', ["abc", "twice"]),
    ],
)
def test_bad_solutions(tmp_path, content, words):
    path = write(tmp_path / "s.json", content)
    with pytest.raises(UserError) as caught:
        read_solutions(path)
    for word in (str(path), *words):
        assert word in str(caught.value)


@pytest.mark.parametrize(
    ("tasks", "solutions"),
    [
        ("arc_format_train.json", "test_outputs_train.json"),
        ("arc_format_train.json.gz", "test_outputs_train.json.gz"),
        ("arc_format_train.json", "test_outputs_train.json.gz"),
        ("arc_format_train.jsonl", "test_outputs_train.json"),
        ("arc-agi_evaluation_challenges.json", "arc-agi_evaluation_solutions.json"),
    ],
)
def test_solutions_beside(tmp_path, tasks, solutions):
    assert solutions_beside(tmp_path / tasks) is None
    write(tmp_path / solutions, {})
    assert solutions_beside(str(tmp_path / tasks)) == tmp_path / solutions
    assert solutions_beside(tmp_path / "other.json") is None
    assert solutions_beside(tmp_path) is None


def test_written_tasks_are_read_back(tmp_path):
    tests = (Pair([[1]], [[2]]), Pair([[3]], [[4]]))
    tasks = [PARSED, Task('b "quoted" é', PARSED.train, tests), Task("c", tests, (tests[0],))]
    path, solutions = (
        tmp_path / "new" / "arc_format_x.json",
        tmp_path / "new" / "test_outputs_x.json",
    )
    path.parent.mkdir()
    with JsonFile(path) as file, JsonFile(solutions) as outputs:
        for task in tasks:
            file.write(arc.task_item(task))
            outputs.write(arc.solution_item(task))
        assert not path.exists()
        file.commit()
        outputs.commit()
    assert [line[:1] for line in path.read_text().splitlines()] == ["{", '"', '"', '"', "}"]
    assert all("output" not in pair for pair in json.loads(path.read_text())["a"]["test"])
    read = list(read_tasks(path))
    truth = read_solutions(solutions_beside(path))
    for task, again in zip(tasks, read, strict=True):
        assert (task.task_id, task.train) == (again.task_id, again.train)
        assert [pair.input for pair in task.test] == [pair.input for pair in again.test]
        assert truth[task.task_id] == [pair.output for pair in task.test]
    assert arc.solution_item(Task("d", PARSED.train, (tests[0], Pair([[1]], None)))) is None


def test_uncommitted_file_leaves_the_earlier_one(tmp_path):
    path = write(tmp_path / "x.json", "earlier")
    with pytest.raises(KeyboardInterrupt), JsonFile(path, b"[]") as file:
        file.write(b"1")
        raise KeyboardInterrupt
    assert path.read_text() == "earlier"
    assert list(tmp_path.iterdir()) == [path]
    with JsonFile(path, b"[]") as file:
        file.write(b"1")
        file.commit()
    assert json.loads(path.read_text()) == [1]
    assert list(tmp_path.iterdir()) == [path]


def test_full_disk_is_one_line_and_keeps_the_earlier_file(tmp_path, monkeypatch):
    if not Path("/dev/full").exists():
        pytest.skip("no /dev/full")
    path = write(tmp_path / "x.json", "earlier")
    with pytest.raises(UserError, match="No space left") as caught, JsonFile(path) as file:
        file._file = open("/dev/full", "wb")  # noqa: SIM115
        file.write(b"1")
        file.commit()
    assert caught.value.exit_code == 1 and str(path) in str(caught.value)
    assert path.read_text() == "earlier"


def test_unwritable_place(tmp_path):
    write(tmp_path / "file", "")
    with pytest.raises(UserError, match="cannot write") as caught:
        JsonFile(tmp_path / "file" / "x.json")
    assert caught.value.exit_code == 2


@needs_shared
def test_the_public_training_tasks():
    path = SHARED / "arc_agi_1_training_challenges.json"
    tasks = list(read_tasks(path))
    raw = json.loads(path.read_text())
    assert len(tasks) == 400
    for task in tasks:
        train = [{"input": pair.input, "output": pair.output} for pair in task.train]
        assert train == raw[task.task_id]["train"]
        assert [{"input": pair.input} for pair in task.test] == raw[task.task_id]["test"]
    truth = read_solutions(SHARED / "arc_agi_1_training_solutions.json")
    assert truth.keys() == raw.keys()
    assert all(len(truth[task.task_id]) == len(task.test) for task in tasks)
    assert solutions_beside(path) == SHARED / "arc_agi_1_training_solutions.json"
    assert len({task_id_of((*t.train, *t.test), len(t.test)) for t in tasks}) == 400
