"""From logits to the next token: repetition penalty, temperature, top-k, top-p, min-p in transformers' order.

Nothing here sorts the vocabulary. The cut of top-k and of top-p is found by bisection on the bits of the
float32 logits (32 counting passes, exact), many times cheaper than a sort of 50k tokens on a CPU; a sample
is drawn by inverting the cumulative distribution in two levels, which needs two random numbers a row instead
of one a token.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

_BLOCK = 256


class Options(NamedTuple):
    """How to choose a token. None leaves a rule out of the compiled program; values are traced.

    `temperature` 0 means the most likely token, whatever the filters.
    """

    temperature: jax.typing.ArrayLike
    top_k: jax.typing.ArrayLike | None = None
    top_p: jax.typing.ArrayLike | None = None
    min_p: jax.typing.ArrayLike | None = None
    repetition_penalty: jax.typing.ArrayLike | None = None


def choose(logits: jax.Array, top: jax.Array, options: Options, uniform: jax.Array) -> jax.Array:
    """Chooses one token a row; of equally likely tokens the greedy choice is the first.

    Args:
      logits: [b, v] float32, after any repetition penalty. Any row, even of NaN, gives a valid id.
      top: [b, 1], their maxima.
      options: the temperature and the filters.
      uniform: [b, 2] float32 in [0, 1), read only if the temperature is not 0.

    Returns:
      tokens [b] int32.
    """
    # One program serves greedy decoding and sampling: the branch not taken costs nothing when it runs.
    return lax.cond(
        options.temperature > 0,  # pyright: ignore[reportOperatorIssue]
        lambda: sample(filtered(logits, top, options), uniform),
        lambda: first_equal(logits, top),
    )


def first_equal(x: jax.Array, top: jax.Array) -> jax.Array:
    """Index of each row's first value equal to top [b, 1], the last index if none: [b, v] -> [b] int32."""
    index = lax.broadcasted_iota(jnp.int32, x.shape, 1)
    return jnp.min(jnp.where(x == top, index, x.shape[-1] - 1), axis=-1)


def penalized(logits: jax.Array, seen: jax.Array, penalty: jax.typing.ArrayLike) -> jax.Array:
    """Repetition penalty (Keskar et al. 2019, CTRL, section 4.1): lowers the scores of tokens already seen.

    Args:
      logits: [b, v] float32.
      seen: [b, v] bool, tokens of the prompt and those generated.
      penalty: positive scalar; 1 changes nothing, above 1 discourages repetition.

    Returns:
      [b, v] float32.
    """
    return jnp.where(seen, jnp.where(logits < 0, logits * penalty, logits / penalty), logits)


def filtered(logits: jax.Array, top: jax.Array, options: Options) -> jax.Array:
    """Applies temperature, then top-k, top-p and min-p, each to what the one before it left.

    Args:
      logits: [b, v] float32.
      top: [b, 1], their maxima.
      options: temperature > 0; a filter that is None is not part of the program.

    Returns:
      [b, v] float32, unnormalized log probabilities with maximum 0; -inf where a filter removed the token.
    """
    # The maximum is taken off first, so that a tiny temperature cannot overflow.
    x = (logits - top) / options.temperature
    if options.top_k is not None:
        x = _top_k(x, options.top_k)
    if options.top_p is not None:
        x = _top_p(x, options.top_p)
    if options.min_p is not None:
        x = jnp.where(x >= jnp.log(jnp.asarray(options.min_p, jnp.float32)), x, -jnp.inf)
    return x


def sample(x: jax.Array, uniform: jax.Array) -> jax.Array:
    """Draws a token from softmax(x): first a block of 256 tokens, then a token in it.

    Two levels keep the sums short (float32 is enough for any vocabulary) and read the vocabulary once.

    Args:
      x: [b, v] float32 log probabilities up to a constant a row, maximum 0, -inf where it must not fall.
      uniform: [b, 2] float32 in [0, 1).

    Returns:
      tokens [b] int32, never one with x = -inf.
    """
    b, v = x.shape
    blocks = -(-v // _BLOCK)
    x = jnp.pad(x, ((0, 0), (0, blocks * _BLOCK - v)), constant_values=-jnp.inf)
    weight = jnp.exp(x).reshape(b, blocks, _BLOCK)
    block = _invert(jnp.sum(weight, axis=-1), uniform[:, 0])
    inside = jnp.take_along_axis(weight, block[:, None, None], axis=1)[:, 0]
    return jnp.minimum(block * _BLOCK + _invert(inside, uniform[:, 1]), v - 1)


def _invert(weight: jax.Array, uniform: jax.Array) -> jax.Array:
    """First index with weight whose cumulative weight passes uniform * total: [b, m], [b] -> [b]."""
    index = lax.broadcasted_iota(jnp.int32, weight.shape, 1)
    # A parallel prefix sum may wobble by a rounding error; asking for weight keeps it off the zeros.
    reached = jnp.where(weight > 0, jnp.cumsum(weight, axis=-1), 0)
    wanted = uniform[:, None] * jnp.max(reached, axis=-1, keepdims=True)
    return jnp.min(jnp.where(reached > wanted, index, weight.shape[-1] - 1), axis=-1)


def _top_k(x: jax.Array, k: jax.typing.ArrayLike) -> jax.Array:
    """Keeps the k largest of each row and everything equal to the k-th."""
    bits = _ordered_bits(x)
    cut = _largest(lambda t: jnp.sum(bits >= t, axis=-1, dtype=jnp.int32) >= k, x.shape[0])
    return jnp.where(bits >= cut[:, None], x, -jnp.inf)


def _top_p(x: jax.Array, p: jax.typing.ArrayLike) -> jax.Array:
    """Keeps the smallest set of most likely tokens whose probability reaches p (Holtzman et al. 2019).

    A token stays if the probability before it in descending order is below p. Of tokens equally likely at the
    cut the first stay, as many as are needed; then top_p near 0 is greedy.
    """
    bits = _ordered_bits(x)
    weight = jnp.exp(x)
    wanted = p * jnp.sum(weight, axis=-1)
    cut = _largest(lambda t: jnp.sum(jnp.where(bits >= t, weight, 0), axis=-1) >= wanted, x.shape[0])[:, None]
    above, tied = bits > cut, bits == cut
    mass_above = jnp.sum(jnp.where(above, weight, 0), axis=-1, keepdims=True)
    weight_tied = jnp.max(jnp.where(tied, weight, 0), axis=-1, keepdims=True)
    ties_before = jnp.cumsum(tied, axis=-1, dtype=jnp.int32) - 1
    keep = above | (tied & (mass_above + ties_before * weight_tied < wanted[:, None]))
    return jnp.where(keep | (p >= 1), x, -jnp.inf)  # pyright: ignore[reportOperatorIssue]


def _ordered_bits(x: jax.Array) -> jax.Array:
    """float32 -> uint32 with the same order (and -0 equal to 0)."""
    bits = lax.bitcast_convert_type(jnp.where(x == 0, 0.0, x), jnp.uint32)
    return bits ^ jnp.where(bits >> 31 == 1, jnp.uint32(0xFFFFFFFF), jnp.uint32(0x80000000))


def _largest(holds: Callable[[jax.Array], jax.Array], rows: int) -> jax.Array:
    """Each row's largest uint32 t for which holds(t [b, 1]) -> [b], 0 if none; holds must be monotone."""

    def one_bit(i: jax.Array, t: jax.Array) -> jax.Array:
        candidate = t | (jnp.uint32(1) << (31 - i).astype(jnp.uint32))
        return jnp.where(holds(candidate[:, None]), candidate, t)

    return lax.fori_loop(0, 32, one_bit, jnp.zeros(rows, jnp.uint32))
