"""Folders of safetensors: read and written side by side with the safetensors library, whole or damaged."""

import errno
import json
import os
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from portable.checkpoint import folder as folders
from portable.checkpoint.folder import INDEX, SINGLE, Checkpoint, Source, write
from portable.checks import CheckpointError
from tests.oracles import ROOT, child, need

TENSORS = {
    "small": np.arange(3, dtype=ml_dtypes.bfloat16),
    "wide": np.arange(24, dtype=np.float32).reshape(4, 3, 2),
    "half": np.linspace(0, 1, 5, dtype=np.float16),
    "double": np.array(0.1, np.float64),
    "empty": np.zeros((0, 3), np.float32),
}


def _sources(tensors):
    return {name: Source(a.dtype, a.shape, lambda a=a: a) for name, a in tensors.items()}


def _write(folder, tensors=TENSORS, max_shard_size=10**9):
    write(folder, {"made": "up"}, _sources(tensors), max_shard_size)


def _read(folder):
    found = Checkpoint(folder)
    rows = {name: entry.shape[0] if entry.shape else 1 for name, entry in found.entries.items()}
    blocks = {name: [block for _, block in found.rows(name, 0, n)] for name, n in rows.items()}
    return {
        name: np.concatenate(parts).reshape(found.entries[name].shape)
        if parts
        else np.zeros(found.entries[name].shape, np.float32)
        for name, parts in blocks.items()
    }


def _assert_equal(got, want):
    assert got.keys() == want.keys()
    for name, array in want.items():
        assert got[name].dtype == array.dtype, name
        np.testing.assert_array_equal(got[name], array, err_msg=name)


def _names(folder):
    return sorted(file.name for file in folder.iterdir())


def test_the_library_reads_what_we_write(tmp_path):
    _write(tmp_path / "new" / "folder")
    _assert_equal(load_file(tmp_path / "new" / "folder" / SINGLE), TENSORS)
    assert json.loads((tmp_path / "new" / "folder" / "config.json").read_text()) == {"made": "up"}


def test_we_read_what_the_library_writes(tmp_path):
    save_file(TENSORS, tmp_path / SINGLE)
    _assert_equal(_read(tmp_path), TENSORS)


def test_a_lone_file_of_another_name_is_read(tmp_path):
    save_file(TENSORS, tmp_path / "consolidated.safetensors")
    _assert_equal(_read(tmp_path), TENSORS)


def test_rows_come_in_blocks(tmp_path, monkeypatch):
    _write(tmp_path)
    monkeypatch.setattr(folders, "_BLOCK", 64)
    blocks = [*Checkpoint(tmp_path).rows("wide", 1, 4)]
    assert [row for row, _ in blocks] == [1, 2, 3]
    np.testing.assert_array_equal(np.concatenate([block for _, block in blocks]), TENSORS["wide"][1:])


def test_shards_hold_at_most_their_size_and_the_index_names_them(tmp_path):
    _write(tmp_path, max_shard_size=100)
    index = json.loads((tmp_path / INDEX).read_text())
    assert index["metadata"]["total_size"] == sum(a.nbytes for a in TENSORS.values())
    shard = {"small": 1, "wide": 2, "half": 3, "double": 3, "empty": 3}  # 6, 96 and 18 bytes
    assert index["weight_map"] == {name: f"model-0000{i}-of-00003.safetensors" for name, i in shard.items()}
    _assert_equal(_read(tmp_path), TENSORS)
    for name, file in index["weight_map"].items():
        assert name in load_file(tmp_path / file)


CHANGED = {name: array + 1 for name, array in TENSORS.items()}


@pytest.mark.parametrize("before", [10**9, 100, 30])
@pytest.mark.parametrize("after", [10**9, 100, 30])
def test_saving_again_replaces_the_weights_and_leaves_nothing_behind(tmp_path, before, after):
    fresh = tmp_path / "fresh"
    _write(fresh, CHANGED, after)
    folder = tmp_path / "again"
    _write(folder, TENSORS, before)
    (folder / "tokenizer.json").write_text("{}")
    for _ in range(2):  # twice: the second time finds the shards' other names
        _write(folder, CHANGED, after)
        _assert_equal(_read(folder), CHANGED)
        assert len(_names(folder)) == len(_names(fresh)) + 1
    assert (folder / "tokenizer.json").exists()


@pytest.mark.parametrize("before", [10**9, 30])
@pytest.mark.parametrize("after", [10**9, 30])
def test_full_disk_changes_nothing(tmp_path, monkeypatch, before, after):
    _write(tmp_path, TENSORS, before)
    names = _names(tmp_path)
    sources = _sources(CHANGED)

    def full():
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    for failing in CHANGED:
        broken = sources | {failing: sources[failing]._replace(fetch=full)}
        with pytest.raises(CheckpointError, match=r"cannot write .*No space left.*unchanged"):
            write(tmp_path, {}, broken, after)
        _assert_equal(_read(tmp_path), TENSORS)
        assert _names(tmp_path) == names


def test_file_size_limit_of_the_system_changes_nothing(tmp_path):
    _write(tmp_path)
    code = f"""
        import resource, signal
        from pathlib import Path
        import numpy as np
        from portable.checkpoint.folder import Source, write
        from portable.checks import CheckpointError
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, 10_000))
        big = np.zeros(10_000, np.float32)
        try:
            write(Path({str(tmp_path)!r}), {{}}, {{"big": Source(big.dtype, big.shape, lambda: big)}}, 10**9)
        except CheckpointError as fault:
            print(fault)
    """
    assert "File too large" in child(textwrap.dedent(code))
    _assert_equal(_read(tmp_path), TENSORS)
    assert _names(tmp_path) == ["config.json", SINGLE]


@pytest.mark.parametrize("before", [10**9, 30])
@pytest.mark.parametrize("after", [10**9, 30])
def test_killed_between_any_two_renames_leaves_old_or_new_weights(tmp_path, monkeypatch, before, after):
    """Stops the writing after each of its changes to the folder, as a SIGKILL would: nothing more runs."""

    class Killed(BaseException):
        pass

    steps = 0
    while True:
        folder = tmp_path / str(steps)
        _write(folder, TENSORS, before)
        _write(folder, TENSORS, before)  # so that shards may already have their other names
        left = steps

        def counted(act):
            def step(*args, **options):
                nonlocal left
                if left == 0:
                    raise Killed
                left -= 1
                return act(*args, **options)

            return step

        with monkeypatch.context() as patched:
            patched.setattr(os, "replace", counted(os.replace))
            patched.setattr(Path, "unlink", counted(Path.unlink))
            try:
                _write(folder, CHANGED, after)
            except Killed:
                pass
            else:
                break
        got = _read(folder)
        _assert_equal(got, CHANGED if float(got["double"]) > 1 else TENSORS)
        _write(folder, CHANGED, after)  # and saving again mends it
        _assert_equal(_read(folder), CHANGED)
        steps += 1
    assert steps > 2


@pytest.mark.full
def test_killed_at_a_random_moment_leaves_old_or_new_weights(tmp_path):
    code = """
        import itertools, sys
        from pathlib import Path
        import numpy as np
        from portable.checkpoint.folder import Source, write
        print("ready", flush=True)
        for i in itertools.count(1):
            tensors = {n: np.full((300, 300), i, np.float32) for n in "abcdef"}
            sources = {n: Source(a.dtype, a.shape, lambda a=a: a) for n, a in tensors.items()}
            write(Path(sys.argv[1]), {"i": i}, sources, 400_000 if i % 2 else 10**9)
    """
    seed = np.random.SeedSequence().entropy
    print("seed", seed)
    rng = np.random.default_rng(seed)
    command = [sys.executable, "-c", textwrap.dedent(code), str(tmp_path)]
    _write(tmp_path, {"a": np.zeros((1, 1), np.float32)})
    written = []
    for _ in range(20):
        with subprocess.Popen(command, env=os.environ | {"PYTHONPATH": str(ROOT)}, stdout=subprocess.PIPE) as process:
            assert process.stdout.readline() == b"ready\n"
            time.sleep(rng.uniform(0, 0.5))
            process.send_signal(signal.SIGKILL)
        (value,) = {float(array[0, 0]) for array in _read(tmp_path).values()}
        written.append(value)
    assert len(set(written)) > 5


def test_truncated_file_is_told(tmp_path):
    _write(tmp_path)
    file = tmp_path / SINGLE
    for size in (0, 5, 100, file.stat().st_size - 1):
        file.write_bytes(file.read_bytes()[:size])
        with pytest.raises(CheckpointError, match=r"model.safetensors cannot be read.*truncated.*again"):
            Checkpoint(tmp_path)
        _write(tmp_path)


def test_foreign_file_is_told(tmp_path):
    (tmp_path / SINGLE).write_bytes(b"<html>not found</html>" * 10)
    with pytest.raises(CheckpointError, match="cannot be read as safetensors"):
        Checkpoint(tmp_path)


def _sharded(folder):
    _write(folder, max_shard_size=30)
    return json.loads((folder / INDEX).read_text())


def test_missing_shards_are_all_named(tmp_path):
    index = _sharded(tmp_path)
    gone = sorted(set(index["weight_map"].values()))[:2]
    for name in gone:
        (tmp_path / name).unlink()
    with pytest.raises(CheckpointError, match=f"lacks 2 of the .* files.*{gone[0]}, {gone[1]}"):
        Checkpoint(tmp_path)


def test_index_that_names_absent_tensors(tmp_path):
    index = _sharded(tmp_path)
    file = index["weight_map"]["wide"]
    index["weight_map"] |= {"ghost": file, "spirit": file}
    (tmp_path / INDEX).write_text(json.dumps(index))
    with pytest.raises(CheckpointError, match=r"do not hold: ghost \(.*\), spirit \(.*\)"):
        Checkpoint(tmp_path)


@pytest.mark.parametrize("content, sentence", [("{", "is not JSON"), ("[]", "JSON object"), ("{}", "weight_map")])
def test_broken_index(tmp_path, content, sentence):
    _sharded(tmp_path)
    (tmp_path / INDEX).write_text(content)
    with pytest.raises(CheckpointError, match=sentence):
        Checkpoint(tmp_path)
    _write(tmp_path, CHANGED)  # saving over it works
    _assert_equal(_read(tmp_path), CHANGED)


def test_index_cannot_point_outside_its_folder(tmp_path):
    (tmp_path / INDEX).write_text(json.dumps({"weight_map": {"w": "../secret.safetensors"}}))
    with pytest.raises(CheckpointError, match=r"outside its folder: \.\./secret"):
        Checkpoint(tmp_path)


def test_several_files_without_an_index(tmp_path):
    for name in "ab":
        save_file({name: np.zeros(2)}, tmp_path / f"{name}.safetensors")
    with pytest.raises(CheckpointError, match=r"several safetensors files and no .*a.safetensors, b.safetensors"):
        Checkpoint(tmp_path)


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.pt", "weights.pth", "last.ckpt"])
def test_pickles_are_refused_with_the_way_out(tmp_path, name):
    (tmp_path / name).write_bytes(b"\x80\x04.")
    with pytest.raises(CheckpointError, match=r"(?s)only as pickle: .*save_file") as caught:
        Checkpoint(tmp_path)
    assert name in str(caught.value)


def test_empty_folder(tmp_path):
    with pytest.raises(CheckpointError, match="holds no safetensors file; it has no file at all"):
        Checkpoint(tmp_path)


def test_conversion_snippet_works_as_printed(tmp_path, monkeypatch):
    torch = need("torch")
    monkeypatch.chdir(tmp_path)
    shared = torch.randn(4, 3)
    torch.save({"embedding": shared, "head": shared, "rows": shared[1:]}, "pytorch_model.bin")
    snippet = textwrap.dedent(folders.HOW_TO_CONVERT.split("\n\n")[1])
    exec(compile(snippet, "snippet", "exec"), {})
    _assert_equal(_read(tmp_path), {"embedding": shared.numpy(), "head": shared.numpy(), "rows": shared[1:].numpy()})
