"""A walk over tiles of rows, each through its expert's whole network, where launches cost more than rows."""

from portable.ops._grouped_matmul.xla_large_tiles import TILING
from portable.ops._moe_ffn.walk import implementation

IMPL = implementation(TILING)
