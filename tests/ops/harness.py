"""Runs any op over its named cases: what parity, and later benchmarks and kernels, share."""

import importlib

import jax
import jax.numpy as jnp
import numpy as np

import portable
from portable import selection


def cases(op: str) -> dict:
    """Returns the named argument sets of an op."""
    return importlib.import_module(f"portable.ops._{op}.cases").CASES


def is_float(x) -> bool:
    """Whether x is an array that can be differentiated."""
    return hasattr(x, "dtype") and jnp.issubdtype(x.dtype, jnp.floating)


def value_and_gradients(op: str, args, kwargs, implementation: str | None):
    """Returns (outputs, cotangents of every floating argument) of an op, compiled as one program.

    The cotangents of the outputs are fixed random numbers, so every output counts, states included.
    """
    leaves, tree = jax.tree.flatten((args, {k: v for k, v in kwargs.items() if hasattr(v, "dtype")}))
    static = {k: v for k, v in kwargs.items() if not hasattr(v, "dtype")}
    floats = [i for i, x in enumerate(leaves) if is_float(x)]

    @jax.jit
    def both(leaves):
        def call(*changed):
            full = list(leaves)
            for i, x in zip(floats, changed, strict=True):
                full[i] = x
            a, k = tree.unflatten(full)
            return jax.tree.leaves(getattr(portable.ops, op)(*a, **k, **static, implementation=implementation))

        out, pull = jax.vjp(call, *(leaves[i] for i in floats))
        keys = jax.random.split(jax.random.key(7), len(out))
        dout = [jax.random.normal(k, o.shape, jnp.float32).astype(o.dtype) for k, o in zip(keys, out, strict=True)]
        return out, pull(dout)

    return both(leaves)


def in_float64(op: str, args, kwargs):
    """Returns `value_and_gradients` of the reference on the same arguments in float64."""
    with jax.enable_x64(True):
        args, kwargs = jax.tree.map(lambda x: x.astype(jnp.float64) if is_float(x) else x, (args, kwargs))
        return value_and_gradients(op, args, kwargs, "reference")


def relative(got, want) -> float:
    """Returns max|got - want| / max|want| of two arrays; 0 for empty ones."""
    got, want = np.asarray(got, np.float64), np.asarray(want, np.float64)
    assert got.shape == want.shape, (got.shape, want.shape)
    if not want.size:
        return 0.0
    return float(np.abs(got - want).max() / max(np.abs(want).max(), np.finfo(np.float32).tiny))


def implementations(op: str, args=None, kwargs=None) -> list[str]:
    """Returns the implementations that this process can run, on these arguments if given: no kernels."""
    found = {n: impl for n, impl in selection.implementations(op).items() if n not in selection.KERNEL_HOMES}
    if args is None:
        return list(found)
    arrays, options = importlib.import_module(f"portable.ops._{op}.api").prepare(*args, **kwargs)
    return [n for n, impl in found.items() if impl.why_not(*arrays, **options) is None]
