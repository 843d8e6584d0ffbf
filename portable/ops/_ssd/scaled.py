"""The contract of `ssd`'s implementations, for those that want v = dt * x [b, t, h, p] ready made.

Every implementation takes (a, dt, x, k, q, state, boundaries): log decays and step sizes a, dt [b, t, h], inputs x
[b, t, h * p], k and q [b, t, g, n], the state at the start [b, h, p, n] or None, and the number of segments begun so
far [b, t] or None. It returns y [b, t, h * p] in the dtype of x, and the state at the end. All heads' channels share an
axis because a TPU pads or transposes arrays whose last axis is shorter than its tiles of 128.
"""

from collections.abc import Callable

import jax

from portable.ops._arguments import accumulator
from portable.selection import Impl


def heads(x, dt):
    """[b, t, h * p] -> [b, t, h, p], with the h of dt [b, t, h]."""
    return x.reshape(*dt.shape, x.shape[-1] // max(1, dt.shape[-1]))


def flat(x):
    """[b, t, h, p] -> [b, t, h * p]."""
    return x.reshape(*x.shape[:2], x.shape[2] * x.shape[3])


def _times(x, dt):
    wide = accumulator(x, dt)
    return (x.astype(wide) * dt.astype(wide)[..., None]).astype(x.dtype)


def _arrays(a, dt, x, k, q, state, boundaries):
    return a, k, _times(heads(x, dt), dt), q, state, boundaries


def backward(bwd: Callable, residuals, cotangents, **options):
    """Returns the cotangents of the contract's arguments from a `bwd` in terms of (a, k, v, q, state, boundaries)."""
    dt, x = residuals[1:3]
    dy, dfinal = cotangents
    da, dk, dv, dq, dstate, dboundaries = bwd(_arrays(*residuals), (heads(dy, dt), dfinal), **options)
    wide = accumulator(x, dt)
    ddt = (dv.astype(wide) * heads(x, dt).astype(wide)).sum(-1).astype(dt.dtype)
    return da, ddt, flat(_times(dv, dt)), dk, dq, dstate, dboundaries


def scaled(impl: Impl) -> Impl:
    """Makes an implementation of one whose arrays are (a, k, v, q, state, boundaries)."""

    def fwd(*args, **options):
        y, state = impl.fwd(*_arrays(*args), **options)
        return flat(y), state

    def bwd(residuals, cotangents, **options):
        assert impl.bwd is not None
        return backward(impl.bwd, residuals, cotangents, **options)

    def why_not(a, dt, x, k, q, state, boundaries, **options):
        v = jax.eval_shape(heads, x, dt)
        return impl.why_not(a, k, v, q, state, boundaries, **options)

    def interpret(part, *args, **options):
        run = impl.interpret
        assert run is not None
        if part == "fwd":
            y, state = run(part, *_arrays(*args), **options)
            return flat(y), state
        return backward(lambda *args, **options: run(part, *args, **options), *args, **options)

    return Impl(fwd=fwd, bwd=impl.bwd and bwd, why_not=why_not, interpret=impl.interpret and interpret)
