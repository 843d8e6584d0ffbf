"""`neighborhood_attention` against NATTEN: its mask with torch's gradients, and its own forward pass."""

import functools
import math
import random
import warnings

import jax
import numpy as np
import pytest

from portable.ops import neighborhood_attention
from portable.parity.numbers import relative
from tests.ops.neighborhood_definition import table
from tests.oracles import need


def natten_mask(torch, natten, space, window, stride, dilation, is_causal):
    flex = natten.backends.flex
    rank, n = len(space), math.prod(space)
    given = [tuple(x) for x in (space, window, stride, dilation, is_causal)]
    block = flex.get_na_flex_mask("cpu", rank, *given, q_shape=given[0], kv_shape=given[0])
    index = torch.arange(n)
    zero = torch.tensor(0)
    return block.mask_mod(zero, zero, index[:, None], index[None, :]).numpy()


def natten_draw(seed: int):
    rng = random.Random(seed)
    rank = rng.choice([1, 2, 3])
    space = [rng.randint(2, (24, 9, 6)[rank - 1]) for _ in range(rank)]
    window = [rng.randint(2, n) for n in space]
    dilation = [rng.randint(1, n // w) for n, w in zip(space, window, strict=True)]
    stride = [rng.randint(1, w) for w in window]
    return space, window, stride, dilation, [rng.random() < 0.4 for _ in space]


def check_natten(seed: int) -> None:
    """Its flex path forward; its mask, torch's autograd and float64 for gradients."""
    torch, natten, _ = need("torch", "natten", "natten.backends.flex")
    space, window, stride, dilation, causal = natten_draw(seed)
    seen = natten_mask(torch, natten, space, window, stride, dilation, causal)
    assert np.array_equal(seen, table(space, window, stride, dilation, causal))
    generator = torch.Generator().manual_seed(seed)
    h, g, k = 2, 1 + seed % 2, 8
    q, key, v, do = (torch.randn(2, *space, n, k, generator=generator) for n in (h, g, g, h))
    dlse = torch.randn(2, *space, h, generator=generator)
    options = {"stride": tuple(stride), "dilation": tuple(dilation), "is_causal": tuple(causal)}

    wide = [x.double().requires_grad_() for x in (q, key, v)]
    flat = [x.reshape(2, -1, x.shape[-2], k).repeat_interleave(h // x.shape[-2], 2) for x in wide]
    scores = torch.einsum("bqhk,bshk->bhqs", flat[0], flat[1]) * k**-0.5
    scores = scores.masked_fill(~torch.from_numpy(seen), float("-inf"))
    want = torch.einsum("bhqs,bshk->bqhk", scores.softmax(-1), flat[2]).reshape(do.shape)
    want_lse = scores.logsumexp(-1).transpose(1, 2).reshape(dlse.shape)
    grads = torch.autograd.grad((want * do).sum() + (want_lse * dlse).sum(), wide)

    @jax.jit
    def run(*arrays):
        call = functools.partial(neighborhood_attention, window=window, **options, return_lse=True)
        found, pull = jax.vjp(call, *arrays)
        return *found, *pull((do.numpy(), dlse.numpy()))

    got = run(*(x.numpy() for x in (q, key, v)))
    for ours, theirs in zip(got, (want, want_lse, *grads), strict=True):
        assert relative(ours, theirs.detach().numpy()) <= 2e-6, (space, window, options)
    whole = len(space) == 1 and window[0] == space[0] and causal[0]  # another kernel, not for CPUs
    if not whole:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch deprecates what it calls
            theirs = natten.functional.neighborhood_attention_generic(
                q, key, v, kernel_size=tuple(window), **options, return_lse=True, backend="flex-fna"
            )
        for ours, other in zip(got[:2], theirs, strict=True):
            assert relative(ours, other.numpy()) <= 4e-6


@pytest.mark.oracle
@pytest.mark.parametrize("case", range(2))
def test_equals_natten(case, seed):
    check_natten(seed + case)


@pytest.mark.oracle
@pytest.mark.full
@pytest.mark.parametrize("part", range(4))
def test_equals_natten_everywhere(part, seed):
    for case in range(10):
        check_natten(seed + 100 + 10 * part + case)
