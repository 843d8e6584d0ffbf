"""What lets `flax.nnx.Linear` run on `portable.ops.linear`."""

import jax
from flax import nnx
from jaxtyping import Array, Float

from portable import ops


def dot_general(
    x: Float[Array, "... d"],
    kernel: Float[Array, "d o"],
    dimension_numbers,
    *,
    precision=None,
    preferred_element_type=None,
    out_sharding=None,
) -> Float[Array, "... o"]:
    """The `dot_general` of an `nnx.Linear(..., dot_general=portable.nn.dot_general)`.

    Args:
      x: [..., d]. kernel: [d, o]. dimension_numbers: those of x @ kernel, as `nnx.Linear` gives them.
      precision, out_sharding: where one is given, `jax.lax.dot_general` runs as if this were not here.
      preferred_element_type: dtype of the result; None takes that of x.

    Returns:
      x @ kernel [..., o].
    """
    if precision is None and out_sharding is None and dimension_numbers == (((x.ndim - 1,), (0,)), ((), ())):
        return ops.linear(x, kernel, out_dtype=preferred_element_type)
    options = {"preferred_element_type": preferred_element_type, "out_sharding": out_sharding}
    return jax.lax.dot_general(x, kernel, dimension_numbers, precision=precision, **options)


def kernel_of(layer: nnx.Linear) -> Array:
    """Returns the kernel as the layer's product reads it, with its adapter where it has one (`portable.adapters`)."""
    updated = getattr(layer, "updated_kernel", None)
    return layer.kernel[...] if updated is None else updated()


def linear(
    i: int, o: int, axes: tuple[str | None, str | None], *, use_bias: bool, dtype, param_dtype, rngs, **options
) -> nnx.Linear:
    """Returns an `nnx.Linear` from i to o channels on `portable.ops.linear`, whose Params name their logical axes."""
    return nnx.Linear(
        i,
        o,
        use_bias=use_bias,
        dtype=dtype,
        param_dtype=param_dtype,
        dot_general=dot_general,
        kernel_metadata={"axes": axes},
        bias_metadata={"axes": axes[1:]},
        rngs=rngs,
        **options,
    )
