"""config.json in both forms of transformers; each field is read, refused, or changes nothing."""

import dataclasses
import json
import logging
import math

import pytest
from conftest import TINY

from utils.errors import UserError
from utils.model.config import _HARMLESS, _OF_WEIGHTS, _REFUSED, FAMILIES, MODEL_TYPES, ModelConfig

LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64}


def config(**fields):
    merged = {**TINY, "num_hidden_layers": 4, **fields}
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
        ({"quantization": {"bits": 4}}, ("quantization", "MLX")),
        ({"is_causal": False}, ("is_causal",)),
        ({"model_type": "mistral", "layer_types": ["full_attention"] * 4}, ("layer_types",)),
        ({"hidden_act": "gelu"}, ("gelu", "silu")),
        ({"partial_rotary_factor": 0.5}, ("partial_rotary_factor",)),
        ({"rope_scaling": {"rope_type": "longrope", "factor": 2}}, ("longrope", "yarn")),
        ({"rope_scaling": {"rope_type": "dynamic", "factor": 2}}, ("dynamic", "llama3")),
        ({"rope_scaling": {"rope_type": "linear"}}, ("linear", "factor")),
        (
            {"rope_scaling": {"rope_type": "linear", "factor": 2}, "rope_parameters": LLAMA3},
            ("rope_scaling", "rope_parameters", "differ"),
        ),
        ({"rope_theta": ...}, ("rope_theta", "missing")),
        ({"rope_theta": 1.0, "rope_scaling": YARN}, ("rope_theta", "above 1", "yarn")),
        ({"rope_scaling": {**YARN, "truncate": 1}}, ("truncate", "true or false")),
        ({"rope_scaling": {**LLAMA3, "low_freq_factor": 4}}, ("low_freq_factor", "below")),
        ({"rope_parameters": {"rope_theta": 5.0}}, ("rope_theta", "5.0", "10000.0")),
        ({"rope_parameters": {"full_attention": {"rope_theta": 1e4}}}, ("per layer type",)),
        ({"num_key_value_heads": 3}, ("num_key_value_heads", "3")),
        ({"num_hidden_layers": 0}, ("num_hidden_layers",)),
        ({"hidden_size": "32"}, ("hidden_size",)),
        ({"head_dim": 7}, ("head_dim", "7")),
        ({"rms_norm_eps": ...}, ("rms_norm_eps",)),
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


def test_rope_parameters_and_rope_scaling_that_say_the_same():
    scaling = {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64}
    new = {**scaling, "rope_type": "yarn", "rope_theta": 1e4, "attention_factor": None}
    assert config(rope_scaling=scaling, rope_parameters=new) == config(rope_scaling=scaling)


def test_what_training_leaves_behind_is_harmless(caplog):
    caplog.set_level(logging.INFO)
    assert config(torch_dtype="bfloat16", use_cache=False, _commit_hash="x", prefix="") == config()
    assert not caplog.messages


# As in files of Qwen2.5, of SmolLM2, and in one that was written in full.
IGNORED = {
    "use_mrope": False,
    "is_llama_config": True,
    "rope_interleaved": True,
    "temperature": 0.7,
    "pruned_heads": {},
    "num_experts": 8,
    "logit_softcap": 30.0,
}


def test_what_the_class_never_reads_is_ignored_and_named(caplog):
    caplog.set_level(logging.INFO)
    rope = {"rope_type": "linear", "factor": 2.0}
    written = config(**IGNORED, attention_bias=True, mlp_bias=True, rope_scaling=rope | {"beta": 1})
    assert written == config(rope_scaling=rope)
    (line,) = caplog.messages
    for name in (*IGNORED, "attention_bias", "mlp_bias", "beta of rope_type linear"):
        assert name in line


# Names that transformers looks for in all configurations, with values that change no model of text.
LOOKED_FOR = {
    "num_heads": 7,
    "mlp_layer_types": ["dense"] * 4,
    "mtp_layer_types": ["full_attention"] * 4,
    "distributed_config": {},
    "vision_aspect_ratio": "anyres",
    "vision_feature_layer": 1,
    "vision_feature_select_strategy": "full",
}
SIZES = ("hidden_size", "intermediate_size", "num_hidden_layers")
SMALL = {
    **TINY,
    "num_hidden_layers": 4,
    "hidden_size": 256,
    "num_attention_heads": 32,
    "sliding_window": 3,
    "head_dim": 8,
}
FEW_EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32}


def small(family):
    experts = FEW_EXPERTS if family == "qwen3_moe" else {}
    return {**SMALL, **experts, "model_type": family}


def test_fields_that_families_read_in_ways_of_their_own():
    def of(family, **fields):
        return ModelConfig.from_dict({**small(family), **fields})

    caps = {family: of(family, attn_logit_softcapping=9.0) for family in ("gemma2", "gemma3_text")}
    assert [found.score_softcap for found in caps.values()] == [9, None]
    assert of("qwen3_moe", num_experts=128, num_local_experts=4).num_experts == 4
    assert of("qwen3_moe", num_experts_per_tok=4).experts_per_token == 4  # all of them
    assert of("gemma2", hidden_activation="gelu_new") == of("gemma2")
    with pytest.raises(UserError, match="hidden_activation 'gelu' is not supported"):
        of("gemma2", hidden_activation="gelu")  # by erf, and not by tanh
    whole = {"model_type": "gemma3", "text_config": small("gemma3_text")}
    for tied in (True, False):
        found = ModelConfig.from_dict({**whole, "tie_word_embeddings": tied})
        assert found.tie_word_embeddings is tied


@pytest.mark.parametrize("family", MODEL_TYPES)
def test_an_absent_field_takes_the_default_of_transformers_or_is_refused(family):
    transformers = pytest.importorskip("transformers")
    fields = {name: value for name, value in SMALL.items() if name in FAMILIES[family]}
    fields |= {"model_type": family} | {"use_sliding_window": True} if "qwen" in family else {}
    fields["model_type"], refused = family, set()
    for name in FAMILIES[family]:
        rest = {key: value for key, value in fields.items() if key != name}
        try:
            found = ModelConfig.from_dict(rest)
        except UserError:
            refused.add(name)
            continue
        assert found == ModelConfig.from_dict(transformers.AutoConfig.for_model(**rest).to_dict())
    needed = {
        *("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "rms_norm_eps"),
        *("num_attention_heads", "max_position_embeddings", "rope_theta"),
    }
    # The experts have a width of their own, and files of Gemma 3 are sparing.
    given = {"qwen3_moe": {"intermediate_size"}, "gemma3_text": needed - {*SIZES}}
    assert refused == needed - given.get(family, set())


def logits(config, state=None):
    """Those of torch's model of a configuration, for a few tokens, and its parameters."""
    import torch
    import transformers

    model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    if state is not None:
        model.load_state_dict(state)
    with torch.no_grad():
        return model(torch.arange(3, 11)[None]).logits, model


@pytest.mark.parametrize("family", MODEL_TYPES)
def test_every_field_of_transformers_is_read_refused_or_harmless(family, monkeypatch, tmp_path):
    """Every attribute of its class, and every name that torch's model looks for in it while it is
    made, saved, loaded, run, and asked to generate."""
    pytest.importorskip("torch", reason="torch is not installed: requirements-torch.txt")
    import torch
    import transformers

    settings = transformers.AutoConfig.for_model(**small(family))
    kind, names = type(settings), {field.name for field in dataclasses.fields(settings)}
    look_up = kind.__getattribute__

    def noted(self, name):
        if not hasattr(kind, name):
            names.add(name)
        return look_up(self, name)

    monkeypatch.setattr(kind, "__getattribute__", noted)
    logits(settings)[1].save_pretrained(tmp_path)
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path)
    model.generate(torch.arange(3, 11)[None], max_new_tokens=2, do_sample=False, pad_token_id=0)
    monkeypatch.undo()
    names = {name for name in names if not name.startswith("_")}
    names -= vars(transformers.GenerationConfig()).keys()  # how to generate is for the flags to say
    known = FAMILIES[family].keys() | _HARMLESS | _OF_WEIGHTS | _REFUSED.keys() | LOOKED_FOR.keys()
    assert names - known == set()


@pytest.mark.parametrize("family", MODEL_TYPES)
def test_what_is_let_through_changes_no_logits(family):
    """All that is harmless, all that is ignored above, and what other families read, at once."""
    pytest.importorskip("torch", reason="torch is not installed: requirements-torch.txt")
    import torch
    import transformers

    fields = small(family)
    expected, model = logits(transformers.AutoConfig.for_model(**fields))
    default = model.config.to_dict()
    changed = {"problem_type": "regression", "num_labels": 3, "architectures": ["OtherForCausalLM"]}
    changed |= {"id2label": {"0": "a", "1": "b", "2": "c"}, "label2id": {"a": 0, "b": 1, "c": 2}}
    changed |= {"dtype": "bfloat16", "torch_dtype": "bfloat16", **IGNORED, **LOOKED_FOR}
    changed |= {"auto_map": {"AutoModelForCausalLM": "other.Model"}}
    changed |= {"return_dict": True}  # with False transformers' own models end in an error
    others = {name for known in FAMILIES.values() for name in known}
    for name in (_HARMLESS | others) - FAMILIES[family].keys() - _REFUSED.keys() - {"model_type"}:
        value = default.get(name)
        other = 0.5 if type(value) is float else value + 1 if type(value) is int else not value
        changed.setdefault(name, 5 if name.endswith("_token_id") else other)
    changed = {name: value for name, value in changed.items() if name not in FAMILIES[family]}
    found, _ = logits(transformers.AutoConfig.for_model(**fields, **changed), model.state_dict())
    assert torch.equal(found, expected)


def test_the_file_is_named(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({**TINY, "hidden_size": "8"}))
    with pytest.raises(UserError, match=str(tmp_path / "config.json")):
        ModelConfig.from_hf(tmp_path)
