"""PPM, PGM and JPEG 2000 of more than 8 bits; see test_png16.py for PNG."""

import sys

import numpy as np
import pytest

from perpixel.data.images import inspect, read_image
from perpixel.data.masks import read_mask

RNG = np.random.default_rng(0)


def write_pnm(path, values, maximum, plain):
    """(H, W) or (H, W, 3) as Netpbm describes it: maxval, and two bytes a sample, high byte first, where it is above 255."""
    kind = {(2, False): 5, (3, False): 6, (2, True): 2, (3, True): 3}[values.ndim, plain]
    samples = " ".join(map(str, values.ravel())).encode() if plain else values.astype(">u2" if maximum > 255 else np.uint8).tobytes()
    path.write_bytes(f"P{kind}\n# by hand\n{values.shape[1]} {values.shape[0]}\n{maximum}\n".encode() + samples)


@pytest.mark.parametrize("plain", [False, True])
@pytest.mark.parametrize("bands", [(), (3,)])
@pytest.mark.parametrize("maximum", [15, 255, 1000, 4095, 65535])
def test_pnm_images_are_scaled_so_that_the_largest_value_of_the_header_is_white(tmp_path, maximum, bands, plain):
    values = RNG.integers(0, maximum + 1, (5, 4, *bands))
    values.flat[:2] = 0, maximum
    write_pnm(tmp_path / "a.pnm", values, maximum, plain)
    kind = np.uint8 if maximum < 256 else np.uint16
    expected = np.round(values / maximum * np.iinfo(kind).max).astype(kind)
    found = read_image(tmp_path / "a.pnm")
    np.testing.assert_array_equal(found, expected.transpose(2, 0, 1) if bands else expected[None])
    info = inspect(tmp_path / "a.pnm")
    assert (found.dtype, info.dtype, info.bands) == (kind, np.dtype(kind).name, found.shape[0])


@pytest.mark.parametrize("plain", [False, True])
@pytest.mark.parametrize("maximum", [1, 3, 20, 255, 300, 4095, 65535])
def test_pgm_masks_hold_the_numbers_of_the_file(tmp_path, maximum, plain):
    values = np.append(RNG.integers(0, maximum + 1, 18), [0, maximum]).reshape(5, 4)
    write_pnm(tmp_path / "a.pgm", values, maximum, plain)
    np.testing.assert_array_equal(read_mask(tmp_path / "a.pgm"), values)


@pytest.mark.parametrize("bits", [12, 16])
@pytest.mark.parametrize("bands", [2, 3, 4])  # with alpha, which is dropped
def test_colour_of_jpeg_2000_keeps_its_bits_or_names_what_is_missing(tmp_path, monkeypatch, bits, bands):
    imagecodecs = pytest.importorskip("imagecodecs")
    values = RNG.integers(0, 2**bits, (8, 9, bands)).astype(np.uint16)
    (tmp_path / "a.jp2").write_bytes(imagecodecs.jpeg2k_encode(values, level=0, reversible=True, bitspersample=bits))
    colors = values[..., : 3 if bands > 2 else 1].transpose(2, 0, 1) << (16 - bits)  # 12 bits as Pillow scales grey
    np.testing.assert_array_equal(read_image(tmp_path / "a.jp2"), colors)
    info = inspect(tmp_path / "a.jp2")
    assert (info.dtype, info.bands) == ("uint16", len(colors))
    monkeypatch.setitem(sys.modules, "imagecodecs", None)
    with pytest.raises(ValueError, match=r"a\.jp2: colour of more than 8 bits in JPEG 2000 needs imagecodecs; pip install"):
        read_image(tmp_path / "a.jp2")
