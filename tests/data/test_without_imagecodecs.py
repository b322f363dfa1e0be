"""What becomes of compressed TIFF where imagecodecs is missing."""

import numpy as np
import pytest
import tifffile

from perpixel.data.images import Picture
from perpixel.data.label_windows import LabelSource
from perpixel.data.masks import LabelMap
from perpixel.data.sources import open_source

SCALE = (33550, "d", 3, (1.0, 1.0, 0.0), True)  # ModelPixelScale
NODATA = (42113, 2, 0, "7", True)


def refuse(*_, **__):
    raise ValueError("<COMPRESSION.LZW: 5> requires the 'imagecodecs' package")


@pytest.fixture
def write(monkeypatch):
    """Writes an LZW picture, which from then on needs what is missing."""

    def written(path, values, **options):
        tifffile.imwrite(path, values, compression="lzw", tile=(64, 64), photometric="minisblack", **options)
        monkeypatch.setattr(tifffile.TiffPage, "decode", property(lambda _: refuse))
        monkeypatch.setattr(tifffile.TiffPage, "asarray", refuse)
        return Picture(path)

    return written


@pytest.mark.parametrize("tag", [SCALE, NODATA])
def test_a_picture_whose_place_or_missing_data_pillow_would_drop_is_refused(tmp_path, write, tag):
    picture = write(tmp_path / "a.tif", np.zeros((70, 80), np.uint8), extratags=[tag])
    with pytest.raises(ValueError, match=r"a\.tif: needs imagecodecs: .*pip install 'perpixel\[tiff\]'"):
        open_source(picture)


def test_a_picture_whose_mask_pillow_would_drop_is_refused(tmp_path, write):
    tifffile.imwrite(tmp_path / "a.tif.msk", np.zeros((70, 80), np.uint8))
    with pytest.raises(ValueError, match=r"a\.tif: needs imagecodecs"):
        open_source(write(tmp_path / "a.tif", np.zeros((70, 80), np.uint8)))


def test_labels_of_a_tiled_mask_are_read_by_pillow(tmp_path, write):
    """A mask needs no place: it is that of the image."""
    values = np.random.default_rng(0).integers(0, 3, (70, 80), dtype=np.uint8)
    source = LabelSource(write(tmp_path / "a.tif", values, extratags=[SCALE]), LabelMap({0: 0, 1: 1, 2: 2}))
    assert np.array_equal(source.read(3, 4, 60, 70).labels, values[3:63, 4:74])
