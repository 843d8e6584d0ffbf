"""A walk over tiles of rows, each through its expert's whole network, with the sizes of a processor."""

from portable.ops._grouped_matmul.xla_small_tiles import TILING
from portable.ops._moe_ffn.walk import implementation

IMPL = implementation(TILING)
