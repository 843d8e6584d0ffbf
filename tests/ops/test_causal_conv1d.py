"""Facts of `causal_conv1d`: numpy's convolution, and properties of its state."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from portable.ops import causal_conv1d
from portable.ops._causal_conv1d.cases import CASES
from portable.parity.numbers import relative


def test_equals_numpy_convolve():
    (x, kernel), _ = CASES["plain"]()
    y, _ = causal_conv1d(x, kernel)
    for i in range(x.shape[0]):
        for c in range(x.shape[2]):
            full = np.convolve(np.asarray(x[i, :, c], np.float64), np.asarray(kernel[::-1, c], np.float64))
            np.testing.assert_allclose(y[i, :, c], full[: x.shape[1]], rtol=1e-5, atol=1e-6)


def test_equals_the_depthwise_convolution_of_xla():
    (x, kernel), kwargs = CASES["silu"]()
    u = jnp.concatenate([kwargs["state"], x], 1)
    dims = ("NWC", "WIO", "NWC")
    y = jax.lax.conv_general_dilated(u, kernel[:, None], (1,), "VALID", dimension_numbers=dims, feature_group_count=12)
    assert relative(causal_conv1d(x, kernel, **kwargs)[0], jax.nn.silu(y + kwargs["bias"])) <= 2e-6


def test_a_state_continues_a_sequence():
    (x, kernel), kwargs = CASES["silu"]()
    whole, final = causal_conv1d(x, kernel, **kwargs)
    y, state = [], kwargs.pop("state")
    for part in (slice(0, 1), slice(1, 3), slice(3, 33)):
        out, state = causal_conv1d(x[:, part], kernel, state=state, **kwargs)
        y.append(out)
    np.testing.assert_allclose(jnp.concatenate(y, 1), whole, rtol=1e-6, atol=1e-6)
    np.testing.assert_array_equal(state, final)


def test_ragged_rows_end_with_their_own_state():
    (x, kernel), kwargs = CASES["ragged"]()
    y, state = causal_conv1d(x, kernel, **kwargs)
    for i, n in enumerate(kwargs["lengths"].tolist()):
        row = {**kwargs, "lengths": None, "state": kwargs["state"][i : i + 1]}
        alone, tail = causal_conv1d(x[i : i + 1, :n], kernel, **row)
        np.testing.assert_allclose(y[i : i + 1, :n], alone, rtol=1e-6, atol=1e-6)
        np.testing.assert_array_equal(state[i : i + 1], tail)


def test_taps_do_not_reach_over_a_segment():
    (x, kernel), _ = CASES["plain"]()
    ids = (jnp.arange(33) >= 14).astype(jnp.int32)[None].repeat(2, 0)
    y, state = causal_conv1d(x, kernel, segment_ids=ids)
    np.testing.assert_allclose(y[:, 14:], causal_conv1d(x[:, 14:], kernel)[0], rtol=1e-6, atol=1e-6)
    # The state carried on holds nothing of an earlier segment.
    _, short = causal_conv1d(x[:, :15], kernel, segment_ids=ids[:, :15])
    np.testing.assert_array_equal(short[:, :2], 0)
    np.testing.assert_array_equal(short[:, 2], x[:, 14])
    np.testing.assert_array_equal(state, x[:, -3:])


BAD = {
    "rank": ({"x": jnp.ones((2, 3))}, ValueError, r"x must be \[b, t, c\]; got rank 2"),
    "channels": ({"kernel": jnp.ones((4, 5))}, ValueError, r"kernel must be \[k, c\] with c=8"),
    "no taps": ({"kernel": jnp.ones((0, 8))}, ValueError, "at least one tap"),
    "state": ({"state": jnp.ones((2, 4, 8))}, ValueError, "state must be"),
    "activation": ({"activation": "mish"}, ValueError, "activation must be None or 'silu'; got 'mish'"),
    "lengths": ({"lengths": jnp.array([1, 9])}, ValueError, r"lengths must lie in 0\.\.6"),
    "integers": ({"x": jnp.ones((2, 6, 8), jnp.int32)}, TypeError, "x must be floating point"),
}


@pytest.mark.parametrize("fault", BAD)
def test_a_wrong_argument_gets_a_sentence(fault):
    more, error, sentence = BAD[fault]
    arguments = {"x": jnp.ones((2, 6, 8)), "kernel": jnp.ones((4, 8)), **more}
    with pytest.raises(error, match=sentence):
        causal_conv1d(arguments.pop("x"), arguments.pop("kernel"), **arguments)
