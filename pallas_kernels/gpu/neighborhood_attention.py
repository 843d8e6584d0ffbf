"""`neighborhood_attention` by Triton kernels: tiles of queries walk along the tiles of keys that their windows touch.

Runs by name: nothing here has been measured on a device.
"""

import dataclasses
import functools

import jax.numpy as jnp

from portable.checks import Unavailable
from portable.ops._neighborhood_attention import blocked, layout
from portable.pallas_kernels import block_lists
from portable.pallas_kernels.gpu import _block_attention, _launch

COSTS = {
    (2, False): layout.Costs(keys=(64, 64), queries=128, fetch=32, visit=512, mask=0.5),
    (2, True): layout.Costs(keys=(64, 64), queries=64, fetch=32, visit=512, mask=0.5),
    (4, False): layout.Costs(keys=(32, 32), queries=64, fetch=32, visit=512, mask=0.5),
    (4, True): layout.Costs(keys=(32, 32), queries=32, fetch=32, visit=512, mask=0.5),
}


def _cut(axes, q, k, v):
    return layout.choose(axes, 1, COSTS[_block_attention.kind(q, v)])


def _attend(q, k, v, tiles, scale):
    queries, keys, full = tiles.pairs
    ranges = block_lists.known(queries, keys, full, tiles.intervals.shape[1])
    return _block_attention.attend(q, k, v, tiles.intervals, tiles.places, ranges, scale=scale)


def _gradients(q, k, v, dout, highest, inverse, mean, tiles, scale):
    queries, keys, full = tiles.pairs
    given = q, k, v, dout, highest, inverse, mean, tiles.intervals, tiles.places
    ranges = block_lists.known(queries, keys, full, tiles.intervals.shape[1])
    dq = _block_attention.query_gradients(*given, ranges, scale=scale)
    ranges = block_lists.known(keys, queries, full, tiles.places.shape[1])
    return dq, *_block_attention.key_gradients(*given, ranges, scale=scale)


def refuses(q, k, v, *rest, scale, **pattern) -> str | None:
    """Says in a sentence why the kernels cannot take arguments of these shapes and dtypes; None when they can."""
    if reason := blocked.refuses(q, k, v, *rest, dtypes=(jnp.float32, jnp.bfloat16, jnp.float16)):
        return reason
    if max(q.shape[-1], v.shape[-1]) > 128:
        return f"it takes widths up to 128; got q {list(q.shape)}, v {list(v.shape)}."
    return None


def why_not(*arrays, **options) -> str | None:
    """Returns `refuses`, or which package is not installed."""
    return refuses(*arrays, **options) or _launch.missing("triton", "jax_triton")


def interpret(part, *args, **options):
    """Runs `fwd` or `bwd` ("fwd", "bwd") by Triton's interpreter on the CPU; see `_launch.interpret`.

    Raises:
      Unavailable: the kernels cannot take the arguments, or triton or torch is not installed.
    """
    if reason := refuses(*(args if part == "fwd" else args[0]), **options):
        raise Unavailable(f"neighborhood_attention: 'triton' cannot take this call: {reason}")
    return _launch.interpret(__name__, part, args, options)


def _mapped(part):
    def run(*args, **options):
        return _launch.batchable(functools.partial(part, **options))(*args)

    return run


_FORM = blocked.form(blocked.Core(_attend, _gradients, _cut), why_not, interpret)
IMPL = dataclasses.replace(_FORM, fwd=_mapped(_FORM.fwd), bwd=_mapped(_FORM.bwd))
