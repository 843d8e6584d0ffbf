"""The command line: help, examples that parse, and mistakes told in one sentence."""

import errno
import importlib.machinery
import json
import os
import re
import shlex
import subprocess
import sys
import types

import numpy as np
import pytest

from portable import cli, reports
from portable.checks import CheckpointError, DataError
from tests.oracles import ROOT


@pytest.fixture
def command(monkeypatch):
    """Adds a command `broken` whose run calls the function given."""

    def add(run):
        module = types.ModuleType("portable.commands.broken")
        module.__spec__ = importlib.machinery.ModuleSpec(module.__name__, None)
        module.configure, module.run = lambda parser: None, run
        monkeypatch.setitem(sys.modules, module.__name__, module)
        monkeypatch.setitem(cli.COMMANDS, "broken", "a command that fails")

    return add


def test_help_lists_every_command(capsys):
    assert cli.main([]) == 0
    listed = capsys.readouterr().out
    for name, line in cli.offered().items():
        assert re.search(rf"^ +{name} +{line}", listed, re.MULTILINE)


@pytest.mark.parametrize("name", cli.offered())
def test_every_example_in_help_parses(name, capsys):
    with pytest.raises(SystemExit) as stop:
        cli.main([name, "--help"])
    assert stop.value.code == 0
    lines = re.findall(r"(?m)^  (?:[A-Z_]+=\S+ )?portable (.*)$", capsys.readouterr().out.split("examples:")[1])
    assert lines
    for line in lines:
        assert cli.parser(name).parse_args(shlex.split(line, comments=True)).command == name


def _raise(error):
    def run(args):
        raise error

    return run


@pytest.mark.parametrize(
    "error, sentence",
    [
        (CheckpointError("model: tensor w must be [2]; got [3]."), "model: tensor w must be [2]; got [3]."),
        (DataError("no text in a.txt."), "no text in a.txt."),
        (
            FileNotFoundError(errno.ENOENT, "No such file or directory", "a.txt"),
            "a.txt: no such file or directory.",
        ),
        (PermissionError(errno.EACCES, "Permission denied", "a.txt"), "a.txt: permission denied."),
        (IsADirectoryError(errno.EISDIR, "Is a directory", "a"), "a: is a directory."),
        (OSError(errno.ENOSPC, "No space left on device"), "no space left on device."),
        (ModuleNotFoundError("No module named 'grain'", name="grain"), "pip install 'portable-jax[train]'"),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, Exception) else "",
)
def test_a_users_mistake_is_one_sentence(command, capsys, monkeypatch, error, sentence):
    monkeypatch.setattr(cli, "_requirements", lambda: ["jax>=0.10", 'grain; extra == "train"'])
    command(_raise(error))
    assert cli.main(["broken"]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("portable: ")
    assert sentence in err
    assert err.count("\n") == 1


def test_json_and_text_that_cannot_be_read(command, capsys, tmp_path):
    file = tmp_path / "config.json"
    file.write_bytes(b"{nonsense")
    command(lambda args: json.loads(file.read_text()))
    assert cli.main(["broken"]) == 2
    assert "must be JSON" in capsys.readouterr().err
    file.write_bytes(b"\xff\xfe\xff")
    command(lambda args: file.read_text(encoding="utf-8"))
    assert cli.main(["broken"]) == 2
    assert "must be UTF-8 text" in capsys.readouterr().err


def test_a_check_of_an_op_is_a_users_mistake_but_a_bug_is_not(command, capsys):
    from portable import ops

    command(lambda args: ops.rms_norm(np.ones([2, 4], np.int32), np.ones([4], np.float32)))
    assert cli.main(["broken"]) == 2
    assert "rms_norm" in capsys.readouterr().err
    command(lambda args: np.ones(3).reshape(2, 2) and None)
    with pytest.raises(ValueError, match="reshape"):
        cli.main(["broken"])
    command(lambda args: reports.explain("ssd", 1))
    with pytest.raises(TypeError, match="missing 4 required"):
        cli.main(["broken"])
    command(_raise(KeyError("bug")))
    with pytest.raises(KeyError):
        cli.main(["broken"])


def test_too_little_memory_is_said(command, capsys):
    command(_raise(MemoryError("Unable to allocate 373. GiB")))
    assert cli.main(["broken"]) == 2
    assert "not enough memory for this: Unable to allocate 373. GiB" in capsys.readouterr().err


def test_the_demo_refuses_a_text_of_a_few_bytes_before_it_writes(tmp_path, capsys):
    (tmp_path / "s.txt").write_text("short")
    assert cli.main(["demo", str(tmp_path / "s.txt"), "--out", str(tmp_path / "run")]) == 2
    out, err = capsys.readouterr()
    assert "too little text to learn from: 5 bytes; give at least 2048" in err
    assert not out
    assert not (tmp_path / "run").exists()


def test_traceback_on_request(command, capsys, monkeypatch):
    monkeypatch.setenv("PORTABLE_TRACEBACK", "1")
    command(_raise(DataError("no text.")))
    assert cli.main(["broken"]) == 2
    assert "Traceback" in capsys.readouterr().err


def test_interrupt(command, capsys):
    command(_raise(KeyboardInterrupt()))
    assert cli.main(["broken"]) == 130
    assert "stopped" in capsys.readouterr().err


def test_warnings_are_sentences(command, capsys):
    import warnings

    def run(args):
        warnings.warn("2 tensors hold NaN: a, b.", stacklevel=1)
        return 0

    command(run)
    with warnings.catch_warnings():
        warnings.simplefilter("default")
        assert cli.main(["broken"]) == 0
    assert capsys.readouterr().err == "portable: 2 tensors hold NaN: a, b.\n"


@pytest.mark.parametrize(
    "line, words",
    [
        ("nonsense", ["no command 'nonsense'", "info"]),
        ("explain sssd", ["no op called 'sssd'", "ssd"]),
        ("explain ssd --case nothing", ["no case called 'nothing'", "plain"]),
        ("explain ssd --implementation nothing", ["no implementation called 'nothing'", "reference"]),
        ("explain --list", ["one op"]),
        ("info --nothing", ["--nothing", "portable info --help"]),
    ],
)
def test_wrong_arguments(line, words, capsys):
    assert cli.main(line.split()) == 2
    err = capsys.readouterr().err
    assert err.count("\n") == 1
    assert all(word in err for word in words)


def test_explain_says_every_platform(capsys):
    assert cli.main(["explain"]) == 0
    text = capsys.readouterr().out
    for op in ("ssd", "causal_conv1d", "rms_norm"):
        assert f"{op} (" in text
    assert text.count("This process runs here") >= 3
    assert cli.main(["explain", "ssd", "--case", "mamba2-130m", "--json"]) == 0
    ((title, rows),) = json.loads(capsys.readouterr().out).items()
    assert "float32[1,2048,24,64]" in title
    assert {row[0] for row in rows} >= {"cpu", "cuda", "tpu"}
    assert cli.main(["explain", "ssd", "--list"]) == 0
    assert "mamba2-2.7b" in capsys.readouterr().out


def test_info_is_readable_by_programs(capsys):
    import jax

    assert cli.main(["info", "--json"]) == 0
    rows = {row[0]: row[1] for row in json.loads(capsys.readouterr().out)["portable"]}
    assert rows["jax"] == jax.__version__
    assert rows["ssd"] == "xla_scan"


def _process(line: str, **env) -> subprocess.CompletedProcess:
    variables = os.environ | {"PYTHONPATH": str(ROOT)} | env
    done = subprocess.run(line, shell=True, env=variables, cwd=ROOT, capture_output=True, text=True, timeout=120)
    # With the compilers of [aot] installed, their C++ logging speaks on a machine without such a device.
    done.stderr = re.sub(r"(?m)^(WARNING: All log messages before absl|[IW]\d{4} ).*\n", "", done.stderr)
    return done


def test_process_exit_code_and_streams():
    done = _process(f"{sys.executable} -m portable explain nothing")
    assert (done.returncode, done.stdout, done.stderr.count("\n")) == (2, "", 1)
    done = _process(f"{sys.executable} -m portable explain ssd --list | head -n 1")
    assert done.stdout == "ssd\n"
    assert done.stderr == ""


def test_a_platform_that_is_not_there():
    done = _process(f"{sys.executable} -m portable info", JAX_PLATFORMS="nonsense")
    assert done.returncode == 2
    assert done.stderr.startswith("portable: JAX_PLATFORMS=nonsense")
