"""Named argument sets of `grouped_matmul`, shared by parity tests, lowering tests and benchmarks."""

import jax
import jax.numpy as jnp


def _case(sizes, d, f, *, m=None, apart=False, dtype=jnp.float32, scale=1.0):
    """Returns a function of a seed that makes (args, kwargs)."""

    def make(seed: int = 0):
        keys = jax.random.split(jax.random.key(seed), 2)
        x = scale * jax.random.normal(keys[0], (sum(sizes) if m is None else m, d), jnp.float32)
        w = jax.random.normal(keys[1], (len(sizes), d, f), jnp.float32).astype(dtype)
        return (x.astype(dtype), tuple(w) if apart else w, jnp.asarray(sizes, jnp.int32)), {}

    return make


STAGES = {
    "smoke": {
        "plain": _case((20, 7, 30), 16, 24),
    },
    "shapes": {
        "apart": _case((20, 7, 30, 1), 16, 24, apart=True),
        "empty_groups": _case((0, 70, 0, 9, 0), 24, 8, m=90),
        "one_group_takes_all": _case((0, 0, 150, 0), 8, 16),
        "few_rows": _case((0, 1, 0, 1, 0, 2), 8, 8),
        "tiles_of_every_size": _case((600, 300, 130, 60, 20, 1), 8, 8),
        "bfloat16": _case((20, 7, 30), 32, 16, dtype=jnp.bfloat16),
    },
    "stability": {
        "large_values": _case((20, 7, 30), 16, 24, scale=1e15),
        "small_values": _case((20, 7, 30), 16, 24, scale=1e-15),
    },
    "edges": {
        "no_rows": _case((0, 0), 8, 8),
        "no_group_has_rows": _case((0, 0), 8, 8, m=5),
        "one_of_everything": _case((1,), 1, 1),
    },
}
CASES = {name: case for stage in STAGES.values() for name, case in stage.items()}

# Shapes of published models, for benchmarks and ahead-of-time compilation.
SIZES = {
    "qwen3-30b-a3b": _case((256,) * 128, 2048, 768, dtype=jnp.bfloat16),
}

# What stands for the rest in the backend-parity matrix.
MATRIX = ("empty_groups", "bfloat16")
