"""The order of rows in which experts work: choices sorted by expert, stable, on the device, of static shapes."""

from typing import Any, NamedTuple

import jax.numpy as jnp


class Plan(NamedTuple):
    """Choice c = t * k + j is the j-th of token t; row r of the experts' order is choice order[r].

    Attributes:
      order: [m] int32, m = t * k; empty choices come last.
      rank: [t, k] int32, the row of each choice.
      group_sizes: [e] int32, rows of each expert.
      token: [m] int32, the token of each row.
    """

    order: Any
    rank: Any
    group_sizes: Any
    token: Any


def make(indices, experts: int) -> Plan:
    """Returns the plan of indices [t, k] among this many experts; other indices are empty choices."""
    flat = indices.reshape(-1)
    order = jnp.argsort(flat, stable=True).astype(jnp.int32)
    rank = jnp.zeros_like(order).at[order].set(jnp.arange(flat.size, dtype=jnp.int32), unique_indices=True)
    group_sizes = jnp.sum(flat[:, None] == jnp.arange(experts), axis=0, dtype=jnp.int32)
    return Plan(order, rank.reshape(indices.shape), group_sizes, order // max(indices.shape[1], 1))


def combine(y, plan: Plan, weights, experts_of):
    """Returns the weighted sum over each token's choices, [t, d] in the weights' dtype, in the order of choices.

    Args:
      y: [m, d] rows in the experts' order.
      plan: their order.
      weights: [t, k].
      experts_of: [t, k] bool, false where a choice is empty: its row may hold anything.
    """
    rows = jnp.where(experts_of[..., None], y[plan.rank].astype(weights.dtype), 0)
    return jnp.sum(weights[..., None] * rows, axis=1)


def limited(indices, experts: int, capacity: int):
    """Returns indices [t, k] with the choices of an expert behind its first `capacity`, in order of tokens, emptied."""
    plan = make(indices, experts)
    starts = jnp.cumsum(plan.group_sizes) - plan.group_sizes
    within = plan.rank - starts[jnp.minimum(indices, experts - 1)]
    return jnp.where(within < capacity, indices, experts)
