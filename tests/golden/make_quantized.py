"""Writes `quantized.safetensors`: small quantised weights, and what their libraries make of them.

    pip install bitsandbytes compressed-tensors && pip install --no-deps autoawq
    PYTHONPATH=.:tests python tests/golden/make_quantized.py

bitsandbytes 0.50 also quantises what it stores; the others are given what `tests/quantize.py`
packs. Of AutoAWQ 0.2.9 one module is run alone, which needs torch only. GPTQModel 7.7 does not run
without a GPU's libraries; what its `convert_gptq_v1_to_v2_format_module` and `dequantize_weight`
do with 4 bits is repeated here, line by line.
"""

import importlib.util
from pathlib import Path

import numpy as np
import safetensors.numpy
import torch
from quantize import CASES, GROUP
from safetensors.torch import load, save_file
from transformers.integrations.finegrained_fp8 import Fp8Dequantize

SHAPE = (32, 96)  # whole blocks: of others transformers assumes smaller ones


def of_bitsandbytes(weight, kind, nested):
    import bitsandbytes

    packed, state = bitsandbytes.functional.quantize_4bit(
        weight.bfloat16(), quant_type=kind, compress_statistics=nested, blocksize=64
    )
    tensors = {f"weight.{name}": part for name, part in state.as_dict(packed=True).items()}
    return {"weight": packed, **tensors}, bitsandbytes.functional.dequantize_4bit(packed, state)


def of_awq(parts):
    folder = Path(importlib.util.find_spec("awq").submodule_search_locations[0])
    spec = importlib.util.spec_from_file_location("packing", folder / "utils/packing_utils.py")
    packing = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(packing)
    scales = parts["scales"].float()  # in float16 it would round twice
    return packing.dequantize_gemm(parts["qweight"], parts["qzeros"], scales, 4, GROUP).T


def of_gptq(parts, first):
    zeros = parts["qzeros"].clone()
    if first:
        zeros += 0b00010001000100010001000100010001
    shift = torch.arange(0, 32, 4, dtype=torch.int32)
    zeros = (zeros.unsqueeze(2).expand(-1, -1, 8) >> shift[None, None]).to(torch.int8) & 15
    zeros = zeros.reshape(zeros.shape[0], -1)[:, : parts["scales"].shape[1]]
    weight = parts["qweight"].unsqueeze(1).expand(-1, 8, -1) >> shift[None, :, None]
    weight = (weight.to(torch.int8) & 15).reshape(-1, weight.shape[-1])
    group = parts["g_idx"].long()
    return (parts["scales"].float()[group] * (weight - zeros[group])).T


def of_compressed_tensors(parts, fields):
    from compressed_tensors.compressors.pack_quantized.base import PackedQuantizationCompressor
    from compressed_tensors.quantization import QuantizationScheme

    # The library sorts columns by group before it packs them, and has no order to read.
    weights = {**fields["config_groups"]["group_0"]["weights"], "actorder": None}
    scheme = QuantizationScheme(targets=["Linear"], weights=weights)
    return PackedQuantizationCompressor.decompress(dict(parts), scheme)["weight"]


def main():
    made = {}
    weight = np.random.default_rng(7).standard_normal(SHAPE, np.float32)
    for name, (fields, how) in CASES.items():
        stored = {suffix: np.ascontiguousarray(part) for suffix, part in how(weight)[0].items()}
        parts = load(safetensors.numpy.save(stored))
        if fields["quant_method"] == "bitsandbytes":
            kind = fields["bnb_4bit_quant_type"]
            parts, found = of_bitsandbytes(torch.tensor(weight), kind, name.endswith("nested"))
        elif fields["quant_method"] == "awq":
            found = of_awq(parts)
        elif fields["quant_method"] == "gptq":
            found = of_gptq(parts, name == "gptq")
        elif name.startswith("pack"):
            parts.pop("weight_g_idx", None)
            found = of_compressed_tensors(parts, fields)
        else:
            scale = next(part for suffix, part in parts.items() if suffix != "weight")
            scale = scale.reshape(1, 1) if scale.ndim == 0 else scale
            found = Fp8Dequantize(None)._dequantize_one(parts["weight"], scale, torch.float32)
        made |= {f"{name}.{suffix}": part for suffix, part in parts.items()}
        made[f"{name}.reference"] = found.bfloat16()
    made = {name: part.contiguous() for name, part in made.items()}
    save_file(made, Path(__file__).parent / "quantized.safetensors")


if __name__ == "__main__":
    main()
