"""What every implementation of `attention` is given."""

import dataclasses
from typing import Any, NamedTuple

from portable.ops._attention.mods import Mod


class Arrays(NamedTuple):
    """Arrays, None where absent.

    `out` and `lse` are the results where they are known, which the backward wants: a forward without a derivative of
    JAX's own returns them as they are.
    """

    q: Any  # [b, t, h, k]
    k: Any  # [b, s, g, k]
    v: Any  # [b, s, g, v]
    sinks: Any  # [h]
    key_mask: Any  # [b, s]
    q_segments: Any  # [b, t]
    kv_segments: Any  # [b, s]
    q_positions: Any  # [b, t]
    kv_positions: Any  # [b, s]
    mask_arrays: tuple  # what mask_mod closes over
    score_arrays: tuple  # what score_mod closes over
    out: Any  # [b, t, h, v]
    lse: Any  # [b, h, t]


@dataclasses.dataclass(frozen=True)
class Rules:
    """The options. A query sees the keys of positions -left..right beside its own, None for no limit."""

    left: int | None
    right: int | None
    mask_mod: Mod | None
    score_mod: Mod | None
    soft_cap: float | None
    scale: float
