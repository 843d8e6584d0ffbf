"""`benchmarks/memory.py`: what it keeps, and what it shows."""

import json

import pytest

from benchmarks import memory
from portable import parity
from portable.parity import plan
from portable.selection import ops

GIB = 2**30


def result(job, target="tpu-v5e", status="compiled", needed=3 * GIB, **fields):
    known = {"argument_bytes": GIB, "temp_bytes": GIB, "memory_bytes": 4 * GIB} | fields
    return parity.Result(job, target, status, needed_bytes=needed, **known)


def test_record_keeps_the_verdict_and_the_compilers_versions():
    found = memory.record([result("a", opcodes={"dot": 3, "add": 7}, compile_seconds=1.23456)])
    [row] = json.loads(json.dumps(found))["results"]
    assert row["verdict"] == "fits, 1.00 GiB to spare"
    assert (row["fits"], row["spare_bytes"]) == (True, GIB)
    assert row["opcodes"] == {"dot": 3}
    assert row["compile_seconds"] == 1.23
    assert found["versions"]["jax"]


def test_results_of_another_compiler_are_not_kept():
    old = memory.record([result("a"), result("b", needed=1)])
    new = memory.record([result("b", needed=2), result("c")])
    rows = memory.merged(old, new)["results"]
    assert [(r["job"], r["needed_bytes"]) for r in rows] == [("a", 3 * GIB), ("b", 2), ("c", 3 * GIB)]
    old["versions"]["jax"] = "0.1"
    assert [r["job"] for r in memory.merged(old, new)["results"]] == ["b", "c"]
    assert memory.merged({}, new) == new


def test_table(tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "160")
    rows = [
        result("ssd/a/value", argument_bytes=10),
        result("ssd/b/value", argument_bytes=10, status="failed", needed=None, message="LLVM ERROR"),
        result("big/train", status="does not fit", needed=6 * GIB),
        result("big/decode", target="cuda-sm80"),
    ]
    file = tmp_path / "aot.json"
    file.write_text(json.dumps(memory.record(rows)))
    assert memory.main(["--show", "--out", str(file)]) == 0
    shown = capsys.readouterr().out
    assert "1 of 2 compiled" in shown
    assert "6.0 GiB: short by 2.0 GiB" in shown
    assert "3.0 GiB / 1.0 GiB" in shown
    assert "tpu-v5e ssd/b/value: failed: LLVM ERROR" in shown


def test_compiles_and_writes(tmp_path, capsys):
    file = tmp_path / "results" / "aot.json"
    asked = ["--targets", "cpu", "--only", "rms_norm/empty", "--out", str(file)]
    assert memory.main(asked) == 0
    rows = json.loads(file.read_text())["results"]
    assert [(r["job"], r["status"]) for r in rows] == [
        ("rms_norm/empty/gradients", "compiled"),
        ("rms_norm/empty/value", "compiled"),
    ]


@pytest.mark.parametrize(
    "asked, said",
    [
        (["--targets", "tpu-v5e,tpu-v99"], "unknown target tpu-v99; there are: cpu, tpu-v5e"),
        (["--show", "--out", "nowhere.json"], "no results at nowhere.json; run without --show first"),
    ],
)
def test_mistakes(asked, said, capsys):
    with pytest.raises(SystemExit) as stopped:
        memory.main(asked)
    assert stopped.value.code == 2
    assert said in " ".join(capsys.readouterr().err.split())


def test_a_missing_compiler_leaves_the_results_as_they_are(tmp_path, monkeypatch):
    file = tmp_path / "aot.json"
    file.write_text("{}")
    monkeypatch.setattr(parity, "missing", lambda family: f"no {family} here.")
    with pytest.raises(SystemExit, match=r"no tpu here\."):
        memory.main(["--targets", "tpu-v5e", "--out", str(file)])
    assert file.read_text() == "{}"


def test_nothing_of_that_name(tmp_path):
    with pytest.raises(SystemExit, match="no program's name contains 'nonsense'"):
        memory.main(["--targets", "cpu", "--only", "nonsense", "--out", str(tmp_path / "aot.json")])


def test_the_committed_results_cover_the_plan():
    rows = json.loads(memory.RESULTS.read_text())["results"]
    assert [r["verdict"] for r in rows if r["status"] in ("failed", "cannot")] == []
    have = {(r["job"], r["target"]) for r in rows}
    models = {(j.name, j.target): j for j in plan.model_jobs(plan.TARGETS)}
    assert set(models) - have == set()
    assert {(op, t) for op in ops() for t in plan.TARGETS} <= {(j.partition("/")[0], t) for j, t in have}
    for row in rows:
        # A model that cannot be trained on one device is a result; one that cannot be served would be a fault.
        if (row["job"], row["target"]) in models and "/train" not in row["job"]:
            assert row["fits"], row["verdict"]


@pytest.mark.parametrize("n, text", [(0, "0 B"), (1023, "1023 B"), (1536, "1.5 KiB"), (3 * 2**30, "3.0 GiB")])
def test_sizes_read_well(n, text):
    assert memory.size(n) == text
