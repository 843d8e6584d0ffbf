"""The tile walk with sizes for a device whose launches cost more than rows."""

from portable.ops._grouped_matmul.xla_small_tiles import engine

SIZES = (512, 128, 32)
BUCKETS = (32, 128, 512, 1024)

IMPL = engine(SIZES, BUCKETS)
