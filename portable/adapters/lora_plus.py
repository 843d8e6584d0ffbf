"""Learning rates by factor (LoRA+)."""

from collections.abc import Callable
from typing import Any

import jax
import optax

LABELS = ("a", "b", "magnitude", "other")


def labels(params: Any) -> Any:
    """Returns a tree like `params` (a state of AdapterParam) with each array's label: a, b, magnitude or other.

    For `optax.multi_transform`, which takes this function itself.
    """

    def one(path, _):
        parts = [str(getattr(key, "key", getattr(key, "name", key))) for key in path]
        name = next((p for p in reversed(parts) if p not in ("value", "raw_value")), "")
        return name if (name in LABELS and "adapters" in parts) or (name in LABELS and "bank" in parts) else "other"

    return jax.tree_util.tree_map_with_path(one, params)


def lora_plus(
    make: Callable[[Any], optax.GradientTransformation], learning_rate: Any, *, ratio: float = 16.0
) -> optax.GradientTransformation:
    """Returns an optimizer that gives B, which starts at zero, a larger learning rate than A (LoRA+, arXiv:2402.12354).

    Args:
      make: from a learning rate to an optimizer, such as optax.adamw.
      learning_rate: of everything but B; a number or a schedule.
      ratio: of B's to it.
    """
    rate: Any = learning_rate  # a number or a schedule
    faster: Any = (lambda step: ratio * rate(step)) if callable(learning_rate) else ratio * rate
    rates = dict.fromkeys(LABELS, learning_rate) | {"b": faster}
    return optax.multi_transform({label: make(rate) for label, rate in rates.items()}, labels)
