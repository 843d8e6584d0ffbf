"""One adapter of one weight: a low-rank update, with magnitudes or without."""

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from portable import ops
from portable.adapters.config import DoRAConfig, LoRAConfig
from portable.adapters.variables import AdapterCache, AdapterParam


class LowRank(nnx.Module):
    """A update of a weight [*e, d, o], its contracted axes as d and its others as o; leading axes are separate weights.

    Attributes:
      a, b: AdapterParam [*e, d, r] and [*e, r, o]. magnitude: AdapterParam [*e, o], or None (LoRA).
      squares: AdapterCache [*e, o], sums of the frozen weight's squares, or None.
      norms: AdapterCache [*e, o], of the updated weight as `portable.adapters.refresh` left it, or None.
      key: AdapterCache, of the dropout of this call, or None.
      config: of the adapter. scale: of the update. ids: whether a leading axis counts adapters, which rows choose.
    """

    def __init__(self, config: LoRAConfig, a, b, magnitude, squares, *, scale: float, axes: tuple = (), ids=False):
        """Args:
        config: LoRAConfig or DoRAConfig. a, b, magnitude, squares: arrays as above.
        scale: of the update. axes: logical axes (*e, d, o) of the weight, or (). ids: see above.
        """
        lead, last = (axes[:-2], axes[-2:]) if axes else ((), (None, None))
        self.a = AdapterParam(a, axes=(*lead, last[0], None))
        self.b = AdapterParam(b, axes=(*lead, None, last[1]))
        over = (*lead, last[1])
        self.magnitude = nnx.data(None if magnitude is None else AdapterParam(magnitude, axes=over))
        self.squares = nnx.data(None if squares is None else AdapterCache(squares, axes=over))
        self.norms: Any = nnx.data(None)
        self.key: Any = nnx.data(None)
        self.config, self.scale, self.ids = config, scale, ids

    @property
    def rank(self) -> int:
        """Columns of a."""
        return self.a.get_value().shape[-1]

    def norm(self, w, shards: int = 1):
        """Returns the updated weight's norms [*e, o], or None without magnitudes; w is [*e, d, o]."""
        if self.magnitude is None:
            return None
        form = {"auto": None, "dense": "xla_dense", "factored": "xla_factored"}[self.config.norm]  # pyright: ignore
        squares = None if self.config.norm == "dense" else value(self.squares)  # pyright: ignore
        a, b = value(self.a), value(self.b)
        options = {"scale": self.scale, "shards": shards, "implementation": form}
        return ops.dora_norm(w, a, b, squares=squares, **options)

    def gain(self, w):
        """Returns what multiplies the output channels, [*e, o] float32, or None without magnitudes."""
        if self.magnitude is None:
            return None
        n: Any = self.norm(w) if self.norms is None else value(self.norms)
        return self._gain(n)

    def _gain(self, n):
        n = jax.lax.stop_gradient(n) if self.detached else n
        positive = ~(n <= 0)  # a NaN is not hidden
        return jnp.where(positive, value(self.magnitude).astype(n.dtype) / jnp.where(positive, n, 1), 0)

    @property
    def detached(self) -> bool:
        """Whether the norm is a constant in gradients."""
        return not isinstance(self.config, DoRAConfig) or self.config.detach

    def updated(self, w, *, cached: bool = False):
        """Returns the weight [*e, d, o] with the update, in float32 or wider; `cached` takes norms that are kept."""
        wide = jnp.promote_types(jnp.float32, w.dtype)
        a, b = (value(v).astype(wide) for v in (self.a, self.b))
        w = w.astype(wide) + self.scale * jnp.matmul(a, b, precision=jax.lax.Precision.HIGHEST)
        if self.magnitude is None:
            return w
        # Of this very sum: what is merged has the magnitudes as its norms, to the last digit.
        n = value(self.norms) if cached and self.norms is not None else jnp.sqrt(jnp.sum(w * w, axis=-2))
        return self._gain(n.astype(wide))[..., None, :] * w

    def linear(self, x, w, bias=None, *, ids=None, group_sizes=None, out_dtype=None, key: Any = None):
        """Returns the adapted layer's output, `portable.ops.dora_linear` or `lora_linear` with this adapter."""
        config: Any = self.config
        key = value(self.key) if key is None else key
        options: dict[str, Any] = {"bias": bias, "ids": ids, "group_sizes": group_sizes, "out_dtype": out_dtype}
        options |= {"scale": self.scale, "key": key, "dropout": config.dropout if key is not None else 0.0}
        a, b = value(self.a), value(self.b)
        if self.magnitude is None:
            return ops.lora_linear(x, w, a, b, **options)
        # The norm is that of the weight as it is stored: that of its narrower copy for this product may round.
        return ops.dora_linear(
            x,
            w,
            a,
            b,
            value(self.magnitude),
            norms=value(self.norms),
            squares=value(self.squares),
            norm=config.norm,
            detach=config.detach,
            dropout_mode=config.dropout_mode,
            **options,
        )

    def refresh(self, w, shards: int = 1) -> None:
        """Keeps the updated weight's norms for the calls to come."""
        if self.magnitude is not None and self.detached:
            self.norms = AdapterCache(self.norm(w, shards), axes=self.magnitude.get_metadata().get("axes", ()))


def value(variable: Any) -> Any:
    """Returns a variable's array; None of None."""
    return None if variable is None else variable.get_value()
