"""Short depthwise causal convolution as a layer."""

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from portable import ops


class CausalConv1d(nnx.Module):
    """`portable.ops.causal_conv1d` with learned filters.

    Attributes:
      kernel: Param [k, c].
      bias: Param [c], or None.
    """

    def __init__(
        self,
        channels: int,
        taps: int,
        *,
        use_bias: bool = True,
        axis: str | None = None,
        dtype=jnp.float32,
        param_dtype=jnp.float32,
        rngs: nnx.Rngs,
    ):
        """Args:
        channels: c, each with its own filter.
        taps: k, the filter's length.
        use_bias: whether a bias is added.
        axis: the logical axis of the channels, for `portable.sharding`.
        dtype: of the inputs and outputs; sums are float32.
        param_dtype: dtype of the Params.
        rngs: source of the initial filters, uniform in +-1/sqrt(k).
        """
        bound = taps**-0.5
        kernel = jax.random.uniform(rngs.params(), (taps, channels), param_dtype, -bound, bound)
        self.kernel = nnx.Param(kernel, axes=(None, axis))
        self.bias = nnx.data(nnx.Param(jnp.zeros((channels,), param_dtype), axes=(axis,)) if use_bias else None)
        self.dtype = dtype

    def __call__(
        self,
        x: Float[Array, "b t c"],
        state: Float[Array, "b w c"] | None = None,
        *,
        lengths: Int[Array, " b"] | None = None,
        segment_ids: Int[Array, "b t"] | None = None,
        activation: str | None = None,
    ) -> tuple[Float[Array, "b t c"], Float[Array, "b w c"]]:
        """Returns the convolved x and the state after it; arguments as `portable.ops.causal_conv1d`."""
        bias = None if self.bias is None else jnp.asarray(self.bias[...])
        return ops.causal_conv1d(
            x.astype(self.dtype),
            jnp.asarray(self.kernel[...]),
            bias=bias,
            state=state,
            lengths=lengths,
            segment_ids=segment_ids,
            activation=activation,
        )
