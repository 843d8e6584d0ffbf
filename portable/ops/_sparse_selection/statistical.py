"""Selection by a threshold that mean and deviation give: Spark Transformer's statistical top-k."""

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from portable.ops._arguments import accumulator, check_array, check_float, check_groups, check_shape
from portable.ops._sparse_selection.common import best, held, in_chunks, positions, whole


def statistical_threshold(
    x: Float[Array, "*rows n"], top_k: int, *, where: Bool[Array, "*rows n"] | None = None
) -> Float[Array, "*rows"]:
    """Returns the number that about top_k of n normally distributed numbers exceed, without sorting them.

        theta = mean(x) + std(x) * Q(1 - top_k / n),  Q the quantiles of the standard normal, std with n - 1

    Differentiable in x.

    Args:
      x: [*rows, n].
      top_k: how many; -inf is returned where n is not more.
      where: [*rows, n], the numbers that count.

    Returns:
      [*rows] in float32 (float64 if x is).

    Raises:
      ValueError: x has no axis, or top_k is below 1.
      TypeError: x is not floating point, or top_k is no integer.

    Source: You et al. 2025, Spark Transformer (arXiv 2506.06644), section 3.

    >>> import jax, portable
    >>> x = jax.random.normal(jax.random.key(0), (10000,))
    >>> int((x > portable.ops.statistical_threshold(x, 800)).sum())
    795
    """
    op = "statistical_threshold"
    check_array(op, x=x)
    check_float(op, x=x)
    if x.ndim < 1:
        raise ValueError(f"{op}: x must be [*rows, n]; got shape {list(x.shape)}.")
    top_k, wide = whole(op, "top_k", top_k), accumulator(x)
    real = jnp.ones(x.shape, bool) if where is None else where
    x, n = jnp.where(real, x.astype(wide), 0), real.sum(-1).astype(wide)
    mean = x.sum(-1) / jnp.maximum(n, 1)
    apart = jnp.where(real, x - mean[..., None], 0)
    square = (apart * apart).sum(-1) / jnp.maximum(n - 1, 1)
    deviation = jnp.where(square > 0, jnp.sqrt(jnp.where(square > 0, square, 1)), 0)
    rare = n > top_k
    quantile = jax.scipy.special.ndtri(1 - top_k / jnp.where(rare, n, 2 * top_k))
    return jnp.where(rare, mean + deviation * quantile, -jnp.inf)


def spark_ffn(
    x: Float[Array, "*rows d"],
    gate: Float[Array, "r f"],
    up: Float[Array, "rest f"],
    down: Float[Array, "f e"],
    *,
    top_k: int,
) -> Float[Array, "*rows e"]:
    """Computes a feed-forward layer of which about top_k of f units are active.

        y = (gelu(max(0, x[:r] @ gate - theta)) * (x[r:] @ up)) @ down,  theta of `statistical_threshold`

    The first r channels predict which units are; the threshold comes off what remains, so that a unit switches without
    a jump. With top_k >= f nothing is cut. The products here are whole; units at zero are what a kernel would skip.

    Args:
      x: [*rows, d].
      gate: [r, f]. up: [d - r, f]. down: [f, e].
      top_k: active units; the paper has 8 %.

    Returns:
      [*rows, e] in the dtype of x.

    Raises:
      ValueError: shapes do not fit, or top_k is below 1.
      TypeError: an argument is not floating point, or top_k is no integer.

    Source: You et al. 2025, Spark Transformer (arXiv 2506.06644), section 3.
    """
    op, sizes = "spark_ffn", {}
    check_array(op, x=x)
    check_shape(op, "gate", gate, "r f", sizes)
    check_shape(op, "up", up, "rest f", sizes)
    check_shape(op, "down", down, "f e", sizes)
    check_float(op, x=x, gate=gate, up=up, down=down)
    if x.shape[-1] != sizes["r"] + sizes["rest"]:
        raise ValueError(
            f"{op}: x must be [*rows, d] with d={sizes['r'] + sizes['rest']}, the rows of gate and up together; got "
            f"shape {list(x.shape)}."
        )
    wide: Any = accumulator(x, gate, up, down)
    product = lambda a, b: jnp.einsum("...d,df->...f", a, b, preferred_element_type=wide)  # noqa: E731
    judged = product(x[..., : sizes["r"]], gate)
    theta = statistical_threshold(judged, top_k)[..., None]
    active = jnp.where(theta == -jnp.inf, judged, jnp.maximum(judged - jnp.where(theta == -jnp.inf, 0, theta), 0))
    units = jax.nn.gelu(active, approximate=False) * product(x[..., sizes["r"] :], up)
    return product(units.astype(x.dtype), down).astype(x.dtype)


def select_spark(
    q: Float[Array, "b t h d"],
    k: Float[Array, "b s g d"],
    *,
    top_k: int = 256,
    channels: int | None = None,
    budget: int | None = None,
    q_positions: Int[Array, "b t"] | Int[Array, " t"] | None = None,
) -> Int[Array, "b h t n"]:
    """Chooses for each query the tokens whose score by a part of the channels is above a statistical threshold.

        x[t, s] = q[t, :channels] . k[s, :channels];  those of x >= theta over s <= t (`statistical_threshold`)

    About top_k of them, of scores that are normally distributed. For `block_sparse_attention` with block_q=1, block_k=1
    and is_causal=True. (The paper also multiplies the weights by a softplus of the product of the other channels, which
    is a layer's matter.)

    Args:
      q: [b, t, h, d] queries.
      k: [b, s, g, d] keys, h % g == 0.
      top_k: tokens of a query, about; all where fewer are visible.
      channels: that judge; all unless given.
      budget: tokens of a query at most, the highest first; 2 * top_k unless given.
      q_positions: [b, t] or [t]; 0, 1, ... unless given.

    Returns:
      [b, h, t, min(budget, s)] int32, -1 behind the last.

    Raises:
      ValueError: shapes do not fit, a size is below 1, or there are not so many channels.
      TypeError: q or k is not floating point, or a size is no integer.

    Source: You et al. 2025, Spark Transformer (arXiv 2506.06644), section 3; sizes of its attention.
    """
    op, sizes = "select_spark", {}
    check_shape(op, "q", q, "b t h d", sizes)
    check_shape(op, "k", k, "b s g d", sizes)
    check_groups(op, sizes["h"], sizes["g"], "k must be [b, s, g, d]")
    check_float(op, q=q, k=k)
    top_k = whole(op, "top_k", top_k)
    budget = min(sizes["s"], 2 * top_k if budget is None else whole(op, "budget", budget))
    channels = sizes["d"] if channels is None else whole(op, "channels", channels)
    if channels > sizes["d"]:
        raise ValueError(f"{op}: channels must be at most d={sizes['d']}; got {channels}.")
    (b, t, h, _), g, wide = q.shape, sizes["g"], accumulator(q, k)
    at = positions(op, q_positions, b, t)
    q, k = (x[..., :channels].astype(wide) for x in held(q, k))

    def choose(q, at):
        x = jnp.einsum("btgrd,bsgd->btgrs", q.reshape(*q.shape[:2], g, h // g, -1), k)
        x = x.reshape(*q.shape[:2], h, -1)
        seen = jnp.broadcast_to((jnp.arange(x.shape[-1]) <= at[..., None])[:, :, None], x.shape)
        theta = statistical_threshold(x, top_k, where=seen)[..., None]
        return best(x, budget, hidden=~seen | (x < theta))

    return jnp.swapaxes(in_chunks(choose, b * h * sizes["s"], q, at), 1, 2)
