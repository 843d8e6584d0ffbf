"""The tile walk with the sizes of a processor."""

from portable.ops._grouped_matmul import tiles
from portable.selection import Impl

TILING = tiles.Tiling(
    # XLA:CPU's product has cliffs between these: 64 and 96 rows take as long as 128, 32 as long as 48.
    sizes=(512, 256, 128, 48, 24, 8, 1),
    buckets=(8, 24, 48, 64, 96, 128, 192, 256, 384, 512, 768, 1024),
    batched=100,
    guarded=True,
)


def engine(tiling: tiles.Tiling) -> Impl:
    """Returns the implementation that walks a device's tiles."""

    def fwd(x, w, group_sizes):
        """See `reference.fwd`."""
        return (tiles.matmul(x, w, group_sizes, tiling),)

    def bwd(residuals, cotangents):
        """Returns the cotangents of x and w; residuals are the arguments of `fwd`."""
        x, w, group_sizes = residuals
        (dy,) = cotangents
        dx = tiles.matmul(dy, w, group_sizes, tiling, transposed=True)
        dw = tiles.outer(x, dy, group_sizes, w[0].dtype, 0, tiling)
        return dx, tuple(dw) if isinstance(w, tuple) else dw, None

    return Impl(fwd=fwd, bwd=bwd)


IMPL = engine(TILING)
