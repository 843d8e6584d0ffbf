"""The kinds of variables of adapted models: what is trained, what waits, what is only kept."""

from flax import nnx


class AdapterParam(nnx.LoRAParam):
    """What the active adapter trains: the filter for optimizers, gradients and checkpoints."""


class StoredParam(nnx.Variable):
    """A weight that is not in use: of an adapter that is not active, or of the model where a copy is trained."""


class AdapterCache(nnx.Variable):
    """What follows from other variables, or is given for one call; never trained, never saved."""
