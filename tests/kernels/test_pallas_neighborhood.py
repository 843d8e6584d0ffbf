"""The TPU kernel of `neighborhood_attention`: faults put into it are found, and a table made at run time drives it."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import tpu as pltpu

import portable
from portable import selection
from portable.ops._neighborhood_attention.api import prepare
from portable.ops._neighborhood_attention.cases import CASES, _case
from portable.pallas_kernels import block_lists
from portable.pallas_kernels.tpu import _block_attention as core
from portable.pallas_kernels.tpu import neighborhood_attention as kernel
from portable.parity import numbers
from tests.kernels import block_sparse
from tests.kernels.mutation import mutated

REFERENCE = selection.implementations("neighborhood_attention")["reference"]
# Grouped heads, two axes that bound what is seen, masked and full tiles, tiles that are read in vain.
CASE = _case(64, 16, window=(41, 16), stride=(2, 1), h=4, g=2, k=16, v=8, return_lse=True)


def blocks(c, x, size):
    """[b, tokens, heads, k] -> [b, heads, blocks, size, k]."""
    x = jnp.asarray(x).swapaxes(1, 2)
    return x.reshape(*x.shape[:2], -1, size, x.shape[-1])


def run(c: block_sparse.Case, fan: int, module=core) -> dict:
    """Runs the core's forward and gradients on a case, its lists made from the table inside the program."""
    unblock = lambda x: x.reshape(*x.shape[:2], -1, x.shape[-1]).swapaxes(1, 2)  # noqa: E731
    queries, keys = c.table.shape[2], c.k.shape[1] // c.columns

    @jax.jit
    def both(table, q, k, v, dout, intervals, places):
        n = table.shape[-1]
        lists = block_lists.selected(table)
        steps = block_lists.steps(lists, fan, queries * -(-n // fan))
        back = block_lists.steps(block_lists.selected(table, by_keys=keys), fan, keys + queries * n // fan)
        given = [blocks(c, x, size) for x, size in ((q, c.rows), (k, c.columns), (v, c.columns))]
        sees = intervals, places
        out, highest, total = module.attend(*given, *sees, steps, scale=c.scale)
        dout = blocks(c, dout, c.rows)
        alive = total > 0
        mean = jnp.where(alive, (out * dout).sum(-1), 0)
        sums = jnp.where(alive, highest, 0), jnp.where(alive, 1 / jnp.where(alive, total, 1), 0), mean
        dq = module.query_gradients(*given, dout, *sums, *sees, steps, scale=c.scale)
        dk, dv = module.key_gradients(*given, dout, *sums, *sees, back, scale=c.scale)
        lse = (highest + jnp.log(total))[..., None]
        return {n: unblock(x) for n, x in {"out": out, "lse": lse, "dq": dq, "dk": dk, "dv": dv}.items()}

    with pltpu.force_tpu_interpret_mode(pltpu.InterpretParams(uninitialized_memory="nan")):
        arrays = c.q, c.k, c.v, c.dout, block_sparse.intervals(c), block_sparse.places(c)
        return both(c.table, *arrays)


@pytest.mark.parametrize(
    "fan, heads", [(2, {}), pytest.param(1, {"h": 8, "g": 2, "tables": 4}, marks=pytest.mark.full)]
)
def test_blocks_selected_at_run_time(fan, heads, seed):
    c = block_sparse.case(seed, **heads)
    want, got = block_sparse.definition(c), run(c, fan)
    sees = want.pop("sees")
    assert not sees.all()
    assert (np.asarray(got["lse"])[~sees] == -np.inf).all()
    got["lse"], want["lse"] = np.where(sees[..., None], got["lse"], 0), np.where(sees[..., None], want["lse"], 0)
    for name, x in want.items():
        assert numbers.relative(got[name], x) <= 2e-6, name


def errors(impl: selection.Impl, arrays: tuple, options: dict, gradients: bool, seed: int) -> list[float]:
    """Returns the relative errors of a kernel's results, and of its gradients where they are asked for."""
    with jax.default_matmul_precision("highest"):
        pairs = numbers.interpreted(impl, REFERENCE, arrays, options, gradients, seed)
    return [numbers.relative(got, want) for got, want in pairs]


# Whether the gradients are needed to see it: interpreting them takes as long again, three times.
MUTATIONS = {
    "ends included": (False, "(places[i : i + 1] < seen_by", "(places[i : i + 1] <= seen_by"),
    "an axis not compared": (False, "for i in range(s.axes)\n", "for i in range(1, s.axes)\n"),
    "the sums do not fade": (False, "total[...] = total[...] * fade", "total[...] = total[...]"),
    "what is only read is looked at": (False, "jnp.where(number >= 0, places[0, 0], NOWHERE)", "places[0, 0]"),
    "the first block again": (False, "return own[at]\n", "return own[at] * 0\n"),
    "keys not reset": (True, "k_acc[...], v_acc[...] = jnp.zeros_like(k_acc), jnp.zeros_like(v_acc)", "pass"),
    "the mean forgotten": (True, "columns[:, 2:3]", "columns[:, 2:3] * 0"),
}


LATER = ("the mean forgotten", "the first block again")  # in the full tier


@pytest.mark.parametrize("fault", [pytest.param(f, marks=[pytest.mark.full] * (f in LATER)) for f in MUTATIONS])
def test_a_fault_in_the_kernel_is_found(fault, tmp_path, monkeypatch, seed):
    args, kwargs = CASE(seed)
    arrays, options = prepare(*args, **kwargs)
    gradients, old, new = MUTATIONS[fault]
    monkeypatch.setattr(kernel, "FAN", 2)
    monkeypatch.setattr(kernel, "_block_attention", mutated(core, old, new, tmp_path))
    found = errors(kernel.IMPL, arrays, options, gradients, seed)
    assert not all(e <= 4 * numbers.BARS["float32"] * numbers.GRADIENTS for e in found), found


@pytest.mark.parametrize(
    "most, gradients",
    [(2, False), pytest.param(1, True, marks=pytest.mark.full), pytest.param(8, True, marks=pytest.mark.full)],
)
def test_blocks_of_a_step_do_not_matter(most, gradients, monkeypatch, seed):
    args, kwargs = CASE(seed)
    arrays, options = prepare(*args, **kwargs)
    monkeypatch.setattr(kernel, "FAN", most)
    found = errors(kernel.IMPL, arrays, options, gradients, seed)
    assert max(found) <= numbers.BARS["float32"] * (numbers.GRADIENTS if gradients else 1)


@pytest.mark.parametrize(
    "change, sentence",
    [
        ({"dtype": jnp.float16}, "it needs float32 or bfloat16; got float16."),
        ({"bias": True}, "it knows no bias by offset; got rel_pos_bias [2, 5, 5]."),
        ({"b": 0}, "it needs at least one element; got q [0, 9, 10, 2, 8]"),
    ],
)
def test_limits_are_told(change, sentence):
    args, kwargs = _case(9, 10, window=3, **change)(0)
    with pytest.raises(portable.Unavailable) as caught:
        portable.ops.neighborhood_attention(*args, **kwargs, implementation="pallas_tpu")
    assert sentence in str(caught.value)


def test_under_vmap():
    args, kwargs = CASES["plain"](0)
    twice = jax.tree.map(lambda x: jnp.stack([x, x[::-1]]), args)

    def value(*args):
        return portable.ops.neighborhood_attention(*args, **kwargs, implementation="pallas_tpu")[0]

    text = jax.jit(jax.vmap(value)).trace(*twice).lower(lowering_platforms=("tpu",)).as_text()
    assert text.count("tpu_custom_call") >= 1
