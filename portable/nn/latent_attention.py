"""Multi-head latent attention (DeepSeek-V2): keys and values of all heads from one short vector a position."""

from typing import Any, NamedTuple

import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float, Int

from portable import ops
from portable.nn.cache import Seen, extend
from portable.nn.heads import KERNEL_INIT
from portable.nn.linear import kernel_of, linear
from portable.nn.norm import RMSNorm
from portable.nn.padding import right_padded
from portable.nn.rotary import Rotary, rotary


class LatentState(NamedTuple):
    """What decoding carries: r + e numbers a position, whatever the number of heads.

    Attributes:
      latents: [b, s, r + e], the normalised latent of a position, then the rotated key that all heads share; position p
        of a row lies at p.
      positions: [b, s] int32, -1 where there is nothing.
      length: [b] int32, positions read so far.
    """

    latents: Float[Array, "b s c"]
    positions: Int[Array, "b s"]
    length: Int[Array, " b"]


class LatentAttention(nnx.Module):
    """Causal attention whose keys and values are projections of a latent vector of rank r.

    With c = norm(kv_down(u)) a head's key is [key_up(c), rotary(key_rope(u))], the second part the same for all heads,
    its value value_up(c), and its query [query without positions, rotary(rest)]. Decoding never builds keys and values:
    q . key_up(c) = key_up'(q) . c, so the queries go to the latent's space, the means of latents come back through
    value_up (DeepSeek-V2, arXiv:2405.04434, section 2.1 and appendix C).

    Attributes:
      query: Linear from d to h * (n + e), or None with a rank of queries.
      query_down, query_norm, query_up: Linear from d to that rank, RMSNorm, Linear to h * (n + e); or None.
      kv_down, key_rope: Linear from d to r and to e. kv_norm: RMSNorm over r.
      key_up, value_up: Linear from r to h * n and to h * v. out: Linear from h * v to d.
    """

    def __init__(
        self,
        d: int,
        *,
        num_heads: int,
        kv_rank: int,
        query_rank: int | None = None,
        head_dim: int = 128,
        rope_dim: int = 64,
        value_dim: int = 128,
        rope: Rotary = Rotary(interleaved=True),
        scale: float | None = None,
        norm_eps: float = 1e-6,
        use_bias: bool = False,
        kernel_init: nnx.Initializer = KERNEL_INIT,
        dtype=jnp.float32,
        param_dtype=jnp.float32,
        rngs: nnx.Rngs,
    ):
        """Args:
        d: width of the input and the output.
        num_heads: h.
        kv_rank: r, width of the latent.
        query_rank: width that queries pass through; None for a direct projection.
        head_dim: n, channels of a head's keys without positions.
        rope_dim: e, channels with rotary positions, one key for all heads.
        value_dim: v, channels of a head's values.
        rope: their frequencies.
        scale: of the scores; None for (n + e) ** -0.5.
        norm_eps: of the norms.
        use_bias: biases on query_down, kv_down, key_rope and out.
        kernel_init: of the projections.
        dtype: of activations and matrix products; sums are float32.
        param_dtype: dtype of the Params.
        rngs: source of the initial Params.

        Raises:
          ValueError: rope_dim is odd.
        """
        if rope_dim % 2:
            raise ValueError(f"LatentAttention: rope_dim must be even; got {rope_dim}.")
        self.num_heads, self.head_dim, self.rope_dim, self.value_dim = num_heads, head_dim, rope_dim, value_dim
        self.kv_rank, self.rope, self.dtype = kv_rank, rope, dtype
        self.scale = (head_dim + rope_dim) ** -0.5 if scale is None else scale
        options = {"kernel_init": kernel_init, "dtype": dtype, "param_dtype": param_dtype, "rngs": rngs}
        queries = num_heads * (head_dim + rope_dim)
        self.query: Any = nnx.data(None)
        self.query_down: Any = nnx.data(None)
        self.query_norm: Any = nnx.data(None)
        self.query_up: Any = nnx.data(None)
        if query_rank is None:
            self.query = linear(d, queries, ("embed", "heads"), use_bias=False, **options)
        else:
            self.query_down = linear(d, query_rank, ("embed", None), use_bias=use_bias, **options)
            self.query_norm = RMSNorm(query_rank, eps=norm_eps, axis=None, param_dtype=param_dtype)
            self.query_up = linear(query_rank, queries, (None, "heads"), use_bias=False, **options)
        self.kv_down = linear(d, kv_rank, ("embed", None), use_bias=use_bias, **options)
        self.key_rope = linear(d, rope_dim, ("embed", None), use_bias=use_bias, **options)
        self.kv_norm = RMSNorm(kv_rank, eps=norm_eps, axis=None, param_dtype=param_dtype)
        self.key_up = linear(kv_rank, num_heads * head_dim, (None, "heads"), use_bias=False, **options)
        self.value_up = linear(kv_rank, num_heads * value_dim, (None, "heads"), use_bias=False, **options)
        self.out = linear(num_heads * value_dim, d, ("heads", "embed"), use_bias=use_bias, **options)

    def __call__(
        self,
        u: Float[Array, "b t d"],
        *,
        state: LatentState | None = None,
        lengths: Int[Array, " b"] | None = None,
        mask: Bool[Array, "b t"] | None = None,
        segment_ids: Int[Array, "b t"] | None = None,
        return_state: bool = False,
    ) -> Any:
        """Attends over a sequence; arguments, results and errors as of `portable.nn.Attention`."""
        self._check(u, 3)
        u, lengths, segment_ids, inverse = right_padded("LatentAttention", u, lengths, mask, segment_ids)
        if state is None and return_state:
            raise ValueError(
                "LatentAttention: return_state needs a state to write to; give state=layer.init_state(b, length)."
            )
        t = u.shape[1]
        real = None if lengths is None else jnp.arange(t) < lengths[:, None]
        before = jnp.zeros(u.shape[:1], jnp.int32) if state is None else state.length
        positions = before[:, None] + jnp.arange(t, dtype=jnp.int32)
        plain, turned, latents = self._project(u, positions, before + (t if lengths is None else lengths))
        if state is None:
            y = self._expanded(plain, turned, latents, key_mask=real, segment_ids=segment_ids)
        else:
            (held,), held_positions, length, seen = extend(
                "LatentAttention",
                (state.latents,),
                state.positions,
                state.length,
                (latents,),
                positions,
                real=real,
                segment_ids=segment_ids,
                is_ring=False,
            )
            y = self._attend_to(seen, plain, turned, positions)
            state = LatentState(held, held_positions, length)
        y = self.out(y.reshape(*u.shape[:2], -1))
        if inverse is not None:
            y = jnp.take_along_axis(y, inverse[..., None], axis=1)
        return (y, state) if return_state else y

    def init_state(self, batch: int, length: int) -> LatentState:
        """Returns the state before any position, for `batch` rows of at most `length` positions."""
        latents = jnp.zeros((batch, length, self.kv_rank + self.rope_dim), self.dtype)
        return LatentState(latents, jnp.full((batch, length), -1, jnp.int32), jnp.zeros((batch,), jnp.int32))

    def step(self, u: Float[Array, "b d"], state: LatentState) -> tuple[Float[Array, "b d"], LatentState]:
        """Attends from one position: (u [b, d], state) -> (y [b, d], state). Equal to a call with t = 1."""
        self._check(u, 2)
        y, state = self(u[:, None], state=state, return_state=True)
        return y[:, 0], state

    def _project(self, u, positions, lengths):
        """Returns queries without positions [b, t, h, n], rotated ones [b, t, h, e] and latents [b, t, r + e]."""
        u = u.astype(self.dtype)
        if self.query is not None:
            q = self.query(u)
        else:
            q = self.query_up(self.query_norm(self.query_down(u)))
        plain, turned = jnp.split(q.reshape(*u.shape[:2], self.num_heads, -1), [self.head_dim], axis=-1)
        key = rotary(self.key_rope(u)[:, :, None], positions, self.rope, lengths=lengths)[:, :, 0]
        latents = jnp.concatenate([self.kv_norm(self.kv_down(u)), key], axis=-1)
        return plain, rotary(turned, positions, self.rope, lengths=lengths), latents

    def _attend_to(self, seen: Seen, plain, turned, positions):
        options = {
            "key_mask": seen.positions >= 0,
            "segment_ids": seen.segments,
            "q_positions": positions,
            "kv_positions": seen.positions,
        }
        (latents,) = seen.arrays
        # For each key: products of the wider scores and means that latents bring, against building key and value.
        wider = 2 * (self.kv_rank + self.rope_dim) - (self.head_dim + self.rope_dim + self.value_dim)
        if plain.shape[1] * wider <= self.kv_rank * (self.head_dim + self.value_dim):
            return self._absorbed(plain, turned, latents, **options)
        return self._expanded(plain, turned, latents, **options)

    def _expanded(self, plain, turned, latents, **options) -> Any:
        """Returns [b, t, h, v]: attention to keys and values of every head, built from the latents."""
        b, s, _ = latents.shape
        c, key = latents[..., : self.kv_rank], latents[..., self.kv_rank :]
        k = self.key_up(c).reshape(b, s, self.num_heads, self.head_dim)
        k = jnp.concatenate([k, jnp.broadcast_to(key[:, :, None], (*k.shape[:3], self.rope_dim))], axis=-1)
        v = self.value_up(c).reshape(b, s, self.num_heads, self.value_dim)
        q = jnp.concatenate([plain, turned], axis=-1)
        return ops.attention(q, k, v, is_causal=True, scale=self.scale, **options)

    def _absorbed(self, plain, turned, latents, **options):
        """Returns the same: every head attends to the latents themselves, as to one key and value."""
        up = kernel_of(self.key_up).astype(self.dtype).reshape(self.kv_rank, self.num_heads, self.head_dim)
        down = kernel_of(self.value_up).astype(self.dtype).reshape(self.kv_rank, self.num_heads, self.value_dim)
        wide = jnp.promote_types(jnp.float32, self.dtype)
        q = jnp.einsum("bthn,rhn->bthr", plain, up, preferred_element_type=wide).astype(self.dtype)
        q, kv = jnp.concatenate([q, turned], axis=-1), latents[:, :, None]
        # The shared key is averaged along with the latents and dropped: cheaper than a copy of the cache without it.
        mean: Any = ops.attention(q, kv, kv, is_causal=True, scale=self.scale, **options)
        return jnp.einsum("bthr,rhv->bthv", mean[..., : self.kv_rank], down, preferred_element_type=wide).astype(
            self.dtype
        )

    def _check(self, u, rank: int) -> None:
        wanted = "[b, t, d]" if rank == 3 else "[b, d]"
        if getattr(u, "ndim", None) != rank or u.shape[-1] != self.kv_down.in_features:
            found = list(u.shape) if hasattr(u, "shape") else type(u).__name__
            raise ValueError(f"LatentAttention: u must be {wanted} with d={self.kv_down.in_features}; got {found}.")
