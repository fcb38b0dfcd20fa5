"""Quantised checkpoints: the weights and states of what they are worth, and what misfits."""

import contextlib
import copy
import itertools
import json
from pathlib import Path

import jax
import numpy as np
import pytest
from checkpoints import write_adapter, write_random_checkpoint
from conftest import TINY
from parity import TOLERANCE, load_engine, prefill, worst_error
from quantize import CASES, quantized
from safetensors.numpy import load_file, save_file

from utils.errors import UserError
from utils.model.adapters import read_adapter
from utils.model.config import ModelConfig
from utils.model.files import stored_in
from utils.model.layout import Layout, make_mesh, single_device_mesh
from utils.model.quantized import quantization_of
from utils.model.schemes import Module
from utils.model.weights import Checkpoint, misfits

FIELDS = {**TINY, "num_hidden_layers": 2, "tie_word_embeddings": False}
WEIGHTS = "model.safetensors"
GOLDEN = Path(__file__).parents[1] / "golden" / "quantized.safetensors"


UP = "model.layers.1.mlp.up_proj."


def quantize(folder, case, change=()):
    """Quantises the checkpoint in a folder; returns name -> what the weight is worth. change:
    suffix -> tensor of the module UP, None for one that is to be missing."""
    config, tensors = json.loads((folder / "config.json").read_text()), load_file(folder / WEIGHTS)
    config["quantization_config"], how = CASES[case]
    tensors, worth = quantized(tensors, how)
    (folder / "config.json").write_text(json.dumps(config))
    tensors |= {UP + suffix: value for suffix, value in dict(change).items()}
    tensors = {name: value for name, value in tensors.items() if value is not None}
    save_file(tensors, folder / WEIGHTS)
    return worth


def load(folder, mesh=None):
    config = ModelConfig.from_hf(folder)
    layout = Layout.of(config, mesh or single_device_mesh())
    return Checkpoint(folder, config).load(layout, np.float32)


def wrong_with(scheme, module):
    expected = {module.name + suffix: known for suffix, known in scheme.expected(module).items()}
    return list(misfits(expected, module.tensors))


@pytest.mark.parametrize("case", CASES)
def test_every_part_of_a_weight(case, tmp_path):
    """Also where a part begins and ends within a byte, a word, a block and a group, and where the
    last block is not full."""
    weight = np.random.default_rng(1).standard_normal((40, 80), np.float32)
    fields, how = CASES[case]
    parts, worth = how(weight)
    save_file({f"m.{suffix}": part for suffix, part in parts.items()}, tmp_path / "m.safetensors")
    tensors = {tensor.name: tensor for tensor in stored_in(tmp_path / "m.safetensors")}
    scheme = quantization_of({"quantization_config": fields})
    module = Module("m.", weight.shape, tensors)
    assert scheme.holds(module) and wrong_with(scheme, module) == []
    assert np.abs(worth - weight).max() < 0.6
    for rows in (slice(0, 40), slice(5, 31), slice(16, 32), slice(39, 40)):
        for columns in (slice(0, 80), slice(13, 70), slice(64, 80)):
            found = scheme.read(module, rows, columns)
            np.testing.assert_array_equal(found, worth[rows, columns])


@pytest.mark.parametrize("case", CASES)
def test_the_last_bit_of_what_its_library_says(case):
    """`tests/golden/make_quantized.py` stored it, in bfloat16."""
    tensors = {tensor.name: tensor for tensor in stored_in(GOLDEN)}
    expected = tensors[f"{case}.reference"].read()
    scheme = quantization_of({"quantization_config": CASES[case][0]})
    module = Module(f"{case}.", expected.shape, tensors)
    assert wrong_with(scheme, module) == []
    found = scheme.read(module, *(slice(0, n) for n in expected.shape))
    np.testing.assert_array_equal(found.astype(expected.dtype), expected)


@pytest.mark.parametrize("case", CASES)
def test_the_states_of_a_model_with_those_weights(case, tmp_path):
    """torch's, every hook point; on one device and on a mesh of four."""
    pytest.importorskip("torch", reason="torch is not installed: requirements-torch.txt")
    import reference
    import torch

    config = copy.deepcopy(reference.CASES["qwen3"][0])
    config.hidden_size, config.intermediate_size = 32, 64
    model = reference.random_model(config, seed=4)
    reference.save(model, tmp_path)
    worth = quantize(tmp_path, case)
    with torch.no_grad():
        for name, value in worth.items():
            model.get_parameter(name).copy_(torch.from_numpy(value))
    ids = np.random.default_rng(3).integers(3, config.vocab_size, 20).tolist()
    states, _ = reference.hidden_states(model, ids)
    for mesh in (None, make_mesh(2, 2, jax.devices()[:4])):
        found = prefill(load_engine(tmp_path, mesh=mesh), [ids, [5, 6]], 32, chunk=32, slots=64)
        for name, expected in states.items():
            assert worst_error(found.captures[name][0, :20], expected) < TOLERANCE, name


@pytest.fixture
def folder(tmp_path):
    write_random_checkpoint(tmp_path, FIELDS)
    return tmp_path


def test_an_adapter_of_a_quantised_model(folder, tmp_path):
    name = "model.layers.1.mlp.up_proj"
    worth = quantize(folder, "nf4_nested")
    made = write_adapter(tmp_path / "a", {name: (64, 32)})
    a, b = (made[f"base_model.model.{name}.lora_{x}.weight"] for x in "AB")
    config = ModelConfig.from_hf(folder)
    checkpoint = Checkpoint(folder, config, read_adapter(tmp_path / "a"))
    params = checkpoint.load(Layout.of(config, single_device_mesh()), np.float32)
    expected = worth[f"{name}.weight"] + np.float32(2) * (b @ a)
    np.testing.assert_allclose(params["layers_1"]["mlp"]["up"], expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize(
    ("case", "change", "message"),
    [
        ("nf4", {"weight.absmax": None}, r"missing .*up_proj\.weight\.absmax"),
        ("nf4", {"weight.quant_state.bitsandbytes__nf4": None}, r"missing .*bitsandbytes__nf4"),
        (
            "nf4",
            {"weight.quant_state.bitsandbytes__nf4": np.frombuffer(b'{"a": 1}', np.uint8)},
            r"bitsandbytes__nf4 cannot be read \('shape'\)",
        ),
        ("nf4_nested", {"weight.nested_quant_map": None}, r"missing .*weight\.nested_quant_map"),
        ("fp8_block", {"weight_scale_inv": None}, r"missing .*up_proj\.weight_scale_inv"),
        (
            "fp8_block",
            {"weight_scale_inv": np.ones((3, 1), np.float32)},
            r"weight_scale_inv has shape \[3, 1\], not \[4, 1\]",
        ),
        ("awq", {"scales": None}, r"missing .*up_proj\.scales"),
        ("gptq", {"qzeros": np.ones((1, 8), np.int16)}, r"qzeros has dtype I16, not one of I32"),
        ("pack_quantized_asymmetric", {"weight_zero_point": None}, r"missing .*weight_zero_point"),
        (
            "pack_quantized",
            {"weight_zero_point": np.ones((8, 1), np.int32)},
            r"unexpected .*zero_p",
        ),
    ],
)
def test_what_is_missing_or_misfits(folder, case, change, message):
    quantize(folder, case, change)
    with pytest.raises(UserError, match=message) as error:
        load(folder)
    assert error.value.exit_code == 2 and "\n" not in str(error.value)


def test_what_changes_no_weight_is_let_through(folder):
    """Scales of activations, and the biases of zeros that AutoGPTQ stores; not others."""
    ones = np.ones(64, np.float16)
    quantize(folder, "gptq", {"input_scale": ones, "bias": 0 * ones})
    load(folder)
    write_random_checkpoint(folder, FIELDS)
    quantize(folder, "gptq", {"bias": ones})
    with pytest.raises(UserError, match=r"unexpected .*up_proj\.bias"):
        load(folder)


_INT8 = {"group_0": {"weights": {"type": "int", "num_bits": 8, "strategy": "channel"}}}


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"quant_method": "bitsandbytes", "load_in_8bit": True}, "bitsandbytes 8-bit is not"),
        ({"load_in_8bit": True}, "bitsandbytes 8-bit is not"),
        (CASES["nf4"][0] | {"bnb_4bit_quant_type": "int4"}, "bnb_4bit_quant_type 'int4' is not"),
        (CASES["awq"][0] | {"version": "gemv"}, "version 'gemv' is not supported"),
        (CASES["awq"][0] | {"bits": 3}, "bits 3 is not supported"),
        (CASES["gptq"][0] | {"bits": 8}, "bits 8 is not supported"),
        (CASES["gptq"][0] | {"checkpoint_format": "marlin"}, "checkpoint_format 'marlin' is not"),
        (CASES["gptq"][0] | {"format": "gptq_v3"}, "format 'gptq_v3' is not"),
        (CASES["gptq"][0] | {"group_size": 0}, "group_size 0 is not"),
        (CASES["fp8_block"][0] | {"fmt": "e5m2"}, "fmt 'e5m2' is not supported"),
        (CASES["fp8_block"][0] | {"weight_block_size": [16]}, r"a block of \[16\] is not"),
        (CASES["pack_quantized"][0] | {"format": "int-quantized"}, "format 'int-quantized' is not"),
        (CASES["pack_quantized"][0] | {"config_groups": _INT8}, "num_bits 8 is not"),
        (CASES["pack_quantized"][0] | {"sparsity_config": {"format": "sparse-24"}}, "sparse weig"),
        (CASES["pack_quantized"][0] | {"config_groups": {}}, "config_groups differ or are none"),
        ({"quant_method": "hqq"}, "quant_method 'hqq' is not supported; supported: bitsandbytes"),
        ([4], "quantization_config holds what it cannot"),
    ],
)  # fmt: skip
def test_what_is_not_supported_is_named(fields, message):
    with pytest.raises(UserError, match=message):
        quantization_of({"quantization_config": fields})


def test_a_field_of_the_wrong_type_never_crashes():
    wrong = (-1, 0, 1.5, True, "x", [], [[]], {}, {"x": []}, {"format": []}, [{}] * 2, None)
    for fields, _ in CASES.values():
        extra = ("transform_config", "sparsity_config", "format", "version", "fmt", "pack_dtype")
        for field, value in itertools.product((*fields, *extra), wrong):
            with contextlib.suppress(UserError):  # or it is a field that is not looked at
                quantization_of({"quantization_config": {**fields, field: value}})
