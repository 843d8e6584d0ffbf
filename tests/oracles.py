"""Optional packages that tests compare with, and a process of its own for what needs another environment."""

import importlib
import os
import subprocess
import sys
import warnings
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).resolve().parent.parent
# The extra that installs a module; what is not named here comes with [oracles].
EXTRAS = {
    "jax_triton": "triton",
    "triton": "triton",
    "libtpu": "aot",
    "jax_plugins.xla_cuda12": "aot",
    "tokenizers": "hf",
    "huggingface_hub": "hf",
    "jinja2": "hf",
    "grain": "train",
    "matplotlib": "train",
    "PIL": "train",
    "sklearn": "train",
}
# NATTEN is in no extra: its build would fetch a torch of its own, and on a GPU's machine compile for an hour.
NATTEN = "pip install --no-deps --no-build-isolation natten==0.21.7, in an environment with torch"


def need(*names: str) -> ModuleType | tuple[ModuleType, ...]:
    """Imports optional modules, or skips with the command that installs them.

    Called at the top of a test file it skips the whole file; inside a test or a fixture, that test.

    Args:
      *names: module names, for example "torch", "transformers".

    Returns:
      The module, or a tuple of them where several were named.
    """
    modules = []
    for name in names:
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # their deprecations are not ours to mend
                modules.append(importlib.import_module(name))
        except ModuleNotFoundError as missing:
            if missing.name is None or not name.startswith(missing.name.partition(".")[0]):
                raise  # it is installed, and something inside it is broken
            extra = EXTRAS.get(name, "oracles")
            command = f"pip install 'portable-jax[{extra}]' (a clone: pip install -e '.[{extra}]')"
            pytest.skip(
                f"needs {name}: {NATTEN if name.startswith('natten') else command}",
                allow_module_level=True,
            )
    if "torch" in names:
        threads = max(1, (os.cpu_count() or 1) // int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "1")))
        sys.modules["torch"].set_num_threads(threads)
    return modules[0] if len(modules) == 1 else tuple(modules)


def child(
    code: str,
    *,
    devices: int = 1,
    env: dict[str, str] | None = None,
    folder: Path | None = None,
    timeout: float = 600,
) -> str:
    """Runs Python code in a process of its own and returns what it printed.

    Args:
      code: the program. A failed assertion in it fails the test, with what it printed.
      devices: how many CPU devices JAX shows it. Forcing several slows the rest of a process, hence a child.
      env: further environment variables; a value of "" removes the variable.
      folder: where it runs; the root of the repository unless given.
      timeout: seconds after which it is ended.
    """
    variables = os.environ | {"PYTHONPATH": str(ROOT)}
    if devices > 1:
        variables["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count={devices}"
    variables |= env or {}
    done = subprocess.run(
        [sys.executable, "-c", code],
        env={name: value for name, value in variables.items() if value != ""},
        cwd=folder or ROOT,
        capture_output=True,
        text=True,
        timeout=timeout,
    )
    if done.returncode:
        pytest.fail(f"the child process ended with {done.returncode}\n{done.stdout}\n{done.stderr}", pytrace=False)
    return done.stdout
