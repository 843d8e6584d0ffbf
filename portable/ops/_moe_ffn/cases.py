"""Named argument sets of `moe_ffn`, shared by parity tests, lowering tests and benchmarks."""

import jax
import jax.numpy as jnp

from portable.ops._route.routing import Routing


def _case(
    t,
    d,
    f,
    e,
    k,
    *,
    skew=0.0,
    gated=True,
    biases=False,
    apart=False,
    empty=0.0,
    dtype=jnp.float32,
    scale=1.0,
    **options,
):
    """Returns a function of a seed that makes (args, kwargs).

    `skew` favours experts of a low number, and `empty` is the share of choices that are of no expert.
    """

    def make(seed: int = 0):
        keys = jax.random.split(jax.random.key(seed), 10)

        def normal(key, *shape):
            return jax.random.normal(key, shape, jnp.float32)

        logits = normal(keys[0], t, e) - skew * jnp.log1p(jnp.arange(e))
        weights, indices = jax.lax.top_k(jax.nn.softmax(logits), k)
        gone = jax.random.bernoulli(keys[1], empty, (t, k))
        routing = Routing(jnp.where(gone, e, indices), jnp.where(gone, 0, weights), e)
        x = scale * normal(keys[2], t, d)
        w_up, w_gate = (normal(key, e, d, f) / d**0.5 for key in keys[3:5])
        w_down = normal(keys[5], e, f, d) / f**0.5
        experts = [w.astype(dtype) for w in (w_gate, w_up, w_down)]
        experts = [tuple(w) for w in experts] if apart else experts
        experts = experts if gated else [None, *experts[1:]]
        kwargs = dict(options)
        if biases:
            made = {"b_gate": normal(keys[6], e, f), "b_up": normal(keys[7], e, f), "b_down": normal(keys[8], e, d)}
            kwargs |= {name: b.astype(dtype) for name, b in made.items()}
        return (x.astype(dtype), *experts, routing), kwargs

    return make


STAGES = {
    "smoke": {
        "plain": _case(20, 16, 24, 4, 2, capacity=10),
    },
    "shapes": {
        "gpt_oss": _case(40, 16, 8, 4, 2, biases=True, activation="swiglu_oai", capacity=30),
        "apart": _case(20, 16, 24, 5, 3, apart=True, biases=True),
        "no_gate": _case(30, 8, 16, 3, 1, gated=False, activation="relu2", empty=0.3, capacity=30),
        "no_gate_apart": _case(7, 8, 16, 3, 2, gated=False, apart=True, activation="gelu"),
        "skewed": _case(300, 8, 8, 16, 2, skew=3.0, empty=0.1),
        "one_token": _case(1, 16, 8, 12, 3),
        "bfloat16": _case(40, 32, 16, 4, 2, dtype=jnp.bfloat16, capacity=30),
    },
    "stability": {
        "large_values": _case(20, 16, 24, 4, 2, scale=1e6),
        "small_values": _case(20, 16, 24, 4, 2, scale=1e-6),
    },
    "edges": {
        "no_tokens": _case(0, 8, 8, 4, 2),
        "every_choice_empty": _case(5, 8, 8, 4, 2, empty=1.0, capacity=0),
        "every_expert": _case(6, 8, 8, 3, 3),
        "one_expert": _case(9, 8, 8, 1, 1, capacity=4),
    },
}
CASES = {name: case for stage in STAGES.values() for name, case in stage.items()}

# Shapes of published models, for benchmarks and ahead-of-time compilation.
SIZES = {
    "qwen3-30b-a3b": _case(4096, 2048, 768, 128, 8, dtype=jnp.bfloat16),
}

# What stands for the rest in the backend-parity matrix.
MATRIX = ("gpt_oss", "bfloat16", "qwen3-30b-a3b")
