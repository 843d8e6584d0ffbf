"""The Mamba-2 layer: against its definition in float64, and the properties that decoding, padding and packing need."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from portable.nn import Mamba2
from portable.parity.numbers import relative
from tests.nn import mamba2_definition as definition

OPTIONS = {
    "plain": {},
    "groups and biases": {"n_groups": 4, "use_bias": True, "conv_kernel": 3},
    "norm before gate": {"norm_before_gate": True, "n_groups": 2},
    "skip per channel": {"D_has_hdim": True},
    "no norm": {"gated_norm": False, "use_conv_bias": False},
    "limits": {"dt_limit": (0.01, 0.05), "n_groups": 2, "D_has_hdim": True},
}


def layer(**options) -> Mamba2:
    return nnx.merge(*split_layer(**options))


@functools.cache
def split_layer(**options):
    sizes = {"num_heads": 4, "head_dim": 8, "state_size": 6}
    made = Mamba2(16, **sizes, **options, rngs=nnx.Rngs(1))
    for i, param in enumerate(jax.tree.leaves(nnx.state(made), is_leaf=lambda x: isinstance(x, nnx.Variable))):
        noise = jax.random.normal(jax.random.key(i), param.get_value().shape)
        param.set_value(param.get_value() + 0.1 * noise.astype(param.get_value().dtype))
    graphdef, state = nnx.split(made)
    # Nothing may sit at its initial value, where an unused Param would not show.
    noisy = jax.tree.map(lambda x: x + 0.1 * jax.random.normal(jax.random.key(x.size), x.shape, x.dtype), state)
    return graphdef, noisy


def inputs(t: int = 21, b: int = 2):
    return jax.random.normal(jax.random.key(5), (b, t, 16), jnp.float32)


def run(made, *args, **kwargs):
    """Calls the layer compiled as one program, as users do."""
    graphdef, state = nnx.split(made)
    return jax.jit(lambda state, args, kwargs: nnx.merge(graphdef, state)(*args, return_state=True, **kwargs))(
        state, args, kwargs
    )


@pytest.mark.parametrize("name", OPTIONS)
@pytest.mark.parametrize("segments", [False, True])
def test_equals_the_definition(name, segments):
    made, u = layer(**OPTIONS[name]), inputs()
    ids = jnp.array([[0] * 6 + [2] * 9 + [0] * 6, [1] * 21]) if segments else None
    y, _ = run(made, u, segment_ids=ids)
    for i in range(2):
        want = definition.mixer(made, u[i], None if ids is None else np.asarray(ids)[i])
        assert relative(y[i], want) <= 1e-5


@pytest.mark.parametrize("name", OPTIONS)
def test_gradients_equal_finite_differences_of_the_definition(name):
    made, u = layer(**OPTIONS[name]), inputs(t=7, b=1)
    ids = np.array([0, 0, 0, 1, 1, 1, 1])
    graphdef, state = nnx.split(made)
    weights = np.random.default_rng(0).normal(size=(7, 16))

    def loss(state, u):
        y = nnx.merge(graphdef, state)(u, segment_ids=jnp.asarray(ids)[None])
        return jnp.sum(y * jnp.asarray(weights, jnp.float32))

    gradients = jax.jit(jax.grad(loss, argnums=(0, 1)))(state, u)
    rng = np.random.default_rng(1)
    leaves, tree = jax.tree.flatten((state, u))
    moves = [rng.normal(size=x.shape) for x in leaves]
    want = 0.0
    for sign in (1, -1):
        with jax.enable_x64(True):
            moved = [np.asarray(x, np.float64) + sign * 1e-6 * m for x, m in zip(leaves, moves, strict=True)]
            state_moved, u_moved = jax.tree.unflatten(tree, moved)
            y = definition.mixer(nnx.merge(graphdef, state_moved), u_moved[0], ids)
        want += sign * float((y * weights).sum()) / 2e-6
    got = sum(float((np.asarray(g, np.float64) * m).sum()) for g, m in zip(jax.tree.leaves(gradients), moves))
    assert abs(got - want) <= 2e-5 * max(1.0, abs(want))


@pytest.mark.parametrize("name", OPTIONS)
def test_prefill_and_steps_equal_the_whole(name):
    made, u = layer(**OPTIONS[name]), inputs()
    whole, final = run(made, u)
    y, state = run(made, u[:, :9], state=made.init_state(2))
    graphdef, params = nnx.split(made)
    step = jax.jit(lambda params, u, state: nnx.merge(graphdef, params).step(u, state))
    assert relative(y, whole[:, :9]) <= 2e-6
    for i in range(9, 15):
        y, state = step(params, u[:, i], state)
        assert relative(y, whole[:, i]) <= 5e-6
    y, state = run(made, u[:, 15:], state=state)  # several tokens from a carried state: chunked prefill
    assert relative(y, whole[:, 15:]) <= 5e-6
    for got, want in zip(state, final, strict=True):
        assert relative(got, want) <= 5e-6


def test_left_right_and_both_sided_padding_are_exact():
    made, u = layer(n_groups=2), inputs(t=20, b=3)
    spans = [(0, 13), (7, 20), (4, 11)]
    mask = jnp.stack([(jnp.arange(20) >= a) & (jnp.arange(20) < b) for a, b in spans])
    noise = jnp.where(mask[..., None], u, 1e3)  # whatever stands at a pad must not matter
    y, state = run(made, noise, mask=mask)
    for i, (a, b) in enumerate(spans):
        alone, last = run(made, u[i : i + 1, a:b])
        assert relative(y[i, a:b], alone[0]) <= 2e-6
        for got, want in zip(state, last, strict=True):
            assert relative(got[i], want[0]) <= 2e-6


def test_lengths_equal_a_right_padded_mask_and_continue():
    made, u = layer(), inputs(t=20)
    lengths = jnp.array([13, 20])
    y, state = run(made, u, lengths=lengths)
    masked, same = run(made, u, mask=jnp.arange(20) < lengths[:, None])
    assert relative(masked[0, :13], y[0, :13]) <= 2e-6
    for got, want in zip(same, state, strict=True):
        np.testing.assert_allclose(got, want, rtol=1e-6, atol=1e-6)
    # A left-padded continuation: the carried state meets the first real token.
    more = inputs(t=6)[:, ::-1]
    left = jnp.array([[False] * 2 + [True] * 4, [True] * 6])
    got, _ = run(made, more, state=state, mask=left)
    whole, _ = run(made, jnp.concatenate([u[:1, :13], more[:1, 2:]], 1))
    assert relative(got[0, 2:], whole[0, 13:]) <= 5e-6


def test_batch_equals_single_rows():
    made, u = layer(), inputs(b=3)
    y, _ = run(made, u)
    for i in range(3):
        assert relative(run(made, u[i : i + 1])[0], y[i : i + 1]) <= 2e-6


def test_bfloat16_computes_in_bfloat16_and_keeps_a_float32_state():
    wide = layer()
    _, params = nnx.split(wide)
    half = Mamba2(16, num_heads=4, head_dim=8, state_size=6, dtype=jnp.bfloat16, rngs=nnx.Rngs(1))
    half = nnx.merge(nnx.graphdef(half), params)
    y, state = run(half, inputs())
    assert y.dtype == jnp.bfloat16
    assert state.ssm.dtype == jnp.float32
    assert state.x.dtype == jnp.bfloat16
    assert relative(y, run(wide, inputs())[0]) <= 3e-2
    text = jax.jit(lambda params, u: nnx.merge(nnx.graphdef(half), params)(u)).lower(params, inputs()).as_text()
    dots = [line for line in text.splitlines() if "dot_general" in line and "tensor<16x32x" in line]
    assert dots
    assert all("bf16" in line for line in dots)


def test_a_half_precision_state_can_be_asked_for():
    made = Mamba2(16, num_heads=4, head_dim=8, state_size=6, state_dtype=jnp.bfloat16, rngs=nnx.Rngs(1))
    _, state = run(made, inputs(), state=made.init_state(2))
    assert state.ssm.dtype == jnp.bfloat16
    _, state = made.step(inputs()[:, 0], state)
    assert state.ssm.dtype == jnp.bfloat16


def test_the_initial_step_sizes_and_rates_are_the_papers():
    made = Mamba2(64, num_heads=512, head_dim=1, state_size=2, rngs=nnx.Rngs(0))
    dt = np.log1p(np.exp(np.asarray(made.dt_bias.get_value(), np.float64)))
    assert 1e-3 * 0.999 <= dt.min() < 2e-3 < 0.05 < dt.max() <= 0.1 * 1.001
    rates = np.exp(np.asarray(made.A_log.get_value(), np.float64))
    assert 1 <= rates.min() < 2 < 15 < rates.max() <= 16.001


def test_every_param_names_its_axes():
    for variable in jax.tree.leaves(nnx.state(layer(use_bias=True)), is_leaf=lambda x: isinstance(x, nnx.Variable)):
        assert len(variable.get_metadata()["axes"]) == variable.get_value().ndim


def test_wrong_arguments_get_a_sentence():
    made, u = layer(), inputs(t=4)
    with pytest.raises(ValueError, match="not both"):
        made(u, lengths=jnp.array([1, 2]), mask=jnp.ones((2, 4), bool))
    with pytest.raises(ValueError, match="contiguous; got a row with a hole"):
        made(u, mask=jnp.array([[True, False, True, True]] * 2))
    with pytest.raises(ValueError, match="n_groups must divide num_heads; got 3 and 4"):
        layer(n_groups=3)
    with pytest.raises(ValueError, match="activation must be one of silu"):
        layer(activation="mish")


@pytest.mark.parametrize("ids", [[0, 0, 0, 9, 9, 9], [4, 4, 4, 0, 0, 0], [2, 7, 7, 7, 0, 5]])
def test_padding_ends_no_segment(ids):
    layer = Mamba2(32, num_heads=4, head_dim=16, state_size=8, rngs=nnx.Rngs(0))
    u, ids = jax.random.normal(jax.random.key(0), (1, 6, 32)), jnp.array([ids])
    y, want = layer(u[:, :3], segment_ids=ids[:, :3], return_state=True)
    assert jnp.abs(want.ssm).max() > 1e-4
    right = layer(u, segment_ids=ids, lengths=jnp.array([3]), return_state=True)
    mask = jnp.arange(6)[None] >= 3
    left = layer(jnp.roll(u, 3, 1), segment_ids=jnp.roll(ids, 3, 1), mask=mask, return_state=True)
    for got, start in ((right, 0), (left, 3)):
        assert jnp.allclose(got[0][:, start : start + 3], y, atol=1e-6)
        for g, w in zip(got[1], want, strict=True):
            assert jnp.allclose(g, w, atol=1e-6)


def test_inputs_that_are_no_sequence():
    layer = Mamba2(32, num_heads=4, head_dim=16, rngs=nnx.Rngs(0))
    with pytest.raises(ValueError, match=r"u must be \[b, t, d\] with d=32; got \[2, 32\]"):
        layer(jnp.ones([2, 32]))
    with pytest.raises(ValueError, match=r"u must be \[b, d\] with d=32; got \[2, 1, 32\]"):
        layer.step(jnp.ones([2, 1, 32]), layer.init_state(2))
    with pytest.raises(ValueError, match="got list"):
        layer([[1.0]])
    with pytest.raises(TypeError, match="floating point; got int32"):
        layer(jnp.ones([1, 2, 32], jnp.int32))
