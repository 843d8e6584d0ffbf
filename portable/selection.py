"""Which implementation of an op runs: the only file that knows platforms.

An op offers several implementations of one contract. The choice is made when a program is *lowered*, not when Python
runs: a primitive carries the table {platform: function}, and its lowering rule for a platform traces that platform's
function alone. So a laptop lowers for a TPU and gets the TPU's form, a CPU never imports or traces a kernel, and one
exported program can carry a form for each platform.
"""

import contextlib
import dataclasses
import functools
import importlib
import importlib.util
import pkgutil
from collections.abc import Callable, Iterator
from typing import Any

import jax
from jax.extend.core import Primitive
from jax.interpreters import ad, batching, mlir

from portable.checks import Unavailable

PLATFORMS = ("cpu", "cuda", "rocm", "tpu")
# Kernels are found by path, `<home>.<op>`; each home serves the platforms named.
KERNEL_HOMES = {
    "pallas_tpu": ("portable.pallas_kernels.tpu", ("tpu",)),
    "triton": ("portable.pallas_kernels.gpu", ("cuda",)),
}

# Part of jit's cache key, unlike a ContextVar: a jitted function is traced again under another choice.
_choice = jax.make_user_context(None)


def _accepts_all(*args, **options) -> str | None:
    return None


@dataclasses.dataclass(frozen=True)
class Impl:
    """One implementation of an op's contract.

    Attributes:
      fwd: (*arrays, **options) -> tuple of arrays. Absent arguments are None.
      bwd: (residuals, cotangents, **options) -> tuple with a cotangent for each argument of `fwd` (None where there
        is none). None borrows the backward of the platform's XLA form, which may itself be left to JAX.
      why_not: (*arrays, **options) -> None, or the sentence that says why this call cannot be taken. Looks at shapes
        and dtypes only.
      automatic: whether auto mode may choose it: only with a committed measurement that beats the XLA form.
    """

    fwd: Callable
    bwd: Callable | None = None
    why_not: Callable[..., str | None] = _accepts_all
    automatic: bool = False


@dataclasses.dataclass(frozen=True)
class Table:
    """The choice for one call: an implementation's name for each platform, `default` for the rest."""

    op: str
    names: tuple[tuple[str, str], ...]
    xla: tuple[tuple[str, str], ...]

    def get(self, platform: str, part: str) -> Callable:
        """Returns the function that runs `part` ("fwd" or "bwd") on `platform`."""
        names, forms = dict(self.names), dict(self.xla)
        form = implementations(self.op)[forms.get(platform, forms["default"])]
        found = getattr(implementations(self.op)[names.get(platform, names["default"])], part)
        return found or getattr(form, part) or functools.partial(_derivative, form.fwd)

    @property
    def plain(self) -> bool:
        """Whether one form without a backward of its own runs everywhere, to be differentiated by JAX in any mode."""
        (name, *others) = {name for _, name in self.names}
        return not others and name not in KERNEL_HOMES and implementations(self.op)[name].bwd is None


def _derivative(fwd: Callable, residuals, cotangents, **options) -> tuple:
    return jax.vjp(functools.partial(fwd, **options), *residuals)[1](cotangents)


@functools.cache
def implementations(op: str) -> dict[str, Impl]:
    """Returns every implementation of an op by name, the reference first, kernels last."""
    folder = _package(op)
    forms = sorted(m.name for m in pkgutil.iter_modules(folder.__path__) if m.name.startswith("xla"))
    found = {n: importlib.import_module(f"{folder.__name__}.{n}").IMPL for n in ("reference", *forms)}
    for name, (home, _) in KERNEL_HOMES.items():
        if importlib.util.find_spec(f"{home}.{op}"):
            found[name] = importlib.import_module(f"{home}.{op}").IMPL
    return found


def ops() -> tuple[str, ...]:
    """Returns the names of the ops that have implementations to choose from."""
    home = importlib.import_module("portable.ops")
    return tuple(sorted(m.name[1:] for m in pkgutil.iter_modules(home.__path__) if m.ispkg))


def _package(op: str):
    if op not in ops():
        raise ValueError(f"portable has no op called {op!r}; there are: {', '.join(ops())}.")
    return importlib.import_module(f"portable.ops._{op}")


@contextlib.contextmanager
def using(name: str | None) -> Iterator[None]:
    """Runs every op inside the context with the implementation `name`; None restores the automatic choice.

    An op that has no implementation of that name raises, as if it had been named in the call.

    >>> import jax.numpy as jnp, portable
    >>> with portable.using("reference"):
    ...     y = portable.ops.rms_norm(jnp.ones([2, 4]), jnp.ones([4]))
    """
    with _choice(name):
        yield


def choose(op: str, name: str | None, *args, **options) -> Table:
    """Returns the table of implementations for a call with these arguments.

    Raises:
      ValueError: no implementation has that name.
      Unavailable: the named implementation cannot take these arguments.
    """
    name = name or _choice.value
    forms = {"default": "xla"} | _package(op).XLA
    if args:  # an XLA form that refuses these arguments leaves them to the default one
        refused = [p for p, form in forms.items() if implementations(op)[form].why_not(*args, **options)]
        forms |= dict.fromkeys(refused, forms["default"])
    xla = tuple(sorted(forms.items()))
    if name == "xla":
        return Table(op, xla, xla)
    if name is None:
        chosen = dict(forms)
        for kernel, (home, platforms) in KERNEL_HOMES.items():
            if importlib.util.find_spec(f"{home}.{op}"):
                impl = implementations(op)[kernel]
                if impl.automatic and impl.why_not(*args, **options) is None:
                    chosen |= dict.fromkeys(platforms, kernel)
        return Table(op, tuple(sorted(chosen.items())), xla)
    known = implementations(op)
    if name not in known:
        names = ", ".join(dict.fromkeys([*known, "xla"]))
        raise ValueError(f"{op}: no implementation called {name!r}; there are: {names}.")
    if args and (reason := known[name].why_not(*args, **options)):
        raise Unavailable(
            f"{op}: {name!r} cannot take this call: {reason} Leave implementation=None to let portable choose."
        )
    return Table(op, (("default", name),), xla)


def call(op: str, implementation: str | None, arrays: tuple, options: dict[str, Any]) -> tuple:
    """Runs an op's chosen implementation, differentiable in reverse mode (a `Table.plain` one in every mode).

    The derivative stands outside the choice of platform, and its residuals are the op's own arguments, so any forward
    pairs with any backward.

    Args:
      op: the op's name.
      implementation: a name, or None for the automatic choice.
      arrays: arguments of `Impl.fwd`, None where absent.
      options: its hashable options.

    Returns:
      The tuple of arrays that `Impl.fwd` returns.
    """
    table = choose(op, implementation, *arrays, **options)
    chosen = _forward if table.plain else _traced_once
    return chosen(table, tuple(options.items()), *arrays)


def _forward(table: Table, options: tuple, *arrays) -> tuple:
    return run(table, "fwd", *arrays, **dict(options))


def _backward(table: Table, options: tuple, residuals, cotangents) -> tuple:
    return run(table, "bwd", residuals, cotangents, **dict(options))


_differentiable = jax.custom_vjp(_forward, nondiff_argnums=(0, 1))
_differentiable.defvjp(lambda table, options, *arrays: (_forward(table, options, *arrays), arrays), _backward)
# Layers of equal shapes share one trace; XLA inlines the calls.
_traced_once = jax.jit(_differentiable, static_argnums=(0, 1))


def run(table: Table, part: str, *args, **options) -> tuple:
    """Runs one part of the chosen implementation on pytrees of arrays, each platform with its own."""
    if len({name for _, name in table.names}) == 1 and table.names[0][1] not in KERNEL_HOMES:
        return table.get("default", part)(*args, **options)
    leaves, tree = jax.tree.flatten(args)
    rules = _Rules(table, part, tree, tuple(sorted(options.items())))
    out = _primitive.bind(*leaves, rules=rules)
    return jax.tree.unflatten(rules.out_tree(leaves), out)


@dataclasses.dataclass(frozen=True)
class _Rules:
    """What the primitive carries. Compared by value, so equal calls share traces and lowered functions."""

    table: Table
    part: str
    tree: Any
    options: tuple
    vmaps: tuple = ()  # (batched dimensions, axis size) of each vmap around the call, the innermost first

    def function(self, platform: str) -> Callable:
        """Returns the platform's function over flat arrays. Jitted: layers of equal shapes are traced once."""
        return _function(self, platform)

    def out_tree(self, leaves) -> Any:
        shapes = jax.eval_shape(_nested(self, "default"), *leaves)
        return jax.tree.structure(shapes)


@functools.cache
def _nested(rules: _Rules, platform: str) -> Callable:
    def call(*leaves):
        return rules.table.get(platform, rules.part)(*rules.tree.unflatten(leaves), **dict(rules.options))

    return jax.jit(call)


@functools.cache
def _function(rules: _Rules, platform: str) -> Callable:
    def call(*leaves):
        return jax.tree.leaves(_nested(rules, platform)(*leaves))

    for dims, size in rules.vmaps:
        call = jax.vmap(call, in_axes=dims, axis_size=size)
    return jax.jit(call)


_primitive = Primitive("portable")
_primitive.multiple_results = True


@_primitive.def_impl
def _eager(*leaves, rules):
    return _compiled(rules)(*leaves)


@functools.cache
def _compiled(rules: _Rules) -> Callable:
    return jax.jit(functools.partial(_primitive.bind, rules=rules))


@_primitive.def_abstract_eval
def _abstract(*avals, rules):
    # The output types come from the XLA form's own trace: that keeps the varying axes of a shard_map.
    return list(jax.make_jaxpr(rules.function("default"))(*avals).out_avals)


def _lowering(platform: str) -> Callable:
    def rule(ctx, *leaves, rules):
        return mlir.lower_fun(rules.function(platform), multiple_results=True)(ctx, *leaves)

    return rule


mlir.register_lowering(_primitive, _lowering("default"))
for _platform in PLATFORMS:
    mlir.register_lowering(_primitive, _lowering(_platform), platform=_platform)


def _batch(leaves, dims, *, rules):
    size = next(x.shape[d] for x, d in zip(leaves, dims, strict=True) if d is not None)
    batched = dataclasses.replace(rules, vmaps=(*rules.vmaps, (tuple(dims), size)))
    out = _primitive.bind(*leaves, rules=batched)
    return out, [0] * len(out)


def _jvp(primals, tangents, *, rules):
    # Reached only by differentiating a backward pass (custom_vjp stands outside the first derivative): the XLA form
    # is traced in place, so higher derivatives are JAX's own.
    return jax.jvp(rules.function("default"), tuple(primals), tuple(map(ad.instantiate_zeros, tangents)))


batching.primitive_batchers[_primitive] = _batch
ad.primitive_jvps[_primitive] = _jvp


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
        return Report(name, _explain_rows(name, None, None, {}))
    api = importlib.import_module(f"{_package(name).__name__}.api")
    implementation = kwargs.pop("implementation", None)
    # Arrays may be abstract; everything that is not an array (sizes, names) is passed through untouched.
    options = {}
    static = {k: v for k, v in kwargs.items() if not hasattr(v, "shape")}

    def prepare(args, arrays):
        core, found = api.prepare(*args, **arrays, **static)
        options.update(found)
        return core

    core = jax.eval_shape(prepare, args, {k: v for k, v in kwargs.items() if hasattr(v, "shape")})
    return Report(name, _explain_rows(name, implementation, core, options))


def _explain_rows(op: str, name: str | None, core, options) -> tuple[tuple[str, ...], ...]:
    name = name or _choice.value
    table = choose(op, name, *(core or ()), **options) if core is not None or name else choose(op, "xla")
    names, reasons = dict(table.names), _package(op).WHY
    here = {"gpu": "cuda"}.get(jax.default_backend(), jax.default_backend())
    rows = []
    for platform in PLATFORMS:
        chosen = names.get(platform, names["default"])
        why = "asked for by name." if name else reasons.get(chosen, "measured faster here than the XLA form.")
        rows.append((platform, chosen, f"{why} This process runs here." if platform == here else why))
    for other, impl in implementations(op).items():
        if other in names.values():
            continue
        if other == "reference":
            why = "the definition, step by step: exact and slow, by name only."
        elif core is not None and (reason := impl.why_not(*core, **options)):
            why = f"cannot take this call: {reason}"
        elif other not in KERNEL_HOMES:
            why = f"by name on any platform; {reasons[other]}"
        elif not impl.automatic:
            why = "no committed measurement shows it faster than the XLA form; it runs by name."
        else:
            why = f"for {', '.join(KERNEL_HOMES[other][1])} only."
        rows.append(("-", other, why))
    return tuple(rows)


def info() -> Report:
    """Returns versions, devices, and the implementation of each op on this process's platform."""
    from importlib.metadata import PackageNotFoundError, version

    rows = []
    for package in ("portable-jax", "jax", "jaxlib", "flax", "optax", "libtpu", "jax-cuda12-plugin", "jax-triton"):
        with contextlib.suppress(PackageNotFoundError):
            rows.append((package, version(package), _note(package)))
    for device in jax.devices():
        rows.append((f"device {device.id}", device.platform, device.device_kind))
    here = {"gpu": "cuda"}.get(jax.default_backend(), jax.default_backend())
    if asked := _choice.value:
        rows.append(("portable.using", asked, "in this context, for every op"))
    for op in ops():
        known = implementations(op)
        names = dict(choose(op, None).names) if asked in (None, "xla", *known) else {"default": "none of that name"}
        rows.append((op, names.get(here, names["default"]), f"of {', '.join(known)}"))
    return Report("portable", tuple(rows))


def _note(package: str) -> str:
    if package == "libtpu" and jax.default_backend() != "tpu":
        return "no TPU here: set JAX_PLATFORMS=cpu, or a plain `import jax` tries the TPU first and prints noise."
    if package == "jax-cuda12-plugin" and jax.default_backend() != "gpu":
        return "no GPU here: a plain `import jax` looks for one first; JAX_PLATFORMS=cpu avoids that."
    return ""
