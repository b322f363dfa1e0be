"""PNG of 16 bits a band, of which Pillow alone keeps 8."""

import io
import struct
import zlib

import numpy as np
import pytest
from PIL import Image, ImageOps

from perpixel.data.images import Picture, inspect, read_image

BANDS = {2: 3, 4: 2, 6: 4}  # colour type (W3C PNG, section 11.2.2) -> bands, alpha among them


def write(path, values, color, orientation=1):
    """(H, W, bands) uint16 as a PNG by hand (W3C PNG, section 5); every other row by the filter "Sub"."""

    def chunk(kind, data):
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    lines, step = b"", 2 * values.shape[2]
    for number, row in enumerate(values.astype(">u2")):
        line = np.frombuffer(row.tobytes(), np.uint8)
        before = np.concatenate([np.zeros(step, np.uint8), line[:-step]])
        lines += b"\1" + (line - before).tobytes() if number % 2 else b"\0" + line.tobytes()
    exif = Image.Exif()
    exif[0x0112] = orientation
    header = struct.pack(">IIBBBBB", values.shape[1], values.shape[0], 16, color, 0, 0, 0)
    chunks = chunk(b"IHDR", header) + chunk(b"eXIf", exif.tobytes()[6:]) + chunk(b"IDAT", zlib.compress(lines)) + chunk(b"IEND", b"")
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + chunks)


def upright(band, orientation):
    """By Pillow's own turning of a picture of 32-bit numbers."""
    exif, file = Image.Exif(), io.BytesIO()
    exif[0x0112] = orientation
    Image.fromarray(band.astype(np.int32)).save(file, "TIFF", exif=exif)
    return np.asarray(ImageOps.exif_transpose(Image.open(file)))


@pytest.mark.parametrize("orientation", [1, 3, 6, 7])
@pytest.mark.parametrize("color", BANDS)
def test_all_16_bits_of_a_png_are_read_upright_with_and_without_alpha(tmp_path, color, orientation):
    values = np.random.default_rng(color).integers(0, 65536, (13, 17, BANDS[color]), dtype=np.uint16)
    write(tmp_path / "a.png", values, color, orientation)
    image, bands = read_image(tmp_path / "a.png"), 1 if color == 4 else 3
    assert image.dtype == np.uint16
    np.testing.assert_array_equal(image, [upright(values[..., band], orientation) for band in range(bands)])


def test_the_header_of_grey_with_alpha_announces_one_band_of_16_bits(tmp_path):
    write(tmp_path / "a.png", np.zeros((5, 7, 2), np.uint16), 4)
    info = inspect(Picture(tmp_path / "a.png"))
    assert (info.bands, info.dtype, info.height, info.width) == (1, "uint16", 5, 7)
