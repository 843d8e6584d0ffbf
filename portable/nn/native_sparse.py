"""Native Sparse Attention."""

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from portable import ops
from portable.nn.heads import KERNEL_INIT
from portable.nn.linear import linear
from portable.nn.sparse_attention import SparseAttention, window_sums
from portable.ops._sparse_selection.common import whole
from portable.ops._sparse_selection.compressed import check_sizes


class Compression(nnx.Module):
    """A network from the vectors of a kernel to one, for each head of keys:

        silu((x + position) @ up) @ down

    over the kernel's vectors one behind the other (Yuan et al. 2025, arXiv 2502.11089, equation 7: a network with
    positions inside the block; its one hidden layer, activation and width are our choice).

    Attributes:
      position: Param [kernel, g, e]. up: Param [g, kernel * e, width]. down: Param [g, width, e].
    """

    def __init__(
        self,
        kernel: int,
        heads: int,
        head_dim: int,
        width: int,
        *,
        dtype=jnp.float32,
        param_dtype=jnp.float32,
        rngs: nnx.Rngs,
    ):
        """Args:
        kernel: vectors. heads: g. head_dim: e. width: of the hidden layer.
        dtype: of activations and matrix products. param_dtype: of the Params. rngs: source of the initial Params.
        """
        init = nnx.initializers.lecun_normal(batch_axis=(0,))
        axes = ("heads", None, None)
        made = nnx.initializers.normal(0.02)(rngs.params(), (kernel, heads, head_dim), param_dtype)
        self.position = nnx.Param(made, axes=(None, "heads", None))
        self.up = nnx.Param(init(rngs.params(), (heads, kernel * head_dim, width), param_dtype), axes=axes)
        self.down = nnx.Param(init(rngs.params(), (heads, width, head_dim), param_dtype), axes=axes)
        self.dtype = dtype

    def __call__(self, x: Float[Array, "b n kernel g e"]) -> Float[Array, "b n g e"]:
        """Returns one vector of each kernel."""
        position, up, down = (jnp.asarray(p[...]).astype(self.dtype) for p in (self.position, self.up, self.down))
        x = jnp.swapaxes(x.astype(self.dtype) + position, 2, 3)
        x = x.reshape(*x.shape[:3], -1)
        hidden = jax.nn.silu(jnp.einsum("bngi,gij->bngj", x, up))
        return jnp.einsum("bngj,gje->bnge", hidden, down)


class NSA(SparseAttention):
    """Native Sparse Attention: compressed, selected and last tokens, each with a gate of its own for each head.

    Kernels are compressed to the means of their keys and of their values, as flash-linear-attention has it, or by a map
    that is learned, as in the paper. Always sparse: its weights are its own.

    Attributes:
      gate: Linear from d to 3 * h, of which the sigmoid weighs the three branches of each head.
      compress_key, compress_value: `Compression`, or None for means.
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
        compression: str = "mean",
        compression_width: int | None = None,
        rngs: nnx.Rngs,
        **options: Any,
    ):
        """Args:
        d: width of the input and the output.
        block_size, top_k, kernel, stride, initial, local: of `portable.ops.select_nsa`.
        last: tokens of the sliding branch, the query's own among them.
        compression: "mean", or "mlp" for the paper's map; see `Compression`.
        compression_width: of its hidden layer; 2 * head_dim unless given.
        rngs: source of the initial Params.
        **options: of `Attention`, without is_causal, window, soft_cap and sinks; max_segments.

        Raises:
          ValueError: as of `Attention`, or an option is refused or unknown.
        """
        if compression not in ("mean", "mlp"):
            raise ValueError(f'NSA: compression must be "mean" or "mlp"; got {compression!r}.')
        name = type(self).__name__
        for size, x in (("last", last), ("block_size", block_size)):
            whole(name, size, x)
        check_sizes(name, kernel, stride, block_size, top_k, initial, local)
        if compression_width is not None:
            whole(name, "compression_width", compression_width)
        super().__init__(d, rngs=rngs, **options)
        self.block_size, self.last, self.kernel, self.stride, self.summary = block_size, last, kernel, stride, stride
        self.choice = (("top_k", top_k), ("initial", initial), ("local", local))
        kept = {name: options[name] for name in ("dtype", "param_dtype") if name in options}
        kept = {"dtype": jnp.float32, "param_dtype": jnp.float32} | kept
        init = options.get("kernel_init", KERNEL_INIT)
        self.gate = linear(
            d, 3 * self.num_heads, ("embed", "heads"), use_bias=False, kernel_init=init, rngs=rngs, **kept
        )

        self.compress_key = self.compress_value = nnx.data(None)
        if compression == "mlp":
            width = 2 * self.head_dim if compression_width is None else compression_width
            self.compress_key, self.compress_value = (
                Compression(kernel, self.num_kv_heads, self.head_dim, width, rngs=rngs, **kept) for _ in range(2)
            )

    def _summed(self, k, v):
        return jnp.concatenate([k, v], -1)

    def _sums(self, k, v):
        if self.compress_key is None:
            return super()._sums(k, v)
        starts = jnp.arange(max(0, (k.shape[1] - self.kernel) // self.stride + 1)) * self.stride
        return self._compressed(k, v, jnp.broadcast_to(starts, (k.shape[0], starts.shape[0])))

    def _compressed(self, k, v, starts):
        """Returns [b, n, g, 2 * e] of the kernels that start at [b, n]."""
        at = jnp.clip(starts[..., None] + jnp.arange(self.kernel), 0, max(0, k.shape[1] - 1))
        rows = jnp.arange(k.shape[0])[:, None, None]
        maps: Any = (self.compress_key, self.compress_value)
        made = [compress(x[rows, at]) for compress, x in zip(maps, (k, v), strict=True)]
        return jnp.concatenate(made, -1).astype(jnp.promote_types(k.dtype, jnp.float32))

    def _written(self, state, k, v, positions, real):
        if self.compress_key is None:
            return super()._written(state, k, v, positions, real)
        before, held = state.length, state.sums
        state = self._extended(state, k, v, positions, real)
        # Kernels that end in what was added.
        number = jnp.maximum(0, (before - self.kernel) // self.stride + 1)[:, None]
        number = number + jnp.arange(-(-k.shape[1] // self.stride))
        made = self._compressed(state.k, state.v, number * self.stride)
        whole = number * self.stride + self.kernel <= state.length[:, None]
        number = jnp.where(whole, number, held.shape[1])
        rows = jnp.arange(k.shape[0])[:, None]
        return state._replace(sums=held.at[rows, number].set(made, mode="drop"))

    def _select(self, u, q, positions, k, v, sums, laid=None):
        gates = jax.nn.sigmoid(self.gate(u.astype(self.dtype))).reshape(*q.shape[:3], 3)
        means = sums
        if self.compress_key is None:
            means = window_sums(sums, self.kernel // self.stride) / self.kernel
        keys, values = means[..., : self.head_dim].astype(q.dtype), means[..., self.head_dim :].astype(q.dtype)
        ends = jnp.arange(keys.shape[1], dtype=jnp.int32) * self.stride + self.kernel - 1
        segments: Any = None
        if laid is not None:  # a kernel is of the document that it starts in; one that ends in another is not seen
            segments = (laid.segments, laid.segments[:, : keys.shape[1] * self.stride : self.stride])
        compressed = self._dense(q, positions, keys, values, kv_positions=ends, segment_ids=segments)
        options: dict[str, Any] = {
            "kernel": self.kernel,
            "stride": self.stride,
            "block_k": self.block_size,
            "s": k.shape[1],
        }
        options["starts"] = None if laid is None else laid.starts
        options |= dict(self.choice)
        chosen = ops.select_nsa(q, keys, q_positions=positions, scale=self.scale, **options)
        selected = self._sparse(q, positions, k, v, chosen, laid)
        parts = compressed, selected, self._sliding(q, positions, k, v, laid)
        return sum(gates[..., i, None] * x for i, x in enumerate(parts))

    def _is_dense(self, length: int) -> bool:
        return False

    def _check(self, u, rank: int) -> None:
        if not self.is_sparse:
            raise ValueError("NSA: is_sparse must be True, as its weights are its own; got False. Use Attention.")
        super()._check(u, rank)

    def _sliding(self, q, positions, k, v, laid):
        t, s = q.shape[1], k.shape[1]
        near = t + self.last - 1
        if positions is None or near >= s:
            segments = None if laid is None else laid.segments
            return self._dense(q, positions, k, v, window=self.last, segment_ids=segments)
        # Of a long cache, what the new positions can see.
        at = positions[:, :1] - (self.last - 1) + jnp.arange(near, dtype=jnp.int32)
        take = lambda x: jnp.take_along_axis(x, jnp.clip(at, 0, s - 1)[..., None, None], 1)  # noqa: E731
        return self._dense(q, positions, take(k), take(v), kv_positions=at, key_mask=at >= 0, window=self.last)
