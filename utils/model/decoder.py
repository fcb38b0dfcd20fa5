"""The decoder of Qwen, Llama, Mistral and Gemma checkpoints, in Flax Linen.

One module for all families; the differences are fields of `ModelConfig`. It knows nothing of
batches, sampling or files, and of the mesh only what `Layout` says. Hidden states leave it through
the `intermediates` collection, gated by the static capture spec, so that a run without capture is
the same code with less kept.
"""

# B batch   T tokens   S slots of the cache   D model width   F mlp width
# N query heads   K key/value heads   H head width   V vocabulary   E experts

import math
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax.traverse_util import flatten_dict
from jax import Array
from jax.sharding import PartitionSpec as P

from utils.model.attention import Angles, Past, attend, attend_cached, rotate, rotation, softcapped
from utils.model.capture import CaptureSpec, width_of
from utils.model.config import ModelConfig, Scores
from utils.model.interventions import Edit
from utils.model.layout import INVALID_POSITION, Layout, summed

Cache = dict[str, Any]
Changes = tuple[dict[str, Any] | None, ...]
FEW_TOKENS = 16  # of a step of decoding
_lecun = nn.initializers.lecun_normal  # LeCun et al. 1998: axes of inputs, of outputs
# Rows, of which those of an expert follow those of another, times the kernels: [R, D], [E, F, D].
_BY_EXPERT = jax.lax.RaggedDotDimensionNumbers((((1,), (2,)), ((), ())), [0], [0])


def linear(x: Array, kernel: Array, inputs: int, layout: Layout, dtype: Any = None) -> Array:
    """Sums over the last `inputs` axes of both: [B, T, ...], [..., D] -> [B, T, ...]; dtype: of the
    sums (default: that of x)."""
    axes = tuple(range(-inputs, 0))
    lead, out = x.shape[:-inputs], kernel.shape[:-inputs]
    if layout.platform != "cpu" or math.prod(lead) > FEW_TOKENS:
        return jnp.tensordot(x, kernel, (axes, axes), preferred_element_type=dtype)
    # XLA on a CPU reads a kernel at the rate of the memory only where it comes first; with the
    # other order, to which it would turn back without the barriers, at half of that.
    rows = jax.lax.optimization_barrier(x.reshape(math.prod(lead), -1).T)
    y = jnp.dot(kernel.reshape(math.prod(out), -1), rows, preferred_element_type=dtype)
    return jax.lax.optimization_barrier(y).T.reshape(*lead, *out)


class RMSNorm(nn.Module):
    """Root-mean-square norm (Zhang and Sennrich 2019) in float32, over the last axis."""

    config: ModelConfig

    @nn.compact
    def __call__(self, x: Array) -> Array:
        c = self.config
        init = nn.initializers.zeros if c.unit_offset else nn.initializers.ones
        scale = self.param("scale", init, (x.shape[-1],))
        x32 = x.astype(jnp.float32)
        x32 = x32 * jax.lax.rsqrt(jnp.mean(x32 * x32, axis=-1, keepdims=True) + c.rms_norm_eps)
        if c.unit_offset:
            return (x32 * (1 + scale.astype(jnp.float32))).astype(x.dtype)
        return x32.astype(x.dtype) * scale


def gated(config: ModelConfig, gate: Array, up: Array) -> Array:
    """SwiGLU or GeGLU (Shazeer 2020)."""
    act = jax.nn.silu if config.gated_by == "silu" else jax.nn.gelu  # by tanh
    return act(gate) * up


class Hooked(nn.Module):
    """A part of a layer, with the hook points at which its values are changed and captured.

    Which ones is static, so that a program without them is as if there were none.

    captured: hook points of this layer. edits: the model's in this layer, each with its number.
    """

    config: ModelConfig
    layout: Layout
    scores: Scores
    captured: tuple[str, ...]
    edits: tuple[tuple[int, Edit], ...]

    def at(self, hook_point: str, x: Array, changes: Changes) -> Array:
        """x, [B, T, ...], as it goes on from a hook point, where it is changed by the edits in
        their order and then captured: [B, T, W], sown as a bare array."""
        here = [
            (edit, changes[number])
            for number, edit in self.edits
            if edit.hook_point == hook_point and changes[number] is not None
        ]
        if not here and hook_point not in self.captured:
            return x
        width = width_of(self.config, hook_point)  # x may have zeros behind it
        flat = x.reshape(*x.shape[:2], -1)
        value = flat[..., :width]
        for edit, arrays in here:
            value = edit.apply(value, arrays)
        if hook_point in self.captured:
            self.sow("intermediates", hook_point, value, lambda _, new: new, lambda: None)
        if not here:
            return x
        return jnp.concatenate([value, flat[..., width:]], axis=-1).reshape(x.shape)


class Attention(Hooked):
    @nn.compact
    def __call__(
        self, x: Array, positions: Array, cos_sin: Angles, past: Past | None, changes: Changes
    ) -> tuple[Array, Array | None]:
        """x: [B, T, D] -> [B, T, D], and the cache with the T tokens written into it.

        Without a past, as in training, the tokens see one another alone.
        """
        c, layout = self.config, self.layout
        D, N, K, H = c.hidden_size, c.num_heads, c.num_kv_heads, c.head_dim
        prompt = x.shape[1] > 1
        heads = layout.heads(prompt)
        x = self.at("attn_in", x, changes)
        # Devices that share the tokens of a prompt each project their own to all heads. With a
        # generated token, kernels stay as they are stored, split by their inputs.
        gather = prompt and not layout.by_heads

        def project(name: str, count: int) -> Array:
            kernel = self.param(name, _lecun(2, (0, 1)), (count, H, D))
            y = layout.split(linear(x, layout.kernel(kernel, gather), 1, layout), *heads)
            if c.qkv_bias:
                y = y + self.param(f"{name}_bias", nn.initializers.zeros, (count, H))
            return y

        query, key, value = project("query", N), project("key", K), project("value", K)
        if c.qk_norm:
            query = RMSNorm(c, name="query_norm")(query)
            key = RMSNorm(c, name="key_norm")(key)
        query = layout.split(self.at("q", query, changes), *heads)
        key = layout.split(self.at("k", key, changes), *heads)
        value = layout.split(self.at("v", value, changes), *heads)
        query, key = rotate(query, cos_sin), rotate(key, cos_sin)

        if past is None:
            key, value = key.swapaxes(1, 2), value.swapaxes(1, 2)
            y, cache = attend(query, key, value, positions, positions, self.scores), None
        else:
            new = jnp.concatenate([key, value], axis=-1)
            if not layout.by_heads:  # the tokens of all devices, in the order of the prompt
                new = layout.collect(layout.whole_rows(new))
            new = new.swapaxes(1, 2)
            y, cache = attend_cached(query, new, past, positions, self.scores, layout)
        y = layout.split(self.at("z", layout.split(y, *heads), changes), *heads)

        kernel = self.param("out", _lecun((1, 2), 0), (D, N, H))
        y = linear(y, layout.kernel(kernel, gather), 2, layout)
        if c.out_bias:
            y = y + self.param("out_bias", nn.initializers.zeros, (D,))
        return y, cache


class Mlp(Hooked):
    @nn.compact
    def __call__(self, x: Array, changes: Changes) -> Array:
        """[B, T, D] -> [B, T, D]."""
        layout = self.layout
        x = self.at("mlp_in", x, changes)
        B, T, D = x.shape
        F = layout.padded(self.config.intermediate_size)
        gather = layout.gathers_mlp(B, T, F)

        def project(name: str, y: Array, shape: tuple[int, int]) -> Array:
            kernel = self.param(name, _lecun(1, 0), shape)
            y = linear(y, layout.kernel(kernel, gather), 1, layout)
            if self.config.mlp_bias:
                y = y + self.param(f"{name}_bias", nn.initializers.zeros, shape[:1])
            return y

        y = gated(self.config, project("gate", x, (F, D)), project("up", x, (F, D)))
        by = ("data", "model") if gather else ("data", None, "model")  # tokens, or width
        y = layout.split(self.at("mlp_act", layout.split(y, *by), changes), *by)
        return project("down", y, (D, F))


class Mixture(Hooked):
    """A mixture of experts (Shazeer et al. 2017), each an mlp without biases. Every device has all
    experts, and of each its share of the width, so that none waits for another's tokens."""

    @nn.compact
    def __call__(self, x: Array, changes: Changes) -> Array:
        """The weighted sum of what a token's experts give; [B, T, D] -> [B, T, D]."""
        c, layout = self.config, self.layout
        x = self.at("mlp_in", x, changes)
        E, F, D = c.num_experts, layout.padded(c.intermediate_size), x.shape[-1]
        router = self.param("router", _lecun(1, 0), (E, D))
        kernels = [
            self.param(f"expert_{name}", _lecun(2, 1, 0), shape)
            for name, shape in (("gate", (E, F, D)), ("up", (E, F, D)), ("down", (E, D, F)))
        ]
        share = jax.nn.softmax(linear(x, router, 1, layout, jnp.float32), axis=-1)
        share, experts = jax.lax.top_k(share, c.experts_per_token)
        if c.renormalize_experts:
            share = share / jnp.sum(share, axis=-1, keepdims=True)
        prompt, data = x.shape[1] > 1, P("data")
        in_specs = data, data, data, *(P(None, "model"),) * 2, P(None, None, "model")

        @layout.on_each_device(in_specs, P(*layout.stream(prompt)))
        def mixed(x: Array, share: Array, experts: Array, *kernels: Array) -> Array:
            shape, x = x.shape, x.reshape(-1, D)
            order = jnp.argsort(experts.reshape(-1), stable=True)  # one after the other
            sizes = jnp.bincount(experts.reshape(-1), length=E)
            gate, up, down = (
                lambda y, kernel=kernel: jax.lax.ragged_dot_general(y, kernel, sizes, _BY_EXPERT)
                for kernel in kernels
            )
            rows = x[order // c.experts_per_token]
            y = down(gated(c, gate(rows), up(rows)))
            y = y[jnp.argsort(order)].reshape(*share.shape, D)  # each token's, side by side
            y = jnp.sum(y * share.astype(y.dtype)[..., None], axis=-2)
            return summed(y.reshape(shape), prompt)

        return mixed(x, share, experts, *kernels)


class Block(Hooked):
    @nn.compact
    def __call__(
        self, x: Array, positions: Array, cos_sin: Angles, past: Past | None, changes: Changes
    ) -> tuple[Array, Array | None]:
        """The residual stream [B, T, D] after this layer, and the rest as `Attention` gives it."""
        c = self.config
        part = c, self.layout, self.scores, self.captured, self.edits

        def split(y: Array) -> Array:
            return self.layout.split(y, *self.layout.stream(prompt=x.shape[1] > 1))

        def to_add(y: Array, norm: str) -> Array:
            return RMSNorm(c, name=norm)(split(y)) if c.out_norms else split(y)

        x = self.at("resid_pre", x, changes)
        y, cache = Attention(*part, name="attention")(
            RMSNorm(c, name="attention_norm")(x), positions, cos_sin, past, changes
        )
        y = self.at("attn_out", to_add(y, "attention_out_norm"), changes)
        x = self.at("resid_mid", split(x + y), changes)
        mlp = (Mixture if c.num_experts else Mlp)(*part, name="mlp")
        y = to_add(mlp(RMSNorm(c, name="mlp_norm")(x), changes), "mlp_out_norm")
        y = self.at("mlp_out", y, changes)
        return self.at("resid_post", split(x + y), changes), cache


_Layer = nn.jit(Block)  # which is traced once for all layers whose fields are equal


class Decoder(nn.Module):
    """Token ids to hidden states, and hidden states to logits.

    num_layers_run: layers that are computed, from the first; all of them unless nothing after the
    last captured layer is wanted. edits: what is changed at hook points, in this order.
    """

    config: ModelConfig
    layout: Layout
    capture: CaptureSpec = CaptureSpec()
    num_layers_run: int | None = None
    edits: tuple[Edit, ...] = ()

    @property
    def depth(self) -> int:
        """How many layers are run."""
        return self.config.num_layers if self.num_layers_run is None else self.num_layers_run

    def setup(self) -> None:
        c, n = self.config, self.depth
        V = self.layout.padded(c.vocab_size)
        init = nn.initializers.normal(0.02)
        self.embedding = self.param("embedding", init, (V, c.hidden_size))
        edits = [tuple(e for e in enumerate(self.edits) if e[1].layer == i) for i in range(n)]
        self.layers = [
            _Layer(c, self.layout, c.scores(i), self.capture.points(i), edits[i]) for i in range(n)
        ]
        if n == c.num_layers:
            self.final_norm = RMSNorm(c)
            if not c.tie_word_embeddings:
                self.head = self.param("head", init, (V, c.hidden_size))

    def __call__(
        self,
        tokens: Array,
        positions: Array,
        lengths: Array | None = None,
        cache: Cache | None = None,
        row: Array | None = None,
        slot: Array | None = None,
        changes: Changes = (),
    ) -> tuple[Array, Cache]:
        """Residual stream after the last layer that is run, [B, T, D], and the cache.

        tokens, positions: int32 [B, T]. Of each data group they are written into its rows of the
        cache (`Engine.state`) from `row` on, into the slots from `slot` on, both int32 [data], and
        see what those rows hold: a chunk of a prompt, whose tokens are in the order of
        `Layout.deal`, or one generated token. What is written at slot 0 begins its row anew. Tokens
        at or behind their row's `lengths`, int32 [B], are padding, which nobody sees. Without a
        cache the tokens see one another alone. changes: the arrays of every edit, see `Edit.apply`,
        with tokens in the order of `tokens`; None where it changes nothing. Call through
        `apply(..., mutable=["intermediates"])` to receive what the spec captures.
        """
        c = self.config
        x = self.layout.look_up(self.embedding, tokens)
        if c.embedding_scale != 1:
            x = x * jnp.asarray(c.embedding_scale, x.dtype)
        ropes = dict.fromkeys(map(c.rope_of, range(len(self.layers))))
        cos_sin = {rope: rotation(positions, rope, c.head_dim) for rope in ropes}
        new: Cache = {}
        if cache is not None:
            key_at = self._key_positions(cache, positions, lengths, row, slot)
            new["positions"] = self.layout.write_rows(cache["positions"], key_at, row, "data")
        for i, layer in enumerate(self.layers):
            past = None if cache is None else Past(cache[layer.name], key_at, row, slot)
            rotated_by = cos_sin[c.rope_of(i)]
            x, new[layer.name] = layer(x, positions, rotated_by, past, changes)
        return x, new

    def _key_positions(
        self, cache: Cache, positions: Array, lengths: Array, row: Array, slot: Array
    ) -> Array:
        """The positions in the slots of the rows of a pass, with those of its own tokens: int32
        [B, S]."""
        B, T = positions.shape
        before = self.layout.read_rows(cache["positions"], row, B, "data")
        slot = jnp.repeat(slot, B // self.layout.data)[:, None]
        before = jnp.where(slot == 0, INVALID_POSITION, before)
        number = jnp.arange(before.shape[1], dtype=jnp.int32) - slot  # of the pass's tokens
        positions = self.layout.collect(positions)
        real = jnp.where(positions < lengths[:, None], positions, INVALID_POSITION)
        now = jnp.take_along_axis(real, jnp.clip(number, 0, T - 1), axis=1)
        return jnp.where((number >= 0) & (number < T), now, before)

    def logits(self, x: Array) -> Array:
        """Final norm and unembedding: [B, D] -> float32 [B, V]; -inf where V is padded."""
        x = self.layout.split(self.final_norm(x), "data")
        kernel = self.embedding if self.config.tie_word_embeddings else self.head
        # Not rounded to the model's dtype: bfloat16 makes the highest of them equal too often.
        logits = linear(x, kernel, 1, self.layout, jnp.float32)
        logits = softcapped(logits, self.config.logit_softcap)
        logits = self.layout.split(logits, "data", "model")
        if logits.shape[-1] == self.config.vocab_size:
            return logits
        return jnp.where(jnp.arange(logits.shape[-1]) < self.config.vocab_size, logits, -jnp.inf)

    def initialize(self, tokens: Array, positions: Array) -> Array:
        """Touches every parameter; for `init` and abstract shapes."""
        return self.logits(self(tokens, positions)[0][:, 0])


def split_cache(layout: Layout, cache: Cache) -> Cache:
    """A cache, its arrays split over the mesh as they are from pass to pass."""
    return {
        name: layout.split(value, *(("data",) if name == "positions" else layout.slots))
        for name, value in cache.items()
    }


def captured(variables: dict[str, Any]) -> dict[str, Array]:
    """What `apply` gave beside its result -> `{"<hook_point>.<layer>": [B, T, W]}`."""
    sown = flatten_dict(variables.get("intermediates", {}))  # by module, a layer's first
    return {f"{path[-1]}.{path[0].removeprefix('layers_')}": x for path, x in sown.items()}
