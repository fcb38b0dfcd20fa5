"""Prompt-only extraction of one layer, side by side with SAELens's cached-activations runner.

    pip install sae-lens
    python benchmarks/compare_saelens.py --model_path MODEL --dataset_path TASKS.json

Both read the same rows of token ids (prompts of ARC tasks, joined and cut into rows of --context
tokens, because that runner takes one length), compute in float32 up to the layer and no further,
and write what they captured to disk; loading the model and compiling are left out.
"""

import argparse
import importlib.util
import sys
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

from benchmarks import bench
from utils import cli
from utils.errors import UserError


def build_parser() -> cli.Parser:
    parser = bench.build_parser(__doc__)
    parser.add_argument("--model_path", required=bench.NEEDED, help="with its tokenizer")
    parser.add_argument("--dataset_path", required=bench.NEEDED, help="ARC tasks")
    parser.add_argument("--layer", type=cli.int_at_least(0), default=11, help="from 0")
    parser.add_argument("--context", type=cli.int_at_least(16), default=800, help="tokens a row")
    parser.add_argument("--rows", type=cli.int_at_least(1), default=8, help="rows measured")
    parser.add_argument("--repeats", type=cli.int_at_least(1), default=3, help="best of so many")
    return parser


def token_rows(args: argparse.Namespace):
    """int32 [rows, context]"""
    import numpy as np

    from utils.arc import tasks as arc
    from utils.prompt import codec as tokens
    from utils.prompt.formats import load_format

    tokenizer = tokens.load_tokenizer(args.model_path)
    fmt = load_format("chat", None, tokenizer)
    ids, need = [], args.rows * args.context
    for task in arc.read_tasks(args.dataset_path):
        ids.extend(tokens.encode_prompt(fmt.render(task, 0), tokenizer)[0])
        if len(ids) >= need:
            return np.array(ids[:need], np.int32).reshape(args.rows, args.context)
    raise UserError(f"the tasks have {len(ids)} tokens, fewer than {need}: lower --rows")


def ours(args: argparse.Namespace, rows, scratch: Path):
    import numpy as np

    from utils.model.capture import CaptureSpec
    from utils.model.config import ModelConfig
    from utils.model.decoder import Decoder
    from utils.model.engine import Engine
    from utils.model.generate import Shape
    from utils.model.layout import Layout, single_device_mesh
    from utils.model.weights import Checkpoint
    from utils.plan.batching import Length, cache_slots, chunk_tokens
    from utils.shards.writer import RunFolder

    config = ModelConfig.from_hf(args.model_path)
    layout = Layout.of(config, single_device_mesh())
    params = Checkpoint(args.model_path, config).load(layout, np.float32)
    name = f"resid_post.{args.layer}"
    decoder = Decoder(config, layout, CaptureSpec((name,)), args.layer + 1)
    engine = Engine(decoder, params, logits=False)
    chunk = chunk_tokens([args.context], on_cpu=True)
    shape = Shape(1, cache_slots(Length(args.context), chunk, 0), chunk)
    length = np.array([args.context], np.int32)

    def states(row: np.ndarray, cache: Any) -> tuple[np.ndarray, Any]:
        state, parts = engine.begin(shape, cache), []
        for start in range(0, args.context, chunk):
            begin = np.array([start], np.int32)
            part, state = engine.prefill(state, row[None], [0], begin, length, length, shape)
            parts.append(part.captures[name])
        return np.concatenate(parts, axis=1)[0, : args.context], state[0]

    def run(number: int) -> None:
        path = scratch / f"ours{number}"
        with RunFolder(path, {}, {}, activation_dtype="float32") as folder:
            folder.begin()
            cache = None
            for i, row in enumerate(rows):
                found, cache = states(row, cache)
                item = {
                    "task_id": "row",
                    "sample_idx": i,
                    "input_ids": row,
                    "prompt_length": len(row),
                    "activations": {name: found},
                    "output_logprobs": np.zeros(0, np.float32),
                    "cells": np.zeros((0, 7), np.int32),
                    "num_train_pairs": 0,
                    "prediction": None,
                    "target": None,
                    "correct": None,
                    "teacher_forced": False,
                }
                answer = {"task_id": "row", "sample_idx": i, "attempts": []}
                folder.add(item, answer)
            folder.finish()

    return run


def saelens(args: argparse.Namespace, rows, scratch: Path):
    import torch
    from datasets import Dataset
    from sae_lens import CacheActivationsRunner, CacheActivationsRunnerConfig

    from utils.model.config import ModelConfig

    dataset = Dataset.from_dict({"input_ids": rows.tolist()})
    width = ModelConfig.from_hf(args.model_path).hidden_size

    def prepare(number: int):
        config = CacheActivationsRunnerConfig(
            dataset_path="rows",
            model_name=args.model_path,
            model_class_name="AutoModelForCausalLM",
            model_from_pretrained_kwargs={"dtype": torch.float32},
            model_batch_size=1,
            hook_name=f"model.layers.{args.layer}",
            d_in=width,
            training_tokens=rows.size,
            context_size=args.context,
            new_cached_activations_path=str(scratch / f"saelens{number}"),
            shuffle=False,
            prepend_bos=False,
            device="cpu",
            # It fills whole buffers: one that holds just these rows.
            buffer_size_gb=(rows.size + 0.5) * width * 4 / 1e9,
        )
        return CacheActivationsRunner(config, override_dataset=dataset)

    return prepare


def main(args: argparse.Namespace, signals: cli.Signals) -> None:
    beside = importlib.util.find_spec("sae_lens") is not None
    if not (beside or args.smoke):
        raise UserError("SAELens is not installed: pip install sae-lens")
    with bench.scratch(args, layer=1, context=64, rows=4, repeats=1) as folder:
        measure(args, folder, beside)


def measure(args: argparse.Namespace, folder: Path, beside: bool) -> None:
    """beside: whether SAELens is there to be measured too."""
    import numpy as np

    from utils.shards import iter_items

    rows = token_rows(args)
    mine = ours(args, rows, folder)
    theirs = saelens(args, rows, folder) if beside else None
    mine(0)
    times, other_times, cached = [], [], None
    for number in range(1, args.repeats + 1):
        runner = theirs(number) if theirs else None
        start = time.perf_counter()
        mine(number)
        middle = time.perf_counter()
        times.append(middle - start)
        if runner:
            cached = runner.run()
            other_times.append(time.perf_counter() - middle)
    name = f"resid_post.{args.layer}"
    stored = np.stack([item["activations"][name] for item in iter_items(folder / "ours1")])
    print(bench.processor())
    print(f"ours:    {rows.size / min(times):.0f} tokens/s")
    if cached is None:
        print("SAELens is not installed: our side alone was run")
        return
    reference = np.asarray(cached.with_format("numpy")[f"model.layers.{args.layer}"])
    reference = reference.reshape(stored.shape)
    error = np.linalg.norm(stored - reference, axis=-1) / np.linalg.norm(reference, axis=-1)
    ratio = min(other_times) / min(times)
    print(f"SAELens: {rows.size / min(other_times):.0f} tokens/s, ratio {ratio:.2f}")
    print(f"largest difference between the two: {error.max():.1e} of a row's norm")


if __name__ == "__main__":
    cli.run(main, build_parser())
