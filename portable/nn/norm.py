"""Normalisation layers."""

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from portable import ops


class RMSNorm(nnx.Module):
    """`portable.ops.rms_norm` with a learned scale.

    Attributes:
      scale: Param [d].
    """

    def __init__(
        self,
        d: int,
        *,
        eps: float = 1e-5,
        groups: int = 1,
        norm_before_gate: bool = False,
        axis: str | None = "embed",
        param_dtype=jnp.float32,
    ):
        """Args:
        d: the width.
        eps: added to the mean square.
        groups: blocks of d that are normalised separately.
        norm_before_gate: whether a gate multiplies after the norm instead of before.
        axis: the logical axis of the scale, for `portable.sharding`.
        param_dtype: dtype of the scale.
        """
        self.scale = nnx.Param(jnp.ones((d,), param_dtype), axes=(axis,))
        self.eps, self.groups, self.norm_before_gate = eps, groups, norm_before_gate

    def __call__(self, x: Float[Array, "... d"], gate: Float[Array, "... d"] | None = None) -> Float[Array, "... d"]:
        """Returns the normalised (and gated) x [..., d] in its dtype."""
        options = {"groups": self.groups, "norm_before_gate": self.norm_before_gate, "eps": self.eps}
        return ops.rms_norm(x, jnp.asarray(self.scale[...]), gate=gate, **options)


ACTIVATIONS = {
    "silu": jax.nn.silu,
    "swish": jax.nn.silu,
    "relu": jax.nn.relu,
    "gelu": lambda x: jax.nn.gelu(x, approximate=False),
    "gelu_new": jax.nn.gelu,
    "gelu_pytorch_tanh": jax.nn.gelu,
    "sigmoid": jax.nn.sigmoid,
    "tanh": jnp.tanh,
}
