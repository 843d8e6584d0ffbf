"""The Triton kernels of `neighborhood_attention`: values and gradients by the interpreter, code by the compilers."""

import dataclasses
import json
import re
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import portable
from portable import selection
from portable.ops._neighborhood_attention.api import prepare
from portable.ops._neighborhood_attention.cases import _case
from portable.pallas_kernels.gpu import _launch
from portable.pallas_kernels.gpu import neighborhood_attention as kernel
from portable.parity import numbers
from tests.kernels import block_sparse
from tests.kernels.mutation import errors
from tests.kernels.triton_compiler import SHARED, compile_kernels, compilers
from tests.oracles import need

REFERENCE = selection.implementations("neighborhood_attention")["reference"]
MADE = {
    # Grouped heads, groups of unequal length, masked and full tiles, several for each.
    "plane": _case(51, 8, window=(17, 8), stride=(2, 1), dilation=(2, 1), h=4, g=2, k=16, v=8, return_lse=True),
    "line": _case(150, window=100, is_causal=True, k=16, b=2, mask=0.3, extra=2, return_lse=True),
    "volume_bfloat16": _case(5, 6, 9, window=(3, 4, 7), stride=(1, 2, 7), k=24, dtype=jnp.bfloat16),
    "float16": _case(40, window=24, stride=8, k=32, dtype=jnp.float16),
}


def made(case, seed):
    args, kwargs = MADE[case](seed)
    return prepare(*args, **kwargs)


@pytest.mark.parametrize("case", MADE)
def test_equals_the_definition_in_float64(case, seed):
    need("triton", "torch")
    arrays, options = made(case, seed)
    pairs = numbers.interpreted(kernel.IMPL, REFERENCE, arrays, options, True, seed)
    floats = [x for x in arrays if x is not None and jnp.issubdtype(x.dtype, jnp.floating)]
    assert [x.dtype for x, _ in pairs] == [arrays[0].dtype, jnp.float32, *(x.dtype for x in floats)]
    bar = numbers.BARS[str(arrays[0].dtype)]
    for i, (got, want) in enumerate(pairs):
        assert numbers.relative(got, want) <= bar * (1 if i < 2 else numbers.GRADIENTS), i


@pytest.mark.parametrize("heads", [{}, {"h": 8, "g": 2, "tables": 4}])
def test_blocks_selected_at_run_time(heads, seed):
    need("triton", "torch")
    c = block_sparse.case(seed, **heads)
    want = block_sparse.definition(c)
    arrays = c.table, c.q, c.k, c.v, c.dout, block_sparse.intervals(c), block_sparse.places(c)
    out, lse, *grads = _launch.interpret("tests.kernels.triton_block_sparse", "fwd", arrays, {"scale": c.scale})
    sees = want["sees"]
    assert not sees.all()
    assert (lse[~sees] == -np.inf).all()
    assert numbers.relative(lse[sees], want["lse"][..., 0][sees]) <= 2e-6
    for name, x in zip(("out", "dq", "dk", "dv"), (out, *grads), strict=True):
        assert numbers.relative(x, want[name]) <= 2e-6, name


FAULTS = {
    "ends included": ("(at < tl.load(first + (A + a) * R)", "(at <= tl.load(first + (A + a) * R)"),
    "an axis not compared": ("tl.static_range(A)", "tl.static_range(1, A)"),
    "the sums do not fade": ("return new, total * fade +", "return new, total +"),
    "full blocks forgotten": ("for i in range(whole, end):", "for i in range(whole, whole):"),
    "every group the first": ("group = head // (H // G)", "group = head * 0"),
    "masks forgotten backwards": ("        if i < whole:", "        if i < 0:"),
    "log-sum-exp has no slope": ("- means[:, None])", ")"),
    "padding is written": ("(j < WIDTH)[None, :] &", "(j < WIDTH + 1)[None, :] &"),
}


@pytest.fixture(scope="module")
def faulty(tmp_path_factory):
    """Returns a function that builds the implementation with a fault and returns its name for the interpreter."""
    need("triton", "torch")
    folder = tmp_path_factory.mktemp("faulty")
    home = "from portable.pallas_kernels.gpu import "
    read = lambda name: (Path(kernel.__file__).parent / f"{name}.py").read_text()  # noqa: E731

    def build(fault):
        name = f"faulty_neighborhood_{list(FAULTS).index(fault)}"
        old, new = FAULTS[fault]
        kernels = read("_block_attention_kernels")
        assert old in kernels, f"nothing to change: {old}"
        (folder / f"{name}_kernels.py").write_text(kernels.replace(old, new))
        core, host = read("_block_attention"), read("neighborhood_attention")
        for text, line in ((core, f"{home}_block_attention_kernels"), (host, f"{home}_block_attention, _launch")):
            assert line in text, line
        core = core.replace(f"{home}_block_attention_kernels", f"import {name}_kernels as _block_attention_kernels")
        host = host.replace(
            f"{home}_block_attention, _launch", f"{home}_launch\nimport {name}_core as _block_attention"
        )
        (folder / f"{name}_core.py").write_text(core)
        (folder / f"{name}.py").write_text(host)
        return name

    sys.path.insert(0, str(folder))
    _launch.stop()  # a new one, which sees the new path
    yield build
    sys.path.remove(str(folder))
    _launch.stop()


@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_in_a_kernel_is_found(fault, faulty, seed):
    arrays, options = made("plane", seed)
    name = faulty(fault)
    impl = dataclasses.replace(kernel.IMPL, interpret=lambda part, *a, **o: _launch.interpret(name, part, a, o))
    try:
        found = errors(impl, REFERENCE, arrays, options, seed)
    except RuntimeError as fault:
        assert "IndexError" in str(fault)  # noqa: PT017 - one of two ways to be found
        return
    assert not all(error <= 2e-5 for error in found), found


@pytest.mark.parametrize(
    "change, sentence",
    [
        ({"dtype": jnp.float64}, "it needs float32 or bfloat16 or float16; got float64."),
        ({"bias": True}, "it knows no bias by offset; got rel_pos_bias [2, 5, 5]."),
        ({"k": 160}, "it takes widths up to 128; got q [1, 9, 10, 2, 160]"),
    ],
)
def test_limits_are_told(change, sentence):
    with jax.enable_x64(True):
        args, kwargs = _case(9, 10, window=3, **change)(0)
        with pytest.raises(portable.Unavailable, match=re.escape(sentence)):
            portable.ops.neighborhood_attention(*args, **kwargs, implementation="triton")


LOWER = """
import sys
import jax, jax.numpy as jnp
import portable
from portable.pallas_kernels.gpu import _launch

def lowered(target, q, k, v, batched=False, **options):
    def value(*a):
        return portable.ops.neighborhood_attention(*a, **options, return_lse=True, implementation="triton")
    def both(q, k, v):
        out, pull = jax.vjp(value, q, k, v)
        return out, pull(out)
    of = jax.ShapeDtypeStruct
    with _launch.capability(target):
        f = jax.jit(jax.vmap(both) if batched else both)
        return f.trace(of(*q), of(*k), of(*v)).lower(lowering_platforms=("cuda",)).as_text()
"""


@pytest.mark.aot
@pytest.mark.parametrize("width", [64, pytest.param(128, marks=pytest.mark.full)])
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
@pytest.mark.parametrize(
    "target", [90, pytest.param(80, marks=pytest.mark.full), pytest.param(100, marks=pytest.mark.full)]
)
def test_compiles_without_spilling(target, dtype, width, tmp_path, record_property):
    compilers()
    shape = f"((1, 64, 64, 4, {width}), jnp.{dtype})"
    code = f"{LOWER}lowered({target}, {shape}, {shape}, {shape}, window=(21, 16), stride=(1, 8))\n"
    found = compile_kernels(code, tmp_path)
    record_property("kernels", json.dumps(found))
    assert {name.split()[1] for name in found} == {"attend", "query_gradients", "key_gradients"}
    for name, used in found.items():
        print(name, used)
        assert name.startswith(f"sm_{target}")
        assert used["spilled"] == 0, (name, used)
        assert used["shared"] <= SHARED[target], (name, used)


@pytest.mark.aot
def test_lowers_mapped(tmp_path):
    compilers()
    shape = "((3, 1, 16, 16, 2, 32), jnp.bfloat16)"
    code = f"{LOWER}text = lowered(90, {shape}, {shape}, {shape}, True, window=5)\n"
    compile_kernels(code + "assert text.count('triton_kernel_call') >= 4, text.count('triton_kernel_call')\n", tmp_path)
