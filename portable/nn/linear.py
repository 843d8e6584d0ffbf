"""What lets `flax.nnx.Linear` run on `portable.ops.linear`."""

import jax
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
