"""What is particular to `dora_linear` and `dora_norm`: what is kept, digits, devices, refusals."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from portable import ops
from tests.oracles import child


def arrays(d=24, o=20, r=3, t=7, n=(), seed=0, dtype=jnp.float32):
    keys = jax.random.split(jax.random.key(seed), 5)
    shapes = (t, d), (d, o), (*n, d, r), (*n, r, o), (*n, o)
    x, w, a, b, m = (jax.random.normal(k, s) for k, s in zip(keys, shapes, strict=True))
    return x.astype(dtype), (w * d**-0.5).astype(dtype), a.astype(dtype), b.astype(dtype), jnp.abs(m)


def test_the_backward_keeps_one_array_of_the_outputs_size_and_lora_none():
    x, w, a, b, m = arrays(t=50)

    def kept(fn, *args):
        _, pull = jax.vjp(fn, *args)
        mine = {z.unsafe_buffer_pointer() for z in (x, w, a, b, m)}
        return sorted(
            z.shape for z in jax.tree.leaves(pull) if hasattr(z, "shape") and z.unsafe_buffer_pointer() not in mine
        )

    large = [s for s in kept(lambda a, b, m: ops.dora_linear(x, w, a, b, m), a, b, m) if s[:1] == (50,)]
    assert large == [(50, 3), (50, 20)]
    large = [s for s in kept(lambda a, b: ops.lora_linear(x, w, a, b), a, b) if s[:1] == (50,)]
    assert large == [(50, 3)]


@pytest.mark.parametrize("size", [1.0, 1e-1, 1e-2])
def test_the_expansion_loses_digits_as_the_update_cancels_the_weight(size):
    """By the square of ||w|| / ||w + a b||, as the docstring says; the dense form by its first power at most."""
    rng = np.random.default_rng(0)
    a, b = (rng.standard_normal(s).astype(np.float32).astype(float) for s in ((64, 4), (4, 32)))
    w = (-a @ b + 2 * size * rng.standard_normal((64, 32))).astype(np.float32).astype(float)
    want = np.linalg.norm(w + a @ b, axis=0)
    found = {}
    for form in ("xla_dense", "xla_factored"):
        got = ops.dora_norm(*(jnp.asarray(z, jnp.float32) for z in (w, a, b)), implementation=form)
        found[form] = np.abs(np.asarray(got) / want - 1).max()
    ratio = (np.linalg.norm(w, axis=0) / want).max()
    assert found["xla_factored"] < 5e-7 * ratio**2
    assert found["xla_dense"] < 5e-7 * ratio
    if size < 0.1:
        assert found["xla_factored"] > 10 * found["xla_dense"]


@pytest.mark.parametrize("spread", [0, 1e-4, 1e-3, 1e-2, 1e-1])
def test_bfloat16_results_are_rounded_once(spread):
    """Gains near 1 are where PEFT's (g - 1) * base, and a gain in bfloat16, lose what the adapter adds."""
    x, w, a, b, _ = arrays(d=64, o=64, r=4, t=256, dtype=jnp.bfloat16)
    b = (0.003 * b).astype(jnp.bfloat16)  # what it adds is a sixtieth of the base: its own roundings do not count
    n = ops.dora_norm(w, a, b)
    m = n * (1 + spread * jax.random.normal(jax.random.key(9), n.shape))
    exact = [np.asarray(z, np.float64) for z in (x, w, a, b, m)]
    v = exact[1] + exact[2] @ exact[3]
    want = exact[0] @ (v * exact[4] / np.linalg.norm(v, axis=0))
    got = np.asarray(ops.dora_linear(x, w, a, b, m), np.float64)
    floor = np.asarray(jnp.asarray(want, jnp.bfloat16), np.float64)
    rms = lambda e: np.sqrt(np.mean(e**2))  # noqa: E731
    assert rms(got - want) < 1.05 * rms(floor - want)
    kept, _ = jax.vjp(lambda m: ops.dora_linear(x, w, a, b, m), m)  # the sum that a backward keeps is rounded too
    assert rms(np.asarray(kept, np.float64) - want) < 1.5 * rms(floor - want)


def test_gradients_of_a_norm_do_not_flow_unless_asked():
    x, w, a, b, m = arrays()
    through = jax.grad(lambda a: ops.dora_linear(x, w, a, b, m, detach=False).sum())(a)
    constant = jax.grad(lambda a: ops.dora_linear(x, w, a, b, m).sum())(a)
    norms = ops.dora_norm(w, a, b)
    cached = jax.grad(lambda a: ops.dora_linear(x, w, a, b, m, norms=norms).sum())(a)
    np.testing.assert_allclose(constant, cached, rtol=1e-6, atol=1e-5)
    assert np.abs(through - constant).max() > 1e-2


@pytest.mark.parametrize("ids", [(0, 2, -1, 1), ((0, -1, 2), (1, 1, 1), (2, 2, 2), (-1, -1, 0))])
def test_each_row_is_what_it_is_alone(ids):
    x, w, a, b, m = arrays(t=12, n=(3,))
    x, ids = x.reshape(4, 3, -1), jnp.asarray(ids)
    got = jax.jit(lambda *z: ops.dora_linear(*z, ids=ids, scale=2.0))(x, w, a, b, m)
    each = [x @ w, *(ops.dora_linear(x, w, a[i], b[i], m[i], scale=2.0) for i in range(3))]
    rows = jnp.broadcast_to(ids.reshape(4, -1), (4, 3))
    want = jnp.take_along_axis(jnp.stack(each, 2), (rows + 1)[..., None, None], axis=2)[:, :, 0]
    np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-5)


SHARDED = """
import re
import jax, jax.numpy as jnp, numpy as np
from jax.sharding import NamedSharding, PartitionSpec as P
from portable import ops, sharding
mesh = sharding.mesh(model=4)
MOVES = r"= (\\w+\\[[\\d,]*\\])\\S* (all-reduce|all-gather|reduce-scatter|all-to-all|collective-permute)(?:-start)?\\("
place = lambda *axes: NamedSharding(mesh, P(*axes))
w, a, b = (jax.random.normal(jax.random.key(i), s) for i, s in enumerate([(64, 32), (64, 4), (4, 32)]))
squares = jnp.sum(w * w, 0)
placed = [jax.device_put(z, s) for z, s in zip((w, a, b), (place("model"), place("model"), place()))]
apart = {"shards": 4}
for form, options in (("xla_dense", {}), ("xla_factored", apart), ("xla_factored", {**apart, "squares": squares})):
    run = jax.jit(lambda w, a, b: ops.dora_norm(w, a, b, implementation=form, **options)).lower(*placed).compile()
    moved = re.findall(MOVES, run.as_text())
    assert moved == [("f32[32]", "all-reduce")], (form, moved)
    np.testing.assert_allclose(run(*placed), jnp.linalg.norm(w + a @ b, axis=0), rtol=1e-5)
columns = [jax.device_put(z, s) for z, s in zip((w, a, b), (place(None, "model"), place(), place(None, "model")))]
for form in ("xla_dense", "xla_factored"):
    run = jax.jit(lambda w, a, b: ops.dora_norm(w, a, b, implementation=form)).lower(*columns).compile()
    assert not re.findall(r"all-reduce|all-gather|all-to-all|collective-permute", run.as_text()), form

def local(x, w, a, b, m):
    return ops.dora_linear(x, w, a, b, m)

x, m = jax.random.normal(jax.random.key(8), (8, 64)), jnp.ones(32)
want = ops.dora_linear(x, w, a, b, m)
rows = jax.shard_map(local, mesh=mesh, in_specs=(P("model"), P(), P(), P(), P()), out_specs=P("model"))
np.testing.assert_allclose(rows(x, w, a, b, m), want, rtol=1e-4, atol=1e-5)
columns = (P(), P(None, "model"), P(), P(None, "model"), P("model"))
outs = jax.shard_map(local, mesh=mesh, in_specs=columns, out_specs=P(None, "model"))
np.testing.assert_allclose(outs(x, w, a, b, m), want, rtol=1e-4, atol=1e-5)
slopes = jax.grad(lambda f, a: jnp.sum(f(x, w, a, b, m) ** 2), argnums=1)
for f in (rows, outs):
    np.testing.assert_allclose(slopes(f, a), slopes(ops.dora_linear, a), rtol=1e-3, atol=1e-3)
print("sharded")
"""


def test_a_sharded_weight_costs_one_all_reduce_of_its_outputs():
    assert "sharded" in child(SHARDED, devices=4)


@pytest.mark.parametrize(
    "change, error, message",
    [
        ({"a": jnp.ones((23, 3))}, ValueError, r"dora_linear: a must be \[d, r\] with d=24; got shape \[23, 3\]"),
        ({"m": jnp.ones(19)}, ValueError, r"dora_linear: m must be \[o\] with o=20"),
        ({"x": jnp.ones((7, 24), jnp.int32)}, TypeError, "x must be floating point"),
        ({"w": jnp.ones((24, 20), jnp.int8)}, TypeError, "a weight of integers needs w_scale"),
        ({"norm": "best"}, ValueError, "norm must be one of auto, dense, factored; got 'best'"),
        ({"dropout": 1.0}, ValueError, r"dropout must lie in \[0, 1\); got 1.0"),
        ({"dropout_mode": "input"}, ValueError, "dropout_mode must be one of peft, adapter"),
        ({"ids": jnp.zeros(7, jnp.int32), "group_sizes": jnp.array([7])}, ValueError, "not both"),
        ({"squares": jnp.ones((1, 20))}, ValueError, r"squares must be \[o\]"),
    ],
)
def test_refusals(change, error, message):
    names = dict(zip("xwabm", arrays(), strict=True)) | change
    positional = [names.pop(name) for name in "xwabm"]
    with pytest.raises(error, match=message):
        ops.dora_linear(*positional, **names)


def test_ids_out_of_range_and_of_another_shape():
    x, w, a, b, m = arrays(n=(3,))
    with pytest.raises(ValueError, match=r"ids must lie in -1\.\.2"):
        ops.dora_linear(x, w, a, b, m, ids=jnp.array([0, 1, 2, 3, 0, 0, 0]))
    with pytest.raises(ValueError, match=r"ids must be \[\*tokens\] of x \[7, 24\]"):
        ops.dora_linear(x, w, a, b, m, ids=jnp.array([0, 1]))


def test_refusals_of_the_norm():
    _, w, a, b, _ = arrays()
    with pytest.raises(ValueError, match="shards must divide d; got d=24, shards=5"):
        ops.dora_norm(w, a, b, shards=5)
    with pytest.raises(ValueError, match=r"dora_norm: b must be \[r, o\] with r=3"):
        ops.dora_norm(w, a, b[:2])


def test_norms_by_blocks_of_rows_leave_no_row_out(monkeypatch):
    from portable.ops._dora_norm import xla_blocks

    _, w, a, b, _ = arrays(d=50, o=20, r=64)
    monkeypatch.setattr(xla_blocks, "BLOCK", 4 * 20 * 8)  # six blocks of 8 rows, and two rows beside them
    want = np.linalg.norm(np.asarray(w, float) + np.asarray(a, float) @ np.asarray(b, float), axis=0)
    got = jax.jit(lambda *z: ops.dora_norm(*z, implementation="xla_blocks"))(w, a, b)
    np.testing.assert_allclose(got, want, rtol=1e-6)
    assert "while" in jax.jit(lambda *z: ops.dora_norm(*z, implementation="xla_blocks")).lower(w, a, b).as_text()
