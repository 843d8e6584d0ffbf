"""Named argument sets of `ssd_step`, shared by parity tests, lowering tests and benchmarks."""

import jax
import jax.numpy as jnp


def _case(b=2, h=4, p=8, g=2, n=16, *, dtype=jnp.float32, state_dtype=jnp.float32, D=None, size=1.0, step=1.0):
    """Returns a function of a seed that makes (args, kwargs); `size` multiplies x, B, C and the state, `step` dt."""

    def make(seed: int = 0):
        keys = iter(jax.random.split(jax.random.key(seed), 7))

        def normal(*shape):
            return jax.random.normal(next(keys), shape, jnp.float32)

        x, B, C = ((size * normal(*shape)).astype(dtype) for shape in ((b, h, p), (b, g, n), (b, g, n)))
        dt, A = step * jax.nn.softplus(normal(b, h) - 2), -jnp.exp(normal(h))
        state = (size * normal(b, h, p, n)).astype(state_dtype)
        kwargs = {} if D is None else {"D": normal(*D)}
        return (x, dt, A, B, C, state), kwargs

    return make


# What the numerics tests put every implementation through; the first case is the smoke test.
STAGES = {
    "smoke": {
        "one_group": _case(g=1),
    },
    "shapes": {
        "groups": _case(D=(4,)),
        "D_per_channel": _case(b=1, g=4, D=(4, 8)),
        "bfloat16": _case(dtype=jnp.bfloat16, D=(4,)),
        "bfloat16_state": _case(dtype=jnp.bfloat16, state_dtype=jnp.bfloat16),
    },
    "stability": {
        "large_steps": _case(step=1e4, D=(4,)),
        "bfloat16_extremes": _case(dtype=jnp.bfloat16, size=1e12),
    },
    "edges": {
        "no_rows": _case(b=0),
    },
}
CASES = {name: case for stage in STAGES.values() for name, case in stage.items()}

SIZES = {
    "mamba2-130m": _case(b=1, h=24, p=64, g=1, n=128, D=(24,)),
    "mamba2-2.7b": _case(b=64, h=80, p=64, g=1, n=128, dtype=jnp.bfloat16, D=(80,)),
}

# What stands for the rest in the backend-parity matrix.
MATRIX = ("groups", "bfloat16", "mamba2-2.7b")
