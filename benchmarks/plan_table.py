"""What TPU slices can reach, by their compiler: the table of README_DISTRIBUTED_INFERENCE.md.

    pip install -r requirements-tpu.txt && python benchmarks/plan_table.py

Compiles the run of each model's shape for each slice, ahead of time, with no TPU and no weights:
three layers captured, prompts of about 2,000 tokens (one a character), answers of at most 400.
Minutes a line.
"""

import argparse
import json
import random
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))
sys.path.insert(0, str(Path(__file__).parents[1]))

from benchmarks.shapes import LLAMA_3_1_8B, QWEN2_0_5B, QWEN2_5_7B

MODELS = {"Qwen2-0.5B": QWEN2_0_5B, "Qwen2.5-7B": QWEN2_5_7B, "Llama-3.1-8B": LLAMA_3_1_8B}
SLICES = ["v4-8", "v4-64", "v5e-8", "v5e-64"]


def write_tasks(path: Path, count: int) -> None:
    """Tasks of six pairs of 12 x 12 grids: prompts of equal length, so one shape to compile."""
    rng = random.Random(0)

    def grid() -> list[list[int]]:
        return [[rng.randint(0, 9) for _ in range(12)] for _ in range(12)]

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


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--models", nargs="+", default=list(MODELS), choices=MODELS)
    parser.add_argument("--slices", nargs="+", default=SLICES)
    parser.add_argument("--batch_size", type=int, default=8)
    parser.add_argument("--mesh_shape", nargs="+", default=["auto"])
    args = parser.parse_args()

    import jax

    jax.config.update("jax_platforms", "cpu")
    from utils.plan.plan import plan_run
    from utils.plan.request import Request, mesh_shapes
    from utils.run import tpu

    print("| model | slice | mesh, batch | GB | prefill tokens/s | by bytes | step ms |")
    for name in args.models:
        with tempfile.TemporaryDirectory() as scratch:
            scratch = Path(scratch)
            write_outline(scratch / "model", MODELS[name])
            for slice_name in args.slices:
                devices = tpu.slice_devices(slice_name)
                write_tasks(scratch / "tasks.json", args.batch_size * len(devices))
                request = Request(
                    str(scratch / "model"),
                    str(scratch / "tasks.json"),
                    distributed=True,
                    batch_size=args.batch_size,
                    mesh_shape=mesh_shapes(args.mesh_shape)[0],
                    max_output_tokens=400,
                )
                p = tpu.estimate(plan_run(request, devices, writes=False), slice_name)
                mesh = "x".join(map(str, p["mesh_shape"]))
                if not p["fits"]:
                    print(f"| {name} | {slice_name} | {mesh} | does not fit | | | |", flush=True)
                    continue
                (bucket,) = p["buckets"]
                rate, step = p["estimated_prefill_tokens_per_second"], bucket["decode_step_seconds"]
                memory = tpu.CHIPS[slice_name.partition("-")[0]].memory
                seconds = bucket["prefill"]["bytes_accessed_per_device"] / memory
                by_bytes = rate * min(1, bucket["prefill_seconds"] / seconds)
                print(
                    f"| {name} | {slice_name} | {mesh}, {bucket['rows']} x {bucket['length']} | "
                    f"{p['hbm_bytes_per_device'] / 1e9:.1f} | {rate:,.0f} | {by_bytes:,.0f} | "
                    f"{step * 1e3:.2f} |",
                    flush=True,
                )


if __name__ == "__main__":
    main()
