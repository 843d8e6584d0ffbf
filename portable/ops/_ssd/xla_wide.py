"""`xla_chunks` in chunks of 256: the form of TPUs, whose matrix units are that wide, or half."""

from portable.ops._ssd import xla_chunks
from portable.selection import Impl

DEFAULT_CHUNK = 256


def fwd(*arrays, chunk_size):
    """See `xla_chunks.fwd`."""
    return xla_chunks.fwd(*arrays, chunk_size=chunk_size or DEFAULT_CHUNK)


def bwd(residuals, cotangents, *, chunk_size):
    """See `xla_chunks.bwd`."""
    return xla_chunks.bwd(residuals, cotangents, chunk_size=chunk_size or DEFAULT_CHUNK)


IMPL = Impl(fwd=fwd, bwd=bwd)
