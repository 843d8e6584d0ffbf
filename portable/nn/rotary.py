"""Rotary positions, with the ways in which published models stretch them to longer contexts."""

import dataclasses
import math

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

KINDS = ("default", "linear", "dynamic", "yarn", "llama3")


@dataclasses.dataclass(frozen=True)
class Rotary:
    """How channels turn with the position: frequencies, which pairs, and a factor on the result.

    Pair i turns by position * f[i]. By default f[i] = theta ** (-2 i / dims) (RoPE, Su et al., arXiv:2104.09864).
    Longer contexts than those of the training are reached by changed frequencies, which `kind` names:

    - "linear": f / factor (Chen et al., arXiv:2306.15595).
    - "dynamic": theta grows with the row once it is longer than `original_length` (NTK-aware, in transformers).
    - "yarn": fast pairs keep f, slow ones get f / factor, a ramp lies between them, and queries and keys are scaled
      (Peng et al., arXiv:2309.00071, section 3).
    - "llama3": fast pairs keep f, slow ones get f / factor, with another ramp (Llama 3.1, arXiv:2407.21783).

    Attributes:
      theta: base of the frequencies.
      dims: channels that are rotated, the first ones; None for all.
      kind: one of `KINDS`.
      interleaved: pair i is channels 2 i and 2 i + 1 (DeepSeek, GPT-J) instead of i and i + dims / 2 (Llama).
      factor: of all kinds but "default".
      original_length: positions of the training, which "dynamic", "yarn" and "llama3" need.
      beta_fast, beta_slow: of "yarn": pairs that turn more often than this in the training keep their frequency, pairs
        that turn less often are stretched.
      truncate: of "yarn": whether the ends of its ramp are whole channels.
      attention_factor: of "yarn": scales rotated queries and keys. None: as `mscale` and `mscale_all_dim` say if both
        are given, else 0.1 log(factor) + 1.
      mscale, mscale_all_dim: of "yarn".
      low_freq_factor, high_freq_factor: of "llama3": where its ramp ends.
    """

    theta: float = 10000.0
    dims: int | None = None
    kind: str = "default"
    interleaved: bool = False
    factor: float = 1.0
    original_length: int | None = None
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    truncate: bool = True
    attention_factor: float | None = None
    mscale: float | None = None
    mscale_all_dim: float | None = None
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0

    def __post_init__(self):
        if self.kind not in KINDS:
            raise ValueError(f"Rotary: kind must be one of {', '.join(KINDS)}; got {self.kind!r}.")
        if not self.theta > 0:
            raise ValueError(f"Rotary: theta must be positive; got {self.theta}.")
        if self.kind != "default" and not self.factor >= 1:
            raise ValueError(f"Rotary: factor must be at least 1; got {self.factor}.")
        if self.kind in ("dynamic", "yarn", "llama3") and not self.original_length:
            raise ValueError(f"Rotary: {self.kind} needs original_length, the positions of the training; got none.")
        if self.kind == "llama3" and not self.high_freq_factor > self.low_freq_factor:
            raise ValueError(
                "Rotary: high_freq_factor must exceed low_freq_factor; got "
                f"{self.high_freq_factor} and {self.low_freq_factor}."
            )

    @property
    def scale(self) -> float:
        """Factor on rotated queries and keys."""
        if self.kind != "yarn":
            return 1.0
        if self.attention_factor is not None:
            return self.attention_factor
        if self.mscale and self.mscale_all_dim:
            return yarn_scale(self.factor, self.mscale) / yarn_scale(self.factor, self.mscale_all_dim)
        return yarn_scale(self.factor)

    def frequencies(self, dims: int, dtype=jnp.float32, lengths: Int[Array, " b"] | None = None):
        """Returns radians a position of each pair.

        Args:
          dims: rotated channels, even.
          dtype: float32, in which published models compute them, or float64.
          lengths: [b] positions of each row, only for "dynamic"; None for rows within `original_length`.

        Returns:
          [dims / 2], or [b, dims / 2] for "dynamic" with lengths.
        """
        # In numpy, so that they are constants of the program, with the roundings of the tables that models were
        # trained on: a difference in the last bit is one of degrees at far positions.
        exponents = np.arange(0, dims, 2).astype(dtype) / dtype(dims)
        if self.kind == "dynamic" and lengths is not None:
            trained = self.original_length or 1
            stretch = self.factor * jnp.maximum(lengths, trained) / trained
            base = self.theta * (stretch - (self.factor - 1)).astype(dtype) ** (dims / (dims - 2))
            return 1.0 / base[:, None] ** exponents
        plain = (dtype(1) / dtype(self.theta) ** exponents).astype(dtype)
        if self.kind == "linear":
            return plain / dtype(self.factor)
        if self.kind == "yarn":
            kept = 1 - self._ramp(dims).astype(dtype)
            return plain / dtype(self.factor) * (1 - kept) + plain * kept
        if self.kind == "llama3":
            turns = dtype(self.original_length) * plain / dtype(2 * math.pi)
            ramp = (turns - dtype(self.low_freq_factor)) / dtype(self.high_freq_factor - self.low_freq_factor)
            kept = np.clip(ramp, 0, 1)
            return (1 - kept) * plain / dtype(self.factor) + kept * plain
        return plain

    def _ramp(self, dims: int) -> np.ndarray:
        """From 0 at pairs that keep their frequency to 1 at those that are stretched: YaRN, equations 18 and 19."""

        def pair(turns: float) -> float:
            """The (fractional) pair that turns so often within the positions of the training."""
            assert self.original_length is not None
            return dims * math.log(self.original_length / (turns * 2 * math.pi)) / (2 * math.log(self.theta))

        low, high = pair(self.beta_fast), pair(self.beta_slow)
        if self.truncate:
            low, high = math.floor(low), math.ceil(high)
        low, high = max(low, 0), min(high, dims - 1)
        return np.clip((np.arange(dims // 2) - low) / (high - low or 0.001), 0, 1)


def yarn_scale(factor: float, mscale: float = 1.0) -> float:
    """Returns YaRN's growth of the logits' scale, 0.1 mscale log(factor) + 1 (arXiv:2309.00071, equation 22)."""
    return 1.0 if factor <= 1 else 0.1 * mscale * math.log(factor) + 1.0


def rotary(
    x: Float[Array, "b t h e"],
    positions: Int[Array, "b t"] | Int[Array, " t"],
    rope: Rotary = Rotary(),
    *,
    lengths: Int[Array, " b"] | None = None,
) -> Float[Array, "b t h e"]:
    """Rotates pairs of channels by angles that grow with the position (RoPE, Su et al., arXiv:2104.09864).

    Args:
      x: [b, t, h, e].
      positions: [b, t] or [t].
      rope: frequencies, pairs and scale.
      lengths: [b] positions of each row altogether, which only "dynamic" frequencies read; None for short rows.

    Returns:
      [b, t, h, e] in the dtype of x; angles are float32 (float64 if x is).

    Raises:
      ValueError: rope.dims is odd or exceeds e.
    """
    dims = x.shape[-1] if rope.dims is None else rope.dims
    if dims % 2 or not 0 < dims <= x.shape[-1]:
        raise ValueError(f"rotary: dims must be even and at most the head's {x.shape[-1]} channels; got {dims}.")
    wide = jnp.promote_types(jnp.float32, x.dtype)
    frequencies = rope.frequencies(dims, wide.type, lengths)
    if frequencies.ndim == 2:
        frequencies = frequencies[:, None, None]
    angles = positions[..., None, None].astype(wide) * frequencies
    cos, sin = (f(angles) * wide.type(rope.scale) for f in (jnp.cos, jnp.sin))
    turned, rest = x[..., :dims].astype(wide), x[..., dims:]
    low, high = (turned[..., ::2], turned[..., 1::2]) if rope.interleaved else jnp.split(turned, 2, axis=-1)
    pair = low * cos - high * sin, high * cos + low * sin
    joined = jnp.stack(pair, -1).reshape(turned.shape) if rope.interleaved else jnp.concatenate(pair, axis=-1)
    return jnp.concatenate([joined.astype(x.dtype), rest], axis=-1)
