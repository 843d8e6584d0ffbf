"""Named argument sets of `linear`, shared by parity tests, lowering tests and benchmarks."""

import jax
import jax.numpy as jnp


def _case(*shape, d, o, dtype=jnp.float32, size=1.0, **options):
    """Returns a function of a seed that makes (args, kwargs); `size` multiplies x."""

    def make(seed: int = 0):
        keys = jax.random.split(jax.random.key(seed))
        kernel = (o, d) if options.get("transposed") else (d, o)
        x, w = (jax.random.normal(k, s, jnp.float32) for k, s in zip(keys, ((*shape, d), kernel), strict=True))
        return ((size * x).astype(dtype), (w * d**-0.5).astype(dtype)), dict(options)

    return make


# What the numerics tests put every implementation through; the first case is the smoke test.
STAGES = {
    "smoke": {
        "row": _case(1, d=512, o=520),
    },
    "shapes": {
        "row_of_a_sequence": _case(1, 1, d=512, o=513),
        "vector": _case(d=516, o=512),
        "small_row": _case(1, d=24, o=40),
        "odd_row": _case(1, d=515, o=512),
        "rows": _case(2, 5, d=24, o=40),
        "transposed": _case(1, d=48, o=80, transposed=True),
        "bfloat16": _case(1, d=48, o=80, dtype=jnp.bfloat16),
        "bfloat16_to_float32": _case(1, d=48, o=80, dtype=jnp.bfloat16, transposed=True, out_dtype="float32"),
    },
    "stability": {
        "large": _case(1, d=512, o=520, size=1e30),
        "bfloat16_small": _case(1, d=48, o=80, dtype=jnp.bfloat16, size=1e-30),
    },
    "edges": {
        "no_rows": _case(0, d=24, o=40),
    },
}
CASES = {name: case for stage in STAGES.values() for name, case in stage.items()}

SIZES = {
    "mamba2-130m": _case(1, d=768, o=1536),
    "mamba2-130m-head": _case(1, d=768, o=50288, dtype=jnp.bfloat16, transposed=True, out_dtype="float32"),
    "mamba2-2.7b": _case(1, d=2560, o=5120, dtype=jnp.bfloat16),
}

# What stands for the rest in the backend-parity matrix.
MATRIX = ("row", "bfloat16", "mamba2-2.7b")
