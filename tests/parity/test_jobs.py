"""Child processes that compile: their answers, and what becomes of those that crash or hang."""

import time

import pytest

from portable import parity
from portable.parity import jobs, targets, worker


def job(build: str, target: str = "cpu", **options) -> parity.Job:
    kwargs = options.pop("kwargs", {})
    return parity.Job(build, target, f"tests.parity.builders:{build}", kwargs, **options)


def test_one_bad_job_is_one_failed_result():
    # A good job before, between and after the bad ones: each must come back, in order, from whichever child.
    names = ["product", "abort", "leave", "odd", "loop", "hang", "wrong_shapes", "no_arrays"]
    names += ["kernel_too_small", "chatter", "absent"]
    todo = [job(name, timeout=4 if name == "hang" else 60) for name in names]
    seen = []
    results = parity.run(todo, on_result=seen.append)
    assert [r.job for r in results] == [j.name for j in todo]
    assert sorted(r.job for r in seen) == sorted(j.name for j in todo)
    said = {r.job: (r.status, r.message) for r in results}
    assert said["product"] == said["loop"] == said["chatter"] == ("compiled", "")
    assert said["abort"] == ("failed", "the compiler ended with signal SIGABRT.")
    assert said["leave"] == ("failed", "the compiler ended with exit code 3.")
    assert said["odd"] == ("failed", "KeyError: 'a mistake that nobody foresaw'")
    assert said["hang"] == ("failed", "no answer after 4 s.")
    assert said["kernel_too_small"] == ("cannot", "scores of this op need at least two rows.")
    assert said["wrong_shapes"][0] == "failed"
    assert said["wrong_shapes"][1].startswith("TypeError: dot_general requires contracting dimensions")
    assert said["no_arrays"] == (
        "failed",
        "ValueError: a program to compile needs at least one array among its arguments; got none.",
    )
    assert said["absent"][0] == "failed"
    assert "has no attribute 'absent'" in said["absent"][1]


def test_memory_of_a_program_known_by_hand():
    n = 64
    [found] = parity.run([job("product", kwargs={"n": n})])
    assert found.argument_bytes == 2 * (n * 2 * n) * 4
    assert found.output_bytes == n * n * 4
    assert found.alias_bytes == 0
    parts = (found.argument_bytes, found.output_bytes, found.temp_bytes, found.code_bytes)
    assert found.needed_bytes == sum(parts)
    assert found.fits is None  # nobody says how much memory this machine lends
    assert found.spare_bytes is None
    assert found.opcodes.get("dot", 0) + sum(found.custom_calls.values()) == 1
    assert found.lower_seconds > 0
    assert found.compile_seconds > 0


def test_donated_argument_is_counted_once():
    n = 128
    [found] = parity.run([job("loop", kwargs={"n": n})])
    assert found.alias_bytes == found.argument_bytes == found.output_bytes == n * n * 4
    assert found.needed_bytes == n * n * 4 + found.temp_bytes + found.code_bytes
    assert found.temp_bytes < n * n * 4


def test_several_children_at_a_time():
    todo = [parity.Job(f"{i}", "cpu", "tests.parity.builders:product", {"n": 8 + i}) for i in range(4)]
    results = parity.run(todo, processes=2)
    assert [r.output_bytes for r in results] == [(8 + i) ** 2 * 4 for i in range(4)]


def test_an_error_in_the_callback_ends_the_children():
    def stop(result):
        raise InterruptedError("enough")

    start = time.monotonic()
    with pytest.raises(InterruptedError, match="enough"):
        parity.run([job("product"), job("hang", timeout=300)], on_result=stop)
    assert time.monotonic() - start < 60


def test_missing_compiler_is_a_sentence(monkeypatch):
    monkeypatch.setattr(targets, "missing", lambda family: f"no {family} here." if family == "tpu" else None)
    results = parity.run([job("product", "tpu-v5e"), job("product")])
    assert (results[0].status, results[0].message) == ("cannot", "no tpu here.")
    assert results[0].verdict == "cannot: no tpu here."
    assert results[1].status == "compiled"


def test_nothing_to_do():
    assert parity.run([]) == []


def test_bad_lists_of_jobs():
    with pytest.raises(ValueError, match=r"'product' 2 times"):
        parity.run([job("product"), job("product")])
    with pytest.raises(ValueError, match="no target called 'tpu-v99'; there are: cpu, device, tpu-v4"):
        parity.run([job("product", "tpu-v99")])


@pytest.mark.parametrize(
    "message, needed",
    [
        (
            "RESOURCE_EXHAUSTED: Ran out of memory on HBM, the total memory required for HLO temporaries "
            "(768.12G) exceeds available HBM (15.75G).",
            int(768.12 * 2**30),
        ),
        (
            "RESOURCE_EXHAUSTED: Ran out of memory in memory space hbm. Used 20.5G of 15.75G hbm. "
            "Exceeded hbm capacity by 4.75G.",
            int(20.5 * 2**30),
        ),
        ("RESOURCE_EXHAUSTED: Ran out of memory in memory space vmem. Used 20M of 16M vmem.", None),
        ("INTERNAL: Mosaic failed to compile TPU kernel", None),
    ],
)
def test_too_big_is_read_from_the_compilers_message(message, needed):
    assert worker.too_big(message) == needed


def test_verdicts():
    gib = 2**30
    result = jobs.Result("j", "t", "compiled", needed_bytes=3 * gib, memory_bytes=4 * gib)
    assert (result.fits, result.spare_bytes, result.verdict) == (True, gib, "fits, 1.00 GiB to spare")
    result = jobs.Result("j", "t", "does not fit", needed_bytes=6 * gib, memory_bytes=4 * gib)
    assert (result.fits, result.spare_bytes) == (False, -2 * gib)
    assert result.verdict == "does not fit, short by 2.00 GiB"
    assert jobs.Result("j", "t", "failed", "why").verdict == "failed: why"


@pytest.mark.parametrize(
    "log, code, said",
    [
        ("noise\n", -11, "the compiler ended with signal SIGSEGV."),
        (
            "",
            -9,
            "the compiler ended with signal SIGKILL, which is how a system that runs out of memory ends a process.",
        ),
        (
            "I0000 00:00 x.cc:3] hello\nF0000 00:00 y.cc:4] Check failed: a == b\n*** SIGABRT ***\n",
            -6,
            "the compiler ended with signal SIGABRT: F0000 00:00 y.cc:4] Check failed: a == b",
        ),
        ("Traceback (most recent call last):\n  File x\nOSError: no\n  more\nI0000 bye\n", 1, "OSError: no"),
    ],
)
def test_last_words(log, code, said):
    assert jobs._last_words(log, code) == said
