"""The programs that are compiled: they compute what they say."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import portable
from portable import parity
from portable.parity import hlo, programs
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


TINY = {
    "model_type": "mamba2",
    "vocab_size": 40,
    "hidden_size": 16,
    "num_hidden_layers": 3,
    "num_heads": 4,
    "head_dim": 8,
    "state_size": 8,
    "n_groups": 2,
}


def shapes(tree):
    return jax.tree.map(lambda x: (x.shape, x.dtype), tree)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_works_of_a_model_fit_together(dtype):
    b, t, v = 2, 12, TINY["vocab_size"]

    def program(work):
        return programs.model("mamba2", TINY, work, dtype=dtype, batch=b, length=t)

    forward, prefill, decode, train = (program(w) for w in ("forward", "prefill", "decode", "train"))
    assert shapes(jax.eval_shape(forward.fn, *forward.args)) == ((b, t, v), jnp.float32)
    logits, state = jax.eval_shape(prefill.fn, *prefill.args)
    assert shapes(logits) == ((b, v), jnp.float32)
    # The state that prefill leaves is the one that decoding takes and gives back, in place.
    assert shapes(state) == shapes(decode.args[2]) == shapes(jax.eval_shape(decode.fn, *decode.args)[1])
    assert decode.donate == (2,)
    assert {x.dtype for x in jax.tree.leaves(decode.args[0])} == {jnp.dtype(dtype)}
    after, metrics = jax.eval_shape(train.fn, *train.args)
    assert shapes(after) == shapes(train.args[0])
    assert {x.dtype for x in jax.tree.leaves(train.args[0].params)} == {jnp.dtype("float32")}
    assert metrics["loss"].shape == ()


def test_a_training_step_reuses_the_state_it_is_given():
    program = programs.model("mamba2", TINY, "train", batch=2, length=12)
    compiled = parity.compile_for("cpu", program.fn, *program.args, donate_argnums=program.donate)
    state = sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(program.args[0]))
    assert hlo.memory(compiled)["alias"] == state


def test_the_works_of_a_model_of_images():
    forward, train = (programs.model("dinat", "digits_dinat", work, batch=3, length=8) for work in ("forward", "train"))
    assert shapes(jax.eval_shape(forward.fn, *forward.args)) == ((3, 10), jnp.float32)
    after, metrics = jax.eval_shape(train.fn, *train.args)
    assert shapes(after) == shapes(train.args[0])
    assert metrics["loss"].shape == ()
    with pytest.raises(ValueError, match="work of dinat must be one of forward, train; got 'decode'"):
        programs.model("dinat", "digits_dinat", "decode")


def test_unknown_models_and_work():
    with pytest.raises(ValueError, match="no model called 'mamba3'; there are: mamba2"):
        programs.model("mamba3", TINY, "forward")
    with pytest.raises(ValueError, match="work of mamba2 must be one of forward, prefill, decode, train; got 'serve'"):
        programs.model("mamba2", TINY, "serve")
