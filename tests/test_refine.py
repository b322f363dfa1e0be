"""Scores from elsewhere, refined: arrays and files."""

from functools import partial

import numpy as np
import pytest
import tifffile
import torch
from PIL import Image

from perpixel.refine import read_scores, refine, refine_files
from perpixel.refinement import DenseCRF, build_refiner

RNG = np.random.default_rng(0)
IMAGE = RNG.integers(0, 256, (12, 17, 3), dtype=np.uint8)
LOGITS = RNG.normal(size=(4, 12, 17)).astype(np.float32)
PROBABILITIES = np.exp(LOGITS) / np.exp(LOGITS).sum(0)


def by_module(image=IMAGE, logits=LOGITS):
    pixels = torch.from_numpy(np.moveaxis(image, -1, 0).copy())
    return DenseCRF().eval()(torch.from_numpy(logits)[None], pixels[None])[0].softmax(0).numpy()


@pytest.mark.parametrize("scores", [LOGITS, PROBABILITIES, np.moveaxis(PROBABILITIES, 0, -1), PROBABILITIES.astype(np.float64)])
def test_logits_and_probabilities_in_either_order_give_the_refiner_s_marginals(scores):
    found = refine(IMAGE, scores)
    np.testing.assert_allclose(found, by_module(), atol=1e-5)
    np.testing.assert_allclose(found.sum(0), 1, atol=1e-5)


@pytest.mark.parametrize(("dtype", "worst"), [(np.uint8, 0.02), (np.uint16, 1e-4)])
def test_probabilities_stored_as_whole_numbers_are_taken_as_such(dtype, worst):
    stored = np.round(PROBABILITIES * np.iinfo(dtype).max).astype(dtype)
    np.testing.assert_allclose(refine(IMAGE, stored), refine(IMAGE, PROBABILITIES), atol=worst)


@pytest.mark.parametrize(("dtype", "white"), [(np.uint16, 65535), (">u2", 65535), (np.float32, 1)])
def test_the_same_image_in_another_type_gives_the_same_labels(dtype, white):
    """Of colours near enough to each other that the bandwidth counts."""
    image = IMAGE // 16
    np.testing.assert_allclose(refine((image * (white / 255)).astype(dtype), LOGITS), refine(image, LOGITS), atol=1e-3)


@pytest.mark.parametrize("dtype", [np.int16, np.int32, np.int64, np.uint32])
def test_eight_bits_in_a_wider_type_stay_eight_bits(dtype):
    """What arithmetic in NumPy leaves; white is 65535 in uint16 alone."""
    np.testing.assert_array_equal(refine(IMAGE.astype(dtype), LOGITS), refine(IMAGE, LOGITS))


def test_files_and_tensors_are_taken_as_arrays_are(tmp_path):
    Image.fromarray(IMAGE).save(tmp_path / "photo.png")
    np.save(tmp_path / "scores.npy", LOGITS)
    np.testing.assert_array_equal(refine(tmp_path / "photo.png", str(tmp_path / "scores.npy")), refine(IMAGE, LOGITS))
    np.testing.assert_array_equal(refine(IMAGE, torch.from_numpy(LOGITS)), refine(IMAGE, LOGITS))


def test_folders_are_refined_file_by_file_of_the_same_name(tmp_path, command):
    for name in ("images", "scores"):
        (tmp_path / name).mkdir()
    for number in range(3):
        Image.fromarray(np.roll(IMAGE, number, 0)).save(tmp_path / "images" / f"{number}.png")
        np.save(tmp_path / "scores" / f"{number}.npy", np.roll(LOGITS, number, 1))
    said = command("refine", tmp_path / "images", tmp_path / "scores", "-o", tmp_path / "out", "--set", "iterations=2")
    assert said.code == 0
    assert "3 label images" in said.out
    for number in range(3):
        expected = refine(np.roll(IMAGE, number, 0), np.roll(LOGITS, number, 1), options={"iterations": 2}).argmax(0)
        np.testing.assert_array_equal(np.asarray(Image.open(tmp_path / "out" / f"{number}.png")), expected)
    (tmp_path / "scores" / "1.npy").unlink()
    said = command("refine", tmp_path / "images", tmp_path / "scores", "-o", tmp_path / "out")
    assert said.code == 2
    assert "1 of 3 images, such as 1.png" in " ".join(said.err.split())


@pytest.fixture
def folders(tmp_path):
    """images/1.png and scores/1.npy."""
    for name in ("images", "scores"):
        (tmp_path / name).mkdir()
    Image.fromarray(IMAGE).save(tmp_path / "images" / "1.png")
    np.save(tmp_path / "scores" / "1.npy", LOGITS)
    return tmp_path


def test_two_images_of_one_name_are_refused_as_one_result_would_overwrite_the_other(folders):
    Image.fromarray(IMAGE).save(folders / "images" / "1.jpg")
    with pytest.raises(ValueError, match=r"1\.jpg and .*1\.png have one name, '1'"):
        refine_files(folders / "images", folders / "scores", folders / "out")
    assert not (folders / "out").exists()


def test_a_refined_label_image_replaces_another_but_never_a_mask_of_somebody_else(folders):
    for _ in range(2):
        assert len(refine_files(folders / "images", folders / "scores", folders / "out")) == 1
    Image.fromarray(IMAGE[..., 0]).save(folders / "out" / "1.png")
    before = (folders / "out" / "1.png").read_bytes()
    with pytest.raises(ValueError, match=r"1\.png is there, and does not say that perpixel has predicted it"):
        refine_files(folders / "images", folders / "scores", folders / "out")
    assert (folders / "out" / "1.png").read_bytes() == before


def test_refined_probabilities_never_overwrite_the_scores_they_are_refined_from(folders):
    (folders / "scores").rename(folders / "probabilities")
    with pytest.raises(ValueError, match=r"1\.npy are the scores themselves"):
        refine_files(folders / "images", folders / "probabilities", folders, with_probabilities=True)
    np.testing.assert_array_equal(np.load(folders / "probabilities" / "1.npy"), LOGITS)


def test_two_scores_of_one_name_are_refused_as_either_could_be_meant(folders):
    np.savez(folders / "scores" / "1.npz", LOGITS)
    with pytest.raises(ValueError, match=r"1\.npy and .*1\.npz have one name, '1'"):
        refine_files(folders / "images", folders / "scores", folders / "out")
    assert not (folders / "out").exists()


def test_pages_of_a_stack_are_refused(folders):
    tifffile.imwrite(folders / "images" / "stack.tif", np.stack([IMAGE[..., 0]] * 3), photometric="minisblack")
    np.save(folders / "scores" / "stack.npy", LOGITS)
    with pytest.raises(ValueError, match=r"stack\.tif\[0\] and .*stack\.tif\[1\] are pages of one file"):
        refine_files(folders / "images", folders / "scores", folders / "out")
    assert not (folders / "out").exists()
    with pytest.raises(ValueError, match=r"stack\.tif\[1\] are pages of one file, and refine takes one image a file"):
        refine_files(folders / "images" / "stack.tif", folders / "scores", folders / "out")


def test_probabilities_of_zero_are_taken_as_nearly_zero():
    labels = RNG.integers(0, 4, (12, 17))
    hard = np.eye(4, dtype=np.float32)[labels].transpose(2, 0, 1)
    assert np.isfinite(refine(IMAGE, hard)).all()
    np.testing.assert_array_equal(refine(IMAGE, hard, "grid_mrf", {"strength": 0.0}).argmax(0), labels)


def test_a_grey_image_is_taken_as_one_band():
    assert refine(IMAGE[..., 0], LOGITS, "grid_mrf", {"method": "icm"}).shape == LOGITS.shape


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((IMAGE, LOGITS[:, :5]), r"scores have shape \(4, 5, 17\) and the image 12x17 pixels"),
        ((IMAGE, np.where(LOGITS > 2, np.nan, LOGITS)), "NaN or infinite"),
        ((IMAGE, LOGITS, "crf"), "unknown refiner 'crf'"),
        ((IMAGE, LOGITS, "dense_crf", {"iters": 3}), "no option 'iters'; it takes kernels"),
        ((IMAGE, LOGITS, "dense_crf", None, "probabilities"), "are no probabilities"),
        ((IMAGE, LOGITS, "dense_crf", None, "odds"), "unknown kind of scores 'odds'"),
        ((IMAGE, LOGITS.transpose(0, 2, 1)), "the wrong way round: transpose the scores"),
        ((IMAGE, PROBABILITIES[0]), r"np.stack\(\[1 - p, p\]\)"),
        ((IMAGE, PROBABILITIES[:1]), r"one class.*np.stack\(\[1 - p, p\]\)"),
        ((IMAGE, 100 * PROBABILITIES), "do not add up to 1"),
        ((IMAGE, (100 * PROBABILITIES).astype(np.uint8)), "do not add up to 255"),
        ((IMAGE, LOGITS, "dense_crf", {"iterations": "five"}), "whole number"),
        ((IMAGE, LOGITS, "dense_crf", {"iterations": 2.5}), "whole number"),
        ((IMAGE, LOGITS, "dense_crf", {"kernels": 3}), "wrong kind"),
        ((IMAGE, LOGITS, "grid_mrf", {"strength": "a"}), "wrong kind"),
        ((IMAGE, LOGITS, "gaussian_crf", {"neighbours": "a"}), "wrong kind"),
        ((IMAGE[None], LOGITS), r"give \(H, W\) or \(H, W, C\)"),
        ((IMAGE, LOGITS.astype(complex)), "give real numbers"),
    ],
)
def test_what_does_not_fit_is_refused_with_what_does(arguments, message):
    with pytest.raises(ValueError, match=message):
        refine(*arguments)


@pytest.mark.parametrize("kind", ["npy", "npz", "tif"])
def test_the_command_writes_labels_and_probabilities_of_the_image_s_size(tmp_path, command, kind):
    Image.fromarray(IMAGE).save(tmp_path / "photo.png")
    path = tmp_path / f"scores.{kind}"
    {"npy": np.save, "npz": np.savez, "tif": partial(tifffile.imwrite, photometric="minisblack")}[kind](path, PROBABILITIES)
    said = command("refine", tmp_path / "photo.png", path, "-o", tmp_path / "out", "--set", "iterations=2", "--probabilities")
    assert said.code == 0
    expected = refine(IMAGE, PROBABILITIES, options={"iterations": 2})
    np.testing.assert_array_equal(np.asarray(Image.open(tmp_path / "out" / "photo.png")), expected.argmax(0))
    written = np.load(tmp_path / "out" / "probabilities" / "photo.npy")
    assert written.dtype == np.float16
    np.testing.assert_allclose(written, expected, atol=1e-3)


def test_files_that_hold_no_scores_are_named(tmp_path, command):
    (tmp_path / "empty.npy").touch()
    np.savez(tmp_path / "two.npz", a=LOGITS, b=LOGITS)
    np.save(tmp_path / "objects.npy", np.array([{}]), allow_pickle=True)
    for name, message in [("none.npy", "no such file"), ("empty.npy", "damaged, cut short"), ("two.npz", "it holds 2 arrays")]:
        with pytest.raises(ValueError, match=message):
            read_scores(tmp_path / name)
    with pytest.raises(ValueError, match="damaged, cut short"):
        read_scores(tmp_path / "objects.npy")
    Image.fromarray(IMAGE).save(tmp_path / "photo.png")
    np.save(tmp_path / "small.npy", LOGITS[:, :4])
    assert "is the image itself" in command("refine", tmp_path / "photo.png", tmp_path / "small.npy", "-o", tmp_path).err
    said = command("refine", tmp_path / "photo.png", tmp_path / "small.npy", "-o", tmp_path / "out")
    assert said.code == 2
    assert "12x17" in said.err
    assert "(4, 4, 17)" in said.err


def test_refiners_are_built_by_name_in_eval_mode():
    assert not build_refiner("dense_crf").training
    with pytest.raises(ValueError, match="weight"):
        build_refiner("gaussian_crf", {"weight": -1})
