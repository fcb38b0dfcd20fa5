"""How many held-out tasks the model that ships solves, by family, with and without views.

    python benchmarks/arc_tiny_accuracy.py --augmentations 8

Draws tasks that training left out, runs simple_extraction_inference.py on them as a user would, and
counts exact matches of the whole output grid: with one greedy attempt, and with two attempts, drawn
(the second at temperature 0.7) or, with --augmentations, voted over so many views of each task.
"""

import argparse
import json
import subprocess
import sys
from collections import defaultdict
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

from benchmarks import bench
from examples.generate_tasks import FAMILIES, draw_rows, family_of
from utils import cli
from utils.errors import UserError

NUMBER, SEED = 500, 2  # as training holds them out


def build_parser() -> cli.Parser:
    parser = bench.build_parser(__doc__)
    parser.add_argument(
        "--model_path",
        default=str(bench.ROOT / "examples" / "arc_tiny") if bench.NEEDED else None,
        help="folder of the model",
    )
    parser.add_argument(
        "--num_tasks", type=cli.int_at_least(1), default=NUMBER, help="of the held-out tasks"
    )
    parser.add_argument(
        "--augmentations", type=cli.int_at_least(1), default=1, help="views a task; 1: none"
    )
    return parser


def solved(folder: Path, rows: list[dict], model: str, name: str, *flags: str) -> dict[str, list]:
    """Family -> whether each of its tasks is solved within the run's attempts."""
    from utils.arc.rows import to_task

    output = folder / name / "predictions.json"
    command = [sys.executable, bench.ROOT / "simple_extraction_inference.py", "--model_path", model]
    command += ["--dataset_path", folder / "arc_data" / "arc_format_train.json"]
    command += ["--output_path", output, "--no_extraction", "--prompt_format", "compact"]
    command += ["--max_output_tokens", "64", "--batch_size", str(min(50, len(rows))), *flags]
    run(command)
    predictions = json.loads(output.read_text())
    found = defaultdict(list)
    for row in rows:
        task, _ = to_task(row, "examples")
        (answer,) = predictions[task.task_id]
        found[family_of(row)].append(bool(answer["correct"]))
    return found


def run(command: list) -> None:
    if subprocess.run(list(map(str, command)), stdout=subprocess.DEVNULL).returncode:
        raise UserError(f"{Path(command[1]).name} failed, see above", exit_code=1)


def main(args: argparse.Namespace, _: cli.Signals) -> None:
    with bench.scratch(args, num_tasks=4, augmentations=2) as folder:
        measure(args, folder)


def measure(args: argparse.Namespace, folder: Path) -> None:
    if not Path(args.model_path).is_dir():
        raise UserError(f"{args.model_path} is not a folder: give that of the model")
    if args.num_tasks > NUMBER:
        raise UserError(f"{NUMBER} tasks are held out, not {args.num_tasks}")
    rows = list(draw_rows(args.num_tasks, SEED))
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    transform = [sys.executable, bench.ROOT / "transform_hf_to_arc.py"]
    run([*transform, "--dataset", folder / "rows.jsonl", "--output_dir", folder / "arc_data"])
    columns = {
        "one attempt": solved(folder, rows, args.model_path, "one"),
        "two attempts": solved(folder, rows, args.model_path, "two", "--predictions_per_task", "2"),
    }
    if args.augmentations > 1:
        views = ("--augmentations", str(args.augmentations))
        name = f"two voted of {args.augmentations} views"
        columns[name] = solved(folder, rows, args.model_path, "voted", *views)
    print(f"| family | tasks | {' | '.join(columns)} |\n|---|{'---|' * (len(columns) + 1)}")
    for family in filter(columns["one attempt"].get, FAMILIES):
        shares = [f"{sum(c[family]) / len(c[family]):.0%}" for c in columns.values()]
        print(f"| {family} | {len(columns['one attempt'][family])} | {' | '.join(shares)} |")
    total = [f"{sum(map(sum, c.values())) / len(rows):.1%}" for c in columns.values()]
    print(f"| **all** | {len(rows)} | {' | '.join(total)} |")


if __name__ == "__main__":
    cli.run(main, build_parser())
