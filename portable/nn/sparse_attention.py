"""Attention to selected blocks: MoBA, NSA and InfLLM-V2 around one cache that keeps sums of its blocks."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float, Int

from portable import ops
from portable.nn.attention import Attention
from portable.nn.cache import extend
from portable.nn.heads import KERNEL_INIT
from portable.nn.linear import linear
from portable.nn.padding import right_padded


class SparseState(NamedTuple):
    """What decoding carries.

    Attributes:
      k, v: [b, s, g, e]; position p of a row lies at p.
      positions: [b, s] int32, -1 where there is nothing.
      length: [b] int32, positions read so far.
      sums: float32 sums of as many keys as the layer's `summary` says, [b, ceil(s / summary), g, e]; in NSA also of
        values, on the last axis.
    """

    k: Float[Array, "b s g e"]
    v: Float[Array, "b s g e"]
    positions: Int[Array, "b s"]
    length: Int[Array, " b"]
    sums: Float[Array, "b n g c"]


class SparseAttention(Attention):
    """What the layers share; their Params are those of `Attention`, under the same names.

    Attributes:
      is_sparse: false attends to all keys, with the same weights; may be set at any time.
      summary: keys of a sum that the state keeps.
    """

    summary: int
    _refused = ("is_causal", "window", "soft_cap", "sinks")

    def __init__(self, d: int, *, rngs: nnx.Rngs, **options: Any):
        name = type(self).__name__
        if given := [option for option in self._refused if option in options]:
            raise ValueError(f"{name}: {given[0]} is not an option of attention to selected blocks; leave it out.")
        super().__init__(d, rngs=rngs, **options)
        self.is_sparse = True

    def __call__(
        self,
        u: Float[Array, "b t d"],
        *,
        state: SparseState | None = None,
        lengths: Int[Array, " b"] | None = None,
        mask: Bool[Array, "b t"] | None = None,
        return_state: bool = False,
    ) -> Any:
        """Attends over a sequence, each position to itself and to what it selects of those before.

        Args:
          u: [b, t, d].
          state: from `init_state` or an earlier call, to continue from.
          lengths: [b] real positions of right-padded rows.
          mask: [b, t] true at the real positions of rows padded on any side; not together with `lengths`.
          return_state: whether the state behind each row's last real position is returned too; needs `state`.

        Returns:
          y [b, t, d] in the layer's dtype (at padded positions without meaning), or (y, state).

        Raises:
          ValueError: shapes do not fit, both lengths and mask are given, or a concrete state is too short for what is
            added.
        """
        name = type(self).__name__
        self._check(u, 3)
        u, lengths, _, inverse = right_padded(name, u, lengths, mask, None)
        if state is None and return_state:
            raise ValueError(f"{name}: return_state needs a state to write to; give state=layer.init_state(b, length).")
        (b, t), count = u.shape[:2], jnp.arange(u.shape[1], dtype=jnp.int32)
        added = jnp.full((b,), t) if lengths is None else lengths
        if state is None:
            q, k, v = self._project(u, count, added)
            y = self._select(u, q, None, k, v, self._sums(k, v))
        else:
            positions = state.length[:, None] + count
            q, k, v = self._project(u, positions, state.length + added)
            real = None if lengths is None else count < lengths[:, None]
            state = self._written(state, k, v, positions, real)
            y = self._select(u, q, positions, state.k, state.v, state.sums)
        y = self.out(y.reshape(b, t, -1))
        if inverse is not None:
            y = jnp.take_along_axis(y, inverse[..., None], axis=1)
        return (y, state) if return_state else y

    def init_state(self, batch: int, length: int) -> SparseState:  # type: ignore[override]
        """Returns the state before any position, for `batch` rows of at most `length` positions."""
        zeros = jnp.zeros((batch, length, self.num_kv_heads, self.head_dim), self.dtype)
        empty = jnp.full((batch, length), -1, jnp.int32), jnp.zeros((batch,), jnp.int32)
        return SparseState(zeros, zeros, *empty, self._sums(zeros, zeros))

    def step(self, u: Float[Array, "b d"], state: SparseState) -> tuple[Float[Array, "b d"], SparseState]:  # type: ignore[override]
        """Attends from one position: (u [b, d], state) -> (y [b, d], state). Equal to a call with t = 1."""
        self._check(u, 2)
        y, state = self(u[:, None], state=state, return_state=True)
        return y[:, 0], state

    def _summed(self, k, v):
        """Returns what sums are of."""
        return k

    def _sums(self, k, v):
        x = self._summed(k, v).astype(jnp.promote_types(k.dtype, jnp.float32))
        count = -(-x.shape[1] // self.summary)
        x = jnp.pad(x, ((0, 0), (0, count * self.summary - x.shape[1]), (0, 0), (0, 0)))
        return x.reshape(x.shape[0], count, self.summary, *x.shape[2:]).sum(2)

    def _written(self, state: SparseState, k, v, positions, real) -> SparseState:
        name, cache = type(self).__name__, (state.k, state.v)
        (held_k, held_v), marked, length, _ = extend(
            name, cache, state.positions, state.length, (k, v), positions, real=real, segment_ids=None, is_ring=False
        )
        new = self._summed(k, v).astype(state.sums.dtype)
        new = new if real is None else jnp.where(real[..., None, None], new, 0)
        rows = jnp.arange(new.shape[0])[:, None]
        sums = state.sums.at[rows, positions // self.summary].add(new, mode="drop")
        return SparseState(held_k, held_v, marked, length, sums)

    def _dense(self, q, positions, k, v, **options) -> Any:
        return ops.attention(q, k, v, is_causal=True, q_positions=positions, scale=self.scale, **options)

    def _sparse(self, q, positions, k, v, chosen, block_k: int) -> Any:
        return ops.block_sparse_attention(
            q, k, v, chosen, block_q=1, block_k=block_k, is_causal=True, q_positions=positions, scale=self.scale
        )

    def _select(self, u, q, positions, k, v, sums):
        """Attends from q at [b, t] positions, None for 0, 1, ..., to keys at 0, 1, ...; those behind are not read."""
        raise NotImplementedError


class MoBA(SparseAttention):
    """Mixture of Block Attention: each head of each query attends to its own block and to those of the best means."""

    def __init__(self, d: int, *, block_size: int = 512, top_k: int = 3, rngs: nnx.Rngs, **options: Any):
        """Args:
        d: width of the input and the output.
        block_size: keys of a block. Published models have 512 with top_k 3, or 4096 with 12.
        top_k: blocks of a query, its own among them.
        rngs: source of the initial Params.
        **options: of `Attention`, without is_causal, window, soft_cap and sinks.

        Raises:
          ValueError: as of `Attention`, or an option is refused.
        """
        super().__init__(d, rngs=rngs, **options)
        self.block_size = self.summary = block_size
        self.top_k = top_k

    def _select(self, u, q, positions, k, v, sums):
        if not self.is_sparse:
            return self._dense(q, positions, k, v)
        # Of blocks that are not full, a query sees its own alone, which it needs no mean for.
        means = sums / self.block_size
        options = {"block_k": self.block_size, "top_k": self.top_k, "q_positions": positions}
        return self._sparse(q, positions, k, v, ops.select_moba(q, None, means=means, **options), self.block_size)


class InfLLMv2Attention(SparseAttention):
    """InfLLM-V2: dense up to a position, from there on to selected blocks, with the same weights.

    A position below `dense_below` attends to all before it, also in a longer text: then a text that grows token by
    token gets what it gets at once. (The paper's switch looks at the length of the whole text.)
    """

    def __init__(
        self,
        d: int,
        *,
        block_size: int = 64,
        top_k: int = 64,
        kernel: int = 32,
        stride: int = 16,
        initial: int = 1,
        local_window: int = 2048,
        dense_below: int = 8192,
        rngs: nnx.Rngs,
        **options: Any,
    ):
        """Args:
        d: width of the input and the output.
        block_size, top_k, kernel, stride, initial: of `portable.ops.select_infllm`.
        local_window: its window.
        dense_below: position from which on blocks are selected.
        rngs: source of the initial Params.
        **options: of `Attention`, without is_causal, window, soft_cap and sinks.

        Raises:
          ValueError: as of `Attention`, or an option is refused.
        """
        super().__init__(d, rngs=rngs, **options)
        self.block_size, self.dense_below, self.summary = block_size, dense_below, stride
        self.kernel, self.stride = kernel, stride
        self.choice = (("top_k", top_k), ("initial", initial), ("window", local_window))

    def _select(self, u, q, positions, k, v, sums):
        t, s, limit = q.shape[1], k.shape[1], self.dense_below
        if not self.is_sparse or s <= limit:
            return self._dense(q, positions, k, v)

        def dense(q, positions):
            return self._dense(q, positions, k[:, :limit], v[:, :limit])

        def sparse(q, positions):
            means = window_sums(sums, self.kernel // self.stride) / self.kernel
            options = {"block_k": self.block_size, "kernel": self.kernel, "stride": self.stride, "s": s}
            options |= {"q_positions": positions, "scale": self.scale, **dict(self.choice)}
            chosen = ops.select_infllm(q, None, means=means, **options)
            return self._sparse(q, positions, k, v, chosen, self.block_size)

        if positions is None:
            behind = sparse(q[:, limit:], jnp.arange(limit, t, dtype=jnp.int32))
            return jnp.concatenate([dense(q[:, :limit], None), behind], 1) if limit else behind
        early = positions < limit

        def both(q, positions):
            return jnp.where(early[..., None, None], dense(q, positions), sparse(q, positions))

        def some(q, positions):
            return jax.lax.cond(early.any(), both, sparse, q, positions)

        return jax.lax.cond(early.all(), dense, some, q, positions)


class NSA(SparseAttention):
    """Native Sparse Attention: compressed, selected and last tokens, each with a gate of its own for each head.

    Kernels are compressed to the means of their keys and of their values, as flash-linear-attention has it (the paper
    learns a map). Always sparse: its weights are its own.

    Attributes:
      gate: Linear from d to 3 * h, of which the sigmoid weighs the three branches of each head.
    """

    def __init__(
        self,
        d: int,
        *,
        block_size: int = 64,
        top_k: int = 16,
        kernel: int = 64,
        stride: int = 64,
        initial: int = 1,
        local: int = 2,
        last: int = 512,
        rngs: nnx.Rngs,
        **options: Any,
    ):
        """Args:
        d: width of the input and the output.
        block_size, top_k, kernel, stride, initial, local: of `portable.ops.select_nsa`.
        last: tokens of the sliding branch, the query's own among them.
        rngs: source of the initial Params.
        **options: of `Attention`, without is_causal, window, soft_cap and sinks.

        Raises:
          ValueError: as of `Attention`, or an option is refused.
        """
        super().__init__(d, rngs=rngs, **options)
        self.block_size, self.last, self.kernel, self.stride, self.summary = block_size, last, kernel, stride, stride
        self.choice = (("top_k", top_k), ("initial", initial), ("local", local))
        kept = {name: options[name] for name in ("dtype", "param_dtype") if name in options}
        kept = {"dtype": jnp.float32, "param_dtype": jnp.float32} | kept
        init = options.get("kernel_init", KERNEL_INIT)
        self.gate = linear(
            d, 3 * self.num_heads, ("embed", "heads"), use_bias=False, kernel_init=init, rngs=rngs, **kept
        )

    def _summed(self, k, v):
        return jnp.concatenate([k, v], -1)

    def _select(self, u, q, positions, k, v, sums):
        gates = jax.nn.sigmoid(self.gate(u.astype(self.dtype))).reshape(*q.shape[:3], 3)
        means = window_sums(sums, self.kernel // self.stride) / self.kernel
        keys, values = means[..., : self.head_dim].astype(q.dtype), means[..., self.head_dim :].astype(q.dtype)
        ends = jnp.arange(keys.shape[1], dtype=jnp.int32) * self.stride + self.kernel - 1
        compressed = self._dense(q, positions, keys, values, kv_positions=ends)
        options = {"kernel": self.kernel, "stride": self.stride, "block_k": self.block_size, "s": k.shape[1]}
        chosen = ops.select_nsa(q, keys, q_positions=positions, scale=self.scale, **options, **dict(self.choice))
        selected = self._sparse(q, positions, k, v, chosen, self.block_size)
        parts = compressed, selected, self._sliding(q, positions, k, v)
        return sum(gates[..., i, None] * x for i, x in enumerate(parts))

    def _sliding(self, q, positions, k, v):
        t, s = q.shape[1], k.shape[1]
        near = t + self.last - 1
        if positions is None or near >= s:
            return self._dense(q, positions, k, v, window=self.last)
        # Of a long cache, what the new positions can see.
        at = positions[:, :1] - (self.last - 1) + jnp.arange(near, dtype=jnp.int32)
        take = lambda x: jnp.take_along_axis(x, jnp.clip(at, 0, s - 1)[..., None, None], 1)  # noqa: E731
        return self._dense(q, positions, take(k), take(v), kv_positions=at, key_mask=at >= 0, window=self.last)


def window_sums(x, count: int) -> Any:
    """Returns the sums of each `count` neighbours along axis 1, [b, n - count + 1, ...]."""
    n = max(0, x.shape[1] - count + 1)
    return sum(x[:, i : i + n] for i in range(count))
