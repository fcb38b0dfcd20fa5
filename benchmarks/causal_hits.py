"""How often the strongest cause of an answer's cell is the cell that it was copied from.

    python benchmarks/causal_hits.py --tasks_per_family 8

Draws tasks that training left out, of the families whose rule says for each cell of the answer from
which cell of the test input it comes, maps their causes with the model that ships, and counts by
family and layer: of the cells of the answer, for how many does log p fall most when the states of
just that cell are changed? Chance is one over the cells that are changed.
"""

import argparse
import json
import sys
from collections import defaultdict
from pathlib import Path
from typing import Any

import numpy as np

sys.path.insert(0, str(Path(__file__).parents[1]))

from benchmarks import bench
from examples.causal_map import Lab, plan_maps, sample_of, shape_for, source_cells
from examples.generate_tasks import draw_rows, family_of
from utils import cli
from utils.plan.request import Request

NUMBER, SEED = 500, 2  # as training holds them out
COPYING = ("recolor", "flip", "rotate", "transpose", "mirror", "tile")


def build_parser() -> cli.Parser:
    parser = bench.build_parser(__doc__)
    shipped = str(bench.ROOT / "examples" / "arc_tiny")
    parser.add_argument("--model_path", default=shipped, help="folder of the model")
    parser.add_argument(
        "--tasks_per_family",
        type=cli.int_at_least(1),
        default=8,
        help="of each of six families, at most",
    )
    parser.add_argument("--layers", nargs="+", default=["all"], metavar="LAYER", help="or `all`")
    parser.add_argument("--op", choices=("zero", "mean"), default="zero", help="the change")
    parser.add_argument(
        "--sources",
        choices=("all", "test"),
        default="test",
        help="the cells that are changed: all of the puzzle, or those of the test input",
    )
    return parser


def origins(row: dict[str, Any]) -> np.ndarray:
    """int [A, 2]: for each cell of the last pair's output, row by row, the cell of its input that
    it is copied from, or recolored from."""
    given = np.array(row["examples"][-1][0])
    numbers = np.arange(given.size).reshape(given.shape)
    if "recolor" not in row["source"].partition("\n")[0]:
        program: dict[str, Any] = {}
        exec(row["source"], program)  # our own: it moves cells and does not ask what they hold
        numbers = program["main"](numbers)
    return np.stack(np.unravel_index(numbers.ravel(), given.shape), axis=1)


def main(args: argparse.Namespace, _: cli.Signals) -> None:
    with bench.scratch(args, tasks_per_family=1, layers=["0"]) as folder:
        measure(args, folder)


def measure(args: argparse.Namespace, folder: Path) -> None:
    families = COPYING[:2] if args.smoke else COPYING
    held_out = list(draw_rows(NUMBER, SEED))
    drawn = {
        name: [row for row in held_out if family_of(row) == name][: args.tasks_per_family]
        for name in families
    }
    rows = {f"{name}-{i}": row for name in families for i, row in enumerate(drawn[name])}
    tasks = {}
    for name, row in rows.items():
        *train, test = ({"input": given, "output": made} for given, made in row["examples"])
        tasks[name] = {"train": train, "test": [test]}
    path = folder / "tasks.json"
    path.write_text(json.dumps(tasks))
    request = Request(args.model_path, str(path), prompt_format="compact")
    plan = plan_maps(request, list(rows), args.layers, "resid_pre")
    samples = {name: sample_of(plan, name, 0) for name in rows}
    lab = Lab(plan, args.op, shape_for(plan, list(samples.values()), args.sources))
    hits, chances = defaultdict(list), defaultdict(list)
    for name, sample in samples.items():
        cells = source_cells(plan.encode(sample), args.sources)
        found = lab.causal_map(sample, cells)
        strongest = found.sources[found.effect.argmin(axis=1)]  # [L, A, 4]
        true = np.concatenate([np.full((len(found.targets), 2), (-1, 0)), origins(rows[name])], 1)
        family = name.partition("-")[0]
        hits[family].append((strongest == true).all(axis=-1))
        chances[family].append(np.full(len(true), 1 / len(cells)))
    print(f"| family | tasks | cells | chance | {' | '.join(map(_layer, found.layers))} |")
    print(f"|---|{'---|' * (3 + len(found.layers))}")
    for family in [*families, "**all**"]:
        chosen = list(families) if family == "**all**" else [family]
        by_cell = np.concatenate([part for name in chosen for part in hits[name]], axis=1)
        chance = np.concatenate([part for name in chosen for part in chances[name]]).mean()
        shares = " | ".join(f"{share:.0%}" for share in by_cell.mean(axis=1))
        tasks_here = sum(len(hits[name]) for name in chosen)
        print(f"| {family} | {tasks_here} | {by_cell.shape[1]} | {chance:.1%} | {shares} |")


def _layer(number: int) -> str:
    return f"layer {number}"


if __name__ == "__main__":
    cli.run(main, build_parser())
