"""How a list of items becomes the bytes of a shard, and how such bytes are read safely.

A shard is a pickle (protocol 5). Equal items give equal bytes: nothing is memoised, and every array
is stored as a call `numpy.ndarray(shape, dtype, bytearray)`, which any numpy loads without a copy.
Reading builds numpy arrays and plain containers and calls nothing else. Knows nothing of what an
item is.
"""

import io
import math
import mmap
import pickle
import re
from collections.abc import Callable
from typing import Any, BinaryIO

import numpy as np

from utils.store.local import Sink


def dump(items: list[dict[str, Any]], sink: Sink) -> None:
    """Pickle stored items into `sink`, large arrays straight from their own memory."""
    _Pickler(sink).dump(items)


def shard_bytes(items: list[dict[str, Any]]) -> int:
    """Exact size in bytes of the shard that `dump` would write; reads no large array but what is
    read-only."""
    sink = Sink()
    dump(items, sink)
    return sink.size


def unpickled(file: BinaryIO) -> Any:
    """What a pickle from its beginning holds. Raises UnpicklingError, with the cause, where it is
    broken or asks for anything else than numpy data and plain containers."""
    try:
        return (_Unpickler if _shares_nothing(file) else _SharingUnpickler)(file).load()
    except EOFError:
        raise pickle.UnpicklingError("it ends too early") from None
    except Exception as error:  # broken pickles end in errors of every kind
        cause = " ".join(str(error).split())[:200] or type(error).__name__
        raise pickle.UnpicklingError(f"no pickle that can be loaded: {cause}") from error


class _Pickler(pickle.Pickler):
    def __init__(self, sink: Sink):
        super().__init__(sink, protocol=5)
        self.fast = True  # no memo: the bytes must not depend on which objects happen to be shared

    def reducer_override(self, value: Any) -> Any:
        if value is np.ndarray:
            return NotImplemented
        if type(value) is not np.ndarray or value.dtype.kind not in "biuf":
            raise TypeError(f"a shard cannot hold {value!r:.80}")
        if not value.flags.writeable:  # as JAX hands it over; what a shard gives back must not be
            value = value.copy()  # since pickle tells the two apart in its bytes
        buffer = pickle.PickleBuffer(value.reshape(-1).view(np.uint8))
        return np.ndarray, (value.shape, value.dtype.str, buffer)


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


_DTYPES = {"b1", *(kind + size for kind in "iu" for size in "1248"), "f2", "f4", "f8"}


def _plain(code: Any) -> np.dtype:
    if not isinstance(code, str) or code.lstrip("<|=") not in _DTYPES:
        shown = repr(code[:40]) if isinstance(code, str) else f"given as a {type(code).__name__}"
        raise pickle.UnpicklingError(f"an array of dtype {shown} is refused")
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


_ALLOWED = {
    ("numpy", "ndarray"): _Callable(_array),  # ours; the rest is how numpy pickles by itself
    ("numpy", "dtype"): _Callable(_Dtype),
    ("numpy._core.numeric", "_frombuffer"): _Callable(
        lambda buffer, dtype, shape, order: _array(shape, dtype, buffer, order)
    ),
    ("numpy._core.multiarray", "_reconstruct"): _Callable(
        lambda subtype, shape, code: np.zeros(0).view(_Reconstructed)
    ),
}


class _Unpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        try:  # numpy 1 says numpy.core where numpy 2 says numpy._core
            return _ALLOWED[module.replace("numpy.core.", "numpy._core."), name]
        except KeyError:
            raise pickle.UnpicklingError(
                f"it asks for {f'{module}.{name}'!a:.80}, neither numpy data nor a container"
            ) from None


# The instructions of a pickle that `dump` may write, up to the next that brings its own length. Not
# among them is what fetches an object a second time or says where to keep it.
_PLAIN = re.compile(
    rb"(?:(?:K.)++|[(01N\]ae}su)t\x81\x85-\x89Rb\x93\x94]++|\x80.|M..|J....|[G\x95].{8})*+",
    re.DOTALL,
)
_LENGTH_BYTES = {b"C": 1, b"U": 1, b"\x8a": 1, b"\x8c": 1, b"B": 4, b"T": 4, b"X": 4}
_LENGTH_BYTES |= {b"\x8d": 8, b"\x8e": 8, b"\x96": 8}


def _shares_nothing(file: BinaryIO) -> bool:
    """Whether a pickle, as `dump` writes them, has no object in two places; rewinds the file.

    Only of such a one no few bytes can stand for gigabytes: with a memo, lists in lists in lists
    that are each other twice make a hash or a comparison endless, and a large index fills memory.
    """
    try:
        content: Any = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    except (io.UnsupportedOperation, ValueError):  # in memory, or empty
        content = file.read()
        file.seek(0)
    place = 0
    while True:
        place = _PLAIN.match(content, place).end()
        size = _LENGTH_BYTES.get(code := content[place : place + 1])
        if size is None:
            return code == pickle.STOP
        start = place + 1 + size
        place = start + int.from_bytes(content[place + 1 : start], "little")


class _Refused(dict):
    def __missing__(self, code: int) -> Any:
        raise pickle.UnpicklingError(f"instruction {code:#04x} is refused")


class _SharingUnpickler(pickle._Unpickler):
    """For pickles of other writers, with a memo: Python's own, slow, whose memo grows by what is
    kept in it. A key has to be a string, since the hash of anything else can take for ever."""

    find_class = _Unpickler.find_class
    dispatch = _Refused(pickle._Unpickler.dispatch)
    for _code in (pickle.EMPTY_SET, pickle.ADDITEMS, pickle.FROZENSET, pickle.DICT):
        del dispatch[_code[0]]

    def load_setitem(self) -> None:
        value, key = self.stack.pop(), self.stack.pop()
        self._put(key, value)

    def load_setitems(self) -> None:
        items = self.pop_mark()
        for key, value in zip(items[::2], items[1::2], strict=True):
            self._put(key, value)

    def _put(self, key: Any, value: Any) -> None:
        if type(key) is not str or type(self.stack[-1]) is not dict:
            raise pickle.UnpicklingError(f"a {type(key).__name__} as a key is refused")
        self.stack[-1][key] = value

    dispatch[pickle.SETITEM[0]] = load_setitem
    dispatch[pickle.SETITEMS[0]] = load_setitems
