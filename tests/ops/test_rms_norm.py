"""Facts of `rms_norm`: the formula in numpy for both orders of gate and norm, and its errors."""

import jax.numpy as jnp
import numpy as np
import pytest

from portable.ops import rms_norm
from portable.ops._rms_norm.cases import CASES


@pytest.mark.parametrize("case", [c for c in CASES if c != "empty" and not c.startswith("bfloat16")])
def test_equals_the_formula(case):
    (x, scale), kwargs = CASES[case]()
    y, gate = np.asarray(x, np.float64), kwargs.get("gate")
    silu = 1.0 if gate is None else np.asarray(gate, np.float64) / (1 + np.exp(-np.asarray(gate, np.float64)))
    y = y if kwargs.get("norm_before_gate") else y * silu
    for block in np.split(np.arange(x.shape[-1]), kwargs.get("groups", 1)):
        mean = np.mean(y[..., block] ** 2, axis=-1, keepdims=True)
        y[..., block] = y[..., block] / np.sqrt(mean + kwargs.get("eps", 1e-5))
    y = y * np.asarray(scale, np.float64) * (silu if kwargs.get("norm_before_gate") else 1.0)
    np.testing.assert_allclose(rms_norm(x, scale, **kwargs), y, rtol=2e-6, atol=2e-6)


BAD = {
    "width": ({"scale": jnp.ones(7)}, ValueError, r"got x \[2, 8\] and scale \[7\]"),
    "gate": ({"gate": jnp.ones((2, 7))}, ValueError, r"gate must have the shape of x, \[2, 8\]; got \[2, 7\]"),
    "groups": ({"groups": 3}, ValueError, "groups must divide d; got d=8, groups=3"),
    "integers": ({"x": jnp.ones((2, 8), jnp.int32)}, TypeError, "x must be floating point; got int32"),
}


@pytest.mark.parametrize("fault", BAD)
def test_a_wrong_argument_gets_a_sentence(fault):
    more, error, sentence = BAD[fault]
    arguments = {"x": jnp.ones((2, 8)), "scale": jnp.ones(8), **more}
    with pytest.raises(error, match=sentence):
        rms_norm(arguments.pop("x"), arguments.pop("scale"), **arguments)
