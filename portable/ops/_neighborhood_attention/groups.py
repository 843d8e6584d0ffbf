"""Dilation groups as rows of the batch: moved once for a stack of layers, instead of in each of them."""

import math
import operator
from collections.abc import Sequence

from jaxtyping import Array, Shaped

from portable.ops._arguments import check_array

TO, BACK = "space_to_batch", "batch_to_space"


def space_to_batch(x: Shaped[Array, " b *axes"], dilation: Sequence[int]) -> Shaped[Array, " rows *axes"]:
    """Makes every dilation group a row of the batch, in which its positions are neighbors.

    `neighborhood_attention` with a dilation is the same op without one on such an array. Layers of one dilation that
    follow one another, and whatever works on each position alone, can so be run between one `space_to_batch` and one
    `batch_to_space`: the groups are then gathered once, not for q, k and v of each layer.

    Args:
      x: [b, *space, ...], any number of axes behind space.
      dilation: one integer for each axis of space; each divides its axis, so that all groups are equally large.

    Returns:
      [b * G, *space / dilation, ...], G the product of the dilations; group g of row i is row i * G + g.

    Raises:
      ValueError: a dilation is below 1 or does not divide its axis, or x has too few axes.

    Source: the groups of Hassani and Shi 2022 (arXiv 2209.15001), section 3.2.

    >>> import jax.numpy as jnp, portable
    >>> x = jnp.arange(6.0).reshape(1, 6)
    >>> portable.ops.space_to_batch(x, (2,)).tolist()
    [[0.0, 2.0, 4.0], [1.0, 3.0, 5.0]]
    """
    dilation = _checked(TO, x, dilation)
    b, *rest = x.shape
    rank = len(dilation)
    for i, (length, d) in enumerate(zip(rest, dilation, strict=False)):
        if length % d:
            raise ValueError(
                f"{TO}: dilation must divide its axis; got {d} on axis {i} of {length} positions. Pad space, or leave "
                f"the groups to neighborhood_attention, which takes any length."
            )
    x = x.reshape(b, *(n for s, d in zip(rest, dilation, strict=False) for n in (s // d, d)), *rest[rank:])
    order = [*range(2, 2 * rank + 1, 2), *range(1, 2 * rank, 2)]
    x = x.transpose(0, *order, *range(2 * rank + 1, x.ndim))
    return x.reshape(b * math.prod(dilation), *x.shape[rank + 1 :])


def batch_to_space(x: Shaped[Array, " rows *axes"], dilation: Sequence[int]) -> Shaped[Array, " b *axes"]:
    """The inverse of `space_to_batch`.

    Args:
      x: [b * G, *space / dilation, ...].
      dilation: as given to `space_to_batch`.

    Returns:
      [b, *space, ...].

    Raises:
      ValueError: a dilation is below 1, x has too few axes, or rows that are not whole sets of groups.

    >>> import jax.numpy as jnp, portable
    >>> portable.ops.batch_to_space(jnp.array([[0, 2, 4], [1, 3, 5]]), (2,)).tolist()
    [[0, 1, 2, 3, 4, 5]]
    """
    dilation = _checked(BACK, x, dilation)
    rows, *rest = x.shape
    rank, groups = len(dilation), math.prod(dilation)
    if rows % groups:
        raise ValueError(f"{BACK}: rows must be a multiple of the {groups} groups of {list(dilation)}; got {rows}.")
    x = x.reshape(rows // groups, *dilation, *rest)
    order = [i for j in range(rank) for i in (rank + 1 + j, 1 + j)]
    x = x.transpose(0, *order, *range(2 * rank + 1, x.ndim))
    return x.reshape(rows // groups, *(s * d for s, d in zip(rest, dilation, strict=False)), *rest[rank:])


def _checked(op: str, x, dilation) -> tuple[int, ...]:
    check_array(op, x=x)
    try:
        dilation = tuple(operator.index(d) for d in dilation)
    except TypeError:
        raise TypeError(f"{op}: dilation must be integers, one for each axis of space; got {dilation!r}.") from None
    if not dilation or min(dilation) < 1:
        raise ValueError(f"{op}: dilation must be at least 1 on each of at least one axis; got {list(dilation)}.")
    if x.ndim <= len(dilation):
        raise ValueError(
            f"{op}: x must be [b, *space, ...] with {len(dilation)} axes of space, as dilation; got {list(x.shape)}."
        )
    return dilation
