"""Every op, implementation and case against the definition in float64; kernels by their interpreters. Generic over ops.

Five stages: smoke, shapes, stability and edges are the op's own cases (`STAGES` in its `cases`), values and gradients
held together; the fifth, determinism, is the same bits twice.
"""

import importlib
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.test_util import check_grads

import portable
from portable import selection
from portable.parity import numbers, programs

STAGES = ("smoke", "shapes", "stability", "edges")
ALL = [
    pytest.param(op, case, id=f"{op}-{stage}-{case}")
    for op in selection.ops()
    for stage, cases in programs.stages(op).items()
    for case in cases
]
KERNELS = [(op, k) for op in selection.ops() for k in selection.implementations(op) if k in selection.KERNEL_HOMES]


@pytest.mark.parametrize("op", selection.ops())
def test_every_op_has_every_stage(op):
    stages = programs.stages(op)
    assert tuple(stages) == STAGES
    assert all(stages.values())
    assert sum(map(len, stages.values())) == len(programs.cases(op, sizes=False))


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
@pytest.mark.parametrize("name", ["reference", "xla"])
def test_gradients_keep_the_dtypes_of_their_arguments(op, name):
    program = programs.op(op, "bfloat16", gradients=True, implementation=name)
    out, gradients = jax.eval_shape(program.fn, *program.args)
    assert jax.tree.leaves(out)[0].dtype == jnp.bfloat16
    floats = [x for x in jax.tree.leaves(program.args[0]) if jnp.issubdtype(x.dtype, jnp.floating)]
    assert [g.dtype for g in gradients] == [x.dtype for x in floats]


@pytest.mark.parametrize("op, name", [(op, name) for op in selection.ops() for name in selection.implementations(op)])
def test_an_implementation_gives_the_same_bits_twice(op, name, seed):
    twice = numbers.interpreted_case if name in selection.KERNEL_HOMES else numbers.ran
    for case in programs.cases(op, sizes=False):  # the first that it takes
        try:
            first, second = ([np.asarray(got) for got, _ in twice(op, case, True, name, seed)] for _ in range(2))
        except portable.Unavailable:
            continue
        jax.tree.map(np.testing.assert_array_equal, first, second)
        return
    pytest.skip(f"{name} takes no case here: a package it needs is not installed")


@pytest.mark.parametrize("op", selection.ops())
def test_the_definition_has_the_slopes_of_finite_differences(op, seed):
    name = next(iter(programs.cases(op)))
    args, kwargs = programs.cases(op)[name](seed)
    with jax.enable_x64(True):
        args, kwargs = numbers._wide(args), numbers._wide(kwargs)
        function = getattr(portable.ops, op)
        leaves, tree = jax.tree.flatten(args)
        floats = [i for i, x in enumerate(leaves) if jnp.issubdtype(x.dtype, jnp.floating)]

        def value(*changed):
            full = list(leaves)
            for i, x in zip(floats, changed, strict=True):
                full[i] = x
            return jax.tree.leaves(function(*tree.unflatten(full), **kwargs, implementation="reference"))

        check_grads(jax.jit(value), [leaves[i] for i in floats], order=1, modes=["rev"], eps=1e-6, rtol=1e-6)


@pytest.mark.parametrize("op, kernel", KERNELS)
def test_a_kernel_takes_both_dtypes_and_refuses_in_sentences(op, kernel):
    impl = selection.implementations(op)[kernel]
    taken = set()
    for make in programs.cases(op, sizes=False).values():
        args, kwargs = make(0)
        arrays, options = importlib.import_module(f"portable.ops._{op}.api").prepare(*args, **kwargs)
        if (reason := impl.why_not(*arrays, **options)) is None:
            taken.add(str(args[0].dtype))
        elif "pip install" in reason:
            pytest.skip(reason)
        else:
            assert re.fullmatch(r"[^\n]+ got [^\n]+\.", reason), reason
    assert taken >= {"float32", "bfloat16"}
