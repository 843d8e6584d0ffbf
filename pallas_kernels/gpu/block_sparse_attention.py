"""`block_sparse_attention` by Triton kernels: blocks of queries walk along the blocks of keys that their lists name.

Runs by name: nothing here has been measured on a device.
"""

import dataclasses
import functools

import jax.numpy as jnp

from portable.checks import Unavailable
from portable.ops._block_sparse_attention import blocked
from portable.ops._block_sparse_attention.arguments import Arrays, Blocks
from portable.pallas_kernels import block_lists
from portable.pallas_kernels.gpu import _block_attention, _launch

# Queries and keys of a block at most, by the bytes of an operand: what registers and shared memory hold.
MOST = {2: (128, 128), 4: (64, 64)}
LEAST = 16  # a tensor core's tile


def _sizes(rows: int, columns: int, dtype) -> tuple[int, int]:
    power = lambda size: max(LEAST, 1 << (size - 1).bit_length())  # noqa: E731
    return power(rows), power(columns)


def _flat(x):
    """[N, H, T, R, d] -> [N, T * R, H, d]."""
    n, h, t, r, d = x.shape
    return x.transpose(0, 2, 3, 1, 4).reshape(n, t * r, h, d)


def _blocks(x, count: int):
    """The inverse of `_flat` for so many blocks."""
    n, _, h, d = x.shape
    return x.reshape(n, count, -1, h, d).transpose(0, 3, 1, 2, 4)


def _attend(q, k, v, see: blocked.See, scale: float):
    ranges = block_lists.selected(see.sets)
    found = _block_attention.attend(_flat(q), _flat(k), _flat(v), see.intervals, see.places, ranges, scale=scale)
    out, *sums = (_blocks(x.reshape(*x.shape[:3], -1), q.shape[2]) for x in found)
    return out, *(x[..., 0] for x in sums)


def _gradients(q, k, v, dout, highest, inverse, mean, see: blocked.See, scale: float):
    numbers = (_flat(x[..., None])[..., 0] for x in (highest, inverse, mean))
    given = *map(_flat, (q, k, v, dout)), *numbers, see.intervals, see.places
    dq = _block_attention.query_gradients(*given, ranges=block_lists.selected(see.sets), scale=scale)
    ranges = block_lists.selected(see.sets, by_keys=k.shape[2])
    dk, dv = _block_attention.key_gradients(*given, ranges=ranges, scale=scale)
    return tuple(_blocks(x, like.shape[2]) for x, like in ((dq, q), (dk, k), (dv, v)))


def refuses(*arrays, block_q: int, block_k: int, **options) -> str | None:
    """Says in a sentence why the kernels cannot take arguments of these shapes and dtypes; None when they can."""
    limits = (jnp.float32, jnp.bfloat16, jnp.float16)
    if reason := blocked.refuses(*arrays, block_q=block_q, block_k=block_k, dtypes=limits, **options):
        return reason
    a = Arrays(*arrays)
    rows, columns = _sizes(Blocks.of(a, block_q, block_k).rows, block_k, a.q.dtype)
    if max(a.q.shape[-1], a.v.shape[-1]) > 128:
        return f"it takes widths up to 128; got q {list(a.q.shape)}, v {list(a.v.shape)}."
    most = MOST[a.q.dtype.itemsize]
    if rows > most[0] or columns > most[1]:
        return (
            f"it takes up to {most[0]} queries that share a list and {most[1]} keys a block in {a.q.dtype}; got "
            f"{rows} and {columns}."
        )
    return None


def why_not(*arrays, **options) -> str | None:
    """Returns `refuses`, or which package is not installed."""
    return refuses(*arrays, **options) or _launch.missing("triton", "jax_triton")


def interpret(part, *args, **options):
    """Runs `fwd`, `save` or `bwd` by Triton's interpreter on the CPU; see `_launch.interpret`.

    Raises:
      Unavailable: the kernels cannot take the arguments, or triton or torch is not installed.
    """
    if reason := refuses(*(args[0][:-1] if part == "bwd" else args), **options):
        raise Unavailable(f"block_sparse_attention: 'triton' cannot take this call: {reason}")
    return _launch.interpret(__name__, part, args, options)


def _mapped(part):
    def run(*args, **options):
        return _launch.batchable(functools.partial(part, **options))(*args)

    return run


_FORM = blocked.form(blocked.Core(_attend, _gradients, _sizes), why_not, interpret)
IMPL = dataclasses.replace(_FORM, fwd=_mapped(_FORM.fwd), save=_mapped(_FORM.save), bwd=_mapped(_FORM.bwd))
