"""Which files of a model's folder hold its weights, as transformers decides, and their tensors.

Of a folder in the hub's cache, the snapshot that is meant; of the weights, the files, the tensors
in them, of which no more is read than is asked for, and the names that these have.
"""

import json
import logging
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import ml_dtypes
import numpy as np
from safetensors import SafetensorError, safe_open

from utils.errors import UserError, some
from utils.store.text import GIT_LFS

ONE_FILE, INDEX = "model.safetensors", "model.safetensors.index.json"
EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"
FLOATS = ("F32", "BF16", "F16")
# Types of which the numpy side of safetensors has no name, and whose bytes are read here.
_EIGHT_BITS = {"F8_E4M3": ml_dtypes.float8_e4m3fn, "F8_E8M0": ml_dtypes.float8_e8m0fnu}
_PART = re.compile(r"model-\d+-of-(\d+)\.safetensors")
log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Stored:
    """A tensor on the disk; dtype is the name that safetensors gives it, such as `BF16`."""

    name: str
    file: Path
    shape: tuple[int, ...]
    dtype: str

    def read(self, *index: slice) -> np.ndarray:
        """Its values where the first axes are cut as `index` says; no more is read than that."""
        # Opened for each tensor, so that the pages of a mapped file do not pile up in memory.
        if self.dtype in _EIGHT_BITS:
            return self._bytes().view(_EIGHT_BITS[self.dtype])[index].copy()
        with safe_open(self.file, "numpy") as tensors:
            if not index:
                return tensors.get_tensor(self.name)
            return tensors.get_slice(self.name)[index]

    def _bytes(self) -> np.ndarray:
        """A file of safetensors is the length of its header, the header, and the tensors."""
        with open(self.file, "rb") as stream:
            length = int.from_bytes(stream.read(8), "little")
            begin = json.loads(stream.read(length))[self.name]["data_offsets"][0]
        return np.memmap(self.file, np.uint8, "r", 8 + length + begin, self.shape)


def stored_in(file: Path) -> Iterator[Stored]:
    """The tensors of a file. Raises UserError for one that is no safetensors file."""
    try:
        with safe_open(file, "numpy") as tensors:
            for name in tensors.keys():  # noqa: SIM118 (not a dict)
                entry = tensors.get_slice(name)
                yield Stored(name, file, tuple(entry.get_shape()), entry.get_dtype())
    except (SafetensorError, OSError) as error:
        raise UserError(
            f"{file} is damaged or not a safetensors file ({error}): fetch it again"
        ) from error


def model_folder(path: str | Path) -> Path:
    """The folder of a model's files: `path` itself, or the snapshot of the branch main in it, where
    it is a `models--x--y` folder of the hub's cache.

    Raises UserError where several could be meant, and for a file that is only a link to what has
    been deleted, or a pointer of Git LFS.
    """
    folder = Path(path)
    snapshots = sorted(entry for entry in folder.glob("snapshots/*") if entry.is_dir())
    if snapshots and not (folder / "config.json").exists():
        main = folder / "refs" / "main"
        named = folder / "snapshots" / main.read_text().strip() if main.is_file() else None
        if named not in snapshots and len(snapshots) > 1:
            raise UserError(
                f"{folder} holds several snapshots of a model: give one, such as {snapshots[-1]}"
            )
        folder = named if named in snapshots else snapshots[0]
    for pattern in ("*.json", "*.jinja"):
        for file in sorted(folder.glob(pattern)):
            if not file.name.startswith(".") and not file.name.endswith(".index.json"):
                check_there(file)
    return folder


def check_there(file: Path) -> None:
    """Raises UserError for a link to what is gone, and for Git LFS's pointer to a file."""
    if file.is_symlink() and not file.exists():
        raise UserError(
            f"{file} is a link to {file.readlink()}, which is gone: download the model again "
            "(hf download NAME)"
        )
    if file.is_file():
        with file.open("rb") as stream:
            if stream.read(len(GIT_LFS)) == GIT_LFS:
                raise UserError(
                    f"{file} is a pointer of Git LFS, not the file itself: run git lfs pull in "
                    "its repository, or download the model with hf download NAME"
                )


def weight_files(folder: Path) -> list[Path]:
    """The safetensors files of a model: `model.safetensors`, or else those that its index names, or
    else, where the index was lost, a whole set of parts.

    What else lies beside them (variants, original weights, states of an optimizer) is not read, and
    a line of the log says so where it could have been meant. Raises UserError where nothing can be
    read, or a file is missing.
    """
    index = folder / INDEX
    here = sorted(path.name for path in folder.glob("*.safetensors"))
    here = [name for name in here if not name.startswith(".")]
    parts = [name for name in here if _PART.fullmatch(name)]
    if ONE_FILE in here:
        names, others = [ONE_FILE], [*parts, *([INDEX] if index.exists() else [])]
        if others:
            told = "%s: %s is read, as transformers does; %s beside it are not"
            log.warning(told, folder, ONE_FILE, some(others))
    elif index.exists() or index.is_symlink():
        names = _named(index)
    elif parts and {_PART.fullmatch(name)[1] for name in parts} == {f"{len(parts):05d}"}:
        names = parts
        log.warning("%s is missing: the %d files that it would name are read", index, len(parts))
    else:
        raise UserError(_nothing_to_read(folder, here))
    for name in names:
        check_there(folder / name)
        if not (folder / name).exists():
            raise UserError(f"{index} names {name}, which is not there: copy it too")
    return [folder / name for name in names]


def _named(index: Path) -> list[str]:
    """The names of the files of an index, each once."""
    check_there(index)
    try:
        return sorted({str(Path(n)) for n in json.loads(index.read_text())["weight_map"].values()})
    except (ValueError, KeyError, TypeError, AttributeError, OSError) as error:
        raise UserError(f"{index} is not a safetensors index ({error}): fetch it again") from error


def _nothing_to_read(folder: Path, names: list[str]) -> str:
    if names:
        return (
            f"{folder} has neither {ONE_FILE} nor {INDEX}, by which weights are found, but "
            f"{some(names)}: rename the model's file to {ONE_FILE}, or copy the index of its files"
        )
    if any(folder.glob("*.bin")):
        return (
            f"{folder} holds only .bin weights; convert them with transformers: "
            "AutoModelForCausalLM.from_pretrained(folder).save_pretrained(new_folder), "
            "which writes safetensors"
        )
    return f"{folder} has no .safetensors weights: copy them there too"


def read_headers(folder: Path) -> list[Stored]:
    """Every tensor of the weights."""
    return [tensor for file in weight_files(folder) for tensor in stored_in(file)]


def full_name(name: str, names: set[str], tied: bool) -> str:
    """The name that a tensor of a checkpoint has in a whole model, `names` being all of them.

    A model saved without its head lacks the `model.` before every name; and of a head and the
    embedding that it is tied to, a checkpoint may hold the head alone. The text model of one of
    text and images is a part with a name of its own.
    """
    if name.startswith("language_model."):
        return name.removeprefix("language_model.")
    if name.startswith("model.language_model."):
        return name.replace("language_model.", "", 1)
    bare = EMBEDDING.removeprefix("model.")
    if name == HEAD:
        return EMBEDDING if tied and not names & {EMBEDDING, bare} else HEAD
    return f"model.{name}" if bare in names else name
