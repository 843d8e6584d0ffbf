"""Where a checkpoint is looked for, without a network: the hub's client is replaced."""

import sys
from pathlib import Path

import pytest

from portable.checkpoint import locate
from portable.checks import CheckpointError
from tests.oracles import need


def test_a_folder_comes_first(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    (tmp_path / "owner" / "name").mkdir(parents=True)
    assert locate("owner/name") == Path("owner/name")
    assert locate(tmp_path / "owner") == tmp_path / "owner"


def test_home_is_expanded(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "weights").mkdir()
    assert locate("~/weights") == tmp_path / "weights"


@pytest.mark.parametrize("name", ["missing", "./missing", "../a/b", "/a/b/c", "a/b/c", "owner/na me", ""])
def test_neither_folder_nor_hub_id(tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(CheckpointError, match=r"there is no folder .*it is no hub id, which is owner/name"):
        locate(name)


def test_path_object_is_never_a_hub_id(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(CheckpointError, match="no hub id"):
        locate(Path("owner/name"))


def test_file_instead_of_its_folder(tmp_path):
    (tmp_path / "model.safetensors").touch()
    with pytest.raises(CheckpointError, match="is a file; give the folder"):
        locate(tmp_path / "model.safetensors")


def test_pickle_instead_of_a_folder(tmp_path):
    with pytest.raises(CheckpointError, match=r"(?s)model.bin is a pickle.*save_file"):
        locate(tmp_path / "model.bin")


def test_missing_client_names_the_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(CheckpointError, match=r"pip install 'portable-jax\[hf\]'"):
        locate("owner/name")


@pytest.fixture
def hub(monkeypatch):
    return lambda answer: monkeypatch.setattr(need("huggingface_hub"), "snapshot_download", answer)


def test_only_safetensors_and_json_are_downloaded(hub, tmp_path):
    asked = []
    (tmp_path / "model.safetensors").touch()
    hub(lambda name, **options: asked.append((name, options)) or str(tmp_path))
    assert locate("owner/name") == tmp_path
    assert asked == [("owner/name", {"allow_patterns": ["*.safetensors", "*.json", "*.jinja"]})]


def test_hub_with_pickles_only(hub, tmp_path):
    hub(lambda name, **options: str(tmp_path))
    with pytest.raises(CheckpointError, match=r"(?s)no safetensors file on the hub.*hf download owner/name.*save_file"):
        locate("owner/name")


@pytest.mark.parametrize("kind", ["LocalEntryNotFoundError", "HFValidationError", "OfflineModeIsEnabled"])
def test_what_the_hub_refuses_is_told(hub, kind):
    error = getattr(need("huggingface_hub").errors, kind)

    def refuse(name, **options):
        raise error("the reason\nand a long story")

    hub(refuse)
    with pytest.raises(CheckpointError, match=r"the hub did not give it \(.*the reason\); check") as caught:
        locate("owner/name")
    assert "long story" not in str(caught.value)
