"""Running our decoder on a checkpoint folder, and comparing with a reference."""

import numpy as np

from utils.model.capture import HOOK_POINTS, CaptureSpec
from utils.model.config import ModelConfig
from utils.model.decoder import Decoder
from utils.model.engine import Engine
from utils.model.generate import Outputs, Sampling, Shape
from utils.model.layout import Layout, single_device_mesh
from utils.model.weights import Checkpoint
from utils.plan.batching import pad_rows

TOLERANCE = 1e-4  # of a row's norm; for log-probabilities, absolute


def load_engine(folder, names=None, positions="all", dtype=np.float32, mesh=None) -> Engine:
    """An engine that captures `names`, or every hook point of every layer."""
    config = ModelConfig.from_hf(folder)
    spec = CaptureSpec.from_flags(config.num_layers, ["all"], HOOK_POINTS, positions)
    if names is not None:
        spec = CaptureSpec(tuple(names), positions)
    layout = Layout.of(config, mesh or single_device_mesh())
    params = Checkpoint(folder, config).load(layout, dtype)
    return Engine(Decoder(config, layout, spec), params)


def prefill(engine, rows, length, answers=None, cache_room=0):
    """Prefill of `rows` (lists of ids, None for a padding row), padded to `length`."""
    answers = answers or [[]] * len(rows)
    joined = [
        None if row is None else np.array([*row, *answer])
        for row, answer in zip(rows, answers, strict=True)
    ]
    lengths = np.array([1 if row is None else len(row) for row in rows], np.int32)
    shape = Shape(length, length, max(map(len, answers)))
    return engine.prefill(
        pad_rows(joined, length),
        lengths,
        np.array([len(answer) for answer in answers], np.int32),
        shape,
        Outputs(logits=True, cache_room=cache_room),
    )


def generate(engine, rows, length, max_tokens, stops=(), temperature=0.0, keys=None, captures=True):
    """Prefill and decode; (prefilled, decoded)."""
    lengths = np.array([1 if row is None else len(row) for row in rows], np.int32)
    first = prefill(engine, rows, length, cache_room=max_tokens)
    if keys is None:
        keys = [0 if row is None else i + 1 for i, row in enumerate(rows)]
    decoded = engine.decode(
        first,
        lengths,
        np.array(keys, np.uint32),
        Shape(length, length, 0),
        Sampling(max_tokens, tuple(stops), temperature, captures, keep_cache=True),
    )
    return first, decoded


def log_softmax(logits):
    """float64 log-softmax over the last axis."""
    logits = np.asarray(logits, np.float64)
    logits = logits - logits.max(-1, keepdims=True)
    return logits - np.log(np.exp(logits).sum(-1, keepdims=True))


def worst_error(found, reference) -> float:
    """Largest distance of a row of `found` from its row of `reference`, in norms of the latter."""
    found, reference = np.asarray(found, np.float64), np.asarray(reference, np.float64)
    assert found.shape == reference.shape
    distance = np.linalg.norm(found - reference, axis=-1)
    return float((distance / np.linalg.norm(reference, axis=-1)).max())
