"""The gated feed-forward layer of today's transformers."""

import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from portable.nn.heads import KERNEL_INIT
from portable.nn.linear import linear
from portable.nn.norm import ACTIVATIONS


class GatedMLP(nnx.Module):
    """down(activation(gate(x)) * up(x)) (Shazeer 2020, arXiv:2002.05202).

    Attributes:
      gate, up: Linear from d to f. down: Linear from f to d.
    """

    def __init__(
        self,
        d: int,
        f: int,
        *,
        activation: str = "silu",
        use_bias: bool = False,
        kernel_init: nnx.Initializer = KERNEL_INIT,
        dtype=jnp.float32,
        param_dtype=jnp.float32,
        rngs: nnx.Rngs,
    ):
        """Args:
        d, f: widths of the layer and inside it.
        activation: of the gate, one of `portable.nn.norm.ACTIVATIONS`.
        use_bias: biases on all three.
        kernel_init: of all three.
        dtype: of activations and matrix products. param_dtype: of the Params. rngs: source of the initial Params.

        Raises:
          ValueError: an unknown activation.
        """
        if activation not in ACTIVATIONS:
            raise ValueError(f"GatedMLP: activation must be one of {', '.join(ACTIVATIONS)}; got {activation!r}.")
        self.activation = activation
        options = {"use_bias": use_bias, "kernel_init": kernel_init, "dtype": dtype, "param_dtype": param_dtype}
        self.gate = linear(d, f, ("embed", "mlp"), rngs=rngs, **options)
        self.up = linear(d, f, ("embed", "mlp"), rngs=rngs, **options)
        self.down = linear(f, d, ("mlp", "embed"), rngs=rngs, **options)

    def __call__(self, x: Float[Array, "... d"]) -> Float[Array, "... d"]:
        """Returns the layer's output [..., d]."""
        return self.down(ACTIVATIONS[self.activation](self.gate(x)) * self.up(x))
