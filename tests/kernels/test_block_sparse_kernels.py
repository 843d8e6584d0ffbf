"""The kernels of `block_sparse_attention`: what they refuse, and that vmap keeps them; values are in test_parity."""

import jax
import jax.numpy as jnp
import pytest

import portable
from portable import selection
from portable.ops._block_sparse_attention.api import prepare
from portable.ops._block_sparse_attention.cases import CASES, SIZES, _case
from portable.pallas_kernels.gpu import block_sparse_attention as triton
from portable.pallas_kernels.tpu import block_sparse_attention as pallas
from portable.parity import numbers
from tests.oracles import need

REFERENCE = selection.implementations("block_sparse_attention")["reference"]
LATER = ("plain", "permuted", "tokens", "one_token", "large_scores", "nothing_selected")  # in the full tier


@pytest.mark.parametrize(
    "case", ["groups", "one_list", "bfloat16", *(pytest.param(c, marks=pytest.mark.full) for c in LATER)]
)
def test_triton_equals_the_definition_in_float64(case, seed):
    need("triton", "torch")
    args, kwargs = CASES[case](seed)
    arrays, options = prepare(*args, **kwargs)
    bar = numbers.BARS[str(arrays[0].dtype)]
    for i, (got, want) in enumerate(numbers.interpreted(triton.IMPL, REFERENCE, arrays, options, True, seed)):
        assert numbers.relative(got, want) <= bar * (1 if i < 2 else numbers.GRADIENTS), i


@pytest.mark.parametrize(
    "kernel, case, sentence",
    [
        (pallas, _case(1, 32, 2, 8, n=2, dtype=jnp.float16), "it needs float32 or bfloat16; got float16."),
        (pallas, CASES["single_keys"], "it needs blocks of at least 8 keys; got block_k=1."),
        (pallas, CASES["tokens"], "it needs at least 8 queries that share a list, the rows of a register; got 1."),
        (pallas, SIZES["minicpm4"], "the lists must fit into a TPU's scalar memory, 65536 numbers; got block_indices"),
        (pallas, _case(1, 64, 2, 8, n=1, blocks=(2048, 1024)), "have at most 1048576 pairs; got 2048 and 1024."),
        (pallas, CASES["no_keys"], "it needs at least one element; got q [1, 5, 2, 8], k [1, 0, 2, 8]"),
        (triton, _case(1, 32, 2, 160, n=2), "it takes widths up to 128; got q [1, 32, 2, 160]"),
        (triton, _case(1, 99, 2, 8, n=2, blocks=(65, 16)), "up to 64 queries that share a list and 64 keys a block in"),
        (triton, CASES["no_room"], "it needs at least one element"),
    ],
)
def test_limits_are_told(kernel, case, sentence):
    reasons = []

    def ask():  # in a trace: nothing of these sizes is made
        args, kwargs = case(0)
        arrays, options = prepare(*args, **kwargs)
        reasons.append(getattr(kernel, "refuses", kernel.why_not)(*arrays, **options))

    jax.eval_shape(ask)
    assert sentence in reasons[0], reasons


def test_under_vmap_for_a_tpu():
    args, kwargs = CASES["groups"](0)
    twice = jax.tree.map(lambda x: jnp.stack([x, x[::-1]]), args)

    def loss(*args):
        return portable.ops.block_sparse_attention(*args, **kwargs, implementation="pallas_tpu")[0].sum()

    text = jax.jit(jax.vmap(jax.grad(loss))).trace(*twice).lower(lowering_platforms=("tpu",)).as_text()
    assert text.count("tpu_custom_call") >= 3  # forward, and the gradients of queries and of keys
