"""Attention to selected blocks: MoBA and InfLLM-V2, and what all such layers share."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float, Int

from portable import ops
from portable.nn.attention import Attention
from portable.nn.cache import extend
from portable.nn.conv import CausalConv1d
from portable.nn.packed import Documents, documents
from portable.nn.padding import right_padded
from portable.ops._sparse_selection.common import whole
from portable.ops._sparse_selection.compressed import blocks_of, check_sizes


class SparseState(NamedTuple):
    """What decoding carries.

    Attributes:
      k, v: [b, s, g, e]; position p of a row lies at p.
      positions: [b, s] int32, -1 where there is nothing.
      length: [b] int32, positions read so far.
      sums: float32 sums of as many keys as the layer's `summary` says, [b, ceil(s / summary), g, e]; in NSA also of
        values, on the last axis, or what its map makes of kernels.
      taps: [b, taps - 1, g * e], the last keys before the convolution; None without one.
    """

    k: Float[Array, "b s g e"]
    v: Float[Array, "b s g e"]
    positions: Int[Array, "b s"]
    length: Int[Array, " b"]
    sums: Float[Array, "b n g c"]
    taps: Any = None


class SparseAttention(Attention):
    """What the layers share; their Params are those of `Attention`, under the same names.

    Attributes:
      is_sparse: false attends to all keys, with the same weights; may be set at any time.
      block_size: keys of a block.
      summary: keys of a sum that the state keeps.
      max_segments: documents that a row of packed ones may have in any case; None for as many as it has blocks.
    """

    block_size: int
    summary: int
    _refused = ("is_causal", "window", "soft_cap", "sinks")

    def __init__(self, d: int, *, max_segments: int | None = None, rngs: nnx.Rngs, **options: Any):
        name = type(self).__name__
        if given := [option for option in self._refused if option in options]:
            raise ValueError(f"{name}: {given[0]} is not an option of attention to selected blocks; leave it out.")
        if max_segments is not None:
            whole(name, "max_segments", max_segments)
        super().__init__(d, rngs=rngs, **options)
        self.is_sparse, self.max_segments = True, max_segments

    def __call__(
        self,
        u: Float[Array, "b t d"],
        *,
        state: SparseState | None = None,
        lengths: Int[Array, " b"] | None = None,
        mask: Bool[Array, "b t"] | None = None,
        segment_ids: Int[Array, "b t"] | None = None,
        return_state: bool = False,
    ) -> Any:
        """Attends over a sequence, each position to itself and to what it selects of those before.

        Args:
          u: [b, t, d].
          state: from `init_state` or an earlier call, to continue from.
          lengths: [b] real positions of right-padded rows.
          mask: [b, t] true at the real positions of rows padded on any side; not together with `lengths`.
          segment_ids: [b, t] integers of packed documents; each gets what it would get alone, with blocks and positions
            of its own. Not together with a state. Each stays in one run; see `max_segments`.
          return_state: whether the state behind each row's last real position is returned too; needs `state`.

        Returns:
          y [b, t, d] in the layer's dtype (at padded positions without meaning), or (y, state).

        Raises:
          ValueError: shapes do not fit, both lengths and mask or both state and segment_ids are given, or a concrete
            state is too short for what is added.
        """
        name = type(self).__name__
        self._check(u, 3)
        u, lengths, segment_ids, inverse = right_padded(name, u, lengths, mask, segment_ids)
        if state is not None and segment_ids is not None:
            raise ValueError(f"{name}: a state is of one text; got segment_ids too. Give each document its own state.")
        if state is None and return_state:
            raise ValueError(f"{name}: return_state needs a state to write to; give state=layer.init_state(b, length).")
        (b, t), count = u.shape[:2], jnp.arange(u.shape[1], dtype=jnp.int32)
        added = jnp.full((b,), t) if lengths is None else lengths
        q, k, v = self._split(u)
        k, taps = self._mixed(k, None if state is None else state.taps, lengths, segment_ids)
        if segment_ids is not None:
            y = self._packed(u, q, k, v, added, segment_ids)
        elif state is None:
            q, k, v = self._turned(q, k, v, count, added)
            y = self._select(u, q, None, k, v, self._sums(k, v))
        else:
            positions = state.length[:, None] + count
            q, k, v = self._turned(q, k, v, positions, state.length + added)
            real = None if lengths is None else count < lengths[:, None]
            state = self._written(state, k, v, positions, real)._replace(taps=taps)
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

    def _packed(self, u, q, k, v, added, segment_ids):
        """Attends in a layout where each document begins with a block."""
        if u.shape[1] == 0:
            return q
        # Padding goes on with the last document.
        last = jnp.take_along_axis(segment_ids, jnp.maximum(added - 1, 0)[:, None], 1)
        segment_ids = jnp.where(jnp.arange(u.shape[1]) < added[:, None], segment_ids, last)
        laid = documents(type(self).__name__, segment_ids, self.block_size, self.max_segments)
        q, k, v = self._turned(q, k, v, laid.within, added)
        if self._is_dense(u.shape[1]):
            return self._dense(q, None, k, v, segment_ids=segment_ids)
        u, q, k, v = (laid.put(x) for x in (u, q, k, v))
        return laid.take(self._select(u, q, None, k, v, self._sums(k, v), laid))

    def _is_dense(self, length: int) -> bool:
        """Whether a text of as many positions is attended to as a whole."""
        return not self.is_sparse

    def _mixed(self, k, taps, lengths, segment_ids):
        """Returns keys before their rotation, and the state of what mixed them."""
        return k, None

    def _summed(self, k, v):
        """Returns what sums are of."""
        return k

    def _sums(self, k, v):
        x = self._summed(k, v).astype(jnp.promote_types(k.dtype, jnp.float32))
        count = -(-x.shape[1] // self.summary)
        x = jnp.pad(x, ((0, 0), (0, count * self.summary - x.shape[1]), (0, 0), (0, 0)))
        return x.reshape(x.shape[0], count, self.summary, *x.shape[2:]).sum(2)

    def _extended(self, state: SparseState, k, v, positions, real) -> SparseState:
        name, cache = type(self).__name__, (state.k, state.v)
        (held_k, held_v), marked, length, _ = extend(
            name, cache, state.positions, state.length, (k, v), positions, real=real, segment_ids=None, is_ring=False
        )
        return state._replace(k=held_k, v=held_v, positions=marked, length=length)

    def _written(self, state: SparseState, k, v, positions, real) -> SparseState:
        new = self._summed(k, v).astype(state.sums.dtype)
        new = new if real is None else jnp.where(real[..., None, None], new, 0)
        rows = jnp.arange(new.shape[0])[:, None]
        sums = state.sums.at[rows, positions // self.summary].add(new, mode="drop")
        return self._extended(state, k, v, positions, real)._replace(sums=sums)

    def _dense(self, q, positions, k, v, **options) -> Any:
        return ops.attention(q, k, v, is_causal=True, q_positions=positions, scale=self.scale, **options)

    def _sparse(self, q, positions, k, v, chosen, laid: Documents | None) -> Any:
        options = {"block_q": 1, "block_k": self.block_size, "is_causal": True, "scale": self.scale}
        segments = None if laid is None else laid.segments
        return ops.block_sparse_attention(q, k, v, chosen, q_positions=positions, segment_ids=segments, **options)

    def _select(self, u, q, positions, k, v, sums, laid: Documents | None = None):
        """Attends from q at [b, t] positions, None for 0, 1, ..., to keys at 0, 1, ...; those behind are not read.

        Where documents are laid out, positions are None: slots.
        """
        raise NotImplementedError


class MoBA(SparseAttention):
    """Mixture of Block Attention: each head of each query attends to its own block and to those of the best means.

    With `key_taps` keys are mixed with those before them, so that what belongs together stands out in a block's mean
    (FlashMoBA, arXiv 2511.11571, appendix on the convolution of keys):

        k[t] <- k[t] + silu(sum_i kernel[i] * k[t - taps + 1 + i])

    before norm and rotation, for choice and attention both. Its filters start at zero (both are our choice): the layer
    then begins as the one without.

    Attributes:
      key_conv: CausalConv1d over all channels of the keys, or None.
    """

    def __init__(
        self, d: int, *, block_size: int = 512, top_k: int = 3, key_taps: int = 0, rngs: nnx.Rngs, **options: Any
    ):
        """Args:
        d: width of the input and the output.
        block_size: keys of a block. Published models have 512 with top_k 3, or 4096 with 12.
        top_k: blocks of a query, its own among them.
        key_taps: of the convolution of keys, 3 or 5 in the paper; 0 for none.
        rngs: source of the initial Params.
        **options: of `Attention`, without is_causal, window, soft_cap and sinks; max_segments.

        Raises:
          ValueError: as of `Attention`, or an option is refused.
        """
        for size, x, least in (("block_size", block_size, 1), ("top_k", top_k, 1), ("key_taps", key_taps, 0)):
            whole(type(self).__name__, size, x, least)
        super().__init__(d, rngs=rngs, **options)
        self.block_size = self.summary = block_size
        self.top_k = top_k
        self.key_conv = nnx.data(None)
        if key_taps:
            kept = {name: options[name] for name in ("dtype", "param_dtype") if name in options}
            channels = self.num_kv_heads * self.head_dim
            self.key_conv = CausalConv1d(channels, key_taps, use_bias=False, axis="heads", rngs=rngs, **kept)
            self.key_conv.kernel[...] = jnp.zeros_like(self.key_conv.kernel[...])

    def init_state(self, batch: int, length: int) -> SparseState:  # type: ignore[override]
        state = super().init_state(batch, length)
        if self.key_conv is None:
            return state
        taps, channels = self.key_conv.kernel.shape
        return state._replace(taps=jnp.zeros((batch, taps - 1, channels), self.dtype))

    def _mixed(self, k, taps, lengths, segment_ids):
        if self.key_conv is None:
            return k, None
        flat = k.reshape(*k.shape[:2], -1)
        more, taps = self.key_conv(flat, taps, lengths=lengths, segment_ids=segment_ids, activation="silu")
        return k + more.reshape(k.shape), taps

    def _select(self, u, q, positions, k, v, sums, laid=None):
        if self._is_dense(k.shape[1]):
            return self._dense(q, positions, k, v)
        # Of blocks that are not full, a query sees its own alone, which it needs no mean for.
        means = sums / self.block_size
        options = {"block_k": self.block_size, "top_k": self.top_k, "q_positions": positions}
        options["starts"] = None if laid is None else laid.starts
        return self._sparse(q, positions, k, v, ops.select_moba(q, None, means=means, **options), laid)


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
        **options: of `Attention`, without is_causal, window, soft_cap and sinks; max_segments.

        Raises:
          ValueError: as of `Attention`, or an option is refused.
        """
        name = type(self).__name__
        for size, x, least in (("block_size", block_size, 1), ("dense_below", dense_below, 0)):
            whole(name, size, x, least)
        local = blocks_of(name, "local_window", local_window, block_size)
        check_sizes(name, kernel, stride, block_size, top_k, initial, local)
        super().__init__(d, rngs=rngs, **options)
        self.block_size, self.dense_below, self.summary = block_size, dense_below, stride
        self.kernel, self.stride = kernel, stride
        self.choice = (("top_k", top_k), ("initial", initial), ("window", local_window))

    def _is_dense(self, length: int) -> bool:
        return not self.is_sparse or length <= self.dense_below

    def _select(self, u, q, positions, k, v, sums, laid=None):
        t, s, limit = q.shape[1], k.shape[1], self.dense_below
        if laid is None and self._is_dense(s):
            return self._dense(q, positions, k, v)

        def dense(q, positions):
            if laid is not None:
                return self._dense(q, None, k, v, segment_ids=laid.segments, window=limit)
            return self._dense(q, positions, k[:, :limit], v[:, :limit])

        def sparse(q, positions):
            means = window_sums(sums, self.kernel // self.stride) / self.kernel
            options = {"block_k": self.block_size, "kernel": self.kernel, "stride": self.stride, "s": s}
            options |= {"q_positions": positions, "scale": self.scale, **dict(self.choice)}
            options["starts"] = None if laid is None else laid.starts
            return self._sparse(q, positions, k, v, ops.select_infllm(q, None, means=means, **options), laid)

        if positions is None and laid is None:
            behind = sparse(q[:, limit:], jnp.arange(limit, t, dtype=jnp.int32))
            return jnp.concatenate([dense(q[:, :limit], None), behind], 1) if limit else behind
        if not limit:
            return sparse(q, positions)
        early = jnp.asarray(positions if laid is None else laid.positions) < limit

        def both(q, positions):
            return jnp.where(early[..., None, None], dense(q, positions), sparse(q, positions))

        def some(q, positions):
            return jax.lax.cond(early.any(), both, sparse, q, positions)

        return jax.lax.cond(early.all(), dense, some, q, positions)


def window_sums(x, count: int) -> Any:
    """Returns the sums of each `count` neighbours along axis 1, [b, n - count + 1, ...]."""
    n = max(0, x.shape[1] - count + 1)
    return sum(x[:, i : i + n] for i in range(count))
