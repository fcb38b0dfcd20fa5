"""Runs whose stored states take the place of others, as an intervention of `patch` asks."""

# N tokens whose states are replaced   W width of a hook point

import hashlib
import json
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np

from utils.errors import UserError
from utils.plan.samples import Sample
from utils.prompt.codec import Encoded
from utils.shards.int8 import dequantized_item
from utils.shards.items import sample_key
from utils.shards.manifest import read_manifest
from utils.shards.reader import read_entry
from utils.store.places import place_of


@dataclass(frozen=True, eq=False)
class Donor:
    """A run whose stored states take the place of others.

    entries: sample -> the manifest's entry of the shard that holds it. sample: the one whose states
    are taken, None for the same one; by_cells: the tokens are matched by their cells.
    """

    folder: str
    hook: str
    entries: dict[tuple[Any, ...], dict[str, Any]]
    sample: tuple[Any, ...] | None
    by_cells: bool

    @classmethod
    def of(
        cls, folder: str, hook: str, width: int, sample: tuple[Any, ...] | None, by_cells: bool
    ) -> tuple["Donor", str]:
        """The donor, and the sha256 of its run's `metadata.json`. Raises UserError where the run
        has not stored the hook, or the sample."""
        manifest = read_manifest(folder)
        stored = manifest["activations"].get(hook)
        if stored is None:
            names = ", ".join(manifest["activations"]) or "none"
            raise UserError(f"{folder} has not stored {hook}; it has {names}")
        if stored["width"] != width:
            raise UserError(f"{folder} has {hook} {stored['width']} wide, and here it is {width}")
        entries = {tuple(key): entry for entry in manifest["files"] for key in entry["samples"]}
        if sample and sample not in entries:
            raise UserError(f"{folder} holds no sample {list(sample)}")
        with place_of(folder).open("metadata.json") as file:
            digest = hashlib.sha256(file.read()).hexdigest()
        return cls(folder, hook, entries, sample, by_cells), digest

    def values(self, tokens: np.ndarray, sample: Sample, encoded: Encoded) -> np.ndarray:
        """float32 [N, W]: what is put in the place of some of the sample's tokens, int [N].

        Raises UserError where the donor lacks one of them, or is not of the same tokens.
        """
        item = self._item(self.sample or sample.key)
        rows = item["activations"][self.hook]
        whose = f"{self.folder}, sample {list(self.sample or sample.key)}"
        source = by_cells(tokens, encoded.cells, item["cells"], whose) if self.by_cells else tokens
        if not (self.sample or self.by_cells):
            ids = item["input_ids"][: len(encoded.ids)]
            if not np.array_equal(ids, encoded.ids):
                raise UserError(
                    f"{whose} holds other tokens than this run's prompt: patch from a run of the "
                    "same prompts, or name its `sample`"
                )
        stored = item.get("positions", np.arange(len(rows)))
        at = np.searchsorted(stored, source)
        lacking = (at >= len(stored)) | (stored[np.minimum(at, len(stored) - 1)] != source)
        if lacking.any():
            raise UserError(
                f"{whose} has not stored {self.hook} of token {source[lacking][0]}: patch fewer "
                "tokens, or from a run with --token_positions all"
            )
        return rows[at]

    def _item(self, key: tuple[Any, ...]) -> dict[str, Any]:
        if key not in self.entries:
            raise UserError(f"{self.folder} holds no sample {list(key)} to patch from")
        items = _shard(self.folder, json.dumps(self.entries[key]))
        return next(item for item in items if sample_key(item) == key)


@lru_cache(maxsize=4)
def _shard(folder: str, entry: str) -> list[dict[str, Any]]:
    return [dequantized_item(item) for item in read_entry(folder, json.loads(entry))]


def by_cells(tokens: np.ndarray, cells: np.ndarray, donor: np.ndarray, whose: str) -> np.ndarray:
    """For each token the donor's, int [N], by the pair, role, row and column of its cell.

    cells, donor: int [C, 7], the tables of the sample and of the donor. whose: the donor's name.
    Raises UserError where the donor has no such cell, or another number of tokens there, and for a
    token without a cell.
    """
    spans = {tuple(cell[:4]): (cell[5], cell[6]) for cell in donor.tolist()}
    wanted, source = set(tokens.tolist()), {}
    for *place, _, start, stop in cells.tolist():
        if not wanted & set(range(start, stop)):
            continue
        begin, end = spans.get(tuple(place), (0, 0))
        if end - begin != stop - start:
            what = "no such cell" if begin == end else "another number of tokens for that cell"
            raise UserError(f"{whose} has {what}: pair, role, row, column {place}")
        source.update(zip(range(start, stop), range(begin, end), strict=True))
    if left := wanted - source.keys():
        raise UserError(
            f'"align": "cells" needs tokens of cells, and token {min(left)} has none: give '
            "conditions on cells in `where`"
        )
    return np.array([source[token] for token in tokens.tolist()])
