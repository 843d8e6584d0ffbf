"""The programs that are compiled for every target: each op's value and gradients, each model's work."""

import dataclasses
import importlib
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from portable.nn import fresh_state


@dataclasses.dataclass(frozen=True)
class Program:
    """A function to compile and its arguments.

    Attributes:
      fn: what `jax.jit` is given.
      args: pytrees of arrays or `jax.ShapeDtypeStruct`.
      donate: positions of arguments whose memory the program may reuse.
    """

    fn: Callable
    args: tuple[Any, ...]
    donate: tuple[int, ...] = ()


def cases(op: str, *, sizes: bool = True) -> dict[str, Callable]:
    """Returns the named argument sets of an op, those at the shapes of published models (`sizes`) last."""
    module = importlib.import_module(f"portable.ops._{op}.cases")
    return {**module.CASES, **(getattr(module, "SIZES", {}) if sizes else {})}


def stages(op: str) -> dict[str, dict[str, Callable]]:
    """Returns an op's argument sets by what they try: smoke, shapes, stability and edges."""
    return importlib.import_module(f"portable.ops._{op}.cases").STAGES


def op(name: str, case: str, *, gradients: bool = False, implementation: str | None = None) -> Program:
    """Returns one op on one of its cases.

    Args:
      name: the op, a function of `portable.ops` with a `cases.py`.
      case: a key of `cases(name)`.
      gradients: also computes the cotangents of every floating argument from given ones of every output, so
        that nothing of the backward pass can be simplified away.
      implementation: as for the op.

    Raises:
      ValueError: the op has no such case.
    """
    known = cases(name)
    if case not in known:
        raise ValueError(f"{name} has no case {case!r}; there are: {', '.join(known)}.")
    function = getattr(importlib.import_module("portable.ops"), name)
    static: dict[str, Any] = {}

    def arrays() -> tuple:
        args, kwargs = known[case](0)
        static.update({k: v for k, v in kwargs.items() if not hasattr(v, "dtype")})
        return args, {k: v for k, v in kwargs.items() if k not in static}

    shapes = jax.eval_shape(arrays)

    def value(arrays: tuple) -> Any:
        args, kwargs = arrays
        return function(*args, **kwargs, **static, implementation=implementation)

    return Program(value, (shapes,)) if not gradients else with_gradients(value, shapes)


def with_gradients(fn: Callable, *shapes: Any) -> Program:
    """Returns the program (arguments, cotangents of floating outputs) -> (outputs, cotangents of arguments).

    Args:
      fn: a function of pytrees of arrays.
      *shapes: its arguments, arrays or `jax.ShapeDtypeStruct`. Those that are not floating point get no
        cotangent.
    """

    def floating(tree: Any) -> list:
        return [x for x in jax.tree.leaves(tree) if jnp.issubdtype(x.dtype, jnp.floating)]

    def both(args: tuple, cotangents: list) -> tuple:
        leaves, tree = jax.tree.flatten(args)
        chosen = [jnp.issubdtype(x.dtype, jnp.floating) for x in leaves]

        def of_floating(inputs: list) -> tuple:
            given = iter(inputs)
            out = fn(*tree.unflatten([next(given) if c else x for c, x in zip(chosen, leaves, strict=True)]))
            return floating(out), out

        _, back, out = jax.vjp(of_floating, floating(args), has_aux=True)
        return out, back(cotangents)[0]

    return Program(both, (shapes, floating(jax.eval_shape(fn, *shapes))))


def model(
    kind: str,
    config: str | Mapping[str, Any],
    work: str,
    *,
    dtype: str = "float32",
    batch: int = 1,
    length: int = 2048,
    remat: str = "none",
) -> Program:
    """Returns the program of a model; its weights are abstract, so any size costs no memory here.

    Args:
      kind: a key of `portable.models.MODELS`.
      config: a method of the model's configuration, such as "mamba2_130m", or the dictionary of a
        config.json.
      work: "forward" (logits of every position, layers stacked), "prefill" (right-padded rows of `length`
        tokens to the last logits and a decode state), "decode" (one token of each row, the state donated) or
        "train" (forward, backward and AdamW, layers stacked, the state donated). A model of images has "forward"
        and "train", and no layers to stack.
      dtype: of the computation, and of the weights; training keeps weights in float32.
      batch, length: rows and tokens of a row; images and pixels a side.
      remat: what the backward pass computes again, as a language model takes it.

    Raises:
      ValueError: there is no such kind, or it has no such work.
    """
    from portable import models, nn

    if kind not in models.MODELS:
        raise ValueError(f"there is no model called {kind!r}; there are: {', '.join(models.MODELS)}.")
    reads = kind in models.decoders()
    works = {"forward": _forward, "prefill": _prefill, "decode": _decode, "train": _train}
    works = works if reads else {"forward": _forward, "train": _train}
    if work not in works:
        raise ValueError(f"work of {kind} must be one of {', '.join(works)}; got {work!r}.")
    make, family = works[work], models.MODELS[kind]
    settings = getattr(family.config, config)() if isinstance(config, str) else family.config.from_dict(config)
    options = {"dtype": jnp.dtype(dtype), "param_dtype": jnp.dtype("float32" if work == "train" else dtype)}

    def build() -> nnx.Module:
        made = family.model(settings, **options, **({"remat": remat} if reads else {}), rngs=nnx.Rngs(0))
        return nn.stack(made) if reads and work in ("forward", "train") else made

    return make(nnx.eval_shape(build), batch, length)


def _tokens(*shape: int) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(shape, jnp.int32)


def _sees(model: Any) -> bool:
    return hasattr(model.config, "num_channels")


def _images(model: Any, batch: int, side: int) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct((batch, side, side, model.config.num_channels), jnp.float32)


def _forward(model: Any, batch: int, length: int) -> Program:
    graphdef, weights = nnx.split(model)
    given = _images(model, batch, length) if _sees(model) else _tokens(batch, length)
    return Program(lambda w, x: nnx.merge(graphdef, w)(x), (weights, given))


def _prefill(model: Any, batch: int, length: int) -> Program:
    graphdef, weights = nnx.split(model)

    def prefill(weights: Any, tokens: jax.Array, lengths: jax.Array) -> tuple:
        model = nnx.merge(graphdef, weights)
        return model.prefill(tokens, lengths, fresh_state(model, batch, length))

    return Program(prefill, (weights, _tokens(batch, length), _tokens(batch)))


def _decode(model: Any, batch: int, length: int) -> Program:
    graphdef, weights = nnx.split(model)
    state = jax.eval_shape(lambda w: fresh_state(nnx.merge(graphdef, w), batch, length), weights)
    program = Program(lambda w, t, s: nnx.merge(graphdef, w).step(t, s), (weights, _tokens(batch), state))
    return dataclasses.replace(program, donate=(2,))


def _train(model: Any, batch: int, length: int) -> Program:
    from portable.training.classify import smoothed_cross_entropy
    from portable.training.options import TrainOptions
    from portable.training.step import init_state, make_step, next_token, parts

    options = TrainOptions(batch_size=batch, length=length)
    graphdef, params, biases, rest = parts(model)
    state = jax.eval_shape(lambda p, b: init_state(p, b, options), params, biases)
    data: dict[str, Any] = dict.fromkeys(("tokens", "targets", "segments"), _tokens(batch, length))
    loss = next_token
    if _sees(model):
        noise = jax.ShapeDtypeStruct((batch, 2), jnp.uint32)
        data = {"images": _images(model, batch, length), "labels": _tokens(batch), "noise": noise}
        loss = smoothed_cross_entropy

    def step(state: Any, rest: Any, data: Any) -> tuple:
        return make_step(graphdef, rest, options, loss)(state, data)

    return Program(step, (state, rest, data), donate=(0,))
