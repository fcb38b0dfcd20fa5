"""Hugging Face `config.json` -> `ModelConfig`: each field is read, refused, or changes nothing.

What the architecture's class in transformers reads is read here too, with the class's default where
the file is silent, or refused by name. What that class never reads cannot change the result: it is
ignored, and named in the log. Reads the transformers 4 form (`rope_theta`, `rope_scaling`) and the
5 form (`rope_parameters`). Knows nothing of weights, devices or files other than `config.json`.
"""

import logging
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from utils.errors import UserError
from utils.model.rope import ROPE_FIELDS, Rope, parse_ropes
from utils.store.text import read_json

log = logging.getLogger(__name__)

_EVERY_FAMILY = {
    **dict.fromkeys(("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers")),
    **dict.fromkeys(("num_attention_heads", "max_position_embeddings", "rms_norm_eps")),
    **dict.fromkeys(ROPE_FIELDS),
    "head_dim": None,
    "tie_word_embeddings": False,
}
_SILU = {**_EVERY_FAMILY, "hidden_act": "silu"}
_QWEN = {
    "num_key_value_heads": 32,
    "use_sliding_window": False,
    "sliding_window": 4096,
    "max_window_layers": 28,
    "layer_types": None,
}
_GEMMA = {
    **_EVERY_FAMILY,
    "num_key_value_heads": 4,
    "head_dim": 256,
    "hidden_activation": "gelu_pytorch_tanh",
    "tie_word_embeddings": True,
    "attention_bias": False,
    "query_pre_attn_scalar": 256,
    "sliding_window": 4096,
    "layer_types": None,
    "attn_logit_softcapping": None,
    "final_logit_softcapping": None,
    "use_bidirectional_attention": False,
}
# model_type -> the fields that its class in transformers reads, with the class's defaults. None
# stands for a value that follows from others (heads of their own for keys, a head's width), or that
# has to be there, since a guess would go unnoticed (a size, the rotary base).
FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {
        **_SILU,
        "num_key_value_heads": None,
        "attention_bias": False,
        "mlp_bias": False,
    },
    "mistral": {**_SILU, "num_key_value_heads": 8, "sliding_window": 4096},
    "qwen2": {**_SILU, **_QWEN},
    "qwen3": {**_SILU, **_QWEN, "head_dim": 128, "attention_bias": False},
    "qwen3_moe": {
        **_SILU,
        "num_key_value_heads": 4,
        "attention_bias": False,
        "use_sliding_window": False,
        "sliding_window": 4096,
        "moe_intermediate_size": 768,
        "num_experts": 128,
        "num_local_experts": None,  # another name of it
        "num_experts_per_tok": 8,
        "norm_topk_prob": False,
        "decoder_sparse_step": 1,
        "mlp_only_layers": None,
    },
    "gemma2": {**_GEMMA, "attn_logit_softcapping": 50.0, "final_logit_softcapping": 30.0},
    "gemma3_text": {
        **_GEMMA,
        # The files of larger models leave these out.
        **{"vocab_size": 262_208, "num_attention_heads": 8, "max_position_embeddings": 131_072},
        "rms_norm_eps": 1e-6,
        "rope_theta": 1e6,
        "rope_local_base_freq": 1e4,
        "sliding_window_pattern": 6,
    },
}
MODEL_TYPES = tuple(FAMILIES)

# Fields of training, classifiers, generation and bookkeeping that nearly every file has: they leave
# hidden states as they are, and are not worth a line. So do names with an underscore before them.
_HARMLESS = (
    {"model_type", "architectures", "auto_map", "tokenizer_class", "transformers_version"}
    | {"dtype", "torch_dtype", "use_bfloat16", "torchscript", "unsloth_fixed", "unsloth_version"}
    | {"bos_token_id", "eos_token_id", "pad_token_id", "sep_token_id", "begin_suppress_tokens"}
    | {"attention_dropout", "initializer_range", "gradient_checkpointing", "pretraining_tp"}
    | {"problem_type", "num_labels", "id2label", "label2id", "finetuning_task"}
    | {"task_specific_params", "prefix", "model_max_length", "chunk_size_feed_forward"}
    | {"is_decoder", "is_encoder_decoder", "tie_encoder_decoder", "tie_last_hidden_states"}
    | {"use_cache", "return_dict", "output_attentions", "output_hidden_states"}
    | {"keys_to_ignore_at_inference", "output_router_logits", "router_aux_loss_coef"}
)
_OF_WEIGHTS = {"quantization_config", "compression_config"}  # which `utils.model.quantized` reads
# Fields that transformers looks for in every architecture, or that say how the weights are stored,
# and what to do about them. A family whose own class reads one has it in FAMILIES.
_REFUSED = {
    "quantization": "the weights are quantized by MLX: take the checkpoint that is not",
    "sliding_window": "this model_type has no sliding window of its own, and transformers would "
    "give one to the cache alone: remove it, or give the model_type of the model's training",
    "layer_types": "this model_type has layers of one type, and transformers would heed the others "
    "in the cache alone: remove it, or give the model_type of the model's training",
    "attention_chunk_size": "attention here is not in chunks",
    "per_layer_config": "all layers have one shape here",
    "kv_sharing_modes": "each layer has its own keys and values here",
    "fusion_config": "fused modules round otherwise: remove it",
    "transformers_weights": "name the file that it gives model.safetensors, and remove it",
    "is_causal": "attention here is to earlier tokens alone",
    **dict.fromkeys(
        ("text_config", "decoder", "generator"),
        "this is a model of several parts: save its text model alone, and give that folder",
    ),
}


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

    sliding_windows: of each layer, as soft caps too, as in `Scores`. sliding_rope: the rotary
    embedding of layers that have a window, where it is another. intermediate_size: of the mlp, or
    of one expert of a mixture, whose experts are num_experts, of which each token is given to
    experts_per_token. gated_by: `silu` or `gelu_tanh`. out_norms: what attention and mlp give is
    normed before it is added. unit_offset: a norm multiplies by one more than its stored scale.
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
        if not path.exists():
            raise UserError(
                f"{model_path} has no config.json: give the folder of a Hugging Face model"
            )
        fields = read_json(path)
        if not isinstance(fields, dict):
            raise UserError(f"{path} does not hold a JSON object")
        try:
            return cls.from_dict(fields)
        except UserError as error:
            raise UserError(f"{path}: {error}") from None

    @classmethod
    def from_dict(cls, fields: dict[str, Any]) -> "ModelConfig":
        """From the parsed fields of a `config.json`. Raises UserError naming the field."""
        if fields.get("model_type") == "gemma3" and isinstance(fields.get("text_config"), dict):
            log.info("config.json: of this model of text and images the text model alone is read")
            tied = {k: v for k, v in fields.items() if k == "tie_word_embeddings"}
            fields = {**fields["text_config"], **tied, "model_type": "gemma3_text"}
        model_type = fields.get("model_type")
        if model_type not in MODEL_TYPES:
            raise UserError(
                f"model_type {model_type!r} is not supported; supported: {', '.join(MODEL_TYPES)}"
            )
        read, ignored = dict(FAMILIES[model_type]), []
        for name, value in fields.items():
            if name in read:
                read[name] = value
            elif name not in _REFUSED:
                if not (name in _HARMLESS | _OF_WEIGHTS or name.startswith("_") or value is None):
                    ignored.append(name)
            elif value is False if name == "is_causal" else value:
                raise UserError(f"{name} is not supported: {_REFUSED[name]}")
        fields = read
        rope, sliding_rope, unread = parse_ropes(fields)
        if ignored := [*ignored, *unread]:
            told = "config.json: ignored, since transformers' class for %s never reads them: %s"
            log.info(told, model_type, ", ".join(ignored))

        def size(name: str, default: int | None = None) -> int:
            value = default if fields[name] is None else fields[name]
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                raise UserError(f"{name} must be a positive whole number, not {value!r}")
            return value

        gemma = "hidden_activation" in fields
        act = "hidden_activation" if gemma else "hidden_act"
        known = ("gelu_pytorch_tanh", "gelu_new") if gemma else ("silu", "swish")
        if fields[act] not in known:
            raise UserError(f"{act} {fields[act]!r} is not supported; only {known[0]} is")
        heads = size("num_attention_heads")
        kv_heads = size("num_key_value_heads", heads)
        if heads % kv_heads:
            raise UserError(
                f"num_attention_heads {heads} is not a multiple of num_key_value_heads {kv_heads}"
            )
        head_dim = size("head_dim", size("hidden_size") // heads)
        if head_dim % 2:
            raise UserError(f"head_dim {head_dim} is odd; rotary embedding needs an even one")
        eps = fields["rms_norm_eps"]
        if not isinstance(eps, int | float) or not 0 <= eps < math.inf:
            raise UserError(f"rms_norm_eps must be a number of at least 0, not {eps!r}")
        attention_bias, mlp_bias = _flag(fields, "attention_bias"), _flag(fields, "mlp_bias")
        num_layers = size("num_hidden_layers")
        mixture, family = "num_experts" in fields, {}
        if gemma:
            family = _of_gemma(model_type, fields)
        elif mixture:
            family = _of_mixture(fields, size)
        return cls(
            model_type=model_type,
            vocab_size=size("vocab_size"),
            hidden_size=size("hidden_size"),
            intermediate_size=size("moe_intermediate_size" if mixture else "intermediate_size"),
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
            tie_word_embeddings=_flag(fields, "tie_word_embeddings"),
            max_position_embeddings=size("max_position_embeddings"),
            sliding_windows=_sliding_windows(fields, num_layers),
            query_scale=(size("query_pre_attn_scalar") if gemma else head_dim) ** -0.5,
            **family,
        )


def _of_gemma(model_type: str, fields: dict[str, Any]) -> dict[str, Any]:
    """What Gemma 2 and 3 have and the others have not."""
    if _flag(fields, "use_bidirectional_attention"):
        raise UserError("use_bidirectional_attention is not supported: attention is causal")
    for name in ("attn_logit_softcapping", "final_logit_softcapping"):
        cap = fields[name]
        if cap is not None and (not isinstance(cap, int | float) or not 0 < cap < math.inf):
            raise UserError(f"{name} must be a positive number or null, not {cap!r}")
    return {
        "gated_by": "gelu_tanh",
        "out_norms": True,
        "unit_offset": True,
        "embedding_scale": float(fields["hidden_size"]) ** 0.5,
        # The class of Gemma 3 has the field, and hands it to nobody.
        "score_softcap": fields["attn_logit_softcapping"] if model_type == "gemma2" else None,
        "logit_softcap": fields["final_logit_softcapping"],
    }


def _of_mixture(fields: dict[str, Any], size: Any) -> dict[str, Any]:
    """The experts, of which every layer must be made."""
    if fields["mlp_only_layers"] or fields["decoder_sparse_step"] not in (None, 1):
        raise UserError(
            "mlp_only_layers and decoder_sparse_step are not supported: each layer has experts"
        )
    experts = size("num_experts" if fields["num_local_experts"] is None else "num_local_experts")
    chosen = size("num_experts_per_tok")
    if chosen > experts:
        raise UserError(f"num_experts_per_tok is {chosen}, and there are {experts} experts")
    return {
        "num_experts": experts,
        "experts_per_token": chosen,
        "renormalize_experts": _flag(fields, "norm_topk_prob"),
    }


def _flag(fields: dict[str, Any], name: str) -> bool:
    value = False if fields.get(name) is None else fields[name]  # also of a family without it
    if not isinstance(value, bool):
        raise UserError(f"{name} must be true or false, not {value!r}")
    return value


def _sliding_windows(fields: dict[str, Any], num_layers: int) -> tuple[int | None, ...]:
    window = fields.get("sliding_window")
    if "use_sliding_window" in fields and not _flag(fields, "use_sliding_window"):
        window = None
    if window is not None and (not isinstance(window, int) or window < 1):
        raise UserError(f"sliding_window must be a positive whole number or null, not {window!r}")
    if (layer_types := fields.get("layer_types")) is None:
        if "hidden_activation" in fields:  # Gemma: so many layers in turn, the last one without
            every = fields.get("sliding_window_pattern", 2)
            if not isinstance(every, int) or every < 1:
                raise UserError(f"sliding_window_pattern must be a whole number, not {every!r}")
            return tuple(window if (i + 1) % every else None for i in range(num_layers))
        first = fields.get("max_window_layers", 0)
        if window is not None and not isinstance(first, int):
            raise UserError(f"max_window_layers must be a whole number, not {first!r}")
        return tuple(window if window and i >= first else None for i in range(num_layers))
    known = ["full_attention", "sliding_attention"]
    is_list = isinstance(layer_types, list) and len(layer_types) == num_layers
    if not is_list or any(kind not in known for kind in layer_types):
        raise UserError(
            f"layer_types must name one of {', '.join(known)} for each of the {num_layers} layers"
        )
    if "sliding_attention" in layer_types and window is None:
        raise UserError("layer_types has sliding_attention, but no sliding_window is in use")
    return tuple(window if kind == "sliding_attention" else None for kind in layer_types)
