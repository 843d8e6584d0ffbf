"""The contract of `rms_norm`: checks. No algorithm."""

from jaxtyping import Array, Float

from portable import selection
from portable.ops._arguments import check_array, check_float, vary_together


def rms_norm(
    x: Float[Array, "... d"],
    scale: Float[Array, " d"],
    *,
    gate: Float[Array, "... d"] | None = None,
    norm_before_gate: bool = False,
    groups: int = 1,
    eps: float = 1e-5,
    implementation: str | None = None,
) -> Float[Array, "... d"]:
    """Divides by the root mean square and scales, with an optional SiLU gate before or after.

        y = x * silu(gate)                                           # unless norm_before_gate
        y = y / sqrt(mean(y**2 over each of `groups` blocks of d) + eps) * scale
        y = y * silu(gate)                                           # if norm_before_gate

    Computed in float32 whatever the dtype of x; the backward keeps x, scale and gate only.

    Args:
      x: [..., d].
      scale: [d].
      gate: [..., d] or None.
      norm_before_gate: the order of norm and gate; Mamba-2's published models gate first.
      groups: d is cut into this many equal blocks, each with its own mean square.
      eps: added to the mean square.
      implementation: "reference" or "xla".

    Returns:
      [..., d] in the dtype of x.

    Raises:
      ValueError: shapes do not fit, or d is not divisible by groups.
      TypeError: an argument has an integer dtype.

    Source: Zhang and Sennrich 2019 (arXiv 1910.07467), equation 4; the gated form is Mamba-2's (arXiv 2405.21060,
    section 7.2).

    >>> import jax.numpy as jnp, portable
    >>> y = portable.ops.rms_norm(jnp.array([3.0, 4.0]), jnp.ones(2), eps=0.0)
    >>> [f"{v:.4f}" for v in y.tolist()]
    ['0.8485', '1.1314']
    """
    arrays, options = prepare(x, scale, gate=gate, norm_before_gate=norm_before_gate, groups=groups, eps=eps)
    (y,) = selection.call("rms_norm", implementation, arrays, options)
    return y


def prepare(x, scale, *, gate=None, norm_before_gate=False, groups=1, eps=1e-5):
    """Checks the arguments; returns the core's (x, scale, gate) and its options."""
    check_array("rms_norm", x=x, scale=scale, gate=gate)
    if x.ndim < 1 or scale.shape != x.shape[-1:]:
        raise ValueError(
            f"rms_norm: x must be [..., d] and scale [d]; got x {list(x.shape)} and scale {list(scale.shape)}."
        )
    if gate is not None and gate.shape != x.shape:
        raise ValueError(f"rms_norm: gate must have the shape of x, {list(x.shape)}; got {list(gate.shape)}.")
    if groups < 1 or x.shape[-1] % groups:
        raise ValueError(f"rms_norm: groups must divide d; got d={x.shape[-1]}, groups={groups}.")
    check_float("rms_norm", x=x, scale=scale, gate=gate)
    return vary_together(x, scale, gate), {"groups": groups, "norm_before_gate": norm_before_gate, "eps": eps}
