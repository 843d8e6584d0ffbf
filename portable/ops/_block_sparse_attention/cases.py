"""Named argument sets of `block_sparse_attention`, shared by parity tests, lowering tests and benchmarks."""

import jax
import jax.numpy as jnp


def _case(
    b,
    t,
    h,
    k,
    g=None,
    *,
    n,
    blocks=(16, 16),
    s=None,
    v=None,
    lists=None,
    empty=0.2,
    dtype=jnp.float32,
    size=1.0,
    **more,
):
    """Returns a function of a seed that makes (args, kwargs); `size` multiplies q.

    Lists are random: blocks come twice, behind the query and not at all (a share of `empty` is padding, the whole list
    of the last block too). With `permuted` the keys and queries of each row are in random order, and have positions;
    with `segments` there are some; with `decoder` the queries are the last positions; with `far`
    every third query stands at the end of what an int32 counts.
    """
    s, g, h_sel = t if s is None else s, g or h, lists or h
    block_q, block_k = blocks
    options = {"block_q": block_q, "block_k": block_k, "is_causal": True, "return_lse": True} | more
    names = "permuted", "segments", "decoder", "far"
    permuted, segments, decoder, far = (options.pop(name, False) for name in names)

    def make(seed: int = 0):
        keys = jax.random.split(jax.random.key(seed), 8)
        shapes = ((b, t, h, k), (b, s, g, k), (b, s, g, v or k))
        args = [jax.random.normal(key, shape, jnp.float32) for key, shape in zip(keys, shapes, strict=False)]
        args[0] = size * args[0]
        shape = (b, h_sel, -(-t // block_q), n)
        chosen = jax.random.randint(keys[3], shape, 0, max(1, -(-s // block_k)), jnp.int32)
        number = jnp.arange(shape[2], dtype=jnp.int32)[:, None]
        own = number * block_q // block_k
        chosen = jnp.concatenate([chosen[..., 1:], jnp.broadcast_to(own, (*shape[:3], 1))[..., :n]], -1)
        kept = jax.random.bernoulli(keys[4], 1 - empty, shape) & (number < max(1, shape[2] - 1))
        chosen = jnp.where(kept & (chosen < -(-s // block_k)), chosen, -1)
        kwargs = dict(options)
        if permuted:
            orders = [jax.random.permutation(key, jnp.arange(size)) for key, size in ((keys[5], t), (keys[6], s))]
            kwargs["q_positions"], kwargs["kv_positions"] = orders
        if segments:
            ids = [jnp.sort(jax.random.randint(key, (b, size), 0, 3)) for key, size in ((keys[5], t), (keys[6], s))]
            kwargs["segment_ids"] = ids[0] if t == s else tuple(ids)
        if decoder:
            kwargs["q_positions"] = s - t - jnp.arange(b)[:, None] + jnp.arange(t)
        if far:
            place = jnp.arange(t, dtype=jnp.int32)
            kwargs["q_positions"] = jnp.where(place % 3, place, 2**31 - 1)
        return (*(x.astype(dtype) for x in args), chosen), kwargs

    return make


# What the numerics tests put every implementation through; the first case is the smoke test.
STAGES = {
    "smoke": {
        "plain": _case(1, 48, 2, 16, n=2),
    },
    "shapes": {
        "groups": _case(1, 38, 6, 16, 2, n=3, v=24, lists=2, blocks=(16, 8)),
        "one_list": _case(1, 35, 4, 8, 2, n=3, s=90, lists=1, blocks=(8, 32), is_causal=False, segments=True),
        "tokens": _case(1, 96, 4, 16, 2, n=4, lists=4, blocks=(1, 16), empty=0.1),
        "single_keys": _case(1, 24, 2, 8, 1, n=40, lists=1, blocks=(1, 1)),
        "permuted": _case(1, 48, 1, 8, n=2, permuted=True),
        "decoder": _case(2, 1, 4, 8, 2, n=4, s=90, lists=2, blocks=(1, 16), decoder=True, empty=0.0),
        "bfloat16": _case(1, 40, 4, 16, 2, n=2, lists=2, dtype=jnp.bfloat16),
    },
    "stability": {
        "large_scores": _case(1, 32, 1, 16, n=2, size=10.0),
        "small_scores": _case(1, 32, 1, 16, n=2, size=1e-6),
        "bfloat16_large_scores": _case(1, 32, 1, 16, n=2, size=10.0, dtype=jnp.bfloat16),
    },
    "edges": {
        "one_token": _case(2, 1, 2, 8, n=1, blocks=(4, 4)),
        "nothing_selected": _case(1, 20, 1, 8, n=2, empty=1.0),
        "no_room": _case(1, 20, 2, 8, n=0),
        "no_keys": _case(1, 5, 2, 8, n=2, s=0, is_causal=False),
        "no_keys_for_tokens": _case(1, 32, 2, 8, n=2, s=0, blocks=(1, 16), is_causal=False),
        "far_positions": _case(1, 48, 2, 8, n=2, far=True),
        "far_tokens": _case(1, 48, 2, 8, n=2, blocks=(1, 16), far=True),
        "empty": _case(2, 0, 2, 8, n=2),
    },
}
CASES = {name: case for stage in STAGES.values() for name, case in stage.items()}

# Shapes of published models, for benchmarks and ahead-of-time compilation.
SIZES = {
    "blocks_of_64": _case(1, 16384, 8, 64, 2, n=17, blocks=(64, 64), empty=0.0),
    "minicpm4": _case(1, 8192, 32, 128, 2, n=96, lists=2, blocks=(1, 64), empty=0.0, dtype=jnp.bfloat16),
    "video": _case(1, 8192, 24, 128, n=16, blocks=(128, 128), empty=0.0, is_causal=False, dtype=jnp.bfloat16),
}

# What stands for the rest in the backend-parity matrix.
MATRIX = ("tokens", "bfloat16", "video")
