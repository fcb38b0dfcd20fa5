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
        match self.op:
            case "zero":
                new = jnp.zeros_like(wide)
            case "set":
                new = jnp.broadcast_to(arrays["vector"], wide.shape)
            case "add":
                new = wide + arrays["vector"]
            case "scale":
                new = wide * arrays["factor"]
            case "ablate_direction":
                direction = arrays["vector"]
                new = wide - jnp.sum(wide * direction, axis=-1, keepdims=True) * direction
            case "latent":
                # The latent's share is exchanged; what the autoencoder does not explain stays.
                weights, latent = arrays["weights"], arrays["latent"]
                latents = encode(self.architecture, self.k, weights, wide)
                before = jnp.take(latents, latent, axis=-1)
                after = before * arrays["amount"] if self.relative else arrays["amount"]
                direction = jnp.take(weights["w_dec"], latent, axis=0)
                new = wide + (after - before)[..., None] * direction
            case "reconstruct":
                weights = arrays["weights"]
                new = decode(weights, encode(self.architecture, self.k, weights, wide))
            case "patch":
                new = arrays["values"].astype(jnp.float32)
        return jnp.where(arrays["mask"][..., None], new.astype(x.dtype), x)
