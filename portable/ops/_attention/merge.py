"""The union of attentions over different keys."""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from portable.ops._arguments import accumulator, check_float, check_shape, vary_together


def merge_attentions(
    outs: Sequence[Float[Array, "b t h v"]], lses: Sequence[Float[Array, "b h t"]]
) -> tuple[Float[Array, "b t h v"], Float[Array, "b h t"]]:
    """Joins attentions of the same queries over disjoint sets of keys into the attention over all of those.

        lse = log(sum_i exp(lses[i]))
        out = sum_i exp(lses[i] - lse) * outs[i]

    Exact, and summed in float32 (float64 if an argument is float64). Plain JAX, differentiable in every mode and
    argument. A branch that saw no key (out 0, lse -inf) adds nothing, and where no branch saw one the same comes out,
    with gradients of zero. A sink is a key: give it to one branch only.

    Args:
      outs: [b, t, h, v] each, as `attention` returns them.
      lses: [b, h, t] each, natural logarithms.

    Returns:
      out [b, t, h, v] in the outs' common dtype, and lse [b, h, t] in float32.

    Raises:
      ValueError: there is nothing to merge, as many outs as lses are not given, or shapes differ.
      TypeError: an argument has an integer dtype.

    Source: Rabe and Staats 2021 (arXiv 2112.05682), section 2.

    >>> import jax.numpy as jnp, portable
    >>> one, other = jnp.zeros([1, 1, 1, 1]), jnp.ones([1, 1, 1, 1])
    >>> out, lse = portable.ops.merge_attentions([one, other], [jnp.log(x)[0] for x in (other, 3 * other)])
    >>> round(float(out[0, 0, 0, 0]), 4), round(float(jnp.exp(lse[0, 0, 0])), 4)
    (0.75, 4.0)
    """
    if not len(outs) or len(outs) != len(lses):
        raise ValueError(
            f"merge_attentions: outs and lses must be of the same number, at least 1; got {len(outs)} and {len(lses)}."
        )
    sizes: dict[str, int] = {}
    for i, (out, lse) in enumerate(zip(outs, lses, strict=True)):
        check_shape("merge_attentions", f"outs[{i}]", out, "b t h v", sizes)
        check_shape("merge_attentions", f"lses[{i}]", lse, "b h t", sizes)
        check_float("merge_attentions", **{f"outs[{i}]": out, f"lses[{i}]": lse})
    wide, dtype = accumulator(*outs, *lses), jnp.result_type(*outs)
    joined = vary_together(*outs, *lses)
    values = [jnp.moveaxis(x.astype(wide), 1, 2) for x in joined[: len(outs)]]
    levels = jnp.stack([x.astype(wide) for x in joined[len(outs) :]])
    top = jax.lax.stop_gradient(levels.max(0))
    top = jnp.where(top == -jnp.inf, 0, top)
    weights = jnp.exp(levels - top)
    total = weights.sum(0)
    some = total > 0
    total = jnp.where(some, total, 1)
    lse = jnp.where(some, jnp.log(total) + top, -jnp.inf)
    out = sum(w[..., None] * x for w, x in zip(weights / total, values, strict=True))
    return jnp.moveaxis(out, 1, 2).astype(dtype), lse
