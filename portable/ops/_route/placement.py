"""What stands between a router and the experts' op: experts without computation, and a table of where experts lie."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from portable.checks import check_values
from portable.ops._arguments import accumulator, check_array, check_float, check_integer
from portable.ops._route.routing import Routing, spread


def simple_experts(
    x: Float[Array, "*tokens d"],
    routing: Routing,
    *,
    constants: Float[Array, "c d"] | None = None,
    mixes: Float[Array, "c d 2"] | None = None,
    copies: int = 0,
    zeros: int = 0,
) -> tuple[Float[Array, "*tokens d"], Routing]:
    """Computes the experts that are no networks, and returns the routing of those that are.

    The experts stand in this order: networks, constants, copies, zeros. A copy yields x (LongCat's zero-computation
    experts are copies), a zero nothing, and constant j

        a0 * x + a1 * constants[j]   with   [a0, a1] = softmax(x @ mixes[j])

    Args:
      x: [*tokens, d].
      routing: over all experts.
      constants, mixes: [c, d] and [c, d, 2], both or neither.
      copies, zeros: how many there are.

    Returns:
      (y, networks): the weighted sum of these experts' outputs, [*tokens, d] in the dtype of x (summed in float32, or
      float64 where an argument is); and the Routing for `moe_ffn`, in which their choices are empty.

    Raises:
      ValueError: shapes do not fit, or the routing has fewer experts than are named.
      TypeError: an array has a dtype of another kind.

    Source: MoE++ (arXiv 2410.07348); LongCat-Flash (2509.01322).

    >>> import jax.numpy as jnp, portable
    >>> routing = portable.ops.Routing(jnp.array([[0, 2]]), jnp.array([[0.75, 0.25]]), num_experts=3)
    >>> y, networks = portable.ops.simple_experts(jnp.ones([1, 4]), routing, copies=1)
    >>> y.tolist(), networks.indices.tolist(), networks.num_experts
    ([[0.25, 0.25, 0.25, 0.25]], [[0, 2]], 2)
    """
    check_array("simple_experts", x=x, constants=constants, mixes=mixes)
    check_float("simple_experts", x=x, constants=constants, mixes=mixes)
    if x.shape[:-1] != routing.indices.shape[:-1]:
        raise ValueError(
            f"simple_experts: x must be [*tokens, d] of the routing's tokens, {list(routing.indices.shape[:-1])}; got "
            f"shape {list(x.shape)}."
        )
    d = x.shape[-1]
    if (constants is None) != (mixes is None):
        raise ValueError("simple_experts: give constants and mixes together, or neither.")
    if constants is not None and mixes is not None:
        _check_constants(constants, mixes, d)
    c = 0 if constants is None else len(constants)
    first = routing.num_experts - c - copies - zeros
    if min(copies, zeros, first) < 0:
        raise ValueError(
            f"simple_experts: the routing's {routing.num_experts} experts must include {c} constants, {copies} copies "
            f"and {zeros} zeros."
        )
    dtype = accumulator(x, constants, mixes, routing.weights)
    wide, weights, indices = x.astype(dtype), routing.weights.astype(dtype), routing.indices
    copied = (indices >= first + c) & (indices < first + c + copies)
    share = jnp.where(copied, weights, 0).sum(-1)
    y = 0
    if constants is not None and mixes is not None:
        each = spread(weights, indices - first, c)
        mix = jax.nn.softmax(jnp.einsum("...d,cdm->...cm", wide, mixes.astype(dtype)), axis=-1)
        share = share + (each * mix[..., 0]).sum(-1)
        y = jnp.einsum("...c,cd->...d", each * mix[..., 1], constants.astype(dtype))
    y = y + share[..., None] * wide
    network = indices < first
    networks = Routing(jnp.where(network, indices, first), jnp.where(network, routing.weights, 0), first)
    return y.astype(x.dtype), networks


def _check_constants(constants: Array, mixes: Array, d: int) -> None:
    if constants.shape[1:] != (d,) or mixes.shape != (len(constants), d, 2):
        raise ValueError(
            f"simple_experts: constants must be [c, d] and mixes [c, d, 2] with d={d}; got {list(constants.shape)} and "
            f"{list(mixes.shape)}."
        )


def remap_experts(
    routing: Routing,
    table: Int[Array, "*rows e"],
    *,
    num_experts: int,
    rows: Int[Array, "*tokens"] | None = None,
) -> Routing:
    """Says where each chosen expert lies: one gather between `route` and `moe_ffn`.

    With a table of one row: experts that were pruned, or stand in another order. With several, each token names its
    own: experts that an adapter replaces (ESFT, ExpertWeave: the adapter of a token is its row), or copies of busy
    experts (a token's row is its place modulo the number of copies).

    Args:
      routing: over E experts.
      table: [E] or [rows, E] integers, the place of each expert, from 0 to num_experts; num_experts for one that is
        gone, whose choices become empty. No place stands twice in a row.
      num_experts: how many places there are.
      rows: [*tokens] integers, with a table of several rows.

    Returns:
      Routing over num_experts, without logits and scores (which belong to the router's experts). Weights are the
      routing's own: a router that should not choose a pruned expert gets its logit as -inf.

    Raises:
      ValueError: shapes do not fit, or concrete numbers are out of range or stand twice.
      TypeError: table or rows are not integers.

    Source: ESFT (arXiv 2407.01906); ExpertWeave (2508.17624).

    >>> import jax.numpy as jnp, portable
    >>> routing = portable.ops.Routing(jnp.array([[0, 1], [0, 1]]), jnp.ones([2, 2]), num_experts=2)
    >>> table = jnp.array([[0, 1], [0, 2]])
    >>> portable.ops.remap_experts(routing, table, num_experts=3, rows=jnp.array([0, 1])).indices.tolist()
    [[0, 1], [0, 2]]
    """
    check_table(table, routing.num_experts, num_experts)
    check_array("remap_experts", rows=rows)
    check_integer("remap_experts", rows=rows)
    tokens = routing.indices.shape[:-1]
    if (rows is not None) != (table.ndim == 2):
        raise ValueError("remap_experts: give rows with a table [rows, E], and none with a table [E].")
    if rows is not None and rows.shape != tokens:
        raise ValueError(f"remap_experts: rows must be [*tokens], {list(tokens)}; got shape {list(rows.shape)}.")
    if rows is not None:
        check_values(
            lambda r: (r >= 0) & (r < table.shape[0]),
            f"remap_experts: rows must be from 0 to {table.shape[0] - 1}, the rows of the table.",
            rows,
        )
    places = jnp.pad(table.astype(jnp.int32), [(0, 0)] * (table.ndim - 1) + [(0, 1)], constant_values=num_experts)
    indices = places[routing.indices] if rows is None else places[rows[..., None], routing.indices]
    return Routing(indices, jnp.where(indices == num_experts, 0, routing.weights), num_experts)


def check_table(table: Int[Array, "*rows e"], e: int, num_experts: int) -> None:
    """Raises unless `remap_experts` can take the table for a router over e experts."""
    check_array("remap_experts", table=table)
    check_integer("remap_experts", table=table)
    if table.ndim not in (1, 2) or table.shape[-1] != e:
        raise ValueError(f"remap_experts: table must be [E] or [rows, E] with E={e}; got shape {list(table.shape)}.")
    check_values(
        lambda t: (t >= 0) & (t <= num_experts),
        f"remap_experts: table must hold places from 0 to {num_experts} (which stands for none).",
        table,
    )
    check_values(
        lambda t: (t == num_experts) | ((t[..., :, None] == t[..., None, :]).sum(-1) == 1),
        "remap_experts: no place may stand twice in a row of the table.",
        table,
    )
