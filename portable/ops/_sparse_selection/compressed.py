"""Selection by attention to compressed keys: NSA and InfLLM-V2."""

import math

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from portable.ops._arguments import accumulator, check_float, check_groups, check_shape
from portable.ops._sparse_selection.common import beginnings, best, block_means, held, in_chunks, positions, whole


def select_nsa(
    q: Float[Array, "b t h d"],
    compressed: Float[Array, "b c g d"],
    *,
    s: int | None = None,
    kernel: int = 64,
    stride: int = 64,
    block_k: int = 64,
    top_k: int = 16,
    initial: int = 1,
    local: int = 2,
    scale: float | None = None,
    q_positions: Int[Array, "b t"] | Int[Array, " t"] | None = None,
    starts: Int[Array, "b t"] | Int[Array, " t"] | None = None,
) -> Int[Array, "b g t n"]:
    """Chooses for each query and head of keys the blocks that its attention to compressed keys falls on.

        p[t, c] = softmax over c of q[t] . compressed[c] * scale, where the last token of kernel c is t or before it
        s[t, i] = sum over the heads of the group and over c of p[t, c] * (strides that kernel c and block i share)

    The first `initial` blocks and the `local` last ones up to the query's own are always chosen, then those that score
    highest, `top_k` in all. The weights of c are what equation 9 of the paper counts, with kernels centred on their
    block. Defaults are flash-linear-attention's, where a kernel is a block; the paper's are kernel=32, stride=16.
    For `block_sparse_attention` with block_q=1 and is_causal=True.

    Args:
      q: [b, t, h, d] queries.
      compressed: [b, c, g, d], number c for the tokens from c * stride to c * stride + kernel - 1, as
        `block_means(k, kernel, stride=stride)` or a learned map makes them; h % g == 0.
      s: keys that there are, for the number of blocks; what kernels cover unless given.
      kernel, stride: tokens of a kernel, and from one to the next; stride divides kernel and block_k.
      block_k: tokens of a block.
      top_k: blocks of a query.
      initial, local: of them, those at the start and up to the query that are always chosen.
      scale: of the scores; None for d**-0.5.
      q_positions: [b, t] or [t]; 0, 1, ... unless given.
      starts: [b, t] or [t], where the text of each query begins, a multiple of block_k; nothing before it is chosen. 0
        unless given.

    Returns:
      [b, g, t, min(top_k, blocks)] int32, -1 where fewer blocks are visible.

    Raises:
      ValueError: shapes do not fit, a size is out of range, or stride does not divide.
      TypeError: an array is not floating point, or a size is no integer.

    Source: Yuan et al. 2025 (arXiv 2502.11089), equations 8 to 12.

    >>> import jax.numpy as jnp, portable
    >>> q, k = jnp.ones([1, 8, 1, 1]), jnp.array([0.0, 0, 5, 5, 1, 1, 0, 0]).reshape(1, 8, 1, 1)
    >>> sizes = dict(kernel=2, stride=2, block_k=2, top_k=2, initial=0, local=1)
    >>> portable.ops.select_nsa(q, portable.ops.block_means(k, 2), **sizes)[0, 0, ::2].tolist()
    [[0, -1], [1, 0], [2, 1], [3, 1]]
    """
    op = "select_nsa"
    g, blocks, scale = _check(op, q, compressed, s, kernel, stride, block_k, top_k, initial, local, scale)
    b, t = q.shape[:2]
    at, begin = positions(op, q_positions, b, t), beginnings(op, starts, b, t, block_k)
    shares = _shares(compressed.shape[1], blocks, kernel, stride, block_k)

    def pool(p):
        return jnp.einsum("btgc,cn->btgn", p, shares.astype(p.dtype))

    return _select(q, compressed, at, begin, pool, blocks, g, kernel, stride, block_k, top_k, initial, local, scale)


def select_infllm(
    q: Float[Array, "b t h d"],
    k: Float[Array, "b s g d"] | None,
    *,
    block_k: int = 64,
    top_k: int = 64,
    kernel: int = 32,
    stride: int = 16,
    initial: int = 1,
    window: int = 2048,
    scale: float | None = None,
    q_positions: Int[Array, "b t"] | Int[Array, " t"] | None = None,
    means: Float[Array, "b c g d"] | None = None,
    s: int | None = None,
    starts: Int[Array, "b t"] | Int[Array, " t"] | None = None,
) -> Int[Array, "b g t n"]:
    """Chooses for each query and head of keys the blocks on which its attention to means of keys is highest.

        p[t, c] = softmax over c of q[t] . mean(k[kernel c]) * scale, where the last token of kernel c is t or before it
        s[t, i] = max over the kernels c that touch block i of (sum over the heads of the group of p[t, c])

    The first `initial` blocks and those of the last `window` tokens are always chosen, then those that score highest,
    `top_k` in all. Nothing is learned: the same weights serve dense attention, which the paper keeps for texts up to a
    length. The softmax is exact (the paper's kernel estimates its sum by coarser means, to save work). For
    `block_sparse_attention` with block_q=1 and is_causal=True.

    Args:
      q: [b, t, h, d] queries.
      k: [b, s, g, d] keys, h % g == 0; None if means are given.
      block_k: keys of a block.
      top_k: blocks of a query.
      kernel, stride: keys of a mean, and from one to the next; stride divides kernel and block_k.
      initial: blocks at the start that are always chosen.
      window: tokens up to the query whose blocks are always chosen; a multiple of block_k.
      scale: of the scores; None for d**-0.5.
      q_positions: [b, t] or [t]; 0, 1, ... unless given.
      means: [b, c, g, d] (`block_means(k, kernel, stride=stride)`), where a cache keeps them.
      s: keys that there are, if means are given; what kernels cover unless given.
      starts: [b, t] or [t], where the text of each query begins, a multiple of block_k; nothing before it is chosen. 0
        unless given.

    Returns:
      [b, g, t, min(top_k, blocks)] int32, -1 where fewer blocks are visible.

    Raises:
      ValueError: shapes do not fit, a size is out of range, or stride does not divide.
      TypeError: an array is not floating point, or a size is no integer.

    Source: Zhao et al. 2025 (arXiv 2509.24663), section 3; sizes of MiniCPM4 (arXiv 2506.07900).

    >>> import jax.numpy as jnp, portable
    >>> q, k = jnp.ones([1, 8, 1, 1]), jnp.array([0.0, 0, 5, 5, 1, 1, 0, 0]).reshape(1, 8, 1, 1)
    >>> sizes = dict(kernel=1, stride=1, block_k=2, top_k=2, initial=0, window=2)
    >>> portable.ops.select_infllm(q, k, **sizes)[0, 0, ::2].tolist()
    [[0, -1], [1, 0], [2, 1], [3, 1]]
    """
    op = "select_infllm"
    if (k is None) == (means is None):
        raise ValueError(f"{op}: give k or the means of its kernels; got {'neither' if k is None else 'both'}.")
    sizes: dict[str, int] = {}
    check_shape(op, "q", q, "b t h d", sizes)
    check_shape(op, "k", k, "b s g d", sizes)
    check_float(op, q=q, k=k)
    local = blocks_of(op, "window", window, block_k)
    check_sizes(op, kernel, stride, block_k, top_k, initial, local)
    if k is not None:
        means, s = block_means(jax.lax.stop_gradient(k), kernel, stride=stride), k.shape[1]
    compressed = jnp.asarray(means)
    g, blocks, scale = _check(op, q, compressed, s, kernel, stride, block_k, top_k, initial, local, scale)
    b, t = q.shape[:2]
    at, begin = positions(op, q_positions, b, t), beginnings(op, starts, b, t, block_k)
    # The kernels that touch a block stand in a row.
    first = jnp.arange(blocks) * (block_k // stride) - (kernel // stride - 1)
    rows = first[:, None] + jnp.arange((block_k + kernel) // stride - 1)
    there = (rows >= 0) & (rows < compressed.shape[1])

    def pool(p):
        if not p.shape[-1]:
            return jnp.zeros((*p.shape[:-1], blocks), p.dtype)
        return jnp.where(there, p[..., jnp.clip(rows, 0, p.shape[-1] - 1)], 0).max(-1)

    return _select(q, compressed, at, begin, pool, blocks, g, kernel, stride, block_k, top_k, initial, local, scale)


def _check(op, q, compressed, s, kernel, stride, block_k, top_k, initial, local, scale):
    """Returns heads of keys, blocks and the scale."""
    sizes: dict[str, int] = {}
    check_shape(op, "q", q, "b t h d", sizes)
    check_shape(op, "compressed keys", compressed, "b c g d", sizes)
    check_groups(op, sizes["h"], sizes["g"], "keys must be [b, s, g, d]")
    check_float(op, q=q, compressed=compressed)
    check_sizes(op, kernel, stride, block_k, top_k, initial, local)
    covered = (sizes["c"] - 1) * stride + kernel if sizes["c"] else 0
    s = covered if s is None else whole(op, "s", s, 0)
    return sizes["g"], -(-s // block_k), (max(1, sizes["d"]) ** -0.5 if scale is None else scale)


def blocks_of(op: str, name: str, tokens, block_k) -> int:
    """Returns the blocks of a window, which must be whole ones."""
    tokens, block_k = whole(op, name, tokens, 0), whole(op, "block_k", block_k)
    if tokens % block_k:
        raise ValueError(f"{op}: {name} must be a multiple of block_k; got {tokens} and {block_k}.")
    return tokens // block_k


def check_sizes(op: str, kernel, stride, block_k, top_k, initial, local) -> None:
    """Raises unless the sizes are numbers of tokens and blocks that go together."""
    for name, x in (("kernel", kernel), ("stride", stride), ("block_k", block_k), ("top_k", top_k)):
        whole(op, name, x)
    for name, x in (("initial", initial), ("local", local)):
        whole(op, name, x, 0)
    if kernel % stride or block_k % stride:
        raise ValueError(
            f"{op}: stride must divide kernel and block_k; got stride={stride}, kernel={kernel}, block_k={block_k}."
        )
    if initial + local > top_k:
        raise ValueError(
            f"{op}: top_k must hold the blocks that are always chosen; got top_k={top_k} for {initial} at the start "
            f"and {local} up to the query."
        )


def _shares(kernels: int, blocks: int, kernel: int, stride: int, block_k: int):
    """Returns how many strides kernel c and block i share, [c, blocks]."""
    start, first = jnp.arange(kernels)[:, None] * stride, jnp.arange(blocks) * block_k
    both = jnp.minimum(start + kernel, first + block_k) - jnp.maximum(start, first)
    return jnp.maximum(0, both) // math.gcd(stride, block_k)


def _select(q, compressed, at, begin, pool, blocks, g, kernel, stride, block_k, top_k, initial, local, scale):
    q, compressed = held(q, compressed)
    wide = accumulator(q, compressed)
    b, _, h, d = q.shape
    kernels = compressed.shape[1]
    ends = jnp.arange(kernels, dtype=jnp.int32) * stride + kernel - 1
    compressed = compressed.astype(wide)

    def choose(q, at, begin):
        q = q.reshape(*q.shape[:2], g, h // g, d).astype(wide)
        scores = jnp.einsum("btgrd,bcgd->btgrc", q, compressed) * scale
        seen = (ends <= at[..., None]) & (ends >= begin[..., None] * block_k + kernel - 1)
        scores = jnp.where(seen[:, :, None, None], scores, -jnp.inf)
        top = scores.max(-1, keepdims=True, initial=-jnp.inf)
        weights = jnp.exp(scores - jnp.where(top == -jnp.inf, 0, top))
        total = weights.sum(-1, keepdims=True)
        p = (weights / jnp.where(total == 0, 1, total)).sum(3)
        own, number = at[..., None] // block_k, jnp.arange(blocks, dtype=jnp.int32)
        first = begin[..., None]
        forced = (number < first + initial) | (number > own - local)
        hidden = (number > own) | (number < first)
        return best(pool(p), top_k, hidden=hidden[:, :, None], forced=forced[:, :, None])

    each = b * (h * kernels + g * blocks * ((block_k + kernel) // stride))
    return jnp.swapaxes(in_chunks(choose, each, q, at, begin), 1, 2)
