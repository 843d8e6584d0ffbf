"""XLA's products and one pass over their sum.

The backward keeps x's product with the first factor, [*tokens, r], and, where there is a gain, the sum before it,
[*tokens, o]: automatic differentiation of the formula as PEFT writes it keeps two arrays of that size.
"""

import jax
import jax.numpy as jnp

from portable.ops._dora_linear.arguments import Arguments, Meeting, dropped, per_row, sum_rows
from portable.selection import Impl


def _scaled(y, given: Arguments):
    return y if given.w_scale is None else y * given.w_scale.astype(y.dtype)


def save(*arrays, **options):
    """Returns the result of `reference.fwd`, and (x a, the sum before the gain or None).

    The result is made of the sum as it is kept, rounded: what comes next then keeps no array beside it, for XLA makes
    the result again from the sum where a backward pass asks for it.
    """
    return _run(arrays, True, **options)


def _run(arrays, is_kept: bool, *, scale, rate, generator, whole, out_dtype):
    given = Arguments(*arrays)
    x, weight, factors = given.x, Meeting(given, True), Meeting(given, False)
    low = dropped(x, given, rate, generator)
    # Rounded by the product itself: of the same dtype as the one below, XLA:GPU would make one array of both.
    inner = factors.product(low, given.a, x.dtype)
    total = _scaled(weight.product(low if whole else x, given.w), given)
    total = total + scale * factors.product(inner, given.b)
    kept = None if given.gain is None else total.astype(x.dtype)
    total = total if kept is None or not is_kept else kept.astype(given.wide)
    y = total if given.gain is None else per_row(given.gain, given, 1) * total
    if whole:
        y = y + _scaled(weight.product(x - low, given.w), given)
    if given.bias is not None:
        y = y + per_row(given.bias.astype(given.wide), given)
    return (y.astype(out_dtype),), (inner, kept)


def fwd(*arrays, **options):
    """See `reference.fwd`."""
    return _run(arrays, False, **options)[0]


def bwd(residuals, cotangents, *, scale, rate, generator, whole, out_dtype):
    """Returns the cotangents of `Arguments`; the residuals are those and what `save` kept.

    Cotangents that nobody asks for, as of a frozen weight, XLA removes with the products they take.
    """
    del out_dtype
    *arrays, (inner, total) = residuals
    given, (dy,) = Arguments(*arrays), cotangents
    if given.key is not None:  # the mask is drawn again: the barrier keeps XLA from keeping the forward's
        given = given._replace(key=jax.lax.optimization_barrier(given.key))
    x, wide, weight, factors = given.x, given.wide, Meeting(given, True), Meeting(given, False)
    slope, dgain = dy.astype(wide), None
    dz = slope
    if given.gain is not None:
        dz = per_row(given.gain, given, 1) * slope
        dgain = sum_rows(slope * total.astype(wide), given.gain, given)
    dbias = None if given.bias is None else sum_rows(slope, given.bias, given).astype(given.bias.dtype)

    low = dropped(x, given, rate, generator)
    narrow = dz.astype(x.dtype)
    dinner = factors.back(narrow, given.b, x.dtype)  # without the scale, which meets sums in float32
    da = factors.outer(low, dinner, given.a, scale)
    db = factors.outer(inner, narrow, given.b, scale)
    dlow = scale * factors.back(dinner, given.a)
    through = _scaled(dz - slope if whole else dz, given).astype(x.dtype)
    dx = weight.back(through, given.w)
    if whole:
        plain = _scaled(slope, given).astype(x.dtype)
        dx = dropped(dx + dlow, given, rate, generator) + weight.back(plain, given.w)
    else:
        dx = dx + dropped(dlow, given, rate, generator)
    dw = dw_scale = None
    if jnp.issubdtype(given.w.dtype, jnp.floating):
        dw = weight.outer(low if whole else x, through, given.w)
        if whole:
            dw = dw + weight.outer(x, plain, given.w)
    if given.w_scale is not None:
        dw_scale = dz * weight.product(low if whole else x, given.w)
        if whole:
            dw_scale = dw_scale + slope * weight.product(x - low, given.w)
        dw_scale = sum_rows(dw_scale, given.w_scale, given).astype(given.w_scale.dtype)
    return dx.astype(x.dtype), dw, da, db, dgain, dbias, dw_scale, None, None, None


IMPL = Impl(fwd=fwd, bwd=bwd, save=save)
