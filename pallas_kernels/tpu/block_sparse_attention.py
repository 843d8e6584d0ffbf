"""`block_sparse_attention` on a TPU: blocks of queries walk along the blocks of keys that their lists name.

The lists are made from the indices while the program runs, and lie in a TPU's scalar memory. Runs by name: nothing here
has been measured on a device.
"""

import jax.numpy as jnp
from jax.experimental.pallas import tpu as pltpu

from portable.ops._block_sparse_attention import blocked
from portable.ops._block_sparse_attention.arguments import Arrays, Blocks
from portable.pallas_kernels import block_lists
from portable.pallas_kernels.tpu import _block_attention
from portable.selection import Impl

SCORES = 1 << 18  # that a step holds
FAN = 4
SCALARS = 65_536  # numbers of blocks: the lists lie in a TPU's scalar memory, of 1 MiB


def _sizes(rows: int, columns: int, dtype) -> tuple[int, int]:
    least = 32 // jnp.dtype(dtype).itemsize  # rows of a register
    return -(-rows // least) * least, -(-columns // least) * least


def _fan(rows: int, columns: int, n: int) -> int:
    return max(1, min(FAN, n, SCORES // (rows * columns)))


def _by_queries(q, k, see: blocked.See) -> block_lists.Steps:
    nq, n = see.sets.shape[2:]
    fan = _fan(q.shape[3], k.shape[3], n)
    return block_lists.steps(block_lists.selected(see.sets), fan, nq * -(-n // fan))


def _attend(q, k, v, see: blocked.See, scale: float):
    return _block_attention.attend(q, k, v, see.intervals, see.places, _by_queries(q, k, see), scale=scale)


def _gradients(q, k, v, dout, highest, inverse, mean, see: blocked.See, scale: float):
    given = q, k, v, dout, highest, inverse, mean, see.intervals, see.places
    dq = _block_attention.query_gradients(*given, _by_queries(q, k, see), scale=scale)
    (nq, n), nk = see.sets.shape[2:], k.shape[2]
    fan = _fan(q.shape[3], k.shape[3], nq)
    steps = block_lists.steps(block_lists.selected(see.sets, by_keys=nk), fan, nk + nq * n // fan)
    return dq, *_block_attention.key_gradients(*given, steps, scale=scale)


def why_not(*arrays, block_q: int, block_k: int, **options) -> str | None:
    """Says in a sentence why the kernel cannot take a call."""
    limits = (jnp.float32, jnp.bfloat16)
    if reason := blocked.refuses(*arrays, block_q=block_q, block_k=block_k, dtypes=limits, **options):
        return reason
    a = Arrays(*arrays)
    s = Blocks.of(a, block_q, block_k)
    if block_k < 8:
        return f"it needs blocks of at least 8 keys; got block_k={block_k}."
    if s.rows < 8:
        return f"it needs at least 8 queries that share a list, the rows of a register; got {s.rows}."
    if a.block_indices.size > SCALARS:
        return (
            f"the lists must fit into a TPU's scalar memory, {SCALARS} numbers; got block_indices "
            f"{list(a.block_indices.shape)}."
        )
    if s.rows * block_k > 4 * SCORES:
        return f"a block of queries and one of keys have at most {4 * SCORES} pairs; got {s.rows} and {block_k}."
    return None


def interpret(part: str, *args, **options) -> tuple:
    """Runs `fwd`, `save` or `bwd` in Pallas' interpreter of a TPU; memory that nothing wrote is NaN."""
    with pltpu.force_tpu_interpret_mode(pltpu.InterpretParams(uninitialized_memory="nan")):
        return getattr(IMPL, part)(*args, **options)


IMPL: Impl = blocked.form(blocked.Core(_attend, _gradients, _sizes), why_not, interpret)
