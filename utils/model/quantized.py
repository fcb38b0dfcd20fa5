"""The `quantization_config` of a config.json -> the scheme by which its weights are read.

What is not supported is refused by name, before a file of weights is opened.
"""

from collections.abc import Mapping
from typing import Any

from utils.errors import UserError
from utils.model.schemes import Awq, BitsAndBytes, Fp8, Gptq, PackQuantized, Quantization


def quantization_of(fields: Mapping[str, Any]) -> Quantization | None:
    """The scheme that a config.json names, None for weights that are not quantised. Raises
    UserError naming what is not supported."""
    given = fields.get("quantization_config") or fields.get("compression_config")
    if not given:
        return None
    try:
        method = given.get("quant_method")
        if method is None and ("load_in_4bit" in given or "load_in_8bit" in given):
            method = "bitsandbytes"  # as its first versions say it
        if method not in _READERS:
            raise _unsupported(f"quant_method {method!r}")
        return _READERS[method](given)
    except (AttributeError, TypeError) as error:
        raise UserError(f"quantization_config holds what it cannot: {error}") from error


def _unsupported(what: str) -> UserError:
    return UserError(
        f"quantization_config: {what} is not supported; supported: bitsandbytes 4-bit, fp8, awq "
        "(gemm) and gptq 4-bit, and compressed-tensors pack-quantized 4-bit and float-quantized "
        "8-bit; take a checkpoint that is not quantised, or one of these"
    )


def _require(given: Mapping[str, Any], name: str, *known: Any, default: Any = None) -> Any:
    """The value of a field; raises UserError for one that is not known."""
    value = default if given.get(name) is None else given[name]
    value = value.lower() if isinstance(value, str) else value
    if isinstance(value, dict | list) or value not in known:
        raise _unsupported(f"{name} {value!r}")
    return value


def _group_size(size: Any) -> int | None:
    if size is None or size == -1:
        return None
    if not isinstance(size, int) or isinstance(size, bool) or size < 1:
        raise _unsupported(f"group_size {size!r}")
    return size


def _block(sizes: Any) -> tuple[int, int] | None:
    if sizes is None:
        return None
    valid = isinstance(sizes, list) and len(sizes) == 2
    if not valid or not all(isinstance(size, int) and size > 0 for size in sizes):
        raise _unsupported(f"a block of {sizes!r}")
    return tuple(sizes)


def _bitsandbytes(given: Mapping[str, Any]) -> Quantization:
    if not given.get("load_in_4bit", given.get("_load_in_4bit")):
        raise _unsupported("bitsandbytes 8-bit")
    kind = _require(given, "bnb_4bit_quant_type", "nf4", "fp4", default="fp4")
    return BitsAndBytes("bitsandbytes", kind)


def _fp8(given: Mapping[str, Any]) -> Quantization:
    _require(given, "fmt", "e4m3", "float8_e4m3fn", default="e4m3")
    block = _block(given.get("weight_block_size"))
    return Fp8("fp8", f"{block[0]}x{block[1]}" if block else "scaled", block)


def _awq(given: Mapping[str, Any]) -> Quantization:
    _require(given, "bits" if "bits" in given else "w_bit", 4)
    _require(given, "zero_point", True, default=True)
    version = _require(given, "version", "gemm", default="gemm")
    size = given.get("group_size", given.get("q_group_size"))
    return Awq("awq", version, _group_size(size))


def _gptq(given: Mapping[str, Any]) -> Quantization:
    _require(given, "bits", 4)
    _require(given, "is_marlin_format", False, default=False)
    _require(given, "pack_dtype", "int32", default="int32")
    field = "format" if given.get("checkpoint_format") is None else "checkpoint_format"
    version = _require(given, field, "gptq", "gptq_v2", default="gptq")
    return Gptq("gptq", version, _group_size(given.get("group_size")))


def _compressed_tensors(given: Mapping[str, Any]) -> Quantization:
    _require(given, "quantization_status", "compressed", default="compressed")
    if (given.get("transform_config") or {}).get("config_groups"):
        raise _unsupported("compressed-tensors with transform_config")
    if (given.get("sparsity_config") or {}).get("format", "dense") != "dense":
        raise _unsupported("compressed-tensors with sparse weights")
    kind = _require(given, "format", "pack-quantized", "float-quantized")
    groups = [group.get("weights") for group in (given.get("config_groups") or {}).values()]
    if not groups or any(weights != groups[0] for weights in groups) or not groups[0]:
        raise _unsupported("compressed-tensors whose config_groups differ or are none")
    weights = groups[0]
    if kind == "float-quantized":
        _require(weights, "type", "float")
        _require(weights, "num_bits", 8)
        _require(weights, "strategy", "tensor", "channel", "block")
        block = _block(weights.get("block_structure"))
        return Fp8("compressed-tensors", kind, block if weights["strategy"] == "block" else None)
    _require(weights, "type", "int")
    _require(weights, "num_bits", 4)
    strategy = _require(weights, "strategy", "channel", "group")
    symmetric = _require(weights, "symmetric", True, False, default=True)
    size = _group_size(weights.get("group_size")) if strategy == "group" else None
    return PackQuantized("compressed-tensors", kind, size, symmetric)


_READERS = {
    "bitsandbytes": _bitsandbytes,
    "fp8": _fp8,
    "awq": _awq,
    "gptq": _gptq,
    "compressed-tensors": _compressed_tensors,
}
