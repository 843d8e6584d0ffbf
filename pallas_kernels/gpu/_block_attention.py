"""Attention over selected blocks on a GPU: what the kernels of neighborhood and block-sparse attention share.

A program takes a block of queries (or of keys, for their gradients) of one head and walks along its list, which may be
made at run time; see `_block_attention_kernels`. Letters: N batch rows, H heads of queries, G of keys, T blocks of R
queries, S blocks of C keys, A axes on which a key has a place and a query an interval of places.
"""

import jax.numpy as jnp
from jax import ShapeDtypeStruct

from portable.pallas_kernels.block_lists import Ranges
from portable.pallas_kernels.gpu import _launch
from portable.pallas_kernels.gpu._launch import Config

WIDE = 64  # heads of more take the wide configurations
# By the bytes of an operand and whether it is wide. Float32 products do not run on tensor cores and hold their operands
# in registers.
CONFIGS = {
    (2, False): {
        "attend": Config(0, 0, warps=4, stages=2),
        "query_gradients": Config(0, 0, warps=8, stages=1),
        "key_gradients": Config(0, 0, warps=8, stages=1),
    },
    (2, True): {
        "attend": Config(0, 0, warps=4, stages=2),
        "query_gradients": Config(0, 0, warps=8, stages=1),
        "key_gradients": Config(0, 0, warps=8, stages=1),
    },
    (4, False): {
        "attend": Config(0, 0, warps=8, stages=1),
        "query_gradients": Config(0, 0, warps=8, stages=1),
        "key_gradients": Config(0, 0, warps=4, stages=1),
    },
    (4, True): {
        "attend": Config(0, 0, warps=8, stages=1),
        "query_gradients": Config(0, 0, warps=8, stages=1),
        "key_gradients": Config(0, 0, warps=8, stages=1),
    },
}


def kind(q, v) -> tuple[int, bool]:
    """Returns which configurations suit arrays [..., k] and [..., v]."""
    return q.dtype.itemsize, max(q.shape[-1], v.shape[-1]) > WIDE


def attend(q, k, v, intervals, places, ranges: Ranges, *, scale: float):
    """Softmax attention of blocks of queries to the blocks of keys that their lists name.

    Args:
      q: [N, T * R, H, k]. k: [N, S * C, G, k]. v: [N, S * C, G, v]; H % G == 0, R and C powers of two.
      intervals: [N or fewer, T, 2 * A, R] int32, first places and ends; row i takes number i % their number.
      places: [N or fewer, S, A, C] int32, likewise.
      ranges: the queries' lists, [N or 1, a divisor of H, ...].
      scale: of the scores.

    Returns:
      [N, T * R, H, v] in the dtype of q; and in float32 [N, T * R, H] the highest score of each query, and the sum of
      the exponentials of its scores less that one. For queries that see nothing they are 0, -inf and 0.
    """
    n, tokens, h, _ = q.shape
    out, sums = ShapeDtypeStruct((n, tokens, h, v.shape[-1]), q.dtype), ShapeDtypeStruct((n, tokens, h), jnp.float32)
    return _run("attend", ranges, intervals, places, (q, k, v), (out, sums, sums), intervals.shape[1], scale)


def query_gradients(q, k, v, dout, highest, inverse, mean, intervals, places, ranges: Ranges, *, scale: float):
    """Returns the cotangent of q.

    Args:
      q, k, v, intervals, places, ranges, scale: of `attend`.
      dout: [N, T * R, H, v], the cotangent of its result.
      highest, inverse: [N, T * R, H] float32, such that weights are exp(score - highest) * inverse. The log-sum-exp
        would do in place of both, were it not rounded: of scores in the thousands it keeps four digits.
      mean: [N, T * R, H] float32, the sum of result * dout, less the cotangent of the log-sum-exp.
    """
    given, out = (q, k, v, dout, highest, inverse, mean), ShapeDtypeStruct(q.shape, q.dtype)
    return _run("query_gradients", ranges, intervals, places, given, (out,), intervals.shape[1], scale)[0]


def key_gradients(q, k, v, dout, highest, inverse, mean, intervals, places, ranges: Ranges, *, scale: float):
    """Returns the cotangents of k and v; `ranges` are the keys' lists, the rest as `query_gradients`."""
    h, share = q.shape[2], q.shape[2] // k.shape[2]  # what heads that share keys give is added up outside
    outs = [ShapeDtypeStruct((*x.shape[:2], h, x.shape[3]), x.dtype if share == 1 else jnp.float32) for x in (k, v)]
    given = q, k, v, dout, highest, inverse, mean
    found = _run("key_gradients", ranges, intervals, places, given, outs, places.shape[1], scale)
    if share == 1:
        return found
    return tuple(
        x.reshape(*x.shape[:2], -1, share, x.shape[3]).sum(3).astype(y.dtype)
        for x, y in zip(found, (k, v), strict=True)
    )


def _run(name: str, ranges: Ranges, intervals, places, arrays, outputs, blocks: int, scale: float):
    from portable.pallas_kernels.gpu import _block_attention_kernels

    q, k, v = arrays[:3]
    n, _, h, width = q.shape
    _, queries, twice, rows = intervals.shape
    lists = [jnp.asarray(x) for x in ranges]
    power = lambda size: max(16, 1 << (size - 1).bit_length())  # noqa: E731
    constants = {
        "SCALE": scale, "LN": lists[0].shape[0], "LH": lists[0].shape[1], "I": lists[3].shape[2],
        "IN": intervals.shape[0], "PN": places.shape[0], "H": h, "G": k.shape[2], "T": queries, "S": places.shape[1],
        "A": twice // 2, "R": rows, "C": places.shape[-1], "K": width, "V": v.shape[-1], "D": power(width),
        "E": power(v.shape[-1]),
    }  # fmt: skip
    kernel = getattr(_block_attention_kernels, name)
    given = (*lists, intervals, places, *arrays)
    config = CONFIGS[kind(q, v)][name]
    return _launch.call(kernel, given, outputs, (n * h * blocks,), config=config, **constants)
