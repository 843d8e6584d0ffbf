"""The tile walk with sizes for a device whose launches cost more than rows."""

from portable.ops._grouped_matmul.tiles import Tiling
from portable.ops._grouped_matmul.xla_small_tiles import engine

# One batched launch takes the place of as many as there are groups.
TILING = Tiling(sizes=(512, 128, 32), buckets=(32, 128, 512, 1024), batched=1024, guarded=False)

IMPL = engine(TILING)
