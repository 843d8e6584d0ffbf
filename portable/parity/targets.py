"""The devices that programs are compiled for, whether this machine has them or not.

A compiler for a device does not need the device: libtpu compiles for any TPU by its topology's name, and
XLA's CUDA compiler for any GPU by a description of its limits. Both want the environment of
`environment(family)` before jax is imported, which is why `portable.parity.run` compiles in child processes.
"""

import dataclasses
import functools
import importlib.resources
import importlib.util
import os
import pathlib
import re
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
      family: the compiler: "cpu", "tpu" or "cuda".
      topology: a libtpu topology name, or the name of a description in `data/`; "" for the CPU of this
        process.
      memory_bytes: memory that the compiler lets one program use (TPU) or that the driver reports (CUDA);
        None where it is the machine's.
      device: which product that is.
    """

    name: str
    family: str
    topology: str = ""
    memory_bytes: int | None = None
    device: str = ""


def _tpu(name: str, topology: str, gib: float, device: str) -> Target:
    return Target(name, "tpu", topology, int(gib * 2**30), device)


def _cuda(name: str, description: str, device: str) -> Target:
    found = re.search(r"\bdevice_memory_size:\s*(\d+)", _description(description))
    if found is None:
        raise ValueError(f"the target description {description}.txtpb must state device_memory_size.")
    return Target(name, "cuda", description, int(found[1]), device)


def _description(name: str) -> str:
    file = importlib.resources.files("portable.parity") / "data" / f"{name}.txtpb"
    return file.read_text(encoding="utf-8")


# Memory of the TPUs: "available HBM" in libtpu 0.0.42's own message about a program that is too big.
TARGETS: dict[str, Target] = {
    t.name: t
    for t in (
        Target("cpu", "cpu", device="this machine"),
        _tpu("tpu-v5e", "v5e:2x2", 15.75, "TPU v5e chip"),
        _tpu("tpu-v5p", "v5p:2x2x1", 95.74, "TPU v5p chip"),
        _tpu("tpu-v6e", "v6e:2x2", 31.25, "TPU v6e chip"),
        _tpu("tpu-7x", "tpu7x:2x2x1", 94.75, "one of the two cores of a TPU7x chip"),
        _cuda("cuda-sm80", "sm_80", "A100 SXM 80 GB"),
        _cuda("cuda-sm90", "sm_90", "H100 SXM 80 GB"),
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
    if family == "cpu":
        return None
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


def environment(family: str) -> dict[str, str]:
    """Returns this process's variables, jax's replaced by those of a process that compiles for a family."""
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
        platform="cuda", topology_name="", target_config=_description(target.topology), topology="1x1x1"
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
