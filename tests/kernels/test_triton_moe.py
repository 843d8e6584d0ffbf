"""The Triton kernels of `moe_ffn` and `grouped_matmul`: by the interpreter against the definition, and compiled."""

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
from portable.ops._grouped_matmul import api as product_api
from portable.ops._moe_ffn import activations
from portable.ops._moe_ffn.api import prepare
from portable.ops._moe_ffn.cases import _case as case
from portable.pallas_kernels.gpu import _grouped, _launch, grouped_matmul, moe_ffn
from portable.parity import numbers
from tests.kernels.mutation import errors
from tests.kernels.triton_compiler import SHARED, compile_kernels, compilers
from tests.oracles import need

REFERENCE = selection.implementations("moe_ffn")["reference"]
PRODUCT = selection.implementations("grouped_matmul")["reference"]


def made(seed, *sizes, **options):
    args, kwargs = case(*sizes, **options)(seed)
    return prepare(*args, **kwargs)


@pytest.mark.parametrize(
    "options",
    [
        # Several tiles and parts, short ones last; blocks of several sizes; an expert that nobody chose.
        {"biases": True, "empty": 0.2, "activation": "swiglu_oai"},
        {"gated": False, "dtype": jnp.bfloat16, "activation": "relu2"},
    ],
    ids=["float32", "bfloat16"],
)
def test_equals_the_definition_in_float64(options, seed):
    need("triton", "torch")
    dtype = options.get("dtype", jnp.float32)
    arrays, static = made(seed, 37, 40, 72 if dtype == jnp.float32 else 136, 4, 2, skew=4.0, **options)
    pairs = numbers.interpreted(moe_ffn.IMPL, REFERENCE, arrays, static, True, seed)
    bar = numbers.BARS[jnp.dtype(dtype).name]
    assert len(pairs) == 1 + sum(x is not None and jnp.issubdtype(x.dtype, jnp.floating) for x in arrays)
    for i, (got, want) in enumerate(pairs):
        assert numbers.relative(got, want) <= bar * (1 if i == 0 else numbers.GRADIENTS), i


@pytest.mark.parametrize("gated", [True, False])
@pytest.mark.parametrize("activation", activations.NAMES)
def test_every_activation(activation, gated, seed):
    need("triton", "torch")
    if not gated and activation == "swiglu_oai":
        return
    arrays, static = made(seed, 5, 8, 8, 2, 2, gated=gated, activation=activation, scale=4.0)
    impl = dataclasses.replace(moe_ffn.IMPL, bwd=None)
    (error,) = errors(impl, REFERENCE, arrays, static, seed)
    assert error <= 2e-6


def test_what_is_kept_is_what_the_xla_form_keeps(seed):
    need("triton", "torch")
    arrays, static = made(seed, 12, 8, 8, 3, 2, biases=True, empty=0.4)
    (y,), kept = moe_ffn.IMPL.interpret("save", *arrays, **static)
    (y_xla,), kept_xla = selection.implementations("moe_ffn")["xla_ragged"].save(*arrays, **static)
    real = int((arrays[4] < 3).sum())  # rows behind them mean nothing
    assert numbers.relative(y, y_xla) <= 2e-6
    for got, want in zip(kept, kept_xla, strict=True):
        assert numbers.relative(got[:real], want[:real]) <= 2e-6


def test_rows_of_no_group_are_zero_and_their_nan_stays_there():
    need("triton", "torch")
    x = jnp.ones((9, 8)).at[5:].set(jnp.nan)
    arrays, _ = product_api.prepare(x, jnp.ones((3, 8, 4)), jnp.asarray([2, 0, 3]))
    (y,) = grouped_matmul.IMPL.interpret("fwd", *arrays)
    np.testing.assert_array_equal(y, np.where(np.arange(9) < 5, 8.0, 0.0)[:, None] * np.ones(4))
    dx, dw, _ = grouped_matmul.IMPL.interpret("bwd", arrays, (jnp.ones((9, 4)).at[5:].set(jnp.nan),))
    np.testing.assert_array_equal(dx, np.where(np.arange(9) < 5, 4.0, 0.0)[:, None] * np.ones(8))
    np.testing.assert_array_equal(dw, np.asarray([2.0, 0.0, 3.0])[:, None, None] * np.ones((8, 4)))


# A line of the source, and the fault put in its place.
FAULTS = {
    "every block of the first group": ("tl.load(group + block), rows, f, gate", "tl.load(group), rows, f, gate"),
    "the last part of the sum forgotten": ("tl.where(e < E, D, 0), INNER", "tl.where(e < E, D - INNER, 0), INNER"),
    "columns of the next row written": ("[:, None] & (f < F)[None, :])\n\n\n", "[:, None])\n\n\n"),
    "rows of the next block written": ("(i < end - first)[:, None]", "(i < ROWS)[:, None]"),
    "the last block forgotten": ("block >= tl.load(count)", "block >= tl.load(count) - 1"),
    "gate and up exchanged": ("_activate(of_gate, of_up,", "_activate(of_up, of_gate,"),
    "the gate's bias forgotten": ("of_gate += tl.load", "of_gate += 0 * tl.load"),
    "rows are not those of their tokens": ("tl.load(token + rows) if GATHER else rows", "rows"),
}
FAULTS_BACKWARD = {
    "matrices not turned around": ("f[None, :] * D", "f[None, :]"),
    "a row of the next group added": ("own = (rows < last)[:, None]", "own = (rows < last + 1)[:, None]"),
}


@pytest.fixture(scope="module")
def faulty(tmp_path_factory):
    """Returns a function that builds an implementation whose kernels have a fault."""
    need("triton", "torch")
    folder = tmp_path_factory.mktemp("faulty_groups")
    home = Path(_grouped.__file__).parent

    def build(fault, module):
        name = f"faulty_groups_{[*FAULTS, *FAULTS_BACKWARD].index(fault)}"
        old, new = (FAULTS | FAULTS_BACKWARD)[fault]
        kernels = (home / "_grouped_kernels.py").read_text()
        assert old in kernels, f"nothing to change: {old}"
        (folder / f"{name}_kernels.py").write_text(kernels.replace(old, new))
        shared = (home / "_grouped.py").read_text()
        line = "from portable.pallas_kernels.gpu import _grouped_kernels"
        assert line in shared
        (folder / f"{name}_shared.py").write_text(shared.replace(line, f"import {name}_kernels as _grouped_kernels"))
        host, line = Path(module.__file__).read_text(), "import _grouped, _launch"
        assert line in host
        (folder / f"{name}.py").write_text(host.replace(line, f"import _launch\nimport {name}_shared as _grouped"))

        def interpret(part, *args, **options):
            return _launch.interpret(name, part, args, options)

        return dataclasses.replace(module.IMPL, interpret=interpret)

    sys.path.insert(0, str(folder))
    _launch.stop()  # a new one, which sees the new path
    yield build
    sys.path.remove(str(folder))
    _launch.stop()


def found(impl, reference, arrays, options, seed):
    """Whether a fault shows: as an error of a result, or as what the interpreter says is outside."""
    try:
        return not all(e <= 2e-5 for e in errors(impl, reference, arrays, options, seed))
    except RuntimeError as reason:
        return "IndexError" in str(reason)


@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_in_a_kernel_is_found(fault, faulty, seed):
    arrays, options = made(seed, 20, 24, 40, 3, 2, biases=True, skew=1.0)
    impl = dataclasses.replace(faulty(fault, moe_ffn), bwd=None)
    assert found(impl, REFERENCE, arrays, options, seed)


@pytest.mark.parametrize("fault", FAULTS_BACKWARD)
def test_a_fault_in_a_backward_kernel_is_found(fault, faulty, seed):
    rng = np.random.default_rng(seed)
    x, w = (jnp.asarray(rng.normal(size=s), jnp.float32) for s in ((23, 24), (3, 24, 40)))
    arrays, options = product_api.prepare(x, w, jnp.asarray([9, 0, 14]))
    assert found(faulty(fault, grouped_matmul), PRODUCT, arrays, options, seed)


REFUSED = {
    "it needs float32, bfloat16 or float16; got float64.": {"dtype": jnp.float64},
    "it needs at least one row, group and column; got 0 rows and matrices [4, 8, 8].": {"t": 0},
    "must be stacked arrays, [e, d, f] and [e, f, d]; got 4 arrays each.": {"apart": True},
}


@pytest.mark.parametrize("reason", REFUSED)
def test_says_what_it_cannot_take(reason):
    with jax.enable_x64("float64" in reason):
        arrays, options = made(0, **{"t": 4, "d": 8, "f": 8, "e": 4, "k": 2} | REFUSED[reason])
    assert reason in moe_ffn.why_not(*arrays, **options)
    with pytest.raises(portable.Unavailable, match=re.escape(reason)):
        moe_ffn.interpret("fwd", *arrays, **options)


CODE = """
import jax, jax.numpy as jnp
from portable.pallas_kernels.gpu import _launch, moe_ffn

def shapes(t, d, f, e, k, dtype):
    of = jax.ShapeDtypeStruct
    up, bias = of((e, d, f), dtype), of((e, f), dtype)
    arrays = of((t, d), dtype), up, up, of((e, f, d), dtype), of((t, k), jnp.int32), of((t, k), jnp.float32)
    return (*arrays, bias, bias, of((e, d), dtype))

def both(arrays, dy):
    (y,), saved = moe_ffn.save(*arrays, activation="silu", capacity=None)
    return y, moe_ffn.bwd((*arrays, saved), (dy,), activation="silu", capacity=None)

def lowered(fn, *args):
    return jax.jit(fn).trace(*args).lower(lowering_platforms=("cuda",)).as_text()
"""


@pytest.mark.aot
@pytest.mark.parametrize("tokens", [4096, 8])
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
@pytest.mark.parametrize(
    "target", [90, pytest.param(80, marks=pytest.mark.full), pytest.param(100, marks=pytest.mark.full)]
)
def test_compiles_without_spilling(target, dtype, tokens, tmp_path, record_property):
    compilers()
    kernels = compile_kernels(
        f"{CODE}\na = shapes({tokens}, 2048, 768, 128, 8, jnp.{dtype})\n"
        f"with _launch.capability({target}): lowered(both, a, a[0])\n",
        tmp_path,
    )
    record_property("kernels", json.dumps(kernels))
    assert {name.split()[1] for name in kernels} == {"hidden_kept", "product", "outer"}
    for name, used in kernels.items():
        assert name.startswith(f"sm_{target}")
        assert used["spilled"] == 0, (name, used)
        assert used["shared"] <= SHARED[target], (name, used)


@pytest.mark.aot
def test_lowers_mapped(tmp_path):
    compilers()
    code = (
        "a = shapes(20, 32, 64, 4, 2, jnp.bfloat16)\n"
        "more = jax.tree.map(lambda x: jax.ShapeDtypeStruct((3, *x.shape), x.dtype), a)\n"
        "with _launch.capability(90):\n"
        "    text = lowered(jax.vmap(both, in_axes=((0, *[None] * 8), 0)), (more[0], *a[1:]), more[0])\n"
        "assert text.count('triton_kernel_call') >= 7, text.count('triton_kernel_call')\n"
        "assert 'while' in text\n"
    )
    compile_kernels(CODE + code, tmp_path)


def test_a_function_mapped_in_turn():
    mapped = jax.vmap(_launch.mapped_in_turn(lambda x, pair: (x @ pair[0], None)), (0, None))
    x, w = jnp.arange(12.0).reshape(2, 3, 2), jnp.ones((2, 4))
    np.testing.assert_array_equal(mapped(x, (w, None))[0], x @ w)
