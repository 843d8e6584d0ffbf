"""The Mamba-2 mixer (Dao and Gu 2024, arXiv 2405.21060, section 7 and figure 6)."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float, Int

from portable import ops
from portable.nn.conv import CausalConv1d
from portable.nn.linear import linear
from portable.nn.norm import ACTIVATIONS, RMSNorm
from portable.nn.padding import right_padded


class Mamba2State(NamedTuple):
    """What a Mamba-2 layer carries from one position to the next.

    Attributes:
      x, B, C: the last k - 1 inputs of each convolution, [b, k - 1, h*p], [b, k - 1, g*n] twice, oldest first.
      ssm: [b, h, p, n], float32 unless the layer was given another `state_dtype`.
    """

    x: Float[Array, "b w e"]
    B: Float[Array, "b w m"]
    C: Float[Array, "b w m"]
    ssm: Float[Array, "b h p n"]


class Mamba2(nnx.Module):
    """Projections, short convolutions, the state-space recurrence, a gated norm and the output projection.

    The paper's fused input projection is held as its row blocks (z, x, B, C, dt) and its convolution as its channel
    blocks: slices of a fused output cost more than the products on a TPU, and tensor parallelism wants them apart.

    Attributes:
      in_z, in_x, in_B, in_C, in_dt: Linear from d to h*p, h*p, g*n, g*n and h.
      conv_x, conv_B, conv_C: CausalConv1d.
      dt_bias, A_log: Param [h]. D: Param [h], or [h, p] with `D_has_hdim`.
      norm: RMSNorm over h*p, gated by z; None without `gated_norm`, where y * silu(z) takes its place.
      out: Linear from h*p to d.
    """

    def __init__(
        self,
        d: int,
        *,
        num_heads: int,
        head_dim: int = 64,
        state_size: int = 128,
        n_groups: int = 1,
        conv_kernel: int = 4,
        chunk_size: int | None = None,
        use_bias: bool = False,
        use_conv_bias: bool = True,
        activation: str = "silu",
        D_has_hdim: bool = False,
        gated_norm: bool = True,
        norm_before_gate: bool = False,
        norm_eps: float = 1e-5,
        dt_limit: tuple[float, float] = (0.0, float("inf")),
        dt_range: tuple[float, float] = (1e-3, 0.1),
        dt_floor: float = 1e-4,
        A_range: tuple[float, float] = (1.0, 16.0),
        dtype=jnp.float32,
        param_dtype=jnp.float32,
        state_dtype=jnp.float32,
        rngs: nnx.Rngs,
    ):
        """Args:
        d: width of the model.
        num_heads, head_dim, state_size, n_groups: h, p, n and g; h % g == 0.
        conv_kernel: taps of the short convolutions.
        chunk_size: positions in a chunk of `portable.ops.ssd`; None takes the platform's. No effect on the result.
        use_bias, use_conv_bias: biases of the projections and of the convolutions.
        activation: after the convolutions; one of `portable.nn.norm.ACTIVATIONS`.
        D_has_hdim: a skip weight for each channel of a head instead of one for each head.
        gated_norm, norm_before_gate, norm_eps: the norm before the output projection, in g groups.
        dt_limit: step sizes are clipped to this range after softplus, in prefill and in `step` alike.
        dt_range, dt_floor: initial step sizes are log-uniform in this range, at least the floor.
        A_range: initial decay rates are uniform in this range (and negated).
        dtype: of the activations and matrix products; sums, decays and the state are float32.
        param_dtype: dtype of the Params.
        state_dtype: dtype in which `init_state` keeps the recurrent state.
        rngs: source of the initial Params.
        """
        if num_heads % n_groups:
            raise ValueError(f"Mamba2: n_groups must divide num_heads; got {n_groups} and {num_heads}.")
        if activation not in ACTIVATIONS:
            raise ValueError(f"Mamba2: activation must be one of {', '.join(ACTIVATIONS)}; got {activation!r}.")
        inner, groups = num_heads * head_dim, n_groups * state_size
        self.num_heads, self.head_dim, self.state_size, self.n_groups = num_heads, head_dim, state_size, n_groups
        self.conv_kernel, self.chunk_size, self.activation, self.dt_limit = (
            conv_kernel,
            chunk_size,
            activation,
            dt_limit,
        )
        self.dtype, self.state_dtype = dtype, state_dtype

        def conv(channels, axis):
            return CausalConv1d(
                channels,
                conv_kernel,
                use_bias=use_conv_bias,
                axis=axis,
                dtype=dtype,
                param_dtype=param_dtype,
                rngs=rngs,
            )

        options = {"use_bias": use_bias, "dtype": dtype, "param_dtype": param_dtype, "rngs": rngs}
        self.in_z = linear(d, inner, ("embed", "inner"), **options)
        self.in_x = linear(d, inner, ("embed", "inner"), **options)
        self.in_B = linear(d, groups, ("embed", "groups"), **options)
        self.in_C = linear(d, groups, ("embed", "groups"), **options)
        wide = jnp.promote_types(jnp.float32, dtype)
        self.in_dt = linear(d, num_heads, ("embed", "heads"), preferred_element_type=wide, **options)
        self.conv_x, self.conv_B, self.conv_C = conv(inner, "inner"), conv(groups, "groups"), conv(groups, "groups")

        low, high = dt_range
        dt = jnp.exp(jax.random.uniform(rngs.params(), (num_heads,), jnp.float32, jnp.log(low), jnp.log(high)))
        dt = jnp.maximum(dt, dt_floor)
        inverse_softplus = dt + jnp.log(-jnp.expm1(-dt))
        rates = jax.random.uniform(rngs.params(), (num_heads,), jnp.float32, *A_range)
        skip = (num_heads, head_dim) if D_has_hdim else (num_heads,)
        self.dt_bias = nnx.Param(inverse_softplus.astype(param_dtype), axes=("heads",))
        self.A_log = nnx.Param(jnp.log(rates).astype(param_dtype), axes=("heads",))
        self.D = nnx.Param(jnp.ones(skip, param_dtype), axes=("heads", None)[: len(skip)])
        self.norm = nnx.data(None)
        if gated_norm:
            self.norm = RMSNorm(
                inner,
                eps=norm_eps,
                groups=n_groups,
                norm_before_gate=norm_before_gate,
                axis="inner",
                param_dtype=param_dtype,
            )
        self.out = linear(inner, d, ("inner", "embed"), **options)

    def __call__(
        self,
        u: Float[Array, "b t d"],
        *,
        state: Mamba2State | None = None,
        lengths: Int[Array, " b"] | None = None,
        mask: Bool[Array, "b t"] | None = None,
        segment_ids: Int[Array, "b t"] | None = None,
        return_state: bool = False,
    ) -> Any:
        """Mixes a sequence.

        Args:
          u: [b, t, d].
          state: from `init_state` or an earlier call, to continue from; None starts at zero.
          lengths: [b] real positions of right-padded rows.
          mask: [b, t] true at the real positions of rows padded on any side; not together with `lengths`.
          segment_ids: [b, t] integers; where they change, everything starts anew (packed documents).
          return_state: whether the state after each row's last real position is returned too.

        Returns:
          y [b, t, d] in the layer's dtype (at padded positions without meaning), or (y, state).

        Raises:
          ValueError: shapes do not fit, both lengths and mask are given, or a concrete mask has holes.
          TypeError: u is not floating point.
        """
        self._check(u, 3)
        u, lengths, segment_ids, inverse = right_padded("Mamba2", u, lengths, mask, segment_ids)
        b, t, _ = u.shape
        h, p, n, g = self.num_heads, self.head_dim, self.state_size, self.n_groups
        u = u.astype(self.dtype)
        real = None
        if lengths is not None:
            real = jnp.arange(t) < lengths[:, None]
            if segment_ids is not None and t:  # padding belongs to the last real segment
                last = jnp.take_along_axis(segment_ids, jnp.maximum(lengths - 1, 0)[:, None], axis=1)
                segment_ids = jnp.where(real, segment_ids, last)

        fused = self.activation in ("silu", "swish")
        options = {"lengths": lengths, "segment_ids": segment_ids, "activation": "silu" if fused else None}
        before: Any = state or (None, None, None, None)
        before_x, before_B, before_C, before_ssm = before
        x, state_x = self.conv_x(self.in_x(u), before_x, **options)
        B, state_B = self.conv_B(self.in_B(u), before_B, **options)
        C, state_C = self.conv_C(self.in_C(u), before_C, **options)
        if not fused:
            x, B, C = map(ACTIVATIONS[self.activation], (x, B, C))

        dt = self._step_sizes(self.in_dt(u))
        if real is not None:  # a position with dt = 0 leaves the state untouched
            dt = jnp.where(real[..., None], dt, 0)
        y, ssm = ops.ssd(
            x.reshape(b, t, h, p),
            dt,
            self._rates(),
            B.reshape(b, t, g, n),
            C.reshape(b, t, g, n),
            D=jnp.asarray(self.D[...]),
            initial_state=before_ssm,
            segment_ids=segment_ids,
            chunk_size=self.chunk_size,
        )
        y = self.out(self._gate(y.reshape(b, t, h * p), self.in_z(u)))
        if inverse is not None:
            y = jnp.take_along_axis(y, inverse[..., None], axis=1)
        if not return_state:
            return y
        return y, Mamba2State(state_x, state_B, state_C, ssm.astype(self.state_dtype))

    def init_state(self, batch: int) -> Mamba2State:
        """Returns the state before any position, for `batch` rows."""
        taps, groups = self.conv_kernel - 1, self.n_groups * self.state_size
        inner = self.num_heads * self.head_dim
        return Mamba2State(
            jnp.zeros((batch, taps, inner), self.dtype),
            jnp.zeros((batch, taps, groups), self.dtype),
            jnp.zeros((batch, taps, groups), self.dtype),
            jnp.zeros((batch, self.num_heads, self.head_dim, self.state_size), self.state_dtype),
        )

    def step(self, u: Float[Array, "b d"], state: Mamba2State) -> tuple[Float[Array, "b d"], Mamba2State]:
        """Mixes one position: (u [b, d], state) -> (y [b, d], state). Equal to a call with t = 1, but cheaper."""
        self._check(u, 2)
        b = u.shape[0]
        h, p, n, g = self.num_heads, self.head_dim, self.state_size, self.n_groups
        u = u.astype(self.dtype)
        activation = ACTIVATIONS[self.activation]
        x, state_x = self.conv_x(self.in_x(u)[:, None], state.x)
        B, state_B = self.conv_B(self.in_B(u)[:, None], state.B)
        C, state_C = self.conv_C(self.in_C(u)[:, None], state.C)
        y, ssm = ops.ssd_step(
            activation(x).reshape(b, h, p),
            self._step_sizes(self.in_dt(u)),
            self._rates(),
            activation(B).reshape(b, g, n),
            activation(C).reshape(b, g, n),
            state.ssm,
            D=jnp.asarray(self.D[...]),
        )
        y = self.out(self._gate(y.reshape(b, h * p), self.in_z(u)))
        return y, Mamba2State(state_x, state_B, state_C, ssm)

    def _check(self, u, rank: int) -> None:
        wanted = "[b, t, d]" if rank == 3 else "[b, d]"
        if getattr(u, "ndim", None) != rank or u.shape[-1] != self.in_x.in_features:
            found = list(u.shape) if hasattr(u, "shape") else type(u).__name__
            raise ValueError(f"Mamba2: u must be {wanted} with d={self.in_x.in_features}; got {found}.")
        if not jnp.issubdtype(u.dtype, jnp.floating):
            raise TypeError(f"Mamba2: u must be floating point; got {u.dtype}.")

    def _rates(self) -> Float[Array, " h"]:
        return -jnp.exp(jnp.asarray(self.A_log[...]).astype(jnp.promote_types(jnp.float32, self.dtype)))

    def _step_sizes(self, dt: Float[Array, "... h"]) -> Float[Array, "... h"]:
        wide = jnp.promote_types(jnp.float32, dt.dtype)
        return jnp.clip(jax.nn.softplus(dt.astype(wide) + self.dt_bias[...].astype(wide)), *self.dt_limit)

    def _gate(self, y: Float[Array, "... e"], z: Float[Array, "... e"]) -> Float[Array, "... e"]:
        if self.norm is not None:
            return self.norm(y, z)
        wide = jnp.promote_types(jnp.float32, y.dtype)
        return (y.astype(wide) * jax.nn.silu(z.astype(wide))).astype(y.dtype)
