"""What a compiler expects of a function on a device that is not here."""

import dataclasses
import pathlib
import tempfile
from collections.abc import Callable
from typing import Any

import jax

from portable.parity import jobs, targets
from portable.parity.programs import Program
from portable.parity.roofline import roofline


def estimate(fn: Callable, *args: Any, target: str, timeout: float = 3600.0) -> jobs.Result:
    """Compiles `jit(fn)(*args)` for a target in a child process; returns its memory, roofline and estimated time.

    The estimate is the TPU compiler's own (see `portable.parity.cost` for what it cannot see); CUDA's gives none.

    Args:
      fn: a function of pytrees of arrays.
      *args: arrays or `jax.ShapeDtypeStruct`.
      target: a name in `portable.parity.TARGETS`, of a TPU or a CUDA device.
      timeout: seconds after which the compiler is stopped.

    Returns:
      A result with `estimated_seconds`, `roofline_seconds`, `fraction`, `temp_bytes` and `verdict`. Without an
      estimate, `uncounted` says why; without the compiler, `status` is "cannot" and `message` the sentence.

    Raises:
      ValueError: an unknown target, or one that is not compiled for.
    """
    place = targets.find(target)
    if place.family not in ("tpu", "cuda"):
        raise ValueError(f"estimate: the target must be a TPU or a CUDA device; got {target!r}.")
    with targets.capability(place):
        exported = jax.export.export(
            jax.jit(fn),
            platforms=[place.family],
            disabled_checks=[jax.export.DisabledSafetyCheck.custom_call("triton_kernel_call")],
        )(*args)
    work = roofline(place, fn, *args)
    with tempfile.TemporaryDirectory() as folder:
        file = pathlib.Path(folder) / "program"
        file.write_bytes(exported.serialize())
        job = jobs.Job(getattr(fn, "__name__", "program"), target, f"{__name__}:saved", {"file": str(file)}, timeout)
        [result] = jobs.run([job])
    known = {"flops": sum(work.flops.values()), "moved_bytes": work.bytes, "roofline_seconds": work.seconds}
    return dataclasses.replace(result, **known)


def saved(file: str) -> Program:
    """Returns the program in a file, for the child process."""
    exported = jax.export.deserialize(bytearray(pathlib.Path(file).read_bytes()))
    shapes = [jax.ShapeDtypeStruct(x.shape, x.dtype) for x in exported.in_avals]
    args, kwargs = exported.in_tree.unflatten(shapes)
    return Program(lambda *args: exported.call(*args, **kwargs), args)
