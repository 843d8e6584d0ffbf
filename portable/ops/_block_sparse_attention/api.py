"""The contract of `block_sparse_attention`: checks and preparation. No algorithm."""

import math
import numbers
import operator
from typing import Any

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from portable import selection
from portable.checks import check_values
from portable.ops._arguments import (
    accumulator,
    check_array,
    check_float,
    check_groups,
    check_integer,
    check_positions,
    check_segments,
    check_shape,
    vary_together,
)

OP = "block_sparse_attention"


def block_sparse_attention(
    q: Float[Array, "b t h k"],
    k: Float[Array, "b s g k"],
    v: Float[Array, "b s g v"],
    block_indices: Int[Array, "b lists nq n"],
    *,
    block_q: int,
    block_k: int,
    is_causal: bool,
    q_positions: Int[Array, "b t"] | Int[Array, " t"] | None = None,
    kv_positions: Int[Array, "b s"] | Int[Array, " s"] | None = None,
    segment_ids: Int[Array, "b t"] | tuple[Int[Array, "b t"], Int[Array, "b s"]] | None = None,
    scale: float | None = None,
    return_lse: bool = False,
    implementation: str | None = None,
) -> Float[Array, "b t h v"] | tuple[Float[Array, "b t h v"], Float[Array, "b h t"]]:
    """Computes attention of each block of queries to the blocks of keys that are selected for it.

    Query i of head h, in block I = i // block_q, sees key j where j // block_k is one of block_indices[b, l, I] with
    the head's list l = h // (h / lists), and, where they are given, causality and segments agree:

        x[i, j] = q[i] . k[j] * scale,  -inf where i does not see j
        lse[i]  = log(sum_j exp(x[i, j]))
        out[i]  = sum_j exp(x[i, j] - lse[i]) * v[j]

    A list is a set: its order says nothing, -1 is padding, and a block that it names twice counts once. Blocks behind a
    query are no error, and add nothing if causal. A query that sees no key has out = 0 and lse = -inf, and no gradient
    passes through it. Keys and values of a selected block must be finite, also those that causality hides; a NaN
    elsewhere is not read. Lengths need not be multiples of the blocks. Selection by token is block_k = 1.

    Work and memory are linear in the blocks that are selected. Softmax and sums are float32 (float64 if an argument is
    float64), matrix products take operands in the dtype of the arguments. Differentiable in q, k and v through out and
    lse both, in reverse mode; `implementation="reference"` also in forward mode.

    Where keys or queries are permuted (to bring together what is seen together), positions say what causality compares:
    give those of the permuted tokens. If each head has a permutation of its own, make the heads rows of the batch.

    Args:
      q: [b, t, h, k] queries.
      k: [b, s, g, k] keys; h % g == 0, and query head i reads head i // (h / g).
      v: [b, s, g, v] values; their width may differ from that of the keys.
      block_indices: [b, lists, nq, n] integers, nq = ceil(t / block_q), from 0 to ceil(s / block_k) - 1 or -1; lists is
        1, g or h.
      block_q: queries that share a list.
      block_k: keys of a block.
      is_causal: a query sees keys of its own position and before. Positions count from 0 on both sides, so with t != s
        the first query is at the first key; to decode, give `q_positions`.
      q_positions: [b, t] or [t] integers, what causality takes for positions; None for 0, 1, ...
      kv_positions: [b, s] or [s], the same of the keys.
      segment_ids: [b, t] integers where t = s, or a pair ([b, t], [b, s]): a query sees keys of its own segment.
      scale: of the scores; None for k**-0.5.
      return_lse: also return the log-sum-exp, in the natural logarithm; see `merge_attentions`.
      implementation: "reference", "xla" (the platform's form) or the name of a form or kernel.

    Returns:
      out [b, t, h, v] in the dtype of q; with return_lse also lse [b, h, t] in float32.

    Raises:
      ValueError: shapes do not fit, a block size is below 1, or an index is out of range and the array is concrete
        (under `portable.checks()` also inside compiled code; without, such an index adds nothing).
      TypeError: an array has a dtype of another kind, or an option has another type.
      portable.Unavailable: the named implementation cannot take these arguments.

    Source: what MoBA (arXiv 2502.13189, equation 2), NSA (arXiv 2502.11089, equation 12) and InfLLM-V2 (arXiv
    2509.24663, section 3) have in common; lists of blocks as in Child et al. 2019 (arXiv 1904.10509), section 5.5.

    >>> import jax.numpy as jnp, portable
    >>> q = k = jnp.ones([1, 6, 1, 8])
    >>> v = jnp.arange(6.0).reshape(1, 6, 1, 1)
    >>> chosen = jnp.array([[0, -1], [0, 1], [2, 2]])[None, None]
    >>> options = dict(block_q=2, block_k=2, is_causal=True)
    >>> portable.ops.block_sparse_attention(q, k, v, chosen, **options)[0, :, 0, 0].tolist()
    [0.0, 0.5, 1.0, 1.5, 4.0, 4.5]
    """
    arrays, options = prepare(
        q,
        k,
        v,
        block_indices,
        block_q=block_q,
        block_k=block_k,
        is_causal=is_causal,
        q_positions=q_positions,
        kv_positions=kv_positions,
        segment_ids=segment_ids,
        scale=scale,
    )
    out, lse = selection.call(OP, implementation, arrays, options)
    out = out.astype(q.dtype)
    return (out, lse) if return_lse else out


def prepare(
    q,
    k,
    v,
    block_indices,
    *,
    block_q,
    block_k,
    is_causal,
    q_positions=None,
    kv_positions=None,
    segment_ids=None,
    scale=None,
    return_lse=False,
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Checks the arguments; returns the arrays and options of `arguments`."""
    del return_lse  # every implementation returns it
    sizes: dict[str, int] = {}
    check_shape(OP, "q", q, "b t h k", sizes)
    check_shape(OP, "k", k, "b s g k", sizes)
    check_shape(OP, "v", v, "b s g v", sizes)
    if 0 in (sizes["k"], sizes["v"]):
        raise ValueError(f"{OP}: heads must be at least 1 wide; got k={sizes['k']}, v={sizes['v']}.")
    check_groups(OP, sizes["h"], sizes["g"], "k and v must be [b, s, g, ...]")
    check_array(OP, block_indices=block_indices)
    block_q, block_k = (_size(name, x) for name, x in (("block_q", block_q), ("block_k", block_k)))
    sizes["nq"] = -(-sizes["t"] // block_q)
    check_shape(OP, "block_indices", block_indices, "b lists nq n", sizes)
    if sizes["lists"] not in (1, sizes["g"], sizes["h"]):
        raise ValueError(
            f"{OP}: block_indices must be [b, lists, nq, n] with lists of 1, g={sizes['g']} or h={sizes['h']}; got "
            f"{sizes['lists']}."
        )
    q_segments, kv_segments = check_segments(OP, segment_ids, sizes)
    q_positions = check_positions(OP, "q_positions", q_positions, "t", sizes)
    kv_positions = check_positions(OP, "kv_positions", kv_positions, "s", sizes)
    check_float(OP, q=q, k=k, v=v)
    check_integer(OP, block_indices=block_indices)
    if not isinstance(is_causal, (bool, np.bool_)):
        raise TypeError(f"{OP}: is_causal must be True or False; got {type(is_causal).__name__}.")
    if scale is not None and (isinstance(scale, bool) or not isinstance(scale, numbers.Real)):
        raise TypeError(f"{OP}: scale must be a number; got {type(scale).__name__}. Multiply q by an array instead.")
    if scale is not None and not math.isfinite(scale):
        raise ValueError(f"{OP}: scale must be finite; got {scale}.")
    blocks = -(-sizes["s"] // block_k)
    check_values(
        lambda i: (i >= -1) & (i < blocks),
        f"{OP}: block_indices must lie from 0 to {blocks - 1}, the blocks of {block_k} of s={sizes['s']} keys, or be "
        f"-1 for padding; got others.",
        block_indices,
    )
    common = jnp.result_type(q, k, v)
    wide = accumulator(q, k, v)
    dtype = wide if wide == jnp.float64 else common  # one argument in float64 takes all there
    given = (*(x.astype(dtype) for x in (q, k, v)), block_indices.astype(jnp.int32))
    arrays = vary_together(*given, q_positions, kv_positions, q_segments, kv_segments)
    options: dict[str, Any] = {"block_q": block_q, "block_k": block_k, "is_causal": bool(is_causal)}
    return arrays, options | {"scale": float(sizes["k"] ** -0.5 if scale is None else scale)}


def _size(name: str, x: Any) -> int:
    try:
        size = operator.index(x)
    except TypeError:
        raise TypeError(f"{OP}: {name} must be an integer; got {type(x).__name__}.") from None
    if size < 1 or isinstance(x, bool):
        raise ValueError(f"{OP}: {name} must be at least 1; got {x!r}.")
    return size
