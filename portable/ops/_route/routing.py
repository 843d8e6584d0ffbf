"""What a router decides, and what the experts' op reads: which experts take which tokens, and with what weight."""

import dataclasses
import typing

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int


@jax.tree_util.register_dataclass
@typing.no_type_check  # JAX also holds shapes, shardings and tangents in these fields
@dataclasses.dataclass(frozen=True)
class Routing:
    """Each token's experts.

    Attributes:
      indices: [*tokens, k] int32, the expert of each choice; `num_experts` where a choice is empty (a dropped token, a
        router that wants fewer). An expert stands at most once in a token's choices.
      weights: [*tokens, k], float32 from `route`; 0 where a choice is empty.
      num_experts: E, static.
      logits: [*tokens, E] float32 as the router gave them, or None for a routing made by hand.
      scores: [*tokens, E] float32, the logits after the score function, without selection's bias; or None.
    """

    indices: Int[Array, "*tokens k"]
    weights: Float[Array, "*tokens k"]
    num_experts: int = dataclasses.field(metadata={"static": True})
    logits: Float[Array, "*tokens e"] | None = None
    scores: Float[Array, "*tokens e"] | None = None


@jax.tree_util.register_dataclass
@typing.no_type_check  # JAX also holds shapes, shardings and tangents in these fields
@dataclasses.dataclass(frozen=True)
class ExpertChoice:
    """Each expert's tokens (Zhou et al. 2022, arXiv:2202.09368, equation 1).

    Attributes:
      indices: [E, c] int32, the tokens an expert takes, counted over all tokens in row-major order.
      weights: [E, c], float32 from `expert_choice`.
      logits, scores: as in `Routing`.
    """

    indices: Int[Array, "e c"]
    weights: Float[Array, "e c"]
    logits: Float[Array, "*tokens e"] | None = None
    scores: Float[Array, "*tokens e"] | None = None


def pick(values: Float[Array, "*tokens e"], indices: Int[Array, "*tokens k"]) -> Float[Array, "*tokens k"]:
    """Returns the values at the indices, 0 at an index beyond them.

    A comparison with every expert instead of a gather: its transpose is a sum over choices, not a scatter.
    """
    chosen = indices[..., None] == jnp.arange(values.shape[-1])
    return jnp.where(chosen, values[..., None, :], 0).sum(-1)


def spread(weights: Float[Array, "*tokens k"], indices: Int[Array, "*tokens k"], e: int) -> Float[Array, "*tokens e"]:
    """Returns each expert's weight, the transpose of `pick`."""
    return jnp.where(indices[..., None] == jnp.arange(e), weights[..., None], 0).sum(-2)
