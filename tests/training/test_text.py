"""Files found and read, documents split, and the sentences when there is nothing to train on."""

import hashlib

import pytest

from portable.checks import DataError
from portable.training.stdlib import describe, stdlib_text, unlike
from portable.training.text import Document, read_text, split


def names(documents):
    return [document.name for document in documents]


def test_a_folder_is_read_recursively_and_what_is_no_text_is_named(tmp_path):
    (tmp_path / "sub" / "deep").mkdir(parents=True)
    (tmp_path / ".git").mkdir()
    (tmp_path / "b.txt").write_bytes(b"bee")
    (tmp_path / "sub" / "deep" / "a.txt").write_bytes("ümlaut".encode("latin-1"))  # not UTF-8: bytes are bytes
    (tmp_path / "empty.txt").write_bytes(b"")
    (tmp_path / "picture.png").write_bytes(b"\x89PNG\0\0")
    (tmp_path / "gone.txt").symlink_to(tmp_path / "nowhere")
    (tmp_path / ".git" / "config").write_bytes(b"hidden")
    text = read_text(tmp_path, hold_out=False)
    assert [(d.name, d.data) for d in text.train] == [("b.txt", b"bee"), ("sub/deep/a.txt", b"\xfcmlaut")]
    assert [name for name, _ in text.skipped] == ["empty.txt", "gone.txt", "picture.png"]
    reasons = " ".join(reason for _, reason in text.skipped)
    assert "empty" in reasons
    assert "unreadable" in reasons
    assert "binary" in reasons
    assert all(part in text.summary() for part in ("9 bytes in 2 files", "1 empty", "gone.txt"))


def test_globs_select_files(tmp_path):
    for name in ("a.py", "b.txt", "test_c.py"):
        (tmp_path / name).write_bytes(b"x")
    text = read_text(tmp_path, include=["*.py"], exclude=["test_*"], hold_out=False)
    assert names(text.train) == ["a.py"]


def test_files_are_held_out_by_the_hash_of_their_path():
    documents = [Document(f"folder/{i}.txt", b"x" * 100) for i in range(400)]
    text = split(documents)
    expected = {d.name for d in documents if int.from_bytes(hashlib.sha256(d.name.encode()).digest(), "big") % 20 == 0}
    assert 8 <= len(expected) <= 40
    assert set(names(text.held_out)) == expected
    assert set(names(text.train)) == set(names(documents)) - expected
    # More files do not move those there were.
    more = split([*documents, *[Document(f"more/{i}.txt", b"y" * 100) for i in range(100)]])
    assert expected <= set(names(more.held_out))


@pytest.mark.parametrize("files", [1, 3])
def test_few_files_give_their_ends(files):
    documents = [Document(str(i), bytes(range(1, 256)) * 40) for i in range(files)]
    text = split(documents)
    for whole, head, tail in zip(documents, text.train, text.held_out, strict=True):
        assert head.data + tail.data == whole.data
        assert 0.04 < len(tail.data) / len(whole.data) < 0.1
        assert (head.ends, tail.ends) == (False, True)


def test_the_fingerprint_sees_every_change():
    documents = [Document("a", b"one"), Document("b", b"two")]
    prints = {
        split(parts, hold_out=hold_out).fingerprint
        for hold_out in (True, False)
        for parts in (
            documents,
            documents[::-1],
            [Document("a", b"on"), Document("b", b"etwo")],
            [Document("c", b"one"), Document("b", b"two")],
        )
    }
    assert len(prints) == 8 - 4  # three bytes have no twentieth: nothing is held out either way
    big = [Document("a", b"x\n" * 1000)]
    assert split(big).fingerprint != split(big, hold_out=False).fingerprint
    assert split(big).fingerprint == split(list(big)).fingerprint


def test_nothing_to_train_on_is_said_in_a_sentence(tmp_path):
    (tmp_path / "empty.txt").write_bytes(b"")
    (tmp_path / "utf16.txt").write_bytes("text".encode("utf-16"))
    (tmp_path / "nothing").mkdir()
    for path, words in {
        tmp_path / "missing.txt": ["missing.txt", "No such file", "give a text file"],
        tmp_path / "empty.txt": ["empty.txt", "is empty", "give a text file"],
        tmp_path / "utf16.txt": ["utf16.txt", "binary", "byte 0", "give a text file"],
        tmp_path / "nothing": ["nothing", "no files", "give a folder"],
        tmp_path: ["no text to train on", "1 empty", "1 binary", "give a folder"],
    }.items():
        with pytest.raises(DataError) as caught:
            read_text(path)
        assert all(word in str(caught.value) for word in words), caught.value
    with pytest.raises(DataError, match="2 files, none selected"):
        read_text(tmp_path, include=["*.rst"])


def test_a_file_without_permission_is_unreadable(tmp_path, monkeypatch):
    path = tmp_path / "secret.txt"
    path.write_bytes(b"text")

    def denied(self):
        raise PermissionError(13, "Permission denied", str(self))

    monkeypatch.setattr("pathlib.Path.read_bytes", denied)  # permissions do not stop root
    with pytest.raises(DataError, match=r"secret.txt .* unreadable \(Permission denied\)"):
        read_text(path)


def test_the_standard_library_is_split_by_path_and_listed():
    text = stdlib_text()
    assert sum(len(d.data) for d in text.train) > 5_000_000
    assert "pydoc_data/topics.py" in names(text.train)  # the prose
    assert not any("test" in d.name.split("/")[:-1] for d in text.train + text.held_out)
    assert all(int(hashlib.sha256(d.name.encode()).hexdigest(), 16) % 20 == 0 for d in text.held_out)
    assert not set(names(text.train)) & set(names(text.held_out))
    listed = describe(text, "3")
    assert unlike(text, listed) == []
    changed = split([Document(d.name, d.data + b"#") for d in text.train[:1]] + list(text.train[1:] + text.held_out))
    assert unlike(changed, listed) == [text.train[0].name]
