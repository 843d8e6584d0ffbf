"""`portable train`: what it makes, and a sentence for what it cannot do."""

import dataclasses
import json
import math

import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from portable import models
from portable.checks import PortableError
from portable.cli import main
from portable.training import TrainOptions, bits_per_byte, fit, read_text
from portable.training.log import read_log
from tests.oracles import need

need("grain", "matplotlib")

SIZES = ["--hidden-size", "32", "--layers", "2", "--state-size", "8", "--head-dim", "16"]
FEW = ["--steps", "4", "--length", "32", "--batch-size", "2", "--warmup", "0", "--quiet"]


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    path = tmp_path_factory.mktemp("text") / "text.txt"
    path.write_bytes(bytes(range(32, 127)) * 30)
    return path


@pytest.fixture(scope="module")
def plain(text, tmp_path_factory):
    """The folder of a short run with the default options."""
    out = tmp_path_factory.mktemp("plain") / "run"
    assert main(["train", str(text), "--out", str(out), *SIZES, *FEW]) == 0
    return out


def losses(folder):
    return [record["loss"] for record in read_log(folder / "log.jsonl")]


def test_the_model_in_the_folder_is_the_one_that_was_measured(text, plain):
    score = bits_per_byte(models.load(plain / "model"), read_text(text).held_out)
    logged = read_log(plain / "log.jsonl")[-1]["held_out_bits_per_byte"]
    assert score.bits_per_byte == pytest.approx(logged, rel=1e-4)
    config = json.loads((plain / "model" / "config.json").read_text())
    assert (config["vocab_size"], config["bos_token_id"], config["eos_token_id"]) == (256, 0, 0)


def test_training_goes_on_from_a_saved_model(text, plain, tmp_path):
    assert main(["train", str(text), "--out", str(tmp_path), "--init", str(plain / "model"), *FEW]) == 0
    # A fresh model needs about 8 bits a byte; this run begins near where the first one ended.
    assert losses(plain)[0] / math.log(2) == pytest.approx(8, abs=0.2)
    assert losses(tmp_path)[0] / math.log(2) < 7.7


@pytest.mark.parametrize("options", [["--dtype", "bfloat16"], ["--remat", "full"]])
def test_other_ways_to_compute_learn_the_same(text, plain, tmp_path, options):
    assert main(["train", str(text), "--out", str(tmp_path), *SIZES, *FEW, *options]) == 0
    assert len(losses(tmp_path)) == 4
    np.testing.assert_allclose(losses(tmp_path), losses(plain), rtol=0.02 if "bfloat16" in options else 1e-4)


def test_a_run_inside_the_folder_of_its_text_does_not_read_itself(text, tmp_path, capsys):
    (tmp_path / "text.txt").write_bytes(text.read_bytes())
    arguments = ["train", str(tmp_path), "--out", str(tmp_path / "my runs" / "a"), *SIZES, *FEW]
    assert main([*arguments, "--max-minutes", "0"]) == 0
    capsys.readouterr()
    assert main(arguments) == 0  # the text is the same as before, though config.json and log.jsonl are there now


def test_mistakes_are_one_sentence_and_exit_code_2(text, tmp_path, capsys):
    empty, short, broken = tmp_path / "empty.txt", tmp_path / "short.txt", tmp_path / "tokenizer.json"
    empty.write_bytes(b"")
    short.write_bytes(b"too short")
    broken.write_text("{")
    for arguments, words in [
        ([str(empty)], ["empty.txt", "is empty", "give a text file"]),
        ([str(tmp_path / "missing.txt")], ["missing.txt", "No such file", "give a text file"]),
        ([str(short)], ["shorter than one window", "needs 513, got 1", "--length"]),
        ([str(text), "--steps", "0"], ["steps must be positive, got 0"]),
        ([str(text), "--steps", "many"], ["--steps", "many"]),
        ([str(text), "--hidden-size", "0"], ["hidden_size must be an integer of at least 1, got 0"]),
        ([str(text), "--head-dim", "0"], ["head_dim must be an integer of at least 1, got 0"]),
        ([str(text), "--seed", "99999999999999999999"], ["seed must be below 2**32"]),
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
        assert not (tmp_path / "run").exists()


class Constant(nnx.Module):
    """Predicts the same bytes everywhere."""

    @dataclasses.dataclass(frozen=True)
    class Config:
        vocab_size: int = 256

    def __init__(self):
        self.config, self.dtype = self.Config(), jnp.float32
        self.kernel = nnx.Param(jnp.zeros(self.config.vocab_size))

    def __call__(self, tokens, *, segment_ids=None):
        return jnp.broadcast_to(self.kernel[...], (*tokens.shape, self.config.vocab_size))


def test_a_loss_that_is_no_number_stops_the_run_with_its_log(text, tmp_path):
    options = TrainOptions(steps=9, length=32, warmup=0, schedule="constant", learning_rate=1e38, clip=0)
    with pytest.raises(PortableError, match=r"diverged: the loss of step \d is (nan|inf); start again in another"):
        fit(Constant(), read_text(text), options, tmp_path)
    assert losses(tmp_path)[0] == pytest.approx(8 * math.log(2), rel=1e-5)
    assert not math.isfinite(losses(tmp_path)[-1])


def test_a_run_can_be_left_early_and_taken_up_again(text, tmp_path):
    options = TrainOptions(steps=9, length=32, warmup=0, eval_every=0)
    corpus = read_text(text, hold_out=False)
    first = fit(Constant(), corpus, options, tmp_path / "run", until=3)
    assert (first.status, first.step) == ("stopped", 3)
    assert not (tmp_path / "run" / "model").exists()
    fit(Constant(), corpus, options, tmp_path / "run", until=6)
    fit(Constant(), corpus, options, tmp_path / "straight", until=6)
    assert losses(tmp_path / "run") == losses(tmp_path / "straight")
    assert len(losses(tmp_path / "run")) == 6
