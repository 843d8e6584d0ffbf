"""The contract of `causal_conv1d`: checks and state. No algorithm."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from portable import selection
from portable.checks import check_values
from portable.ops._arguments import check_float, check_integer, check_shape, segment_counts, vary_together


def causal_conv1d(
    x: Float[Array, "b t c"],
    kernel: Float[Array, "k c"],
    *,
    bias: Float[Array, " c"] | None = None,
    state: Float[Array, "b k-1 c"] | None = None,
    lengths: Int[Array, " b"] | None = None,
    segment_ids: Int[Array, "b t"] | None = None,
    activation: str | None = None,
    implementation: str | None = None,
) -> tuple[Float[Array, "b t c"], Float[Array, "b k-1 c"]]:
    """Convolves each channel with its own short filter, looking only backwards.

        u = concatenate([state, x], axis=1)
        y[t] = activation(sum(kernel[j] * u[t + j] for j in range(k)) + bias)

    Summed in float32 whatever the dtype of x. Differentiable in x, kernel, bias and state.

    Args:
      x: [b, t, c] inputs, t >= 0.
      kernel: [k, c] filters; kernel[k - 1] multiplies the present position.
      bias: [c] or None.
      state: [b, k - 1, c], the inputs before the first position, oldest first; None for zeros.
      lengths: [b] real positions of each row of a right-padded batch; only the returned state depends on it.
      segment_ids: [b, t] integers; taps do not reach over a change of segment. The state belongs to the first one.
      activation: None or "silu".
      implementation: "reference" or "xla".

    Returns:
      y [b, t, c] and the state after the last (real) position [b, k - 1, c], both in the dtype of x. Of the last
      segment, taps over a boundary read zero when the state is carried on.

    Raises:
      ValueError: shapes do not fit, the activation is unknown, or (concrete only) lengths lie outside 0..t.
      TypeError: an argument has an integer dtype, or segment_ids or lengths a floating one.

    >>> import jax.numpy as jnp, portable
    >>> y, state = portable.ops.causal_conv1d(jnp.ones([1, 3, 1]), jnp.ones([2, 1]))
    >>> y[0, :, 0].tolist()
    [1.0, 2.0, 2.0]
    """
    arrays, options = prepare(
        x,
        kernel,
        bias=bias,
        state=state,
        lengths=lengths,
        segment_ids=segment_ids,
        activation=activation,
    )
    (y,) = selection.call("causal_conv1d", implementation, arrays, options)
    return y, _tail(arrays[0], arrays[3], x.shape[1], kernel.shape[0], lengths)


def prepare(x, kernel, *, bias=None, state=None, lengths=None, segment_ids=None, activation=None):
    """Checks the arguments; returns the core's (u, kernel, bias, boundaries) and its options."""
    op = "causal_conv1d"
    sizes: dict[str, int] = {}
    check_shape(op, "x", x, "b t c", sizes)
    check_shape(op, "kernel", kernel, "k c", sizes)
    if not sizes["k"]:
        raise ValueError(f"{op}: kernel must have at least one tap; got shape {list(kernel.shape)}.")
    check_shape(op, "bias", bias, "c", sizes)
    sizes["k-1"] = sizes["k"] - 1
    check_shape(op, "state", state, "b k-1 c", sizes)
    check_shape(op, "lengths", lengths, "b", sizes)
    check_shape(op, "segment_ids", segment_ids, "b t", sizes)
    check_float(op, x=x, kernel=kernel, bias=bias, state=state)
    check_integer(op, lengths=lengths, segment_ids=segment_ids)
    if activation not in (None, "silu"):
        raise ValueError(f"{op}: activation must be None or 'silu'; got {activation!r}.")
    t = sizes["t"]
    check_values(lambda n: (n >= 0) & (n <= t), f"{op}: lengths must lie in 0..{t}; got one outside.", lengths)
    if state is None:
        state = jnp.zeros((sizes["b"], sizes["k"] - 1, sizes["c"]), x.dtype)
    u = jnp.concatenate(vary_together(state.astype(x.dtype), x), axis=1)
    return vary_together(u, kernel, bias, segment_counts(segment_ids)), {"activation": activation}


def _tail(u, boundaries, t: int, k: int, lengths):
    """Returns the last k - 1 inputs of each row, zero where they belong to an earlier segment than the last one."""
    if boundaries is not None:
        counts = jnp.pad(boundaries, ((0, 0), (k - 1, 0)))
        last = counts[:, -1:] if lengths is None else jnp.take_along_axis(counts, lengths[:, None] + k - 2, axis=1)
        u = jnp.where((counts == last)[..., None], u, 0)
    if lengths is None:
        return u[:, t:]
    return jax.vmap(lambda row, n: jax.lax.dynamic_slice_in_dim(row, n, k - 1))(u, lengths)
