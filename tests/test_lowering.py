"""Every op and model, compiled ahead of time for accelerators that this machine lacks.

Compilers need no device. One that is not installed is reported as skipped, with the command that installs it.
The quick tier compiles the small cases for one TPU and one GPU; `-m full` every target and size. What is the same
program by the same compiler is not compiled again, neither here nor in the matrix of `.ci/run`.
"""

import math

import jax
import jax.numpy as jnp
import pytest

import portable
from portable import parity
from portable.parity import hlo, plan, programs
from portable.parity.store import Store
from portable.selection import ops
from tests.oracles import ROOT

QUICK_TARGETS = ("tpu-v6e", "cuda-sm90")
OTHERS = [t for t in plan.ACCELERATORS if t not in QUICK_TARGETS and parity.TARGETS[t].family != "rocm"]
BOTH_TIERS = [*QUICK_TARGETS, *(pytest.param(t, marks=pytest.mark.full) for t in OTHERS)]


def compiled(jobs: list[parity.Job]) -> dict[str, parity.Result]:
    """Compiles jobs for one target; fails with every program that its compiler rejects."""
    [family] = {parity.TARGETS[j.target].family for j in jobs}
    if reason := parity.missing(family):
        pytest.skip(reason)
    results = parity.run(jobs, store=Store(ROOT / ".cache" / "parity"))
    bad = [f"{r.job}: {r.verdict}" for r in results if r.status == "failed"]
    assert not bad, "\n".join(bad)
    return {r.job: r for r in results}


@pytest.mark.aot
@pytest.mark.parametrize("target", BOTH_TIERS)
def test_small_cases_of_every_op(target):
    found = compiled(plan.op_jobs([target], sizes=False, values=False))
    assert {r.labels["name"] for r in found.values() if r.status == "compiled"} == set(ops())
    for result in found.values():
        # Only a form or a kernel that is not for the case may refuse, in a sentence.
        assert result.fits or (result.status == "cannot" and "cannot take this call" in result.message), result.job


@pytest.mark.aot
@pytest.mark.full
@pytest.mark.parametrize("target", [*QUICK_TARGETS, *OTHERS])
def test_every_op_at_the_sizes_of_published_models(target):
    small = {j.name for j in plan.op_jobs([target], sizes=False)}
    jobs = [j for j in plan.op_jobs([target]) if j.name not in small]
    for name, result in compiled(jobs).items():
        if result.status == "cannot":
            continue
        assert result.fits, name
        # A few float32 arrays of the size of bf16 arguments; for ssd also the scores inside the chunks, each
        # twice as large as x. A state for each position would be 128 times as large.
        assert result.temp_bytes <= 12 * result.argument_bytes, name


def ssd_gradients(t: int, chunk_size: int, implementation: str) -> programs.Program:
    h, p, n = 8, 16, 16
    shapes = ((1, t, h, p), (1, t, h), (h,), (1, t, 1, n), (1, t, 1, n))
    floats = [jax.ShapeDtypeStruct(s, jnp.float32) for s in shapes]

    def ssd(*args):
        return portable.ops.ssd(*args, chunk_size=chunk_size, implementation=implementation)

    return programs.with_gradients(ssd, *floats)


def test_ssd_on_a_cpu_holds_the_scores_of_one_chunk_only():
    t, h, chunk_size = 8192, 8, 256
    program = ssd_gradients(t, chunk_size, "xla_scan")
    done = parity.compile_for("cpu", program.fn, *program.args)
    x, *_ = jax.tree.leaves(program.args)
    largest = hlo.buffers(hlo.text(done))[0]
    # Scores of the whole sequence, [t, chunk_size] for each head, would be 16 times as large as x.
    assert largest.bytes <= 4 * math.prod(x.shape), largest
    memory = hlo.memory(done)
    assert memory["temp"] <= 2.5 * memory["argument"] + 4 * chunk_size**2 * h * 4


@pytest.mark.parametrize("implementation", ["xla_scan", "xla_chunks"])
def test_memory_of_ssd_grows_with_the_length_and_not_with_its_square(implementation):
    temp = []
    for t in (2048, 8192):
        program = ssd_gradients(t, 64, implementation)
        done = parity.compile_for("cpu", program.fn, *program.args)
        temp.append(hlo.memory(done)["temp"])
        assert all(b.shape.count(t) <= 1 for b in hlo.buffers(hlo.text(done)))
    assert temp[1] <= 4.2 * temp[0]


@pytest.mark.aot
@pytest.mark.parametrize("target", BOTH_TIERS)
def test_mamba2_130m(target):
    work = [("forward", 1, 2048), ("decode", 1, 1)]
    found = compiled(plan.model_jobs([target], models=plan.MODELS[:1], work=work))
    assert [r.status for r in found.values()] == ["compiled"] * 2
    assert all(r.fits for r in found.values())
    weights = 130e6 * 4
    forward, decode = found.values()
    assert forward.argument_bytes == pytest.approx(weights, rel=0.05)
    # Beside the logits and the weights, room for the arrays of a layer or two, not of all.
    assert forward.temp_bytes <= 2 * forward.output_bytes
    # A step reads the weights where they are, fetching a layer or two (3 % each) ahead; a copy of the embedding
    # alone would be 30 %.
    assert decode.temp_bytes <= 0.06 * weights
    # The state is donated: it is updated in place.
    state = decode.argument_bytes - forward.argument_bytes
    assert decode.alias_bytes >= 0.99 * state


@pytest.mark.aot
@pytest.mark.full
@pytest.mark.parametrize("target", plan.MODEL_TARGETS)
def test_every_work_of_every_model(target):
    jobs = plan.model_jobs([target])
    found = compiled(jobs)
    assert len(found) == sum(len(plan.IMAGE_WORK.get(config, plan.WORK)) for _, config, _ in plan.MODELS)
    for job in jobs:
        result = found[job.name]
        if job.kwargs["work"] != "train":
            assert result.fits, result.verdict
        assert result.spare_bytes is not None
