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
from collections.abc import Callable, Iterator, Mapping
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
_counting = jax.make_user_context(False)


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
      interpret: of a kernel: (part, *args, **options) -> what `fwd` or `bwd`, whichever `part` names, would return, by
        an interpreter on the CPU: the kernel's own code, slow, and with every unwritten element NaN.
      save: (*arrays, **options) -> (what `fwd` returns, what else the backward needs): the forward of a call that is
        differentiated, where keeping more than the arguments is worth its memory. What is kept belongs to the op: all
        XLA forms of one give the same, and `bwd` gets it behind the arguments, as the last residual. A kernel without
        one borrows that of the platform's XLA form.
    """

    fwd: Callable
    bwd: Callable | None = None
    why_not: Callable[..., str | None] = _accepts_all
    interpret: Callable[..., tuple] | None = None
    save: Callable | None = None


@dataclasses.dataclass(frozen=True)
class Table:
    """The choice for one call: an implementation's name for each platform, `default` for the rest.

    Attributes:
      op: the op.
      names: (platform, implementation) for every platform that differs from "default".
      xla: the same for the XLA forms: what serves where a kernel has no backward or refuses, and what types are
        taken from.
    """

    op: str
    names: tuple[tuple[str, str], ...]
    xla: tuple[tuple[str, str], ...]

    def get(self, platform: str, part: str) -> Callable:
        """Returns the function that runs `part` ("fwd", "save" or "bwd") on `platform`."""
        names, forms = dict(self.names), dict(self.xla)
        known = implementations(self.op)
        form = known[forms.get(platform, forms["default"])]
        serve = getattr(form, part) or functools.partial(_derivative, form.fwd)
        name = names.get(platform, names["default"])
        if name not in KERNEL_HOMES:
            return getattr(known[name], part) or serve
        if platform not in KERNEL_HOMES[name][1]:
            raise Unavailable(
                f"{self.op}: {name!r} runs on {' and '.join(KERNEL_HOMES[name][1])}; this program is lowered for "
                f"{platform}. Leave implementation=None to let portable choose."
            )
        kernel = getattr(known[name], part)
        if kernel is None:
            return serve

        def where_taken(*args, **options) -> tuple:
            # A named kernel was asked before (`choose`); an automatic one is asked here, where its platform is lowered.
            arrays = args if part != "bwd" else args[0][:-1] if self.saves else args[0]
            return (serve if known[name].why_not(*arrays, **options) else kernel)(*args, **options)

        return where_taken

    @property
    def forms(self) -> "Table":
        """The XLA forms alone."""
        return Table(self.op, self.xla, self.xla)

    @property
    def saves(self) -> bool:
        """Whether a differentiated call keeps more than its arguments."""
        return implementations(self.op)[dict(self.xla)["default"]].save is not None

    @property
    def plain(self) -> bool:
        """Whether one form without a backward of its own runs everywhere, to be differentiated by JAX in any mode."""
        (name, *others) = {name for _, name in self.names}
        return not others and name not in KERNEL_HOMES and implementations(self.op)[name].bwd is None


def _derivative(fwd: Callable, residuals, cotangents, **options) -> tuple:
    return jax.vjp(functools.partial(fwd, **options), *residuals)[1](cotangents)


class _Known(Mapping[str, Impl]):
    """An op's implementations by name, imported when looked up: no kernel is imported on a machine without its use."""

    def __init__(self, op: str) -> None:
        folder = package(op)
        self._paths = {"reference": f"{folder.__name__}.reference"}
        forms = sorted(m.name for m in pkgutil.iter_modules(folder.__path__) if m.name.startswith("xla"))
        self._paths |= {form: f"{folder.__name__}.{form}" for form in forms}
        kernels = {name: f"{home}.{op}" for name, (home, _) in KERNEL_HOMES.items()}
        self._paths |= {name: path for name, path in kernels.items() if importlib.util.find_spec(path)}

    def __getitem__(self, name: str) -> Impl:
        return importlib.import_module(self._paths[name]).IMPL

    def __iter__(self) -> Iterator[str]:
        return iter(self._paths)

    def __len__(self) -> int:
        return len(self._paths)


@functools.cache
def implementations(op: str) -> Mapping[str, Impl]:
    """Returns every implementation of an op by name, the reference first, kernels last."""
    return _Known(op)


def ops() -> tuple[str, ...]:
    """Returns the names of the ops that have implementations to choose from."""
    home = importlib.import_module("portable.ops")
    folders = [m.name for m in pkgutil.iter_modules(home.__path__, f"{home.__name__}.") if m.ispkg]
    return tuple(sorted(f.rpartition("._")[2] for f in folders if importlib.util.find_spec(f"{f}.reference")))


def package(op: str):
    """Returns the package of an op, `portable.ops._<op>`.

    Raises:
      ValueError: there is no such op; the message lists those there are.
    """
    if op not in ops():
        raise ValueError(f"portable has no op called {op!r}; there are: {', '.join(ops())}.")
    return importlib.import_module(f"portable.ops._{op}")


def asked() -> str | None:
    """Returns the name that `using` asks for here, None where it does not."""
    return _choice.value


@contextlib.contextmanager
def using(name: str | None) -> Iterator[None]:
    """Runs every op inside the context with the implementation `name`; None restores the automatic choice.

    "xla" is each platform's XLA form, "kernels" each platform's hand-written kernel where it has one that takes the
    call. An op that has no implementation of another name raises, as if it had been named in the call.

    >>> import jax.numpy as jnp, portable
    >>> with portable.using("reference"):
    ...     y = portable.ops.rms_norm(jnp.ones([2, 4]), jnp.ones([4]))
    """
    with _choice(name):
        yield


@contextlib.contextmanager
def counting() -> Iterator[None]:
    """Traces every op inside the context as the form that its package names `WORK`, whatever was asked for.

    It computes what the op must, and nothing in loops whose length only the device knows.
    """
    with _counting(True):
        yield


def choose(op: str, name: str | None = None, *args, **options) -> Table:
    """Returns the table of implementations for a call with these arguments.

    Args:
      op: the op.
      name: of an implementation; "xla" for each platform's XLA form; "kernels" for each platform's kernel where it has
        one that takes the call; None for the automatic choice.
      *args: arrays as `Impl.fwd` takes them; without any, limits are not asked for.
      **options: the op's options.

    Raises:
      ValueError: no implementation has that name.
      Unavailable: the named implementation cannot take these arguments.
    """
    name = name or _choice.value
    forms = {"default": "xla"} | package(op).XLA
    if args:  # an XLA form that refuses these arguments leaves them to the default one
        refused = [p for p, form in forms.items() if implementations(op)[form].why_not(*args, **options)]
        forms |= dict.fromkeys(refused, forms["default"])
    xla = tuple(sorted(forms.items()))
    if name == "xla":
        return Table(op, xla, xla)
    known = implementations(op)
    if name in (None, "kernels"):
        measured = getattr(package(op), "KERNELS", {})
        every = {p: kernel for kernel in known if kernel in KERNEL_HOMES for p in KERNEL_HOMES[kernel][1]}
        return Table(op, tuple(sorted((forms | (every if name else measured)).items())), xla)
    if name not in known:
        names = ", ".join(dict.fromkeys([*known, "xla", "kernels"]))
        raise ValueError(f"{op}: no implementation called {name!r}; there are: {names}.")
    if args and (reason := known[name].why_not(*args, **options)):
        raise Unavailable(
            f"{op}: {name!r} cannot take this call: {reason} Leave implementation=None to let portable choose."
        )
    return Table(op, (("default", name),), xla)


def call(op: str, implementation: str | None, arrays: tuple, options: dict[str, Any]) -> tuple:
    """Runs an op's chosen implementation, differentiable in reverse mode (a `Table.plain` one in every mode).

    The derivative stands outside the choice of platform, and its residuals belong to the op (its arguments, and what
    `Impl.save` says), so any forward pairs with any backward.

    Args:
      op: the op's name.
      implementation: a name, or None for the automatic choice.
      arrays: arguments of `Impl.fwd`, None where absent.
      options: its hashable options.

    Returns:
      The tuple of arrays that `Impl.fwd` returns.
    """
    table = choose(op, implementation, *arrays, **options)
    if _counting.value and (form := getattr(package(op), "WORK", None)):
        table = Table(op, (("default", form),), (("default", form),))
    chosen = _forward if table.plain else _traced_once
    return chosen(table, tuple(options.items()), *arrays)


def _forward(table: Table, options: tuple, *arrays) -> tuple:
    return run(table, "fwd", *arrays, **dict(options))


def _saved(table: Table, options: tuple, *arrays) -> tuple:
    if not table.saves:
        return _forward(table, options, *arrays), arrays
    out, saved = run(table, "save", *arrays, **dict(options))
    return out, (*arrays, saved)


def _backward(table: Table, options: tuple, residuals, cotangents) -> tuple:
    return run(table, "bwd", residuals, cotangents, **dict(options))


_differentiable = jax.custom_vjp(_forward, nondiff_argnums=(0, 1))
_differentiable.defvjp(_saved, _backward)
# Layers of equal shapes share one trace. Inlined: XLA for TPUs would lay out the arguments and results of a computation
# with several callers without regard to them, and copy.
_traced_once = jax.jit(_differentiable, static_argnums=(0, 1), inline=True)


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
        """Returns the platform's function over flat arrays. Layers of equal shapes are traced once."""
        return _function(self, platform)

    def out_tree(self, leaves) -> Any:
        return jax.tree.structure(jax.eval_shape(_nested(self.forms, "default"), *leaves))

    @property
    def forms(self) -> "_Rules":
        """The same call with the XLA forms."""
        return dataclasses.replace(self, table=self.table.forms)


@functools.cache
def _nested(rules: _Rules, platform: str) -> Callable:
    def call(*leaves):
        return rules.table.get(platform, rules.part)(*rules.tree.unflatten(leaves), **dict(rules.options))

    return jax.jit(call, inline=True)


@functools.cache
def _function(rules: _Rules, platform: str) -> Callable:
    def call(*leaves):
        return jax.tree.leaves(_nested(rules, platform)(*leaves))

    for dims, size in rules.vmaps:
        call = jax.vmap(call, in_axes=dims, axis_size=size)
    return jax.jit(call, inline=True)


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
    return list(jax.make_jaxpr(rules.forms.function("default"))(*avals).out_avals)


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
    return jax.jvp(rules.forms.function("default"), tuple(primals), tuple(map(ad.instantiate_zeros, tangents)))


batching.primitive_batchers[_primitive] = _batch
ad.primitive_jvps[_primitive] = _jvp
