"""Named argument sets of `causal_conv1d`, shared by parity tests, lowering tests and benchmarks."""

import jax
import jax.numpy as jnp


def _case(
    b, t, c, k, *, bias=False, state=False, lengths=False, segments=False, activation=None, dtype=jnp.float32, size=1.0
):
    """Returns a function of a seed that makes (args, kwargs); `size` multiplies x."""

    def make(seed: int = 0):
        keys = jax.random.split(jax.random.key(seed), 6)
        kwargs: dict = {"activation": activation}
        if bias:
            kwargs["bias"] = jax.random.normal(keys[2], (c,), jnp.float32)
        if state:
            kwargs["state"] = jax.random.normal(keys[3], (b, k - 1, c), jnp.float32).astype(dtype)
        if lengths:
            kwargs["lengths"] = jax.random.randint(keys[4], (b,), 1, t + 1)
        if segments:
            starts = jax.random.bernoulli(keys[5], 0.2, (b, t)).astype(jnp.int32)
            kwargs["segment_ids"] = jnp.cumsum(starts, axis=1) % 3
        x = (size * jax.random.normal(keys[0], (b, t, c), jnp.float32)).astype(dtype)
        return (x, jax.random.normal(keys[1], (k, c), jnp.float32) * 0.5), kwargs

    return make


# What the numerics tests put every implementation through; the first case is the smoke test.
STAGES = {
    "smoke": {
        "plain": _case(2, 33, 12, 4),
    },
    "shapes": {
        "silu": _case(2, 33, 12, 4, bias=True, state=True, activation="silu"),
        "ragged": _case(3, 17, 8, 4, bias=True, state=True, lengths=True, activation="silu"),
        "segments": _case(2, 40, 8, 4, bias=True, state=True, segments=True, activation="silu"),
        "segments_ragged": _case(3, 21, 8, 3, lengths=True, segments=True),
        "bfloat16": _case(2, 33, 12, 4, bias=True, state=True, activation="silu", dtype=jnp.bfloat16),
    },
    "stability": {
        "large": _case(2, 33, 12, 4, bias=True, activation="silu", size=1e15),
        "bfloat16_small": _case(2, 33, 12, 4, activation="silu", dtype=jnp.bfloat16, size=1e-15),
    },
    "edges": {
        "one_token": _case(2, 1, 8, 4, bias=True, state=True, activation="silu"),
        "one_tap": _case(2, 9, 8, 1, bias=True),
        "empty": _case(2, 0, 8, 4, state=True),
    },
}
CASES = {name: case for stage in STAGES.values() for name, case in stage.items()}

SIZES = {
    "mamba2-130m": _case(1, 2048, 1792, 4, bias=True, activation="silu"),
    "mamba2-2.7b": _case(1, 2048, 5376, 4, bias=True, activation="silu", dtype=jnp.bfloat16),
}

# What stands for the rest in the backend-parity matrix.
MATRIX = ("segments_ragged", "bfloat16", "mamba2-2.7b")
