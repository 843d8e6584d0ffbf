"""Experts that take a limited number of tokens."""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from portable.ops._arguments import vary_together
from portable.ops._route.routing import Routing, pick

PRIORITIES = ("position", "score")
OVERFLOWS = ("drop", "next")


def limit_capacity(
    routing: Routing,
    capacity: int | Int[Array, " e"] | None = None,
    *,
    factor: float | None = None,
    priority: str | Float[Array, "*tokens"] = "position",
    overflow: str = "drop",
) -> Routing:
    """Lets an expert take no more than its capacity of choices.

    First choices of all tokens come before all second ones, and so on; within them the tokens stand in the order of
    `priority`. What finds its expert full becomes empty (overflow "drop"), or goes to the expert with the best score
    among those that have room and that the token does not hold ("next"): its weight is then the old one times the ratio
    of the two scores. Nothing is left over with "next" as long as a token finds such an expert. Weights are not
    normalised again.

    Args:
      routing: from `route`.
      capacity: choices an expert takes, or one number for each expert [E] (MoE++ gives its experts without computation
        more). Give it or `factor`.
      factor: the capacity is factor * tokens * k / E, rounded up.
      priority: "position", the order of the tokens in memory; "score", the tokens with the best score first
        (batch-prioritised); or [*tokens], larger first.
      overflow: "drop" or "next".

    Returns:
      Routing with the same logits and scores.

    Raises:
      ValueError: not exactly one of capacity and factor is given or it is out of range, a name is unknown, a shape does
        not fit, or "next" is asked of a routing without scores.

    Source: GShard (arXiv 2006.16668), algorithm 1; Switch Transformers (2101.03961), section 2.2 and appendix B
    ("no token left behind"); V-MoE (2106.05974), section 4.1 and algorithm 2; MoE++ (2410.07348).

    >>> import jax.numpy as jnp, portable
    >>> routing = portable.ops.route(jnp.array([[1.0, 0.0], [3.0, 0.0], [2.0, 0.0]]), top_k=1)
    >>> portable.ops.limit_capacity(routing, 2).indices.tolist()
    [[0], [0], [2]]
    >>> portable.ops.limit_capacity(routing, 2, priority="score").indices.tolist()
    [[2], [0], [0]]
    >>> portable.ops.limit_capacity(routing, 2, overflow="next").indices.tolist()
    [[0], [0], [1]]
    """
    *space, k = routing.indices.shape
    e, tokens = routing.num_experts, math.prod(space)
    if (capacity is None) == (factor is None):
        raise ValueError("limit_capacity: give either capacity or factor.")
    if factor is not None and not factor > 0:
        raise ValueError(f"limit_capacity: factor must be positive; got {factor}.")
    if isinstance(capacity, np.integer):
        capacity = int(capacity)
    if factor is not None:
        capacity = math.ceil(factor * tokens * k / e)
    if isinstance(capacity, int) and capacity < 1:
        raise ValueError(f"limit_capacity: an expert must take at least one choice; got {capacity}.")
    if not isinstance(capacity, int) and getattr(capacity, "shape", None) != (e,):
        raise ValueError(f"limit_capacity: capacity must be an integer or integers [E] with E={e}; got {capacity!r}.")
    if overflow not in OVERFLOWS:
        raise ValueError(f"limit_capacity: overflow must be one of {', '.join(OVERFLOWS)}; got {overflow!r}.")
    scores = routing.scores if overflow == "next" else None
    if overflow == "next" and scores is None:
        raise ValueError("limit_capacity: overflow='next' needs the scores of a routing from `route`; got none.")
    room = jnp.broadcast_to(jnp.asarray(capacity, jnp.int32), (e,))
    order = _order(routing, priority).reshape(tokens)
    flat = routing.indices.astype(jnp.int32).reshape(tokens, k)[order]
    rank = _ranks(flat.T.reshape(-1), e).reshape(k, tokens).T
    limits = jnp.append(room, jnp.int32(0))  # of an empty choice
    kept = jnp.where(rank < limits[flat], flat, jnp.int32(e))
    if scores is not None:
        kept = _move(kept, flat, scores.reshape(tokens, e)[order], room)
    back = jnp.argsort(order)
    indices = kept[back].reshape(*space, k)
    weights = routing.weights
    if scores is not None:
        before, after = pick(scores, routing.indices), pick(scores, indices)
        moved = indices != routing.indices
        weights = jnp.where(moved, weights * after / jnp.where(moved & (before != 0), before, 1), weights)
    return dataclasses.replace(routing, indices=indices, weights=jnp.where(indices == e, 0, weights))


def _order(routing: Routing, priority) -> Array:
    space = routing.indices.shape[:-1]
    if isinstance(priority, str):
        if priority not in PRIORITIES:
            raise ValueError(
                f"limit_capacity: priority must be an array or one of {', '.join(PRIORITIES)}; got {priority!r}."
            )
        if priority == "position":
            return jnp.arange(math.prod(space))
        values = routing.weights if routing.scores is None else pick(routing.scores, routing.indices)
        priority = values.max(-1)
    if getattr(priority, "shape", None) != space:
        raise ValueError(
            f"limit_capacity: priority must be [*tokens], {list(space)}, or a name; got "
            f"{list(priority.shape) if hasattr(priority, 'shape') else type(priority).__name__}."
        )
    return jnp.argsort(-jax.lax.stop_gradient(priority).reshape(-1), stable=True)


def _ranks(experts: Int[Array, " n"], e: int) -> Int[Array, " n"]:
    """Returns how many entries before each one name the same expert."""
    order = jnp.argsort(experts, stable=True)
    first = jnp.searchsorted(experts[order], jnp.arange(e + 1))
    return (jnp.arange(experts.size) - first[experts[order]])[jnp.argsort(order)]


def _move(kept, wanted, scores, room):
    """Places the choices that found their expert full, one of each token a round, until none has anywhere to go."""
    e = room.size
    scores = jax.lax.stop_gradient(scores)
    holds = (kept[..., None] == jnp.arange(e)).any(1)
    load = (kept[..., None] == jnp.arange(e)).sum((0, 1), dtype=jnp.int32)

    def proposals(kept, holds, load):
        waiting = (kept == e) & (wanted != e)
        # A score of 0 is an expert that was ruled out, or one without weight.
        open_ = ~holds & (load < room) & (scores > 0)
        best = jnp.argmax(jnp.where(open_, scores, -jnp.inf), -1).astype(jnp.int32)
        return waiting, jnp.where(waiting.any(-1) & open_.any(-1), best, jnp.int32(e))

    def again(state):
        return (proposals(*state)[1] < e).any()

    def step(state):
        kept, holds, load = state
        waiting, expert = proposals(kept, holds, load)
        left = jnp.append(room - load, jnp.int32(0))
        expert = jnp.where(_ranks(expert, e) < left[expert], expert, jnp.int32(e))
        first = waiting & (jnp.cumsum(waiting, -1) == 1)
        kept = jnp.where(first, expert[:, None], kept)
        taken = expert[:, None] == jnp.arange(e)
        return kept, holds | taken, load + taken.sum(0, dtype=jnp.int32)

    kept, holds, load, *_ = vary_together(kept, holds, load, scores, room)
    return jax.lax.while_loop(again, step, (kept, holds, load))[0]
