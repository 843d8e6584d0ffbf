"""Noise that makes a router explore."""

import math

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Key

from portable.ops._arguments import accumulator, check_float


def noisy_logits(
    logits: Float[Array, "*tokens e"],
    spread_logits: Float[Array, "*tokens e"],
    key: Key[Array, ""],
    *,
    floor: float = 0.0,
) -> tuple[Float[Array, "*tokens e"], Float[Array, "*tokens e"]]:
    """Adds normal noise of learned size to a router's logits, for `route(noisy, top_k=k, renormalize=True)`.

        std = softplus(spread_logits) + floor;  noisy = logits + std * normal(key)

    Args:
      logits, spread_logits: [*tokens, E], two linear maps of a token.
      key: of `jax.random`.
      floor: least standard deviation.

    Returns:
      (noisy, std), [*tokens, E] in float32 (float64 if an argument is), as `noisy_load` takes them.

    Raises:
      ValueError: the shapes differ.
      TypeError: an array has an integer dtype.

    Source: Shazeer et al. 2017 (arXiv 1701.06538), equation 4.
    """
    check_float("noisy_logits", logits=logits, spread_logits=spread_logits)
    if logits.shape != spread_logits.shape:
        raise ValueError(
            f"noisy_logits: spread_logits must have the shape of logits, {list(logits.shape)}; got "
            f"{list(spread_logits.shape)}."
        )
    dtype = accumulator(logits, spread_logits)
    std = jax.nn.softplus(spread_logits.astype(dtype)) + floor
    return logits.astype(dtype) + std * jax.random.normal(key, logits.shape, dtype), std


def noisy_load(
    logits: Float[Array, "*tokens e"],
    std: Float[Array, "*tokens e"],
    noisy: Float[Array, "*tokens e"],
    *,
    top_k: int,
) -> Float[Array, "*tokens e"]:
    """Returns the probability that a token chooses an expert, over a fresh draw of that expert's noise alone.

        P[i] = Phi((logits[i] - (the top_k-th largest of noisy without i)) / std[i])

    Its sum over tokens is a smooth estimate of the load; `balance_loss` of that sum is the paper's load loss.

    Args:
      logits, std, noisy: [*tokens, E]: the clean logits and what `noisy_logits` returns.
      top_k: choices a token; less than E.

    Returns:
      [*tokens, E] in the dtype of `noisy`.

    Raises:
      ValueError: top_k is not from 1 to E - 1.

    Source: Shazeer et al. 2017 (arXiv 1701.06538), equations 8 to 10.
    """
    e = noisy.shape[-1]
    if not 1 <= top_k < e:
        raise ValueError(f"noisy_load: top_k must be from 1 to E - 1; got top_k={top_k}, E={e}.")
    best, _ = jax.lax.top_k(noisy, top_k + 1)
    inside, outside = best[..., top_k - 1 : top_k], best[..., top_k:]
    # Without an expert among the top_k, the one that follows them is the top_k-th.
    threshold = jnp.where(noisy > outside, outside, inside)
    return jax.lax.erfc((threshold - logits.astype(noisy.dtype)) / (std * math.sqrt(2))) / 2


def jitter(x: Float[Array, "*tokens d"], key: Key[Array, ""], amount: float) -> Float[Array, "*tokens d"]:
    """Multiplies a router's input by uniform noise from 1 - amount to 1 + amount.

    Args:
      x: [*tokens, d], any floating dtype.
      key: of `jax.random`.
      amount: from 0 to 1.

    Returns:
      [*tokens, d] in the dtype of x.

    Raises:
      ValueError: amount is out of range.

    Source: Switch Transformers (arXiv 2101.03961), section 2.4 and appendix C.
    """
    check_float("jitter", x=x)
    if not 0 <= amount <= 1:
        raise ValueError(f"jitter: amount must be from 0 to 1; got {amount}.")
    dtype = accumulator(x)
    noise = jax.random.uniform(key, x.shape, dtype, 1 - amount, 1 + amount)
    return (x.astype(dtype) * noise).astype(x.dtype)
