"""Prompts of ARC models that others have trained, as their public code writes them.

Each is certain: one piece of public code makes the training prompts of the published models. BARC's
transduction models are left out, since its scripts disagree (in the blank lines around the test
input, and in what stands before the system prompt). Knows nothing of tokens.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

NVARC_END = "<|im_end|>"
# The ARChitects' letters without I and O, which they write before an input and an output.
ARCHITECTS_LETTERS = "ABCDEFGHJKLMNPQRSTUVWXYZabcdefghjklmnpqrstuvwxyz"
ARC24_SYSTEM = "You are a helpful assistant."
ARC24_TASK = (
    "Let's see if you can solve this simple Abstraction and Reasoning Challenge (ARC) task.\n"
    "Below there are some input-output grid examples that define the task.\n"
    "Your job is to understand the transformation between the input and the output and apply it to "
    "the test input grid.\n"
    "The transformations are always based on the following priors: objectness, goal-directed, "
    "numbers & counting, and basic geometry & topology.\n"
)
ARC24_ANSWER = "### Output\n\n```grid"  # which the answer goes on from


@dataclass(frozen=True)
class Wording:
    """One way to put a task, row by row in `formats.FORMATS`.

    compose: (grids of the train pairs and of the test input, the tokenizer's chat template, EOS,
    encoding) -> the text of a prompt. encoding: the only one of its grids, None for any. tail: what
    follows the grid of an answer. end_of_turn: what ends an answer, None for what the chat template
    says, or EOS. begins_with_bos: whether BOS goes before it wherever the tokenizer has one.
    """

    compose: Callable[[list[str], Callable[[list[dict[str, str]]], str], str, str], str]
    encoding: str | None = None
    tail: str = ""
    end_of_turn: str | None = None
    begins_with_bos: bool = False


def train_pairs(grids: list[str]) -> list[tuple[str, str]]:
    """Grids in the order of a prompt -> (input, output) of each train pair."""
    return list(zip(grids[:-1:2], grids[1::2], strict=True))


def compact(grids: list[str], chat: object, eos: str, *_: str) -> str:
    """What the ARChitects write of the grids, and `compact` writes alone."""
    pairs = (f"I{given}\n+/-=O{wanted}\n{eos}" for given, wanted in train_pairs(grids))
    return "".join(pairs) + f"I{grids[-1]}\n+/-=O"


def _nvarc(grids: list[str], *_: object) -> str:
    """github.com/1ytic/NVARC: `get_messages` in SDG/scripts/build_datasets.py, through
    ARChitects/qwen3_configs/chat_template.j2, which puts nothing between two turns."""
    turn = "<|im_start|>user\n{}" + NVARC_END + "<|im_start|>assistant\n"
    pairs = (turn.format(given) + wanted + NVARC_END for given, wanted in train_pairs(grids))
    return "".join(pairs) + turn.format(grids[-1])


def _architects(grids: list[str], *more: Any) -> str:
    """github.com/da-fr/arc-prize-2024: `fmt_opts` in training_code/run_finetuning_Nemo-full.py and
    run_finetuning_Llama-rearc.py, `fmt_task` in training_code/arc_loader.py."""
    return ARCHITECTS_LETTERS + compact(grids, *more)


def _arc24(grids: list[str], chat: Callable[[list[dict[str, str]]], str], *_: str) -> str:
    """github.com/ironbar/arc24: `output-from-examples-v1` in scripts/arc24/prompting.py, which
    docs/modeling/Iteration_50_last_trainings.md trains with; the grids of scripts/inference.py."""
    parts = [ARC24_TASK]
    for number, (given, wanted) in enumerate(train_pairs(grids), 1):
        parts.append(f"\n## Example {number}\n\n### Input\n\n{given}\n\n### Output\n\n{wanted}\n")
    parts.append(f"\n## Test case\n\n### Input\n\n{grids[-1]}")
    system = {"role": "system", "content": ARC24_SYSTEM}
    return chat([system, {"role": "user", "content": "".join(parts)}]) + ARC24_ANSWER


KNOWN = {
    "nvarc": Wording(_nvarc, "digits", end_of_turn=NVARC_END),
    "architects": Wording(_architects, "digits", tail="\n", begins_with_bos=True),
    "arc24": Wording(_arc24, "numbered"),
}
