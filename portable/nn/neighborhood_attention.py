"""Multi-head attention of each position to its neighborhood, over 1, 2 or 3 axes."""

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float, Int

from portable import ops
from portable.nn.heads import KERNEL_INIT, Heads


class NeighborhoodState(NamedTuple):
    """What decoding carries: the keys and values that a later window can reach.

    Attributes:
      k, v: [b, r, *space, g, head_dim]; the first axis of space is a ring of r positions.
      position: [] int32, positions of the causal axes that have been read, in their order.
    """

    k: Float[Array, "b r *space g e"]
    v: Float[Array, "b r *space g e"]
    position: Int[Array, ""]


class NeighborhoodAttention(Heads):
    """Projections around `portable.ops.neighborhood_attention` (arXiv:2204.07143, dilated: arXiv:2209.15001).

    Attributes:
      query, key, value: Linear from d to heads * head_dim. out: Linear back to d.
      rel_pos_bias: Param [h, 2 * w - 1, ...], or None.
      window, stride, dilation, is_causal: one entry for each axis of space.
    """

    def __init__(
        self,
        d: int,
        *,
        rank: int,
        num_heads: int,
        num_kv_heads: int | None = None,
        head_dim: int | None = None,
        window: int | Sequence[int],
        stride: int | Sequence[int] = 1,
        dilation: int | Sequence[int] = 1,
        is_causal: bool | Sequence[bool] = False,
        rel_pos_bias: bool = False,
        use_qkv_bias: bool = True,
        use_out_bias: bool = True,
        pad_small: bool = False,
        kernel_init: nnx.Initializer = KERNEL_INIT,
        dtype=jnp.float32,
        param_dtype=jnp.float32,
        rngs: nnx.Rngs,
    ):
        """Args:
        d: width of the input and the output.
        rank: axes of space, 1 to 3.
        num_heads: heads of the queries.
        num_kv_heads: heads of keys and values, which divide num_heads; None takes num_heads.
        head_dim: channels a head; None takes d / num_heads.
        window, stride, dilation, is_causal: of `portable.ops.neighborhood_attention`, for all axes or one for each.
        rel_pos_bias: whether a learned bias for each offset and head is added to the scores; starts at zero.
        use_qkv_bias, use_out_bias: biases on the projections.
        pad_small: whether inputs smaller than a window are taken; see the op.
        kernel_init: of the projections.
        dtype: of activations and matrix products; sums are float32.
        param_dtype: dtype of the Params.
        rngs: source of the initial Params.

        Raises:
          ValueError: the heads do not divide the width or each other, or an option has not one entry for each axis.
        """
        if rank not in (1, 2, 3):
            raise ValueError(f"NeighborhoodAttention: rank must be 1, 2 or 3; got {rank}.")
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
        self.window, self.stride, self.dilation, self.is_causal = (
            _per_axis(name, value, rank)
            for name, value in [
                ("window", window),
                ("stride", stride),
                ("dilation", dilation),
                ("is_causal", is_causal),
            ]
        )
        self.pad_small = pad_small
        self.rel_pos_bias = nnx.data(None)
        if rel_pos_bias:
            offsets = [2 * w - 1 for w in self.window]
            self.rel_pos_bias = nnx.Param(jnp.zeros((num_heads, *offsets), param_dtype), axes=("heads", *[None] * rank))

    def __call__(
        self,
        u: Float[Array, "b *space d"],
        *,
        key_mask: Bool[Array, " b *space"] | None = None,
        in_groups: bool = False,
    ) -> Float[Array, "b *space d"]:
        """Attends.

        Layers of one dilation in a row gather its groups once, not each of them anew:

            u = ops.space_to_batch(u, layers[0].dilation)
            for layer in layers:
                u = u + layer(u, in_groups=True)
            u = ops.batch_to_space(u, layers[0].dilation)

        Args:
          u: [b, *space, d].
          key_mask: [b, *space], False at positions that nobody sees.
          in_groups: whether u and key_mask come from `ops.space_to_batch` with the layer's dilation; so does the
            result then.

        Returns:
          [b, *space, d] in the layer's dtype.

        Raises:
          ValueError: shapes do not fit, or space is smaller than a window and `pad_small` is off.
        """
        q, k, v = self._project(u, len(self.window))
        y: Any = ops.neighborhood_attention(
            q,
            k,
            v,
            window=self.window,
            stride=self.stride,
            dilation=1 if in_groups else self.dilation,
            is_causal=self.is_causal,
            rel_pos_bias=None if self.rel_pos_bias is None else jnp.asarray(self.rel_pos_bias[...]),
            key_mask=key_mask,
            pad_small=self.pad_small,
        )
        return self.out(y.reshape(*u.shape[:-1], -1))

    def init_state(self, batch: int, space: Sequence[int]) -> NeighborhoodState:
        """Returns the state before any position.

        Args:
          batch: rows.
          space: all of it, also what is still to come.

        Raises:
          ValueError: no axis is causal, a causal one comes behind one that is not, or space has another rank.
        """
        self._check_causal()
        if len(space) != len(self.window):
            raise ValueError(
                f"NeighborhoodAttention: space must have {len(self.window)} axes, as the layer; got {list(space)}."
            )
        reach = min(space[0], (self.window[0] - 1) * self.dilation[0] + 1)
        zeros = jnp.zeros((batch, reach, *space[1:], self.num_kv_heads, self.head_dim), self.dtype)
        return NeighborhoodState(zeros, zeros, jnp.zeros((), jnp.int32))

    def step(
        self, u: Float[Array, "b *rest d"], state: NeighborhoodState, *, space: Sequence[int]
    ) -> tuple[Float[Array, "b *rest d"], NeighborhoodState]:
        """Attends from the next position of the causal axes, in their order; equal to that part of a full call.

        Args:
          u: [b, *rest, d]; rest are the axes that are not causal: none of them where all are, so one token.
          state: from `init_state` or the step before.
          space: as given to `init_state`.

        Returns:
          ([b, *rest, d], the state behind this position).

        Raises:
          ValueError: as `init_state`, or shapes do not fit.
        """
        causal = self._check_causal()
        q, k, v = self._project(u, len(self.window) - causal)
        at = jnp.unravel_index(state.position, tuple(space[:causal]))
        ring = state.k.shape[1]

        def write(cache, new):
            start = (0, at[0] % ring, *at[1:], *[0] * (new.ndim - 1))
            return jax.lax.dynamic_update_slice(cache, new.reshape(new.shape[0], *[1] * causal, *new.shape[1:]), start)

        k, v = write(state.k, k), write(state.v, v)
        after = NeighborhoodState(k, v, state.position + 1)
        seen = jnp.ones((), bool)
        for axis in range(causal):  # the last w positions of the dilation group, of which the window has the newest
            w, s, d = self.window[axis], self.stride[axis], self.dilation[axis]
            place, members = at[axis] // d, (space[axis] - at[axis] % d + d - 1) // d
            first = jnp.minimum(place // s * s + s - 1, members - 1) - w + 1
            back = jnp.arange(w)
            seen = seen[..., None] & (place - back >= jnp.maximum(first, 0))
            index = at[axis] - back * d
            index = index % ring if axis == 0 else jnp.maximum(index, 0)
            k, v = (jnp.take(z, index, axis=1 + axis) for z in (k, v))
        slices = math.prod(self.window[:causal])
        k, v = (z.reshape(z.shape[0], slices, *z.shape[1 + causal :]) for z in (k, v))
        y = self._over_slices(q, k, v, seen.reshape(slices), causal)
        return self.out(y.reshape(*u.shape[:-1], -1)), after

    def _over_slices(self, q, k, v, seen, causal: int):
        """Attends from q [b, *rest, h, e] to keys [b, slices, *rest, g, e] of those slices that are seen."""
        b, slices, *rest, _, _ = k.shape
        if not rest:
            y: Any = ops.attention(q[:, None], k, v, key_mask=jnp.broadcast_to(seen, (b, slices)))
            return y[:, 0]
        many = jnp.broadcast_to(q[:, None], (b, slices, *q.shape[1:]))
        y, lse = ops.neighborhood_attention(
            *(z.reshape(b * slices, *z.shape[2:]) for z in (many, k, v)),
            window=self.window[causal:],
            stride=self.stride[causal:],
            dilation=self.dilation[causal:],
            pad_small=self.pad_small,
            return_lse=True,
        )
        y, lse = (z.reshape(b, slices, *z.shape[1:]) for z in (y, lse))
        weights = jax.nn.softmax(jnp.where(seen.reshape(-1, *[1] * (lse.ndim - 2)), lse, -jnp.inf), axis=1)
        return jnp.sum(weights[..., None] * y, axis=1).astype(self.dtype)

    def _project(self, u, rank: int):
        """Returns q, k and v [b, *space, heads, e] of u [b, *space, d]."""
        d = self.query.in_features
        if getattr(u, "ndim", None) != rank + 2 or u.shape[-1] != d:
            found = list(u.shape) if hasattr(u, "shape") else type(u).__name__
            raise ValueError(
                f"NeighborhoodAttention: u must be [b, *space, d] with {rank} axes of space and d={d}; got {found}."
            )
        return self._split(u)

    def _check_causal(self) -> int:
        """Returns how many axes are causal; they must be the first ones."""
        causal = sum(self.is_causal)
        if not causal or not all(self.is_causal[:causal]):
            raise ValueError(
                "NeighborhoodAttention: step by step needs causal axes, before all others; got "
                f"is_causal={self.is_causal}. Call the layer on the whole of space instead."
            )
        return causal


def _per_axis(name: str, value, rank: int) -> tuple:
    values = tuple(value) if isinstance(value, Sequence) else (value,) * rank
    if len(values) != rank:
        raise ValueError(
            f"NeighborhoodAttention: {name} must be one value or one for each of {rank} axes; got {value!r}."
        )
    return values
