"""Time, memory and a description of the machine, for one process."""

import ctypes
import datetime
import gc
import importlib.metadata
import math
import os
import pathlib
import platform
import statistics
import time
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import numpy as np

PACKAGES = ("portable-jax", "jax", "jaxlib", "flax", "mamba2-jax", "transformers", "torch", "numpy")


def timed(call: Callable[[], Any]) -> dict[str, float]:
    """Seconds of one call: `wall`, and `cpu` summed over the threads of this process.

    Where other programs share the cores the wall time grows and the processor time hardly does, so both are
    kept.
    """
    cpu, wall = time.process_time(), time.perf_counter()
    call()
    return {"wall": time.perf_counter() - wall, "cpu": time.process_time() - cpu}


def limit_threads(threads: int) -> None:
    """Keeps this process on the first `threads` processors, which is what XLA sizes its thread pool by."""
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:threads])


def settle() -> None:
    """Gives memory that is free, but still held by the allocator, back to the system."""
    gc.collect()
    if platform.system() == "Linux":
        ctypes.CDLL("libc.so.6").malloc_trim(0)


def reset_peak() -> None:
    """Makes `memory()["peak_mb"]` count from now; nothing happens where there is no /proc."""
    settle()
    path = pathlib.Path("/proc/self/clear_refs")
    if path.exists():
        path.write_text("5")


def memory() -> dict[str, float]:
    """Resident MiB of this process, `now_mb` and `peak_mb` since `reset_peak`; empty without /proc."""
    path = pathlib.Path("/proc/self/status")
    if not path.exists():
        return {}
    fields = dict(line.split(":", 1) for line in path.read_text().splitlines())
    return {
        "now_mb": int(fields["VmRSS"].split()[0]) / 1024,
        "peak_mb": int(fields["VmHWM"].split()[0]) / 1024,
    }


def summary(values: Sequence[float]) -> dict[str, float]:
    """Median, minimum, maximum and count of some samples."""
    return {
        "median": statistics.median(values),
        "min": min(values),
        "max": max(values),
        "samples": len(values),
    }


def norm(arrays: Iterable[np.ndarray]) -> float:
    """Euclidean norm of all arrays together; summed row by row, for one float32 sum of millions loses digits."""
    rows = (row for array in arrays for row in np.reshape(array, (len(array), -1)))
    return math.sqrt(sum(float(np.vdot(row, row)) for row in rows))


def machine() -> dict[str, Any]:
    """Processor, cores, memory, versions and date, as they are written beside every result."""
    found = {}
    for name in PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found[name] = None
    return {
        "processor": _processor(),
        "cores": os.cpu_count(),
        "memory_gib": round(_memory_gib(), 1),
        "system": f"{platform.system()} {platform.machine()}",
        "python": platform.python_version(),
        "versions": found,
        "date": datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d %H:%M UTC"),
        "load_average_at_start": list(os.getloadavg()),
    }


def _processor() -> str:
    path = pathlib.Path("/proc/cpuinfo")
    if path.exists():
        wanted = ("model name", "cpu family", "model", "stepping")
        lines = [[part.strip() for part in line.split(":", 1)] for line in path.read_text().splitlines() if ":" in line]
        fields = {key: value for key, value in reversed(lines) if key in wanted}
        numbers = ", ".join(f"{key} {fields[key]}" for key in wanted[1:] if key in fields)
        if "model name" in fields:
            return f"{fields['model name']} ({numbers})"
    return platform.processor() or platform.machine()


def _memory_gib() -> float:
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
