"""The matrix: what it holds, how it is shown, kept and compared, and what its command says."""

import html.parser
import json
import re

import pytest

from portable import cli, parity, selection
from portable.parity import page, plan, report, store
from tests.oracles import ROOT

COMMITTED = ROOT / "benchmarks" / "results" / "parity.json"
EVERYWHERE = ("cpu", *plan.ACCELERATORS)  # not what this machine may have beside them
GIB = 2**30
LABELS = {"kind": "op", "name": "ssd", "case": "a", "implementation": "xla", "part": "value", "dtype": "float32"}


def result(job, target="tpu-v5e", status="compiled", **fields):
    known = {"argument_bytes": GIB, "temp_bytes": GIB, "needed_bytes": 3 * GIB, "memory_bytes": 4 * GIB}
    return parity.Result(job, target, status, **({"labels": LABELS} | known | fields))


def test_every_op_and_model_is_in_the_matrix():
    jobs = plan.matrix(EVERYWHERE)
    targets = {j.target for j in jobs}
    assert targets == set(parity.TARGETS) - {"device"}
    assert len([t for t in targets if t.startswith(("tpu", "cuda"))]) == 11
    for op in selection.ops():
        mine = [j for j in jobs if j.labels["name"] == op and j.target == "tpu-v5p"]
        forms = {n for n in selection.implementations(op) if n.startswith("xla")}
        assert forms <= {j.labels["implementation"] for j in mine}
        assert {j.labels["part"] for j in mine} == {"value", "gradients"}
        assert {j.labels["dtype"] for j in mine} == {"float32", "bfloat16"}
        assert len({j.labels["case"] for j in mine}) <= 3
    works = {(j.labels["name"], j.labels["part"], j.labels["case"]) for j in jobs if j.labels["kind"] == "model"}
    assert ("mamba2_2_7b", "train", "4x2048") in works
    assert ("mamba2_130m", "decode", "64") in works
    assert ("nat_mini", "forward", "1x224x224") in works
    assert ("digits_dinat", "train", "128x8x8") in works
    tasks = {j.target: j.task for j in jobs if j.labels["implementation"] == "xla" and j.labels["kind"] == "op"}
    assert (tasks["cpu"], tasks["tpu-v4"], tasks["rocm-gfx942"]) == ("run", "compile", "lower")
    assert {j.task for j in jobs if j.labels["implementation"] == "pallas_tpu" and j.target == "cpu"} == {"interpret"}
    assert not [j for j in jobs if j.labels["implementation"] == "pallas_tpu" and j.target.startswith("cuda")]


def test_a_part_of_the_matrix():
    jobs = plan.matrix(["tpu-v6e"], ops=["ssd"])
    assert {(j.target, j.labels["name"]) for j in jobs} == {("tpu-v6e", "ssd")}
    jobs = plan.matrix(["tpu-v4"], models=["mamba2_130m"])
    assert {(j.target, j.labels["name"]) for j in jobs} == {("tpu-v4", "mamba2_130m")}
    full, quick = ({(j.name, j.target) for j in plan.matrix(quick=q)} for q in (False, True))
    assert quick < full


def test_record_keeps_the_verdict_and_the_compilers_versions():
    found = report.record([result("a", opcodes={"dot": 3, "add": 7}, compile_seconds=1.23456)])
    [row] = json.loads(json.dumps(found))["results"]
    assert row["verdict"] == "fits, 1.00 GiB to spare"
    assert (row["fits"], row["spare_bytes"]) == (True, GIB)
    assert row["opcodes"] == {"dot": 3}
    assert row["compile_seconds"] == 1.23
    assert found["versions"]["jax"]


def test_results_of_another_compiler_are_not_kept():
    old = report.record([result("a"), result("b", needed_bytes=1)])
    new = report.record([result("b", needed_bytes=2), result("c")])
    rows = report.merged(old, new)["results"]
    assert [(r["job"], r["needed_bytes"]) for r in rows] == [("a", 3 * GIB), ("b", 2), ("c", 3 * GIB)]
    old["versions"] = old["versions"] | {"jax": "0.1"}
    assert [r["job"] for r in report.merged(old, new)["results"]] == ["b", "c"]


def test_what_got_worse_is_told():
    old = report.record([result("a"), result("b"), result("c"), result("d", "cuda-sm80", "failed", message="x")])
    new = report.record(
        [
            result("a", status="failed", message="LLVM ERROR"),
            result("b", status="does not fit", needed_bytes=6 * GIB),
            result("c"),
            result("d", "cuda-sm80", "failed", message="x"),
        ]
    )
    assert report.worse(old, new) == [
        "tpu-v5e a: was compiled, now failed: LLVM ERROR.",
        "tpu-v5e b: fitted, now does not fit, short by 2.00 GiB.",
    ]


class Shape(html.parser.HTMLParser):
    """Collects a page's tags and its data."""

    def __init__(self):
        super().__init__()
        self.tags, self.inside, self.data = [], None, ""

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.inside = dict(attrs).get("id")
        assert not dict(attrs).get("src"), "the page must need nothing else"

    def handle_data(self, data):
        if self.inside == "data":
            self.data += data


def test_page_holds_the_results_and_needs_nothing_else():
    found = report.record([result("a", message="</script><b>"), result("b", "cuda-sm80")])
    text = page.page(found)
    shape = Shape()
    shape.feed(text)
    assert json.loads(shape.data)["results"][0]["message"] == "</script><b>"
    assert json.loads(shape.data)["targets"] == ["tpu-v5e", "cuda-sm80"]
    assert {"table", "select", "style", "script"} <= set(shape.tags)
    assert not re.search(r"https?://", text)


def test_tables(capsys, monkeypatch):
    from rich.console import Console

    other = LABELS | {"kind": "model", "name": "big", "part": "train", "case": "4x8"}
    ran = {"error": 2.4e-7, "ulps": 2.0, "memory_bytes": None, "needed_bytes": None}
    found = report.record(
        [
            result("a"),
            result("b", status="failed", message="LLVM ERROR"),
            result("c", "cpu", "ran", **ran),
            result("d", "cuda-sm80", "cannot", message="too small."),
            result("t", status="does not fit", needed_bytes=6 * GIB, labels=other),
            result("t", "cuda-sm80", labels=other),
        ]
    )
    for table in report.tables(found):
        Console(width=140).print(table)
    shown = capsys.readouterr().out
    for text in ("1 of 2 failed", "2.0 ulp", "cannot", "2.0 GiB short", "1.0 GiB free"):
        assert text in shown
        assert text in report.markdown(found) or text == "1 of 2 failed"
    assert report.problems(found) == [("failed", "tpu-v5e b: LLVM ERROR"), ("cannot", "too small.")]


def test_store_survives_what_happens_to_files(tmp_path):
    kept = store.Store(tmp_path / "new")
    assert kept.get("a") is None
    kept.put("a", {"x": 1})
    assert store.Store(tmp_path / "new").get("a") == {"x": 1}
    (tmp_path / "new" / "a.json").write_text('{"x": 1')
    assert kept.get("a") is None
    (tmp_path / "new" / "a.json").write_bytes(b"\xff\xfe")
    assert kept.get("a") is None
    blocked = tmp_path / "file"
    blocked.write_text("")
    with pytest.warns(UserWarning, match="results cannot be kept in .*file.*name another folder with --cache"):
        store.Store(blocked).put("a", {})
    store.Store(None).put("a", {})
    assert store.Store(None).get("a") is None


def test_a_second_run_compiles_nothing(tmp_path, monkeypatch):
    jobs = plan.op_jobs(["cpu"], ops=["rms_norm"])[:1]
    first = parity.run(jobs, store=store.Store(tmp_path))
    assert first[0].status == "ran"
    with monkeypatch.context() as context:
        context.setattr(parity.jobs._Worker, "run", None)
        assert parity.run(jobs, store=store.Store(tmp_path)) == first
    for file in tmp_path.glob("*.json"):  # of another program, or another version of this one
        file.write_text('{"job": "x", "other": 1, "status": "compiled"}')
    [again] = parity.run(jobs, store=store.Store(tmp_path))
    assert (again.status, again.error) == ("ran", first[0].error)


@pytest.mark.parametrize(
    "asked, sentence",
    [
        (["--target", "tpu-v99"], "there is no target called 'tpu-v99'; there are: cpu, device"),
        (["--op", "sdd"], "there is no op called 'sdd'; there are: attention, block_sparse_attention, causal_conv1d"),
        (["--model", "gpt"], "there is no model called 'gpt'; there are: mamba2"),
        (["--show"], "--show needs results"),
        (["--show", "--json", "BAD"], "does not hold results of `portable parity`"),
        (["--against", "no.json"], "--against needs results to compare with; there are none at no.json"),
        (["--op", "ssd", "--processes", "0"], "--processes must be at least 1; got 0"),
        (["--op", "ssd", "--json", "no/such/folder.json"], "no/such/folder.json cannot be written; name a file"),
    ],
)
def test_mistakes(asked, sentence, tmp_path, capsys):
    bad = tmp_path / "bad.json"
    for wrong in ('{"results": [{"job": 1}]}', '{"results": [{"labels": {}}]}', '{"results": []}'):
        bad.write_text(wrong)
        assert cli.main(["parity", *[str(bad) if a == "BAD" else a for a in asked]]) == 2
        assert sentence in " ".join(capsys.readouterr().err.split())


def test_command_runs_writes_and_shows(tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("PORTABLE_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("COLUMNS", "140")
    file, web = tmp_path / "p.json", tmp_path / "p.html"
    asked = ["parity", "--op", "rms_norm", "--target", "cpu", "--target", "rocm-gfx942", "--json", str(file)]
    assert cli.main([*asked, "--html", str(web)]) == 0
    shown = capsys.readouterr().out
    assert "ulp" in shown
    assert "lowered" in shown
    assert "rms_norm/bfloat16/xla/value" in web.read_text()
    rows = json.loads(file.read_text())["results"]
    assert {r["status"] for r in rows} == {"ran", "lowered"}
    assert all(r["ulps"] < 20 for r in rows if r["status"] == "ran")
    # A cell that was green and is not any more is an error only where asked for.
    rows[0]["status"] = "failed"
    bad = {"made": "", "versions": store.versions(), "results": rows}
    file.write_text(json.dumps(bad))
    assert cli.main(["parity", "--show", "--json", str(file)]) == 1
    assert cli.main([*asked, "--fail-on", "worse"]) == 0
    kept = json.loads(file.read_text())
    broken = {**kept, "results": [{**r, "status": "failed"} for r in kept["results"]]}
    monkeypatch.setattr(report, "record", lambda results: broken)
    for _ in range(2):  # the file stays, so that a second run finds the same
        assert cli.main([*asked, "--fail-on", "worse"]) == 1
        assert "is left as it was" in capsys.readouterr().out
        assert json.loads(file.read_text()) == kept
    other = tmp_path / "other.json"
    assert cli.main([*asked[:-1], str(other), "--against", str(file), "--fail-on", "worse"]) == 1
    assert not other.exists()


def test_on_a_machine_with_an_accelerator_the_numbers_run_there(monkeypatch):
    jobs = plan.matrix(["device"], ops=["rms_norm"])
    assert {r.message for r in parity.run(jobs)} == {"this machine has no accelerator that JAX sees."}
    monkeypatch.setattr(plan.targets, "accelerator", lambda: "cuda")  # the child finds this machine's CPU in its place
    assert {j.labels["implementation"] for j in plan.matrix(["device"], ops=["ssd"])} >= {"xla_chunks", "triton"}
    assert {j.task for j in plan.matrix(["device"], ops=["ssd"])} == {"run"}
    assert "device" in {j.target for j in plan.matrix(ops=["rms_norm"])}
    found = parity.run(plan.matrix(["device"], ops=["rms_norm"]), processes=2)
    assert {r.status for r in found} == {"ran"}
    assert max(r.ulps for r in found) < 20


def test_a_compiler_that_is_not_installed_is_told(tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("PORTABLE_CACHE", str(tmp_path))
    monkeypatch.setattr(parity.jobs.targets, "missing", lambda family: "it needs the package libtpu: pip install it.")
    assert cli.main(["parity", "--op", "rms_norm", "--target", "tpu-v5e"]) == 0
    assert "cannot: it needs the package libtpu: pip install it." in capsys.readouterr().out


def test_the_committed_results_cover_the_plan():
    found = json.loads(COMMITTED.read_text())
    rows = {(r["job"], r["target"]): r for r in found["results"]}
    assert {(j.name, j.target) for j in plan.matrix(EVERYWHERE)} == set(rows)
    assert not [r["verdict"] for r in rows.values() if r["status"] == "failed"]
    xla = [r for r in rows.values() if r["labels"]["kind"] == "op" and r["labels"]["implementation"] == "xla"]
    assert all(r["status"] == "compiled" for r in xla if r["target"].startswith(("tpu", "cuda")))
