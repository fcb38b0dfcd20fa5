"""Quantising weights as the libraries do that write such checkpoints: for tests and benchmarks.

Each function of CASES takes a weight, float32 [O, I], and gives the tensors that stand for it, by
their suffix, and what they are worth in float32. The `quantization_config` is beside it.
"""

import json

import ml_dtypes
import numpy as np

GROUP = 32
AWQ_ORDER = [0, 2, 4, 6, 1, 3, 5, 7]  # row of the eight that stands at each place of a word
NF4 = np.array(
    [-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635,
     -0.18477343022823334, -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725,
     0.24611230194568634, 0.33791524171829224, 0.44070982933044434, 0.5626170039176941,
     0.7229568362236023, 1.0],
    np.float32,
)  # fmt: skip
FP4 = np.array([0, 0.0625, 8, 12, 4, 6, 2, 3, 0, -0.0625, -8, -12, -4, -6, -2, -3], np.float32) / 12


def words(values: np.ndarray, axis: int, order=range(8)) -> np.ndarray:
    """int32: eight values of 4 bits in one, along an axis; zeros fill the last word."""
    values = np.moveaxis(values, axis, -1).astype(np.uint32)
    values = np.pad(values, [*[(0, 0)] * (values.ndim - 1), (0, -values.shape[-1] % 8)])
    values = values.reshape(*values.shape[:-1], -1, 8)
    packed = sum(values[..., row] << np.uint32(4 * place) for place, row in enumerate(order))
    return np.ascontiguousarray(np.moveaxis(packed.astype(np.uint32).view(np.int32), -1, axis))


def bitsandbytes(weight, kind="nf4", nested=False, block=64):
    code = {"nf4": NF4, "fp4": FP4}[kind]
    flat = weight.reshape(-1)
    flat = np.pad(flat, (0, -len(flat) % block)).reshape(-1, block)
    absmax = np.abs(flat).max(axis=1)
    state = {"quant_type": kind, "blocksize": block, "dtype": "bfloat16"}
    tensors = {}
    if nested:
        offset, code8 = absmax.mean(), np.linspace(-1, 1, 256, dtype=np.float32)
        state |= {"nested_blocksize": 256, "nested_dtype": "float32"}
        state["nested_offset"] = float(offset)
        groups = np.pad(absmax - offset, (0, -len(absmax) % 256)).reshape(-1, 256)
        scale = np.abs(groups).max(axis=1)
        index = np.abs(groups[..., None] / scale[:, None, None] - code8).argmin(-1)
        index = index.astype(np.uint8).reshape(-1)[: len(absmax)]
        tensors |= {"weight.nested_absmax": scale, "weight.nested_quant_map": code8}
        absmax = code8[index] * scale[np.arange(len(absmax)) // 256] + np.float32(offset)
    tensors["weight.absmax"] = index if nested else absmax
    nibbles = np.abs(flat[..., None] / absmax[:, None, None] - code).argmin(-1).astype(np.uint8)
    values = (code[nibbles] * absmax[:, None]).reshape(-1)[: weight.size].reshape(weight.shape)
    nibbles = nibbles.reshape(-1)[: weight.size + weight.size % 2].reshape(-1, 2)
    tensors["weight"] = (nibbles[:, :1] << 4) | nibbles[:, 1:]
    tensors["weight.quant_map"] = code
    state["shape"] = list(weight.shape)
    text = json.dumps(state).encode()
    tensors[f"weight.quant_state.bitsandbytes__{kind}"] = np.frombuffer(text, np.uint8)
    return tensors, values


def fp8(weight, block, name="weight_scale_inv", dtype=np.float32):
    """block: (rows, columns), or () for one scale of the tensor."""
    rows, columns = block or weight.shape
    grid = [-(-n // size) for n, size in zip(weight.shape, (rows, columns), strict=True)]
    scale = np.zeros(grid, np.float32)
    for i, j in np.ndindex(*grid):
        part = weight[i * rows : (i + 1) * rows, j * columns : (j + 1) * columns]
        scale[i, j] = np.abs(part).max() / 448
    scale = scale.astype(dtype)
    spread = np.repeat(np.repeat(scale.astype(np.float32), rows, 0), columns, 1)
    spread = spread[: weight.shape[0], : weight.shape[1]]
    values = (weight / spread).astype(ml_dtypes.float8_e4m3fn)
    stored = scale if block else scale.reshape(())
    return {"weight": values, name: stored}, values.astype(np.float32) * spread


def grouped(weight, dtype=np.float16, shuffled=False, symmetric=False):
    """4-bit values, zero points [O, G], scales [O, G], the group of each column, and the worth."""
    O, I = weight.shape  # noqa: E741
    group = np.arange(I) // GROUP
    if shuffled:
        group = np.random.default_rng(I).permutation(group)
    zeros, scales = np.zeros((2, O, group.max() + 1))
    for g in range(zeros.shape[1]):
        part = weight[:, group == g]
        low, high = np.minimum(part.min(1), 0), np.maximum(part.max(1), 0)
        if symmetric:
            scales[:, g], zeros[:, g] = np.abs(part).max(1) / 7, 8
        else:
            scales[:, g] = (high - low) / 15
            zeros[:, g] = np.round(-low / scales[:, g])
    scales = scales.astype(dtype)
    wide = scales.astype(np.float32)[:, group]
    values = np.clip(np.round(weight / wide) + zeros[:, group], 0, 15)
    worth = (values - zeros[:, group]).astype(np.float32) * wide
    return values, zeros, scales, group.astype(np.int32), worth


def awq(weight):
    values, zeros, scales, _, worth = grouped(weight)
    tensors = {"qweight": words(values.T, 1, AWQ_ORDER), "qzeros": words(zeros.T, 1, AWQ_ORDER)}
    return tensors | {"scales": np.ascontiguousarray(scales.T)}, worth


def gptq(weight, first=True, shuffled=False):
    """first: the format whose zero points are stored less one, subtracted from the whole word."""
    values, zeros, scales, group, worth = grouped(weight, shuffled=shuffled)
    stored = words(zeros.T, 1)
    if first:
        stored = (stored.view(np.uint32) - np.uint32(0x11111111)).view(np.int32)
    tensors = {"qweight": words(values.T, 0), "qzeros": stored, "g_idx": group}
    return tensors | {"scales": np.ascontiguousarray(scales.T)}, worth


def pack_quantized(weight, symmetric=True, shuffled=False):
    values, zeros, scales, group, worth = grouped(weight, ml_dtypes.bfloat16, shuffled, symmetric)
    tensors = {"weight_packed": words(values, 1), "weight_scale": scales}
    tensors["weight_shape"] = np.array(weight.shape, np.int64)
    if not symmetric:
        tensors["weight_zero_point"] = words(zeros, 0)
    return tensors | ({"weight_g_idx": group} if shuffled else {}), worth


def _bnb(kind):
    return {"quant_method": "bitsandbytes", "load_in_4bit": True, "bnb_4bit_quant_type": kind}


def _compressed(kind, **weights):
    groups = {"group_0": {"targets": ["Linear"], "weights": weights, "input_activations": None}}
    return {
        "quant_method": "compressed-tensors",
        "format": kind,
        "quantization_status": "compressed",
        "config_groups": groups,
        "ignore": ["lm_head"],
    }


_INT4 = {"num_bits": 4, "type": "int", "strategy": "group", "group_size": GROUP}
_FLOAT8 = {"num_bits": 8, "type": "float", "strategy": "channel", "symmetric": True}
# name -> quantization_config, weight -> (tensors, worth)
CASES = {
    "nf4": (_bnb("nf4"), bitsandbytes),
    "nf4_nested": (_bnb("nf4"), lambda w: bitsandbytes(w, nested=True)),
    "fp4": (_bnb("fp4"), lambda w: bitsandbytes(w, "fp4", block=128)),
    "fp8_block": (
        {"quant_method": "fp8", "fmt": "e4m3", "weight_block_size": [16, 32]},
        lambda w: fp8(w, (16, 32)),
    ),
    "fp8_tensor": ({"quant_method": "fp8"}, lambda w: fp8(w, (), "weight_scale")),
    "fp8_channel": (
        _compressed("float-quantized", **_FLOAT8),
        lambda w: fp8(w, (1, w.shape[1]), "weight_scale", ml_dtypes.bfloat16),
    ),
    "awq": ({"quant_method": "awq", "bits": 4, "group_size": GROUP, "version": "gemm"}, awq),
    "gptq": ({"quant_method": "gptq", "bits": 4, "group_size": GROUP}, gptq),
    "gptq_v2_act_order": (
        {"quant_method": "gptq", "bits": 4, "group_size": GROUP, "checkpoint_format": "gptq_v2"},
        lambda w: gptq(w, first=False, shuffled=True),
    ),
    "pack_quantized": (_compressed("pack-quantized", symmetric=True, **_INT4), pack_quantized),
    "pack_quantized_asymmetric": (
        _compressed("pack-quantized", symmetric=False, actorder="group", **_INT4),
        lambda w: pack_quantized(w, symmetric=False, shuffled=True),
    ),
}  # fmt: skip


def quantized(tensors, quantize):
    """The tensors of a checkpoint with its linear layers quantised, and name -> worth of these."""
    made, worth = {}, {}
    for name, value in tensors.items():
        if value.ndim != 2 or "embed" in name or "lm_head" in name:
            made[name] = value
            continue
        parts, worth[name] = quantize(value.astype(np.float32))
        made |= {name.removesuffix("weight") + suffix: part for suffix, part in parts.items()}
    return made, worth
