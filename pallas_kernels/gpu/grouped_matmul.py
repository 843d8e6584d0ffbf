"""`grouped_matmul` by a Triton kernel whose programs read on the device which group's rows they multiply."""

from portable.checks import Unavailable
from portable.pallas_kernels.gpu import _grouped, _launch
from portable.selection import Impl


def refuses(x, w, group_sizes) -> str | None:
    """Says in a sentence why the kernel cannot take arguments of these shapes and dtypes; None when it can."""
    del group_sizes
    if isinstance(w, tuple):
        return f"w must be one stacked array, [e, d, f]; got {len(w)} arrays."
    return _grouped.refuses(x.dtype, x.shape[0], w.shape)


def why_not(*arrays) -> str | None:
    """Returns `refuses`, or which package is not installed."""
    return refuses(*arrays) or _launch.missing("triton", "jax_triton")


def _fwd(x, w, group_sizes):
    return (_grouped.Call(group_sizes, x.shape[0], x.dtype).product(x, w),)


def fwd(*arrays):
    """See `portable.ops._grouped_matmul.reference.fwd`."""
    return _launch.mapped_in_turn(_fwd)(*arrays)


def _bwd(residuals, cotangents):
    x, w, group_sizes = residuals
    (dy,) = cotangents
    dx = _grouped.Call(group_sizes, x.shape[0], x.dtype).product(dy, w, transposed=True)
    return dx, _grouped.outer(x, dy, group_sizes, w.dtype), None


def bwd(residuals, cotangents):
    """Returns the cotangents of x and w; residuals are the arguments of `fwd`."""
    return _launch.mapped_in_turn(_bwd)(residuals, cotangents)


def interpret(part, *args):
    """Runs `fwd` or `bwd` by Triton's interpreter on the CPU; see `_launch.interpret`."""
    if reason := refuses(*(args[0] if part == "bwd" else args)):
        raise Unavailable(f"grouped_matmul: 'triton' cannot take this call: {reason}")
    return _launch.interpret(__name__, part, args, {})


IMPL = Impl(fwd=fwd, bwd=bwd, why_not=why_not, interpret=interpret)
