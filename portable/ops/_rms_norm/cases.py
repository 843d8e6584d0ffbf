"""Named argument sets of `rms_norm`, shared by parity tests, lowering tests and benchmarks."""

import jax
import jax.numpy as jnp


def _case(*shape, gate=False, dtype=jnp.float32, **options):
    def make(seed: int = 0):
        keys = jax.random.split(jax.random.key(seed), 3)
        kwargs = dict(options)
        if gate:
            kwargs["gate"] = jax.random.normal(keys[2], shape, jnp.float32).astype(dtype)
        x = jax.random.normal(keys[0], shape, jnp.float32).astype(dtype)
        return (x, 1 + 0.1 * jax.random.normal(keys[1], shape[-1:], jnp.float32)), kwargs

    return make


CASES = {
    "plain": _case(3, 7, 32),
    "one_row": _case(16, eps=1e-6),
    "gate_first": _case(2, 5, 32, gate=True),
    "norm_first": _case(2, 5, 32, gate=True, norm_before_gate=True),
    "groups": _case(2, 5, 32, gate=True, groups=4),
    "groups_norm_first": _case(2, 5, 32, gate=True, groups=4, norm_before_gate=True),
    "empty": _case(2, 0, 32, gate=True),
    "bfloat16": _case(2, 5, 32, gate=True, groups=2, dtype=jnp.bfloat16),
}

SIZES = {
    "mamba2-130m": _case(1, 2048, 1536, gate=True),
    "mamba2-2.7b": _case(1, 2048, 5120, gate=True, dtype=jnp.bfloat16),
}

# What stands for the rest in the backend-parity matrix.
MATRIX = ("groups", "bfloat16", "mamba2-2.7b")
