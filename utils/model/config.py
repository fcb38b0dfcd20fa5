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
from utils.model.rope import Rope, parse_rope

MODEL_TYPES = ("llama", "mistral", "qwen2", "qwen3")

# Fields that shape the computation; `ModelConfig.from_dict` reads every one of them.
_READ = (
    {"model_type", "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers"}
    | {"num_attention_heads", "num_key_value_heads", "head_dim", "attention_bias", "mlp_bias"}
    | {"hidden_act", "rms_norm_eps", "tie_word_embeddings", "max_position_embeddings"}
    | {"sliding_window", "use_sliding_window", "max_window_layers", "layer_types"}
    | {"rope_theta", "rope_scaling", "rope_parameters", "partial_rotary_factor"}
    | {"original_max_position_embeddings"}
    | {"quantization_config", "compression_config"}  # which `utils.model.quantized` reads
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
    | {"_attn_implementation_autoset", "transformers_version", "unsloth_fixed", "unsloth_version"}
)


@dataclass(frozen=True)
class ModelConfig:
    """The shape of a decoder; everything that decides what it computes, and nothing else.

    `sliding_windows[i]` is the number of keys that a query of layer i sees, itself included, or
    None for all of them.
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

    @property
    def has_head(self) -> bool:
        """Whether the unembedding is a matrix of its own."""
        return not self.tie_word_embeddings

    @classmethod
    def from_hf(cls, model_path: str | Path) -> "ModelConfig":
        """Reads `<model_path>/config.json`. Raises UserError naming the file and the field."""
        path = Path(model_path) / "config.json"
        if not Path(model_path).is_dir():
            raise UserError(
                f"{model_path} is not a folder: give the path of a downloaded Hugging Face model "
                "(hf download NAME --local-dir FOLDER)"
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

        if (fields.get("hidden_act") or "silu") not in ("silu", "swish"):
            raise UserError(f"hidden_act {fields['hidden_act']!r} is not supported; only silu is")
        if fields.get("partial_rotary_factor") not in (None, 1, 1.0):
            raise UserError("partial_rotary_factor is not supported: all of a head is rotated")
        heads = size("num_attention_heads")
        # Llama and Mistral files without the key/value count mean one per query head.
        kv_heads = size("num_key_value_heads", heads)
        if heads % kv_heads:
            raise UserError(
                f"num_attention_heads {heads} is not a multiple of num_key_value_heads {kv_heads}"
            )
        head_dim = size("head_dim", 128 if model_type == "qwen3" else size("hidden_size") // heads)
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
        return cls(
            model_type=model_type,
            vocab_size=size("vocab_size"),
            hidden_size=size("hidden_size"),
            intermediate_size=size("intermediate_size"),
            num_layers=num_layers,
            num_heads=heads,
            num_kv_heads=kv_heads,
            head_dim=head_dim,
            rms_norm_eps=float(eps),
            rope=parse_rope(fields),
            qkv_bias=model_type == "qwen2" or attention_bias,
            out_bias=attention_bias,
            mlp_bias=mlp_bias,
            qk_norm=model_type == "qwen3",
            tie_word_embeddings=_flag(fields, "tie_word_embeddings"),
            max_position_embeddings=size("max_position_embeddings"),
            sliding_windows=_sliding_windows(fields, num_layers),
        )


def _flag(fields: dict[str, Any], name: str) -> bool:
    value = False if fields.get(name) is None else fields[name]
    if not isinstance(value, bool):
        raise UserError(f"{name} must be true or false, not {value!r}")
    return value


def _sliding_windows(fields: dict[str, Any], num_layers: int) -> tuple[int | None, ...]:
    model_type, window = fields["model_type"], fields.get("sliding_window")
    in_use = _flag(fields, "use_sliding_window")
    if model_type == "llama" and (window is not None or in_use):
        raise UserError("sliding_window is not a field of llama")
    if model_type.startswith("qwen") and not in_use:
        window = None
    if window is not None and (not isinstance(window, int) or window < 1):
        raise UserError(f"sliding_window must be a positive whole number or null, not {window!r}")
    layer_types = fields.get("layer_types")
    if layer_types is None:
        if model_type == "mistral":
            return (window,) * num_layers
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
