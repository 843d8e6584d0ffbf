"""The contract of `neighborhood_attention`: checks and preparation. No algorithm."""

import numbers
import operator
from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from portable import selection
from portable.ops._arguments import accumulator, check_array, check_float, check_shape, vary_together

OP = "neighborhood_attention"
_AXES = ("x", "y", "z")


def neighborhood_attention(
    q: Float[Array, "b *space h k"],
    k: Float[Array, "b *space g k"],
    v: Float[Array, "b *space g v"],
    *,
    window: int | Sequence[int],
    stride: int | Sequence[int] = 1,
    dilation: int | Sequence[int] = 1,
    is_causal: bool | Sequence[bool] = False,
    scale: float | None = None,
    rel_pos_bias: Float[Array, " h *offsets"] | None = None,
    extra_k: Float[Array, " b e g k"] | None = None,
    extra_v: Float[Array, " b e g v"] | None = None,
    key_mask: Bool[Array, " b *space"] | None = None,
    return_lse: bool = False,
    pad_small: bool = False,
    implementation: str | None = None,
) -> Float[Array, "b *space h v"] | tuple[Float[Array, "b *space h v"], Float[Array, "b *space h"]]:
    """Softmax attention of each position to a window of positions around it, over 1, 2 or 3 axes.

    What a query sees is a product of intervals, one for each axis. On an axis of length L position i lies in the
    dilation group i % d at p = i // d; the group has n = ceil((L - i % d) / d) positions, numbered u:

        a = clamp(min(p // s * s + s // 2, n - 1) - w // 2, 0, n - w);  a <= u < a + w             # not causal
        a = max(min(p // s * s + s - 1, n - 1) - w + 1, 0);             a <= u <= p                # causal

    So a window shifts inwards at a border and never shrinks, and the queries of a stride share the window of their
    centre. A window of even size has one position more on the left. Sums are float32 (float64 if an argument is
    float64) whatever the dtype; matrix products take operands in the dtype of q. Differentiable in every floating
    argument through both results, in reverse mode; `implementation="reference"` also in forward mode.

    Args:
      q: [b, *space, h, k] queries; space has 1 to 3 axes.
      k: [b, *space, g, k] keys; h % g == 0, and query head i reads head i // (h / g).
      v: [b, *space, g, v] values.
      window: positions in the window w, an integer or one for each axis.
      stride: queries that share a window, 1 <= s <= w; s = w is attention in blocks.
      dilation: d, the distance between the positions of a window.
      is_causal: whether a query sees no later position, for each axis.
      scale: of the scores; k ** -0.5 unless given.
      rel_pos_bias: [h, 2 * w1 - 1, ...], added to the scores at [head, u1 - p1 + w1 - 1, ...]. For odd windows with
        stride 1 and no causal axis.
      extra_k, extra_v: [b, e, g, k] and [b, e, g, v], keys and values that every query sees too, in the same softmax.
      key_mask: [b, *space], False for keys that nobody sees. Their k and v may hold anything.
      return_lse: whether to return the log-sum-exp of the scores as well.
      pad_small: allows axes shorter than window * dilation: a query then sees the keys of its dilation group that
        there are (those up to itself on a causal axis), as if masked positions followed the axis.
      implementation: "reference", "xla" (the platform's form) or the name of a form or kernel.

    Returns:
      [b, *space, h, v] in the dtype of q; with `return_lse` also the natural logarithm of the sum of the exponentials
      of each query's scores, [b, *space, h] in float32. A query that sees no key has result 0 and -inf, and adds
      nothing to any gradient.

    Raises:
      ValueError: shapes do not fit; an axis is empty, or shorter than window * dilation without `pad_small`; a stride
        exceeds its window; a bias is given with a window, stride or causal axis that it is not defined for.
      TypeError: an argument has another kind of dtype.
      portable.Unavailable: the named implementation cannot take these arguments.

    Source: Hassani et al. 2025, "Generalized Neighborhood Attention" (arXiv 2504.16922), section 3; dilation: Hassani
    and Shi 2022 (arXiv 2209.15001), section 3.2; the bias: Hassani et al. 2022 (arXiv 2204.07143), equation 2.

    >>> import jax.numpy as jnp, portable
    >>> x = jnp.ones([1, 8, 9, 2, 16])
    >>> portable.ops.neighborhood_attention(x, x, x, window=(3, 5), dilation=(2, 1)).shape
    (1, 8, 9, 2, 16)
    """
    arrays, options = prepare(
        q,
        k,
        v,
        window=window,
        stride=stride,
        dilation=dilation,
        is_causal=is_causal,
        scale=scale,
        rel_pos_bias=rel_pos_bias,
        extra_k=extra_k,
        extra_v=extra_v,
        key_mask=key_mask,
        pad_small=pad_small,
    )
    out, lse = selection.call(OP, implementation, arrays, options)
    out = out.astype(q.dtype)
    return (out, lse) if return_lse else out


def prepare(
    q,
    k,
    v,
    *,
    window,
    stride: Any = 1,
    dilation: Any = 1,
    is_causal: Any = False,
    scale=None,
    rel_pos_bias=None,
    extra_k=None,
    extra_v=None,
    key_mask=None,
    return_lse=False,
    pad_small=False,
):
    """Checks the arguments; returns the core's arrays and its options.

    The arrays: q, k, v, rel_pos_bias, extra_k, extra_v, key_mask; masked keys and values are zeros.
    """
    check_array(OP, q=q, k=k, v=v, rel_pos_bias=rel_pos_bias, extra_k=extra_k, extra_v=extra_v, key_mask=key_mask)
    rank = q.ndim - 3
    if rank not in (1, 2, 3):
        raise ValueError(f"{OP}: q must be [b, *space, h, k] with 1 to 3 axes of space; got shape {list(q.shape)}.")
    space, sizes = q.shape[1:-2], {}
    axes = " ".join(_AXES[:rank])
    check_shape(OP, "q", q, f"b {axes} h k", sizes)
    check_shape(OP, "k", k, f"b {axes} g k", sizes)
    check_shape(OP, "v", v, f"b {axes} g v", sizes)
    h, g = sizes["h"], sizes["g"]
    if g == 0 or h % g:
        raise ValueError(f"{OP}: k and v must be [b, *space, g, ...] with h % g == 0; got h={h}, g={g}.")
    options: dict[str, Any] = pattern(OP, space, window, stride, dilation, is_causal, pad_small)
    if (extra_k is None) != (extra_v is None):
        raise ValueError(f"{OP}: extra_k and extra_v belong together; got only one of them. Give both or neither.")
    check_shape(OP, "extra_k", extra_k, "b e g k", sizes)
    check_shape(OP, "extra_v", extra_v, "b e g v", sizes)
    check_shape(OP, "key_mask", key_mask, f"b {axes}", sizes)
    if key_mask is not None and key_mask.dtype != jnp.bool_:
        raise TypeError(f"{OP}: key_mask must be boolean; got {key_mask.dtype}. True marks keys that are seen.")
    check_float(OP, q=q, k=k, v=v, rel_pos_bias=rel_pos_bias, extra_k=extra_k, extra_v=extra_v)
    if rel_pos_bias is not None:
        _check_bias(rel_pos_bias, h, **options)
    if scale is not None and not isinstance(scale, numbers.Real):
        raise TypeError(f"{OP}: scale must be a number; got {type(scale).__name__}. Multiply q by an array instead.")
    options["scale"] = float(sizes["k"] ** -0.5 if scale is None and sizes["k"] else scale or 0)
    wide = accumulator(q, k, v, rel_pos_bias, extra_k, extra_v)
    dtype = wide if wide == jnp.float64 else q.dtype  # one argument in float64 takes all there
    q, k, v = (x.astype(dtype) for x in (q, k, v))
    extra_k, extra_v = (None if x is None else x.astype(dtype) for x in (extra_k, extra_v))
    if rel_pos_bias is not None:
        rel_pos_bias = rel_pos_bias.astype(wide)
    if key_mask is not None:  # what masked positions hold must not get into a product: 0 * nan is nan
        seen = key_mask[..., None, None]
        k, v = jnp.where(seen, k, 0), jnp.where(seen, v, 0)
    return vary_together(q, k, v, rel_pos_bias, extra_k, extra_v, key_mask), options


def pattern(op: str, space, window, stride, dilation, is_causal, pad_small: bool) -> dict[str, tuple]:
    """Checks what a query sees; returns window, stride, dilation and is_causal as tuples, one entry an axis."""
    rank = len(space)
    found = {"window": window, "stride": stride, "dilation": dilation, "is_causal": is_causal}
    for name, value in found.items():
        values = tuple(value) if isinstance(value, Sequence) else (value,) * rank
        what = "a bool" if name == "is_causal" else "an integer"
        if len(values) != rank:
            raise ValueError(
                f"{op}: {name} must be {what} or {rank} of them, one for each axis of space; got {list(values)}."
            )
        try:
            found[name] = tuple(bool(x) if name == "is_causal" else operator.index(x) for x in values)
        except TypeError:
            raise TypeError(f"{op}: {name} must be {what} or one for each axis of space; got {value!r}.") from None
    for i, (length, w, s, d) in enumerate(zip(space, found["window"], found["stride"], found["dilation"], strict=True)):
        if length < 1:
            raise ValueError(f"{op}: every axis of space must have at least 1 position; got space {list(space)}.")
        if w < 1 or d < 1:
            raise ValueError(f"{op}: window and dilation must be at least 1; got {w} and {d} on axis {i}.")
        if not 1 <= s <= w:
            raise ValueError(f"{op}: stride must be from 1 to the window, {w} on axis {i}; got {s}.")
        if w * d > length and not pad_small:
            raise ValueError(
                f"{op}: window * dilation must fit into the axis; got {w} * {d} on axis {i} of {length} positions. "
                f"Give less, or pad_small=True to let windows hold what there is."
            )
    return found


def _check_bias(bias, h: int, *, window, stride, dilation, is_causal) -> None:
    if any(w % 2 == 0 for w in window) or any(s > 1 for s in stride) or any(is_causal):
        raise ValueError(
            f"{OP}: rel_pos_bias is defined for odd windows with stride 1 and no causal axis; got window "
            f"{list(window)}, stride {list(stride)}, is_causal {list(is_causal)}."
        )
    wanted = (h, *(2 * w - 1 for w in window))
    if bias.shape != wanted:
        raise ValueError(
            f"{OP}: rel_pos_bias must be [h, 2 * window - 1 for each axis], {list(wanted)}; got {list(bias.shape)}."
        )
