"""Facts of `attention` and `merge_attentions`: the definition in numpy, oracles by others, and properties."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import export

from portable import parity
from portable.ops import attention, merge_attentions
from portable.ops._attention import blocks, reference, walk
from portable.ops._attention.api import prepare
from portable.ops._attention.arguments import Arrays
from portable.ops._attention.cases import CASES
from portable.parity import hlo, programs
from portable.parity.numbers import relative
from tests.oracles import child, need

FORMS = ["reference", "xla"]  # "xla" is this platform's; the others differ in the size of blocks alone


def definition(q, k, v, *, is_causal=False, window=None, mask_mod=None, score_mod=None, soft_cap=None, **arrays):
    """The formula in numpy, float64, one score at a time."""
    q, k, v = (np.asarray(x, np.float64) for x in (q, k, v))
    (b, t, h, width), (s, g) = q.shape, k.shape[1:3]
    given = {name: np.asarray(x) for name, x in arrays.items() if name != "return_lse"}
    left, right = (window - 1, window - 1) if isinstance(window, int) else window or (None, None)
    out, lse = np.zeros((b, t, h, v.shape[-1])), np.full((b, h, t), -np.inf)
    for row, head, i in np.ndindex(b, h, t):
        at = given["q_positions"][row, i] if "q_positions" in given else i
        logits = []
        for j in range(s):
            score = q[row, i, head] @ k[row, j, head // (h // g)] / np.sqrt(width)
            score = score if score_mod is None else float(score_mod(score, row, head, at, j))
            score = score if soft_cap is None else soft_cap * np.tanh(score / soft_cap)
            seen = (
                not (is_causal and j > at) and (left is None or j >= at - left) and (right is None or j <= at + right)
            )
            seen &= "key_mask" not in given or given["key_mask"][row, j]
            seen &= "segment_ids" not in given or given["segment_ids"][row, i] == given["segment_ids"][row, j]
            seen &= mask_mod is None or bool(mask_mod(row, head, at, j))
            logits.append(score if seen else -np.inf)
        sink = [given["sinks"][head]] if "sinks" in given else []
        top = max([*logits, *sink], default=-np.inf)
        if top > -np.inf:
            lse[row, head, i] = top + np.log(np.sum(np.exp(np.array([*logits, *sink]) - top)))
            out[row, i, head] = np.exp(np.array(logits) - lse[row, head, i]) @ v[row, :, head // (h // g)]
    return out, lse


@pytest.mark.parametrize("case", ["causal_groups", "window_pair", "decoder", "packed", "keys_masked"])
def test_equals_the_definition(case, seed):
    args, kwargs = CASES[case](seed)
    kwargs["return_lse"] = True
    want = definition(*args, **kwargs)
    for form in FORMS:
        arrays = {name: x for name, x in kwargs.items() if hasattr(x, "dtype")}
        static = {name: x for name, x in kwargs.items() if name not in arrays}
        run = jax.jit(functools.partial(attention, **static, implementation=form))
        out, lse = run(*args, **arrays)
        assert relative(out, want[0]) <= 2e-6
        np.testing.assert_array_equal(np.isneginf(lse), np.isneginf(want[1]))
        assert relative(np.where(np.isneginf(lse), 0, lse), np.where(np.isneginf(lse), 0, want[1])) <= 2e-6


@functools.partial(jax.jit, static_argnums=(0, 1))
def _slopes(impl, options, arrays, cotangents):
    out, pull = jax.vjp(lambda *arrays: impl.fwd(*arrays, **dict(options)), *arrays)
    if impl.bwd is None:
        return out, pull(cotangents)[:4]
    return out, impl.bwd(tuple(Arrays(*arrays)._replace(out=out[0], lse=out[1])), cotangents, **dict(options))[:4]


@pytest.mark.parametrize("count", [4, pytest.param(100, marks=pytest.mark.full)])
def test_any_blocks_give_the_definition(count, seed):
    random = np.random.default_rng(seed)
    normal = lambda *shape: jnp.asarray(random.normal(size=shape), jnp.float32)  # noqa: E731
    for number in range(count):
        b, g, r, t, s = (int(random.integers(1, n)) for n in (3, 3, 3, 90, 90))
        k, v, *limits = (int(random.integers(*n)) for n in ((1, 20), (1, 20), (8, 40), (8, 40)))
        left, right = (None if random.random() < 0.3 else int(random.integers(0, 60)) for _ in range(2))
        kwargs = {"is_causal": bool(number % 2), "window": (left, right), "sinks": normal(g * r)}
        if number % 3 == 0:
            ids = tuple(jnp.asarray(np.cumsum(random.random((b, n)) < 0.1, 1) % 3) for n in (t, s))
            kwargs |= {"segment_ids": ids, "key_mask": jnp.asarray(random.random((b, s)) < 0.8)}
        arrays, options = prepare(normal(b, t, g * r, k), normal(b, s, g, k), normal(b, s, g, v), **kwargs)
        cotangents = normal(b, t, g * r, v), normal(b, g * r, t)
        got, want = (
            _slopes(impl, tuple(options.items()), arrays, cotangents) for impl in (walk.form(*limits), reference.IMPL)
        )
        for x, y in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
            assert relative(x, y) <= 5e-6, (number, kwargs, limits)


def test_pairs_of_blocks_are_those_of_the_mask(seed):
    random = np.random.default_rng(seed)
    for _ in range(200):
        t, s, i, j = (int(x) for x in random.integers(1, 60, 4))
        left, right = (None if random.random() < 0.3 else int(random.integers(0, 40)) for _ in range(2))
        queries, keys = blocks.blocks(t, i), blocks.blocks(s, j)
        apart = np.arange(s) - np.arange(t)[:, None]
        seen = (left is None or apart >= -left) & (right is None or apart <= right) & np.ones((t, s), bool)
        every, some = blocks.pairs(queries, keys, left, right)
        want = {True: set(), False: set()}
        for a, c in np.ndindex(queries.count, keys.count):
            part = seen[a * queries.size : (a + 1) * queries.size, c * keys.size : (c + 1) * keys.size]
            if part.any():
                want[bool(part.all() and part.shape[1] == keys.size)].add((a, c))
        assert want == {True: set(map(tuple, every)), False: set(map(tuple, some))}


def test_memory_is_linear_and_a_window_costs_its_width():
    def compiled(t):
        shapes = [jax.ShapeDtypeStruct((1, t, 2, 32), jnp.float32)] * 3
        program = programs.with_gradients(functools.partial(attention, is_causal=True), *shapes)
        return hlo.memory(parity.compile_for("cpu", program.fn, *program.args))["temp"]

    temp = [compiled(t) for t in (8192, 16384, 32768)]
    assert temp[2] - temp[1] <= 2.1 * (temp[1] - temp[0])
    assert temp[2] <= 8 * 32768 * 2 * 32 * 4  # eight arrays of the size of q
    axis = blocks.blocks(2**17, 512)
    assert sum(map(len, blocks.pairs(axis, axis, 1023, 0))) <= 3 * axis.count


def torch_slopes(torch, run, arrays, cotangent):
    """Value and gradients of a torch function of arrays [b, h, t, d] from and to ours."""
    leaves = [torch.tensor(np.asarray(x), requires_grad=True) for x in arrays]
    out = run(*[x.transpose(1, 2) if x.ndim == 4 else x for x in leaves])
    out.backward(torch.tensor(np.asarray(cotangent)))
    return [out.detach().numpy(), *[x.grad.numpy() for x in leaves]]


@functools.partial(jax.jit, static_argnums=0)
def our_slopes(run, arrays, cotangent):
    out, pull = jax.vjp(run, *arrays)
    return [*jax.tree.leaves(out), *pull(cotangent)]


@pytest.mark.oracle
@pytest.mark.parametrize("masked", [False, True])
def test_against_torch_in_float64(masked, seed):
    torch = need("torch")
    random = np.random.default_rng(seed)
    with jax.enable_x64(True):
        shapes = (2, 13, 6, 8), (2, 17, 2, 8), (2, 17, 2, 5)
        q, k, v = (jnp.asarray(random.normal(size=x)) for x in shapes)
        cotangent = jnp.asarray(random.normal(size=(2, 13, 6, 5)))
        kept = random.random((2, 17)) < 0.7
        kept[:, 0] = True
        extra = {"attn_mask": torch.tensor(kept)[:, None, None, :]} if masked else {"is_causal": True}
        sdpa = torch.nn.functional.scaled_dot_product_attention
        want = torch_slopes(
            torch,
            lambda q, k, v: sdpa(q, k, v, enable_gqa=True, scale=0.3, **extra).transpose(1, 2),
            (q, k, v),
            cotangent,
        )
        ours = {"key_mask": jnp.asarray(kept)} if masked else {"is_causal": True}
        for form in FORMS:
            run = functools.partial(attention, scale=0.3, **ours, implementation=form)
            for got, expected in zip(our_slopes(run, (q, k, v), cotangent), want, strict=True):
                assert relative(got, expected) <= 1e-12


@pytest.mark.oracle
@pytest.mark.parametrize("family", ["gemma2", "gpt_oss"])
def test_caps_and_sinks_against_transformers(family, seed):
    torch, module = need("torch", f"transformers.models.{family}.modeling_{family}")
    random = np.random.default_rng(seed)
    q, k, v = (jnp.asarray(random.normal(size=(2, 12, h, 8)), jnp.float32) for h in (6, 2, 2))
    cotangent, sinks = (jnp.asarray(random.normal(size=x), jnp.float32) for x in (q.shape, (6,)))
    apart = np.arange(12)[:, None] - np.arange(12)
    mask = torch.tensor(np.where((apart >= 0) & (apart < 5), 0, np.finfo(np.float32).min).astype(np.float32))
    layer = torch.nn.Module()
    layer.num_key_value_groups = 3

    def theirs(q, k, v, *sinks):
        layer.sinks = sinks[0] if sinks else None
        options = {"scaling": 0.25} | ({} if sinks else {"softcap": 2.0})
        return module.eager_attention_forward(layer, q, k, v, mask, **options)[0]

    arrays = (q, k, v) if family == "gemma2" else (q, k, v, sinks)
    want = torch_slopes(torch, theirs, arrays, cotangent)
    for form in FORMS:

        def ours(q, k, v, sinks=None, form=form):
            cap = 2.0 if sinks is None else None
            options = {"scale": 0.25, "soft_cap": cap, "sinks": sinks, "implementation": form}
            return attention(q, k, v, is_causal=True, window=5, **options)

        for got, expected in zip(our_slopes(ours, arrays, cotangent), want, strict=True):
            assert relative(got, expected) <= 5e-6


@pytest.mark.oracle
@pytest.mark.filterwarnings("ignore")
def test_mods_against_torchs_flex_attention(seed):
    torch, flex = need("torch", "torch.nn.attention.flex_attention")
    random = np.random.default_rng(seed)
    q, k, v = (random.normal(size=(2, 4, 32, 16)).astype(np.float32) for _ in range(3))
    slopes, table = random.normal(size=4).astype(np.float32), random.normal(size=63).astype(np.float32)

    def mods(where, slopes, table):
        def score(x, b, h, i, j):
            return x * (1 + b) - slopes[h] * where.abs(i - j) + table[i - j + 31]

        return score, lambda b, h, i, j: ((i - j) % (h + 2) != 1) | (i == j)

    score, mask = mods(torch, torch.tensor(slopes), torch.tensor(table))
    block = flex.create_block_mask(mask, 2, 4, 32, 32, device="cpu")
    want, lse = flex.flex_attention(*map(torch.tensor, (q, k, v)), score, block, return_lse=True)
    score, mask = mods(jnp, jnp.asarray(slopes), jnp.asarray(table))
    for form in FORMS:
        args = [jnp.swapaxes(x, 1, 2) for x in (q, k, v)]
        out, ours = attention(*args, score_mod=score, mask_mod=mask, return_lse=True, implementation=form)
        assert relative(out, np.swapaxes(want.numpy(), 1, 2)) <= 2e-6
        assert relative(ours, lse.numpy()) <= 2e-6


def biased(q, k, v, slopes, table, *, form=None, **options):
    """A score_mod and a mask_mod that close over arrays, one of them integers."""
    n = q.shape[1]
    order = jnp.arange(n)

    def score(x, b, h, i, j):
        return jnp.where(order[j] >= 0, x - slopes[h] * abs(i - j) + table[h, i - j + n - 1], -jnp.inf)

    mask = lambda b, h, i, j: order[j] <= i  # noqa: E731
    return attention(q, k, v, score_mod=score, mask_mod=mask, implementation=form, **options)


def _biased_arguments(seed):
    keys = jax.random.split(jax.random.key(seed), 5)
    shapes = (2, 24, 4, 8), (2, 24, 2, 8), (2, 24, 2, 8), (4,), (4, 47)
    return [jax.random.normal(key, x) for key, x in zip(keys, shapes, strict=True)]


def test_gradients_reach_what_a_score_mod_closes_over(seed):
    args = _biased_arguments(seed)

    def plainly(q, k, v, slopes, table):
        i, j = np.arange(24)[:, None], np.arange(24)
        x = jnp.einsum("bthk,bshk->bhts", q, jnp.repeat(k, 2, 2)) / np.sqrt(8)
        x = x - slopes[:, None, None] * abs(i - j) + table[:, i - j + 23]
        return jnp.einsum("bhts,bshv->bthv", jax.nn.softmax(jnp.where(j <= i, x, -jnp.inf)), jnp.repeat(v, 2, 2))

    slope = lambda f: jax.grad(lambda *a: jnp.sum(jnp.sin(f(*a))), argnums=range(5))  # noqa: E731
    want = jax.jit(slope(plainly))(*args)
    for form in FORMS:
        for got, expected in zip(jax.jit(slope(functools.partial(biased, form=form)))(*args), want, strict=True):
            assert relative(got, expected) <= 5e-6
    many = jax.jit(jax.vmap(slope(biased), (0, None, None, None, 0)))
    many = many(jnp.stack([args[0]] * 2), *args[1:4], jnp.stack([args[4]] * 2))
    for got, expected in zip(many, want, strict=True):
        assert relative(got[1], expected) <= 5e-6


def test_equal_mods_share_what_is_compiled_and_others_do_not():
    (q, k, v), _ = CASES["plain"]()

    def options(slope, cap, inner=0.0):
        slopes, table = jnp.full(2, slope), jnp.full(2, inner)
        within = jax.jit(lambda x, h: x + table[h] if inner else x)  # its table is not in the text of the trace
        return prepare(q, k, v, score_mod=lambda x, b, h, i, j: within(cap * (x - slopes[h]), h))[1]["score_mod"]

    assert options(1.0, 2.0) == options(3.0, 2.0)
    assert hash(options(1.0, 2.0)) == hash(options(3.0, 2.0))
    assert options(1.0, 2.0) != options(1.0, 2.0000003)
    assert options(1.0, 2.0, 1.0) != options(1.0, 2.0, 2.0)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("sink", [False, True])
def test_rows_that_see_nothing(form, sink, seed):
    (q, k, v), kwargs = CASES["keys_masked"](seed)
    sinks = jnp.array([0.5, -jnp.inf])

    def run(q, k, v, sinks):
        return attention(
            q, k, v, key_mask=kwargs["key_mask"], sinks=sinks if sink else None, return_lse=True, implementation=form
        )

    out, lse, *slopes = our_slopes(run, (q, k, v, sinks), (jnp.ones_like(q), jnp.ones((2, 2, 24))))
    assert not out[1].any()
    np.testing.assert_array_equal(lse[1], np.broadcast_to(sinks[:, None] if sink else -np.inf, lse[1].shape))
    for slope in slopes:
        assert np.isfinite(slope).all()
    assert not slopes[0][1].any()
    assert slopes[0][0].any()


def test_a_merge_is_the_attention_over_all_keys(seed):
    (q, k, v), kwargs = CASES["decoder"](seed)
    parts = [slice(0, 7), slice(7, 7), slice(7, 30), slice(30, 40)]

    def branches(q, k, v):
        options = {"is_causal": True, "window": 20, "q_positions": kwargs["q_positions"], "return_lse": True}
        return [
            attention(q, k[:, p], v[:, p], kv_positions=jnp.arange(40)[p], **options) for p in parts
        ]  # the first sees none of its keys

    def merged(q, k, v):
        return merge_attentions(*zip(*branches(q, k, v), strict=True))

    cotangents = tuple(jax.random.normal(jax.random.key(seed), x) for x in (q.shape, (2, 4, 3)))
    got, want = (our_slopes(f, (q, k, v), cotangents) for f in (merged, lambda *a: attention(*a, **kwargs)))
    for x, y in zip(got, want, strict=True):
        assert relative(x, y) <= 5e-6
    half = merge_attentions([got[0].astype(jnp.bfloat16)], [got[1]])
    assert [x.dtype for x in half] == [jnp.bfloat16, jnp.float32]


def test_a_merge_of_nothing_is_nothing():
    outs, lses = [jnp.zeros((1, 3, 2, 4))] * 2, [jnp.full((1, 2, 3), -jnp.inf)] * 2
    (out, lse), pull = jax.vjp(merge_attentions, outs, lses)
    assert not out.any()
    assert np.isneginf(lse).all()
    assert all(np.isfinite(x).all() for x in jax.tree.leaves(pull((out + 1, jnp.ones_like(lse)))))


def test_tokens_one_by_one_equal_the_sequence(seed):
    (q, k, v), kwargs = CASES["causal_groups"](seed)
    whole, levels = attention(q, k, v, **kwargs)
    step = jax.jit(lambda q, at: attention(q, k, v, q_positions=at, **kwargs))
    for i in (0, 1, 33, 69):
        out, lse = step(q[:, i : i + 1], jnp.full((2, 1), i))
        assert relative(out, whole[:, i : i + 1]) <= 2e-6
        assert relative(lse, levels[..., i : i + 1]) <= 2e-6


@pytest.mark.parametrize("form", FORMS)
def test_a_nan_stays_in_its_row(form):
    (q, k, v), _ = CASES["plain"]()
    run = jax.jit(functools.partial(attention, is_causal=True, implementation=form))
    clean, broken = run(q, k, v), run(q.at[1, 5, 1].set(jnp.nan), k, v)
    assert np.isnan(broken[1, 5, 1]).all()
    np.testing.assert_array_equal(np.delete(broken[1], 5, 0), np.delete(clean[1], 5, 0))
    np.testing.assert_array_equal(broken[0], clean[0])


def test_second_order_reverse_mode():
    args = [x[:, :20] for x in CASES["plain"]()[0]]

    def curvature(form):
        def value(q, k, v):
            out, lse = attention(q, k, v, is_causal=True, return_lse=True, implementation=form)
            return jnp.sum(jnp.sin(out)) + jnp.sum(lse**2)

        slopes = jax.grad(value, argnums=(0, 1, 2))
        return jax.jit(jax.grad(lambda *a: sum(jnp.sum(x**2) for x in slopes(*a)), argnums=(0, 1, 2)))(*args)

    for got, want in zip(curvature(None), curvature("reference"), strict=True):
        assert relative(got, want) <= 1e-5


def test_forward_mode_works_with_the_reference():
    (q, k, v), _ = CASES["plain"]()
    _, tangent = jax.jvp(lambda v: attention(q, k, v, implementation="reference"), (v,), (jnp.ones_like(v),))
    np.testing.assert_allclose(tangent, 1, rtol=1e-5)  # the weights sum to 1


def test_the_backward_does_not_compute_the_forward_again():
    (q, k, v), _ = CASES["plain"]()
    name = "xla_small_blocks"  # named, it is traced in place
    text = str(jax.make_jaxpr(jax.grad(lambda q: attention(q, k, v, implementation=name).sum()))(q))
    assert text.count("dot_general") == 2 + 1 + 5  # the forward's, the mean of the results, the backward's


def test_under_checkpoint_and_scan():
    (q, k, v), _ = CASES["plain"]()
    f = lambda x: attention(x, k, v, is_causal=True)  # noqa: E731
    twice = lambda x: jax.lax.scan(lambda x, _: (jax.checkpoint(f)(x), None), x, length=2)[0]  # noqa: E731
    got, want = (jax.grad(lambda x, g=g: jnp.sum(g(x) ** 2))(q) for g in (twice, lambda x: f(f(x))))
    assert relative(got, want) <= 5e-6


def test_an_exported_program_runs_where_it_is_loaded(seed):
    args = _biased_arguments(seed)
    f = jax.jit(jax.grad(lambda *a: jnp.sum(biased(*a) ** 2), argnums=(0, 3)))
    back = export.deserialize(export.export(f, platforms=["cpu", "cuda", "tpu"])(*args).serialize())
    for got, want in zip(back.call(*args), f(*args), strict=True):
        assert relative(got, want) <= 2e-6


SHARDED = """
import jax, jax.numpy as jnp
from jax.sharding import AxisType, PartitionSpec as P
from portable.parity.numbers import relative
from tests.ops.test_attention import _biased_arguments, biased

args = _biased_arguments(0)
mesh = jax.make_mesh((2, 2, 2), ("data", "model", "other"), (AxisType.Auto,) * 3)
heads = P("data", None, "model")

def sharded(q, k, v, slopes, table):
    inside = lambda *a: biased(*a, window=(9, None))
    specs = (heads, heads, heads, P("model"), P("model"))
    return jax.shard_map(inside, mesh=mesh, in_specs=specs, out_specs=heads)(q, k, v, slopes, table)

def replicated(q, k, v, slopes, table):  # each shard takes the first heads' slopes
    specs = (heads, heads, heads, P(), P())
    return jax.shard_map(biased, mesh=mesh, in_specs=specs, out_specs=heads)(q, k, v, slopes, table)

slope = lambda f: jax.jit(jax.grad(lambda *a: jnp.sum(jnp.sin(f(*a))), argnums=range(5)))
for got, want in zip(slope(sharded)(*args), slope(lambda *a: biased(*a, window=(9, None)))(*args), strict=True):
    assert relative(got, want) <= 5e-6

def same(q, k, v, slopes, table):
    return biased(q, k, v, jnp.tile(slopes[:2], 2), jnp.tile(table[:2], (2, 1)))

for got, want in zip(slope(replicated)(*args), slope(same)(*args), strict=True):
    assert relative(got, want) <= 5e-6
print("agree")
"""


def test_sharded_over_eight_devices():
    assert "agree" in child(SHARDED, devices=8)
