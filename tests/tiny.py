"""A tiny random model and a few tasks on the disk: what tests and smoke runs of benchmarks read.

Imports neither pytest nor JAX at the top, so that it serves child processes too.
"""

import json
import random
from pathlib import Path

TINY = {
    "model_type": "qwen2",
    "vocab_size": 288,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 1024,
    "rms_norm_eps": 1e-6,
    "rope_theta": 10000.0,
    "tie_word_embeddings": True,
}


def random_task(
    rng: random.Random, pairs: int, tests: int = 1, side: int | None = None
) -> tuple[dict, list]:
    """A task that mirrors grids left to right, and its solutions; side: of every grid, by default
    drawn, and then prompts have many lengths, for each of which a program is compiled."""

    def grid():
        rows, cols = (side, side) if side else (rng.randint(1, 5), rng.randint(1, 5))
        return [[rng.randint(0, 9) for _ in range(cols)] for _ in range(rows)]

    def mirrored(g):
        return [row[::-1] for row in g]

    train = [grid() for _ in range(pairs)]
    test = [grid() for _ in range(tests)]
    task = {
        "train": [{"input": g, "output": mirrored(g)} for g in train],
        "test": [{"input": g} for g in test],
    }
    return task, [mirrored(g) for g in test]


def write_model(folder: Path, **fields) -> Path:
    """A random Qwen2 of two layers whose tokenizer makes one token of a character.

    fields: of its config.json, where they are not those of TINY.
    """
    from checkpoints import write_random_checkpoint
    from tokenizers_for_tests import character_tokenizer

    folder.mkdir(parents=True, exist_ok=True)
    tokenizer = character_tokenizer()
    write_random_checkpoint(folder, {**TINY, "vocab_size": len(tokenizer) + 3, **fields})
    tokenizer.save_pretrained(folder)
    return folder


def write_tasks(folder: Path, count: int = 7) -> Path:
    """`count` tasks of one to three train pairs, the fourth with two test inputs, and their
    solutions beside them; returns the path of the tasks."""
    folder.mkdir(parents=True, exist_ok=True)
    rng = random.Random(0)
    made = {f"task{i}": random_task(rng, 1 + i % 3, 2 if i == 3 else 1) for i in range(count)}
    path = folder / "arc_format_train.json"
    path.write_text(json.dumps({name: task for name, (task, _) in made.items()}))
    solutions = {name: grids for name, (_, grids) in made.items()}
    (folder / "test_outputs_train.json").write_text(json.dumps(solutions))
    return path
