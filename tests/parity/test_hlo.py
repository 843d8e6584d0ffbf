"""Reading compiled programs, against programs whose instructions are known."""

import jax
import jax.numpy as jnp
import pytest

from portable import parity
from portable.parity import hlo

# In the style of each compiler: a loop, a fusion with its inner instructions, tuples, layouts with tiles.
SAMPLE = """HloModule jit_f, is_scheduled=true

%fused (param_0: f32[64,128]) -> f32[64,128] {
  %param_0 = f32[64,128]{1,0} parameter(0)
  ROOT %inside = f32[64,128]{1,0:T(8,128)S(1)} tanh(%param_0)
}

%body (arg: (s32[], bf16[8,16])) -> (s32[], bf16[8,16]) {
  %arg = (s32[], bf16[8,16]{1,0}) parameter(0)
  %gte = bf16[8,16]{1,0} get-tuple-element(%arg), index=1
  %kernel = bf16[8,16]{1,0:T(8,128)(2,1)} custom-call(%gte), custom_call_target="tpu_custom_call"
  ROOT %t = (s32[], bf16[8,16]{1,0}) tuple(%gte, %kernel)
}

ENTRY %main.9 (x.1: f32[64,128]) -> (f32[64,64], pred[64]) {
  %x.1 = f32[64,128]{1,0} parameter(0)
  %f = f32[64,128]{1,0} fusion(%x.1), kind=kLoop, calls=%fused, metadata={op_name="jit(f)/tanh(x)"}
  %dot.1 = f32[64,64]{1,0} dot(%f, %f), lhs_contracting_dims={1}, rhs_contracting_dims={1}
  %sorted = (f32[64,64]{1,0}, s32[64,64]{1,0}) sort(%dot.1, %dot.1), to_apply=%compare
  %w = (s32[], /*index=1*/bf16[8,16]{1,0}) while(%f), condition=%cond, body=%body
  ROOT %r = (f32[64,64]{1,0}, pred[64]{0}) tuple(%dot.1, %dot.1)
}
"""


def test_counts():
    counted = hlo.opcodes(SAMPLE)
    assert counted["dot"] == counted["fusion"] == counted["tanh"] == counted["while"] == counted["sort"] == 1
    assert counted["parameter"] == 3
    assert hlo.custom_calls(SAMPLE) == {"tpu_custom_call": 1}


def test_buffers_leave_out_registers_and_views():
    found = [(b.name, b.dtype, b.shape, b.bytes) for b in hlo.buffers(SAMPLE)]
    assert found == [
        ("f", "f32", (64, 128), 64 * 128 * 4),
        ("sorted", "s32", (64, 64), 64 * 64 * 4),
        ("sorted", "f32", (64, 64), 64 * 64 * 4),
        ("dot.1", "f32", (64, 64), 64 * 64 * 4),
        ("kernel", "bf16", (8, 16), 8 * 16 * 2),
    ]


@pytest.mark.parametrize(
    "dtype, bits", [("pred", 8), ("bf16", 16), ("f8e4m3fn", 8), ("s4", 4), ("c64", 64), ("token", 0)]
)
def test_bits(dtype, bits):
    assert hlo._bits(dtype) == bits


def test_memory_and_buffers_of_a_compiled_program():
    n = 96
    shape = jax.ShapeDtypeStruct((n, n), jnp.float32)
    compiled = parity.compile_for("cpu", lambda a: (a @ a) @ (a @ a).T, shape)
    found = hlo.memory(compiled)
    assert found["argument"] == found["output"] == n * n * 4
    assert found["needed"] == sum(found[k] for k in ("argument", "output", "temp", "generated_code"))
    largest = hlo.buffers(hlo.text(compiled))[0]
    assert largest.bytes == n * n * 4
    assert largest.shape == (n, n)


def test_no_account_of_memory_is_an_error():
    class Silent:
        def memory_analysis(self):
            return None

    with pytest.raises(ValueError, match="no account of memory"):
        hlo.memory(Silent())  # pyright: ignore[reportArgumentType]
