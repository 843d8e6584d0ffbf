"""The least time a program can take: its matrix products at the device's peak, or its arrays read and written once."""

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import jax
import numpy as np

from portable import selection
from portable.parity.targets import Target


@dataclasses.dataclass(frozen=True)
class Roofline:
    """What a program must compute and move.

    Attributes:
      flops: of its matrix products and convolutions, a loop's body as often as it runs, by the dtype of the operands.
      bytes: arguments read once and results written once (a donated argument that comes back: both).
      seconds: the larger of the two times on the device; None where its peaks are not known.
    """

    flops: dict[str, float]
    bytes: int
    seconds: float | None


def roofline(target: Target, fn: Callable, *args: Any) -> Roofline:
    """Returns the roofline of `fn(*args)` on a target; the arrays may be `jax.ShapeDtypeStruct`.

    Ops of portable count as their default XLA form, whichever implementation is compiled: the roofline is that of the
    work, not of the way it is done, and a platform's form may compute more to compute it faster. An op whose default
    form is as long as its data ask for counts as another one (`selection.counting`).
    """
    with selection.counting():
        closed, out = jax.make_jaxpr(fn, return_shape=True)(*args)
    flops: dict[str, float] = {}
    _add(closed.jaxpr, 1, flops)
    moved = sum(math.prod(x.shape) * x.dtype.itemsize for x in jax.tree.leaves((args, out)))
    if target.bandwidth is None:
        return Roofline(flops, moved, None)
    compute = sum(n / target.peak(dtype) for dtype, n in flops.items())
    return Roofline(flops, moved, max(compute, moved / target.bandwidth))


def _add(jaxpr: Any, times: float, flops: dict[str, float]) -> None:
    for eqn in jaxpr.eqns:
        name, params = eqn.primitive.name, eqn.params
        if name in ("dot_general", "conv_general_dilated", "ragged_dot_general"):
            dtype = str(np.result_type(*[x.aval.dtype for x in eqn.invars[:2]]))
            flops[dtype] = flops.get(dtype, 0) + times * _product(eqn)
        elif name == "portable":
            inner = jax.make_jaxpr(params["rules"].forms.function("default"))(*[x.aval for x in eqn.invars])
            _add(inner.jaxpr, times, flops)
        elif name == "while":
            inner = {}
            _add(params["body_jaxpr"].jaxpr, 1, inner)
            if inner:
                raise ValueError("how often a while loop with matrix products runs is not known; use scan.")
        elif name == "cond":
            branches = []
            for branch in params["branches"]:
                found: dict[str, float] = {}
                _add(branch.jaxpr, times, found)
                branches.append(found)
            largest = max(branches, key=lambda b: sum(b.values()))
            for dtype, n in largest.items():
                flops[dtype] = flops.get(dtype, 0) + n
        else:
            inside = times * params["length"] if name == "scan" else times
            for inner in jax.tree.leaves(list(params.values()), is_leaf=_is_jaxpr):
                if _is_jaxpr(inner):
                    _add(getattr(inner, "jaxpr", inner), inside, flops)


def _is_jaxpr(x: Any) -> bool:
    return hasattr(x, "eqns") or hasattr(x, "jaxpr")


def _product(eqn: Any) -> float:
    left, right = (x.aval.shape for x in eqn.invars[:2])
    if eqn.primitive.name == "ragged_dot_general":
        numbers = eqn.params["ragged_dot_dimension_numbers"]
        (_, contracted), (_, batch) = numbers.dot_dimension_numbers
        shared = {*contracted, *batch, *numbers.rhs_group_dimensions}
        return 2.0 * math.prod(left) * math.prod(n for i, n in enumerate(right) if i not in shared)
    size = math.prod(eqn.outvars[0].aval.shape)
    if eqn.primitive.name == "dot_general":
        (contracted, _), _ = eqn.params["dimension_numbers"]
        return 2.0 * size * math.prod(left[i] for i in contracted)
    spec = eqn.params["dimension_numbers"].rhs_spec  # (out channels, in channels, *space)
    return 2.0 * size * math.prod(right[i] for i in spec[1:])
