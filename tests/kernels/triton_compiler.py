"""Compiles Triton kernels for GPUs that are not here, and reads what the assembler says of them."""

import re
import subprocess
from pathlib import Path

import pytest

from portable import parity
from portable.pallas_kernels.gpu import _launch
from tests.oracles import child

# Shared memory that a program may ask for, of the data-center GPU with that capability.
SHARED = {80: 163 * 1024, 90: 227 * 1024, 100: 227 * 1024}


def compilers() -> None:
    """Skips unless kernels can be compiled for a GPU here."""
    if reason := parity.missing("cuda"):
        pytest.skip(reason)
    for package in ("triton", "jax_triton"):
        if reason := _launch.missing(package):
            pytest.skip(reason)


def compile_kernels(code: str, folder: Path) -> dict[str, dict[str, int]]:
    """Runs code that lowers kernels; returns registers, spilled bytes and shared memory of each by name."""
    import nvidia.cuda_nvcc

    child(code, env={"JAX_TRITON_DUMP_DIR": str(folder), "JAX_ENABLE_COMPILATION_CACHE": "false"})
    ptxas = Path(nvidia.cuda_nvcc.__path__[0]) / "bin" / "ptxas"
    found = {}
    for ptx in sorted(folder.glob("*/*.ptx")):
        arch = re.search(r"^\.target (\w+)", ptx.read_text(), re.MULTILINE)[1]
        command = [ptxas, "-v", f"-arch={arch}", ptx, "-o", "/dev/null"]
        said = subprocess.run(command, capture_output=True, text=True, check=True).stderr
        number = lambda pattern, text: int(re.search(pattern, text)[1])  # noqa: E731
        info = ptx.with_suffix(".compile_info").read_text()
        found[f"{arch} {ptx.stem} {ptx.parent.name}"] = {
            "registers": number(r"Used (\d+) registers", said),
            "spilled": number(r"(\d+) bytes spill stores", said) + number(r"(\d+) bytes spill loads", said),
            "shared": number(r"shared_mem_bytes: (\d+)", info),
        }
    return found
