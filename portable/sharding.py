"""Where each Param lives on a mesh: logical axes are data on the Param, and one function turns them into shardings."""

from collections.abc import Mapping

import jax
from flax import nnx
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

# Logical axis -> mesh axis. What is not named is replicated: B and C of Mamba-2's few groups serve every head.
RULES = {"vocab": "model", "inner": "model", "heads": "model", "mlp": "model"}


def mesh(**axes: int) -> Mesh:
    """Returns a mesh with the given axes, in which XLA propagates shardings by itself (`AxisType.Auto`).

    Args:
      **axes: size of each axis by name, for example `mesh(data=2, model=4)`.

    Raises:
      ValueError: the sizes do not multiply to a number of devices that this process has.

    >>> import portable.sharding
    >>> portable.sharding.mesh(data=1, model=1).axis_names
    ('data', 'model')
    """
    size = 1
    for count in axes.values():
        size *= count
    if not axes or not 1 <= size <= jax.device_count():
        raise ValueError(
            f"mesh: the axes {axes} need {size} devices; this process has {jax.device_count()}. Choose sizes whose "
            "product is at most that."
        )
    devices = jax.devices()[:size]
    return jax.make_mesh(tuple(axes.values()), tuple(axes), (AxisType.Auto,) * len(axes), devices=devices)


def shardings(model: nnx.Module, mesh: Mesh, rules: Mapping[str, str] | None = None):
    """Returns the model's state with a NamedSharding in place of each array.

    Args:
      model: a module, real or abstract (`nnx.eval_shape`), whose Params carry `axes=(...)`.
      mesh: from `mesh`.
      rules: logical axis -> mesh axis; None takes `RULES`. An axis whose size the mesh axis does not divide, and one
        whose mesh axis the mesh lacks, is replicated.

    Returns:
      A state for `jax.device_put(nnx.state(model), ...)` or `jax.jit(..., out_shardings=...)`.
    """
    rules = RULES if rules is None else rules

    def place(variable: nnx.Variable):
        axes = variable.get_metadata().get("axes", ())
        shape = variable.get_value().shape
        axes = (None,) * (len(shape) - len(axes)) + tuple(axes)  # stacked layers add axes in front
        names = [None if axis is None else rules.get(axis) for axis in axes]
        fits = [n in mesh.shape and size % mesh.shape[n] == 0 for n, size in zip(names, shape, strict=True)]
        spec = PartitionSpec(*[n if ok else None for n, ok in zip(names, fits, strict=True)])
        return variable.replace(NamedSharding(mesh, spec))

    return jax.tree.map(place, nnx.state(model), is_leaf=lambda x: isinstance(x, nnx.Variable))


def shard(model: nnx.Module, mesh: Mesh, rules: Mapping[str, str] | None = None) -> nnx.Module:
    """Returns a copy of the model with every Param placed on the mesh as `shardings` says."""
    graphdef, state = nnx.split(model)
    return nnx.merge(graphdef, jax.device_put(state, shardings(model, mesh, rules)))
