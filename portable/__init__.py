"""Model code that runs, unmodified and fast, on CPU, GPU and TPU."""

from portable import _requirements as _requirements  # first: says in a sentence when jax or flax is too old
from portable import ops as ops
from portable.checks import PortableError as PortableError
from portable.checks import Unavailable as Unavailable
from portable.checks import checks as checks
from portable.selection import explain as explain
from portable.selection import info as info
from portable.selection import using as using

__version__ = "0.1.0"
