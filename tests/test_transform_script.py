"""The dataset scripts as a user runs them."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from forks import Script, run_forked

from transform_hf_to_arc import Spread, split_name
from utils.arc.tasks import read_solutions, read_tasks, solutions_beside

ROOT = Path(__file__).parents[1]
SHARED = ROOT.parent / "shared" / "data"
needs_shared = pytest.mark.skipif(not SHARED.is_dir(), reason=f"no {SHARED}")
OFFLINE = {**os.environ, "HF_ENDPOINT": "http://127.0.0.1:9", "HF_HUB_OFFLINE": ""}

A, B, C = ([[[k, k]], [[k]]] for k in (1, 2, 3))
ROWS = [
    {"examples": [A, B, C]},
    {"examples": [A, [[[10]], [[1]]], B]},
    {"examples": [A, B, C]},
    {"examples": [A]},
    {"examples": [[[[1.0]], [[2]]], {"input": [[3]], "output": [[4]]}]},
]


def run(script: str, *flags: object, env: dict = OFFLINE) -> subprocess.CompletedProcess:
    """As its users start it."""
    command = [sys.executable, str(ROOT / script), *map(str, flags)]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, env=env)


def transform(*flags: object) -> subprocess.CompletedProcess:
    return run_forked("transform_hf_to_arc.py", *flags)


def fails(result: subprocess.CompletedProcess, exit_code: int = 2) -> str:
    """The one error line of a run that must have failed; the progress bar may stand before it."""
    assert result.returncode == exit_code, result.stderr
    lines = re.split(r"[\r\n]+", result.stderr.strip())
    assert lines[-1].startswith("error: ") and "Traceback" not in result.stderr
    assert all("rows" in line for line in lines[:-1]), result.stderr
    return lines[-1]


@pytest.fixture
def dataset(tmp_path) -> Path:
    path = tmp_path / "my rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in ROWS) + "{broken\n")
    return path


def test_transform_writes_the_three_files_and_a_summary(dataset, tmp_path):
    out = tmp_path / "out"
    result = transform("--dataset", dataset, "--output_dir", out)
    assert result.returncode == 0, result.stderr
    names = ["arc_format_train.json", "test_outputs_train.json", "transformation_errors.json"]
    assert sorted(path.name for path in out.iterdir()) == names
    tasks = list(read_tasks(out / names[0]))
    truth = read_solutions(solutions_beside(out / names[0]))
    assert [len(task.train) for task in tasks] == [2, 1, 1]
    assert [truth[task.task_id] for task in tasks] == [[[[3]]], [[[2]]], [[[4]]]]
    assert json.loads((out / names[2]).read_text()) == [
        {"row": 1, "pair": 1, "reason": "input: cell out of range 0..9"},
        {"row": 3, "pair": None, "reason": "fewer than two valid pairs"},
        {"row": 5, "pair": None, "reason": "not a JSON object"},
    ]
    for words in (
        r"rows read +6\b",
        r"tasks written +3\b",
        r"duplicates +1\b",
        r"invalid rows +2\b",
        r"1 x input: cell out of range",
        r"pairs per task +2 / 2 / 3 ",
        r"grid height +1 / 1 / 1",
        r"grid width +1 / 1 / 2",
        r"next: python .*--dataset_path \S*arc_format_train.json",
    ):
        assert re.search(words, result.stdout), (words, result.stdout)
    assert "rows/s" in result.stderr


def test_ids_do_not_depend_on_order_or_on_max_train_pairs(dataset, tmp_path):
    backwards = tmp_path / "backwards.jsonl"
    backwards.write_text("\n".join(reversed(dataset.read_text().splitlines())))
    outputs = []
    for i, (path, *flags) in enumerate(
        [(dataset,), (backwards,), (dataset, "--max_train_pairs", 1)]
    ):
        assert (
            transform("--dataset", path, "--output_dir", tmp_path / str(i), *flags).returncode == 0
        )
        outputs.append(
            {t.task_id: t for t in read_tasks(tmp_path / str(i) / "arc_format_train.json")}
        )
    assert outputs[0] == outputs[1]
    assert outputs[2].keys() == outputs[0].keys()
    assert {len(task.train) for task in outputs[2].values()} == {1}


def test_an_earlier_transformation_is_kept_unless_told(dataset, tmp_path):
    out = tmp_path / "out"
    flags = ("--dataset", dataset, "--output_dir", out)
    assert transform(*flags, "--max_samples", 1).returncode == 0
    before = (out / "arc_format_train.json").read_bytes()
    text = fails(transform(*flags))
    assert "--overwrite" in text and "arc_format_train.json" in text
    assert (out / "arc_format_train.json").read_bytes() == before
    assert transform(*flags, "--overwrite").returncode == 0
    assert len(list(read_tasks(out / "arc_format_train.json"))) == 3


def test_the_report_of_another_split_is_kept_unless_told(dataset, tmp_path):
    """Splits share a folder, but for the list of what was wrong; only that of the second row is."""
    out = tmp_path / "out"
    flags = ("--dataset", dataset, "--output_dir", out, "--split")
    for split in ("train[:1]", "train[1:2]"):
        assert transform(*flags, split).returncode == 0
    report = (out / "transformation_errors.json").read_text()
    assert len(json.loads(report)) == 1
    text = fails(transform(*flags, "train[2:3]"))
    assert "transformation_errors.json exists: add --overwrite" in text
    assert (out / "transformation_errors.json").read_text() == report
    assert len(list(out.glob("arc_format_*.json"))) == 2
    assert transform(*flags, "train[2:3]", "--overwrite").returncode == 0
    assert len(list(out.glob("arc_format_*.json"))) == 3


def test_summary_gives_the_lower_median():
    spread = Spread({3: 2, 1: 1, 30: 1})
    assert str(spread) == "1 / 3 / 30"
    assert str(Spread({2: 1, 5: 1})) == "2 / 2 / 5"
    assert str(Spread({7: 1})) == "7 / 7 / 7"


def test_split_names():
    splits = ["train", "train[:100]", "train[100:]", "train[5%:10%]", "train+test", "a/../b"]
    names = ["train", "train_0-100", "train_100-end", "train_5pct-10pct", "train_test", "a_.._b"]
    assert [split_name(split) for split in splits] == names


def test_slices_make_plain_names_and_equal_runs_equal_bytes(dataset, tmp_path):
    contents = []
    for name in ("one", "two"):
        flags = ("--dataset", dataset, "--output_dir", tmp_path / name, "--split", "train[1:]")
        assert transform(*flags).returncode == 0
        files = sorted((tmp_path / name).iterdir())
        assert files[0].name == "arc_format_train_1-end.json"
        contents.append([path.read_bytes() for path in files])
    assert contents[0] == contents[1]


def test_task_rows_without_ground_truth(tmp_path):
    path = tmp_path / "r.jsonl"
    train = [{"input": [[1]], "output": [[2]]}]
    path.write_text(json.dumps({"train": train, "test": [{"input": [[3]]}]}) + "\n")
    result = transform("--dataset", path, "--output_dir", tmp_path / "o")
    assert result.returncode == 0 and re.search(r"ground truth +0\b", result.stdout)
    assert read_solutions(tmp_path / "o" / "test_outputs_train.json") == {}
    assert next(read_tasks(tmp_path / "o" / "arc_format_train.json")).test[0].output is None


def test_nothing_valid_exits_1_with_the_reason_and_the_report(tmp_path):
    path, out = tmp_path / "r.jsonl", tmp_path / "o"
    path.write_text(json.dumps({"examples": [[[["a"]], [[1]]]]}) + "\n")
    text = fails(transform("--dataset", path, "--output_dir", out), 1)
    assert "cell is not an integer" in text and "none of 1 rows" in text
    assert [file.name for file in out.iterdir()] == ["transformation_errors.json"]
    assert len(json.loads((out / "transformation_errors.json").read_text())) == 2
    path.write_text(json.dumps({"examples": [[[[1]], [[1]]]] * 2}) + "\n")
    assert transform("--dataset", path, "--output_dir", out).returncode == 0  # the next try


@pytest.mark.parametrize("script", ["transform_hf_to_arc.py", "test_transformation.py"])
def test_without_network_one_line_at_once(script, tmp_path):
    flags = ["--dataset", "barc0/no_such_thing"]
    flags += ["--output_dir", tmp_path] if script.startswith("transform") else []
    started = time.monotonic()
    for streaming in ([], ["--streaming"]):
        text = fails(run(script, *flags, *streaming))
        assert "barc0/no_such_thing" in text and "local" in text and "--dataset" in text
    assert time.monotonic() - started < 20
    assert not list(tmp_path.iterdir())


def test_bad_input_is_one_line(dataset, tmp_path):
    out = ("--output_dir", tmp_path / "o")
    (tmp_path / "file").write_text("")
    (tmp_path / "empty.jsonl").write_text("")
    cases = [
        (("--dataset", tmp_path / "none.jsonl", *out), "does not exist"),
        (("--dataset", tmp_path / "empty.jsonl", *out), "empty"),
        (("--dataset", dataset, "--column", "pairs", *out), "found: examples"),
        (("--dataset", dataset, "--split", "test", *out), "--split can be: train"),
        (("--dataset", dataset, "--output_dir", tmp_path / "file"), "cannot write"),
        (("--dataset", dataset, "--max_samples", "0", *out), "max_samples"),
        (out, "--dataset"),
    ]
    for flags, word in cases:
        assert word in fails(transform(*flags))
    assert not (tmp_path / "o").exists()


def test_interrupted_it_leaves_the_earlier_files(tmp_path):
    path, out = tmp_path / "r.jsonl", tmp_path / "o"
    rows = (json.dumps({"examples": [A, B, [[[i % 10] * 20] * 20, [[1]]]]}) for i in range(20_000))
    path.write_text("\n".join(rows))
    assert transform("--dataset", path, "--output_dir", out, "--max_samples", 2).returncode == 0
    before = {file.name: file.read_bytes() for file in out.iterdir()}
    command = ["transform_hf_to_arc.py", "--dataset", path, "--output_dir", out, "--overwrite"]
    for stop, code in ((signal.SIGTERM, 143), (signal.SIGKILL, -9)):
        with Script(*command) as child:
            while not any(file.suffix == ".partial" for file in out.iterdir()):
                time.sleep(0.005)
            child.send_signal(stop)
            child.communicate(timeout=60)
        assert child.returncode == code
        assert {f.name: f.read_bytes() for f in out.iterdir() if f.suffix != ".partial"} == before
    assert transform(*command[1:]).returncode == 0
    assert not [file for file in out.iterdir() if file.suffix == ".partial"]


def test_two_at_once_into_one_folder(tmp_path):
    """One owner from the check to the end: the other is refused, and the files are one's."""
    path, out = tmp_path / "r.jsonl", tmp_path / "o"
    rows = (json.dumps({"examples": [A, B, [[[i % 10] * 20] * 20, [[1]]]]}) for i in range(20_000))
    path.write_text("\n".join(rows))
    command = ["transform_hf_to_arc.py", "--dataset", path, "--output_dir", out, "--overwrite"]
    children = [Script(*command) for _ in range(2)]
    ends = [(child.communicate(timeout=120)[1], child.returncode) for child in children]
    assert sorted(code for _, code in ends) == [0, 2], ends
    refusal = next(words for words, code in ends if code == 2)
    assert refusal.startswith(f"error: another process is writing to {out}: wait")
    assert len(json.loads((out / "arc_format_train.json").read_text())) == 10
    names = ["arc_format_train.json", "test_outputs_train.json", "transformation_errors.json"]
    assert sorted(file.name for file in out.iterdir()) == names


@pytest.mark.parametrize("script", ["transform_hf_to_arc.py", "test_transformation.py"])
def test_help_is_quick(script):
    started = time.monotonic()
    result = run(script, "--help")
    assert result.returncode == 0 and time.monotonic() - started < 1.5
    assert "--dataset" in result.stdout and "--split" in result.stdout


def test_inspection_shows_columns_rows_picture_faults_and_the_next_command(dataset):
    result = run_forked("test_transformation.py", "--dataset", dataset, "--num_rows", 6)
    assert result.returncode == 0, result.stderr
    for words in (
        r"examples +list\[list\[list\[list\[int\]\]\]\]",
        r"row 0: 3 valid pairs, height 1 to 1, width 1 to 2, task [0-9a-f]{16}",
        r"row 3: no task",
        r"test pair 0: 1 x 2 -> 1 x 1\n  33    3",
        r"row 1, pair 1: input: cell out of range",
        r"row 5: not a JSON object",
        r"next: python transform_hf_to_arc.py --dataset '.*my rows.jsonl' ",
    ):
        assert re.search(words, result.stdout), (words, result.stdout)
    assert "\x1b" not in result.stdout


def test_inspection_is_coloured_on_a_terminal(dataset):
    pty = pytest.importorskip("pty")
    command = [sys.executable, str(ROOT / "test_transformation.py"), "--dataset", str(dataset)]
    for no_color in ("", "1"):
        master, slave = pty.openpty()
        env = {**OFFLINE, "NO_COLOR": no_color}
        child = subprocess.Popen(command, stdout=slave, stderr=subprocess.DEVNULL, env=env)
        os.close(slave)
        shown = b""
        try:
            while part := os.read(master, 65536):
                shown += part
        except OSError:  # the other side has closed
            pass
        os.close(master)
        assert child.wait(60) == 0
        assert (b"48;2;0;116;217m 1" in shown) == (not no_color)


@needs_shared
def test_the_quick_start_on_real_rows(tmp_path):
    rows = SHARED / "barc0_rows.jsonl"
    result = transform(
        *("--dataset", rows, "--output_dir", tmp_path, "--split", "train", "--max_samples", 10)
    )
    assert result.returncode == 0, result.stderr
    tasks = list(read_tasks(tmp_path / "arc_format_train.json"))
    truth = read_solutions(tmp_path / "test_outputs_train.json")
    for row, task in zip(map(json.loads, rows.read_text().splitlines()), tasks, strict=True):
        pairs = [[pair.input, pair.output] for pair in task.train]
        assert [*pairs, [task.test[0].input, truth[task.task_id][0]]] == row["examples"]
    assert json.loads((tmp_path / "transformation_errors.json").read_text()) == []
    assert run_forked("test_transformation.py", "--dataset", rows).returncode == 0
