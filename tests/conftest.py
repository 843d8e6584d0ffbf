"""Environment of the tests: platform, caches, threads and the seed. Set before JAX is imported."""

import os
import secrets
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
SEED = "PORTABLE_TEST_SEED"
ENVIRONMENT = {
    # Compiled programs are kept between runs and shared by the workers; the bound turns on the cache's file lock.
    "JAX_COMPILATION_CACHE_DIR": str(ROOT / ".cache" / "jax"),
    "JAX_COMPILATION_CACHE_MAX_SIZE": str(2 * 1024**3),
    "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0.1",
    # Most of the time of the tests is LLVM's, on programs that run once. XLA's own passes, and with them the buffers
    # and instructions that tests count, stay as they are; `portable.parity` compiles for other devices without this.
    "JAX_DISABLE_MOST_OPTIMIZATIONS": "1",
    # Two pools of threads on the same cores make both slower.
    "OMP_NUM_THREADS": str(max(1, (os.cpu_count() or 1) // int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "1")))),
    # Libraries that look for a hub or a device when they are imported.
    "HF_HUB_OFFLINE": "1",
    "JAX_SKIP_CUDA_CONSTRAINTS_CHECK": "1",
    "TPU_SKIP_MDS_QUERY": "1",
}


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--platform", default="cpu", help="JAX platforms: cpu (default), cuda, tpu; any leaves it to JAX")
    parser.addoption("--seed", type=int, help="of random inputs: 0, and a fresh one with -m full, unless given")


def pytest_configure(config: pytest.Config) -> None:
    os.environ.pop("JAX_PLATFORMS", None)
    if (platform := config.getoption("platform")) != "any":
        os.environ["JAX_PLATFORMS"] = platform
    for name, value in ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    # Workers inherit the environment, and with it the seed that the header shows.
    full = "full" in config.option.markexpr.replace("not full", "")
    seed = config.getoption("seed")
    if seed is not None or "PYTEST_XDIST_WORKER" not in os.environ:
        os.environ[SEED] = str(seed if seed is not None else secrets.randbelow(2**31) if full else 0)


def pytest_report_header() -> str:
    return f"random inputs: --seed {os.environ[SEED]}"


@pytest.fixture(scope="session")
def seed() -> int:
    """The seed of random inputs, printed in the header."""
    return int(os.environ[SEED])
