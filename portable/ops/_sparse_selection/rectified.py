"""Sparse attention held to the shares that attention of pooled blocks gives: Rectified SpaAttn."""

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from portable.ops._arguments import accumulator, check_float, check_groups, check_shape
from portable.ops._block_sparse_attention.api import block_sparse_attention
from portable.ops._sparse_selection.common import block_means, whole


def rectified_attention(
    q: Float[Array, "b t h k"],
    k: Float[Array, "b s g k"],
    v: Float[Array, "b s g v"],
    block_indices: Int[Array, "b lists nq n"],
    *,
    block_q: int,
    block_k: int,
    scale: float | None = None,
    implementation: str | None = None,
) -> Float[Array, "b t h v"]:
    """Computes block-sparse attention whose share of the whole, and what is missing, come from pooled blocks.

        P[I, J] = softmax over J of mean(q[block I]) . mean(k[block J]) * scale + log |J|
        out[i]  = (sum over chosen J of P[I, J]) * sparse[i] + sum over other J of P[I, J] mean(v[block J])

    for query i of block I, with `sparse` of `block_sparse_attention`: attention to few blocks alone would give those
    all the weight. Exact where all blocks are chosen, and where the queries of a block are the same and the keys of
    each block that is left out. Not causal. Differentiable in q, k and v. (The paper also weighs the gain against the
    error of pooling, by a rule that its abstract does not give; here every block is rectified.)

    Args:
      q, k, v: [b, t, h, k], [b, s, g, k] and [b, s, g, v], h % g == 0.
      block_indices, block_q, block_k, scale, implementation: of `block_sparse_attention`.

    Returns:
      [b, t, h, v] in the dtype of q.

    Raises:
      ValueError: shapes do not fit, or an option is out of range.
      TypeError: as of `block_sparse_attention`.

    Source: Rectified SpaAttn (2025), from its abstract: reallocation of attention by a pooled reference.

    >>> import jax.numpy as jnp, portable
    >>> q = k = jnp.ones([1, 4, 1, 8])
    >>> v = jnp.array([1.0, 1, 3, 3]).reshape(1, 4, 1, 1)
    >>> chosen = jnp.zeros((1, 1, 2, 1), int)
    >>> portable.ops.rectified_attention(q, k, v, chosen, block_q=2, block_k=2)[0, :, 0, 0].tolist()
    [2.0, 2.0, 2.0, 2.0]
    """
    op, sizes = "rectified_attention", {}
    check_shape(op, "q", q, "b t h k", sizes)
    check_shape(op, "k", k, "b s g k", sizes)
    check_shape(op, "v", v, "b s g v", sizes)
    check_groups(op, sizes["h"], sizes["g"], "k and v must be [b, s, g, ...]")
    check_float(op, q=q, k=k, v=v)
    block_q, block_k = whole(op, "block_q", block_q), whole(op, "block_k", block_k)
    b, t, s, h, g = (sizes[x] for x in ("b", "t", "s", "h", "g"))
    factor: float = max(1, sizes["k"]) ** -0.5 if scale is None else scale
    options = {"block_q": block_q, "block_k": block_k, "is_causal": False, "scale": factor}
    sparse: Any = block_sparse_attention(q, k, v, block_indices, implementation=implementation, **options)
    if not t or not s:
        return sparse
    wide, r = accumulator(q, k, v), h // g
    pooled, keys, values = (block_means(x.astype(wide), size) for x, size in ((q, block_q), (k, block_k), (v, block_k)))
    nq, nk = pooled.shape[1], keys.shape[1]
    x = jnp.einsum("bngrd,bmgd->bgrnm", pooled.reshape(b, nq, g, r, -1), keys) * factor
    x = x + jnp.log(jnp.minimum(block_k, s - jnp.arange(nk) * block_k).astype(wide))
    p = jax.nn.softmax(x.reshape(b, h, nq, nk), -1)
    lists = block_indices.shape[1]
    at = jnp.where((block_indices >= 0) & (block_indices < nk), block_indices, nk)
    chosen = jnp.zeros((b, lists, nq, nk + 1), bool).at[(*jnp.ogrid[:b, :lists, :nq, :1][:3], at)].set(True)[..., :nk]
    chosen = jnp.repeat(chosen, h // lists, 1)
    share = jnp.where(chosen, p, 0).sum(-1)  # [b, h, nq]
    rest = jnp.where(chosen, 0, p).reshape(b, g, r, nq, nk)
    missing = jnp.einsum("bgrnm,bmgv->bngrv", rest, values).reshape(b, nq, h, -1)

    def tokens(x):
        """[b, nq, ...] -> [b, t, ...]."""
        return jnp.repeat(x, block_q, axis=1)[:, :t]

    out = tokens(jnp.swapaxes(share, 1, 2))[..., None] * sparse.astype(wide) + tokens(missing)
    return out.astype(q.dtype)
