"""What every layer of attention has: projections to the heads of queries, keys and values, and back."""

import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from portable.nn.linear import linear

KERNEL_INIT = nnx.initializers.lecun_normal()


class Heads(nnx.Module):
    """Projections around an attention op.

    Attributes:
      query, key, value: Linear from d to heads * head_dim. out: Linear back to d.
    """

    def __init__(
        self,
        d: int,
        *,
        num_heads: int,
        num_kv_heads: int | None,
        head_dim: int | None,
        use_qkv_bias: bool,
        use_out_bias: bool,
        kernel_init: nnx.Initializer,
        dtype,
        param_dtype,
        rngs: nnx.Rngs,
    ):
        """Args:
        d: width of the input and the output.
        num_heads: heads of the queries.
        num_kv_heads: heads of keys and values, which divide num_heads; None takes num_heads.
        head_dim: channels a head; None takes d / num_heads.
        use_qkv_bias, use_out_bias: biases on the projections.
        kernel_init: of the projections.
        dtype: of activations and matrix products.
        param_dtype: dtype of the Params.
        rngs: source of the initial Params.

        Raises:
          ValueError: the heads do not divide the width or each other.
        """
        name = type(self).__name__
        kv_heads = num_heads if num_kv_heads is None else num_kv_heads
        if num_heads < 1 or (head_dim is None and d % num_heads):
            raise ValueError(f"{name}: num_heads must divide d; got d={d}, num_heads={num_heads}. Or give head_dim.")
        if kv_heads < 1 or num_heads % kv_heads:
            raise ValueError(
                f"{name}: num_kv_heads must divide num_heads; got num_heads={num_heads}, num_kv_heads={kv_heads}."
            )
        self.num_heads, self.num_kv_heads, self.head_dim = num_heads, kv_heads, head_dim or d // num_heads
        self.dtype = dtype

        options = {"kernel_init": kernel_init, "dtype": dtype, "param_dtype": param_dtype, "rngs": rngs}
        inner, kv_inner = num_heads * self.head_dim, kv_heads * self.head_dim
        self.query = linear(d, inner, ("embed", "heads"), use_bias=use_qkv_bias, **options)
        self.key = linear(d, kv_inner, ("embed", "heads"), use_bias=use_qkv_bias, **options)
        self.value = linear(d, kv_inner, ("embed", "heads"), use_bias=use_qkv_bias, **options)
        self.out = linear(inner, d, ("heads", "embed"), use_bias=use_out_bias, **options)

    def _split(self, u: Float[Array, "*positions d"]) -> list[jnp.ndarray]:
        """Returns q, k and v [*positions, heads, head_dim]."""
        u = u.astype(self.dtype)
        heads = (self.num_heads, self.num_kv_heads, self.num_kv_heads)
        made = zip((self.query, self.key, self.value), heads, strict=True)
        return [f(u).reshape(*u.shape[:-1], n, self.head_dim) for f, n in made]
