"""Model code that runs, unmodified and fast, on CPU, GPU and TPU."""

import importlib
from typing import TYPE_CHECKING, Any

from portable import _requirements as _requirements  # first: says in a sentence when jax or flax is too old
from portable import ops as ops
from portable.artifact import export as export
from portable.artifact import load_export as load_export
from portable.checks import PortableError as PortableError
from portable.checks import Unavailable as Unavailable
from portable.checks import checks as checks
from portable.reports import explain as explain
from portable.reports import info as info
from portable.selection import using as using

if TYPE_CHECKING:
    from portable import checkpoint as checkpoint
    from portable import generation as generation
    from portable import models as models
    from portable import nn as nn
    from portable import parity as parity
    from portable import sharding as sharding
    from portable import training as training
    from portable.generation import generate as generate

__version__ = "0.1.0"

# Imported when first used: `import portable` stays as quick as jax and flax allow.
_ROOMS = ("checkpoint", "generation", "models", "nn", "parity", "sharding", "training")


def __getattr__(name: str) -> Any:
    if name in _ROOMS:
        return importlib.import_module(f"portable.{name}")
    if name == "generate":
        return importlib.import_module("portable.generation").generate
    raise AttributeError(f"module 'portable' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*globals(), *_ROOMS, "generate"])
