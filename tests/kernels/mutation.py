"""Breaks a kernel on purpose: its real source with one line changed, held against the definition like the original."""

import importlib.util
import inspect
import pathlib
import sys
import types

import jax

from portable import selection
from portable.parity import numbers


def mutated(module: types.ModuleType, old: str, new: str, folder: pathlib.Path) -> types.ModuleType:
    """Returns the module built from its source with `old` replaced by `new`, as a file in `folder`."""
    source = inspect.getsource(module)
    assert old in source, f"nothing to mutate: {old}"
    file = folder / f"{module.__name__.rpartition('.')[2]}.py"
    file.write_text(source.replace(old, new))
    name = f"mutated_{folder.name.replace('-', '_')}"
    spec = importlib.util.spec_from_file_location(name, file)
    assert spec is not None
    assert spec.loader is not None
    built = importlib.util.module_from_spec(spec)
    sys.modules[name] = built
    spec.loader.exec_module(built)
    return built


def errors(impl: selection.Impl, reference: selection.Impl, arrays: tuple, options: dict, seed: int) -> list[float]:
    """Returns the relative errors of a kernel's results and gradients."""
    with jax.default_matmul_precision("highest"):
        pairs = numbers.interpreted(impl, reference, arrays, options, True, seed)
    return [numbers.relative(got, want) for got, want in pairs]
