"""The contract of `moe_ffn`: checks and preparation. No algorithm."""

import math
from collections.abc import Sequence

import jax.numpy as jnp
from jaxtyping import Array, Float

from portable import selection
from portable.checks import check_values
from portable.ops._arguments import accumulator, check_float, check_integer, check_shape, vary_together
from portable.ops._grouped_matmul.api import check_experts
from portable.ops._moe_ffn import activations, plan
from portable.ops._route.routing import Routing

_Up = Float[Array, "e d f"] | Sequence[Float[Array, "d f"]]
_Down = Float[Array, "e f d"] | Sequence[Float[Array, "f d"]]


def moe_ffn(
    x: Float[Array, "*tokens d"],
    w_gate: _Up | None,
    w_up: _Up,
    w_down: _Down,
    routing: Routing,
    *,
    activation: str = "silu",
    b_gate: Float[Array, "e f"] | None = None,
    b_up: Float[Array, "e f"] | None = None,
    b_down: Float[Array, "e d"] | None = None,
    capacity: int | None = None,
    implementation: str | None = None,
) -> Float[Array, "*tokens d"]:
    """Runs each token through the experts that a router chose for it, and sums what they return, weighted.

    y = sum_j weights[j] * (act(x w_gate[i_j] + b_gate[i_j]) * (x w_up[i_j] + b_up[i_j])) w_down[i_j] + b_down[i_j],
    i_j = routing.indices[j] (Shazeer et al. 2017, arXiv:1701.06538, equation 1, with the gated networks of
    arXiv:2002.05202). Every choice is computed, however uneven (Gale et al. 2022, arXiv:2211.15841). Choices are sorted
    by expert on the device; sums over channels are float32, and those over a token's choices are made in their order,
    so results are the same bits every time. Differentiable in x, the experts and routing.weights, in reverse mode; a
    differentiated call keeps the products with w_gate and w_up, [t * k, f] each.

    Args:
      x: [*tokens, d].
      w_gate: [e, d, f], or e arrays [d, f]; None for experts without a gate, act(x w_up).
      w_up: likewise.
      w_down: [e, f, d], or e arrays [f, d]. A CPU multiplies with separate arrays where they lie, and reads copies of a
        stacked array's: separate ones are faster for few tokens an expert.
      routing: of `route`, for these tokens and experts.
      activation: "silu", "gelu", "gelu_tanh", "relu", "relu2", or "swiglu_oai", GPT-OSS's clamped gate.
      b_gate, b_up, b_down: biases.
      capacity: the most choices an expert takes, the first in order of tokens; the rest are dropped. None takes all.
      implementation: "reference", "xla" (the platform's form), or "xla_small_tiles", "xla_large_tiles", "xla_ragged",
        "xla_capacity" (needs a capacity); "pallas_tpu", "triton" (stacked arrays).

    Returns:
      [*tokens, d] in x's dtype; 0 for a token all of whose choices are empty.

    Raises:
      ValueError: shapes do not fit, the routing was made for another number of experts, a concrete index is out of
        range, or activation is not one of those above.
      TypeError: an argument has the wrong dtype, or routing is not a `Routing`.
      portable.Unavailable: the named implementation cannot take these arguments.
    """
    arrays, options = prepare(
        x,
        w_gate,
        w_up,
        w_down,
        routing,
        activation=activation,
        b_gate=b_gate,
        b_up=b_up,
        b_down=b_down,
        capacity=capacity,
    )
    selection.choose("moe_ffn", implementation, *arrays, **options)
    if not routing.indices.size or capacity == 0:
        return jnp.zeros_like(x)
    (y,) = selection.call("moe_ffn", implementation, arrays, options)
    return y.reshape(x.shape)


def prepare(x, w_gate, w_up, w_down, routing, *, activation="silu", b_gate=None, b_up=None, b_down=None, capacity=None):
    """Checks the arguments; returns the core's arrays (see `Arguments`) and its options."""
    if not isinstance(routing, Routing):
        raise TypeError(f"moe_ffn: routing must be a Routing, as ops.route returns; got {type(routing).__name__}.")
    if not hasattr(x, "ndim") or x.ndim < 1:
        raise ValueError(f"moe_ffn: x must be [*tokens, d]; got {getattr(x, 'shape', x)!r}.")
    check_float("moe_ffn", x=x, weights=routing.weights, b_gate=b_gate, b_up=b_up, b_down=b_down)
    check_integer("moe_ffn", indices=routing.indices)
    sizes: dict[str, int] = {"d": x.shape[-1]}
    w_gate, w_up = (check_experts("moe_ffn", *w, "d f", sizes) for w in (("w_gate", w_gate), ("w_up", w_up)))
    w_down = check_experts("moe_ffn", "w_down", w_down, "f d", sizes)
    if w_up is None or w_down is None:
        raise TypeError("moe_ffn: w_up and w_down must be arrays, or sequences of them; got None.")
    for name, bias, letters in (("b_gate", b_gate, "e f"), ("b_up", b_up, "e f"), ("b_down", b_down, "e d")):
        check_shape("moe_ffn", name, bias, letters, sizes)
    if len({isinstance(w, tuple) for w in (w_gate, w_up, w_down) if w is not None}) > 1:
        raise TypeError("moe_ffn: w_gate, w_up and w_down must all be stacked arrays, or all sequences; got both.")
    if activation not in activations.NAMES:
        raise ValueError(f"moe_ffn: activation must be one of {', '.join(activations.NAMES)}; got {activation!r}.")
    if w_gate is None and (b_gate is not None or activation == "swiglu_oai"):
        raise ValueError("moe_ffn: b_gate and activation='swiglu_oai' need a gate; got w_gate=None.")
    if capacity is not None and (isinstance(capacity, bool) or not hasattr(capacity, "__index__") or capacity < 0):
        raise ValueError(f"moe_ffn: capacity must be an integer of at least 0; got {capacity!r}.")
    experts, shape = sizes["e"], (*x.shape[:-1], routing.indices.shape[-1])
    if routing.num_experts != experts:
        raise ValueError(
            f"moe_ffn: the routing must be made for these experts, e={experts}; got one for {routing.num_experts}."
        )
    if routing.indices.shape != shape or routing.weights.shape != shape:
        raise ValueError(
            f"moe_ffn: indices and weights must be [*tokens, k] for x {list(x.shape)}; "
            f"got {list(routing.indices.shape)} and {list(routing.weights.shape)}."
        )
    check_values(
        lambda i: (i >= 0) & (i <= experts),
        f"moe_ffn: indices must lie in 0..{experts}, where {experts} is an empty choice.",
        routing.indices,
    )
    leaves = [w for group in (w_gate, w_up, w_down) for w in (group if isinstance(group, tuple) else (group,))]
    wide = accumulator(x, routing.weights, b_gate, b_up, b_down, *leaves)
    dtype = x.dtype if wide == jnp.float32 else wide
    tokens, k = math.prod(x.shape[:-1]), shape[-1]
    indices = routing.indices.reshape(tokens, k).astype(jnp.int32)
    # Compiled code cannot refuse them: they are no choice, and must not move the rows of others.
    indices = jnp.where((indices < 0) | (indices > experts), experts, indices)
    weights = routing.weights.reshape(tokens, k).astype(wide)
    if capacity is not None:
        indices = plan.limited(indices, experts, capacity)
    weights = jnp.where(indices < experts, weights, 0)
    cast = [None if a is None else a.astype(dtype) for a in (b_gate, b_up, b_down)]
    # The matrices keep their dtype: a form that takes a few of them need not convert all.
    given = vary_together(x.reshape(tokens, sizes["d"]).astype(dtype), *leaves, *cast, indices, weights)
    x, *rest, b_gate, b_up, b_down, indices, weights = given
    if isinstance(w_up, tuple):
        count = 0 if w_gate is None else experts
        gate = tuple(rest[:count]) if count else None
        experts_of = (gate, tuple(rest[-2 * experts : -experts]), tuple(rest[-experts:]))
    else:
        experts_of = tuple(rest)
    return (x, *experts_of, indices, weights, b_gate, b_up, b_down), {"activation": activation, "capacity": capacity}
