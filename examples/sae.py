"""Sparse autoencoders on layers' activations, in JAX, in the form that SAELens reads.

    python examples/sae.py --activations_dir results/activations --layer 11 --output_dir sae

By default the K largest latents of a row are active, as in Gao et al. (2024), "Scaling and
evaluating sparse autoencoders"; `--arch` has two other rules. A tenth of the tasks is held out, and
on it are measured the explained variance, the number of active latents (L0), the share of latents
that never fire, and the number of those that fire on more than half of the rows. Training ends, and
keeps its best, when the explained variance there falls by more than 5 points below its best.
"""

# N rows   D input width

import argparse
import logging
import os
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from hashlib import sha256
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

sys.path.insert(0, str(Path(__file__).parents[1]))

from examples.probe import held_out_tasks
from utils import cli
from utils.errors import UserError, some
from utils.model.capture import HOOK_POINTS
from utils.shards.items import to_float32
from utils.shards.manifest import differences
from utils.store.local import check_writable
from utils.store.text import read_json

if TYPE_CHECKING:
    from utils.dataset import ActivationDataset
    from utils.dataset.shuffle import ActivationRows
    from utils.model.autoencoder import Autoencoder

log = logging.getLogger(__name__)

HELD_OUT = 10  # one task in so many


@dataclass(frozen=True)
class SaeConfig:
    """arch: which rule says what latents are active. width: latents. k: of them active in a row, in
    batchtopk and jumprelu on average. dead_steps: after so many steps without firing a latent
    counts as dead, and `aux_k` of them try to explain what is left over, with the weight
    `aux_coefficient`."""

    arch: str = "topk"
    width: int = 1024
    k: int = 32
    steps: int = 2000
    batch_size: int = 1024
    learning_rate: float = 2e-3
    aux_k: int = 64
    aux_coefficient: float = 1 / 32
    dead_steps: int = 100
    seed: int = 0


def progress_file(folder: Path) -> Path:
    """Where a training that was stopped before it could make `folder` is kept."""
    return Path(f"{os.path.abspath(folder)}.training.safetensors")  # of `.` too


def settings(dataset: "ActivationDataset", config: SaeConfig) -> dict[str, Any]:
    """What an autoencoder's cfg.json says of how it was trained."""
    return {
        "activation": dataset.name,
        "selection": repr(dataset.selection),
        "drop_sinks": dataset.selection.drop_sinks,
        "left_out": dict(dataset.left_out),
        "training": asdict(config),
    }


def check_same(folder: Path, now: dict[str, Any]) -> None:
    """Raises UserError where the autoencoder there was trained otherwise than `now` says."""
    from utils.model.autoencoder import CONFIG

    about = read_json(folder / CONFIG)
    about = about.get("metadata") if isinstance(about, dict) else None
    if not isinstance(about, dict) or "training" not in about:
        raise UserError(
            f"{folder / CONFIG} does not say how it was trained: choose another folder, or move "
            f"{folder} away"
        )
    # Not the selection, in which a layer may be counted from the end. Older files lack some.
    said = [name for name in ("activation", "drop_sinks", "training") if name in about]
    if changes := differences(*({name: given[name] for name in said} for given in (about, now))):
        raise UserError(
            f"{folder} was made with other settings: {some(changes)}; go back to the former, or "
            "choose another folder"
        )


def check_new(folder: Path, resume: bool, now: dict[str, Any]) -> bool:
    """Whether an autoencoder is still to be made there; now: its `settings`. Raises UserError where
    something is in the way, an autoencoder of other settings among them, or a training was stopped
    that is not to be resumed."""
    from utils.model.autoencoder import CONFIG

    stopped = progress_file(folder)
    if resume and (folder / CONFIG).exists():
        check_same(folder, now)
        stopped.unlink(missing_ok=True)  # the process may have ended between making one and this
        return False
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise UserError(f"{folder} exists: choose another folder, or move it away")
    if stopped.exists() and not resume:
        raise UserError(
            f"{stopped} is of a training that was stopped: --resume goes on with it, and without "
            "the file it begins anew"
        )
    check_writable(folder)
    return True


def split(rows: "ActivationRows", task_ids: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
    """Activations to train on, and those of a tenth of the tasks, at least one, as stored.

    task_ids: of `rows.samples`. A task is held out with all its test inputs and views, by its id
    alone. Raises UserError for rows of one task.
    """
    chosen = held_out_tasks(task_ids, HELD_OUT)
    held_out = np.array([task in chosen for task in task_ids])
    return rows.activations[~held_out], rows.activations[held_out]


def normalisation(rows: np.ndarray) -> tuple[np.ndarray, float]:
    """The mean of rows [N, D], float32 [D], and the root of their mean squared distance to it."""
    center = rows.mean(axis=0, dtype=np.float64).astype(np.float32)
    parts = (rows[i : i + 65536] for i in range(0, len(rows), 65536))
    squares = sum(float(((to_float32(p) - center) ** 2).sum(dtype=np.float64)) for p in parts)
    return center, float(np.sqrt(squares / rows.size)) or 1.0


def check_config(config: SaeConfig, dataset: "ActivationDataset", devices: int = 1) -> None:
    """Raises UserError where an autoencoder does not fit its input or the devices."""
    import jax

    if config.width < dataset.width:
        raise UserError(
            f"an SAE of {config.width} latents is narrower than its input of {dataset.width}: "
            f"give a width of at least {dataset.width}, usually four times that and more"
        )
    if not 0 < config.k <= config.width:
        raise UserError(f"k {config.k} is not between 1 and the width {config.width}")
    if devices > len(jax.devices()):
        raise UserError(f"--mesh {devices} is more than the {len(jax.devices())} devices there are")
    if config.batch_size % devices:
        raise UserError(f"a batch of {config.batch_size} rows does not go into {devices} devices")


def fit(
    dataset: "ActivationDataset",
    config: SaeConfig,
    rows: "ActivationRows | None" = None,
    devices: int = 1,
    file: Path | None = None,
    stopping: Callable[[], bool] = lambda: False,
) -> tuple["Autoencoder", dict[str, Any]] | None:
    """Train on `rows` of a dataset, by default all, and measure on what is held out.

    file: where the training is kept while it lasts, and from which it goes on. None is returned
    where `stopping` has become true before the end. Raises UserError where the autoencoder does not
    fit its input or the rows are too few.
    """
    from examples.sae_training import Trainer, alike, measure, train

    check_config(config, dataset, devices)
    if rows is None:
        rows = dataset.rows()
    train_rows, held_out = split(rows, [dataset.samples[i][0] for i in rows.samples])
    if len(train_rows) < config.batch_size:
        raise UserError(
            f"{len(train_rows)} rows to train on are fewer than a batch of {config.batch_size}: "
            "extract more tasks, or lower the batch size"
        )
    del rows
    trainer = Trainer(config, *normalisation(train_rows), devices)
    digest = sha256(np.ascontiguousarray(train_rows)).hexdigest()
    begun = {"activation": dataset.name, **asdict(config), "rows": digest}
    progress = train(trainer, train_rows, held_out, file, begun, stopping)
    if progress.steps < config.steps and not progress.fallen:
        return None
    sae = replace(trainer.autoencoder(progress.state), hook=dataset.name)
    if progress.fallen:
        log.warning(
            "ended after %d of %d steps: the explained variance on held-out tasks had fallen more "
            "than 5 points below its best, %.1f%%, which is kept",
            *(progress.steps, config.steps, 100 * progress.best_variance),
        )
        sae = replace(sae, weights=progress.best)
    found = {**measure(sae, held_out), "alike": alike(sae.weights["w_dec"])}
    return sae, {**found, "steps": progress.steps}


def write(
    folder: Path, sae: "Autoencoder", dataset: "ActivationDataset", config: SaeConfig, found: Any
) -> None:
    """The folder of an autoencoder that was trained, with how it was trained and what was found."""
    sae.save(folder, {**settings(dataset, config), "held_out": found})


def describe(found: dict[str, Any]) -> str:
    """What was measured, in a line."""
    return (
        f"explained variance {found['explained_variance']:.1%}, L0 {found['l0']:.1f}, "
        f"dead latents {found['dead_fraction']:.1%}, {found['often_active']} latents active on "
        f"more than half of the rows, {found['alike']} pairs of alike decoder rows"
    )


def build_parser() -> cli.Parser:
    parser = cli.Parser(__doc__)
    parser.add_argument(
        "--activations_dir", required=True, help="of a run: a folder or gs://BUCKET/PREFIX"
    )
    layers = parser.add_mutually_exclusive_group(required=True)
    layers.add_argument("--layer", type=int, help="from 0; negative from the end of those captured")
    layers.add_argument(
        "--layers",
        type=int,
        nargs="+",
        help="several, in one pass over the shards, each with the "
        "same result as alone, in a folder of its own below --output_dir, such as resid_post.11",
    )
    parser.add_argument(
        "--hook_point", default="resid_post", choices=HOOK_POINTS, help="where in the layer"
    )
    parser.add_argument(
        "--output_dir", type=Path, required=True, help="folder to make, for the SAE"
    )
    parser.add_argument(
        "--arch",
        choices=("topk", "batchtopk", "jumprelu"),
        default=SaeConfig.arch,
        help="which latents are active: the k largest of a row, of a batch the k largest a row on "
        "average, or those above a threshold that is learned",
    )
    for name, default, words in (
        ("width", SaeConfig.width, "latents, at least the input's width"),
        ("k", SaeConfig.k, "latents that are active in a row, but for topk on average"),
        ("steps", SaeConfig.steps, "updates"),
        ("batch_size", SaeConfig.batch_size, "rows an update"),
        ("seed", SaeConfig.seed, "of weights and order"),
        ("mesh", 1, "devices that share a batch"),
        ("max_rows", 1_000_000, "rows taken of each layer, drawn at random; in memory twice"),
    ):
        lowest = 0 if name == "seed" else 1
        parser.add_argument(f"--{name}", type=cli.int_at_least(lowest), default=default, help=words)
    parser.add_argument(
        "--drop_sinks",
        type=cli.float_at_least(0),
        default=10.0,
        help="leave out attention sinks, rows whose norm is more than so many times the median; 0 "
        "keeps them, and they alone then make up most of the variance of many models",
    )
    parser.add_argument(
        "--resume",
        action="store_true",
        help="go on with a training that was stopped; what is made already, with "
        "the same settings, stays as it is",
    )
    return parser


def main(args: argparse.Namespace, signals: cli.Signals) -> None:
    from utils.dataset import ActivationDataset, Selection
    from utils.dataset.select import rows_of

    given = {name: getattr(args, name) for name in SaeConfig.__annotations__ if hasattr(args, name)}
    config, sinks, todo = SaeConfig(**given), args.drop_sinks or None, {}
    for layer in args.layers or [args.layer]:
        selection = Selection(layer, args.hook_point, drop_special=True, drop_sinks=sinks)
        dataset = ActivationDataset(args.activations_dir, selection)
        folder = args.output_dir / dataset.name if args.layers else args.output_dir
        check_config(config, dataset, args.mesh)
        if check_new(folder, args.resume, settings(dataset, config)):
            todo[folder] = dataset
        else:
            print(f"{folder}: made already")
    if not todo:
        return
    rows = rows_of(list(todo.values()), args.max_rows, config.seed)
    signals.hold()
    for folder, dataset in todo.items():
        file, stopping = progress_file(folder), lambda: signals.signum is not None
        folder.parent.mkdir(parents=True, exist_ok=True)
        made = fit(dataset, config, rows.pop(0), args.mesh, file, stopping)
        if made is None:
            log.info("%s keeps the training so far: --resume goes on with it", file)
            signals.check()
        write(folder, made[0], dataset, config, made[1])
        file.unlink(missing_ok=True)
        print(f"{folder}: {describe(made[1])} on held-out tasks")


if __name__ == "__main__":
    cli.run(main, build_parser())
