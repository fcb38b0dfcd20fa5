"""Prompt formats: render a task with the span of every cell, parse an answer back to a grid.

Grids go through a template (a chat template, a Jinja file or our own wording) as placeholders and
are written into its finished text one by one (`encodings`), so that the span of every cell is exact
whatever the template does around it. Knows characters only; `codec` says which token holds which
cell.
"""

import functools
import hashlib
import itertools
import json
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from utils.arc.tasks import MAX_SIDE, Grid, Task
from utils.errors import UserError
from utils.prompt.chat import Message, apply_chat, assistant_turn, generation_prompt, rendered
from utils.prompt.encodings import FENCE, GRID_ENCODINGS, NoGridError, read_grid, write_grid
from utils.prompt.known import KNOWN, Wording, compact, train_pairs
from utils.store.text import read_text

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

CHAT_NOTE = (
    "This is a puzzle from ARC, the Abstraction and Reasoning Corpus. One hidden rule turns each "
    "input grid into its output grid. Infer the rule from the examples and apply it to the test "
    "input. "
)
CHAT_REQUEST = "Reply with the test output grid only, written like the grids above."
ENCODING_NOTES = {
    "digits": "A line is a row of the grid, and each digit is the color of one cell.",
    "spaced": "A line is a row of the grid; the digits, one space apart, are its cells' colors.",
    "numbered": "A grid is a fenced block that opens with its shape, rows by columns; each line "
    "holds a row's number, then one digit for the color of each cell.",
    "words": "A line is a row of the grid, and each word is the color of one cell.",
}
PLAIN_NOTE = "In each numbered pair below, the same hidden rule turns the input into the output."

# Private use characters: no template has them, and no Jinja filter trims or changes them.
PLACEHOLDER = re.compile("\ue000([0-9]+)\ue001")

Chat = Callable[[list[Message]], str]  # applies a chat template and opens the assistant's turn


@dataclass(frozen=True, eq=False)
class Prompt:
    """A text and where its cells are.

    cells: int32 [C, 7], in text order, columns pair, role, row, col, color, char_start, char_stop:
    pair counts the train pairs of this prompt from 0 and is -1 for the test pair; role is 0 for
    input, 1 for output. prepend_bos: the tokenizer's BOS token goes before the text.
    """

    text: str
    cells: np.ndarray
    prepend_bos: bool = False


@dataclass(frozen=True, eq=False)
class Answer:
    """What an answer says: a grid, or the reason (a short fixed phrase) why there is none.

    cells: int32 [C, 7] as in `Prompt`, [0, 7] without grid; their spans are in the text that was
    parsed, or, of ids that a `Codec` read, in the whole sequence. text: of such ids, without the
    end of turn.
    """

    grid: Grid | None
    reason: str | None
    cells: np.ndarray
    text: str = ""


@dataclass(frozen=True)
class PromptFormat:
    """One way to put tasks to a model; made by `load_format`.

    skeleton: number of train pairs -> prompt text with placeholders for the grids. lead, tail:
    text around the grid in an answer. opening: how much of the written grid the prompt's end
    already holds. end_of_turn: text after an answer, through the end-of-turn token. template_hash:
    sha256 in hex of all that determines a prompt besides the task. thinking: the prompt's end has
    opened a block of reasoning (`<think>`), which an answer has to close.
    """

    name: str
    encoding: str
    skeleton: Callable[[int], str]
    lead: str
    tail: str
    opening: str
    end_of_turn: str
    prepend_bos: bool
    template_hash: str
    thinking: bool = False

    @property
    def ending(self) -> str:
        """What follows the last grid of a prompt, the generation prompt included."""
        return PLACEHOLDER.split(self.skeleton(1))[-1]

    def render(self, task: Task, test_index: int, num_train_pairs: int | None = None) -> Prompt:
        """The prompt, generation prompt included: the answer begins where its text ends.

        num_train_pairs: how many train pairs are kept, the last ones; None keeps all.
        """
        dropped = 0 if num_train_pairs is None else max(0, len(task.train) - num_train_pairs)
        pairs = task.train[dropped:]
        grids = [grid for pair in pairs for grid in (pair.input, pair.output)]
        grids.append(task.test[test_index].input)
        pieces, cells, length = [], [], 0
        for i, piece in enumerate(PLACEHOLDER.split(self.skeleton(len(pairs)))):
            if i % 2:  # a placeholder's number
                slot = int(piece)
                piece, spans = write_grid(grids[slot], self.encoding)
                pair = slot // 2 if slot < 2 * len(pairs) else -1
                cells.append(_place(spans, length, pair, slot % 2))
            pieces.append(piece)
            length += len(piece)
        return Prompt("".join(pieces), np.concatenate(cells), self.prepend_bos)

    def render_answer(self, grid: Grid) -> Prompt:
        """The text that the assistant is expected to give, without its end of turn. It first closes
        a block of reasoning that the prompt has opened, and has no reasoning of its own."""
        text, spans = write_grid(grid, self.encoding)
        text = self.lead + text[len(self.opening) :] + self.tail
        return Prompt(text, _place(spans, len(self.lead) - len(self.opening), -1, 1))

    def parse(self, text: str) -> Answer:
        """The grid in an answer; `parse(render_answer(grid).text).grid == grid` for every grid.

        A reasoning block (all through the last `</think>`), and all from the end-of-turn text on,
        are dropped; `encodings.read_grid` says which grid of the rest counts. One that has not
        ended, whether the answer or the prompt opened it, holds no grid.
        """
        start = text.rfind("</think>") + len("</think>") if "</think>" in text else 0
        end = self.end_of_turn.strip()
        body = text[start:].partition(end)[0] if end else text[start:]
        try:
            if not body.strip():
                raise NoGridError("empty answer")
            if body.lstrip().startswith("<think>") or (self.thinking and not start):
                raise NoGridError("reasoning without an end")
            cells = read_grid(self.opening + body, self.encoding)
            shape = cells[-1, :2] + 1
            if max(shape) > MAX_SIDE:
                raise NoGridError(f"larger than {MAX_SIDE}x{MAX_SIDE}")
        except NoGridError as reason:
            return Answer(None, str(reason), np.zeros((0, 7), np.int32))
        grid = cells[:, 2].reshape(shape).tolist()
        return Answer(grid, None, _place(cells, start - len(self.opening), -1, 1))


def _place(spans: np.ndarray, offset: int, pair: int, role: int) -> np.ndarray:
    """int32 [C, 5] cells of a grid -> int32 [C, 7] of `Prompt`, the grid's text being at offset."""
    cells = np.empty((len(spans), 7), np.int32)
    cells[:, :2] = pair, role
    cells[:, 2:] = spans
    cells[:, 5:] += offset
    return cells


def load_format(
    name_or_path: str, encoding: str | None, tokenizer: "PreTrainedTokenizerFast"
) -> PromptFormat:
    """A format of PROMPT_FORMATS, or one made of a Jinja file; encoding None is `digits`, or what a
    model of `known` was trained with, which is the only one that its format takes.

    `chat` and `turns` go through the tokenizer's chat template, reasoning switched off where it
    knows `enable_thinking`; `compact` and `plain` do not. BOS goes before `compact` where the
    tokenizer has one, before `plain` and a Jinja file where the tokenizer by itself would put it.
    An answer ends with the chat template's end of turn, EOS in `compact`, a blank line in `plain`.

    A Jinja file renders the whole prompt, up to where the answer begins; one newline at its end is
    dropped. It is given `train` (list of `{"input", "output"}`), `test_input`, `bos_token`,
    `eos_token` (empty where the tokenizer has none) and `chat(messages)`, which applies the
    tokenizer's chat template and opens the assistant's turn. Grids come written in `encoding`, and
    each has to be used exactly once. The prompt may end with the beginning of a `numbered` grid,
    such as "```grid", which the answer then goes on from. Its answers end as the chat template's do
    if it calls `chat`, else with EOS.

    Raises UserError: unknown format or encoding, no chat template, a template that fails or that
    does not use each grid exactly once.
    """
    source, eos = "", tokenizer.eos_token or ""
    if (wording := FORMATS.get(name_or_path)) is None:
        if not Path(name_or_path).is_file():
            names = ", ".join(FORMATS)
            raise UserError(f"no prompt format {name_or_path!r}: neither {names} nor a Jinja file")
        source, wording = jinja_file(name_or_path, tokenizer)
    encoding = encoding or wording.encoding or GRID_ENCODINGS[0]
    if encoding not in GRID_ENCODINGS:
        raise UserError(f"no grid encoding {encoding!r}; there are {', '.join(GRID_ENCODINGS)}")
    if wording.encoding not in (None, encoding):
        raise UserError(
            f"--prompt_format {name_or_path} writes grids as {wording.encoding}, not as "
            f"{encoding}: leave --grid_encoding out"
        )
    chats: list[str] = []

    def chat(messages: list[Message]) -> str:
        chats.append(apply_chat(tokenizer, messages))
        return chats[-1]

    def skeleton(num_pairs: int) -> str:
        # Input and output of each train pair, then the test input.
        placeholders = [f"\ue000{slot}\ue001" for slot in range(2 * num_pairs + 1)]
        text = wording.compose(placeholders, chat, eos, encoding)
        check_placeholders(text, num_pairs, name_or_path)
        return text

    sample = skeleton(1)
    through_chat = bool(chats)
    lead, end = assistant_turn(tokenizer) if through_chat else ("", eos)
    last = PLACEHOLDER.split(sample)[-1]  # the text by which the prompt asks for the answer
    if through_chat:
        last = generation_prompt(tokenizer)
        if not sample.endswith(chats[-1]):
            lead = ""  # the file goes on after the chat template: its own text leads to the answer
            last += sample.rpartition(chats[-1])[2]
    thinking = last.rfind("<think>") > last.rfind("</think>")
    if thinking:  # an empty block, as the templates that know `enable_thinking` write it
        lead = "\n" * (not last.endswith("\n")) + "\n</think>\n\n"
    opening = ""
    if encoding == "numbered":
        opening = next(FENCE[:k] for k in range(len(FENCE), -1, -1) if sample.endswith(FENCE[:k]))
    if wording.begins_with_bos:
        bos = tokenizer.bos_token is not None
    else:
        bos = not through_chat and _adds_bos(tokenizer)
        bos = bos and not sample.startswith(tokenizer.bos_token)
    tail, end = wording.tail, wording.end_of_turn or end
    # By names that the hash of every run so far was made of.
    parts = {"lead": lead, "tail": tail, "prefill": opening, "end_of_turn": end, "prepend_bos": bos}
    written = write_grid([[*range(10)], [0] * 10], encoding)[0]
    determining = [encoding, source, tokenizer.chat_template, sample, skeleton(2), written, parts]
    digest = hashlib.sha256(json.dumps([*determining, tokenizer.bos_token]).encode()).hexdigest()
    cached = functools.cache(skeleton)
    around = lead, tail, opening, end
    return PromptFormat(name_or_path, encoding, cached, *around, bos, digest, thinking)


def _chat(grids: list[str], chat: Chat, _: str, encoding: str) -> str:
    parts = [CHAT_NOTE + ENCODING_NOTES[encoding]]
    for k, (given, wanted) in enumerate(train_pairs(grids), 1):
        parts.append(f"Example {k}\n\nInput:\n{given}\n\nOutput:\n{wanted}")
    parts += [f"Test\n\nInput:\n{grids[-1]}", CHAT_REQUEST]
    return chat([{"role": "user", "content": "\n\n".join(parts)}])


def _turns(grids: list[str], chat: Chat, *_: str) -> str:
    roles = itertools.cycle(("user", "assistant"))
    return chat([{"role": role, "content": g} for role, g in zip(roles, grids, strict=False)])


def _plain(grids: list[str], *_: object) -> str:
    parts = [PLAIN_NOTE]
    for k, (given, wanted) in enumerate([*train_pairs(grids), (grids[-1], "")], 1):
        parts.append(f"Input {k}:\n{given}\n\nOutput {k}:\n{wanted}")
    return "\n\n".join(parts)


FORMATS = {
    "chat": Wording(_chat),
    "turns": Wording(_turns),
    "compact": Wording(compact, tail="\n", begins_with_bos=True),
    "plain": Wording(_plain, end_of_turn="\n\n"),
    **KNOWN,
}
PROMPT_FORMATS = tuple(FORMATS)


def _adds_bos(tokenizer: "PreTrainedTokenizerFast") -> bool:
    """Whether the tokenizer puts a BOS token before a text by itself."""
    first = tokenizer.backend_tokenizer.encode("0").ids[:1]
    return tokenizer.bos_token_id is not None and first == [tokenizer.bos_token_id]


def jinja_file(path: str, tokenizer: "PreTrainedTokenizerFast") -> tuple[str, Wording]:
    """A Jinja file -> (source, what is made of it)."""
    import jinja2
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    source = read_text(Path(path))
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, undefined=jinja2.StrictUndefined
    )

    def compose(grids: list[str], chat: Chat, eos: str, _: str) -> str:
        given = {
            "train": [{"input": i, "output": o} for i, o in train_pairs(grids)],
            "test_input": grids[-1],
            "bos_token": tokenizer.bos_token or "",
            "eos_token": eos,
            "chat": chat,
        }
        which = f"the prompt template {path}"
        return rendered(lambda: environment.from_string(source).render(given), which)

    return source, Wording(compose)


def check_placeholders(text: str, num_pairs: int, name: str) -> None:
    """Raises UserError unless text holds each of the 2 * num_pairs + 1 grids exactly once."""
    found = [int(slot) for slot in PLACEHOLDER.findall(text)]
    for slot in range(2 * num_pairs + 1):
        if (times := found.count(slot)) != 1:
            what = f"the {('input', 'output')[slot % 2]} of train pair {slot // 2 + 1}"
            what = "the test input" if slot == 2 * num_pairs else what
            raise UserError(f"prompt format {name} holds {what} {times} times; use it once, as is")
    if re.search("[\ue000\ue001]", PLACEHOLDER.sub("", text)):
        raise UserError(f"prompt format {name} alters a grid; use each as is")
