"""What one item of a shard is: one rule, `check_item`, for what is written and for what is read.

Knows nothing of bytes (`pickles`), folders, manifests or resuming.
"""

# T tokens   R captured rows (T, or the length of `positions`)   D model width   C cells

import pickle
from types import NoneType
from typing import Any, BinaryIO

import numpy as np

from utils.arc.tasks import MAX_SIDE, SampleKey
from utils.errors import one_line
from utils.shards.pickles import unpickled

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
        narrowed = dtype == "float16" and stored is not array
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
    try:
        check_item(item)
    except (TypeError, ValueError) as error:
        raise type(error)(f"{item['task_id']}: {error}") from error
    return {key: item[key] for key in _TYPES if key in item}


def check_item(item: Any) -> None:
    """Raises TypeError or ValueError unless `item` is one as `stored_item` makes them: its keys,
    types, dtypes and shapes, and that what points into its tokens points at one of them.

    A hostile item may be nested without end, so nothing of it is shown but short strings.
    """
    if type(item) is not dict:
        raise TypeError(f"it is a {type(item).__name__}, not a dict")
    if missing := [key for key in _TYPES if key not in item and key not in _OPTIONAL]:
        raise ValueError(f"it lacks {', '.join(missing)}")
    if unknown := [key for key in item if key not in _TYPES]:
        raise ValueError(f"it has unknown keys: {', '.join(map(_shown, unknown))}")
    for key, value in item.items():
        if not isinstance(value, _TYPES[key]) or (isinstance(value, bool) and key in _INTEGERS):
            raise TypeError(f"it holds a {type(value).__name__} as {key}")
    activations, scales = item["activations"], item.get("scales", {})
    for key, mapping in (("activations", activations), ("scales", scales)):
        for name, array in mapping.items():
            if not isinstance(name, str) or not isinstance(array, np.ndarray):
                raise TypeError(f"it holds no array as {key}[{_shown(name)}]")
    for name, array in activations.items():
        if (array.dtype == np.int8) != (name in scales):
            lacks = "with" if name in scales else "without"
            raise ValueError(f"{_shown(name)} is {array.dtype} {lacks} scales")
    wrong = [_shown(name) for name, fits in _fits(item, activations, scales).items() if not fits]
    if wrong:
        raise ValueError(f"{', '.join(wrong[:8])} do not fit its {item['input_ids'].size} tokens")


def _fits(item: dict[str, Any], activations: dict, scales: dict) -> dict[str, bool]:
    """Of each entry, whether it is what the format says; all have the right types already."""
    ids, cells, places = item["input_ids"], item["cells"], item.get("positions", item["input_ids"])
    T, R, A = ids.size, places.size, ids.size - item["prompt_length"]
    found = {
        "sample_idx": item["sample_idx"] >= 0,
        "view": "view" not in item or _is_view(item["view"]),
        "input_ids": _is(ids, "int32", T),
        "prompt_length": 0 <= item["prompt_length"] <= T,
        "output_logprobs": _is(item["output_logprobs"], "float32", A),
        "cells": _is(cells, "int32", None, len(CELL_COLUMNS)),
        "num_train_pairs": item["num_train_pairs"] >= 0,
        "prediction": _is_grid(item["prediction"]),
        "target": _is_grid(item["target"]),
    }
    if found["cells"]:
        start, stop = cells[:, 5], cells[:, 6]
        found["cells"] = bool(((start >= 0) & (start <= stop) & (stop <= T)).all())
    if "cells_original" in item:
        found["cells_original"] = _is(item["cells_original"], "int32", *cells.shape)
    if "positions" in item:
        fits = _is(places, "int32", R) and (np.diff(places, prepend=-1) > 0).all()
        found["positions"] = bool(fits) and (not R or places[-1] < T)
    if "output_logits" in item:
        found["output_logits"] = _is(item["output_logits"], "float16 float32", 1, None)
    for name, array in activations.items():
        found[f"activations {name}"] = _is(array, "float16 float32 int8", R, None)
    for name, array in scales.items():
        found[f"scales of {name}"] = name in activations and _is(array, "float32", R)
    return found


def _is(array: np.ndarray, dtypes: str, *shape: int | None) -> bool:
    """Whether it has one of the dtypes and that shape, None being any size."""
    return (
        array.dtype.name in dtypes.split()
        and array.ndim == len(shape)
        and all(want in (None, have) for have, want in zip(array.shape, shape, strict=True))
    )


def _is_grid(grid: list | None) -> bool:
    if grid is None:
        return True
    return 0 < len(grid) <= MAX_SIDE and all(
        type(row) is list
        and 0 < len(row) == len(grid[0]) <= MAX_SIDE
        and set(map(type, row)) == {int}
        and min(row) >= 0
        and max(row) <= 9
        for row in grid
    )


def _is_view(view: dict[str, Any]) -> bool:
    if view.keys() != {"number", "dihedral", "colors", "pair_order"}:
        return False
    colors, order = view["colors"], view["pair_order"]
    if type(colors) is not list or type(order) is not list:
        return False
    numbers = [view["number"], view["dihedral"], *colors, *order]
    is_whole = all(type(number) is int and number >= 0 for number in numbers)
    return is_whole and sorted(colors) == [*range(10)]


def _shown(name: Any) -> str:
    return one_line(name, 40) if isinstance(name, str) else f"a {type(name).__name__}"


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


def load(file: BinaryIO) -> list[dict[str, Any]]:
    """The items of a shard file. Raises UnpicklingError, with the cause, for anything else."""
    items = unpickled(file)
    if type(items) is not list:
        raise pickle.UnpicklingError(f"it holds a {type(items).__name__}, not a list of items")
    for number, item in enumerate(items):
        try:
            check_item(item)
        except (TypeError, ValueError) as error:
            raise pickle.UnpicklingError(f"item {number}: {error}") from error
        for mapping in (item, item["activations"], item.get("scales", {})):
            for key, value in mapping.items():
                if isinstance(value, np.ndarray):  # and not what numpy pickles by itself leaves
                    mapping[key] = value.view(np.ndarray)
    return items


def non_finite_rows(item: dict[str, Any]) -> int:
    """Activation rows of a stored item that hold a NaN or an infinity, over all its activations."""
    count = 0
    for array in item["activations"].values():
        if not (_all_finite(array) if array.dtype == np.float16 else np.isfinite(array).all()):
            count += int((~np.isfinite(array).all(axis=-1)).sum())
    return count


def gave_nothing_finite(item: dict[str, Any], non_finite: int) -> bool:
    """Whether the model made nothing but NaN and infinities of a stored item: none of its rows is
    finite, by `non_finite_rows`, or, where it keeps no rows, no log-probability of its answer."""
    if rows := sum(map(len, item["activations"].values())):
        return non_finite == rows
    logprobs = item["output_logprobs"]
    return bool(len(logprobs)) and not np.isfinite(logprobs).any()
