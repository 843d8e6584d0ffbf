"""The least a decode step can do: its own matrix-vector products, each weight read once, and nothing else.

The loop below is what the decoding speed is held against: same weight arrays, the same op for the products, same
number of steps, one compiled program. Every product depends on the one before, and the next step on all logits, so
XLA can neither drop a product nor move one out of the loop.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from portable import ops


class Weights(NamedTuple):
    """The matrices of a model.

    layers: for each layer the input projections [d, *] (the first two of equal width: gate and value), and the output
      projection [*, d]. embedding: [v, d]. head: [d, v], or None where it is the embedding.
    """

    layers: Sequence[tuple[Sequence[jax.Array], jax.Array]]
    embedding: jax.Array
    head: jax.Array | None


def bytes_per_token(weights: Weights) -> int:
    """Bytes of the weights that one step reads (a row of the embedding not counted)."""
    head = weights.embedding if weights.head is None else weights.head
    return sum(x.nbytes for x in jax.tree.leaves((weights.layers, head)))


def step(weights: Weights, token: jax.Array) -> tuple[jax.Array, jax.Array]:
    """One chain of products, [1] -> (next token [1], which depends on every logit, and logits [1, v])."""
    h = weights.embedding[token]
    for inputs, output in weights.layers:
        gate, value, *rest = [ops.linear(h, matrix) for matrix in inputs]
        # A product and maxima: unlike sums, they cannot be moved through a matrix product by algebra.
        wide = gate * value + sum(jnp.max(x) for x in rest)
        h = ops.linear(wide, output)
        h = h / (jnp.max(jnp.abs(h)) + 1e-6)  # stays in range however deep the model is
    if weights.head is None:
        logits = ops.linear(h, weights.embedding, transposed=True)
    else:
        logits = ops.linear(h, weights.head)
    return (jnp.max(logits, axis=-1) > 0).astype(token.dtype), logits


def loop(weights: Weights, token: jax.Array, steps: int) -> jax.Array:
    """`steps` steps in one loop on the device, each from the token that the last one chose; returns [1]."""
    return lax.fori_loop(0, steps, lambda _, token: step(weights, token)[0], token)


def compiled(weights: Weights, steps: int) -> Any:
    """The compiled loop: `program(weights, token)`."""
    return jax.jit(loop, static_argnums=2).lower(weights, jnp.zeros([1], jnp.int32), steps).compile()
