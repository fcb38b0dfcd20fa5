"""The lens on stored states: what it computes, what it counts, and the page of one answer."""

import json
import re

import numpy as np
import pytest
from runs import extracted, made_run
from safetensors.numpy import load_file
from tokenizers_for_tests import merging_tokenizer, word_tokenizer

from examples import logit_lens as script
from examples.lens_page import Film, Reading, film_page, reader
from examples.logit_lens import cells_said, read_answer
from utils.arc.tasks import Pair, Task
from utils.errors import UserError
from utils.model.weights import open_checkpoint
from utils.prompt.codec import Codec
from utils.prompt.formats import load_format
from utils.shards import iter_items
from utils.shards.manifest import read_manifest


@pytest.fixture(scope="module")
def forced(tmp_path_factory, four_layers, tasks_file):
    """A pretended run whose states are noise and whose answers are the true ones."""
    folder = tmp_path_factory.mktemp("forced")
    flags = {"layers_to_extract": [0, 3], "hook_points": ["resid_pre", "resid_post", "mlp_out"]}
    return extracted(folder, four_layers, tasks_file, teacher_forcing=True, **flags)


def test_it_is_the_final_norm_and_the_unembedding(forced, four_layers):
    lens = script.load_lens(open_checkpoint(four_layers), read_manifest(forced))
    item = next(iter_items(forced))
    P = item["prompt_length"]
    weights = load_file(four_layers / "model.safetensors")
    states = item["activations"]["resid_post.3"][P - 1 : -1].astype(np.float32)
    normed = states / np.sqrt((states**2).mean(axis=1, keepdims=True) + 1e-6)
    logits = normed * weights["model.norm.weight"] @ weights["model.embed_tokens.weight"].T
    logprobs = logits - np.log(np.exp(logits).sum(axis=1, keepdims=True))
    said = item["input_ids"][P:]
    reading = read_answer(item, ["resid_post.3"], lens)["resid_post.3"]
    np.testing.assert_allclose(reading.logprob, logprobs[np.arange(len(said)), said], atol=1e-4)
    assert np.array_equal(reading.top, logprobs.argmax(axis=1))
    np.testing.assert_allclose(reading.top_logprob, logprobs.max(axis=1), atol=1e-4)


def test_the_adapter_is_that_of_the_run(forced, four_layers):
    """The states of a run with another one would be read through the wrong unembedding."""
    manifest = read_manifest(forced)
    manifest["model"]["adapter"] = {"path": "lora", "hash": "0" * 64}
    with pytest.raises(UserError, match=r"made with another adapter \(lora\): see --adapter"):
        script.load_lens(open_checkpoint(four_layers), manifest)


def test_tokens_whose_state_was_not_stored_are_left_out():
    item = {
        "input_ids": np.array([5, 6, 7, 8, 9]),
        "prompt_length": 2,
        "positions": np.array([2, 4]),  # those at 1, 2 and 3 predict
        "activations": {"resid_post.0": np.array([[20.0], [40.0]])},
    }
    asked = []

    def lens(states, said):
        asked.append((states.tolist(), said.tolist()))
        return np.full(1, -0.5), np.full(1, 3), np.full(1, -0.1)

    reading = read_answer(item, ["resid_post.0"], lens)["resid_post.0"]
    assert asked == [([[20.0]], [8])]
    np.testing.assert_array_equal(reading.logprob, np.float32([np.nan, -0.5, np.nan]))
    assert reading.top.tolist() == [-1, 3, -1]


# An answer of 1 x 3 cells in tokens 3, 4 and 5 to 6, of which the last shares none; color 7 is
# written with two tokens.
ITEM = {
    "task_id": "a<b>",
    "correct": False,
    "teacher_forced": False,
    "prompt_length": 3,
    "input_ids": np.array([1, 17, 18, 1, 2, 17, 18, 0]),
    "cells": np.array(
        [
            [-1, 0, 0, 0, 1, 0, 1],
            [-1, 0, 0, 1, 7, 1, 3],
            [-1, 1, 0, 0, 1, 3, 4],
            [-1, 1, 0, 1, 2, 4, 5],
            [-1, 1, 0, 2, 7, 5, 7],
        ]
    ),
    "target": [[1, 7, 1]],
    "prediction": [[1, 2, 7]],
}


def text_of(tokens):
    assert min(tokens) >= 0  # a tokenizer knows no other
    return {(17, 18): "7"}.get(
        tuple(tokens), "".join(f"<{t}>" if t > 9 else str(t) for t in tokens)
    )


READ = reader(text_of, "numbered")


@pytest.mark.parametrize(
    ("top", "same", "right"),
    [
        ([1, 2, 17, 18, 0], [True, True, True], [True, False, False]),
        ([2, 17, 1, 18, 0], [False, False, False], [False, False, False]),
        ([1, 2, 17, 9, 0], [True, True, False], [True, False, False]),
    ],
)
def test_a_cell_counts_where_all_its_tokens_are_said(top, same, right):
    reading = Reading(np.zeros(5), np.array(top), np.zeros(5))
    found = cells_said(ITEM, reading, READ)
    assert [part.tolist() for part in found] == [same, right]
    for target in (None, [[1, 7]]):
        assert cells_said({**ITEM, "target": target}, reading, READ)[1] is None


def test_a_cell_without_a_state_does_not_count():
    logprob = np.array([0, np.nan, 0, np.nan, 0])  # that of the second cell, and half of the third
    reading = Reading(logprob, np.array([1, -1, 17, -1, 0]), logprob)
    found = cells_said(ITEM, reading, READ)
    assert [part.tolist() for part in found] == [[True], [True]]


def test_a_layer_can_be_right_where_the_answer_is_not():
    item = {**ITEM, "target": [[2, 2, 7]]}
    reading = Reading(np.zeros(5), np.array([2, 2, 17, 18, 0]), np.zeros(5))
    same, right = cells_said(item, reading, READ)
    assert same.tolist() == [False, True, True] and right.all()


def test_the_page_says_what_each_layer_would_say():
    logprob = np.log(np.array([0.5, 0.25, 0.5, 0.5, 1]))
    reading = Reading(logprob, np.array([1, 99, 17, 18, 0]), np.log(np.full(5, 0.5)))
    silent = Reading(np.full(5, np.nan), np.full(5, -1), np.full(5, np.nan))
    film = Film(ITEM, {"resid_post.0": reading, "resid_post.1": silent})
    text = film_page(film, READ, text_of).decode()
    assert not re.findall(r"(?:src|href)=|https?://|url\(", text) and text.endswith("</html>\n")
    assert "task a&lt;b&gt; (failed)" in text
    assert "resid_post.0, row 1, column 1: would say blue, log p -0.69; log p of blue -0.69" in text
    assert "column 2: would say &#x27;&lt;99&gt;&#x27;, log p -0.69; log p of red -1.39" in text
    assert "column 3: would say orange, log p -1.39; log p of orange -1.39" in text
    assert "resid_post.1, row 1, column 1: no state was stored" in text
    assert "67% of the cells as in the answer" in text and "nan" not in text


def forced_item(tokenizer, encoding, answer, target):
    """An answer to a puzzle, as a run stores it, and a layer that says all of its tokens."""
    codec = Codec(tokenizer, load_format("chat", encoding, tokenizer), (), "")
    encoded = codec.encode(Task("t", (Pair([[1]], [[2]]),), (Pair([[3]], answer),)), 0, 1, True)
    about = {"task_id": "t", "prompt_length": encoded.prompt_length, "cells": encoded.cells}
    item = {**about, "input_ids": encoded.ids, "target": target, "correct": None}
    said = encoded.ids[encoded.prompt_length :]
    zeros = np.zeros(len(said), np.float32)
    return {**item, "teacher_forced": True}, Reading(zeros, said, zeros)


@pytest.mark.parametrize(
    ("tokenizer", "encoding"), [(merging_tokenizer(), "digits"), (word_tokenizer(), "words")]
)
def test_a_color_counts_however_it_is_written(tokenizer, encoding):
    """Three cells a token, or with a blank before it and without; and the layer that says what the
    answer should have been is right, also in colors that the puzzle does not hold."""
    said, true = [[4, 5, 6, 7], [6, 6, 8, 9]], [[4, 5, 0, 7], [0, 6, 8, 9]]
    read = reader(tokenizer.decode, encoding)
    item, reading = forced_item(tokenizer, encoding, said, true)
    _, knowing = forced_item(tokenizer, encoding, true, true)
    same, right = cells_said(item, reading, read)
    assert same.all() and right.tolist() == [True, True, False, True, False, True, True, True]
    same, right = cells_said(item, knowing, read)
    assert not same.all() and right.all()
    film = Film(item, {"resid_post.0": reading, "resid_post.1": knowing})
    text = film_page(film, read, tokenizer.decode).decode()
    assert "100% of the cells as in the answer" in text and 'fill="#ffffff"' not in text
    assert "resid_post.1, row 1, column 3: would say black" in text


@pytest.mark.parametrize(
    ("forced", "words"),
    [(True, "the true answer, given to the model"), (False, "not known to be right or wrong")],
)
def test_an_answer_without_ground_truth_is_not_called_the_true_one(forced, words):
    item = {**ITEM, "correct": None, "teacher_forced": forced}
    assert f"task a&lt;b&gt; ({words})" in film_page(Film(item, {}), READ, text_of).decode()


def test_the_script_writes_numbers_and_a_page(forced, four_layers, tmp_path, in_shell):
    output = tmp_path / "out" / "lens.json"
    given = ["--model_path", four_layers, "--activations_dir", forced]
    code, out, _ = in_shell(script, [*given, "--output", output])
    assert code == 0 and "right" in out
    found = json.loads(output.read_text())
    assert list(found["layers"]) == ["resid_pre.0", "resid_post.0", "resid_pre.3", "resid_post.3"]
    items = list(iter_items(forced))
    for name, line in found["layers"].items():
        each = [p for s in found["samples"] for p in s["logprobs"][name]]
        assert line["tokens"] == len(each) == sum(len(i["output_logprobs"]) for i in items)
        assert line["logprob"] == pytest.approx(np.mean(each), abs=1e-3)
        assert line["right"] == line["as_said"] < 0.5
        assert line["cells"] == line["cells_with_truth"] > 20
    text = output.with_suffix(".html").read_text()
    assert items[0]["task_id"] in text and "the true answer, given to the model" in text
    again = [*given, "--output", output, "--task", "task5", "--max_samples", 7]
    output.unlink()  # the page would be replaced too
    code, _, err = in_shell(script, again)
    assert code == 2 and "lens.html exists: add --overwrite to replace it" in err
    some = in_shell(script, [*again, "--overwrite"])
    assert some[0] == 0 and "task task5 " in output.with_suffix(".html").read_text()
    assert len(json.loads(output.read_text())["samples"]) == 7


def test_mistakes_are_one_line(forced, run_folder, four_layers, models, tmp_path, in_shell):
    def said(**changed):
        flags = {
            "model_path": four_layers,
            "activations_dir": forced,
            "output": tmp_path / "l.json",
        }
        words = [word for k, v in {**flags, **changed}.items() for word in (f"--{k}", v)]
        code, _, err = in_shell(script, words)
        assert code == 2 and err.count("error:") == 1
        return err

    assert "is not the model of the run: its weights are others" in said(model_path=models["14-2"])
    assert "--task nine is no task of the run" in said(task="nine")
    assert "--task task5 is only beyond --max_samples" in said(task="task5", max_samples=2)
    (tmp_path / "folder").mkdir()
    assert "folder is a folder" in said(output=tmp_path / "folder")
    assert "give the JSON file's" in said(output=tmp_path / "l.html")

    def others(random, item, task):
        return {"mlp_out.0": np.zeros((len(item["input_ids"]), 4), np.float32)}

    mlp = made_run(tmp_path / "mlp", others, tasks=2)
    assert "a lens reads the residual stream" in said(activations_dir=mlp)
    assert not list(tmp_path.glob("l.*"))
