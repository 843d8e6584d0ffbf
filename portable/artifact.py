"""One compiled-anywhere program in a file: `portable.export` and `portable.load_export`."""

import contextlib
import importlib
import os
import pathlib
from collections.abc import Callable, Sequence
from typing import Any

import jax
from jax import export as jax_export

from portable import files, selection
from portable.checks import PortableError

# Custom calls whose stability JAX does not promise: a file that holds them belongs with this version of JAX.
_KERNELS = ("triton_kernel_call",)


def export(
    fn: Callable,
    args: Sequence[Any],
    *,
    platforms: Sequence[str] = ("cpu", "cuda", "tpu"),
    implementation: str | None = None,
    capability: int | None = None,
    file: str | os.PathLike | None = None,
) -> jax_export.Exported:
    """Lowers `fn(*args)` once for several platforms; each gets its own implementation of every op.

    Args:
      fn: a function of pytrees of arrays. What it closes over, weights too, becomes part of the program.
      args: example arguments; arrays or `jax.ShapeDtypeStruct`.
      platforms: of `portable.selection.PLATFORMS`.
      implementation: as for `portable.using`: None for what each platform gets by itself, "kernels" for each platform's
        hand-written kernels, "xla" for a program without any.
      capability: compute capability of the CUDA devices, 90 for 9.0, for which Triton kernels are compiled; None asks
        the GPU of this process.
      file: where to save it; needs flatbuffers (`pip install 'portable-jax[aot]'`).

    Returns:
      The exported program: `.call(*args)` runs it on any of the platforms, `.platforms` and `.mlir_module()` tell what
      it holds.

    Raises:
      PortableError: an unknown platform, nothing to save with, or a file that cannot be written.
      Unavailable: the named implementation cannot take the call or runs on none of the platforms, or a Triton kernel
        is asked for without a GPU and without `capability`.

    >>> import jax.numpy as jnp, portable
    >>> program = portable.export(lambda x: portable.ops.rms_norm(x, x[0]), [jnp.ones([2, 4])])
    >>> program.platforms
    ('cpu', 'cuda', 'tpu')
    """
    if isinstance(platforms, str):
        raise PortableError(f"export: platforms must be a sequence of names; got {platforms!r}.")
    if unknown := [p for p in platforms if p not in selection.PLATFORMS]:
        known = ", ".join(selection.PLATFORMS)
        raise PortableError(f"export: platforms must be of {known}; got {unknown[0]!r}.")
    if capability is not None and (not isinstance(capability, int) or capability < 75):
        raise PortableError(f"export: capability must be an integer of at least 75, as 90 for 9.0; got {capability!r}.")
    if not platforms:
        raise PortableError("export: name at least one platform; got none.")
    checks = [jax_export.DisabledSafetyCheck.custom_call(name) for name in _KERNELS]
    with contextlib.ExitStack() as stack:
        if implementation:
            stack.enter_context(selection.using(implementation))
        if capability is not None:
            launch = importlib.import_module("portable.pallas_kernels.gpu._launch")
            stack.enter_context(launch.capability(capability))
        done = jax_export.export(jax.jit(fn), platforms=list(platforms), disabled_checks=checks)(*args)
    if file is not None:
        _save(done, pathlib.Path(file))
    return done


def load_export(file: str | os.PathLike) -> jax_export.Exported:
    """Reads a program that `export` saved.

    Raises:
      PortableError: there is no such file, or it does not hold an exported program.
    """
    file = pathlib.Path(file)
    try:
        return jax_export.deserialize(bytearray(file.read_bytes()))
    except OSError as fault:
        raise PortableError(f"export: {file} cannot be read: {fault.strerror}.") from None
    except ImportError as fault:
        raise PortableError(_needs_flatbuffers()) from fault
    except Exception as fault:  # the reader of the format raises whatever a wrong offset leads to
        raise PortableError(
            f"export: {file} does not hold a program that portable.export saved, or one that this version of JAX "
            f"({jax.__version__}) can read: {type(fault).__name__}."
        ) from fault


def _save(done: jax_export.Exported, file: pathlib.Path) -> None:
    try:
        data = done.serialize()
    except ImportError as fault:
        raise PortableError(_needs_flatbuffers()) from fault
    try:
        files.replace(file, data)
    except OSError as fault:
        raise PortableError(f"export: {file} cannot be written: {fault.strerror}.") from None


def _needs_flatbuffers() -> str:
    return "export: a saved program needs the package flatbuffers: pip install 'portable-jax[aot]'."
