"""What of a model's work survives an autoencoder: loss, cells and tasks with its reconstructions.

    python examples/evaluate_sae.py --sae sae --hook_point resid_post.3 --generate \\
        --model_path examples/arc_tiny --dataset_path arc_data/arc_format_train.json \\
        --prompt_format compact --max_output_tokens 64 --output results/sae.json

The model reads puzzles and their true answers four times: as it is, and with the hidden states of
every token at one hook set to zero, to their mean, or to what the autoencoder makes of them
(spliced). The share of the loss between zero and clean that the reconstruction keeps is
`ce_recovered`. With --generate the model also answers by itself, and the cells and tasks are
counted that it still gets right.
"""

# N rows   W width

import argparse
import sys
from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

sys.path.insert(0, str(Path(__file__).parents[1]))

from utils import cli
from utils.errors import UserError
from utils.plan.request import Request
from utils.store.local import check_output, json_lines, write_result

if TYPE_CHECKING:
    from utils.plan.interventions import Intervention
    from utils.plan.plan import Plan
    from utils.run.compute import Computation
    from utils.run.result import Result

PROMPT = ("dtype", "prompt_format", "grid_encoding", "max_train_pairs", "max_model_len")
CONDITIONS = ("clean", "zero", "mean", "spliced")
GENERATED = ("clean", "mean", "spliced")
KL_BLOCK = 64  # answer tokens a device whose vocabulary-wide logits exist at once, twice
NOWHERE = {"where": {"tokens": []}}


class Spliced:
    """A model with three changes at one hook in one compiled program: zero, mean and
    reconstruction, of which at most one holds, at every token.

    parts: condition -> its change; mean: float32 [W], what the states become there. params: of the
    model, where they are loaded already.
    """

    def __init__(self, plan: "Plan", sae: "Intervention", mean: np.ndarray, params: Any = None):
        from utils.model.interventions import Edit
        from utils.plan.interventions import Intervention
        from utils.run.compute import Computation

        hook = sae.edit.hook
        self.parts = {
            "zero": Intervention(NOWHERE, Edit(hook, "zero")),
            "mean": Intervention(NOWHERE, Edit(hook, "set"), {"vector": mean}),
            "spliced": replace(sae, entry=NOWHERE),
        }
        self.plan = replace(plan, interventions=tuple(self.parts.values()))
        self.computation: Computation = Computation(self.plan, params)
        self.computation.compile(plan.batches)

    def set_mean(self, mean: np.ndarray) -> None:
        import jax

        engine, place = self.computation.engine, list(self.parts).index("mean")
        vector = jax.device_put(mean, self.plan.layout.sharding())
        engine.constants = [
            {"vector": vector} if i == place else arrays
            for i, arrays in enumerate(engine.constants)
        ]

    def results(self, condition: str) -> Iterator["Result"]:
        """Every sample's, under one of CONDITIONS."""
        from tqdm import tqdm

        from utils.run.pipeline import pipelined

        chosen = [
            replace(one, entry={} if name == condition else NOWHERE)
            for name, one in self.parts.items()
        ]
        computation = self.computation
        computation.plan = replace(self.plan, interventions=tuple(chosen))
        pipeline = pipelined(
            computation.passes(self.plan.batches),
            computation.launch,
            computation.fetch,
            lambda: None,
        )
        with tqdm(total=len(self.plan.samples), desc=condition, unit="sample") as bar:
            for results in pipeline:
                bar.update(len(results))
                yield from results


def divergence(computation: "Computation", clean: np.ndarray, spliced: np.ndarray) -> float:
    """KL from the clean model's next-token distribution to that of the spliced one, summed over
    pairs of the last hidden states, [N, W], that the two have at the same token."""
    import jax

    engine, layout, total = computation.engine, computation.layout, 0.0
    block, kl = KL_BLOCK * layout.mesh.size, jax.jit(_kl, static_argnums=0)
    with engine.precision():
        for start in range(0, len(clean), block):
            parts = [rows[start : start + block] for rows in (clean, spliced)]
            n = len(parts[0])
            padded = [np.pad(part, [(0, block - n), (0, 0)]) for part in parts]
            found = kl(engine.model, engine.params, *map(layout.put, padded))
            total += float(np.asarray(found)[:n].sum(dtype=np.float64))
    return total


def _kl(model: Any, params: Any, clean: Any, spliced: Any) -> Any:
    """[N] in nats, of hidden states [N, W] before the final norm."""
    import jax
    import jax.numpy as jnp

    logits = partial(model.apply, {"params": params}, method=type(model).logits)
    p, q = (jax.nn.log_softmax(logits(x), axis=-1) for x in (clean, spliced))
    return jnp.where(jnp.isfinite(p), jnp.exp(p) * (p - q), 0).sum(axis=-1)


def forced(plan: "Plan", sae: "Intervention") -> tuple[dict[str, Any], np.ndarray, Any]:
    """What is said of forced answers; the hook's mean, float32 [W]; and the model's parameters."""
    from examples.sae_training import Reconstruction
    from utils.model.capture import CaptureSpec, width_of

    hook, last = sae.edit.hook, f"resid_post.{plan.config.num_layers - 1}"
    plan = replace(plan, capture=CaptureSpec(tuple(dict.fromkeys((hook, last)))))
    model = Spliced(plan, sae, np.zeros(width_of(plan.config, hook), np.float32))
    edit = sae.edit
    seen, kept = Reconstruction(edit.architecture, edit.k, sae.constants["weights"]), {}
    loss, tokens, kl = dict.fromkeys(CONDITIONS, 0.0), 0, 0.0
    for condition in CONDITIONS:
        if condition == "mean":
            model.set_mean(seen.mean)
        for result in model.results(condition):
            loss[condition] -= float(result.logprobs[0].sum(dtype=np.float64))
            # The token before each of the answer's predicts it.
            answer = slice(result.encoded.prompt_length - 1, len(result.encoded.ids) - 1)
            if condition == "clean":
                tokens += len(result.logprobs[0])
                seen.add(result.captures[hook])
                kept[result.sample.key] = result.captures[last][answer].copy()
            if condition == "spliced":
                clean = kept.pop(result.sample.key)
                kl += divergence(model.computation, clean, result.captures[last][answer])
    ce = {name: total / tokens for name, total in loss.items()}
    gap, explained = ce["zero"] - ce["clean"], seen.explained_variance
    found = {
        "tokens": tokens,
        "explained_variance": explained if np.isfinite(explained) else None,
        "l0": seen.l0,
        "ce": ce,
        "ce_recovered": (ce["zero"] - ce["spliced"]) / gap if gap else None,
        "kl": kl / tokens,
    }
    return found, seen.mean, model.computation.engine.params


def generated(
    plan: "Plan", sae: "Intervention", mean: np.ndarray, params: Any
) -> dict[str, dict[str, int]]:
    """Cells and test inputs that the model answers right by itself, under each of GENERATED."""
    model = Spliced(plan, sae, mean, params)
    found: dict[str, dict[str, int]] = {"cells_correct": {}, "solved": {}}
    for condition in GENERATED:
        cells = solved = 0
        for result in model.results(condition):
            target = result.sample.target
            if target is None:
                continue
            said = plan.codec.read(result.answers[0], result.encoded.prompt_length).grid
            cells += cells_right(said, target)
            solved += said == target
        found["cells_correct"][condition], found["solved"][condition] = cells, solved
    return found


def cells_right(said: Sequence[Sequence[int]] | None, target: Sequence[Sequence[int]]) -> int:
    """Cells of the target that stand at the same place of what was said, whatever its shape."""
    rows = zip(said or (), target, strict=False)
    return sum(a == b for row in rows for a, b in zip(*row, strict=False))


def build_parser() -> cli.Parser:
    parser = cli.Parser(__doc__)
    parser.add_argument(
        "--sae",
        required=True,
        help="folder of an autoencoder in SAELens's form, or Qwen-Scope's layer{n}.sae.pt",
    )
    parser.add_argument(
        "--hook_point",
        required=True,
        metavar="HOOK.LAYER",
        help="where it is put in the place of the hidden states, such as resid_post.11",
    )
    cli.add_flags(parser, Request, "input")
    cli.add_flags(parser, Request, "batches", unit=" and device")
    for name in PROMPT:
        cli.add_flags(parser, Request, name)
    parser.add_argument(
        "--generate",
        action="store_true",
        help="also let the model answer by itself, and count the cells and tasks it gets right",
    )
    answers = {"max_output_tokens": {"help": "tokens an answer of --generate, above 0"}}
    cli.add_flags(parser, Request, "max_output_tokens", answers)
    cli.add_output(parser)
    return parser


def main(args: argparse.Namespace, _: cli.Signals) -> None:
    from utils.model.layout import find_devices
    from utils.plan.interventions import intervention
    from utils.plan.plan import plan_run

    check_output(args.output, args.overwrite)
    request = replace(Request.from_flags(args), no_logits=True)
    if request.max_output_tokens == 0:
        raise UserError("--max_output_tokens is of --generate, and has to be above 0")
    devices = find_devices(everywhere=True)
    plan = plan_run(replace(request, teacher_forcing=True), devices, writes=False)
    entry = {"hook": args.hook_point, "op": "reconstruct", "sae": args.sae}
    sae = intervention(entry, plan.config)
    answering = replace(request, no_logits=False, activations_dir=None)
    free = None
    if args.generate:  # on the same mesh, whose weights it shares
        shape = plan.layout.data, plan.layout.model
        free = plan_run(replace(answering, mesh_shape=shape), devices, writes=False)
    found, mean, params = forced(plan, sae)
    if free is not None:
        found |= generated(free, sae, mean, params)
    write_result(args.output, json_lines(found))
    print(describe(found, plan, free))


def describe(found: dict[str, Any], plan: "Plan", free: "Plan | None") -> str:
    """plan: of the forced answers; free: of those that are generated."""
    from utils.run.summary import shortfalls

    ce = found["ce"]
    shares = [
        f"{name} {'undefined' if found[key] is None else format(found[key], '.1%')}"
        for name, key in (("explained variance", "explained_variance"), ("CE", "ce_recovered"))
    ]
    lines = [
        f"{shares[0]}, L0 {found['l0']:.1f}; {shares[1]} recovered, KL {found['kl']:.4f} nats a "
        f"token, over {found['tokens']} tokens of answers",
        "cross-entropy: " + ", ".join(f"{name} {value:.4f}" for name, value in ce.items()),
    ]
    if free is not None:
        targets = [sample.target for sample in free.samples if sample.target is not None]
        cells = sum(len(grid) * len(grid[0]) for grid in targets)
        for name, key, total in (
            ("solved", "solved", len(targets)),
            ("cells right", "cells_correct", cells),
        ):
            counts = ", ".join(f"{condition} {n}" for condition, n in found[key].items())
            lines.append(f"{name}, of {total}: {counts}")
    for name, part in (("true answers", plan), ("generated answers", free)):
        if part is not None:
            lines += [f"{name}: {' '.join(line.split())}" for line in shortfalls(part)]
    return "\n".join(lines)


if __name__ == "__main__":
    cli.run(main, build_parser())
