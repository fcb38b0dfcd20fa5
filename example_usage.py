"""The tour, offline, in three minutes: from a dataset to features that light up on grid cells.

    python example_usage.py

Inspects and transforms the example tasks, runs the small model that ships with this repository on
them, loads what was stored, asks what each layer knows, trains a sparse autoencoder, changes hidden
states to see what depends on them, and writes pages with pictures, example_run/report.html first.
Nothing is downloaded. To see what a run of your own stored, on a disk or in a bucket:

    python example_usage.py --activations_dir gs://your-bucket/arc-activations

To take the tour with a model of your own, on some of the tasks:

    python example_usage.py --model_path YOUR_MODEL_PATH
"""

import argparse
import json
import os
import pickle
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from utils.cli import Parser, Signals, run
from utils.errors import UserError
from utils.shards import iter_items
from utils.shards.items import CELL_COLUMNS
from utils.shards.manifest import read_manifest, stem
from utils.store.local import whole_name, write_json

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

SCRIPTS = Path(__file__).parent
MARKER = ".example_usage"  # in a folder that the example has made
RUNS = ("results/activations", "mesh/activations")
# Folder -> what the example makes there, besides the files of a run; the inner folders first.
NAMES = {
    "arc_data": {
        "arc_format_train.json",
        "test_outputs_train.json",
        "transformation_errors.json",
        "arc_format_held_out.json",
        "test_outputs_held_out.json",
    },
    "results/activations": {"activation_stats.json"},
    "results": {"predictions.json"},
    "mesh/activations": set(),
    "mesh": {"submission.json"},
    # The last two are what an earlier version of the example made.
    "sae": {"cfg.json", "sae_weights.safetensors", "config.json", "sae.safetensors"},
    "causes": {"causal_map.json", "causal_map.html"},
    "": {"report.html", "lens.json", "lens.html", "sae_evaluation.json"},
}
EXAMPLES = SCRIPTS / "examples"
ROWS = EXAMPLES / "tasks.jsonl"
PROBED = ("color", "row", "col", "role", "boundary")
FOUR_CPUS = {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": "--xla_force_host_platform_device_count=4"}


@dataclass(frozen=True)
class Model:
    """What the tour looks into: a folder, the layer in its middle, what a run of it is told, and
    how many tasks the mesh is given."""

    path: Path
    layer: int
    flags: dict[str, str | int]
    mesh_tasks: int


ARC_TINY = Model(
    EXAMPLES / "arc_tiny",
    3,
    {
        "--prompt_format": "compact",
        "--layers_to_extract": "all",
        "--max_output_tokens": 64,
        "--batch_size": 25,
    },
    16,
)


def model_at(path: Path | None) -> Model:
    """The model that ships, or one of the user's: larger, and so for fewer tasks and one layer."""
    from utils.model.config import ModelConfig
    from utils.model.files import model_folder

    if path is None:
        return ARC_TINY
    layer = ModelConfig.from_hf(model_folder(path)).num_layers // 2
    flags = {"--layers_to_extract": layer, "--max_output_tokens": 128, "--batch_size": 4}
    return Model(path, layer, {**flags, "--max_tasks": 16}, 4)


def build_parser() -> Parser:
    parser = Parser(__doc__)
    parser.add_argument(
        "--output_dir", type=Path, default=Path("example_run"), help="folder for all that is made"
    )
    parser.add_argument(
        "--overwrite",
        action="store_true",
        help="replace the files of an earlier run of this example, in the folder that it made; "
        "other files there stay",
    )
    parser.add_argument(
        "--model_path",
        type=Path,
        metavar="DIR",
        help="a model of your own, to take the tour with on 16 of the tasks (default: the one that "
        "ships, on all of them)",
    )
    parser.add_argument(
        "--activations_dir",
        metavar="DIR|gs://BUCKET/PREFIX",
        help="run nothing, and show what a run stored there, verified as it is read (default: run "
        "the example)",
    )
    return parser


def make_room(folder: Path, overwrite: bool) -> None:
    """Makes and marks the folder, or, where it is to be overwritten, deletes the files that the
    example names, also what is left of them after a kill, and the folders that are empty then.
    Raises UserError for a folder of somebody else's, or that is not to be overwritten."""
    folder.mkdir(parents=True, exist_ok=True)
    if not {path.name for path in folder.iterdir()} - {MARKER}:
        text = "Made by example_usage.py, whose --overwrite replaces its own files here.\n"
        (folder / MARKER).write_text(text)
        return
    if not (folder / MARKER).exists():
        raise UserError(
            f"{folder} holds files and no {MARKER}, as a folder of this example does: choose "
            "another --output_dir, or, if an earlier version of the example made it, delete it "
            "yourself"
        )
    if not overwrite:
        raise UserError(
            f"{folder} exists: add --overwrite to replace the example in it, or choose another "
            "--output_dir"
        )
    for place, names in NAMES.items():
        for path in (folder / place).glob("*"):
            of_run = place in RUNS and stem(path.name) is not None
            if path.is_file() and (of_run or whole_name(path.name) in names):
                path.unlink()
    for place in NAMES:
        with suppress(OSError):  # it is not there, or holds something else
            (folder / place).rmdir()


def shown(path: Path) -> Path:
    """As a user at this shell would write it."""
    return path.relative_to(Path.cwd()) if path.is_relative_to(Path.cwd()) else path


def show_command(
    name: str, *flags: Sequence[str | int | Path], env: Mapping[str, str] | None = None
) -> None:
    words = [[str(shown(SCRIPTS / name))], *([str(word) for word in flag] for flag in flags)]
    surroundings = "".join(f"{key}={value} \\\n  " for key, value in (env or {}).items())
    print(f"$ {surroundings}python " + " \\\n      ".join(map(shlex.join, words)))


def script(
    signals: Signals,
    name: str,
    *flags: Sequence[str | int | Path],
    env: Mapping[str, str] | None = None,
) -> None:
    """Print a command and run it; its output and its progress bar go where ours go."""
    show_command(name, *flags, env=env)
    print(flush=True)
    command = [sys.executable, SCRIPTS / name, *(str(word) for flag in flags for word in flag)]
    with subprocess.Popen(command, env={**os.environ, **(env or {})}) as child:
        while (code := child.poll()) is None:
            if signals.signum is not None:
                if signals.signum != signal.SIGINT:  # Ctrl-C reaches the child by itself
                    child.send_signal(signals.signum)
                child.wait()
                signals.check()
            time.sleep(0.1)
    if code == 141:  # the reader of our output has left
        raise BrokenPipeError
    if code:
        raise UserError(f"{name} ended with exit code {code}, see above", exit_code=1)


def infer(signals: Signals, folder: Path, model: Model) -> None:
    script(
        signals,
        "simple_extraction_inference.py",
        ("--model_path", shown(model.path)),
        ("--dataset_path", folder / "arc_data" / "arc_format_train.json"),
        ("--output_path", folder / "results" / "predictions.json"),
        ("--activations_dir", folder / "results" / "activations"),
        *model.flags.items(),
    )


def heading(text: str) -> None:
    print(f"\n--- {text} " + "-" * (95 - len(text)), flush=True)


def show_shards(folder: Path) -> None:
    """What plain pickle reads, as any program without this project would."""
    metadata = json.loads((folder / "metadata.json").read_text())
    print(f"total samples      {metadata['total_samples']}")
    print(f"total batches      {metadata['total_batches']}")
    logits = []
    for entry in metadata["files"]:
        with open(folder / entry["filename"], "rb") as file:
            items = pickle.load(file)  # a file of our own; load_shard is for those of others
        print(f"  {entry['filename']}, {entry['size_bytes']} bytes: {len(items)} items")
        logits += [item["output_logits"] for item in items]
    print(f"output_logits      {np.concatenate(logits, axis=0).shape}")


def show_item(item: dict[str, Any]) -> None:
    """Every entry of an item, arrays as dtype and shape."""
    arrays = {f"activations[{name!r}]": array for name, array in item["activations"].items()}
    for key, value in ({**item, **arrays}).items():
        if isinstance(value, np.ndarray):
            value = f"{value.dtype} {list(value.shape)}"
        elif isinstance(value, list):
            value = f"grid of {len(value)} x {len(value[0])}"
        if key != "activations":
            print(f"  {key:28} {value}")


def show_tokens(item: dict[str, Any], tokenizer: "PreTrainedTokenizerFast") -> None:
    """The tokens around the first row of the test input, each with the cells that it holds."""
    cells = [dict(zip(CELL_COLUMNS, map(int, cell), strict=True)) for cell in item["cells"]]
    row = [c for c in cells if (c["pair"], c["role"], c["row"]) == (-1, 0, 0)]
    print("  token    id  text   pair  role  row  col  color")
    for token in range(row[0]["token_start"] - 3, row[-1]["token_stop"] + 3):
        token_id = item["input_ids"][token]
        line = f"  {token:5}  {token_id:4}  {tokenizer.decode([token_id])!r:5}"
        for c in cells:
            if c["token_start"] <= token < c["token_stop"]:
                line += f"  {c['pair']:4}  {c['role']:4}  {c['row']:3}  {c['col']:3}"
                line += f"  {c['color']:5}"
        print(line.rstrip())


def show_results(folder: Path, model: Model) -> None:
    from utils.prompt.codec import load_tokenizer

    show_shards(folder)
    item = next((item for item in iter_items(folder) if item["correct"]), None)
    item = item or next(iter_items(folder))
    print(f"\nOne item of {folder}:")
    show_item(item)
    print("Every token has one row in each activation array.")
    print("\nIts tokens where the test input begins, each with the cell that it holds:")
    show_tokens(item, load_tokenizer(model.path))


def show_loaders(folder: Path, layer: int) -> None:
    """The same rows, selected and shuffled, as a program that trains on them reads them."""
    from utils.dataset import ActivationDataset, Selection
    from utils.dataset.stats import activation_stats

    known = activation_stats(folder)
    print("  activation      rows  mean norm  highest")
    for name, stats in known.items():
        print(f"  {name:13} {stats.count:6}  {stats.norm_mean:9.2f}  {stats.norm_max:7.2f}")
    solved = any(item["correct"] for item in iter_items(folder)) or None
    colored = Selection(layer, role="output", colors=range(1, 10), correct=solved)
    dataset = ActivationDataset(folder, colored)
    batch = next(dataset.batches(64, shuffle_buffer=2048))
    print(f"\nOf {'solved' if solved else 'all'} tasks, the cells of output grids but black ones:")
    print(f"  {dataset.name}: {batch.activations.dtype} {list(batch.activations.shape)}")
    print("  pair, role, row, col, color of the first: ", batch.cells[0].tolist())


def train_sae(folder: Path, layer: int) -> dict[str, Any]:
    """What the report shows of an autoencoder: what was measured of it, its input's name, the cells
    of the run, its latents there, and those of them that a program names."""
    import jax

    from examples.features import chosen, encoded, name_latents, read_cells
    from examples.sae import SaeConfig, describe, fit, write
    from utils.dataset import ActivationDataset, Selection

    # An accelerator belongs to one process at a time: it stays free for the scripts that follow.
    jax.config.update("jax_platforms", "cpu")
    activations = folder / "results" / "activations"
    dataset = ActivationDataset(activations, Selection(layer, drop_special=True))
    width = max(SaeConfig.width, dataset.width)
    config = SaeConfig(width=width, steps=1200, batch_size=512)
    sae, measured = fit(dataset, config)
    write(folder / "sae", sae, dataset, config, measured)
    print(f"{folder / 'sae'}: {describe(measured)} on held-out tasks")
    cells = read_cells(activations, dataset.name)
    latents = encoded(sae.encode, cells.rows.activations)
    features = chosen(name_latents(latents, cells))
    print("\nLatents, and the program that says best where each is active:")
    for feature in features:
        print(f"  {feature}")
    found = {"sae": measured, "name": dataset.name, "cells": cells}
    return {**found, "latents": latents, "features": features}


def read_off(signals: Signals, folder: Path) -> dict[str, Any]:
    """Target -> what a linear classifier reads off each layer."""
    from examples.probe import probe

    found = {}
    for target in PROBED:
        found[target] = probe(folder, target)
        signals.check()
    print("  activation " + "".join(f"{target:>18}" for target in found))
    for name in found[PROBED[0]]:
        lines = (
            f"{line[name]['score']:.0%} ({line[name]['chance']:.0%})" for line in found.values()
        )
        print(f"  {name:11}" + "".join(f"{line:>18}" for line in lines))
    return found


def report(folder: Path, found: dict[str, Any]) -> None:
    """found: what `read_off` and `train_sae` give, by the names of `Findings`."""
    from tqdm import tqdm

    from examples.report import Findings, write_report
    from utils.arc.rows import to_task
    from utils.dataset.contrast import contrast

    activations = folder / "results" / "activations"
    items = list(tqdm(iter_items(activations), desc="reading", unit=" samples"))
    about = {}
    for line in ROWS.read_text().splitlines():
        row = json.loads(line)
        task, _ = to_task(row, "examples")
        about[task.task_id] = row["source"].splitlines()[1].removeprefix("# description: ")
    both = {item["correct"] for item in items} >= {True, False}
    findings = Findings(
        manifest=read_manifest(activations),
        items=items,
        about=about,
        contrast=contrast(activations) if both else None,
        **found,
    )
    write_report(folder / "report.html", findings)
    print(f"{folder / 'report.html'}: open it in a browser")


def show_run(place: str) -> None:
    """What a run stored in a folder or a bucket; one shard in memory at a time."""
    from tqdm import tqdm

    manifest = read_manifest(place)
    size = sum(entry["size_bytes"] for entry in manifest["files"])
    print(f"run                {place}: {manifest['status']}")
    print(f"model              {manifest['model']['path']}")
    print(f"total samples      {manifest['total_samples']}")
    print(f"total batches      {manifest['total_batches']}, {size} bytes")
    first, rows, norms = None, {}, {}
    for item in tqdm(iter_items(place), total=manifest["total_samples"], unit=" samples"):
        first = first or item
        for name, states in item["activations"].items():
            rows[name] = rows.get(name, 0) + len(states)
            total = np.linalg.norm(states.astype(np.float32), axis=1).sum(dtype=np.float64)
            norms[name] = norms.get(name, 0.0) + total
    if first is None:
        return
    for name in rows:
        width, mean = manifest["activations"][name]["width"], norms[name] / rows[name]
        print(f"{name:18} {rows[name]} rows, {width} wide, mean norm {mean:.4g}")
    print("\nIts first item:")
    show_item(first)


def reads(tasks: Path, model: Model) -> list[tuple[str, Any]]:
    """The flags of a script that runs the model on tasks again."""
    return [
        ("--model_path", shown(model.path)),
        ("--dataset_path", tasks),
        *((name, value) for name, value in model.flags.items() if name == "--prompt_format"),
    ]


def survives(signals: Signals, folder: Path, model: Model) -> dict[str, Any]:
    """What the model still gets right with reconstructions in the place of its states, of tasks
    that the autoencoder was not trained on."""
    from examples.probe import held_out_tasks
    from examples.sae import HELD_OUT

    files, data = read_manifest(folder / "results" / "activations")["files"], folder / "arc_data"
    ran = {key[0] for entry in files for key in entry["samples"]}
    trained_on = ran - held_out_tasks(ran, HELD_OUT)
    for kind in ("arc_format", "test_outputs"):
        tasks = json.loads((data / f"{kind}_train.json").read_text())
        held_out = {task: tasks[task] for task in tasks if task not in trained_on}
        write_json(data / f"{kind}_held_out.json", held_out)
    script(
        signals,
        "examples/evaluate_sae.py",
        ("--sae", folder / "sae"),
        ("--hook_point", f"resid_post.{model.layer}"),
        *reads(data / "arc_format_held_out.json", model),
        ("--max_tasks", model.mesh_tasks),
        ("--batch_size", 4),
        ("--max_output_tokens", model.flags["--max_output_tokens"]),
        ("--generate",),
        ("--output", folder / "sae_evaluation.json"),
    )
    return json.loads((folder / "sae_evaluation.json").read_text())


def causes(signals: Signals, folder: Path, model: Model) -> None:
    """On which cells of its test input an answer hangs, of a task that is solved if one is."""
    activations = folder / "results" / "activations"
    task = next((item["task_id"] for item in iter_items(activations) if item["correct"]), None)
    script(
        signals,
        "examples/causal_map.py",
        *reads(folder / "arc_data" / "arc_format_train.json", model),
        ("--task", task or next(iter_items(activations))["task_id"]),
        ("--layers", model.flags["--layers_to_extract"]),
        ("--sources", "test"),
        ("--output", folder / "causes"),
    )


def infer_on_mesh(signals: Signals, folder: Path, model: Model) -> None:
    """Some of the tasks on four virtual devices, and how far their states are from step 4's."""
    script(
        signals,
        "distributed_inference_with_activations.py",
        ("--model_path", shown(model.path)),
        ("--dataset_path", folder / "arc_data" / "arc_format_train.json"),
        ("--output_filepath", folder / "mesh" / "submission.json"),
        ("--activations_dir", folder / "mesh" / "activations"),
        ("--extract_activations",),
        *{
            **model.flags,
            "--layers_to_extract": model.layer,
            "--max_tasks": model.mesh_tasks,
        }.items(),
        ("--mesh_shape", 2, 2),
        env=FOUR_CPUS,
    )
    one, mesh = (
        {(item["task_id"], item["sample_idx"]): item for item in iter_items(folder / name)}
        for name in ("results/activations", "mesh/activations")
    )
    same = [key for key in mesh if np.array_equal(one[key]["input_ids"], mesh[key]["input_ids"])]
    name = f"resid_post.{model.layer}"
    differences = [
        float((np.linalg.norm(a - b, axis=-1) / np.linalg.norm(a, axis=-1)).max())
        for key in same
        for a, b in [[i[key]["activations"][name].astype(np.float32) for i in (one, mesh)]]
    ]
    print(f"\n{len(same)} of {len(mesh)} answers are those of one device", end="")
    if differences:
        print("; of their states the one")
        print(f"that differs most does so by {max(differences):.0e} of its norm", end="")
    print()


def show_next() -> None:
    print(
        "Give the folder of a Llama, Mistral, Qwen or Gemma checkpoint as --model_path, and a\n"
        "dataset of your own to the transformation; see README.md. On the tasks above:\n"
    )
    show_command(
        "simple_extraction_inference.py",
        ("--model_path", "YOUR_MODEL_PATH"),
        ("--dataset_path", "example_run/arc_data/arc_format_train.json"),
        ("--output_path", "results/predictions.json"),
        ("--activations_dir", "results/activations"),
    )


def main(args: argparse.Namespace, signals: Signals) -> None:
    folder = args.output_dir
    if args.activations_dir is not None:
        if args.overwrite or args.model_path:
            raise UserError("--activations_dir shows a run: leave out --overwrite and --model_path")
        show_run(args.activations_dir)
        return
    model = model_at(args.model_path)
    signals.hold()  # what was made is noted for --overwrite
    try:
        make_room(folder, args.overwrite)
        heading("1. Inspect the rows of a dataset")
        script(signals, "test_transformation.py", ("--dataset", shown(ROWS)))
        heading("2. Rows -> ARC tasks")
        script(
            signals,
            "transform_hf_to_arc.py",
            ("--dataset", shown(ROWS)),
            ("--output_dir", folder / "arc_data"),
        )
        which = f"the model in {args.model_path}" if args.model_path else "the model that ships"
        heading(f"3. Predictions and activations, with {which}")
        infer(signals, folder, model)
        heading("4. What was stored")
        show_results(folder / "results" / "activations", model)
        signals.check()
        heading("5. Load it as training data")
        show_loaders(folder / "results" / "activations", model.layer)
        signals.check()
        heading("6. What can be read off each layer, and by chance")
        found = {"probes": read_off(signals, folder / "results" / "activations")}
        heading("7. Train a sparse autoencoder")
        found |= train_sae(folder, model.layer)
        signals.check()
        heading("8. What the model still gets right with the autoencoder's reconstructions")
        found["survival"] = survives(signals, folder, model)
        heading("9. A page of pictures")
        report(folder, found)
        heading("10. What each layer would say, if it were the last")
        script(
            signals,
            "examples/logit_lens.py",
            ("--model_path", shown(model.path)),
            ("--activations_dir", folder / "results" / "activations"),
            ("--output", folder / "lens.json"),
        )
        heading("11. Which cells of its puzzle an answer hangs on")
        causes(signals, folder, model)
        heading("12. On a mesh of devices, here four virtual ones")
        infer_on_mesh(signals, folder, model)
        heading("13. With a model of your own")
        show_next()
        pages = [folder / name for name in ("report.html", "lens.html", "causes/causal_map.html")]
        # A model whose answers are no grids has no lens.html.
        print(f"\nThe pictures: {', '.join(str(page) for page in pages if page.exists())}")
    except BrokenPipeError:
        raise
    except OSError as error:
        raise UserError(f"cannot write to {error.filename or folder}: {error.strerror}") from error


if __name__ == "__main__":
    run(main, build_parser())
