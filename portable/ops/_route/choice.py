"""Routing in which the experts choose."""

import math

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from portable.checks import check_values
from portable.ops._arguments import accumulator, check_array, check_float
from portable.ops._route.routing import ExpertChoice


def expert_choice(
    logits: Float[Array, "*tokens e"],
    *,
    capacity: int | None = None,
    factor: float | None = None,
    mask: Bool[Array, "*tokens"] | None = None,
) -> ExpertChoice:
    """Lets each expert take the tokens that score highest with it.

        s = softmax(logits) over the experts;  weights, indices = top_k(transpose(s), capacity)

    Every expert is equally loaded and none can overflow; a token may go to any number of experts, or to none. As
    experts look at all tokens, later ones too, a model that generates text token by token cannot be trained so without
    learning from the future. Ties go to the earlier token. Computed in float32 (float64 if the logits are);
    differentiable in every mode through the weights.

    Args:
      logits: [*tokens, E], any floating dtype.
      capacity: tokens an expert takes. Give it or `factor`.
      factor: mean number of experts a token: the capacity is factor * tokens / E, rounded up, at most all tokens.
      mask: [*tokens] booleans, False at padding, which is taken last and with weight 0.

    Returns:
      ExpertChoice, indices and weights [E, capacity].

    Raises:
      ValueError: shapes do not fit, not exactly one of capacity and factor is given or it is out of range, or a
        concrete logit is NaN or +inf.
      TypeError: logits are not floating point.

    Source: Zhou et al. 2022 (arXiv 2202.09368), equation 1 and section 3.2.

    >>> import jax.numpy as jnp, portable
    >>> choice = portable.ops.expert_choice(jnp.array([[2.0, 0.0], [0.0, 1.0], [3.0, 0.0]]), capacity=2)
    >>> choice.indices.tolist()
    [[2, 0], [1, 0]]
    """
    check_array("expert_choice", logits=logits, mask=mask)
    check_float("expert_choice", logits=logits)
    if logits.ndim < 2:
        raise ValueError(f"expert_choice: logits must be [*tokens, E]; got rank {logits.ndim}.")
    if mask is not None and (mask.shape != logits.shape[:-1] or mask.dtype != bool):
        raise ValueError(
            f"expert_choice: mask must be booleans [*tokens], {list(logits.shape[:-1])}; got {mask.dtype} "
            f"{list(mask.shape)}."
        )
    e, tokens = logits.shape[-1], math.prod(logits.shape[:-1])
    if (capacity is None) == (factor is None):
        raise ValueError("expert_choice: give either capacity or factor.")
    if capacity is None:
        capacity = min(tokens, math.ceil((factor or 0) * tokens / e))
    if not 1 <= capacity <= tokens:
        raise ValueError(
            f"expert_choice: capacity must be from 1 to the number of tokens; got {capacity}, {tokens} tokens."
        )
    check_values(
        lambda x: x < float("inf"),
        "expert_choice: logits must hold no NaN and no +inf; look at what came before the router.",
        logits,
    )
    logits = logits.astype(accumulator(logits))
    scores = jax.nn.softmax(logits, axis=-1)
    columns = scores.reshape(tokens, e).T
    if mask is not None:
        columns = jnp.where(mask.reshape(-1), columns, -1)
    weights, indices = jax.lax.top_k(columns, capacity)
    return ExpertChoice(indices.astype(jnp.int32), jnp.maximum(weights, 0), logits, scores)
