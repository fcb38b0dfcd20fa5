"""Which layers and hook points are captured, for which tokens, and what each capture is called."""

from collections.abc import Sequence
from dataclasses import dataclass

from utils.errors import UserError
from utils.model.config import ModelConfig

HOOK_POINTS = ("resid_pre", "resid_mid", "resid_post", "attn_out", "mlp_out")
TOKEN_POSITIONS = ("all", "prompt", "answer", "last")


def capture_name(hook_point: str, layer: int) -> str:
    """The key of an item's `activations`, e.g. `resid_post.11`."""
    return f"{hook_point}.{layer}"


@dataclass(frozen=True)
class CaptureSpec:
    """What is captured; static under `jit`, so that nothing else is computed or kept.

    names: `"<hook_point>.<layer>"`, layers ascending. positions: one of TOKEN_POSITIONS; `last` is
    the last token of the prompt, the one that the answer's first token is predicted from.
    """

    names: tuple[str, ...] = ()
    positions: str = "all"

    @classmethod
    def from_flags(
        cls,
        config: ModelConfig,
        layers: Sequence[str] | None,
        hook_points: Sequence[str],
        positions: str,
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
        wanted = [point for point in HOOK_POINTS if point in hook_points]
        return cls(tuple(capture_name(p, i) for i in indices for p in wanted), positions)

    @property
    def in_prefill(self) -> bool:
        """Whether any prompt token is captured."""
        return bool(self.names) and self.positions != "answer"

    @property
    def in_decode(self) -> bool:
        """Whether any answer token is captured."""
        return bool(self.names) and self.positions in ("all", "answer")

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
