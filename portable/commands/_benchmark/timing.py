"""Seconds to compile and to run one program."""

import dataclasses
import statistics
import time
from collections.abc import Callable
from typing import Any

import jax

# A quick program is repeated until its samples add up to this, so that a scheduler's hiccup does not decide.
_SECONDS = 0.5
_MOST_SAMPLES = 200


@dataclasses.dataclass(frozen=True)
class Timing:
    """What one program cost.

    Attributes:
      seconds: a sample each, of the whole call, results ready.
      compile_seconds: tracing, lowering and compiling.
      temporary_bytes: what the compiled program needs besides arguments and results, or None where the
        platform does
        not tell.
    """

    seconds: list[float]
    compile_seconds: float
    temporary_bytes: int | None

    @property
    def median(self) -> float:
        """Median of `seconds`."""
        return statistics.median(self.seconds)


def measure(function: Callable, *arguments: Any, samples: int) -> Timing:
    """Compiles `function` for `arguments` (pytrees of arrays), runs it once, and then with a clock."""
    begin = time.perf_counter()
    program = jax.jit(function).lower(*arguments).compile()
    compile_seconds = time.perf_counter() - begin
    seconds = repeat(lambda: jax.block_until_ready(program(*arguments)), samples)
    return Timing(seconds, compile_seconds, getattr(program.memory_analysis(), "temp_size_in_bytes", None))


def repeat(call: Callable[[], Any], samples: int) -> list[float]:
    """Seconds of `samples` calls, or of more until half a second has passed; a call before is not counted."""
    call()
    seconds: list[float] = []
    while len(seconds) < samples or (sum(seconds) < _SECONDS and len(seconds) < _MOST_SAMPLES):
        begin = time.perf_counter()
        call()
        seconds.append(time.perf_counter() - begin)
    return seconds


def platform() -> str:
    """Name of the platform programs run on here, as `portable.explain` names it."""
    backend = jax.default_backend()
    return "cuda" if backend == "gpu" else backend
