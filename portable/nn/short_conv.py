"""The gated short convolution of LFM2."""

from typing import Any

import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float, Int

from portable.nn.conv import CausalConv1d
from portable.nn.heads import KERNEL_INIT
from portable.nn.linear import linear
from portable.nn.padding import right_padded


class ShortConv(nnx.Module):
    """out(C * conv(B * x)), with B, C and x projections of the input (Liquid AI 2025, LFM2, arXiv:2511.23404).

    Attributes:
      in_B, in_C, in_x: Linear from d to d. conv: CausalConv1d. out: Linear from d to d.
    """

    def __init__(
        self,
        d: int,
        *,
        taps: int = 3,
        use_bias: bool = False,
        kernel_init: nnx.Initializer = KERNEL_INIT,
        dtype=jnp.float32,
        param_dtype=jnp.float32,
        rngs: nnx.Rngs,
    ):
        """Args:
        d: width.
        taps: of the convolution.
        use_bias: biases on projections and convolution.
        kernel_init: of the projections.
        dtype: of activations and matrix products. param_dtype: of the Params. rngs: source of the initial Params.
        """
        options = {"use_bias": use_bias, "kernel_init": kernel_init, "dtype": dtype, "param_dtype": param_dtype}
        self.in_B = linear(d, d, ("embed", "inner"), rngs=rngs, **options)
        self.in_C = linear(d, d, ("embed", "inner"), rngs=rngs, **options)
        self.in_x = linear(d, d, ("embed", "inner"), rngs=rngs, **options)
        self.conv = CausalConv1d(
            d, taps, use_bias=use_bias, axis="inner", dtype=dtype, param_dtype=param_dtype, rngs=rngs
        )
        self.out = linear(d, d, ("inner", "embed"), rngs=rngs, **options)
        self.taps, self.dtype = taps, dtype

    def __call__(
        self,
        u: Float[Array, "b t d"],
        *,
        state: Float[Array, "b w d"] | None = None,
        lengths: Int[Array, " b"] | None = None,
        mask: Bool[Array, "b t"] | None = None,
        segment_ids: Int[Array, "b t"] | None = None,
        return_state: bool = False,
    ) -> Any:
        """Mixes a sequence.

        Args:
          u: [b, t, d].
          state: from `init_state` or an earlier call, to continue from.
          lengths: [b] real positions of right-padded rows.
          mask: [b, t] true at the real positions of rows padded on any side; not together with `lengths`.
          segment_ids: [b, t] integers; where they change, the convolution starts anew (packed documents).
          return_state: whether the last taps - 1 gated inputs are returned too.

        Returns:
          y [b, t, d] in the layer's dtype (at padded positions without meaning), or (y, state).

        Raises:
          ValueError: shapes do not fit, or both lengths and mask are given.
        """
        u, lengths, segment_ids, inverse = right_padded("ShortConv", u, lengths, mask, segment_ids)
        if lengths is not None and segment_ids is not None and u.shape[1]:
            # Padding belongs to the last real segment.
            last = jnp.take_along_axis(segment_ids, jnp.maximum(lengths - 1, 0)[:, None], axis=1)
            segment_ids = jnp.where(jnp.arange(u.shape[1]) < lengths[:, None], segment_ids, last)
        u = u.astype(self.dtype)
        mixed, state = self.conv(self.in_B(u) * self.in_x(u), state, lengths=lengths, segment_ids=segment_ids)
        y = self.out(self.in_C(u) * mixed)
        if inverse is not None:
            y = jnp.take_along_axis(y, inverse[..., None], axis=1)
        return (y, state) if return_state else y

    def init_state(self, batch: int) -> Float[Array, "b w d"]:
        """Returns the state before any position, for `batch` rows."""
        return jnp.zeros((batch, self.taps - 1, self.in_x.out_features), self.dtype)

    def step(self, u: Float[Array, "b d"], state: Float[Array, "b w d"]):
        """Mixes one position: (u [b, d], state) -> (y [b, d], state)."""
        y, state = self(u[:, None], state=state, return_state=True)
        return y[:, 0], state
