"""What is particular to `neighborhood_attention`: its definition in numpy, the plan, and what it refuses."""

import functools
import itertools
import json
import math
import random

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, PartitionSpec

from portable import cli, parity
from portable.ops import neighborhood_attention, neighborhood_plan
from portable.ops._neighborhood_attention import halo, reference, tables, xla_cache, xla_tiles, xla_vmem
from portable.ops._neighborhood_attention.cases import CASES
from portable.parity import hlo
from portable.parity.numbers import relative
from portable.parity.roofline import roofline
from tests.ops.neighborhood_definition import definition, sees, table

FORMS = ["xla_cache", "xla_tiles"]  # the forms differ in a setting
X = jax.random.normal(jax.random.key(0), (2, 7, 9, 4, 8))


def draw(seed: int) -> tuple[dict, dict]:
    """A random configuration: the arrays by name, and the options."""
    rng = random.Random(seed)
    rank = rng.choice([1, 2, 3])
    space = [rng.randint(1, (24, 9, 6)[rank - 1]) for _ in range(rank)]
    window = [rng.randint(1, n) for n in space]
    dilation = [rng.randint(1, n // w) for n, w in zip(space, window, strict=True)]
    options = {"stride": [rng.randint(1, w) for w in window], "is_causal": [rng.random() < 0.4 for _ in space]}
    options |= {"pad_small": rng.random() < 0.3}
    g, r, b, extra, k, v = (rng.choice(sizes) for sizes in ((1, 2), (1, 2), (1, 2), (0, 0, 3), (4, 8), (4, 5)))
    array = np.random.default_rng(seed).normal
    arrays = {"q": (b, *space, g * r, k), "k": (b, *space, g, k), "v": (b, *space, g, v)}
    if options["pad_small"]:
        window = [w + rng.randint(0, 3) for w in window]
        dilation = [d + rng.randint(0, 2) for d in dilation]
    if rng.random() < 0.4:
        window = [w - 1 + w % 2 for w in window]
        options |= {"stride": [1] * rank, "is_causal": [False] * rank}
        arrays["rel_pos_bias"] = (g * r, *(2 * w - 1 for w in window))
    if extra:
        arrays |= {"extra_k": (b, extra, g, k), "extra_v": (b, extra, g, v)}
    made = {name: array(size=shape).astype(np.float32) for name, shape in arrays.items()}
    if rng.random() < 0.4:
        made["key_mask"] = np.random.default_rng(seed).random((b, *space)) < 0.8
    return made, options | {"window": window, "dilation": dilation}


def distance(seed: int, form: str) -> float:
    """The largest relative error of value, log-sum-exp and gradients on a random configuration."""
    arrays, options = draw(seed)
    floats = {name: x for name, x in arrays.items() if x.dtype != bool}
    masks = {name: x for name, x in arrays.items() if x.dtype == bool}

    def call(floats):
        given = floats | masks
        qkv = [given.pop(name) for name in ("q", "k", "v")]
        return neighborhood_attention(*qkv, **given, **options, return_lse=True, implementation=form)

    b, *space, h, _ = arrays["q"].shape
    normal = np.random.default_rng(seed + 1).normal
    dout = normal(size=(b, *space, h, arrays["v"].shape[-1])).astype(np.float32)
    dlse = normal(size=(b, *space, h)).astype(np.float32)

    @jax.jit
    def run(floats):
        found, pull = jax.vjp(call, floats)
        return found, pull((dout, dlse))[0]

    (out, lse), grads = run(floats)
    names = ("window", "stride", "dilation", "is_causal")
    seen = table(space, *(options[name] for name in names))
    windows = (options["dilation"], options["window"])
    want, want_lse, want_grads = definition(**arrays, dout=dout, dlse=dlse, mask=seen, windows=windows)
    there = np.isfinite(want_lse)
    assert np.all(np.isfinite(lse) == there)
    errors = [relative(out, want), relative(np.where(there, lse, 0), np.where(there, want_lse, 0))]
    return max(errors + [relative(grads[name], want_grads[name]) for name in want_grads])


@pytest.mark.parametrize("case", range(6))
def test_equals_the_definition_in_numpy(case, seed):
    assert distance(seed * 1000 + case, FORMS[case % 2]) <= 2e-6


@pytest.mark.full
@pytest.mark.parametrize("part", range(8))
def test_equals_the_definition_in_numpy_everywhere(part, seed):
    cases = range(seed % 2**20 * 1000 + 100 + 30 * part, seed % 2**20 * 1000 + 130 + 30 * part)
    bad = {case: error for case in cases if (error := distance(case, FORMS[case % 2])) > 2e-6}
    assert not bad


def test_the_reference_sees_what_lists_of_positions_say():
    for length in (1, 2, 5, 10, 11):
        sizes = itertools.product(range(1, length + 1), range(1, 5), range(1, 4), (False, True))
        for window, stride, dilation, causal in sizes:
            if stride <= window:
                axis = (length, window, stride, dilation, causal)
                assert np.array_equal(reference.seen(*axis), sees(*axis)), axis


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("part", ["lse", "gradients"])
def test_rows_that_see_nothing_are_zero_and_pull_nothing(form, part):
    mask = jnp.ones((2, 7, 9), bool).at[0].set(False).at[1, :4, :5].set(False)
    call = functools.partial(neighborhood_attention, window=3, key_mask=mask, return_lse=True, implementation=form)
    if part == "lse":
        out, lse = jax.jit(call)(X, X, X)
        dead = np.isneginf(lse)
        assert dead[0].all()
        assert dead[1, :3, :4].all()
        assert not dead[1, 5:].any()
        assert not np.any(np.asarray(out)[dead])
        assert np.isfinite(out).all()
        return
    dlse = jnp.where(mask[..., None] & jnp.ones(X.shape[:-1], bool), 1.0, jnp.nan)
    grads = jax.jit(lambda x: jax.vjp(call, x, x, x)[1]((jnp.ones_like(x), dlse)))(X)
    assert not any(np.any(g[0]) for g in grads)


@pytest.mark.parametrize("form", ["reference", *FORMS])
def test_what_masked_positions_hold_is_not_seen(form):
    mask = jnp.ones((2, 7, 9), bool).at[:, 3].set(False)
    dirty = jnp.where(mask[..., None, None], X, jnp.nan)
    run = jax.jit(functools.partial(neighborhood_attention, window=5, key_mask=mask, implementation=form))
    assert relative(run(X, dirty, dirty), run(X, X, X)) == 0


@pytest.mark.parametrize("form", FORMS)
def test_a_small_axis_is_one_padded_with_masked_positions(form):
    options = {"window": (5, 3), "dilation": (2, 2), "stride": (3, 1), "implementation": form}
    small = X[:, :7]
    got = neighborhood_attention(small, small, small, **options, pad_small=True)
    padded = jnp.pad(small, ((0, 0), (0, 3), (0, 0), (0, 0), (0, 0)))
    mask = jnp.ones((2, 7, 9), bool)
    mask = jnp.pad(mask, ((0, 0), (0, 3), (0, 0)))
    want = neighborhood_attention(padded, padded, padded, **options, key_mask=mask)[:, :7]
    assert relative(got, want) <= 1e-6


@pytest.mark.parametrize("form", FORMS)
def test_a_window_of_everything_is_attention_and_a_stride_of_the_window_attention_in_blocks(form):
    x = X[:, :6, :8]
    whole = neighborhood_attention(x, x, x, window=(6, 8), implementation=form)
    flat = x.reshape(2, 48, 4, 8)
    assert relative(whole, jax.nn.dot_product_attention(flat, flat, flat).reshape(x.shape)) <= 2e-6
    blocks = neighborhood_attention(x, x, x, window=(3, 4), stride=(3, 4), implementation=form)
    cut = x.reshape(2, 2, 3, 2, 4, 4, 8).transpose(0, 1, 3, 2, 4, 5, 6).reshape(8, 12, 4, 8)
    want = jax.nn.dot_product_attention(cut, cut, cut).reshape(2, 2, 2, 3, 4, 4, 8)
    assert relative(blocks, want.transpose(0, 1, 3, 2, 4, 5, 6).reshape(x.shape)) <= 2e-6


@pytest.mark.parametrize("budget, unroll", [(1 << 30, 64), (1, 1), (20_000, 2)])
def test_neither_the_steps_nor_the_batch_in_a_step_matter(budget, unroll):
    setting = tables.Setting(rows=4, mask=1.0, tile=budget, budget=budget, unroll=unroll)
    form = halo.form(setting)
    args, kwargs = CASES["bias"]()
    bias, mask = kwargs.pop("rel_pos_bias"), kwargs.pop("key_mask")
    options = {"window": (3, 5), "stride": (1, 1), "dilation": (2, 1), "is_causal": (False, False), "scale": 0.5}
    arrays = (*args, bias, None, None, mask)
    found, pull = jax.vjp(lambda *a: reference.fwd(*a, None, None, mask, **options), *args, bias)
    got = jax.jit(functools.partial(form.fwd, **options))(*arrays)
    dout = jax.tree.map(jnp.ones_like, found)
    grads = jax.jit(functools.partial(form.bwd, **options))(arrays, dout)
    for ours, theirs in zip((*got, *grads[:4]), (*found, *pull(dout)), strict=True):
        assert relative(ours, theirs) <= 2e-6


def test_inside_vmap_scan_checkpoint_and_shard_map():
    call = functools.partial(neighborhood_attention, window=(3, 5), dilation=(2, 1))
    loss = lambda x: jnp.sum(call(x, x, x) ** 2)  # noqa: E731
    want = jax.jit(jax.grad(loss))(X)

    def scanned(x):
        total, _ = jax.lax.scan(lambda c, one: (c + jax.checkpoint(loss)(one[None]), None), 0.0, x)
        return total

    assert relative(jax.jit(jax.grad(scanned))(X), want) <= 2e-6
    mapped = jax.jit(jax.vmap(jax.grad(lambda x: loss(x[None]))))(X)
    assert relative(mapped, want) <= 2e-6
    mesh = jax.make_mesh((1,), ("d",), (AxisType.Auto,))
    spec = PartitionSpec("d")
    sharded = jax.shard_map(lambda x: call(x, x, x), mesh=mesh, in_specs=spec, out_specs=spec)
    assert relative(jax.jit(jax.grad(lambda x: jnp.sum(sharded(x) ** 2)))(X), want) <= 2e-6


def test_second_derivatives():
    x = X[:1, :4, :4, :2, :4]

    def loss(form, x):
        out, lse = neighborhood_attention(x, x, x, window=3, return_lse=True, implementation=form)
        return jnp.sum(jnp.sin(out)) + jnp.sum(lse**2)

    def second(form):
        return jax.jit(jax.grad(lambda x: jnp.sum(jax.grad(functools.partial(loss, form))(x) ** 2)))(x)

    assert relative(second("xla"), second("reference")) <= 1e-5


def test_one_argument_in_float64_takes_all_there():
    with jax.enable_x64(True):
        x = X[:, :3]
        out, lse = neighborhood_attention(x, x.astype(jnp.float64), x, window=3, return_lse=True)
        wide = neighborhood_attention(*[x.astype(jnp.float64)] * 3, window=3, implementation="reference")
    assert (out.dtype, lse.dtype) == (x.dtype, jnp.float64)
    assert relative(out, wide) <= 1e-7


PATTERNS = [
    ((23,), (4,), (3,), (2,), (False,)),
    ((7, 9), (3, 4), (1, 2), (2, 1), (False, True)),
    ((8, 12), (4, 4), (4, 4), (1, 2), (False, False)),
    ((4, 6, 7), (3, 5, 3), (1, 1, 2), (1, 1, 2), (True, False, False)),
]


@pytest.mark.parametrize("pattern", PATTERNS)
@pytest.mark.parametrize("platform, form", [("cpu", xla_cache), ("tpu", xla_vmem), ("cuda", xla_tiles)])
def test_the_plan_equals_what_is_enumerated(pattern, platform, form):
    plan = neighborhood_plan(*pattern, heads=2, dim=8, platform=platform)
    seen = table(*pattern)
    assert plan.pairs == seen.sum()
    visited, masked = [], False
    for n, w, s, d, c, tile, width, tiles in zip(*pattern, plan.tile, plan.width, plan.tiles, strict=True):
        one, count, widest = sees(n, w, s, d, c), 0, 0
        for first in range(0, -(-n // d), tile):
            # What the tile's queries see in any dilation group, in positions inside it.
            rows = [one[i, i % d :: d] for i in range(n) if first <= i // d < first + tile]
            every = [p for row in rows for p in np.flatnonzero(row)]
            widest = max(widest, max(every) - min(every) + 1)
            count += 1
        masked |= any(row.sum() < widest for row in one) or (n % d > 0 and d > 1)
        assert (width, tiles) == (widest, count)
        visited.append(d * count * tile * width)
    assert plan.visited == math.prod(visited)
    assert plan.masked or not masked
    shape = jax.ShapeDtypeStruct((1, *pattern[0], 2, 8), jnp.float32)
    lse = jax.ShapeDtypeStruct(shape.shape[:-1], jnp.float32)
    options = dict(zip(("window", "stride", "dilation", "is_causal"), pattern[1:], strict=True), scale=1.0)
    target = parity.TARGETS["cpu"]
    forward = roofline(target, lambda *a: form.IMPL.fwd(*a, *[None] * 4, **options), *[shape] * 3)
    assert forward.flops == {"float32": plan.flops}
    backward = roofline(
        target, lambda *a: form.IMPL.bwd((*a[:3], *[None] * 4), a[3:], **options)[:3], *[shape] * 4, lse
    )
    assert backward.flops == {"float32": plan.backward_flops}


def test_tiles_of_a_stride_need_no_mask():
    for length, window, dilation in itertools.product(range(2, 19), range(1, 8), (1, 2)):
        if window * dilation <= length and length % dilation == 0:
            for stride in range(1, window + 1):
                found = tables.tiling(tables.Axis(length, window, stride, dilation, False), stride)
                assert (found.width, found.masked) == (window, False)


def test_nothing_has_the_size_of_all_pairs():
    shape = jax.ShapeDtypeStruct((1, 32, 32, 2, 16), jnp.float32)

    def both(q, k, v, dout):
        return jax.vjp(functools.partial(neighborhood_attention, window=7), q, k, v)[1](dout)

    done = parity.compile_for("cpu", both, *[shape] * 4)
    largest = hlo.buffers(hlo.text(done))[0]
    assert largest.bytes <= 1024 * 1024 * 2 * 4 / 4
    assert hlo.memory(done)["temp"] <= 1024 * 1024 * 2 * 4 / 2


@pytest.mark.full
@pytest.mark.parametrize("space", [(16, 32, 32), (8, 32, 32)])
def test_a_volume_with_a_window_of_eleven_fits(space):
    shape = jax.ShapeDtypeStruct((1, *space, 4, 64), jnp.float32)

    def both(q, k, v, dout):
        call = functools.partial(neighborhood_attention, window=11, pad_small=True)
        return jax.vjp(call, q, k, v)[1](dout)

    assert hlo.memory(parity.compile_for("cpu", both, *[shape] * 4))["temp"] <= 2**28


BAD = {
    "rank of q": ({"q": X[0, 0, 0]}, "q must be .* with 1 to 3 axes of space; got shape"),
    "rank of k": ({"k": X[0]}, "k must be .*; got rank 4"),
    "space of v": ({"v": X[:, :5]}, "v must be .* with x=7; got shape"),
    "heads": ({"k": X[..., :3, :], "v": X[..., :3, :]}, "h % g == 0; got h=4, g=3"),
    "empty space": ({"q": X[:, :0], "k": X[:, :0], "v": X[:, :0]}, "at least 1 position; got space .0, 9."),
    "too many windows": ({"window": (3, 3, 3)}, "window must be an integer or 2 of them"),
    "window of a float": ({"window": 3.5}, "window must be an integer"),
    "window of nothing": ({"window": 0}, "window and dilation must be at least 1; got 0"),
    "dilation of nothing": ({"dilation": 0}, "window and dilation must be at least 1"),
    "stride above the window": ({"stride": (1, 4)}, "stride must be from 1 to the window, 3 on axis 1; got 4"),
    "stride of nothing": ({"stride": 0}, "stride must be from 1"),
    "window above the axis": ({"window": 8}, "must fit into the axis; got 8 . 1 on axis 0 of 7 .* pad_small=True"),
    "dilation above the axis": ({"dilation": (3, 1)}, "got 3 . 3 on axis 0 of 7 positions"),
    "bias with a stride": ({"stride": 2, "rel_pos_bias": X[0, 0, :5, :, :5]}, "odd windows with stride 1"),
    "bias with an even window": ({"window": 4, "rel_pos_bias": X[0, 0]}, "odd windows with stride 1"),
    "bias with a causal axis": ({"is_causal": True, "rel_pos_bias": X[0, 0]}, "no causal axis"),
    "shape of the bias": ({"rel_pos_bias": X[0, 0, :5, :, :5]}, r"\[4, 5, 5\]; got \[5, 4, 5\]"),
    "one of the extra": ({"extra_k": X[:, 0]}, "belong together; got only one"),
    "extra keys": ({"extra_k": X[:, 0, :, :2], "extra_v": X[:, 0]}, "extra_k must be .* with g=4"),
    "shape of the mask": ({"key_mask": jnp.ones((2, 7), bool)}, "key_mask must be .*; got rank 2"),
    "dtype of the mask": ({"key_mask": jnp.ones((2, 7, 9))}, "key_mask must be boolean; got float32"),
    "integers": ({"q": jnp.ones(X.shape, jnp.int32)}, "q must be floating point; got int32"),
    "array as scale": ({"scale": jnp.ones(3)}, "scale must be a number; got"),
    "unknown form": ({"implementation": "dense"}, "no implementation called 'dense'"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input_is_a_sentence(name):
    given, sentence = BAD[name]
    given = {"q": X, "k": X, "v": X, "window": 3} | given
    with pytest.raises((ValueError, TypeError), match=f"^neighborhood_attention: .*{sentence}.*") as error:
        neighborhood_attention(*[given.pop(x) for x in ("q", "k", "v")], **given)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    "args, kwargs, sentence",
    [
        (((4, 4, 4, 4), 3), {}, "1 to 3 axes"),
        (((4, 4), 5), {}, "must fit into the axis"),
        (((4, 4), 3), {"heads": 3, "key_heads": 2}, "key_heads divide heads"),
        (((4, 4), 3), {"tile": (2,)}, "tile must hold 2 sizes"),
        (((4, 4), 3), {"platform": "npu"}, "platform must be one of"),
    ],
)
def test_bad_plans_are_sentences(args, kwargs, sentence):
    with pytest.raises(ValueError, match=f"^neighborhood_plan: .*{sentence}"):
        neighborhood_plan(*args, **kwargs)


def test_the_command_shows_the_plan_and_what_a_query_sees(capsys):
    assert (
        cli.main(["plan", "9x12", "--window", "3,5", "--stride", "3,1", "--query", "4,0", "--target", "tpu-v6e"]) == 0
    )
    text = capsys.readouterr().out
    plan = neighborhood_plan((9, 12), (3, 5), (3, 1), platform="tpu")
    assert f"at most {plan.speedup:.2f}" in text
    assert "ms on a TPU v6e chip" in text
    shown = [line.replace(" ", "") for line in text.splitlines()[-9:]]
    assert shown == ["·" * 12] * 3 + ["#####+++++++", "@####+++++++", "#####+++++++"] + ["·" * 12] * 3
    assert cli.main(["plan", "256x256", "--window", "80", "--stride", "16", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["speedup"] == pytest.approx(10.24)
    assert cli.main(["plan", "8", "--window", "3", "--dilation", "2", "--causal", "1"]) == 0
    assert capsys.readouterr().out.splitlines()[-1] == "# · # · @ · + ·"
    for bad, sentence in (
        (["8x", "--window", "3"], "space must be numbers"),
        (["8", "--window", "9"], "must fit into the axis"),
        (["8", "--window", "3,3"], "--window must be a number or 1 of them"),
        (["8", "--window", "3", "--query", "8"], "--query must lie in the space"),
        (["8", "--window", "3", "--target", "abacus"], "no target called"),
    ):
        assert cli.main(["plan", *bad]) == 2
        assert sentence in capsys.readouterr().err
