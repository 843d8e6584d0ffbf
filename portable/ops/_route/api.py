"""The router: logits to each token's experts and weights."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from portable.checks import check_values
from portable.ops._arguments import accumulator, check_array, check_float
from portable.ops._route.routing import Routing, pick

SCORES = ("softmax", "sigmoid", "relu_rms")
GROUP_SCORES = ("max", "top2")


def route(
    logits: Float[Array, "*tokens e"],
    *,
    top_k: int,
    score: str = "softmax",
    renormalize: bool = False,
    renormalize_eps: float = 0.0,
    bias: Float[Array, " e"] | None = None,
    groups: int = 1,
    group_top_k: int | None = None,
    group_score: str = "max",
    scaling: float = 1.0,
    score_scale: Float[Array, " e"] | None = None,
    score_eps: float = 1e-6,
    zero_experts: int = 0,
    mask: Bool[Array, "*tokens"] | None = None,
) -> Routing:
    """Chooses each token's experts and their weights.

        s = softmax(logits), sigmoid(logits), or r / sqrt(mean(r**2) + score_eps) with r = relu(logits)
        c = s + bias
        c = -inf outside the group_top_k of `groups` blocks of experts with the best scores
        indices = the top_k largest c;  w = s[indices]  (relu_rms: times score_scale[indices])
        w = w / (sum(w) + renormalize_eps)                                                # if renormalize
        weights = scaling * w

    A group's score is the largest c in it ("max", DeepSeek-V2) or the sum of the two largest ("top2", DeepSeek-V3). The
    bias decides who is chosen and never enters a weight. Ties go to the lower index. A router that takes the softmax
    after its selection (gpt-oss, GraniteMoE) is `renormalize=True`: the two are one function.

    Choices are empty (index E, weight 0) of a token that `mask` rules out, of an expert whose logit is -inf (so -inf
    prunes an expert), and with relu_rms of an expert whose logit is not positive: BlockFFN's number of experts varies,
    up to top_k. Computed in float32 (float64 if an argument is). Plain JAX, differentiable in every mode through the
    weights, in the logits and score_scale; the choice itself has no derivative.

    Args:
      logits: [*tokens, E], any floating dtype; keep the router's product in float32.
      top_k: choices a token.
      score: "softmax", "sigmoid" or "relu_rms".
      renormalize, renormalize_eps: whether the weights of a token are divided by their sum, and what is added to it.
      bias: [E], added for the selection alone (auxiliary-loss-free balancing; `updated_bias` moves it).
      groups, group_top_k: blocks of E / groups experts, and how many of them a token may use; None for all.
      group_score: "max" or "top2".
      scaling: factor of the weights.
      score_scale: [E], the learned scale of relu_rms' normalisation.
      score_eps: added to its mean square.
      zero_experts: the last experts, so many, yield nothing (MoE++): their weight is 0 before the weights are
        renormalised.
      mask: [*tokens] booleans, False at padding.

    Returns:
      Routing with the logits in float32 and scores s.

    Raises:
      ValueError: shapes do not fit, top_k exceeds the experts or those of the chosen groups, groups do not divide E, a
        name is unknown, or a concrete logit is NaN or +inf (inside compiled code under `portable.checks()`).
      TypeError: an array has a dtype of another kind, or a count is no integer.

    Source: Mixtral (arXiv 2401.04088), section 2.1; DeepSeek-V2 (2405.04434), equations 20 to 22, and V3 (2412.19437),
    equations 12 to 16; BlockFFN (2507.08771); MoE++ (2410.07348).

    >>> import jax.numpy as jnp, portable
    >>> routing = portable.ops.route(jnp.log(jnp.array([[1.0, 4.0, 3.0, 2.0]])), top_k=2, renormalize=True)
    >>> routing.indices.tolist(), [round(w, 4) for w in routing.weights[0].tolist()]
    ([[1, 2]], [0.5714, 0.4286])
    """
    _check(logits, bias, score_scale, mask, top_k, score, groups, group_top_k, group_score, zero_experts)
    e = logits.shape[-1]
    dtype = accumulator(logits, bias, score_scale)
    logits = logits.astype(dtype)
    out = jax.lax.stop_gradient(logits) == -jnp.inf
    if mask is not None:
        out |= ~mask[..., None]
    scores = _scores(jnp.where(out, -jnp.inf, logits), score, score_eps)

    # Without bias and groups the logits order the experts as the scores do, and no two of them meet by underflow.
    choice = logits if bias is None and groups == 1 else scores
    choice = jax.lax.stop_gradient(choice if bias is None else choice + bias.astype(dtype))
    choice = jnp.where(out | (logits <= 0) if score == "relu_rms" else out, -jnp.inf, choice)
    if groups > 1:
        choice = _within_groups(choice, groups, groups if group_top_k is None else group_top_k, group_score)
    best, indices = jax.lax.top_k(choice, top_k)
    weights = pick(scores if score_scale is None else scores * score_scale.astype(dtype), indices)
    if zero_experts:
        weights = jnp.where(indices >= e - zero_experts, 0, weights)
    empty = best == -jnp.inf
    weights = jnp.where(empty, 0, weights)
    if renormalize:
        total = weights.sum(-1, keepdims=True) + renormalize_eps
        weights = weights / jnp.where(total == 0, 1, total)
    return Routing(
        indices=jnp.where(empty, e, indices.astype(jnp.int32)),
        weights=weights * scaling,
        num_experts=e,
        logits=logits,
        scores=scores,
    )


def _check(logits, bias, score_scale, mask, top_k, score, groups, group_top_k, group_score, zero_experts) -> None:
    check_array("route", logits=logits, bias=bias, score_scale=score_scale, mask=mask)
    check_float("route", logits=logits, bias=bias, score_scale=score_scale)
    if logits.ndim < 1:
        raise ValueError("route: logits must be [*tokens, E]; got a scalar.")
    e = logits.shape[-1]
    for name, x in (("bias", bias), ("score_scale", score_scale)):
        if x is not None and x.shape != (e,):
            raise ValueError(f"route: {name} must be [E] with E={e}; got shape {list(x.shape)}.")
    if mask is not None and (mask.shape != logits.shape[:-1] or mask.dtype != bool):
        raise ValueError(
            f"route: mask must be booleans [*tokens], {list(logits.shape[:-1])}; got {mask.dtype} {list(mask.shape)}."
        )
    counts = {"top_k": top_k, "groups": groups, "group_top_k": group_top_k, "zero_experts": zero_experts}
    for name, count in counts.items():
        if isinstance(count, bool) or not (isinstance(count, int) or (count is None and name == "group_top_k")):
            raise TypeError(f"route: {name} must be an integer; got {count!r}.")
    if not 1 <= top_k <= e:
        raise ValueError(f"route: top_k must be from 1 to the number of experts; got top_k={top_k}, E={e}.")
    if score not in SCORES:
        raise ValueError(f"route: score must be one of {', '.join(SCORES)}; got {score!r}.")
    if score_scale is not None and score != "relu_rms":
        raise ValueError(f"route: score_scale belongs to score='relu_rms'; got score={score!r}.")
    if not 0 <= zero_experts <= e:
        raise ValueError(f"route: zero_experts must be from 0 to the number of experts; got {zero_experts}, E={e}.")
    if groups < 1 or e % groups:
        raise ValueError(f"route: groups must divide the experts; got groups={groups}, E={e}.")
    if group_score not in GROUP_SCORES:
        raise ValueError(f"route: group_score must be one of {', '.join(GROUP_SCORES)}; got {group_score!r}.")
    kept = groups if group_top_k is None else group_top_k
    if not 1 <= kept <= groups:
        raise ValueError(f"route: group_top_k must be from 1 to groups={groups}; got {group_top_k}.")
    if top_k > kept * (e // groups):
        raise ValueError(
            f"route: top_k must not exceed the experts of the chosen groups; got top_k={top_k}, group_top_k={kept} "
            f"groups of {e // groups}."
        )
    check_values(
        lambda x: x < float("inf"),
        "route: logits must hold no NaN and no +inf (-inf rules an expert out); look at what came before the router.",
        logits,
    )
    for name, x in (("bias", bias), ("score_scale", score_scale)):
        check_values(lambda x: abs(x) < float("inf"), f"route: {name} must hold finite numbers.", x)


def _scores(logits, score: str, eps: float):
    if score == "sigmoid":
        return jax.nn.sigmoid(logits)
    if score == "relu_rms":
        positive = jax.nn.relu(logits)
        return positive * jax.lax.rsqrt(jnp.mean(positive * positive, -1, keepdims=True) + eps)
    # A row without any expert has no softmax: its scores are 0.
    none = jnp.all(jax.lax.stop_gradient(logits) == -jnp.inf, -1, keepdims=True)
    return jnp.where(none, 0, jax.nn.softmax(jnp.where(none, 0, logits), axis=-1))


def _within_groups(choice, groups: int, kept: int, group_score: str):
    blocks = choice.reshape(*choice.shape[:-1], groups, -1)
    best, _ = jax.lax.top_k(blocks, min(2, blocks.shape[-1]) if group_score == "top2" else 1)
    # An expert that is ruled out adds nothing to its group's score, unless nothing is left of the group.
    level = jnp.where(best[..., 0] == -jnp.inf, -jnp.inf, jnp.where(best == -jnp.inf, 0, best).sum(-1))
    _, chosen = jax.lax.top_k(level, kept)
    allowed = (chosen[..., None] == jnp.arange(groups)).any(-2)
    return jnp.where(allowed[..., None], blocks, -jnp.inf).reshape(choice.shape)
