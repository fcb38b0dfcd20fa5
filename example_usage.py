"""The whole pipeline in a minute, offline: tasks in, activations and a picture out.

    python example_usage.py

Writes a few tasks and a tiny model with random weights, runs the scripts on them as a user would,
and shows what they stored. Nothing is downloaded. To see what a run of your own stored, on a disk
or in a bucket:

    python example_usage.py --activations_dir gs://your-bucket/arc-activations
"""

import argparse
import json
import os
import pickle
import shlex
import signal
import string
import subprocess
import sys
import textwrap
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from hashlib import sha256
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from tqdm import tqdm

from utils.cli import Interrupted, Parser, Signals, run
from utils.errors import UserError
from utils.items import CELL_COLUMNS
from utils.manifest import read_manifest, write_json
from utils.shards import iter_items

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from transformers import PreTrainedTokenizerFast

SCRIPTS = Path(__file__).parent
RECORD = ".example_usage.json"  # path -> sha256 of each file that the example made
MADE = ("rows.jsonl", "model", "arc_data", "results", "teacher_forced", "mesh", "picture.png")
FOUR_CPUS = {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": "--xla_force_host_platform_device_count=4"}

CHATML = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}"
    "<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
MODEL = {
    "architectures": ["Qwen2ForCausalLM"],
    "model_type": "qwen2",
    "hidden_size": 64,
    "intermediate_size": 192,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 2048,
    "rms_norm_eps": 1e-6,
    "rope_theta": 10000.0,
    "tie_word_embeddings": False,
}


def build_parser() -> Parser:
    parser = Parser(__doc__)
    parser.add_argument(
        "--output_dir", type=Path, default=Path("example_run"), help="folder for all that is made"
    )
    parser.add_argument(
        "--overwrite",
        action="store_true",
        help="replace an earlier run of this example; other files in the folder stay",
    )
    parser.add_argument(
        "--activations_dir",
        metavar="DIR|gs://BUCKET/PREFIX",
        help="run nothing, and show what a run stored there, verified as it is read (default: run "
        "the example)",
    )
    return parser


def digests(folder: Path, names: Iterable[str]) -> dict[str, str]:
    """Path below `folder` -> sha256 of every file that is one of `names` or lies below one."""
    files = [p for n in names for p in (folder / n, *(folder / n).rglob("*")) if p.is_file()]
    return {p.relative_to(folder).as_posix(): sha256(p.read_bytes()).hexdigest() for p in files}


def clear(folder: Path, overwrite: bool) -> None:
    """Delete an earlier run of the example; refuse, before that, what it has not made."""
    if not folder.exists() or not any(folder.iterdir()):
        return
    other = "or choose another --output_dir"
    if not overwrite:
        raise UserError(f"{folder} exists: add --overwrite to replace the example in it, {other}")
    record = folder / RECORD
    made = json.loads(record.read_text()) if record.exists() else {}
    found = digests(folder, made or MADE)
    if foreign := [path for path in found if found[path] != made.get(path)]:
        raise UserError(
            f"{folder / foreign[0]} is not as this example leaves it: move it away, {other}"
        )
    for path in found:
        (folder / path).unlink()
        for parent in (folder / path).parents:
            if parent == folder or any(parent.iterdir()):
                break
            parent.rmdir()
    record.unlink(missing_ok=True)


@contextmanager
def recorded(folder: Path) -> Iterator[None]:
    """Note what is made in `folder` meanwhile, also when that ends early, for --overwrite."""
    foreign = digests(folder, MADE)
    try:
        yield
    finally:
        made = {path: d for path, d in digests(folder, MADE).items() if path not in foreign}
        write_json(folder / RECORD, made)


def example_rows(seed: int = 5) -> list[dict[str, Any]]:
    """Rows of four rules, two of each; then one row a second time, and one that holds no task."""
    random = np.random.default_rng(seed)
    rules = {
        "mirror": lambda grid, _: grid[:, ::-1],
        "transpose": lambda grid, _: grid.T,
        "recolour": lambda grid, new_colors: new_colors[grid],
        "gravity": lambda grid, _: np.take_along_axis(
            grid, np.argsort(grid != 0, axis=0, kind="stable"), axis=0
        ),
    }
    rows = []
    for name, rule in [*rules.items()] * 2:
        colors = random.permutation(np.arange(1, 10))[:4]
        new_colors = np.array([0, *random.permutation(np.arange(1, 10))])
        examples = []
        for _ in range(random.integers(3, 5)):
            shape = random.integers(4, 8, 2)
            grid = np.where(random.random(shape) < 0.45, random.choice(colors, shape), 0)
            examples.append([grid.tolist(), rule(grid, new_colors).tolist()])
        rows.append({"source": name, "examples": examples, "seeds": []})
    broken = {"source": "broken", "examples": [[[[0, 12]], [[12, 0]]], [[[1]], [[2]]]], "seeds": []}
    return [*rows[:3], rows[0], broken, *rows[3:]]


def character_tokenizer() -> "PreTrainedTokenizerFast":
    """One token a character of printable ASCII, and the special tokens of ChatML."""
    from tokenizers import Tokenizer, decoders, models
    from transformers import PreTrainedTokenizerFast

    characters = ["\n", " ", *string.digits, *string.ascii_letters, *string.punctuation]
    backend = Tokenizer(models.BPE({token: i for i, token in enumerate(characters)}, []))
    backend.decoder = decoders.Fuse()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend,
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        extra_special_tokens=["<|im_start|>"],
    )
    tokenizer.chat_template = CHATML
    return tokenizer


def write_inputs(folder: Path) -> None:
    from utils.weights import write_random_checkpoint

    rows, tokenizer = example_rows(), character_tokenizer()
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    fields = {**MODEL, "vocab_size": len(tokenizer), "eos_token_id": tokenizer.eos_token_id}
    write_random_checkpoint(folder / "model", fields)
    tokenizer.save_pretrained(folder / "model")
    print(f"{len(rows)} rows in {folder / 'rows.jsonl'}")
    size = f"{MODEL['num_hidden_layers']} layers, {MODEL['hidden_size']} wide, random weights"
    print(f"{size}, and a tokenizer of {len(tokenizer)} tokens in {folder / 'model'}")


def show_command(
    name: str, *flags: Sequence[str | int | Path], env: Mapping[str, str] | None = None
) -> None:
    path = SCRIPTS / name
    shown = path.relative_to(Path.cwd()) if path.is_relative_to(Path.cwd()) else path
    words = [[str(shown)], *([str(word) for word in flag] for flag in flags)]
    surroundings = "".join(f"{key}={value} \\\n  " for key, value in (env or {}).items())
    print(f"$ {surroundings}python " + " \\\n      ".join(map(shlex.join, words)))


def script(
    name: str, *flags: Sequence[str | int | Path], env: Mapping[str, str] | None = None
) -> None:
    """Print a command and run it; its output and its progress bar go where ours go."""
    show_command(name, *flags, env=env)
    print(flush=True)
    command = [sys.executable, SCRIPTS / name, *(str(word) for flag in flags for word in flag)]
    with subprocess.Popen(command, env={**os.environ, **(env or {})}) as child:
        try:
            code = child.wait()
        except Interrupted as stop:
            if stop.signum == signal.SIGTERM:  # Ctrl-C reaches the child by itself
                child.terminate()
            child.wait()
            raise
    if code == 141:  # the reader of our output has left
        raise BrokenPipeError
    if code:
        raise UserError(f"{name} ended with exit code {code}, see above", exit_code=1)


def infer(folder: Path, name: str, *flags: Sequence[str | int]) -> None:
    script(
        "simple_extraction_inference.py",
        ("--model_path", folder / "model"),
        ("--dataset_path", folder / "arc_data" / "arc_format_train.json"),
        ("--output_path", folder / name / "predictions.json"),
        ("--activations_dir", folder / name / "activations"),
        ("--batch_size", 4),
        *flags,
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


def cell_grids(item: dict[str, Any], name: str, role: int) -> tuple[np.ndarray, np.ndarray]:
    """Colors, and the activation norm of each cell (the mean over its tokens), [rows, cols] both.

    name: of the activations. role: 0 for the test input, 1 for the answer.
    """
    cells = item["cells"][(item["cells"][:, 0] == -1) & (item["cells"][:, 1] == role)]
    norms = np.linalg.norm(item["activations"][name].astype(np.float32), axis=1)
    grids = np.zeros((2, *cells[:, 2:4].max(axis=0) + 1), np.float32)
    for _, _, row, col, color, start, stop in cells:
        grids[:, row, col] = color, norms[start:stop].mean()
    return grids[0], grids[1]


def draw_cells(ax: "Axes", values: Any, title: str, edge: str, **colors: Any) -> Any:
    """A grid of squares, the first row on top."""
    rows, cols = np.shape(values)
    mesh = ax.pcolormesh(values, edgecolors=edge, linewidth=0.6, **colors)
    ax.set(aspect="equal", anchor="N", xticks=[], yticks=[], xlim=(0, cols), ylim=(rows, 0))
    ax.set_title(f"{title}, {rows} x {cols}")
    return mesh


def draw(item: dict[str, Any], forced: dict[str, Any], text: str, no_grid: str, path: Path) -> None:
    """Write the picture.

    item, forced: one sample of the generating and of the teacher-forced run. text: its answer.
    no_grid: why that is no grid, where `item["prediction"]` is None.
    """
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    from matplotlib.colors import ListedColormap

    from utils.encodings import PALETTE

    arc_colors = ListedColormap(np.frombuffer(PALETTE, np.uint8).reshape(10, 3) / 255)
    name = list(forced["activations"])[-1]
    grids, heat = zip(*(cell_grids(forced, name, role) for role in (0, 1)), strict=True)
    low, high = min(h.min() for h in heat), max(h.max() for h in heat)

    figure, axes = plt.subplots(2, 3, figsize=(11, 7.8), layout="constrained")
    figure.get_layout_engine().set(w_pad=0.15, h_pad=0.12)
    figure.suptitle(f"Task {forced['task_id']}", fontsize=15)
    titles = ("Test input", "Target", "Prediction")
    for ax, title, grid in zip(axes[0], titles, [*grids, item["prediction"]], strict=True):
        if grid is not None:
            draw_cells(ax, grid, title, "#606060", cmap=arc_colors, vmin=-0.5, vmax=9.5)
            continue
        ax.set_title(title)
        height, width = np.shape(forced["target"])
        ax.set(xticks=[], yticks=[], anchor="N", facecolor="#f2f2f2", box_aspect=height / width)
        ax.text(0.06, 0.88, no_grid[0].upper() + no_grid[1:], fontsize=11)
        lines = textwrap.wrap(text.replace("\n", "↵"), 27)[:10]
        style = {"va": "top", "family": "monospace", "color": "#606060", "parse_math": False}
        ax.text(0.06, 0.82, "\n".join(lines), **style)
    for ax, title, norm in zip(axes[1], ("Norms, test input", "Norms, target"), heat, strict=False):
        shades = draw_cells(ax, norm, title, "white", cmap="viridis", vmin=low, vmax=high)
    axes[1, 2].set_axis_off()
    axes[1, 2].set_box_aspect(1)
    bar = axes[1, 2].inset_axes([0.06, 0.72, 0.88, 0.07])
    figure.colorbar(shades, cax=bar, orientation="horizontal")
    bar.set_title(f"Norm of {name}", fontsize=11)
    key = axes[1, 2].inset_axes([0.06, 0.36, 0.88, 0.088])
    draw_cells(key, [range(10)], "", "#606060", cmap=arc_colors, vmin=-0.5, vmax=9.5)
    key.set_xticks(np.arange(10) + 0.5, range(10))
    key.tick_params(length=0)
    key.set_title("Colors", fontsize=11)
    note = "The weights are random: the prediction\nand the norms carry no meaning."
    axes[1, 2].text(0.5, 0.12, note, ha="center", va="center", style="italic")
    figure.savefig(path, dpi=120)
    plt.close(figure)


def show_results(folder: Path) -> None:
    from utils.prompts import load_format
    from utils.tokens import load_tokenizer

    heading("5. What was stored")
    show_shards(folder / "results" / "activations")
    generated, teacher_forced = (
        {item["task_id"]: item for item in iter_items(folder / name / "activations")}
        for name in ("results", "teacher_forced")
    )
    task_id = max(generated, key=lambda task_id: np.size(generated[task_id]["target"]))
    item, forced = generated[task_id], teacher_forced[task_id]
    tokenizer = load_tokenizer(folder / "model")
    text = tokenizer.decode(item["input_ids"][item["prompt_length"] :])
    reason = load_format("chat", None, tokenizer).parse(text).reason or ""
    no_grid = reason if reason.startswith("no grid") else f"no grid: {reason}"
    print(f"\nOne item of {folder / 'results' / 'activations'}:")
    show_item(item)
    print("Every token has one row in each activation array.")
    print("\nIts tokens where the test input begins, each with the cell that it holds:")
    show_tokens(item, tokenizer)
    print(f"\nIts answer ({no_grid if reason else 'a grid'}):\n  {text!r}")

    heading("6. A picture")
    path = folder / "picture.png"
    draw(item, forced, text, no_grid, path)
    print(f"{path}: input, target and prediction; the activation norm of each cell")


def show_run(place: str) -> None:
    """What a run stored in a folder or a bucket; one shard in memory at a time."""
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


def infer_on_mesh(folder: Path, *flags: Sequence[str | int]) -> None:
    """The run of step 4 on four virtual devices, and how far its states are from those."""
    script(
        "distributed_inference_with_activations.py",
        ("--model_path", folder / "model"),
        ("--dataset_path", folder / "arc_data" / "arc_format_train.json"),
        ("--output_filepath", folder / "mesh" / "submission.json"),
        ("--activations_dir", folder / "mesh" / "activations"),
        ("--extract_activations",),
        ("--mesh_shape", 2, 2),
        *flags,
        env=FOUR_CPUS,
    )
    one, mesh = (
        {(item["task_id"], item["sample_idx"]): item for item in iter_items(folder / name)}
        for name in ("results/activations", "mesh/activations")
    )
    same = [key for key in one if np.array_equal(one[key]["input_ids"], mesh[key]["input_ids"])]
    worst = max(
        float((np.linalg.norm(a - b, axis=-1) / np.linalg.norm(a, axis=-1)).max())
        for key in same
        for name in one[key]["activations"]
        for a, b in [[i[key]["activations"][name].astype(np.float32) for i in (one, mesh)]]
    )
    print(f"\n{len(same)} of {len(one)} answers are those of one device; of their states the one")
    print(f"that differs most does so by {worst:.0e} of its norm (stored as float16)")


def show_next(folder: Path) -> None:
    print(
        "The weights above are random, so predictions and norms carry no meaning. For real ones\n"
        "give the folder of a Llama, Mistral or Qwen checkpoint as --model_path, and a dataset of\n"
        "your own to the transformation. On the tasks above:\n"
    )
    show_command(
        "simple_extraction_inference.py",
        ("--model_path", "YOUR_MODEL_PATH"),
        ("--dataset_path", folder / "arc_data" / "arc_format_train.json"),
        ("--output_path", "results/predictions.json"),
        ("--activations_dir", "results/activations"),
    )


def main(args: argparse.Namespace, signals: Signals) -> None:
    folder = args.output_dir
    if args.activations_dir is not None:
        show_run(args.activations_dir)
        return
    try:
        clear(folder, args.overwrite)
        folder.mkdir(parents=True, exist_ok=True)
        with recorded(folder):
            heading("1. Example tasks, and a tiny model with random weights")
            write_inputs(folder)
            heading("2. Inspect the rows")
            script("test_transformation.py", ("--dataset", folder / "rows.jsonl"))
            heading("3. Rows -> ARC tasks")
            script(
                "transform_hf_to_arc.py",
                ("--dataset", folder / "rows.jsonl"),
                ("--output_dir", folder / "arc_data"),
            )
            heading("4. Predictions and activations")
            sampled = (("--max_output_tokens", 60), ("--temperature", 1))
            infer(folder, "results", *sampled, ("--save_every_n_samples", 4))
            print("\nThe same with the true answers in place of generated ones:\n")
            infer(folder, "teacher_forced", ("--teacher_forcing",))
            show_results(folder)
            heading("7. On a mesh of devices, here four virtual ones")
            infer_on_mesh(folder, *sampled)
            heading("8. With a model of your own")
            show_next(folder)
    except BrokenPipeError:
        raise
    except OSError as error:
        raise UserError(f"cannot write to {error.filename or folder}: {error.strerror}") from error


if __name__ == "__main__":
    run(main, build_parser())
