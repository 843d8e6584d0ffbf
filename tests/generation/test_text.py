"""Text that arrives token by token: every character whole, nothing lost."""

import json

import numpy as np
import pytest

from portable.generation.text import TextStream
from portable.training.tokens import ByteTokenizer, FileTokenizer
from tests.oracles import need

TEXT = "naïve — 日本語 🦋🏽 x\u0301\nend"


def pieces(stream, tokens):
    return [stream.feed([token]) for token in tokens] + [stream.close()]


def test_bytes_come_out_as_whole_characters():
    out = pieces(TextStream(ByteTokenizer().decode), TEXT.encode())
    assert "".join(out) == TEXT
    assert "\N{REPLACEMENT CHARACTER}" not in "".join(out)
    assert max(map(len, out)) == 1
    assert TextStream(ByteTokenizer().decode).feed(TEXT.encode()) == TEXT


def test_a_cut_character_is_shown_at_the_end():
    stream = TextStream(ByteTokenizer().decode)
    assert stream.feed("a🦋".encode()[:-1]) == "a"
    assert stream.close() == "\N{REPLACEMENT CHARACTER}"
    assert stream.close() == ""


def test_bytes_that_are_no_text_do_not_hold_it_up():
    noise = np.random.default_rng(0).integers(1, 256, 400)
    stream, fed = TextStream(ByteTokenizer().decode), 0
    for token in noise:
        text = stream.feed([token])
        fed = 0 if text else fed + 1
        assert fed < 4
    assert stream.feed(b"plain again").endswith("plain again")


@pytest.fixture(scope="module")
def metaspace(tmp_path_factory):
    """A tokenizer that joins words with a mark for the space, as Llama's does, and falls back to bytes."""
    tokenizers = need("tokenizers")
    words = ["▁the", "▁cat", "s", "▁", "▁日"]
    vocab = {f"<0x{i:02X}>": i for i in range(256)} | {w: 256 + i for i, w in enumerate(words)}
    model = tokenizers.models.BPE(vocab=vocab, merges=[], byte_fallback=True, unk_token=None)
    engine = tokenizers.Tokenizer(model)
    engine.decoder = tokenizers.decoders.Sequence(
        [
            tokenizers.decoders.Replace("▁", " "),
            tokenizers.decoders.ByteFallback(),
            tokenizers.decoders.Fuse(),
            tokenizers.decoders.Strip(" ", 1, 0),
        ]
    )
    file = tmp_path_factory.mktemp("tokenizer") / "tokenizer.json"
    file.write_text(engine.to_str())
    assert json.loads(engine.to_str())["decoder"]
    return FileTokenizer(file), vocab


def test_spaces_between_words_survive(metaspace):
    tokenizer, vocab = metaspace
    tokens = [vocab[w] for w in ("▁the", "▁cat", "s", "▁日")] + list("🦋".encode()) + [vocab["▁the"]]
    out = pieces(TextStream(tokenizer.decode), tokens)
    assert "".join(out) == tokenizer.decode(np.array(tokens)).decode() == "the cats 日🦋 the"
    # After a prompt the first word keeps the space that a text of its own would lose.
    after = TextStream(tokenizer.decode, before=np.array(tokens[:2], np.int32))
    assert "".join(pieces(after, tokens[1:3])) == " cats"
