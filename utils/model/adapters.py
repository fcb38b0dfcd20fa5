"""LoRA adapters as peft stores them (Hu et al. 2021), merged into a weight as it is loaded.

An adapter fits by the names and shapes of its tensors, whatever base its file names. What is not
plain LoRA is refused by name.
"""

# O outputs, rows of a weight   I inputs, its columns   R rank

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from hashlib import file_digest, sha256
from pathlib import Path
from typing import Any

import numpy as np

from utils.errors import UserError
from utils.model.config import ModelConfig
from utils.model.files import EMBEDDING, FLOATS, HEAD, Stored, model_folder, stored_in
from utils.store.text import read_json

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"

# Fields that are read, or say what was trained, how and on what; the tensors say the rest.
_KNOWN = (
    {"peft_type", "r", "lora_alpha", "use_rslora", "rank_pattern", "alpha_pattern"}
    | {"init_lora_weights", "base_model_name_or_path", "ensure_weight_tying"}
    | {"target_modules", "exclude_modules", "modules_to_save", "layers_to_transform", "bias"}
    | {"layers_pattern", "lora_dropout", "task_type", "auto_mapping", "peft_version", "revision"}
    | {"inference_mode", "megatron_config", "megatron_core", "runtime_config", "loftq_config"}
    | {"eva_config", "corda_config", "lora_ga_config", "velora_config", "qalora_group_size"}
    # Of a linear layer peft sets it to false, and this decoder has no other.
    | {"fan_in_fan_out"}
)
# Initialisations that take from the base what they put into the adapter.
_CHANGE_THE_BASE = ("pissa", "corda", "olora", "loftq", "lora_ga")
_FACTOR = re.compile(r"(.+)\.lora_(embedding_)?([AB])(\.default)?(\.weight)?")


@dataclass(frozen=True)
class LowRank:
    """What is added to a weight: scaling * B A, A [R, I] and B [O, R]; of an embedding, whose
    weight is stored with the inputs as rows, its transpose."""

    a: Stored
    b: Stored
    scaling: float
    embedding: bool

    @property
    def shape(self) -> tuple[int, int]:
        """Of the weight that it fits."""
        shape = self.b.shape[0], self.a.shape[1]
        return shape[::-1] if self.embedding else shape

    def part(self, rows: slice, columns: slice) -> np.ndarray:
        """float32 [rows, columns]: what is added to that part of the weight."""
        if self.embedding:
            rows, columns = columns, rows
        a = self.a.read(slice(None), columns).astype(np.float32)
        b = self.b.read(rows).astype(np.float32)
        change = (b @ a) * np.float32(self.scaling)
        return change.T if self.embedding else change


@dataclass(frozen=True)
class Adapter:
    """A folder of an adapter.

    added: name of a weight in the base -> what is added to it. replaced: name -> the tensor that
    takes its place. tied: whether an embedding that it replaces is also the head.
    """

    folder: Path
    added: Mapping[str, LowRank]
    replaced: Mapping[str, Stored]
    tied: bool

    @cached_property
    def hash(self) -> str:
        """sha256 over the sha256 of both files."""
        whole = sha256()
        for name in (CONFIG, WEIGHTS):
            with open(self.folder / name, "rb") as file:
                whole.update(file_digest(file, "sha256").digest())
        return whole.hexdigest()

    def untied(self, config: ModelConfig) -> ModelConfig:
        """The configuration of the merged model: a head or an embedding that the adapter replaces
        alone is tied no more. Raises UserError where what it adds would leave that open."""
        if not config.tie_word_embeddings:
            return config
        if ends := [name for name in (EMBEDDING, HEAD) if name in self.added]:
            raise UserError(
                f"{self.folder} adds to {ends[0]}, which the model uses as embedding and as head: "
                "peft's merged model and its adapter differ there, so which is meant is not clear; "
                "merge it and save the model yourself"
            )
        own = {HEAD, EMBEDDING} & set(self.replaced)
        if not own or (self.tied and HEAD not in own):
            return config
        return replace(config, tie_word_embeddings=False)

    def misfits(self, shapes: Mapping[str, tuple[int, ...]]) -> list[str]:
        """What does not fit a model whose weights have these shapes, by their names in a
        checkpoint."""
        own = [(name, "what is added", change.shape) for name, change in self.added.items()]
        own += [(name, "here", tensor.shape) for name, tensor in self.replaced.items()]
        return [f"no {name}" for name, *_ in own if name not in shapes] + [
            f"{name} has shape {list(shapes[name])}, and {what} {list(shape)}"
            for name, what, shape in own
            if shapes.get(name, shape) != shape
        ]


def base_and_adapter(model_path: str, adapter_path: str | None) -> tuple[Path, Path | None]:
    """The folder of the model and that of the adapter, where one is asked for; a model_path that is
    itself an adapter names its base. Raises UserError for a base that is not there, and where two
    models could be meant."""
    folder = Path(model_path)
    if not (folder / CONFIG).exists():
        return folder, None if adapter_path is None else Path(adapter_path)
    if any(folder.glob("model*.safetensors")):
        raise UserError(
            f"{folder} holds a whole model and {CONFIG}: move {CONFIG} away to run that model, or "
            "give the adapter a folder of its own"
        )
    if adapter_path is not None:
        raise UserError(
            f"--model_path {folder} is an adapter, and so is --adapter {adapter_path}: give the "
            "folder of the model as --model_path, and one adapter"
        )
    name = _fields(folder).get("base_model_name_or_path")
    named = [Path(name), folder / name] if isinstance(name, str) and name else []
    base = next((path for path in named if path.is_dir()), None)
    if base is None:
        raise UserError(
            f"{folder} is an adapter, and its base {name!r} is no folder here: give --model_path "
            f"BASE --adapter {folder}"
        )
    if (base / CONFIG).exists():
        raise UserError(f"{folder} is an adapter, and so is its base {base}: merge the latter")
    return model_folder(base), folder


def read_adapter(folder: Path) -> Adapter:
    """The adapter in a folder. Raises UserError for one that is damaged or no plain LoRA."""
    fields = _fields(folder)
    _check(folder, fields)
    if not (folder / WEIGHTS).exists():
        raise UserError(
            f"{folder} has no {WEIGHTS}: copy it there too; a .bin is converted by loading it "
            "with peft and save_pretrained"
        )
    factors: dict[str, dict[str, Stored]] = {}
    replaced, embedded = {}, set()
    for tensor in stored_in(folder / WEIGHTS):
        name = tensor.name.removeprefix("base_model.model.")
        if tensor.dtype not in FLOATS:
            raise UserError(f"{folder}/{WEIGHTS}: {tensor.name} has dtype {tensor.dtype}")
        if match := _FACTOR.fullmatch(name):
            factors.setdefault(match[1], {})[match[3]] = tensor
            embedded |= {match[1]} if match[2] else set()
        else:
            replaced[re.sub(r"\.(base_layer|modules_to_save(\.default)?)\b", "", name)] = tensor
    if not factors and not replaced:
        raise UserError(f"{folder}/{WEIGHTS} holds no tensors: copy the adapter there again")
    try:
        added = {
            f"{module}.weight": _low_rank(module, pair, fields, module in embedded)
            for module, pair in factors.items()
        }
    except (ValueError, TypeError, AttributeError, re.error) as error:
        raise UserError(f"{folder}: {error}") from error
    return Adapter(folder, added, replaced, bool(fields.get("ensure_weight_tying")))


def _fields(folder: Path) -> dict[str, Any]:
    path = folder / CONFIG
    if not path.exists():
        raise UserError(f"--adapter {folder} has no {CONFIG}: give the folder of a peft adapter")
    fields = read_json(path)
    if not isinstance(fields, dict):
        raise UserError(f"{path} does not hold a JSON object")
    return fields


def _check(folder: Path, fields: Mapping[str, Any]) -> None:
    advice = "only plain LoRA can be merged here; merge it with peft and save the model"
    if fields.get("peft_type") != "LORA":
        raise UserError(
            f"{folder}: peft_type {fields.get('peft_type')!r} is not supported: {advice}"
        )
    start = fields.get("init_lora_weights")
    if isinstance(start, str) and start.lower().startswith(_CHANGE_THE_BASE):
        raise UserError(f"{folder}: {start} changes the base too: {advice}")
    if unknown := sorted(name for name, value in fields.items() if value and name not in _KNOWN):
        raise UserError(f"{folder}: {', '.join(unknown)} is not supported: {advice}")


def _low_rank(
    module: str, pair: Mapping[str, Stored], fields: Mapping[str, Any], embedding: bool
) -> LowRank:
    """Raises ValueError for factors that do not belong together, TypeError for fields that are of
    another type than peft's."""
    if missing := {"A", "B"} - set(pair):
        raise ValueError(f"lora_{missing.pop()} of {module} is missing")
    a, b = pair["A"], pair["B"]
    rank = _by_pattern(fields.get("rank_pattern"), module, fields.get("r"))
    alpha = _by_pattern(fields.get("alpha_pattern"), module, fields.get("lora_alpha"))
    fits = len(a.shape) == len(b.shape) == 2 and a.shape[0] == b.shape[1] == rank and rank > 0
    if not fits:
        raise ValueError(
            f"A {list(a.shape)} and B {list(b.shape)} of {module} are not of rank {rank}, as "
            f"{CONFIG} says"
        )
    if not isinstance(alpha, int | float):
        raise ValueError(f"lora_alpha {alpha!r} of {module} is no number")
    scaling = alpha / math.sqrt(rank) if fields.get("use_rslora") else alpha / rank
    return LowRank(a, b, scaling, embedding)


def _by_pattern(patterns: Mapping[str, Any] | None, module: str, default: Any) -> Any:
    """The value of the first pattern that a module's name ends with, as peft's `get_pattern_key`
    finds it."""
    for pattern, value in (patterns or {}).items():
        if re.match(rf"(.*\.)?({pattern})$", module):
            return value
    return default
