"""How `examples/sae.py` trains: the step of each architecture, and the file that it goes on from.

Everything happens in the space of inputs brought to mean zero and unit mean square. Three rules say
which latents of a batch are active: the k highest of each row (topk, Gao et al. 2024), the
B k highest of the batch (batchtopk, Bussmann et al. 2024), or those above a threshold of their own
that is learned (jumprelu, Rajamanoharan et al. 2024, with the quadratic penalty of Gemma Scope 2
that holds the mean number of active latents at k). Dead latents learn in all three by an auxiliary
loss what the others leave over.
"""

# B rows   D input width   L latents

import json
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import cached_property, partial
from itertools import count
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save
from tqdm import tqdm

from utils.errors import UserError
from utils.model.autoencoder import Autoencoder, decode, encode, folded, top
from utils.store.local import replacing

if TYPE_CHECKING:
    from examples.sae import SaeConfig

SMOOTHING = 0.01  # of batchtopk's threshold, the least share of each new batch
BANDWIDTH = 0.5  # around jumprelu's threshold, in which it is moved
THRESHOLD_RATE = 10  # of its learning rate, times that of the weights
MOST_FALLEN = 0.05  # of the explained variance on held-out rows, below its best
MOST_ACTIVE = 1.5  # times k: with more active latents, a variance is explained too easily to count
GUARD_ROWS = 4096  # held-out rows, about, on which it is measured on the way
BLOCK = 1024  # rows that are reconstructed at once
SAVE_SECONDS = 60  # between two states on the disk


@dataclass(frozen=True, eq=False)
class Trainer:
    """One training: what stays the same from step to step.

    center: float32 [D] and scale bring rows x to (x - center) / scale. devices: that share a batch.
    A state is a dict of arrays and dicts: `params` (encoder [L, D], b_enc [L], w_dec [L, D], whose
    rows have unit norm, b_dec [D], and threshold [L] of jumprelu), `optimizer`, `silent`, int32
    [L], steps since a latent last fired, and `threshold`, float32 [], of batchtopk, zero elsewhere.
    The encoder lies as the decoder does, since a CPU forms the gradient of a matrix [D, L] at two
    thirds of the speed.
    """

    config: "SaeConfig"
    center: np.ndarray
    scale: float
    devices: int = 1

    def begin(self, rows: np.ndarray) -> dict[str, Any]:
        """A state to begin with; rows: the first batch [B, D], by which thresholds are chosen such
        that k latents are active. Decoder rows are drawn from the sphere, and the encoder begins as
        their transpose."""
        c, D = self.config, len(self.center)
        decoder = np.random.default_rng(c.seed).standard_normal((c.width, D), dtype=np.float32)
        decoder /= np.linalg.norm(decoder, axis=1, keepdims=True)
        params = {
            "encoder": decoder.copy(),
            "b_enc": np.zeros(c.width, np.float32),
            "w_dec": decoder,
            "b_dec": np.zeros(D, np.float32),
        }
        threshold = np.float32(0)
        if c.arch != "topk":
            x = (rows.astype(np.float32) - self.center) / np.float32(self.scale)
            before = np.maximum(x @ params["encoder"].T, 0).reshape(-1)
            threshold = np.partition(before, -c.k * len(rows))[-c.k * len(rows)]
        if c.arch == "jumprelu":
            params["threshold"] = np.full(c.width, threshold)
        state = {
            "params": params,
            "optimizer": self._optimizer.init(params),
            "silent": np.zeros(c.width, np.int32),
            "threshold": threshold,
        }
        return jax.device_put(state, self.everywhere)

    @cached_property
    def everywhere(self) -> NamedSharding:
        """Of what each of the devices holds whole."""
        mesh = Mesh(np.array(jax.devices()[: self.devices]), ("data",))
        return NamedSharding(mesh, PartitionSpec())

    @cached_property
    def _optimizer(self) -> optax.GradientTransformation:
        """Adam, warmed up over 50 steps; the last quarter of the steps goes down to zero."""
        c = self.config
        warm, decay = min(50, c.steps // 4), max(1, c.steps // 4)
        parts = [
            optax.linear_schedule(0, c.learning_rate, warm),
            optax.constant_schedule(c.learning_rate),
            optax.linear_schedule(c.learning_rate, 0, decay),
        ]
        schedule = optax.join_schedules(parts, [warm, c.steps - c.steps // 4])
        return optax.adam(schedule, b1=0.9, b2=0.999)

    @cached_property
    def step(self) -> Callable[[Any, np.ndarray], tuple[Any, jax.Array]]:
        """(state, rows [B, D]) -> the next state, and the unexplained share of the variance. The
        state that is given is used up."""
        compiled = jax.jit(self._step, donate_argnums=0, out_shardings=self.everywhere)
        shared = NamedSharding(self.everywhere.mesh, PartitionSpec("data"))
        return lambda state, rows: compiled(state, jax.device_put(rows, shared))

    def _step(self, state: Any, rows: Any) -> Any:
        x = (rows.astype(jnp.float32) - self.center) / np.float32(self.scale)
        dead = state["silent"] >= self.config.dead_steps
        gradient = partial(jax.grad(self._loss, has_aux=True), state["params"], x)
        # As a whole: gradients of an auxiliary loss that is not there are arrays of zeros too.
        found = jax.lax.cond(dead.any(), lambda: gradient(dead), lambda: gradient(None))
        gradient, (fired, lowest, unexplained) = found
        decoder = state["params"]["w_dec"]
        along = (gradient["w_dec"] * decoder).sum(axis=1, keepdims=True)
        gradient["w_dec"] -= along * decoder  # what would change their norm alone
        updates, optimizer = self._optimizer.update(gradient, state["optimizer"])
        if "threshold" in updates:  # it has further to go than a weight
            updates["threshold"] *= THRESHOLD_RATE
        params = optax.apply_updates(state["params"], updates)
        share = max(SMOOTHING, 10 / self.config.steps)  # a short training soon leaves its start
        params["w_dec"] /= jnp.linalg.norm(params["w_dec"], axis=1, keepdims=True)
        if "threshold" in params:
            params["threshold"] = jnp.maximum(params["threshold"], 0)
        state = {
            "params": params,
            "optimizer": optimizer,
            "silent": jnp.where(fired, 0, state["silent"] + 1),
            "threshold": state["threshold"] + share * (lowest - state["threshold"]),
        }
        return state, unexplained

    def _loss(self, params: Any, x: Any, dead: Any | None) -> tuple[Any, Any]:
        """dead: bool [L], or None where no latent is."""
        c = self.config
        # The bias is taken away after the product: x needs no gradient of its own then.
        before = jnp.einsum("bd,ld->bl", x, params["encoder"])
        before += params["b_enc"] - params["encoder"] @ params["b_dec"]
        positive = jax.nn.relu(before)
        lowest = penalty = jnp.float32(0)
        if c.arch == "topk":
            latents = top(positive, c.k)
        elif c.arch == "batchtopk":
            latents = top(positive, c.k * len(x), axis=None)
            lowest = jnp.where(latents > 0, latents, jnp.inf).min()
        else:
            gate = _above(jax.lax.stop_gradient(before) - params["threshold"])
            latents = positive * gate
            penalty = (gate.sum() / (c.k * len(x)) - 1) ** 2
        error = x - params["b_dec"] - latents @ params["w_dec"]
        unexplained = (error**2).sum() / (x**2).sum()  # of training rows, whose mean is zero
        loss = unexplained + penalty
        if dead is not None:  # these see what is left over, as if they were the only ones
            left = jax.lax.stop_gradient(error)
            second = top(jnp.where(dead, positive, 0), min(c.aux_k, c.width))
            missed = ((left - second @ params["w_dec"]) ** 2).sum()
            loss += c.aux_coefficient * missed / jnp.maximum((left**2).sum(), 1e-9)
        return loss, ((latents > 0).any(axis=0), lowest, unexplained)

    def autoencoder(self, state: Any) -> Autoencoder:
        """The autoencoder that a state stands for, for inputs as they are stored."""
        c = self.config
        # Copies: the next step takes the memory of this one's state.
        found = {name: np.array(value) for name, value in state["params"].items()}
        found["w_enc"] = found.pop("encoder").T.copy()
        if c.arch == "batchtopk":
            found["threshold"] = np.full(c.width, np.asarray(state["threshold"]))
        weights = folded(found, self.center, self.scale)
        return Autoencoder(c.arch, c.k if c.arch == "topk" else None, None, weights)


@jax.custom_jvp
def _above(x: jax.Array) -> jax.Array:
    """1 above zero, else 0. Its derivative is a rectangle of BANDWIDTH around zero, without which
    no threshold would ever move."""
    return (x > 0).astype(x.dtype)


@_above.defjvp
def _above_jvp(primals: Any, tangents: Any) -> tuple[jax.Array, jax.Array]:
    (x,), (dx,) = primals, tangents
    return _above(x), dx * (jnp.abs(x) < BANDWIDTH / 2) / BANDWIDTH


def shuffled(rows: np.ndarray, batch_size: int, seed: int, first: int = 0) -> Iterator[np.ndarray]:
    """Batches of rows [N, D] without end, each pass in a new order, from batch number `first`."""
    random, passes = np.random.default_rng(seed), len(rows) // batch_size
    for number in count():
        order = random.permutation(len(rows))
        for place in range(max(0, first - number * passes), passes):
            yield rows[order[place * batch_size : (place + 1) * batch_size]]


@dataclass(frozen=True)
class Progress:
    """How far a training has come.

    steps: done. state: of the trainer. best: weights of the autoencoder whose explained variance on
    held-out rows was highest so far, and best_variance. fallen: whether training ended because the
    explained variance had fallen by more than MOST_FALLEN below that.
    """

    steps: int
    state: dict[str, Any]
    best: dict[str, np.ndarray]
    best_variance: float = -np.inf
    fallen: bool = False

    def save(self, file: Path, about: dict[str, Any]) -> None:
        """Writes one safetensors file, whole or not at all, with `about` in its header."""
        leaves, _ = jax.tree_util.tree_flatten_with_path(self._arrays())
        tensors = {jax.tree_util.keystr(path): np.asarray(leaf) for path, leaf in leaves}
        with replacing(file) as sink:
            sink.write(save(tensors, {"about": json.dumps(about)}))

    def _arrays(self) -> dict[str, Any]:
        numbers = {"steps": np.int64(self.steps), "best_variance": np.float64(self.best_variance)}
        return {**numbers, "state": self.state, "best": self.best}

    def load(self, file: Path, about: dict[str, Any]) -> "Progress":
        """What `save` wrote of a training that began like this one. Raises UserError where the file
        is damaged, or `about` differs."""
        try:
            with safe_open(file, "numpy") as stored:
                said = json.loads(stored.metadata()["about"])
                changed = [name for name in about if said[name] != about[name]]
                if changed:
                    old, new = said[changed[0]], about[changed[0]]
                    raise UserError(
                        f"{file} is of a training with {changed[0]} {old}, not {new}: repeat its "
                        "command, or delete the file to begin anew"
                    )
                found = jax.tree_util.tree_map_with_path(
                    lambda path, _: stored.get_tensor(jax.tree_util.keystr(path)), self._arrays()
                )
        except (SafetensorError, OSError, KeyError, TypeError, ValueError) as error:
            raise UserError(f"{file} is damaged ({error}): delete it to begin anew") from error
        numbers = {"steps": int(found["steps"]), "best_variance": float(found["best_variance"])}
        return Progress(**{**found, **numbers})


def train(
    trainer: Trainer,
    rows: np.ndarray,
    held_out: np.ndarray,
    file: Path | None = None,
    about: dict[str, Any] | None = None,
    stopping: Callable[[], bool] = lambda: False,
) -> Progress:
    """Trains on rows [N, D], at least a batch, until `config.steps` are done.

    Twenty times and more on the way the explained variance is measured on held-out rows, and a
    training whose explained variance has fallen is ended. file: from which the training goes on
    where it exists, and where it is stored every SAVE_SECONDS and once `stopping` is true; `about`
    says what it is a training of. The weights of a training that was stopped on the way are those
    of one that was not, to the byte.
    """
    c = trainer.config
    state = trainer.begin(next(shuffled(rows, c.batch_size, c.seed)))
    progress = Progress(0, state, trainer.autoencoder(state).weights)
    if file is not None and file.exists():
        progress = progress.load(file, about)
        state = jax.device_put(progress.state, trainer.everywhere)
    sample = held_out[:: max(1, len(held_out) // GUARD_ROWS)]
    every, saved = max(1, min(100, c.steps // 20)), time.monotonic()
    batches = shuffled(rows, c.batch_size, c.seed, progress.steps)
    bar = tqdm(
        total=c.steps, initial=progress.steps, desc=f"training the {c.arch} SAE", unit="step"
    )
    for number in range(progress.steps + 1, c.steps + 1):
        if stopping():
            break
        batch = next(batches)
        jax.block_until_ready(state)  # one step is under way at a time, so that all can end soon
        state, unexplained = trainer.step(state, batch)
        progress = replace(progress, steps=number, state=state)
        bar.update()
        if number % every:
            continue
        dead = int((state["silent"] >= c.dead_steps).sum())
        bar.set_postfix_str(f"unexplained {float(unexplained):.3f}, dead {dead}", refresh=False)
        progress = guarded(progress, trainer.autoencoder(state), sample, c.k)
        if progress.fallen:
            break
        if file is not None and time.monotonic() - saved > SAVE_SECONDS:
            progress.save(file, about)
            saved = time.monotonic()
    bar.close()
    if file is not None and stopping():
        progress.save(file, about)
    return progress


def guarded(progress: Progress, now: Autoencoder, sample: np.ndarray, k: int) -> Progress:
    """With the explained variance of `now`, which counts where it is as sparse as it should be."""
    found = measure(now, sample)
    if found["l0"] > MOST_ACTIVE * k:
        return progress
    variance = found["explained_variance"]
    if variance > progress.best_variance:
        return replace(progress, best=now.weights, best_variance=variance)
    return replace(progress, fallen=not variance >= progress.best_variance - MOST_FALLEN)  # or NaN


@dataclass
class Reconstruction:
    """Sums over the rows [N, D] that an autoencoder has seen.

    error: squared distance to what it makes of them; squares: squared norms; total: float64 [D],
    the rows' sum; active: int64 [L], in how many rows each latent is above zero.
    """

    architecture: str
    k: int | None
    weights: Any
    rows: int = 0
    error: float = 0.0
    squares: float = 0.0
    total: Any = 0.0
    active: Any = 0

    def add(self, rows: np.ndarray) -> None:
        for start in range(0, len(rows), BLOCK):
            part = rows[start : start + BLOCK].astype(np.float32)
            n = len(part)
            padded = np.pad(part, [(0, BLOCK - n), (0, 0)])
            error, active = _sums(self.architecture, self.k, self.weights, padded, n)
            self.rows += n
            self.error += float(np.asarray(error)[:n].sum(dtype=np.float64))
            self.squares += float(np.square(part, dtype=np.float64).sum())
            self.total = self.total + part.sum(axis=0, dtype=np.float64)
            self.active = self.active + np.asarray(active, np.int64)

    @property
    def mean(self) -> np.ndarray:
        """float32 [D]"""
        return (self.total / self.rows).astype(np.float32)

    @property
    def explained_variance(self) -> float:
        """1 - squared error over the squared distance to the rows' mean; -inf for equal rows."""
        variance = self.squares - float(np.square(self.total).sum()) / self.rows
        if variance > 1e-12 * self.squares:  # and not what rounding leaves of none
            return 1 - self.error / variance
        return -np.inf if np.isfinite(self.error) else np.nan

    @property
    def l0(self) -> float:
        """Active latents of a row, mean."""
        return float(self.active.sum() / self.rows)


@partial(jax.jit, static_argnums=(0, 1))
def _sums(architecture: str, k: int | None, weights: Any, rows: Any, n: Any) -> tuple[Any, Any]:
    """Squared error of each of the rows [B, D], float32 [B], and how often each latent is active in
    the first n of them, int32 [L]."""
    latents = encode(architecture, k, weights, rows)
    here = jnp.arange(len(rows))[:, None] < n
    return ((rows - decode(weights, latents)) ** 2).sum(axis=1), ((latents > 0) & here).sum(axis=0)


def measure(sae: Autoencoder, rows: np.ndarray) -> dict[str, float]:
    """On rows [N, D] that were not trained on.

    explained_variance, l0: see `Reconstruction`. dead_fraction: latents that are active in none of
    the rows. often_active: number of latents that are active in more than half of the rows.
    """
    seen = Reconstruction(sae.architecture, sae.k, jax.device_put(sae.weights))
    seen.add(rows)
    return {
        "explained_variance": seen.explained_variance,
        "l0": seen.l0,
        "dead_fraction": float((seen.active == 0).mean()),
        "often_active": int((seen.active > len(rows) / 2).sum()),
    }


def alike(decoder: np.ndarray, cosine: float = 0.99, block: int = 1024) -> int:
    """How many pairs of a decoder's rows [L, D] have a cosine above this."""
    unit = decoder / np.maximum(np.linalg.norm(decoder, axis=1, keepdims=True), 1e-30)
    found = 0
    for start in range(0, len(unit), block):
        cosines = unit[start : start + block] @ unit[start:].T
        found += int(np.triu(cosines > cosine, 1).sum())
    return found
