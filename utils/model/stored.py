"""A tensor in a safetensors file: its shape, its type, and the part of it that is asked for."""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import ml_dtypes
import numpy as np
from safetensors import SafetensorError, safe_open

from utils.errors import UserError

FLOATS = ("F32", "BF16", "F16")
# Types of which the numpy side of safetensors has no name, and whose bytes are read here.
_EIGHT_BITS = {"F8_E4M3": ml_dtypes.float8_e4m3fn, "F8_E8M0": ml_dtypes.float8_e8m0fnu}


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
