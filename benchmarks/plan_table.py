"""What TPU slices can reach, by their compiler: the table of README_DISTRIBUTED_INFERENCE.md.

    pip install -r requirements-tpu.txt && python benchmarks/plan_table.py

Compiles the run of each model's shape for each slice, ahead of time, with no TPU and no weights:
bfloat16, three layers captured, answers of at most 400 tokens, prompts of about --lengths tokens,
one a character. Minutes a line.
"""

import argparse
import importlib.util
import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

from benchmarks import bench
from benchmarks.shapes import LLAMA_3_1_8B, QWEN2_0_5B, QWEN2_5_7B
from utils import cli
from utils.errors import UserError

MODELS = {"Qwen2-0.5B": QWEN2_0_5B, "Qwen2.5-7B": QWEN2_5_7B, "Llama-3.1-8B": LLAMA_3_1_8B}
SLICES = ["v4-8", "v4-64", "v5e-8", "v5e-64"]


def write_outline(folder: Path, fields: dict) -> None:
    """A checkpoint whose weights are a hole in a sparse file: shapes, no values."""
    from checkpoints import outline
    from tokenizers_for_tests import character_tokenizer

    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(fields))
    outline(folder)
    character_tokenizer().save_pretrained(folder)


def build_parser() -> cli.Parser:
    parser = bench.build_parser(__doc__)
    parser.add_argument(
        "--models", nargs="+", default=list(MODELS), choices=MODELS, help="whose shapes"
    )
    parser.add_argument("--slices", nargs="+", default=SLICES, help="of TPU chips")
    parser.add_argument(
        "--lengths",
        nargs="+",
        type=cli.int_at_least(64),
        default=[2000, 9000, 30000],
        help="tokens of a prompt",
    )
    parser.add_argument("--batch_size", type=cli.int_at_least(1), default=8, help="rows a device")
    parser.add_argument("--mesh_shape", nargs="+", default=["auto"], help="of the devices")
    return parser


def main(args: argparse.Namespace, _: cli.Signals) -> None:
    import jax

    if importlib.util.find_spec("libtpu") is None:
        message = "the TPU compiler is not installed: pip install -r requirements-tpu.txt"
        if not args.smoke:
            raise UserError(message)
        print(message)
        return
    jax.config.update("jax_platforms", "cpu")
    tiny = {"models": ["Qwen2-0.5B"], "slices": ["v5e-4"], "batch_size": 1, "lengths": [200]}
    with bench.scratch(args, **tiny) as folder:
        print(
            "| model | slice | mesh, rows | prompt | GB | programs, s | prefill tokens/s a chip by "
            "FLOPs | at the width of the matrix unit | by bytes | decode step, ms |"
        )
        for name in args.models:
            fields = MODELS[name]
            if args.smoke:  # one layer compiles in seconds
                fields = {**fields, "num_hidden_layers": 1}
            write_outline(folder / name, fields)
            for slice_name in args.slices:
                for length in args.lengths:
                    print(line(args, folder, name, slice_name, length), flush=True)


def line(args: argparse.Namespace, folder: Path, name: str, slice_name: str, length: int) -> str:
    """Of the table: what the compiler says of a model on a slice."""
    from utils.plan.plan import plan_run
    from utils.plan.request import Request, mesh_shapes
    from utils.run import tpu

    devices = tpu.slice_devices(slice_name)
    tasks = folder / f"{name}-{slice_name}-{length}"
    request = Request(
        model_path=str(folder / name),
        dataset_path=str(bench.write_tasks(tasks, args.batch_size * len(devices) * [length])),
        distributed=True,
        batch_size=args.batch_size,
        mesh_shape=mesh_shapes(args.mesh_shape)[0],
        max_output_tokens=400,
    )
    p = tpu.estimate(plan_run(request, devices, writes=False), slice_name)
    mesh, prompt = "x".join(map(str, p["mesh_shape"])), p["prompt_tokens"]["median"]
    begin = f"| {name} | {slice_name} | {mesh}"
    if not p["fits"]:
        return f"{begin} | {prompt:,} | does not fit | | | | | |"
    prompts = p["prompt_tokens"]["median"] * p["num_samples"]
    totals = {
        limit: sum(bucket["prefill_seconds_by"][limit] for bucket in p["buckets"])
        for limit in ("flops", "width", "bytes")
    }
    rates = [f"{prompts / seconds / p['devices']:,.0f}" for seconds in totals.values()]
    largest = p["buckets"][0]
    return (
        f"{begin}, {largest['rows']} | {prompt:,} | {p['hbm_bytes_per_device'] / 1e9:.1f} | "
        f"{p['programs']}, {p['compile_seconds']:.0f} | {' | '.join(rates)} | "
        f"{largest['decode_step_seconds'] * 1e3:.2f} |"
    )


if __name__ == "__main__":
    cli.run(main, build_parser())
