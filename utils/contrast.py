"""Contrast sets: what differs inside the model between tasks that it solves and tasks it fails.

Each failed sample is paired with a solved one of like prompt length, and the mean activations of
the two are compared, layer by layer and role by role.
"""

# S samples   D model width   M pairs

from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from utils.errors import UserError
from utils.items import sample_key
from utils.shards import iter_items

ROLES = ("train input", "train output", "test input", "answer", "other")


@dataclass(frozen=True)
class Contrast:
    """pairs: (failed, solved) sample keys. differences: (activation name, role) -> float32 [D],
    mean over the pairs of solved minus failed.

    consistency: (name, role) -> norm of the summed differences over the root of their summed
    squared norms. Differences that point anywhere give about 1, M that all agree give sqrt(M).
    """

    pairs: list[tuple[tuple[Any, ...], tuple[Any, ...]]]
    differences: dict[tuple[str, str], np.ndarray]
    consistency: dict[tuple[str, str], float]


def roles_of_tokens(item: dict[str, Any]) -> np.ndarray:
    """int [T]: place in ROLES of each token; a token of several roles has the first."""
    roles = np.full(len(item["input_ids"]), ROLES.index("other"))
    for pair, role, _, _, _, start, stop in item["cells"][::-1]:
        roles[start:stop] = role if pair >= 0 else 2 + role
    return roles


def pair_up(failed: dict[Any, int], solved: dict[Any, int]) -> list[tuple[Any, Any]]:
    """Key -> prompt length, of both; each failed sample with the solved one nearest in length that
    is still free, shortest first; without pairs where one side has run out."""
    free = sorted(solved, key=lambda key: (solved[key], key))
    lengths = [solved[key] for key in free]
    pairs = []
    for key in sorted(failed, key=lambda key: (failed[key], key)):
        if not free:
            break
        i = int(np.searchsorted(lengths, failed[key]))
        near = [j for j in (i - 1, i) if 0 <= j < len(free)]
        best = min(near, key=lambda j: abs(lengths[j] - failed[key]))
        pairs.append((key, free.pop(best)))
        lengths.pop(best)
    return pairs


def contrast(folder: str | Path) -> Contrast:
    """The contrast of a run whose answers are known to be right or wrong.

    Holds a mean a sample, layer and role in memory, float32 [D]. Raises UserError where there are
    no solved or no failed samples.
    """
    lengths: dict[bool, dict[Any, int]] = {True: {}, False: {}}
    means: dict[Any, dict[tuple[str, str], np.ndarray]] = {}
    for item in iter_items(folder):
        if item["correct"] is None:
            continue
        key = sample_key(item)
        lengths[item["correct"]][key] = item["prompt_length"]
        roles = roles_of_tokens(item)
        roles = roles[item["positions"]] if "positions" in item else roles
        means[key] = {
            (name, role): states[roles == number].astype(np.float32).mean(axis=0)
            for name, states in item["activations"].items()
            for number, role in enumerate(ROLES)
            if (roles == number).any()
        }
    pairs = pair_up(lengths[False], lengths[True])
    if not pairs:
        raise UserError(
            f"{folder} has {len(lengths[True])} solved and {len(lengths[False])} failed samples: a "
            "contrast needs both"
        )
    found = defaultdict(list)
    for failed, solved in pairs:
        for place in means[failed].keys() & means[solved].keys():
            found[place].append(means[solved][place] - means[failed][place])
    differences, consistency = {}, {}
    for place in sorted(found):
        each = np.array(found[place])  # [M, D]
        differences[place] = each.mean(axis=0)
        spread = np.sqrt((each**2).sum())
        consistency[place] = float(np.linalg.norm(each.sum(axis=0)) / spread) if spread else 0.0
    return Contrast(pairs, differences, consistency)
