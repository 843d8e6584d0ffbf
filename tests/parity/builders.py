"""Programs that a child process of `portable.parity` is asked to build, the ill-behaved ones among them."""

import os
import time

import jax
import jax.numpy as jnp

from portable.checks import Unavailable
from portable.parity import Program


def product(n: int = 64) -> Program:
    return Program(lambda a, b: jnp.tanh(a @ b), (_floats(n, 2 * n), _floats(2 * n, n)))


def loop(n: int = 64) -> Program:
    """Adds 1 in place many times; the carry is the donated argument."""
    return Program(lambda a: jax.lax.fori_loop(0, 100, lambda _, x: x + 1, a), (_floats(n, n),), donate=(0,))


def large(rows: int) -> Program:
    """Sorts the rows of a rows x rows product: product and result are both held."""
    return Program(lambda a: jnp.sort(a @ a.T, axis=-1), (_floats(rows, 128),))


def chatter() -> Program:
    print('{"job": "not an answer"}', flush=True)
    os.write(1, b"nor is this\n")
    return product()


def kernel_too_small() -> Program:
    raise Unavailable("scores of this op need at least two rows.")


def wrong_shapes() -> Program:
    return Program(lambda a, b: a @ b, (_floats(3, 4), _floats(5, 6)))


def no_arrays() -> Program:
    return Program(lambda: jnp.ones(3), ())


def odd() -> Program:
    raise KeyError("a mistake that nobody foresaw")


def abort() -> Program:
    os.abort()


def leave() -> Program:
    os._exit(3)


def hang() -> Program:
    time.sleep(600)
    return product()


def _floats(*shape: int) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(shape, jnp.float32)
