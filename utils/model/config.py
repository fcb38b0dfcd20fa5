"""Hugging Face `config.json` -> `ModelConfig`. What it does not know, it refuses by name.

Reads the transformers 4 form (`rope_theta`, `rope_scaling`) and the 5 form (`rope_parameters`).
Knows nothing of weights, devices or files other than `config.json`.
"""

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from utils.errors import UserError
from utils.model.rope import Rope, parse_ropes

_QWEN = ("qwen2", "qwen3", "qwen3_moe")
_GEMMA = ("gemma2", "gemma3_text")
MODEL_TYPES = ("llama", "mistral", *_QWEN, *_GEMMA)

# Fields that shape the computation; `ModelConfig.from_dict` reads every one of them.
_READ = (
    {"model_type", "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers"}
    | {"num_attention_heads", "num_key_value_heads", "head_dim", "attention_bias", "mlp_bias"}
    | {"hidden_act", "rms_norm_eps", "tie_word_embeddings", "max_position_embeddings"}
    | {"sliding_window", "use_sliding_window", "max_window_layers", "layer_types"}
    | {"rope_theta", "rope_scaling", "rope_parameters", "partial_rotary_factor"}
    | {"original_max_position_embeddings"}
    | {
        "hidden_activation",
        "query_pre_attn_scalar",
        "sliding_window_pattern",
        "rope_local_base_freq",
    }
    | {"attn_logit_softcapping", "final_logit_softcapping", "use_bidirectional_attention"}
    | {"num_experts", "num_local_experts", "num_experts_per_tok", "moe_intermediate_size"}
    | {"norm_topk_prob", "decoder_sparse_step", "mlp_only_layers"}
)
# Fields of training, generation defaults or bookkeeping: they leave hidden states as they are.
_HARMLESS = (
    {"attention_dropout", "initializer_range", "pretraining_tp", "problem_type", "num_labels"}
    | {"finetuning_task", "id2label", "label2id", "task_specific_params"}
    | {"bos_token_id", "eos_token_id", "pad_token_id", "sep_token_id", "begin_suppress_tokens"}
    | {"prefix", "use_cache", "output_attentions", "output_hidden_states"}
    | {"return_dict", "keys_to_ignore_at_inference"}
    | {"is_decoder", "is_encoder_decoder", "tie_encoder_decoder", "chunk_size_feed_forward"}
    | {"model_max_length", "tokenizer_class", "architectures", "auto_map", "_name_or_path"}
    | {"dtype", "torch_dtype", "use_bfloat16", "torchscript", "_attn_implementation"}
    | {"_sliding_window_pattern", "router_aux_loss_coef", "output_router_logits"}
    | {"_attn_implementation_autoset", "transformers_version", "unsloth_fixed", "unsloth_version"}
)


@dataclass(frozen=True)
class Scores:
    """How the product of a query and a key becomes the score that the softmax takes.

    scale: what the product is multiplied by. window: the number of keys that a query sees, itself
    included, or None for all of them. softcap: scores are bent to stay within plus and minus so
    much, `softcap * tanh(score / softcap)` (Gemma 2), or None.
    """

    scale: float
    window: int | None = None
    softcap: float | None = None


@dataclass(frozen=True)
class ModelConfig:
    """The shape of a decoder; everything that decides what it computes, and nothing else.

    `sliding_windows[i]` is the number of keys that a query of layer i sees, itself included, or
    None for all of them. sliding_rope: the rotary embedding of layers that have a window, where it
    is another. intermediate_size: of the mlp, or of one expert of a mixture, whose experts are
    num_experts, of which each token is given to experts_per_token. gated_by: `silu` or `gelu_tanh`.
    out_norms: what attention and mlp give is normed before it is added. unit_offset: a norm
    multiplies by one more than its stored scale. Soft caps as in `Scores`.
    """

    model_type: str
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    rms_norm_eps: float
    rope: Rope
    qkv_bias: bool
    out_bias: bool
    mlp_bias: bool
    qk_norm: bool
    tie_word_embeddings: bool
    max_position_embeddings: int
    sliding_windows: tuple[int | None, ...]
    query_scale: float
    sliding_rope: Rope | None = None
    gated_by: str = "silu"
    out_norms: bool = False
    unit_offset: bool = False
    embedding_scale: float = 1.0
    score_softcap: float | None = None
    logit_softcap: float | None = None
    num_experts: int = 0
    experts_per_token: int = 0
    renormalize_experts: bool = False

    @property
    def has_head(self) -> bool:
        """Whether the unembedding is a matrix of its own."""
        return not self.tie_word_embeddings

    @property
    def no_out_norms(self) -> bool:
        return not self.out_norms

    @property
    def no_experts(self) -> bool:
        return not self.num_experts

    def scores(self, layer: int) -> Scores:
        return Scores(self.query_scale, self.sliding_windows[layer], self.score_softcap)

    def rope_of(self, layer: int) -> Rope:
        windowed = self.sliding_windows[layer] is not None
        return self.sliding_rope if windowed and self.sliding_rope else self.rope

    @classmethod
    def from_hf(cls, model_path: str | Path) -> "ModelConfig":
        """Reads `<model_path>/config.json`. Raises UserError naming the file and the field."""
        path = Path(model_path) / "config.json"
        if not Path(model_path).is_dir():
            raise UserError(
                f"{model_path} is not a folder: give the path of a downloaded Hugging Face model "
                "(hf download NAME --local-dir FOLDER)"
            )
        if (Path(model_path) / "adapter_config.json").exists():
            raise UserError(
                f"{model_path} holds a LoRA adapter, not a model: merge it first with peft, "
                "AutoPeftModelForCausalLM.from_pretrained(...).merge_and_unload()"
                ".save_pretrained(folder), and give that folder"
            )
        try:
            fields = json.loads(path.read_text())
        except FileNotFoundError:
            raise UserError(
                f"{model_path} has no config.json: give the folder of a Hugging Face model"
            ) from None
        except (ValueError, OSError) as error:
            raise UserError(f"{path} cannot be read as JSON: {error}") from error
        if not isinstance(fields, dict):
            raise UserError(f"{path} does not hold a JSON object")
        try:
            return cls.from_dict(fields)
        except UserError as error:
            raise UserError(f"{path}: {error}") from None

    @classmethod
    def from_dict(cls, fields: dict[str, Any]) -> "ModelConfig":
        """From the parsed fields of a `config.json`. Raises UserError naming the field."""
        model_type = fields.get("model_type")
        if model_type not in MODEL_TYPES:
            raise UserError(
                f"model_type {model_type!r} is not supported; supported: {', '.join(MODEL_TYPES)}"
            )
        given = {name for name, value in fields.items() if value is not None}
        if unknown := sorted(given - _READ - _HARMLESS):
            raise UserError(
                f"field {', '.join(unknown)} is not known to this decoder and could change its "
                f"result; known: {', '.join(sorted(_READ))}"
            )

        def size(name: str, default: int | None = None) -> int:
            value = default if fields.get(name) is None else fields[name]
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                raise UserError(f"{name} must be a positive whole number, not {value!r}")
            return value

        gemma = model_type in _GEMMA
        act, known = ("hidden_act", ("silu", "swish"))
        if gemma:  # `hidden_act` is there too, and not read
            act, known = "hidden_activation", ("gelu_pytorch_tanh", "gelu_new")
        if (fields.get(act) or known[0]) not in known:
            raise UserError(f"{act} {fields[act]!r} is not supported; only {known[0]} is")
        if fields.get("partial_rotary_factor") not in (None, 1, 1.0):
            raise UserError("partial_rotary_factor is not supported: all of a head is rotated")
        heads = size("num_attention_heads")
        # Llama and Mistral files without the key/value count mean one per query head.
        kv_heads = size("num_key_value_heads", heads)
        if heads % kv_heads:
            raise UserError(
                f"num_attention_heads {heads} is not a multiple of num_key_value_heads {kv_heads}"
            )
        of_class = {"qwen3": 128, "gemma2": 256, "gemma3_text": 256}
        head_dim = size("head_dim", of_class.get(model_type, size("hidden_size") // heads))
        if head_dim % 2:
            raise UserError(f"head_dim {head_dim} is odd; rotary embedding needs an even one")
        eps = fields.get("rms_norm_eps")
        if not isinstance(eps, int | float) or not 0 <= eps < math.inf:
            raise UserError(f"rms_norm_eps must be a number of at least 0, not {eps!r}")
        attention_bias, mlp_bias = _flag(fields, "attention_bias"), _flag(fields, "mlp_bias")
        if attention_bias and model_type in ("qwen2", "mistral"):
            raise UserError(f"attention_bias is not a field of {model_type}")
        if mlp_bias and model_type != "llama":
            raise UserError(f"mlp_bias is not a field of {model_type}")
        num_layers = size("num_hidden_layers")
        rope, sliding_rope = parse_ropes(fields)
        family: dict[str, Any] = {}
        if gemma:
            family = _of_gemma(fields)
        elif model_type == "qwen3_moe":
            family = _of_mixture(fields, size)
        return cls(
            model_type=model_type,
            vocab_size=size("vocab_size"),
            hidden_size=size("hidden_size"),
            intermediate_size=size(
                "moe_intermediate_size" if model_type == "qwen3_moe" else "intermediate_size"
            ),
            num_layers=num_layers,
            num_heads=heads,
            num_kv_heads=kv_heads,
            head_dim=head_dim,
            rms_norm_eps=float(eps),
            rope=rope,
            sliding_rope=sliding_rope,
            qkv_bias=model_type == "qwen2" or attention_bias,
            out_bias=attention_bias,
            mlp_bias=mlp_bias,
            qk_norm=model_type in ("qwen3", "qwen3_moe", "gemma3_text"),
            tie_word_embeddings=_flag(fields, "tie_word_embeddings", default=gemma),
            max_position_embeddings=size("max_position_embeddings"),
            sliding_windows=_sliding_windows(fields, num_layers),
            query_scale=size("query_pre_attn_scalar", 256 if gemma else head_dim) ** -0.5,
            **family,
        )


def _of_gemma(fields: dict[str, Any]) -> dict[str, Any]:
    """What Gemma 2 and 3 have and the others have not."""
    if _flag(fields, "use_bidirectional_attention"):
        raise UserError("use_bidirectional_attention is not supported: attention is causal")
    of_class = (50.0, 30.0) if fields["model_type"] == "gemma2" else (None, None)
    caps = []
    for name, default in zip(
        ("attn_logit_softcapping", "final_logit_softcapping"), of_class, strict=True
    ):
        cap = fields.get(name, default)
        if cap is not None and (not isinstance(cap, int | float) or not 0 < cap < math.inf):
            raise UserError(f"{name} must be a positive number or null, not {cap!r}")
        caps.append(cap)
    if fields["model_type"] == "gemma3_text":
        caps[0] = None  # there its class hands it to nobody
    return {
        "gated_by": "gelu_tanh",
        "out_norms": True,
        "unit_offset": True,
        "embedding_scale": float(fields["hidden_size"]) ** 0.5,
        "score_softcap": caps[0],
        "logit_softcap": caps[1],
    }


def _of_mixture(fields: dict[str, Any], size: Any) -> dict[str, Any]:
    """The experts of qwen3_moe, of which every layer must be made."""
    if fields.get("mlp_only_layers") or fields.get("decoder_sparse_step") not in (None, 1):
        raise UserError(
            "mlp_only_layers and decoder_sparse_step: layers without experts are not supported"
        )
    name = "num_local_experts" if fields.get("num_experts") is None else "num_experts"
    experts, chosen = size(name), size("num_experts_per_tok")
    if chosen > experts:
        raise UserError(f"num_experts_per_tok is {chosen}, and there are {experts} experts")
    return {
        "num_experts": experts,
        "experts_per_token": chosen,
        "renormalize_experts": _flag(fields, "norm_topk_prob"),
    }


def _flag(fields: dict[str, Any], name: str, default: bool = False) -> bool:
    value = default if fields.get(name) is None else fields[name]
    if not isinstance(value, bool):
        raise UserError(f"{name} must be true or false, not {value!r}")
    return value


def _sliding_windows(fields: dict[str, Any], num_layers: int) -> tuple[int | None, ...]:
    model_type, window = fields["model_type"], fields.get("sliding_window")
    gemma = model_type in _GEMMA
    if gemma:
        window = fields.get("sliding_window", 4096)
    in_use = _flag(fields, "use_sliding_window")
    if model_type == "llama" and (window is not None or in_use):
        raise UserError("sliding_window is not a field of llama")
    if model_type in _QWEN and not in_use:
        window = None
    if window is not None and (not isinstance(window, int) or window < 1):
        raise UserError(f"sliding_window must be a positive whole number or null, not {window!r}")
    layer_types = fields.get("layer_types")
    if layer_types is None:
        if model_type == "mistral" or model_type == "qwen3_moe":
            return (window,) * num_layers
        if gemma:
            every = 2 if model_type == "gemma2" else fields.get("sliding_window_pattern", 6)
            if not isinstance(every, int) or every < 1:
                raise UserError(f"sliding_window_pattern must be a whole number, not {every!r}")
            return tuple(window if (i + 1) % every else None for i in range(num_layers))
        first = fields.get("max_window_layers")
        first = 28 if first is None else first  # the default of Qwen2Config and Qwen3Config
        if window is not None and not isinstance(first, int):
            raise UserError(f"max_window_layers must be a whole number, not {first!r}")
        return tuple(window if window and i >= first else None for i in range(num_layers))
    known = ["full_attention", "sliding_attention"]
    is_list = isinstance(layer_types, list) and len(layer_types) == num_layers
    if not is_list or any(kind not in known for kind in layer_types):
        raise UserError(
            f"layer_types must name one of {', '.join(known)} for each of the {num_layers} layers"
        )
    if model_type == "mistral":
        raise UserError("layer_types is not a field of mistral")
    if "sliding_attention" in layer_types and window is None:
        raise UserError("layer_types has sliding_attention, but no sliding_window is in use")
    return tuple(window if kind == "sliding_attention" else None for kind in layer_types)
