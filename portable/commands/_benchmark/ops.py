"""Times every implementation of an op, forward and with gradients, over its named cases."""

import importlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from portable import reports, selection
from portable.checks import PortableError, Unavailable
from portable.commands._benchmark import timing


def cases(op: str, wanted: Sequence[str], *, quick: bool) -> dict[str, Callable]:
    """Returns makers of arguments by name: those wanted, else a published size, or a small case if quick.

    Raises:
      PortableError: a wanted case does not exist.
    """
    selection.implementations(op)  # an unknown op is told with the names there are
    module = importlib.import_module(f"portable.ops._{op}.cases")
    small, sizes = module.CASES, getattr(module, "SIZES", {})
    known = small | sizes
    if unknown := [name for name in wanted if name not in known]:
        raise PortableError(f"bench: {op} has no case called {unknown[0]!r}; there are: {', '.join(known)}.")
    if wanted:
        return {name: known[name] for name in wanted}
    default = small if quick or not sizes else sizes
    return {name: default[name] for name in list(default)[:1]}


def names(op: str, wanted: Sequence[str]) -> list[str]:
    """Returns the implementations to time: those wanted, else all XLA forms and this platform's kernels."""
    for name in wanted:
        selection.choose(op, name)  # raises where there is no such name
    if wanted:
        return list(wanted)
    homes = selection.KERNEL_HOMES
    return [
        name
        for name in selection.implementations(op)
        if name.startswith("xla") or (name in homes and timing.platform() in homes[name][1])
    ]


def records(op: str, case: str, make: Callable, implementations: Sequence[str], samples: int) -> Iterator[dict]:
    """Yields a record for each implementation: milliseconds, compile seconds, temporary MiB."""
    function = getattr(importlib.import_module("portable.ops"), op)
    arguments, options = make(0)
    report = reports.explain(op, *arguments, **options)
    chosen = {row[0]: row[1] for row in report.rows}[timing.platform()]
    for name in implementations:
        forward, with_gradients, arrays = _programs(function, arguments, options | {"implementation": name})
        try:
            runs = timing.measure(forward, arrays, samples=samples)
        except Unavailable as reason:
            if name in implementations and len(implementations) == 1:
                raise
            yield {"op": op, "case": case, "implementation": name, "why_not": str(reason)}
            continue
        both = timing.measure(with_gradients, arrays, samples=samples)
        yield {
            "op": op,
            "case": case,
            "implementation": name,
            "automatic": name == chosen,
            "forward_ms": 1e3 * runs.median,
            "forward_backward_ms": 1e3 * both.median,
            "forward_samples_s": runs.seconds,
            "forward_backward_samples_s": both.seconds,
            "compile_s": runs.compile_seconds + both.compile_seconds,
            "temporary_mib": None if both.temporary_bytes is None else both.temporary_bytes / 2**20,
        }


def _programs(function: Callable, arguments: tuple, options: dict[str, Any]) -> tuple[Callable, Callable, dict]:
    """The op, and the op with the gradients of all its floating arguments, over a dict of its arrays."""
    arrays = {"arguments": arguments, "options": {k: v for k, v in options.items() if hasattr(v, "shape")}}
    static = {k: v for k, v in options.items() if not hasattr(v, "shape")}

    def forward(arrays):
        return function(*arrays["arguments"], **arrays["options"], **static)

    leaves, tree = jax.tree.flatten(arrays)
    floating = [jnp.issubdtype(leaf.dtype, jnp.floating) for leaf in leaves]

    def with_gradients(arrays):
        leaves = jax.tree.leaves(arrays)

        def value(moving):
            moving = iter(moving)
            mixed = [next(moving) if f else leaf for leaf, f in zip(leaves, floating, strict=True)]
            outputs = jax.tree.leaves(forward(jax.tree.unflatten(tree, mixed)))
            # Squares: with a plain sum the cotangents would be constants that XLA can simplify away.
            return sum(jnp.sum(jnp.square(y.astype(jnp.float32))) for y in outputs)

        return jax.value_and_grad(value)([leaf for leaf, f in zip(leaves, floating, strict=True) if f])

    return forward, with_gradients, arrays
