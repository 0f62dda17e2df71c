"""Predicted masks lie on their photos, whatever the photo's size and orientation."""

from __future__ import annotations

import errno
import json
import os
import shutil
import signal
from pathlib import Path

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from PIL import Image, ImageOps

from kdcache.cli import main
from kdcache.config import TrainConfig
from kdcache.deploy import predict as predict_module
from kdcache.deploy.predict import predict
from kdcache.deploy.trained import NORMALISED, TrainedStudent, open_student
from kdcache.errors import DatasetError, ModelError, RunError
from kdcache.imaging import decode_image, decode_mask
from kdcache.pixels import restored
from kdcache.precompute.dataset import folder_dataset
from kdcache.precompute.extract import extract
from kdcache.train.run_folder import read_best_student
from kdcache.train.student import StudentOutput
from kdcache.train.weights import read_student, save_student

SIZE = 64


def red_is_person(resize="stretch", size=SIZE):
    """A student whose logit is a known function of the pixels: positive where red is strong."""

    def run(pixels_NCHW):
        red = restored(pixels_NCHW)[..., 0].float()[:, None]
        return StudentOutput((red - 127.5) / 10, ())

    return TrainedStudent(
        path=run,
        metadata={"size_px": size, "resize": resize, "input": NORMALISED},
        device="cpu",
        config=TrainConfig(),
        record=None,
        projections=None,
        unet=None,
        run=run,
        takes_photos=None,
    )


def photo(path, height, width, box, orientation=1):
    """A black photo with a red box (top, left, bottom, right) as it is shown; returns the truth."""
    shown = np.zeros((height, width, 3), np.uint8)
    top, left, bottom, right = box
    shown[top:bottom, left:right, 0] = 255
    picture = Image.fromarray(shown)
    back = {3: "ROTATE_180", 6: "ROTATE_90", 8: "ROTATE_270", 5: "TRANSPOSE", 2: "FLIP_LEFT_RIGHT"}
    exif = Image.Exif()
    if orientation > 1:
        picture = picture.transpose(getattr(Image.Transpose, back[orientation]))
        exif[0x0112] = orientation
    picture.save(path, quality=100, subsampling=0, exif=exif)
    return shown[..., 0] > 0


@pytest.mark.parametrize("resize", ["stretch", "letterbox"])
@pytest.mark.parametrize(
    ("height", "width"), [(300, 200), (180, 320), (64, 64), (128, 128), (97, 211), (480, 40)]
)
def test_masks_lie_on_portrait_and_landscape_photos(tmp_path, resize, height, width):
    """The box comes back within the pixels that resizing to the input and back can move."""
    box = (height // 4, width // 4, 3 * height // 4, 3 * width // 4)
    truth = photo(tmp_path / "a.png", height, width, box)
    report = predict(red_is_person(resize), [str(tmp_path / "a.png")], tmp_path / "out")
    assert report.images == 1
    mask = np.asarray(Image.open(tmp_path / "out/a.png"))
    assert mask.shape == (height, width)
    assert set(np.unique(mask)) == {0, 255}
    scale = max(height, width) / SIZE if resize == "letterbox" else 1
    reach = [max(1.0, scale), max(1.0, scale)]
    if resize == "stretch":
        reach = [max(1.0, height / SIZE), max(1.0, width / SIZE)]
    ys, xs = np.nonzero(mask)
    found = (ys.min(), xs.min(), ys.max() + 1, xs.max() + 1)
    for edge, wanted, allowed in zip(found, box, reach * 2, strict=True):
        assert abs(edge - wanted) <= allowed
    if (height, width) == (SIZE, SIZE):
        assert np.array_equal(mask > 0, truth)


@pytest.mark.parametrize(("height", "width"), [(1, 1), (1, 7), (5, 3)])
def test_tiny_photos_have_tiny_masks(tmp_path, height, width):
    photo(tmp_path / "t.png", height, width, (0, 0, height, width))
    for resize in ("stretch", "letterbox"):
        predict(red_is_person(resize), [str(tmp_path / "t.png")], tmp_path / resize)
        mask = np.asarray(Image.open(tmp_path / resize / "t.png"))
        assert mask.shape == (height, width)
        assert (mask == 255).all()


@pytest.mark.parametrize("orientation", [2, 3, 5, 6, 8])
def test_masks_lie_on_the_files_own_pixels_and_are_shown_as_the_photo_is(tmp_path, orientation):
    source, out = tmp_path / "p.jpg", tmp_path / "out"
    # a box in one corner, so that every turn shows
    truth = photo(source, 128, 192, (0, 0, 64, 64), orientation)
    predict(red_is_person(), [str(source)], out, overlay=True, probabilities=True, device="cpu")
    for name in ("p.png", "p_probability.png"):
        with Image.open(source) as photo_file, Image.open(out / name) as mask_file:
            assert mask_file.size == photo_file.size
            stored = np.asarray(mask_file) > np.asarray(mask_file).max() / 2
            red = np.asarray(photo_file)[..., 0] > 127
            assert (stored == red).mean() > 0.97
            shown = np.asarray(ImageOps.exif_transpose(mask_file))
        assert shown.shape == truth.shape
        assert ((shown > shown.max() / 2) == truth).mean() > 0.97
    with Image.open(out / "p_overlay.jpg") as overlay:
        assert overlay.size == (192, 128)
        assert overlay.getexif().get(0x0112, 1) == 1
    # read as a mask of the same photo, it fits
    assert decode_mask((out / "p.png").read_bytes()).shape == (128, 192)
    assert decode_image(source.read_bytes()).shape[:2] == (128, 192)


def test_predicted_masks_are_masks_for_extract(tmp_path, standins):
    (tmp_path / "images").mkdir()
    for number, orientation in enumerate((1, 6, 3)):
        photo(tmp_path / f"images/{number}.jpg", 96, 128, (0, 0, 48, 48), orientation)
    predict(red_is_person(), [str(tmp_path / "images")], tmp_path / "masks")
    dataset = folder_dataset(tmp_path / "images", tmp_path / "masks")
    report = extract(standins.config(val_fraction=0.0), dataset, tmp_path / "c", device="cpu")
    assert report.rows_added == 3
    assert not report.skipped
    assert not report.doubtful


def test_a_folder_keeps_its_tree_and_odd_files_are_skipped_by_name(tmp_path):
    images, out = tmp_path / "images", tmp_path / "images/masks"
    (images / "a/b").mkdir(parents=True)
    for name in ("a/x.jpg", "a/b/x.jpg", "twin.jpg", "twin.png", "ümlaut 1.webp"):
        photo(images / name, 20, 30, (0, 0, 10, 10))
    (images / "broken.jpg").write_bytes(b"\xff\xd8no")
    (images / "phone.heic").write_bytes(b"heic")
    (images / "notes.txt").write_text("no photo")
    for _ in range(2):  # its own masks are no photos of the next time
        result = CliRunner().invoke(
            main, ["predict", "x", str(images), "--out", str(out)], obj=None
        )
        assert result.exit_code == 1  # there is no student x
        report = predict(red_is_person(), [str(images)], out, batch_size=2)
        made = sorted(path.relative_to(out).as_posix() for path in out.rglob("*.png"))
        assert made == ["a/b/x.png", "a/x.png", "ümlaut 1.png"]
        assert report.images == 3
        skipped = {Path(name).name: why for name, why in report.skipped.items()}
        assert set(skipped) == {"twin.jpg", "twin.png", "broken.jpg", "phone.heic"}
        assert "twin.png would both be" in skipped["twin.jpg"]
        assert report.left_out == {"files of suffix .txt, not an image's": 1}


def test_globs_and_files_are_taken_together_and_nothing_is_overwritten(tmp_path):
    for name in ("1.png", "2.png", "11.png"):
        photo(tmp_path / name, 20, 30, (0, 0, 10, 10))
    before = (tmp_path / "1.png").read_bytes()
    report = predict(
        red_is_person(), [str(tmp_path / "1*.png"), str(tmp_path / "2.png")], tmp_path / "o"
    )
    assert report.images == 3
    with pytest.raises(DatasetError, match="would overwrite it"):
        predict(red_is_person(), [str(tmp_path / "1.png")], tmp_path)
    assert (tmp_path / "1.png").read_bytes() == before
    (tmp_path / "3.heic").write_bytes(b"heic")
    (tmp_path / "notes.txt").write_text("no photo")
    again = predict(red_is_person(), [str(tmp_path / "[123n]*")], tmp_path / "p")
    assert again.images == 3
    assert [Path(name).name for name in again.skipped] == ["3.heic"]
    assert again.left_out == {"files of suffix .txt, not an image's": 1}
    with pytest.raises(DatasetError, match="no such photo"):
        predict(red_is_person(), [str(tmp_path / "7*.png")], tmp_path / "o")


def test_probabilities_are_those_of_the_logits(tmp_path):
    Image.fromarray(np.full((SIZE, SIZE, 3), (131, 0, 0), np.uint8)).save(tmp_path / "p.png")
    predict(red_is_person(), [str(tmp_path / "p.png")], tmp_path / "o", probabilities=True)
    levels = np.asarray(Image.open(tmp_path / "o/p_probability.png")).astype(float)
    assert levels.max() == levels.min() == pytest.approx(65535 / (1 + np.exp(-0.35)), abs=1)


def test_a_run_its_file_and_its_exports_predict_alike(
    run, exported, deployable, standins, tmp_path
):
    paths = (run, run / "student_best.safetensors", exported.path, deployable.path)
    masks = []
    for number, path in enumerate(paths):
        out = tmp_path / str(number)
        result = CliRunner().invoke(
            main,
            ["predict", str(path), str(standins.images), "--out", str(out), "--json"],
        )
        assert result.exit_code == 0, result.output
        assert json.loads(result.stdout)["images"] == 10
        masks.append([np.asarray(Image.open(p)) for p in sorted(out.glob("*.png"))])
    for same in masks[1:3]:
        assert all((a == b).mean() > 0.9999 for a, b in zip(masks[0], same, strict=True))
    assert all((a == b).mean() > 0.9 for a, b in zip(masks[0], masks[3], strict=True))
    assert masks[0][0].shape == (90, 120)


def test_prediction_prepares_pixels_as_extraction_does(run, cache, standins, tmp_path):
    """On the stored pixels of a row the student says what the mask of its photo says."""
    key = cache.keys[0]
    one = open_student(run, "cpu")
    logits = one.logits(torch.from_numpy(cache[0].image.astype(np.uint8)[None]))
    seen = []
    whole = TrainedStudent(
        **(vars(one) | {"run": lambda pixels: seen.append(pixels) or one.run(pixels)})
    )
    predict(whole, [str(standins.images / key.sample_id)], tmp_path / "o")
    (pixels,) = seen
    assert np.array_equal(restored(pixels).numpy()[0], cache[0].image)
    student, _ = read_best_student(run)
    with torch.no_grad():
        assert torch.equal(student(pixels).logits, logits)


def test_a_student_of_other_preprocessing_is_refused(run, tmp_path):
    def copied(name):
        shutil.copytree(run, tmp_path / name)
        return tmp_path / name

    other = copied("other")
    record = json.loads((other / "run.json").read_text())
    record["fingerprint"]["resize"] = "letterbox"
    (other / "run.json").write_text(json.dumps(record))
    with pytest.raises(RunError, match="resize = stretch.*letterbox"):
        open_student(other, "cpu")
    older = copied("older")
    record = json.loads((run / "run.json").read_text())
    record["fingerprint"]["interpolation"] = "pillow-bilinear"
    (older / "run.json").write_text(json.dumps(record))
    with pytest.raises(RunError, match="interpolation = opencv-inter-linear.*pillow-bilinear"):
        open_student(older, "cpu")


def test_graphs_that_kdcache_did_not_write_are_refused(standins):
    with pytest.raises(ModelError, match="kdcache export"):
        open_student(standins.teacher, "cpu")


def test_a_stop_leaves_whole_masks_only(tmp_path, monkeypatch):
    for number in range(6):
        photo(tmp_path / f"{number}.jpg", 40, 40, (0, 0, 20, 20))
    save, calls = predict_module._save, iter(range(99))

    def stop_at_third(*arguments):
        if next(calls) == 2:
            os.kill(os.getpid(), signal.SIGINT)
        return save(*arguments)

    monkeypatch.setattr(predict_module, "_save", stop_at_third)
    with pytest.raises(KeyboardInterrupt):
        predict(red_is_person(), [str(tmp_path)], tmp_path / "o", workers=1)
    made = list((tmp_path / "o").iterdir())
    assert 3 <= len(made) < 6
    for path in made:
        assert path.suffix == ".png"
        with Image.open(path) as mask:
            mask.load()


@pytest.mark.parametrize(
    ("options", "names", "refused"),
    [
        ({"overlay": True}, ("a.jpg", "a_overlay.jpg"), {"a.jpg": "overwrite the photo"}),
        (
            {"probabilities": True},
            ("a.png", "a_probability.png"),
            {"a.png": "would overwrite it", "a_probability.png": "would overwrite it"},
        ),
        ({}, ("b.png", "a.jpg", "a.tif"), {"a.jpg": "both be", "a.tif": "both be", "b.png": "it"}),
    ],
)
def test_no_output_overwrites_a_photo_or_another_output(tmp_path, options, names, refused):
    for name in names:
        photo(tmp_path / name, 20, 30, (0, 0, 10, 10))
    before = {name: (tmp_path / name).read_bytes() for name in names}
    given = [str(tmp_path / name) for name in names]
    if len(refused) < len(names):
        report = predict(red_is_person(), given, tmp_path, **options)
        told = {Path(name).name: why for name, why in report.skipped.items()}
        assert set(told) == set(refused)
        assert all(why in told[name] for name, why in refused.items())
    else:
        with pytest.raises(DatasetError, match="no photo to predict"):
            predict(red_is_person(), given, tmp_path, **options)
    assert {name: (tmp_path / name).read_bytes() for name in names} == before


def test_outputs_of_two_photos_that_would_be_one_file_are_refused(tmp_path):
    for name in ("a.png", "a_probability.png"):
        photo(tmp_path / name, 20, 30, (0, 0, 10, 10))
    given = [str(tmp_path / "*.png")]
    with pytest.raises(DatasetError, match="would both be"):
        predict(red_is_person(), given, tmp_path / "o", probabilities=True)
    assert predict(red_is_person(), given, tmp_path / "o").images == 2


def test_the_folder_of_the_photos_is_no_place_for_masks(tmp_path):
    photo(tmp_path / "a.jpg", 20, 30, (0, 0, 10, 10))
    with pytest.raises(DatasetError, match="is the folder of the photos"):
        predict(red_is_person(), [str(tmp_path)], tmp_path)


def test_a_photo_named_twice_is_predicted_once(tmp_path):
    photo(tmp_path / "a.jpg", 20, 30, (0, 0, 10, 10))
    given = [str(tmp_path / "a.jpg"), str(tmp_path / "*.jpg"), str(tmp_path)]
    report = predict(red_is_person(), given, tmp_path / "o")
    assert (report.images, report.skipped) == (1, {})


def test_a_mask_that_cannot_be_written_is_skipped_by_name(tmp_path):
    (tmp_path / "in").mkdir()
    photo(tmp_path / "in" / "a.jpg", 20, 30, (0, 0, 10, 10))
    photo(tmp_path / "in" / ("x" * 250 + ".jpg"), 20, 30, (0, 0, 10, 10))
    Image.new("RGB", (70000, 1)).save(tmp_path / "in" / "wide.png")
    report = predict(red_is_person(), [str(tmp_path / "in")], tmp_path / "o", overlay=True)
    assert report.images == 1
    assert sorted(Path(name).name[:4] for name in report.skipped) == ["wide", "xxxx"]
    assert all("cannot be written" in why for why in report.skipped.values())
    assert not list((tmp_path / "o").glob("*.kdtmp"))


def test_a_full_disk_stops_everything(tmp_path, monkeypatch):
    photo(tmp_path / "a.jpg", 20, 30, (0, 0, 10, 10))

    def full(path, data):
        raise OSError(errno.ENOSPC, "No space left on device", str(path))

    monkeypatch.setattr(predict_module, "write_atomic", full)
    with pytest.raises(OSError, match="No space left"):
        predict(red_is_person(), [str(tmp_path / "a.jpg")], tmp_path / "o")


def test_only_the_weights_are_needed_to_predict(run, tmp_path):
    """Not the checkpoint, which holds the projection."""
    shutil.copytree(run, tmp_path / "run")
    shutil.rmtree(tmp_path / "run/checkpoints")
    assert open_student(tmp_path / "run", "cpu").projections is None
    with pytest.raises(RunError, match=r"best.pt"):
        open_student(tmp_path / "run", "cpu", features=True)


def test_another_runs_student_or_record_are_refused(run, cache, tmp_path):
    for name in ("students", "records"):
        shutil.copytree(run, tmp_path / name)
    record = (run / "run.json").read_text().replace('"encoder"', '"decoder"', 1)
    (tmp_path / "records/run.json").write_text(record)
    with pytest.raises(RunError, match="another run's"):
        open_student(tmp_path / "records", "cpu", features=True)
    tensors, metadata = read_student(run / "student_best.safetensors")
    other = read_best_student(run)[0].unet
    metadata = {**metadata, "size_px": 96}
    save_student(tmp_path / "students/student_best.safetensors", other, metadata)
    with pytest.raises(RunError, match="size = 96.*has 64"):
        open_student(tmp_path / "students", "cpu", features=True)
    assert tensors


def test_what_is_no_student_is_told_as_what_it_is(tmp_path):
    photo(tmp_path / "a.jpg", 20, 30, (0, 0, 10, 10))
    with pytest.raises(ModelError, match=r"expected a run folder, a .safetensors or an .onnx"):
        open_student(tmp_path / "a.jpg", "cpu")
