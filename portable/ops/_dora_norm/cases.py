"""Named argument sets of `dora_norm`, shared by parity tests, lowering tests and benchmarks."""

import jax
import jax.numpy as jnp


def _case(*lead, d, o, r, dtype=jnp.float32, adapter_dtype=None, size=1.0, update=0.3, zeros=0, known=False, **options):
    """Returns a function of a seed that makes (args, kwargs); `update` is the size of a @ b beside w."""

    def make(seed: int = 0):
        keys = jax.random.split(jax.random.key(seed), 3)
        shapes = (*lead, d, o), (*lead, d, r), (*lead, r, o)
        w, a, b = (jax.random.normal(k, s, jnp.float32) for k, s in zip(keys, shapes, strict=True))
        w, a, b = size * w, size * update * a * max(r, 1) ** -0.5, b
        w, b = w.at[..., :zeros].set(0), b.at[..., :zeros].set(0)
        w, narrow = w.astype(dtype), adapter_dtype or dtype
        kwargs = dict(options)
        if known:
            kwargs["squares"] = jnp.sum(jnp.square(w.astype(jnp.float32)), axis=-2)
        return (w, a.astype(narrow), b.astype(narrow)), kwargs

    return make


STAGES = {
    "smoke": {
        "plain": _case(d=24, o=40, r=4, scale=2.0),
    },
    "shapes": {
        "squares_known": _case(d=24, o=40, r=4, scale=0.5, known=True),
        "experts": _case(3, d=16, o=8, r=2, scale=2.0),
        "shards": _case(d=24, o=16, r=3, shards=4),
        "shards_of_experts": _case(2, d=8, o=16, r=3, shards=2, known=True),
        "rank_of_blocks": _case(d=80, o=96, r=64, known=True, update=0.1),
        "bfloat16": _case(d=64, o=32, r=8, dtype=jnp.bfloat16, scale=2.0, out_dtype="bfloat16"),
        "float32_adapter": _case(d=64, o=32, r=8, dtype=jnp.bfloat16, adapter_dtype=jnp.float32),
    },
    "stability": {
        "large": _case(d=24, o=40, r=4, size=1e15),
        "small": _case(d=24, o=40, r=4, size=1e-15),
    },
    "edges": {
        "zero_columns": _case(d=24, o=40, r=4, zeros=3),
        "no_update": _case(d=24, o=40, r=4, scale=0.0),
        "one_of_everything": _case(
            d=1, o=1, r=1, update=0.05
        ),  # an update that cancels the weight costs the expansion digits,
    },
}
CASES = {name: case for stage in STAGES.values() for name, case in stage.items()}

SIZES = {
    "8192": _case(d=8192, o=8192, r=384, dtype=jnp.bfloat16, scale=2.0),
    "8192-known": _case(d=8192, o=8192, r=384, dtype=jnp.bfloat16, scale=2.0, known=True),
}

# What stands for the rest in the backend-parity matrix.
MATRIX = ("plain", "bfloat16", "8192")
