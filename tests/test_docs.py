"""The pages are true: examples run, links and paths lead somewhere, one address stands everywhere."""

import contextlib
import doctest
import importlib
import io
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from scripts import readme, set_repository
from tests.oracles import ROOT

PAGES = readme.pages()
EXAMPLES = sorted(
    str(path.relative_to(ROOT).with_suffix("")).replace("/", ".").removesuffix(".__init__")
    for path in (ROOT / "portable").rglob("*.py")
    if ">>> " in path.read_text()
)


@pytest.mark.parametrize("module", EXAMPLES)
def test_examples_in_docstrings(module):
    result = doctest.testmod(importlib.import_module(module), optionflags=doctest.ELLIPSIS)
    assert result.attempted
    assert not result.failed


def test_examples_are_found():
    assert "portable.selection" in EXAMPLES
    assert len(EXAMPLES) >= 4


def test_python_in_the_readme_runs(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    blocks = re.findall(r"```python\n(.*?)```", readme.README.read_text(), re.DOTALL)
    assert blocks
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        exec(compile("\n".join(blocks), "README.md", "exec"), {"__name__": "__page__"})
    assert "xla" in printed.getvalue()


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_and_paths_lead_somewhere(page):
    text = page.read_text()
    links = re.findall(r"\]\((?!https?://|#)([^)#]+)", text)
    assert not [link for link in links if not (page.parent / link).exists()]
    # A path in backticks that starts with a folder of the repository; <op> and * stand for any name.
    tops = "portable|models|pallas_kernels|tests|docs|scripts|benchmarks|notebooks"
    paths = re.findall(rf"`((?:{tops})/[\w./<>*-]*|\.ci/run)`", text)
    missing = [path for path in paths if not any(ROOT.glob(re.sub(r"<\w+>", "*", path.rstrip("/"))))]
    assert not missing


def test_the_reference_has_every_public_function_of_a_room():
    page = (ROOT / "docs/reference.md").read_text()
    for room in ("portable.ops", "portable.sharding"):
        module = importlib.import_module(room)
        for name, thing in vars(module).items():
            if callable(thing) and not name.startswith("_") and thing.__module__.startswith(room):
                assert f"::: {room}.{name}\n" in page, f"{room}.{name}"


def test_command_blocks_and_ci_are_one():
    tests, demo = (readme.command(name, readme.README.read_text()) for name in ("tests", "demo"))
    for command in (tests, demo):
        assert command.startswith("python3 -m venv .venv && .venv/bin/pip install ")
    assert tests.endswith(".venv/bin/pytest -n 2")
    assert demo.endswith(".venv/bin/portable demo")
    assert "scripts/readme.py tests" in (ROOT / ".ci" / "run").read_text()


def test_commands_in_pages_exist():
    from portable import cli

    for page in PAGES:
        named = re.findall(r"(?m)(?:`|^|bin/)portable ([a-z]+)\b(?! as| import)", page.read_text())
        assert set(named) <= set(cli.offered()), page


def test_stale_and_empty_blocks_are_noticed(monkeypatch, capsys, tmp_path):
    page = tmp_path / "README.md"
    page.write_text(
        "<!-- output of: echo one -->\ntwo\n<!-- end of output -->\n"
        "<!-- measured by: date +%N -->\n<!-- end of output -->\n"
    )
    monkeypatch.setattr(readme, "pages", lambda: [page])
    assert readme.main(["check"]) == 1
    assert capsys.readouterr().out.count("scripts/readme.py fill") == 2
    assert readme.main(["fill", "echo"]) == 0
    assert page.read_text().startswith("<!-- output of: echo one -->\none\n<!-- end of output -->\n")
    assert readme.main(["check"]) == 1
    assert readme.main(["fill"]) == 0
    assert readme.main(["check"]) == 0, "a measurement is not repeated"


def test_one_repository_address():
    assert set_repository.problems() == []


@pytest.fixture
def copy(tmp_path) -> Path:
    for name in ("README.md", "pyproject.toml"):
        shutil.copy(ROOT / name, tmp_path)
    (tmp_path / "notebooks").mkdir()
    notebook = (
        '{"cells": [{"cell_type": "markdown", "source": []}, {"cell_type": "code", "source": '
        "[\"install('portable-jax[tpu] @ git+https://github.com/other/name')\"]}]}"
    )
    (tmp_path / "notebooks" / "01_one.ipynb").write_text(notebook)
    return tmp_path


def test_another_address_is_written_everywhere(copy):
    assert len(set_repository.problems(copy)) == 2  # the notebook's address and its missing badge
    set_repository.write(copy, "https://github.com/me/mine")
    assert set_repository.problems(copy) == []
    assert set_repository.address(copy) == "https://github.com/me/mine"
    badge = "https://colab.research.google.com/github/me/mine/blob/main/notebooks/01_one.ipynb"
    assert badge in (copy / "README.md").read_text()
    assert "git+https://github.com/me/mine'" in (copy / "notebooks" / "01_one.ipynb").read_text()


def test_notebook_without_an_install_cell_is_noticed(copy):
    set_repository.write(copy, "https://github.com/me/mine")
    (copy / "notebooks" / "01_one.ipynb").write_text('{"cells": [{"cell_type": "code", "source": ["1"]}]}')
    assert any("first code cell" in sentence for sentence in set_repository.problems(copy))


def test_an_address_that_colab_cannot_open_is_refused(copy):
    with pytest.raises(ValueError, match=r"must be https://github\.com/OWNER/NAME"):
        set_repository.write(copy, "git@example.org:me/mine")


def test_scripts_run_from_a_shell():
    done = subprocess.run([sys.executable, ROOT / "scripts" / "readme.py", "tests"], capture_output=True, text=True)
    assert done.stdout.strip() == readme.command("tests", readme.README.read_text())
    done = subprocess.run(
        [sys.executable, ROOT / "scripts" / "set_repository.py", "--check"], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout
