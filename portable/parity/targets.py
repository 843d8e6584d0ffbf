"""The devices that programs are compiled for, whether this machine has them or not.

A compiler for a device does not need the device: libtpu compiles for any TPU by its topology's name, and
XLA's CUDA compiler for any GPU by a description of its limits. Both want the environment of
`environment(family)` before jax is imported, which is why `portable.parity.run` compiles in child processes.
"""

import contextlib
import dataclasses
import functools
import importlib.resources
import importlib.util
import math
import os
import pathlib
import re
import subprocess
import sys
from collections.abc import Callable, Sequence
from importlib import metadata
from typing import Any

import jax

INSTALL = "pip install 'portable-jax[aot]'"

# Set by a shell for its own programs; a verdict about a device must not depend on them.
_FOREIGN = ("JAX_", "XLA_", "TPU_", "LIBTPU_", "TF_XLA_")


@dataclasses.dataclass(frozen=True)
class Target:
    """One device that programs are compiled for.

    Attributes:
      name: what users call it.
      family: the compiler: "cpu", "tpu", "cuda" or "rocm"; "device" for the accelerator of this machine, which runs.
      topology: a libtpu topology name, or the name of a description in `data/`; "" for this process's devices.
      memory_bytes: memory that the compiler lets one program use (TPU) or that the driver reports (CUDA); None where it
        is the machine's.
      device: which product that is.
      bandwidth: of the memory, in bytes/s; None where nobody knows.
      flops: peak of matrix products in FLOP/s: of bfloat16 operands, and of float32 ones at JAX's default precision
        (one bfloat16 pass on a TPU, TF32 on a GPU that has it).
      clock: Hz of the cycles that a TPU's compiler counts.
    """

    name: str
    family: str
    topology: str = ""
    memory_bytes: int | None = None
    device: str = ""
    bandwidth: float | None = None
    flops: tuple[float, float] = (math.inf, math.inf)
    clock: float | None = None

    def peak(self, dtype: str) -> float:
        """Returns the peak of matrix products with operands of a dtype, in FLOP/s."""
        return self.flops[0] if dtype in ("bfloat16", "float16") else self.flops[1]


def _tpu(name: str, topology: str, gib: float, bandwidth: float, tflops: float, ghz: float, device: str) -> Target:
    peak = tflops * 1e12
    return Target(name, "tpu", topology, int(gib * 2**30), device, bandwidth * 1e9, (peak, peak), ghz * 1e9)


def _cuda(name: str, description: str, half: float, single: float) -> Target:
    text = _description(description)
    found = {}
    for key in ("device_memory_size", "memory_bandwidth"):
        match = re.search(rf"^\s*{key}:\s*(\d+)", text, re.MULTILINE)
        if match is None:
            raise ValueError(f"the target description {description}.txtpb must state {key}.")
        found[key] = int(match[1])
    device = re.search(r'^device_description_str: "([^"]+)"', text, re.MULTILINE)
    return Target(
        name,
        "cuda",
        description,
        found["device_memory_size"],
        device[1] if device else description,
        float(found["memory_bandwidth"]),
        (half * 1e12, single * 1e12),
    )


def description(target: Target) -> str:
    """Returns what the compiler is told of the device: a topology's name or a description."""
    return _description(target.topology) if target.family == "cuda" else target.topology


def _description(name: str) -> str:
    file = importlib.resources.files("portable.parity") / "data" / f"{name}.txtpb"
    return file.read_text(encoding="utf-8")


# Memory of the TPUs: "available HBM" in libtpu 0.0.42's own message about a program that is too big. Bandwidth in GB/s
# and TFLOP/s: Google Cloud's pages on TPU versions. Clock: the peak over the FLOPs of the chip's matrix units a cycle.
# TFLOP/s of the GPUs, dense, in bfloat16 (float16 on the T4) with float32 sums, and in TF32 (float32 on the T4):
# NVIDIA's data sheets and architecture white papers.
TARGETS: dict[str, Target] = {
    t.name: t
    for t in (
        Target("cpu", "cpu", device="this machine"),
        Target("device", "device", device="the accelerator of this machine"),
        _tpu("tpu-v4", "v4:2x2x1", 15.25, 614, 137.5, 1.05, "one of the two cores of a TPU v4 chip"),
        _tpu("tpu-v5e", "v5e:2x2", 15.75, 819, 197, 1.5, "TPU v5e chip"),
        _tpu("tpu-v5p", "v5p:2x2x1", 95.74, 2765, 459, 1.75, "TPU v5p chip"),
        _tpu("tpu-v6e", "v6e:2x2", 31.25, 1640, 918, 1.75, "TPU v6e chip"),
        _tpu("tpu-7x", "tpu7x:2x2x1", 94.75, 3690, 1153, 2.2, "one of the two cores of a TPU7x chip"),
        _cuda("cuda-sm75", "sm_75", 65, 8.1),
        _cuda("cuda-sm80", "sm_80", 312, 156),
        _cuda("cuda-sm86", "sm_86", 154.8, 77.4),
        _cuda("cuda-sm89", "sm_89", 165.2, 82.6),
        _cuda("cuda-sm90", "sm_90", 989.4, 494.7),
        _cuda("cuda-sm100", "sm_100", 2250, 1125),
        Target("rocm-gfx942", "rocm", device="AMD Instinct MI300X"),
    )
}


def find(name: str) -> Target:
    """Returns the target of that name.

    Raises:
      ValueError: there is none; the message lists those there are.
    """
    if name not in TARGETS:
        raise ValueError(f"there is no target called {name!r}; there are: {', '.join(TARGETS)}.")
    return TARGETS[name]


def missing(family: str) -> str | None:
    """Says in a sentence why programs of a family cannot be compiled here; None when they can.

    Looks for packages without importing them, so it may be asked in any process.
    """
    if family in ("cpu", "rocm"):  # for ROCm, programs are lowered and no more
        return None
    if family == "device":
        return None if accelerator() else "this machine has no accelerator that JAX sees."
    if family == "tpu":
        if importlib.util.find_spec("libtpu") is None:
            return f"compiling for a TPU needs the package libtpu: {INSTALL}."
        have, want = _version("libtpu"), _wanted_libtpu()
        if have and want and not have.startswith(want):
            # Other versions compile simple programs and fail larger ones with errors of their own.
            return f"jax {jax.__version__} is made for libtpu {want}*, got {have}: {INSTALL}."
        return None
    plugin = _cuda_plugin()
    if plugin is None:
        return f"compiling for a CUDA device needs the package jax-cuda12-plugin: {INSTALL}."
    have, want = _version(f"jax-{plugin.removeprefix('xla_')}-plugin"), _version("jaxlib")
    if have != want:
        return f"the CUDA plugin must have jaxlib's version {want}, got {have}: {INSTALL}."
    if _cuda_tools() is None and not os.path.isdir("/usr/local/cuda/nvvm/libdevice"):
        return f"compiling for a CUDA device needs the package nvidia-cuda-nvcc-cu12 (ptxas): {INSTALL}."
    return None


@functools.cache
def accelerator() -> str | None:
    """Returns the platform of the accelerator that JAX finds on this machine: "cuda", "rocm", "tpu", or None.

    Another process looks, because a TPU belongs to the first process that does.
    """
    if os.environ.get("JAX_PLATFORMS") == "cpu":
        return None
    script = "import jax; print(jax.default_backend())"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    found = done.stdout.strip().rpartition("\n")[2]
    return {"gpu": "cuda", "cpu": None, "": None}.get(found, found)


def capability(target: Target) -> contextlib.AbstractContextManager:
    """Lowers Triton kernels for a target; their compiler otherwise asks the GPU of the process what it is."""
    if target.family != "cuda":
        return contextlib.nullcontext()
    launch = importlib.import_module("portable.pallas_kernels.gpu._launch")
    return launch.capability(int(target.topology.removeprefix("sm_")))


def environment(family: str) -> dict[str, str]:
    """Returns this process's variables, jax's replaced by those of a process that compiles for a family."""
    if family == "device":
        paths = os.pathsep.join(p for p in sys.path if p)
        return os.environ | {"PYTHONPATH": paths, "XLA_PYTHON_CLIENT_PREALLOCATE": "false"}
    env = {k: v for k, v in os.environ.items() if not k.startswith(_FOREIGN)}
    env |= {
        "JAX_PLATFORMS": "cpu",
        "JAX_ENABLE_COMPILATION_CACHE": "false",
        # What this process can import, the child can.
        "PYTHONPATH": os.pathsep.join(p for p in sys.path if p),
    }
    if family == "tpu":
        env |= {
            "TPU_SKIP_MDS_QUERY": "1",  # no question to a cloud's metadata server
            "TPU_WORKER_HOSTNAMES": "localhost",
            "TPU_ACCELERATOR_TYPE": "v5litepod-4",
            "TPU_LOG_DIR": "disabled",
            # libtpu otherwise locks a file, and a second process that compiles is turned away.
            "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
        }
    if family == "cuda":
        env["JAX_SKIP_CUDA_CONSTRAINTS_CHECK"] = "1"
        if (tools := _cuda_tools()) is not None:
            env["XLA_FLAGS"] = f"--xla_gpu_cuda_data_dir={tools}"
    return env


@functools.cache
def device(target: Target) -> Any:
    """Returns a jax device of the target, which can be compiled for and may not exist.

    Raises:
      jax.errors.JaxRuntimeError: the compiler does not know the topology or cannot read the description.
    """
    from jax.experimental import topologies

    here = jax.devices("cpu")[0]  # also registers the plugins
    if target.family == "cpu":
        return here
    if target.family == "tpu":
        return topologies.get_topology_desc(platform="tpu", topology_name=target.topology).devices[0]
    return topologies.get_topology_desc(
        platform="cuda", topology_name="", target_config=description(target), topology="1x1x1"
    ).devices[0]


def lower_for(
    target: Target | str, fn: Callable, *args: Any, donate_argnums: int | Sequence[int] = ()
) -> jax.stages.Lowered:
    """Lowers `jit(fn)(*args)` for one device of a target, in a process with `environment(target.family)`.

    Args:
      target: a target or its name.
      fn: the function to jit.
      *args: pytrees of arrays or `jax.ShapeDtypeStruct`; those without a sharding are put on the target's
        device.
      donate_argnums: as in `jax.jit`.

    Raises:
      ValueError: no argument holds an array, so that nothing says where the program runs; or an unknown
        target.
    """
    place = jax.sharding.SingleDeviceSharding(device(find(target) if isinstance(target, str) else target))
    if not jax.tree.leaves(args):
        raise ValueError("a program to compile needs at least one array among its arguments; got none.")

    def put(x: Any) -> jax.ShapeDtypeStruct:
        sharding = (x.sharding if isinstance(x, jax.ShapeDtypeStruct) else None) or place
        return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding)

    return jax.jit(fn, donate_argnums=donate_argnums).lower(*jax.tree.map(put, args))


def compile_for(
    target: Target | str, fn: Callable, *args: Any, donate_argnums: int | Sequence[int] = ()
) -> jax.stages.Compiled:
    """Compiles `jit(fn)(*args)` for one device of a target; see `lower_for`.

    Raises:
      jax.errors.JaxRuntimeError: the compiler refuses, for one because the program does not fit the device.
    """
    return lower_for(target, fn, *args, donate_argnums=donate_argnums).compile()


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _wanted_libtpu() -> str | None:
    """Returns the start of the version of libtpu that jax names in its own extra `tpu`, such as "0.0.42."."""
    for requirement in metadata.requires("jax") or ():
        if found := re.match(r"libtpu==([\d.]+)\*", requirement):
            return found[1]
    return None


def _cuda_plugin() -> str | None:
    """Returns the module of the CUDA plugin in `jax_plugins` that this environment holds."""
    if importlib.util.find_spec("jax_plugins") is None:
        return None
    for name in ("xla_cuda12", "xla_cuda13"):
        if importlib.util.find_spec(f"jax_plugins.{name}") is not None:
            return name
    return None


def _cuda_tools() -> pathlib.Path | None:
    """Returns the folder of NVIDIA's compiler wheel: `bin/ptxas` and `nvvm/libdevice` in it."""
    spec = importlib.util.find_spec("nvidia")
    for home in (spec.submodule_search_locations or ()) if spec else ():
        for folder in ("cuda_nvcc", "cu13"):
            if (pathlib.Path(home) / folder / "nvvm" / "libdevice").is_dir():
                return pathlib.Path(home) / folder
    return None
