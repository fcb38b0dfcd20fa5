"""LoRA adapters: what they add, whom they fit, and the same states as peft's merged model."""

import contextlib
import copy
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from checkpoints import write_adapter, write_random_checkpoint
from conftest import TINY
from parity import TOLERANCE, load_engine, prefill, worst_error
from safetensors.numpy import load_file, save_file

from utils.errors import UserError
from utils.model.adapters import _KNOWN, base_and_adapter, read_adapter
from utils.model.config import ModelConfig
from utils.model.layout import Layout, make_mesh, single_device_mesh
from utils.model.weights import Checkpoint

UP, QUERY = "model.layers.1.mlp.up_proj", "model.layers.0.self_attn.q_proj"
SHAPES = {UP: (64, 32), QUERY: (32, 32)}
WEIGHTS = "adapter_model.safetensors"


@pytest.fixture
def base(tmp_path):
    write_random_checkpoint(tmp_path / "base", TINY)
    return tmp_path / "base"


def load(base, adapter, mesh=None, dtype=np.float32):
    config, adapter = ModelConfig.from_hf(base), adapter and read_adapter(adapter)
    config = config if adapter is None else adapter.untied(config)
    layout = Layout.of(config, mesh or single_device_mesh())
    return Checkpoint(base, config, adapter).load(layout, dtype)


@pytest.mark.parametrize(
    ("fields", "scalings"),
    [
        ({}, (2, 2)),
        ({"use_rslora": True}, (4 / 2**0.5, 4 / 2**0.5)),
        # As peft matches: a whole part of the name at its end; the first that does.
        ({"alpha_pattern": {"proj": 9, "layers.1.mlp.up_proj": 6, ".*up_proj": 8}}, (3, 2)),
        ({"r": 5, "rank_pattern": {"up_proj": 2, r".*\.q_proj": 2}}, (2, 2)),
        ({"fan_in_fan_out": True, "lora_dropout": 0.5, "init_lora_weights": "eva"}, (2, 2)),
    ],
)
def test_what_is_added(base, tmp_path, fields, scalings):
    """In float32, to what the base has in bfloat16; on a mesh too, and cast at the end."""
    made = write_adapter(tmp_path / "a", SHAPES, **fields)
    plain, merged = load(base, None), load(base, tmp_path / "a")
    changed = {"layers_1": ("mlp", "up", UP), "layers_0": ("attention", "query", QUERY)}
    for (layer, (part, name, module)), scaling in zip(changed.items(), scalings, strict=True):
        a, b = (made[f"base_model.model.{module}.lora_{x}.weight"] for x in "AB")
        before = np.asarray(plain[layer][part][name])
        expected = before + np.float32(scaling) * (b @ a).reshape(before.shape)
        np.testing.assert_allclose(merged[layer][part][name], expected, rtol=1e-5, atol=1e-6)
    leaves = zip(jax.tree.leaves(plain), jax.tree.leaves(merged), strict=True)
    assert [np.array_equal(*pair) for pair in leaves].count(False) == 2
    parts = load(base, tmp_path / "a", make_mesh(2, 2, jax.devices()[:4]))
    cast = load(base, tmp_path / "a", dtype=jnp.bfloat16)
    for whole, split, rounded in zip(*map(jax.tree.leaves, (merged, parts, cast)), strict=True):
        np.testing.assert_allclose(whole, split, rtol=1e-6, atol=1e-7)
        np.testing.assert_array_equal(whole.astype(jnp.bfloat16), rounded)


def drop_a_factor(folder):
    tensors = load_file(folder / WEIGHTS)
    del tensors[f"base_model.model.{UP}.lora_B.weight"]
    save_file(tensors, folder / WEIGHTS)


BAD = {
    "dora": ({"use_dora": True}, SHAPES, r"a: use_dora is not supported: only plain LoRA"),
    "loha": ({"peft_type": "LOHA"}, SHAPES, r"peft_type 'LOHA' is not supported"),
    "pissa": ({"init_lora_weights": "pissa_niter_4"}, SHAPES, r"pissa_niter_4 changes the base"),
    "tokens": ({"trainable_token_indices": [3]}, SHAPES, r"trainable_token_indices is not supp"),
    "new": ({"use_wonders": 1}, SHAPES, r"use_wonders is not supported"),
    "rank": ({"r": 4}, SHAPES, r"A \[2, 32\] and B \[32, 2\] of .*q_proj are not of rank 4"),
    "alpha": ({"lora_alpha": "4"}, SHAPES, r"a: lora_alpha '4' of .* is no number"),
    "pattern": ({"alpha_pattern": {"(": 1}}, SHAPES, r"a: .*unterminated subpattern"),
    "shape": ({}, {UP: (48, 32)}, r"another model than .*base: .*\[64, 32\], .*\[48, 32\]"),
    "name": ({}, {f"{UP}s": (64, 32)}, r"of another model than .*: no .*up_projs\.weight"),
    "norm": ({}, {"model.norm": (32, 32)}, r"model\.norm\.weight has shape \[32\], .*\[32, 32\]"),
    "tied head": ({}, {"lm_head": (288, 32)}, r"adds to lm_head\.weight, which the model uses"),
}


@pytest.mark.parametrize("case", BAD)
def test_what_is_refused(base, tmp_path, case):
    """Before the weights of the model are read."""
    fields, shapes, message = BAD[case]
    write_adapter(tmp_path / "a", shapes, **fields)
    with pytest.raises(UserError, match=message) as error:
        load(base, tmp_path / "a")
    assert error.value.exit_code == 2 and "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (drop_a_factor, r"lora_B of model\.layers\.1\.mlp\.up_proj is missing"),
        (lambda folder: (folder / WEIGHTS).unlink(), rf"a has no {WEIGHTS}: copy it"),
        (lambda folder: (folder / WEIGHTS).write_bytes(b"x" * 20), "damaged or not a safetensors"),
        (lambda folder: save_file({}, folder / WEIGHTS), "holds no tensors"),
        (lambda folder: (folder / "adapter_config.json").unlink(), r"--adapter .*a has no adapter"),
        (lambda folder: (folder / "adapter_config.json").write_text("["), "cannot be read as JSON"),
    ],
)
def test_a_damaged_adapter(base, tmp_path, change, message):
    write_adapter(tmp_path / "a", SHAPES)
    change(tmp_path / "a")
    with pytest.raises(UserError, match=message):
        load(base, tmp_path / "a")


def test_a_field_of_the_wrong_type_never_crashes(tmp_path):
    wrong = (-1, 0, 1.5, True, "x", [], [[]], {}, {"(": 1}, {"up_proj": "x"}, None)
    for field, value in itertools.product(sorted(_KNOWN), wrong):
        write_adapter(tmp_path, {UP: (2, 3)}, **{field: value})
        with contextlib.suppress(UserError):  # or it is a field that is not looked at
            read_adapter(tmp_path)


def test_a_folder_that_is_an_adapter_names_its_base(base, tmp_path, monkeypatch):
    folder = tmp_path / "a"
    write_adapter(folder, SHAPES, base_model_name_or_path=str(base))
    assert base_and_adapter(str(folder), None) == (base, folder)
    assert base_and_adapter(str(base), str(folder)) == (base, folder)
    assert base_and_adapter(str(base), None) == (base, None)
    with pytest.raises(UserError, match="is an adapter, and so is --adapter"):
        base_and_adapter(str(folder), str(folder))
    write_adapter(folder, SHAPES, base_model_name_or_path="base")
    monkeypatch.chdir(tmp_path)
    assert base_and_adapter(str(folder), None)[0].samefile(base)
    write_adapter(folder, SHAPES, base_model_name_or_path="Qwen/Qwen2-0.5B")
    with pytest.raises(UserError, match=r"'Qwen/Qwen2-0.5B' is no folder here: give --model_path"):
        base_and_adapter(str(folder), None)
    write_adapter(folder, SHAPES, base_model_name_or_path=str(folder))
    with pytest.raises(UserError, match=r"and so is its base"):
        base_and_adapter(str(folder), None)
    write_adapter(base, SHAPES)
    with pytest.raises(UserError, match=r"holds a whole model and adapter_config.json: move"):
        base_and_adapter(str(base), None)


LINEAR = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
# name -> whether the base ties its embeddings, what peft is asked for
PEFT = {
    "all linear layers": (True, {"target_modules": LINEAR}),
    "patterns": (
        True,
        {
            "target_modules": ["q_proj", "down_proj"],
            "use_rslora": True,
            "rank_pattern": {r"layers\.1\.self_attn\.q_proj": 3},
            "alpha_pattern": {"down_proj": 5, "layers.1.self_attn.q_proj": 7},
            "fan_in_fan_out": True,
        },
    ),
    "biases": (True, {"target_modules": ["v_proj"], "bias": "all"}),
    "embeddings": (
        False,
        {"target_modules": ["v_proj"], "modules_to_save": ["embed_tokens", "lm_head"]},
    ),
    "a head that was tied": (True, {"target_modules": ["up_proj"], "modules_to_save": ["lm_head"]}),
    "an embedding that was tied": (
        True,
        {"target_modules": ["up_proj"], "modules_to_save": ["embed_tokens"]},
    ),
    "low rank embeddings": (False, {"target_modules": ["embed_tokens", "lm_head", "k_proj"]}),
}


@pytest.mark.parametrize("case", PEFT)
def test_the_states_of_peft_s_merged_model(case, tmp_path):
    """Every hook point, and the logits; on one device and on a mesh."""
    peft = pytest.importorskip("peft", reason="peft is not installed: requirements-torch.txt")
    import reference
    import torch

    tied, asked = PEFT[case]
    config = copy.deepcopy(reference.CASES["qwen2"][0])
    config.tie_word_embeddings = tied
    model = reference.random_model(config, seed=5)
    reference.save(model, tmp_path / "base")
    torch.manual_seed(0)
    wrapped = peft.get_peft_model(model, peft.LoraConfig(r=4, lora_alpha=6, **asked))
    with torch.no_grad():
        for name, value in wrapped.named_parameters():
            if "lora_" in name:
                value.copy_(0.3 * torch.randn(value.shape))
            elif "modules_to_save" in name or ("bias" in name and asked.get("bias")):
                value.add_(0.1 * torch.randn(value.shape))
    wrapped.save_pretrained(tmp_path / "adapter")
    merged = wrapped.merge_and_unload()
    ids = np.random.default_rng(3).integers(3, config.vocab_size, 20).tolist()
    states, logits = reference.hidden_states(merged, ids)
    for mesh in (None, make_mesh(2, 2, jax.devices()[:4])):
        engine = load_engine(tmp_path / "base", mesh=mesh, adapter=tmp_path / "adapter")
        found = prefill(engine, [ids, [5, 6]], 32, chunk=32, slots=64)
        for name, expected in states.items():
            assert worst_error(found.captures[name][0, :20], expected) < TOLERANCE, name
        size = logits.shape[-1]
        np.testing.assert_allclose(found.logits[0, :size], logits[-1], rtol=1e-4, atol=1e-4)
