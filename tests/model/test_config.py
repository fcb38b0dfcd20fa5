"""config.json in both forms of transformers; what is not known is refused by name."""

import json
import math

import pytest
from conftest import TINY

from utils.errors import UserError
from utils.model.config import MODEL_TYPES, ModelConfig

LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}


def config(**fields):
    merged = {**TINY, **fields}
    return ModelConfig.from_dict({k: v for k, v in merged.items() if v is not ...})


@pytest.mark.parametrize("kind", ["type", "rope_type"])
def test_both_forms_of_rope_are_one(kind):
    scaling = {**LLAMA3, kind: "llama3"}
    old = config(model_type="llama", rope_theta=5e5, rope_scaling=scaling)
    new = config(model_type="llama", rope_theta=..., rope_parameters={"rope_theta": 5e5, **LLAMA3})
    assert old == new
    assert (new.rope.theta, new.rope.type, new.rope.factor) == (5e5, "llama3", 8.0)


def test_yarn_attention_factor():
    """0.1 ln(factor) + 1, unless the file says otherwise."""
    scaling = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64}
    assert config(rope_scaling=scaling).rope.attention_factor == 0.1 * math.log(4) + 1
    explicit = config(rope_scaling={**scaling, "attention_factor": 0.5})
    assert explicit.rope.attention_factor == 0.5
    mixed = config(rope_scaling={**scaling, "mscale": 2.0, "mscale_all_dim": 1.0})
    assert mixed.rope.attention_factor == (0.2 * math.log(4) + 1) / (0.1 * math.log(4) + 1)


@pytest.mark.parametrize(
    ("fields", "windows"),
    [
        ({"sliding_window": 8}, (None,) * 4),  # Qwen names a window and does not use it
        (
            {"sliding_window": 8, "use_sliding_window": True, "max_window_layers": 3},
            (None, None, None, 8),
        ),
        (
            {
                "sliding_window": 8,
                "use_sliding_window": True,
                "layer_types": ["sliding_attention", "full_attention"] * 2,
            },
            (8, None, 8, None),
        ),
        ({"model_type": "mistral", "sliding_window": 8}, (8,) * 4),
        ({"model_type": "mistral", "sliding_window": None}, (None,) * 4),
    ],
)
def test_sliding_windows(fields, windows):
    assert config(**fields).sliding_windows == windows


def test_head_dim_is_explicit_or_derived():
    assert config().head_dim == 8
    assert config(model_type="mistral", head_dim=16).head_dim == 16
    assert config(model_type="qwen3").head_dim == 128  # Qwen3Config's own default


@pytest.mark.parametrize(
    ("fields", "named"),
    [
        ({"model_type": "gpt2"}, ("gpt2", *MODEL_TYPES)),
        ({"model_type": ...}, ("None", *MODEL_TYPES)),
        ({"num_experts": 8}, ("num_experts", "hidden_size")),
        ({"hidden_act": "gelu"}, ("gelu", "silu")),
        ({"partial_rotary_factor": 0.5}, ("partial_rotary_factor",)),
        ({"rope_scaling": {"rope_type": "longrope", "factor": 2}}, ("longrope", "yarn")),
        ({"rope_scaling": {"rope_type": "dynamic", "factor": 2}}, ("dynamic", "llama3")),
        ({"rope_scaling": {"rope_type": "linear"}}, ("linear", "factor")),
        ({"rope_scaling": {"rope_type": "linear", "factor": 2, "beta": 1}}, ("beta",)),
        ({"rope_theta": ...}, ("rope_theta", "missing")),
        ({"rope_parameters": {"rope_theta": 5.0}}, ("rope_theta", "5.0", "10000.0")),
        ({"rope_parameters": {"full_attention": {"rope_theta": 1e4}}}, ("per layer type",)),
        ({"num_key_value_heads": 3}, ("num_key_value_heads", "3")),
        ({"num_hidden_layers": 0}, ("num_hidden_layers",)),
        ({"hidden_size": "32"}, ("hidden_size",)),
        ({"head_dim": 7}, ("head_dim", "7")),
        ({"rms_norm_eps": ...}, ("rms_norm_eps",)),
        ({"attention_bias": True}, ("attention_bias", "qwen2")),
        ({"mlp_bias": True}, ("mlp_bias",)),
        ({"layer_types": ["full_attention"]}, ("layer_types",)),
        ({"layer_types": ["sliding_attention"] * 4}, ("sliding_window",)),
        ({"model_type": "llama", "sliding_window": 8}, ("sliding_window",)),
    ],
)
def test_refused_by_name(fields, named):
    with pytest.raises(UserError) as error:
        config(**fields)
    for word in named:
        assert word in str(error.value)
    assert "\n" not in str(error.value)


def test_what_training_leaves_behind_is_harmless():
    assert config(torch_dtype="bfloat16", use_cache=False, unsloth_version="x") == config()


def test_the_file_is_named(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({**TINY, "num_experts": 8}))
    with pytest.raises(UserError, match=str(tmp_path / "config.json")):
        ModelConfig.from_hf(tmp_path)
