"""Every op, implementation and case against the reference in float64: values and gradients. Generic over ops."""

import jax.numpy as jnp
import pytest

from portable import selection
from tests.ops.harness import cases, implementations, in_float64, is_float, relative, value_and_gradients

ALL = [pytest.param(op, case, id=f"{op}-{case}") for op in selection.ops() for case in cases(op)]


@pytest.mark.parametrize("op, case", ALL)
def test_every_implementation_equals_the_definition_in_float64(op, case, seed):
    args, kwargs = cases(op)[case](seed)
    half = any(is_float(x) and x.dtype == jnp.bfloat16 for x in (*args, *kwargs.values()))
    # bfloat16 results carry 8 bits; float32 sums of these sizes keep about 21 of 24.
    bar, gradient_bar = (1e-2, 2.5e-2) if half else (2e-6, 5e-6)
    want, want_gradients = in_float64(op, args, kwargs)
    for name in implementations(op, args, kwargs):
        got, gradients = value_and_gradients(op, args, kwargs, name)
        for i, (g, w) in enumerate(zip(got, want, strict=True)):
            assert relative(g, w) <= bar, f"{name}: output {i}"
        for i, (g, w) in enumerate(zip(gradients, want_gradients, strict=True)):
            assert relative(g, w) <= gradient_bar, f"{name}: gradient {i}"


@pytest.mark.parametrize("op", selection.ops())
def test_gradients_keep_the_dtypes_of_their_arguments(op):
    args, kwargs = cases(op)["bfloat16"]()
    floats = [x for x in (*args, *[v for _, v in sorted(kwargs.items())]) if is_float(x)]
    for name in implementations(op, args, kwargs):
        out, gradients = value_and_gradients(op, args, kwargs, name)
        assert out[0].dtype == jnp.bfloat16
        assert [g.dtype for g in gradients] == [x.dtype for x in floats], name
