"""Test-time augmentation: the mean over views, each read window by window."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from torch import Tensor
from torch.nn import functional

from perpixel.augmented import SCALES, AugmentedTiler, View, views
from perpixel.data.writing import write_labels, write_rgb
from perpixel.evaluate import evaluate
from perpixel.models import unet
from perpixel.predict import load
from perpixel.tiling import Tiler, predict_tiled, predict_whole, reader


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    return unet(3, "plain", width=1).double().eval()


def resized(x: Tensor, size: tuple[int, int]) -> Tensor:
    return functional.interpolate(x[None], size, mode="bilinear", antialias=True)[0]


def reference(model, image: Tensor, augmentation: list[View]) -> Tensor:
    """With whole copies of the image, by the library's own functions."""
    scores = []
    for view in augmentation:
        scaled = resized(image, tuple(max(round(side * view.scale), 1) for side in image.shape[-2:]))
        seen = torch.rot90(scaled.flip(-1) if view.mirrored else scaled, view.turns, (1, 2))
        upright = torch.rot90(predict_tiled(model, seen, 40, 8), -view.turns, (1, 2))
        scores.append(resized(upright.flip(-1) if view.mirrored else upright, tuple(image.shape[-2:])))
    return torch.stack(scores).mean(0)


@pytest.mark.parametrize("size", [(37, 50), (1, 9), (64, 31)])
@pytest.mark.parametrize("kinds", ["flips", "rotations", "scales", "flips,rotations"])
def test_the_scores_are_the_mean_over_copies_of_the_image(model, kinds, size):
    """Before softmax (arXiv:1706.05587, sec. 4.1)."""
    image = torch.randn(3, *size, dtype=torch.float64)
    tiler = AugmentedTiler(Tiler(model, 40, 8), views(kinds))
    torch.testing.assert_close(tiler.block(reader(image), size, 0, 0, *size), reference(model, image, views(kinds)))


@given(data=st.data())
@settings(max_examples=12, deadline=None)
def test_any_part_is_that_of_the_whole_and_is_read_within_the_reach_it_states(model, data):
    size = (data.draw(st.integers(1, 90)), data.draw(st.integers(1, 90)))
    view = View(data.draw(st.sampled_from(SCALES)), data.draw(st.booleans()), data.draw(st.integers(0, 3)))
    image, tiler = torch.randn(3, *size, dtype=torch.float64), AugmentedTiler(Tiler(model, 32, 8), [View(), view])
    whole = tiler.block(reader(image), size, 0, 0, *size)
    top, left = (data.draw(st.integers(0, side - 1)) for side in size)
    height, width = data.draw(st.integers(1, size[0] - top)), data.draw(st.integers(1, size[1] - left))
    reads = []

    def read(*part: int) -> Tensor:
        reads.append(part)
        return reader(image)(*part)

    part = tiler.block(read, size, top, left, height, width)
    torch.testing.assert_close(part, whole[:, top : top + height, left : left + width])
    y, x, rows, columns = tiler.reach(size, top, left, height, width)
    if min(size) > 48:  # mirroring in smaller images may read a little more
        assert all(y <= a and x <= b and a + h <= y + rows and b + w <= x + columns for a, b, h, w in reads)


def test_augmentation_composes_with_exact_tiling_and_the_first_pass_over_the_image():
    torch.manual_seed(0)
    pooled = unet(2, "plain", width=1, image_pooling=True).double().eval()
    image, size = torch.randn(3, 280, 30, dtype=torch.float64), (280, 30)
    tiler = AugmentedTiler(Tiler(pooled, 16, "exact"), views("flips")).prepared(reader(image), size)
    expected = (predict_whole(pooled, image) + predict_whole(pooled, image.flip(-1)).flip(-1)) / 2
    torch.testing.assert_close(tiler.block(reader(image), size, 0, 0, *size), expected)


def test_views_are_all_combinations_and_the_image_itself_comes_first():
    assert views("") == [View()]
    for kinds, count in {"flips": 2, "rotations": 4, "scales": 6, "flips,rotations": 8, "scales, flips, rotations": 48}.items():
        found = views(kinds)
        assert len(found) == len(set(found)) == count
        assert found[0] == View()
    with pytest.raises(ValueError, match="'turns'; known are flips, rotations, scales"):
        views("flips,turns")


def test_predict_writes_the_labels_of_the_mean_scores(make_bundle, command, tmp_path):
    rng = np.random.default_rng(0)
    write_rgb(tmp_path / "photo.png", rng.integers(0, 256, (70, 52, 3), dtype=np.uint8))
    bundle = make_bundle(width=4)
    said = command("predict", bundle, tmp_path / "photo.png", "--out", tmp_path / "labels", "--tta", "flips,rotations", "--probabilities")
    assert said.code == 0, said.err
    written = np.load(tmp_path / "labels" / "probabilities" / "photo.npy")
    plain, augmented = load(bundle, "cpu"), load(bundle, "cpu", augment="flips,rotations")
    np.testing.assert_allclose(written, augmented.probabilities(tmp_path / "photo.png"), atol=1e-3)
    assert np.abs(written - plain.probabilities(tmp_path / "photo.png")).max() > 1e-3
    assert command("predict", bundle, tmp_path / "photo.png", "--tta", "mirrors").code == 2


def test_evaluate_scores_the_labels_that_predict_writes_with_the_same_views(make_bundle, command, tmp_path):
    rng = np.random.default_rng(1)
    for number in range(3):
        write_rgb(tmp_path / "images" / f"{number}.png", rng.integers(0, 256, (40, 52, 3), dtype=np.uint8))
        write_labels(tmp_path / "masks" / f"{number}.png", rng.integers(0, 3, (40, 52), dtype=np.uint8), [(0, 0, 0)] * 3)
    bundle = make_bundle(width=4)
    found = evaluate(bundle, tmp_path / "images", tmp_path / "masks", device="cpu", augment="rotations")
    segmenter = load(bundle, "cpu", augment="rotations")
    counts = np.zeros((3, 3), int)
    for number in range(3):
        truth = np.asarray(Image.open(tmp_path / "masks" / f"{number}.png"))
        np.add.at(counts, (truth, segmenter.predict(tmp_path / "images" / f"{number}.png")), 1)
    assert np.array_equal(found.confusion.counts.numpy(), counts)
    assert not np.array_equal(evaluate(bundle, tmp_path / "images", tmp_path / "masks", device="cpu").confusion.counts.numpy(), counts)
    page = tmp_path / "page.html"
    said = command("evaluate", bundle, tmp_path / "images", tmp_path / "masks", "--tta", "rotations", "--absent", "truth", "--report", page)
    assert said.code == 0, said.err
    assert "several views of each image: rotations" in said.out
    assert "--tta rotations --absent=truth --report" in page.read_text()
