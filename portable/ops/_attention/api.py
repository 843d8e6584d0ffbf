"""The contract of `attention`: checks and preparation. No algorithm."""

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from portable import selection
from portable.ops._arguments import (
    accumulator,
    check_float,
    check_groups,
    check_positions,
    check_segments,
    check_shape,
    vary_together,
)
from portable.ops._attention.arguments import Arrays
from portable.ops._attention.mods import trace


def attention(
    q: Float[Array, "b t h k"],
    k: Float[Array, "b s g k"],
    v: Float[Array, "b s g v"],
    *,
    is_causal: bool = False,
    window: int | tuple[int | None, int | None] | None = None,
    key_mask: Bool[Array, "b s"] | None = None,
    segment_ids: Int[Array, "b t"] | tuple[Int[Array, "b t"], Int[Array, "b s"]] | None = None,
    q_positions: Int[Array, "b t"] | Int[Array, " t"] | None = None,
    kv_positions: Int[Array, "b s"] | Int[Array, " s"] | None = None,
    mask_mod: Callable | None = None,
    score_mod: Callable | None = None,
    soft_cap: float | None = None,
    sinks: Float[Array, " h"] | None = None,
    scale: float | None = None,
    return_lse: bool = False,
    implementation: str | None = None,
) -> Float[Array, "b t h v"] | tuple[Float[Array, "b t h v"], Float[Array, "b h t"]]:
    """Computes each query's mean of values, weighted by a softmax over the keys that it sees.

    For each batch row and head, with k and v of the head's group h // (h / g):

        x[i, j] = q[i] . k[j] * scale
        x[i, j] = score_mod(x[i, j], b, h, q_positions[i], kv_positions[j])
        x[i, j] = soft_cap * tanh(x[i, j] / soft_cap)
        x[i, j] = -inf where i does not see j
        lse[i]  = log(exp(sinks[h]) + sum_j exp(x[i, j]))
        out[i]  = sum_j exp(x[i, j] - lse[i]) * v[j]

    A query sees a key where everything that is given agrees: causality, window, key_mask, segments and mask_mod. One
    that sees none has out = 0 and lse = -inf (lse = sinks[h] with a sink), and no gradient passes through it. Keys and
    values that are not seen must be finite all the same: their weight is 0, and 0 times NaN is NaN.

    Memory is linear in t and s, forwards and backwards. Blocks that no query of theirs sees are not computed where
    causality and window say so and positions are not given. Softmax and sums are float32 (float64 if an argument is
    float64), matrix products take operands in the dtype of the arguments. Differentiable in every floating argument
    and every floating array that score_mod closes over, through out and lse both, in reverse mode;
    `implementation="reference"` also in forward mode.

    Args:
      q: [b, t, h, k] queries.
      k: [b, s, g, k] keys; h % g == 0. Groups are never broadcast to heads.
      v: [b, s, g, v] values; their width may differ from that of the keys.
      is_causal: a query sees keys of its own position and before. Positions count from 0 on both sides, so with t != s
        the first query is at the first key; to decode, give `q_positions`.
      window: (left, right): a query sees the keys from `left` positions before it to `right` after it, None for no
        limit. An integer w is (w - 1, w - 1): with is_causal the last w keys, the query's own among them.
      key_mask: [b, s] booleans, False for keys that no query sees.
      segment_ids: [b, t] integers where t = s, or a pair ([b, t], [b, s]): a query sees keys of its own segment.
      q_positions: [b, t] or [t] integers, what causality, window and mods take for positions; None for 0, 1, ...
      kv_positions: [b, s] or [s], the same of the keys.
      mask_mod: (b, h, q_position, kv_position) -> whether it is seen, of scalars; may close over arrays.
      score_mod: (score, b, h, q_position, kv_position) -> score, of scalars; may close over arrays. A score of -inf
        masks. Inside a `shard_map` b and h count from the shard's first.
      soft_cap: > 0, or None.
      sinks: [h] logits of a key without a value, or None.
      scale: of the scores; None for k**-0.5.
      return_lse: also return the log-sum-exp.
      implementation: "reference", "xla" or a kernel's name.

    Returns:
      out [b, t, h, v] in the dtype of q; with return_lse also lse [b, h, t] in float32.

    Raises:
      ValueError: shapes do not fit, or window, soft_cap or scale is out of range.
      TypeError: an array has a dtype of another kind, or a mod does not return one scalar of its kind.
      portable.Unavailable: the named implementation cannot take these arguments.

    Source: Vaswani et al. 2017 (arXiv 1706.03762), equation 1; groups: Ainslie et al. 2023 (arXiv 2305.13245); mods:
    Dong et al. 2024, FlexAttention (arXiv 2412.05496), section 3; soft cap: Gemma 2 (arXiv 2408.00118), section 2;
    sinks: gpt-oss (arXiv 2508.10925), section 2. Gemma 2 caps before it masks and gpt-oss appends the sink after the
    mask; score_mod comes first as in FlexAttention, where caps are mods too, and can itself cap before it adds.

    >>> import jax.numpy as jnp, portable
    >>> q, k = jnp.ones([1, 4, 2, 8]), jnp.ones([1, 4, 1, 8])
    >>> v = jnp.arange(4.0).reshape(1, 4, 1, 1)
    >>> out, lse = portable.ops.attention(q, k, v, is_causal=True, window=2, return_lse=True)
    >>> out[0, :, 0, 0].tolist(), lse.shape
    ([0.0, 0.5, 1.5, 2.5], (1, 2, 4))
    """
    arrays, options = prepare(
        q,
        k,
        v,
        is_causal=is_causal,
        window=window,
        key_mask=key_mask,
        segment_ids=segment_ids,
        q_positions=q_positions,
        kv_positions=kv_positions,
        mask_mod=mask_mod,
        score_mod=score_mod,
        soft_cap=soft_cap,
        sinks=sinks,
        scale=scale,
    )
    # Residuals are arguments: the second call returns what it is given, and its backward then has the results.
    held = jax.tree.map(jax.lax.stop_gradient, Arrays(*arrays))
    out, lse = selection.call("attention", implementation, tuple(held), options)
    arrays = tuple(Arrays(*arrays)._replace(out=out, lse=lse))
    out, lse = selection.call("attention", implementation, arrays, options)
    out = out.astype(q.dtype)
    return (out, lse) if return_lse else out


def prepare(
    q,
    k,
    v,
    *,
    is_causal=False,
    window=None,
    key_mask=None,
    segment_ids=None,
    q_positions=None,
    kv_positions=None,
    mask_mod=None,
    score_mod=None,
    soft_cap=None,
    sinks=None,
    scale=None,
    return_lse=False,
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Checks the arguments; returns the arrays and options of `arguments`."""
    del return_lse  # every implementation returns it
    op, sizes = "attention", {}
    check_shape(op, "q", q, "b t h k", sizes)
    check_shape(op, "k", k, "b s g k", sizes)
    check_shape(op, "v", v, "b s g v", sizes)
    check_groups(op, sizes["h"], sizes["g"], "k and v must be [b, s, g, ...]")
    check_shape(op, "sinks", sinks, "h", sizes)
    check_shape(op, "key_mask", key_mask, "b s", sizes)
    q_segments, kv_segments = check_segments(op, segment_ids, sizes)
    q_positions = check_positions(op, "q_positions", q_positions, "t", sizes)
    kv_positions = check_positions(op, "kv_positions", kv_positions, "s", sizes)
    check_float(op, q=q, k=k, v=v, sinks=sinks)
    if key_mask is not None and key_mask.dtype != jnp.bool_:
        raise TypeError(f"{op}: key_mask must be booleans, True for keys that are seen; got {key_mask.dtype}.")
    left, right = _limits(op, window, is_causal)
    if soft_cap is not None and not (_is_number(soft_cap) and soft_cap > 0):
        raise ValueError(f"{op}: soft_cap must be a number above 0, or None for no cap; got {_shown(soft_cap)}.")
    if scale is not None and not _is_number(scale):
        raise ValueError(
            f"{op}: scale must be a finite number, or None for k**-0.5; got {_shown(scale)}. Multiply q by an array."
        )

    wide = accumulator(q, k, v, sinks)
    common = wide if wide == jnp.float64 else jnp.result_type(q, k, v)  # one argument in float64 takes all there
    given = (*(x.astype(common) for x in (q, k, v)), sinks, key_mask, q_segments, kv_segments)
    given = vary_together(*given, q_positions, kv_positions)
    mask, mask_arrays = trace(op, "mask_mod", mask_mod, given[0])
    score, score_arrays = trace(op, "score_mod", score_mod, given[0], score=wide)
    options: dict[str, Any] = {"left": left, "right": right, "mask_mod": mask, "score_mod": score}
    options["soft_cap"] = None if soft_cap is None else float(soft_cap)
    options["scale"] = float(max(1, sizes["k"]) ** -0.5 if scale is None else scale)
    return (*given, mask_arrays, score_arrays, None, None), options


def _limits(op: str, window: Any, is_causal: Any) -> tuple[int | None, int | None]:
    """Returns how many positions before and after its own a query sees, None for no limit."""
    if not isinstance(is_causal, bool):
        raise TypeError(f"{op}: is_causal must be True or False; got {_shown(is_causal)}.")
    whole = lambda x, least: isinstance(x, int) and not isinstance(x, bool) and x >= least  # noqa: E731
    sides: Any = (window - 1, window - 1) if whole(window, 1) else (None, None) if window is None else window
    pair = isinstance(sides, tuple) and len(sides) == 2
    if not pair or not all(x is None or whole(x, 0) for x in sides):
        raise ValueError(
            f"{op}: window must be an integer of at least 1, a pair (left, right) of integers of at least 0 or None, "
            f"or None; got {_shown(window)}."
        )
    return sides[0], 0 if is_causal else sides[1]


def _is_number(x) -> bool:
    return isinstance(x, (int, float)) and not isinstance(x, bool) and math.isfinite(x)


def _shown(x) -> str:
    return repr(x) if isinstance(x, (int, float, str, tuple, bool)) else type(x).__name__
