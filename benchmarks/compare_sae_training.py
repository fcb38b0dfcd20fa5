"""Training an autoencoder, side by side with SAELens's trainer: rows of activations a second.

    pip install sae-lens
    python benchmarks/compare_sae_training.py

Both train the same architecture of the same width and k, in float32, on the same batches, which lie
in memory; compiling and the first steps are left out. They take turns, --repeats times, and the
best of each counts.
"""

import argparse
import importlib.util
import os
import sys
import time
from collections.abc import Callable, Iterator
from itertools import cycle, islice
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

from benchmarks import bench
from utils import cli
from utils.errors import UserError

ARCHS = ("topk", "batchtopk", "jumprelu")


def build_parser() -> cli.Parser:
    parser = bench.build_parser(__doc__)
    for name, default, words in (
        ("input_width", 160, "of the rows; the small model that ships has 160"),
        ("width", 1024, "latents"),
        ("k", 32, "active latents of a row"),
        ("batch_size", 1024, "rows a step"),
        ("steps", 30, "measured in a turn"),
        ("repeats", 3, "turns"),
    ):
        parser.add_argument(f"--{name}", type=cli.int_at_least(1), default=default, help=words)
    return parser


def ours(args: argparse.Namespace, arch: str, batches: list) -> Callable[[], None]:
    """A function that trains for `args.steps` steps."""
    from examples.sae import SaeConfig, normalisation
    from examples.sae_training import Trainer

    config = SaeConfig(arch, args.width, args.k, 10_000, args.batch_size)
    trainer = Trainer(config, *normalisation(batches[0]))
    state = trainer.begin(batches[0])

    def turn() -> None:
        nonlocal state
        for batch in islice(cycle(batches), args.steps):
            state, unexplained = trainer.step(state, batch)
        unexplained.block_until_ready()

    return turn


def saelens(args: argparse.Namespace, arch: str, batches: list) -> Callable[[], None]:
    """The same in SAELens."""
    import sae_lens
    import torch
    from sae_lens.config import SAETrainerConfig
    from sae_lens.training.sae_trainer import SAETrainer

    kinds = {"topk": "TopK", "batchtopk": "BatchTopK", "jumprelu": "JumpReLU"}
    k = {} if arch == "jumprelu" else {"k": args.k}
    config = getattr(sae_lens, f"{kinds[arch]}TrainingSAEConfig")(args.input_width, args.width, **k)
    sae = getattr(sae_lens, f"{kinds[arch]}TrainingSAE")(config)
    tensors: Iterator[torch.Tensor] = cycle([torch.from_numpy(batch) for batch in batches])
    settings = SAETrainerConfig(10**9, args.batch_size, lr=1e-3, lr_end=1e-3)
    trainer = SAETrainer(settings, sae, tensors)

    def turn() -> None:
        for _ in range(args.steps):  # what its `fit` does for each step
            trainer.step(next(tensors))
            trainer.n_training_steps += 1

    return turn


def main(args: argparse.Namespace, signals: cli.Signals) -> None:
    beside = importlib.util.find_spec("sae_lens") is not None
    if not (beside or args.smoke):
        raise UserError("SAELens is not installed: pip install sae-lens")
    tiny = {"input_width": 16, "width": 64, "k": 4, "batch_size": 32, "steps": 2, "repeats": 1}
    with bench.scratch(args, **tiny):
        measure(args, beside)


def measure(args: argparse.Namespace, beside: bool) -> None:
    """beside: whether SAELens is there to be measured too."""
    import numpy as np

    random = np.random.default_rng(0)
    batches = [
        random.standard_normal((args.batch_size, args.input_width), np.float32) for _ in range(4)
    ]
    load = os.getloadavg()[0]
    print(f"{bench.processor()}, load average {load:.1f} before the run")
    print(f"input {args.input_width}, width {args.width}, k {args.k}, batches of {args.batch_size}")
    print("| architecture | rows/s | SAELens, rows/s | ratio |\n|---|---|---|---|", flush=True)
    for arch in ARCHS:
        sides = (ours, saelens) if beside else (ours,)
        turns = [side(args, arch, batches) for side in sides]
        best = [float("inf")] * len(turns)
        for number in range(args.repeats + 1):
            for i, turn in enumerate(turns):
                start = time.perf_counter()
                turn()
                if number:  # the first turn compiles
                    best[i] = min(best[i], time.perf_counter() - start)
        rates = [args.steps * args.batch_size / seconds for seconds in best]
        theirs = f"{rates[1]:.0f} | {rates[0] / rates[1]:.2f}" if beside else "not installed | "
        print(f"| {arch} | {rates[0]:.0f} | {theirs} |", flush=True)


if __name__ == "__main__":
    cli.run(main, build_parser())
