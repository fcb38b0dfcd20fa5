"""Run a model on ARC tasks on one device and keep the hidden states of every token.

    python simple_extraction_inference.py --model_path MODEL \\
        --dataset_path arc_data/arc_format_train.json \\
        --output_path results/predictions.json --activations_dir results/activations

Writes predictions, shards of activations and metadata.json. Ctrl-C or SIGTERM stops it within
seconds with all that was stored intact; the same command with --resume does the rest.
"""

import argparse

from utils import cli
from utils.plan import flags
from utils.plan.request import Request


def build_parser() -> cli.Parser:
    parser = cli.Parser(description=__doc__)
    flags.add_input_flags(parser)
    parser.add_argument(
        "--output_path", default=Request.output_path, help="predictions, a JSON file"
    )
    flags.add_batch_flags(parser, Request.batch_size, "")
    parser.add_argument(
        "--no_extraction",
        action="store_true",
        help="predictions only; --activations_dir is not touched, and OUTPUT_PATH.run keeps what "
        "--resume needs",
    )
    flags.add_model_flags(parser)
    flags.add_generation_flags(parser)
    flags.add_capture_flags(parser)
    flags.add_storage_flags(parser)
    return parser


def main(args: argparse.Namespace, signals: cli.Signals) -> int:
    from utils.plan.plan import prepare
    from utils.run import summary as report
    from utils.run.loop import run

    prepared = prepare(Request.from_flags(args))
    if args.dry_run:
        report.print_plan(prepared)
        return 0
    report.print_summary(prepared, run(prepared, signals))
    return 0


if __name__ == "__main__":
    cli.run(main, build_parser())
