"""The bytes that a compiled program moves, from its text and from real compilers."""

import dataclasses

import jax
import jax.numpy as jnp
import pytest

from portable import parity
from portable.models.mamba2.config import Mamba2Config
from portable.parity import loops, traffic

PROGRAM = """HloModule jit_f

%row (table: bf16[1000,64], i: s32[]) -> bf16[1,64] {
  %table = bf16[1000,64]{1,0} parameter(0)
  %i = s32[] parameter(1)
  %zero = s32[] constant(0)
  ROOT %one = bf16[1,64]{1,0} dynamic-slice(%table, %i, %zero), dynamic_slice_sizes={1,64}
}

%write (all: f32[8,64], new: f32[1,64], j: s32[]) -> f32[8,64] {
  %all = f32[8,64]{1,0} parameter(0)
  %new = f32[1,64]{1,0} parameter(1)
  %j = s32[] parameter(2)
  %nought = s32[] constant(0)
  ROOT %put = f32[8,64]{1,0} dynamic-update-slice(%all, %new, %j, %nought)
}

ENTRY %main (w: bf16[1000,64], k: f32[64,64], n: s32[], s: f32[8,64]) -> f32[8,64] {
  %w = bf16[1000,64]{1,0:T(8,128)(2,1)} parameter(0)
  %k = f32[64,64]{1,0:T(8,128)} parameter(1)
  %n = s32[]{:T(128)S(6)} parameter(2)
  %s = f32[8,64]{1,0:T(8,128)} parameter(3)
  %x = bf16[1,64]{1,0:T(2,128)(2,1)S(1)} fusion(%w, %n), kind=kLoop, calls=%row
  %start = (f32[64,64]{1,0:T(8,128)S(1)}, f32[64,64]{1,0:T(8,128)}, u32[]{:S(2)}) copy-start(%k)
  %half = ((f32[64,64]{1,0:T(8,128)}), f32[32,64]{1,0:T(8,128)S(1)}, s32[]{:S(2)}) slice-start(%k)
  %here = f32[64,64]{1,0:T(8,128)S(1)} copy-done(%start)
  %y = f32[1,64]{1,0:T(1,128)} convolution(%x, %here), dim_labels=bf_io->bf
  ROOT %out = f32[8,64]{1,0:T(8,128)} fusion(%s, %y, %n), kind=kLoop, calls=%write
}
"""


def test_arrays_count_where_they_lie_in_memory():
    row, matrix, half, y = 64 * 2, 64 * 64 * 4, 32 * 64 * 4, 64 * 4
    # One row of the table; the fetches; y written, and read where its row of the state is written in place.
    assert traffic.accessed(PROGRAM) == row + matrix + half + y + y + y
    in_memory = PROGRAM.replace("S(1)", "")
    assert traffic.accessed(in_memory) == 3 * row + 3 * matrix + 2 * half + y + y + y


@pytest.mark.parametrize(
    "line, moved",
    [
        ("f32[4,64]{1,0:T(8,128)S(1)} dynamic-slice(%far, %n, %n)", 1024),
        ("f32[4,64]{1,0:T(8,128)} dynamic-slice(%near, %n, %n)", 1024),
        ("f32[4,64]{1,0:T(8,128)} slice(%far)", 2048),
        ("f32[8,64]{1,0:T(8,128)} dynamic-update-slice(%far, %near_row, %n, %n)", 256),
        ("f32[8,64]{1,0:T(8,128)S(1)} dynamic-update-slice(%near, %far_row, %n, %n)", 256),
        ("f32[8,64]{1,0:T(8,128)} dynamic-update-slice(%far, %far_row, %n, %n)", 512),
        ("((f32[8,64]{1,0:T(8,128)}, f32[1,64]{1,0}), f32[8,64]{1,0:S(1)}, u32[]) async-start(%far, %far_row)", 2048),
    ],
)  # fmt: skip
def test_slices_outside_fusions(line, moved):
    program = f"""HloModule m

ENTRY %main (n: s32[]) -> f32[8] {{
  %n = s32[]{{:T(128)S(6)}} parameter(0)
  %far = f32[8,64]{{1,0:T(8,128)}} parameter(1)
  %near = f32[8,64]{{1,0:T(8,128)S(1)}} parameter(2)
  %far_row = f32[1,64]{{1,0:T(1,128)}} parameter(3)
  %near_row = f32[1,64]{{1,0:T(1,128)S(1)}} parameter(4)
  ROOT %r = {line}
}}
"""
    assert traffic.accessed(program) == moved


def test_a_slice_in_a_fusion_in_a_fusion():
    nested = PROGRAM.replace(
        "ENTRY %main",
        """%outer (shelf: bf16[1000,64], i: s32[]) -> bf16[1,64] {
  %shelf = bf16[1000,64]{1,0} parameter(0)
  %place = s32[] parameter(1)
  ROOT %taken = bf16[1,64]{1,0} fusion(%shelf, %place), kind=kLoop, calls=%row
}

ENTRY %main""",
    ).replace("fusion(%w, %n), kind=kLoop, calls=%row", "fusion(%w, %n), kind=kLoop, calls=%outer")
    assert traffic.accessed(nested) == traffic.accessed(PROGRAM)


def test_a_weight_that_a_nested_fusion_only_converts_is_read_whole():
    program = """HloModule m

%widened (w: bf16[1000,64]) -> f32[1000,64] {
  %w = bf16[1000,64]{1,0} parameter(0)
  ROOT %wide = f32[1000,64]{1,0} convert(%w)
}

%product (x: f32[1,64], v: bf16[1000,64]) -> f32[1,1000] {
  %x = f32[1,64]{1,0} parameter(0)
  %v = bf16[1000,64]{1,0} parameter(1)
  %inner = f32[1000,64]{1,0} fusion(%v), kind=kLoop, calls=%widened
  ROOT %y = f32[1,1000]{1,0} convolution(%x, %inner), dim_labels=bf_oi->bf
}

ENTRY %main (a: f32[1,64], b: bf16[1000,64]) -> f32[1,1000] {
  %a = f32[1,64]{1,0:T(1,128)S(1)} parameter(0)
  %b = bf16[1000,64]{1,0:T(8,128)(2,1)} parameter(1)
  ROOT %r = f32[1,1000]{1,0:T(1,128)} fusion(%a, %b), kind=kOutput, calls=%product
}
"""
    assert traffic.accessed(program) == 1000 * 64 * 2 + 1000 * 4


def test_a_loop_moves_as_often_as_it_runs():
    def f(x):
        return jax.lax.scan(lambda c, _: (jnp.sort(c * 2), None), x, None, length=5)[0]

    x = jnp.ones(2**16)
    text = jax.jit(f).lower(x).compile().as_text()
    moved = traffic.accessed(text)
    assert 5 * 2 * x.nbytes <= moved <= 40 * x.nbytes
    once = jax.jit(lambda x: jnp.sort(x * 2)).lower(x).compile().as_text()
    assert moved >= 4 * traffic.accessed(once)


def test_a_loop_without_a_count_is_refused():
    f = jax.jit(lambda x: jax.lax.while_loop(lambda c: c.sum() < 100, lambda c: c * 2, x))
    with pytest.raises(loops.Uncounted, match="how often the loop"):
        traffic.accessed(f.lower(jnp.ones(8)).compile().as_text())


@pytest.mark.aot
@pytest.mark.parametrize("target", ["tpu-v5e", "tpu-v6e"])
def test_a_decode_step_reads_each_weight_once(target):
    if reason := parity.missing("tpu"):
        pytest.skip(reason)
    config = dataclasses.replace(Mamba2Config.mamba2_2_7b(), num_hidden_layers=2).to_dict()
    kwargs = {"kind": "mamba2", "config": config, "work": "decode", "dtype": "bfloat16", "batch": 1}
    [found] = parity.run([parity.Job("decode", target, "portable.parity.programs:model", kwargs)])
    assert found.status == "compiled", found.verdict
    print(f"{target}: {found.accessed_bytes / found.moved_bytes:.3f} of weights and two states")
    # All but the row of the embedding, which the head reads whole, and no more than prefetches that came too soon.
    assert found.moved_bytes <= found.accessed_bytes <= 1.1 * found.moved_bytes
