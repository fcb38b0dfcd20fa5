"""Run a model on ARC tasks on a (data, model) mesh of devices, from one host to a TPU pod, and keep
the hidden states of every token.

    python distributed_inference_with_activations.py --model_path MODEL \\
        --dataset_path arc_data/arc_format_train.json \\
        --output_filepath results/submission.json --activations_dir results/activations \\
        --batch_size 8 --extract_activations --layers_to_extract 0 11 23 \\
        --mesh_shape 8 8 --save_every_n_batches 10

On a pod the same command starts on every host. Writes submission.json, shards of activations and
metadata.json. SIGTERM on any host stops all within seconds with all that was stored intact; the
same command with --resume, on the same mesh or another, does the rest. Before money is spent,
--plan v5e-64 says on any machine whether the run fits and how long it takes at best.
"""

import argparse

from utils import cli
from utils.errors import UserError
from utils.plan import flags
from utils.plan.request import Request, mesh_shapes


def build_parser() -> cli.Parser:
    parser = cli.Parser(description=__doc__)
    flags.add_input_flags(parser)
    parser.add_argument(
        "--output_filepath",
        dest="output_path",
        default="results/submission.json",
        help="Kaggle submission, a JSON file",
    )
    flags.add_mesh_flags(parser)
    flags.add_model_flags(parser)
    flags.add_generation_flags(parser)
    flags.add_capture_flags(parser).add_argument(
        "--extract_activations",
        action="store_true",
        help="keep activations; without it the run makes the submission alone",
    )
    flags.add_storage_flags(parser, save_every_n_samples=None)
    flags.add_plan_flags(parser)
    parser.set_defaults(distributed=True)
    return parser


def main(args: argparse.Namespace, signals: cli.Signals) -> int:
    request = Request.from_flags(args)
    shapes = mesh_shapes(args.mesh_shape)
    if args.plan is not None:
        from utils.run import tpu as plan

        return plan.main(request, args.plan, shapes, args.plan_json)
    if args.plan_json is not None:
        raise UserError("--plan_json needs --plan SLICE")
    if len(shapes) > 1:
        words = " ".join(args.mesh_shape)
        raise UserError(f"--mesh_shape {words} is several shapes, which --plan alone compares")
    from utils.plan.plan import prepare
    from utils.run import summary as report
    from utils.run.connect import connect
    from utils.run.loop import run
    from utils.run.peers import agree, parting

    peers = connect(
        args.coordinator_address,
        args.num_processes,
        args.process_id,
        timeout=args.coordinator_timeout,
        silence=args.peer_timeout,
        signals=signals,
    )
    with parting(peers):
        with peers.together("checking the request"):
            prepared = prepare(request)
        agree(prepared, peers)
        if args.verbose and peers.index == 0:
            report.print_placements(prepared)
        if args.dry_run:
            if peers.index == 0:
                report.print_plan(prepared)
            return 0
        manifest = run(prepared, signals, peers)
        if peers.index == 0:
            report.print_summary(prepared, manifest)
    return 0


if __name__ == "__main__":
    cli.run(main, build_parser())
