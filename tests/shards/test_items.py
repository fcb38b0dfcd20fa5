"""Stored form, exact bytes and restricted loading of shard items."""

import io
import os
import pickle
import subprocess

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from utils.arc.views import View
from utils.dataset.contrast import roles_of_tokens
from utils.dataset.select import Selection, cells_of_tokens
from utils.shards.int8 import dequantized_item, quantized_item
from utils.shards.items import load, sample_key, sample_name, stored_item, to_storage
from utils.shards.pickles import dump, shard_bytes
from utils.store.local import Sink, checksum

VIEW = {"number": 2, "dihedral": 5, "colors": [*range(10)], "pair_order": [0]}


def item(sample_idx=0, tokens=4, width=3, task_id="task", **changes):
    rng = np.random.default_rng(abs(sample_idx))
    return {
        "task_id": task_id,
        "sample_idx": sample_idx,
        "input_ids": np.arange(tokens, dtype=np.int64),
        "prompt_length": tokens - 1,
        "activations": {"resid_post.0": rng.standard_normal((tokens, width), np.float32)},
        "output_logits": rng.standard_normal((1, 7), np.float32),
        "output_logprobs": np.array([-0.5]),
        "cells": np.array([[0, 0, 0, 0, 5, 1, 2]]),
        "num_train_pairs": 1,
        "prediction": [[1, 2], [3, 4]],
        "target": None,
        "correct": None,
        "teacher_forced": False,
        **changes,
    }


def dumped(items):
    file = io.BytesIO()
    dump(items, Sink(file))
    return file.getvalue()


def same(one, other):
    """Equal keys, types, dtypes and values."""
    if isinstance(one, np.ndarray):
        return type(other) is np.ndarray and one.dtype == other.dtype and (one == other).all()
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(same(one[k], other[k]) for k in one)
    return type(one) is type(other) and one == other


# ------------------------------------------------------------------------------- stored form


@pytest.mark.parametrize(
    ("value", "dtype"),
    [
        (65504.0, np.float16),
        (65519.0, np.float16),  # rounds down to 65504
        (65520.0, np.float32),  # would round up to infinity
        (-65520.0, np.float32),
        (1e38, np.float32),
        (np.inf, np.float16),
        (-np.inf, np.float16),
        (np.nan, np.float16),
    ],
)
@pytest.mark.parametrize("size", [1, 37])
def test_float16_keeps_every_finite_value_finite(value, dtype, size):
    array = np.ones(size, np.float32)
    array[-1] = value
    stored = to_storage(array, "float16")
    assert stored.dtype == dtype
    np.testing.assert_allclose(stored.astype(np.float32), array, rtol=1e-3)


def test_an_overflow_beside_an_infinity_is_seen():
    stored = to_storage(np.array([np.inf, np.nan, 70000], np.float32), "float16")
    assert stored.dtype == np.float32 and stored[2] == 70000


@given(st.lists(st.floats(width=32), min_size=1, max_size=40))
def test_no_infinity_where_the_model_had_a_number(values):
    array = np.array(values, np.float32)
    np.testing.assert_array_equal(np.isinf(to_storage(array, "float16")), np.isinf(array))


def test_bfloat16_is_taken():
    bfloat16 = pytest.importorskip("ml_dtypes").bfloat16
    array = np.array([1.5, -2, 3e38], bfloat16)
    assert to_storage(array[:2], "float16").tolist() == [1.5, -2]
    assert to_storage(array, "float16").dtype == np.float32
    assert to_storage(array[:2], "float32").dtype == np.float32


def test_nothing_is_copied_that_is_stored_as_it_is():
    array = np.ones((3, 4), np.float16)
    assert to_storage(array, "float16") is array
    strided = np.ones((3, 8), np.float16)[:, ::2]
    assert to_storage(strided, "float16").flags.c_contiguous


def test_dtypes_of_a_stored_item():
    stored = stored_item(item(), "float16")
    assert stored["input_ids"].dtype == stored["cells"].dtype == np.int32
    assert stored["output_logprobs"].dtype == np.float32
    assert stored["activations"]["resid_post.0"].dtype == stored["output_logits"].dtype == "f2"
    assert stored_item(item(), "float32")["output_logits"].dtype == np.float32


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"activations": {"resid_post.0": np.zeros((5, 3))}}, "resid_post.0"),
        ({"output_logprobs": np.zeros(2)}, "output_logprobs"),
        ({"cells": np.zeros((1, 6), int)}, "cells"),
        ({"positions": np.array([0])}, "resid_post.0"),
        ({"correct": np.True_}, "correct"),
        ({"sample_idx": True}, "sample_idx"),
        ({"colour": 1}, "colour"),
        ({"input_ids": np.zeros(4)}, "int32"),
        ({"cells_original": np.zeros((2, 7), int)}, "cells_original"),
        ({"cells_original": np.zeros((1, 7))}, "int32"),
        ({"view": 1}, "int as view"),
        ({"view": {}}, "view"),
        ({"view": {**VIEW, "number": True}}, "view"),
        ({"view": {**VIEW, "colors": None}}, "view"),
        ({"view": {**VIEW, "colors": [0] * 10}}, "view"),
        ({"sample_idx": -1}, "sample_idx"),
        ({"prompt_length": 5}, "prompt_length"),
        ({"prompt_length": -1}, "prompt_length"),
        ({"input_ids": np.zeros((4, 1), int)}, "input_ids"),
        ({"cells": np.array([[0, 0, 0, 0, 5, 1, 5]])}, "cells"),
        ({"cells": np.array([[0, 0, 0, 0, 5, 2, 1]])}, "cells"),
        ({"cells": np.array([[0, 0, 0, 0, 5, -1, 1]])}, "cells"),
        ({"output_logits": np.zeros(7, np.float32)}, "output_logits"),
        ({"activations": {"resid_post.0": np.zeros(4, np.float32)}}, "resid_post.0"),
        ({"activations": {"cells": np.zeros((4, 2))}, "cells": np.zeros((1, 6), int)}, "cells"),
        ({"positions": np.array([0, 1, 1, 2])}, "positions"),
        ({"positions": np.array([0, 1, 2, 4])}, "positions"),
        ({"positions": np.array([-1, 1, 2, 3])}, "positions"),
        ({"num_train_pairs": -1}, "num_train_pairs"),
        ({"prediction": [[np.int64(1)]]}, "prediction"),
        ({"prediction": [[1], [1, 2]]}, "prediction"),
        ({"prediction": []}, "prediction"),
        ({"target": [[10]]}, "target"),
        ({"target": [[1] * 31]}, "target"),
        ({"scales": {"resid_post.0": np.zeros(3, np.float32)}}, "scales of resid_post.0"),
        ({"scales": {"resid_post.1": np.zeros(4, np.float32)}}, "scales of resid_post.1"),
    ],
)
def test_misfits_are_refused_where_they_are_made(changes, message):
    with pytest.raises((TypeError, ValueError), match=message):
        stored_item(item(**changes), "float16")


def test_an_item_of_an_augmented_run():
    """Two keys more, each at its place; without them the bytes are those of before."""
    cells = np.array([[0, 0, 1, 0, 7, 1, 2]])
    stored = stored_item(item(cells_original=cells, view=VIEW), "float16")
    keys = [key for key in stored if key not in ("view", "cells_original")]
    assert keys == list(stored_item(item(), "float16"))
    assert stored["cells_original"].dtype == np.int32
    loaded = load(io.BytesIO(dumped([stored])))
    assert same(stored, loaded[0]) and same(stored, pickle.loads(dumped([stored]))[0])


def test_the_key_of_a_sample():
    assert sample_key(item(3)) == ("task", 3)
    assert sample_key(item(3, view=VIEW)) == ("task", 3, 2)
    assert sample_key({"task_id": "a", "sample_idx": 0, "view": 0, "attempts": []}) == ("a", 0, 0)
    assert sample_name(("a", 1)) == "a, sample 1"
    assert sample_name(("a", 1, 0)) == "a, sample 1, view 0"


def test_only_plain_values_reach_the_disk():
    stored = stored_item(item(), "float16")
    with pytest.raises(TypeError, match="a shard cannot hold"):
        dumped([{**stored, "correct": np.True_}])


# ------------------------------------------------------------------------------------- bytes


def test_round_trip_with_plain_pickle_and_with_load():
    items = [stored_item(item(i), "float16") for i in range(3)]
    items[1]["cells"] = np.zeros((0, 7), np.int32)
    data = dumped(items)
    for loaded in (pickle.loads(data), load(io.BytesIO(data))):
        assert all(map(same, items, loaded))
        assert loaded[0]["activations"]["resid_post.0"].flags.writeable


def test_bytes_do_not_depend_on_sharing_memory_layout_or_writability():
    shared = "a string that is interned nowhere " + str(os.getpid())
    copies = [bytes(shared, "ascii").decode() for _ in range(2)]
    grid = [[1, 2]]
    ones = np.ones((4, 3), np.float32)
    frozen = ones.astype(np.float16)
    frozen.flags.writeable = False
    first = [item(i, task_id=shared, prediction=grid, target=grid) for i in range(2)]
    second = [item(i, task_id=copies[i], prediction=[[1, 2]], target=[[1, 2]]) for i in range(2)]
    for i in range(2):
        first[i]["activations"] = {"resid_post.0": ones}
        second[i]["activations"] = {"resid_post.0": (np.asfortranarray(ones), frozen)[i]}
        second[i] = dict(reversed(second[i].items()))
    assert dumped([stored_item(i, "float16") for i in first]) == dumped(
        [stored_item(i, "float16") for i in second]
    )
    assert not frozen.flags.writeable


@pytest.mark.parametrize("tokens", [3, 1000, 40000])  # below and above what pickle buffers
def test_size_and_checksum_are_those_of_the_bytes(tokens):
    items = [stored_item(item(i, tokens, 40), "float16") for i in range(3)]
    file = io.BytesIO()
    sink = Sink(file)
    dump(items, sink)
    assert sink.size == shard_bytes(items) == len(file.getvalue())
    file.seek(0)
    assert sink.crc32c == checksum(file)
    assert Sink(io.BytesIO()).crc32c == "AAAAAA=="


def test_a_file_that_takes_a_part_at_a_time_gets_all():
    class Slow(io.BytesIO):
        def write(self, buffer):
            return super().write(bytes(buffer)[:1000])

    file = Slow()
    Sink(file).write(bytes(range(256)) * 20)
    assert file.getvalue() == bytes(range(256)) * 20


def test_checksum_is_google_s():
    sink = Sink(io.BytesIO())
    sink.write(b"123456789")
    assert sink.crc32c == "4waSgw=="  # crc32c 0xe3069283, the check value of the polynomial


# --------------------------------------------------------------------------- restricted loading


class Calls:
    """Pickles as a call of `function`."""

    def __init__(self, function, *args):
        self.call = function, args

    def __reduce__(self):
        return self.call


def object_array(value):
    array = np.empty(1, object)
    array[0] = value
    return array


MARKER = "executed"
TOUCH = f"touch {MARKER}"
ARRAY = b"cnumpy\nndarray\n"
HOSTILE = {
    "os.system": (pickle.dumps(Calls(os.system, TOUCH)), "system"),
    "builtins.eval": (pickle.dumps(Calls(eval, f"open('{MARKER}', 'w')")), "builtins.eval"),
    "open": (pickle.dumps(Calls(open, MARKER, "w")), "open"),
    "Popen": (pickle.dumps(Calls(subprocess.Popen, ["touch", MARKER])), "subprocess.Popen"),
    "getattr": (pickle.dumps(Calls(getattr, "x", "upper")), "builtins.getattr"),
    "numpy.load": (pickle.dumps(Calls(np.load, "x.npy")), "numpy.load"),
    "name of two lines": (b"\x80\x04\x8c\x02a\n\x8c\x02b\x1b\x93.", r"a\\n.b\\x1b"),
    "dotted name": (b"\x80\x04\x8c\x05numpy\x8c\x09os.system\x93.", "numpy.os.system"),
    "numpy scalar": (pickle.dumps(np.float32(1)), "scalar"),
    "call inside an object array": (
        pickle.dumps(object_array(Calls(os.system, TOUCH)), 5),
        "dtype 'O8'|system",
    ),
    "object array": (pickle.dumps(object_array([1]), 5), "dtype 'O8'"),
    "object array by code": (ARRAY + b"(K\x01\x85V|O\nC\x08" + b"\0" * 8 + b"tR.", r"'\|O'"),
    "structured dtype": (pickle.dumps(np.zeros(2, [("a", "f4")]), 5), "dtype 'V4'"),
    "big-endian array": (pickle.dumps(np.zeros(2, ">f4"), 5), "byte order"),
    "array beyond its bytes": (ARRAY + b"(K\x09\x85V<f4\nC\x04" + b"\0" * 4 + b"tR.", "fill"),
    "array without bytes": (ARRAY + b"(K\x09\x85V<f4\nNtR.", "no buffer"),
    "negative shape": (ARRAY + b"(J\xff\xff\xff\xff\x85V<f4\nC\x04" + b"\0" * 4 + b"tR.", "shape"),
    "altered function": (ARRAY + b"}V_function\nK\x01sb.", "alter"),
    "altered function, by slot": (ARRAY + b"(N}V_function\nK\x01stb.", "alter"),
    "altered array": (
        ARRAY + b"(K\x01\x85V<f4\nC\x04" + b"\0" * 4 + b"tR(K\x01K\x09\x85V<f4\nI00\nC\x00tb.",
        "__setstate__",
    ),
    "new object of an allowed name": (ARRAY + b")\x81.", "not a type object"),
    "persistent id": (b"Pname\n.", "persistent"),
    "extension code": (b"\x82\x01.", "extension"),
    "text": (b"hello\n", "no pickle"),
    "nothing": (b"", "too early"),
    "a number": (pickle.dumps(3), "not a list"),
    "a list of numbers": (pickle.dumps([3]), "not a dict"),
    "an item without keys": (pickle.dumps([{"task_id": "x"}]), "lacks sample_idx"),
    "a view without a number": (
        pickle.dumps([{**stored_item(item(), "float16"), "view": {"number": "2"}}], 5),
        "view do not fit",
    ),
    "a large index of the memo": (b"N" + b"r" + (1 << 30).to_bytes(4, "little") + b".", "NoneType"),
    "lists in lists as a dtype": (
        b"]q\0" + b"]h\0ah\0aq\0" * 99 + b"0" + ARRAY + b"(K\x01\x85h\0C\x04" + b"\0" * 4 + b"tR.",
        "given as a list",
    ),
    "lists in lists as a name": (
        b"]}]q\0" + b"]h\0ah\0aq\0" * 99 + b"sa.",
        "a list as a key is refused",
    ),
    "tuples in tuples as a key": (
        b"]})q\0" + b"h\0h\0\x86q\0" * 99 + b"Nsa.",
        "a tuple as a key is refused",
    ),
    "a set": (b"\x8f(K\x01\x90.", "0x8f is refused"),
    "more bytes than there are": (b"\x96" + b"\xff" * 7 + b"\x7f.", "no pickle|too early"),
    "a list where an array belongs": (
        pickle.dumps([{**stored_item(item(), "float16"), "cells": []}], 5),
        "list as cells",
    ),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_pickles_are_refused_by_name(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    data, message = HOSTILE[name]
    with pytest.raises(pickle.UnpicklingError, match=message) as refusal:
        load(io.BytesIO(data))
    assert len(str(refusal.value).splitlines()) == 1
    assert os.listdir(tmp_path) == []
    items = [stored_item(item(), "float16")]  # and it has not spoilt the next load
    assert same(load(io.BytesIO(dumped(items)))[0], items[0])


def test_the_hostile_pickles_are_hostile(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("os.system", "builtins.eval", "call inside an object array"):
        pickle.loads(HOSTILE[name][0])
        assert os.listdir(tmp_path) == [MARKER]
        os.unlink(MARKER)


@pytest.mark.parametrize("protocol", [3, 4, 5])
@pytest.mark.parametrize("numpy_version", [1, 2])
def test_numpy_s_own_pickles_load_in_the_spellings_of_numpy_1_and_2(protocol, numpy_version):
    stored = stored_item(item(), "float16")
    stored["cells"] = np.asfortranarray(stored["cells"].repeat(2, axis=0))
    stored["output_logits"] = stored["output_logits"].repeat(2, axis=1)[:, ::2]
    data = pickle.dumps([stored], protocol)
    if numpy_version == 1:
        if protocol > 3:
            data = data[:2] + data[11:]  # the frame, whose length would no longer be right
        for module in (b"multiarray", b"numeric"):
            old, new = b"numpy._core." + module, b"numpy.core." + module
            for mark in (b"\x8c%c", b"c"):  # of protocol 4 and up, and of protocol 3
                two = [mark % len(name) if b"%" in mark else mark for name in (old, new)]
                data = data.replace(two[0] + old, two[1] + new)
        assert b"numpy._core" not in data and b"numpy.core" in data
    (loaded,) = load(io.BytesIO(data))
    assert same(stored, loaded)
    assert type(loaded["cells"]) is np.ndarray


LIES = st.one_of(
    st.none() | st.booleans() | st.integers(-9, 9) | st.text(max_size=3) | st.just({}),
    st.lists(st.lists(st.integers(-9, 99), max_size=3), max_size=3),
    st.builds(
        np.ones,
        st.lists(st.integers(0, 9), max_size=3),
        st.sampled_from(["f2", "f4", "f8", "i1", "i4", "i8", "b1"]),
    ),
)


@given(st.data())
def test_a_lying_item_is_refused_or_can_be_used(data):
    """One entry, at the top or in its dicts, is anything else, whoever wrote the pickle."""
    original = item(2, positions=np.arange(4), cells_original=item()["cells"], view=dict(VIEW))
    original = quantized_item(original)[0] if data.draw(st.booleans()) else original
    lying = stored_item(original, "int8" if "scales" in original else "float16")
    places = [lying, *(value for value in lying.values() if isinstance(value, dict))]
    place = data.draw(st.sampled_from(places))
    place[data.draw(st.sampled_from([*place, "more"]))] = data.draw(LIES)
    try:
        (found,) = load(io.BytesIO(pickle.dumps([lying], data.draw(st.integers(3, 5)))))
    except pickle.UnpicklingError as refusal:
        assert len(str(refusal).splitlines()) == 1
        return
    sample_key(found)
    roles_of_tokens(found)
    cells_of_tokens(found, Selection(0, original=True))
    for name, rows in dequantized_item(found)["activations"].items():
        assert len(rows) == len(found.get("positions", found["input_ids"])), name
    for grid in filter(None, (found["prediction"], found["target"])):
        View.from_dict(found.get("view", VIEW)).invert(grid)


@pytest.mark.parametrize("keep", [0.3, 0.9, 0.999])
def test_a_truncated_pickle_is_refused(keep):
    data = dumped([stored_item(item(), "float16")])
    with pytest.raises(pickle.UnpicklingError):
        load(io.BytesIO(data[: int(len(data) * keep)]))
