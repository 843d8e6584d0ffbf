"""`moe_ffn` by Triton kernels: products with gate and up and the activation in one, the product with down in another.

Rows are read from x by their token, and written in the plan's order: nothing is padded but in the programs.
"""

import functools

import jax
import jax.numpy as jnp

from portable.checks import Unavailable
from portable.ops._moe_ffn import compose
from portable.ops._moe_ffn.arguments import Arguments
from portable.pallas_kernels.gpu import _grouped, _launch
from portable.selection import Impl


def refuses(*arrays, activation, capacity) -> str | None:
    """Says in a sentence why the kernels cannot take arguments of these shapes and dtypes; None when they can."""
    del activation, capacity
    a = Arguments(*arrays)
    if isinstance(a.w_up, tuple):
        return (
            f"w_gate, w_up and w_down must be stacked arrays, [e, d, f] and [e, f, d]; got {len(a.w_up)} arrays each."
        )
    return _grouped.refuses(a.x.dtype, a.indices.size, a.w_up.shape)


def why_not(*arrays, **options) -> str | None:
    """Returns `refuses`, or which package is not installed."""
    return refuses(*arrays, **options) or _launch.missing("triton", "jax_triton")


def _run(keep: bool, activation: str, *arrays):
    a = Arguments(*arrays)
    plan = compose.make_plan(a)
    call = _grouped.Call(plan.group_sizes, a.indices.size, a.x.dtype)
    h, kept = call.hidden(a.x, plan.token, a.w_gate, a.w_up, a.b_gate, a.b_up, activation, keep=keep)
    return compose.finish(a, plan, call.product(h, a.w_down, a.b_down)), kept


def fwd(*arrays, activation, capacity):
    """See `portable.ops._moe_ffn.reference.fwd`."""
    del capacity
    return _launch.mapped_in_turn(functools.partial(_run, False, activation))(*arrays)[0]


def save(*arrays, activation, capacity):
    """Returns the result, and the products with w_gate (or None) and w_up in the plan's order."""
    del capacity
    return _launch.mapped_in_turn(functools.partial(_run, True, activation))(*arrays)


def _matmul(x, w, group_sizes, transposed):
    return _grouped.Call(group_sizes, x.shape[0], x.dtype).product(x, w, transposed=transposed)


def _outer(x, dy, group_sizes, dtype, i):
    del i
    return _grouped.outer(x, dy, group_sizes, dtype)


def bwd(residuals, cotangents, **options):
    """See `compose.bwd`."""
    walk = functools.partial(compose.bwd, compose.Engine(_matmul, _outer), **options)
    return _launch.mapped_in_turn(walk)(*jax.tree.map(jnp.asarray, (residuals, cotangents)))


def interpret(part, *args, **options):
    """Runs `fwd`, `save` or `bwd` by Triton's interpreter on the CPU; see `_launch.interpret`."""
    if reason := refuses(*(args[0][:-1] if part == "bwd" else args), **options):
        raise Unavailable(f"moe_ffn: 'triton' cannot take this call: {reason}")
    return _launch.interpret(__name__, part, args, options)


IMPL = Impl(fwd=fwd, save=save, bwd=bwd, why_not=why_not, interpret=interpret)
