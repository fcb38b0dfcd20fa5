"""A TopK sparse autoencoder on one layer's activations, in JAX.

    python examples/sae.py --activations_dir results/activations --layer 11 --output_dir sae

Follows Gao et al. (2024), "Scaling and evaluating sparse autoencoders": the K largest latents, a
decoder of unit-norm rows, and an auxiliary loss by which dead latents learn what the others leave
over. Inputs are normalised: the mean of the training rows is taken away, and the deviations from it
are brought to unit mean square. A tenth of the tasks is held out, and on it are measured the
explained variance, the number of active latents (L0) and the share of latents that never fire.
"""

# B rows   D input width   F latents   K active latents   A auxiliary latents

import argparse
import json
import sys
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from hashlib import sha256
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

sys.path.insert(0, str(Path(__file__).parents[1]))

from utils import cli
from utils.errors import UserError
from utils.model.capture import HOOK_POINTS
from utils.shards.items import to_float32
from utils.store.local import check_writable, new_folder, write_json

if TYPE_CHECKING:
    import jax

    from utils.dataset import ActivationDataset
    from utils.dataset.shuffle import ActivationRows

HELD_OUT = 10  # one task in so many
WEIGHTS, CONFIG = "sae.safetensors", "config.json"


@dataclass(frozen=True)
class SaeConfig:
    """width: latents. k: of them active in a row. dead_steps: after so many steps without firing a
    latent counts as dead, and `aux_k` of them try to explain what is left over, with the weight
    `aux_coefficient`."""

    width: int = 1024
    k: int = 32
    steps: int = 2000
    batch_size: int = 1024
    learning_rate: float = 2e-3
    aux_k: int = 64
    aux_coefficient: float = 1 / 32
    dead_steps: int = 100
    seed: int = 0


@dataclass(frozen=True)
class Sae:
    """encoder: float32 [D, F]; bias: [F]; decoder: [F, D], rows of unit norm; center: [D] and scale
    bring an input x to (x - center) / scale; shift: [D], learned, is taken from that."""

    encoder: np.ndarray
    bias: np.ndarray
    decoder: np.ndarray
    shift: np.ndarray
    center: np.ndarray
    scale: float
    k: int

    def encode(self, rows: np.ndarray) -> np.ndarray:
        """Activations [B, D] -> latents, float32 [B, F], K of a row above zero, or fewer; more only
        where the K-th is there twice."""
        x = (to_float32(rows) - self.center) / np.float32(self.scale)
        return np.asarray(_latents(self._params(), x, self.k))

    def decode(self, latents: np.ndarray) -> np.ndarray:
        """Latents [B, F] -> activations, float32 [B, D]."""
        return (latents @ self.decoder + self.shift) * np.float32(self.scale) + self.center

    def _params(self) -> dict[str, Any]:
        return {n: getattr(self, n) for n in ("encoder", "bias", "decoder", "shift")}

    def save(self, folder: Path, about: dict[str, Any]) -> None:
        """Writes sae.safetensors and config.json. Raises UserError where `folder` has files."""
        from safetensors.numpy import save

        check_new(folder)
        tensors = {**self._params(), "center": self.center, "scale": np.float32([self.scale])}
        try:
            with new_folder(folder) as made:
                write_json(made / CONFIG, {"k": self.k, **about})
                content = save({n: np.ascontiguousarray(t) for n, t in tensors.items()})
                (made / WEIGHTS).write_bytes(content)
        except OSError as error:
            raise UserError(f"cannot write {folder}: {error.strerror}") from error


def load_sae(folder: str | Path) -> Sae:
    """Raises UserError where there is none."""
    from safetensors import SafetensorError
    from safetensors.numpy import load_file

    try:
        tensors = load_file(Path(folder) / WEIGHTS)
        k = json.loads((Path(folder) / CONFIG).read_text())["k"]
        return Sae(**{**tensors, "scale": float(tensors["scale"][0])}, k=k)
    except (OSError, SafetensorError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{folder} holds no autoencoder of this script: {error}") from error


def check_new(folder: Path) -> None:
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise UserError(f"{folder} exists: choose another folder, or move it away")
    check_writable(folder)


def _latents(params: Any, x: Any, k: int) -> "jax.Array":
    return top(_before(params, x), k)


def _before(params: Any, x: Any) -> "jax.Array":
    """What the largest are chosen from: [B, D] -> [B, F], none below zero."""
    import jax

    return jax.nn.relu((x - params["shift"]) @ params["encoder"] + params["bias"])


def top(values: Any, k: int) -> "jax.Array":
    """Values >= 0, float32 [B, F], all but the `k` largest of each row set to zero; equal to the
    smallest of those, all are kept.

    The k-th largest is found bit by bit, since floats above zero are ordered as their bits are;
    `jax.lax.top_k` would sort each row.
    """
    import jax
    import jax.numpy as jnp

    bits = jax.lax.bitcast_convert_type(values, jnp.int32)

    def bit(i: Any, threshold: Any) -> Any:
        higher = threshold | (1 << (30 - i))
        enough = (bits >= higher).sum(axis=1, keepdims=True) >= k
        return jnp.where(enough, higher, threshold)

    threshold = jax.lax.fori_loop(0, 31, bit, jnp.zeros((len(values), 1), jnp.int32))
    return jnp.where(bits >= threshold, values, 0)


def initial(width: int, inputs: int, seed: int) -> dict[str, np.ndarray]:
    """Decoder rows drawn from the sphere; the encoder begins as their transpose."""
    random = np.random.default_rng(seed)
    decoder = random.standard_normal((width, inputs), dtype=np.float32)
    decoder /= np.linalg.norm(decoder, axis=1, keepdims=True)
    return {
        "encoder": decoder.T.copy(),
        "bias": np.zeros(width, np.float32),
        "decoder": decoder,
        "shift": np.zeros(inputs, np.float32),
    }


def train(
    batches: Iterator[np.ndarray], center: np.ndarray, scale: float, config: SaeConfig
) -> Sae:
    """batches: activations [B, D], all of one size, at least `config.steps` of them."""
    import jax
    import jax.numpy as jnp
    import optax
    from tqdm import tqdm

    D, F = len(center), config.width
    decay = optax.linear_schedule(config.learning_rate, 0, max(1, config.steps // 4))
    warm = min(50, config.steps // 4)
    schedule = optax.join_schedules(
        [
            optax.linear_schedule(0, config.learning_rate, warm),
            optax.constant_schedule(config.learning_rate),
            decay,
        ],
        [warm, config.steps - config.steps // 4],
    )
    tx = optax.adam(schedule, b1=0.9, b2=0.999)
    center, scale = np.asarray(center, np.float32), np.float32(scale)

    def loss(params: Any, x: Any, silent: Any) -> tuple[Any, Any]:
        before = _before(params, x)
        latents = top(before, config.k)
        error = x - params["shift"] - latents @ params["decoder"]
        main = (error**2).sum() / (x**2).sum()  # of training rows, whose mean is zero
        # The dead latents see what is left over, as if they were the only ones.
        dead = silent >= config.dead_steps
        second = top(jnp.where(dead, before, 0), min(config.aux_k, F))
        left = jax.lax.stop_gradient(error)
        missed = ((left - second @ params["decoder"]) ** 2).sum() / (left**2).sum()
        auxiliary = jnp.where(dead.any(), jnp.nan_to_num(missed), 0)
        return main + config.aux_coefficient * auxiliary, ((latents > 0).any(axis=0), main)

    @partial(jax.jit, donate_argnums=(0, 1, 2))
    def step(params: Any, state: Any, silent: Any, rows: Any) -> Any:
        x = (rows.astype(jnp.float32) - center) / scale
        gradient, (fired, main) = jax.grad(loss, has_aux=True)(params, x, silent)
        rows = params["decoder"]
        along = (gradient["decoder"] * rows).sum(axis=1, keepdims=True)
        gradient["decoder"] -= along * rows  # what would change their norm alone
        updates, state = tx.update(gradient, state, params)
        params = optax.apply_updates(params, updates)
        norms = jnp.linalg.norm(params["decoder"], axis=1, keepdims=True)
        params["decoder"] /= norms
        return params, state, jnp.where(fired, 0, silent + 1), main

    params = jax.tree.map(jnp.asarray, initial(F, D, config.seed))
    state, silent = tx.init(params), jnp.zeros(F, jnp.int32)
    bar = tqdm(total=config.steps, desc="training the SAE", unit="step")
    for number, rows in zip(range(config.steps), batches, strict=False):
        params, state, silent, unexplained = step(params, state, silent, rows)
        if number % 50 == 0:
            dead = int((silent >= config.dead_steps).sum())
            said = f"unexplained {float(unexplained):.3f}, dead {dead}"
            bar.set_postfix_str(said, refresh=False)
        bar.update()
    bar.close()
    trained = {name: np.asarray(value) for name, value in params.items()}
    return Sae(**trained, center=center, scale=float(scale), k=config.k)


def measure(sae: Sae, rows: np.ndarray) -> dict[str, float]:
    """On rows [N, D] that were not trained on.

    explained_variance: 1 - squared error over the squared distance to the rows' mean. l0: active
    latents of a row, mean. dead_fraction: latents that are active in none of the rows.
    """
    fired = np.zeros(sae.decoder.shape[0], bool)
    mean = rows.mean(axis=0, dtype=np.float64).astype(np.float32)
    error = total = active = 0.0
    for start in range(0, len(rows), 4096):
        part = to_float32(rows[start : start + 4096])
        latents = sae.encode(part)
        error += float(((part - sae.decode(latents)) ** 2).sum(dtype=np.float64))
        total += float(((part - mean) ** 2).sum(dtype=np.float64))
        active += int((latents > 0).sum())
        fired |= (latents > 0).any(axis=0)
    return {
        "explained_variance": 1 - error / total,
        "l0": active / len(rows),
        "dead_fraction": float(1 - fired.mean()),
    }


def split(rows: "ActivationRows", task_ids: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
    """Activations to train on, and those of a tenth of the tasks, at least one, as stored.

    task_ids: of `rows.samples`. A task is held out with all its test inputs and views, by its id
    alone. Raises UserError for rows of one task.
    """
    tasks = sorted(set(task_ids), key=lambda task: sha256(task.encode()).digest())
    if len(tasks) < 2:
        raise UserError("the rows are of one task, and one has to be held out: extract more tasks")
    chosen = set(tasks[: max(1, len(tasks) // HELD_OUT)])
    held_out = np.array([task in chosen for task in task_ids])
    return rows.activations[~held_out], rows.activations[held_out]


def shuffled(rows: np.ndarray, batch_size: int, seed: int) -> Iterator[np.ndarray]:
    """Batches of rows [N, D] without end, each pass in a new order."""
    random = np.random.default_rng(seed)
    while True:
        order = random.permutation(len(rows))
        for start in range(0, len(rows) - batch_size + 1, batch_size):
            yield rows[order[start : start + batch_size]]


def fit(
    dataset: "ActivationDataset", config: SaeConfig, most: int | None = None
) -> tuple[Sae, dict[str, float]]:
    """Train on the rows of `dataset` in memory, `most` of them, and measure on what is held out.

    Raises UserError where the autoencoder does not fit its input or the rows are too few.
    """
    if config.width < dataset.width:
        raise UserError(
            f"an SAE of {config.width} latents is narrower than its input of {dataset.width}: "
            f"give a width of at least {dataset.width}, usually four times that and more"
        )
    if not 0 < config.k <= config.width:
        raise UserError(f"k {config.k} is not between 1 and the width {config.width}")
    rows = dataset.rows(most, seed=config.seed)
    train_rows, held_out = split(rows, [dataset.samples[i][0] for i in rows.samples])
    if len(train_rows) < config.batch_size:
        raise UserError(
            f"{len(train_rows)} rows to train on are fewer than a batch of {config.batch_size}: "
            "extract more tasks, or lower the batch size"
        )
    del rows
    center = train_rows.mean(axis=0, dtype=np.float64).astype(np.float32)
    parts = (train_rows[i : i + 65536] for i in range(0, len(train_rows), 65536))
    squares = sum(float(((to_float32(p) - center) ** 2).sum(dtype=np.float64)) for p in parts)
    scale = float(np.sqrt(squares / train_rows.size)) or 1.0
    batches = shuffled(train_rows, config.batch_size, config.seed)
    sae = train(batches, center, scale, config)
    return sae, measure(sae, held_out)


def about(
    dataset: "ActivationDataset", config: SaeConfig, found: dict[str, float]
) -> dict[str, Any]:
    """What config.json says besides k."""
    return {
        "activation": dataset.name,
        "selection": repr(dataset.selection),
        "left_out": dict(dataset.left_out),
        "training": asdict(config),
        "held_out": found,
    }


def describe(found: dict[str, float]) -> str:
    return (
        f"explained variance {found['explained_variance']:.1%}, L0 {found['l0']:.1f}, "
        f"dead latents {found['dead_fraction']:.1%}"
    )


def build_parser() -> cli.Parser:
    parser = cli.Parser(__doc__)
    defaults = SaeConfig()
    parser.add_argument(
        "--activations_dir", required=True, help="of a run: a folder or gs://BUCKET/PREFIX"
    )
    parser.add_argument(
        "--layer", type=int, required=True, help="from 0; negative from the end of those captured"
    )
    parser.add_argument(
        "--hook_point", default="resid_post", choices=HOOK_POINTS, help="where in the layer"
    )
    parser.add_argument(
        "--output_dir", type=Path, required=True, help="folder to make, for the SAE"
    )
    for name, words in (
        ("width", "latents, at least the input's width"),
        ("k", "latents that are active in a row"),
        ("steps", "updates"),
        ("batch_size", "rows an update"),
        ("seed", "of weights and order"),
    ):
        parser.add_argument(
            f"--{name}",
            type=cli.int_at_least(0 if name == "seed" else 1),
            default=getattr(defaults, name),
            help=words,
        )
    parser.add_argument(
        "--max_rows",
        type=cli.int_at_least(1),
        default=1_000_000,
        help="rows taken, drawn at random from all; in memory they are twice, as stored",
    )
    parser.add_argument(
        "--drop_sinks",
        type=cli.float_at_least(0),
        default=10.0,
        help="leave out attention sinks, rows whose norm is more than so many times the median; 0 "
        "keeps them, and they alone then make up most of the variance of many models",
    )
    return parser


def main(args: argparse.Namespace, _: cli.Signals) -> None:
    from utils.dataset import ActivationDataset, Selection

    check_new(args.output_dir)
    config = SaeConfig(
        width=args.width, k=args.k, steps=args.steps, batch_size=args.batch_size, seed=args.seed
    )
    sinks = args.drop_sinks or None
    selection = Selection(args.layer, args.hook_point, drop_special=True, drop_sinks=sinks)
    dataset = ActivationDataset(args.activations_dir, selection)
    sae, found = fit(dataset, config, args.max_rows)
    sae.save(args.output_dir, about(dataset, config, found))
    print(f"{args.output_dir}: {describe(found)} on held-out tasks")


if __name__ == "__main__":
    cli.run(main, build_parser())
