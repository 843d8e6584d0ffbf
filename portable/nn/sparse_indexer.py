"""DeepSeek's indexer: a small attention of its own that says which tokens the large one looks at."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from portable import ops
from portable.nn.cache import extend
from portable.nn.heads import KERNEL_INIT
from portable.nn.linear import linear
from portable.nn.padding import check_rows
from portable.nn.rotary import Rotary, rotary
from portable.ops._arguments import check_shape
from portable.ops._sparse_selection.common import whole


class IndexerState(NamedTuple):
    """What decoding carries.

    Attributes:
      k: [b, s, e]; position p of a row lies at p.
      positions: [b, s] int32, -1 where there is nothing.
      length: [b] int32, positions read so far.
      sums: [b, ceil(s / block_size), e] float32, of the keys of each block; no blocks without HISA.
    """

    k: Float[Array, "b s e"]
    positions: Int[Array, "b s"]
    length: Int[Array, " b"]
    sums: Float[Array, "b n e"]


class SparseIndexer(nnx.Module):
    """Scores every token before a position by a few small heads, and returns the best ones.

    The published layer turns queries and keys by a Hadamard matrix, to round them to 8 bits; as products do not change
    by it, and nothing is rounded here, it is left out.

    Attributes:
      query: Linear from d (or query_dim) to heads * head_dim. key: Linear from d to head_dim. key_norm: LayerNorm.
      weight: Linear from d to heads, what each head's scores count.
    """

    def __init__(
        self,
        d: int,
        *,
        num_heads: int = 64,
        head_dim: int = 128,
        top_k: int = 2048,
        block_size: int | None = None,
        blocks: int = 64,
        query_dim: int | None = None,
        rope: Rotary | None = Rotary(dims=64),
        kernel_init: nnx.Initializer = KERNEL_INIT,
        dtype=jnp.float32,
        param_dtype=jnp.float32,
        rngs: nnx.Rngs,
    ):
        """Args:
        d: width of the input.
        num_heads, head_dim: of the indexer.
        top_k: tokens of a query.
        block_size: keys of a block of HISA, which looks at the tokens of the `blocks` best blocks alone; None for DSA,
          which looks at all.
        blocks: of HISA.
        query_dim: width of what queries are made from, where it is not u (a latent of queries).
        rope: rotary positions; None for none.
        kernel_init: of the projections.
        dtype: of activations and matrix products; scores are float32.
        param_dtype: dtype of the Params.
        rngs: source of the initial Params.

        Raises:
          ValueError: a size is out of range.
          TypeError: a size is no integer.
        """
        name = type(self).__name__
        for size, x in (("num_heads", num_heads), ("head_dim", head_dim), ("top_k", top_k)):
            whole(name, size, x)
        if block_size is not None:
            whole(name, "block_size", block_size)
            whole(name, "blocks", blocks, 2)
        self.num_heads, self.head_dim, self.top_k, self.rope, self.dtype = num_heads, head_dim, top_k, rope, dtype
        self.block_size, self.blocks = block_size, blocks
        options = {"kernel_init": kernel_init, "dtype": dtype, "param_dtype": param_dtype, "rngs": rngs}
        self.query = linear(query_dim or d, num_heads * head_dim, ("embed", "heads"), use_bias=False, **options)
        self.key = linear(d, head_dim, ("embed", None), use_bias=False, **options)
        self.key_norm = nnx.LayerNorm(head_dim, dtype=dtype, param_dtype=param_dtype, rngs=rngs)
        self.weight = linear(d, num_heads, ("embed", "heads"), use_bias=False, **options)

    def __call__(
        self,
        u: Float[Array, "b t d"],
        *,
        queries: Float[Array, "b t q"] | None = None,
        state: IndexerState | None = None,
        lengths: Int[Array, " b"] | None = None,
        segment_ids: Int[Array, "b t"] | None = None,
    ) -> Any:
        """Chooses tokens for each position.

        Args:
          u: [b, t, d].
          queries: [b, t, query_dim], what queries are made from; u unless given.
          state: from `init_state` or an earlier call, to continue from.
          lengths: [b] real positions of right-padded rows.
          segment_ids: [b, t] integers of packed documents, each in one run: a position chooses in its own. Not together
            with a state or with HISA, whose blocks would reach over documents.

        Returns:
          [b, 1, t, n] int32 for `portable.ops.block_sparse_attention` with blocks of 1, -1 where fewer tokens are
          visible; with a state (indices, the state behind each row's last real position).

        Raises:
          ValueError: shapes do not fit, segment_ids cannot be, or a concrete state is too short for what is added.
        """
        if segment_ids is not None and (state is not None or self.block_size is not None):
            other = "a state" if state is not None else f"blocks of {self.block_size} keys"
            raise ValueError(
                f"SparseIndexer: segment_ids go without a state and without block_size; got {other} too. Give each "
                "document a call of its own."
            )
        if getattr(u, "ndim", None) != 3 or u.shape[-1] != self.key.in_features:
            found = list(u.shape) if hasattr(u, "shape") else type(u).__name__
            raise ValueError(f"SparseIndexer: u must be [b, t, d] with d={self.key.in_features}; got {found}.")
        check_rows("SparseIndexer", u, lengths, segment_ids)
        check_shape("SparseIndexer", "queries", queries, "b t q",
                    {"b": u.shape[0], "t": u.shape[1], "q": self.query.in_features})  # fmt: skip
        (b, t), count = u.shape[:2], jnp.arange(u.shape[1], dtype=jnp.int32)
        added = jnp.full((b,), t) if lengths is None else lengths
        before = jnp.zeros((b,), jnp.int32) if state is None else state.length
        positions, starts = before[:, None] + count, None
        if segment_ids is not None:
            begins = jnp.pad(segment_ids[:, 1:] != segment_ids[:, :-1], ((0, 0), (1, 0)))[:, :t]
            starts = jax.lax.cummax(jnp.where(begins, count, 0), axis=1)
        turned = positions if starts is None else positions - starts
        u = u.astype(self.dtype)
        source = u if queries is None else queries.astype(self.dtype)
        q = self.query(source).reshape(b, t, self.num_heads, self.head_dim)
        k = self.key_norm(self.key(u))
        if self.rope is not None:
            q = rotary(q, turned, self.rope, lengths=before + added)
            k = rotary(k[:, :, None], turned, self.rope, lengths=before + added)[:, :, 0]
        w = self.weight(u)
        if state is None:
            return self._choose(q, k, w, positions, None, starts)
        real = None if lengths is None else count < lengths[:, None]
        (held,), marked, length, _ = extend(
            "SparseIndexer", (state.k,), state.positions, state.length, (k,), positions,
            real=real, segment_ids=None, is_ring=False,
        )  # fmt: skip
        sums = state.sums
        if self.block_size is not None:
            new = k.astype(sums.dtype) if real is None else jnp.where(real[..., None], k.astype(sums.dtype), 0)
            sums = sums.at[jnp.arange(b)[:, None], positions // self.block_size].add(new, mode="drop")
        state = IndexerState(held, marked, length, sums)
        return self._choose(q, held, w, positions, sums), state

    def init_state(self, batch: int, length: int) -> IndexerState:
        """Returns the state before any position, for `batch` rows of at most `length` positions."""
        count = 0 if self.block_size is None else -(-length // self.block_size)
        wide = jnp.promote_types(self.dtype, jnp.float32)
        return IndexerState(
            jnp.zeros((batch, length, self.head_dim), self.dtype),
            jnp.full((batch, length), -1, jnp.int32),
            jnp.zeros((batch,), jnp.int32),
            jnp.zeros((batch, count, self.head_dim), wide),
        )

    def _choose(self, q, k, w, positions, sums, starts=None):
        options = {"top_k": self.top_k, "q_positions": positions}
        if self.block_size is None:
            return ops.select_dsa(q, k, w, starts=starts, **options)
        options |= {"block_k": self.block_size, "blocks": self.blocks}
        # A query's own block, the only one that is not full, is looked at whatever its mean.
        means = None if sums is None else sums / self.block_size
        return ops.select_hisa(q, k, w, means=means, **options)
