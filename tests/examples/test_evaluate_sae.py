"""Autoencoders whose score is known: identity, and one that knows nothing; and what is refused."""

import json
from dataclasses import replace

import jax
import numpy as np
import pytest
from tiny import write_model

from examples import evaluate_sae as script
from examples.evaluate_sae import cells_right
from utils.model.autoencoder import Autoencoder
from utils.plan.plan import plan_run
from utils.plan.request import Request

HOOK, D = "resid_post.1", 32


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return write_model(tmp_path_factory.mktemp("model"), num_hidden_layers=3)


@pytest.fixture(scope="module")
def autoencoders(tmp_path_factory):
    """Folders: `identity` gives its input, `constant` zeros whatever its input is, `narrow` is of
    another width, `elsewhere` of another hook."""
    folder = tmp_path_factory.mktemp("saes")
    eye, zeros = np.eye(D, dtype=np.float32), np.zeros(D, np.float32)
    both = {
        "w_enc": np.concatenate([eye, -eye], axis=1), "b_enc": np.zeros(2 * D, np.float32),
        "w_dec": np.concatenate([eye, -eye]), "b_dec": zeros,
    }  # fmt: skip
    constant = {**both, "w_dec": 0 * both["w_dec"]}
    narrow = {
        "w_enc": np.ones((8, 16), np.float32), "b_enc": np.ones(16, np.float32),
        "w_dec": np.ones((16, 8), np.float32), "b_dec": np.ones(8, np.float32),
    }  # fmt: skip
    made = {
        "identity": (HOOK, both),
        "constant": (None, constant),
        "narrow": (None, narrow),
        "elsewhere": ("resid_pre.0", both),
    }
    for name, (hook, weights) in made.items():
        Autoencoder("standard", None, hook, weights).save(folder / name, {})
    return folder


def flags(model, tasks, sae, output, *more, hook=HOOK):
    argv = ["--model_path", model, "--dataset_path", tasks, "--sae", sae, "--hook_point", hook]
    return [*argv, "--output", output, "--prompt_format", "compact", "--batch_size", "4", *more]


def test_identity_keeps_all_and_a_constant_nothing(
    tmp_path, model, tasks_file, autoencoders, in_shell, monkeypatch
):
    """An autoencoder that gives its input changes no token; one that gives a constant explains
    nothing. What they are compared with does not depend on the devices."""
    free = ["--generate", "--max_output_tokens", "12"]
    found = {}
    for name, more, devices in (("identity", free, 1), ("constant", [], 2)):
        used = jax.devices()[:devices]
        monkeypatch.setattr("utils.model.layout.find_devices", lambda everywhere, d=used: d)
        output = tmp_path / "results" / f"{name}.json"
        code, out, err = in_shell(
            script, flags(model, tasks_file, autoencoders / name, output, *more)
        )
        assert code == 0, err
        found[name] = json.loads(output.read_text())
        assert f"over {found[name]['tokens']} tokens of answers" in out
    one, other = found.values()
    assert list(other) == ["tokens", "explained_variance", "l0", "ce", "ce_recovered", "kl"]
    assert list(one) == [*other, "cells_correct", "solved"]
    assert list(one["ce"]) == ["clean", "zero", "mean", "spliced"]

    assert one["ce"]["spliced"] == one["ce"]["clean"] != one["ce"]["zero"]
    assert one["ce_recovered"] == 1 and one["kl"] == 0
    assert one["explained_variance"] == pytest.approx(1, abs=1e-6) and one["l0"] == D
    for counts in (one["cells_correct"], one["solved"]):
        assert list(counts) == ["clean", "mean", "spliced"]
        assert counts["clean"] == counts["spliced"]

    assert other["tokens"] == one["tokens"]
    for condition in ("clean", "zero", "mean"):
        assert other["ce"][condition] == pytest.approx(one["ce"][condition], abs=1e-5)
    assert other["kl"] > 1e-5 and other["l0"] == D
    assert other["explained_variance"] < 0
    ce = other["ce"]
    assert ce["spliced"] == pytest.approx(ce["zero"], abs=1e-6) and ce["zero"] != ce["mean"]
    assert other["ce_recovered"] == (ce["zero"] - ce["spliced"]) / (ce["zero"] - ce["clean"])


def test_what_is_left_out_is_named(model, tasks_file):
    """Room for the answer is kept where it is generated: there more is left out."""
    lengths = {"max_model_len": 105, "max_output_tokens": 60}
    request = Request(str(model), str(tasks_file), prompt_format="compact", **lengths)
    forced, free = (
        plan_run(replace(request, teacher_forcing=forced), jax.devices()[:1], writes=False)
        for forced in (True, False)
    )
    ce = dict.fromkeys(script.CONDITIONS, 1.0)
    counts = {"solved": {"clean": 0}, "cells_correct": {"clean": 0}}
    shares = {"explained_variance": 1, "ce_recovered": 1, "l0": 1, "kl": 0, "tokens": 1, "ce": ce}
    text = script.describe({**shares, **counts}, forced, free)
    for line in (
        "true answers: skipped 1: 1 does not fit in 105 tokens",
        "true answers: train pairs 2 of 7 samples lose some to fit in 105 tokens: 11 of 13 kept",
        "generated answers: skipped 4: 4 does not fit in 105 tokens",
        "generated answers: train pairs 3 of 4 samples lose some",
    ):
        assert f"\n{line}" in text


def test_what_is_counted_and_measured():
    assert cells_right([[1, 2], [3, 4]], [[1, 2], [0, 4]]) == 3
    assert cells_right([[1, 2, 9]], [[1, 2], [0, 4]]) == 2
    assert cells_right(None, [[1]]) == 0


@pytest.mark.parametrize(
    ("sae", "hook", "more", "words"),
    [
        ("narrow", HOOK, [], "is 8 wide, and resid_post.1 is 32"),
        ("elsewhere", HOOK, [], "is an autoencoder of resid_pre.0, not of resid_post.1"),
        ("identity", "resid_post", [], "hook 'resid_post': the model has layers 0 to 2"),
        ("identity", "resid_post.7", [], "the model has layers 0 to 2"),
        ("none", HOOK, [], "none"),
        ("identity", HOOK, ["--max_output_tokens", "0"], "--max_output_tokens is of --generate"),
        ("identity", HOOK, ["--max_model_len", "5"], "none of the 8 samples can be run"),
    ],
)
def test_a_mistake_is_one_line_before_the_model_loads(
    tmp_path, model, tasks_file, autoencoders, in_shell, monkeypatch, sae, hook, more, words
):
    monkeypatch.setattr("utils.model.weights.Checkpoint.load", None)
    output = tmp_path / "sae.json"
    argv = flags(model, tasks_file, autoencoders / sae, output, *more, hook=hook)
    code, _, err = in_shell(script, argv)
    assert code == 2 and words in err and err.strip().count("\n") == 0, err
    assert not output.exists()


def test_the_help_speaks_of_this_script():
    text = " ".join(script.build_parser().format_help().split())
    assert "samples a batch and device" in text and "--generate, above 0 (default" in text
    assert "augmentations" not in text and "the prompt alone" not in text and "--seed" not in text


def test_tasks_without_ground_truth_are_refused(tmp_path, model, autoencoders, in_shell):
    task = {"train": [{"input": [[1]], "output": [[2]]}], "test": [{"input": [[3]]}]}
    (tmp_path / "tasks.json").write_text(json.dumps({"t": task}))
    argv = flags(model, tmp_path / "tasks.json", autoencoders / "identity", tmp_path / "o.json")
    code, _, err = in_shell(script, argv)
    assert code == 2 and "needs ground truth" in err
