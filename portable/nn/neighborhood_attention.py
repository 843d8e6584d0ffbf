"""Multi-head attention of each position to its neighborhood, over 1, 2 or 3 axes."""

from collections.abc import Sequence

import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float

from portable import ops
from portable.nn.linear import dot_general


class NeighborhoodAttention(nnx.Module):
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
        kernel_init: nnx.Initializer = nnx.initializers.lecun_normal(),
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
        kv_heads = num_kv_heads or num_heads
        if head_dim is None and d % num_heads:
            raise ValueError(
                f"NeighborhoodAttention: num_heads must divide d; got d={d}, num_heads={num_heads}. Or give head_dim."
            )
        if num_heads % kv_heads:
            raise ValueError(
                f"NeighborhoodAttention: num_kv_heads must divide num_heads; got num_heads={num_heads}, "
                f"num_kv_heads={kv_heads}."
            )
        self.num_heads, self.num_kv_heads, self.head_dim = num_heads, kv_heads, head_dim or d // num_heads
        self.window, self.stride, self.dilation, self.is_causal = (
            _per_axis(name, value, rank)
            for name, value in [
                ("window", window),
                ("stride", stride),
                ("dilation", dilation),
                ("is_causal", is_causal),
            ]
        )
        self.pad_small, self.dtype = pad_small, dtype

        def linear(i: int, o: int, axes: tuple[str, str], bias: bool) -> nnx.Linear:
            return nnx.Linear(
                i,
                o,
                use_bias=bias,
                dtype=dtype,
                param_dtype=param_dtype,
                kernel_init=kernel_init,
                dot_general=dot_general,
                kernel_metadata={"axes": axes},
                bias_metadata={"axes": axes[1:]},
                rngs=rngs,
            )

        inner, kv_inner = num_heads * self.head_dim, kv_heads * self.head_dim
        self.query = linear(d, inner, ("embed", "heads"), use_qkv_bias)
        self.key = linear(d, kv_inner, ("embed", "heads"), use_qkv_bias)
        self.value = linear(d, kv_inner, ("embed", "heads"), use_qkv_bias)
        self.out = linear(inner, d, ("heads", "embed"), use_out_bias)
        self.rel_pos_bias = nnx.data(None)
        if rel_pos_bias:
            offsets = [2 * w - 1 for w in self.window]
            self.rel_pos_bias = nnx.Param(jnp.zeros((num_heads, *offsets), param_dtype), axes=("heads", *[None] * rank))

    def __call__(
        self, u: Float[Array, "b *space d"], *, key_mask: Bool[Array, "b *space"] | None = None
    ) -> Float[Array, "b *space d"]:
        """Attends.

        Args:
          u: [b, *space, d].
          key_mask: [b, *space], False at positions that nobody sees.

        Returns:
          [b, *space, d] in the layer's dtype.

        Raises:
          ValueError: shapes do not fit, or space is smaller than a window and `pad_small` is off.
        """
        rank, d = len(self.window), self.query.in_features
        if getattr(u, "ndim", None) != rank + 2 or u.shape[-1] != d:
            found = list(u.shape) if hasattr(u, "shape") else type(u).__name__
            raise ValueError(
                f"NeighborhoodAttention: u must be [b, *space, d] with {rank} axes of space and d={d}; got {found}."
            )
        u = u.astype(self.dtype)
        q, k, v = (
            f(u).reshape(*u.shape[:-1], heads, self.head_dim)
            for f, heads in [
                (self.query, self.num_heads),
                (self.key, self.num_kv_heads),
                (self.value, self.num_kv_heads),
            ]
        )
        y = ops.neighborhood_attention(
            q,
            k,
            v,
            window=self.window,
            stride=self.stride,
            dilation=self.dilation,
            is_causal=self.is_causal,
            rel_pos_bias=None if self.rel_pos_bias is None else jnp.asarray(self.rel_pos_bias[...]),
            key_mask=key_mask,
            pad_small=self.pad_small,
        )
        return self.out(y.reshape(*u.shape[:-1], -1))


def _per_axis(name: str, value, rank: int) -> tuple:
    values = tuple(value) if isinstance(value, Sequence) else (value,) * rank
    if len(values) != rank:
        raise ValueError(
            f"NeighborhoodAttention: {name} must be one value or one for each of {rank} axes; got {value!r}."
        )
    return values
