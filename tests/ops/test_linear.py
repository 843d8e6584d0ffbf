"""What is particular to `linear`: where the CPU's row form is taken, and what stays JAX's own product."""

import jax
import jax.numpy as jnp
import pytest
from flax import nnx

import portable
from portable import nn, selection
from portable.ops import linear

ROW, KERNEL = jnp.ones([1, 512]), jnp.ones([512, 512])


def forms(x, kernel, **options) -> tuple[str, str, str]:
    table = selection.choose("linear", None, x, kernel, **{"transposed": False, "out_dtype": x.dtype} | options)
    names = dict(table.names)
    return names["cpu"], names["tpu"], names["default"]


def test_only_single_rows_leave_xlas_product():
    half = KERNEL.astype(jnp.bfloat16)
    assert forms(ROW, KERNEL) == ("xla_row", "xla", "xla")
    assert forms(ROW.astype(jnp.bfloat16), half[:, :8]) == ("xla_row", "xla_twice", "xla")
    assert forms(jnp.ones([2, 512]), KERNEL) == ("xla", "xla", "xla")
    assert forms(jnp.ones([2, 512], jnp.bfloat16), half) == ("xla", "xla", "xla")
    assert forms(ROW, KERNEL, transposed=True) == ("xla", "xla", "xla")
    assert forms(ROW.astype(jnp.float16), KERNEL.astype(jnp.float16)) == ("xla", "xla", "xla")


def test_many_rows_differentiate_in_forward_mode():
    x, tangent = jnp.ones([4, 512]), jnp.full([4, 512], 0.5)
    _, got = jax.jvp(lambda x: linear(x, KERNEL), (x,), (tangent,))
    assert jnp.all(got == 256)
    assert "custom_vjp" not in str(jax.make_jaxpr(linear)(x, KERNEL))


def test_a_bfloat16_row_is_never_a_product_of_one_row():
    row, kernel = ROW.astype(jnp.bfloat16), KERNEL.astype(jnp.bfloat16)
    text = jax.jit(linear).lower(row, kernel).as_text()
    assert "(tensor<2x512xbf16>, tensor<512x512xbf16>)" in text


@pytest.mark.parametrize("transposed", [False, True])
def test_shapes_that_do_not_fit(transposed):
    with pytest.raises(ValueError, match=r"linear: x must be \[\.\.\., d\] and kernel \[.*; got x \[1, 512\]"):
        linear(ROW, jnp.ones([3, 5]), transposed=transposed)
    with pytest.raises(ValueError, match="got x"):
        linear(ROW, jnp.ones([512]), transposed=transposed)


def test_integers_are_refused():
    with pytest.raises(TypeError, match="linear: x must be floating point; got int32"):
        linear(jnp.ones([1, 512], jnp.int32), KERNEL)


def test_a_named_form_that_cannot_take_the_call():
    with pytest.raises(portable.Unavailable, match="it is for one row; got 2"):
        linear(jnp.ones([2, 512]), KERNEL, implementation="xla_row")


def test_nnx_linear_runs_on_it():
    x = jax.random.normal(jax.random.key(0), (1, 512))
    ours = nnx.Linear(512, 512, dot_general=nn.dot_general, rngs=nnx.Rngs(0))
    plain = nnx.Linear(512, 512, rngs=nnx.Rngs(0))
    assert jnp.allclose(ours(x), plain(x), rtol=1e-5, atol=1e-5)
    assert "portable[" in str(jax.make_jaxpr(ours)(x))
    precise = nnx.Linear(512, 512, dot_general=nn.dot_general, precision="highest", rngs=nnx.Rngs(0))
    assert "portable[" not in str(jax.make_jaxpr(precise)(x))
