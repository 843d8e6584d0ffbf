"""Runs that are killed, stopped, or find a full disk or someone else's folder, and go on."""

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from portable import models
from portable.checkpoint.orbax import TrainingCheckpoints
from portable.checks import CheckpointError
from portable.cli import main
from portable.training.log import read_log
from portable.training.progress import Lines
from tests.oracles import ROOT, child, need

need("grain", "matplotlib")

STEPS = 36
SIZES = ["--hidden-size", "32", "--layers", "2", "--state-size", "8", "--head-dim", "16"]
OPTIONS = [
    "--steps",
    str(STEPS),
    "--length",
    "48",
    "--batch-size",
    "4",
    "--accumulate",
    "2",
    "--log-every",
    "1",
]
OPTIONS += ["--checkpoint-every", "3", "--eval-every", "12", "--eval-bytes", "500", "--seed", "5"]


def command(text: Path, out: Path) -> list[str]:
    return ["train", str(text), "--out", str(out), *SIZES, *OPTIONS]


def losses(folder: Path) -> list[tuple]:
    """Everything of the log that must not depend on what happened to the run, exactly."""
    keys = ("step", "loss", "learning_rate", "gradient_norm", "held_out_bits_per_byte")
    lines = (folder / "log.jsonl").read_text().splitlines()
    return [tuple(json.loads(line).get(key) for key in keys) for line in lines]


@pytest.fixture(scope="module")
def text(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("text") / "text.txt"
    words = random.Random(0).choices(["ten", "green", "bottles", "hanging", "on", "the", "wall\n"], k=900)
    path.write_text(" ".join(words))
    return path


@pytest.fixture(scope="module")
def whole(text, tmp_path_factory) -> Path:
    """The folder of a run that nothing happened to."""
    out = tmp_path_factory.mktemp("whole") / "run"
    assert main(command(text, out)) == 0
    return out


@pytest.fixture
def stopped(whole, tmp_path) -> Path:
    """A copy of the run as it was after step 33, its log ahead of its checkpoint."""
    out = tmp_path / "run"
    shutil.copytree(whole, out)
    shutil.rmtree(out / "checkpoints" / str(STEPS))
    shutil.rmtree(out / "model")
    return out


def test_a_run_leaves_a_folder_with_everything(whole):
    assert sorted(p.name for p in whole.iterdir() if p.name != ".lock") == [
        "checkpoints",
        "config.json",
        "log.jsonl",
        "loss.png",
        "model",
    ]
    assert sorted(p.name for p in (whole / "checkpoints").iterdir()) == ["33", "36"]
    log = losses(whole)
    assert [line[0] for line in log] == list(range(1, STEPS + 1))
    assert [line[0] for line in log if line[4] is not None] == [12, 24, 36]
    assert log[-1][1] < log[0][1] - 1  # it learnt
    assert (whole / "loss.png").read_bytes().startswith(b"\x89PNG")


def kill_when(arguments: list[str], moment) -> str:
    """Starts the command in a child and kills it once `moment()` is true; returns what it printed."""
    process = subprocess.Popen(
        [sys.executable, "-m", "portable", *arguments],
        # A killed process can leave half an entry: not in the cache that the other tests share.
        env=os.environ | {"PYTHONPATH": str(ROOT), "JAX_COMPILATION_CACHE_DIR": str(ROOT / ".cache" / "jax-killed")},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    deadline = time.monotonic() + 300
    while process.poll() is None and not moment():
        assert time.monotonic() < deadline
        time.sleep(0.0005)
    process.kill()
    return process.communicate()[0]


def at_step(out: Path, step: int):
    return lambda: len(read_log(out / "log.jsonl")) >= step


def in_a_checkpoint_write(out: Path, after: int):
    def moment() -> bool:
        folder = out / "checkpoints"
        names = os.listdir(folder) if folder.exists() else []
        return any("tmp" in name and int(name.split(".")[0]) > after for name in names)

    return moment


def test_a_killed_run_ends_with_the_same_losses_bit_for_bit(text, whole, tmp_path):
    out = tmp_path / "run"
    step = random.randrange(1, 12)
    print("first kill after step", step)
    kill_when(command(text, out), at_step(out, step))
    kill_when(command(text, out), in_a_checkpoint_write(out, 15))
    done = [r["step"] for r in read_log(out / "log.jsonl")]
    assert 0 < len(done) < STEPS
    assert main(command(text, out)) == 0
    assert losses(out) == losses(whole)


@pytest.mark.full
def test_many_kills(text, whole, tmp_path):
    seed = random.randrange(10**6)
    print("seed", seed)
    rng = random.Random(seed)
    out = tmp_path / "run"
    for _ in range(10):
        done = len(read_log(out / "log.jsonl"))
        after = min(done + rng.randrange(0, 5), STEPS - 2)
        moment = rng.choice([at_step(out, after), in_a_checkpoint_write(out, min(after, STEPS - 6))])
        kill_when(command(text, out), moment)
    assert main(command(text, out)) == 0
    assert losses(out) == losses(whole)


def test_a_finished_run_stays_as_it_is(text, whole, capsys):
    before = losses(whole)
    assert main(command(text, whole)) == 0
    assert "continuing after step 36 of 36" in capsys.readouterr().out
    assert losses(whole) == before


def test_ctrl_c_saves_and_says_how_to_go_on(text, whole, tmp_path, capsys, monkeypatch):
    out, before = tmp_path / "run", signal.getsignal(signal.SIGINT)  # a shell's background job ignores it
    show = Lines.report

    def press(self, report):
        show(self, report)
        if report.step == 8:
            signal.raise_signal(signal.SIGINT)

    with monkeypatch.context() as patch:
        patch.setattr(Lines, "report", press)
        assert main(command(text, out)) == 130
    assert "the same command continues" in capsys.readouterr().out
    assert TrainingCheckpoints(out / "checkpoints").latest == len(losses(out)) < STEPS
    assert (out / "loss.png").exists()
    assert main(command(text, out)) == 0
    assert losses(out) == losses(whole)
    assert signal.getsignal(signal.SIGINT) is before


def test_a_time_limit_stops_with_a_checkpoint(text, tmp_path, capsys):
    out = tmp_path / "run"
    assert main([*command(text, out), "--max-minutes", "0"]) == 0
    assert "out of time after step 1 of 36" in capsys.readouterr().out
    assert TrainingCheckpoints(out / "checkpoints").latest == 1


def test_an_interrupted_checkpoint_is_ignored_with_a_note(text, whole, stopped, capsys):
    draft = stopped / "checkpoints" / "36.orbax-checkpoint-tmp"
    draft.mkdir()
    (draft / "part").write_bytes(b"half an array")
    assert main(command(text, stopped)) == 0
    shown = capsys.readouterr().out
    assert "36.orbax-checkpoint-tmp" in shown
    assert "interrupted while being written; it is ignored" in shown
    assert "continuing after step 33 of 36" in shown
    assert losses(stopped) == losses(whole)


def test_a_damaged_checkpoint_gives_way_to_the_one_before(text, whole, tmp_path, capsys):
    out = tmp_path / "run"
    shutil.copytree(whole, out)
    for path in (out / "checkpoints" / str(STEPS)).rglob("*"):
        if path.is_file() and path.stat().st_size > 10_000:
            os.truncate(path, 1000)
    assert main(command(text, out)) == 0
    shown = capsys.readouterr().out
    assert "cannot be read" in shown
    assert "continuing after step 33" in shown
    assert losses(out) == losses(whole)


def test_a_folder_of_another_run_is_refused_with_what_differs(text, stopped, tmp_path, capsys):
    before = losses(stopped)
    arguments = command(text, stopped)
    arguments[arguments.index("--hidden-size") + 1] = "48"
    assert main([*arguments, "--learning-rate", "0.1"]) == 2
    said = capsys.readouterr().err
    for part in ("hidden_size was 32, is 48", "learning_rate was 0.003, is 0.1", "another --out"):
        assert part in said
    other = tmp_path / "other.txt"
    other.write_text(text.read_text() + "and one more bottle")
    assert main(command(other, stopped)) == 2
    assert "text was" in capsys.readouterr().err
    # Without the configuration, the arrays themselves tell.
    (stopped / "config.json").unlink()
    assert main(arguments) == 2
    said = capsys.readouterr().err
    assert "checkpoint" in said
    assert "params.layers.0" in said
    assert "is float32[2, 64], expected float32[2, 96]" in said
    assert losses(stopped) == before
    filled = tmp_path / "filled"
    filled.mkdir()
    (filled / "thesis.tex").write_text("x")
    assert main(command(text, filled)) == 2
    assert "holds thesis.tex: give a new or empty one" in capsys.readouterr().err


def test_a_run_does_not_go_on_from_other_weights(text, whole, tmp_path, capsys):
    model = models.load(whole / "model")
    model.embed.embedding[...] *= 1.01
    models.save(model, tmp_path / "other")

    def begin(init: Path) -> int:
        return main(["train", str(text), "--out", str(tmp_path / "run"), *OPTIONS, "--init", str(init), "--quiet"])

    assert begin(whole / "model") == 0
    assert begin(whole / "model") == 0
    assert begin(tmp_path / "other") == 2
    assert "initial_weights was" in capsys.readouterr().err


def test_two_processes_do_not_share_a_folder(text, stopped, capsys):
    fcntl = pytest.importorskip("fcntl", reason="needs a system with file locks")
    with (stopped / ".lock").open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        assert main(command(text, stopped)) == 2
    assert "another process is training in" in capsys.readouterr().err


def test_a_full_disk_loses_nothing(text, whole, stopped, tmp_path):
    # A limit on the size of files is met in the middle of a write, as a full disk is.
    code = f"""
import resource
from pathlib import Path
from portable.checks import CheckpointError
from portable.cli import main
hard = resource.getrlimit(resource.RLIMIT_FSIZE)[1]
for limit in (20_000, 2_000):
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, hard))
    print("exit code", main({command(text, stopped)!r}))
resource.setrlimit(resource.RLIMIT_FSIZE, (hard, hard))
print([p.name for p in Path({str(stopped / "checkpoints")!r}).iterdir() if p.name.isdigit()])
"""
    shown = child(code)
    assert shown.count("exit code 2") == 2
    assert shown.splitlines()[-1] == "['33']"
    assert main(command(text, stopped)) == 0
    assert losses(stopped) == losses(whole)


@pytest.mark.parametrize("name", ["with space", "st*r", "qu?", "hash#1", "per%20", "ü"])
def test_a_folder_may_have_any_name_that_orbax_can_write_to(tmp_path, name):
    checkpoints = TrainingCheckpoints(tmp_path / name)
    checkpoints.save(3, {"x": np.arange(4)})
    checkpoints.wait()
    state, step, _ = checkpoints.restore({"x": np.zeros(4, int)})
    assert (state["x"].tolist(), step) == ([0, 1, 2, 3], 3)
    checkpoints.close()


def test_a_folder_name_that_would_lose_every_checkpoint_is_refused(tmp_path):
    with pytest.raises(CheckpointError, match=r"folder with '\[' in its name, got .*: choose another"):
        TrainingCheckpoints(tmp_path / "run [1]")
    assert list(tmp_path.iterdir()) == []


def test_too_little_space_is_seen_before_writing(tmp_path, monkeypatch):
    checkpoints = TrainingCheckpoints(tmp_path / "c")
    checkpoints.save(1, {"x": np.ones(1000, np.float32)})
    checkpoints.wait()
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=3999))
    sentence = "checkpoint of step 2 could not be written .*: the disk is full; the checkpoint of step 1 is complete"
    with pytest.raises(CheckpointError, match=sentence):
        checkpoints.save(2, {"x": np.ones(1000, np.float32)})
    state, step, notes = checkpoints.restore({"x": np.zeros(1000, np.float32)})
    assert (state["x"].sum(), step, notes) == (1000, 1, [])
    checkpoints.close()
