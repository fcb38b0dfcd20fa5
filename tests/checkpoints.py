"""Checkpoints made on the spot, for tests and benchmarks: the shapes of a model, random or zero."""

import json
import math
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
from safetensors.numpy import save_file

from utils.model.config import ModelConfig
from utils.model.weights import parameters


def outline(folder: str | Path) -> None:
    """Writes `model.safetensors` for the `config.json` of a folder, bfloat16, all zeros and, where
    the file system knows sparse files, taking no room: for planning runs of a model not at hand."""
    folder, header, size = Path(folder), {}, 0
    config = ModelConfig.from_hf(folder)
    for parameter in parameters(config).values():
        stored = parameter.stored_shape
        for name in parameter.names:
            end = size + 2 * math.prod(stored)
            header[name] = {"dtype": "BF16", "shape": stored, "data_offsets": [size, end]}
            size = end
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with open(folder / "model.safetensors", "wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        file.truncate(8 + len(text) + size)


def write_random_checkpoint(folder: str | Path, fields: dict[str, Any], seed: int = 0) -> None:
    """Writes `config.json` with `fields` and random bfloat16 weights in one safetensors file.

    Kernels have standard deviation 1 / sqrt(inputs), embeddings 0.05, norm scales stay near 1.
    """
    random = np.random.default_rng(seed)
    tensors = {}
    config = ModelConfig.from_dict(fields)
    for path, parameter in parameters(config).items():
        stored = parameter.stored_shape
        noise = random.standard_normal(parameter.shape, dtype=np.float32)
        if path.endswith("scale"):
            noise = 1 + 0.1 * noise
        elif len(stored) == 1:
            noise *= 0.1
        else:
            noise *= 0.05 if path in ("embedding", "head") else stored[1] ** -0.5
        tensors |= parameter.as_stored(noise.astype(jnp.bfloat16))
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(fields, indent=2) + "\n")
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def write_adapter(
    folder: str | Path, shapes: dict[str, tuple[int, ...]], rank: int = 2, **fields: Any
) -> dict[str, Any]:
    """Writes a random LoRA adapter as peft stores it, and returns its tensors.

    shapes: of the weights that it adds to, by the names of their modules. fields: of its
    adapter_config.json, where they are not the usual ones.
    """
    random = np.random.default_rng(0)
    tensors = {}
    for module, (outputs, inputs) in shapes.items():
        for letter, shape in (("A", (rank, inputs)), ("B", (outputs, rank))):
            noise = random.standard_normal(shape, dtype=np.float32)
            tensors[f"base_model.model.{module}.lora_{letter}.weight"] = noise * inputs**-0.25
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    usual = {"peft_type": "LORA", "r": rank, "lora_alpha": 4, "bias": "none", "use_dora": False}
    (folder / "adapter_config.json").write_text(json.dumps({**usual, **fields}))
    save_file(tensors, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    return tensors
