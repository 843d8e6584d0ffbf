"""Named argument sets of `rms_norm`, shared by parity tests, lowering tests and benchmarks."""

import jax
import jax.numpy as jnp


def _case(*shape, gate=False, dtype=jnp.float32, size=1.0, **options):
    """Returns a function of a seed that makes (args, kwargs); `size` multiplies x."""

    def make(seed: int = 0):
        keys = jax.random.split(jax.random.key(seed), 3)
        kwargs = dict(options)
        if gate:
            kwargs["gate"] = jax.random.normal(keys[2], shape, jnp.float32).astype(dtype)
        x = (size * jax.random.normal(keys[0], shape, jnp.float32)).astype(dtype)
        return (x, 1 + 0.1 * jax.random.normal(keys[1], shape[-1:], jnp.float32)), kwargs

    return make


# What the numerics tests put every implementation through; the first case is the smoke test.
STAGES = {
    "smoke": {
        "plain": _case(3, 7, 32),
    },
    "shapes": {
        "gate_first": _case(2, 5, 32, gate=True),
        "norm_first": _case(2, 5, 32, gate=True, norm_before_gate=True),
        "groups": _case(2, 5, 32, gate=True, groups=4),
        "groups_norm_first": _case(2, 5, 32, gate=True, groups=4, norm_before_gate=True),
        "bfloat16": _case(2, 5, 32, gate=True, groups=2, dtype=jnp.bfloat16),
    },
    "stability": {
        "large": _case(2, 5, 32, gate=True, size=1e12),
        "small": _case(2, 5, 32, size=1e-12),
        "bfloat16_large": _case(2, 5, 32, gate=True, dtype=jnp.bfloat16, size=1e12),
    },
    "edges": {
        "one_row": _case(16, eps=1e-6),
        "empty": _case(2, 0, 32, gate=True),
    },
}
CASES = {name: case for stage in STAGES.values() for name, case in stage.items()}

SIZES = {
    "mamba2-130m": _case(1, 2048, 1536, gate=True),
    "mamba2-2.7b": _case(1, 2048, 5120, gate=True, dtype=jnp.bfloat16),
}

# What stands for the rest in the backend-parity matrix.
MATRIX = ("groups", "bfloat16", "mamba2-2.7b")
