"""What every implementation of `block_sparse_attention` is given, and how it is cut into blocks."""

import dataclasses
from typing import Any, NamedTuple

import jax.numpy as jnp

from portable.ops._arguments import accumulator


class Arrays(NamedTuple):
    """Arrays, None where absent."""

    q: Any  # [b, t, h, k]
    k: Any  # [b, s, g, k]
    v: Any  # [b, s, g, v]
    block_indices: Any  # [b, h_sel, nq, n] int32
    q_positions: Any  # [b, t] int32
    kv_positions: Any  # [b, s] int32
    q_segments: Any  # [b, t]
    kv_segments: Any  # [b, s]


class Saved(NamedTuple):
    """What a backward needs beside the arguments: the result, and of each query's scores [b, h, t] the highest and the
    sum of exponentials less it; -inf and 0 where it sees nothing. The log-sum-exp would do in place of both, were it
    not rounded: of scores in the thousands it keeps four digits.
    """

    out: Any
    highest: Any
    total: Any

    @property
    def results(self) -> tuple[Any, Any]:
        """The result and the log-sum-exp."""
        some = self.total != 0
        return self.out, jnp.where(some, self.highest + jnp.log(jnp.where(some, self.total, 1)), -jnp.inf)


@dataclasses.dataclass(frozen=True)
class Blocks:
    """Sizes of a call. A lane is what a list of blocks and a head of keys have in common: b * m of them.

    Letters: m lanes of a row of the batch, r heads of a lane, i queries of a block, j keys of a block.
    """

    b: int
    t: int
    s: int
    h: int
    g: int
    lists: int  # of a row of the batch
    n: int
    block_q: int
    block_k: int

    @classmethod
    def of(cls, a: Arrays, block_q: int, block_k: int) -> "Blocks":
        """Returns the sizes of the arrays."""
        (b, t, h, _), (s, g) = a.q.shape, a.k.shape[1:3]
        return cls(b, t, s, h, g, a.block_indices.shape[1], a.block_indices.shape[3], block_q, block_k)

    @property
    def m(self) -> int:
        """Lanes of a row of the batch."""
        return max(self.lists, self.g)

    @property
    def rows(self) -> int:
        """Queries that share a list and a head of keys: those of a block, of each head of a lane."""
        return self.h // self.m * self.block_q

    @property
    def nq(self) -> int:
        """Blocks of queries."""
        return -(-self.t // self.block_q)

    @property
    def nk(self) -> int:
        """Blocks of keys."""
        return -(-self.s // self.block_k)

    def queries(self, x, fill: float = 0):
        """[b, t, h, d] -> [b, m, nq, r * i, d]."""
        x = _filled(x, 1, self.nq * self.block_q, fill)
        x = x.reshape(self.b, self.nq, self.block_q, self.m, self.h // self.m, x.shape[-1])
        return x.transpose(0, 3, 1, 4, 2, 5).reshape(self.b, self.m, self.nq, self.rows, x.shape[-1])

    def tokens(self, x):
        """The inverse of `queries`."""
        x = x.reshape(self.b, self.m, self.nq, self.h // self.m, self.block_q, x.shape[-1]).transpose(0, 2, 4, 1, 3, 5)
        return x.reshape(self.b, self.nq * self.block_q, self.h, x.shape[-1])[:, : self.t]

    def numbers(self, x, fill: float = 0):
        """[b, h, t] -> [b, m, nq, r * i]."""
        return self.queries(jnp.swapaxes(x, 1, 2)[..., None], fill)[..., 0]

    def token_numbers(self, x):
        """The inverse of `numbers`."""
        return jnp.swapaxes(self.tokens(x[..., None])[..., 0], 1, 2)

    def keys(self, x):
        """[b, s, g, d] -> [b, g, nk, j, d]."""
        x = jnp.swapaxes(_filled(x, 1, self.nk * self.block_k), 1, 2)
        return x.reshape(self.b, self.g, self.nk, self.block_k, x.shape[-1])

    def key_tokens(self, x):
        """The inverse of `keys`."""
        return jnp.swapaxes(x.reshape(self.b, self.g, -1, x.shape[-1]), 1, 2)[:, : self.s]

    def by_query(self, x, fill: int = 0):
        """[b, t] -> [b, nq, i]."""
        return _filled(x, 1, self.nq * self.block_q, fill).reshape(self.b, self.nq, self.block_q)

    def by_key(self, x, fill: int = 0):
        """[b, s] -> [b, nk, j]."""
        return _filled(x, 1, self.nk * self.block_k, fill).reshape(self.b, self.nk, self.block_k)

    def lanes(self, x):
        """[b, lists, ...] -> [b * m, ...], a list for each lane."""
        x = jnp.repeat(x, self.m // self.lists, axis=1) if self.lists < self.m else x
        return x.reshape(self.b * self.m, *x.shape[2:])


def _filled(x, axis: int, size: int, fill: float = 0):
    widths = [(0, 0)] * x.ndim
    widths[axis] = (0, size - x.shape[axis])
    return jnp.pad(x, widths, constant_values=fill) if widths[axis][1] else x


def as_sets(indices, blocks: int):
    """Returns lists [..., n] with everything that adds nothing at -1: padding, repetitions, numbers out of range."""
    none = jnp.iinfo(jnp.int32).max
    indices = jnp.where((indices < 0) | (indices >= blocks), none, indices)
    if indices.shape[-1] <= 32:  # comparing all is quicker than sorting
        same = indices[..., :, None] == indices[..., None, :]
        before = jnp.tril(jnp.ones((indices.shape[-1],) * 2, bool), -1)
        twice = (same & before).any(-1)
    else:
        indices = jnp.sort(indices, axis=-1)
        twice = jnp.pad(indices[..., 1:] == indices[..., :-1], [(0, 0)] * (indices.ndim - 1) + [(1, 0)])
    return jnp.where(twice | (indices == none), -1, indices)


def for_backward(a: Arrays, saved: Saved, cotangents):
    """Returns (dout in the dtype of q, highest, inverse, mean), [b, h, t] the last three.

    Weights are exp(score - highest) * inverse, and the cotangents of scores weights * (dout . v - mean).
    """
    dout, dlse = cotangents
    wide = accumulator(a.q, a.k, a.v)
    sees = saved.total != 0
    mean = jnp.einsum("bthv,bthv->bht", dout.astype(wide), saved.out.astype(wide)) - dlse.astype(wide)
    # Every weight of a row that sees nothing is 0.
    mean, highest = jnp.where(sees, mean, 0), jnp.where(sees, saved.highest, 0)
    inverse = jnp.where(sees, 1 / jnp.where(sees, saved.total, 1), 0)
    return dout.astype(a.q.dtype), highest, inverse, mean
