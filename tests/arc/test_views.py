"""Views of tasks and back again; and runs that ask in several views."""

import functools
import itertools
import json
import shutil
import signal
from dataclasses import replace

import numpy as np
import pytest
from conftest import NoSignals, words
from hypothesis import given, settings
from hypothesis import strategies as st
from parity import TOLERANCE, worst_error
from runs import planned
from strategies import FREE_FORMATS, format_named, grids, tasks, tokenizer_named

import distributed_inference_with_activations as distributed_script
import simple_extraction_inference as script
from utils.arc.scores import submission, vote
from utils.arc.tasks import Pair, Task
from utils.arc.views import View, original_cells, views
from utils.cli import Interrupted
from utils.plan.plan import plan_run
from utils.plan.request import Request
from utils.prompt.codec import Codec, encode_answer, encode_prompt
from utils.prompt.encodings import COLORS
from utils.prompt.formats import GRID_ENCODINGS, Answer
from utils.run import loop as extract
from utils.run.dry_run import plan_storage
from utils.run.result import Result, to_item
from utils.shards import __main__ as merge
from utils.shards import iter_items
from utils.shards.items import sample_key
from utils.shards.manifest import read_answers, read_manifest

GRID = [[1, 2, 3], [4, 5, 6]]
SYMMETRIES = [  # of GRID, turned counter-clockwise; the second four of its transpose
    [[1, 2, 3], [4, 5, 6]],
    [[3, 6], [2, 5], [1, 4]],
    [[6, 5, 4], [3, 2, 1]],
    [[4, 1], [5, 2], [6, 3]],
    [[1, 4], [2, 5], [3, 6]],
    [[4, 5, 6], [1, 2, 3]],
    [[6, 3], [5, 2], [4, 1]],
    [[3, 2, 1], [6, 5, 4]],
]
SAME, SWAPPED = tuple(range(10)), (0, 2, 1, *range(3, 10))
TASK = Task("t", tuple(Pair([[k]], [[k, k]]) for k in (1, 2, 3)), (Pair([[1, 0]], [[2], [0]]),))


@st.composite
def any_view(draw, pairs):
    order = tuple(draw(st.permutations(range(pairs))))
    return View(7, draw(st.integers(0, 7)), (0, *draw(st.permutations(range(1, 10)))), order)


# -------------------------------------------------------------------------------------- views


@pytest.mark.parametrize("dihedral", range(8))
def test_the_eight_symmetries(dihedral):
    view = View(1, dihedral, SAME, (0,))
    assert view.show(GRID) == SYMMETRIES[dihedral]
    assert view.invert(SYMMETRIES[dihedral]) == GRID
    assert view.show([[5] * 3]) in ([[5] * 3], [[5]] * 3)


@given(grids(), any_view(2))
def test_what_is_shown_comes_back(grid, view):
    shown = view.show(grid)
    assert view.invert(shown) == grid and view.show(view.invert(grid)) == grid
    assert {type(cell) for row in shown for cell in row} == {int}
    assert View.from_dict(json.loads(json.dumps(view.to_dict()))) == view


def test_a_task_in_a_view():
    """A quarter turn, blue and red swapped, the last pair first."""
    assert View(1, 1, SWAPPED, (2, 0, 1)).show_task(TASK) == Task(
        "t",
        (Pair([[3]], [[3], [3]]), Pair([[2]], [[2], [2]]), Pair([[1]], [[1], [1]])),
        (Pair([[0], [2]], [[1, 0]]),),
    )
    unknown = replace(TASK, test=(Pair([[1, 0]], None),))
    assert View(1, 2, SAME, (0, 1, 2)).show_task(unknown).test == (Pair([[0, 1]], None),)


@given(st.integers(1, 30), st.integers(0, 5), st.integers(0, 3))
def test_views_of_a_task(number, seed, pairs):
    task = replace(TASK, train=TASK.train[:pairs])
    found = views(task, number, seed)
    assert found[0] == View(0, 0, SAME, tuple(range(pairs)))
    assert found[0].show_task(task) == task
    assert [view.number for view in found] == list(range(number))
    assert len({(v.dihedral, v.colors, v.pair_order) for v in found}) == number
    for start in range(0, number, 8):
        eight = [view.dihedral for view in found[start : start + 8]]
        assert len(set(eight)) == len(eight)
    for view in found:
        assert view.colors[0] == 0 and sorted(view.colors) == list(range(10))
        assert sorted(view.pair_order) == list(range(pairs))
    assert views(task, 31, seed)[:number] == found  # nor do the first depend on how many follow


def test_eight_views_hold_every_symmetry():
    assert sorted(view.dihedral for view in views(TASK, 8, 0)) == list(range(8))
    assert sorted(view.dihedral for view in views(TASK, 24, 0)) == sorted([*range(8)] * 3)


def test_views_depend_on_seed_and_task_id():
    one, other = views(TASK, 9, 0), views(replace(TASK, task_id="u"), 9, 0)
    assert one != other and one != views(TASK, 9, 1)
    assert views(replace(TASK, test=TASK.test * 2), 9, 0) == one
    assert len({view.pair_order for view in one}) > 2 and len({v.colors for v in one}) == 9


def test_the_draws_are_those_of_every_python():
    """Of another draw a resumed run would mix two sets of views."""
    assert views(TASK, 3, 0)[1:] == [
        View(1, 5, (0, 7, 2, 4, 5, 3, 9, 1, 8, 6), (0, 2, 1)),
        View(2, 3, (0, 3, 5, 8, 4, 9, 1, 7, 2, 6), (1, 0, 2)),
    ]


# ------------------------------------------------------------------------------ cells


def check_cells(cells, original, task, sample_idx, view, kept):
    """cells_original in the plainest words: every cell of the original once, and its tokens."""
    found = set()
    for shown, (pair, role, row, col, color, *tokens) in zip(cells, original.tolist(), strict=True):
        of = task.test[sample_idx] if pair == -1 else task.train[pair]
        assert (of.output if role else of.input)[row][col] == color
        assert shown[4] == view.colors[color]
        assert shown[1] == role and shown[5:].tolist() == tokens
        assert (shown[0] == -1) == (pair == -1)
        assert pair == -1 or kept[shown[0]] == pair
        found.add((pair, role, row, col))
    assert len(found) == len(original)
    return found


def places(grid, pair, role):
    return {(pair, role, row, col) for row in range(len(grid)) for col in range(len(grid[0]))}


@pytest.mark.parametrize("tokenizer_name", ["character", "merging", "word"])
@pytest.mark.parametrize("encoding", GRID_ENCODINGS)
@pytest.mark.parametrize("name", FREE_FORMATS)
def test_cells_speak_of_the_original_task(name, encoding, tokenizer_name):
    tokenizer = tokenizer_named(tokenizer_name)
    fmt = format_named(name, encoding, tokenizer_name)
    glyphs = COLORS if encoding == "words" else "0123456789"

    @settings(max_examples=12)
    @given(st.data())
    def check(data):
        task, target = data.draw(tasks()), data.draw(grids(st.integers(1, 6)))
        task = replace(task, test=(Pair(task.test[0].input, target),))
        view = data.draw(any_view(len(task.train)))
        dropped = data.draw(st.integers(0, len(task.train) - 1))
        kept = view.pair_order[dropped:]
        prompt = fmt.render(view.show_task(task), 0, len(kept))
        ids, cells = encode_prompt(prompt, tokenizer)
        answer, answer_cells = encode_answer(fmt, view.show(target), tokenizer, len(ids))
        ids, cells = np.concatenate([ids, answer]), np.concatenate([cells, answer_cells])
        original = original_cells(cells, view, dropped)
        assert original.dtype == np.int32
        found = check_cells(cells, original, task, 0, view, kept)
        expected = places(task.test[0].input, -1, 0) | places(target, -1, 1)
        for i in kept:
            expected |= places(task.train[i].input, i, 0) | places(task.train[i].output, i, 1)
        assert found == expected
        for *_, color, start, stop in original[:: max(1, len(original) // 20)].tolist():
            said = tokenizer.decode(ids[start:stop])
            assert glyphs[view.colors[color]].lower() in said.lower()

    check()


def test_no_cells():
    none = np.zeros((0, 7), np.int32)
    assert original_cells(none, View(1, 3, SWAPPED, (0, 1)), 0).shape == (0, 7)


def test_cells_of_a_quarter_turn():
    """[[1, 2]] shown as [[1], [2]] (blue and red swapped), the second pair of two, the other left
    out."""
    view = View(1, 1, SWAPPED, (1, 0))
    assert view.show([[1, 2]]) == [[1], [2]]
    cells = np.array([[0, 0, 0, 0, 1, 4, 5], [0, 0, 1, 0, 2, 6, 7], [-1, 0, 0, 0, 3, 9, 10]])
    assert original_cells(cells.astype(np.int32), view, 1).tolist() == [
        [0, 0, 0, 1, 2, 4, 5],
        [0, 0, 0, 0, 1, 6, 7],
        [-1, 0, 0, 0, 3, 9, 10],
    ]


# ---------------------------------------------------------------------------------- runs

SHORT = ["--max_output_tokens", 40]
FLAGS = ["--augmentations", 3, "--max_output_tokens", 8, "--save_every_n_samples", 5]
FLAGS += ["--activation_dtype", "float32"]
ORDER = [f"task{i}" for i in range(7)]


def parsed(codec, ids, prompt_length=0):
    """Takes an answer of the random model for a grid of two cells, so that there is a vote."""
    grid = [[int(ids[0]) % 3, int(ids[-1]) % 2]]
    return Answer(grid, None, np.zeros((0, 7), np.int32), f"{len(ids)} tokens")


@pytest.fixture
def parses(monkeypatch):
    monkeypatch.setattr(Codec, "read", parsed)


def go(model, tasks_file, folder, *flags):
    """Runs; the items by sample."""
    extract.run(planned(model, tasks_file, folder, *flags), NoSignals())
    return {sample_key(item): item for item in iter_items(folder / "acts")}


@functools.cache
def tasks_of(path):
    """task id -> Task with its ground truth."""
    solutions = json.loads((path.parent / "test_outputs_train.json").read_text())
    return {
        name: Task(
            name,
            tuple(Pair(p["input"], p["output"]) for p in task["train"]),
            tuple(
                Pair(p["input"], out) for p, out in zip(task["test"], solutions[name], strict=True)
            ),
        )
        for name, task in json.loads(path.read_text()).items()
    }


SAMPLES = {(name, 0) for name in ORDER} | {("task3", 1)}
TRIPLES = {(*key, view) for key in SAMPLES for view in range(3)}


@pytest.fixture(scope="module")
def run(tiny_model, tasks_file, tmp_path_factory):
    """A folder with an augmented run of 24 samples in 5 shards; and its items."""
    folder = tmp_path_factory.mktemp("augmented")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Codec, "read", parsed)
        return folder, go(tiny_model, tasks_file, folder, *FLAGS)


def test_every_sample_once_in_every_view(run, tasks_file):
    folder, items = run
    manifest = read_manifest(folder / "acts")
    listed = [tuple(key) for entry in manifest["files"] for key in entry["samples"]]
    assert len(listed) == len(set(listed)) == 24 and set(listed) == TRIPLES == set(items)
    assert manifest["prompt"]["augmentations"] == 3
    for (name, index, number), item in items.items():
        task = tasks_of(tasks_file)[name]
        view = views(task, 3, 0)[number]
        assert item["view"] == view.to_dict()
        assert item["target"] == view.show(task.test[index].output)
        assert item["correct"] is (item["prediction"] == item["target"])
        found = check_cells(
            *(item["cells"], item["cells_original"], task, index, view, view.pair_order)
        )
        expected = places(task.test[index].input, -1, 0)
        for i, pair in enumerate(task.train):
            expected |= places(pair.input, i, 0) | places(pair.output, i, 1)
        assert found == expected


def test_answers_are_mapped_back_and_voted(run, tasks_file):
    folder, items = run
    answers = read_answers(folder / "acts")
    assert set(answers) == set(items)
    for (name, index, number), answer in answers.items():
        item, target = items[name, index, number], tasks_of(tasks_file)[name].test[index].output
        (attempt,) = answer["attempts"]
        assert (answer["view"], answer["target"]) == (number, target)
        assert View.from_dict(item["view"]).show(attempt["grid"]) == item["prediction"]
        assert attempt["logprob"] == pytest.approx(item["output_logprobs"].sum(), abs=1e-4)
        assert attempt["text"] == f"{len(item['input_ids']) - item['prompt_length']} tokens"
    predictions = json.loads((folder / "predictions.json").read_text())
    assert {(n, s["sample_idx"]) for n, found in predictions.items() for s in found} == SAMPLES
    chosen = vote(answers)
    shapes = set()
    for name, samples in predictions.items():
        for sample in samples:
            expected = chosen[name, sample["sample_idx"]]
            assert sample == {key: expected[key] for key in sample}
            assert all(
                set(a) == {"grid", "text", "logprob", "votes", "view"} for a in sample["attempts"]
            )
            shapes.add(tuple(a["votes"] for a in sample["attempts"]))
    assert shapes <= {(3,), (2, 1), (1, 1)}
    assert read_manifest(folder / "acts")["scores"]["outputs_solved"]["total"] == 8


def test_an_answer_that_is_right_in_its_view_is_right(tiny_model, tasks_file, tmp_path):
    """Each sample's target, as the model would have to say it in that view."""
    plan = planned(tiny_model, tasks_file, tmp_path, "--augmentations", 8, *SHORT)
    assert len(plan.samples) == 64
    for sample in plan.samples:
        task = tasks_of(tasks_file)[sample.original.task_id]
        shown = sample.view.show(task.test[sample.sample_idx].output)
        answer, _ = encode_answer(plan.codec.fmt, shown, plan.codec.tokenizer)
        logprobs = [np.zeros(len(answer), np.float32)]
        result = Result(sample, plan.encode(sample), [answer], logprobs, {}, None)
        item, found = to_item(result, plan)
        assert item["prediction"] == item["target"] == shown and item["correct"] is True
        assert (
            found["attempts"][0]["grid"] == found["target"] == task.test[sample.sample_idx].output
        )
        assert found["correct"] is True and found["attempts"][0]["text"] == "\n".join(
            "".join(map(str, line)) for line in shown
        )
        cells = item["cells_original"]
        said = {tuple(c) for c in cells[(cells[:, 0] == -1) & (cells[:, 1] == 1)][:, 2:5].tolist()}
        target = task.test[sample.sample_idx].output
        assert said == {(r, c, x) for r, row in enumerate(target) for c, x in enumerate(row)}


def test_cells_of_a_shortened_prompt(tiny_model, tasks_file, tmp_path):
    """Its pairs are those that stay, by their numbers in the task."""
    flags = ["--augmentations", 3, *SHORT]
    every = planned(tiny_model, tasks_file, tmp_path, *flags).samples
    flags += ["--max_model_len", max(sample.length.prompt for sample in every) + 39]
    plan = planned(tiny_model, tasks_file, tmp_path, *flags)
    short = [s for s in plan.samples if s.num_train_pairs < len(s.original.train)]
    assert short
    for sample in short:
        item, _ = to_item(Result(sample, plan.encode(sample), [], [], {}, None), plan)
        task, kept = sample.original, sample.view.pair_order[-sample.num_train_pairs :]
        original = item["cells_original"]
        check_cells(item["cells"], original, task, sample.sample_idx, sample.view, kept)


def test_forced_answers(tiny_model, tasks_file, tmp_path):
    """The dry run's count is the run's; cells of the answer are those of the ground truth."""
    flags = ["--augmentations", 3, "--teacher_forcing", "--save_every_n_samples", 10]
    tokens, shards = plan_storage(planned(tiny_model, tasks_file, tmp_path, *flags))
    items = go(tiny_model, tasks_file, tmp_path, *flags)
    manifest = read_manifest(tmp_path / "acts")
    assert set(items) == TRIPLES and tokens == manifest["total_tokens"]
    assert shards == [(e["num_samples"], e["size_bytes"]) for e in manifest["files"]]
    for (name, index, number), item in items.items():
        task = tasks_of(tasks_file)[name]
        view = views(task, 3, 0)[number]
        found = check_cells(
            *(item["cells"], item["cells_original"], task, index, view, view.pair_order)
        )
        answer = {place for place in found if place[:2] == (-1, 1)}
        assert answer == places(task.test[index].output, -1, 1)
        assert (item["prediction"], item["correct"]) == (None, None)
    predictions = json.loads((tmp_path / "predictions.json").read_text())
    assert all(
        s["attempts"] == [] and s["correct"] is None for t in predictions.values() for s in t
    )


def test_the_first_view_is_the_run_without(tiny_model, tasks_file, run, parses, tmp_path):
    """Its items are those of an unaugmented run, which is to the byte what it is with the flag."""
    flags = FLAGS[2:]
    plain = go(tiny_model, tasks_file, tmp_path / "plain", *flags)
    assert set(plain) == SAMPLES
    assert not any({"view", "cells_original"} & item.keys() for item in plain.values())
    for (name, index), item in plain.items():
        first = run[1][name, index, 0]
        assert (first["cells"] == item["cells"]).all()
        assert (first["cells_original"] == item["cells"]).all()
        assert first["input_ids"].tolist() == item["input_ids"].tolist()
        for hook, states in item["activations"].items():
            assert worst_error(first["activations"][hook], states) < TOLERANCE
    go(tiny_model, tasks_file, tmp_path / "one", *flags, "--augmentations", 1)
    names = [f"acts/{p.name}" for p in (tmp_path / "plain" / "acts").iterdir()]
    assert len(names) == 4
    for name in ("predictions.json", *names):
        contents = [(tmp_path / run / name).read_bytes() for run in ("plain", "one")]
        if name.endswith("metadata.json"):
            listed, prompts = (
                [json.loads(c)[key] for c in contents] for key in ("files", "prompt")
            )
            assert listed[0] == listed[1] and prompts[0] == prompts[1]
            assert "augmentations" not in prompts[0]
        else:
            assert contents[0] == contents[1], name


def test_views_do_not_depend_on_the_place_in_the_dataset(tiny_model, tasks_file, tmp_path):
    content = json.loads(tasks_file.read_text())
    other = tmp_path / "tasks.json"
    other.write_text(json.dumps({name: content[name] for name in reversed(ORDER[2:])}))
    one, two = (
        {
            s.key: s.view
            for s in planned(tiny_model, p, tmp_path, "--augmentations", 5, *SHORT).samples
        }
        for p in (tasks_file, other)
    )
    assert two == {key: view for key, view in one.items() if key[0] in ORDER[2:]}


# -------------------------------------------------------------------- resuming, sharding


def shell_flags(model, tasks_file, folder, *flags):
    paths = {"model_path": model, "dataset_path": tasks_file, "dtype": "float32"}
    paths |= {"output_path": folder / "predictions.json", "activations_dir": folder / "acts"}
    return [*words(paths), *FLAGS, *flags]


def contents(folder):
    files = [p for p in folder.rglob("*") if p.is_file() and p.suffix in (".pkl", ".json")]
    return {p.name: p.read_bytes() for p in files if p.name != "metadata.json"}


def test_resuming(tiny_model, tasks_file, run, parses, in_shell, tmp_path):
    """A whole run has nothing to do; of one that lost two shards they are made again."""
    folder = tmp_path / "run"
    shutil.copytree(run[0], folder)
    flags = shell_flags(tiny_model, tasks_file, folder, "--resume")
    before = contents(folder)
    code, stdout, _ = in_shell(script, flags)
    assert (code, stdout) == (0, "") and contents(folder) == before
    for number, said in ((1, "was 3, is None"), (2, "was 3, is 2")):
        code, _, stderr = in_shell(script, [*flags, "--augmentations", number])
        assert code == 2 and f"prompt.augmentations {said}" in stderr
    manifest = json.loads((folder / "acts" / "metadata.json").read_text())
    lost = [manifest["files"].pop() for _ in range(2)]
    for entry in lost:
        (folder / "acts" / entry["filename"]).unlink()
    manifest = json.dumps({**manifest, "status": "running"})
    (folder / "acts" / "metadata.json").write_text(manifest)
    (folder / "predictions.json").unlink()
    code, stdout, stderr = in_shell(script, flags)
    assert code == 0, stderr
    assert "tasks         7, samples 24, each test input in 3 views" in stdout
    assert contents(folder) == before
    assert read_manifest(folder / "acts")["status"] == "complete"


def stopping_after(count, original):
    made = itertools.count()

    def to_item(result, plan):
        if next(made) == count:
            raise Interrupted(signal.SIGTERM)
        return original(result, plan)

    return to_item


@pytest.mark.parametrize("extracts", [True, False])
def test_stopped_and_resumed(
    tiny_model, tasks_file, run, parses, in_shell, tmp_path, monkeypatch, extracts
):
    """Within a shard and between the views of a test input."""
    flags = shell_flags(tiny_model, tasks_file, tmp_path)
    if not extracts:
        at = flags.index("--activation_dtype")
        flags[at : at + 2] = ["--no_extraction"]
    folder = tmp_path / ("acts" if extracts else "predictions.json.run")
    with monkeypatch.context() as patch:
        patch.setattr(extract, "to_item", stopping_after(13, extract.to_item))
        assert in_shell(script, flags)[0] == 143
    kept = set(read_answers(folder))
    assert len(kept) == 13 and kept < TRIPLES
    code, _, stderr = in_shell(script, [*flags, "--resume"])
    assert code == 0, stderr
    assert contents(tmp_path)["predictions.json"] == contents(run[0])["predictions.json"]
    if extracts:
        assert set(read_answers(folder)) == TRIPLES
        assert {sample_key(item) for item in iter_items(folder)} == TRIPLES
    else:
        assert [path.name for path in folder.iterdir()] == ["metadata.json"]


def test_a_disk_lost_with_its_machine(
    tiny_model, tasks_file, parses, in_shell, tmp_path, monkeypatch, gcs
):
    """What the bucket holds of the views is not computed again."""
    flags = shell_flags(tiny_model, tasks_file, tmp_path, "--upload_to_cloud")
    flags += ["--cloud_bucket", "gs://bucket/run"]
    with monkeypatch.context() as patch:
        patch.setattr(extract, "to_item", stopping_after(13, extract.to_item))
        assert in_shell(script, flags)[0] == 143
    shutil.rmtree(tmp_path / "acts")
    sent = {entry["filename"]: entry for entry in read_manifest("gs://bucket/run")["files"]}
    assert sent
    code, _, stderr = in_shell(script, [*flags, "--resume"])
    assert code == 0, stderr
    kept = {entry["filename"]: entry for entry in read_manifest("gs://bucket/run")["files"]}
    assert {name: kept[name]["crc32c"] for name in sent} == {n: sent[n]["crc32c"] for n in sent}
    assert all(len(gcs.generations(f"run/{name}")) == 1 for name in kept)
    items = [sample_key(item) for item in iter_items("gs://bucket/run")]
    assert len(items) == 24 and set(items) == TRIPLES


def test_parts_on_a_mesh_merged(tiny_model, tasks_file, run, parses, tmp_path):
    """The distributed script on eight virtual devices, the tasks in two parts: the states of one
    device, and the submission of its votes."""
    parts = [tmp_path / str(i) / "acts" for i in (0, 1)]
    for i, part in enumerate(parts):
        flags = {
            **{"model_path": tiny_model, "dataset_path": tasks_file, "dtype": "float32"},
            **{"output_filepath": part.parent / "submission.json", "activations_dir": part},
            **{"extract_activations": True, "batch_size": 1, "mesh_shape": [4, 2]},
            **{"num_shards": 2, "shard_id": i},
        }
        argv = [*words(flags), *map(str, FLAGS)]
        request = Request.from_flags(distributed_script.build_parser().parse_args(argv))
        extract.run(plan_run(request), NoSignals())
    argv = ["merge", *parts, "--into", tmp_path / "merged"]
    argv += ["--output_filepath", tmp_path / "submission.json"]
    merge.main(merge.build_parser().parse_args(list(map(str, argv))), NoSignals())
    items = {sample_key(item): item for item in iter_items(tmp_path / "merged")}
    assert items.keys() == run[1].keys() == TRIPLES
    for key, item in run[1].items():
        assert items[key]["input_ids"].tolist() == item["input_ids"].tolist()
        assert items[key]["view"] == item["view"]
        for hook, states in item["activations"].items():
            assert worst_error(items[key]["activations"][hook], states) < TOLERANCE
    targets = {name: [None] * len(tasks_of(tasks_file)[name].test) for name in ORDER}
    expected = submission(targets, vote(read_answers(run[0] / "acts")))
    assert json.loads((tmp_path / "submission.json").read_text()) == expected
    for part in parts:
        mine = json.loads((part.parent / "submission.json").read_text())
        assert mine == {name: expected[name] for name in mine} and 0 < len(mine) < 7


def test_several_attempts_in_each_view(tiny_model, tasks_file, parses, tmp_path):
    """All are votes; the item is that of the first, and each view draws its own."""
    flags = ["--max_output_tokens", 8, "--predictions_per_task", 3, "--temperature", 1]
    items = go(tiny_model, tasks_file, tmp_path, *flags, "--augmentations", 2)
    answers = read_answers(tmp_path / "acts")
    assert {len(answer["attempts"]) for answer in answers.values()} == {3}
    for key, item in items.items():
        first = answers[key]["attempts"][0]["grid"]
        assert View.from_dict(item["view"]).show(first) == item["prediction"]
    predictions = json.loads((tmp_path / "predictions.json").read_text())
    for name, samples in predictions.items():
        for sample in samples:
            said = [
                a["grid"]
                for v in (0, 1)
                for a in answers[name, sample["sample_idx"], v]["attempts"]
            ]
            votes = [said.count(attempt["grid"]) for attempt in sample["attempts"]]
            assert votes == [attempt["votes"] for attempt in sample["attempts"]]
            assert votes[0] == max(map(said.count, said))


def test_views_that_do_not_fit_are_skipped(tiny_model, tasks_file, parses, tmp_path):
    """A transposed grid has other lines, and so other tokens; the views that fit vote."""
    flags = ["--augmentations", 8, "--max_output_tokens", 4, "--max_train_pairs", 1]
    lengths = {}
    for sample in planned(tiny_model, tasks_file, tmp_path, *flags).samples:
        lengths.setdefault(sample.key[:2], []).append(sample.length.prompt)
    assert set(lengths) == SAMPLES
    limit = max(max(found) for found in lengths.values() if len(set(found)) > 1) - 1
    extra = ["--max_model_len", limit + 4]
    items = go(tiny_model, tasks_file, tmp_path, *flags, *extra)
    fitting = {key: sum(n <= limit for n in found) for key, found in lengths.items()}
    assert 0 < min(n for n in fitting.values() if n) < 8
    manifest = read_manifest(tmp_path / "acts")
    left_out = [sample_key(entry) for entry in manifest["skipped"]]
    assert len(left_out) == len(set(left_out)) == 64 - len(items) == 64 - sum(fitting.values())
    assert not set(left_out) & set(items)
    assert list(manifest["skipped"][0]) == ["task_id", "sample_idx", "view", "reason"]
    predictions = json.loads((tmp_path / "predictions.json").read_text())
    for (name, index), count in fitting.items():
        attempts = predictions[name][index]["attempts"]
        assert bool(attempts) == bool(count) and sum(a["votes"] for a in attempts) <= count


def test_a_dry_run_counts_all_views(tiny_model, tasks_file, in_shell, tmp_path):
    flags = shell_flags(tiny_model, tasks_file, tmp_path, "--dry_run")
    code, stdout, stderr = in_shell(script, flags)
    assert code == 0, stderr
    assert "samples       24, each test input in 3 views\n" in stdout
    assert "shards        at most 5\n" in stdout
