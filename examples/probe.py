"""Linear probes: how well each layer's states tell what a cell is, on tasks that were held out.

    python examples/probe.py --activations_dir results/activations --target color --output p.json

For every activation of a run, a ridge classifier is fitted in closed form (Hoerl and Kennard 1970):
least squares on one column a class, the inputs brought to mean 0 and deviation 1. All that a fit
needs of the training rows are sums, which one pass over the shards collects in float64 for all
activations at once. The penalty is the one with the lowest generalized cross-validation error
(Golub, Heath and Wahba 1979), which follows from the same sums.

A row is the state of one token that holds a cell, and the score is the share of rows, of a fifth of
the tasks that nothing was fitted to, whose class is right. `chance` is the mean score of the same
probe on shuffled labels, fitted and scored in the same way, 19 times: within each sample the cells
exchange their labels, so that a probe that only knows the task and not the cell scores no less.
`highest_chance` is the highest of the 19: labels that have nothing to do with the states score
higher than that one time in 20.

    color     the cell's color
    row, col  its row or column, counted from 0
    role      train input, train output, test input or answer
    boundary  whether it lies on the edge of its grid
    correct   whether the sample is solved: of the last token of each prompt alone, and the labels
              are exchanged between samples
"""

# R rows   D width   K classes   L sets of labels: the true ones first, then those shuffled

import argparse
import sys
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any

import numpy as np

sys.path.insert(0, str(Path(__file__).parents[1]))

from utils import cli
from utils.errors import UserError, some
from utils.store.local import check_output, json_lines, write_result

HELD_OUT = 5  # one task in so many
SHUFFLES = 19
PENALTIES = np.logspace(-6, 2, 25)  # of inputs of deviation 1, a row
BLOCK_ROWS = 1024  # added at once: for the few of an item, threads of BLAS cost more than they give


@dataclass(frozen=True)
class Target:
    """What a probe is to tell. classes: how many there are. label: cells int [N, 7] of one item,
    and int [N, 2], the last row and column of each one's grid -> int [N]; None where the target is
    one of the whole sample."""

    classes: int
    label: Callable[[np.ndarray, np.ndarray], np.ndarray] | None


def _role(cells: np.ndarray, _: np.ndarray) -> np.ndarray:
    from utils.dataset.contrast import roles_of_cells

    return roles_of_cells(cells)


TARGETS = {
    "color": Target(10, lambda cells, _: cells[:, 4]),
    "row": Target(30, lambda cells, _: cells[:, 2]),
    "col": Target(30, lambda cells, _: cells[:, 3]),
    "role": Target(4, _role),
    "boundary": Target(
        2, lambda cells, ends: ((cells[:, 2:4] == 0) | (cells[:, 2:4] == ends)).any(axis=1)
    ),
    "correct": Target(2, None),
}


def ends_of_grids(cells: np.ndarray) -> np.ndarray:
    """int [N, 2]: the last row and column of the grid of each cell of an item, [N, 7]."""
    grids, which = np.unique(cells[:, :2], axis=0, return_inverse=True)
    ends = np.zeros((len(grids), 2), np.int32)
    np.maximum.at(ends, which.reshape(-1), cells[:, 2:4])
    return ends[which.reshape(-1)]


def labelled_rows(item: dict[str, Any], target: str) -> tuple[np.ndarray, np.ndarray]:
    """Places among an item's stored rows and the class of each, both int [R].

    A token that holds several cells has the class of the first of them. For `correct` there is at
    most one row, and none of a sample whose answer is not known to be right or wrong, nor of the
    views of an augmented run beside the task itself.
    """
    from utils.dataset.select import first_cells

    tokens = item.get("positions", np.arange(len(item["input_ids"])))
    label = TARGETS[target].label
    if label is None:
        known = item["correct"] is not None and not item.get("view", {}).get("number")
        rows = np.flatnonzero(tokens == item["prompt_length"] - 1) if known else np.zeros(0, int)
        return rows, np.full(len(rows), int(bool(item["correct"])))
    cells = item["cells"]
    first = first_cells(cells, len(item["input_ids"]))[tokens]
    rows = np.flatnonzero(first >= 0)
    return rows, label(cells, ends_of_grids(cells)).astype(int)[first[rows]]


def held_out_tasks(task_ids: Iterable[str], one_in: int = HELD_OUT) -> set[str]:
    """A share of the tasks, at least one, by their ids alone. Raises UserError for one task."""
    tasks = sorted(set(task_ids), key=lambda task: sha256(task.encode()).digest())
    if len(tasks) < 2:
        raise UserError("the rows are of one task, and one has to be held out: extract more tasks")
    return set(tasks[: max(1, len(tasks) // one_in)])


class Sums:
    """What a ridge fit needs of the training rows of one activation, in float64."""

    def __init__(self, width: int, columns: int):
        self.rows = 0
        self.x, self.y = np.zeros(width), np.zeros(columns)
        self.xx, self.xy = np.zeros((width, width)), np.zeros((width, columns))

    def add(self, x: np.ndarray, y: Any) -> None:
        """x: [R, D]; y: sparse float64 [R, L K], one column a class and set of labels."""
        x = x.astype(np.float64)
        self.rows += len(x)
        self.x += x.sum(axis=0)
        self.y += y.sum(axis=0)
        self.xx += x.T @ x
        self.xy += (y.T @ x).T

    def fit(self, sets: int) -> tuple[np.ndarray, np.ndarray]:
        """Weights float64 [D, L K] and constants [L K] by which the scores of the classes are
        x @ weights + constants; each of the L sets of labels has the penalty that suits it."""
        n, mean, shares = self.rows, self.x / self.rows, self.y / self.rows
        covariance = self.xx / n - np.outer(mean, mean)
        deviation = np.sqrt(np.maximum(np.diag(covariance), 0))
        # A component that is the same in all rows says nothing; what is left of it is rounding.
        alive = deviation > 1e-6 * np.abs(mean)
        scale = np.where(alive, deviation, np.inf)
        values, vectors = np.linalg.eigh(covariance / np.outer(scale, scale))
        values = np.maximum(values, 0)[:, None]
        along = vectors.T @ ((self.xy / n - np.outer(mean, shares)) / scale[:, None])  # [D, L K]
        spread = (shares * (1 - shares)).reshape(sets, -1).sum(axis=1)  # of columns of 0 and 1
        best, lowest = np.zeros_like(along), np.full(sets, np.inf)
        for penalty in PENALTIES:
            shrunk = 1 / (values + penalty)
            explained = along**2 * (values + 2 * penalty) * shrunk**2
            left = spread - explained.sum(axis=0).reshape(sets, -1).sum(axis=1)
            free = 1 - (1 + float((values * shrunk).sum())) / n
            if free <= 0:  # as many parameters as rows
                continue
            error = left / free**2
            better = np.repeat(error < lowest, along.shape[1] // sets)
            best = np.where(better, along * shrunk, best)
            lowest = np.minimum(lowest, error)
        weights = vectors @ best / scale[:, None]
        return weights, shares - mean @ weights


def shuffled_labels(
    labels: np.ndarray, target: str, seen: list[int], random: np.random.Generator
) -> np.ndarray:
    """int [R, L]: the labels of an item's rows, then SHUFFLES times in another order. The one label
    that `correct` has of an item is exchanged for one drawn from `seen`, those of its part of the
    run so far, which it is added to."""
    if target == "correct":
        seen += labels.tolist()
        drawn = random.choice(seen, (len(labels), SHUFFLES)) if seen else np.zeros((0, SHUFFLES))
    else:
        drawn = random.permuted(np.repeat(labels[:, None], SHUFFLES, axis=1), axis=0)
    return np.concatenate([labels[:, None], drawn], axis=1).astype(int)


def one_hot(sets: np.ndarray, classes: int) -> Any:
    """Labels int [R, L] -> sparse float64 [R, L K], a one in each row for each set of labels."""
    from scipy.sparse import csr_array

    R, L = sets.shape
    columns = (sets + classes * np.arange(L)).reshape(-1)
    starts = np.arange(0, R * L + 1, L)
    return csr_array((np.ones(R * L), columns, starts), shape=(R, L * classes))


def names_of(manifest: dict[str, Any], layers: Sequence[int] | None) -> list[str]:
    """The activations of a run, of these layers or all. Raises UserError where there are none."""
    there = manifest["activations"]
    if missing := sorted(set(layers or ()) - {about["layer"] for about in there.values()}):
        raise UserError(f"no layer {missing[0]} was captured; there are {some(list(there), 12)}")
    names = [name for name, about in there.items() if not layers or about["layer"] in layers]
    if not names:
        raise UserError("the run holds no activations: was it a run with --no_extraction?")
    return names


def share_of_rows(folder: str | Path, manifest: dict[str, Any], max_rows: int) -> float:
    """The share that `max_rows` are of the rows of an activation in a run, at most 1. Where not
    every token has a row, the run is read once to count them."""
    from tqdm import tqdm

    from utils.shards import iter_items

    capture, rows = manifest["capture"], manifest["total_tokens"]
    of_all = (capture["token_positions"], capture.get("max_rows_per_sample")) == ("all", None)
    if rows > max_rows and not of_all:
        items = tqdm(iter_items(folder), "counting", manifest["total_samples"], unit=" samples")
        rows = sum(len(item.get("positions", item["input_ids"])) for item in items)
    return min(1.0, max_rows / max(1, rows))


def probe(
    folder: str | Path,
    target: str,
    layers: Sequence[int] | None = None,
    max_rows: int = 100_000,
    seed: int = 0,
) -> dict[str, dict[str, float]]:
    """Activation -> `score`, `chance` and `highest_chance`, shares of the held-out rows; `rows`,
    how many were fitted to; and `held_out_rows`, how many were scored.

    folder: of a run, on a disk or at `gs://bucket/prefix`. max_rows: of more tokens about so many
    are drawn by `seed`; those of held-out tasks are kept in memory until the end. Rows that are not
    finite are left out. Raises UserError: no such layer, one task alone, rows of one class alone.
    """
    from tqdm import tqdm

    from utils.shards import iter_items
    from utils.shards.manifest import read_manifest

    manifest = read_manifest(folder)
    names = names_of(manifest, layers)
    held_out = held_out_tasks(key[0] for entry in manifest["files"] for key in entry["samples"])
    random, classes = np.random.default_rng(seed), TARGETS[target].classes
    share = share_of_rows(folder, manifest, max_rows) if target != "correct" else 1.0
    widths = {name: manifest["activations"][name]["width"] for name in names}
    sums = {name: Sums(width, classes * (SHUFFLES + 1)) for name, width in widths.items()}
    kept: dict[str, list[np.ndarray]] = {name: [] for name in names}
    kept_labels, seen = [], {True: [], False: []}
    waiting: list[tuple[dict[str, np.ndarray], np.ndarray]] = []  # states and labels of items

    def add_waiting() -> None:
        if waiting:
            ones = one_hot(np.concatenate([sets for _, sets in waiting]), classes)
            for name in names:
                sums[name].add(np.concatenate([states[name] for states, _ in waiting]), ones)
            waiting.clear()

    total = manifest["total_samples"]
    for item in tqdm(iter_items(folder), total=total, desc="probing", unit=" samples"):
        rows, labels = labelled_rows(item, target)
        is_held_out = item["task_id"] in held_out
        sets = shuffled_labels(labels, target, seen[is_held_out], random)
        states = item["activations"]
        wanted = random.random(len(rows)) < share
        for name in names:
            wanted &= np.isfinite(states[name][rows]).all(axis=1)
        rows, sets = rows[wanted], sets[wanted]
        states = {name: states[name][rows] for name in names}
        if is_held_out:
            kept_labels.append(sets)
            for name in names:
                kept[name].append(states[name])
            continue
        waiting.append((states, sets))
        if sum(len(sets) for _, sets in waiting) >= BLOCK_ROWS:
            add_waiting()
    add_waiting()
    truth = np.concatenate(kept_labels) if kept_labels else np.zeros((0, SHUFFLES + 1), int)
    _check(sums[names[0]].y[:classes], truth[:, 0], target)
    if TARGETS[target].label is None:  # all of them are here, and can change places
        truth[:, 1:] = random.permuted(np.repeat(truth[:, :1], SHUFFLES, axis=1), axis=0)
    found = {}
    for name in names:
        weights, constants = sums[name].fit(SHUFFLES + 1)
        told = []
        for x in kept.pop(name):
            scores = x.astype(np.float64) @ weights + constants
            told.append(scores.reshape(len(x), SHUFFLES + 1, classes).argmax(axis=2))
        right = (np.concatenate(told) == truth).mean(axis=0)
        found[name] = {
            "score": float(right[0]),
            "chance": float(right[1:].mean()),
            "highest_chance": float(right[1:].max()),
            "rows": sums[name].rows,
            "held_out_rows": len(truth),
        }
    return found


def _check(fitted: np.ndarray, held_out: np.ndarray, target: str) -> None:
    """fitted: rows of each class, [K]; held_out: labels, [R]."""
    if (fitted > 0).sum() >= 2 and len(held_out):
        return
    if target == "correct":
        raise UserError(
            "a probe of `correct` needs solved and failed samples, with the states of the last "
            "token of their prompts, in the tasks that are fitted to and in those held out: "
            "extract more tasks, without --teacher_forcing, with --token_positions all or last"
        )
    raise UserError(
        f"no two classes of {target} are among the stored tokens that hold cells: extract more "
        "tasks, with --token_positions all or cells"
    )


def build_parser() -> cli.Parser:
    parser = cli.Parser(__doc__)
    parser.add_argument(
        "--activations_dir", required=True, help="of a run: a folder or gs://BUCKET/PREFIX"
    )
    parser.add_argument("--target", required=True, choices=TARGETS, help="what is to be told")
    parser.add_argument(
        "--layers", type=cli.int_at_least(0), nargs="+", help="from 0 (default: all stored)"
    )
    cli.add_output(parser)
    parser.add_argument(
        "--max_rows",
        type=cli.int_at_least(1),
        default=100_000,
        help="about so many tokens are drawn; a fifth of them is held in memory, in all layers",
    )
    parser.add_argument("--seed", type=cli.int_at_least(0), default=0, help="of draws and shuffles")
    return parser


def main(args: argparse.Namespace, _: cli.Signals) -> None:
    check_output(args.output, args.overwrite)
    found = probe(args.activations_dir, args.target, args.layers, args.max_rows, args.seed)
    write_result(args.output, json_lines(found))
    print(f"{args.target}:  score  chance  highest of {SHUFFLES} shuffles  rows")
    for name, line in found.items():
        score, chance, highest = (line[k] for k in ("score", "chance", "highest_chance"))
        print(f"  {name:14} {score:6.1%}  {chance:6.1%}  {highest:6.1%}  {line['rows']}")
    print(args.output)


if __name__ == "__main__":
    cli.run(main, build_parser())
