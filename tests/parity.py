"""Running our decoder on a checkpoint folder, and comparing with a reference."""

from dataclasses import dataclass, replace

import jax
import numpy as np

from utils.model.adapters import read_adapter
from utils.model.capture import HOOK_POINTS, CaptureSpec
from utils.model.config import ModelConfig
from utils.model.decoder import Decoder
from utils.model.engine import Engine
from utils.model.generate import Sampling, Shape
from utils.model.layout import Layout, single_device_mesh
from utils.model.weights import Checkpoint
from utils.plan.batching import Batch, Length, pad_rows, prefill_passes

TOLERANCE = 1e-4  # of a row's norm; for log-probabilities, absolute


def load_engine(
    folder,
    names=None,
    positions="all",
    dtype=np.float32,
    mesh=None,
    adapter=None,
    edits=(),
) -> Engine:
    """An engine that captures `names`, or every hook point of every layer; adapter: a folder."""
    config = ModelConfig.from_hf(folder)
    if adapter is not None:
        adapter = read_adapter(adapter)
        config = adapter.untied(config)
    points = [p for p in HOOK_POINTS if not (config.num_experts and p == "mlp_act")]
    spec = CaptureSpec.from_flags(config, ["all"], points, positions)
    if names is not None:
        spec = CaptureSpec(tuple(names), positions)
    layout = Layout.of(config, mesh or single_device_mesh())
    params = Checkpoint(folder, config, adapter).load(layout, dtype)
    model = Decoder(config, layout, spec, edits=tuple(edits))
    return Engine(model, params, logits=True, forced=True)


@dataclass
class Prefilled:
    """What the chunks of a prefill gave, joined: captures by name, [B, T, D]; logits, [B, V]; log
    p of the forced answers' tokens, [B, A]; and the engine's state."""

    captures: dict
    logits: np.ndarray
    logprobs: np.ndarray
    state: tuple


jax.tree_util.register_dataclass(
    Prefilled, ["captures", "logits", "logprobs"], [], drop_fields=["state"]
)


def prefill(
    engine, rows, length, answers=None, chunk=32, slots=256, used=None, changes=()
) -> Prefilled:
    """Prefill of `rows` (lists of ids, None for a padding row) of at most `length` tokens.

    changes: of each edit its `mask` and `values`, of all rows and `length` tokens.
    """
    answers, data = answers or [[]] * len(rows), engine.model.layout.data
    ids = [
        None if row is None else np.array([*row, *answer])
        for row, answer in zip(rows, answers, strict=True)
    ]
    prompts = np.array([1 if row is None else len(row) for row in rows], np.int32)
    lengths = np.array([1 if row is None else len(row) for row in ids], np.int32)
    padded, shape = pad_rows(ids, length), Shape(len(rows), slots, chunk)
    batch = Batch(shape, tuple(-1 if row is None else b for b, row in enumerate(rows)))
    state, captures = engine.begin(shape, used), {}
    room = -(-length // chunk) * chunk
    logprobs = np.zeros((len(rows), room), np.float32)
    for passed in prefill_passes(batch, [Length(int(n)) for n in lengths], data):
        places, starts = [row for row, _ in passed], np.array([k * chunk for _, k in passed])
        here = tuple(
            {name: _chunks(value, places, starts, chunk) for name, value in arrays.items()}
            for arrays in changes
        )
        part, state = engine.prefill(
            state, padded, places, starts.astype(np.int32), prompts, lengths, shape, here
        )
        part = jax.device_get(part)  # once, since each index into an array on a device takes long
        for b, start, number in zip(places, starts, range(data), strict=True):
            for name, value in part.captures.items():
                states = np.zeros((len(rows), room, value.shape[-1]), value.dtype)
                kept = captures.setdefault(name, states)
                kept[b, start : start + chunk] = value[number]
            if part.logprobs is not None:
                logprobs[b, start : start + chunk] = part.logprobs[number]
            if start <= prompts[b] - 1 < start + chunk and part.logits is not None:
                found = np.asarray(state[1])[b]
                np.testing.assert_array_equal(np.asarray(part.logits)[number], found)
    captures = {name: kept[:, :length] for name, kept in captures.items()}
    forced = np.zeros((len(rows), max(map(len, answers))), np.float32)
    for b, answer in enumerate(answers):
        forced[b, : len(answer)] = logprobs[b, prompts[b] - 1 :][: len(answer)]
    return Prefilled(captures, np.asarray(state[1]), forced, state)


def _chunks(array, rows, starts, chunk):
    """[B, T, ...] -> [P, chunk, ...], zeros behind the end."""
    found = np.zeros((len(rows), chunk, *array.shape[2:]), array.dtype)
    for target, row, start in zip(found, rows, starts, strict=True):
        part = array[row, start : start + chunk]
        target[: len(part)] = part
    return found


def generate(
    engine,
    rows,
    length,
    max_tokens,
    stops=(),
    temperature=0.0,
    keys=None,
    answer_changes=(),
    on_host=True,
    **chunks,
):
    """Prefill and decode; (prefilled, decoded). answer_changes: of each edit its mask, [B, A].
    on_host: whether what was decoded is fetched."""
    prompts = np.array([1 if row is None else len(row) for row in rows], np.int32)
    first = prefill(engine, rows, length, **chunks)
    if keys is None:
        keys = [0 if row is None else i + 1 for i, row in enumerate(rows)]
    sampling = Sampling(max_tokens, tuple(stops))
    if engine.sampling not in (None, sampling):
        engine = replace(engine, _programs={})
    engine.sampling = sampling
    shape = Shape(len(rows), chunks.get("slots", 256), chunks.get("chunk", 32))
    decoded, first.state = engine.decode(
        first.state, prompts, np.array(keys, np.uint32), temperature, shape, tuple(answer_changes)
    )
    return first, jax.device_get(decoded) if on_host else decoded


def log_softmax(logits):
    """float64 log-softmax over the last axis."""
    logits = np.asarray(logits, np.float64)
    logits = logits - logits.max(-1, keepdims=True)
    return logits - np.log(np.exp(logits).sum(-1, keepdims=True))


def worst_error(found, reference) -> float:
    """Largest distance of a row of `found` from its row of `reference`, in norms of the latter, or
    absolute where that is 0."""
    found, reference = np.asarray(found, np.float64), np.asarray(reference, np.float64)
    assert found.shape == reference.shape
    distance = np.linalg.norm(found - reference, axis=-1)
    norm = np.linalg.norm(reference, axis=-1)
    return float((distance / np.where(norm > 0, norm, 1)).max())
