"""The whole run, in process, against torch: every token of every item, in shards on disk."""

import json
import re
import shutil
import subprocess
import sys
import textwrap

import numpy as np
import pytest
from checkpoints import write_adapter
from conftest import ROOT, SHARED, TINY, NoSignals, run_script
from parity import TOLERANCE, log_softmax, worst_error
from runs import planned

import simple_extraction_inference as script
from utils.dataset import ActivationDataset, Selection
from utils.dataset.contrast import contrast
from utils.model.capture import HOOK_POINTS
from utils.run.dry_run import plan_storage
from utils.run.loop import run
from utils.shards import iter_items

PARITY_FAMILIES = {
    "qwen2": {"model_type": "qwen2", "tie_word_embeddings": True},
    "qwen3": {"model_type": "qwen3", "head_dim": 16, "tie_word_embeddings": False},
    "llama": {
        "model_type": "llama",
        "rope_scaling": {
            "rope_type": "llama3",
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 128,
        },
    },
    "mistral": {"model_type": "mistral", "sliding_window": 50},
}


def items_of(model, tasks, folder, *flags):
    """Runs, and returns what the shards hold by sample."""
    run(planned(model, tasks, folder, *flags), NoSignals())
    return {(item["task_id"], item["sample_idx"]): item for item in iter_items(folder / "acts")}


EVERYTHING = [
    "--layers_to_extract",
    "all",
    "--hook_points",
    *HOOK_POINTS,
    "--activation_dtype",
    "float32",
]


@pytest.fixture(scope="module", params=PARITY_FAMILIES)
def family(request, tmp_path_factory):
    """A random checkpoint with a tokenizer, and the reference that reads the same folder."""
    pytest.importorskip("torch", reason="torch is not installed: requirements-torch.txt")
    import torch
    import transformers
    from reference import random_model, save
    from tokenizers_for_tests import character_tokenizer

    folder = tmp_path_factory.mktemp(request.param)
    tokenizer = character_tokenizer()
    fields = {**TINY, **PARITY_FAMILIES[request.param], "vocab_size": len(tokenizer)}
    (folder / "config.json").write_text(json.dumps(fields))
    config = transformers.AutoConfig.from_pretrained(folder)
    save(random_model(config, "bfloat16", seed=5), folder, "bfloat16")
    (folder / "generation_config.json").unlink(missing_ok=True)
    (folder / "config.json").write_text(json.dumps(fields))
    tokenizer.save_pretrained(folder)
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    return folder, model.eval()


def check_against(model, item):
    from reference import hidden_states

    ids, P = item["input_ids"], item["prompt_length"]
    states, logits = hidden_states(model, ids)
    assert set(item["activations"]) == set(states)
    for name, expected in states.items():
        assert item["activations"][name].shape == expected.shape
        assert worst_error(item["activations"][name], expected) < TOLERANCE, name
    logprobs = log_softmax(logits)
    expected = logprobs[np.arange(P - 1, len(ids) - 1), ids[P:]]
    np.testing.assert_allclose(item["output_logprobs"], expected, atol=TOLERANCE)
    found = log_softmax(item["output_logits"][0])
    np.testing.assert_allclose(found, logprobs[P - 1], atol=TOLERANCE)


def test_generation_against_torch(family, tasks_file, tmp_path):
    import torch

    folder, model = family
    flags = ["--max_output_tokens", 24, "--batch_size", 3, *EVERYTHING]
    items = items_of(folder, tasks_file, tmp_path, *flags)
    assert len(items) == 8
    stops = planned(folder, tasks_file, tmp_path, "--max_output_tokens", 1).codec.stop_ids
    for item in items.values():
        P = item["prompt_length"]
        with torch.no_grad():
            expected = model.generate(
                torch.tensor(item["input_ids"][None, :P], dtype=torch.long),
                attention_mask=torch.ones(1, P, dtype=torch.long),
                max_new_tokens=24,
                do_sample=False,
                eos_token_id=list(stops),
                pad_token_id=0,
            )[0].numpy()
        assert item["input_ids"].tolist() == expected.tolist()
        check_against(model, item)


def test_teacher_forcing_against_torch(family, tasks_file, tmp_path):
    folder, model = family
    flags = ["--teacher_forcing", "--batch_size", 2, *EVERYTHING]
    items = items_of(folder, tasks_file, tmp_path, *flags)
    assert len(items) == 8
    for item in items.values():
        assert item["teacher_forced"] and item["prediction"] is None and item["correct"] is None
        check_against(model, item)
        answer = item["cells"][(item["cells"][:, 0] == -1) & (item["cells"][:, 1] == 1)]
        assert answer[:, 4].tolist() == [cell for row in item["target"] for cell in row]
        assert (answer[:, 5] >= item["prompt_length"]).all()


def test_batch_size_and_bucket_change_nothing(tiny_model, tasks_file, tmp_path):
    """1, 3 and 8 rows a batch, float32 storage: the same answers, the same states."""
    flags = ["--max_output_tokens", 20, "--activation_dtype", "float32"]
    runs = [
        items_of(tiny_model, tasks_file, tmp_path / str(n), "--batch_size", n, *flags)
        for n in (1, 3, 8)
    ]
    for other in runs[1:]:
        assert other.keys() == runs[0].keys()
        for key, item in runs[0].items():
            assert other[key]["input_ids"].tolist() == item["input_ids"].tolist()
            for name, states in item["activations"].items():
                assert worst_error(other[key]["activations"][name], states) < TOLERANCE


def test_two_runs_are_equal_to_the_byte(tiny_model, tasks_file, tmp_path):
    flags = ["--max_output_tokens", 20, "--batch_size", 2, "--predictions_per_task", 2]
    for name in ("one", "two"):
        items_of(tiny_model, tasks_file, tmp_path / name, *flags, "--save_every_n_samples", 3)
    one = sorted(p.name for p in (tmp_path / "one" / "acts").iterdir())
    assert one == sorted(p.name for p in (tmp_path / "two" / "acts").iterdir())
    assert [name for name in one if name.endswith(".pkl")] == [
        f"activations_batch_{i:06d}.pkl" for i in (1, 2, 3)
    ]
    for name in [f"acts/{name}" for name in one if name != "metadata.json"] + ["predictions.json"]:
        assert (tmp_path / "one" / name).read_bytes() == (tmp_path / "two" / name).read_bytes()


@pytest.mark.parametrize("positions", ["prompt", "answer", "last", "cells"])
def test_selected_positions_are_named(tiny_model, tasks_file, tmp_path, positions):
    every = items_of(tiny_model, tasks_file, tmp_path / "all", "--teacher_forcing")
    chosen = items_of(
        *(tiny_model, tasks_file, tmp_path / "some", "--teacher_forcing"),
        *("--token_positions", positions),
    )
    for key, item in chosen.items():
        P, T = item["prompt_length"], len(item["input_ids"])
        held = {token for *_, start, stop in item["cells"] for token in range(start, stop)}
        expected = {"prompt": range(P), "answer": range(P, T), "last": [P - 1]}
        expected = expected.get(positions, sorted(held))
        assert item["positions"].dtype == np.int32
        assert item["positions"].tolist() == list(expected)
        for name, states in item["activations"].items():
            whole = every[key]["activations"][name][item["positions"]]
            np.testing.assert_allclose(
                states.astype(np.float32), whole.astype(np.float32), atol=2e-3
            )


def test_prompt_alone(tiny_model, tasks_file, tmp_path):
    flags = ["--max_output_tokens", 0, "--no_logits", "--layers_to_extract", 1]
    items = items_of(tiny_model, tasks_file, tmp_path, *flags)
    generated = items_of(
        *(tiny_model, tasks_file, tmp_path / "g", "--max_output_tokens", 5),
        *("--layers_to_extract", 1),
    )
    for key, item in items.items():
        assert "output_logits" not in item and item["teacher_forced"] is False
        assert len(item["input_ids"]) == item["prompt_length"]
        assert item["output_logprobs"].shape == (0,)
        states = generated[key]["activations"]["resid_post.1"][: item["prompt_length"]]
        np.testing.assert_allclose(
            item["activations"]["resid_post.1"].astype(np.float32),
            states.astype(np.float32),
            atol=2e-3,
        )
    predictions = json.loads((tmp_path / "predictions.json").read_text())
    assert all(sample["attempts"] == [] for task in predictions.values() for sample in task)


def test_several_predictions(tiny_model, tasks_file, tmp_path):
    """The first is the greedy one, and its states are kept; the others differ with the seed."""

    def attempts(name, *flags):
        base = ["--max_output_tokens", 16, *flags]
        items_of(tiny_model, tasks_file, tmp_path / name, *base)
        predictions = json.loads((tmp_path / name / "predictions.json").read_text())
        return [[a["text"] for a in s["attempts"]] for task in predictions.values() for s in task]

    greedy = attempts("greedy")
    three = attempts("three", "--predictions_per_task", 3, "--temperature", 1)
    other = attempts("other", "--predictions_per_task", 3, "--temperature", 1, "--seed", 1)
    assert [a[:1] for a in three] == [a[:1] for a in other] == greedy
    assert all(len(a) == 3 and a[1] != a[2] for a in three)
    assert [a[1:] for a in three] != [a[1:] for a in other]


def test_dry_run_is_exact(tiny_model, tasks_file, tmp_path):
    """Tokens, samples, shards and bytes before the run are those after it."""
    flags = ["--teacher_forcing", "--save_every_n_samples", 3]
    tokens, shards = plan_storage(planned(tiny_model, tasks_file, tmp_path, *flags))
    assert not (tmp_path / "acts").exists()
    run(planned(tiny_model, tasks_file, tmp_path, *flags), NoSignals())
    manifest = json.loads((tmp_path / "acts" / "metadata.json").read_text())
    assert tokens == manifest["total_tokens"]
    written = [(entry["num_samples"], entry["size_bytes"]) for entry in manifest["files"]]
    assert shards == written
    sizes = [(tmp_path / "acts" / e["filename"]).stat().st_size for e in manifest["files"]]
    assert [size for _, size in shards] == sizes


def test_long_prompts_lose_whole_train_pairs(tiny_model, tasks_file, tmp_path):
    """No more than needed, from the front; what does not fit with one pair is skipped."""
    full = planned(tiny_model, tasks_file, tmp_path, "--max_output_tokens", 10)
    longest = max(full.samples, key=lambda sample: sample.length.prompt)
    assert longest.num_train_pairs == len(longest.task.train) > 1
    limit = longest.length.prompt + 10
    for room, lost in ((limit, 0), (limit - 1, 1)):
        cut = planned(
            *(tiny_model, tasks_file, tmp_path),
            *("--max_output_tokens", 10, "--max_model_len", room),
        )
        sample = next(sample for sample in cut.samples if sample.key == longest.key)
        assert sample.num_train_pairs == longest.num_train_pairs - lost
    smallest = min(sample.length.prompt for sample in full.samples)
    least = planned(
        *(tiny_model, tasks_file, tmp_path / "least"),
        *("--max_output_tokens", 10, "--max_model_len", smallest + 10),
    )
    assert {sample.num_train_pairs for sample in least.samples} == {1}
    assert len(least.samples) + len(least.skipped) == 8
    assert "does not fit" in least.skipped[0]["reason"]
    manifest = run(least, NoSignals())
    assert manifest["skipped"] == list(least.skipped)
    predictions = json.loads((tmp_path / "least" / "predictions.json").read_text())
    skipped = least.skipped[0]
    entry = predictions[skipped["task_id"]][skipped["sample_idx"]]
    assert (entry["attempts"], entry["correct"]) == ([], False)


def test_without_ground_truth_nothing_is_scored(tiny_model, tasks_file, tmp_path):
    alone = tmp_path / "tasks.json"
    shutil.copy(tasks_file, alone)
    items = items_of(tiny_model, alone, tmp_path / "out", "--max_output_tokens", 4)
    assert all(item["target"] is None and item["correct"] is None for item in items.values())
    manifest = json.loads((tmp_path / "out" / "acts" / "metadata.json").read_text())
    assert manifest["scores"]["outputs_solved"]["share"] is None


def test_float16_overflow_is_kept_as_float32(tiny_model, tasks_file, tmp_path):
    """A state beyond 65,504 reaches the disk as the number it is, and is counted."""
    from safetensors.numpy import load_file, save_file

    model = tmp_path / "model"
    shutil.copytree(tiny_model, model)
    tensors = load_file(model / "model.safetensors")
    name = "model.layers.1.mlp.down_proj.weight"
    tensors[name] = (tensors[name].astype(np.float32) * 1e6).astype(tensors[name].dtype)
    save_file(tensors, model / "model.safetensors")
    items = items_of(
        *(model, tasks_file, tmp_path / "out", "--max_output_tokens", 0),
        *("--layers_to_extract", 0, 1),
    )
    manifest = json.loads((tmp_path / "out" / "acts" / "metadata.json").read_text())
    assert manifest["float16_overflows"] == len(items)
    for item in items.values():
        assert item["activations"]["resid_post.0"].dtype == np.float16
        states = item["activations"]["resid_post.1"]
        assert states.dtype == np.float32
        assert np.isfinite(states).all() and np.abs(states).max() > 65504


def test_a_run_with_an_adapter_beside_one_without(tiny_model, tasks_file, tmp_path, in_shell):
    """Both have the same samples, tokens and cells, so their states can be paired; a run with the
    adapter is not one without it."""
    module, shape = "model.layers.1.mlp.down_proj", (32, 64)
    write_adapter(tmp_path / "lora", {module: shape}, base_model_name_or_path=str(tiny_model))
    flags = ["--teacher_forcing", "--layers_to_extract", "all", "--activation_dtype", "float32"]
    plain, tuned, named = tmp_path / "plain", tmp_path / "tuned", tmp_path / "named"
    items_of(tiny_model, tasks_file, plain, *flags)
    items_of(tiny_model, tasks_file, tuned, *flags, "--adapter", tmp_path / "lora")
    items_of(tmp_path / "lora", tasks_file, named, *flags)  # which names its base
    manifests = [
        json.loads((folder / "acts" / "metadata.json").read_text())
        for folder in (plain, tuned, named)
    ]
    adapters = [manifest["model"].pop("adapter") for manifest in manifests]
    assert adapters[0] is None and adapters[1] == adapters[2]
    assert adapters[1]["path"] == str(tmp_path / "lora") and len(adapters[1]["hash"]) == 64
    assert manifests[0]["model"] == manifests[1]["model"] == manifests[2]["model"]
    for layer, changed in enumerate([False, True]):
        rows = [
            ActivationDataset(folder / "acts", Selection(layer)).rows()
            for folder in (plain, tuned, named)
        ]
        for name in ("samples", "tokens", "token_ids", "cells"):
            values = [getattr(row, name) for row in rows]
            assert np.array_equal(values[0], values[1]), name
        assert np.array_equal(rows[0].activations, rows[1].activations) is not changed
        assert np.array_equal(rows[1].activations, rows[2].activations)
    found = contrast(plain / "acts", tuned / "acts")
    assert len(found.pairs) == 8 and all(one == two for one, two in found.pairs)
    for (name, _), difference in found.differences.items():
        assert difference.any() == (int(name.rpartition(".")[2]) >= 1)
    paths = ["--model_path", tiny_model, "--dataset_path", tasks_file, "--dtype", "float32"]
    paths += ["--output_path", tuned / "predictions.json", "--activations_dir", tuned / "acts"]
    code, _, err = in_shell(script, [*paths, *flags, "--resume"])
    assert code == 2 and "model.adapter was {'path'" in err and "is None" in err


def test_the_manifest_says_what_was_run(tiny_model, tasks_file, tmp_path):
    items = items_of(tiny_model, tasks_file, tmp_path, "--max_output_tokens", 4)
    manifest = json.loads((tmp_path / "acts" / "metadata.json").read_text())
    assert manifest["status"] == "complete"
    assert manifest["total_samples"] == len(items) == 8
    assert manifest["total_tokens"] == sum(len(item["input_ids"]) for item in items.values())
    assert manifest["activations"]["resid_post.1"] == {
        "hook_point": "resid_post",
        "layer": 1,
        "width": 32,
        "dtype": "float16",
    }
    keys = [
        "model",
        "dataset",
        "prompt",
        "arguments",
        "versions",
        "devices",
        "mesh_shape",
        "processes",
        "seconds",
    ]
    assert set(keys) < set(manifest)
    assert set(manifest["versions"]) == {"python", "jax", "flax", "transformers", "numpy", "commit"}
    if (ROOT / ".git").exists():
        head = subprocess.check_output(["git", "rev-parse", "HEAD"], cwd=ROOT, text=True)
        assert manifest["versions"]["commit"] == head.strip()
    rate = manifest["total_tokens"] / manifest["seconds"]
    assert manifest["tokens_per_second"] == pytest.approx(rate)


def test_the_quick_start_snippet_runs_unchanged(tiny_model, tasks_file, tmp_path):
    """Step 3A's command with its defaults but the answer's length, then step 4's snippet."""
    quickstart = SHARED / "quickstart.md"
    if not quickstart.exists():
        pytest.skip("the quick start is not here")
    command = (
        f"simple_extraction_inference.py --model_path {tiny_model} --dataset_path {tasks_file} "
        "--output_path results/predictions.json --activations_dir results/activations "
        "--max_tasks 100 --save_every_n_samples 50 --max_output_tokens 8"
    )
    result = run_script(*command.split(), cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    code = re.search(r"```python\n(.*?)```", quickstart.read_text(), re.S)[1]
    loaded = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)], cwd=tmp_path, capture_output=True, text=True
    )
    assert "Total samples: 8" in loaded.stdout, loaded.stderr
    assert "Activations shape: (8, " in loaded.stdout
