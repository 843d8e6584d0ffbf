"""What portable will do and why, in sentences: `portable.explain` and `portable.info`."""

import contextlib
import dataclasses
import importlib
from collections.abc import Callable
from importlib.metadata import PackageNotFoundError, version

import jax

from portable import selection


@dataclasses.dataclass(frozen=True)
class Report:
    """Rows of text for people: `str()` aligns them, `rows` is for programs."""

    title: str
    rows: tuple[tuple[str, ...], ...]

    def __str__(self) -> str:
        widths = [max(map(len, column)) for column in zip(*self.rows, strict=True)]
        lines = ["  ".join(c.ljust(w) for c, w in zip(row, widths, strict=True)).rstrip() for row in self.rows]
        return "\n".join([self.title, *("  " + line for line in lines)])

    __repr__ = __str__


def explain(op: str | Callable, *args, **kwargs) -> Report:
    """Says in sentences which implementation of an op each platform gets, and why the others are not chosen.

    Args:
      op: the op's name, or the function itself (`portable.ops.ssd`).
      *args: arguments of the op, arrays or `jax.ShapeDtypeStruct`. Without any, what depends on them is left open.
      **kwargs: keyword arguments of the op.

    Returns:
      A report with one row for each platform and each implementation that no platform gets.

    >>> import portable
    >>> print(portable.explain("rms_norm"))  # doctest: +ELLIPSIS
    rms_norm
      cpu ...
    """
    name = op if isinstance(op, str) else op.__name__
    if not args:
        return Report(name, _rows(name, None, None, {}))
    api = importlib.import_module(f"{selection.package(name).__name__}.api")
    implementation = kwargs.pop("implementation", None)
    # Arrays may be abstract; everything that is not an array (sizes, names) is passed through untouched.
    options = {}
    static = {k: v for k, v in kwargs.items() if not hasattr(v, "shape")}

    def prepare(args, arrays):
        core, found = api.prepare(*args, **arrays, **static)
        options.update(found)
        return core

    core = jax.eval_shape(prepare, args, {k: v for k, v in kwargs.items() if hasattr(v, "shape")})
    return Report(name, _rows(name, implementation, core, options))


def _rows(op: str, name: str | None, core, options) -> tuple[tuple[str, ...], ...]:
    name = name or selection.asked()
    table = selection.choose(op, name, *(core or ()), **options) if core is not None or name else selection.choose(op)
    names, forms, reasons = dict(table.names), dict(table.xla), selection.package(op).WHY
    known, kernels = selection.implementations(op), selection.KERNEL_HOMES

    def refusal(implementation: str) -> str | None:
        return None if core is None else known[implementation].why_not(*core, **options)

    rows, given = [], set()
    for platform in selection.PLATFORMS:
        chosen = names.get(platform, names["default"])
        if chosen in kernels and platform not in kernels[chosen][1]:
            chosen, why = "none", f"{chosen} was asked for by name and does not run here."
        elif chosen in kernels and (reason := refusal(chosen)):
            chosen, why = forms.get(platform, forms["default"]), f"{chosen} cannot take this call: {reason}"
        elif name:
            why = "asked for by name."
        else:
            why = reasons.get(chosen, "measured faster here than the XLA form.")
        given.add(chosen)
        rows.append((platform, chosen, f"{why} This process runs here." if platform == _here() else why))
    for other in known:
        if other in given or other in names.values():
            continue
        if other == "reference":
            why = "the definition, step by step: exact and slow, by name only."
        elif reason := refusal(other):
            why = f"cannot take this call: {reason}"
        elif other not in kernels:
            why = f"by name on any platform; {reasons[other]}"
        else:
            where = " and ".join(kernels[other][1])
            why = f"by name on {where}; no committed measurement shows it faster than the XLA form."
        rows.append(("-", other, why))
    return tuple(rows)


def _here() -> str:
    return {"gpu": "cuda"}.get(jax.default_backend(), jax.default_backend())


def info() -> Report:
    """Returns versions, devices, and the implementation of each op on this process's platform."""
    rows = []
    for package in ("portable-jax", "jax", "jaxlib", "flax", "optax", "libtpu", "jax-cuda12-plugin", "jax-triton"):
        with contextlib.suppress(PackageNotFoundError):
            rows.append((package, version(package), _note(package)))
    for device in jax.devices():
        rows.append((f"device {device.id}", device.platform, device.device_kind))
    if asked := selection.asked():
        rows.append(("portable.using", asked, "in this context, for every op"))
    for op in selection.ops():
        known = selection.implementations(op)
        there = asked in (None, "xla", "kernels", *known)
        names = dict(selection.choose(op).names) if there else {"default": "none of that name"}
        rows.append((op, names.get(_here(), names["default"]), f"of {', '.join(known)}"))
    return Report("portable", tuple(rows))


def _note(package: str) -> str:
    if package == "libtpu" and jax.default_backend() != "tpu":
        return "no TPU here: set JAX_PLATFORMS=cpu, or a plain `import jax` tries the TPU first and prints noise."
    if package == "jax-cuda12-plugin" and jax.default_backend() != "gpu":
        return "no GPU here: a plain `import jax` looks for one first; JAX_PLATFORMS=cpu avoids that."
    return ""
