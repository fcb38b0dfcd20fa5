"""Which layers and hook points are captured, for which tokens, and what each capture is called."""

import hashlib
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from utils.errors import UserError
from utils.model.config import ModelConfig

HOOK_POINTS = (
    *("resid_pre", "resid_mid", "resid_post", "attn_out", "mlp_out"),
    *("attn_in", "q", "k", "v", "z", "mlp_in", "mlp_act"),
)
TOKEN_POSITIONS = ("all", "prompt", "answer", "last", "cells")
# Where TransformerLens has a hook point in a block; all others are called `hook_` and their name.
# Its `hook_normalized` is before the norm's weight unless that was folded into what follows.
_PLACES = {
    "attn_in": "ln1.hook_normalized",
    "mlp_in": "ln2.hook_normalized",
    "mlp_act": "mlp.hook_post",
    **{point: f"attn.hook_{point}" for point in "qkvz"},
}


@dataclass(frozen=True)
class CaptureSpec:
    """What is captured; static under `jit`, so that nothing else is computed or kept.

    names: the keys of an item's `activations`, `"<hook_point>.<layer>"`, layers ascending. tokens:
    which tokens' states are kept, one of TOKEN_POSITIONS; `last` is the last token of the prompt,
    the one that the answer's first token is predicted from, and `cells` are those that hold a cell
    of any grid. max_rows: of these tokens so many are drawn in each sample, by `seed`.

    The device captures one run of tokens, `rows`; the host keeps those among them that `kept` says.
    """

    names: tuple[str, ...] = ()
    tokens: str = "all"
    max_rows: int | None = None
    seed: int = 0

    @classmethod
    def from_flags(
        cls,
        config: ModelConfig,
        layers: Sequence[str] | None,
        hook_points: Sequence[str],
        tokens: str,
        max_rows: int | None = None,
        seed: int = 0,
    ) -> "CaptureSpec":
        """layers: integers (negative from the end) or `all`; None is first, middle and last.

        Raises UserError when a layer or hook point does not exist.
        """
        indices = resolve_layers(config.num_layers, layers)
        for hook_point in hook_points:
            if hook_point not in HOOK_POINTS:
                raise UserError(
                    f"hook point {hook_point!r} does not exist; there are {', '.join(HOOK_POINTS)}"
                )
        if config.num_experts and "mlp_act" in hook_points:
            raise UserError(
                "hook point mlp_act does not exist in a mixture of experts: each token has that of "
                "several experts; take mlp_in and mlp_out"
            )
        wanted = [point for point in HOOK_POINTS if point in hook_points]
        names = tuple(f"{point}.{i}" for i in indices for point in wanted)
        return cls(names, tokens, max_rows, seed)

    def start(self, prompt: Any) -> Any:
        """Index of the first token that is kept, after prompts of `prompt` tokens: an int, or an
        array of the lengths of several prompts; always the int 0 where all start there."""
        return {"answer": prompt, "last": prompt - 1}.get(self.tokens, 0)

    def rows(self, prompt: int, answer: int) -> range:
        """The tokens that a capture's rows belong to on the device, of a prompt and an answer of so
        many tokens; `start` is its beginning. For `cells`, which lie anywhere, it is all of them.
        """
        stop = prompt if self.tokens in ("prompt", "last") else prompt + answer
        return range(self.start(prompt), stop)

    @property
    def keeps_all(self) -> bool:
        """Whether every token of every sample has a row."""
        return self.tokens == "all" and self.max_rows is None

    def kept(
        self, prompt: int, answer: int, spans: np.ndarray, key: tuple[str | int, ...]
    ) -> np.ndarray:
        """The tokens whose rows are stored, of `rows`: int32 [R], ascending.

        spans: int [C, 2], first token of each cell and the one behind its last. key: of the sample.
        What is drawn depends on the seed and the key alone: every token of a sample has a random
        number, and those with the lowest are kept.
        """
        span = self.rows(prompt, answer)
        tokens = np.arange(span.start, span.stop, dtype=np.int32)
        if self.tokens == "cells":
            tokens = tokens_in(spans, prompt + answer)
        if self.max_rows is not None and len(tokens) > self.max_rows:
            digest = hashlib.sha256(repr((self.seed, *key)).encode()).digest()
            # Raw bits: numpy may change how it makes other draws of them, but not the bits.
            numbers = np.random.PCG64(int.from_bytes(digest)).random_raw(prompt + answer)
            lowest = np.argsort(numbers[tokens], kind="stable")[: self.max_rows]
            tokens = np.sort(tokens[lowest])
        return tokens

    def num_kept(self, prompt: int, answer: int, cell_tokens: int) -> int:
        """How many tokens `kept` gives, where `cell_tokens` of them hold a cell."""
        chosen = cell_tokens if self.tokens == "cells" else len(self.rows(prompt, answer))
        return chosen if self.max_rows is None else min(chosen, self.max_rows)

    def points(self, layer: int) -> tuple[str, ...]:
        """The hook points that are captured in a layer."""
        parts = (name.partition(".") for name in self.names)
        return tuple(point for point, _, number in parts if int(number) == layer)

    @property
    def in_prefill(self) -> bool:
        """Whether any prompt token is captured."""
        return bool(self.names) and self.start(1) < 1

    @property
    def in_decode(self) -> bool:
        """Whether any answer token is captured."""
        return bool(self.names) and self.rows(1, 1).stop > 1

    @property
    def last_layer(self) -> int:
        """Highest layer that is captured, or -1."""
        return max((int(name.rpartition(".")[2]) for name in self.names), default=-1)


def width_of(config: ModelConfig, name: str) -> int:
    """The width of what is captured under a name."""
    heads = {"q": config.num_heads, "k": config.num_kv_heads, "v": config.num_kv_heads}
    heads["z"] = config.num_heads
    hook_point = name.partition(".")[0]
    if hook_point in heads:
        return heads[hook_point] * config.head_dim
    return config.intermediate_size if hook_point == "mlp_act" else config.hidden_size


def hook_name(name: str) -> str:
    """`resid_post.11` as TransformerLens, and with it SAELens, calls it."""
    point, _, layer = name.rpartition(".")
    return f"blocks.{layer}.{_PLACES.get(point, f'hook_{point}')}"


def capture_name(hook: str) -> str:
    """TransformerLens's `blocks.11.hook_resid_post`, or `model.layers.11`, by which Hugging Face
    models call the same, as it is called here. Raises UserError for a place that is not captured.
    """
    for point in HOOK_POINTS:
        place = re.escape(hook_name(f"{point}.")).replace(r"\.\.", r"\.(\d+)\.", 1)
        if found := re.fullmatch(place, hook):
            return f"{point}.{found[1]}"
    if found := re.fullmatch(r"model\.layers\.(\d+)", hook):
        return f"resid_post.{found[1]}"
    raise UserError(f"it was trained at {hook!r}, which is none of the places captured here")


def tokens_in(spans: np.ndarray, tokens: int) -> np.ndarray:
    """Which of so many tokens are in one of the spans, int [C, 2]: int32, ascending."""
    steps = np.zeros(tokens + 1, np.int64)
    np.add.at(steps, spans[:, 0], 1)
    np.add.at(steps, spans[:, 1], -1)
    return np.flatnonzero(steps.cumsum() > 0).astype(np.int32)


def resolve_layers(num_layers: int, layers: Sequence[str] | None) -> list[int]:
    """Layer flags -> ascending indices in 0..num_layers - 1, each once."""
    if layers is None:
        return sorted({0, (num_layers - 1) // 2, num_layers - 1})
    if list(layers) == ["all"]:
        return list(range(num_layers))
    indices = set()
    for text in layers:
        try:
            index = int(text)
        except ValueError:
            raise UserError(
                f"layer {text!r} is neither a whole number nor `all` on its own"
            ) from None
        if not -num_layers <= index < num_layers:
            raise UserError(
                f"layer {index} does not exist: the model has {num_layers} layers, "
                f"0..{num_layers - 1} or -{num_layers}..-1"
            )
        indices.add(index % num_layers)
    return sorted(indices)
