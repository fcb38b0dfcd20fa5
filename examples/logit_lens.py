"""The logit lens: what each layer would say of an answer, if it were the last.

    python examples/logit_lens.py --model_path YOUR_MODEL_PATH \\
        --activations_dir results/activations --output lens.json

Every stored `resid_post` and `resid_pre` goes through the model's final norm and unembedding
(nostalgebraist 2020), and of the checkpoint only these are read. A token of an answer is predicted
from the state of the token before it, so the run must have stored that, for generated or for forced
answers: `--token_positions all`, or `answer`, which lacks the first token of each answer. What
was not stored does not count.

The file says for each layer, over all answers, the mean log-probability in nats of what was said;
`as_said`, the share of the answers' cells of which the layer says the same, by the highest of its
logits at each of the cell's tokens; and `right`, the share of which it says the true color, however
its tokens spell that, of the answers whose truth is known and has the same shape (null where there
are none). Under `samples` stand the log-probabilities of every token of every answer by layer, null
where no state was stored.

Beside it is written a page of the same name that ends in .html, a film of one answer: the grid that
each layer would say, and how sure it is of what was said in the end.
"""

# T tokens of an answer   D model width   V vocabulary   R rows   C columns

import argparse
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

sys.path.insert(0, str(Path(__file__).parents[1]))

from examples.lens_page import (
    Film,
    Read,
    Reading,
    answer_cells,
    film_page,
    reader,
    said_of,
    stored,
    truth_of,
)
from utils import cli
from utils.errors import UserError, some
from utils.store.local import check_output, json_lines, write_result

if TYPE_CHECKING:
    from utils.model.weights import Checkpoint

STREAMS = ("resid_pre", "resid_post")
ROWS = 256  # tokens that go through the unembedding at once

Lens = Callable[[np.ndarray, np.ndarray], tuple[np.ndarray, np.ndarray, np.ndarray]]


def load_lens(checkpoint: "Checkpoint", manifest: dict[str, Any]) -> Lens:
    """States [N, D] and token ids [N] -> log p of these, float32 [N], the ids of the highest
    logits, int32 [N], and log p of those, float32 [N].

    Raises UserError where the model, or its adapter, is not the one of the run.
    """
    import jax
    import jax.numpy as jnp

    from utils.model.decoder import Decoder
    from utils.model.layout import Layout, default_dtype, single_device_mesh

    config, folder = checkpoint.config, checkpoint.folder
    layout = Layout.of(config, single_device_mesh())
    if checkpoint.fingerprint() != manifest["model"]["hash"]:
        raise UserError(f"{folder} is not the model of the run: its weights are others")
    of_run = manifest["model"].get("adapter") or {"path": "none", "hash": None}
    if (checkpoint.adapter and checkpoint.adapter.hash) != of_run["hash"]:
        raise UserError(f"the run was made with another adapter ({of_run['path']}): see --adapter")
    paths = [path for path in checkpoint.parameters if not path.startswith("layers_")]
    dtype = np.dtype(default_dtype(jax.local_devices()))
    params, model = checkpoint.load(layout, dtype, paths), Decoder(config, layout)

    @jax.jit
    def read(params: Any, states: Any, said: Any) -> Any:
        logits = model.apply({"params": params}, states.astype(dtype), method="logits")
        logprobs = jax.nn.log_softmax(logits)
        top = logprobs.argmax(axis=1)
        each = jnp.arange(len(said))
        return logprobs[each, said], top.astype(jnp.int32), logprobs[each, top]

    def lens(states: np.ndarray, said: np.ndarray) -> Any:
        parts = []
        for start in range(0, len(said), ROWS):
            ids = said[start : start + ROWS]
            padding = ROWS - len(ids)
            rows = np.pad(states[start : start + ROWS].astype(np.float32), ((0, padding), (0, 0)))
            found = read(params, rows, np.pad(ids, (0, padding)))
            parts.append([np.asarray(part)[: len(ids)] for part in found])
        return tuple(map(np.concatenate, zip(*parts, strict=True)))

    return lens


def names_of(manifest: dict[str, Any]) -> list[str]:
    """The activations of a run that a lens can read, in the order of the layers. Raises UserError
    where there are none."""
    there = manifest["activations"]
    names = [name for name, about in there.items() if about["hook_point"] in STREAMS]
    if not names:
        raise UserError(
            f"the run holds {some(list(there), 12) or 'no activations'}; a lens reads the residual "
            "stream: run with --hook_points resid_post"
        )
    order = {point: number for number, point in enumerate(STREAMS)}
    return sorted(names, key=lambda n: (there[n]["layer"], order[there[n]["hook_point"]]))


def read_answer(item: dict[str, Any], names: Sequence[str], lens: Lens) -> dict[str, Reading]:
    """What each layer says of an item's answer."""
    P, T = item["prompt_length"], len(item["input_ids"])
    tokens = item.get("positions", np.arange(T))
    row_of = np.full(T, -1)
    row_of[tokens] = np.arange(len(tokens))
    rows = row_of[P - 1 : T - 1]  # a token is predicted from the one before it
    there, said, found = rows >= 0, item["input_ids"][P:], {}
    for name in names:
        logprob, top = np.full(T - P, np.nan, np.float32), np.full(T - P, -1, np.int32)
        top_logprob = logprob.copy()
        if there.any():
            read = lens(item["activations"][name][rows[there]], said[there])
            logprob[there], top[there], top_logprob[there] = read
        found[name] = Reading(logprob, top, top_logprob)
    return found


def cells_said(
    item: dict[str, Any], reading: Reading, read: Read
) -> tuple[np.ndarray, np.ndarray | None]:
    """bool [C] each, of the answer's cells in order, but those that lack a state: whether the layer
    says what was said, and whether it says what is true; None where the truth is not known."""
    cells, (same, colors) = answer_cells(item), said_of(item, reading, read)
    known, truth = stored(cells, reading), truth_of(item, cells)
    return same[known], None if truth is None else (colors == truth)[known]


@dataclass
class Tally:
    """Of one layer, over all answers so far: sum of log-probabilities and how many, and how many
    cells are as said and right, of how many."""

    logprob: float = 0.0
    tokens: int = 0
    as_said: int = 0
    cells: int = 0
    right: int = 0
    cells_with_truth: int = 0

    def add(self, logprob: np.ndarray, same: np.ndarray, right: np.ndarray | None) -> None:
        known = logprob[np.isfinite(logprob)]
        self.logprob += float(known.sum(dtype=np.float64))
        self.tokens += len(known)
        self.as_said += int(same.sum())
        self.cells += len(same)
        if right is not None:
            self.right += int(right.sum())
            self.cells_with_truth += len(right)

    def to_json(self) -> dict[str, Any]:
        def share(part: float, whole: int) -> float | None:
            return part / whole if whole else None

        return {
            "logprob": share(self.logprob, self.tokens),
            "as_said": share(self.as_said, self.cells),
            "right": share(self.right, self.cells_with_truth),
            "tokens": self.tokens,
            "cells": self.cells,
            "cells_with_truth": self.cells_with_truth,
        }


def look(
    folder: str | Path,
    names: Sequence[str],
    lens: Lens,
    read: Read,
    max_samples: int,
    task: str | None,
) -> tuple[dict[str, Tally], list[dict[str, Any]], Film | None]:
    """Layer -> tally; what the file says of each sample; and the answer to be shown, that of
    `task`, or the first solved one, or the first with a grid."""
    from tqdm import tqdm

    from utils.shards import iter_items
    from utils.shards.manifest import read_manifest

    tallies = {name: Tally() for name in names}
    samples, film, best = [], None, 0
    items, total = iter_items(folder), min(max_samples, read_manifest(folder)["total_samples"])
    for item in tqdm(islice(items, total), total=total, desc="reading", unit=" samples"):
        readings = read_answer(item, names, lens)
        for name, reading in readings.items():
            tallies[name].add(reading.logprob, *cells_said(item, reading, read))
        about = {key: item[key] for key in ("task_id", "sample_idx", "view") if key in item}
        said = item["input_ids"][item["prompt_length"] :].tolist()
        logprobs = {n: np.round(r.logprob.astype(float), 4).tolist() for n, r in readings.items()}
        samples.append({**about, "tokens": said, "logprobs": logprobs})
        # Of a task that was asked for, its first answer with a grid.
        rank = 1 + bool(item["correct"]) if task in (None, item["task_id"]) else 0
        if len(answer_cells(item)) and rank > best:
            kept = {key: value for key, value in item.items() if key != "activations"}
            film, best = Film(kept, readings), rank
    return tallies, samples, film


def build_parser() -> cli.Parser:
    parser = cli.Parser(__doc__)
    parser.add_argument("--model_path", required=True, help="folder of the model of the run")
    parser.add_argument("--adapter", metavar="FOLDER", help="that of the run (default: none)")
    parser.add_argument(
        "--activations_dir", required=True, help="of the run: a folder or gs://BUCKET/PREFIX"
    )
    cli.add_output(parser, "JSON file to write, and a page beside it")
    parser.add_argument(
        "--task", metavar="ID", help="whose answer the page shows (default: the first solved)"
    )
    parser.add_argument(
        "--max_samples",
        type=cli.int_at_least(1),
        default=1000,
        help="answers that are read, from the first of the run",
    )
    return parser


def main(args: argparse.Namespace, _: cli.Signals) -> None:
    from utils.model.weights import open_checkpoint
    from utils.prompt.codec import load_tokenizer, tokenizer_folder
    from utils.shards.manifest import read_manifest

    if args.output.suffix == ".html":
        raise UserError(f"--output {args.output} is the page's name: give the JSON file's")
    for path in (args.output, args.output.with_suffix(".html")):
        check_output(path, args.overwrite)
    manifest = read_manifest(args.activations_dir)
    names = names_of(manifest)
    stored = [key[0] for entry in manifest["files"] for key in entry["samples"]]
    if args.task is not None and args.task not in stored[: args.max_samples]:
        there = "only beyond --max_samples" if args.task in stored else "no task of the run"
        raise UserError(f"--task {args.task} is {there} in {args.activations_dir}")
    checkpoint = open_checkpoint(args.model_path, args.adapter)
    tokenizer = load_tokenizer(tokenizer_folder(args.model_path, checkpoint.folder))
    lens = load_lens(checkpoint, manifest)
    read = reader(tokenizer.decode, manifest["prompt"]["encoding"])
    tallies, samples, film = look(
        args.activations_dir, names, lens, read, args.max_samples, args.task
    )
    if not any(tally.tokens for tally in tallies.values()):
        raise UserError(
            f"{args.activations_dir} holds no state that an answer is predicted from: run it with "
            "--token_positions all, and generate or force answers"
        )
    layers = {name: tally.to_json() for name, tally in tallies.items()}
    write_result(args.output, json_lines({"layers": layers, "samples": samples}))
    print("  layer           log p  as said  right")
    for name, line in layers.items():
        shares = [
            f"{line[k]:7.1%}" if line[k] is not None else "      ?" for k in ("as_said", "right")
        ]
        print(f"  {name:14}{line['logprob']:7.3f} {' '.join(shares)}")
    print(f"{args.output}: {len(samples)} answers")
    if film is None:
        print("no answer there holds a grid, so there is no page")
        return
    write_result(args.output.with_suffix(".html"), film_page(film, read, tokenizer.decode))
    print(f"{args.output.with_suffix('.html')}: open it in a browser")


if __name__ == "__main__":
    cli.run(main, build_parser())
