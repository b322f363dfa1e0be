"""What to label next: uncertain, and unlike what is chosen already."""

from functools import partial

import numpy as np
import pytest
import tifffile
import torch

from perpixel import blockwise, budget
from perpixel.bundle import load_bundle
from perpixel.data.images import Picture
from perpixel.report.glance import glance, glance_at, glance_at_blocks
from perpixel.report.label_next import choose, descriptor, evenly, propose
from perpixel.report.thumbnails import shrunk
from perpixel.segmenter import Segmenter

COLORS = [(200, 0, 0), (0, 200, 0), (0, 0, 200)]


def by_definition(uncertainty, descriptors, count):
    """Try every free item, every time."""
    chosen = []
    while len(chosen) < min(count, len(uncertainty)):
        best, worth = None, -1.0
        for item in range(len(uncertainty)):
            if item in chosen:
                continue
            far = min((float(np.sqrt(((descriptors[item] - descriptors[other]) ** 2).sum())) for other in chosen), default=1.0)
            if uncertainty[item] * far > worth:
                best, worth = item, uncertainty[item] * far
        chosen.append(best)
    return chosen


@pytest.mark.parametrize("seed", range(5))
def test_choices_equal_those_of_trying_every_image_every_time(seed):
    random = np.random.default_rng(seed)
    uncertainty, descriptors = random.random(30), random.normal(size=(30, 4))
    assert choose(uncertainty, descriptors, 9) == by_definition(uncertainty, descriptors, 9)


def test_copies_of_the_most_uncertain_image_come_last():
    descriptors = np.array([[0.0, 0], [0, 0], [0, 0], [1, 0], [0, 1]])
    assert choose(np.array([0.9, 0.8, 0.85, 0.3, 0.2]), descriptors, 5) == [0, 3, 4, 2, 1]


def test_more_than_there_are_gives_all_and_none_gives_none():
    assert sorted(choose(np.array([0.0, 0.0]), np.zeros((2, 3)), 9)) == [0, 1]
    assert choose(np.zeros(0), np.zeros((0, 3)), 2) == []
    with pytest.raises(ValueError, match="2 uncertainties, 3 descriptors"):
        choose(np.zeros(2), np.zeros((3, 1)), 1)


def test_descriptors_of_like_images_lie_nearer_than_those_of_unlike_ones():
    random = np.random.default_rng(0)
    image = random.integers(0, 256, (3, 40, 40), np.uint8)
    near = (image.astype(int) + random.integers(-3, 4, image.shape)).clip(0, 255).astype(np.uint8)
    other = 255 - image
    even, one = torch.full((3, 40, 40), 1 / 3), torch.eye(3)[0][:, None, None].expand(3, 40, 40)
    here, alike, unlike = (descriptor(glance_at(shown, even.log(), "a")) for shown in (image, near, other))
    assert np.linalg.norm(here - alike) < 0.1 * np.linalg.norm(here - unlike)
    assert np.linalg.norm(here - descriptor(glance_at(image, 50 * one, "a"))) > 0.5


def test_proposals_are_the_images_of_least_certain_logits_and_damaged_ones_are_named():
    images = [np.full((3, 20, 30), 40 * n, np.uint8) for n in range(5)]
    sureness = [9.0, 0.1, 6.0, 0.0, 9.0]

    def read(index):
        if index == 4:
            raise ValueError("e.png: is damaged")
        logits = torch.zeros(3, 20, 30)
        logits[index % 3] = sureness[index]
        return glance_at(images[index], logits, "abcde"[index])

    proposals, damaged = propose(list("abcde"), read, COLORS, count=2)
    assert [proposal.name for proposal in proposals] == ["d", "b"]
    assert proposals[0].uncertainty == pytest.approx(1.0)
    assert proposals[0].size == (20, 30)
    assert damaged == ["e.png: is damaged"]


def test_many_images_are_thinned_evenly():
    assert evenly(range(10), 5) == [0, 2, 4, 6, 8]
    assert evenly(range(3), 5) == [0, 1, 2]
    looked = []

    def read(index):
        looked.append(index)
        return glance_at(np.zeros((1, 8, 8), np.uint8), torch.zeros(2, 8, 8), str(index))

    propose([str(n) for n in range(1000)], read, COLORS[:2], count=1, limit=10)
    assert len(set(looked)) == 10
    assert max(looked) == 900


def test_a_large_image_is_looked_at_block_by_block_as_in_one_piece_and_kept_small(make_bundle, tmp_path, monkeypatch):
    """Of 301x422 pixels, in blocks of 96: numbers, means of the pixels that fall on each small one, and classes at their middles."""
    monkeypatch.setattr("perpixel.segmenter.WHOLE", 0)
    monkeypatch.setattr(budget, "WHOLE", 0)
    monkeypatch.setattr(budget, "SIDE", 96)
    segmenter = Segmenter(load_bundle(make_bundle(tile=64, overlap=16)))
    pixels = np.random.default_rng(4).integers(0, 256, (301, 422, 3), dtype=np.uint8)
    tifffile.imwrite(tmp_path / "a.tif", pixels, photometric="rgb", tile=(64, 64))
    picture = Picture(tmp_path / "a.tif")
    whole = glance(segmenter, picture)
    monkeypatch.setattr(blockwise, "WHOLE_PIXELS", 0)
    monkeypatch.setattr("perpixel.report.glance.glance_at_blocks", partial(glance_at_blocks, side=100))
    blocks = glance(segmenter, picture)
    assert blocks.size == whole.size == (301, 422)
    assert blocks.pixels.shape == (3, 71, 100)
    assert blocks.uncertainty == pytest.approx(whole.uncertainty, rel=1e-5)
    np.testing.assert_allclose(blocks.shares, whole.shares, rtol=1e-5)
    rows, columns = np.arange(301) * 71 // 301, np.arange(422) * 100 // 422
    for row, column in ((0, 0), (35, 50), (70, 99), (22, 23)):
        there = np.ix_(rows == row, columns == column)
        assert blocks.entropy[row, column] == pytest.approx(whole.entropy[there].mean(), rel=1e-5)
        np.testing.assert_allclose(blocks.pixels[:, row, column], [band[there].mean() for band in whole.pixels], atol=0.51)
    np.testing.assert_array_equal(blocks.guess, shrunk(whole.guess, 100))


def test_scores_that_overflow_are_told_and_the_image_left_out():
    with pytest.raises(ValueError, match=r"a\.png: its scores overflowed"):
        glance_at(np.zeros((1, 4, 4), np.uint8), torch.full((2, 4, 4), torch.inf), "a.png")
