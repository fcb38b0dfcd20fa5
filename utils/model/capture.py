"""Which layers and hook points are captured, for which tokens, and what each capture is called."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from utils.errors import UserError

HOOK_POINTS = ("resid_pre", "resid_mid", "resid_post", "attn_out", "mlp_out")
TOKEN_POSITIONS = ("all", "prompt", "answer", "last")


@dataclass(frozen=True)
class CaptureSpec:
    """What is captured; static under `jit`, so that nothing else is computed or kept.

    names: the keys of an item's `activations`, `"<hook_point>.<layer>"`, layers ascending. tokens:
    which tokens' states are kept, one of TOKEN_POSITIONS; `last` is the last token of the prompt,
    the one that the answer's first token is predicted from.
    """

    names: tuple[str, ...] = ()
    tokens: str = "all"

    @classmethod
    def from_flags(
        cls, num_layers: int, layers: Sequence[str] | None, hook_points: Sequence[str], tokens: str
    ) -> "CaptureSpec":
        """layers: integers (negative from the end) or `all`; None is first, middle and last.

        Raises UserError when a layer or hook point does not exist.
        """
        indices = resolve_layers(num_layers, layers)
        for hook_point in hook_points:
            if hook_point not in HOOK_POINTS:
                raise UserError(
                    f"hook point {hook_point!r} does not exist; there are {', '.join(HOOK_POINTS)}"
                )
        wanted = [point for point in HOOK_POINTS if point in hook_points]
        return cls(tuple(f"{point}.{i}" for i in indices for point in wanted), tokens)

    def start(self, prompt: Any) -> Any:
        """Index of the first token that is kept, after prompts of `prompt` tokens: an int, or an
        array of the lengths of several prompts; always the int 0 where all start there."""
        return {"all": 0, "prompt": 0, "answer": prompt, "last": prompt - 1}[self.tokens]

    def rows(self, prompt: int, answer: int) -> range:
        """The tokens that a capture's rows belong to, of a prompt and an answer of so many tokens.

        This is the one place that knows what --token_positions means; `start` is its beginning.
        """
        stop = {"all": prompt + answer, "answer": prompt + answer}.get(self.tokens, prompt)
        return range(self.start(prompt), stop)

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
