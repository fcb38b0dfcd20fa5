"""Activations as int8 with a scale for each row, and how far that is from what the model made."""

# R rows   D width

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

_BLOCK = 1 << 18  # values that are worked on at once, in the cache


@dataclass(frozen=True)
class RelativeError:
    """Of the finite rows of one activation: the norm of what int8 changed over the row's own norm.

    rows: how many; sum and max: of their errors. A row of zeros has error 0.
    """

    rows: int = 0
    sum: float = 0.0
    max: float = 0.0

    def __add__(self, other: "RelativeError") -> "RelativeError":
        highest = max(self.max, other.max)
        return RelativeError(self.rows + other.rows, self.sum + other.sum, highest)


Errors = dict[str, RelativeError]  # by the name of the activation


def joined(one: Mapping[str, RelativeError], other: Mapping[str, RelativeError]) -> Errors:
    """The errors of the rows of both."""
    none = RelativeError()
    return {name: one.get(name, none) + other.get(name, none) for name in {**one, **other}}


def quantized_item(item: dict[str, Any]) -> tuple[dict[str, Any], Errors]:
    """The item with its activations as int8 and `scales`, and their errors.

    An array that int8 cannot hold, as `quantized` says, stays what it is and has no scales.
    """
    states, scales, errors = dict(item["activations"]), {}, {}
    for name, rows in item["activations"].items():
        values, found, row_errors = quantized(rows)
        if values is not None:
            states[name], scales[name] = values, found
        total = float(row_errors.sum(dtype=np.float64))
        errors[name] = RelativeError(len(row_errors), total, float(row_errors.max(initial=0)))
    return {**item, "activations": states, "scales": scales}, errors


def quantized(rows: np.ndarray) -> tuple[np.ndarray | None, np.ndarray | None, np.ndarray]:
    """Rows [R, D] as int8 [R, D], float32 scales [R] and the relative error of each row.

    A value is int8 * scale, the scale the row's largest magnitude over 127, so that no element is
    off by more than 1/254 of that; the scale of a row of zeros is 0. (None, None, zeros for the
    finite rows) where a row holds a NaN or an infinity, or numbers so small or so large that
    float32 could not hold the scale or the product: nothing is to be lost.
    """
    R, D = rows.shape
    values, scales = np.empty((R, D), np.int8), np.empty(R, np.float32)
    errors = np.zeros(R, np.float32)
    step = max(1, _BLOCK // max(D, 1))
    for start in range(0, R, step):
        part = slice(start, start + step)
        block = np.asarray(rows[part], np.float32)
        largest = np.abs(block).max(axis=1, initial=0)
        scale = largest / np.float32(127)
        with np.errstate(over="ignore", invalid="ignore"):
            fits = (scale >= np.finfo(np.float32).tiny) & np.isfinite(scale * np.float32(127))
        if not (fits | (largest == 0)).all():
            finite = int(np.isfinite(np.asarray(rows, np.float32)).all(axis=1).sum())
            return None, None, np.zeros(finite, np.float32)
        units = block / np.where(fits, scale, 1)[:, None]  # -127..127: no square can overflow
        nearest = np.rint(units)
        values[part], scales[part] = nearest, np.where(fits, scale, 0)
        norms = np.linalg.norm(units, axis=1)
        off = np.linalg.norm(units - nearest, axis=1)
        errors[part] = off / np.where(norms, norms, 1)
    return values, scales, errors


def values_of(item: dict[str, Any], name: str, places: Any = slice(None)) -> np.ndarray:
    """Rows of one activation of a stored item, at `places`: int8 as float32, others as stored."""
    rows, scales = item["activations"][name][places], item.get("scales", {}).get(name)
    if scales is None:
        return rows
    return np.multiply(rows, scales[places][:, None], dtype=np.float32)


def dequantized_item(item: dict[str, Any]) -> dict[str, Any]:
    """A stored item with the values of its activations, and without `scales`."""
    if "scales" not in item:
        return item
    values = {name: values_of(item, name) for name in item["activations"]}
    return {**{k: v for k, v in item.items() if k != "scales"}, "activations": values}
