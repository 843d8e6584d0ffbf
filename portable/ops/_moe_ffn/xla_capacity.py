"""All experts in one batched product, each with as many rows as the capacity: what a mesh shards most simply."""

import jax.numpy as jnp

from portable.ops._arguments import accumulator
from portable.ops._moe_ffn import compose
from portable.selection import Impl


def why_not(*arrays, activation, capacity) -> str | None:
    """Returns the sentence that says why this call cannot be taken."""
    del arrays, activation
    return None if capacity is not None else "it needs the most choices an expert takes; got capacity=None."


def _slots(group_sizes, capacity: int, rows: int):
    """Returns each expert's rows [e, c], and which of them are its own."""
    starts = jnp.cumsum(group_sizes) - group_sizes
    slots = starts[:, None] + jnp.arange(capacity)
    return jnp.minimum(slots, rows - 1), (jnp.arange(capacity) < group_sizes[:, None])[..., None]


def _engine(capacity: int, rows: int) -> compose.Engine:
    capacity = min(capacity, rows)

    def gathered(x, group_sizes):
        slots, own = _slots(group_sizes, capacity, rows)
        return jnp.where(own, x[slots], 0)

    def matmul(x, w, group_sizes, transposed):
        w = (jnp.stack(w) if isinstance(w, tuple) else w).astype(x.dtype)
        letters = "ecf,edf->ecd" if transposed else "ecd,edf->ecf"
        y = jnp.einsum(letters, gathered(x, group_sizes), w, preferred_element_type=accumulator(x))
        ends = jnp.cumsum(group_sizes)
        expert = jnp.minimum(jnp.searchsorted(ends, jnp.arange(rows), side="right"), ends.size - 1)
        within = jnp.arange(rows) - (ends - group_sizes)[expert]
        real = (jnp.arange(rows) < ends[-1])[:, None]
        return jnp.where(real, y[expert, jnp.minimum(within, capacity - 1)], 0).astype(x.dtype)

    def outer(x, dy, group_sizes, dtype, i):
        del i
        x, dy = gathered(x, group_sizes), gathered(dy, group_sizes)
        return jnp.einsum("ecd,ecf->edf", x, dy, preferred_element_type=accumulator(x)).astype(dtype)

    return compose.Engine(matmul, outer)


def save(*arrays, activation, capacity):
    """See `compose.save`."""
    engine = _engine(capacity, arrays[4].size)
    return compose.save(engine, *arrays, activation=activation, capacity=capacity)


def bwd(residuals, cotangents, *, activation, capacity):
    """See `compose.bwd`."""
    engine = _engine(capacity, residuals[4].size)
    return compose.bwd(engine, residuals, cotangents, activation=activation, capacity=capacity)


IMPL = Impl(fwd=lambda *arrays, **options: save(*arrays, **options)[0], save=save, bwd=bwd, why_not=why_not)
