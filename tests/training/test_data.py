"""Tokenizers, packing, windows and batches."""

import itertools
import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from portable.checks import DataError
from portable.training.data import IGNORE, Batches, Windows, pack
from portable.training.text import Document
from portable.training.tokens import ByteTokenizer, load_tokenizer
from tests.oracles import need

TEXTS = st.lists(st.binary(min_size=1, max_size=40).map(lambda b: b.replace(b"\0", b"?")), min_size=1, max_size=6)


def walk(texts: list[bytes]) -> list[tuple[int, int, int]]:
    """(input, target, document) of every prediction, one byte after the other: what windows must contain."""
    stream = []
    for number, text in enumerate(texts):
        stream += [(0, number), *[(byte, number) for byte in text]]
    stream.append((0, len(texts)))
    return [(a, b, document) for (a, document), (b, _) in itertools.pairwise(stream)]


@settings(max_examples=60, deadline=None)
@given(TEXTS, st.integers(1, 9))
def test_every_byte_is_predicted_once_and_documents_are_apart(texts, length):
    packed = pack([Document(str(i), text) for i, text in enumerate(texts)], ByteTokenizer())
    if len(packed.tokens) <= length:
        return
    windows = Windows(packed, length)
    expected = walk(texts)
    seen = []
    for i in range(len(windows)):
        window = windows[i]
        part = expected[i * length : (i + 1) * length]
        assert [v.dtype for v in window.values()] == [np.int32] * 3
        assert window["segments"][: len(part)].tolist() == [d - part[0][2] for _, _, d in part]
        real = window["targets"] != IGNORE
        assert real.tolist() == [True] * len(part) + [False] * (length - len(part))
        seen += list(zip(window["tokens"][real].tolist(), window["targets"][real].tolist()))
    assert seen == [(a, b) for a, b, _ in expected]
    assert packed.bytes == sum(map(len, texts))


def test_a_batch_depends_on_the_step_alone_and_an_epoch_sees_every_window_once():
    need("grain")
    windows = Windows(pack([Document("a", bytes(range(1, 251)))], ByteTokenizer()), 10)
    count = len(windows)
    assert count == 26
    batches = Batches(windows, 2, seed=3)
    again = Batches(windows, 2, seed=3)
    other = Batches(windows, 2, seed=4)

    def first(batch):
        return batch["tokens"][:, 0].tolist()

    # Asked backwards and from a fresh object: no hidden state.
    order = [first(batches[step]) for step in range(26)]
    assert [first(again[step]) for step in reversed(range(26))] == order[::-1]
    assert [first(other[step]) for step in range(26)] != order
    flat = [*itertools.chain(*order)]
    starts = sorted(windows[i]["tokens"][0] for i in range(count))
    assert sorted(flat[:26]) == starts
    assert sorted(flat[26:]) == starts
    assert flat[:26] != flat[26:]  # a new permutation every epoch
    assert batches[10**6]["tokens"].shape == (2, 10)


def test_text_shorter_than_a_window_is_said_in_a_sentence():
    packed = pack([Document("a", b"short")], ByteTokenizer())
    Windows(packed, 6)  # separator, five bytes, separator: just enough
    with pytest.raises(DataError, match=r"window of 7 tokens needs 8, got 7 from 5 bytes; give more text or"):
        Windows(packed, 7)


def test_bytes_go_there_and_back():
    tokenizer = ByteTokenizer()
    data = bytes(range(1, 256))
    assert tokenizer.decode(tokenizer.encode(data)) == data
    assert tokenizer.decode(np.array([0, 104, 105, 0])) == b"hi"
    with pytest.raises(DataError, match="byte 0, got it at 2 of 3"):
        tokenizer.encode(b"ab\0")


@pytest.fixture
def bpe(tmp_path):
    tokenizers = need("tokenizers")
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE())
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=300,
        special_tokens=["<|endoftext|>"],
        initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(["the cat and the hat and the bat"] * 10, trainer)
    path = tmp_path / "tokenizer.json"
    tokenizer.save(str(path))
    return tokenizer, path


def test_a_tokenizer_file_is_used_as_its_own_library_does(bpe):
    theirs, path = bpe
    ours = load_tokenizer(path)
    text = "the hat, the Käse and 猫"
    assert ours.encode(text.encode()).tolist() == theirs.encode(text).ids
    assert ours.decode(ours.encode(text.encode())) == text.encode()
    assert ours.vocab_size == theirs.get_vocab_size()
    assert ours.separator == theirs.token_to_id("<|endoftext|>")
    # A separator written out in a text is text.
    assert ours.separator not in ours.encode(b"a <|endoftext|> b")
    assert ours.decode(ours.encode(b"bad \xff byte")) == "bad \ufffd byte".encode()
    packed = pack([Document("a", b"the cat"), Document("b", b"the hat")], ours)
    assert packed.bytes == 14
    assert len(packed.tokens) < 14


def test_a_tokenizer_without_an_end_token_gets_one_more_id(bpe, tmp_path):
    _, path = bpe
    saved = json.loads(path.read_text())
    saved["added_tokens"] = []
    vocab = saved["model"]["vocab"]
    vocab["<|start|>"] = vocab.pop("<|endoftext|>")
    path.write_text(json.dumps(saved))
    ours = load_tokenizer(path)
    assert ours.separator == len(vocab)
    assert ours.vocab_size == len(vocab) + 1


def test_an_unusable_tokenizer_is_said_in_a_sentence(tmp_path):
    need("tokenizers")
    (tmp_path / "broken.json").write_text("{")
    (tmp_path / "other.json").write_text('{"a": 1}')
    for name, words in {
        "missing.json": "No such file",
        "broken.json": "is not a",
        "other.json": "is not a",
    }.items():
        with pytest.raises(DataError, match=words) as caught:
            load_tokenizer(tmp_path / name)
        assert "give a" in str(caught.value) or "give one" in str(caught.value)
