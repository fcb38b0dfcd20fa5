"""A task as token ids with the table that says which tokens hold which cell; and answers read back.

The table is int32 [C, 7], columns CELL_COLUMNS: `input_ids[token_start:token_stop]` are the tokens
whose text overlaps the cell. Several cells can share a token and a cell can take several.
"""

# P prompt tokens   T all tokens   A answer tokens   C cells

import contextlib
import hashlib
import json
import logging
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from utils.arc.tasks import Grid, Task
from utils.errors import UserError
from utils.model.files import model_folder
from utils.prompt.chat import assistant_turn
from utils.prompt.formats import Answer, Prompt, PromptFormat, load_format
from utils.store.text import read_json

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

log = logging.getLogger(__name__)
# Tokens that end a turn or a text wherever a vocabulary has them.
END_TOKENS = (
    *("<|im_end|>", "<|eot_id|>", "<|eom_id|>", "<|end_of_text|>", "<|endoftext|>", "</s>"),
    *("<|end|>", "<|return|>", "<|end_of_turn|>", "<end_of_turn>", "<｜end▁of▁sentence｜>"),  # noqa: RUF001
)


@dataclass(frozen=True, eq=False)
class Encoded:
    """A sample as the model is given it: the prompt and, where it is forced, the answer behind it.

    ids: int32 [T], the first prompt_length of them the prompt; cells: int32 [C, 7] of both.
    """

    ids: np.ndarray
    prompt_length: int
    cells: np.ndarray


@dataclass(frozen=True, eq=False)
class Codec:
    """How tasks become token ids, and token ids answers; made by `load_codec`.

    stop_ids: every token that ends an answer, ascending. tokenizer_hash: see `hash_tokenizer`.
    vocab_size: embeddings of the model, where a model is meant.
    """

    tokenizer: "PreTrainedTokenizerFast"
    fmt: PromptFormat
    stop_ids: tuple[int, ...]
    tokenizer_hash: str
    vocab_size: int | None = None

    def encode(self, task: Task, index: int, pairs: int, forced: bool = False) -> Encoded:
        """Test input `index` of a task behind its last `pairs` train pairs.

        forced: with the ground truth, which the test pair must have, as the answer. Raises
        UserError where the vocabulary cannot write a cell, or the model cannot read a token.
        """
        ids, cells = encode_prompt(self.fmt.render(task, index, pairs), self.tokenizer)
        P = len(ids)
        if forced:
            more, located = encode_answer(self.fmt, task.test[index].output, self.tokenizer, P)
            ids, cells = np.concatenate([ids, more]), np.concatenate([cells, located])
        if self.vocab_size is not None and ids.max() >= self.vocab_size:
            token = self.tokenizer.convert_ids_to_tokens(int(ids.max()))
            raise UserError(
                f"the prompt holds the token {token!r}, whose id is {ids.max()}, and the model has "
                f"{self.vocab_size} embeddings (vocab_size): use the tokenizer that belongs to the "
                "model, or a --prompt_format without that token"
            )
        return Encoded(ids, P, cells)

    def read(self, ids: Sequence[int], prompt_length: int = 0) -> Answer:
        """What generated ids, canonical or not, say, and which of them hold which cell.

        prompt_length: index of ids[0] in the sequence. The text ends before the first stop id. Each
        token is decoded on its own, behind an anchor, so that no decoder drops a leading space and
        each character belongs to one token; the bytes of a character that several tokens share
        become replacement characters, which are never part of a cell.
        """
        ids, end_of_turn = [int(token) for token in ids], self.fmt.end_of_turn
        pieces = _pieces(ids, self.tokenizer)
        end = next((i for i, token in enumerate(ids) if token in self.stop_ids), len(ids))
        if end < len(ids):  # in `plain` a closing fence can have merged with the blank line
            merged = end_of_turn and pieces[end].endswith(end_of_turn)
            pieces[end:] = [pieces[end].removesuffix(end_of_turn) if merged else ""]
        text = "".join(pieces)
        answer = self.fmt.parse(text)
        ends = np.cumsum([len(piece) for piece in pieces])
        cells = _locate(answer.cells, np.stack([ends - [len(piece) for piece in pieces], ends], 1))
        cells[:, 5:] += prompt_length
        if "\ufffd" in text:
            kept = self.tokenizer.backend_tokenizer.decode(ids[:end], skip_special_tokens=False)
            text = kept + "".join(pieces[end:])
        return replace(answer, cells=cells, text=text)


def load_codec(
    model_path: str | Path,
    base: Path,
    prompt_format: str,
    grid_encoding: str | None,
    vocab_size: int,
) -> Codec:
    """The codec of a model, offline. base: the folder whose configurations name the ends of an
    answer; model_path: it, or that of an adapter, see `tokenizer_folder`. Raises UserError for a
    tokenizer, template or end of text that cannot be used, or that does not fit a model with
    `vocab_size` embeddings."""
    folder = tokenizer_folder(model_path, base)
    tokenizer = load_tokenizer(folder)
    check_vocabulary(tokenizer, vocab_size)
    fmt = load_format(prompt_format, grid_encoding, tokenizer)
    configs = [_read_json(base / name) for name in ("generation_config.json", "config.json")]
    stops = stop_ids(tokenizer, configs, fmt)
    if fmt.thinking:
        log.info(
            "the prompt ends within a block of reasoning: an answer counts from its </think> on, "
            "and a forced answer begins with one"
        )
    return Codec(tokenizer, fmt, stops, hash_tokenizer(folder, tokenizer), vocab_size)


def hash_tokenizer(folder: Path, tokenizer: "PreTrainedTokenizerFast") -> str:
    """sha256 in hex of all that decides how a text becomes ids: the bytes of tokenizer.json, and
    what tokenizer_config.json or another file beside it adds and changes."""
    added = [
        [number, token.content, token.lstrip, token.rstrip, token.single_word, token.normalized]
        for number, token in sorted(tokenizer.added_tokens_decoder.items())
    ]
    special = [tokenizer.bos_token, tokenizer.eos_token, tokenizer.unk_token]
    settings = [added, special, tokenizer.init_kwargs.get("add_prefix_space")]
    digest = hashlib.sha256((folder / "tokenizer.json").read_bytes())
    digest.update(json.dumps(settings).encode())
    return digest.hexdigest()


def _read_json(path: Path) -> dict[str, Any] | None:
    if not path.exists():
        return None
    value = read_json(path)
    if not isinstance(value, dict):
        raise UserError(f"{path} does not hold a JSON object")
    return value


def tokenizer_folder(model_path: str | Path, base: Path) -> Path:
    """An adapter's folder may hold the tokenizer that it was trained with; else the base's."""
    return Path(model_path) if (Path(model_path) / "tokenizer.json").exists() else base


def load_tokenizer(model_path: str | Path) -> "PreTrainedTokenizerFast":
    """The fast tokenizer of a model folder, offline. Raises UserError where it is not there as a
    whole."""
    folder = model_folder(model_path)
    if not folder.is_dir():
        raise UserError(f"no model folder at {folder}; give the path of a local checkpoint")
    if not (folder / "tokenizer.json").is_file():
        slow = any((folder / name).is_file() for name in ("tokenizer.model", "vocab.json"))
        raise UserError(
            f"{folder} has only a slow tokenizer; write tokenizer.json with transformers: "
            "AutoTokenizer.from_pretrained(folder).save_pretrained(folder)"
            if slow
            else f"{folder} has no tokenizer; copy tokenizer.json and tokenizer_config.json there"
        )
    if not (folder / "tokenizer_config.json").is_file():
        raise UserError(
            f"{folder} has no tokenizer_config.json, which says how texts begin and end: copy it "
            "there too, and chat_template.jinja if the model came with one"
        )
    # Not AutoTokenizer: it imports torch where that is installed (1.6 s, 190 MB), and rebuilds
    # some tokenizers from their parts where tokenizer.json already says all.
    from transformers import PreTrainedTokenizerFast

    try:
        # The last argument keeps transformers from an alarm about a pattern that some tokenizers
        # of Mistral's split words by: they are read as AutoTokenizer reads them, digits one by one.
        tokenizer = PreTrainedTokenizerFast.from_pretrained(
            folder, local_files_only=True, fix_mistral_regex=False
        )
    except Exception as error:  # the tokenizers library raises bare Exception for a broken file
        reason = " ".join(str(error).split())
        raise UserError(f"cannot read the tokenizer in {folder}: {reason}") from error
    tokenizer.backend_tokenizer.no_truncation()  # either may be saved in tokenizer.json
    tokenizer.backend_tokenizer.no_padding()
    return tokenizer


def check_vocabulary(tokenizer: "PreTrainedTokenizerFast", vocab_size: int) -> None:
    """Raises UserError where the tokenizer has ids that the model, of vocab_size, does not; tokens
    that were added to it, often one for padding, are looked at where a prompt holds them."""
    added = tokenizer.added_tokens_encoder
    largest = max(id for token, id in tokenizer.get_vocab().items() if token not in added)
    if largest >= vocab_size:
        raise UserError(
            f"the tokenizer has token ids up to {largest}, but the model's vocab_size is "
            f"{vocab_size}; use the tokenizer that belongs to the model"
        )


def encode_prompt(
    prompt: Prompt, tokenizer: "PreTrainedTokenizerFast"
) -> tuple[np.ndarray, np.ndarray]:
    """input_ids: int32 [P]; cells: int32 [C, 7]. No special token is added but the prompt's BOS.

    Raises UserError where the vocabulary cannot write a cell.
    """
    ids, spans = _encode(prompt.text, tokenizer)
    cells = _cells_of(prompt, ids, spans, tokenizer)
    if prompt.prepend_bos:
        ids = np.concatenate([np.array([tokenizer.bos_token_id], np.int32), ids])
        cells[:, 5:] += 1
    return ids, cells


def encode_answer(
    fmt: PromptFormat, grid: Grid, tokenizer: "PreTrainedTokenizerFast", prompt_length: int = 0
) -> tuple[np.ndarray, np.ndarray]:
    """The answer that holds grid, end of turn included; cells: token indices from prompt_length on.

    ids: int32 [A], to be put after a prompt's. They are those that the tokenizer gives the answer
    after the prompt's own ending, as long as no token reaches over the border.
    """
    answer = fmt.render_answer(grid)
    text = answer.text + fmt.end_of_turn
    for context in (fmt.ending, "\n", ""):  # a tokenizer may open any text with a space of its own
        before, _ = _encode(context, tokenizer)
        ids, spans = _encode(context + text, tokenizer)
        if np.array_equal(ids[: len(before)], before):
            break
    ids, spans = ids[len(before) :], spans[len(before) :] - len(context)
    cells = _cells_of(answer, ids, spans, tokenizer)
    cells[:, 5:] += prompt_length
    return ids, cells


def stop_ids(
    tokenizer: "PreTrainedTokenizerFast",
    configs: Iterable[dict | None] = (),
    fmt: PromptFormat | None = None,
) -> tuple[int, ...]:
    """Every token id that ends an answer, ascending.

    EOS of the tokenizer and of configs (generation_config.json, config.json), the END_TOKENS that
    the vocabulary has, what the chat template puts after an assistant's message, and the token that
    ends an answer of fmt, where one token does and holds no cell.
    """
    ends = {tokenizer.eos_token_id}
    for config in configs:
        eos = (config or {}).get("eos_token_id")
        listed = eos if isinstance(eos, list) else [eos]
        if not all(end is None or type(end) is int for end in listed):
            raise UserError(
                "eos_token_id in generation_config.json or config.json must be a token id or a "
                f"list of them, not {eos!r}"
            )
        ends.update(listed)
    added = tokenizer.added_tokens_encoder
    ends.update(added.get(token) for token in END_TOKENS)
    if tokenizer.chat_template:
        with contextlib.suppress(UserError):  # formats that do without it are free to ignore it
            ends.update(_encode(assistant_turn(tokenizer)[1], tokenizer)[0][-1:].tolist())
    if fmt and fmt.end_of_turn:
        ids, cells = encode_answer(fmt, [[0]], tokenizer)
        mark = fmt.end_of_turn.strip() or fmt.end_of_turn
        if cells[-1, 6] < len(ids) and _pieces(ids[-1:].tolist(), tokenizer)[0].endswith(mark):
            ends.add(int(ids[-1]))
    return tuple(sorted(end for end in ends if end is not None))


def _encode(text: str, tokenizer: "PreTrainedTokenizerFast") -> tuple[np.ndarray, np.ndarray]:
    """ids: int32 [P]; spans: int32 [P, 2], the characters of text that each token holds."""
    backend = tokenizer.backend_tokenizer
    encoding = backend.encode(text, add_special_tokens=False)
    ids = np.array(encoding.ids, np.int32)
    spans = np.array(encoding.offsets, np.int32).reshape(-1, 2)
    # The space that SentencePiece puts before a text claims the first character for its own.
    spaces = [token for token in set(encoding.ids) if not backend.id_to_token(token).strip("▁")]
    added = np.isin(ids, spaces)
    spans[added, 1] = spans[added, 0]
    return ids, spans


def _locate(cells: np.ndarray, spans: np.ndarray) -> np.ndarray:
    """cells with character spans, spans: int32 [P, 2] of tokens -> cells with token spans."""
    located = cells.copy()
    located[:, 5] = np.searchsorted(spans[:, 1], cells[:, 5], side="right")
    located[:, 6] = np.searchsorted(spans[:, 0], cells[:, 6], side="left")
    return located


def _cells_of(
    prompt: Prompt, ids: np.ndarray, spans: np.ndarray, tokenizer: "PreTrainedTokenizerFast"
) -> np.ndarray:
    """Its cells with token spans. Raises UserError where one has no token, or the token that stands
    for anything unknown."""
    cells = _locate(prompt.cells, spans)
    unknown = np.concatenate([[0], np.cumsum(ids == tokenizer.unk_token_id)])
    start, stop = cells[:, 5], cells[:, 6]
    lost = np.flatnonzero((stop <= start) | (unknown[stop] > unknown[start]))
    if len(lost):
        char_start, char_stop = prompt.cells[lost[0], 5:]
        raise UserError(
            f"the tokenizer has no token for the cell {prompt.text[char_start:char_stop]!r}; "
            "choose another --grid_encoding"
        )
    return cells


def _pieces(ids: list[int], tokenizer: "PreTrainedTokenizerFast") -> list[str]:
    """The text of each token on its own; "" for an id that the tokenizer does not have."""
    backend = tokenizer.backend_tokenizer
    if backend.decoder is None:
        return [backend.id_to_token(token) or "" for token in ids]
    anchor = backend.encode("0", add_special_tokens=False).ids[-1:]
    skip = len(backend.decode(anchor, skip_special_tokens=False))
    texts = {
        token: backend.decode([*anchor, token], skip_special_tokens=False)[skip:]
        for token in set(ids)
    }
    return [texts[token] for token in ids]
