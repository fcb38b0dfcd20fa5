"""What a run changes in the hidden states, at the places where they are captured.

An intervention is an `Edit`, which is static under `jit`, and its arrays, which are arguments of
the compiled program: other vectors, masks or latents compile nothing. Knows no tasks or files.
"""

# B batch   T tokens   W width of the hook point   L latents of an autoencoder

from dataclasses import dataclass
from typing import Any

import jax.numpy as jnp
from jax import Array

from utils.model.autoencoder import decode, encode

OPS = ("zero", "set", "add", "scale", "ablate_direction", "latent", "reconstruct", "patch")
OVERWRITING = ("zero", "set", "patch", "reconstruct")
Arrays = dict[str, Any]


@dataclass(frozen=True)
class Edit:
    """The static part of an intervention.

    hook: a capture name, `resid_post.11`. op: one of OPS. architecture, k: of the autoencoder of
    `latent` and `reconstruct`. relative: whether a latent is multiplied instead of set.
    """

    hook: str
    op: str
    architecture: str | None = None
    k: int | None = None
    relative: bool = False

    @property
    def hook_point(self) -> str:
        return self.hook.partition(".")[0]

    @property
    def layer(self) -> int:
        return int(self.hook.partition(".")[2])

    def apply(self, x: Array, arrays: Arrays) -> Array:
        """x, [B, T, W], changed at the tokens of `mask`, bool [B, T].

        Beside `mask`, arrays holds `vector`, float32 [W], of set, add (already multiplied by
        alpha) and ablate_direction (of norm 1); `factor`, float32 scalar, of scale; `values`,
        [B, T, W], of patch; `weights`, of an autoencoder; `latent`, int32 scalar, and `amount`,
        float32 scalar, what it becomes or is multiplied by.
        """
        wide = x.astype(jnp.float32)
        new = getattr(self, f"_{self.op}")(wide, arrays)
        return jnp.where(arrays["mask"][..., None], new.astype(x.dtype), x)

    def _zero(self, x: Array, arrays: Arrays) -> Array:
        return jnp.zeros_like(x)

    def _set(self, x: Array, arrays: Arrays) -> Array:
        return jnp.broadcast_to(arrays["vector"], x.shape)

    def _add(self, x: Array, arrays: Arrays) -> Array:
        return x + arrays["vector"]

    def _scale(self, x: Array, arrays: Arrays) -> Array:
        return x * arrays["factor"]

    def _ablate_direction(self, x: Array, arrays: Arrays) -> Array:
        direction = arrays["vector"]
        return x - jnp.sum(x * direction, axis=-1, keepdims=True) * direction

    def _latent(self, x: Array, arrays: Arrays) -> Array:
        """The latent's share is exchanged; what the autoencoder does not explain stays."""
        weights, latent = arrays["weights"], arrays["latent"]
        before = jnp.take(encode(self.architecture, self.k, weights, x), latent, axis=-1)
        after = before * arrays["amount"] if self.relative else arrays["amount"]
        return x + (after - before)[..., None] * jnp.take(weights["w_dec"], latent, axis=0)

    def _reconstruct(self, x: Array, arrays: Arrays) -> Array:
        weights = arrays["weights"]
        return decode(weights, encode(self.architecture, self.k, weights, x))

    def _patch(self, x: Array, arrays: Arrays) -> Array:
        return arrays["values"].astype(jnp.float32)
