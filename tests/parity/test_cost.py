"""The estimate from a TPU's compiled program, and the roofline from the traced one."""

import jax
import jax.numpy as jnp
import pytest

import portable
from portable import parity
from portable.parity import cost, programs, roofline

LOOP = """HloModule jit_f

%cond (p: (s32[], f32[8])) -> pred[] {
  %p = (s32[], f32[8]) parameter(0)
  %bound = s32[]{:T(128)} constant(24)
  %i = s32[]{:T(128)} get-tuple-element(%p), index=0
  ROOT %lt = pred[] compare(%i, %bound), direction=LT
}

%body (q: (s32[], f32[8])) -> (s32[], f32[8]) {
  %q = (s32[], f32[8]) parameter(0)
  %j = s32[]{:T(128)} get-tuple-element(%q), index=0
  %one = s32[]{:T(128)} constant(1)
  %next = s32[]{:T(128)} add(%j, %one)
  %x = f32[8]{0} get-tuple-element(%q), index=1
  %y = f32[8]{0} fusion(%x), kind=kLoop, calls=%f, metadata={op_name="mul"}, backend_config={"estimated_cycles":"100"}
  %other = s32[]{:T(128)} constant(3)
  ROOT %out = (s32[], f32[8]) tuple(%next, %y)
}

%f (z: f32[8]) -> f32[8] {
  %z = f32[8]{0} parameter(0)
  ROOT %m = f32[8]{0} multiply(%z, %z)
}

ENTRY %main (a: f32[8]) -> f32[8] {
  %a = f32[8]{0} parameter(0)
  %zero = s32[]{:T(128)} constant(0)
  %b = f32[8]{0} fusion(%a), kind=kLoop, calls=%f, metadata={op_name="mul"}, backend_config={"estimated_cycles":"7"}
  %t = (s32[], f32[8]) tuple(%zero, %b)
  %w = (s32[], f32[8]) while(%t), condition=%cond, body=%body
  ROOT %r = f32[8]{0} get-tuple-element(%w), index=1
}
"""


# The condition as a fusion, which a compiler may make of it: alone, and joined with another reason to stop.
FUSED = LOOP.replace(
    "  ROOT %lt = pred[] compare(%i, %bound), direction=LT",
    "  ROOT %lt = pred[] fusion(%i, %bound), kind=kLoop, calls=%test",
).replace(
    "%body (q",
    """%test (m: s32[], n: s32[]) -> pred[] {
  %m = s32[]{:T(128)} parameter(0)
  %n = s32[]{:T(128)} parameter(1)
  ROOT %less = pred[] compare(%m, %n), direction=LT
}

%body (q""",
)
EARLIER = FUSED.replace(
    "  ROOT %less = pred[] compare(%m, %n), direction=LT",
    "  %less = pred[] compare(%m, %n), direction=LT\n  ROOT %both = pred[] and(%less, %less)",
)


def test_a_fused_condition():
    assert cost.cycles(FUSED) == cost.cycles(LOOP)
    with pytest.raises(cost.Uncounted, match="how often the loop w runs"):
        cost.cycles(EARLIER)


def test_a_loop_counts_as_often_as_it_runs():
    assert cost.cycles(LOOP) == 7 + 24 * 100
    assert cost.breakdown(LOOP) == {"mul": 2407}
    assert cost.cycles(LOOP.replace("%zero = s32[]{:T(128)} constant(0)", "%zero = s32[]{:T(128)} constant(4)")) == 2007
    target = parity.TARGETS["tpu-v5e"]
    assert cost.seconds(target, LOOP) == pytest.approx(2407 / 1.5e9)
    assert cost.seconds(parity.TARGETS["cuda-sm90"], LOOP) is None


@pytest.mark.parametrize(
    "old, new",
    [
        ("direction=LT", "direction=NE"),
        ("%next = s32[]{:T(128)} add(%j, %one)", "%next = s32[]{:T(128)} add(%other, %one)"),
        ("%bound = s32[]{:T(128)} constant(24)", "%bound = s32[]{:T(128)} copy(%i)"),
        ("%one = s32[]{:T(128)} constant(1)", "%one = s32[]{:T(128)} constant(2)"),
        ("%next = s32[]{:T(128)} add(%j, %one)", "%next = s32[]{:T(128)} multiply(%j, %one)"),
        ("%zero = s32[]{:T(128)} constant(0)", "%zero = s32[]{:T(128)} convert(%a)"),
    ],
)
def test_a_loop_whose_length_is_not_found_is_refused(old, new):
    assert old in LOOP
    with pytest.raises(cost.Uncounted, match="how often the loop w runs"):
        cost.cycles(LOOP.replace(old, new))


def test_a_kernel_without_an_estimate_is_named():
    line = '  ROOT %m = f32[8]{0} custom-call(%z), custom_call_target="tpu_custom_call"'
    text = LOOP.replace("  ROOT %m = f32[8]{0} multiply(%z, %z)", line)
    with pytest.raises(cost.Uncounted, match="a Pallas kernel"):
        cost.cycles(text)


def test_roofline_counts_products_as_often_as_they_run():
    target = parity.TARGETS["tpu-v5e"]
    x = jax.ShapeDtypeStruct((64, 64), jnp.bfloat16)

    def f(x):
        return jax.lax.scan(lambda c, _: (c @ x, None), x, None, length=5)[0]

    found = roofline.roofline(target, jax.jit(f), x)
    assert found.flops == {"bfloat16": 5 * 2 * 64**3}
    assert found.bytes == 2 * 64 * 64 * 2
    assert found.seconds == pytest.approx(max(5 * 2 * 64**3 / 197e12, found.bytes / 819e9))
    assert roofline.roofline(parity.TARGETS["cpu"], f, x).seconds is None


def test_roofline_of_an_op_is_that_of_its_default_form():
    h, p, n, t, q = 4, 16, 16, 512, 128
    shapes = ((1, t, h, p), (1, t, h), (h,), (1, t, 1, n), (1, t, 1, n))
    args = [jax.ShapeDtypeStruct(s, jnp.float32) for s in shapes]
    target, found = parity.TARGETS["tpu-v5e"], []
    for name in (None, "xla_chunks"):
        work = roofline.roofline(target, lambda *a, n=name: portable.ops.ssd(*a, implementation=n), *args)
        found.append(work.flops)
    assert found[0] == found[1]
    # Scores, scores times values, the state's update and its reading, for every chunk.
    exact = t / q * (2 * q * q * n + h * (2 * q * q * p + 2 * q * p * n + 2 * q * p * n))
    assert found[0] == {"float32": pytest.approx(exact, rel=0.01)}


def test_gradients_of_every_op_have_a_roofline():
    program = programs.op("ssd", "heads_of_64", gradients=True)
    assert sum(roofline.roofline(parity.TARGETS["cuda-sm90"], program.fn, *program.args).flops.values()) > 0


@pytest.mark.parametrize("name", [None, "xla_small_tiles", "xla_large_tiles", "xla_ragged"])
def test_roofline_of_products_of_groups_is_that_of_their_rows(name):
    program = programs.op("grouped_matmul", "plain", gradients=True, implementation=name)
    work = roofline.roofline(parity.TARGETS["cuda-sm90"], program.fn, *program.args)
    assert work.flops == {"float32": 3 * 2 * 57 * 16 * 24}


def test_a_while_loop_with_products_is_refused():
    def f(x):
        return jax.lax.while_loop(lambda c: c[0, 0] < 9, lambda c: c @ c, x)

    with pytest.raises(ValueError, match="how often a while loop with matrix products runs is not known"):
        roofline.roofline(parity.TARGETS["tpu-v5e"], f, jnp.ones((4, 4)))


def test_estimate_of_a_function_without_a_compiler_says_what_is_missing(monkeypatch):
    monkeypatch.setattr(parity.jobs.targets, "missing", lambda family: "install it.")
    found = parity.estimate(lambda x: x @ x, jnp.ones((64, 64)), target="tpu-v5e")
    assert (found.status, found.message) == ("cannot", "install it.")
    assert found.flops == 2 * 64**3
    with pytest.raises(ValueError, match="the target must be a TPU or a CUDA device; got 'cpu'"):
        parity.estimate(lambda x: x, jnp.ones(2), target="cpu")


@pytest.mark.aot
def test_estimate_of_a_function():
    if reason := parity.missing("tpu"):
        pytest.skip(reason)
    found = parity.estimate(lambda x: x @ x, jnp.ones((2048, 2048), jnp.bfloat16), target="tpu-v5e")
    assert found.status == "compiled"
    assert 0.2 < found.fraction <= 1.5
    assert found.roofline_seconds == pytest.approx(2 * 2048**3 / 197e12)


@pytest.mark.aot
def test_estimate_of_a_triton_kernel():
    if reason := parity.missing("cuda"):
        pytest.skip(reason)
    for package in ("triton", "jax_triton"):
        pytest.importorskip(package, reason="pip install 'portable-jax[aot]'")
    args, kwargs = programs.cases("ssd")["heads_of_64_bfloat16"](0)
    kernel = parity.estimate(
        lambda *a: portable.ops.ssd(*a, **kwargs, implementation="triton"), *args, target="cuda-sm90"
    )
    assert kernel.status == "compiled", kernel.verdict
    assert any("triton" in name for name in kernel.custom_calls)
