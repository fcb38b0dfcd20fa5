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
import signal

if __name__ == "__main__":  # until `cli.run`; an import may lose the exception of an interrupt
    signal.signal(signal.SIGINT, signal.SIG_DFL)

from utils import cli
from utils.errors import UserError
from utils.plan.request import DRY_RUN, Request, mesh_shapes
from utils.run import prices


def build_parser() -> cli.Parser:
    parser = cli.Parser(description=__doc__)
    cli.add_flags(parser.add_argument_group("input"), Request, "input")
    submission = {
        "flag": "--output_filepath",
        "default": "results/submission.json",
        "help": "Kaggle submission, a JSON file",
    }
    cli.add_flags(parser, Request, "output", {"output_path": submission})

    devices = parser.add_argument_group("devices and processes")
    cli.add_flags(devices, Request, "mesh")
    cli.add_flags(devices, Request, "batches", {"batch_size": {"default": 8}}, " and device")
    devices.add_argument(
        "--coordinator_address",
        metavar="HOST:PORT",
        help="where process 0 listens; with --num_processes and --process_id, where the "
        "surroundings do not tell (default: what a TPU pod, Slurm or GKE says)",
    )
    devices.add_argument(
        "--num_processes",
        type=cli.int_at_least(1),
        help="processes of the run (default: see --coordinator_address)",
    )
    devices.add_argument(
        "--process_id",
        type=cli.int_at_least(0),
        help="this one's number, from 0 (default: see --coordinator_address)",
    )
    devices.add_argument(
        "--coordinator_timeout",
        type=cli.int_at_least(1),
        default=300,
        help="seconds to wait for all processes to come together",
    )
    devices.add_argument(
        "--peer_timeout",
        type=cli.int_at_least(6),
        default=45,
        help="seconds of silence after which a process counts as dead, and the others stop",
    )
    cli.add_flags(devices, Request, "parts")

    cli.add_flags(parser.add_argument_group("model and prompt"), Request, "model and prompt")
    cli.add_flags(parser.add_argument_group("answers"), Request, "answers")
    capture = parser.add_argument_group("what is extracted")
    cli.add_flags(capture, Request, "what is extracted")
    capture.add_argument(
        "--extract_activations",
        action="store_true",
        help="keep activations; without it the run makes the submission alone",
    )
    storage = parser.add_argument_group("storage")
    cli.add_flags(storage, Request, "storage", {"save_every_n_samples": {"default": None}})
    storage.add_argument("--dry_run", action="store_true", help=DRY_RUN)
    cli.add_flags(parser.add_argument_group("cloud storage"), Request, "cloud storage")

    slices = parser.add_argument_group("plan")
    slices.add_argument(
        "--plan",
        metavar="SLICE",
        help="compile the run for a TPU slice (v4-8 .. v4-1024, v5e-1 .. v5e-256, v5p-8 .. "
        "v5p-1024, v6e-1 .. v6e-256), print prompt lengths, memory, FLOPs, time, storage and cost, "
        "and stop; needs jax[tpu], but no TPU (default: run)",
    )
    slices.add_argument(
        "--plan_json", metavar="FILE", help="write the plan there too (default: nowhere)"
    )
    for name, words in (
        ("--usd_per_chip_hour", prices.CHIP_HOUR_HELP),
        ("--usd_per_gb_month", prices.GB_MONTH_HELP),
    ):
        slices.add_argument(name, metavar="USD", type=cli.float_at_least(0), help=words)
    parser.set_defaults(distributed=True)
    return parser


def main(args: argparse.Namespace, signals: cli.Signals) -> int:
    request = Request.from_flags(args)
    shapes = mesh_shapes(args.mesh_shape)
    if args.plan is not None:
        others = ("coordinator_address", "num_processes", "process_id")
        unused = ["--dry_run"] if args.dry_run else []
        unused += [f"--{name}" for name in others if getattr(args, name) is not None]
        if unused:
            raise UserError(f"--plan starts no run: leave out {', '.join(unused)}")
        from utils.run import tpu

        costs = (args.usd_per_chip_hour, args.usd_per_gb_month)
        return tpu.main(request, args.plan, shapes, args.plan_json, *costs)
    for name in ("plan_json", "usd_per_chip_hour", "usd_per_gb_month"):
        if getattr(args, name) is not None:
            raise UserError(f"--{name} needs --plan SLICE")
    if len(shapes) > 1:
        words = " ".join(args.mesh_shape)
        raise UserError(f"--mesh_shape {words} is several shapes, which --plan alone compares")
    from utils.plan.plan import plan_run
    from utils.run.connect import connect
    from utils.run.dry_run import print_placements, print_plan
    from utils.run.loop import run
    from utils.run.opening import stored_already
    from utils.run.peers import agree
    from utils.run.summary import print_summary

    with connect(
        args.coordinator_address,
        args.num_processes,
        args.process_id,
        timeout=args.coordinator_timeout,
        silence=args.peer_timeout,
        signals=signals,
    ) as peers:
        with peers.together("checking the request"):
            plan = plan_run(request)
        agree(plan, peers)
        if args.verbose and peers.index == 0:
            print_placements(plan)
        if args.dry_run:
            stored = stored_already(plan, peers)
            if peers.index == 0:
                print_plan(plan, *stored)
            return 0
        manifest = run(plan, signals, peers)
        if peers.index == 0:
            print_summary(plan, manifest)
    return 0


if __name__ == "__main__":
    cli.run(main, build_parser())
