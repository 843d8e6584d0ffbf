"""Runs of equal layers as one stacked layer: compiled once and scanned, which is how training state is held."""

import itertools
from collections.abc import Callable

import jax
import jax.numpy as jnp
from flax import nnx

REMAT = ("none", "full", "dots")


def checkpointed(layer: Callable, policy: str) -> Callable:
    """Returns the layer so that its backward recomputes what `policy` says.

    Args:
      layer: an NNX module or function of arrays.
      policy: "none" keeps everything, "full" keeps the layer's input only, "dots" keeps the results of products of
        activations with weights.

    Raises:
      ValueError: an unknown policy.
    """
    if policy not in REMAT:
        raise ValueError(f"remat must be one of {', '.join(REMAT)}; got {policy!r}.")
    if policy == "none":
        return layer
    keep = jax.checkpoint_policies.dots_with_no_batch_dims_saveable if policy == "dots" else None
    if not isinstance(layer, nnx.Module):
        return jax.checkpoint(layer, policy=keep)
    graphdef, state = nnx.split(layer)

    def call(*args, **kwargs):
        # The options are closed over: some are not arrays.
        run = jax.checkpoint(lambda state, *args: nnx.merge(graphdef, state)(*args, **kwargs), policy=keep)
        return run(state, *args)

    return call


class Stack(nnx.Module):
    """Equal layers with stacked Params, run one after another by `lax.scan`.

    Attributes:
      layer: one layer whose Params carry a leading axis of the layers.
      size: how many layers there are.
    """

    def __init__(self, layers: list[nnx.Module]):
        """Args:
        layers: layers of equal structure and shapes.
        """
        states = [nnx.state(layer) for layer in layers]
        self.layer = nnx.merge(nnx.graphdef(layers[0]), jax.tree.map(lambda *x: jnp.stack(x), *states))
        self.size = len(layers)

    def __call__(self, x, *, remat: str = "none", **kwargs):
        """Returns layer[size - 1](... layer[0](x)); keyword arguments go to every layer unchanged."""
        graphdef, state = nnx.split(self.layer)

        def body(x, state):
            return checkpointed(lambda s, x: nnx.merge(graphdef, s)(x, **kwargs), remat)(state, x), None

        return jax.lax.scan(body, x, state)[0]

    def layers(self) -> list[nnx.Module]:
        """Returns the layers one by one again."""
        graphdef, state = nnx.split(self.layer)
        return [nnx.merge(graphdef, jax.tree.map(lambda x, i=i: x[i], state)) for i in range(self.size)]


def _signature(layer: nnx.Module):
    graphdef, state = nnx.split(layer)
    return graphdef, jax.tree.structure(state), tuple((x.shape, x.dtype) for x in jax.tree.leaves(state))


def stack(model: nnx.Module) -> nnx.Module:
    """Returns a copy of the model in which each run of equal layers of an `nnx.List` is one `Stack`.

    Stacked models are for training: Params and optimizer state have one leading axis per run, the program holds one
    layer's code, and `unstack` gives the list back. Weight maps, adapters and decoding see only the list.
    """
    model = nnx.merge(*nnx.split(model))
    for name, value in list(vars(model).items()):
        if isinstance(value, nnx.List) and len(value) and isinstance(value[0], nnx.Module):
            runs = [list(run) for _, run in itertools.groupby(value, key=_signature)]
            setattr(model, name, nnx.List([run[0] if len(run) == 1 else Stack(run) for run in runs]))
    return model


def unstack(model: nnx.Module) -> nnx.Module:
    """Returns a copy of the model in which every `Stack` is its layers again: the inverse of `stack`."""
    model = nnx.merge(*nnx.split(model))
    for name, value in list(vars(model).items()):
        if isinstance(value, nnx.List) and any(isinstance(item, Stack) for item in value):
            layers = [item.layers() if isinstance(item, Stack) else [item] for item in value]
            setattr(model, name, nnx.List(list(itertools.chain(*layers))))
    return model
