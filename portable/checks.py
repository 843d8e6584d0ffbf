"""Errors written for people, and checks of values that cost nothing unless asked for."""

import contextlib
from collections.abc import Callable, Iterator

import jax
import jax.core
import jax.numpy as jnp
import numpy as np
from jax.experimental import checkify


class PortableError(Exception):
    """Base of the errors a user can mend; the command line prints them as one sentence."""


class Unavailable(PortableError, NotImplementedError):
    """A named implementation cannot take this call; the message says why."""


class ConfigError(PortableError, ValueError):
    """A configuration is incomplete or contradicts itself."""


class CheckpointError(PortableError, ValueError):
    """A file of weights or of training state cannot be used as asked."""


class DataError(PortableError, ValueError):
    """Text, tokens or images given as data cannot be used as asked."""


# Part of jit's cache key, unlike a ContextVar: a function traced without checks is traced again inside.
_value_checks = jax.make_user_context(False)


@contextlib.contextmanager
def checks() -> Iterator[None]:
    """Turns on checks of array values inside compiled code.

    Outside this context the rules on values (for example: `A` of `ssd` must not be positive) are checked only where
    an array is concrete. Inside it they become `checkify` checks, so the compiled function must be wrapped:

        with portable.checks():
            error, out = jax.jit(checkify.checkify(f))(x)
        error.throw()
    """
    with _value_checks(True):
        yield


def check_values(holds: Callable, message: str, *arrays: jax.Array | None) -> None:
    """Raises ValueError(message) unless `holds(*arrays)` is true; silent on tracers outside `checks()`.

    Args:
      holds: elementwise rule over the arrays, written with operators that numpy and jax share.
      message: the sentence for the user.
      *arrays: the arguments; nothing is checked when one of them is None.
    """
    if any(a is None for a in arrays):
        return
    if any(isinstance(a, jax.core.Tracer) for a in arrays):
        if _value_checks.value:
            checkify.check(jnp.all(holds(*arrays)), message)
    elif not np.all(holds(*[np.asarray(a) for a in arrays])):
        raise ValueError(message)
