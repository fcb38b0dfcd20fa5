"""The reference: torch transformers on random checkpoints of every family, hooked at every point.

Needs torch. The tests compare against it live; `tests/golden/make_golden.py` stores what it says,
so that parity is tested where torch is absent too.
"""

from pathlib import Path

import numpy as np
import torch
import transformers

_BASE = {
    "vocab_size": 160,
    "hidden_size": 24,
    "intermediate_size": 40,
    "num_hidden_layers": 3,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "rms_norm_eps": 1e-5,
    "pad_token_id": None,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "initializer_range": 0.02,
}


def _config(family, **fields):
    return getattr(transformers, f"{family}Config")(**{**_BASE, **fields})


def _rope(theta=10000.0, **fields):
    return {"rope_theta": theta, **fields}


# name -> configuration, dtype on disk
CASES = {
    "qwen2": (
        _config("Qwen2", tie_word_embeddings=True, rope_parameters=_rope(1e6, rope_type="default")),
        "bfloat16",
    ),
    "qwen2_sliding_yarn": (
        _config(
            "Qwen2",
            use_sliding_window=True,
            sliding_window=7,
            max_window_layers=1,
            rope_parameters=_rope(
                rope_type="yarn", factor=4.0, original_max_position_embeddings=64
            ),
        ),
        "float32",
    ),
    "qwen3": (
        _config(
            "Qwen3",
            head_dim=8,
            attention_bias=True,
            rope_parameters=_rope(1e6, rope_type="default"),
        ),
        "float32",
    ),
    "llama3": (
        _config(
            "Llama",
            attention_bias=True,
            mlp_bias=True,
            rope_parameters=_rope(
                500000.0,
                rope_type="llama3",
                factor=8.0,
                low_freq_factor=1.0,
                high_freq_factor=4.0,
                original_max_position_embeddings=64,
            ),
        ),
        "float16",
    ),
    "llama_linear": (
        _config(
            "Llama",
            tie_word_embeddings=True,
            num_key_value_heads=6,
            rope_parameters=_rope(rope_type="linear", factor=2.5),
        ),
        "float32",
    ),
    "mistral": (
        _config(
            "Mistral",
            head_dim=6,
            sliding_window=9,
            rope_parameters=_rope(rope_type="default"),
        ),
        "bfloat16",
    ),
    "mistral_full": (
        _config("Mistral", sliding_window=None, rope_parameters=_rope(rope_type="default")),
        "float32",
    ),
    "gemma2": (
        _config(
            "Gemma2",
            head_dim=8,
            sliding_window=9,
            query_pre_attn_scalar=5,
            attn_logit_softcapping=2.0,
            final_logit_softcapping=3.0,
            attn_implementation="eager",  # the others leave the soft cap out
            rope_parameters=_rope(rope_type="default"),
        ),
        "bfloat16",
    ),
    "gemma3_text": (
        _config(
            "Gemma3Text",
            head_dim=8,
            sliding_window=9,
            sliding_window_pattern=2,
            query_pre_attn_scalar=12,
            rope_parameters={
                "full_attention": _rope(1e6, rope_type="linear", factor=8.0),
                "sliding_attention": _rope(rope_type="default"),
            },
        ),
        "float32",
    ),
    "qwen3_moe": (
        _config(
            "Qwen3Moe",
            head_dim=8,
            moe_intermediate_size=12,
            num_experts=6,
            num_experts_per_tok=3,
            norm_topk_prob=True,
            rope_parameters=_rope(1e6, rope_type="default"),
        ),
        "float32",
    ),
}


def random_model(config, dtype="float32", seed=0):
    """A causal model whose every parameter, norms and biases included, is far from its default.

    Values are representable in `dtype`; the model itself computes in float32.
    """
    model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            if "norm" in name:
                value = 0.3 * noise + (0 if model.config.model_type.startswith("gemma") else 1)
            elif parameter.ndim == 1:
                value = 0.5 * noise
            elif "embed" in name or "lm_head" in name:
                value = noise * (1.0 if config.hidden_size < 200 else 0.05)
            else:
                value = 1.5 * noise / parameter.shape[-1] ** 0.5
            parameter.copy_(value.to(getattr(torch, dtype)).float())
    return model


def save(model, folder: Path, dtype="float32", max_shard_size="5GB"):
    """Writes the checkpoint in `dtype`; the model in memory stays float32."""
    state = {name: value.to(getattr(torch, dtype)) for name, value in model.state_dict().items()}
    if model.config.tie_word_embeddings:
        state.pop("lm_head.weight", None)
    model.save_pretrained(folder, state_dict=state, max_shard_size=max_shard_size)


def hidden_states(model, input_ids, changes=None) -> tuple[dict[str, np.ndarray], np.ndarray]:
    """Every hook point of every layer, {"<hook_point>.<layer>": [T, W]}, and logits [T, V].

    changes: name -> what makes another value of one, float32 [T, W], before it goes on; not for
    `resid_mid` of Gemma.
    """
    found, changes, T = {}, changes or {}, len(input_ids)

    def seen(name, value):
        """The value as it goes on."""
        flat = value[0] if value.shape[0] == 1 else value
        turned = flat.ndim == 3 and flat.shape[0] != T  # heads before tokens
        flat = flat.transpose(0, 1) if turned else flat
        array = flat.detach().float().numpy().reshape(T, -1).copy()
        if name in changes:
            array = np.asarray(changes[name](array), np.float32)
            flat = torch.tensor(array).reshape(flat.shape)
            value = (flat.transpose(0, 1) if turned else flat).reshape(value.shape)
        found[name] = array
        return value

    def hook_output(module, name):
        def hook(m, args, out):
            if isinstance(out, tuple):
                return (seen(name, out[0]), *out[1:])
            return seen(name, out)

        return module.register_forward_hook(hook)

    def hook_input(module, name):
        def hook(m, args, kwargs):
            if args:
                return (seen(name, args[0]), *args[1:]), kwargs
            return args, {**kwargs, "hidden_states": seen(name, kwargs["hidden_states"])}

        return module.register_forward_pre_hook(hook, with_kwargs=True)

    def hook_stream_through(module, i):
        """What is changed in the middle of a layer is changed in what is added to get there."""

        def hook(m, args, out):
            before = torch.tensor(found[f"resid_pre.{i}"])
            middle = changes[f"resid_mid.{i}"]((before + out[0][0]).detach().numpy())
            return (torch.tensor(np.asarray(middle))[None] - before, *out[1:])

        return module.register_forward_hook(hook)

    handles = []
    for i, layer in enumerate(model.model.layers):
        # Gemma norms what attention and mlp give before it is added.
        attention, normed = layer.self_attn, hasattr(layer, "pre_feedforward_layernorm")
        before_mlp = "pre_feedforward" if normed else "post_attention"
        handles += [
            hook_input(layer, f"resid_pre.{i}"),
            hook_input(attention, f"attn_in.{i}"),
            hook_output(getattr(attention, "q_norm", attention.q_proj), f"q.{i}"),
            hook_output(getattr(attention, "k_norm", attention.k_proj), f"k.{i}"),
            hook_output(attention.v_proj, f"v.{i}"),
            hook_input(attention.o_proj, f"z.{i}"),
            hook_output(layer.post_attention_layernorm if normed else attention, f"attn_out.{i}"),
            hook_input(layer.mlp, f"mlp_in.{i}"),
            hook_output(layer.post_feedforward_layernorm if normed else layer.mlp, f"mlp_out.{i}"),
            hook_output(layer, f"resid_post.{i}"),
        ]
        if f"resid_mid.{i}" in changes:
            handles.append(hook_stream_through(attention, i))
        else:
            handles.append(hook_input(getattr(layer, f"{before_mlp}_layernorm"), f"resid_mid.{i}"))
        if hasattr(layer.mlp, "down_proj"):  # a mixture has no mlp_act
            handles.append(hook_input(layer.mlp.down_proj, f"mlp_act.{i}"))
    try:
        with torch.no_grad():
            logits = model(torch.tensor(np.asarray(input_ids)[None], dtype=torch.long)).logits
    finally:
        for handle in handles:
            handle.remove()
    return found, logits[0].float().numpy()
