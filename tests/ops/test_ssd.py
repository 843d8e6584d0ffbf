"""Facts of `ssd` and `ssd_step`: the definition in numpy, and properties that no implementation may break."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental import checkify

import portable
from portable.ops import ssd, ssd_step
from portable.ops._ssd.cases import CASES
from portable.parity.numbers import relative

FORMS = ["reference", "xla_scan", "xla_chunks", "xla_lanes"]


def definition(x, dt, A, B, C, D=None, initial_state=None, segment_ids=None, chunk_size=None):
    """The recurrence in numpy, float64, one row, head and position at a time."""
    x, dt, A, B, C = (np.asarray(v, np.float64) for v in (x, dt, A, B, C))
    b, t, h, p = x.shape
    g, n = B.shape[2:]
    y, states = np.zeros_like(x), np.zeros((b, h, p, n))
    for i in range(b):
        for j in range(h):
            s = np.zeros((p, n)) if initial_state is None else np.asarray(initial_state, np.float64)[i, j]
            group = j // (h // g)
            for k in range(t):
                if segment_ids is not None and k and segment_ids[i, k] != segment_ids[i, k - 1]:
                    s = np.zeros((p, n))
                s = np.exp(dt[i, k, j] * A[j]) * s + dt[i, k, j] * np.outer(x[i, k, j], B[i, k, group])
                y[i, k, j] = s @ C[i, k, group]
                if D is not None:
                    y[i, k, j] += np.asarray(D, np.float64)[j] * x[i, k, j]
            states[i, j] = s
    return y, states


@pytest.mark.parametrize("case", ["plain", "groups", "segments", "one_token", "strong_decay", "empty"])
def test_the_reference_equals_the_definition(case):  # and the other forms equal the reference: test_parity.py
    args, kwargs = CASES[case]()
    y, state = ssd(*args, **kwargs, implementation="reference")
    want, want_state = definition(*args, **kwargs)
    assert relative(y, want) <= 2e-6
    assert relative(state, want_state) <= 2e-6


def test_gradients_equal_finite_differences(seed):
    args, kwargs = CASES["segments"](seed)
    args = tuple(a[:1, :20] if a.ndim > 1 else a for a in args)
    kwargs = {**kwargs, "initial_state": kwargs["initial_state"][:1], "segment_ids": kwargs["segment_ids"][:1, :20]}
    with jax.enable_x64(True):
        floats = [jnp.asarray(a, jnp.float64) for a in (*args, kwargs["D"], kwargs["initial_state"])]

        @jax.jit
        def loss(*f):
            y, state = ssd(*f[:5], **{**kwargs, "D": f[5], "initial_state": f[6]})
            return jnp.sum(jnp.sin(y)) + jnp.sum(state**2)

        gradients = jax.jit(jax.grad(loss, argnums=tuple(range(7))))(*floats)
        for i, (value, gradient) in enumerate(zip(floats, gradients, strict=True)):
            direction = jnp.asarray(np.random.default_rng(i).normal(size=value.shape))
            if i == 1:
                direction = direction * value  # step sizes stay positive
            moved = [list(floats), list(floats)]
            for sign, where in zip((1, -1), moved, strict=True):
                where[i] = value + sign * 1e-6 * direction
            slope = (loss(*moved[0]) - loss(*moved[1])) / 2e-6
            np.testing.assert_allclose(float(jnp.sum(gradient * direction)), float(slope), rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("form", ["xla_scan", "xla_chunks"])
def test_the_chunk_size_does_not_matter(form):
    args, kwargs = CASES["segments"]()
    kwargs.pop("chunk_size")
    want = ssd(*args, **kwargs, implementation="reference")
    for size in (1, 3, 16, 79, 80, 1000):
        y, state = ssd(*args, **kwargs, chunk_size=size, implementation=form)
        assert relative(y, want[0]) <= 2e-6, size
        assert relative(state, want[1]) <= 2e-6, size


def test_a_state_continues_a_sequence():
    (x, dt, A, B, C), kwargs = CASES["groups"]()
    whole, final = ssd(x, dt, A, B, C, **kwargs)
    y, state = [], kwargs.pop("initial_state")
    for part in (slice(0, 1), slice(1, 40), slice(40, 67)):
        out, state = ssd(x[:, part], dt[:, part], A, B[:, part], C[:, part], initial_state=state, **kwargs)
        y.append(out)
    assert relative(jnp.concatenate(y, 1), whole) <= 2e-6
    assert relative(state, final) <= 2e-6


@pytest.mark.parametrize("case", ["groups", "plain"])
def test_steps_equal_the_sequence(case):
    (x, dt, A, B, C), kwargs = CASES[case]()
    whole, final = ssd(x, dt, A, B, C, **kwargs)
    state = kwargs.get("initial_state", jnp.zeros_like(final))
    step = jax.jit(lambda i, s: ssd_step(x[:, i], dt[:, i], A, B[:, i], C[:, i], s, D=kwargs.get("D")))
    for i in range(x.shape[1]):
        y, state = step(i, state)
        assert relative(y, whole[:, i]) <= 5e-6
    assert relative(state, final) <= 2e-6


def test_packed_segments_equal_separate_sequences():
    (x, dt, A, B, C), _ = CASES["plain"]()
    ids = jnp.repeat(jnp.array([[4, 9, 4], [1, 0, 1]]), jnp.array([30, 41, 25]), axis=1, total_repeat_length=96)
    packed, final = ssd(x, dt, A, B, C, segment_ids=ids, chunk_size=16)
    for part in (slice(0, 30), slice(30, 71), slice(71, 96)):
        alone, state = ssd(x[:, part], dt[:, part], A, B[:, part], C[:, part])
        assert relative(packed[:, part], alone) <= 2e-6
    assert relative(final, state) <= 2e-6


def test_positions_without_a_step_leave_the_state_untouched():
    (x, dt, A, B, C), kwargs = CASES["groups"]()
    D = kwargs.pop("D")
    _, want = ssd(x[:, :40], dt[:, :40], A, B[:, :40], C[:, :40], **kwargs)
    padded = jnp.where(jnp.arange(x.shape[1])[None, :, None] < 40, dt, 0)
    y, state = ssd(x, padded, A, B, C, D=D, **kwargs)
    assert relative(state, want) <= 2e-6
    assert np.isfinite(y).all()


def test_groups_equal_repeated_heads():
    (x, dt, A, B, C), kwargs = CASES["groups"]()
    repeated = [jnp.repeat(v, x.shape[2] // v.shape[2], axis=2) for v in (B, C)]
    assert relative(ssd(x, dt, A, B, C, **kwargs)[0], ssd(x, dt, A, *repeated, **kwargs)[0]) <= 2e-6


@pytest.mark.parametrize("form", FORMS)
def test_a_nan_stays_in_its_row_and_behind_its_position(form):
    (x, dt, A, B, C), kwargs = CASES["plain"]()
    broken = x.at[1, 50, 2].set(jnp.nan)
    y, _ = ssd(broken, dt, A, B, C, **kwargs, implementation=form)
    clean, _ = ssd(x, dt, A, B, C, **kwargs, implementation=form)
    np.testing.assert_array_equal(np.asarray(y[0]), np.asarray(clean[0]))
    assert np.isnan(y[1, 50:, 2]).all()
    # Within a chunk a product with a zero weight is still a product: rows before the chunk are untouched.
    np.testing.assert_array_equal(np.asarray(y[1, :32]), np.asarray(clean[1, :32]))


def test_second_order_reverse_mode():
    args, kwargs = CASES["short_of_a_chunk"]()

    def curvature(form):
        def slope(x, dt):
            return jax.grad(lambda d: jnp.sum(ssd(x, d, *args[2:], **kwargs, implementation=form)[0] ** 2))(dt)

        return jax.jit(jax.grad(lambda x, dt: jnp.sum(slope(x, dt) ** 2), argnums=(0, 1)))(*args[:2])

    for got, want in zip(curvature(None), curvature("reference"), strict=True):
        assert relative(got, want) <= 1e-5


def test_forward_mode_works_with_the_reference():
    args, kwargs = CASES["short_of_a_chunk"]()
    f = lambda x: ssd(x, *args[1:], **kwargs, implementation="reference")[0]  # noqa: E731
    _, tangent = jax.jvp(f, (args[0],), (jnp.ones_like(args[0]),))
    np.testing.assert_allclose(tangent, f(jnp.ones_like(args[0])), rtol=1e-5)  # ssd is linear in x


def test_vmap_of_value_and_gradient():
    args, kwargs = CASES["groups"]()
    xs = jnp.stack([args[0], 2 * args[0], -args[0]])
    f = lambda x: jnp.sum(ssd(x, *args[1:], **kwargs)[0] ** 2)  # noqa: E731
    slope = jax.jit(jax.grad(f))
    want = jnp.stack([slope(x) for x in xs])
    assert relative(jax.jit(jax.vmap(slope))(xs), want) <= 2e-6
    assert relative(jax.jit(jax.vmap(jax.vmap(slope)))(xs[None])[0], want) <= 2e-6


def test_under_checkpoint_and_scan():
    args, kwargs = CASES["plain"]()
    f = lambda x: ssd(x, *args[1:], **kwargs)[0]  # noqa: E731
    twice = lambda x: jax.lax.scan(lambda x, _: (jax.checkpoint(f)(x), None), x, length=2)[0]  # noqa: E731
    got = jax.jit(jax.grad(lambda x: jnp.sum(twice(x) ** 2)))(args[0])
    want = jax.jit(jax.grad(lambda x: jnp.sum(f(f(x)) ** 2)))(args[0])
    assert relative(got, want) <= 5e-6


BAD = {
    "rank": (lambda a: (a[0][0], *a[1:]), {}, ValueError, r"x must be \[b, t, h, p\]; got rank 3"),
    "groups": (
        lambda a: (*a[:3], a[3][:, :, [0] * 5], a[4][:, :, [0] * 5]),
        {},
        ValueError,
        r"h % g == 0; got h=4, g=5",
    ),
    "lengths": (lambda a: (a[0], a[1][:, :-1], *a[2:]), {}, ValueError, r"dt must be \[b, t, h\] with t=96"),
    "positive A": (lambda a: (*a[:2], -a[2], *a[3:]), {}, ValueError, "A must not be positive"),
    "negative dt": (lambda a: (a[0], -a[1], *a[2:]), {}, ValueError, "dt must be >= 0"),
    "integers": (lambda a: (a[0].astype(jnp.int32), *a[1:]), {}, TypeError, "x must be floating point; got int32"),
    "float ids": (lambda a: a, {"segment_ids": jnp.zeros((2, 96))}, TypeError, "segment_ids must be integers"),
    "chunk": (lambda a: a, {"chunk_size": 0}, ValueError, "chunk_size must be an integer of at least 1; got 0"),
    "half a chunk": (
        lambda a: a,
        {"chunk_size": 2.5},
        ValueError,
        "chunk_size must be an integer of at least 1; got 2",
    ),
    "a list": (lambda a: (*a[:2], [-1.0] * 4, *a[3:]), {}, TypeError, "A must be an array; got list"),
    "a number": (lambda a: a, {"D": 1.0}, TypeError, "D must be an array; got float"),
    "skip": (lambda a: a, {"D": jnp.zeros((3,))}, ValueError, r"D must be \[h\] with h=4"),
    "scalar skip": (lambda a: a, {"D": jnp.zeros(())}, ValueError, r"D must be \[h\] or \[h, p\]; got shape \[\]"),
    "state": (lambda a: a, {"initial_state": jnp.zeros((2, 4, 16, 3))}, ValueError, "initial_state must be"),
    "name": (lambda a: a, {"implementation": "palas"}, ValueError, "no implementation called 'palas'; there are: ref"),
}


@pytest.mark.parametrize("fault", BAD)
def test_a_wrong_argument_gets_a_sentence(fault):
    change, more, error, sentence = BAD[fault]
    args, kwargs = CASES["plain"]()
    with pytest.raises(error, match=sentence):
        ssd(*change(args), **{**kwargs, **more})


def test_values_are_checked_in_compiled_code_on_demand():
    args, kwargs = CASES["plain"]()
    f = lambda A: ssd(*args[:2], A, *args[3:], **kwargs)[0]  # noqa: E731
    assert np.isfinite(jax.jit(f)(args[2])).all()
    jax.jit(f)(-args[2])  # no check, and no cost
    with portable.checks():
        error, _ = jax.jit(checkify.checkify(f))(-args[2])
        fine, _ = jax.jit(checkify.checkify(f))(args[2])
    with pytest.raises(Exception, match="A must not be positive"):
        error.throw()
    fine.throw()


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("b, h, p, n", [(0, 4, 3, 8), (2, 0, 3, 8), (2, 4, 0, 8), (2, 4, 3, 0)])
def test_nothing_comes_of_nothing(form, b, h, p, n):
    g = 2 if h else 1
    args = (jnp.ones([b, 5, h, p]), jnp.ones([b, 5, h]), -jnp.ones([h]), jnp.ones([b, 5, g, n]), jnp.ones([b, 5, g, n]))
    y, state = ssd(*args, implementation=form)
    assert y.shape == (b, 5, h, p)
    assert state.shape == (b, h, p, n)
    assert not jnp.any(y)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("wide", ["x", "dt", "A", "B", "initial_state"])
def test_one_argument_in_float64_takes_all_there(form, wide):
    args, _ = CASES["plain"]()
    args = dict(zip(("x", "dt", "A", "B", "C"), args, strict=True))
    args["initial_state"] = jnp.ones([2, 4, 16, 16])
    with jax.enable_x64(True):
        args[wide] = args[wide].astype(jnp.float64)
        y, state = ssd(**args, chunk_size=4, implementation=form)  # 24 chunks: a loop in every form
        assert (y.dtype, state.dtype) == (args["x"].dtype, jnp.float64)
        want, want_state = definition(
            *(args[n] for n in ["x", "dt", "A", "B", "C"]), initial_state=args["initial_state"]
        )
        assert relative(state, want_state) <= 1e-12
        assert relative(y, want) <= (1e-12 if wide == "x" else 1e-7)
