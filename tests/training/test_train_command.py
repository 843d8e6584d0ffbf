"""`portable train`: what it makes, and a sentence for what it cannot do."""

import json
import math

import numpy as np
import pytest

from portable import models
from portable.cli import main
from portable.training import bits_per_byte, read_text
from portable.training.log import read_log
from tests.oracles import need

need("grain", "matplotlib")

SIZES = ["--hidden-size", "32", "--layers", "2", "--state-size", "8", "--head-dim", "16"]
FEW = ["--steps", "4", "--length", "32", "--batch-size", "2", "--warmup", "0"]


@pytest.fixture
def text(tmp_path):
    path = tmp_path / "text.txt"
    path.write_bytes(bytes(range(32, 127)) * 30)
    return path


def test_the_model_in_the_folder_is_the_one_that_was_measured(text, tmp_path):
    out = tmp_path / "run"
    assert main(["train", str(text), "--out", str(out), *SIZES, *FEW, "--quiet"]) == 0
    model = models.load(out / "model")
    score = bits_per_byte(model, read_text(text).held_out)
    assert score.bits_per_byte == pytest.approx(
        read_log(out / "log.jsonl")[-1]["held_out_bits_per_byte"], rel=1e-4
    )
    config = json.loads((out / "model" / "config.json").read_text())
    assert (config["vocab_size"], config["bos_token_id"], config["eos_token_id"]) == (256, 0, 0)


def test_training_goes_on_from_a_saved_model(text, tmp_path):
    first, second = tmp_path / "first", tmp_path / "second"
    assert main(["train", str(text), "--out", str(first), *SIZES, *FEW, "--quiet"]) == 0
    arguments = ["train", str(text), "--out", str(second), "--init", str(first / "model"), *FEW, "--quiet"]
    assert main(arguments) == 0
    # A fresh model needs about 8 bits a byte; the second run starts where the first one ended.
    started = read_log(second / "log.jsonl")[0]["loss"] / math.log(2)
    assert started < read_log(first / "log.jsonl")[0]["loss"] / math.log(2) - 0.3


@pytest.mark.parametrize("options", [["--dtype", "bfloat16"], ["--remat", "full"], ["--accumulate", "2"]])
def test_other_ways_to_compute_learn_the_same(text, tmp_path, options):
    plain, other = tmp_path / "plain", tmp_path / "other"
    common = ["train", str(text), *SIZES, *FEW, "--quiet"]
    assert main([*common, "--out", str(plain)]) == 0
    assert main([*common, "--out", str(other), *options]) == 0
    losses = [[r["loss"] for r in read_log(folder / "log.jsonl")] for folder in (plain, other)]
    assert len(losses[0]) == 4
    np.testing.assert_allclose(losses[1], losses[0], rtol=0.02 if "bfloat16" in options else 1e-4)


def test_mistakes_are_one_sentence_and_exit_code_2(text, tmp_path, capsys):
    empty, short = tmp_path / "empty.txt", tmp_path / "short.txt"
    empty.write_bytes(b"")
    short.write_bytes(b"too short")
    broken = tmp_path / "tokenizer.json"
    broken.write_text("{")
    for arguments, words in [
        ([str(empty)], ["empty.txt", "is empty", "give a text file"]),
        ([str(tmp_path / "missing.txt")], ["missing.txt", "No such file", "give a text file"]),
        ([str(short)], ["shorter than one window", "needs 513, got 1", "--length"]),
        ([str(text), "--steps", "0"], ["steps must be positive, got 0"]),
        ([str(text), "--steps", "many"], ["--steps", "many"]),
        ([str(text), "--schedule", "cos"], ["--schedule", "cosine"]),
        ([str(text), "--hidden-size", "40", "--head-dim", "64"], ["num_heads * head_dim"]),
        ([str(text), "--init", "x", "--layers", "3"], ["--init brings its own sizes, got --layers too"]),
        ([str(text), "--tokenizer", str(broken)], ["tokenizer.json"]),
        ([str(text), "--remat", "most"], ["remat", "most"]),
        ([str(text), "--tokenizer", str(tmp_path / "none.json")], ["none.json", "No such file"]),
    ]:
        code = main(["train", *arguments, "--out", str(tmp_path / "run"), "--quiet"])
        said = capsys.readouterr().err
        assert code == 2, arguments
        assert "Traceback" not in said
        assert all(word in said for word in words), said
        assert len(said.strip().splitlines()) == 1, said
        assert not (tmp_path / "run" / "log.jsonl").exists()


def test_a_loss_that_is_no_number_stops_the_run(text, tmp_path, capsys):
    out = tmp_path / "run"
    code = main(
        [
            "train",
            str(text),
            "--out",
            str(out),
            *SIZES,
            *FEW,
            "--learning-rate",
            "1e30",
            "--clip",
            "0",
            "--quiet",
        ]
    )
    assert code == 2
    assert "training diverged: the loss of step" in capsys.readouterr().err
