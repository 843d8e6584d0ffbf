"""Facts of `block_sparse_attention`: the definition in numpy, properties, bad input, transformations."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import export
from jax.experimental import checkify

import portable
from portable import parity
from portable.ops import attention, block_sparse_attention
from portable.ops._block_sparse_attention import dispatch, gather, reference
from portable.ops._block_sparse_attention.api import prepare
from portable.ops._block_sparse_attention.cases import CASES
from portable.parity import hlo, programs
from portable.parity.numbers import relative
from tests.ops.sparse_definition import attend
from tests.oracles import child

# Steps of few blocks and tiles of few rows, so that small sizes have several of each.
FORMS = {
    "gather": gather.form(600),
    "dispatch": dispatch.form(dispatch.Setting(rows=8, room=2000, few=10**6, crowd=0)),
    "reference": reference.IMPL,
}
# (b, t, s, h, g, lists, n, block_q, block_k, k, v, causal): ragged ends, groups, lists of all kinds.
SHAPES = [
    (2, 21, 21, 4, 2, 4, 3, 4, 4, 8, 12, True),
    (1, 26, 19, 4, 2, 2, 4, 1, 8, 8, 8, False),
    (1, 17, 30, 6, 2, 1, 5, 8, 3, 4, 4, True),
]
MORE = [
    (2, 40, 40, 2, 1, 2, 40, 1, 1, 8, 4, True),
    (1, 33, 64, 4, 4, 4, 2, 16, 32, 16, 16, True),
    (3, 9, 50, 4, 2, 2, 4, 3, 7, 8, 8, False),
    (1, 64, 64, 8, 1, 8, 5, 2, 8, 4, 8, True),
    (1, 5, 100, 2, 2, 1, 9, 5, 10, 8, 8, False),
]


def drawn(shape, seed: int):
    """Returns random arguments of a shape: blocks named twice, behind the query, not at all; permuted, in segments."""
    b, t, s, h, g, lists, n, block_q, block_k, k, v, causal = shape
    rng = np.random.default_rng(seed)
    normal = lambda *sizes: rng.normal(size=sizes).astype(np.float32)  # noqa: E731
    table = rng.integers(-1, -(-s // block_k), (b, lists, -(-t // block_q), n)).astype(np.int32)
    table[rng.random(table.shape[:3]) < 0.2] = -1
    arrays = {
        "q_positions": np.stack([rng.permutation(max(t, s))[:t] for _ in range(b)]),
        "kv_positions": np.stack([rng.permutation(s) for _ in range(b)]),
        "segment_ids": tuple(np.sort(rng.integers(0, 2, (b, size)), 1) for size in (t, s)),
    }
    args = normal(b, t, h, k), normal(b, s, g, k), normal(b, s, g, v), table
    options = {"block_q": block_q, "block_k": block_k, "is_causal": causal}
    return args, arrays, options, (normal(b, t, h, v), normal(b, h, t))


@functools.partial(jax.jit, static_argnums=(0, 1))
def slopes(form, options, arrays, cotangents):
    """Returns (out, lse, dq, dk, dv) of a form as the op would run it."""
    impl, options = FORMS[form], dict(options)
    if impl.bwd is None:
        value = lambda *floats: impl.fwd(*floats, *arrays[3:], **options)  # noqa: E731
        out, pull = jax.vjp(value, *arrays[:3])
        return (*out, *pull(cotangents))
    out, saved = impl.save(*arrays, **options)
    return (*out, *impl.bwd((*arrays, saved), cotangents, **options)[:3])


def compared(form, shape, seed):
    """Yields pairs (found, defined) of a form on a random case."""
    args, arrays, options, cotangents = drawn(shape, seed)
    given = {name: jax.tree.map(jnp.asarray, x) for name, x in arrays.items()}
    prepared, static = prepare(*map(jnp.asarray, args), **given, **options)
    got = slopes(form, tuple(static.items()), prepared, tuple(map(jnp.asarray, cotangents)))
    want = attend(*args, **options, **arrays, dout=cotangents[0], dlse=cotangents[1])
    np.testing.assert_array_equal(np.isneginf(got[1]), np.isneginf(want[1]))
    return [(np.where(np.isneginf(w), 0, x), np.where(np.isneginf(w), 0, w)) for x, w in zip(got, want, strict=True)]


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize(
    "shape, count", [*((s, 4) for s in SHAPES), *(pytest.param(s, 20, marks=pytest.mark.full) for s in SHAPES + MORE)]
)
def test_equals_the_definition_in_float64(form, shape, count, seed):
    seen = 0
    for number in range(count):
        pairs = compared(form, shape, seed + number)
        seen += np.any(pairs[0][1] == 0)
        for name, (got, want) in zip(("out", "lse", "dq", "dk", "dv"), pairs, strict=True):
            assert relative(got, want) <= 2e-6, (name, seed + number)
    assert seen  # queries without keys


def all_blocks(b, lists, nq, nk):
    return jnp.broadcast_to(jnp.arange(nk, dtype=jnp.int32), (b, lists, nq, nk))


def normal(i, *shape):
    return jax.random.normal(jax.random.key(i), shape)


@pytest.mark.parametrize("form", ["xla_gather", "xla_dispatch"])
def test_selecting_all_is_dense_attention(form):
    q, k, v, dout = normal(0, 1, 70, 4, 16), normal(1, 1, 70, 2, 16), normal(2, 1, 70, 2, 16), normal(3, 1, 70, 4, 16)
    block_q = 1 if form == "xla_dispatch" else 8
    chosen = all_blocks(1, 1, -(-70 // block_q), 5)

    def both(fn):
        out, pull = jax.vjp(fn, q, k, v)
        return out, *pull(dout)

    options = {"block_q": block_q, "block_k": 16, "is_causal": True, "implementation": form}
    got = both(lambda *a: block_sparse_attention(*a, chosen, **options))
    want = both(lambda *a: attention(*a, is_causal=True))
    for x, y in zip(got, want, strict=True):
        assert relative(x, y) <= 2e-6


def test_a_list_is_a_set():
    args, kwargs = CASES["plain"](0)
    q, k, v, chosen = args
    # A block more than once, in another order, with more padding.
    other = jnp.concatenate([chosen[..., ::-1], chosen[..., :1], jnp.full_like(chosen[..., :2], -1)], -1)
    for form in ("xla_gather", "xla_dispatch"):
        pair = [block_sparse_attention(q, k, v, c, **kwargs, implementation=form) for c in (chosen, other)]
        for one, two in zip(*pair, strict=True):
            np.testing.assert_allclose(one, two, rtol=1e-6, atol=1e-6)


def test_what_is_not_selected_is_not_read():
    q, k, v = normal(0, 1, 128, 2, 8), normal(1, 1, 128, 2, 8), normal(2, 1, 128, 2, 8)
    chosen = jnp.array([0, 0, 0, 0, 0, 0, 0, 7])[None, None, :, None]
    options = {"block_q": 16, "block_k": 16, "is_causal": True}
    want = block_sparse_attention(q, k, v, chosen, **options)
    k, v = (x.at[:, 16:112].set(jnp.nan) for x in (k, v))
    for form in ("xla_gather", "xla_dispatch"):
        np.testing.assert_allclose(
            block_sparse_attention(q, k, v, chosen, **options, implementation=form), want, atol=1e-6
        )
    spoiled = block_sparse_attention(q, k.at[0, 115].set(jnp.nan), v, chosen, **options)
    np.testing.assert_array_equal(np.isnan(spoiled).any((0, 2, 3)), np.arange(128) >= 115)  # it shows where it is seen


def test_indices_out_of_range():
    q, k, v = normal(0, 1, 64, 1, 8), normal(1, 1, 64, 1, 8), normal(2, 1, 64, 1, 8)
    lists = [[0, 4], [-7, 1], [99, 2], [3, 3]], [[0, -1], [-1, 1], [-1, 2], [3, -1]]
    wrong, right = (jnp.array(x, jnp.int32)[None, None] for x in lists)
    call = functools.partial(block_sparse_attention, block_q=16, block_k=16, is_causal=False)
    with pytest.raises(ValueError, match="block_indices must lie from 0 to 3, the blocks of 16 of s=64 keys, or be -1"):
        call(q, k, v, wrong)
    for form in ("reference", "xla_gather", "xla_dispatch"):
        run = jax.jit(functools.partial(call, implementation=form))
        np.testing.assert_allclose(run(q, k, v, wrong), run(q, k, v, right), atol=1e-6)
    with portable.checks():
        error, _ = jax.jit(checkify.checkify(call))(q, k, v, wrong)
        with pytest.raises(checkify.JaxRuntimeError, match="block_indices must lie from 0 to 3"):
            error.throw()
        jax.jit(checkify.checkify(call))(q, k, v, right)[0].throw()


PLAIN = {"block_q": 4, "block_k": 4, "is_causal": True}
SHAPE = {"q": (1, 8, 4, 8), "k": (1, 8, 2, 8), "v": (1, 8, 2, 8), "block_indices": (1, 2, 2, 3)}
WRONG = {
    "lists": ({"block_indices": (1, 3, 2, 3)}, {}, ValueError, "lists of 1, g=2 or h=4; got 3"),
    "blocks of queries": ({"block_indices": (1, 2, 3, 3)}, {}, ValueError, r"\[b, lists, nq, n\] with nq=2"),
    "groups": ({"k": (1, 8, 3, 8), "v": (1, 8, 3, 8)}, {}, ValueError, "got h=4, g=3"),
    "width": ({"k": (1, 8, 2, 6)}, {}, ValueError, r"k must be \[b, s, g, k\] with k=8"),
    "no block": ({}, {"block_q": 0}, ValueError, "block_q must be at least 1; got 0"),
    "half a block": ({}, {"block_k": 1.5}, TypeError, "block_k must be an integer; got float"),
    "causal": ({}, {"is_causal": 1}, TypeError, "is_causal must be True or False; got int"),
    "scale": ({}, {"scale": float("nan")}, ValueError, "scale must be finite; got nan"),
    "array of scales": ({}, {"scale": np.ones(2)}, TypeError, "scale must be a number; got ndarray"),
    "positions": ({}, {"q_positions": np.arange(7)}, ValueError, r"q_positions must be \[t\] with t=8"),
    "float positions": ({}, {"kv_positions": np.ones(8)}, TypeError, "kv_positions must be integers"),
    "no width": ({"q": (1, 8, 4, 0), "k": (1, 8, 2, 0)}, {}, ValueError, "heads must be at least 1 wide; got k=0, v=8"),
    "segments": ({"k": (1, 9, 2, 8), "v": (1, 9, 2, 8)}, {"segment_ids": np.ones((1, 8), int)}, ValueError, "a pair"),
}


@pytest.mark.parametrize("fault", WRONG)
def test_errors_say_what_is_wrong(fault):
    shapes, options, kind, sentence = WRONG[fault]
    args = [
        jnp.zeros(shape, jnp.int32 if name == "block_indices" else jnp.float32)
        for name, shape in (SHAPE | shapes).items()
    ]
    with pytest.raises(kind, match=sentence) as caught:
        block_sparse_attention(*args, **PLAIN | options)
    assert str(caught.value).startswith("block_sparse_attention: ")


def test_numbers_of_numpy_are_numbers():
    args, kwargs = CASES["plain"](0)
    want = block_sparse_attention(*args, **kwargs | {"scale": float(np.float32(0.3))})
    got = block_sparse_attention(*args, **kwargs | {"scale": np.float32(0.3), "is_causal": np.True_})
    jax.tree.map(np.testing.assert_array_equal, got, want)


def test_dtypes_are_checked():
    args = [jnp.zeros(shape) for shape in SHAPE.values()]
    with pytest.raises(TypeError, match="block_indices must be integers; got float32"):
        block_sparse_attention(*args, **PLAIN)


@pytest.mark.parametrize("form", ["xla_gather", "xla_dispatch"])
def test_under_vmap_checkpoint_and_scan(form):
    q, k, v = normal(0, 3, 2, 20, 2, 8), normal(1, 3, 2, 20, 1, 8), normal(2, 3, 2, 20, 1, 8)
    block_q = 1 if form == "xla_dispatch" else 4
    chosen = jnp.asarray(np.random.default_rng(0).integers(-1, 2, (3, 2, 2, -(-20 // block_q), 2)), jnp.int32)
    call = functools.partial(block_sparse_attention, block_q=block_q, block_k=16, is_causal=True, implementation=form)

    def loss(fn, args):
        return (fn(*args, chosen) ** 2).sum()

    def stepped(q, k, v, chosen):
        return jax.lax.scan(lambda c, xs: (c, jax.checkpoint(call)(*xs)), 0, (q, k, v, chosen))[1]

    alone = lambda *a: jnp.stack([call(*(x[i] for x in a)) for i in range(3)])  # noqa: E731
    want = jax.jit(jax.value_and_grad(functools.partial(loss, alone)))((q, k, v))
    for fn in (jax.vmap(call), stepped):
        got = jax.jit(jax.value_and_grad(functools.partial(loss, fn)))((q, k, v))
        jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=2e-5, atol=2e-5), got, want)


def test_second_derivatives():
    args, kwargs = CASES["plain"](0)
    q, k, v, chosen = args[0][:, :32], args[1][:, :32], args[2][:, :32], args[3][:, :, :2]
    chosen = jnp.where(chosen < 2, chosen, -1)

    def slope(form):
        def value(q):
            return block_sparse_attention(q, k, v, chosen, **kwargs | {"return_lse": False}, implementation=form).sum()

        return jax.jit(jax.grad(lambda q: (jax.grad(value)(q) ** 2).sum()))(q)

    assert relative(slope("xla_gather"), slope("reference")) <= 1e-5


def test_lowers_for_every_platform_from_here():
    args, kwargs = CASES["tokens"](0)

    def loss(*floats):
        return block_sparse_attention(*floats, args[3], **kwargs)[0].sum()

    exported = export.export(jax.jit(jax.grad(loss, (0, 1, 2))), platforms=("cpu", "cuda", "tpu"))(*args[:3])
    got = exported.call(*args[:3])
    for x, y in zip(got, jax.jit(jax.grad(loss, (0, 1, 2)))(*args[:3]), strict=True):
        np.testing.assert_allclose(x, y, rtol=1e-6, atol=1e-6)


def test_sharded_over_rows_and_heads():
    child(
        """
import functools, jax, jax.numpy as jnp, numpy as np
from jax.sharding import PartitionSpec as P
from portable.ops import block_sparse_attention

mesh = jax.make_mesh((2, 2), ("data", "model"), axis_types=(jax.sharding.AxisType.Auto,) * 2)
normal = lambda i, *shape: jax.random.normal(jax.random.key(i), shape)
q, k, v = normal(0, 2, 20, 4, 8), normal(1, 2, 20, 2, 8), normal(2, 2, 20, 2, 8)
for form, block_q in (("xla_gather", 4), ("xla_dispatch", 1)):
    chosen = jnp.asarray(np.random.default_rng(0).integers(-1, 2, (2, 4, -(-20 // block_q), 2)), jnp.int32)
    call = functools.partial(block_sparse_attention, block_q=block_q, block_k=16, is_causal=True, implementation=form)
    heads = P("data", None, "model"), P("data", None, "model"), P("data", None, "model"), P("data", "model")
    shared = jax.shard_map(call, mesh=mesh, in_specs=heads, out_specs=P("data", None, "model"))
    both = lambda fn: jax.jit(jax.value_and_grad(lambda q, k, v: (fn(q, k, v, chosen) ** 2).sum(), (0, 1, 2)))(q, k, v)
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-5, atol=1e-5), both(shared), both(call))
""",
        devices=4,
    )


@pytest.mark.parametrize("size", [1, 3, 8])
def test_the_plan_holds_each_pair_once(size, seed):
    rng = np.random.default_rng(seed)
    chosen = np.stack([[rng.permutation(7)[:3] for _ in range(11)] for _ in range(2)])
    chosen = np.where(rng.random(chosen.shape) < 0.3, -1, chosen).astype(np.int32)
    p = jax.jit(dispatch.plan, static_argnums=(1, 2))(jnp.asarray(chosen), 7, size)
    unit, block, slot, tiles = (np.asarray(x) for x in p)
    for lane in range(2):
        found = {
            (int(unit[i, lane, x]), int(block[i, lane]))
            for i in range(tiles) for x in range(size) if unit[i, lane, x] < 11
        }  # fmt: skip
        assert found == {(u, int(n)) for u in range(11) for n in chosen[lane, u] if n >= 0}
        for u, j in np.argwhere(chosen[lane] >= 0):
            tile, x = divmod(int(slot[lane, u, j]), size)
            assert (unit[tile, lane, x], block[tile, lane]) == (u, chosen[lane, u, j])
    assert tiles <= len(unit)


@pytest.mark.parametrize("form", ["xla_gather", "xla_dispatch"])
def test_memory_is_linear_in_the_length(form):
    temp = []
    for t in (2048, 8192):
        block_q = 1 if form == "xla_dispatch" else 64
        floats = [jax.ShapeDtypeStruct((1, t, n, 16), jnp.float32) for n in (2, 1, 1)]
        chosen = jax.ShapeDtypeStruct((1, 2, t // block_q, 8), jnp.int32)
        call = functools.partial(
            block_sparse_attention, block_q=block_q, block_k=64, is_causal=True, implementation=form
        )
        program = programs.with_gradients(call, *floats, chosen)
        done = parity.compile_for("cpu", program.fn, *program.args)
        temp.append(hlo.memory(done)["temp"])
        assert all(b.shape.count(t) <= 1 for b in hlo.buffers(hlo.text(done)))
    assert temp[1] <= 4.2 * temp[0]
