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
from utils.model.stored import FLOATS, Stored

PER_WORD = 8  # 4-bit values in an int32
_BLOCK_VALUES = 1 << 22  # dequantised at once, so that no temporary array is large
# Scales that were measured for activations; no weight depends on them.
_OF_ACTIVATIONS = ("input_scale", "activation_scale", "output_scale", "k_scale", "v_scale")
_ITEMSIZE = {"F32": 4, "BF16": 2, "F16": 2}

Shapes = tuple[tuple[int, ...], ...]


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


@dataclass(frozen=True)
class Quantization(ABC):
    """A scheme; method and format are how the manifest names it."""

    method: str
    format: str
    suffixes: ClassVar[tuple[str, ...]] = ()  # of the tensors that show that a weight is quantised

    @abstractmethod
    def expected(self, module: Module) -> dict[str, tuple[Shapes, tuple[str, ...]]]:
        """Suffix -> shapes and dtypes that it may have, of every tensor that makes the weight.
        Raises UserError for what cannot be read."""

    @abstractmethod
    def read(self, module: Module, rows: slice, columns: slice) -> np.ndarray:
        """float32 [rows, columns], a part of the weight. The slices have a start and a stop."""

    def holds(self, module: Module) -> bool:
        """Whether the weight is quantised, even if some of its tensors are missing."""
        packed = "weight" in module and module["weight"].dtype not in FLOATS
        return packed or any(suffix in module for suffix in self.suffixes)

    def check(self, module: Module) -> tuple[list[str], list[str]]:
        """The names of the tensors that make the weight, and what is wrong with them."""
        expected, problems = self.expected(module), []
        for suffix, (shapes, dtypes) in expected.items():
            name = module.name + suffix
            if suffix not in module:
                problems.append(f"missing {name}")
            elif (shape := module[suffix].shape) not in shapes:
                known = " or ".join(str(list(known)) for known in shapes)
                problems.append(f"{name} has shape {list(shape)}, not {known}")
            elif (dtype := module[suffix].dtype) not in dtypes:
                problems.append(f"{name} has dtype {dtype}, not one of {', '.join(dtypes)}")
        return [module.name + suffix for suffix in expected], problems

    def ignores(self, tensor: Stored) -> bool:
        """Whether a tensor that is of no parameter leaves the result as it is."""
        return tensor.name.rpartition(".")[2] in _OF_ACTIVATIONS


@dataclass(frozen=True)
class BitsAndBytes(Quantization):
    """Two values of 4 bits in a byte, the first one above, and a scale for each block of the
    flattened weight; nested, the scales are 8-bit values with scales of their own."""

    suffixes: ClassVar = (
        *("weight.absmax", "weight.quant_map", "weight.nested_absmax", "weight.nested_quant_map"),
        *("weight.quant_state.bitsandbytes__nf4", "weight.quant_state.bitsandbytes__fp4"),
    )

    def expected(self, module: Module) -> dict[str, tuple[Shapes, tuple[str, ...]]]:
        state, nested = self._state(module), "weight.nested_absmax" in module
        size = math.prod(module.shape)
        # What holds the bytes may be of another type, as bnb_4bit_quant_storage says.
        width = _ITEMSIZE.get(module["weight"].dtype, 1) if "weight" in module else 1
        blocks = -(-size // state["blocksize"])
        found = {
            "weight": (((-(-size // (2 * width)), 1),), ("U8", "I8", *FLOATS)),
            "weight.absmax": (((blocks,),), ("U8",) if nested else ("F32",)),
            "weight.quant_map": (((16,),), ("F32",)),
            self._state_suffix(module): ((state["bytes"],), ("U8",)),
        }
        if nested:
            groups = -(-blocks // state["nested_blocksize"])
            found["weight.nested_absmax"] = (((groups,),), ("F32",))
            found["weight.nested_quant_map"] = (((256,),), ("F32",))
        return found

    def _state_suffix(self, module: Module) -> str:
        nf4, fp4 = self.suffixes[-2:]
        return fp4 if fp4 in module else nf4

    def _state(self, module: Module) -> dict[str, Any]:
        """What bitsandbytes says of a weight, in JSON that is stored as bytes; its defaults where
        that is missing. `bytes` is the shape of these."""
        state = {"blocksize": 64, "nested_blocksize": 256, "nested_offset": 0.0, "bytes": ()}
        if (suffix := self._state_suffix(module)) not in module:
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

        return _in_blocks(_sizes(rows, columns), block, width)

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

    def _scale(self, module: Module) -> str:
        return next((s for s in self.suffixes if s in module), self.suffixes[0])

    def expected(self, module: Module) -> dict[str, tuple[Shapes, tuple[str, ...]]]:
        rows = module.shape[0]
        shapes = ((), (1,), (1, 1), (rows,), (rows, 1))
        if self.block is not None:
            sizes = zip(module.shape, self.block, strict=True)
            shapes = (tuple(-(-n // size) for n, size in sizes),)
        scale = (shapes, (*FLOATS, "F8_E8M0"))
        return {"weight": ((module.shape,), ("F8_E4M3",)), self._scale(module): scale}

    def read(self, module: Module, rows: slice, columns: slice) -> np.ndarray:
        values = module["weight"].read(rows, columns)
        table = np.arange(256, dtype=np.uint8).view(values.dtype).astype(np.float32)
        values = values.view(np.uint8)
        scales = module[self._scale(module)].read().astype(np.float32)
        scales = scales.reshape(len(scales) if scales.ndim else 1, -1)
        block = self.block or (module.shape[0] if len(scales) == 1 else 1, module.shape[1])
        row, column = (
            np.arange(part.start, part.stop) // size
            for part, size in zip((rows, columns), block, strict=True)
        )
        return _in_blocks(
            values.shape, lambda part: table[values[part]] * scales[row[part]][:, column]
        )


@dataclass(frozen=True)
class Grouped(Quantization):
    """Values of 4 bits, eight in an int32, of which each group of columns has a scale and a zero
    point: (value - zero) * scale.

    group_size: columns of a group; None is all of them.
    """

    group_size: int | None = None

    def groups(self, module: Module) -> int:
        return -(-module.shape[1] // (self.group_size or module.shape[1]))

    def group_of(self, module: Module, columns: slice, order: str) -> np.ndarray:
        """The group of each column, as the tensor `order` says where there is one."""
        if order not in module:
            group_size = self.group_size or module.shape[1]
            return np.arange(columns.start, columns.stop) // group_size
        group = module[order].read(columns)
        if group.min(initial=0) < 0 or group.max(initial=0) >= self.groups(module):
            tensor = module[order]
            raise UserError(f"{tensor.file}: {tensor.name} names groups that are not there")
        return group


@dataclass(frozen=True)
class Awq(Grouped):
    """AutoAWQ's `gemm`: columns before rows, and rows packed in an order of their own."""

    suffixes: ClassVar = ("qweight", "qzeros", "scales")
    order: ClassVar = np.array([0, 4, 1, 5, 2, 6, 3, 7], np.int32)  # of eight rows in a word

    def expected(self, module: Module) -> dict[str, tuple[Shapes, tuple[str, ...]]]:
        (rows, columns), groups = module.shape, self.groups(module)
        return {
            "qweight": (((columns, _words(rows)),), ("I32",)),
            "qzeros": (((groups, _words(rows)),), ("I32",)),
            "scales": (((groups, rows),), FLOATS),
        }

    def read(self, module: Module, rows: slice, columns: slice) -> np.ndarray:
        words, at = _packed(rows)
        weight = module["qweight"].read(columns, words).T
        return _grouped(
            lambda part: _values(weight, at[part], 0, self.order),
            _values(module["qzeros"].read(slice(None), words).T, at, 0, self.order),
            module["scales"].read(slice(None), rows).T,
            self.group_of(module, columns, ""),
        )


@dataclass(frozen=True)
class Gptq(Grouped):
    """AutoGPTQ's and GPTQModel's: columns before rows, columns packed. In the first format, `gptq`,
    zero points are stored less one; `g_idx` names the group of each column."""

    suffixes: ClassVar = ("qweight", "qzeros", "scales", "g_idx")

    def expected(self, module: Module) -> dict[str, tuple[Shapes, tuple[str, ...]]]:
        (rows, columns), groups = module.shape, self.groups(module)
        found = {
            "qweight": (((_words(columns), rows),), ("I32",)),
            "qzeros": (((groups, _words(rows)),), ("I32",)),
            "scales": (((groups, rows),), FLOATS),
        }
        return found | ({"g_idx": (((columns,),), ("I32",))} if "g_idx" in module else {})

    def read(self, module: Module, rows: slice, columns: slice) -> np.ndarray:
        (words, at), (zero_words, zero_at) = _packed(columns), _packed(rows)
        weight = module["qweight"].read(words, rows).T
        zeros = module["qzeros"].read(slice(None), zero_words).T
        if self.format == "gptq":
            # To the word and not to each value, as GPTQModel does: so what a value borrowed from
            # its neighbour when one was subtracted is given back.
            zeros = (zeros.view(np.uint32) + np.uint32(0x11111111)).view(np.int32)
        return _grouped(
            lambda part: _values(weight[part], at, 1),
            _values(zeros, zero_at, 0),
            module["scales"].read(slice(None), rows).T,
            self.group_of(module, columns, "g_idx"),
        )

    def ignores(self, tensor: Stored) -> bool:
        """AutoGPTQ also stores a bias of zeros for a layer that has none."""
        unused = tensor.name.endswith(".bias") and tensor.dtype in FLOATS
        return (unused and not tensor.read().any()) or super().ignores(tensor)


@dataclass(frozen=True)
class PackQuantized(Grouped):
    """compressed-tensors' `pack-quantized`: rows before columns, columns packed, values from -8 to
    7 stored plus 8, and zero points likewise where there are any."""

    symmetric: bool = True
    suffixes: ClassVar = (
        *("weight_packed", "weight_scale", "weight_shape"),
        *("weight_zero_point", "weight_g_idx"),
    )

    def expected(self, module: Module) -> dict[str, tuple[Shapes, tuple[str, ...]]]:
        (rows, columns), groups = module.shape, self.groups(module)
        found = {
            "weight_packed": (((rows, _words(columns)),), ("I32",)),
            "weight_scale": (((rows, groups),), FLOATS),
            "weight_shape": (((2,),), ("I64", "I32")),
        }
        if not self.symmetric:
            found["weight_zero_point"] = (((_words(rows), groups),), ("I32",))
        if "weight_g_idx" in module:
            found["weight_g_idx"] = (((columns,),), ("I32", "I64"))
        return found

    def read(self, module: Module, rows: slice, columns: slice) -> np.ndarray:
        words, at = _packed(columns)
        weight, scales = module["weight_packed"].read(rows, words), module["weight_scale"]
        scales = scales.read(rows)
        zeros = np.full(scales.shape, PER_WORD, np.int32)
        if not self.symmetric:
            zero_words, zero_at = _packed(rows)
            zeros = _values(module["weight_zero_point"].read(zero_words), zero_at, 0)
        group = self.group_of(module, columns, "weight_g_idx")
        return _grouped(lambda part: _values(weight[part], at, 1), zeros, scales, group)


def _words(values: int) -> int:
    """How many int32 hold so many values of 4 bits."""
    return -(-values // PER_WORD)


def _packed(values: slice) -> tuple[slice, np.ndarray]:
    """The int32 that hold these values, and the values' places among all that they hold."""
    words = slice(values.start // PER_WORD, _words(values.stop))
    return words, np.arange(values.start, values.stop) - words.start * PER_WORD


def _values(
    packed: np.ndarray, at: np.ndarray, axis: int, order: np.ndarray | None = None
) -> np.ndarray:
    """int32: the 4-bit values at the places `at` of an axis that holds eight in an int32, the first
    in the lowest bits, or in those that `order` says."""
    place = at % PER_WORD if order is None else order[at % PER_WORD]
    shift = (4 * place).astype(np.int32).reshape((-1, 1) if axis == 0 else (1, -1))
    return (np.take(packed, at // PER_WORD, axis) >> shift) & 15


def _grouped(
    values: Callable[[slice], np.ndarray], zeros: np.ndarray, scales: np.ndarray, group: np.ndarray
) -> np.ndarray:
    """float32 [rows, columns]; values: of a block of rows; zeros and scales: [rows, G]; group: of
    each column."""
    zeros, scales = zeros.astype(np.float32), scales.astype(np.float32)

    def block(part: slice) -> np.ndarray:
        found = values(part).astype(np.float32)
        found -= np.take(zeros[part], group, axis=1)
        found *= np.take(scales[part], group, axis=1)
        return found

    return _in_blocks((len(scales), len(group)), block)


def _sizes(*index: slice) -> tuple[int, ...]:
    return tuple(part.stop - part.start for part in index)


def _in_blocks(
    sizes: tuple[int, int], block: Callable[[slice], np.ndarray], width: int | None = None
) -> np.ndarray:
    """float32 [rows, columns], a few rows at a time; width: values that are made of each row."""
    rows, columns = sizes
    made, step = np.empty(sizes, np.float32), max(1, _BLOCK_VALUES // max(1, width or columns))
    for start in range(0, rows, step):
        part = slice(start, min(start + step, rows))
        made[part] = block(part)
    return made
