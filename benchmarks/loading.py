"""Seconds and peak memory of loading Qwen2-0.5B's shape: as it is, with an adapter, quantised.

    python benchmarks/loading.py

Writes random checkpoints, in bfloat16, in bitsandbytes 4-bit, AWQ and FP8, and a LoRA adapter of
rank 16 to every linear layer. Each is loaded in a process of its own, in float32 on one device;
what counts is the most memory that this process held, the parameters and all of JAX included.
"""

import argparse
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

from benchmarks import bench, shapes
from utils import cli

LINEAR = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj")
LINEAR += ("mlp.gate_proj", "mlp.up_proj", "mlp.down_proj")
WAYS = {  # name -> scheme of tests/quantize.py, or None
    "bfloat16": None,
    "bfloat16 and an adapter": None,
    "bitsandbytes nf4, nested": "nf4_nested",
    "awq": "awq",
    "gptq, act-order": "gptq_v2_act_order",
    "fp8, blocks": "fp8_block",
}


def build_parser() -> cli.Parser:
    parser = bench.build_parser(__doc__)
    parser.add_argument(
        "--layers", type=cli.int_at_least(1), default=24, help="of the model, each of 15 M"
    )
    parser.add_argument("--load", nargs=2, help=argparse.SUPPRESS)  # a checkpoint, an adapter or -
    return parser


def load(folder: str, adapter: str) -> None:
    """Prints in JSON the parameters' bytes, the peak of this process, and the seconds it took."""
    import jax
    import numpy as np

    from utils.model.adapters import read_adapter
    from utils.model.config import ModelConfig
    from utils.model.layout import Layout, single_device_mesh
    from utils.model.weights import Checkpoint

    start = time.perf_counter()
    config = ModelConfig.from_hf(folder)
    layout = Layout.of(config, single_device_mesh())
    checkpoint = Checkpoint(folder, config, None if adapter == "-" else read_adapter(Path(adapter)))
    params = jax.block_until_ready(checkpoint.load(layout, np.float32))
    seconds = time.perf_counter() - start
    size = sum(leaf.nbytes for leaf in jax.tree.leaves(params))
    print(json.dumps([size, bench.peak_bytes(), seconds]))


def once_a_shape(how: Callable) -> Callable:
    """Quantises the first weight of each shape alone, since that is slow, and any will do."""
    known = {}

    def quantised(weight):
        if weight.shape not in known:
            known[weight.shape] = how(weight)
        return known[weight.shape]

    return quantised


def main(args: argparse.Namespace, _: cli.Signals) -> None:
    if args.load:
        load(*args.load)
        return
    with bench.scratch(args, layers=1):
        measure(args)


def measure(args: argparse.Namespace) -> None:
    import quantize
    from checkpoints import write_adapter, write_random_checkpoint
    from safetensors.numpy import load_file, save_file

    fields = {**shapes.QWEN2_0_5B, "num_hidden_layers": args.layers}
    if args.smoke:
        fields |= {"vocab_size": 512, "hidden_size": 64, "intermediate_size": 128}
        fields |= {"num_attention_heads": 4}
    print(bench.processor())
    print("| weights | on the disk, GB | seconds | peak, GB | bound, GB |\n|---|---|---|---|---|")
    with tempfile.TemporaryDirectory() as scratch:
        base = Path(scratch) / "base"
        write_random_checkpoint(base, fields)
        tensors = load_file(base / "model.safetensors")
        adapted = {
            f"model.layers.{i}.{name}": tensors[f"model.layers.{i}.{name}.weight"].shape
            for i in range(args.layers)
            for name in LINEAR
        }
        write_adapter(Path(scratch) / "adapter", adapted, rank=16, r=16)
        for name, scheme in WAYS.items():
            folder = base
            if scheme is not None:
                folder = Path(scratch) / scheme
                folder.mkdir()
                config, how = quantize.CASES[scheme]
                made, _ = quantize.quantized(tensors, once_a_shape(how))
                text = json.dumps({**fields, "quantization_config": config})
                (folder / "config.json").write_text(text)
                save_file(made, folder / "model.safetensors")
                del made
            adapter = str(Path(scratch) / "adapter") if "adapter" in name else "-"
            command = [sys.executable, __file__, "--load", str(folder), adapter]
            result = subprocess.run(command, capture_output=True, text=True, check=True)
            size, peak, seconds = json.loads(result.stdout.splitlines()[-1])
            held = (folder / "model.safetensors").stat().st_size
            bound = 1.3 * size + 0.5e9
            print(
                f"| {name} | {held / 1e9:.2f} | {seconds:.1f} | {peak / 1e9:.2f} | "
                f"{bound / 1e9:.2f} |",
                flush=True,
            )


if __name__ == "__main__":
    cli.run(main, build_parser())
