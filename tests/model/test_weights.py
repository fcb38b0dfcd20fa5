"""Checkpoints on disk -> parameters: formats, sharding, memory, and everything that misfits."""

import json
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from checkpoints import outline, write_random_checkpoint
from conftest import ROOT, TINY
from flax.traverse_util import flatten_dict
from safetensors.numpy import load_file, save_file

from utils.errors import UserError
from utils.model.config import MODEL_TYPES, ModelConfig
from utils.model.decoder import Decoder
from utils.model.layout import Layout, make_mesh, single_device_mesh
from utils.model.weights import TABLE, Checkpoint, parameters


@pytest.fixture
def folder(tmp_path) -> Path:
    write_random_checkpoint(tmp_path, TINY)
    return tmp_path


def load(folder, dtype=np.float32):
    config = ModelConfig.from_hf(folder)
    return Checkpoint(folder, config).load(Layout.of(config, single_device_mesh()), dtype)


def edit(folder, change):
    """Rewrites the weights as `change`, a function of the dict of tensors, leaves them."""
    path = folder / "model.safetensors"
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path)


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("family", MODEL_TYPES)
def test_the_table_has_the_parameters_of_the_decoder(family, tied):
    """The same paths and shapes, in the same order, for every family."""
    fields = {**TINY, "model_type": family, "tie_word_embeddings": tied, "num_hidden_layers": 11}
    if family == "llama":
        fields |= {"attention_bias": True, "mlp_bias": True}
    config = ModelConfig.from_dict(fields)
    model = Decoder(config, Layout.of(config, single_device_mesh()))
    tokens = jax.ShapeDtypeStruct((1, 1), jnp.int32)
    tree = jax.eval_shape(
        lambda t: model.init(jax.random.key(0), t, t, method=Decoder.initialize), tokens
    )
    leaves = flatten_dict(tree["params"], sep="/")
    found = [(path, parameter.shape) for path, parameter in parameters(config).items()]
    assert found == [(path, leaf.shape) for path, leaf in leaves.items()]
    rows = [row for row in TABLE if row.is_of(config)]
    assert len({row.path for row in rows}) == len({row.hf for row in rows}) == len(rows)


def test_names_and_paths_are_each_other_s_reverse():
    config = ModelConfig.from_dict({**TINY, "model_type": "qwen3", "tie_word_embeddings": False})
    found = parameters(config)
    paths = {name: path for path, parameter in found.items() for name in parameter.names}
    assert list(paths.values()) == list(found)
    query = found["layers_1/attention/query"].names
    assert query == ["model.layers.1.self_attn.q_proj.weight"]
    assert "model.layers.3.self_attn.rotary_emb.inv_freq" not in paths


def test_values_arrive_in_place(folder):
    tensors = load_file(folder / "model.safetensors")
    params = load(folder)
    stored = tensors["model.layers.1.self_attn.q_proj.weight"].astype(np.float32)
    query = np.asarray(params["layers_1"]["attention"]["query"])
    H = query.shape[1]
    for n, h in [(0, 0), (0, H - 1), (3, 2)]:
        np.testing.assert_array_equal(query[n, h], stored[n * H + h])
    out = np.asarray(params["layers_1"]["attention"]["out"])
    stored = tensors["model.layers.1.self_attn.o_proj.weight"].astype(np.float32)
    np.testing.assert_array_equal(out[:, 2, 3], stored[:, 2 * H + 3])


@pytest.mark.parametrize("dtype", [np.float32, jnp.bfloat16, np.float16])
def test_dtypes_on_disk(folder, dtype):
    expected = load(folder)

    def cast(tensors):
        tensors.update({name: value.astype(dtype) for name, value in tensors.items()})

    edit(folder, cast)
    for a, b in zip(jax.tree.leaves(expected), jax.tree.leaves(load(folder)), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-7)  # float16 rounds what is below 6e-5


@pytest.mark.parametrize("shape", [(4, 2), (2, 4), (1, 8)])
def test_parts_of_a_tensor_are_read_as_the_sharding_asks(folder, shape):
    """Every shard equals that block of the whole parameter, with zeros where it does not divide;
    no more is read from the disk than one data group holds."""
    config = ModelConfig.from_hf(folder)
    whole = load(folder)
    layout = Layout.of(config, make_mesh(*shape))
    assert layout.by_heads == (shape[1] == 2)
    checkpoint = Checkpoint(folder, config)
    parts = checkpoint.load(layout, np.float32)
    for a, b in zip(jax.tree.leaves(whole), jax.tree.leaves(parts), strict=True):
        assert all(n <= m for n, m in zip(a.shape, b.shape, strict=True))
        padded = np.pad(a, [(0, m - n) for n, m in zip(a.shape, b.shape, strict=True)])
        np.testing.assert_array_equal(padded, b)
    kernel = parts["layers_0"]["mlp"]["up"]
    assert kernel.addressable_shards[0].data.shape == (64 // shape[1], 32)
    held = [leaf.addressable_shards[0].data.size for leaf in jax.tree.leaves(parts)]
    assert sum(held) < 1.2 * sum(leaf.size for leaf in jax.tree.leaves(whole)) / shape[1]


def test_a_device_can_have_padding_alone(tmp_path):
    """Of nine rows over eight devices, two each, the last three have none."""
    write_random_checkpoint(tmp_path, {**TINY, "intermediate_size": 9})
    config = ModelConfig.from_hf(tmp_path)
    loaded = Checkpoint(tmp_path, config).load(Layout.of(config, make_mesh(1, 8)), np.float32)
    up = np.asarray(loaded["layers_0"]["mlp"]["up"])
    assert up.shape == (16, 32) and up[:9].any(axis=1).all() and not up[9:].any()


def test_all_misfits_in_one_error(folder):
    def change(tensors):
        del tensors["model.layers.1.mlp.up_proj.weight"]
        tensors["model.layers.9.mlp.up_proj.weight"] = np.zeros((64, 32), np.float32)
        tensors["model.norm.weight"] = np.ones(31, np.float32)
        tensors["model.layers.0.mlp.down_proj.weight"] = np.zeros((32, 64), np.int8)
        tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = np.ones(4, np.float32)

    edit(folder, change)
    with pytest.raises(UserError) as error:
        load(folder)
    message = str(error.value)
    assert "missing model.layers.1.mlp.up_proj.weight" in message
    assert "unexpected model.layers.9.mlp.up_proj.weight" in message
    assert "model.norm.weight has shape [31], not [32]" in message
    assert "down_proj.weight has dtype I8" in message
    assert "inv_freq" not in message  # old checkpoints carry it; the configuration says the same


def test_a_head_beside_tied_embeddings(folder):
    edit(folder, lambda t: t.update({"lm_head.weight": t["model.embed_tokens.weight"].copy()}))
    load(folder)
    edit(folder, lambda t: t.update({"lm_head.weight": t["lm_head.weight"] + np.float32(1)}))
    with pytest.raises(UserError, match="tie_word_embeddings"):
        load(folder)


def test_damaged_file(folder):
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(UserError, match=r"model\.safetensors is damaged"):
        load(folder)


def test_fingerprint_sees_one_bit(folder):
    def print_of():
        return Checkpoint(folder, ModelConfig.from_hf(folder)).fingerprint()

    before = print_of()
    assert before == print_of()
    path = folder / "model.safetensors"
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    assert print_of() != before


def test_peak_memory_of_loading(tmp_path):
    """Below 1.3 times the parameters' size plus 0.5 GB, all of the process counted."""
    fields = {
        **TINY,
        "vocab_size": 100_000,
        "hidden_size": 1024,
        "intermediate_size": 4096,
        "num_hidden_layers": 12,
        "num_attention_heads": 16,
    }
    (tmp_path / "config.json").write_text(json.dumps(fields))
    outline(tmp_path)
    code = f"""
import re, jax, numpy as np
from utils.model.config import ModelConfig
from utils.model.layout import Layout, single_device_mesh
from utils.model.weights import Checkpoint
config = ModelConfig.from_hf({str(tmp_path)!r})
layout = Layout.of(config, single_device_mesh())
params = Checkpoint({str(tmp_path)!r}, config).load(layout, np.float32)
jax.block_until_ready(params)
size = sum(leaf.nbytes for leaf in jax.tree.leaves(params))
# Not getrusage, which counts what the parent held when it started this process.
peak = int(re.search(r"VmHWM:\\s+(\\d+)", open("/proc/self/status").read())[1]) * 1024
print(size, peak)
"""
    result = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True
    )
    size, peak = map(int, result.stdout.split())
    assert size > 1e9
    assert peak < 1.3 * size + 0.5e9
