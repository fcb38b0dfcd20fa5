"""Mean, deviation and norms of each captured activation, computed once and kept with the run.

They lie in `activation_stats.json` beside the manifest, on a disk or in a bucket, and are computed
again where the manifest lists other shards than they were made of.
"""

# N rows   D model width

import io
import json
import logging
import threading
from dataclasses import dataclass
from functools import partial
from hashlib import sha256
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from utils.errors import UserError
from utils.shards import iter_items
from utils.shards.items import to_float32
from utils.shards.manifest import Manifest, read_manifest
from utils.store.bucket import Stopped
from utils.store.deadline import within
from utils.store.local import checksum, json_lines, write_json
from utils.store.places import LocalFolder, Place, place_of

log = logging.getLogger(__name__)

STATS_FILE = "activation_stats.json"
BINS = 128  # of the norms' histogram, an octave: a quantile is exact to 0.3%
OCTAVES = 64  # around 1
SEND_SECONDS = 60


@dataclass(frozen=True)
class ActivationStats:
    """Of one activation, over every stored row of a run.

    count: rows; non_finite: rows besides that hold an infinity or a NaN, and are left out. mean,
    std: float32 [D], of each component, the deviation that of the population. norm_mean, norm_std,
    norm_median, norm_max: of the rows' euclidean norms, the median to 0.3%.
    """

    count: int
    non_finite: int
    mean: np.ndarray
    std: np.ndarray
    norm_mean: float
    norm_std: float
    norm_median: float
    norm_max: float


class _Running:
    """Moments of blocks of rows brought together as Chan et al. (1979) do, in float64."""

    def __init__(self) -> None:
        self.count = self.non_finite = 0
        self.mean: Any = 0.0
        self.squares: Any = 0.0  # sum of squared deviations
        self.norms = [0.0, 0.0, 0.0]  # sum, sum of squares, highest
        self.histogram = np.zeros(BINS * OCTAVES, np.int64)

    def add(self, rows: np.ndarray) -> None:
        """rows: [N, D], float16 or float32."""
        rows = to_float32(rows)
        finite = np.isfinite(rows).all(axis=1)
        self.non_finite += int((~finite).sum())
        rows = rows if finite.all() else rows[finite]
        if not len(rows):
            return
        count, mean = len(rows), rows.mean(axis=0, dtype=np.float64)
        centred = rows - mean.astype(np.float32)
        squares = np.einsum("ND,ND->D", centred, centred, dtype=np.float64)
        shift, total = mean - self.mean, self.count + count
        self.squares = self.squares + squares + shift**2 * (self.count * count / total)
        self.mean = self.mean + shift * (count / total)
        self.count = total
        norms = np.sqrt(np.einsum("ND,ND->N", rows, rows, dtype=np.float64))
        self.norms[0] += norms.sum()
        self.norms[1] += (norms**2).sum()
        self.norms[2] = max(self.norms[2], norms.max())
        with np.errstate(divide="ignore"):
            place = np.floor((np.log2(norms) + OCTAVES / 2) * BINS)
        place = np.clip(place, 0, len(self.histogram) - 1).astype(int)
        self.histogram += np.bincount(place, minlength=len(self.histogram))

    def result(self) -> dict[str, Any]:
        total, squares, highest = self.norms
        mean = total / self.count
        middle = np.searchsorted(self.histogram.cumsum(), self.count / 2)
        return {
            "count": self.count,
            "non_finite": self.non_finite,
            "mean": self.mean.tolist(),
            "std": np.sqrt(self.squares / self.count).tolist(),
            "norm_mean": mean,
            "norm_std": float(np.sqrt(max(0.0, squares / self.count - mean**2))),
            "norm_median": float(2 ** ((middle + 0.5) / BINS - OCTAVES / 2)),
            "norm_max": highest,
        }


def activation_stats(folder: str | Path) -> dict[str, ActivationStats]:
    """Name of each captured activation -> its statistics, read or, the first time, computed.

    folder: of a run, on a disk or at `gs://bucket/prefix`. Raises UserError for a folder without a
    run or without rows. Statistics that cannot be written there are returned, with a warning.
    """
    manifest = read_manifest(folder)
    digest, place = _digest(manifest), place_of(folder)
    if STATS_FILE in place.names():
        try:
            stored = json.loads(place.read(STATS_FILE))
            if stored["files_hash"] == digest:
                return _parsed(stored, manifest)
        except (ValueError, KeyError, TypeError):
            log.warning("%s/%s is damaged and is computed again", place, STATS_FILE)
    stored = {"files_hash": digest, **_computed(folder, manifest)}
    _keep(stored, place)
    return _parsed(stored, manifest)


def _parsed(stored: dict[str, Any], manifest: Manifest) -> dict[str, ActivationStats]:
    parsed = {}
    for name in manifest["activations"]:
        vectors = {key: np.array(stored[name][key], np.float32) for key in ("mean", "std")}
        parsed[name] = ActivationStats(**{**stored[name], **vectors})
    return parsed


def _digest(manifest: Manifest) -> str:
    files = sorted((entry["filename"], entry["crc32c"]) for entry in manifest["files"])
    return sha256(json.dumps(files).encode()).hexdigest()


def _computed(folder: str | Path, manifest: Manifest) -> dict[str, Any]:
    running = {name: _Running() for name in manifest["activations"]}
    total = manifest["total_samples"]
    for item in tqdm(iter_items(folder), total=total, desc="statistics", unit=" samples"):
        for name, rows in item["activations"].items():
            running[name].add(rows)
    for name, found in running.items():
        if found.non_finite and not found.count:
            raise UserError(
                f"all {found.non_finite} rows of {name} in {folder} hold a NaN or an infinity, "
                "which the model made: look at its weights"
            )
    if not running or not all(r.count for r in running.values()):
        raise UserError(f"{folder} holds no activations: was it a run with --no_extraction?")
    return {name: r.result() for name, r in running.items()}


def _keep(stats: dict[str, Any], place: Place) -> None:
    try:
        if isinstance(place, LocalFolder):
            write_json(place.path / STATS_FILE, stats)
            return
        there = place.listing().get(STATS_FILE)
        replaces, stopping = there.generation if there else 0, threading.Event()
        content = json_lines(stats)
        sealed = (content, STATS_FILE, len(content), checksum(io.BytesIO(content)))
        send = partial(place.put, *sealed, replaces=replaces, stopping=stopping)
        try:
            within(SEND_SECONDS, send, lambda: Stopped(f"no answer within {SEND_SECONDS} s"))
        finally:
            stopping.set()
    except (OSError, UserError, Stopped) as error:
        log.warning("the statistics are not kept in %s: %s", place, error)
