"""What the Triton kernels share: the call from JAX, the capability of an absent GPU, the interpreter on a CPU.

Neither triton nor jax_triton is imported before a kernel is called: a file that only offers one imports without them.
"""

import atexit
import contextlib
import functools
import importlib
import importlib.util
import inspect
import json
import os
import shutil
import subprocess
import sys
import tempfile
import traceback
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

from portable.checks import Unavailable

# The extra of pyproject.toml that brings each package.
_EXTRAS = {"triton": "triton", "jax_triton": "triton", "torch": "oracles"}
# Where NVIDIA's wheels for CUDA 12 and 13 hold the compiler.
_CUDA = ("cuda_nvcc", "cu13")
# Part of jit's cache key: a program lowered for one capability is not taken for another's.
_capability = jax.make_user_context(None)


class Config(NamedTuple):
    """How a kernel is cut: columns of a block of p and of n, warps of a program, stages of a loop's loads."""

    block_p: int
    block_n: int
    warps: int
    stages: int


@contextlib.contextmanager
def capability(number: int) -> Iterator[None]:
    """Compiles kernels lowered inside the context for a compute capability (90 is 9.0), asking no device.

    Without it the GPU of the process is asked; one that has none cannot lower a kernel.

        with capability(90):
            lowered = jax.jit(f).trace(x).lower(lowering_platforms=("cuda",))
    """
    with _capability(number):
        yield


def missing(*packages: str) -> str | None:
    """Says in a sentence which of the packages is not installed; None when all are. Imports none of them."""
    for package in packages:
        if importlib.util.find_spec(package) is None:
            return f"it needs the package {package}: pip install 'portable-jax[{_EXTRAS[package]}]'."
    return None


def call(
    kernel: Any,
    inputs: Sequence[jax.Array],
    outputs: Sequence[jax.ShapeDtypeStruct],
    grid: tuple[int, ...],
    *,
    config: Config,
    **constants: Any,
) -> tuple[jax.Array, ...]:
    """Runs a `@triton.jit` kernel on the GPU, or in the interpreter inside the child process of `interpret`.

    Args:
      kernel: its parameters are pointers to `inputs`, pointers to `outputs`, then constants.
      inputs: arrays.
      outputs: shapes and dtypes of the results; the kernel writes every element.
      grid: number of programs along each axis.
      config: warps and stages.
      **constants: its `tl.constexpr` parameters by name.

    Raises:
      Unavailable: jax_triton cannot be imported.
    """
    if _interpreting:
        return _interpreted(kernel, inputs, outputs, grid, constants)
    try:
        import jax_triton
    except ImportError as fault:
        # It also refuses a jax without the CUDA plugin, in words of its own.
        reason = missing("jax_triton") or f"jax_triton cannot be imported: {fault}"
        raise Unavailable(f"a Triton kernel cannot be lowered: {reason}") from fault
    _match_assembler()
    # Renamed in jax-triton 0.4.
    results = "out_type" if "out_type" in inspect.signature(jax_triton.triton_call).parameters else "out_shape"
    options: dict[str, Any] = {
        "kernel": kernel,
        "grid": grid,
        results: list(outputs),
        "num_warps": config.warps,
        "num_stages": config.stages,
        "compute_capability": _known_capability(),
    }
    return tuple(jax_triton.triton_call(*inputs, **options, **constants))


def _known_capability() -> int | None:
    if _capability.value is None:
        try:
            jax.devices("cuda")
        except RuntimeError:
            raise Unavailable(
                "a Triton kernel is compiled for one compute capability, and this process has no GPU to ask; name it, "
                "as in portable.export(..., capability=90)."
            ) from None
    return _capability.value


def _match_assembler() -> None:
    """Has Triton write PTX for the ptxas of jax, which assembles it. Its own may be newer, and so is then the PTX."""
    spec = importlib.util.find_spec("nvidia")
    wheels = [Path(home) / folder for home in (spec and spec.submodule_search_locations) or () for folder in _CUDA]
    found = [path for wheel in wheels if (path := wheel / "bin" / "ptxas").exists()] or [shutil.which("ptxas")]
    if found[0]:
        for variable in ("TRITON_PTXAS_PATH", "TRITON_PTXAS_BLACKWELL_PATH"):
            os.environ.setdefault(variable, str(found[0]))


def batchable(fn: Callable) -> Callable:
    """Gives a function of arrays whose first axis is a batch a rule for vmap: the new axis joins the batch.

    A call of a Triton kernel has no batching rule of its own. Arguments and results are pytrees of arrays; the first
    axis of every array is the batch.
    """
    rule = jax.custom_batching.custom_vmap(fn)

    @rule.def_vmap
    def _(size, batched, *args):
        def fold(x, mapped):
            x = x if mapped else jax.numpy.broadcast_to(x, (size, *x.shape))
            return x.reshape(size * x.shape[1], *x.shape[2:])

        out = rule(*jax.tree.map(fold, args, tuple(batched)))
        return jax.tree.map(lambda x: x.reshape(size, -1, *x.shape[1:]), out), jax.tree.map(lambda _: True, out)

    # The interpreter wants arrays, and the rule traces.
    return fn if _interpreting else rule


def mapped_in_turn(fn: Callable) -> Callable:
    """Gives a function of arrays that share no axis a rule for vmap: its calls follow each other."""
    return fn if _interpreting else jax.custom_batching.sequential_vmap(fn)


# The interpreter. Triton decides when a kernel is decorated whether it is interpreted, so that happens in a process
# of its own, which runs the host's code unchanged: only `call` differs.

_interpreting = False


def interpret(module: str, part: str, args: tuple, options: dict[str, Any]) -> tuple:
    """Runs `IMPL.fwd` or `IMPL.bwd` of a module of kernels in a child process, its kernels by Triton's interpreter.

    Args:
      module: the module's name; it exports `IMPL`.
      part: "fwd" or "bwd".
      args: positional arguments, nested tuples of arrays and None.
      options: keyword arguments that JSON can hold.

    Returns:
      A tuple of numpy arrays, None where there is none. What a kernel left unwritten is NaN.

    Raises:
      Unavailable: triton or torch is not installed, or the implementation says so.
      RuntimeError: the child failed; the message is its traceback.
    """
    if reason := missing("triton", "torch"):
        raise Unavailable(f"the interpreter of Triton kernels cannot run: {reason}")
    with tempfile.TemporaryDirectory() as folder:
        job = {"module": module, "part": part, "options": options, "folder": folder}
        _store(Path(folder) / "in", args)
        answer = _ask(json.dumps(job))
        if "unavailable" in answer:
            raise Unavailable(answer["unavailable"])
        if "error" in answer:
            raise RuntimeError(f"the interpreter's process failed.\n{answer['error']}")
        return _fetch(Path(folder) / "out")


def _store(path: Path, tree: tuple) -> None:
    """Writes nested tuples of arrays and None: the numbers to <path>.npz, all as integers, the rest to <path>.json.

    .npz knows no bfloat16.
    """
    leaves = [np.ascontiguousarray(x) for x in jax.tree.leaves(tree)]
    np.savez(path.with_suffix(".npz"), *[x.view(f"u{x.dtype.itemsize}") for x in leaves])
    form = jax.tree.unflatten(jax.tree.structure(tree), range(len(leaves)))
    path.with_suffix(".json").write_text(json.dumps({"form": form, "dtypes": [x.dtype.name for x in leaves]}))


def _fetch(path: Path) -> tuple:
    """Reads what `_store` wrote, as numpy arrays."""
    found = json.loads(path.with_suffix(".json").read_text())
    with np.load(path.with_suffix(".npz")) as file:
        leaves = [file[f"arr_{i}"].view(jax.numpy.dtype(dtype)) for i, dtype in enumerate(found["dtypes"])]

    def build(form) -> Any:
        return None if form is None else leaves[form] if isinstance(form, int) else tuple(map(build, form))

    return build(found["form"])


def _ask(job: str) -> dict[str, str]:
    child = _child()
    try:
        child.stdin.write(job + "\n")
        child.stdin.flush()
        line = child.stdout.readline()
    except BrokenPipeError:
        line = ""
    if not line:
        stop()
        return {"error": f"it ended with exit code {child.returncode}."}
    return json.loads(line)


@functools.cache
def _child() -> Any:
    """Starts the process that interprets; it stays for the next call, because its imports are what takes time."""
    env = os.environ | {"TRITON_INTERPRET": "1", "JAX_PLATFORMS": "cpu"}
    env["PYTHONPATH"] = os.pathsep.join(p for p in sys.path if p)  # what this process can import, the child can
    code = f"from {__name__} import serve; serve()"
    pipe = subprocess.PIPE
    child = subprocess.Popen([sys.executable, "-P", "-c", code], stdin=pipe, stdout=pipe, text=True, env=env)
    atexit.register(stop)
    return child


def stop() -> None:
    """Ends the process that interprets, if there is one; the next call starts another."""
    if _child.cache_info().currsize:
        _child().communicate()
        _child.cache_clear()


def serve() -> None:
    """The child process: answers one job a line until the input ends."""
    global _interpreting
    _interpreting = True
    _mend_bfloat16()
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)  # what a library prints must not end up among the answers
    for line in sys.stdin:
        job = json.loads(line)
        answer = {}
        try:
            folder = Path(job["folder"])
            run = getattr(importlib.import_module(job["module"]).IMPL, job["part"])
            _store(folder / "out", run(*_fetch(folder / "in"), **job["options"]))
        except Unavailable as fault:
            answer = {"unavailable": str(fault)}
        except Exception:  # noqa: BLE001 - whatever it is, the parent raises it
            answer = {"error": traceback.format_exc()}
        print(json.dumps(answer), file=answers, flush=True)


def _mend_bfloat16() -> None:
    """Gives the interpreter the GPU's bfloat16: its own products take the bits for integers, its casts cut them off."""
    from triton import language as tl
    from triton.runtime import interpreter

    builder, handle = interpreter.InterpreterBuilder, interpreter.TensorHandle
    cast, dot = builder.cast_impl, builder.create_dot

    def rounding_cast(self, src, dst_type):
        match src.dtype.scalar, dst_type.scalar:
            case tl.float32, tl.bfloat16:
                return handle(src.data.astype(jax.numpy.bfloat16).view(np.uint16), tl.bfloat16)
            case tl.bfloat16, tl.float32:
                return handle(src.data.view(jax.numpy.bfloat16).astype(np.float32), tl.float32)
        return cast(self, src, dst_type)

    def float_dot(self, a, b, *rest):
        # Products of two bfloat16 are exact in float32, where the GPU adds them up as well.
        wide = [rounding_cast(self, x, tl.float32) if x.dtype.scalar == tl.bfloat16 else x for x in (a, b)]
        return dot(self, *wide, *rest)

    for name, mended in (("cast_impl", rounding_cast), ("create_dot", float_dot)):
        setattr(builder, name, mended)


def _interpreted(kernel, inputs, outputs, grid, constants) -> tuple[jax.Array, ...]:
    """Runs a kernel decorated under TRITON_INTERPRET=1 on torch tensors; results start as NaN.

    Each array has margins. What is read there is NaN and shows in the results; what is written there raises IndexError.
    """
    import torch

    size = 4096

    def tensor(x, margin):
        around = np.full(x.size + 2 * size, margin, x.dtype)
        around[size:-size] = x.ravel()
        half = x.dtype == jax.numpy.bfloat16
        whole = torch.from_numpy(around.view(np.int16)).view(torch.bfloat16) if half else torch.from_numpy(around)
        return around, whole[size:-size]

    given = [tensor(x, np.nan if jax.numpy.issubdtype(x.dtype, np.inexact) else -1) for x in map(np.asarray, inputs)]
    results = [tensor(np.full(o.shape, np.nan, o.dtype), -77) for o in outputs]
    kernel[grid](*[view for _, view in (*given, *results)], **constants)
    for i, (around, _) in enumerate(results):
        if not (np.concatenate([around[:size], around[-size:]]) == -77).all():
            raise IndexError(f"{kernel.__name__} wrote outside its result {i}.")
    found = [around[size:-size].reshape(o.shape) for (around, _), o in zip(results, outputs, strict=True)]
    return tuple(map(jax.numpy.asarray, found))
