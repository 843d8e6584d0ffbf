"""Folders of images: what is found, refused, held out and measured."""

import json

import numpy as np
import pytest

from portable.checks import CheckpointError, ConfigError, DataError
from portable.training.classify import ImageBatches, ImageOptions, classify
from portable.training.image_files import decode
from portable.training.images import ImageSet, Preprocess, read_digits, read_images
from portable.training.plot import confusion_matrix
from tests.oracles import need

need("grain", "matplotlib", "PIL")

COLOURS = {"blue": (0, 0, 200), "green": (0, 200, 0), "red": (200, 0, 0)}


def paint(path, colour=(9, 9, 9), size=(12, 10), mode="RGB", seed=0):
    from PIL import Image

    noise = np.random.default_rng(seed).integers(0, 50, (size[1], size[0], 3))
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray((noise + np.array(colour)).astype(np.uint8)).convert(mode).save(path)


def folder_of(root, count=10, colours=COLOURS, **options):
    for name, colour in colours.items():
        for i in range(count):
            paint(root / name / f"{i}{('.png', '.jpg', '.WEBP')[i % 3]}", colour, seed=i, **options)
    return root


def test_a_folder_is_read_with_its_classes(tmp_path):
    folder = folder_of(tmp_path)
    (folder / "red" / "notes.txt").write_text("not an image")
    paint(folder / "red" / "more" / "below.png", COLOURS["red"])
    paint(folder / ".hidden" / "a.png")
    images = read_images(folder)
    assert images.classes == ("blue", "green", "red")
    assert (images.preprocess.size, images.preprocess.channels) == (10, 3)
    assert (len(images.train), len(images.held_out)) == (31 - 3, 3)
    assert sorted(images.held_out.labels) == [0, 1, 2]
    assert not set(images.train.names) & set(images.held_out.names)
    for part in (images.train, images.held_out):
        for pixels, label, name in zip(part.pixels, part.labels, part.names, strict=True):
            assert pixels.shape == (10, 10, 3)
            assert pixels.dtype == np.uint8
            assert name.startswith(images.classes[label] + "/")
            assert pixels.mean((0, 1)).argmax() == {"blue": 2, "green": 1, "red": 0}[images.classes[label]]
    normal = np.stack([images.preprocess(pixels) for pixels in images.train.pixels]).astype(np.float64)
    np.testing.assert_allclose(normal.mean((0, 1, 2)), 0, atol=1e-5)
    np.testing.assert_allclose(normal.std((0, 1, 2)), 1, atol=1e-5)
    # The same whatever the folder is called; another as soon as a file, the size or the split is.
    (tmp_path / "red" / "more" / "below.png").rename(tmp_path / "red" / "below.png")
    again = read_images(folder)
    assert again.fingerprint != images.fingerprint
    assert read_images(folder, size=8).fingerprint != again.fingerprint
    assert read_images(folder).fingerprint == again.fingerprint
    assert len(read_images(folder, hold_out=False).held_out) == 0


def test_many_images_are_held_out_by_the_hash_of_their_path_alone(tmp_path):
    folder_of(tmp_path, 40, size=(4, 4))
    before = read_images(tmp_path)
    assert before.rule == "sha256 of the path is a multiple of 20"
    held = set(before.held_out.names)
    for i in range(5):
        paint(tmp_path / "red" / f"new{i}.png", size=(4, 4))
    assert {name for name in read_images(tmp_path).held_out.names if "new" not in name} == held


def test_two_folders_are_the_two_parts(tmp_path):
    folder_of(tmp_path / "train", 3)
    folder_of(tmp_path / "val", 2, {"red": (1, 1, 1)})
    images = read_images(tmp_path)
    assert (len(images.train), len(images.held_out), images.rule) == (9, 2, "the folder val")
    assert images.held_out.labels.tolist() == [2, 2]
    paint(tmp_path / "val" / "cyan" / "a.png")
    with pytest.raises(DataError, match=r"holds classes that .* lacks: cyan"):
        read_images(tmp_path)


@pytest.mark.parametrize("mode", ["1", "L", "P", "RGBA", "LA", "I;16", "CMYK"])
@pytest.mark.parametrize("channels", [1, 3])
def test_every_kind_of_pixel_becomes_grey_or_colour(tmp_path, mode, channels):
    from PIL import Image

    path = tmp_path / ("a.jpg" if mode == "CMYK" else "a.png")
    if mode == "I;16":
        Image.fromarray(np.full((6, 8), 128 * 256, np.uint16)).save(path)
    else:
        image = Image.new("RGB", (8, 6), (128, 128, 128)).convert(mode)
        image.save(path, **({"transparency": 0} if mode == "P" else {}))
    pixels = decode(path, 5, channels)
    assert (pixels.shape, pixels.dtype) == ((5, 5, channels), np.uint8)
    assert abs(pixels.mean() - 128) < (130 if mode in "1P" else 3)


def test_images_are_upright_and_white_where_transparent(tmp_path):
    from PIL import Image

    picture = np.zeros((4, 8, 3), np.uint8)
    picture[:, :4] = 255  # white on the left
    exif = Image.Exif()
    exif[0x0112] = 6  # the camera was turned: its left is up
    Image.fromarray(picture).save(tmp_path / "turned.png", exif=exif)
    turned = decode(tmp_path / "turned.png", 4, 1)[..., 0]
    assert turned[0].min() > turned[-1].max()
    Image.new("RGBA", (4, 4), (0, 0, 0, 0)).save(tmp_path / "nothing.png")
    assert decode(tmp_path / "nothing.png", 4, 3).min() == 255


def spoil(folder):
    good = (folder / "red" / "0.png").read_bytes()
    (folder / "red" / "broken.png").write_bytes(good[: len(good) // 2])
    (folder / "red" / "text.jpg").write_text("not an image")
    (folder / "blue" / "empty.png").write_bytes(b"")
    paint(folder / "blue" / "tiny.png", size=(1, 1))
    (folder / "gone").mkdir()


def test_everything_that_cannot_be_used_is_named_at_once_or_left_out(tmp_path):
    spoil(folder_of(tmp_path, 3))
    with pytest.raises(DataError) as error:
        read_images(tmp_path)
    for part in (
        "2 broken (red/broken.png, red/text.jpg)",
        "1 empty (blue/empty.png)",
        "1 smaller than 4 x 4 pixels (blue/tiny.png)",
        "1 a class without images (gone/)",
        "--skip-broken",
    ):
        assert part in str(error.value)
    images = read_images(tmp_path, skip_broken=True)
    assert images.classes == ("blue", "green", "red")
    assert len(images.train) + len(images.held_out) == 9
    assert len(images.skipped) == 5
    assert "skipped 2 broken (red/broken.png, red/text.jpg), 1 empty" in images.summary()


def test_a_file_that_breaks_later_is_said_in_a_sentence(tmp_path):
    paint(tmp_path / "a.png")
    decode(tmp_path / "a.png", 8, 3)
    (tmp_path / "a.png").write_bytes(b"")
    with pytest.raises(DataError, match="can no longer be read"):
        decode(tmp_path / "a.png", 8, 3)


def test_the_digits():
    need("sklearn")
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

    images = read_digits()
    x, y = load_digits(return_X_y=True)
    x_train, x_test, y_train, y_test = train_test_split(x, y, test_size=1 / 3, stratify=y, random_state=0)
    for part, pixels, labels in [(images.train, x_train, y_train), (images.held_out, x_test, y_test)]:
        assert np.array_equal(np.asarray(part.pixels).reshape(-1, 64), pixels)
        assert np.array_equal(part.labels, labels)
    scaled = np.asarray(images.train.pixels) / 16
    assert images.preprocess.mean[0] == pytest.approx(scaled.mean(), abs=1e-6)
    assert images.preprocess.deviation[0] == pytest.approx(scaled.std(), abs=1e-6)
    assert len(read_digits(hold_out=False).train) == 1797


def numbered(count):
    pixels = np.zeros((count, 6, 6, 1), np.uint8)
    pixels[:, 2, 2, 0] = np.arange(count)
    return ImageSet(pixels, np.arange(count, dtype=np.int32), tuple(map(str, range(count))))


PLAIN = Preprocess(6, 1, 1.0, (0.0,), (1.0,))


def test_a_batch_depends_on_the_step_alone_and_images_are_moved_and_flipped():
    batches = ImageBatches(numbered(24), PLAIN, ImageOptions(shift=1, flip=True), 8, seed=3)
    again = ImageBatches(numbered(24), PLAIN, ImageOptions(shift=1, flip=True), 8, seed=3)
    first = [batches[step] for step in range(12)]
    for step in reversed(range(12)):
        other = again[step]
        assert {k: (v.shape, v.dtype) for k, v in other.items()} == {
            "images": ((8, 6, 6, 1), np.float32),
            "labels": ((8,), np.int32),
            "noise": ((8, 2), np.uint32),
        }
        assert all(np.array_equal(first[step][key], other[key]) for key in other)
    assert sorted(np.concatenate([b["labels"] for b in first[:3]])) == list(range(24))
    assert len(np.unique(np.concatenate([b["noise"] for b in first]), axis=0)) == 96
    where = set()
    for batch in first:
        for image, label in zip(batch["images"][..., 0], batch["labels"], strict=True):
            if label:
                ((y, x),) = np.argwhere(image)
                assert image[y, x] == label
                where.add((int(y), int(x)))
    # Moved by at most one: rows 1 to 3; columns too, and mirrored 2 to 4.
    assert where == {(y, x) for y in (1, 2, 3) for x in (1, 2, 3, 4)}


def test_accuracy_and_confusion_are_counted():
    labels = np.array([0, 0, 1, 2, 2], np.int32)
    taken = np.array([0, 1, 1, 2, 0])
    from flax import nnx

    class Told(nnx.Module):
        """Answers with the class that a pixel names."""

        def __call__(self, images):
            return 4.0 * (images[:, 0, 0, :1] == np.arange(3))

    pixels = np.tile(taken.astype(np.uint8)[:, None, None, None], (1, 2, 2, 1))
    images = ImageSet(pixels, labels, tuple("abcde"))
    found = classify(Told(), images, PLAIN, batch_size=2)
    assert found.confusion.tolist() == [[1, 1, 0], [0, 1, 0], [1, 0, 1]]
    assert found.accuracy == 3 / 5
    assert found.loss == pytest.approx(np.log(np.exp(4) + 2) - 4 * 3 / 5, rel=1e-6)
    with pytest.raises(DataError, match="accuracy needs images, got none"):
        classify(Told(), ImageSet(pixels[:0], labels[:0], ()), PLAIN)
    with pytest.raises(DataError, match="the model has 3 classes, the images are of 6"):
        classify(Told(), ImageSet(pixels, labels + 3, tuple("abcde")), PLAIN)


@pytest.mark.parametrize("classes", [2, 60])
def test_a_confusion_matrix_is_drawn(tmp_path, classes):
    counts = np.random.default_rng(0).integers(0, 9, (classes, classes)) + 50 * np.eye(classes, dtype=int)
    counts[0] = 0  # a class of which nothing was held out
    confusion_matrix(counts, [f"a class with a long name {i}" for i in range(classes)], tmp_path / "a.png")
    assert (tmp_path / "a.png").read_bytes().startswith(b"\x89PNG")


def test_the_preparation_goes_through_its_file(tmp_path):
    path = tmp_path / "preprocessor_config.json"
    prepared = Preprocess(32, 3, 1 / 255, (0.1, 0.2, 0.3), (0.4, 0.5, 0.6))
    path.write_text(json.dumps(prepared.to_dict()))
    assert Preprocess.from_file(path) == prepared
    path.write_text(json.dumps({"size": 224, "image_mean": [0.5], "image_std": [0.5]}))
    assert Preprocess.from_file(path) == Preprocess(224, 1, 1 / 255, (0.5,), (0.5,))
    for text in ("{", "[]", "{}", '{"size": 8, "image_mean": [0], "image_std": [0]}'):
        path.write_text(text)
        with pytest.raises(CheckpointError, match="does not say how images are prepared"):
            Preprocess.from_file(path)


def test_wrong_options():
    with pytest.raises(ConfigError, match="shift must not be negative, got -1"):
        ImageOptions(shift=-1)
    with pytest.raises(ConfigError, match=r"label_smoothing must be at least 0 and below 1, got 1\.0"):
        ImageOptions(label_smoothing=1.0)


def test_progress_of_images():
    import io

    from rich.console import Console

    from portable.training.progress import Bar, Lines, Report

    report = Report(30, 60, 1.5, None, 1234.5, 185.0, held_out=0.9866, unit="images")
    plain, screen = io.StringIO(), io.StringIO()
    Lines(plain).report(report)
    assert plain.getvalue() == "step 30/60  loss 1.5000  held out 98.66%  1,234 images/s  3:05 min left\n"
    bar = Bar(Console(file=screen, force_terminal=True, color_system=None, width=160))
    bar.start(0, 60)
    bar.report(report)
    bar.close()
    last = " ".join(screen.getvalue().split())
    assert "loss 1.5000 held out 98.66% 1,234 images/s 3:05 min left" in last
    assert "bits/byte" not in last
