"""`--interventions FILE.json`: which hidden states a run changes, and how, checked before it runs.

Each entry names a hook, a condition on tokens and an operation. Which tokens of a sample fulfil
the condition follows from its cell table, so that masks are made here, on the host; what is done
to them is `utils.model.interventions`.
"""

# T tokens of a sample, those that may be generated included   C cells   W width of a hook point

import hashlib
import io
import logging
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from utils.errors import UserError
from utils.model.autoencoder import load_autoencoder
from utils.model.capture import HOOK_POINTS, tokens_in, width_of
from utils.model.config import ModelConfig
from utils.model.interventions import OPS, OVERWRITING, Edit
from utils.plan.donors import Donor
from utils.plan.request import Request
from utils.plan.samples import Sample
from utils.prompt.codec import Codec, Encoded
from utils.shards.items import CELL_COLUMNS
from utils.store.text import read_json

log = logging.getLogger(__name__)

_OF_CELLS = ("role", "pair", "row", "col", "color")
_CONDITIONS = (*_OF_CELLS, "part", "tokens", "samples")
# The keys that an operation needs, and those that it may have.
_KEYS = {
    "zero": ((), ()),
    "set": (("vector",), ()),
    "add": (("vector",), ("alpha",)),
    "scale": (("factor",), ()),
    "ablate_direction": (("vector",), ()),
    "latent": (("sae", "latent"), ("value", "factor")),
    "reconstruct": (("sae",), ()),
    "patch": (("from",), ("sample", "align")),
}


@dataclass(frozen=True, eq=False)
class Intervention:
    """One entry of the file.

    entry: as given, and `sha256`, for the manifest. edit, constants: what is compiled, and the
    arrays that stay the same. donor: of `patch`, the run whose states take the others' place.
    """

    entry: dict[str, Any]
    edit: Edit
    constants: dict[str, Any] = field(default_factory=dict)
    donor: Donor | None = None

    @property
    def where(self) -> dict[str, Any]:
        return self.entry.get("where") or {}

    def mask(self, sample: Sample, encoded: Encoded, room: int = 0) -> np.ndarray:
        """bool [T]: the tokens that are meant, of prompt and forced answer, and of `room` generated
        ones behind them, which hold no cell that is known yet."""
        P, where, tokens = encoded.prompt_length, self.where, np.arange(len(encoded.ids) + room)
        concerned = "samples" not in where or list(sample.key) in where["samples"]
        mask = np.full(len(tokens), concerned)
        if "part" in where:
            mask &= (tokens < P) == (where["part"] == "prompt")
        if "tokens" in where:
            mask &= np.isin(tokens, where["tokens"])
        if any(name in where for name in _OF_CELLS):
            cells = encoded.cells[_meant(encoded.cells, where)]
            mask &= np.isin(tokens, tokens_in(cells[:, 5:], len(tokens)))
        return mask


def read_interventions(
    path: str | None, config: ModelConfig, generates: bool
) -> tuple[Intervention, ...]:
    """The entries of the file, each checked; none without a file. generates: whether answers are
    generated, whose cells are not known. Raises UserError naming the file and the entry."""
    if path is None:
        return ()
    entries = read_json(Path(path))
    if not isinstance(entries, list) or not entries:
        raise UserError(f"{path} must hold a list of interventions, at least one")
    found = []
    for number, entry in enumerate(entries):
        try:
            if not isinstance(entry, dict):
                raise UserError("it must be an object")
            _check_where(entry.get("where"), generates, entry.get("op"))
            found.append(intervention(entry, config))
        except UserError as error:
            raise UserError(f"{path}, entry {number}: {error}") from None
    return tuple(found)


def intervention(entry: dict[str, Any], config: ModelConfig) -> Intervention:
    """An entry, its `where` not looked at. Raises UserError for what it lacks, what does not exist
    and what does not fit the model."""
    op, hook = entry.get("op"), entry.get("hook")
    if op not in OPS:
        raise UserError(f"op {op!r} does not exist; there are {', '.join(OPS)}")
    needed, optional = _KEYS[op]
    if missing := [name for name in needed if name not in entry]:
        raise UserError(f"{op} needs {', '.join(missing)}")
    known = {"hook", "where", "op", *needed, *optional}
    if unknown := sorted(entry.keys() - known):
        raise UserError(f"{op} does not take {', '.join(unknown)}")
    point, _, layer = hook.partition(".") if isinstance(hook, str) else ("", "", "")
    if point not in HOOK_POINTS or (config.num_experts and point == "mlp_act"):
        raise UserError(f"hook {hook!r} does not exist: give one such as resid_post.11")
    if not (layer.isascii() and layer.isdigit() and int(layer) < config.num_layers):
        last = config.num_layers - 1
        raise UserError(f"hook {hook!r}: the model has layers 0 to {last}, such as {point}.{last}")
    hook = f"{point}.{int(layer)}"
    width, noted = width_of(config, hook), dict(entry)
    if op in ("set", "add", "ablate_direction"):
        vector, noted["sha256"] = _vector(entry["vector"], width, hook)
        if op == "add":
            vector = vector * np.float32(_number(entry, "alpha", 1))
        if op == "ablate_direction":
            if not (norm := np.linalg.norm(vector)):
                raise UserError(f"{entry['vector']} holds zeros, which are no direction")
            vector = vector / norm
        return Intervention(noted, Edit(hook, op), {"vector": vector.astype(np.float32)})
    if op == "scale":
        return Intervention(noted, Edit(hook, op), {"factor": np.float32(_number(entry, "factor"))})
    if op in ("latent", "reconstruct"):
        return _with_autoencoder(noted, op, hook, width)
    if op == "patch":
        return _patch(noted, hook, width)
    return Intervention(noted, Edit(hook, op))


def _with_autoencoder(noted: dict[str, Any], op: str, hook: str, width: int) -> Intervention:
    sae = load_autoencoder(_text(noted, "sae"))
    if sae.hook not in (None, hook):
        raise UserError(f"{noted['sae']} is an autoencoder of {sae.hook}, not of {hook}")
    inputs, latents = sae.weights["w_enc"].shape
    if inputs != width:
        raise UserError(f"{noted['sae']} is {inputs} wide, and {hook} is {width}")
    noted["sha256"], constants = sae.sha256, {"weights": sae.weights}
    relative = "factor" in noted
    if op == "latent":
        latent = noted["latent"]
        if type(latent) is not int or not 0 <= latent < latents:
            raise UserError(f"latent {latent!r} does not exist: there are 0 to {latents - 1}")
        if relative == ("value" in noted):
            raise UserError("latent takes either `value` or `factor`")
        amount = _number(noted, "factor" if relative else "value")
        constants |= {"latent": np.int32(latent), "amount": np.float32(amount)}
    return Intervention(noted, Edit(hook, op, sae.architecture, sae.k, relative), constants)


def _patch(noted: dict[str, Any], hook: str, width: int) -> Intervention:
    folder, sample = _text(noted, "from"), noted.get("sample")
    if sample is not None and not _is_key(sample):
        raise UserError(f"sample must be [task_id, sample_idx], not {sample!r}")
    if noted.get("align", "cells") != "cells":
        raise UserError(f'align {noted["align"]!r} does not exist; there is "cells"')
    key = None if sample is None else tuple(sample)
    donor, noted["sha256"] = Donor.of(folder, hook, width, key, "align" in noted)
    return Intervention(noted, Edit(hook, "patch"), {}, donor)


def _check_where(where: Any, generates: bool, op: Any) -> None:
    if where is None:
        where = {}
    if not isinstance(where, dict):
        raise UserError("where must be an object of conditions")
    if unknown := sorted(where.keys() - set(_CONDITIONS)):
        raise UserError(f"where has no {', '.join(unknown)}; there are {', '.join(_CONDITIONS)}")
    for name, choices in (("part", ("prompt", "answer")), ("role", ("input", "output"))):
        if name in where and where[name] not in choices:
            raise UserError(f"{name} is one of {', '.join(choices)}, not {where[name]!r}")
    for name in ("row", "col", "color", "tokens"):
        values = where.get(name, [])
        values = values if isinstance(values, list) else [values]
        if any(type(value) is not int or value < 0 for value in values):
            raise UserError(f"{name} must be a number from 0 or a list, not {where[name]!r}")
    pair = where.get("pair", "test")
    if pair not in ("test", "train") and (type(pair) is not int or pair < 0):
        raise UserError(f"pair is test, train or a train pair's number, not {pair!r}")
    samples = where.get("samples", [])
    if not isinstance(samples, list) or not all(isinstance(key, list) for key in samples):
        raise UserError("samples must be a list of [task_id, sample_idx]")
    of_cells = any(name in where for name in _OF_CELLS)
    of_answer = where.get("part") == "answer" or (
        where.get("pair") == "test" and where.get("role") == "output"
    )
    if generates and of_cells and of_answer:
        raise UserError(
            "the cells of an answer are not known before it is generated: take --teacher_forcing, "
            'or cells of the prompt with "part": "prompt"'
        )
    if generates and op == "patch" and where.get("part") != "prompt" and not of_cells:
        raise UserError(
            'patch takes the place of known tokens: add "part": "prompt", or take --teacher_forcing'
        )


def _meant(cells: np.ndarray, where: dict[str, Any]) -> np.ndarray:
    """bool [C]: the cells that fulfil all conditions on cells."""
    meant = np.ones(len(cells), bool)
    for name in where.keys() & set(_OF_CELLS):
        column, value = cells[:, CELL_COLUMNS.index(name)], where[name]
        if name == "role":
            value = ("input", "output").index(value)
        if name == "pair":
            value = {"test": -1, "train": column[column >= 0]}.get(value, value)
        meant &= np.isin(column, value)
    return meant


def check_interventions(
    request: Request,
    codec: Codec,
    samples: Sequence[Sample],
    interventions: Sequence[Intervention],
) -> None:
    """Says how many tokens of prompts and forced answers each intervention meets.

    Raises UserError for one that meets no token of any sample, for two that overwrite the same hook
    at the same token, and for a donor that lacks what it is asked for.
    """
    forced, path = request.teacher_forcing, request.interventions
    counts, of_all = np.zeros((2, len(interventions)), int)
    for sample in samples:
        encoded = codec.encode(sample.task, sample.sample_idx, sample.num_train_pairs, forced)
        written: dict[str, list[tuple[int, np.ndarray]]] = {}
        for number, one in enumerate(interventions):
            mask = one.mask(sample, encoded, request.room)
            known = mask[: len(encoded.ids)]
            counts[number] += known.sum()
            of_all[number] += mask.sum()
            try:
                if one.donor and known.any():
                    one.donor.values(np.flatnonzero(known), sample, encoded)
            except UserError as error:
                raise UserError(f"{path}, entry {number}: {error}") from None
            if one.edit.op not in OVERWRITING:
                continue
            for other, before in written.setdefault(one.edit.hook, []):
                if (mask & before).any():
                    raise UserError(
                        f"{path}: entries {other} and {number} both overwrite {one.edit.hook} at "
                        f"token {np.argmax(mask & before)} of sample {list(sample.key)}: make "
                        "their `where` exclude each other"
                    )
            written[one.edit.hook].append((number, mask))
    for number, one in enumerate(interventions):
        if not of_all[number]:
            raise UserError(
                f"{path}, entry {number} matches no token of any sample: look at its `where`"
            )
        what = "prompts and forced answers" if forced else "prompts"
        text = "intervention %d, %s at %s: %d tokens of %s"
        log.info(text, number, one.edit.op, one.edit.hook, counts[number], what)


def _vector(path: Any, width: int, hook: str) -> tuple[np.ndarray, str]:
    """float32 [W], and the file's sha256."""
    if not isinstance(path, str):
        raise UserError(f"vector must be the path of a .npy file, not {path!r}")
    try:
        content = Path(path).read_bytes()
        vector = np.lib.format.read_array(io.BytesIO(content), allow_pickle=False)
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror or error}") from error
    except ValueError as error:
        raise UserError(f"{path} is not a .npy file of numbers: {error}") from error
    if vector.shape != (width,):
        raise UserError(f"{path} has shape {list(vector.shape)}, and {hook} is {width} wide")
    if not np.issubdtype(vector.dtype, np.number) or not np.isfinite(vector).all():
        raise UserError(f"{path} must hold finite numbers")
    return vector.astype(np.float32), hashlib.sha256(content).hexdigest()


def _is_key(value: Any) -> bool:
    """Whether it can be a sample's key, with the number of a view or without."""
    if not isinstance(value, list) or len(value) not in (2, 3):
        return False
    return isinstance(value[0], str) and all(type(number) is int for number in value[1:])


def _number(entry: dict[str, Any], name: str, default: float | None = None) -> float:
    value = entry.get(name, default)
    if isinstance(value, bool) or not isinstance(value, int | float) or not np.isfinite(value):
        raise UserError(f"{name} must be a finite number, not {value!r}")
    return float(value)


def _text(entry: dict[str, Any], name: str) -> str:
    if not isinstance(entry[name], str):
        raise UserError(f"{name} must be a path, not {entry[name]!r}")
    return entry[name]
