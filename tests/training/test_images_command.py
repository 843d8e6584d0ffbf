"""`portable train --task image`: what it makes, runs that are stopped, and a sentence for what it cannot do."""

import json
import shutil
import signal
import types

import numpy as np
import pytest

from portable import models
from portable.cli import main
from portable.commands import _train_images
from portable.models.nat import NATConfig
from portable.training.classify import classify
from portable.training.images import Preprocess, read_images
from portable.training.log import read_log
from portable.training.progress import Lines
from tests.models.small import random_model
from tests.oracles import need
from tests.training.test_images import folder_of, paint, spoil

need("grain", "matplotlib", "PIL", "sklearn")

TINY = ["--embed-dim", "8", "--depths", "1", "--patch-size", "2"]
FEW = ["--steps", "12", "--batch-size", "8", "--checkpoint-every", "4", "--eval-every", "6", "--log-every", "1"]
FEW += ["--learning-rate", "0.01", "--accumulate", "2"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return folder_of(tmp_path_factory.mktemp("images"), 8)


def command(folder, out, *more):
    return ["train", str(folder), "--task", "image", "--out", str(out), "--size", "8", *TINY, *FEW, *more]


@pytest.fixture(scope="module")
def whole(folder, tmp_path_factory):
    """The folder of a run that nothing happened to."""
    out = tmp_path_factory.mktemp("whole") / "run"
    assert main([*command(folder, out), "--quiet"]) == 0
    return out


def losses(out):
    """Everything of the log that must not depend on what happened to the run, exactly."""
    keys = ("step", "loss", "learning_rate", "gradient_norm", "held_out_accuracy", "held_out_loss")
    return [tuple(record.get(key) for key in keys) for record in read_log(out / "log.jsonl")]


def test_a_run_leaves_a_folder_with_everything(folder, whole):
    names = {p.name for p in whole.iterdir()} - {".lock"}
    assert names == {"checkpoints", "config.json", "log.jsonl", "curves.png", "confusion.png", "model"}
    log = losses(whole)
    assert [line[0] for line in log] == list(range(1, 13))
    assert [line[0] for line in log if line[4] is not None] == [6, 12]
    assert log[-1][1] < log[0][1]
    described = json.loads((whole / "config.json").read_text())
    assert "length" not in described["training"]
    assert described["augmentation"] == {"shift": 1, "flip": False, "label_smoothing": 0.1}


def test_the_model_in_the_folder_is_the_one_that_was_measured(folder, whole):
    model = models.load(whole / "model")
    assert model.config.labels == ("blue", "green", "red")
    assert model.config.dilations == ((1,),)
    prepared = Preprocess.from_file(whole / "model" / "preprocessor_config.json")
    images = read_images(folder, size=8)
    assert prepared == images.preprocess
    found = classify(model, images.held_out, prepared)
    assert (found.accuracy, found.loss) == pytest.approx(losses(whole)[-1][4:], rel=1e-4)


def test_a_stopped_run_ends_with_the_same_losses_bit_for_bit(folder, whole, tmp_path, capsys, monkeypatch):
    out, show = tmp_path / "run", Lines.report
    arguments = command(folder, out)

    def press(self, report):
        show(self, report)
        if report.step == 5:
            signal.raise_signal(signal.SIGINT)

    with monkeypatch.context() as patch:
        patch.setattr(Lines, "report", press)
        assert main(arguments) == 130
    said = capsys.readouterr().out
    assert "images/s" in said
    assert "bits/byte" not in said
    assert len(losses(out)) < 12
    assert main(arguments) == 0
    assert losses(out) == losses(whole)
    said = capsys.readouterr().out
    assert "continuing after step" in said
    assert "class  images  right" in said
    assert "held out" in said.splitlines()[-1]
    # As after a kill: the log is ahead of the last checkpoint.
    shutil.rmtree(out / "checkpoints" / "12")
    assert main([*arguments, "--quiet"]) == 0
    assert losses(out) == losses(whole)


def test_another_look_at_the_images_is_another_run(folder, whole, capsys):
    assert main([*command(folder, whole), "--flip"]) == 2
    assert "augmentation.flip was false, is true" in capsys.readouterr().err


def test_training_goes_on_from_a_saved_model(folder, whole, tmp_path, capsys):
    init = ["--task", "image", "--init", str(whole / "model"), *FEW, "--no-held-out"]
    assert main(["train", str(folder), "--out", str(tmp_path / "same"), *init]) == 0
    said = capsys.readouterr().out
    assert "weights of" in said
    assert "the head is new" not in said
    assert "nothing held out" in said
    assert not (tmp_path / "same" / "confusion.png").exists()
    assert losses(tmp_path / "same")[0][1] < losses(whole)[0][1]
    other = folder_of(tmp_path / "other", 4, {"dark": (0, 0, 0), "light": (200, 200, 200)})
    one = ["--steps", "1", "--warmup", "0", "--learning-rate", "1e-6"]
    assert main(["train", str(other), "--out", str(tmp_path / "new"), *init, *one]) == 0
    assert "the head is new: it was for 3 classes, here are 2" in capsys.readouterr().out
    before, tuned = (models.load(run / "model") for run in (whole, tmp_path / "new"))
    assert tuned.config.labels == ("dark", "light")
    np.testing.assert_allclose(before.stem.conv1.kernel[...], tuned.stem.conv1.kernel[...], atol=1e-5)
    # Images are prepared as they were for the model, not as these would be.
    old, new = ((run / "model" / "preprocessor_config.json").read_text() for run in (whole, tmp_path / "new"))
    assert old == new


def test_broken_images_are_left_out_when_asked(tmp_path, capsys):
    spoil(folder_of(tmp_path / "images", 3))
    arguments = command(tmp_path / "images", tmp_path / "images" / "runs")
    assert main(arguments) == 2
    said = capsys.readouterr().err
    assert len(said.strip().splitlines()) == 1
    assert "2 broken (red/broken.png, red/text.jpg)" in said
    # The run lies among the classes, and is none of them, also when it goes on.
    for _ in range(2):
        assert main([*arguments, "--skip-broken"]) == 0
        assert "of 3 classes" in capsys.readouterr().out


def test_mistakes_are_one_sentence_and_exit_code_2(folder, tmp_path, capsys):
    file, empty, one, tiny = (tmp_path / name for name in ("file.png", "empty", "one", "tiny"))
    paint(file)
    empty.mkdir()
    folder_of(one, 2, {"red": (1, 1, 1)})
    folder_of(tiny, 2, size=(1, 1))
    models.save(random_model(), tmp_path / "text")
    image, text = ["--task", "image"], str(tmp_path / "text")
    for arguments, words in [
        ([str(tmp_path / "none"), *image], ["none does not exist", "give a folder"]),
        ([str(file), *image], ["file.png is a file", "give a folder"]),
        ([str(empty), *image], ["empty holds no folders", "named as the class"]),
        ([str(one), *image], ["fewer than two classes (red)", "nothing to tell apart"]),
        ([str(tiny), *image], ["6 smaller than 4 x 4 pixels (blue/0.png", "3 a class without images (blue/"]),
        ([str(tiny), *image, "--skip-broken"], ["fewer than two classes (none)"]),
        ([str(folder), *image, "--tokenizer", "t.json"], ["--task image has no use for --tokenizer: leave out"]),
        ([str(folder), *image, "--length", "9", "--layers", "2"], ["no use for --length, --layers"]),
        ([str(folder), "--flip"], ["--task text has no use for --flip: leave out what --task image takes"]),
        ([str(folder), "--shift", "0", "--depths", "2"], ["no use for --shift, --depths"]),
        ([str(folder), *image, "--init", text], ["Mamba2LM, not a model of images"]),
        ([str(folder), *image, "--init", text, "--depths", "2"], ["--init brings its own sizes, got --depths too"]),
        ([str(folder), *image, "--size", "2"], ["--size must be at least 4 pixels", "got 2"]),
        ([str(folder), *image, "--depths", "two"], ["--depths must be numbers", "got 'two'"]),
        ([str(folder), *image, "--kernel-size", "4"], ["kernel_size must be odd; got 4"]),
        ([str(folder), *image, "--patch-size", "3"], ["patch_size must be 4, 2 or 1; got 3"]),
        ([str(folder), *image, "--drop-path", "1"], ["drop_path_rate must be below 1"]),
        ([str(folder), *image, "--shift", "-1"], ["shift must not be negative, got -1"]),
        ([str(folder), *image, "--batch-size", "0"], ["batch_size must be positive, got 0"]),
        (["digits", *image, "--size", "16"], ["the digits are 8 x 8 pixels, got --size 16"]),
        ([str(folder), "--task", "sound"], ["--task", "sound"]),
    ]:
        code = main(["train", *arguments, "--out", str(tmp_path / "run"), "--quiet"])
        said = capsys.readouterr().err
        assert code == 2, arguments
        assert "Traceback" not in said
        assert all(word in said for word in words), said
        assert len(said.strip().splitlines()) == 1, said
        assert not (tmp_path / "run").exists()


def test_text_is_not_trained_from_a_model_of_images(folder, whole, tmp_path, capsys):
    (tmp_path / "a.txt").write_text("some text " * 200)
    init = ["--init", str(whole / "model")]
    assert main(["train", str(tmp_path / "a.txt"), "--out", str(tmp_path / "run"), *init]) == 2
    assert "is NAT, a model of images: give --task image" in capsys.readouterr().err


def new_config(size, classes):
    """The configuration for grey images when nothing else is said."""
    images = types.SimpleNamespace(preprocess=Preprocess(size, 1, 1.0, (0.0,), (1.0,)), classes=classes)
    given = dict.fromkeys(("patch_size", "kernel_size", "depths", "embed_dim", "drop_path"))
    return _train_images.new_config(types.SimpleNamespace(**given), images)


def test_the_model_of_the_digits_in_the_matrix_is_the_one_that_is_trained():
    assert NATConfig.digits_dinat() == new_config(8, tuple("0123456789"))


@pytest.mark.parametrize(
    ("size", "patch", "sides", "dilations"),
    [
        (8, 1, 2, ((1, 2), (1, 1))),
        (32, 2, 3, ((1, 5), (1, 2), (1, 1))),
        (224, 4, 4, ((1, 8), (1, 4), (1, 2), (1, 1))),
        (4, 1, 1, ((1, 1),)),
    ],
)
def test_a_new_model_fits_its_images(size, patch, sides, dilations):
    config = new_config(size, ("a", "b"))
    assert (config.patch_size, len(config.depths), config.dilations) == (patch, sides, dilations)
    assert (config.num_channels, config.labels) == (1, ("a", "b"))


def test_the_digits_begin_to_be_told_apart(tmp_path, capsys):
    sizes = ["--embed-dim", "8", "--depths", "1", "--steps", "30", "--batch-size", "32", "--learning-rate", "0.01"]
    assert main(["train", "digits", "--task", "image", "--out", str(tmp_path / "run"), *sizes]) == 0
    said = capsys.readouterr().out
    assert "train on 1,198 images of 10 classes, 8 x 8 x 1, held out 599" in said
    assert read_log(tmp_path / "run" / "log.jsonl")[-1]["held_out_accuracy"] > 0.15  # 0.1 by chance
