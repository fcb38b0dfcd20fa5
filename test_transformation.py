"""Show what a dataset of example pairs holds before it is transformed.

    python test_transformation.py --dataset rows.jsonl --num_rows 5

A script, not a test module: the tests are in tests/.
"""

import argparse
import os
import shlex
import shutil
import sys
from itertools import islice, zip_longest

from utils.arc.rows import DEFAULT_DATASET, add_flags, open_rows, to_task
from utils.cli import Parser, Signals, int_at_least, run
from utils.prompt.encodings import PALETTE


def build_parser() -> Parser:
    parser = Parser(__doc__.split("\n")[0])
    add_flags(parser, DEFAULT_DATASET)
    parser.add_argument(
        "--num_rows", type=int_at_least(1), default=5, help="rows to look at, from the first on"
    )
    return parser


def picture(grid: list[list[int]], cell_width: int, colored: bool) -> list[str]:
    """The lines of a grid: digits on their colors, or bare digits."""
    if not colored:
        return ["".join(map(str, row)) for row in grid]
    return ["".join(painted(color, cell_width) for color in row) + "\x1b[0m" for row in grid]


def painted(color: int, width: int) -> str:
    red, green, blue = PALETTE[3 * color : 3 * color + 3]
    ink = 30 if red * 0.3 + green * 0.6 + blue * 0.1 > 110 else 97
    return f"\x1b[{ink};48;2;{red};{green};{blue}m{color:>{width}}"


def show_pair(title: str, grids: list[list[list[int]]], colored: bool) -> None:
    """Print the grids of a pair side by side; two characters a cell where the terminal has room."""
    room = shutil.get_terminal_size().columns
    cell_width = 2 if colored and 2 * sum(len(grid[0]) for grid in grids) + 6 <= room else 1
    print(f"\n{title}: " + " -> ".join(f"{len(grid)} x {len(grid[0])}" for grid in grids))
    lines = [picture(grid, cell_width, colored) for grid in grids]
    blank = " " * (cell_width * len(grids[0][0]))
    for left, right in zip_longest(lines[0], lines[1] if len(lines) > 1 else []):
        print(f"  {left or blank}    {right or ''}".rstrip())


def main(args: argparse.Namespace, signals: Signals) -> int:
    source = open_rows(args.dataset, args.split, args.column, args.streaming)
    print(f"{args.dataset}, split {args.split}\n\ncolumns")
    for name, kind in source.columns.items():
        print(f"  {name:16} {kind}")
    where = source.column or "train and test"
    tasks, wrong = [], []
    print(f"\nrows (pairs from {where})")
    for i, row in enumerate(islice(source.rows, args.num_rows)):
        task, problems = to_task(row, source.column)
        wrong += [(i, pair, reason) for pair, reason in problems]
        if task is None:
            print(f"  row {i}: no task in it")
            continue
        tasks.append(task)
        pairs = (*task.train, *task.test)
        sizes = [(len(g), len(g[0])) for p in pairs for g in (p.input, p.output) if g]
        heights, widths = zip(*sizes, strict=True)
        print(
            f"  row {i}: {len(pairs)} valid pairs, height {min(heights)} to {max(heights)}, width"
            f" {min(widths)} to {max(widths)}, task {task.task_id}"
        )
    colored = sys.stdout.isatty() and not os.environ.get("NO_COLOR")
    for side in ("train", "test") if tasks else ():
        for i, pair in enumerate(getattr(tasks[0], side)):
            show_pair(f"{side} pair {i}", [g for g in (pair.input, pair.output) if g], colored)
    print("\nwrong" if wrong else "\nnothing is wrong with these rows")
    for i, pair, reason in wrong:
        print(f"  row {i}" + (f", pair {pair}" if pair is not None else "") + f": {reason}")
    if not tasks:
        return 1
    flags = ["--dataset", args.dataset, "--output_dir", "./arc_data", "--split", args.split]
    flags += ["--max_samples", "10"] + (["--column", args.column] if args.column else [])
    flags += ["--streaming"] if args.streaming else []
    print(f"\nnext: python transform_hf_to_arc.py {shlex.join(flags)}")
    return 0


if __name__ == "__main__":
    run(main, build_parser())
