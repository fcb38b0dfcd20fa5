"""What the latents of a sparse autoencoder stand for on ARC grids, named by programs.

    python examples/features.py --activations_dir results/activations --sae sae --output names.json

Every predicate of `examples/predicates.py`, and every two of them together, is tried on every
latent: is the latent active where the predicate holds, and only there? A latent gets the one with
the highest F1 score, the harmonic mean of precision (of the cells where the latent is active, how
many are so) and recall (of the cells that are so, on how many it is active).

Of so many predicates one always fits a little. So the same search is made 19 times with the tasks
shuffled: what is so of a cell is said of one in another task, as many cells further on in the run
for all of them. `chance` is the highest F1 score of all 19. A latent is named where its score is
higher: one that has nothing to do with the cells is named one time in 20.

A predicate of your own is one more line of that file.
"""

# N cells, or rather tokens that hold one   L latents   A predicates   P with those of two
# R rows   C columns of a grid

import argparse
import logging
import math
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np

sys.path.insert(0, str(Path(__file__).parents[1]))

from examples.predicates import PREDICATES, Array, labels, masks_of
from examples.probe import share_of_rows
from utils import cli
from utils.dataset.select import NON_FINITE, first_cells
from utils.dataset.shuffle import ActivationRows
from utils.errors import UserError, some
from utils.shards.items import to_float32
from utils.store.local import check_output, json_lines, write_result

log = logging.getLogger(__name__)

SHUFFLES = 19
LEAST = 20  # cells of a predicate, and cells where a latent is active
BLOCK = 4096  # rows that are encoded at once


@dataclass(frozen=True, eq=False)
class Cells:
    """Tokens that hold cells, and what is so of the first cell of each.

    rows: their activations and where they come from; keys: of the samples that `rows.samples` are
    places in. masks: bool [N, A], of the predicates in the order of PREDICATES.
    """

    rows: ActivationRows
    keys: Sequence[tuple[Any, ...]]
    masks: Array


@dataclass(frozen=True)
class Feature:
    """A latent and the predicate that fits it best; kind: of its first one. Precision, recall and
    f1 are of all cells; base: how common the predicate is among them; chance: the highest f1 of any
    predicate on shuffled tasks. cells: on how many the latent is active."""

    latent: int
    predicate: str
    kind: str
    precision: float
    recall: float
    f1: float
    chance: float
    base: float
    cells: int

    @property
    def named(self) -> bool:
        return self.f1 > self.chance

    def __str__(self) -> str:
        return (
            f"latent {self.latent}: {self.predicate} (precision {self.precision:.0%}, recall "
            f"{self.recall:.0%}, F1 {self.f1:.2f}, on shuffled tasks at most {self.chance:.2f})"
        )


def read_cells(folder: str | Path, name: str, max_rows: int | None = None, seed: int = 0) -> Cells:
    """The tokens of a run that hold cells; max_rows: of more about so many, of whole samples that
    are drawn by `seed`. Rows that are not finite are left out. Raises UserError where the run holds
    no such activation or no cells."""
    from tqdm import tqdm

    from utils.shards import iter_items
    from utils.shards.items import sample_key
    from utils.shards.manifest import read_manifest

    manifest = read_manifest(folder)
    if name not in manifest["activations"]:
        there = some(list(manifest["activations"]), 12) or "none"
        raise UserError(f"{folder} has no {name}; captured were {there}")
    total, parts, masks, keys = manifest["total_samples"], [], [], []
    left_out = 0
    share = share_of_rows(folder, manifest, max_rows) if max_rows else 1.0
    drawn = set(np.random.default_rng(seed).permutation(total)[: math.ceil(share * total)])
    items = tqdm(iter_items(folder), total=total, desc="reading", unit=" samples")
    for number, item in enumerate(items):
        if number not in drawn:
            continue
        tokens = item.get("positions", np.arange(len(item["input_ids"]), dtype=np.int32))
        first = first_cells(item["cells"], len(item["input_ids"]))[tokens]
        finite, holds = np.isfinite(item["activations"][name]).all(axis=1), first >= 0
        left_out += int((holds & ~finite).sum())
        places = np.flatnonzero(holds & finite)
        tokens, cells = tokens[places], item["cells"][first[places], :5]
        samples = np.full(len(places), len(keys), np.int32)
        states = item["activations"][name][places]
        parts.append(ActivationRows(states, samples, tokens, item["input_ids"][tokens], cells))
        masks.append(masks_of(item["cells"])[first[places]])
        keys.append(sample_key(item))
    if left_out:
        log.info("left out %d rows %s", left_out, NON_FINITE)
    if not sum(map(len, parts)):
        raise UserError(
            f"no finite row of {name} in {folder} is of a token that holds a cell: run it with "
            "--token_positions all or cells"
        )
    return Cells(ActivationRows.joined(parts), keys, np.concatenate(masks))


def with_conjunctions(masks: Array) -> tuple[list[str], list[str], Any]:
    """Names, kinds and masks, sparse int32 [N, P], of the predicates that hold of LEAST cells or
    more, and of every two of them that do so together and are not the same as one of them. Raises
    UserError where there are none."""
    from scipy.sparse import csr_array

    known, counts = labels(), masks.sum(axis=0)
    single = [number for number in range(len(known)) if LEAST <= counts[number] < len(masks)]
    names, kinds = [known[i][1] for i in single], [known[i][0] for i in single]
    columns = [masks[:, i] for i in single]
    together = masks.T.astype(np.float32) @ masks.astype(np.float32)  # exact below 2^24 cells
    for i, j in combinations(single, 2):
        if LEAST <= together[i, j] < min(counts[i], counts[j]):
            names.append(f"{known[i][1]} and {known[j][1]}")
            kinds.append(known[i][0])
            columns.append(masks[:, i] & masks[:, j])
    if not columns:
        raise UserError(f"no predicate is true of {LEAST} cells and more: extract more tasks")
    return names, kinds, csr_array(np.stack(columns, axis=1), dtype=np.int32)


def encoded(encode: Callable[[Array], Any], states: Array) -> Any:
    """Latents of rows [N, D], float32 [N, L], sparse; `encode` is given BLOCK rows at a time."""
    from scipy.sparse import csr_array, vstack

    parts = (states[i : i + BLOCK] for i in range(0, len(states), BLOCK))
    return vstack([csr_array(np.asarray(encode(to_float32(part)))) for part in parts], "csr")


def shuffled(samples: Array, random: np.random.Generator) -> Array:
    """int [N]: for each row, the row of another sample whose predicates it is said to have.

    samples: int [N], ascending. All rows are moved on by one draw, from the last to the first, and
    by so many that none stays in its sample. So the cells of a grid stay together, and what is true
    of the run as it is would be as likely in any other place. Raises UserError where there is no
    room for that.
    """
    longest = np.bincount(samples).max()
    if len(samples) < 2 * longest + SHUFFLES:
        raise UserError("the cells are of too few samples to be shuffled: extract more tasks")
    return np.roll(np.arange(len(samples)), random.integers(longest, len(samples) - longest))


def best_fits(active: Any, masks: Any) -> tuple[Array, Array, Array]:
    """Of each latent the predicate with the highest F1, int [L], that F1, and on how many cells
    the two meet, [L]. active: int32 [N, L]; masks: int32 [N, P]; both sparse, 1 or nothing."""
    common = (active.T @ masks).toarray()
    f1 = 2 * common / np.add.outer(active.sum(axis=0), masks.sum(axis=0))
    best = f1.argmax(axis=1)
    each = np.arange(len(best))
    return best, f1[each, best], common[each, best]


def name_latents(
    active: Any, cells: Cells, seed: int = 0, shuffles: int = SHUFFLES
) -> list[Feature]:
    """The best predicate of every latent that is active on LEAST cells or more.

    active: sparse [N, L], not zero where a latent is active. Raises UserError for cells of too few
    samples.
    """
    from tqdm import tqdm

    names, kinds, masks = with_conjunctions(cells.masks)
    fires = (active != 0).sum(axis=0)
    tried = np.flatnonzero(fires >= LEAST)
    active = (active[:, tried] != 0).astype(np.int32)
    best, f1, common = best_fits(active, masks)
    chance, random = np.zeros(len(tried)), np.random.default_rng(seed)
    said = f"{len(names)} predicates, tasks shuffled"
    for _ in tqdm(range(shuffles), desc=said, unit=" times"):
        order = shuffled(cells.rows.samples, random)
        chance = np.maximum(chance, best_fits(active, masks[order])[1])
    counts = masks.sum(axis=0)
    return [
        Feature(
            latent=int(latent),
            predicate=names[best[i]],
            kind=kinds[best[i]],
            precision=float(common[i] / fires[latent]),
            recall=float(common[i] / counts[best[i]]),
            f1=float(f1[i]),
            chance=float(chance[i]),
            base=float(counts[best[i]] / masks.shape[0]),
            cells=int(fires[latent]),
        )
        for i, latent in enumerate(tried)
    ]


def chosen(features: Sequence[Feature], most: int = 8) -> list[Feature]:
    """For a page: the named ones of the highest F1, each predicate once, kinds in turn."""
    queues: dict[str, dict[str, Feature]] = {kind: {} for kind in PREDICATES}
    for feature in sorted(features, key=lambda f: (-f.f1, f.latent)):
        if feature.named:
            queues[feature.kind].setdefault(feature.predicate, feature)
    waiting = [list(queue.values()) for queue in queues.values()]
    found: list[Feature] = []
    while len(found) < most and any(waiting):
        found += [queue.pop(0) for queue in waiting if queue]
    return found[:most]


def build_parser() -> cli.Parser:
    parser = cli.Parser(__doc__)
    parser.add_argument(
        "--activations_dir", required=True, help="of a run: a folder or gs://BUCKET/PREFIX"
    )
    parser.add_argument("--sae", required=True, help="folder of an autoencoder")
    parser.add_argument(
        "--hook_point",
        help="the activation that it is of, such as resid_post.11 (default: what its folder says)",
    )
    cli.add_output(parser)
    parser.add_argument(
        "--max_rows",
        type=cli.int_at_least(1),
        default=50_000,
        help="about so many tokens are taken, of whole samples that are drawn",
    )
    parser.add_argument("--seed", type=cli.int_at_least(0), default=0, help="of draws and shuffles")
    return parser


def main(args: argparse.Namespace, _: cli.Signals) -> None:
    from utils.model.autoencoder import load_autoencoder
    from utils.shards.manifest import read_manifest

    check_output(args.output, args.overwrite)
    sae = load_autoencoder(args.sae)
    name = args.hook_point or sae.hook
    if name is None:
        raise UserError(f"{args.sae} does not say what it is of: give --hook_point resid_post.11")
    if sae.hook not in (None, name):
        raise UserError(f"{args.sae} is of {sae.hook}, not of {name}")
    there = read_manifest(args.activations_dir)["activations"]
    if name in there and there[name]["width"] != sae.width:
        width = there[name]["width"]
        raise UserError(f"{args.sae} is for an input {sae.width} wide, and {name} is {width}")
    cells = read_cells(args.activations_dir, name, args.max_rows, args.seed)
    features = name_latents(encoded(sae.encode, cells.rows.activations), cells, args.seed)
    named = sum(feature.named for feature in features)
    found = {
        "activation": name,
        "rows": len(cells.rows),
        "predicates": len(labels()),
        "latents": [{**asdict(feature), "named": feature.named} for feature in features],
        "named": named,
        "named_by_chance": len(features) / (SHUFFLES + 1),
    }
    write_result(args.output, json_lines(found))
    for feature in chosen(features, 20):
        print(f"  {feature}")
    print(
        f"{named} of {len(features)} latents that are active on {LEAST} cells or more are named; "
        f"of latents that have nothing to do with cells {len(features) / (SHUFFLES + 1):.0f} would "
        f"be\n{args.output}"
    )


if __name__ == "__main__":
    cli.run(main, build_parser())
