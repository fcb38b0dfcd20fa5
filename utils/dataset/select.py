"""Activations as training data: rows of shards, selected, shuffled, in numpy batches.

    from utils.dataset import ActivationDataset, Selection

    dataset = ActivationDataset("results/activations", Selection(layer=11, role="output"))
    for batch in dataset.batches(4096, shuffle_buffer=200_000, seed=0):
        batch.activations  # float32 [4096, width]

A row is what one layer made of one token. Which rows are taken is said by a `Selection`, and what
was left out is counted in `dataset.left_out` and logged.
"""

# N rows   D model width   T tokens   C cells

import logging
from collections import Counter
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import count
from pathlib import Path
from types import NoneType
from typing import Any

import numpy as np

from utils.dataset.shuffle import NO_CELL, ActivationRows, Reservoir, cast, in_order, mixed
from utils.dataset.stats import activation_stats
from utils.errors import UserError, some
from utils.model.capture import HOOK_POINTS
from utils.prompt.codec import load_tokenizer
from utils.shards.int8 import values_of
from utils.shards.items import to_float32
from utils.shards.manifest import Manifest, differences, read_manifest
from utils.shards.reader import read_ahead, read_entry

log = logging.getLogger(__name__)

ROLE_NUMBERS = {"input": 0, "output": 1}
NON_FINITE = "with a NaN or an infinity, which the model made"
SPECIAL, SINK = "special tokens", "attention sinks"
SAID = (NON_FINITE, SPECIAL, SINK)  # causes that are always said


@dataclass(frozen=True)
class Selection:
    """Which rows; what is None selects nothing away.

    layer: from 0, negative from the end of those captured. hook_point: where in the layer. part:
    "prompt" or "answer". role: "input" or "output" grids. pair: "train", "test", or the number of a
    train pair in the prompt. colors: of cells. With role, pair or colors only tokens that hold such
    a cell are taken. correct: of solved or of failed samples (those whose answer is unknown are
    neither). original: role, pair, row, col and color speak of the task as it was before its view
    of an augmented run. drop_special: leave out special tokens. drop_sinks: leave out rows whose
    norm is more than so many times the run's median norm (attention sinks: 10 is a fair choice).
    """

    layer: int
    hook_point: str = "resid_post"
    part: str | None = None
    role: str | None = None
    pair: str | int | None = None
    colors: Collection[int] | int | None = None
    correct: bool | None = None
    original: bool = False
    drop_special: bool = False
    drop_sinks: float | None = None

    def __post_init__(self) -> None:
        def check(name: str, allowed: Collection[Any]) -> None:
            if (value := getattr(self, name)) is not None and value not in allowed:
                raise UserError(f"{name} {value!r} is none of {', '.join(map(str, allowed))}")

        for name in ("layer", "pair", "colors"):  # numpy's whole numbers are welcome
            if isinstance(value := getattr(self, name), np.integer):
                object.__setattr__(self, name, int(value))
        if type(self.layer) is not int:
            raise UserError(f"layer {self.layer!r} is not a whole number")
        check("hook_point", HOOK_POINTS)
        check("part", ("prompt", "answer"))
        check("role", tuple(ROLE_NUMBERS))
        if type(self.pair) is not int:
            check("pair", ("train", "test"))
        if type(self.colors) is int:
            object.__setattr__(self, "colors", (self.colors,))
        if self.colors is not None and not set(self.colors) <= set(range(10)):
            raise UserError(f"colors {list(self.colors)} are not all among 0..9")
        if type(self.correct) not in (bool, NoneType):
            raise UserError(f"correct {self.correct!r} is none of True, False, None")
        if self.drop_sinks is not None and self.drop_sinks <= 1:
            raise UserError(f"drop_sinks {self.drop_sinks:g} would drop half of all: give 2 to 100")


class ActivationDataset:
    """The selected rows of a run, or of several runs of one model. A row that is not finite is
    never selected: one would be enough to ruin what is trained on it.

    folders: of a disk or `gs://bucket/prefix`; shards are verified as they are read. special_ids:
    default, what the manifest says, or the tokenizer of the manifest's model.

    Attributes: name, such as "resid_post.11"; width; samples, the keys of all samples in the order
    of the manifests, `(task_id, sample_idx)` and, in an augmented run, the view's number; left_out,
    cause -> rows that the last pass has left out.

    Raises UserError: no manifest, no such layer or hook point, runs that do not belong together.
    """

    def __init__(
        self,
        folders: str | Path | Sequence[str | Path],
        selection: Selection,
        special_ids: Collection[int] | None = None,
    ):
        self.folders = [folders] if isinstance(folders, str | Path) else list(folders)
        manifests = [read_manifest(folder) for folder in self.folders]
        self.name, self.width = _captured(self.folders[0], manifests[0], selection)
        _check_alike(self.folders, manifests, self.name)
        self.selection = selection
        self.samples: list[tuple[Any, ...]] = []
        self.left_out: Counter[str] = Counter()
        self._entries = []  # folder, manifest's entry, place of its first sample
        for folder, manifest in zip(self.folders, manifests, strict=True):
            for entry in manifest["files"]:
                self._entries.append((folder, entry, len(self.samples)))
                self.samples += map(tuple, entry["samples"])
            if manifest["status"] != "complete":
                so_far = manifest["total_samples"]
                log.info("the run in %s is not complete: %d samples so far", folder, so_far)
        if not self.samples:
            raise UserError(f"{self.folders[0]} holds no samples: is its run at its beginning?")
        # There are no more rows, of however many there is to be room for.
        self._tokens = sum(manifest["total_tokens"] for manifest in manifests)
        self._all_finite = not any(manifest.get("non_finite", 1) for manifest in manifests)
        self._special = np.zeros(0, int)
        if selection.drop_special:
            ids = _special_ids(manifests[0]) if special_ids is None else special_ids
            self._special = np.array(sorted(ids), int)
        elif special_ids is not None:
            raise UserError("special_ids are given, but the selection does not drop_special")
        self._norm_limit = None
        if selection.drop_sinks is not None:
            stats = [activation_stats(folder)[self.name].norm_median for folder in self.folders]
            self._norm_limit = selection.drop_sinks * float(np.median(stats))

    def parts(
        self, seed: int | None = None, worker: int = 0, workers: int = 1
    ) -> Iterator[ActivationRows]:
        """Every sample's selected rows, as stored but int8 as float32; samples without any are left
        out.

        seed: of the order of shards; None keeps the manifests'. worker, workers: this one's share
        of the shards. The next shard is read while this one is used. Raises UserError where
        nothing is selected in the end, which a share of several workers may be.
        """
        for (rows,) in together([self], seed, worker, workers):
            if len(rows):
                yield rows

    def _conclude(self, left_out: Counter[str], found: int, workers: int) -> None:
        """At the end of a pass: says what was left out, and raises UserError where all was."""
        self.left_out = left_out
        if not found and workers == 1:
            causes = ", ".join(f"{n} {cause}" for cause, n in left_out.items() if n)
            raise UserError(
                f"nothing is selected of {some(list(map(str, self.folders)))}: of "
                f"{left_out.total()} rows {causes}; select less narrowly"
            )
        if dropped := {c: n for c, n in left_out.items() if c in SAID and n}:
            said = " and ".join(f"{n} {cause}" for cause, n in dropped.items())
            log.info("left out %s; %d rows stay", said, found)

    def _select(self, item: dict[str, Any], place: int, left_out: Counter[str]) -> ActivationRows:
        s = self.selection
        tokens = item.get("positions", np.arange(len(item["input_ids"]), dtype=np.int32))
        left = np.ones(len(tokens), bool)

        def drop(cause: str, where: np.ndarray) -> None:
            nonlocal left
            left_out[cause] += int((left & where).sum())
            left = left & ~where

        if not self._all_finite:
            drop(NON_FINITE, ~np.isfinite(item["activations"][self.name]).all(axis=1))
        if s.correct is not None and item["correct"] is None:
            drop("of samples without a generated answer or without ground truth", left)
        elif s.correct is not None and item["correct"] != s.correct:
            drop("of samples not " + ("solved" if s.correct else "failed"), left)
        if s.part is not None:
            drop(f"not in the {s.part}", (tokens < item["prompt_length"]) != (s.part == "prompt"))
        held = cells_of_tokens(item, s)[tokens]
        if (s.role, s.pair, s.colors) != (None, None, None):
            drop("of other tokens or cells", held[:, 0] == NO_CELL)
        if len(self._special):
            drop(SPECIAL, np.isin(item["input_ids"][tokens], self._special))
        if self._norm_limit is not None:
            norms = np.linalg.norm(to_float32(values_of(item, self.name)), axis=1)
            drop(SINK, norms > self._norm_limit)
        rows = np.flatnonzero(left)
        states = values_of(item, self.name, slice(None) if left.all() else rows)
        samples, tokens = np.full(len(rows), place, np.int32), tokens[rows]
        return ActivationRows(states, samples, tokens, item["input_ids"][tokens], held[rows])

    def batches(
        self,
        batch_size: int,
        *,
        shuffle_buffer: int = 0,
        seed: int = 0,
        epochs: int | None = 1,
        drop_last: bool = False,
        dtype: Any = np.float32,
        worker: int = 0,
        workers: int = 1,
    ) -> Iterator[ActivationRows]:
        """Batches of `batch_size` rows, activations in `dtype`; the last one may be smaller.

        shuffle_buffer: rows that are mixed in memory, 0 for the order of storage; with it the order
        of shards is drawn too. The same seed gives the same batches; each epoch is shuffled anew.
        epochs: passes over the rows, None without end. worker, workers: this one's share of the
        shards; one that has no rows gives no batch. Raises UserError: nothing is selected, fewer
        rows than a batch with `drop_last`, a value that `dtype` cannot hold.
        """
        if batch_size < 1:
            raise UserError(f"batch_size {batch_size} is below 1")
        if shuffle_buffer and shuffle_buffer < batch_size:
            raise UserError(
                f"shuffle_buffer {shuffle_buffer} is below the batch_size {batch_size}: give 0, or "
                "ten batches and more"
            )
        for epoch in count() if epochs is None else range(epochs):
            order = [seed, epoch] if shuffle_buffer else None
            blocks = self.parts(order, worker, workers)
            if shuffle_buffer:
                random = np.random.default_rng([seed, epoch, 1])
                size = min(shuffle_buffer, self._tokens + 1)
                batches = mixed(blocks, size, batch_size, drop_last, random)
            else:
                batches = in_order(blocks, batch_size, drop_last)
            empty = True
            for rows in batches:
                empty = False
                yield replace(rows, activations=cast(rows.activations, dtype))
            if empty and workers == 1:
                raise UserError(f"the selection has fewer rows than a batch of {batch_size}")
            if empty:
                return

    def rows(self, most: int | None = None, seed: int = 0) -> ActivationRows:
        """All selected rows in memory, in order, or `most` of them, drawn at random by `seed` from
        all in one pass (reservoir sampling, Vitter 1985). Activations are as `parts` gives them."""
        return rows_of([self], most, seed)[0]


def together(
    datasets: Sequence[ActivationDataset],
    seed: int | None = None,
    worker: int = 0,
    workers: int = 1,
) -> Iterator[list[ActivationRows]]:
    """Of several datasets of the same runs, each sample's rows in each of them, which may be none:
    every shard is read once for all. Otherwise as `ActivationDataset.parts`."""
    entries = datasets[0]._entries
    order = np.arange(len(entries))
    if seed is not None:
        np.random.default_rng(seed).shuffle(order)
    left_out: list[Counter[str]] = [Counter() for _ in datasets]
    found = np.zeros(len(datasets), int)
    entries = [entries[i] for i in order[worker::workers]]
    shards = read_ahead(lambda entry: read_entry(*entry[:2]), entries)
    for (_, _, first), items in zip(entries, shards, strict=True):
        for place, item in enumerate(items, first):
            pairs = zip(datasets, left_out, strict=True)
            rows = [dataset._select(item, place, causes) for dataset, causes in pairs]
            found += [len(part) for part in rows]
            yield rows
    for dataset, causes, number in zip(datasets, left_out, found, strict=True):
        dataset._conclude(causes, int(number), workers)


def rows_of(
    datasets: Sequence[ActivationDataset], most: int | None = None, seed: int = 0
) -> list[ActivationRows]:
    """`ActivationDataset.rows` of each of several datasets of the same runs, in one pass."""
    if most is None:
        parts = zip(*together(datasets), strict=True)
        return [ActivationRows.joined([rows for rows in each if len(rows)]) for each in parts]
    kept = [Reservoir(min(most, dataset._tokens), seed) for dataset in datasets]
    for parts in together(datasets):
        for reservoir, rows in zip(kept, parts, strict=True):
            if len(rows):
                reservoir.add(rows)
    return [reservoir.rows() for reservoir in kept]


def cells_of_tokens(item: dict[str, Any], selection: Selection) -> np.ndarray:
    """int32 [T, 5]: pair, role, row, col, color of the first selected cell that a token holds."""
    cells = item["cells"]
    if selection.original:
        cells = item.get("cells_original", cells)
    keep = np.ones(len(cells), bool)
    if selection.role is not None:
        keep &= cells[:, 1] == ROLE_NUMBERS[selection.role]
    if selection.pair in ("train", "test"):
        keep &= (cells[:, 0] == -1) == (selection.pair == "test")
    elif selection.pair is not None:
        keep &= cells[:, 0] == selection.pair
    if selection.colors is not None:
        keep &= np.isin(cells[:, 4], list(selection.colors))
    none = np.full((1, 5), NO_CELL, np.int32)  # at place -1
    cells = cells[keep]
    return np.concatenate([cells[:, :5], none])[first_cells(cells, len(item["input_ids"]))]


def first_cells(cells: np.ndarray, tokens: int) -> np.ndarray:
    """int [T], of each of so many tokens: place among cells, int [C, 7], of the first that it
    holds, or -1."""
    first, counts = np.full(tokens, -1), cells[:, 6] - cells[:, 5]
    which = np.repeat(np.arange(len(cells)), counts)
    held = np.arange(len(which)) - np.repeat(counts.cumsum() - counts, counts) + cells[which, 5]
    first[held[::-1]] = which[::-1]  # the first of several is written last
    return first


def _captured(folder: Any, manifest: Manifest, selection: Selection) -> tuple[str, int]:
    """Name and width of what is selected. Raises UserError where it was not captured."""
    there = manifest["activations"]
    if not there:
        raise UserError(f"{folder} holds no activations: was it a run with --no_extraction?")
    layers = sorted(a["layer"] for a in there.values() if a["hook_point"] == selection.hook_point)
    layer = selection.layer
    if layer < 0 and len(layers) >= -layer:
        layer = layers[layer]
    name = f"{selection.hook_point}.{layer}"
    if name not in there:
        raise UserError(f"{folder} has no {name}; captured were {some(list(there), 12)}")
    return name, there[name]["width"]


def _check_alike(folders: Sequence[Any], manifests: Sequence[Manifest], name: str) -> None:
    """Raises UserError for runs of different models, prompts or positions, or with shards in
    common."""
    seen: dict[str, Any] = {}
    for folder, manifest in zip(folders, manifests, strict=True):
        for key in ("model", "prompt"):
            if changes := differences(manifests[0].get(key), manifest.get(key), key):
                raise UserError(
                    f"{folder} is of another run than {folders[0]}: {some(changes)}; train on runs "
                    "of one model and prompt"
                )
        if name not in manifest["activations"]:
            raise UserError(f"{folder} has no {name}, which {folders[0]} has")
        positions = [m["capture"].get("token_positions") for m in (manifests[0], manifest)]
        if positions[0] != positions[1]:
            raise UserError(
                f"{folder} holds the states of {positions[1]} tokens, {folders[0]} of "
                f"{positions[0]}: train on runs of one kind"
            )
        for entry in manifest["files"]:
            if (other := seen.setdefault(entry["crc32c"], folder)) is not folder:
                raise UserError(
                    f"{folder} and {other} both hold the shard {entry['filename']}: its rows would "
                    "count double"
                )


def _special_ids(manifest: Manifest) -> list[int]:
    if "special_ids" in manifest:
        return manifest["special_ids"]
    try:
        return load_tokenizer(manifest["model"]["path"]).all_special_ids
    except UserError as error:
        why = f"which tokens are special is not known ({error})"
        raise UserError(f"{why}: pass special_ids") from error
