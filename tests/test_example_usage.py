"""The example as a user runs it: its output, its files, and what --overwrite leaves alone."""

import json
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from conftest import ROOT, run_script

import example_usage
from utils.errors import UserError
from utils.shards import iter_items

FILES = [
    "arc_data/arc_format_train.json",
    "arc_data/test_outputs_train.json",
    "arc_data/transformation_errors.json",
    "mesh/activations/activations_batch_000001.pkl",
    "mesh/activations/metadata.json",
    "mesh/submission.json",
    "model/config.json",
    "model/model.safetensors",
    "model/tokenizer.json",
    "picture.png",
    "results/activations/activations_batch_000001.pkl",
    "results/activations/activations_batch_000002.pkl",
    "results/activations/metadata.json",
    "results/predictions.json",
    "rows.jsonl",
    "teacher_forced/activations/activations_batch_000001.pkl",
    "teacher_forced/activations/metadata.json",
    "teacher_forced/predictions.json",
]


def contents(folder: Path) -> dict[str, bytes]:
    paths = (path for path in folder.rglob("*") if path.is_file())
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in paths}


@pytest.fixture(scope="module")
def ran(tmp_path_factory):
    """A whole run of the example: its folder and what it printed."""
    place = tmp_path_factory.mktemp("example")
    result = run_script("example_usage.py", cwd=place)
    assert result.returncode == 0, result.stdout + result.stderr
    assert [path.name for path in place.iterdir()] == ["example_run"]
    return place / "example_run", result


@pytest.fixture
def copy(ran, tmp_path) -> Path:
    return shutil.copytree(ran[0], tmp_path / "example_run")


def test_it_writes_every_file_and_records_it(ran):
    folder, _ = ran
    made = contents(folder)
    assert set(FILES) <= made.keys()
    assert json.loads(made.pop(example_usage.RECORD)).keys() == made.keys()


def test_it_prints_commands_shapes_and_that_the_weights_are_random(ran):
    folder, result = ran
    out = result.stdout
    commands = re.findall(r"^\$ python (?:\S*/)?(\w+\.py)", out, re.M)
    inference = "simple_extraction_inference.py"
    scripts = ["test_transformation.py", "transform_hf_to_arc.py", *[inference] * 3]
    assert commands == scripts  # the last one is for the user's own model
    assert re.search(r"duplicates +1\b", out) and re.search(r"invalid rows +1\b", out)
    assert "weights above are random" in out and "YOUR_MODEL_PATH" in out

    items = {item["task_id"]: item for item in iter_items(folder / "results" / "activations")}
    item = items[re.search(r"  task_id +(\w+)", out)[1]]
    arrays = {key: value for key, value in item.items() if isinstance(value, np.ndarray)}
    arrays |= {f"activations[{name!r}]": array for name, array in item["activations"].items()}
    for key, array in arrays.items():
        assert re.search(
            rf"  {re.escape(key)} +{array.dtype} {re.escape(str([*array.shape]))}", out
        )
    vocabulary = item["output_logits"].shape[1]
    assert f"({len(items)}, {vocabulary})" in out

    tokens = re.findall(r"^ +(\d+) +(\d+)  '\d'((?: +-?\d+){5})$", out, re.M)
    assert len(tokens) >= 4
    for token, token_id, cell in tokens:
        assert item["input_ids"][int(token)] == int(token_id)
        cell = [*map(int, cell.split()), int(token), int(token) + 1]
        assert cell in item["cells"].tolist()


def test_it_shows_progress_and_no_warning(ran):
    _, result = ran
    assert "rows/s" in result.stderr and "tokens/s" in result.stderr
    lines = [line for line in re.split(r"[\r\n]+", result.stderr) if line]
    assert all(re.match(r"inference:|\d+ ?rows|\d+ rows|planning", line) for line in lines), lines


def test_the_teacher_forced_answers_have_a_cell_for_each_cell_of_the_target(ran):
    for item in iter_items(ran[0] / "teacher_forced" / "activations"):
        answer = item["cells"][(item["cells"][:, 0] == -1) & (item["cells"][:, 1] == 1)]
        colors, norms = example_usage.cell_grids(item, "resid_post.3", 1)
        assert len(answer) == np.size(item["target"])
        assert colors.tolist() == item["target"]
        start, stop = answer[0, 5:]
        rows = item["activations"]["resid_post.3"][start:stop].astype(np.float32)
        assert norms[0, 0] == pytest.approx(np.linalg.norm(rows, axis=1).mean())


def test_the_picture_is_a_picture(ran):
    from matplotlib.image import imread

    from utils.encodings import PALETTE

    pixels = np.round(imread(ran[0] / "picture.png")[..., :3] * 255).astype(int)
    assert pixels.shape[0] >= 700 and pixels.shape[1] >= 1000
    colors, counts = np.unique(pixels.reshape(-1, 3), axis=0, return_counts=True)
    shown = {tuple(color) for color, count in zip(colors, counts, strict=True) if count > 300}
    palette = {tuple(PALETTE[i : i + 3]) for i in range(0, 30, 3)}
    assert palette <= shown and len(colors) > 100 and len(shown - palette) > 10
    edge = np.concatenate([pixels[[0, -1]].reshape(-1, 3), pixels[:, [0, -1]].reshape(-1, 3)])
    assert (edge == 255).all()  # nothing is cut off


def test_a_second_run_is_refused_and_changes_nothing(copy):
    before = contents(copy)
    result = run_script("example_usage.py", cwd=copy.parent)
    assert result.returncode == 2 and result.stdout == ""
    assert re.fullmatch(r"error: example_run exists: .*--overwrite.*\n", result.stderr)
    assert contents(copy) == before


def test_overwrite_deletes_what_the_example_made_and_nothing_else(copy):
    (copy / "notes.txt").write_text("mine")
    (copy / "results" / "mine.json").write_text("{}")
    example_usage.clear(copy, overwrite=True)
    assert contents(copy) == {"notes.txt": b"mine", "results/mine.json": b"{}"}
    assert not (copy / "model").exists() and not (copy / "teacher_forced").exists()


def test_overwrite_refuses_what_was_changed_since_or_made_by_others(copy, tmp_path):
    (copy / "model" / "config.json").write_text("{}")
    (tmp_path / "other" / "results").mkdir(parents=True)
    (tmp_path / "other" / "results" / "predictions.json").write_text("{}")
    for folder, name in ((copy, "config.json"), (tmp_path / "other", "predictions.json")):
        before = contents(folder)
        with pytest.raises(UserError, match=rf"{name} is not as .* another --output_dir"):
            example_usage.clear(folder, overwrite=True)
        assert contents(folder) == before


def test_a_folder_that_cannot_be_written_is_one_line(tmp_path):
    (tmp_path / "file").write_text("")
    for folder in (tmp_path / "file", tmp_path / "file" / "below"):
        result = run_script("example_usage.py", "--output_dir", folder)
        assert result.returncode == 2 and re.fullmatch(r"error: .*file.*\n", result.stderr)


def test_a_script_that_fails_ends_the_example(tmp_path, monkeypatch, capfd):
    (tmp_path / "fails.py").write_text("raise SystemExit(3)")
    monkeypatch.setattr(example_usage, "SCRIPTS", tmp_path)
    with pytest.raises(UserError, match=r"fails.py ended with exit code 3") as caught:
        example_usage.script("fails.py", ("--flag", "two words"))
    assert caught.value.exit_code == 1
    assert "fails.py \\\n      --flag 'two words'" in capfd.readouterr().out


def test_stopped_by_sigterm_what_it_made_can_be_overwritten(tmp_path):
    folder = tmp_path / "run"
    command = [sys.executable, str(ROOT / "example_usage.py"), "--output_dir", str(folder)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as child:
        while not (folder / "arc_data").exists():
            assert child.poll() is None
            time.sleep(0.01)
        child.send_signal(signal.SIGTERM)
        _, errors = child.communicate(timeout=60)
    assert child.returncode == 143 and b"Traceback" not in errors
    example_usage.clear(folder, overwrite=True)
    assert not {*contents(folder)} - {"arc_data/arc_format_train.json.tmp"}


def test_nothing_heavy_is_imported_before_parsing():
    code = "import sys, example_usage; print(*sys.modules)"
    loaded = subprocess.check_output([sys.executable, "-c", code], cwd=ROOT, text=True).split()
    assert not {"jax", "transformers", "datasets", "matplotlib", "tokenizers"} & {*loaded}


@pytest.mark.slow
def test_overwrite_runs_again_to_the_same_bytes(copy):
    before = contents(copy)
    (copy / "notes.txt").write_text("mine")
    result = run_script("example_usage.py", "--overwrite", cwd=copy.parent)
    assert result.returncode == 0, result.stderr
    after = contents(copy)
    assert after.pop("notes.txt") == b"mine"
    assert after.keys() == before.keys()
    timed = {example_usage.RECORD, *(name for name in after if name.endswith("metadata.json"))}
    assert {name for name in after if after[name] != before[name]} <= timed
