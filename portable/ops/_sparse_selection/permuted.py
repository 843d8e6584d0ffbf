"""Block-sparse attention after a permutation of keys and queries; PBS-Attn's permutation and blocks."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from portable.ops._arguments import accumulator, check_float, check_groups, check_shape
from portable.ops._block_sparse_attention.api import block_sparse_attention
from portable.ops._sparse_selection.common import best, block_means, held, whole
from portable.ops._sparse_selection.grouping import check_permutation


class Permuted(NamedTuple):
    """What `permuted_attention` is told.

    Attributes:
      block_indices: [b, h, nq, n] int32 blocks of permuted keys, -1 for none.
      kv_order: [b, g, s] int32, the token at each place.
    """

    block_indices: Any
    kv_order: Any


def permuted_attention(
    q: Float[Array, "b t h k"],
    k: Float[Array, "b s g k"],
    v: Float[Array, "b s g v"],
    block_indices: Int[Array, "b lists nq n"],
    kv_order: Int[Array, "b g s"],
    *,
    q_order: Int[Array, "b h t"] | None = None,
    block_q: int,
    block_k: int,
    is_causal: bool,
    scale: float | None = None,
    return_lse: bool = False,
    implementation: str | None = None,
) -> Float[Array, "b t h v"] | tuple[Float[Array, "b t h v"], Float[Array, "b h t"]]:
    """Computes `block_sparse_attention` of keys and queries in another order, and puts the result back into place.

    Attention does not ask for the order of keys; bringing together those that are seen together fills blocks. Causality
    compares the places from which tokens came. Each head of keys has an order of its own, and each head of queries.

    Args:
      q, k, v: [b, t, h, k], [b, s, g, k] and [b, s, g, v], h % g == 0.
      block_indices: [b, lists, nq, n] blocks of keys in their new order for blocks of queries in theirs; lists is 1, g
        or h.
      kv_order: [b, g, s], at each new place the token that comes there.
      q_order: [b, h, t], the same of queries; None leaves them.
      block_q, block_k, is_causal, scale, return_lse, implementation: of `block_sparse_attention`.

    Returns:
      As `block_sparse_attention`, in the order of q.

    Raises:
      ValueError: shapes do not fit, or a concrete order is no permutation.
      TypeError: as of `block_sparse_attention`, or an order is not of integers.

    Source: Wang et al. 2025, PBS-Attn (arXiv 2510.21270), section 3.

    >>> import jax.numpy as jnp, portable
    >>> q = k = jnp.ones([1, 4, 1, 8])
    >>> v, order = jnp.arange(4.0).reshape(1, 4, 1, 1), jnp.array([[[2, 0, 3, 1]]])
    >>> options = dict(block_q=2, block_k=2, is_causal=False)
    >>> portable.ops.permuted_attention(q, k, v, jnp.array([[[[0], [1]]]]), order, **options)[0, :, 0, 0].tolist()
    [1.0, 1.0, 2.0, 2.0]
    """
    op = "permuted_attention"
    sizes: dict[str, int] = {}
    check_shape(op, "q", q, "b t h k", sizes)
    check_shape(op, "k", k, "b s g k", sizes)
    check_shape(op, "v", v, "b s g v", sizes)
    check_groups(op, sizes["h"], sizes["g"], "k and v must be [b, s, g, ...]")
    check_permutation(op, "kv_order", kv_order, "b g s", sizes)
    if q_order is not None:
        check_permutation(op, "q_order", q_order, "b h t", sizes)
    check_shape(op, "block_indices", block_indices, "b lists nq n", sizes)
    b, t, h, g, lists = (sizes[x] for x in ("b", "t", "h", "g", "lists"))
    if lists not in (1, g, h):
        raise ValueError(f"{op}: block_indices must be [b, lists, nq, n] with lists of 1, g={g} or h={h}; got {lists}.")
    if q_order is not None and is_causal and g < h:  # queries of a row share their positions
        k, v, kv_order = (jnp.repeat(x, h // g, axis) for x, axis in ((k, 2), (v, 2), (kv_order, 1)))
        block_indices = jnp.repeat(block_indices, h // g, 1) if lists == g else block_indices
        g, lists = h, h if lists == g else lists
    r = h // g
    rows = lambda x: x.reshape(b * g, *x.shape[2:])  # noqa: E731
    heads = jnp.swapaxes(q, 1, 2)  # [b, h, t, k]
    if q_order is not None:
        heads = jnp.take_along_axis(heads, q_order[..., None], 2)
    queries = jnp.swapaxes(heads.reshape(b * g, r, t, -1), 1, 2)
    keys, values = (
        rows(jnp.take_along_axis(jnp.swapaxes(x, 1, 2), kv_order[..., None], 2))[:, :, None] for x in (k, v)
    )
    chosen = jnp.broadcast_to(block_indices, (b, g, *block_indices.shape[2:])) if lists == 1 else block_indices
    chosen = chosen.reshape(b * g, -1, *chosen.shape[2:])
    places: dict[str, Any] = {}
    if is_causal:
        places["kv_positions"] = rows(kv_order)
        if q_order is not None:
            places["q_positions"] = rows(q_order)
    out, lse = block_sparse_attention(
        queries, keys, values, chosen, block_q=block_q, block_k=block_k, is_causal=is_causal, scale=scale,
        return_lse=True, implementation=implementation, **places,
    )  # fmt: skip
    out, lse = jnp.swapaxes(out, 1, 2).reshape(b, h, t, -1), lse.reshape(b, h, t)
    if q_order is not None:
        back = jnp.argsort(q_order, axis=-1)
        out, lse = jnp.take_along_axis(out, back[..., None], 2), jnp.take_along_axis(lse, back, 2)
    out = jnp.swapaxes(out, 1, 2)
    return (out, lse) if return_lse else out


def select_pbs(
    q: Float[Array, "b t h d"],
    k: Float[Array, "b t g d"],
    *,
    block_q: int = 128,
    block_k: int = 128,
    segment: int = 256,
    threshold: float = 0.9,
    budget: int | None = None,
    scale: float | None = None,
) -> Permuted:
    """Brings the keys that matter together inside segments of the text, and chooses blocks of them by their means.

        w[j] = mean over the last block_q queries i of softmax over j <= i of q[i] . k[j] * scale
        order: inside each segment by falling w
        p[I, J] = softmax over the blocks J of earlier segments of mean(q[block I]) . mean(ordered k[block J]) * scale

    Chosen are, for a block of queries, the fewest blocks of earlier segments with a sum of p of at least the threshold,
    all blocks of its own segment, and the one that holds the first token. For `permuted_attention` with the same blocks
    and is_causal=True; for prompts that are read at once. A threshold of 1 or more chooses all that is visible. The
    heads of a group share an order, by the mean of their w (the paper repeats keys, so that each has its own).

    Args:
      q: [b, t, h, d] queries.
      k: [b, t, g, d] keys of the same tokens, h % g == 0.
      block_q, block_k: of queries and of keys; both divide segment.
      segment: tokens that are ordered among themselves.
      threshold: of the sum of p.
      budget: blocks of a list at most, the highest p first; None for as many as there are. It must hold a segment's
        blocks and one.
      scale: of the scores; None for d**-0.5.

    Returns:
      `Permuted`.

    Raises:
      ValueError: shapes do not fit, a size is out of range or does not divide.
      TypeError: q or k is not floating point, or a size is no integer.

    Source: Wang et al. 2025, PBS-Attn (arXiv 2510.21270), section 3; defaults of its code.

    >>> import jax.numpy as jnp, portable
    >>> q, k = jnp.ones([1, 8, 1, 1]), jnp.array([0.0, 5, 1, 1, 0, 0, 0, 0]).reshape(1, 8, 1, 1)
    >>> found = portable.ops.select_pbs(q, k, block_q=4, block_k=2, segment=4, threshold=0.5)
    >>> found.kv_order[0, 0].tolist(), found.block_indices[0, 0, 1].tolist()
    ([1, 2, 3, 0, 4, 5, 6, 7], [1, 2, 3, 0])
    """
    op, sizes = "select_pbs", {}
    check_shape(op, "q", q, "b t h d", sizes)
    check_shape(op, "k", k, "b t g d", sizes)
    check_groups(op, sizes["h"], sizes["g"], "k must be [b, t, g, d]")
    check_float(op, q=q, k=k)
    block_q, block_k, segment = (
        whole(op, name, x) for name, x in (("block_q", block_q), ("block_k", block_k), ("segment", segment))
    )
    if segment % block_q or segment % block_k:
        raise ValueError(
            f"{op}: block_q and block_k must divide segment; got block_q={block_q}, block_k={block_k}, "
            f"segment={segment}."
        )
    (b, t, h, d), g = q.shape, sizes["g"]
    blocks, least = -(-t // block_k), segment // block_k + 1
    if budget is not None and whole(op, "budget", budget) < min(least, blocks):
        raise ValueError(
            f"{op}: budget must hold the blocks that are always chosen, a segment's and the first token's, {least}; "
            f"got {budget}."
        )
    if not threshold > 0:
        raise ValueError(f"{op}: threshold must be above 0; got {threshold}.")
    count, factor = min(blocks, budget or blocks), max(1, d) ** -0.5 if scale is None else scale
    if not t:
        return Permuted(jnp.zeros((b, h, 0, 0), jnp.int32), jnp.zeros((b, g, 0), jnp.int32))
    wide = accumulator(q, k)
    q, k = (x.astype(wide) for x in held(q, k))
    token = jnp.arange(t, dtype=jnp.int32)
    last = q[:, -block_q:].reshape(b, -1, g, h // g, d)
    scores = jnp.einsum("bigrd,bjgd->bgrij", last, k) * factor
    seen = token <= token[-block_q:, None]
    weight = jax.nn.softmax(jnp.where(seen, scores, -jnp.inf), -1).mean((2, 3))
    order = jnp.lexsort((-weight, jnp.broadcast_to(token // segment, weight.shape)), axis=-1).astype(jnp.int32)
    ordered = jnp.take_along_axis(jnp.swapaxes(k, 1, 2), order[..., None], 2)
    means = block_means(jnp.swapaxes(ordered, 1, 2), block_k)
    pooled = block_means(q, block_q).reshape(b, -1, g, h // g, d)
    coarse = (jnp.einsum("bngrd,bmgd->bgrnm", pooled, means) * factor).reshape(b, h, -1, blocks)
    number, mine = jnp.arange(blocks), jnp.arange(coarse.shape[2])[:, None] * block_q // segment
    earlier, own = number * block_k // segment < mine, number * block_k // segment == mine
    top = jnp.where(earlier, coarse, -jnp.inf).max(-1, keepdims=True)
    p = jnp.where(earlier, jnp.exp(coarse - jnp.where(top == -jnp.inf, 0, top)), 0)
    p = p / jnp.maximum(p.sum(-1, keepdims=True), jnp.finfo(wide).tiny)
    kept = earlier
    if threshold < 1:
        falling = jnp.argsort(-p, axis=-1)
        sums = jnp.take_along_axis(p, falling, -1)
        before = jnp.cumsum(sums, -1) - sums
        enough = jnp.take_along_axis(before, jnp.argsort(falling, axis=-1), -1) >= threshold
        kept = earlier & ~enough  # NaN is not enough: all is looked at
    first = jnp.argmin(order, -1) // block_k
    first = jnp.repeat(first, h // g, 1)[..., None, None] == number
    forced = own | first
    chosen = best(p, count, hidden=~(kept | forced) | (number * block_k // segment > mine), forced=forced)
    return Permuted(chosen, order)
