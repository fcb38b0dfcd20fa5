"""How quantised weights of linear layers are stored, and what they are in float32.

A scheme says which tensors a checkpoint holds in place of a weight [O, I], and what they mean:
bitsandbytes 4-bit (Dettmers et al. 2023), FP8 with a scale for a tensor, a row or a block
(DeepSeek-V3, 2024), AWQ (Lin et al. 2023), GPTQ (Frantar et al. 2022), and what the library
compressed-tensors stores of these. Each follows the code of the library that writes it, in float32
throughout, and reads no more than the part that is asked for needs.
"""

# O outputs, rows of a weight   I inputs, its columns   G groups of columns that share a scale

import json
import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np

from utils.errors import UserError
from utils.model.files import FLOATS, Stored

PER_WORD = 8  # 4-bit values in an int32
_BLOCK_VALUES = 1 << 22  # dequantised at once, so that no temporary array is large
# Scales that were measured for activations; no weight depends on them.
_OF_ACTIVATIONS = ("input_scale", "activation_scale", "output_scale", "k_scale", "v_scale")
_ITEMSIZE = {"F32": 4, "BF16": 2, "F16": 2}

# Suffix or name -> the dtypes that a tensor may have, and then the shapes: of all that are needed.
Expected = dict[str, tuple[tuple[Any, ...], ...]]


@dataclass(frozen=True)
class Module:
    """A linear layer in a checkpoint: its name, which ends in a dot, the shape (O, I) of its
    weight, and the checkpoint's tensors by name. Its own are named by their suffix."""

    name: str
    shape: tuple[int, int]
    tensors: Mapping[str, Stored]

    def __contains__(self, suffix: str) -> bool:
        return self.name + suffix in self.tensors

    def __getitem__(self, suffix: str) -> Stored:
        return self.tensors[self.name + suffix]

    def first(self, *suffixes: str) -> str:
        """The first of these that it has; the very first where it has none."""
        return next((suffix for suffix in suffixes if suffix in self), suffixes[0])


@dataclass(frozen=True)
class Quantization(ABC):
    """A scheme; method and format are how the manifest names it."""

    method: str
    format: str
    suffixes: ClassVar[tuple[str, ...]] = ()  # of the tensors that show that a weight is quantised

    @abstractmethod
    def expected(self, module: Module) -> Expected:
        """The tensors that make the weight. Raises UserError for what cannot be read."""

    @abstractmethod
    def read(self, module: Module, rows: slice, columns: slice) -> np.ndarray:
        """float32 [rows, columns], a part of the weight. The slices have a start and a stop."""

    def holds(self, module: Module) -> bool:
        """Whether the weight is quantised, even if some of its tensors are missing."""
        packed = "weight" in module and module["weight"].dtype not in FLOATS
        return packed or any(suffix in module for suffix in self.suffixes)

    def ignores(self, tensor: Stored) -> bool:
        """Whether a tensor that is of no parameter leaves the result as it is."""
        return tensor.name.rpartition(".")[2] in _OF_ACTIVATIONS


@dataclass(frozen=True)
class BitsAndBytes(Quantization):
    """Two values of 4 bits in a byte, the first one above, and a scale for each block of the
    flattened weight; nested, the scales are 8-bit values with scales of their own."""

    states: ClassVar = tuple(f"weight.quant_state.bitsandbytes__{kind}" for kind in ("nf4", "fp4"))
    suffixes: ClassVar = (
        *("weight.absmax", "weight.quant_map", "weight.nested_absmax", "weight.nested_quant_map"),
        *states,
    )

    def expected(self, module: Module) -> Expected:
        state, nested = self._state(module), "weight.nested_absmax" in module
        size = math.prod(module.shape)
        # What holds the bytes may be of another type, as bnb_4bit_quant_storage says.
        width = _ITEMSIZE.get(module["weight"].dtype, 1) if "weight" in module else 1
        blocks = -(-size // state["blocksize"])
        found = {
            "weight": (("U8", "I8", *FLOATS), (-(-size // (2 * width)), 1)),
            "weight.absmax": (("U8",) if nested else ("F32",), (blocks,)),
            "weight.quant_map": (("F32",), (16,)),
            module.first(*self.states): (("U8",), state["bytes"]),
        }
        if nested:
            groups = -(-blocks // state["nested_blocksize"])
            found["weight.nested_absmax"] = (("F32",), (groups,))
            found["weight.nested_quant_map"] = (("F32",), (256,))
        return found

    def _state(self, module: Module) -> dict[str, Any]:
        """What bitsandbytes says of a weight, in JSON that is stored as bytes; its defaults where
        that is missing. `bytes` is the shape of these."""
        state = {"blocksize": 64, "nested_blocksize": 256, "nested_offset": 0.0, "bytes": ()}
        if (suffix := module.first(*self.states)) not in module:
            return state
        tensor = module[suffix]
        try:
            state |= json.loads(tensor.read().tobytes()) | {"bytes": tensor.shape}
            shape, sizes = tuple(state["shape"]), (state["blocksize"], state["nested_blocksize"])
            if shape != module.shape:
                raise ValueError(f"it is of a weight {list(shape)}, not {list(module.shape)}")
            if not all(isinstance(size, int) and size > 0 for size in sizes):
                raise ValueError(f"blocks of {sizes}")
            state["nested_offset"] = np.float32(state["nested_offset"])
        except (ValueError, KeyError, TypeError) as error:
            raise UserError(f"{tensor.file}: {tensor.name} cannot be read ({error})") from error
        return state

    def read(self, module: Module, rows: slice, columns: slice) -> np.ndarray:
        state, width = self._state(module), module.shape[1]
        first, last = rows.start * width, rows.stop * width  # of the flattened weight
        held, block_size = _ITEMSIZE.get(module["weight"].dtype, 1), state["blocksize"]
        words = slice(first // (2 * held), -(-last // (2 * held)))
        packed = module["weight"].read(words).view(np.uint8).reshape(-1)
        blocks = slice(first // block_size, -(-last // block_size))
        scales = self._scales(module, state, blocks)
        code = module["weight.quant_map"].read()
        pairs = np.stack([np.repeat(code, 16), np.tile(code, 16)], axis=-1)  # of each byte,
        pairs = pairs.view(np.uint64)[:, 0]  # looked up as one value

        def block(part: slice) -> np.ndarray:
            start, stop = (first + row * width for row in (part.start, part.stop))
            begin = words.start * held
            flat = pairs[packed[start // 2 - begin : -(-stop // 2) - begin]].view(np.float32)
            begin = blocks.start
            spread = scales[start // block_size - begin : -(-stop // block_size) - begin]
            spread = np.repeat(spread, block_size)[start % block_size :]
            values = flat[start % 2 :][: stop - start] * spread[: stop - start]
            return values.reshape(-1, width)[:, columns]

        return _in_blocks(rows, columns, block, width)

    def _scales(self, module: Module, state: dict[str, Any], blocks: slice) -> np.ndarray:
        absmax = module["weight.absmax"].read(blocks)
        if absmax.dtype != np.uint8:
            return absmax
        code, scale = (module[f"weight.nested_{name}"].read() for name in ("quant_map", "absmax"))
        group = np.arange(blocks.start, blocks.stop) // state["nested_blocksize"]
        return code[absmax] * scale[group] + state["nested_offset"]


@dataclass(frozen=True)
class Fp8(Quantization):
    """Values of 8 bits, e4m3, times a scale: of the tensor, of each row, or of each block.

    block: rows and columns that share a scale, or None where the scales say so by their shape.
    """

    block: tuple[int, int] | None = None
    suffixes: ClassVar = ("weight_scale_inv", "weight_scale")

    def expected(self, module: Module) -> Expected:
        rows = module.shape[0]
        shapes = ((), (1,), (1, 1), (rows,), (rows, 1))
        if self.block is not None:
            sizes = zip(module.shape, self.block, strict=True)
            shapes = (tuple(-(-n // size) for n, size in sizes),)
        scale = (*FLOATS, "F8_E8M0"), *shapes
        return {"weight": (("F8_E4M3",), module.shape), module.first(*self.suffixes): scale}

    def read(self, module: Module, rows: slice, columns: slice) -> np.ndarray:
        values = module["weight"].read(rows, columns)
        table = np.arange(256, dtype=np.uint8).view(values.dtype).astype(np.float32)
        values = values.view(np.uint8)
        scales = module[module.first(*self.suffixes)].read().astype(np.float32)
        scales = scales.reshape(len(scales) if scales.ndim else 1, -1)
        block = self.block or (module.shape[0] if len(scales) == 1 else 1, module.shape[1])
        row, column = (
            np.arange(part.start, part.stop) // size
            for part, size in zip((rows, columns), block, strict=True)
        )
        return _in_blocks(
            rows, columns, lambda part: table[values[part]] * scales[row[part]][:, column]
        )


@dataclass(frozen=True)
class Grouped(Quantization):
    """Values of 4 bits, eight in an int32, of which each group of columns has a scale and a zero
    point: (value - zero) * scale. Zero points are packed by rows.

    group_size: columns of a group; None is all of them. symmetric: all zero points are 8, and none
    is stored. suffixes: of values, zero points, scales, and anything else. g_idx: of the tensor
    that names the group of each column, if there can be one. columns_first: whether columns come
    before rows in all of them. axis: by which values are packed, 0 for rows and 1 for columns.
    places: of eight values in a word, from its lowest bits.
    """

    group_size: int | None = None
    symmetric: bool = False
    suffixes: ClassVar = ("qweight", "qzeros", "scales")
    g_idx: ClassVar = ""
    columns_first: ClassVar = True
    axis: ClassVar = 1
    places: ClassVar = np.arange(PER_WORD)

    def groups(self, module: Module) -> int:
        return -(-module.shape[1] // (self.group_size or module.shape[1]))

    def expected(self, module: Module) -> Expected:
        (rows, columns), groups = module.shape, self.groups(module)
        values, zeros, scales, *_ = self.suffixes
        packed = (rows, _words(columns)) if self.axis else (_words(rows), columns)
        found = {values: (("I32",), packed), scales: (FLOATS, (rows, groups))}
        if not self.symmetric:
            found[zeros] = ("I32",), (_words(rows), groups)
        if self.columns_first:
            found = {suffix: (dtypes, shape[::-1]) for suffix, (dtypes, shape) in found.items()}
        if self.g_idx in module:
            found[self.g_idx] = ("I32", "I64"), (columns,)
        return found

    def read(self, module: Module, rows: slice, columns: slice) -> np.ndarray:
        def stored(suffix: str, *index: slice) -> np.ndarray:  # [rows, columns]
            if self.columns_first:
                return module[suffix].read(*index[::-1]).T
            return module[suffix].read(*index)

        values_in, zeros_in, scales_in, *_ = self.suffixes
        every, index = slice(None), [rows, columns]
        scales = stored(scales_in, rows, every).astype(np.float32)
        if self.symmetric:
            zeros = np.full_like(scales, PER_WORD)
        else:
            words, at = _packed(rows)
            zeros = stored(zeros_in, words, every)
            if self.format == "gptq":
                # Stored less one. Added to the word and not to each value, as GPTQModel does: so
                # what a value borrowed from its neighbour when one was subtracted is given back.
                zeros = (zeros.view(np.uint32) + np.uint32(0x11111111)).view(np.int32)
            zeros = self._values(zeros, at, 0).astype(np.float32)
        index[self.axis], at = _packed(index[self.axis])
        words, group = stored(values_in, *index), self._group_of(module, columns)

        def block(part: slice) -> np.ndarray:
            packed = (words[part], at) if self.axis else (words, at[part])
            found = self._values(*packed, self.axis).astype(np.float32)
            found -= np.take(zeros[part], group, axis=1)
            found *= np.take(scales[part], group, axis=1)
            return found

        return _in_blocks(rows, columns, block)

    def _values(self, packed: np.ndarray, at: np.ndarray, axis: int) -> np.ndarray:
        """int32: the values at the places `at` of an axis that holds eight in an int32."""
        shift = (4 * self.places[at % PER_WORD]).astype(np.int32)
        shift = shift.reshape((-1, 1) if axis == 0 else (1, -1))
        return (np.take(packed, at // PER_WORD, axis) >> shift) & 15

    def _group_of(self, module: Module, columns: slice) -> np.ndarray:
        if self.g_idx not in module:
            group_size = self.group_size or module.shape[1]
            return np.arange(columns.start, columns.stop) // group_size
        tensor = module[self.g_idx]
        group = tensor.read(columns)
        if group.min(initial=0) < 0 or group.max(initial=0) >= self.groups(module):
            raise UserError(f"{tensor.file}: {tensor.name} names groups that are not there")
        return group


class Awq(Grouped):
    """AutoAWQ's `gemm`."""

    axis: ClassVar = 0
    places: ClassVar = np.array([0, 4, 1, 5, 2, 6, 3, 7])


class Gptq(Grouped):
    """AutoGPTQ's and GPTQModel's; zero points are stored less one in the first format, `gptq`."""

    g_idx: ClassVar = "g_idx"

    def ignores(self, tensor: Stored) -> bool:
        """AutoGPTQ also stores a bias of zeros for a layer that has none."""
        unused = tensor.name.endswith(".bias") and tensor.dtype in FLOATS
        return (unused and not tensor.read().any()) or super().ignores(tensor)


class PackQuantized(Grouped):
    """compressed-tensors' `pack-quantized`."""

    suffixes: ClassVar = ("weight_packed", "weight_zero_point", "weight_scale", "weight_shape")
    g_idx: ClassVar = "weight_g_idx"
    columns_first: ClassVar = False

    def expected(self, module: Module) -> Expected:
        return super().expected(module) | {"weight_shape": (("I64", "I32"), (2,))}


def _words(values: int) -> int:
    """How many int32 hold so many values of 4 bits."""
    return -(-values // PER_WORD)


def _packed(values: slice) -> tuple[slice, np.ndarray]:
    """The int32 that hold these values, and the values' places among all that they hold."""
    words = slice(values.start // PER_WORD, _words(values.stop))
    return words, np.arange(values.start, values.stop) - words.start * PER_WORD


def _in_blocks(
    rows: slice, columns: slice, block: Callable[[slice], np.ndarray], width: int = 0
) -> np.ndarray:
    """float32 [rows, columns], a few rows at a time, counted from the first; width: values that are
    made of each row, where they are more than its columns."""
    sizes = tuple(part.stop - part.start for part in (rows, columns))
    made, step = np.empty(sizes, np.float32), max(1, _BLOCK_VALUES // max(1, width or sizes[1]))
    for start in range(0, sizes[0], step):
        part = slice(start, min(start + step, sizes[0]))
        made[part] = block(part)
    return made
