"""The TPU kernel of `ssd`: faults put into it are found, and it holds no copy of its arguments."""

import math

import jax
import jax.numpy as jnp
import pytest

import portable
from portable import parity, selection
from portable.ops._ssd.api import prepare
from portable.ops._ssd.cases import CASES
from portable.pallas_kernels.tpu import ssd as kernel
from portable.parity import numbers
from tests.kernels.mutation import errors, mutated

REFERENCE = selection.implementations("ssd")["reference"]
MUTATIONS = {
    "mask off by one": ("_iota(size, size, 0) >= _iota(size, size, 1)", "_iota(size, size, 0) > _iota(size, size, 1)"),
    "last chunk dropped": ("self.g, self.chunks, self.blocks)", "self.g, self.chunks - 1, self.blocks)"),
    "wrong group": (
        "[*specs, _by_group(s, at), ",
        "[*specs, pl.BlockSpec((1, s.size, s.n), lambda b, g, c, j: (b, at(c), 0)), ",
    ),
    "sums in bfloat16": (
        "preferred_element_type=jnp.float32)",
        "preferred_element_type=jnp.bfloat16).astype(jnp.float32)",
    ),
    "state not reset at a segment": ("jnp.where(self.seen_last == 0, sums, -jnp.inf)", "sums"),
    "a gradient lost": ("columns = da_pairs + _dot(upto, through, precision=EXACT)", "columns = da_pairs"),
}


@pytest.mark.parametrize("fault", MUTATIONS)
def test_a_fault_in_the_kernel_is_found(fault, tmp_path, seed):
    args, kwargs = CASES["heads_of_64"](seed)
    arrays, options = prepare(*args, **kwargs)
    broken = mutated(kernel, *MUTATIONS[fault], tmp_path).IMPL
    found = errors(broken, REFERENCE, arrays, options, seed)
    assert not all(e <= 4 * numbers.BARS["float32"] * numbers.GRADIENTS for e in found), found


@pytest.mark.parametrize(
    "change, sentence",
    [
        ({"chunk_size": 96}, "chunk_size must be a multiple of 128; got 96."),
        ({"p": 48}, "the head size p must divide 128 or be a multiple of it; got 48."),
        ({"g": 2, "n": 64}, "with several groups the state size n must be a multiple of 128; got 64."),
        ({"g": 8}, "a group's heads must fill whole blocks of 128 lanes; got 1 heads of 64."),
        ({"dtype": jnp.float16}, "x must be float32 or bfloat16; got float16."),
        ({"t": 0}, "it needs at least one element; got x [1, 0, 8, 64], B [1, 0, 1, 128]."),
    ],
)
def test_limits_are_told(change, sentence):
    size = {"t": 128, "h": 8, "p": 64, "g": 1, "n": 128, "chunk_size": None, "dtype": jnp.float32} | change
    x = jnp.zeros((1, size["t"], size["h"], size["p"]), size["dtype"])
    k = jnp.zeros((1, size["t"], size["g"], size["n"]), size["dtype"])
    with pytest.raises(portable.Unavailable) as caught:
        portable.ops.ssd(
            x, jnp.zeros(x.shape[:3]), -jnp.ones(size["h"]), k, k,
            chunk_size=size["chunk_size"], implementation="pallas_tpu",
        )  # fmt: skip
    assert sentence in str(caught.value)


def test_one_program_with_a_kernel_for_tpus_and_none_for_the_rest():
    args, kwargs = CASES["heads_of_64_bfloat16"](0)

    def run(x):
        return portable.ops.ssd(x, *args[1:], **kwargs)[0]

    both = portable.export(run, [args[0]], platforms=("cpu", "tpu"), implementation="kernels")
    assert "tpu_custom_call" in both.mlir_module()
    assert numbers.relative(both.call(args[0]), run(args[0])) == 0  # the XLA form on a CPU
    plain = portable.export(run, [args[0]], platforms=("cpu", "tpu"), implementation="xla")
    assert "tpu_custom_call" not in plain.mlir_module()


def test_under_vmap():
    args, kwargs = CASES["heads_of_64"](0)
    twice = jax.tree.map(lambda x: jnp.stack([x, x[::-1]]), args[0])

    def run(x):
        return portable.ops.ssd(x, *args[1:], **kwargs, implementation="pallas_tpu")[0]

    text = jax.jit(jax.vmap(run)).trace(twice).lower(lowering_platforms=("tpu",)).as_text()
    assert text.count("tpu_custom_call") >= 1


def forward(implementation: str) -> parity.Program:
    """A forward at the sizes of mamba2-2.7b; a child process imports this by name."""
    t, h, p, n = 8192, 80, 64, 128
    half, single = jnp.bfloat16, jnp.float32
    shapes = ((1, t, h, p), half), ((1, t, h), single), ((h,), single), ((1, t, 1, n), half), ((1, t, 1, n), half)
    arrays = [jax.ShapeDtypeStruct(*s) for s in shapes]
    return parity.Program(lambda *a: portable.ops.ssd(*a, implementation=implementation), tuple(arrays))


@pytest.mark.aot
def test_memory_of_the_forward_is_a_quarter_of_what_goes_in_and_out():
    if reason := parity.missing("tpu"):
        pytest.skip(reason)
    build = "tests.kernels.test_pallas_ssd:forward"
    jobs = [parity.Job(n, "tpu-v5e", build, {"implementation": n}) for n in ("pallas_tpu", "xla")]
    mine, xla = parity.run(jobs)
    assert mine.status == xla.status == "compiled", (mine.verdict, xla.verdict)
    x = math.prod((8192, 80, 64)) * 2
    print(f"temporary memory: kernel {mine.temp_bytes / 2**20:.1f} MiB, XLA form {xla.temp_bytes / 2**20:.1f} MiB")
    assert mine.temp_bytes <= 2 * x / 4
