"""How far an implementation's results are from the reference in float64, gradients included; models too."""

import dataclasses
import functools
import importlib
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from portable import selection
from portable.checks import Unavailable
from portable.nn import fresh_state
from portable.parity import programs

# What float32 sums of these sizes, and results rounded to bfloat16, leave; gradients are allowed 2.5 times as much.
BARS = {"float32": 2e-6, "bfloat16": 1e-2, "float16": 1e-3, "float64": 1e-12}
GRADIENTS = 2.5
# Of a model's logits, states and gradients: errors of layers add up.
MODEL_BARS = {"float32": 2e-5, "bfloat16": 6e-2}


def relative(got: Any, want: Any) -> float:
    """Returns max|got - want| / max|finite want| of two arrays; 0 for empty ones, infinite if a difference is NaN."""
    got, want = np.asarray(got, np.float64), np.asarray(want, np.float64)
    if got.shape != want.shape:
        raise ValueError(f"results must have the reference's shape {list(want.shape)}; got {list(got.shape)}.")
    if not want.size:
        return 0.0
    with np.errstate(invalid="ignore"):
        error = np.where(got == want, 0, np.abs(got - want)).max()  # infinities may be equal
    scale = np.abs(want[np.isfinite(want)]).max(initial=np.finfo(np.float32).tiny)
    return float(np.inf if np.isnan(error) else error / scale)


def compare(
    *, interpret: bool, name: str, case: str, gradients: bool, implementation: str, seed: int = 0
) -> dict[str, Any]:
    """Runs an op on a case, or interprets its kernel on the CPU; returns the fields of a `jobs.Result`.

    Float32 products are run at full precision: the question is what the code computes, not what a default rounds.

    Args:
      interpret: `implementation` is a kernel, run by its interpreter.
      name, case, gradients, implementation: as for `programs.op`.
      seed: of the case's arguments and of the cotangents.
    """
    compared = interpreted_case if interpret else ran
    with jax.default_matmul_precision("highest"):
        found = compared(name, case, gradients, implementation, seed)
    dtype = str(jax.eval_shape(lambda: programs.cases(name)[case](seed)[0][0]).dtype)
    error = max((relative(got, want) for got, want in found), default=0.0)
    bar = BARS[dtype] * (GRADIENTS if gradients else 1)
    status = "interpreted" if interpret else "ran"
    given = {"status": status, "error": error, "ulps": error / float(jnp.finfo(dtype).eps)}
    if error > bar:
        return given | {"status": "failed", "message": f"the error, {error:.1e}, is above {bar:.0e}"}
    return given


def compare_model(
    *, kind: str, config: str, work: str, dtype: str, batch: int, length: int, layers: int, seed: int = 0
) -> dict[str, Any]:
    """Runs a model of published widths with few layers and random weights; returns the fields of a `jobs.Result`.

    Args:
      kind, config, dtype, batch: as for `programs.model`.
      work: "prefill" (logits and state), "decode" (those of a step after a prefill) or "train" (loss and gradients);
        of a model of images "forward" (logits) or "train".
      length: tokens of a row; pixels a side.
      layers: instead of the published number; those of the first level of a model of images.
      seed: of weights and inputs.
    """
    with jax.default_matmul_precision("highest"):
        model = _model(kind, config, layers, dtype, seed)
        graphdef, weights = nnx.split(model)
        tokens = _inputs(model, batch, length, seed)
        got = jax.tree.leaves(jax.jit(functools.partial(_work, work, graphdef))(weights, tokens))
    with jax.enable_x64(True), jax.default_device(jax.devices("cpu")[0]), selection.using("reference"):
        graphdef, _ = nnx.split(nnx.eval_shape(lambda: _model(kind, config, layers, "float64", seed)))
        wide = _wide(jax.tree.map(np.asarray, weights))
        want = jax.tree.leaves(jax.jit(functools.partial(_work, work, graphdef))(wide, _wide(np.asarray(tokens))))
    floats = [(g, w) for g, w in zip(got, want, strict=True) if jnp.issubdtype(w.dtype, jnp.floating)]
    largest = max(np.abs(w).max() for _, w in floats)
    # What is zero by definition (a bias of keys moves all scores of a query alike) is held against the largest array.
    zero = [np.abs(w).max() <= 1e-12 * largest for _, w in floats]
    error = max(
        float(np.abs(g).max() / largest) if z else relative(g, w) for z, (g, w) in zip(zero, floats, strict=True)
    )
    given = {"status": "ran", "error": error, "ulps": error / float(jnp.finfo(dtype).eps)}
    if error > MODEL_BARS[dtype]:
        return given | {"status": "failed", "message": f"the error, {error:.1e}, is above {MODEL_BARS[dtype]:.0e}"}
    return given


def _model(kind: str, config: str, layers: int, dtype: str, seed: int) -> nnx.Module:
    from portable.models import MODELS

    settings = shortened(getattr(MODELS[kind].config, config)(), layers)
    options = {"dtype": jnp.dtype(dtype), "param_dtype": jnp.dtype(dtype)}
    return MODELS[kind].model(settings, **options, rngs=nnx.Rngs(seed))


def shortened(config: Any, layers: int) -> Any:
    """Returns a model's configuration with its first layers only; of a model of images, those of the first level."""
    if not hasattr(config, "depths"):
        return dataclasses.replace(config, num_hidden_layers=layers)
    dilations = config.dilations and (config.dilations[0][:layers],)
    return dataclasses.replace(config, depths=(layers,), num_heads=config.num_heads[:1], dilations=dilations)


def _inputs(model: Any, batch: int, length: int, seed: int) -> jax.Array:
    """Returns images [batch, length, length, c] or tokens [batch, length], whichever the model takes."""
    if channels := getattr(model.config, "num_channels", 0):
        return jax.random.normal(jax.random.key(seed), (batch, length, length, channels))
    return jax.random.randint(jax.random.key(seed), (batch, length), 0, 256)


def _work(work: str, graphdef: Any, weights: Any, tokens: jax.Array) -> Any:
    if work == "train":

        def loss(weights):
            logits = nnx.merge(graphdef, weights)(tokens)
            nats = -jax.nn.log_softmax(logits.astype(jnp.promote_types(jnp.float32, logits.dtype)))
            if logits.ndim == 2:  # of images, each of a class of its own
                return nats[jnp.arange(len(nats)), jnp.arange(len(nats)) % nats.shape[1]].mean()
            return jnp.take_along_axis(nats[:, :-1], tokens[:, 1:, None], axis=-1).mean()

        return jax.value_and_grad(loss)(weights)
    model = nnx.merge(graphdef, weights)
    if work == "forward":
        return model(tokens)
    lengths = jnp.full(tokens.shape[:1], tokens.shape[1])
    logits, state = model.prefill(tokens, lengths, fresh_state(model, tokens.shape[0], tokens.shape[1] + 1))
    return model.step(tokens[:, 0], state) if work == "decode" else (logits, state)


def _wide(tree: Any) -> Any:
    """Returns a tree with its floating arrays in float64 (under enable_x64)."""

    def widen(x):
        return x.astype(jnp.float64) if hasattr(x, "dtype") and jnp.issubdtype(x.dtype, jnp.floating) else x

    return jax.tree.map(widen, tree)


def _cotangents(outputs: Any, seed: int) -> Any:
    """Returns random cotangents, so that every output counts, states included."""
    leaves, tree = jax.tree.flatten(outputs)
    keys = jax.random.split(jax.random.key(seed + 1), max(1, len(leaves)))
    pairs = zip(keys, leaves, strict=False)
    return tree.unflatten([jax.random.normal(k, x.shape, jnp.float32).astype(x.dtype) for k, x in pairs])


def ran(name: str, case: str, gradients: bool, implementation: str | None, seed: int) -> list[tuple[Any, Any]]:
    """Returns pairs (result, the reference's in float64) of the op as a user calls it."""
    arrays, static, cotangents, want = _defined(name, case, gradients, seed)
    got = _results(_value(name, static, implementation), arrays, cotangents)
    return list(zip(got, want, strict=True))


def _value(name: str, static: dict[str, Any], implementation: str | None) -> Callable:
    function = getattr(importlib.import_module("portable.ops"), name)
    return lambda arrays: function(*arrays[0], **arrays[1], **static, implementation=implementation)


def _results(value: Callable, arrays: Any, cotangents: list | None) -> list:
    if cotangents is None:
        return jax.tree.leaves(jax.jit(value)(arrays))
    return jax.tree.leaves(jax.jit(programs.with_gradients(value, arrays).fn)((arrays,), cotangents))


@functools.lru_cache(maxsize=4)  # every implementation of a case is held against the same
def _defined(name: str, case: str, gradients: bool, seed: int) -> tuple[Any, dict[str, Any], list | None, list]:
    args, kwargs = programs.cases(name)[case](seed)
    arrays = (args, {k: v for k, v in kwargs.items() if hasattr(v, "dtype")})
    static = {k: v for k, v in kwargs.items() if k not in arrays[1]}
    cotangents = None
    if gradients:
        shapes = jax.tree.leaves(jax.eval_shape(_value(name, static, "reference"), arrays))
        cotangents = _cotangents([x for x in shapes if jnp.issubdtype(x.dtype, jnp.floating)], seed)
    # On the CPU: a TPU has no float64.
    with jax.enable_x64(True), jax.default_device(jax.devices("cpu")[0]):
        value, wide = _value(name, static, "reference"), _wide(jax.tree.map(np.asarray, arrays))
        outputs = [x for x in jax.tree.leaves(jax.eval_shape(value, wide)) if jnp.issubdtype(x.dtype, jnp.floating)]
        pairs = zip(cotangents or [], outputs, strict=cotangents is not None)
        want = _results(value, wide, None if cotangents is None else [np.asarray(c).astype(x.dtype) for c, x in pairs])
    return arrays, static, cotangents, [np.asarray(x) for x in want]


def interpreted_case(name: str, case: str, gradients: bool, implementation: str, seed: int) -> list[tuple[Any, Any]]:
    """Returns pairs (a kernel's result, the reference's in float64) on the op's prepared arguments."""
    args, kwargs = programs.cases(name)[case](seed)
    arrays, options = importlib.import_module(f"portable.ops._{name}.api").prepare(*args, **kwargs)
    impl = selection.implementations(name)[implementation]
    if reason := impl.why_not(*arrays, **options):
        raise Unavailable(f"{name}: {implementation!r} cannot take this call: {reason}")
    return interpreted(impl, selection.implementations(name)["reference"], arrays, options, gradients, seed)


def interpreted(
    impl: selection.Impl, reference: selection.Impl, arrays: tuple, options: dict, gradients: bool, seed: int
) -> list[tuple[Any, Any]]:
    """Returns pairs (a kernel's result, the reference's in float64) on arrays as `Impl.fwd` takes them."""
    if impl.interpret is None:
        raise ValueError("a kernel needs `interpret`, which runs it on the CPU; got None.")
    got = impl.interpret("fwd", *arrays, **options)
    cotangents = _cotangents(tuple(jnp.asarray(x) for x in got), seed) if gradients and impl.bwd is not None else None
    with jax.enable_x64(True):  # one program: op by op it would be fifty
        fn = functools.partial(reference.fwd, **options)
        wide, pulled = _wide(arrays), _wide(_floating(cotangents))
        if cotangents is None:
            return list(zip(got, jax.jit(fn)(*wide), strict=True))
        want, slopes = jax.jit(programs.with_gradients(fn, *wide).fn)(wide, pulled)
    kept = (impl.interpret("save", *arrays, **options)[1],) if impl.save is not None else ()
    found = impl.interpret("bwd", (*arrays, *kept), cotangents, **options)
    taken = [g for g, x in zip(found, arrays, strict=True) if _floating([x])]
    return list(zip((*got, *taken), (*want, *slopes), strict=True))


def _floating(values: Any) -> list:
    return [x for x in values or () if x is not None and jnp.issubdtype(x.dtype, jnp.floating)]
