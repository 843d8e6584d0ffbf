"""Activations of experts, as functions of the two products (gate, up); gate is None where there is none."""

import functools

import jax
import jax.numpy as jnp

_PLAIN = {
    "silu": jax.nn.silu,
    "gelu": functools.partial(jax.nn.gelu, approximate=False),
    "gelu_tanh": functools.partial(jax.nn.gelu, approximate=True),
    "relu": jax.nn.relu,
    "relu2": lambda x: jnp.square(jax.nn.relu(x)),
}
# GPT-OSS (arXiv:2508.10925): its experts' limit and slope.
_LIMIT, _SLOPE = 7.0, 1.702

NAMES = (*_PLAIN, "swiglu_oai")


def activate(name: str, gate, up):
    """Returns the hidden activations: act(up), act(gate) * up, or GPT-OSS's (up + 1) * gate * sigmoid(1.702 gate)."""
    if name == "swiglu_oai":
        gate, up = jnp.minimum(gate, _LIMIT), jnp.clip(up, -_LIMIT, _LIMIT)
        return (up + 1) * gate * jax.nn.sigmoid(_SLOPE * gate)
    return _PLAIN[name](up) if gate is None else _PLAIN[name](gate) * up
