"""Multi-head attention with rotary positions, grouped keys, sliding windows and a cache for decoding."""

from typing import Any, NamedTuple

import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float, Int

from portable import ops
from portable.nn.cache import extend
from portable.nn.heads import KERNEL_INIT, Heads
from portable.nn.norm import RMSNorm
from portable.nn.padding import right_padded
from portable.nn.rotary import Rotary, rotary


class AttentionState(NamedTuple):
    """What decoding carries.

    Attributes:
      k, v: [b, s, g, e]; position p of a row lies at p % s.
      positions: [b, s] int32, -1 where there is nothing.
      length: [b] int32, positions read so far.
    """

    k: Float[Array, "b s g e"]
    v: Float[Array, "b s g e"]
    positions: Int[Array, "b s"]
    length: Int[Array, " b"]


class Attention(Heads):
    """Projections and positions around `portable.ops.attention`.

    Attributes:
      query, key, value: Linear from d to heads * head_dim. out: Linear back to d.
      query_norm, key_norm: RMSNorm over the channels of a head or of all heads, or None.
      sinks: Param [h], or None.
    """

    def __init__(
        self,
        d: int,
        *,
        num_heads: int,
        num_kv_heads: int | None = None,
        head_dim: int | None = None,
        is_causal: bool = True,
        window: int | None = None,
        rope: Rotary | None = Rotary(),
        qk_norm: bool | str = False,
        qk_norm_eps: float = 1e-6,
        qkv_clip: float | None = None,
        soft_cap: float | None = None,
        sinks: bool = False,
        scale: float | None = None,
        use_qkv_bias: bool = False,
        use_out_bias: bool = False,
        kernel_init: nnx.Initializer = KERNEL_INIT,
        dtype=jnp.float32,
        param_dtype=jnp.float32,
        rngs: nnx.Rngs,
    ):
        """Args:
        d: width of the input and the output.
        num_heads: heads of the queries.
        num_kv_heads: heads of keys and values, which divide num_heads; None takes num_heads.
        head_dim: channels a head; None takes d / num_heads.
        is_causal: whether a position sees none behind it.
        window: a position sees the last `window` ones, its own among them (and as many behind it, if not causal).
        rope: rotary positions; None for none.
        qk_norm: RMSNorm of queries and keys before the rotation, head by head (Qwen 3, Gemma 3); "all" for one over
          the channels of all heads (OLMoE).
        qk_norm_eps: of these norms.
        qkv_clip: queries, keys and values are clipped to +- this, after the norms (OLMoE).
        soft_cap, scale: of `portable.ops.attention`.
        sinks: a learned logit for each head beside the scores (gpt-oss).
        use_qkv_bias, use_out_bias: biases on the projections.
        kernel_init: of the projections.
        dtype: of activations and matrix products; sums are float32.
        param_dtype: dtype of the Params.
        rngs: source of the initial Params.

        Raises:
          ValueError: the heads do not divide the width or each other, window is not positive, or qk_norm is unknown.
        """
        if qk_norm not in (False, True, "all"):
            raise ValueError(f'Attention: qk_norm must be False, True or "all"; got {qk_norm!r}.')
        if window is not None and window < 1:
            raise ValueError(f"Attention: window must be at least 1; got {window}. None is no window.")
        super().__init__(
            d,
            num_heads=num_heads,
            num_kv_heads=num_kv_heads,
            head_dim=head_dim,
            use_qkv_bias=use_qkv_bias,
            use_out_bias=use_out_bias,
            kernel_init=kernel_init,
            dtype=dtype,
            param_dtype=param_dtype,
            rngs=rngs,
        )
        self.is_causal, self.window, self.soft_cap, self.scale = is_causal, window, soft_cap, scale
        self.rope, self.qkv_clip = rope, qkv_clip
        self.query_norm = self.key_norm = self.sinks = nnx.data(None)
        if qk_norm:
            heads, axis = ((self.num_heads, self.num_kv_heads), "heads") if qk_norm == "all" else ((1, 1), None)
            self.query_norm, self.key_norm = (
                RMSNorm(n * self.head_dim, eps=qk_norm_eps, axis=axis, param_dtype=param_dtype) for n in heads
            )
        if sinks:
            self.sinks = nnx.Param(jnp.zeros((num_heads,), param_dtype), axes=("heads",))

    def __call__(
        self,
        u: Float[Array, "b t d"],
        *,
        state: AttentionState | None = None,
        lengths: Int[Array, " b"] | None = None,
        mask: Bool[Array, "b t"] | None = None,
        segment_ids: Int[Array, "b t"] | None = None,
        return_state: bool = False,
    ) -> Any:
        """Attends over a sequence.

        Args:
          u: [b, t, d].
          state: from `init_state` or an earlier call, to continue from.
          lengths: [b] real positions of right-padded rows.
          mask: [b, t] true at the real positions of rows padded on any side; not together with `lengths`.
          segment_ids: [b, t] integers; a position sees its own segment (packed documents). What a state holds belongs
            to the first one, and the last one is what it holds afterwards. Each stays in one run.
          return_state: whether the state behind each row's last real position is returned too; needs `state`.

        Returns:
          y [b, t, d] in the layer's dtype (at padded positions without meaning), or (y, state).

        Raises:
          ValueError: shapes do not fit, both lengths and mask are given, a layer that is not causal is given a state,
            or a concrete state is too short for what is added.
        """
        self._check(u, 3)
        u, lengths, segment_ids, inverse = right_padded(type(self).__name__, u, lengths, mask, segment_ids)
        if state is None and return_state:
            raise ValueError(
                "Attention: return_state needs a state to write to; give state=layer.init_state(b, length)."
            )
        if state is not None and not self.is_causal:
            raise ValueError("Attention: a layer that is not causal has no state; call it on the whole sequence.")
        t = u.shape[1]
        real = None if lengths is None else jnp.arange(t) < lengths[:, None]
        positions = jnp.arange(t, dtype=jnp.int32)
        if state is None:
            q, k, v = self._project(u, positions, jnp.full(u.shape[:1], t) if lengths is None else lengths)
            y = self._attend(q, k, v, key_mask=real, segment_ids=segment_ids)
        else:
            positions = state.length[:, None] + positions
            q, k, v = self._project(u, positions, state.length + (t if lengths is None else lengths))
            y, state = self._extend(q, k, v, positions, real, segment_ids, state)
        y = self.out(y.reshape(*u.shape[:2], -1))
        if inverse is not None:
            y = jnp.take_along_axis(y, inverse[..., None], axis=1)
        return (y, state) if return_state else y

    def init_state(self, batch: int, length: int) -> AttentionState:
        """Returns the state before any position, for `batch` rows of at most `length` positions."""
        held = length if self.window is None else min(length, self.window)
        zeros = jnp.zeros((batch, held, self.num_kv_heads, self.head_dim), self.dtype)
        return AttentionState(zeros, zeros, jnp.full((batch, held), -1, jnp.int32), jnp.zeros((batch,), jnp.int32))

    def step(self, u: Float[Array, "b d"], state: AttentionState) -> tuple[Float[Array, "b d"], AttentionState]:
        """Attends from one position: (u [b, d], state) -> (y [b, d], state). Equal to a call with t = 1."""
        self._check(u, 2)
        y, state = self(u[:, None], state=state, return_state=True)
        return y[:, 0], state

    def _extend(self, q, k, v, positions, real, segment_ids, state: AttentionState):
        """Attends from new positions to the state and to themselves; returns (y, the state with them)."""
        (held_k, held_v), held_positions, length, seen = extend(
            "Attention",
            (state.k, state.v),
            state.positions,
            state.length,
            (k, v),
            positions,
            real=real,
            segment_ids=segment_ids,
            is_ring=self.window is not None,
        )
        y = self._attend(
            q,
            *seen.arrays,
            key_mask=seen.positions >= 0,
            segment_ids=seen.segments,
            q_positions=positions,
            kv_positions=seen.positions,
        )
        return y, AttentionState(held_k, held_v, held_positions, length)

    def _attend(self, q, k, v, **options) -> Any:
        return ops.attention(
            q,
            k,
            v,
            is_causal=self.is_causal,
            window=self.window,
            soft_cap=self.soft_cap,
            sinks=None if self.sinks is None else jnp.asarray(self.sinks[...]),
            scale=self.scale,
            **options,
        )

    def _project(self, u, positions, lengths):
        q, k, v = self._split(u)
        return self._turned(q, k, v, positions, lengths)

    def _turned(self, q, k, v, positions, lengths):
        """Returns q, k and v normed, clipped and rotated."""
        if self.query_norm is not None and self.key_norm is not None:
            q, k = (
                norm(z.reshape(*z.shape[:2], -1, norm.scale.shape[0])).reshape(z.shape)
                for norm, z in ((self.query_norm, q), (self.key_norm, k))
            )
        if self.qkv_clip is not None:
            q, k, v = (jnp.clip(z, -self.qkv_clip, self.qkv_clip) for z in (q, k, v))
        if self.rope is not None:
            q, k = (rotary(z, positions, self.rope, lengths=lengths) for z in (q, k))
        return q, k, v

    def _check(self, u, rank: int) -> None:
        wanted = "[b, t, d]" if rank == 3 else "[b, d]"
        if getattr(u, "ndim", None) != rank or u.shape[-1] != self.query.in_features:
            found = list(u.shape) if hasattr(u, "shape") else type(u).__name__
            raise ValueError(f"{type(self).__name__}: u must be {wanted} with d={self.query.in_features}; got {found}.")
