"""What TPU slices can reach, by their compiler: the table of README_DISTRIBUTED_INFERENCE.md.

    pip install -r requirements-tpu.txt && python benchmarks/plan_table.py

Compiles the run of each model's shape for each slice, ahead of time, with no TPU and no weights:
three layers captured, prompts of about 2,000 tokens (one a character), answers of at most 400.
Minutes a line.
"""

import argparse
import importlib.util
import json
import random
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

from benchmarks import bench
from benchmarks.shapes import LLAMA_3_1_8B, QWEN2_0_5B, QWEN2_5_7B
from utils import cli
from utils.errors import UserError

MODELS = {"Qwen2-0.5B": QWEN2_0_5B, "Qwen2.5-7B": QWEN2_5_7B, "Llama-3.1-8B": LLAMA_3_1_8B}
SLICES = ["v4-8", "v4-64", "v5e-8", "v5e-64"]


def write_tasks(path: Path, count: int, side: int) -> None:
    """Tasks of six pairs of square grids: prompts of equal length, so one shape to compile."""
    rng = random.Random(0)

    def grid() -> list[list[int]]:
        return [[rng.randint(0, 9) for _ in range(side)] for _ in range(side)]

    tasks = {}
    for i in range(count):
        pairs = [{"input": grid(), "output": grid()} for _ in range(6)]
        tasks[f"task{i:05}"] = {"train": pairs, "test": [{"input": grid()}]}
    path.write_text(json.dumps(tasks))


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
    tiny = {"models": ["Qwen2-0.5B"], "slices": ["v5e-4"], "batch_size": 1}
    with bench.scratch(args, **tiny) as folder:
        print("| model | slice | mesh, batch | GB | prefill tokens/s | by bytes | step ms |")
        for name in args.models:
            fields = MODELS[name]
            if args.smoke:  # two layers compile in seconds
                fields = {**fields, "num_hidden_layers": 2}
            write_outline(folder / name, fields)
            for slice_name in args.slices:
                print(line(args, folder, name, slice_name), flush=True)


def line(args: argparse.Namespace, folder: Path, name: str, slice_name: str) -> str:
    """Of the table: what the compiler says of a model on a slice."""
    from utils.plan.plan import plan_run
    from utils.plan.request import Request, mesh_shapes
    from utils.run import tpu

    devices = tpu.slice_devices(slice_name)
    side = 3 if args.smoke else 12
    write_tasks(folder / "tasks.json", args.batch_size * len(devices), side)
    request = Request(
        model_path=str(folder / name),
        dataset_path=str(folder / "tasks.json"),
        distributed=True,
        batch_size=args.batch_size,
        mesh_shape=mesh_shapes(args.mesh_shape)[0],
        max_output_tokens=400,
    )
    p = tpu.estimate(plan_run(request, devices, writes=False), slice_name)
    mesh = "x".join(map(str, p["mesh_shape"]))
    if not p["fits"]:
        return f"| {name} | {slice_name} | {mesh} | does not fit | | | |"
    (bucket,) = p["buckets"]
    rate, step = p["estimated_prefill_tokens_per_second"], bucket["decode_step_seconds"]
    memory = tpu.CHIPS[slice_name.partition("-")[0]].memory
    seconds = bucket["prefill"]["bytes_accessed_per_device"] / memory
    by_bytes = rate * min(1, bucket["prefill_seconds"] / seconds)
    return (
        f"| {name} | {slice_name} | {mesh}, {bucket['rows']} x {bucket['length']} | "
        f"{p['hbm_bytes_per_device'] / 1e9:.1f} | {rate:,.0f} | {by_bytes:,.0f} | "
        f"{step * 1e3:.2f} |"
    )


if __name__ == "__main__":
    cli.run(main, build_parser())
