"""Rasters that GDAL reads: what is damaged of them."""

import numpy as np
import pytest
import tifffile

from perpixel.data.images import Picture
from perpixel.data.sources import open_source

rasterio = pytest.importorskip("rasterio")
SHEET = (
    '<SimpleSource><SourceFilename relativeToVRT="1">{0}.tif</SourceFilename><SourceBand>1</SourceBand>'
    '<SrcRect xOff="0" yOff="0" xSize="256" ySize="256"/><DstRect xOff="{1}" yOff="0" xSize="256" ySize="256"/></SimpleSource>'
)


@pytest.mark.filterwarnings("ignore:Dataset has no geotransform")
def test_of_a_vrt_only_the_block_with_the_damaged_tile_of_a_sheet_is_not_known(tmp_path):
    """GDAL reads a .vrt in blocks of 128x128; the damaged tile lies in rows 128 to 191 and columns 256 to 319."""
    pixels = np.random.default_rng(0).integers(1, 255, (256, 512)).astype(np.uint8)
    for number in (0, 1):
        tifffile.imwrite(tmp_path / f"{number}.tif", pixels[:, 256 * number :][:, :256], tile=(64, 64), compression="zlib")
    with tifffile.TiffFile(tmp_path / "1.tif") as tiff:
        offset, count = tiff.pages[0].dataoffsets[8], tiff.pages[0].databytecounts[8]
    with (tmp_path / "1.tif").open("r+b") as file:
        file.seek(offset)
        file.write(b"\xff" * count)
    sheets = SHEET.format(0, 0) + SHEET.format(1, 256)
    band = f'<VRTRasterBand dataType="Byte" band="1">{sheets}</VRTRasterBand>'
    (tmp_path / "a.vrt").write_text(f'<VRTDataset rasterXSize="512" rasterYSize="256">{band}</VRTDataset>', "utf-8")
    source = open_source(Picture(tmp_path / "a.vrt"))
    expected = np.ones((256, 512), bool)
    expected[128:256, 256:384] = False
    for top, left, height, width in ((0, 0, 256, 512), (30, 40, 200, 300)):
        window = source.read(top, left, height, width)
        part = (slice(top, top + height), slice(left, left + width))
        assert list(window.damage) == [(128, 256, 128, 128)]
        assert np.array_equal(window.known, expected[part])
        assert np.array_equal(window.pixels[0], np.where(expected, pixels, 0)[part])


@pytest.mark.filterwarnings("ignore:Dataset has no geotransform")
def test_a_raster_holds_what_gdal_s_cache_may_hold_and_no_more_than_the_file_has(tmp_path):
    with rasterio.open(tmp_path / "a.img", "w", driver="HFA", width=2048, height=1024, count=3, dtype="uint16") as file:
        file.write(np.ones((3, 1024, 2048), np.uint16))
    source = open_source(Picture(tmp_path / "a.img"))
    for megabytes in (5, 2**10):
        with rasterio.Env(GDAL_CACHEMAX=megabytes):
            assert source.held(256) == min(megabytes * 2**20, 3 * 1024 * 2048 * 2)
