"""Trains the model in examples/arc_tiny: a small Qwen2 that solves the tasks of generate_tasks.py.

    python examples/train_arc_tiny.py --work_dir training --output_dir my_arc_tiny

Each example is a whole row in the `compact` prompt format: three train pairs and the test pair. The
loss is on the outputs, from the second pair on. No task of the held-out sets (`HELD_OUT`) is
trained on; on some of the second set progress is measured. Stopped at any moment, the same command
goes on from the last saved state; the same seed, steps and machine give the same weights. Runs on a
CPU or one GPU, in float32.

The weights that ship come from a run of 4,200 steps in which `PRACTICE` was brought in at step
1,200, so that another run gives others.
"""

# B rows   T tokens   V vocabulary

import argparse
import itertools
import json
import os
import string
import sys
from collections import defaultdict
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

sys.path.insert(0, str(Path(__file__).parents[1]))

from examples.generate_tasks import FAMILIES, draw_row, draw_rows, family_of
from utils import cli
from utils.errors import UserError, some
from utils.shards.manifest import differences
from utils.store.local import (
    check_writable,
    json_lines,
    new_folder,
    replacing,
    to_json,
    write_result,
)
from utils.store.text import read_json

if TYPE_CHECKING:
    import jax
    from transformers import PreTrainedTokenizerFast

    from utils.model.layout import Layout
    from utils.prompt.formats import PromptFormat

MODEL = {
    "architectures": ["Qwen2ForCausalLM"],
    "model_type": "qwen2",
    "hidden_size": 160,
    "intermediate_size": 432,
    "num_hidden_layers": 6,
    "num_attention_heads": 5,
    "num_key_value_heads": 5,
    "max_position_embeddings": 2048,
    "rms_norm_eps": 1e-6,
    "rope_theta": 10000.0,
    "tie_word_embeddings": True,
    "torch_dtype": "bfloat16",
}
ARROW = "+/-=O"  # of the `compact` format, between input and output: one token
# (number of tasks, seed of generate_tasks): examples/tasks.jsonl, and the set of the accuracy table
HELD_OUT = ((200, 1), (500, 2))
TRAIN_SEED = 1000  # and above
# Families that take longest to learn are drawn more often than the others.
PRACTICE = {"flip": 3, "rotate": 3, "transpose": 3, "mirror": 3, "gravity": 2}
POOL = 2048  # rows that are drawn and sorted by length together
WIDTH = 32  # lengths are padded to a multiple of it, in tokens
CHECKED = 128  # held-out rows on which progress is measured
DECAY = 0.3  # share of the steps over which the learning rate falls to zero


def tiny_tokenizer() -> "PreTrainedTokenizerFast":
    """One token a character of printable ASCII; one for `+/-=O`."""
    from tokenizers import AddedToken, Tokenizer, decoders, models
    from transformers import PreTrainedTokenizerFast

    characters = ["\n", " ", *string.digits, *string.ascii_letters, *string.punctuation]
    backend = Tokenizer(models.BPE({token: i for i, token in enumerate(characters)}, []))
    backend.decoder = decoders.Fuse()
    backend.add_tokens([AddedToken(ARROW, normalized=False)])
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, eos_token="<|im_end|>", pad_token="<|endoftext|>"
    )


def text_of(row: dict[str, Any], fmt: "PromptFormat") -> str:
    """A row as the model sees it at inference, followed by the answer and its end."""
    from utils.arc.rows import to_task

    task, _ = to_task(row, "examples")
    answer = fmt.render_answer(task.test[0].output).text
    return fmt.render(task, 0).text + answer + fmt.end_of_turn


def outputs_from(ids: np.ndarray, first: int, arrow: int, eos: int) -> np.ndarray:
    """bool [T]: the tokens of the outputs from number `first` on, each with its end."""
    begun = np.cumsum(ids == arrow)
    ended = np.cumsum(ids == eos) - (ids == eos)
    return (begun > ended) & (ids != arrow) & (begun > first)


class Rows:
    """Rows as token ids, and batches of them.

    held_out: the examples, as text, that training leaves out.
    """

    def __init__(self, fmt: "PromptFormat", tokenizer: "PreTrainedTokenizerFast"):
        self.fmt, self.tokenizer = fmt, tokenizer
        self.arrow = tokenizer.convert_tokens_to_ids(ARROW)
        self.held_out = {
            str(row["examples"]) for number, seed in HELD_OUT for row in draw_rows(number, seed)
        }

    def ids(self, row: dict[str, Any]) -> np.ndarray:
        """int32 [T]"""
        encoded = self.tokenizer.backend_tokenizer.encode(text_of(row, self.fmt))
        return np.array(encoded.ids, np.int32)

    def padded(self, rows: list[np.ndarray], batch: int, first: int) -> tuple[np.ndarray, ...]:
        """tokens int32 [B, T] and, of the outputs that count, weights float32 [B, T]."""
        length = -(-max(map(len, rows)) // WIDTH) * WIDTH
        tokens = np.full((batch, length), self.tokenizer.pad_token_id, np.int32)
        weights = np.zeros((batch, length), np.float32)
        for i, ids in enumerate(rows):
            tokens[i, : len(ids)] = ids
            counted = outputs_from(ids, first, self.arrow, self.tokenizer.eos_token_id)
            weights[i, : len(ids)] = counted
        return tokens, weights

    def pool(
        self, seed: int, index: int, batch_tokens: int, multiple: int
    ) -> list[tuple[np.ndarray, ...]]:
        """The batches of pool number `index`: rows of like length, `batch_tokens` each, and as many
        rows as are a `multiple`."""
        families = [f for name, f in FAMILIES.items() for _ in range(PRACTICE.get(name, 1))]
        by_length: dict[int, list[np.ndarray]] = defaultdict(list)
        for i in range(POOL):
            row = draw_row(families[i % len(families)], (TRAIN_SEED + seed, index, i))
            if str(row["examples"]) not in self.held_out:
                ids = self.ids(row)
                by_length[-(-len(ids) // WIDTH)].append(ids)
        batches, waiting = [], []
        for width in range(1, max(by_length) + 1):
            waiting += by_length[width]  # what does not fill a batch waits for the next length
            size = max(1, batch_tokens // (width * WIDTH) // multiple) * multiple
            while len(waiting) >= size:
                batches.append(self.padded(waiting[:size], size, 1))
                waiting = waiting[size:]
        np.random.default_rng((seed, index)).shuffle(batches)
        return batches

    def stream(
        self, seed: int, start: tuple[int, int], batch_tokens: int, multiple: int
    ) -> Iterator[Any]:
        """(pool, batch of it), tokens, weights, from `start` on; a thread prepares the next one."""
        first, skip = start
        with ThreadPoolExecutor(1) as ahead:
            following = ahead.submit(self.pool, seed, first, batch_tokens, multiple)
            for index in itertools.count(first):
                batches = following.result()
                following = ahead.submit(self.pool, seed, index + 1, batch_tokens, multiple)
                for number, batch in enumerate(batches[skip:], skip + 1):
                    yield (index, number), *batch
                skip = 0


def optimizer(params: Any, steps: int, learning_rate: float) -> Any:
    """Muon (Jordan et al. 2024) on the kernels, Adam on the rest; a warm-up, a plateau, and a line
    down to zero."""
    import jax
    import optax
    from optax.contrib import MuonDimensionNumbers, muon

    def schedule(peak: float) -> Any:
        warm = min(100, steps // 10 + 1)
        fall = max(1, int(steps * DECAY))
        parts = [
            optax.linear_schedule(0, peak, warm),
            optax.constant_schedule(peak),
            optax.linear_schedule(peak, 0, fall),
        ]
        return optax.join_schedules(parts, [warm, steps - fall])

    def axes(path: Any, leaf: Any) -> Any:
        name = path[-1].key
        if name in ("gate", "up", "down", "query", "key", "value"):
            return MuonDimensionNumbers((0,), tuple(range(1, leaf.ndim)))
        return MuonDimensionNumbers((0, 1), (2,)) if name == "out" else None

    dimensions = jax.tree_util.tree_map_with_path(axes, params)
    return optax.chain(
        optax.clip_by_global_norm(1.0),
        muon(
            schedule(learning_rate),
            adam_learning_rate=schedule(0.6 * learning_rate),
            consistent_rms=0.2,
            weight_decay=0.01,
            muon_weight_dimension_numbers=dimensions,
        ),
    )


def predictions(model: Any, params: Any, tokens: "jax.Array") -> "jax.Array":
    """float32 [B, T - 1, V]: the logits of every token after the first."""
    import jax.numpy as jnp

    from utils.model.decoder import Decoder

    B, T = tokens.shape
    positions = jnp.broadcast_to(jnp.arange(T), (B, T))
    states, _ = model.apply({"params": params}, tokens, positions)
    flat = states[:, :-1].reshape(B * (T - 1), -1)
    logits = model.apply({"params": params}, flat, method=Decoder.logits)
    return logits.reshape(B, T - 1, -1)


def compiled(model: Any, tx: Any) -> tuple[Any, Any]:
    """The training step, and the rows of a batch whose last answer greedy decoding gets right."""
    import jax
    import optax

    def loss(params: Any, tokens: Any, weights: Any) -> Any:
        logits = predictions(model, params, tokens)
        losses = optax.softmax_cross_entropy_with_integer_labels(logits, tokens[:, 1:])
        return (losses * weights[:, 1:]).sum() / weights[:, 1:].sum()

    def step(params: Any, state: Any, tokens: Any, weights: Any) -> Any:
        value, gradient = jax.value_and_grad(loss)(params, tokens, weights)
        updates, state = tx.update(gradient, state, params)
        return optax.apply_updates(params, updates), state, value

    def solved(params: Any, tokens: Any, weights: Any) -> Any:
        best = predictions(model, params, tokens).argmax(-1)
        return ((best == tokens[:, 1:]) | (weights[:, 1:] == 0)).all(axis=1)

    return jax.jit(step, donate_argnums=(0, 1)), jax.jit(solved)


def accuracy(
    rows: Rows, solved: Any, params: Any, layout: "Layout"
) -> tuple[float, dict[str, float]]:
    """Share of the first CHECKED held-out tasks that are solved, of all and by family."""
    number, seed = HELD_OUT[-1]
    by_family: dict[str, list[bool]] = defaultdict(list)
    held_out = list(itertools.islice(draw_rows(number, seed), CHECKED))
    size = -(-32 // layout.data) * layout.data
    for i in range(0, CHECKED, size):
        part = held_out[i : i + size]
        padded = rows.padded([rows.ids(row) for row in part], size, 3)
        right = np.asarray(solved(params, *map(layout.put, padded)))
        for row, is_right in zip(part, right[: len(part)], strict=True):
            by_family[family_of(row)].append(bool(is_right))
    shares = {family: float(np.mean(found)) for family, found in sorted(by_family.items())}
    return float(np.mean(list(itertools.chain(*by_family.values())))), shares


def save_state(path: Path, state: dict[str, Any]) -> None:
    """Whole or not at all."""
    from flax.serialization import to_bytes

    with replacing(path) as sink:
        sink.write(to_bytes(state))


def write_checkpoint(folder: Path, fields: dict[str, Any], params: dict[str, Any]) -> None:
    """Writes `config.json` with `fields` and a parameter tree as bfloat16 in one safetensors file.

    params: as `Checkpoint.load` gives it, on one device. Raises UserError where it cannot.
    """
    import jax.numpy as jnp
    from flax.traverse_util import flatten_dict
    from safetensors import SafetensorError
    from safetensors.numpy import save_file

    from utils.model.config import ModelConfig
    from utils.model.weights import parameters

    tensors, leaves = {}, flatten_dict(params, sep="/")
    for path, parameter in parameters(ModelConfig.from_dict(fields)).items():
        tensors |= parameter.as_stored(np.asarray(leaves[path]).astype(jnp.bfloat16))
    try:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "config.json").write_text(json.dumps(fields, indent=2) + "\n")
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
        (folder / "model.safetensors").chmod(0o644)  # safetensors keeps it to its owner
    except (SafetensorError, OSError) as error:  # a full disk is either
        raise UserError(f"cannot write the weights to {folder}: {error}") from error


def check_settings(args: argparse.Namespace) -> None:
    """Notes in the work folder what decides the weights, or compares it with what is noted there;
    --steps may change. Raises UserError."""
    path = args.work_dir / "settings.json"
    now = {key: getattr(args, key) for key in ("seed", "learning_rate", "batch_tokens")}
    now |= {"model": MODEL, "practice": PRACTICE}
    if not path.exists():
        write_result(path, json_lines(now))
    elif changes := differences(read_json(path), now):
        raise UserError(
            f"{args.work_dir} holds a training with other settings: {some(changes)}; go back "
            "to the former, or give another --work_dir"
        )


def train(args: argparse.Namespace) -> None:
    import jax
    import jax.numpy as jnp
    from flax.serialization import from_bytes
    from tqdm import tqdm

    from utils.model.config import ModelConfig
    from utils.model.decoder import Decoder
    from utils.model.layout import Layout, make_mesh, use_compilation_cache
    from utils.prompt.formats import load_format

    # A device a core: XLA spreads matrix products alone over the cores of one device.
    jax.config.update("jax_num_cpu_devices", os.cpu_count())
    use_compilation_cache()
    tokenizer = tiny_tokenizer()
    fields = {**MODEL, "vocab_size": len(tokenizer), "eos_token_id": tokenizer.eos_token_id}
    config = ModelConfig.from_dict(fields)
    layout = Layout.of(config, make_mesh(len(jax.local_devices()), 1))
    model = Decoder(config, layout)
    rows = Rows(load_format("compact", None, tokenizer), tokenizer)

    tokens = jnp.zeros((layout.data, WIDTH), jnp.int32)
    params = model.init(jax.random.key(args.seed), tokens, tokens, method=Decoder.initialize)
    params = jax.device_put(params["params"], layout.sharding())
    tx = optimizer(params, args.steps, args.learning_rate)
    check_settings(args)
    state = {"params": params, "optimizer": tx.init(params), "step": 0, "next": [0, 0]}
    path = args.work_dir / "state.msgpack"
    if path.exists():
        try:
            state = from_bytes(state, path.read_bytes())
        except (ValueError, KeyError, TypeError) as error:
            raise UserError(f"{path} is damaged: move it away to begin again") from error
        print(f"going on from step {state['step']} of {path}")
    log = (args.work_dir / "log.jsonl").open("a")
    step, solved = compiled(model, tx)
    params, opt_state = jax.device_put((state["params"], state["optimizer"]), layout.sharding())
    done = int(state["step"])
    begin = tuple(int(i) for i in state["next"])

    bar = tqdm(total=args.steps, initial=done, unit="step", desc="training")
    losses = []
    for place, *batch in rows.stream(args.seed, begin, args.batch_tokens, layout.data):
        if done >= args.steps:
            break
        params, opt_state, loss = step(params, opt_state, *map(layout.put, batch))
        done += 1
        losses.append(float(loss))
        bar.set_postfix(loss=f"{losses[-1]:.3f}", refresh=False)
        bar.update()
        if done % args.check_every == 0 or done == args.steps:
            total, families = accuracy(rows, solved, params, layout)
            entry = {"step": done, "loss": round(float(np.mean(losses)), 4), "accuracy": total}
            log.write(to_json({**entry, **families}) + "\n")
            log.flush()
            losses.clear()
            worst = sorted(families, key=families.get)[:4]
            bar.write(f"{entry}, worst " + ", ".join(f"{f} {families[f]:.2f}" for f in worst))
            state = {"params": params, "optimizer": opt_state, "step": done, "next": place}
            save_state(path, state)
    bar.close()
    with new_folder(args.output_dir) as folder:
        write_checkpoint(folder, fields, params)
        tokenizer.save_pretrained(folder)
    size = sum(file.stat().st_size for file in args.output_dir.iterdir())
    print(f"{args.output_dir}: {size / 1e6:.1f} MB")


def build_parser() -> cli.Parser:
    parser = cli.Parser(__doc__)
    parser.add_argument(
        "--work_dir", type=Path, required=True, help="folder of the state and log.jsonl"
    )
    parser.add_argument("--output_dir", type=Path, required=True, help="folder of the model")
    parser.add_argument("--steps", type=cli.int_at_least(1), default=4200, help="updates in all")
    parser.add_argument(
        "--batch_tokens", type=cli.int_at_least(512), default=8192, help="tokens an update"
    )
    parser.add_argument(
        "--learning_rate",
        type=cli.float_at_least(0),
        default=0.005,
        help="highest one, of Muon; Adam's is 0.6 of it",
    )
    parser.add_argument("--seed", type=cli.int_at_least(0), default=0, help="of weights and tasks")
    parser.add_argument(
        "--check_every",
        type=cli.int_at_least(1),
        default=200,
        help="updates between two looks at the held-out tasks; the state is saved then",
    )
    return parser


def main(args: argparse.Namespace, _: cli.Signals) -> None:
    if args.output_dir.exists():
        raise UserError(f"{args.output_dir} exists: give another --output_dir")
    check_writable(args.work_dir)
    check_writable(args.output_dir.absolute().parent)
    args.work_dir.mkdir(parents=True, exist_ok=True)
    train(args)


def keep_memory() -> None:
    """Starts this script again with an allocator that keeps what is freed: glibc gives a step's
    gigabytes of temporary arrays back to the system, and asks for them again."""
    kept = {
        "MALLOC_ARENA_MAX": "1",
        "MALLOC_MMAP_MAX_": "0",
        "MALLOC_TRIM_THRESHOLD_": str(1 << 40),
    }
    if sys.platform == "linux" and not kept.keys() & os.environ.keys():
        os.execve(sys.executable, [sys.executable, *sys.argv], {**os.environ, **kept})


if __name__ == "__main__":
    keep_memory()
    cli.run(main, build_parser())
