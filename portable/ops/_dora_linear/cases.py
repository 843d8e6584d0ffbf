"""Named argument sets of `dora_linear`, shared by parity tests, lowering tests and benchmarks."""

import jax
import jax.numpy as jnp


def _case(
    *tokens,
    d,
    o,
    r,
    dtype=jnp.float32,
    ids=None,
    groups=None,
    adapters=None,
    bias=False,
    zeros=0,
    size=1.0,
    cached=False,
    quantised=False,
    key=False,
    **options,
):
    """Returns a function of a seed that makes (args, kwargs); `adapters` is the number that ids choose among."""

    def make(seed: int = 0):
        keys = jax.random.split(jax.random.key(seed), 6)
        lead = () if groups is None else (len(groups),)
        each = lead if adapters is None else (adapters,)
        shapes = (*tokens, d), (*lead, d, o), (*each, d, r), (*each, r, o), (*each, o), (*lead, o)
        x, w, a, b, m, beta = (jax.random.normal(k, s, jnp.float32) for k, s in zip(keys, shapes, strict=True))
        w, a = w.at[..., :zeros].set(0) * d**-0.5, size * a * (d * max(r, 1)) ** -0.5
        b, m = b.at[..., :zeros].set(0), jnp.abs(m).at[..., :zeros].set(0)
        kwargs = dict(options)
        if bias:
            kwargs["bias"] = beta
        if ids is not None:
            kwargs["ids"] = jnp.asarray(ids, jnp.int32)
        if groups is not None:
            kwargs["group_sizes"] = jnp.asarray(groups, jnp.int32)
        if cached:
            kwargs["norms"] = 1 + jnp.abs(jax.random.normal(keys[5], (*each, o)))
        if key:
            kwargs["key"] = jax.random.key_data(jax.random.key(7))
        w = w.astype(dtype)
        if quantised:
            kwargs["w_scale"] = jnp.max(jnp.abs(w), axis=0) / 127
            w = jnp.round(w / kwargs["w_scale"]).astype(jnp.int8)
        return (size * x.astype(dtype), w, a.astype(dtype), b.astype(dtype), m), kwargs

    return make


STAGES = {
    "smoke": {
        # The slopes of finite differences are those of a norm in the graph.
        "attached": _case(3, 5, d=12, o=10, r=4, scale=2.0, bias=True, detach=False),
    },
    "shapes": {
        "detached": _case(3, 5, d=12, o=10, r=4, scale=0.5),
        "vector": _case(d=12, o=10, r=4, bias=True),
        "factored_norm": _case(7, d=24, o=10, r=3, norm="factored"),
        "cached_norms": _case(7, d=24, o=10, r=3, scale=2.0, cached=True),
        "examples": _case(4, 5, d=12, o=10, r=3, adapters=3, ids=(2, -1, 0, 2), bias=True, cached=True),
        "examples_norms": _case(4, 5, d=12, o=10, r=3, adapters=3, ids=(2, -1, 0, 2)),
        "tokens": _case(2, 3, d=12, o=10, r=3, adapters=3, ids=((2, -1, 0), (0, 0, 2)), cached=True),
        "many_tokens": _case(1, 90, d=12, o=10, r=3, adapters=4, ids=([3] * 20 + [-1] * 30 + [0] * 40,), bias=True),
        "experts": _case(12, d=12, o=10, r=3, groups=(5, 0, 7), bias=True),
        "dropout": _case(6, 5, d=12, o=10, r=4, scale=2.0, bias=True, dropout=0.4, key=True),
        "dropout_of_the_adapter": _case(6, 5, d=12, o=10, r=4, dropout=0.4, dropout_mode="adapter", key=True),
        "quantised": _case(6, 5, d=12, o=10, r=4, scale=2.0, bias=True, quantised=True),
        "bfloat16": _case(6, 16, d=32, o=24, r=8, dtype=jnp.bfloat16, bias=True),
    },
    "stability": {
        "large": _case(6, 5, d=12, o=10, r=4, size=1e10),
        "small": _case(6, 5, d=12, o=10, r=4, size=1e-10),
    },
    "edges": {
        "zero_columns": _case(6, 5, d=12, o=10, r=4, zeros=3, bias=True),
        "no_rows": _case(0, d=12, o=10, r=4),
        "nobody_has_an_adapter": _case(3, d=12, o=10, r=3, adapters=2, ids=(-1, -1, -1), cached=True),
        "one_of_everything": _case(1, d=1, o=1, r=1),
    },
}
CASES = {name: case for stage in STAGES.values() for name, case in stage.items()}

# Square layers as the factored-norm paper times them (arXiv:2603.22276), and a small model's.
SIZES = {
    "4096": _case(4096, d=4096, o=4096, r=384, dtype=jnp.bfloat16, scale=2.0),
    "8192": _case(4096, d=8192, o=8192, r=384, dtype=jnp.bfloat16, scale=2.0),
}

# What stands for the rest in the backend-parity matrix.
MATRIX = ("attached", "bfloat16", "4096")
