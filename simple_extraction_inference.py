"""Run a model on ARC tasks on one device and keep the hidden states of every token.

    python simple_extraction_inference.py --model_path MODEL \\
        --dataset_path arc_data/arc_format_train.json \\
        --output_path results/predictions.json --activations_dir results/activations

Writes predictions, shards of activations and metadata.json. Ctrl-C or SIGTERM stops it within
seconds with all that was stored intact; the same command with --resume does the rest.
"""

import argparse
import signal

if __name__ == "__main__":  # until `cli.run`; an import may lose the exception of an interrupt
    signal.signal(signal.SIGINT, signal.SIG_DFL)

from utils import cli
from utils.plan.request import DRY_RUN, Request


def build_parser() -> cli.Parser:
    parser = cli.Parser(description=__doc__)
    cli.add_flags(parser.add_argument_group("input"), Request, "input")
    cli.add_flags(parser, Request, "output")
    cli.add_flags(parser, Request, "batches")
    parser.add_argument(
        "--no_extraction",
        action="store_true",
        help="predictions only; --activations_dir is not touched, and OUTPUT_PATH.run keeps what "
        "--resume needs",
    )
    for title in ("model and prompt", "answers", "what is extracted"):
        cli.add_flags(parser.add_argument_group(title), Request, title)
    storage = parser.add_argument_group("storage")
    cli.add_flags(storage, Request, "storage")
    storage.add_argument("--dry_run", action="store_true", help=DRY_RUN)
    cli.add_flags(parser.add_argument_group("cloud storage"), Request, "cloud storage")
    return parser


def main(args: argparse.Namespace, signals: cli.Signals) -> int:
    from utils.plan.plan import plan_run
    from utils.run.dry_run import print_plan
    from utils.run.loop import run
    from utils.run.opening import stored_already
    from utils.run.peers import Peers
    from utils.run.summary import print_summary

    plan = plan_run(Request.from_flags(args))
    if args.dry_run:
        print_plan(plan, *stored_already(plan, Peers()))
        return 0
    print_summary(plan, run(plan, signals))
    return 0


if __name__ == "__main__":
    cli.run(main, build_parser())
