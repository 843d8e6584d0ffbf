"""Named argument sets of `attention`, shared by parity tests, lowering tests and benchmarks."""

import jax
import jax.numpy as jnp


def _case(b, t, h, k, g=None, *, s=None, v=None, dtype=jnp.float32, size=1.0, **options):
    """Returns a function of a seed that makes (args, kwargs); `size` multiplies q.

    Options that are True stand for random arrays of their names: `key_mask`, `segment_ids`, `sinks`, and
    `q_positions` for those of a decoder, at the end of the keys.
    """
    s, g = t if s is None else s, h if g is None else g

    def make(seed: int = 0):
        keys = jax.random.split(jax.random.key(seed), 6)
        shapes = ((b, t, h, k), (b, s, g, k), (b, s, g, v or k))
        args = [jax.random.normal(key, shape, jnp.float32) for key, shape in zip(keys, shapes, strict=False)]
        args[0] = size * args[0]
        kwargs = {"return_lse": True} | options
        if "key_mask" in options:  # the last row sees nothing where b > 1
            kept = jax.random.bernoulli(keys[3], 0.7, (b, s))
            kwargs["key_mask"] = kept & (jnp.arange(b) < max(1, b - 1))[:, None]
        if "segment_ids" in options:
            starts = jax.random.bernoulli(keys[4], 0.1, (b, t)).astype(jnp.int32)
            kwargs["segment_ids"] = jnp.cumsum(starts, axis=1) % 3  # ids come back later in a row
        if "sinks" in options:
            kwargs["sinks"] = size * jax.random.normal(keys[5], (h,), jnp.float32)
        if "q_positions" in options:
            kwargs["q_positions"] = s - t - jnp.arange(b)[:, None] + jnp.arange(t)
        return tuple(x.astype(dtype) for x in args), kwargs

    return make


def _every_third(b, h, i, j):
    return ((i - j + h) % 3 != b) | (i == j)


def _alibi(score, b, h, i, j):
    return score - 2.0 ** -(h + 1.0) * abs(i - j)


# What the numerics tests put every implementation through; the first case is the smoke test.
STAGES = {
    "smoke": {
        "plain": _case(2, 33, 2, 16),
    },
    "shapes": {
        "causal_groups": _case(2, 70, 6, 16, 2, v=24, is_causal=True, sinks=True, soft_cap=5.0),
        "window_pair": _case(1, 40, 2, 8, s=55, window=(5, 2), score_mod=_alibi),
        "blocks": _case(1, 1100, 2, 8, 1, is_causal=True, window=300),
        "decoder": _case(2, 3, 4, 8, 2, s=40, is_causal=True, window=20, q_positions=True),
        "packed": _case(2, 50, 2, 8, is_causal=True, segment_ids=True, mask_mod=_every_third),
        "keys_masked": _case(2, 24, 2, 8, s=37, key_mask=True, return_lse=False),
        "bfloat16": _case(2, 70, 4, 16, 2, is_causal=True, dtype=jnp.bfloat16),
    },
    "stability": {
        "large_scores": _case(1, 40, 2, 16, size=10.0, is_causal=True),
        "small_scores": _case(1, 40, 2, 16, size=1e-6, sinks=True),
        "capped": _case(1, 40, 2, 16, size=10.0, soft_cap=30.0),
        "bfloat16_large_scores": _case(1, 40, 2, 16, size=10.0, dtype=jnp.bfloat16),
    },
    "edges": {
        "one_token": _case(2, 1, 2, 8, is_causal=True),
        "no_keys": _case(2, 5, 2, 8, s=0, sinks=True),
        "window_of_one": _case(1, 9, 2, 8, is_causal=True, window=1),
        "empty": _case(2, 0, 2, 8),
    },
}
CASES = {name: case for stage in STAGES.values() for name, case in stage.items()}

# Shapes of published models, for benchmarks and ahead-of-time compilation.
SIZES = {
    "gpt2": _case(1, 1024, 12, 64, is_causal=True),
    "llama3-8b": _case(1, 8192, 32, 128, 8, is_causal=True, dtype=jnp.bfloat16),
}

# What stands for the rest in the backend-parity matrix.
MATRIX = ("causal_groups", "bfloat16", "llama3-8b")
