"""One table from Hugging Face tensor names to Flax paths and axes; safetensors -> params.

How a parameter is split over the mesh follows from its axes' letters (`placement`). Each process
reads from disk only the slices that its devices hold. Every tensor of the model matches exactly
one row; what is missing, unexpected or mis-shaped is reported together.
"""

# D model width   F mlp width   N query heads   K key/value heads   H head width   V vocabulary
# E experts

import math
import re
from collections.abc import Collection, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from hashlib import sha256
from pathlib import Path
from typing import Any

import jax
import numpy as np
from flax.traverse_util import unflatten_dict
from jax.sharding import PartitionSpec

from utils.errors import UserError, some
from utils.model.adapters import Adapter, base_and_adapter, read_adapter
from utils.model.config import ModelConfig
from utils.model.files import EMBEDDING, FLOATS, HEAD, Stored, full_name, model_folder, read_headers
from utils.model.layout import Layout
from utils.model.quantized import quantization_of
from utils.model.schemes import Expected, Module
from utils.store.text import read_json


@dataclass(frozen=True)
class Weight:
    """A row of the table: one parameter, or that of every layer, whose number goes to `{layer}`.

    hf: the checkpoint's name; path: the Flax path. axes: of both, outputs before inputs; `(N H)` is
    one axis on disk that is two in the parameter, and where the name has an `{expert}`, the first
    axis E is as many tensors on disk. only_if: the attribute of `ModelConfig` that models with it
    have, or after `not ` do not have; None is all of them.
    """

    hf: str
    path: str
    axes: str
    only_if: str | None = None

    def is_of(self, config: ModelConfig) -> bool:
        """Whether a model has it."""
        _, negated, attribute = (self.only_if or "").rpartition("not ")
        return self.only_if is None or bool(getattr(config, attribute)) != bool(negated)


_OF_A_LAYER = (
    Weight("input_layernorm.weight", "attention_norm/scale", "D"),
    Weight("post_attention_layernorm.weight", "mlp_norm/scale", "D", "not out_norms"),
    Weight("post_attention_layernorm.weight", "attention_out_norm/scale", "D", "out_norms"),
    Weight("pre_feedforward_layernorm.weight", "mlp_norm/scale", "D", "out_norms"),
    Weight("post_feedforward_layernorm.weight", "mlp_out_norm/scale", "D", "out_norms"),
    Weight("self_attn.q_proj.weight", "attention/query", "(N H) D"),
    Weight("self_attn.k_proj.weight", "attention/key", "(K H) D"),
    Weight("self_attn.v_proj.weight", "attention/value", "(K H) D"),
    Weight("self_attn.o_proj.weight", "attention/out", "D (N H)"),
    Weight("self_attn.q_proj.bias", "attention/query_bias", "(N H)", "qkv_bias"),
    Weight("self_attn.k_proj.bias", "attention/key_bias", "(K H)", "qkv_bias"),
    Weight("self_attn.v_proj.bias", "attention/value_bias", "(K H)", "qkv_bias"),
    Weight("self_attn.o_proj.bias", "attention/out_bias", "D", "out_bias"),
    Weight("self_attn.q_norm.weight", "attention/query_norm/scale", "H", "qk_norm"),
    Weight("self_attn.k_norm.weight", "attention/key_norm/scale", "H", "qk_norm"),
    Weight("mlp.gate_proj.weight", "mlp/gate", "F D", "not num_experts"),
    Weight("mlp.up_proj.weight", "mlp/up", "F D", "not num_experts"),
    Weight("mlp.down_proj.weight", "mlp/down", "D F", "not num_experts"),
    Weight("mlp.gate.weight", "mlp/router", "E D", "num_experts"),
    Weight("mlp.experts.{expert}.gate_proj.weight", "mlp/expert_gate", "E F D", "num_experts"),
    Weight("mlp.experts.{expert}.up_proj.weight", "mlp/expert_up", "E F D", "num_experts"),
    Weight("mlp.experts.{expert}.down_proj.weight", "mlp/expert_down", "E D F", "num_experts"),
    Weight("mlp.gate_proj.bias", "mlp/gate_bias", "F", "mlp_bias"),
    Weight("mlp.up_proj.bias", "mlp/up_bias", "F", "mlp_bias"),
    Weight("mlp.down_proj.bias", "mlp/down_bias", "D", "mlp_bias"),
)
TABLE = (
    Weight("model.embed_tokens.weight", "embedding", "V D"),
    Weight("lm_head.weight", "head", "V D", "not tie_word_embeddings"),
    Weight("model.norm.weight", "final_norm/scale", "D"),
    *(
        replace(row, hf=f"model.layers.{{layer}}.{row.hf}", path=f"layers_{{layer}}/{row.path}")
        for row in _OF_A_LAYER
    ),
)
# Buffers that old checkpoints carry and the configuration already determines, and what a model of
# text and images has besides its text model.
_NOT_READ = re.compile(
    r".*\.rotary_emb\.inv_freq|(model\.)?(vision_tower|multi_modal_projector)\..*"
)
_BLOCK_BYTES, _READERS = 1 << 26, 4  # of a fingerprint


@dataclass(frozen=True)
class Parameter:
    """A parameter of a model, and what it is made of in a checkpoint.

    names: of the tensor on disk, or of one for each expert, which are stacked by a first axis.
    axes: of these tensors, that of the experts included, each as letters and sizes; of several
    letters, which are one axis on disk, each is an axis of the parameter.
    """

    names: list[str]
    axes: list[dict[str, int]]
    of_experts: bool

    @property
    def sizes(self) -> dict[str, int]:
        """The letter and size of each axis."""
        return {letter: size for axis in self.axes for letter, size in axis.items()}

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(self.sizes.values())

    @property
    def stored_axes(self) -> list[dict[str, int]]:
        return self.axes[self.of_experts :]

    @property
    def stored_shape(self) -> tuple[int, ...]:
        """Of each tensor on disk."""
        return tuple(math.prod(axis.values()) for axis in self.stored_axes)

    def as_stored(self, value: np.ndarray) -> dict[str, np.ndarray]:
        """Its value -> the checkpoint's tensors by name."""
        parts = value if self.of_experts else [value]
        parts = [part.reshape(self.stored_shape) for part in parts]
        return dict(zip(self.names, parts, strict=True))

    def placement(self, layout: Layout) -> tuple[tuple[int, ...], PartitionSpec]:
        """Its shape on the mesh, and how it is split.

        Over `model` are split the vocabulary, the mlp's width and the heads; where attention is not
        by heads (`Layout`), its kernels are split by D instead. A vocabulary or width that does not
        divide the model axis is padded with zeros; a D that does not leaves the kernel whole.
        """
        split = next((axis for axis in self.sizes if axis in "VFNK"), None)
        if split in ("N", "K") and not layout.by_heads:
            split = "D"
        sizes = {a: layout.padded(n) if a in "VF" else n for a, n in self.sizes.items()}
        spec = ["model" if a == split and n % layout.model == 0 else None for a, n in sizes.items()]
        return tuple(sizes.values()), PartitionSpec(*spec)


def parameters(config: ModelConfig) -> dict[str, Parameter]:
    """Those of a model by their Flax paths, in the order of the parameter tree's leaves."""
    sizes = {
        "D": config.hidden_size,
        "F": config.intermediate_size,
        "N": config.num_heads,
        "K": config.num_kv_heads,
        "H": config.head_dim,
        "V": config.vocab_size,
        "E": config.num_experts,
    }
    found = {}
    for row in filter(lambda row: row.is_of(config), TABLE):
        groups = re.findall(r"\(.*?\)|\w", row.axes)
        axes = [{a: sizes[a] for a in group.strip("()").split()} for group in groups]
        of_experts = "{expert}" in row.hf
        for layer in range(config.num_layers if "{layer}" in row.path else 1):
            experts = range(config.num_experts if of_experts else 1)
            names = [row.hf.format(layer=layer, expert=expert) for expert in experts]
            found[row.path.format(layer=layer)] = Parameter(names, axes, of_experts)
    return dict(sorted(found.items(), key=lambda entry: entry[0].split("/")))


def misfits(expected: Expected, tensors: Mapping[str, Stored]) -> Iterator[str]:
    """What is wrong with those that are expected, by name."""
    for name, (dtypes, *shapes) in expected.items():
        if (tensor := tensors.get(name)) is None:
            yield f"missing {name}"
        elif tensor.shape not in shapes:
            known = " or ".join(str(list(shape)) for shape in shapes)
            yield f"{name} has shape {list(tensor.shape)}, not {known}"
        elif tensor.dtype not in dtypes:
            yield f"{name} has dtype {tensor.dtype}, not one of {', '.join(dtypes)}"


class Checkpoint:
    """The tensors of a folder of safetensors files, checked against the configuration, and the
    adapter that is merged into them, if any.

    parameters: of the model, by Flax path; quantization: the scheme that config.json names, or
    None. Raises UserError for a folder without safetensors files, and one error for all tensors
    that are missing, unexpected, mis-shaped or of an unknown dtype.
    """

    def __init__(self, model_path: str | Path, config: ModelConfig, adapter: Adapter | None = None):
        self.folder, self.config, self.adapter = Path(model_path), config, adapter
        self._config_file = self.folder / "config.json"
        self.parameters = parameters(config)
        try:
            self.quantization = quantization_of(read_json(self._config_file))
        except UserError as error:
            raise UserError(f"{self._config_file}: {error}") from None
        self._stored: dict[str, Stored] = {}  # by its name in a whole model
        problems = []
        tensors = read_headers(self.folder)
        names = {tensor.name for tensor in tensors}
        for tensor in tensors:
            name = full_name(tensor.name, names, config.tie_word_embeddings)
            if name in self._stored:
                problems.append(f"{name} is there twice")
            self._stored[name] = tensor
        self._replaced = {} if adapter is None else adapter.replaced
        wanted = {name: p.stored_shape for p in self.parameters.values() for name in p.names}
        if adapter is not None:
            if misfitting := adapter.misfits(wanted):
                raise UserError(
                    f"the adapter in {adapter.folder} is of another model than {self.folder}: "
                    + some(misfitting, 12, "; ")
                )
            if HEAD in wanted and EMBEDDING in self._replaced and EMBEDDING in self._stored:
                # A head that was tied, until the adapter replaced the embedding alone.
                self._stored.setdefault(HEAD, self._stored[EMBEDDING])
        self._modules: dict[str, Module] = {}  # of the weights that are quantised
        expected, scheme = Expected(), self.quantization
        for name, shape in wanted.items():
            module = Module(name.removesuffix("weight"), shape, self._stored)
            if scheme and len(shape) == 2 and scheme.holds(module):
                self._modules[name] = module
                own = scheme.expected(module)
                expected |= {module.name + suffix: known for suffix, known in own.items()}
            elif name in self._stored or name not in self._replaced:
                expected[name] = FLOATS, shape
        used = expected.keys() | self._replaced.keys()
        used |= {HEAD} if config.tie_word_embeddings else set()
        problems += [
            f"unexpected {name}"
            for name, tensor in self._stored.items()
            if name not in used
            and not _NOT_READ.fullmatch(name)
            and not (scheme and scheme.ignores(tensor))
        ]
        problems += misfits(expected, self._stored)
        if problems:
            shown = some(problems, 12, "; ")
            raise UserError(f"the weights in {self.folder} do not fit its config.json: {shown}")
        if config.tie_word_embeddings and HEAD in self._stored:
            head, embedding = self._stored[HEAD], self._stored[EMBEDDING]
            if head.shape != embedding.shape or not np.array_equal(head.read(), embedding.read()):
                raise UserError(
                    f"{self._config_file} ties the embeddings, but lm_head.weight differs from "
                    'them: set "tie_word_embeddings": false if the head was trained'
                )

    def _read(self, name: str, *index: slice) -> np.ndarray:
        """A part of the weight of this name; float32 where it is computed, else as it is stored."""
        if name in self._replaced:
            values = self._replaced[name].read(*index)
        elif name in self._modules:
            values = self.quantization.read(self._modules[name], *index)
        else:
            values = self._stored[name].read(*index)
        if self.adapter is not None and name in self.adapter.added:
            values = values.astype(np.float32) + self.adapter.added[name].part(*index)
        return values

    def fingerprint(self) -> str:
        """sha256 in hex over the sha256 of every block of config and weights, each read once."""

        def digest(block: tuple[Path, int]) -> str:
            file, start = block
            found = sha256(file.name.encode())
            with file.open("rb") as stream:
                stream.seek(start)
                found.update(stream.read(_BLOCK_BYTES))
            return found.hexdigest()

        files = [self._config_file, *sorted({tensor.file for tensor in self._stored.values()})]
        blocks = [
            (file, start)
            for file in files
            for start in range(0, max(1, file.stat().st_size), _BLOCK_BYTES)
        ]
        with ThreadPoolExecutor(_READERS) as pool:
            return sha256("".join(pool.map(digest, blocks)).encode()).hexdigest()

    def load(
        self, layout: Layout, dtype: Any, paths: Collection[str] | None = None
    ) -> dict[str, Any]:
        """The parameter tree, each leaf of `dtype` and split over the mesh as the table says.

        paths: of the parameters that are wanted (default: all)."""
        paths = self.parameters if paths is None else paths

        def leaf(path: str) -> jax.Array:
            shape, spec = self.parameters[path].placement(layout)
            parts: dict[str, np.ndarray] = {}  # which several devices may hold, computed once

            def part(index: tuple[slice, ...]) -> np.ndarray:
                if str(index) not in parts:
                    parts[str(index)] = self._part(path, shape, index).astype(dtype)
                return parts[str(index)]

            return jax.make_array_from_callback(shape, layout.sharding(*spec), part)

        # Two readers: one converts while the other waits for the disk, and no more than two
        # tensors exist twice at any time.
        with ThreadPoolExecutor(2) as pool:
            leaves = list(pool.map(leaf, paths))
        return unflatten_dict(dict(zip(paths, leaves, strict=True)), sep="/")

    def _part(self, path: str, padded: tuple[int, ...], index: tuple[slice, ...]) -> np.ndarray:
        """The block `index` of the parameter of shape `padded`, in the parameter's axes."""
        parameter = self.parameters[path]
        wanted = [s.indices(size)[:2] for s, size in zip(index, padded, strict=True)]
        block = {
            axis: (min(start, size), min(stop, size))
            for (axis, size), (start, stop) in zip(parameter.sizes.items(), wanted, strict=True)
        }
        if any(start == stop for start, stop in block.values()):  # padding alone
            return np.zeros([stop - start for start, stop in wanted], np.float32)
        slices = []
        for outer, *inner in parameter.stored_axes:
            # Of an axis that is two in the parameter only the outer one is ever sharded.
            size = math.prod(parameter.sizes[axis] for axis in inner)
            start, stop = block[outer]
            slices.append(slice(start * size, stop * size))
        names = parameter.names[slice(*block["E"])] if parameter.of_experts else parameter.names
        parts = [self._read(name, *slices) for name in names]
        sizes = [stop - start for start, stop in block.values()]
        tensor = (np.stack(parts) if parameter.of_experts else parts[0]).reshape(sizes)
        room = [(0, j - i - n) for (i, j), n in zip(wanted, tensor.shape, strict=True)]
        return np.pad(tensor, room) if any(after for _, after in room) else tensor


def open_checkpoint(model_path: str | Path, adapter_path: str | None = None) -> Checkpoint:
    """The checkpoint of a model's folder, with the adapter that is asked for, or, where the folder
    is that of an adapter, of the base that it names. Reads headers alone. Raises UserError."""
    folder, adapter_folder = base_and_adapter(str(model_folder(model_path)), adapter_path)
    config, adapter = ModelConfig.from_hf(folder), None
    if adapter_folder is not None:
        adapter = read_adapter(adapter_folder)
        config = adapter.untied(config)
    return Checkpoint(folder, config, adapter)
