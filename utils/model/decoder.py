"""The decoder of Qwen2, Qwen3, Llama and Mistral checkpoints, in Flax Linen.

One module for all four families; the differences are fields of `ModelConfig`. It knows nothing of
batches, sampling or files, and of the mesh only what `Layout` says. Hidden states leave it through
the `intermediates` collection, gated by the static capture spec, so that a run without capture is
the same code with less kept.
"""

# B batch   T query tokens   S key tokens   D model width   F mlp width
# N query heads   K key/value heads   H head width   V vocabulary

from dataclasses import dataclass
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import Array
from jax.lax import dynamic_update_slice_in_dim

from utils.model.attention import INVALID_POSITION, attend, attend_prompt, rotate, rotation
from utils.model.capture import CaptureSpec
from utils.model.config import ModelConfig
from utils.model.layout import Layout

Cache = dict[str, Any]


class RMSNorm(nn.Module):
    """Root-mean-square norm (Zhang and Sennrich 2019) in float32, over the last axis."""

    eps: float

    @nn.compact
    def __call__(self, x: Array) -> Array:
        scale = self.param("scale", nn.initializers.ones, (x.shape[-1],))
        x32 = x.astype(jnp.float32)
        x32 = x32 * jax.lax.rsqrt(jnp.mean(x32 * x32, axis=-1, keepdims=True) + self.eps)
        return x32.astype(x.dtype) * scale


@dataclass(frozen=True)
class Past:
    """What a generated token finds in one layer of the tokens before it, in every row.

    cache: key and value [B, K, S, H]. key_positions: int32 [B, S], this token's among them. slot:
    int32 scalar, where this token's own key and value go.
    """

    cache: Cache
    key_positions: Array
    slot: Array


class Attention(nn.Module):
    config: ModelConfig
    layer: int
    layout: Layout

    @nn.compact
    def __call__(
        self, x: Array, positions: Array, cos_sin: tuple[Array, Array], past: Past | None
    ) -> tuple[Array, Cache]:
        """x: [B, T, D] -> [B, T, D], and keys and values.

        Without a past the T tokens are a prompt, whose keys and values are [B, K, T, H]; else T is
        1, and they are the cache's with the token written into it.
        """
        c, layout = self.config, self.layout
        D, N, K, H = c.hidden_size, c.num_heads, c.num_kv_heads, c.head_dim
        heads = layout.heads(prompt=past is None)
        gather = layout.gathers_attention(prompt=past is None)

        def project(name: str, count: int) -> Array:
            kernel = self.param(name, nn.initializers.lecun_normal(), (D, count, H))
            y = jnp.einsum("BTD,DNH->BTNH", x, layout.kernel(kernel, gather))
            y = layout.split(y, *heads)
            if c.qkv_bias:
                y = y + self.param(f"{name}_bias", nn.initializers.zeros, (count, H))
            return y

        query, key, value = project("query", N), project("key", K), project("value", K)
        if c.qk_norm:
            query = RMSNorm(c.rms_norm_eps, name="query_norm")(query)
            key = RMSNorm(c.rms_norm_eps, name="key_norm")(key)
        query, key = rotate(query, cos_sin), rotate(key, cos_sin)
        key, value = key.swapaxes(1, 2), value.swapaxes(1, 2)

        window = c.sliding_windows[self.layer]
        if past is None:
            cache = {"key": key, "value": value}
            y = attend_prompt(query, key, value, positions, window, layout)
        else:
            cache = {
                name: dynamic_update_slice_in_dim(past.cache[name], x, past.slot, axis=2)
                for name, x in (("key", key), ("value", value))
            }
            y = attend(query, cache["key"], cache["value"], positions, past.key_positions, window)
            y = layout.split(y, *heads)

        kernel = self.param("out", nn.initializers.lecun_normal(), (N, H, D))
        y = jnp.einsum("BTNH,NHD->BTD", y, layout.kernel(kernel, gather))
        if c.out_bias:
            y = y + self.param("out_bias", nn.initializers.zeros, (D,))
        return y, cache


class Mlp(nn.Module):
    config: ModelConfig
    layout: Layout

    @nn.compact
    def __call__(self, x: Array) -> Array:
        """SwiGLU (Shazeer 2020); [B, T, D] -> [B, T, D]."""
        layout = self.layout
        B, T, D = x.shape
        F = layout.padded(self.config.intermediate_size)
        gather = layout.gathers_mlp(B, T, F)

        def project(name: str, y: Array, shape: tuple[int, int]) -> Array:
            kernel = self.param(name, nn.initializers.lecun_normal(), shape)
            y = jnp.einsum("BTD,DF->BTF", y, layout.kernel(kernel, gather))
            if self.config.mlp_bias:
                y = y + self.param(f"{name}_bias", nn.initializers.zeros, shape[1:])
            return y

        gated = jax.nn.silu(project("gate", x, (D, F))) * project("up", x, (D, F))
        by = ("data", "model") if gather else ("data", None, "model")  # tokens, or width
        return project("down", layout.split(gated, *by), (F, D))


class Block(nn.Module):
    config: ModelConfig
    layer: int
    capture: CaptureSpec
    layout: Layout

    @nn.compact
    def __call__(
        self, x: Array, positions: Array, cos_sin: tuple[Array, Array], past: Past | None
    ) -> tuple[Array, Cache]:
        """The residual stream [B, T, D] after this layer, and the rest as `Attention` gives it."""
        eps = self.config.rms_norm_eps

        def split(y: Array) -> Array:
            return self.layout.split(y, *self.layout.stream(prompt=past is None))

        self._capture("resid_pre", x)
        y, cache = Attention(self.config, self.layer, self.layout, name="attention")(
            RMSNorm(eps, name="attention_norm")(x), positions, cos_sin, past
        )
        y = split(y)
        self._capture("attn_out", y)
        x = split(x + y)
        self._capture("resid_mid", x)
        y = split(Mlp(self.config, self.layout, name="mlp")(RMSNorm(eps, name="mlp_norm")(x)))
        self._capture("mlp_out", y)
        x = split(x + y)
        self._capture("resid_post", x)
        return x, cache

    def _capture(self, hook_point: str, value: Array) -> None:
        """Sows [B, T, D] as a bare array, if the spec asks for it."""
        if f"{hook_point}.{self.layer}" in self.capture.names:
            self.sow("intermediates", hook_point, value, lambda _, new: new, lambda: None)


class Decoder(nn.Module):
    """Token ids to hidden states, and hidden states to logits.

    num_layers_run: layers that are computed, from the first; all of them unless nothing after the
    last captured layer is wanted.
    """

    config: ModelConfig
    layout: Layout
    capture: CaptureSpec = CaptureSpec()
    num_layers_run: int | None = None

    def setup(self) -> None:
        c = self.config
        n = c.num_layers if self.num_layers_run is None else self.num_layers_run
        V = self.layout.padded(c.vocab_size)
        init = nn.initializers.normal(0.02)
        self.embedding = self.param("embedding", init, (V, c.hidden_size))
        self.layers = [Block(c, i, self.capture, self.layout) for i in range(n)]
        if n == c.num_layers:
            self.final_norm = RMSNorm(c.rms_norm_eps)
            if not c.tie_word_embeddings:
                self.head = self.param("head", init, (c.hidden_size, V))

    def __call__(
        self, tokens: Array, positions: Array, cache: Cache | None = None, slot: Array | None = None
    ) -> tuple[Array, Cache]:
        """Residual stream after the last layer that is run, [B, T, D], and keys and values.

        tokens, positions: int32 [B, T]. Without a cache the T tokens are a prompt, in the order of
        `Layout.deal`: they see one another, and layer name -> key, value [B, K, T, H] comes back.
        With a cache (`filled_cache`) there is one token a row, which is written at `slot` (int32
        scalar) and sees the whole cache. Call through `apply(..., mutable=["intermediates"])` to
        receive what the spec captures.
        """
        x = self.layout.look_up(self.embedding, tokens)
        cos_sin = rotation(positions, self.config.rope, self.config.head_dim)
        new: Cache = {}
        if cache is not None:
            new["positions"] = dynamic_update_slice_in_dim(
                cache["positions"], positions, slot, axis=1
            )
        for layer in self.layers:
            past = None if cache is None else Past(cache[layer.name], new["positions"], slot)
            x, new[layer.name] = layer(x, positions, cos_sin, past)
        return x, new

    def logits(self, x: Array) -> Array:
        """Final norm and unembedding: [B, D] -> float32 [B, V]; -inf where V is padded."""
        x = self.layout.split(self.final_norm(x), "data")
        if self.config.tie_word_embeddings:
            axes, kernel = "BD,VD->BV", self.embedding
        else:
            axes, kernel = "BD,DV->BV", self.head
        # Not rounded to the model's dtype: bfloat16 makes the highest of them equal too often.
        logits = jnp.einsum(axes, x, kernel, preferred_element_type=jnp.float32)
        logits = self.layout.split(logits, "data", "model")
        if logits.shape[-1] == self.config.vocab_size:
            return logits
        return jnp.where(jnp.arange(logits.shape[-1]) < self.config.vocab_size, logits, -jnp.inf)

    def initialize(self, tokens: Array, positions: Array) -> Array:
        """Touches every parameter; for `init` and abstract shapes."""
        return self.logits(self(tokens, positions)[0][:, 0])


def filled_cache(
    layout: Layout, prompt: Cache, positions: Array, lengths: Array, answer: int
) -> Cache:
    """The cache of a prompt with room for `answer` tokens behind it.

    prompt: what the decoder returned. positions: int32 [B, T] in the order of `Layout.deal`;
    lengths: int32 [B] of the prompts. Each layer's key and value are [B, K, S, H], `positions`
    int32 [B, S]: a slot of padding, or one that is not written yet, is in nobody's past.
    """
    size = layout.cache_size(positions.shape[1], answer)
    over = ("model", None) if layout.by_heads else (None, "model")  # heads, slots

    def slots(x: Array) -> Array:
        return layout.split(layout.into_slots(x, size, 2), "data", *over)

    real = jnp.where(positions < lengths[:, None], positions, INVALID_POSITION)
    at = layout.into_slots(real, size, 1, INVALID_POSITION)
    return {
        "positions": layout.split(at, "data", over[1]),
        **{name: jax.tree.map(slots, layer) for name, layer in prompt.items()},
    }


def captured(variables: dict[str, Any]) -> dict[str, Array]:
    """What `apply` gave beside its result -> `{"<hook_point>.<layer>": [B, T, D]}`."""
    return {
        f"{hook_point}.{block.removeprefix('layers_')}": value
        for block, points in variables.get("intermediates", {}).items()
        for hook_point, value in points.items()
    }
