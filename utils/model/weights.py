"""One table from Hugging Face tensor names to Flax paths, axes and sharding; safetensors -> params.

Each process reads from disk only the slices that its devices hold. Every tensor of the model
matches exactly one row; what is missing, unexpected or mis-shaped is reported together.
"""

# D model width   F mlp width   N query heads   K key/value heads   H head width   V vocabulary

import json
import re
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict
from jax.sharding import PartitionSpec
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from utils.errors import UserError
from utils.model.config import ModelConfig
from utils.model.decoder import Decoder
from utils.model.layout import Layout
from utils.model.mesh import single_device_mesh

P = PartitionSpec


@dataclass(frozen=True)
class Weight:
    """hf: pattern of the checkpoint's name. axes: the checkpoint's axes -> the parameter's, where
    `(N H)` is one axis on disk that is two in the parameter. spec: the split over the mesh;
    by_sequence: that of attention whose heads do not divide it, where different (`Layout`).
    """

    hf: str
    path: str
    axes: str
    spec: PartitionSpec
    by_sequence: PartitionSpec | None = None


_LAYER, _BLOCK = r"model\.layers\.(\d+)\.", "layers_{0}/"
_ATTENTION, _MLP = _LAYER + r"self_attn\.", _LAYER + r"mlp\."
TABLE = (
    Weight(r"model\.embed_tokens\.weight", "embedding", "V D -> V D", P("model", None)),
    Weight(r"lm_head\.weight", "head", "V D -> D V", P(None, "model")),
    Weight(r"model\.norm\.weight", "final_norm/scale", "D -> D", P(None)),
    Weight(_LAYER + r"input_layernorm\.weight", _BLOCK + "attention_norm/scale", "D -> D", P(None)),
    Weight(
        _LAYER + r"post_attention_layernorm\.weight", _BLOCK + "mlp_norm/scale", "D -> D", P(None)
    ),
    *(
        row
        for hf, name, heads in (("q", "query", "N"), ("k", "key", "K"), ("v", "value", "K"))
        for row in (
            Weight(
                _ATTENTION + hf + r"_proj\.weight",
                _BLOCK + f"attention/{name}",
                f"({heads} H) D -> D {heads} H",
                P(None, "model", None),
                P("model", None, None),
            ),
            Weight(
                _ATTENTION + hf + r"_proj\.bias",
                _BLOCK + f"attention/{name}_bias",
                f"({heads} H) -> {heads} H",
                P("model", None),
                P(None, None),
            ),
        )
    ),
    Weight(
        _ATTENTION + r"q_norm\.weight", _BLOCK + "attention/query_norm/scale", "H -> H", P(None)
    ),
    Weight(_ATTENTION + r"k_norm\.weight", _BLOCK + "attention/key_norm/scale", "H -> H", P(None)),
    Weight(
        _ATTENTION + r"o_proj\.weight",
        _BLOCK + "attention/out",
        "D (N H) -> N H D",
        P("model", None, None),
        P(None, None, "model"),
    ),
    Weight(_ATTENTION + r"o_proj\.bias", _BLOCK + "attention/out_bias", "D -> D", P(None)),
    *(
        row
        for name in ("gate", "up")
        for row in (
            Weight(
                _MLP + name + r"_proj\.weight",
                _BLOCK + f"mlp/{name}",
                "F D -> D F",
                P(None, "model"),
            ),
            Weight(_MLP + name + r"_proj\.bias", _BLOCK + f"mlp/{name}_bias", "F -> F", P("model")),
        )
    ),
    Weight(_MLP + r"down_proj\.weight", _BLOCK + "mlp/down", "D F -> F D", P("model", None)),
    Weight(_MLP + r"down_proj\.bias", _BLOCK + "mlp/down_bias", "D -> D", P(None)),
)
# Buffers that old checkpoints carry and the configuration already determines.
_DERIVED = re.compile(r".*\.rotary_emb\.inv_freq")
_BLOCK_BYTES, _SAMPLE_BYTES = 1 << 26, 1 << 12  # of a fingerprint
_STORED_DTYPES = ("F32", "BF16", "F16")


def row_of(name: str) -> tuple[Weight, str] | None:
    """The table row that a checkpoint's tensor matches, and its Flax path."""
    for row in TABLE:
        if match := re.fullmatch(row.hf, name):
            return row, row.path.format(*match.groups())
    return None


@dataclass(frozen=True)
class Placement:
    """A parameter on the mesh: its shape there, and how it is split over it."""

    shape: tuple[int, ...]
    spec: PartitionSpec
    padded: bool  # with zeros, where a width or the vocabulary does not divide the model axis


def placement(path: str, shape: tuple[int, ...], layout: Layout) -> Placement:
    """Of the parameter at a Flax path, whose shape in the checkpoint's model is `shape`."""
    row, _ = row_of(_hf_name(path))
    spec = row.spec if layout.by_heads or row.by_sequence is None else row.by_sequence
    sizes, split = list(shape), list(spec)
    for i, (axis, size) in enumerate(zip(_axes(row)[1], shape, strict=True)):
        if split[i] == "model" and size % layout.model:
            if axis in ("F", "V"):
                sizes[i] = layout.padded(size)
            else:
                split[i] = None
    return Placement(tuple(sizes), P(*split), tuple(sizes) != shape)


def abstract_params(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Flax path -> shape of every parameter, nothing computed."""
    tokens = jax.ShapeDtypeStruct((1, 1), jnp.int32)
    model = Decoder(config, Layout.of(config, single_device_mesh()))
    tree = jax.eval_shape(
        lambda t: model.init(jax.random.key(0), t, t, method=Decoder.initialize), tokens
    )
    return {path: leaf.shape for path, leaf in flatten_dict(tree["params"], sep="/").items()}


class Checkpoint:
    """The tensors of a folder of safetensors files, checked against the configuration.

    files: name -> file that holds it. Raises UserError for a folder without safetensors files, and
    one error for all tensors that are missing, unexpected, mis-shaped or of an unknown dtype.
    """

    def __init__(self, model_path: str | Path, config: ModelConfig):
        self.folder, self.config = Path(model_path), config
        self.shapes = abstract_params(config)
        self._names: dict[str, str] = {}  # Flax path -> checkpoint name
        self._files: dict[str, Path] = {}
        problems = []
        for name, file, shape, dtype in self._entries():
            if _DERIVED.fullmatch(name):
                continue
            found = row_of(name)
            if name == "lm_head.weight" and config.tie_word_embeddings:
                self._files[name] = file
                continue
            if found is None or found[1] not in self.shapes:
                problems.append(f"unexpected {name}")
                continue
            row, path = found
            want = _stored_shape(row, self.shapes[path])
            if shape != want:
                problems.append(f"{name} has shape {list(shape)}, not {list(want)}")
            elif dtype not in _STORED_DTYPES:
                problems.append(f"{name} has dtype {dtype}, not one of {', '.join(_STORED_DTYPES)}")
            elif path in self._names:
                problems.append(f"{name} is there twice")
            self._names[path] = name
            self._files[name] = file
        missing = [path for path in self.shapes if path not in self._names]
        problems += [f"missing {_hf_name(path)}" for path in missing]
        if problems:
            shown = "; ".join(problems[:12])
            more = f"; and {len(problems) - 12} more" if len(problems) > 12 else ""
            raise UserError(
                f"the weights in {self.folder} do not fit its config.json: {shown}{more}"
            )
        if config.tie_word_embeddings and "lm_head.weight" in self._files:
            self._check_tied()

    def _entries(self) -> Iterator[tuple[str, Path, tuple[int, ...], str]]:
        index = self.folder / "model.safetensors.index.json"
        if index.exists():
            try:
                names = json.loads(index.read_text())["weight_map"].values()
                files = [self.folder / name for name in sorted(set(names))]
            except (ValueError, KeyError, TypeError, AttributeError, OSError) as error:
                raise UserError(
                    f"{index} is not a safetensors index ({error}): fetch it again"
                ) from error
        else:
            files = sorted(self.folder.glob("*.safetensors"))
        if not files:
            if any(self.folder.glob("*.bin")):
                raise UserError(
                    f"{self.folder} holds only .bin weights; convert them with transformers: "
                    "AutoModelForCausalLM.from_pretrained(folder).save_pretrained(new_folder), "
                    "which writes safetensors"
                )
            raise UserError(f"{self.folder} has no .safetensors weights: copy them there too")
        for file in files:
            if not file.exists():
                raise UserError(f"{index} names {file.name}, which is not there: copy it too")
            try:
                with safe_open(file, "numpy") as tensors:
                    for name in tensors.keys():  # noqa: SIM118 (not a dict)
                        entry = tensors.get_slice(name)
                        yield name, file, tuple(entry.get_shape()), entry.get_dtype()
            except (SafetensorError, OSError) as error:
                raise UserError(
                    f"{file} is damaged or not a safetensors file ({error}): fetch it again"
                ) from error

    def _check_tied(self) -> None:
        head, embedding = (
            self._read(name, (slice(None),))
            for name in ("lm_head.weight", self._names["embedding"])
        )
        if head.shape != embedding.shape or not np.array_equal(head, embedding):
            raise UserError(
                f"{self.folder}/config.json ties the embeddings, but lm_head.weight differs from "
                'them: set "tie_word_embeddings": false if the head was trained'
            )

    def _read(self, name: str, index: tuple[slice, ...]) -> np.ndarray:
        # Opened for each tensor, so that the pages of a mapped file do not pile up in memory.
        with safe_open(self._files[name], "numpy") as tensors:
            return tensors.get_slice(name)[index]

    def digests(self, index: int = 0, count: int = 1) -> tuple[str, dict[int, str]]:
        """Of config and weights, block by block: sha256 over the first bytes of every block, and
        number -> sha256 of the blocks that are this process's share, every `count`-th.

        `fingerprint` makes one hash of the shares of all processes.
        """
        own, seen = {}, sha256()
        files = [self.folder / "config.json", *sorted(set(self._files.values()))]
        blocks = [
            (file, start)
            for file in files
            for start in range(0, max(1, file.stat().st_size), _BLOCK_BYTES)
        ]
        for number, (file, start) in enumerate(blocks):
            mine = number % count == index
            with file.open("rb") as stream:
                stream.seek(start)
                block = stream.read(_BLOCK_BYTES if mine else _SAMPLE_BYTES)
            seen.update(f"{file.name} {file.stat().st_size}".encode() + block[:_SAMPLE_BYTES])
            if mine:
                own[number] = sha256(file.name.encode() + block).hexdigest()
        return seen.hexdigest(), own

    def load(self, layout: Layout, dtype: Any) -> dict[str, Any]:
        """The parameter tree, each leaf of `dtype` and split over the mesh as the table says."""

        def leaf(path: str) -> jax.Array:
            row, _ = row_of(self._names[path])
            place = placement(path, self.shapes[path], layout)
            sharding = layout.sharding(*place.spec)

            def part(index: tuple[slice, ...]) -> np.ndarray:
                return self._part(path, row, place.shape, index).astype(dtype)

            return jax.make_array_from_callback(place.shape, sharding, part)

        # Two readers: one converts while the other waits for the disk, and no more than two
        # tensors exist twice at any time.
        with ThreadPoolExecutor(2) as pool:
            leaves = list(pool.map(leaf, self.shapes))
        return unflatten_dict(dict(zip(self.shapes, leaves, strict=True)), sep="/")

    def _part(
        self, path: str, row: Weight, padded: tuple[int, ...], index: tuple[slice, ...]
    ) -> np.ndarray:
        """The block `index` of the parameter of shape `padded`, in the parameter's axes."""
        stored, axes = _axes(row)
        shape = dict(zip(axes, self.shapes[path], strict=True))
        wanted = [s.indices(size)[:2] for s, size in zip(index, padded, strict=True)]
        block = {
            a: (min(i, shape[a]), min(j, shape[a])) for a, (i, j) in zip(axes, wanted, strict=True)
        }
        slices = []
        for group in stored:
            # Of an axis that is two in the parameter only the outer one is ever sharded.
            inner = int(np.prod([shape[axis] for axis in group[1:]], dtype=int))
            start, stop = block[group[0]]
            slices.append(slice(start * inner, stop * inner))
        tensor = self._read(self._names[path], tuple(slices))
        flat = [axis for group in stored for axis in group]
        tensor = tensor.reshape([block[axis][1] - block[axis][0] for axis in flat])
        tensor = tensor.transpose([flat.index(axis) for axis in axes])
        room = [(0, j - i - n) for (i, j), n in zip(wanted, tensor.shape, strict=True)]
        return np.pad(tensor, room) if any(after for _, after in room) else tensor


def fingerprint(shares: Iterable[dict[Any, str]]) -> str:
    """sha256 over the sha256 of every block, from the shares that `Checkpoint.digests` gives."""
    digests = {int(number): digest for share in shares for number, digest in share.items()}
    return sha256("".join(digests[number] for number in sorted(digests)).encode()).hexdigest()


def _axes(row: Weight) -> tuple[list[list[str]], list[str]]:
    """Axes on disk, grouped, and axes of the parameter."""
    left, right = row.axes.split(" -> ")
    groups = re.findall(r"\(([^)]*)\)|(\S+)", left)
    return [(group or single).split() for group, single in groups], right.split()


def _stored_shape(row: Weight, shape: tuple[int, ...]) -> tuple[int, ...]:
    stored, axes = _axes(row)
    sizes = dict(zip(axes, shape, strict=True))
    return tuple(int(np.prod([sizes[axis] for axis in group], dtype=int)) for group in stored)


def _hf_name(path: str) -> str:
    """Checkpoint name of a Flax path, for messages."""
    for row in TABLE:
        pattern = re.escape(row.path).replace(r"\{0\}", r"(\d+)")
        if match := re.fullmatch(pattern, path):
            name = row.hf.replace("\\", "")
            return name.replace("(d+)", match.group(1)) if match.groups() else name
    raise KeyError(path)


def outline(folder: str | Path) -> None:
    """Writes `model.safetensors` for the `config.json` of a folder, bfloat16, all zeros and, where
    the file system knows sparse files, taking no room: for planning runs of a model not at hand."""
    folder, header, size = Path(folder), {}, 0
    for path, shape in abstract_params(ModelConfig.from_hf(folder)).items():
        name = _hf_name(path)
        stored = _stored_shape(row_of(name)[0], shape)
        end = size + 2 * int(np.prod(stored))
        header[name] = {"dtype": "BF16", "shape": stored, "data_offsets": [size, end]}
        size = end
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with open(folder / "model.safetensors", "wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        file.truncate(8 + len(text) + size)


def write_checkpoint(folder: str | Path, fields: dict[str, Any], params: dict[str, Any]) -> None:
    """Writes `config.json` with `fields` and a parameter tree as bfloat16 in one safetensors file.

    params: as `Checkpoint.load` gives it, on one device. Raises UserError where it cannot.
    """
    tensors = {}
    for path, leaf in flatten_dict(params, sep="/").items():
        name = _hf_name(path)
        stored, axes = _axes(row_of(name)[0])
        flat = [axes.index(axis) for group in stored for axis in group]
        tensor = np.asarray(leaf).astype(jnp.bfloat16).transpose(flat)
        tensors[name] = tensor.reshape(_stored_shape(row_of(name)[0], leaf.shape))
    _write(Path(folder), fields, tensors)


def write_random_checkpoint(folder: str | Path, fields: dict[str, Any], seed: int = 0) -> None:
    """Writes `config.json` with `fields` and random bfloat16 weights in one safetensors file.

    For examples and benchmarks: the shapes of a real model, the knowledge of none. Kernels have
    standard deviation 1 / sqrt(inputs), embeddings 0.05, norm scales stay near 1.
    """
    random = np.random.default_rng(seed)
    tensors = {}
    for path, shape in abstract_params(ModelConfig.from_dict(fields)).items():
        name = _hf_name(path)
        row, _ = row_of(name)
        stored = _stored_shape(row, shape)
        noise = random.standard_normal(stored, dtype=np.float32)
        if path.endswith("scale"):
            noise = 1 + 0.1 * noise
        elif len(stored) == 1:
            noise *= 0.1
        else:
            noise *= 0.05 if path in ("embedding", "head") else stored[1] ** -0.5
        tensors[name] = noise.astype(jnp.bfloat16)
    _write(Path(folder), fields, tensors)


def _write(folder: Path, fields: dict[str, Any], tensors: dict[str, np.ndarray]) -> None:
    """A checkpoint folder; tensors: bfloat16, by their names in the checkpoint."""
    whole = {name: np.ascontiguousarray(tensor) for name, tensor in tensors.items()}
    try:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "config.json").write_text(json.dumps(fields, indent=2) + "\n")
        save_file(whole, folder / "model.safetensors", metadata={"format": "pt"})
        (folder / "model.safetensors").chmod(0o644)  # safetensors keeps it to its owner
    except (SafetensorError, OSError) as error:  # a full disk is either
        raise UserError(f"cannot write the weights to {folder}: {error}") from error
