"""Contrast sets: what differs inside the model between tasks that it solves and tasks it fails, or
between two models on the same tasks.

Failed and solved samples of like prompt length are paired, or each sample with itself in another
run, and the mean activations of the two are compared, layer by layer and role by role.
"""

# N cells   T tokens   D model width   M pairs

from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from utils.arc.tasks import SampleKey
from utils.dataset.select import first_cells
from utils.errors import UserError
from utils.shards import iter_items
from utils.shards.items import sample_key

CELL_ROLES = ("train input", "train output", "test input", "answer")
# And tokens that hold no cell: of the prompt, and of an answer (all of one that does not parse).
ROLES = (*CELL_ROLES, "rest of prompt", "rest of answer")
FLIPS = 400  # draws of the signs that chance is measured with


@dataclass(frozen=True)
class Contrast:
    """pairs: (failed, solved) sample keys, or (key, key) of two runs; lengths: of their prompts, in
    tokens, int [M, 2].

    By (activation name, role), over the pairs of which both have tokens of that role: counts, how
    many; differences, float32 [D], mean of the second minus the first; consistency, norm of the
    summed differences over the root of their summed squared norms, 1 on average where they point
    anywhere, sqrt(count) where they all agree; chance, what 95 of 100 draws of their signs stay
    below.
    """

    pairs: list[tuple[SampleKey, SampleKey]]
    lengths: np.ndarray
    counts: dict[tuple[str, str], int]
    differences: dict[tuple[str, str], np.ndarray]
    consistency: dict[tuple[str, str], float]
    chance: dict[tuple[str, str], float]


def roles_of_cells(cells: np.ndarray) -> np.ndarray:
    """int [N], places in CELL_ROLES, of cells [N, 5] or [N, 7]."""
    return np.where(cells[:, 0] >= 0, cells[:, 1], 2 + cells[:, 1])


def roles_of_tokens(item: dict[str, Any]) -> np.ndarray:
    """int [T]: place in ROLES of each token; a token of several roles has the first."""
    roles = np.full(len(item["input_ids"]), ROLES.index("rest of prompt"))
    roles[item["prompt_length"] :] = ROLES.index("rest of answer")
    first = first_cells(item["cells"], len(roles))
    roles[first >= 0] = roles_of_cells(item["cells"])[first[first >= 0]]
    return roles


def pair_up(failed: dict[Any, int], solved: dict[Any, int]) -> list[tuple[Any, Any]]:
    """Key -> prompt length, of both. Each sample of the smaller group with the nearest in length of
    the other that is still free, shortest first; (failed, solved)."""
    swapped = len(solved) < len(failed)
    few, many = (solved, failed) if swapped else (failed, solved)
    free = sorted(many, key=lambda key: (many[key], key))
    lengths = [many[key] for key in free]
    pairs = []
    for key in sorted(few, key=lambda key: (few[key], key)):
        i = int(np.searchsorted(lengths, few[key]))
        near = [j for j in (i - 1, i) if 0 <= j < len(free)]
        best = min(near, key=lambda j: abs(lengths[j] - few[key]))
        other = free.pop(best)
        lengths.pop(best)
        pairs.append((other, key) if swapped else (key, other))
    return pairs


@dataclass(frozen=True)
class _Sample:
    """length: of the prompt, in tokens; means: (activation name, role) -> float32 [D]."""

    length: int
    correct: bool | None
    means: dict[tuple[str, str], np.ndarray]


def _samples(folder: str | Path) -> dict[SampleKey, _Sample]:
    """The samples of a run; of an augmented one, of the tasks themselves (view 0). Rows that are
    not finite are left out."""
    samples = {}
    for item in iter_items(folder):
        if item.get("view", {}).get("number"):
            continue
        roles = roles_of_tokens(item)
        roles = roles[item["positions"]] if "positions" in item else roles
        means = {}
        for name, states in item["activations"].items():
            finite = np.isfinite(states).all(axis=1)
            for number, role in enumerate(ROLES):
                if (chosen := finite & (roles == number)).any():
                    means[name, role] = states[chosen].mean(axis=0, dtype=np.float32)
        samples[sample_key(item)] = _Sample(item["prompt_length"], item["correct"], means)
    return samples


def contrast(folder: str | Path, other: str | Path | None = None) -> Contrast:
    """The contrast of a run whose answers are known to be right or wrong; of an augmented run, of
    the tasks themselves (view 0).

    other: a run of the same tasks by another model, for instance with an adapter; each sample is
    then paired with itself, and what is compared is `other` minus `folder`. Holds a mean a sample,
    layer and role in memory, float32 [D]. Raises UserError where nothing can be paired, and for
    models of different widths.
    """
    first = second = _samples(folder)
    if other is None:
        failed, solved = (
            {key: sample.length for key, sample in first.items() if sample.correct is known}
            for known in (False, True)
        )
        if not (pairs := pair_up(failed, solved)):
            raise UserError(
                f"{folder} has {len(solved)} solved and {len(failed)} failed samples whose answers "
                "were generated: a contrast needs both"
            )
    else:
        second = _samples(other)
        if not (pairs := [(key, key) for key in first if key in second]):
            raise UserError(f"{folder} and {other} have no sample in common: run the same tasks")
    found = defaultdict(list)
    for one, two in pairs:
        before, after = first[one].means, second[two].means
        for place in sorted(before.keys() & after.keys()):
            if len(before[place]) != len(after[place]):
                raise UserError(
                    f"{place[0]} is {len(before[place])} wide in {folder}, and {len(after[place])} "
                    f"in {other}: compare runs of models of one width"
                )
            found[place].append(after[place] - before[place])
    random = np.random.default_rng(0)
    counts, differences, consistency, chance = {}, {}, {}, {}
    for place in sorted(found):
        each = np.array(found[place])  # [M, D]
        signs = random.choice([-1.0, 1.0], (FLIPS, len(each))).astype(np.float32)
        spread = float(np.sqrt((each**2).sum())) or 1.0
        counts[place], differences[place] = len(each), each.mean(axis=0)
        consistency[place] = float(np.linalg.norm(each.sum(axis=0))) / spread
        drawn = np.linalg.norm(signs @ each, axis=1) / spread
        chance[place] = float(np.quantile(drawn, 0.95))
    lengths = np.array([[first[one].length, second[two].length] for one, two in pairs])
    return Contrast(pairs, lengths, counts, differences, consistency, chance)
