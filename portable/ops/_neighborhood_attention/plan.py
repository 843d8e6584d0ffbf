"""What neighborhood attention will cost, counted before anything runs: tiles, products, bytes, the bound on speedup."""

import dataclasses
import importlib
import math
from collections.abc import Sequence

from portable import selection
from portable.ops._neighborhood_attention import halo, tables
from portable.ops._neighborhood_attention.api import OP, pattern
from portable.ops._neighborhood_attention.tiles import Cut

PLAN = "neighborhood_plan"


@dataclasses.dataclass(frozen=True)
class NeighborhoodPlan:
    """How the XLA form cuts a call, and what that costs.

    Attributes:
      space, window, stride, dilation, is_causal: the pattern, one entry for each axis.
      tile: queries of a tile, for each axis.
      width: keys that a tile is given, for each axis.
      tiles: of each axis, those that pad the last step of a loop included.
      masked: whether some query does not see all keys of its tile.
      steps: of the loop over tiles.
      pairs: pairs of a query and a key that a softmax sums over, of one head and one row of the batch.
      visited: pairs whose scores are computed, likewise; those that are masked or padding included.
      flops: of the matrix products, forward: 2 * (k + v) a visited pair, head and row.
      backward_flops: of those of the backward, which computes the scores again: 2 * (3 * k + 2 * v) a pair, and 2 for
        a sum. Products with a bias's table are not counted here or above.
      dense_flops: of attention of all queries to all keys.
      copied_bytes: keys and values as tiles hold them.
      step_bytes: what one step holds: its keys, values and scores.
      moved_bytes: q, k, v read once and the result written once.
      speedup: dense_flops / flops, the bound on the speedup over dense attention where products are what costs.
      best_speedup: the same with no pair computed in vain.
    """

    space: tuple[int, ...]
    window: tuple[int, ...]
    stride: tuple[int, ...]
    dilation: tuple[int, ...]
    is_causal: tuple[bool, ...]
    tile: tuple[int, ...]
    width: tuple[int, ...]
    tiles: tuple[int, ...]
    masked: bool
    steps: int
    pairs: int
    visited: int
    flops: int
    backward_flops: int
    dense_flops: int
    copied_bytes: int
    step_bytes: int
    moved_bytes: int

    @property
    def speedup(self) -> float:
        """Bound on the speedup over dense attention."""
        return self.dense_flops / self.flops

    @property
    def best_speedup(self) -> float:
        """Bound on the speedup of any form that computes whole windows."""
        return math.prod(self.space) ** 2 / self.pairs


def neighborhood_plan(
    space: Sequence[int],
    window: int | Sequence[int],
    stride: int | Sequence[int] = 1,
    dilation: int | Sequence[int] = 1,
    is_causal: bool | Sequence[bool] = False,
    *,
    batch: int = 1,
    heads: int = 1,
    key_heads: int | None = None,
    dim: int = 64,
    value_dim: int | None = None,
    itemsize: int = 4,
    extra: int = 0,
    pad_small: bool = False,
    tile: Sequence[int] | None = None,
    platform: str = "cpu",
) -> NeighborhoodPlan:
    """Counts what `neighborhood_attention` computes, moves and holds, and how much less that is than dense attention.

    Args:
      space: positions on each of 1 to 3 axes.
      window, stride, dilation, is_causal, pad_small: as for `neighborhood_attention`.
      batch: rows of the batch.
      heads: of the queries.
      key_heads: of keys and values; `heads` unless given.
      dim: width of a query and a key.
      value_dim: width of a value; `dim` unless given.
      itemsize: bytes of a number.
      extra: keys that every query sees.
      tile: queries of a tile for each axis, instead of those that the platform's form takes.
      platform: "cpu", "tpu", "cuda" or "rocm", whose XLA form is planned.

    Returns:
      The plan; it counts exactly what the form does.

    Raises:
      ValueError: what `neighborhood_attention` refuses, sizes below 1, or an unknown platform.

    >>> import portable
    >>> plan = portable.ops.neighborhood_plan((256, 256), window=80, stride=16, platform="tpu")
    >>> plan.tile, plan.width, plan.masked, f"{plan.speedup:.2f}"
    ((16, 16), (80, 80), False, '10.24')
    """
    space = tuple(space)
    if len(space) not in (1, 2, 3):
        raise ValueError(f"{PLAN}: space must have 1 to 3 axes; got {list(space)}.")
    seen = pattern(PLAN, space, window, stride, dilation, is_causal, pad_small)
    g, v = key_heads or heads, value_dim or dim
    if min(batch, heads, g, dim, v, itemsize) < 1 or heads % g:
        raise ValueError(
            f"{PLAN}: sizes must be at least 1 and key_heads divide heads; got batch {batch}, heads {heads}, key_heads "
            f"{g}, dim {dim}, value_dim {v}, itemsize {itemsize}."
        )
    if platform not in selection.PLATFORMS:
        raise ValueError(f"{PLAN}: platform must be one of {', '.join(selection.PLATFORMS)}; got {platform!r}.")
    if tile is not None and (len(tile) != len(space) or min(tile) < 1):
        raise ValueError(f"{PLAN}: tile must hold {len(space)} sizes of at least 1; got {list(tile)}.")
    forms = selection.package(OP).XLA
    setting = importlib.import_module(
        f"{selection.package(OP).__name__}.{forms.get(platform, forms['default'])}"
    ).SETTING
    shape = (batch, *space, heads, dim)
    cuts, (share, shared) = halo.plan(shape, setting, g=g, v=v, itemsize=itemsize, tile=tile, **seen)
    groups = math.prod(seen["dilation"])
    queries = math.prod(c.padded for c in cuts)
    keys = math.prod(c.tiles.width for c in cuts)
    visited = groups * queries * keys
    each, computed = 2 * batch * heads, visited + groups * queries * extra
    n = math.prod(space)
    taken = math.prod(c.taken for c in cuts)
    rows = math.prod(c.tiles.tile for c in cuts)
    step = share * groups * taken * keys * shared * ((dim + v) * itemsize + heads // g * rows * max(4, itemsize))
    return NeighborhoodPlan(
        space=space,
        **seen,
        tile=tuple(c.tiles.tile for c in cuts),
        width=tuple(c.tiles.width for c in cuts),
        tiles=tuple(c.trips * c.taken for c in cuts),
        masked=any(c.tiles.masked for c in cuts),
        steps=math.prod(c.trips for c in cuts) * (batch // share) * (g // shared),
        pairs=math.prod(_seen(c) for c in cuts),
        visited=visited,
        flops=each * (dim + v) * computed,
        backward_flops=each * ((3 * dim + 2 * v) * computed + visited),
        dense_flops=each * (dim + v) * n * (n + extra),
        copied_bytes=batch * g * (dim + v) * itemsize * groups * math.prod(c.trips * c.taken for c in cuts) * keys,
        step_bytes=step,
        moved_bytes=batch * n * (heads + g) * (dim + v) * itemsize,
    )


def _seen(cut: Cut) -> int:
    """Returns the number of pairs of an axis: the sum over its positions of the keys that each sees."""
    axis = cut.tiles.axis
    first, end = tables.bounds(axis)
    sizes = (end - first).tolist()
    return sum(sizes[i % axis.dilation if len(sizes) > 1 else 0][i // axis.dilation] for i in range(axis.length))
