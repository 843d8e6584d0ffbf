"""Every op, implementation and case against the definition in float64; kernels by their interpreters. Generic over ops.

The cases of an op are its shape sweep, its adversarial scales and its edges; values and gradients are held together.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.test_util import check_grads

import portable
from portable import selection
from portable.parity import numbers, programs
from tests.ops.harness import is_float, value_and_gradients

ALL = [pytest.param(op, case, id=f"{op}-{case}") for op in selection.ops() for case in programs.cases(op, sizes=False)]
KERNELS = [(op, k) for op in selection.ops() for k in selection.implementations(op) if k in selection.KERNEL_HOMES]


@pytest.mark.parametrize("op, case", ALL)
def test_every_implementation_equals_the_definition_in_float64(op, case, seed):
    for name in selection.implementations(op):
        kernel = name in selection.KERNEL_HOMES
        try:
            found = numbers.compare(
                interpret=kernel, name=op, case=case, gradients=True, implementation=name, seed=seed
            )
        except portable.Unavailable:
            continue  # its limits: tested where it is strict
        assert found["status"] != "failed", f"{name}: {found['message']}"


@pytest.mark.parametrize("op", selection.ops())
def test_gradients_keep_the_dtypes_of_their_arguments(op):
    args, kwargs = programs.cases(op)["bfloat16"](0)
    floats = [x for x in (*args, *[v for _, v in sorted(kwargs.items())]) if is_float(x)]
    for name in ("reference", "xla"):
        out, gradients = value_and_gradients(op, args, kwargs, name)
        assert out[0].dtype == jnp.bfloat16
        assert [g.dtype for g in gradients] == [x.dtype for x in floats], name


@pytest.mark.parametrize("op", selection.ops())
def test_an_implementation_gives_the_same_bits_twice(op, seed):
    args, kwargs = programs.cases(op)[next(iter(programs.cases(op)))](seed)
    for name in ("reference", "xla"):
        first, second = (value_and_gradients(op, args, kwargs, name) for _ in range(2))
        jax.tree.map(np.testing.assert_array_equal, first, second)


@pytest.mark.parametrize("op", selection.ops())
def test_the_definition_has_the_slopes_of_finite_differences(op, seed):
    name = next(iter(programs.cases(op)))
    args, kwargs = programs.cases(op)[name](seed)
    with jax.enable_x64(True):
        args, kwargs = numbers._wide(args), numbers._wide(kwargs)
        function = getattr(portable.ops, op)
        floats = [i for i, x in enumerate(args) if is_float(x)]

        def value(*changed):
            full = list(args)
            for i, x in zip(floats, changed, strict=True):
                full[i] = x
            return jax.tree.leaves(function(*full, **kwargs, implementation="reference"))

        check_grads(value, [args[i] for i in floats], order=1, modes=["rev"], eps=1e-6, rtol=1e-6)


@pytest.mark.parametrize("op, kernel", KERNELS)
def test_a_kernel_takes_both_dtypes_and_refuses_in_sentences(op, kernel):
    impl = selection.implementations(op)[kernel]
    taken = set()
    for make in programs.cases(op, sizes=False).values():
        args, kwargs = make(0)
        arrays, options = selection.importlib.import_module(f"portable.ops._{op}.api").prepare(*args, **kwargs)
        if (reason := impl.why_not(*arrays, **options)) is None:
            taken.add(str(args[0].dtype))
        else:
            assert reason[-1] == ".", reason
    assert taken >= {"float32", "bfloat16"} or "install" in str(reason)
