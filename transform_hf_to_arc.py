"""Turn a dataset of example pairs into ARC tasks and their ground truth.

    python transform_hf_to_arc.py --dataset rows.jsonl --output_dir ./arc_data --max_samples 10

Writes arc_format_<split>.json, test_outputs_<split>.json and transformation_errors.json.
"""

import argparse
import re
import shlex
import time
from collections import Counter
from dataclasses import dataclass, field
from itertools import accumulate, islice
from pathlib import Path

from utils.arc import rows
from utils.arc import tasks as arc
from utils.cli import Parser, Signals, int_at_least, run
from utils.errors import UserError
from utils.store.local import JsonFile, remove_partial
from utils.store.locks import locked


def build_parser() -> Parser:
    parser = Parser(__doc__.split("\n")[0])
    rows.add_flags(parser)
    add = parser.add_argument
    add("--output_dir", type=Path, default=Path("arc_data"), help="folder for the three files")
    add(
        "--max_samples",
        type=int_at_least(1),
        help="read at most this many rows (default: every row)",
    )
    add(
        "--max_train_pairs",
        type=int_at_least(1),
        help="keep the first so many train pairs of a task (default: all); which pairs are test"
        " pairs does not change",
    )
    add("--overwrite", action="store_true", help="replace the files of an earlier transformation")
    return parser


def split_name(split: str) -> str:
    """A split as part of a file name: train[:100] -> train_0-100, train[5%:] -> train_5pct-end."""
    name = split.replace("[:", "[0:").replace(":]", ":end]").replace("%", "pct").replace("]", "")
    return re.sub(r"[^\w.-]", "_", name.replace(":", "-"))


class Spread(Counter):
    """Smallest, middle and largest of many small integers, kept as a histogram."""

    def __str__(self) -> str:
        values = sorted(self)
        below = accumulate(self[value] for value in values)
        middle = next(v for v, n in zip(values, below, strict=True) if 2 * n >= self.total())
        return f"{values[0]} / {middle} / {values[-1]}"


@dataclass
class Summary:
    seconds: float = 0.0  # of reading and writing; importing and opening are left out
    rows: int = 0
    tasks: int = 0
    duplicates: int = 0
    invalid_rows: int = 0
    with_truth: int = 0
    reasons: Counter = field(default_factory=Counter)
    pairs: Spread = field(default_factory=Spread)
    heights: Spread = field(default_factory=Spread)
    widths: Spread = field(default_factory=Spread)

    def count(self, task: arc.Task, has_truth: bool) -> None:
        self.tasks += 1
        self.with_truth += has_truth
        self.pairs[len(task.train) + len(task.test)] += 1
        for pair in (*task.train, *task.test):
            for grid in filter(None, (pair.input, pair.output)):
                self.heights[len(grid)] += 1
                self.widths[len(grid[0])] += 1

    def show(self, tasks: Path, solutions: Path, errors: Path) -> None:
        print(f"rows read        {self.rows}, {self.rows / max(self.seconds, 1e-9):.0f} rows/s")
        print(f"tasks written    {self.tasks} to {tasks}")
        print(f"ground truth     {self.with_truth} to {solutions}")
        print(f"duplicates       {self.duplicates}")
        print(f"invalid rows     {self.invalid_rows}; what was wrong is in {errors}")
        for reason, count in self.reasons.most_common():
            print(f"  {count:7d} x {reason}")
        print(f"pairs per task   {self.pairs} (min / median / max)")
        print(f"grid height      {self.heights}")
        print(f"grid width       {self.widths}")


def main(args: argparse.Namespace, signals: Signals) -> int:
    paths = [
        args.output_dir / f"arc_format_{split_name(args.split)}.json",
        args.output_dir / f"test_outputs_{split_name(args.split)}.json",
        args.output_dir / "transformation_errors.json",
    ]
    with locked(args.output_dir):
        for path in paths:
            remove_partial(path)
        *own, errors = paths
        taken = [path for path in own if path.exists()]
        # Splits share a list of errors: it is kept with the tasks that it is about, if not empty.
        if any(args.output_dir.glob("arc_format_*.json")) and errors.exists():
            taken += [errors] if errors.stat().st_size > len("[\n]\n") else []
        if taken and not args.overwrite:
            raise UserError(
                f"{taken[0]} exists: add --overwrite to replace it, or choose another --output_dir"
            )
        source = rows.open_rows(args.dataset, args.split, args.column, args.streaming)
        summary = transform(source, args, signals, *paths)
    summary.show(*paths)
    print(
        f"next: python simple_extraction_inference.py --model_path YOUR_MODEL_PATH"
        f" --dataset_path {shlex.quote(str(paths[0]))} --output_path results/predictions.json"
        f" --activations_dir results/activations"
    )
    return 0


def transform(
    source: rows.Source,
    args: argparse.Namespace,
    signals: Signals,
    tasks_path: Path,
    solutions_path: Path,
    errors_path: Path,
) -> Summary:
    """Writes the three files, each whole. Raises UserError where no row gives a task: the file of
    errors is then the only one."""
    from tqdm import tqdm

    summary, seen = Summary(), set()
    signals.hold()  # what is not finished is cleared away
    with (
        JsonFile(tasks_path) as tasks,
        JsonFile(solutions_path) as solutions,
        JsonFile(errors_path, b"[]") as errors,
    ):
        wanted = islice(source.rows, args.max_samples)
        started = time.monotonic()
        for i, row in enumerate(tqdm(wanted, unit=" rows", total=args.max_samples)):
            signals.check()
            task, problems = rows.to_task(row, source.column, args.max_train_pairs)
            for pair, reason in problems:
                errors.write(rows.error_item(i, pair, reason))
                summary.reasons[reason] += 1
            summary.rows += 1
            if task is None:
                summary.invalid_rows += 1
            elif (digest := bytes.fromhex(task.task_id)) in seen:
                summary.duplicates += 1
            else:
                seen.add(digest)
                tasks.write(arc.task_item(task))
                solution = arc.solution_item(task)
                if solution is not None:
                    solutions.write(solution)
                summary.count(task, solution is not None)
        whole = [solutions, errors, tasks] if seen else [errors]
        for file in whole:
            file.finish()
        for file in whole:
            file.commit()
        summary.seconds = time.monotonic() - started
    if not seen:
        common = ", ".join(f"{reason} ({n})" for reason, n in summary.reasons.most_common(3))
        message = f"none of {summary.rows} rows gives a task: {common}; see {errors_path}"
        raise UserError(message, exit_code=1)
    return summary


if __name__ == "__main__":
    run(main, build_parser())
