"""Environment of the tests: platform, caches and threads. Set before JAX is imported."""

import os
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
# Compiled programs are kept between runs and shared by the workers; the bound turns on the cache's file lock.
CACHE = {
    "JAX_COMPILATION_CACHE_DIR": str(ROOT / ".cache" / "jax"),
    "JAX_COMPILATION_CACHE_MAX_SIZE": str(2 * 1024**3),
    "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0.5",
}


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--platform",
        default="cpu",
        help="JAX platforms to test on: cpu (default), cuda, tpu, or 'any' for JAX's choice",
    )


def pytest_configure(config: pytest.Config) -> None:
    platform = config.getoption("platform")
    os.environ.pop("JAX_PLATFORMS", None)
    if platform != "any":
        os.environ["JAX_PLATFORMS"] = platform
    for name, value in CACHE.items():
        os.environ.setdefault(name, value)
    # Two BLAS pools on the same cores make both slower.
    os.environ.setdefault("OMP_NUM_THREADS", str(_cores_per_worker()))
    # Libraries that look for a hub or a device at import.
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    os.environ.setdefault("JAX_SKIP_CUDA_CONSTRAINTS_CHECK", "1")
    os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")


def _cores_per_worker() -> int:
    return max(1, (os.cpu_count() or 1) // int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "1")))
