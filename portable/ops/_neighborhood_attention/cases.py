"""Named argument sets of `neighborhood_attention`, shared by parity tests, lowering tests, benchmarks and tuning."""

import jax
import jax.numpy as jnp


def _case(
    *space, window, b=1, h=2, g=None, k=8, v=None, bias=False, extra=0, mask=0.0, dtype=jnp.float32, size=1.0, **options
):
    """Returns a function of a seed that makes (args, kwargs).

    `size` multiplies q and k; `extra` is the number of keys that all see, `mask` the share of masked keys.
    """
    g, v = g or h, v or k

    def make(seed: int = 0):
        keys = jax.random.split(jax.random.key(seed), 7)
        normal = lambda i, *shape: jax.random.normal(keys[i], shape, jnp.float32).astype(dtype)  # noqa: E731
        kwargs = {"window": window, **options}
        if bias:
            windows = (window,) * len(space) if isinstance(window, int) else window
            kwargs["rel_pos_bias"] = normal(3, h, *(2 * w - 1 for w in windows)).astype(jnp.float32)
        if extra:
            kwargs["extra_k"], kwargs["extra_v"] = size * normal(4, b, extra, g, k), normal(5, b, extra, g, v)
        if mask:
            kwargs["key_mask"] = ~jax.random.bernoulli(keys[6], mask, (b, *space))
        q, key = (size * normal(i, b, *space, n, k) for i, n in ((0, h), (1, g)))
        return (q.astype(dtype), key.astype(dtype), normal(2, b, *space, g, v)), kwargs

    return make


# What the numerics tests put every implementation through; the first case is the smoke test.
STAGES = {
    "smoke": {
        "plain": _case(9, 10, window=5, return_lse=True),
    },
    "shapes": {
        "line": _case(23, window=4, stride=3, dilation=2, b=2, h=4, g=2, v=5, return_lse=True),
        "causal_plane": _case(7, 9, window=(3, 4), stride=(1, 2), dilation=(2, 1), is_causal=(False, True), extra=3),
        "volume": _case(4, 6, 7, window=(3, 5, 3), stride=(1, 1, 2), h=4, g=1, is_causal=(True, False, False)),
        "blocks": _case(8, 8, window=4, stride=4, return_lse=True),
        "bias": _case(8, 11, window=(3, 5), dilation=(2, 1), b=2, bias=True, mask=0.2),
        "heads_of_32": _case(20, 20, window=7, h=4, k=32, return_lse=True),
        "bfloat16": _case(14, 14, window=7, dilation=2, h=4, g=2, k=32, bias=True, dtype=jnp.bfloat16),
    },
    "stability": {
        "large_scores": _case(9, 10, window=5, size=30.0, return_lse=True),
        "equal_scores": _case(9, 10, window=5, size=0.0, return_lse=True),
        "bfloat16_large_scores": _case(9, 10, window=5, size=4.0, dtype=jnp.bfloat16),
    },
    "edges": {
        "one_position": _case(1, 1, window=1, return_lse=True),
        "smaller_than_the_window": _case(3, 9, window=5, dilation=(1, 2), pad_small=True, bias=True),
        "all_masked": _case(6, 6, window=3, mask=1.0),
        "empty_batch": _case(5, window=3, b=0, return_lse=True),
    },
}
CASES = {name: case for stage in STAGES.values() for name, case in stage.items()}

# Shapes of published models, for benchmarks and ahead-of-time compilation.
SIZES = {
    "nat-mini": _case(56, 56, window=7, h=2, k=32, bias=True),
    "dinat-mini": _case(56, 56, window=7, dilation=8, h=2, k=32, bias=True),
    "flux": _case(256, 256, window=80, stride=16, h=24, k=128, dtype=jnp.bfloat16),
    "video": _case(16, 32, 32, window=11, h=4, k=64),
}

# What stands for the rest in the backend-parity matrix.
MATRIX = ("heads_of_32", "bfloat16", "flux")
