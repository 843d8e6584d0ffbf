"""The wheel, installed where no source tree can be seen, holds and imports everything."""

import os
import re
import shutil
import subprocess
import sys
import sysconfig
import tomllib
import venv
import zipfile
from pathlib import Path

import pytest

from portable import _requirements
from tests.oracles import ROOT, child

SOURCES = ("portable", "models", "pallas_kernels")
IMPORT_ALL = """
import importlib, importlib.util, pkgutil, sys
import portable
count = 0
for module in pkgutil.walk_packages(portable.__path__, "portable."):
    needs_triton = module.name.startswith("portable.pallas_kernels.gpu.")
    if module.name.endswith("__main__") or (needs_triton and not importlib.util.find_spec("triton")):
        continue
    found = importlib.import_module(module.name).__file__
    assert found.startswith(sys.prefix), f"{module.name} comes from {found}, not from the wheel"
    count += 1
print(count)
"""


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> Path:
    """Builds the wheel from a copy of the sources, so that the build leaves nothing behind."""
    source, out = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("wheel")
    for name in SOURCES:
        shutil.copytree(ROOT / name, source / name, symlinks=True, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    build = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", out, source]
    done = subprocess.run(build, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    (found,) = out.glob("*.whl")
    return found


@pytest.fixture(scope="module")
def installed(wheel, tmp_path_factory) -> Path:
    """Installs the wheel in a clean environment that sees this one's other packages; returns its folder."""
    home = tmp_path_factory.mktemp("venv") / "env"
    venv.create(home, with_pip=False, symlinks=True)
    install = [
        sys.executable,
        "-m",
        "pip",
        "--python",
        home,
        "install",
        "--no-deps",
        "--no-index",
        "-q",
        wheel,
    ]
    done = subprocess.run(install, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    # A path added by a .pth file comes last, and its .pth files are not read: an editable portable is unseen.
    site = Path(sysconfig.get_path("purelib", vars={"base": str(home), "platbase": str(home)}))
    (site / "dependencies.pth").write_text(sysconfig.get_path("purelib") + "\n")
    return home


def test_wheel_holds_every_file(wheel):
    inside = set(zipfile.ZipFile(wheel).namelist())
    wanted = {f"portable/{p.relative_to(ROOT / 'portable')}" for p in _files(ROOT / "portable")}
    for name in ("models", "pallas_kernels"):
        wanted |= {f"portable/{p.relative_to(ROOT)}" for p in _files(ROOT / name)}
    assert wanted
    assert not wanted - inside, f"missing from the wheel: {sorted(wanted - inside)}"
    assert any(name.endswith("licenses/LICENSE") for name in inside)
    assert not [name for name in inside if not name.startswith(("portable/", "portable_jax-"))]


def test_installed_wheel_imports_everything_from_another_folder(installed, tmp_path):
    done = _run(installed, "-c", IMPORT_ALL, folder=tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    modules = [p for name in SOURCES for p in (ROOT / name).rglob("*.py") if "pallas_kernels/gpu" not in str(p)]
    assert int(done.stdout) >= len(modules) - 2, "portable/__init__.py and __main__.py are not counted"


def test_installed_command_runs(installed, tmp_path):
    done = subprocess.run([installed / "bin" / "portable", "explain", "ssd"], **_options(tmp_path))
    assert done.returncode == 0, done.stdout + done.stderr
    assert re.search(r"^  tpu +xla", done.stdout, re.MULTILINE)
    by_module = _run(installed, "-m", "portable", "explain", "ssd", folder=tmp_path)
    assert by_module.stdout == done.stdout


def test_version_bounds_agree_with_pyproject():
    dependencies = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["dependencies"]
    for package, (low, high) in _requirements.REQUIRED.items():
        text = f"{package}>={'.'.join(map(str, low))},<{'.'.join(map(str, high))}"
        assert text in dependencies


@pytest.mark.parametrize("package, old", [("jax", "0.7.2"), ("flax", "0.11.2"), ("jax", "0.12.0")])
def test_another_version_is_refused_in_a_sentence(package, old, tmp_path):
    # A distribution earlier on the path stands for the one that an old runtime has.
    folder = tmp_path / f"{package}-{old}.dist-info"
    folder.mkdir()
    (folder / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {package}\nVersion: {old}\n")
    code = f"""
import sys
sys.path.insert(0, {str(tmp_path)!r})
try:
    import portable
except ImportError as error:
    print(error)
    assert not [m for m in sys.modules if m.startswith("flax")], "it must speak before anything can break"
else:
    raise SystemExit("imported")
"""
    said = child(code)
    assert f"portable needs {package}>=" in said
    assert f"this process has {old}" in said
    assert "Runtime > Restart" in said


def _files(folder: Path) -> list[Path]:
    """Returns every source and data file below a folder, not following links."""
    found = [Path(base) / name for base, _, names in os.walk(folder) for name in names]
    return [path for path in found if "__pycache__" not in path.parts]


def _run(home: Path, *args: str, folder: Path) -> subprocess.CompletedProcess:
    return subprocess.run([home / "bin" / "python", *args], **_options(folder))


def _options(folder: Path) -> dict:
    env = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    return {"cwd": folder, "env": env, "capture_output": True, "text": True, "timeout": 300}
