"""Causal maps against passes from the start with the same interventions, and their page."""

import json
import re
import shutil
from dataclasses import replace
from types import SimpleNamespace

import jax
import numpy as np
import pytest
from conftest import ROOT
from tiny import write_model

from examples import causal_map as script
from examples.causal_map import CausalMap, Lab, plan_maps, sample_of, source_cells, tokens_of
from examples.causal_page import page
from examples.generate_tasks import FAMILIES, draw_row
from utils.arc.tasks import Pair, Task
from utils.model.generate import Shape
from utils.model.interventions import Edit
from utils.plan.batching import Length
from utils.plan.interventions import Intervention
from utils.plan.request import Request
from utils.plan.samples import Sample
from utils.run.compute import Computation

TASKS = ["task1", "task4"]  # of two train pairs each


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return write_model(tmp_path_factory.mktemp("model"))


class Given:
    """A donor whose states are at hand, float32 [T, W]."""

    def __init__(self, states):
        self.states = states

    def values(self, tokens, sample, encoded):
        return self.states[tokens]


def planned(model, tasks, names, devices=1):
    request = Request(str(model), str(tasks), dtype="float32", prompt_format="compact")
    return plan_maps(request, names, ["all"], "resid_pre", jax.devices()[:devices])


class Reference:
    """The model with the same changes, as a run with interventions makes them: in passes over
    whole samples, from the start, each on its own."""

    def __init__(self, plan, op, shape):
        batches = tuple(replace(batch, shape=shape) for batch in plan.batches)
        self.plan, self.names = replace(plan, batches=batches), plan.capture.names
        self.edits = [Edit(name, "set" if op == "mean" else op) for name in self.names]
        self.vectors = [{"vector": np.zeros(32, np.float32)} if op == "mean" else {}] * 2
        self.donors = [Given(np.zeros((1, 32))) if op == "patch" else None] * 2
        self.computation = Computation(self.with_changes({}))
        self.clean = self.run({})

    def with_changes(self, tokens):
        """tokens: layer -> those that are meant in the first of TASKS."""
        parts = zip(self.edits, self.vectors, self.donors, strict=True)
        return replace(
            self.plan,
            interventions=tuple(
                Intervention(
                    {"where": {"tokens": tokens.get(layer, []), "samples": [[TASKS[0], 0]]}}, *part
                )
                for layer, part in enumerate(parts)
            ),
        )

    def run(self, tokens):
        self.computation.plan = self.with_changes(tokens)
        return {
            result.sample.key[0]: result
            for job in self.computation.passes(self.plan.batches)
            for result in self.computation.fetch(self.computation.launch(job))
        }

    def effect(self, layer, cell, targets):
        """What log p of the cells of the answer became, minus what it was."""
        after = self.run({layer: list(range(*cell[5:].tolist()))})[TASKS[0]]
        before = self.clean[TASKS[0]]
        change = after.logprobs[0].astype(np.float64) - before.logprobs[0]
        prompt = before.encoded.prompt_length
        return np.array([change[slice(*(cell[5:] - prompt))].sum() for cell in targets])

    def take_means(self):
        own = self.clean[TASKS[0]]
        cells = own.encoded.cells[own.encoded.cells[:, 5] < own.encoded.prompt_length]
        means = [own.captures[name][tokens_of(cells)].mean(axis=0) for name in self.names]
        self.computation.engine.constants = [{"vector": jax.device_put(mean)} for mean in means]

    def take_donor(self, cells):
        own, theirs = (self.clean[name] for name in TASKS)
        spans = {tuple(cell[:4]): slice(*cell[5:]) for cell in theirs.encoded.cells}
        self.donors = []
        for name in self.names:
            states = np.zeros((len(own.encoded.ids), 32), np.float32)
            for cell in cells:
                states[slice(*cell[5:])] = theirs.captures[name][spans[tuple(cell[:4])]]
            self.donors.append(Given(states))


@pytest.mark.parametrize(("op", "devices"), [("zero", 2), ("mean", 1), ("patch", 1)])
def test_effects_are_those_of_passes_from_the_start(model, tasks_file, op, devices):
    """Whatever was tried before; on two devices two cells are changed at once."""
    names = TASKS if op == "patch" else TASKS[:1]
    plan = planned(model, tasks_file, names, devices)
    sample = sample_of(plan, TASKS[0], 0)
    donor = sample_of(plan, TASKS[1], 0) if op == "patch" else None
    encoded = plan.encode(sample)
    cells = source_cells(encoded, "all")
    if donor:
        have = {tuple(cell[:4]) for cell in plan.encode(donor).cells}
        cells = np.array([cell for cell in cells if tuple(cell[:4]) in have])
    cells = cells[:: len(cells) // 5]
    lab = Lab(plan, op, Shape(devices, 512, 16))
    found = lab.causal_map(sample, cells, donor)
    targets = encoded.cells[encoded.cells[:, 5] >= encoded.prompt_length]
    assert found.effect.shape == (2, len(cells), len(targets))

    reference = Reference(planned(model, tasks_file, names), op, Shape(len(names), 512, 16))
    if op == "mean":
        reference.take_means()
    if op == "patch":
        reference.take_donor(cells)
    for source in (0, 2, len(cells) - 1):
        for layer in (0, 1):
            expected = reference.effect(layer, cells[source], targets)
            np.testing.assert_allclose(found.effect[layer, source], expected, atol=1e-5)
    assert np.abs(found.effect).max(axis=(1, 2)).min() > 1e-3
    # The same lab again, after all that was tried: nothing of it is left. And a sample that is its
    # own donor changes nothing.
    again = lab.causal_map(sample, cells[:1], donor and sample)
    np.testing.assert_allclose(again.before, found.before, atol=1e-5)
    np.testing.assert_allclose(again.effect, 0 if donor else found.effect[:, :1], atol=1e-5)


def flags(model, tasks, folder, **more):
    given = {
        "model_path": model, "dataset_path": tasks, "task": "task1", "layers": "all",
        "output": folder / "map", **more,
    }  # fmt: skip
    return [word for name, value in given.items() for word in (f"--{name}", str(value))]


def test_the_model_that_ships_takes_a_cell_from_where_it_came(tmp_path, in_shell, monkeypatch):
    """The script on a grid to be flipped: most cells of the answer hang most on the cell that they
    come from."""
    monkeypatch.setattr("utils.model.layout.find_devices", lambda everywhere: jax.devices()[:1])
    row = draw_row(FAMILIES["flip"], (2, 3))
    *train, test = ({"input": given, "output": answer} for given, answer in row["examples"])
    task = {"train": train, "test": [test]}
    (tmp_path / "tasks.json").write_text(json.dumps({NAME: task, "other": task}))
    shipped = ROOT / "examples" / "arc_tiny"
    argv = flags(shipped, tmp_path / "tasks.json", tmp_path, task=NAME, sources="test", layers=0)
    code, out, err = in_shell(script, [*argv, "--prompt_format", "compact"])
    assert code == 0, err
    rows, cols = np.shape(test["input"])
    size = rows * cols
    assert f"{size} cells of the puzzle at 1 layers, in {size} passes" in out

    found = json.loads((tmp_path / "map" / "causal_map.json").read_text())
    keys = ["task_id", "sample_idx", "num_train_pairs", "hook_points", "layers"]
    assert list(found) == [*keys, "source_cells", "target_cells", "effect"]
    assert (found["task_id"], found["sample_idx"]) == (NAME, 0)
    assert (found["hook_points"], found["layers"]) == (["resid_pre"], [0])
    assert found["target_cells"] == [[r, c] for r in range(rows) for c in range(cols)]
    assert found["source_cells"] == [[-1, 0, r, c] for r, c in found["target_cells"]]
    effect = np.array(found["effect"])
    assert effect.shape == (1, size, size)
    axis = int(np.array_equal(np.flip(test["input"], 1), test["output"]))
    sources = np.flip(np.arange(size).reshape(rows, cols), axis).ravel()
    assert (effect[0].argmin(axis=0) == sources).mean() > 0.6

    text = (tmp_path / "map" / "causal_map.html").read_text()
    assert text.count("<button") == text.count("data-source=") == size
    code, _, err = in_shell(script, argv)
    assert code == 2 and "exists: choose another folder" in err


def test_a_donor_can_be_longer(tmp_path, in_shell):
    """In its other grids."""
    grid, large = [[1, 2], [3, 4]], [[5] * 30] * 30
    model = write_model(tmp_path / "model", max_position_embeddings=4096)
    test = {"input": grid, "output": grid}
    tasks = {"a": [test], "long": [{"input": large, "output": large}]}
    made = {name: {"train": pairs, "test": [test]} for name, pairs in tasks.items()}
    (tmp_path / "tasks.json").write_text(json.dumps(made))
    argv = flags(model, tmp_path / "tasks.json", tmp_path, task="a", sources="test", op="patch")
    code, out, err = in_shell(script, [*argv, "--donor", "long"])
    assert code == 0 and "4 cells of the puzzle" in out and "train pairs" not in out, err


def test_train_pairs_that_are_left_out_are_named(tmp_path, in_shell, monkeypatch):
    def pretended(sample, cells, donor):
        effect = np.zeros((1, len(cells), len(cells)), np.float32)
        places = cells[:, :4], cells[:, 2:4]
        return CausalMap(sample, "resid_pre", [0], *places, effect[0, 0], effect)

    monkeypatch.setattr(script, "Lab", lambda *_: SimpleNamespace(causal_map=pretended))
    model, pair = write_model(tmp_path / "model"), {"input": [[1, 2]], "output": [[3, 4]]}
    task = {"train": [pair] * 5, "test": [pair]}
    (tmp_path / "tasks.json").write_text(json.dumps({"a": task}))
    argv = flags(
        model, tmp_path / "tasks.json", tmp_path, task="a", max_model_len=60, sources="test"
    )
    code, out, err = in_shell(script, [*argv, "--prompt_format", "compact"])
    assert code == 0 and "1 of 1 samples lose some to fit in 60 tokens: 3 of 5 kept" in out, err
    found = json.loads((tmp_path / "map" / "causal_map.json").read_text())
    assert found["num_train_pairs"] == 3


@pytest.mark.parametrize(
    ("more", "words"),
    [
        ({"task": "none"}, "has no task none"),
        ({"sample_idx": 1}, "has no test input 1: there are 0 to 0"),
        ({"layers": 9}, "layer 9 does not exist"),
        ({"op": "patch"}, "--op patch needs --donor TASK"),
        ({"donor": "task2"}, "no other op takes one"),
        ({"op": "patch", "donor": "task2"}, "task task2 has no such cell"),
        ({"op": "patch", "donor": "gone"}, "has no task gone"),
        ({"max_model_len": 20}, "none of the 1 samples can be run"),
        ({"solutions_path": "other.json"}, "has none of the 1 tasks"),
        ({"hook_point": "mlp_up"}, "invalid choice: 'mlp_up'"),
    ],
)  # fmt: skip
def test_a_mistake_is_one_line_before_the_model_loads(
    tmp_path, model, tasks_file, in_shell, monkeypatch, more, words
):
    monkeypatch.setattr("utils.model.weights.Checkpoint.load", None)
    if "solutions_path" in more:
        more = {"solutions_path": tmp_path / "other.json"}
        more["solutions_path"].write_text('{"gone": [[[1]]]}')
    code, _, err = in_shell(script, flags(model, tasks_file, tmp_path, **more))
    assert code == 2 and words in err and err.count("\n") == 1, err
    assert not (tmp_path / "map").exists()


NAME = "<img src=x onerror=alert(1)>"
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")


@pytest.fixture
def page_of_a_map(tmp_path):
    """A map whose strongest cause of answer cell i is cell i of the test input at layer 2, and
    cell 3 - i at layer 5; the task's id is a stranger's, and in the page it is text."""
    grid = [[1, 2], [3, 4]]
    task = Task(NAME, (Pair(grid, grid), Pair(grid, grid)), (Pair(grid, grid),))
    sample = Sample(task, 0, 2, Length(1), 1)
    places = np.array([[r, c] for r in (0, 1) for c in (0, 1)])
    sources = np.array([[pair, 0, r, c] for pair in (1, -1) for r, c in places])
    effect = np.full((2, 8, 4), -0.1, np.float32)
    for i in range(4):
        effect[0, 4 + i, i], effect[1, 4 + 3 - i, i], effect[:, 0, i] = -5, -3, 0.2
    found = CausalMap(sample, "resid_pre", [2, 5], sources, places, np.full(4, -0.5), effect)
    path = tmp_path / "causal_map.html"
    path.write_bytes(page(found, "mean"))
    return path


def test_the_page_fetches_nothing_and_runs_nothing_of_a_stranger(page_of_a_map):
    text = page_of_a_map.read_text()
    assert text.endswith("</html>\n") and "<img" not in text and "&lt;img src=x" in text
    assert not re.findall(r"(?:src|href)=\"|https?://|url\(", text)
    assert text.count("<button") == 4 and text.count("data-source=") == 8
    assert text.count('class="unasked"') == 12 and "mean over the puzzle" in text


@pytest.mark.skipif(CHROMIUM is None, reason="no chromium on this machine: apt install chromium")
@pytest.mark.parametrize(("width", "height"), [(1280, 800), (390, 844)])
def test_one_points_at_a_cell_and_sees_its_causes(page_of_a_map, width, height):
    """By mouse, by tap, and by keys; layer by layer."""
    sync_api = pytest.importorskip("playwright.sync_api")
    complaints = []

    def strongest():
        return view.eval_on_selector_all(".first", "cells => cells.map(c => c.dataset.source)")

    with sync_api.sync_playwright() as playwright:
        options = ["--no-sandbox", "--disable-gpu", "--disable-background-networking"]
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=options)
        context = browser.new_context(
            viewport={"width": width, "height": height}, has_touch=width < 600
        )
        view = context.new_page()
        for event in ("console", "pageerror", "requestfailed"):
            view.on(event, lambda found: complaints.append(str(found)))
        view.goto(page_of_a_map.as_uri())
        assert view.evaluate("document.documentElement.scrollWidth <= window.innerWidth")
        assert strongest() == ["4"]
        second = view.locator("#answer button").nth(1)
        second.tap() if width < 600 else second.hover()
        assert strongest() == ["5"]
        assert view.locator(".more").count() == 1
        assert "test input, row 1, column 2: with it changed, log p is -5.50" in view.inner_text(
            "#said"
        )
        second.focus()
        view.keyboard.press("ArrowDown")
        assert strongest() == ["7"]
        view.focus("#layer")
        view.keyboard.press("ArrowRight")
        assert strongest() == ["4"] and view.inner_text("#number") == "5"
        sides = view.eval_on_selector_all(
            ".grid > *", "cells => cells.map(c => c.getBoundingClientRect().width)"
        )
        assert min(sides) >= 10
        browser.close()
    assert not complaints
