"""The TPU's attention: interpreted on a CPU, against a plain softmax, and compiled for TPUs."""

import functools
import importlib.util
import json
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import ROOT

from utils.model.config import Scores
from utils.model.flash import INVALID_POSITION, _blocks, cost, flash

# The tolerance is absolute, for queries of variance 4 and values of variance 1.
TOLERANCE = {"float32": 1e-5, "bfloat16": 2e-2}


@functools.partial(jax.jit, static_argnames="scores")
def interpreted(query, kv, query_at, key_at, scores):
    """With the rows in question between others of the cache."""
    rest = [(2, 1), (0, 0), (0, 0), (0, 0)]
    cache = jnp.pad(kv, rest, constant_values=jnp.nan)
    return flash(query, cache, 2, query_at, key_at, scores, interpret=True)


def attention(query, kv, query_at, key_at, how):
    """One query at a time, over the keys that it sees and no others; float64."""
    (B, T, N, H), K = query.shape, kv.shape[1]
    query, kv = np.float64(query), np.float64(kv)
    y = np.zeros((B, T, N, H))
    for b, t, n in np.ndindex(B, T, N):
        distance = query_at[b, t] - key_at[b]
        seen = (distance >= 0) & (distance < (how.window or 2**29))
        if seen.any():
            key, value = np.split(kv[b, n * K // N, seen], 2, axis=-1)
            scores = key @ query[b, t, n] * how.scale
            if how.softcap:
                scores = how.softcap * np.tanh(scores / how.softcap)
            weights = np.exp(scores - scores.max())
            y[b, t, n] = weights @ value / weights.sum()
    return y


def arrays(B, T, S, N, K, H, dtype="float32"):
    rng = np.random.default_rng(0)
    query, kv = 2 * rng.standard_normal((B, T, N, H)), rng.standard_normal((B, K, S, 2 * H))
    return np.asarray(query, jnp.dtype(dtype)), np.asarray(kv, jnp.dtype(dtype))


def check(query, kv, query_at, key_at, window=None, softcap=None):
    query_at, key_at = np.int32(query_at), np.int32(key_at)
    scores = Scores(query.shape[-1] ** -0.5, window, softcap)
    found = interpreted(query, kv, query_at, key_at, scores=scores)
    assert found.dtype == query.dtype and found.shape == query.shape
    error = np.abs(np.float64(found) - attention(query, kv, query_at, key_at, scores)).max()
    print(f"largest error {error:.1e}")
    assert error <= TOLERANCE[str(query.dtype)]


@pytest.mark.parametrize("dtype, N, K, H, T, window, softcap", [
    ("float32", 14, 2, 64, 300, None, None),
    ("float32", 8, 2, 128, 512, 100, None),
    ("float32", 4, 4, 80, 40, 7, None),
    ("float32", 4, 2, 256, 200, 70, 5.0),
    ("bfloat16", 14, 2, 64, 512, 200, None),
    ("bfloat16", 32, 8, 128, 80, None, None),
])  # fmt: skip
def test_a_prompt(dtype, N, K, H, T, window, softcap):
    at = np.arange(T)[None]
    check(*arrays(1, T, T, N, K, H, dtype), at, at, window, softcap)


# A cache of 1,100 slots: those of row 0 hold 700 tokens and, after a gap, 128 more; those of row 1
# begin empty and hold 400. The chunk is what was written last.
CACHE = np.full((2, 1100), INVALID_POSITION)
CACHE[0, :700], CACHE[0, 720:848] = np.arange(700), np.arange(700, 828)
CACHE[1, 30:430] = np.arange(400)
CHUNK = np.stack([np.arange(700, 828), np.arange(272, 400)])
EMPTY = np.nonzero(INVALID_POSITION == CACHE)


@pytest.mark.parametrize("rubbish", [3e38, np.nan, np.inf])
@pytest.mark.parametrize("H, window", [(64, None), (128, 150)])
def test_a_chunk_against_a_cache(H, window, rubbish):
    """Whatever the empty slots hold."""
    query, kv = arrays(2, 128, 1100, 8, 2, H)
    kv[EMPTY[0], :, EMPTY[1]] = rubbish
    check(query, kv, CHUNK, CACHE, window)


@pytest.mark.parametrize("H, window", [(64, None), (128, 150)])
@pytest.mark.parametrize("rubbish", [np.nan, -np.inf])
def test_what_is_not_finite_reaches_those_who_see_it(H, window, rubbish):
    """It stands in the value of one token, in a block that others see in part."""
    query, kv = arrays(2, 128, 1100, 8, 2, H)
    clean = np.asarray(interpreted(query, kv, CHUNK, CACHE, scores=Scores(H**-0.5, window)))
    kv[0, 0, 750, H + 3] = rubbish  # position 730: that of query 30; only key/value head 0
    found = np.asarray(interpreted(query, kv, CHUNK, CACHE, scores=Scores(H**-0.5, window)))
    same = (found == clean).all(axis=-1)
    assert same[1].all() and same[0, :30].all() and same[0, :, 4:].all()
    assert not np.isfinite(found[0, 30:, :4]).all(axis=-1).any()


def test_queries_dealt_out_of_order():
    """As over 4 devices in 4 stripes, of which this is what the second one holds, and backwards."""
    at = np.arange(256).reshape(4, 4, 16)[:, 1].ravel()
    query, kv = arrays(2, 64, 256, 14, 2, 64)
    keys = np.broadcast_to(np.arange(256), (2, 256))
    check(query, kv, [at, at[::-1]], keys)
    check(query, kv, [at, at[::-1]], keys[:, ::-1], window=30)


def test_a_query_that_sees_no_key_gives_zeros():
    query, kv = arrays(1, 40, 40, 4, 4, 80)
    at = np.arange(40)[None]
    for query_at, key_at, blind in (
        (at - 10, at, np.arange(40) < 10),  # before every key
        (at, np.where(at < 15, INVALID_POSITION, at), np.arange(40) < 15),
        (at, np.full_like(at, INVALID_POSITION), np.full(40, True)),
        (np.full_like(at, INVALID_POSITION), at, np.full(40, True)),  # with a window, beyond all
    ):
        found = interpreted(query, kv, np.int32(query_at), np.int32(key_at), scores=Scores(0.1, 7))
        assert ((np.asarray(found[0]) == 0).all(axis=(1, 2)) == blind).all()
        check(query, kv, query_at, key_at, window=7)


def test_blocks_that_nobody_sees_are_passed_over():
    """A chunk of 2 blocks at 3,000 in a cache of 8 blocks, of which 6 hold anything."""
    query_at = jnp.arange(3000, 3512).reshape(1, 2, 256)
    slots = jnp.arange(4096)
    key_at = jnp.where(slots < 3512, slots, INVALID_POSITION).reshape(1, 8, 512)
    queries, keys = _blocks(query_at, key_at, None)
    assert queries[:, 0].tolist() == [[0, 0], [6, 6], [3000, 3256], [3255, 3511]]
    assert keys[0, 0].tolist() == [*range(0, 3584, 512), INVALID_POSITION]
    assert keys[1, 0].tolist() == [*range(511, 3072, 512), INVALID_POSITION, INVALID_POSITION]
    queries, _ = _blocks(query_at, key_at, 1000)
    assert queries[:2, 0].tolist() == [[3, 4], [6, 6]]
    queries, _ = _blocks(query_at - 3000, key_at, None)
    assert queries[:2, 0].tolist() == [[0, 0], [0, 0]]


def test_cost_is_that_of_the_scores_that_are_seen():
    """Counted one by one: a whole prompt, and the mean of the chunks that make it up."""
    distance = np.arange(64)[:, None] - np.arange(64)
    for window in (None, 1, 20, 100):
        scores = Scores(1.0, window)
        seen = int(((distance >= 0) & (distance < (window or 64))).sum())
        whole = cost(3, 14, 2, 64, 64, 128, 2, scores)
        assert (whole.transcendentals, whole.flops) == (3 * 14 * seen, 3 * 14 * seen * 4 * 128)
        assert cost(3, 14, 2, 16, 64, 128, 2, scores).flops == whole.flops // 4


SLICES = {"v4": "v4-8", "v5e": "v5e-4", "v6e": "v6e-4"}
CASES = [
    (14, 2, 64, "bfloat16"),
    (32, 8, 128, "bfloat16"),
    (8, 4, 256, "bfloat16"),
    (14, 2, 64, "float32"),
]
COMPILE = """
import json, sys
import jax
from utils.model.config import Scores
from utils.model.flash import flash
from utils.run.tpu import slice_devices

# As a process sets it for a model in float32; the kernel takes no notice.
jax.config.update("jax_default_matmul_precision", "highest")
T, S = 2048, 32768

def chunk(kv, new, query, query_at, key_at, slot):
    kv = jax.lax.dynamic_update_slice(kv, new, (0, 0, slot, 0))
    softcap = 50.0 if query.shape[-1] == 256 else None  # as in Gemma 2
    scores = Scores(query.shape[-1] ** -0.5, softcap=softcap)
    return kv, flash(query, kv, 0, query_at, key_at, scores)

def compiled(name, N, K, H, dtype):
    on = jax.sharding.SingleDeviceSharding(slice_devices(name)[0])
    shapes = [
        ((1, K, S, 2 * H), dtype), ((1, K, T, 2 * H), dtype), ((1, T, N, H), dtype),
        ((1, T), "int32"), ((1, S), "int32"), ((), "int32"),
    ]
    arguments = [jax.ShapeDtypeStruct(*shape, sharding=on) for shape in shapes]
    program = jax.jit(chunk, donate_argnums=0).lower(*arguments).compile()
    memory = program.memory_analysis()
    return {
        "flops": program.cost_analysis()["flops"], "hlo": program.as_text(),
        "aliased": memory.alias_size_in_bytes, "temporary": memory.temp_size_in_bytes,
    }

print(json.dumps([compiled(*case) for case in json.loads(sys.argv[1])]))
"""


@pytest.mark.skipif(
    importlib.util.find_spec("libtpu") is None,
    reason="the TPU compiler is not installed: requirements-tpu.txt",
)
@pytest.mark.parametrize(
    ("chip", "cases"),
    [
        ("v5e", CASES),
        *((chip, CASES[:1]) for chip in ("v4", "v6e")),
        *(pytest.param(chip, CASES[1:], marks=pytest.mark.slow) for chip in ("v4", "v6e")),
    ],
)
def test_compiles_for_a_chip(chip, cases):
    """A chunk of 2,048 against 32,768 slots, written in place: the kernel fits into the memories of
    the chip, states its FLOPs, and has no copy made of the cache."""
    asked = json.dumps([(SLICES[chip], *case) for case in cases])
    # In a process of its own: another default, another cache of programs.
    done = subprocess.run(
        [sys.executable, "-c", COMPILE, asked], cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-3000:]
    for (N, K, H, dtype), program in zip(cases, json.loads(done.stdout), strict=True):
        itemsize = jnp.dtype(dtype).itemsize
        stated = cost(1, N, K, 2048, 32768, H, itemsize, Scores(1.0)).flops
        assert program["flops"] == pytest.approx(stated, rel=1e-4)
        cache = K * 32768 * 2 * H * itemsize
        assert cache <= program["aliased"] < 1.1 * cache
        assert program["temporary"] < cache / 2
        shape = f"[1,{K},32768,{2 * H}]"
        made = [line for line in program["hlo"].splitlines() if shape in line.split("(")[0]]
        assert made and not [line for line in made if " copy" in line or " transpose(" in line]
