"""The decoder of Qwen2, Qwen3, Llama and Mistral checkpoints, in Flax Linen.

One module for all four families; the differences are fields of `ModelConfig`. It knows nothing of
batches, sampling, files or meshes. Hidden states leave it through the `intermediates` collection,
gated by the static capture spec, so that a run without capture is the same code with less kept.
"""

# B batch   T query tokens   S key tokens   D model width   F mlp width
# N query heads   K key/value heads   H head width   V vocabulary

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from utils.attention import INVALID_POSITION, attend, attend_prompt, rotate, rotation
from utils.capture import CaptureSpec
from utils.config import ModelConfig

Cache = dict[str, Any]


class RMSNorm(nn.Module):
    """Root-mean-square norm (Zhang and Sennrich 2019) in float32, over the last axis."""

    eps: float

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        scale = self.param("scale", nn.initializers.ones, (x.shape[-1],))
        x32 = x.astype(jnp.float32)
        x32 = x32 * jax.lax.rsqrt(jnp.mean(x32 * x32, axis=-1, keepdims=True) + self.eps)
        return x32.astype(x.dtype) * scale


class Attention(nn.Module):
    config: ModelConfig
    layer: int

    @nn.compact
    def __call__(
        self,
        x: jax.Array,
        positions: jax.Array,
        cos_sin: tuple[jax.Array, jax.Array],
        cache: Cache | None,
        key_positions: jax.Array | None,
        slot: jax.Array | None,
    ) -> tuple[jax.Array, Cache | None]:
        """x: [B, T, D] -> [B, T, D], and this layer's cache with the T tokens written at `slot`."""
        c = self.config
        D, N, K, H = c.hidden_size, c.num_heads, c.num_kv_heads, c.head_dim

        def project(name: str, heads: int) -> jax.Array:
            kernel = self.param(name, nn.initializers.lecun_normal(), (D, heads, H))
            y = jnp.einsum("BTD,DNH->BTNH", x, kernel)
            if c.qkv_bias:
                y = y + self.param(f"{name}_bias", nn.initializers.zeros, (heads, H))
            return y

        query, key, value = project("query", N), project("key", K), project("value", K)
        if c.qk_norm:
            query = RMSNorm(c.rms_norm_eps, name="query_norm")(query)
            key = RMSNorm(c.rms_norm_eps, name="key_norm")(key)
        query, key = rotate(query, cos_sin), rotate(key, cos_sin)

        key, value = key.swapaxes(1, 2), value.swapaxes(1, 2)
        if cache is not None:
            at = (0, 0, 0 if slot is None else slot, 0)
            cache = {
                "key": jax.lax.dynamic_update_slice(cache["key"], key, at),
                "value": jax.lax.dynamic_update_slice(cache["value"], value, at),
            }
        window = c.sliding_windows[self.layer]
        if slot is None:
            y = attend_prompt(query, key, value, positions, window)
        else:
            y = attend(query, cache["key"], cache["value"], positions, key_positions, window)

        kernel = self.param("out", nn.initializers.lecun_normal(), (N, H, D))
        y = jnp.einsum("BTNH,NHD->BTD", y, kernel)
        if c.out_bias:
            y = y + self.param("out_bias", nn.initializers.zeros, (D,))
        return y, cache


class Mlp(nn.Module):
    config: ModelConfig

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """SwiGLU (Shazeer 2020); [B, T, D] -> [B, T, D]."""
        D, F = self.config.hidden_size, self.config.intermediate_size

        def project(name: str, y: jax.Array, shape: tuple[int, int]) -> jax.Array:
            y = jnp.einsum(
                "BTD,DF->BTF", y, self.param(name, nn.initializers.lecun_normal(), shape)
            )
            if self.config.mlp_bias:
                y = y + self.param(f"{name}_bias", nn.initializers.zeros, shape[1:])
            return y

        gated = jax.nn.silu(project("gate", x, (D, F))) * project("up", x, (D, F))
        return project("down", gated, (F, D))


class Block(nn.Module):
    config: ModelConfig
    layer: int
    capture: CaptureSpec

    @nn.compact
    def __call__(self, x: jax.Array, *args: Any) -> tuple[jax.Array, Cache | None]:
        eps = self.config.rms_norm_eps
        self._capture("resid_pre", x)
        y, cache = Attention(self.config, self.layer, name="attention")(
            RMSNorm(eps, name="attention_norm")(x), *args
        )
        self._capture("attn_out", y)
        x = x + y
        self._capture("resid_mid", x)
        y = Mlp(self.config, name="mlp")(RMSNorm(eps, name="mlp_norm")(x))
        self._capture("mlp_out", y)
        x = x + y
        self._capture("resid_post", x)
        return x, cache

    def _capture(self, hook_point: str, value: jax.Array) -> None:
        """Sows [B, T, D] as a bare array, if the spec asks for it."""
        if f"{hook_point}.{self.layer}" in self.capture.names:
            self.sow("intermediates", hook_point, value, lambda _, new: new, lambda: None)


class Decoder(nn.Module):
    """Token ids to hidden states, and hidden states to logits.

    num_layers_run: layers that are computed, from the first; all of them unless nothing after the
    last captured layer is wanted.
    """

    config: ModelConfig
    capture: CaptureSpec = CaptureSpec()
    num_layers_run: int | None = None

    def setup(self) -> None:
        c = self.config
        n = c.num_layers if self.num_layers_run is None else self.num_layers_run
        init = nn.initializers.normal(0.02)
        self.embedding = self.param("embedding", init, (c.vocab_size, c.hidden_size))
        self.layers = [Block(c, i, self.capture) for i in range(n)]
        if n == c.num_layers:
            self.final_norm = RMSNorm(c.rms_norm_eps)
            if not c.tie_word_embeddings:
                self.head = self.param("head", init, (c.hidden_size, c.vocab_size))

    def __call__(
        self,
        tokens: jax.Array,
        positions: jax.Array,
        cache: Cache | None = None,
        slot: jax.Array | None = None,
    ) -> tuple[jax.Array, Cache | None]:
        """Residual stream after the last layer that is run, [B, T, D], and the cache.

        tokens, positions: int32 [B, T]. Without `slot` the T tokens are a prompt: they see one
        another, and a cache that is given is filled from slot 0. With `slot` (int32 scalar) they
        are written there and see the whole cache. Call through
        `apply(..., mutable=["intermediates"])` to receive what the spec captures.
        """
        x = self.embedding[tokens]
        cos_sin = rotation(positions, self.config.rope, self.config.head_dim)
        new: Cache = {}
        key_positions = None
        if cache is not None:
            key_positions = jax.lax.dynamic_update_slice(
                cache["positions"], positions, (0, 0 if slot is None else slot)
            )
            new["positions"] = key_positions
        for layer in self.layers:
            entry = None if cache is None else cache[layer.name]
            x, new[layer.name] = layer(x, positions, cos_sin, entry, key_positions, slot)
        return x, None if cache is None else new

    def logits(self, x: jax.Array) -> jax.Array:
        """Final norm and unembedding: [..., D] -> float32 [..., V]."""
        x = self.final_norm(x)
        if self.config.tie_word_embeddings:
            logits = jnp.einsum("...D,VD->...V", x, self.embedding)
        else:
            logits = jnp.einsum("...D,DV->...V", x, self.head)
        return logits.astype(jnp.float32)

    def initialize(self, tokens: jax.Array, positions: jax.Array) -> jax.Array:
        """Touches every parameter; for `init` and abstract shapes."""
        return self.logits(self(tokens, positions)[0])


def empty_cache(config: ModelConfig, batch: int, size: int, dtype: Any) -> Cache:
    """Cache of `size` slots, all invalid: key and value [B, K, S, H], positions int32 [B, S]."""
    shape = (batch, config.num_kv_heads, size, config.head_dim)
    return {
        "positions": jnp.full((batch, size), INVALID_POSITION, jnp.int32),
        **{
            f"layers_{i}": {"key": jnp.zeros(shape, dtype), "value": jnp.zeros(shape, dtype)}
            for i in range(config.num_layers)
        },
    }


def captured(intermediates: dict[str, Any]) -> dict[str, jax.Array]:
    """The `intermediates` collection -> `{"<hook_point>.<layer>": [B, T, D]}`."""
    return {
        f"{hook_point}.{block.removeprefix('layers_')}": value
        for block, points in intermediates.items()
        for hook_point, value in points.items()
    }
