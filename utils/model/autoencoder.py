"""Sparse autoencoders: read from the forms in which they are published, encoded, and written.

Whatever form an autoencoder was read from, its weights are brought to one: the decoder's bias is
taken from the input, which is then encoded, and added to what the latents decode to. That is how
SAELens has it by default, whose folders are the form that is written. Nothing here needs torch.
"""

# D input width   L latents

import json
import math
import pickle
import re
import zipfile
from dataclasses import dataclass, replace
from functools import partial
from hashlib import file_digest
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes  # also gives numpy the name bfloat16, by which safetensors asks
import numpy as np
from jax import Array
from safetensors import SafetensorError
from safetensors.numpy import load_file, save

from utils.errors import UserError, some
from utils.model.capture import capture_name, hook_name
from utils.store.local import new_folder, write_json, writing

CONFIG, WEIGHTS = "cfg.json", "sae_weights.safetensors"  # of SAELens's folders
FORMER_CONFIG, FORMER_WEIGHTS = "config.json", "sae.safetensors"  # of this project's first ones
FORM = "6.0.0"  # the first SAELens whose folders look like this
ARCHITECTURES = ("standard", "topk", "batchtopk", "jumprelu")
THRESHOLDED = ("batchtopk", "jumprelu")

# In float32 also where a device multiplies float32 in bfloat16 by default.
_matmul = partial(jnp.matmul, precision=jax.lax.Precision.HIGHEST)


@dataclass(frozen=True, eq=False)
class Autoencoder:
    """A trained autoencoder, ready for `encode` and `decode`.

    architecture: "standard" (a latent is active above zero), "topk" (the k highest of a row, where
    above zero), or "batchtopk" and "jumprelu" (above a threshold of its own). k: of topk. hook: the
    capture that it was trained on, such as "resid_post.11", or None where that is not said.
    weights: float32: w_enc [D, L], b_enc [L], w_dec [L, D], b_dec [D], and threshold [L] of the
    last two architectures. sha256: of the weights' file. path: what it was read from.
    """

    architecture: str
    k: int | None
    hook: str | None
    weights: dict[str, np.ndarray]
    sha256: str = ""
    path: str = ""

    @property
    def width(self) -> int:
        return len(self.weights["b_dec"])

    @property
    def num_latents(self) -> int:
        return len(self.weights["b_enc"])

    def encode(self, x: np.ndarray) -> np.ndarray:
        """Activations [..., D] -> latents, float32 [..., L], on the host."""
        encoder = jax.jit(encode, static_argnums=(0, 1))
        return np.asarray(encoder(self.architecture, self.k, self.weights, x))

    def decode(self, latents: np.ndarray) -> np.ndarray:
        """Latents [..., L] -> activations, float32 [..., D], on the host."""
        return np.asarray(jax.jit(decode)(self.weights, latents))

    def save(self, folder: str | Path, about: dict[str, Any]) -> None:
        """Writes a folder in SAELens's form, which `SAE.load_from_disk` of SAELens opens.

        A batchtopk is written as the jumprelu that it is once its threshold is known, as SAELens
        does. about: goes to the `metadata` of cfg.json. Raises UserError where `folder` holds files
        or cannot be written.
        """
        architecture, hook = self.architecture, self.hook
        metadata = {"sae_lens_version": FORM, "training_architecture": architecture, **about}
        if hook is not None:
            metadata["hook_name"] = hook_name(hook)
        config = {
            "architecture": "jumprelu" if architecture == "batchtopk" else architecture,
            "d_in": self.width,
            "d_sae": self.num_latents,
            "dtype": "float32",
            "device": "cpu",
            "apply_b_dec_to_input": True,
            "normalize_activations": "none",
            # SAELens calls TransformerLens's z, which has an axis of heads, by this name.
            "reshape_activations": "hook_z" if (hook or "").startswith("z.") else "none",
            **({"k": self.k} if architecture == "topk" else {}),
            "metadata": metadata,
        }
        tensors = {
            (name if name == "threshold" else name.replace("w_", "W_")): np.ascontiguousarray(value)
            for name, value in self.weights.items()
        }
        with writing(Path(folder)), new_folder(Path(folder)) as made:
            write_json(made / CONFIG, config)
            (made / WEIGHTS).write_bytes(save(tensors))


def encode(architecture: str, k: int | None, weights: Any, x: Any) -> Array:
    """Activations [..., D] of any float dtype -> latents, float32 [..., L], none below zero.

    The latents are SAELens's, but that all of several equal values at the k-th place are kept.
    architecture and k are static under `jit`; weights are traced.
    """
    centered = x.astype(jnp.float32) - weights["b_dec"]
    before = _matmul(centered, weights["w_enc"]) + weights["b_enc"]
    latents = jax.nn.relu(before)
    if architecture == "topk":
        return top(latents, k)
    if architecture in THRESHOLDED:
        return jnp.where(before > weights["threshold"], latents, 0)
    return latents


def decode(weights: Any, latents: Any) -> Array:
    """Latents [..., L] -> activations, float32 [..., D]."""
    return _matmul(latents, weights["w_dec"]) + weights["b_dec"]


def top(values: Any, k: int, axis: int | None = -1) -> Array:
    """Float32 values >= 0, all but the `k` largest along the last axis set to zero; equal to the
    smallest of those, all are kept. With `axis` None, the k largest of the whole array.

    The k-th largest is found bit by bit, unsorted: floats above zero are ordered as their bits are.
    """
    bits = jax.lax.bitcast_convert_type(values, jnp.int32)

    def bit(i: Any, lowest: Any) -> Any:
        higher = lowest | (1 << (30 - i))
        count = (bits >= higher).astype(jnp.int32)
        if count.shape[-1] % 8 == 0:  # on a CPU one sum of a whole row takes three times as long
            count = sum(jnp.split(count, 8, axis=-1))
        return jnp.where(count.sum(axis=axis, keepdims=True) >= k, higher, lowest)

    start = jnp.zeros_like(bits.min(axis=axis, keepdims=True))
    return jnp.where(bits >= jax.lax.fori_loop(0, 31, bit, start), values, 0)


def load_autoencoder(path: str | Path) -> Autoencoder:
    """Reads an autoencoder; nothing that stands in a file is run.

    path: a folder that SAELens or `examples/sae.py` wrote, or a file `layer{n}.sae.pt` of
    Qwen-Scope, whose k is in the name of its folder, as published (`...-L0_50`).

    Raises UserError: there is none, it is damaged, or of a kind that would give other latents.
    """
    path = Path(path)
    try:
        if path.is_file():
            made, file = _from_qwen_scope(path), path
        elif (path / CONFIG).exists():
            made, file = _from_saelens(path), path / WEIGHTS
        elif (path / FORMER_CONFIG).exists():
            made, file = _from_former(path), path / FORMER_WEIGHTS
        else:
            raise UserError(f"neither a folder with {CONFIG} nor a file layer{{n}}.sae.pt")
        _check(made)
        with file.open("rb") as stream:
            digest = file_digest(stream, "sha256").hexdigest()
        return replace(made, sha256=digest, path=str(path))
    except OSError as error:
        why = f"{error.strerror}: {error.filename}" if error.filename else str(error)
    except KeyError as error:
        why = f"{error} is missing"
    except UserError as error:
        why = str(error)
    except (SafetensorError, ValueError, TypeError, AttributeError, zipfile.BadZipFile) as error:
        why = f"it is damaged ({error})"
    raise UserError(f"{path} holds no autoencoder that can be read: {why}")


def _tensors(file: Path) -> dict[str, np.ndarray]:
    return {name: value.astype(np.float32, copy=False) for name, value in load_file(file).items()}


def _from_saelens(folder: Path) -> Autoencoder:
    config = json.loads((folder / CONFIG).read_text())
    about = {**config, **config.get("metadata", {})}  # before SAELens 6 there was no `metadata`
    architecture, k = config.get("architecture", "standard"), config.get("k")
    activation = config.get("activation_fn", config.get("activation_fn_str", "relu"))
    if activation == "topk":
        architecture, k = "topk", config["activation_fn_kwargs"]["k"]
    if architecture not in ARCHITECTURES:
        raise UserError(f"the architecture is {architecture!r}, not one of {some(ARCHITECTURES)}")
    if activation not in ("relu", "topk"):
        raise UserError(f"its activation function is {activation!r}, not relu or topk")
    norm = config.get("normalize_activations") or "none"
    if norm != "none":
        raise UserError(
            f"it normalises its input ({norm!r}), and that is not folded into its weights: take "
            "the folder that SAELens writes when training has ended, or fold it in there"
        )
    if about.get("hook_head_index") is not None:
        raise UserError(f"it was trained on one attention head, number {about['hook_head_index']}")
    found = _tensors(folder / WEIGHTS)
    names = {"W_enc", "b_enc", "W_dec", "b_dec"}
    if architecture in THRESHOLDED:
        if "topk_threshold" in found:  # one for all, of a batchtopk in training
            found["threshold"] = np.full_like(found["b_enc"], found.pop("topk_threshold").item())
        if "log_threshold" in found:
            found["threshold"] = np.exp(found.pop("log_threshold"))
        names.add("threshold")
    if surplus := sorted(found.keys() - names):
        raise UserError(f"{WEIGHTS} holds {some(surplus)}, whose meaning is not known")
    weights = {name.lower(): found[name] for name in sorted(names)}
    if config.get("rescale_acts_by_decoder_norm"):
        norms = np.linalg.norm(weights["w_dec"], axis=1)
        weights["w_enc"], weights["b_enc"] = weights["w_enc"] * norms, weights["b_enc"] * norms
        weights["w_dec"] = weights["w_dec"] / norms[:, None]
    if not config.get("apply_b_dec_to_input", True):
        weights = _taking_the_bias(weights)
    hook = about.get("hook_name", about.get("hook_point"))
    hook = hook and capture_name(hook)
    return Autoencoder(architecture, int(k) if architecture == "topk" else None, hook, weights)


def _taking_the_bias(weights: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """The same autoencoder where its decoder's bias was not taken from the input so far."""
    share = weights["b_dec"].astype(np.float64) @ weights["w_enc"]
    return {**weights, "b_enc": (weights["b_enc"] + share).astype(np.float32)}


def _from_former(folder: Path) -> Autoencoder:
    """Of this project's first form, which stored the normalisation beside the weights."""
    config = json.loads((folder / FORMER_CONFIG).read_text())
    found = _tensors(folder / FORMER_WEIGHTS)
    names = {"w_enc": "encoder", "b_enc": "bias", "w_dec": "decoder", "b_dec": "shift"}
    weights = {name: found[former] for name, former in names.items()}
    weights = folded(weights, found["center"], found["scale"].item())
    return Autoencoder("topk", config["k"], config.get("activation"), weights)


def folded(
    weights: dict[str, np.ndarray], center: np.ndarray, scale: float
) -> dict[str, np.ndarray]:
    """Weights for x where `weights` are for (x - center) / scale. Latents are `scale` times as
    large, so that the decoder's rows stay as long as they are."""
    scale = np.float32(scale)
    grown = {name: weights[name] * scale for name in ("b_enc", "threshold") if name in weights}
    return {**weights, **grown, "b_dec": weights["b_dec"] * scale + center}


def _strided(storage: np.ndarray, offset: int, shape: Any, strides: Any, *_: Any) -> np.ndarray:
    """float32 of this shape: the tensor that begins at `offset` of a storage."""
    last = offset + sum((n - 1) * s for n, s in zip(shape, strides, strict=True))
    if min(offset, *shape, *strides) < 0 or (math.prod(shape) and last >= len(storage)):
        raise ValueError("a tensor reaches beyond its storage")
    steps = [s * storage.itemsize for s in strides]
    view = np.lib.stride_tricks.as_strided(storage[offset:], shape, steps, writeable=False)
    return np.ascontiguousarray(view, np.float32)


class _TorchUnpickler(pickle.Unpickler):
    """What `torch.save` wrote, as dicts of numpy arrays; any other name than those of a tensor is
    refused, so that nothing of the pickle's own is run."""

    _KNOWN = {  # noqa: RUF012
        "collections.OrderedDict": dict,
        "torch.FloatStorage": np.dtype(np.float32),
        "torch.HalfStorage": np.dtype(np.float16),
        "torch.BFloat16Storage": np.dtype(ml_dtypes.bfloat16),
        "torch._utils._rebuild_tensor_v2": _strided,
        "torch._utils._rebuild_parameter": lambda tensor, *_: tensor,
    }

    def __init__(self, archive: zipfile.ZipFile, root: str):
        super().__init__(archive.open(f"{root}/data.pkl"))
        self._archive, self._root = archive, root

    def find_class(self, module: str, name: str) -> Any:
        if (asked := f"{module}.{name}") not in self._KNOWN:
            raise UserError(f"it asks for {asked!a:.80}, which is no part of a tensor")
        return self._KNOWN[asked]

    def persistent_load(self, pid: Any) -> np.ndarray:
        _, dtype, key, _, count = pid
        entry = self._archive.getinfo(f"{self._root}/data/{int(key)}")
        if entry.file_size != count * dtype.itemsize or entry.compress_type != zipfile.ZIP_STORED:
            raise ValueError(f"storage {key} has {entry.file_size} bytes")
        return np.frombuffer(self._archive.read(entry), dtype)


def _from_qwen_scope(file: Path) -> Autoencoder:
    """Of Qwen-Scope (Qwen team, 2026): topk, with the matrices as torch's linear layers have them,
    [L, D] and [D, L], and the decoder's bias not taken from the input."""
    layer = re.fullmatch(r"layer(\d+)\.sae\.pt", file.name)
    if not layer:
        raise UserError("of files, those called layer{n}.sae.pt are read, as Qwen-Scope has them")
    k = re.findall(r"L0_(\d+)", str(file.absolute().parent))
    if not k:
        raise UserError(
            "its k is not in the file: give its folder the name that it is published under, which "
            "ends in -L0_50 or another k"
        )
    with zipfile.ZipFile(file) as archive:
        names = [n for n in archive.namelist() if re.fullmatch(r"[^/]+/data\.pkl", n)]
        if len(names) != 1:
            raise ValueError("it holds no data.pkl")
        try:
            found = _TorchUnpickler(archive, names[0].partition("/")[0]).load()
        except (pickle.UnpicklingError, EOFError, IndexError, OverflowError) as error:
            raise ValueError(f"a broken pickle: {error}") from error
    weights = {name: found[name] for name in ("b_enc", "b_dec")}
    weights |= {n: np.ascontiguousarray(found[n.capitalize()].T) for n in ("w_enc", "w_dec")}
    return Autoencoder("topk", int(k[-1]), f"resid_post.{layer[1]}", _taking_the_bias(weights))


def _check(made: Autoencoder) -> None:
    """Raises UserError unless shapes fit each other and all weights are finite."""
    weights = made.weights
    if weights["w_enc"].ndim != 2:
        raise UserError(f"w_enc has shape {list(weights['w_enc'].shape)}, which is no matrix")
    D, L = weights["w_enc"].shape
    shapes = {"b_enc": (L,), "w_dec": (L, D), "b_dec": (D,), "threshold": (L,)}
    for name, value in weights.items():
        if value.shape != shapes.get(name, (D, L)):
            raise UserError(
                f"{name} has shape {list(value.shape)}, which does not fit w_enc's {[D, L]}"
            )
        if not np.isfinite(value).all():
            raise UserError(f"{name} holds values that are not finite")
    if made.architecture == "topk" and not 0 < made.k <= L:
        raise UserError(f"its k, {made.k}, is not between 1 and its {L} latents")
