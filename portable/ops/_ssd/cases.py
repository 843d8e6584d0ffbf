"""Named argument sets of `ssd`, shared by parity tests, lowering tests, benchmarks and tuning."""

import jax
import jax.numpy as jnp


def _case(b, t, h, p, g, n, *, D=None, state=False, segments=False, chunk_size=None, dtype=jnp.float32, **sizes):
    """Returns a function of a seed that makes (args, kwargs).

    `sizes` multiply: `scale` the decay rates, `step` the step sizes, `size` x, B, C and the state.
    """
    scale, step, size = (sizes.get(name, 1.0) for name in ("scale", "step", "size"))

    def make(seed: int = 0):
        keys = jax.random.split(jax.random.key(seed), 8)
        normal = lambda i, *shape: jax.random.normal(keys[i], shape, jnp.float32)  # noqa: E731
        x, B, C = (size * normal(i, b, t, *last) for i, last in enumerate([(h, p), (g, n), (g, n)]))
        # Step sizes and rates of a Mamba-2 at its initialisation: dt log-uniform in [1e-3, 0.1], A in [-16, -1].
        dt = step * jnp.exp(jax.random.uniform(keys[3], (b, t, h), jnp.float32, jnp.log(1e-3), jnp.log(0.1)))
        A = -scale * jax.random.uniform(keys[4], (h,), jnp.float32, 1.0, 16.0)
        kwargs = {"chunk_size": chunk_size}
        if D is not None:
            kwargs["D"] = normal(5, *((h,) if D == "h" else (h, p)))
        if state:
            kwargs["initial_state"] = size * normal(6, b, h, p, n)
        if segments:
            starts = jax.random.bernoulli(keys[7], 0.15, (b, t)).astype(jnp.int32)
            kwargs["segment_ids"] = jnp.cumsum(starts, axis=1) % 3  # ids come back later in a row
        return (x.astype(dtype), dt, A, B.astype(dtype), C.astype(dtype)), kwargs

    return make


# What the numerics tests put every implementation through; the first case is the smoke test.
STAGES = {
    "smoke": {
        "plain": _case(2, 96, 4, 16, 1, 16, chunk_size=32),
    },
    "shapes": {
        "groups": _case(2, 67, 6, 8, 2, 12, D="h", state=True, chunk_size=16),
        "segments": _case(2, 80, 4, 8, 4, 8, D="hp", state=True, segments=True, chunk_size=16),
        "short_of_a_chunk": _case(1, 5, 2, 4, 1, 4, D="h"),
        "heads_of_64": _case(1, 200, 4, 64, 2, 128, D="h", state=True, segments=True),
        "bfloat16": _case(2, 70, 4, 16, 2, 16, D="h", state=True, chunk_size=32, dtype=jnp.bfloat16),
        "heads_of_64_bfloat16": _case(1, 150, 16, 64, 1, 32, state=True, dtype=jnp.bfloat16),
    },
    "stability": {
        "strong_decay": _case(1, 130, 4, 8, 1, 8, state=True, scale=300.0),
        "weak_decay": _case(1, 130, 4, 8, 1, 8, state=True, scale=1e-4),
        "bfloat16_strong_decay": _case(1, 300, 4, 8, 1, 8, state=True, dtype=jnp.bfloat16, scale=300.0),
        "large_steps": _case(1, 100, 4, 8, 1, 8, state=True, chunk_size=32, step=100.0),
        "bfloat16_extremes": _case(1, 100, 4, 8, 1, 8, state=True, chunk_size=32, dtype=jnp.bfloat16, size=1e12),
    },
    "edges": {
        "one_token": _case(2, 1, 4, 8, 2, 8, state=True),
        "chunk_of_one": _case(1, 7, 2, 4, 1, 4, state=True, chunk_size=1),
        "empty": _case(2, 0, 4, 8, 2, 8, state=True),
    },
}
CASES = {name: case for stage in STAGES.values() for name, case in stage.items()}

# Shapes of published models, for benchmarks and ahead-of-time compilation.
SIZES = {
    "mamba2-130m": _case(1, 2048, 24, 64, 1, 128),
    "mamba2-2.7b": _case(1, 2048, 80, 64, 1, 128, dtype=jnp.bfloat16),
}

# What stands for the rest in the backend-parity matrix.
MATRIX = ("heads_of_64", "heads_of_64_bfloat16", "mamba2-2.7b")
