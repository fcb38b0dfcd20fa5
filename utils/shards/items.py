"""What one item of a shard is, and how a list of items becomes bytes and comes back.

A shard is a pickle (protocol 5) of a list of items. Equal items give equal bytes: nothing is
memoised, and every array is stored as a call `numpy.ndarray(shape, dtype, bytearray)`, which any
numpy loads without a copy. Reading builds numpy arrays and plain containers and calls nothing else.
Knows nothing of folders, manifests or resuming.
"""

# T tokens   R captured rows (T, or the length of `positions`)   D model width   C cells

import math
import pickle
from collections.abc import Callable
from types import NoneType
from typing import Any, BinaryIO

import numpy as np

from utils.arc.tasks import SampleKey
from utils.store.local import Sink

CELL_COLUMNS = ("pair", "role", "row", "col", "color", "token_start", "token_stop")
_TYPES: dict[str, type | tuple[type, ...]] = {  # in the order of storage
    "task_id": str,
    "sample_idx": int,
    "view": dict,  # of an augmented run: `number`, `dihedral`, `colors`, `pair_order`
    "input_ids": np.ndarray,  # int32 [T]
    "prompt_length": int,
    "positions": np.ndarray,  # int32 [R], absent when every token has a row
    "activations": dict,  # "<hook_point>.<layer>" -> [R, D]
    "scales": dict,  # of activations in int8: name -> float32 [R]; see `utils.shards.int8`
    "output_logits": np.ndarray,  # [1, V], absent under --no_logits
    "output_logprobs": np.ndarray,  # float32 [T - prompt_length]
    "cells": np.ndarray,  # int32 [C, 7]
    "cells_original": np.ndarray,  # int32 [C, 7], of an augmented run
    "num_train_pairs": int,
    "prediction": (list, NoneType),  # this and `target` as the view shows them
    "target": (list, NoneType),
    "correct": (bool, NoneType),
    "teacher_forced": bool,
}
_OPTIONAL = {"view", "positions", "scales", "output_logits", "cells_original"}
_INTEGERS = {key for key, kind in _TYPES.items() if kind is int}
_BLOCK = 1 << 16  # values that are widened at once


def sample_key(entry: dict[str, Any]) -> SampleKey:
    """The sample that an item, an answer of the journal or an entry of what was skipped is of.

    The views of an augmented run are samples of their own: an item holds its view whole, the others
    its number. Raises KeyError or TypeError for anything else.
    """
    key = entry["task_id"], entry["sample_idx"]
    if (view := entry.get("view")) is None:
        return key
    return (*key, view["number"] if isinstance(view, dict) else view)


def sample_name(key: SampleKey) -> str:
    """`task1, sample 0`, or with its view `task1, sample 0, view 2`."""
    words = zip(("{}", "sample {}", "view {}"), key, strict=False)
    return ", ".join(word.format(part) for word, part in words)


def logits_dtype(activation_dtype: str) -> str:
    """What `output_logits` are stored in."""
    return "float16" if activation_dtype == "int8" else activation_dtype


def to_storage(array: Any, dtype: str) -> np.ndarray:
    """A C-contiguous `array` in `dtype` ("float16" or "float32"); no copy where none is needed.

    A finite value that float16 cannot hold makes it float32; NaN and infinities stay as they are.
    Takes bfloat16 too.
    """
    array = np.asarray(array)
    with np.errstate(over="ignore", invalid="ignore"):
        stored = np.ascontiguousarray(array, dtype=dtype)
        narrowed = dtype == "float16" and stored is not array and stored.size
        if narrowed and not _all_finite(stored) and (np.isinf(stored) & np.isfinite(array)).any():
            return np.ascontiguousarray(array, dtype=np.float32)
    return stored


def to_float32(array: np.ndarray) -> np.ndarray:
    """A float16 or float32 array as float32, C-contiguous; itself where it is that already.

    Exact. A finite half is shifted into place and scaled by 2^112, block by block in the cache.
    """
    if array.dtype != np.float16 or array.size < _BLOCK:
        return np.ascontiguousarray(array, np.float32)
    array = np.ascontiguousarray(array)
    if not _all_finite(array):
        return array.astype(np.float32)
    bits, widened = array.view(np.int16).reshape(-1), np.empty(array.shape, np.float32)
    floats = widened.reshape(-1)
    for start in range(0, len(bits), _BLOCK):  # what stays in the cache between the passes
        block = floats[start : start + _BLOCK]
        shifted = block.view(np.int32)
        shifted[...] = bits[start : start + _BLOCK]
        np.left_shift(shifted, 13, out=shifted)
        np.bitwise_and(shifted, np.int32(-0x70002000), out=shifted)  # 0x8FFFE000
        np.multiply(block, np.float32(2.0**112), out=block)
    return widened


def _all_finite(halves: np.ndarray) -> bool:
    """Of float16: as integers, what is not finite sorts above what is; two passes, no temporary."""
    if not halves.size:
        return True
    top = halves.view(np.int16).max(), halves.view(np.uint16).max()
    return top[0] < 0x7C00 and top[1] < 0xFC00


def stored_item(item: dict[str, Any], activation_dtype: str) -> dict[str, Any]:
    """`item` as a shard holds it: keys in order, arrays contiguous and in their stored dtype.

    Raises KeyError, TypeError or ValueError when keys, types or shapes are not those of an item: a
    mistake of the program's, never of the user's. A copy is made only of what is not stored as is.
    Activations that have scales are int8, as `utils.shards.int8` makes them; beside "int8" the
    others are those that int8 cannot hold, and stored as float32.
    """
    item = dict(item)
    for key in ("input_ids", "positions", "cells", "cells_original"):
        if key in item:
            array = np.asarray(item[key])
            item[key] = np.ascontiguousarray(array.astype(np.int32, "C", "same_kind", copy=False))
    item["output_logprobs"] = to_storage(item["output_logprobs"], "float32")
    scales = item.get("scales", {})
    wide = "float32" if activation_dtype == "int8" else activation_dtype
    item["activations"] = {
        name: to_storage(array, "int8" if name in scales else wide)
        for name, array in item["activations"].items()
    }
    if "output_logits" in item:
        dtype = logits_dtype(activation_dtype)
        item["output_logits"] = to_storage(item["output_logits"], dtype)
    check_items([item])
    tokens = len(item["input_ids"])
    rows = len(item.get("positions", item["input_ids"]))
    shapes = {name: len(array) == rows for name, array in item["activations"].items()}
    shapes |= {f"scales of {name}": len(array) == rows for name, array in scales.items()}
    shapes["output_logprobs"] = item["output_logprobs"].shape == (tokens - item["prompt_length"],)
    shapes["cells"] = item["cells"].shape[1:] == (len(CELL_COLUMNS),)
    if "cells_original" in item:
        shapes["cells_original"] = item["cells_original"].shape == item["cells"].shape
    if wrong := [name for name, fits in shapes.items() if not fits]:
        raise ValueError(f"{item['task_id']}: {', '.join(wrong)} do not fit its {tokens} tokens")
    return {key: item[key] for key in _TYPES if key in item}


def check_items(items: Any) -> None:
    """Raises TypeError or ValueError unless `items` is a list of dicts with an item's keys."""
    if not isinstance(items, list):
        raise TypeError(f"holds a {type(items).__name__}, not a list of items")
    for index, item in enumerate(items):
        if not isinstance(item, dict):
            raise TypeError(f"item {index} is a {type(item).__name__}, not a dict")
        if missing := [key for key in _TYPES if key not in item and key not in _OPTIONAL]:
            raise ValueError(f"item {index} lacks {', '.join(missing)}")
        if unknown := [key for key in item if key not in _TYPES]:
            raise ValueError(f"item {index} has unknown keys: {', '.join(map(repr, unknown))}")
        for key, value in item.items():
            if not isinstance(value, _TYPES[key]) or (isinstance(value, bool) and key in _INTEGERS):
                raise TypeError(f"item {index} holds a {type(value).__name__} as {key}")
        if "view" in item and type(item["view"].get("number")) is not int:
            raise TypeError(f"item {index} holds a view without a number")
        scales = item.get("scales", {})
        for key, mapping in (("activations", item["activations"]), ("scales", scales)):
            for name, array in mapping.items():
                if not isinstance(name, str) or not isinstance(array, np.ndarray):
                    raise TypeError(f"item {index}: {key}[{name!r}] is not an array")
        for name, array in item["activations"].items():
            if (array.dtype == np.int8) != (name in scales):
                lacks = "with" if name in scales else "without"
                raise ValueError(f"item {index}: {name} is {array.dtype} {lacks} scales")


def array_bytes(item: dict[str, Any]) -> int:
    """Bytes of all arrays of a stored item."""
    values = (*item.values(), *item["activations"].values(), *item.get("scales", {}).values())
    return sum(value.nbytes for value in values if isinstance(value, np.ndarray))


def float16_overflows(item: dict[str, Any], activation_dtype: str) -> int:
    """Arrays of a stored item that are float32 because `activation_dtype` could not hold them."""
    wide = [array.dtype != np.dtype(activation_dtype) for array in item["activations"].values()]
    if "output_logits" in item:
        wide.append(item["output_logits"].dtype != np.dtype(logits_dtype(activation_dtype)))
    return sum(wide)


def dump(items: list[dict[str, Any]], sink: Sink) -> None:
    """Pickle stored items into `sink`, large arrays straight from their own memory."""
    _Pickler(sink).dump(items)


def shard_bytes(items: list[dict[str, Any]]) -> int:
    """Exact size in bytes of the shard that `dump` would write; reads no large array."""
    sink = Sink()
    dump(items, sink)
    return sink.size


def load(file: BinaryIO) -> list[dict[str, Any]]:
    """The items of a shard file. Raises UnpicklingError, with the cause, for anything else."""
    try:
        items = _Unpickler(file).load()
    except EOFError:
        raise pickle.UnpicklingError("it ends too early") from None
    except Exception as error:  # broken pickles end in errors of every kind
        cause = " ".join(str(error).split()) or type(error).__name__
        raise pickle.UnpicklingError(f"no pickle that can be loaded: {cause}") from error
    try:
        check_items(items)
    except (TypeError, ValueError) as error:
        raise pickle.UnpicklingError(str(error)) from error
    for item in items:
        for mapping in (item, item["activations"], item.get("scales", {})):
            for key, value in mapping.items():
                if type(value) is _Reconstructed:
                    mapping[key] = value.view(np.ndarray)
    return items


def non_finite_rows(item: dict[str, Any]) -> int:
    """Activation rows of a stored item that hold a NaN or an infinity, over all its activations."""
    count = 0
    for array in item["activations"].values():
        if not (_all_finite(array) if array.dtype == np.float16 else np.isfinite(array).all()):
            count += int((~np.isfinite(array).all(axis=-1)).sum())
    return count


class _Pickler(pickle.Pickler):
    def __init__(self, sink: Sink):
        super().__init__(sink, protocol=5)
        self.fast = True  # no memo: the bytes must not depend on which objects happen to be shared

    def reducer_override(self, value: Any) -> Any:
        if value is np.ndarray:
            return NotImplemented
        if type(value) is not np.ndarray or value.dtype.kind not in "biuf":
            raise TypeError(f"a shard cannot hold {value!r:.80}")
        if not value.flags.writeable:
            value = np.asarray(_Writable(value))
        buffer = pickle.PickleBuffer(value.reshape(-1).view(np.uint8))
        return np.ndarray, (value.shape, value.dtype.str, buffer)


class _Writable:
    """Lends an array's memory as writable, because pickle tells the two apart in its bytes.

    Nothing writes to it. What JAX hands over is read-only; what a shard gives back must not be.
    """

    def __init__(self, array: np.ndarray):
        self.array = array
        self.__array_interface__ = {
            **array.__array_interface__,
            "data": (array.ctypes.data, False),
        }


def _array(shape: Any, dtype: Any, buffer: Any, order: str = "C") -> np.ndarray:
    """Stands in for `numpy.ndarray`: a plain number type over exactly the bytes given."""
    dtype = dtype.dtype if isinstance(dtype, _Dtype) else _plain(dtype)
    if type(shape) is not tuple or not all(type(n) is int and n >= 0 for n in shape):
        raise pickle.UnpicklingError("an array has no valid shape")
    if not isinstance(buffer, bytes | bytearray | memoryview) or order not in ("C", "F"):
        raise pickle.UnpicklingError("an array has no buffer of bytes")
    if len(buffer) != math.prod(shape) * dtype.itemsize:
        raise pickle.UnpicklingError("an array's bytes do not fill its shape")
    return np.ndarray(shape, dtype, buffer, order=order)


_PLAIN = {"b1", *(kind + size for kind in "iu" for size in "1248"), "f2", "f4", "f8"}


def _plain(code: Any) -> np.dtype:
    if not isinstance(code, str) or code.lstrip("<|=") not in _PLAIN:
        raise pickle.UnpicklingError(f"an array of dtype {code!r:.40} is refused")
    return np.dtype(code)


class _Dtype:
    """Stands in for `numpy.dtype`, whose own state could describe memory that is not there."""

    __slots__ = ("dtype",)

    def __init__(self, code: Any, align: Any = False, copy: Any = False):
        self.dtype = _plain(code)

    def __setstate__(self, state: Any) -> None:
        if type(state) is not tuple or len(state) < 2 or state[1] not in ("<", "|", "="):
            raise pickle.UnpicklingError("an array of a foreign byte order or dtype is refused")


class _Reconstructed(np.ndarray):
    """An array under construction, as numpy pickles it before protocol 5."""

    def __setstate__(self, state: Any) -> None:
        _, shape, dtype, is_fortran, raw = state
        array = _array(shape, dtype, raw, "F" if is_fortran else "C")
        super().__setstate__((1, array.shape, array.dtype, bool(is_fortran), bytes(raw)))


class _Callable:
    """What a pickle gets when it names an allowed global: it can be called, and nothing else."""

    __slots__ = ("_function",)

    def __init__(self, function: Callable[..., Any]):
        self._function = function

    def __call__(self, *args: Any) -> Any:
        return self._function(*args)

    def __setstate__(self, state: Any) -> None:
        raise pickle.UnpicklingError("an attempt to alter a function is refused")


def _frombuffer(buffer: Any, dtype: Any, shape: Any, order: Any) -> np.ndarray:
    return _array(shape, dtype, buffer, order)


def _reconstruct(subtype: Any, shape: Any, code: Any) -> np.ndarray:
    return np.zeros(0).view(_Reconstructed)


_ALLOWED = {
    ("numpy", "ndarray"): _Callable(_array),  # ours; the rest is how numpy pickles by itself
    ("numpy", "dtype"): _Callable(_Dtype),
    ("numpy._core.numeric", "_frombuffer"): _Callable(_frombuffer),
    ("numpy._core.multiarray", "_reconstruct"): _Callable(_reconstruct),
}


class _Unpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        try:  # numpy 1 says numpy.core where numpy 2 says numpy._core
            return _ALLOWED[module.replace("numpy.core.", "numpy._core."), name]
        except KeyError:
            raise pickle.UnpicklingError(
                f"it asks for {f'{module}.{name}'!a:.80}, neither numpy data nor a container"
            ) from None
