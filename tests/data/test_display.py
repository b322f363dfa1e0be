"""Pictures for people."""

import numpy as np
import pytest

from perpixel.data.display import default_colors, overlay, to_display

RNG = np.random.default_rng(0)


def test_the_default_colours_are_pascal_vocs():
    """The first, the 20th class (tvmonitor) and the void colour, as printed in the devkit's colour table."""
    colors = default_colors(256)
    published = {0: (0, 0, 0), 1: (128, 0, 0), 2: (0, 128, 0), 3: (128, 128, 0), 4: (0, 0, 128), 8: (64, 0, 0), 15: (192, 128, 128)}
    published |= {20: (0, 64, 128), 255: (224, 224, 192)}
    assert {index: colors[index] for index in published} == published
    assert len(set(colors)) == 256
    assert len(set(default_colors(1000))) == 1000


def test_bytes_are_shown_as_they_are():
    rgb = RNG.integers(0, 256, (3, 4, 5), dtype=np.uint8)
    np.testing.assert_array_equal(to_display(rgb), rgb.transpose(1, 2, 0))


@pytest.mark.parametrize(("bands", "shown"), [(1, [0, 0, 0]), (2, [0, 1, None]), (3, [0, 1, 2]), (7, [0, 1, 2])])
def test_any_number_of_bands_becomes_three(bands, shown):
    image = RNG.integers(0, 256, (bands, 4, 5), dtype=np.uint8)
    result = to_display(image)
    for channel, band in enumerate(shown):
        np.testing.assert_array_equal(result[..., channel], 0 if band is None else image[band])


@pytest.mark.parametrize("dtype", [np.uint16, np.float32])
def test_deep_pictures_are_stretched_between_their_percentiles(dtype):
    image = RNG.normal(20000, 3000, (1, 100, 100)).clip(0, 60000).astype(dtype)
    low, high = np.percentile(image, [1, 99])
    wanted = ((image[0].astype(float) - low) / (high - low)).clip(0, 1) * 255
    np.testing.assert_allclose(to_display(image)[..., 0], wanted, atol=1)


def test_flat_and_broken_pictures_can_still_be_shown():
    assert to_display(np.full((1, 3, 3), 7, np.uint16)).max() == 0
    spot = np.zeros((1, 50, 50), np.uint16)
    spot[0, 3, 3] = 900
    assert to_display(spot)[3, 3, 0] == 255
    holes = np.array([[[0.0, 1.0], [np.nan, np.inf]]], np.float32)
    assert to_display(holes)[..., 0].tolist() == [[0, 255], [0, 0]]
    assert to_display(holes * np.nan).max() == 0


def test_an_overlay_mixes_the_class_colour_with_the_image_except_where_ignored():
    image = RNG.integers(0, 256, (3, 6, 7), dtype=np.uint8)
    labels = RNG.integers(0, 3, (6, 7), dtype=np.uint8)
    labels[2] = 255
    colors = [(0, 0, 0), (255, 0, 0), (10, 200, 30)]
    result = overlay(image, labels, colors, opacity=0.25)
    for y in range(6):
        for x in range(7):
            pixel = image[:, y, x].astype(float)
            wanted = pixel if labels[y, x] == 255 else 0.75 * pixel + 0.25 * np.array(colors[labels[y, x]])
            np.testing.assert_allclose(result[y, x], wanted, atol=0.51)


def test_an_overlay_that_does_not_fit_is_refused():
    image = np.zeros((1, 4, 5), np.uint8)
    with pytest.raises(ValueError, match=r"labels have shape \(4, 6\), the image \(4, 5\)"):
        overlay(image, np.zeros((4, 6), np.uint8), [(0, 0, 0)])
    with pytest.raises(ValueError, match="labels hold class 3, but there are 2 colours"):
        overlay(image, np.full((4, 5), 3, np.uint8), [(0, 0, 0)] * 2)
    with pytest.raises(ValueError, match=r"opacity is 1\.5; legal is 0 to 1"):
        overlay(image, np.zeros((4, 5), np.uint8), [(0, 0, 0)], opacity=1.5)
    with pytest.raises(ValueError, match=r"takes \(bands, height, width\)"):
        to_display(np.zeros((4, 5)))
