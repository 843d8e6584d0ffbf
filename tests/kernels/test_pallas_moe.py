"""The TPU kernels of `moe_ffn` and `grouped_matmul`: activations, what is kept, faults, limits, what is computed."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import tpu as pltpu

import portable
from portable import selection
from portable.ops._grouped_matmul import blocks as layout
from portable.ops._moe_ffn import activations
from portable.ops._moe_ffn.api import prepare
from portable.ops._moe_ffn.cases import CASES
from portable.ops._moe_ffn.cases import _case as case
from portable.pallas_kernels.tpu import _grouped as kernel
from portable.pallas_kernels.tpu import grouped_matmul, moe_ffn
from portable.parity import numbers
from tests.kernels.mutation import mutated

_ERF = np.vectorize(math.erf)
DEFINED = {
    "silu": lambda g: g / (1 + np.exp(-g)),
    "gelu": lambda g: g * (1 + _ERF(g / 2**0.5)) / 2,
    "gelu_tanh": lambda g: g * (1 + np.tanh((2 / np.pi) ** 0.5 * (g + 0.044715 * g**3))) / 2,
    "relu": lambda g: np.maximum(g, 0),
    "relu2": lambda g: np.maximum(g, 0) ** 2,
}


def hidden(name, gate, up):
    """Returns the activations in float64, from their formulas."""
    if name == "swiglu_oai":
        gate, up = np.minimum(gate, 7), np.clip(up, -7, 7)
        return (up + 1) * gate / (1 + np.exp(-1.702 * gate))
    return up if name is None else DEFINED[name](up) if gate is None else DEFINED[name](gate) * up


def error(module, monkeypatch, *, activation="silu", gated=True, biases=True, seed=0):
    """Returns the largest relative error of a module's `products`: 3 of 5 blocks, 2 tiles of columns, one short."""
    e, inner, width, size, sizes = 4, 12, 136, 8, (3, 0, 9, 0)
    monkeypatch.setattr(module, "_columns", lambda *sizes: 128)
    rng = np.random.default_rng(seed)
    blocks = layout.make(jnp.asarray(sizes), 17, size)
    x = rng.normal(size=(17, inner))
    made = {}
    for name in ("gate", "up")[0 if gated else 1 :]:
        bias = 4 * rng.normal(size=(e, width)) if biases else None
        made[name] = 3 * rng.normal(size=(e, inner, width)), bias
    want, at = {}, np.repeat(np.arange(e), sizes)
    for name, (w, bias) in made.items():
        want[name] = np.einsum("md,mdf->mf", np.float32(x[:12]).astype(float), np.float32(w)[at].astype(float))
        if bias is not None:
            want[name] += np.float32(bias)[at]
    single = {name: (jnp.float32(w), None if b is None else jnp.float32(b)) for name, (w, b) in made.items()}
    with pltpu.force_tpu_interpret_mode(pltpu.InterpretParams(uninitialized_memory="nan")):
        given = jnp.float32(x)[blocks.rows], blocks, single.get("gate"), single["up"]
        found = module.products(*given, activation=activation, keep=True)
    wanted = [hidden(activation, want.get("gate"), want["up"]), *want.values()]
    assert len(found) == len(wanted)
    rows = np.asarray(blocks.place)[:12]
    return max(numbers.relative(f[rows], w) for f, w in zip(found, wanted, strict=True))


def test_every_activation_is_defined():
    assert set(activations.NAMES) == {*DEFINED, "swiglu_oai"}


@pytest.mark.parametrize(
    "options",
    [
        *({"activation": name} for name in activations.NAMES),
        {"activation": "gelu", "gated": False, "biases": False},
        {"activation": None, "gated": False},
    ],
    ids=str,
)
def test_products_and_activations(options, monkeypatch, seed):
    assert error(kernel, monkeypatch, **options, seed=seed) <= 2e-6


FAULTS = {
    "every block of the first group": ("(group[i], 0, j)", "(group[0], 0, j)"),
    "bias forgotten": ("y if bias is None else y + bias[...].astype(jnp.float32)", "y"),
    "last block forgotten": ("block < count[0]", "block < count[0] - 1"),
    "sums in bfloat16": (
        "preferred_element_type=jnp.float32)",
        "preferred_element_type=jnp.bfloat16).astype(jnp.float32)",
    ),
    "gate and up exchanged": ("_activate(activation, gate, up),", "_activate(activation, up, gate),"),
    "last columns forgotten": ("pl.cdiv(width, columns)", "width // columns"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_in_the_kernel_is_found(fault, monkeypatch, tmp_path, seed):
    found = error(mutated(kernel, *FAULTS[fault], tmp_path), monkeypatch, seed=seed)
    assert not found <= 2e-5


def test_what_is_kept_is_what_the_xla_form_keeps(seed):
    args, kwargs = case(12, 8, 8, 3, 2, biases=True, empty=0.4)(seed)
    arrays, options = prepare(*args, **kwargs)
    (y,), kept = moe_ffn.IMPL.interpret("save", *arrays, **options)
    (y_xla,), kept_xla = selection.implementations("moe_ffn")["xla_ragged"].save(*arrays, **options)
    real = int((args[4].indices < 3).sum())  # rows behind them mean nothing
    assert numbers.relative(y, y_xla) <= 2e-6
    for got, want in zip(kept, kept_xla, strict=True):
        assert got.shape == want.shape
        assert numbers.relative(got[:real], want[:real]) <= 2e-6
    without = jax.eval_shape(lambda: moe_ffn.save(arrays[0], None, *arrays[2:6], **options))
    assert without[1][0] is None
    assert without[1][1].shape == (24, 8)


def test_lowers_for_tpus_mapped_and_with_gradients():
    args, kwargs = CASES["gpt_oss"](0)

    def loss(x, *experts):
        return portable.ops.moe_ffn(x, *experts, args[4], **kwargs, implementation="pallas_tpu").sum()

    def lowered(fn, *args):
        return jax.jit(fn).trace(*args).lower(lowering_platforms=("tpu",)).as_text()

    assert lowered(loss, *args[:4]).count("tpu_custom_call") == 2
    slopes = lowered(jax.grad(loss, argnums=(0, 1, 2, 3)), *args[:4])
    assert slopes.count("grouped_hidden") >= 1
    assert "tpu_custom_call" in lowered(jax.vmap(lambda x: loss(x, *args[1:4])), jnp.stack([args[0]] * 2))


@pytest.mark.parametrize(
    "change, sentence",
    [
        ({"dtype": jnp.float16}, "it needs float32 or bfloat16; got float16."),
        ({"t": 0}, "it needs at least one row, group and column; got 0, 4 and matrices [8, 8]."),
        ({"apart": True}, "must be stacked arrays, [e, d, f] and [e, f, d]; got 4 arrays each."),
    ],
)
def test_limits_are_told(change, sentence):
    args, kwargs = case(**{"t": 4, "d": 8, "f": 8, "e": 4, "k": 2} | change)(0)
    with pytest.raises(portable.Unavailable) as caught:
        portable.ops.moe_ffn(*args, **kwargs, implementation="pallas_tpu")
    assert sentence in str(caught.value)


def test_matrices_that_no_tile_fits_are_refused():
    shapes = [jax.ShapeDtypeStruct(s, jnp.float32) for s in ((64, 50_000), (2, 50_000, 256))]
    assert grouped_matmul.why_not(*shapes, jax.ShapeDtypeStruct((2,), jnp.int32)) == (
        "128 columns of a matrix must fit into a TPU's VMEM with a block of rows; got 50000 rows."
    )


# Tokens, width, experts' width, experts and choices of published models.
PUBLISHED = {
    "mixtral-8x7b": (4096, 4096, 14336, 8, 2),
    "qwen3-30b-a3b": (4096, 2048, 768, 128, 8),
    "gpt-oss-20b": (4096, 2880, 2880, 32, 4),
    "deepseek-v3": (4096, 7168, 2048, 256, 8),
    "deepseek-v2-lite": (4096, 2048, 1408, 64, 6),
    "olmoe": (4096, 2048, 1024, 64, 8),
    "the-issue": (4096, 1024, 2816, 64, 6),
    "decode": (1, 2048, 768, 64, 8),
}


@pytest.mark.parametrize("name", PUBLISHED)
@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float32])
def test_computes_little_more_than_the_rows_of_its_blocks_ask_for(name, dtype):
    t, d, f, e, k = PUBLISHED[name]
    rows = kernel.block_rows(t * k, e, max(d, f), dtype)
    assert rows == 32 // jnp.dtype(dtype).itemsize or 2 * rows <= t * k / e
    for products, inner, width in ((2, d, f), (1, f, d)):
        assert kernel.refuses(t * k, e, inner, width, dtype, of_rows=rows, products=products) is None
        columns = kernel._columns(rows, inner, width, products, dtype)
        assert -(-width // columns) * columns <= 1.1 * width
