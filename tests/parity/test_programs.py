"""The programs that are compiled: they compute what they say."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import portable
from portable.parity import programs
from portable.selection import ops


def test_gradients_equal_those_of_jax():
    def fn(a, options):
        return {"y": jnp.sin(a["x"]) * options[0], "n": options[1] + 1}

    rng = np.random.default_rng(0)
    x, scale, dy = (jnp.asarray(rng.normal(size=5), jnp.float32) for _ in range(3))
    args = ({"x": x}, (scale, jnp.arange(3)))
    program = programs.with_gradients(fn, *args)
    out, cotangents = program.fn(args, [dy])
    assert out["n"].tolist() == [1, 2, 3]
    expected = jax.grad(lambda x, s: (jnp.sin(x) * s * dy).sum(), argnums=(0, 1))(x, scale)
    for found, wanted in zip(cotangents, expected, strict=True):
        np.testing.assert_allclose(found, wanted, rtol=1e-6)
    assert [s.shape for s in jax.tree.leaves(program.args[1])] == [(5,)]


@pytest.mark.parametrize("op", ops())
def test_every_case_becomes_a_program(op):
    # Nothing is computed or allocated: the shapes must agree with the arrays of the case.
    for name, make in programs.cases(op).items():
        program = programs.op(op, name)
        args, kwargs = program.args[0]
        wanted = jax.eval_shape(lambda make=make: make(0)[0])
        assert jax.tree.map(jnp.shape, args) == jax.tree.map(jnp.shape, wanted)
        assert all(hasattr(v, "shape") for v in kwargs.values())
        assert jax.eval_shape(program.fn, *program.args) is not None


def test_an_op_program_computes_the_op():
    args, kwargs = programs.cases("rms_norm")["gate_first"](0)
    arrays = {k: v for k, v in kwargs.items() if hasattr(v, "shape")}
    found = programs.op("rms_norm", "gate_first").fn((args, arrays))
    np.testing.assert_array_equal(found, portable.ops.rms_norm(*args, **kwargs))


def test_unknown_names():
    with pytest.raises(ModuleNotFoundError, match="_no_such_op"):
        programs.op("no_such_op", "plain")
    with pytest.raises(ValueError, match="rms_norm has no case 'no_such_case'; there are: plain"):
        programs.op("rms_norm", "no_such_case")
