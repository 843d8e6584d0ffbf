"""Values beside the output that training a router needs: pure functions of a `Routing`.

Means and counts are over the tokens a program sees. Where these are split over the devices of a `shard_map`,
`axis_name` makes them those of all tokens: a mean of the devices' losses would be another number.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, Num

from portable.ops._route.routing import Routing, spread

AxisName = str | tuple[str, ...] | None
SHARES = ("choices", "tokens")


def expert_load(routing: Routing, *, axis_name: AxisName = None) -> Int[Array, " e"]:
    """Counts the tokens of each expert.

    Args:
      routing: from `route`; empty choices count nowhere.
      axis_name: mesh axes of an enclosing `shard_map` to sum over.

    Returns:
      [E] int32.
    """
    return total(_counts(routing.indices, routing.num_experts).sum(_leading(routing)), axis_name)


def updated_bias(bias: Float[Array, "*b e"], load: Num[Array, "*b e"], *, rate: float = 1e-3) -> Float[Array, "*b e"]:
    """Moves the selection's bias towards the experts with less than the mean load, by `rate` each.

    Args:
      bias: [E], the `bias` of `route`; or those of several layers, [..., E].
      load: of the same shape, from `expert_load` over a whole batch; a common factor does not matter.
      rate: the step; DeepSeek-V3 trains with 0.001 and ends with 0.

    Returns:
      An array of that shape in the dtype of bias.

    Raises:
      ValueError: the shapes differ.

    Source: Wang et al. 2024 (arXiv 2408.15664), algorithm 1; DeepSeek-V3 (2412.19437), section 2.1.2.
    """
    if bias.shape != load.shape:
        raise ValueError(f"updated_bias: load must have the bias's shape, {list(bias.shape)}; got {list(load.shape)}.")
    load = load.astype(jnp.promote_types(jnp.float32, bias.dtype))
    return bias + (rate * jnp.sign(load.mean(-1, keepdims=True) - load)).astype(bias.dtype)


def load_balance_loss(
    routing: Routing,
    *,
    share_of: str = "choices",
    per_sequence: bool = False,
    recount: bool = False,
    expert_weights: Float[Array, " e"] | None = None,
    mask: Bool[Array, "*tokens"] | None = None,
    axis_name: AxisName = None,
) -> Float[Array, ""]:
    """Computes E * sum_i(f[i] * P[i]): how much often chosen experts are also those with high scores.

    P[i] is the mean over tokens of expert i's share of the token's scores, f[i] the share of it in the load: of all
    choices ("choices": f sums to 1, and the loss is 1 at balance; DeepSeek, ST-MoE's top-1) or of all tokens ("tokens":
    f sums to k; transformers' Mixtral). Gradients pass through P alone.

    Args:
      routing: from `route`.
      share_of: "choices" or "tokens".
      per_sequence: f and P are those of each sequence (the last axis of the tokens), and the loss is the mean over
        sequences (DeepSeek-V3's complementary loss).
      recount: count the top_k of the scores, without bias, groups and dropped choices, instead of the choices made: so
        DeepSeek-V3 and transformers.
      expert_weights: [E], factor of each expert's term (MoE++ gives its experts without computation less than 1).
      mask: [*tokens] booleans, False at padding.
      axis_name: mesh axes of an enclosing `shard_map`. With per_sequence each device holds whole sequences.

    Returns:
      [], float32.

    Raises:
      ValueError: the routing has no scores, share_of is unknown, or per_sequence has no axis of tokens.

    Source: Switch Transformers (arXiv 2101.03961), equations 4 to 6; DeepSeek-V3 (2412.19437), equations 17 to 20;
    MoE++ (2410.07348).

    >>> import jax.numpy as jnp, portable
    >>> routing = portable.ops.route(jnp.zeros([8, 4]), top_k=2)  # ties: all tokens to experts 0 and 1
    >>> [float(portable.ops.load_balance_loss(routing, share_of=of)) for of in ("choices", "tokens")]
    [1.0, 2.0]
    """
    shares = _shares("load_balance_loss", routing)
    if share_of not in SHARES:
        raise ValueError(f"load_balance_loss: share_of must be one of {', '.join(SHARES)}; got {share_of!r}.")
    if per_sequence and shares.ndim < 2:
        raise ValueError("load_balance_loss: per_sequence needs a routing of [..., t] tokens; got one token.")
    e, k = routing.num_experts, routing.indices.shape[-1]
    indices = jax.lax.top_k(jax.lax.stop_gradient(shares), k)[1] if recount else routing.indices
    real = _real(shares, mask)
    counts = _counts(indices, e) * real[..., None]
    axes = -2 if per_sequence else tuple(range(shares.ndim - 1))
    names = None if per_sequence else axis_name
    tokens = total(real.sum(axes if not per_sequence else -1), names)
    load = total(counts.sum(axes), names).astype(shares.dtype)
    f = load / jnp.maximum(tokens[..., None] if share_of == "tokens" else load.sum(-1, keepdims=True), 1)
    P = total((shares * real[..., None]).sum(axes), names) / jnp.maximum(tokens[..., None], 1)
    loss = e * (f * P if expert_weights is None else f * P * expert_weights).sum(-1)
    return mean(loss, tokens > 0, axis_name) if per_sequence else loss


def z_loss(
    routing: Routing, *, mask: Bool[Array, "*tokens"] | None = None, axis_name: AxisName = None
) -> Float[Array, ""]:
    """Computes the mean over tokens of logsumexp(logits)**2, which keeps logits small.

    Args:
      routing: from `route`.
      mask: [*tokens] booleans, False at padding.
      axis_name: mesh axes of an enclosing `shard_map`.

    Returns:
      [], float32.

    Raises:
      ValueError: the routing has no logits.

    Source: ST-MoE (arXiv 2202.08906), equation 5.
    """
    if routing.logits is None:
        raise ValueError("z_loss: the routing must have logits; take one from `route`.")
    real = _real(routing.logits, mask)
    logits = jnp.where(real[..., None], routing.logits, 0)
    return mean(jax.nn.logsumexp(logits, axis=-1) ** 2, real, axis_name)


def expert_importance(routing: Routing, *, axis_name: AxisName = None) -> Float[Array, " e"]:
    """Sums the weights of each expert over all tokens, for `balance_loss`.

    Args:
      routing: from `route`.
      axis_name: mesh axes of an enclosing `shard_map`.

    Returns:
      [E] in the dtype of the weights.

    Source: Shazeer et al. 2017 (arXiv 1701.06538), equation 6.
    """
    each = spread(routing.weights, routing.indices, routing.num_experts)
    return total(each.sum(_leading(routing)), axis_name)


def balance_loss(values: Float[Array, " e"]) -> Float[Array, ""]:
    """Computes the squared coefficient of variation of the experts' values: their importance, or their load.

    Args:
      values: [E], of `expert_importance`, or the sum over tokens of `noisy_load`; of all devices' tokens.

    Returns:
      [], variance (over E) / (mean**2 + 1e-10).

    Source: Shazeer et al. 2017 (arXiv 1701.06538), equations 7 and 11.
    """
    return values.var() / (values.mean() ** 2 + 1e-10)


def chunk_union(routing: Routing, chunk: int) -> Bool[Array, "*batch n e"]:
    """Says which experts each chunk of consecutive tokens uses: what decoding several tokens at once must load.

    The chunk-level sparsity is `1 - chunk_union(routing, chunk).mean()`; with chunk 1 it is that of single tokens.

    Args:
      routing: of [*batch, t] tokens.
      chunk: tokens in a chunk; the last one may be shorter.

    Returns:
      [*batch, n, E] with n = ceil(t / chunk).

    Raises:
      ValueError: chunk is not positive, or there is no axis of tokens.

    Source: BlockFFN (arXiv 2507.08771).
    """
    used = _counts(routing.indices, routing.num_experts) > 0
    return _chunks("chunk_union", used, chunk, False).any(-2)


def chunk_sparsity_loss(
    routing: Routing, chunk: int, *, mask: Bool[Array, "*tokens"] | None = None, axis_name: AxisName = None
) -> Float[Array, ""]:
    """Computes the mean over chunks and experts of 1 - prod over the chunk of (1 - share of the expert).

    A smooth form of the number of experts that a chunk uses, with shares of the scores for probabilities.

    Args:
      routing: from `route`, of [*batch, t] tokens.
      chunk: tokens in a chunk; the last one may be shorter.
      mask: [*batch, t] booleans, False at padding, which uses nothing.
      axis_name: mesh axes of an enclosing `shard_map`; each device holds whole chunks.

    Returns:
      [], float32.

    Raises:
      ValueError: the routing has no scores, chunk is not positive, or there is no axis of tokens.

    Source: BlockFFN (arXiv 2507.08771).
    """
    shares = _shares("chunk_sparsity_loss", routing)
    shares = _chunks("chunk_sparsity_loss", shares * _real(shares, mask)[..., None], chunk, 0)
    used = (1 - jnp.prod(1 - shares, axis=-2)).mean(-1)
    return mean(used, jnp.ones(used.shape, bool), axis_name)


def locality_loss(
    routing: Routing,
    *,
    steepness: float = 100.0,
    mask: Bool[Array, "*batch t"] | None = None,
    segment_ids: Int[Array, "*batch t"] | None = None,
    axis_name: AxisName = None,
) -> Float[Array, ""]:
    """Computes how ill each token's experts predict those of the next: a cross-entropy of softened activations.

    With a = sigmoid(steepness * logits), the mean over neighbours t, t + 1 and experts of the binary cross-entropy of
    a[t] to the target a[t + 1]; gradients pass through both.

    Args:
      routing: from `route`, of [*batch, t] tokens.
      steepness: of the sigmoid.
      mask: [*batch, t] booleans, False at padding.
      segment_ids: [*batch, t] integers; only neighbours of one segment count.
      axis_name: mesh axes of an enclosing `shard_map`; each device holds whole sequences.

    Returns:
      [], float32; 0 where there are no neighbours.

    Raises:
      ValueError: the routing has no logits, or no axis of tokens.

    Source: BlockFFN (arXiv 2507.08771).
    """
    if routing.logits is None or routing.logits.ndim < 2:
        raise ValueError("locality_loss: the routing must have logits [*batch, t, E]; take one from `route`.")
    real = _real(routing.logits, mask)
    logits = jnp.where(real[..., None], routing.logits, 0) * steepness
    left, right = logits[..., :-1, :], logits[..., 1:, :]
    loss = jax.nn.softplus(left) - left * jax.nn.sigmoid(right)
    pairs = real[..., :-1] & real[..., 1:]
    if segment_ids is not None:
        pairs &= segment_ids[..., :-1] == segment_ids[..., 1:]
    return mean(loss.mean(-1), pairs, axis_name)


def total(x, axis_name: AxisName):
    """Returns the sum over the mesh axes named, x itself without any."""
    return x if axis_name is None else jax.lax.psum(x, axis_name)


def mean(values, real, axis_name: AxisName):
    """Returns the mean of the values that are real, over all devices' of the mesh axes named; 0 where there is none."""
    summed, count = jnp.where(real, values, 0).sum(), real.sum().astype(values.dtype)
    return total(summed, axis_name) / jnp.maximum(total(count, axis_name), 1)


def _counts(indices, e: int) -> Int[Array, "*tokens e"]:
    return (indices[..., None] == jnp.arange(e)).sum(-2, dtype=jnp.int32)


def _leading(routing: Routing) -> tuple[int, ...]:
    return tuple(range(routing.indices.ndim - 1))


def _real(values, mask):
    if mask is None:
        return jnp.ones(values.shape[:-1], bool)
    if mask.shape != values.shape[:-1]:
        raise ValueError(f"mask must be [*tokens], {list(values.shape[:-1])}; got shape {list(mask.shape)}.")
    return mask


def _shares(op: str, routing: Routing) -> Float[Array, "*tokens e"]:
    """Returns the scores of each token divided by their sum: softmax is left as it is."""
    if routing.scores is None:
        raise ValueError(f"{op}: the routing must have scores; take one from `route`.")
    summed = routing.scores.sum(-1, keepdims=True)
    return routing.scores / jnp.where(summed == 0, 1, summed)


def _chunks(op: str, values, chunk: int, fill):
    """Returns [*batch, n, chunk, E] of [*batch, t, E]."""
    if values.ndim < 2 or chunk < 1:
        raise ValueError(f"{op}: tokens must be [*batch, t] and chunk at least 1; got {values.ndim - 1} axes, {chunk}.")
    *batch, t, e = values.shape
    values = jnp.pad(values, [(0, 0)] * len(batch) + [(0, -t % chunk), (0, 0)], constant_values=fill)
    return values.reshape(*batch, -1, chunk, e)
