"""`portable generate` on a folder with a small model, with bytes and with a tokenizer.json."""

import io
import json
import re
import unicodedata

import numpy as np
import pytest
from flax import nnx

from portable import cli, models
from portable.generation import generate
from portable.models.mamba2 import Mamba2Config, Mamba2LM
from tests.oracles import need


def saved(folder, **options):
    options = {"vocab_size": 256, "bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 0} | options
    config = Mamba2Config(hidden_size=32, num_hidden_layers=2, num_heads=4, head_dim=16, state_size=16, **options)
    model = Mamba2LM(config, rngs=nnx.Rngs(0))
    models.save(model, folder)
    return model


@pytest.fixture(scope="module")
def bytes_model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("bytes")
    return folder, saved(folder)


@pytest.fixture
def loaded(bytes_model, monkeypatch):
    """The folder, from which commands get one and the same model, so that its programs compile once."""
    folder, model = bytes_model
    monkeypatch.setattr(models, "load", lambda folder, dtype: model)
    return folder


def test_writes_what_generate_gives(bytes_model, capsys):
    folder, model = bytes_model
    assert cli.main(["generate", str(folder), "--prompt", "abc", "--max-new-tokens", "40"]) == 0
    out, err = capsys.readouterr()
    tokens = generate(model, [list(b"abc")], max_new_tokens=40).tokens[0]
    assert out == bytes(tokens.astype(np.uint8)).replace(b"\0", b"").decode(errors="replace")
    assert re.search(r"^40 tokens; \d+\.\d\d s to the first, compiling included; then [\d.]+ tokens/s$", err.strip())


def test_sampling_depends_on_the_seed_only(loaded, capsys):
    texts = []
    for seed in ("3", "3", "4"):
        options = ["--max-new-tokens", "30", "--temperature", "1.5", "--top-k", "200", "--seed", seed]
        assert cli.main(["generate", str(loaded), "--prompt", "x", *options]) == 0
        texts.append(capsys.readouterr().out)
    assert texts[0] == texts[1] != texts[2]


def test_prompt_from_standard_input_and_none_at_all(loaded, capsys, monkeypatch):
    short = ["--max-new-tokens", "10"]
    assert cli.main(["generate", str(loaded), "--prompt", "né", *short]) == 0
    expected = capsys.readouterr().out
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO("né".encode())))
    assert cli.main(["generate", str(loaded), "--prompt", "-", *short]) == 0
    assert capsys.readouterr().out == expected
    assert cli.main(["generate", str(loaded), *short]) == 0


def test_a_terminal_sees_the_prompt_and_no_escape_sequences(tmp_path, capsys, monkeypatch):
    folder, model = tmp_path, saved(tmp_path)
    model.embed.embedding[...] *= 0
    monkeypatch.setattr(models, "load", lambda folder, dtype: model)
    options = ["--ignore-eos", "--temperature", "1", "--max-new-tokens", "2000"]  # all bytes equally likely
    monkeypatch.setattr("sys.stdout.isatty", lambda: True)
    assert cli.main(["generate", str(folder), "--prompt", "né\x1b[31m", *options]) == 0
    out = capsys.readouterr().out
    assert out.startswith("né\N{SYMBOL FOR ESCAPE}[31m")
    assert out.endswith("\n")
    assert not [c for c in out if unicodedata.category(c) == "Cc" and c not in "\t\n"]
    monkeypatch.setattr("sys.stdout.isatty", lambda: False)
    assert cli.main(["generate", str(folder), "--prompt", "né", *options]) == 0
    assert "\x1b" in capsys.readouterr().out


def test_a_model_with_several_ends(tmp_path, capsys):
    saved(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"eos_token_id": [0, 10]}))
    assert cli.main(["generate", str(tmp_path), "--prompt", "a", "--max-new-tokens", "5"]) == 0
    assert "token" in capsys.readouterr().err


def test_with_a_tokenizer(tmp_path, capsys):
    tokenizers = need("tokenizers")
    words = ["<|endoftext|>", "the", "cat", "sat", "on", "mat"]
    engine = tokenizers.Tokenizer(
        tokenizers.models.WordLevel({w: i for i, w in enumerate(words)}, unk_token="<|endoftext|>")
    )
    engine.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    model = saved(tmp_path, vocab_size=6)
    (tmp_path / "tokenizer.json").write_text(engine.to_str())
    assert cli.main(["generate", str(tmp_path), "--prompt", "the cat", "--max-new-tokens", "12", "--ignore-eos"]) == 0
    out = capsys.readouterr().out
    tokens = generate(model, [[1, 2]], max_new_tokens=12).tokens[0]
    assert out.split() == [words[i] for i in tokens if i]


@pytest.mark.parametrize(
    "arguments, sentence",
    [
        (["--max-new-tokens", "0"], "max_new_tokens must be at least 1; got 0"),
        (["--max-new-tokens", "99999999999"], "max_new_tokens must be below 2**31; got 99999999999"),
        (["--seed", "99999999999999999999"], "--seed must be in 0..4294967295; got 99999999999999999999"),
        (["--temperature", "-1"], "temperature must be 0"),
        (["--temperature", "1", "--top-p", "0"], "top_p must be in (0, 1]; got 0.0"),
        (["--tokenizer", "nowhere.json"], "nowhere.json cannot be read"),
        (["--dtype", "int8"], "invalid choice"),
    ],
)
def test_mistakes(loaded, capsys, arguments, sentence):
    assert cli.main(["generate", str(loaded), "--prompt", "a", *arguments]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert sentence in err
    assert "Traceback" not in err


def test_a_folder_without_a_model_or_without_a_tokenizer(tmp_path, capsys):
    assert cli.main(["generate", str(tmp_path / "nowhere"), "--prompt", "a"]) == 2
    assert "there is no folder" in capsys.readouterr().err
    saved(tmp_path, vocab_size=1000)
    assert cli.main(["generate", str(tmp_path), "--prompt", "a"]) == 2
    assert "1000 tokens are not bytes; give its tokenizer" in capsys.readouterr().err
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["vocab_size"] == 1000
