"""Pictures read window by window: the same pixels as the whole, only what is touched is decoded, and damage is said."""

import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import rasterio
import tifffile

from perpixel.data import tiff_windows
from perpixel.data.images import Picture, read_image
from perpixel.data.sources import find_sources, open_source
from perpixel.data.tiff_windows import TiffSource
from perpixel.data.windows import hole_lines

SIZE = (150, 210)


def noise(*shape, dtype=np.uint8, seed=0):
    values = np.random.default_rng(seed).integers(0, 255, shape)
    return values.astype(dtype) if np.dtype(dtype).kind == "u" else (values / 255).astype(dtype)


def windows_equal(source, whole, count=12):
    """Random windows, a single pixel and everything."""
    random = np.random.default_rng(1)
    height, width = source.size
    boxes = [(0, 0, height, width), (height - 1, width - 1, 1, 1)]
    for _ in range(count):
        h, w = int(random.integers(1, height + 1)), int(random.integers(1, width + 1))
        boxes.append((int(random.integers(0, height - h + 1)), int(random.integers(0, width - w + 1)), h, w))
    for top, left, h, w in boxes:
        window = source.read(top, left, h, w)
        assert window.known is None
        np.testing.assert_array_equal(window.pixels, whole[:, top : top + h, left : left + w])


KINDS = {
    "tiled": {"tile": (64, 48), "compression": "zlib", "predictor": True},
    "striped": {"rowsperstrip": 7, "compression": "zlib"},
    "strips_as_they_lie": {"rowsperstrip": 11},
    "one_strip": {"rowsperstrip": 150},
    "planar": {"tile": (32, 32), "planarconfig": "separate", "compression": "zlib"},
    "planar_as_it_lies": {"planarconfig": "separate"},
    "big_and_big_endian": {"tile": (64, 64), "bigtiff": True, "byteorder": ">"},
    "lzw": {"tile": (64, 64), "compression": "lzw"},
    "jpeg": {"tile": (64, 64), "compression": "jpeg"},
}


@pytest.mark.parametrize(
    ("kind", "dtype"),
    [(kind, dtype) for kind in KINDS for dtype in (np.uint8, np.uint16, np.float32) if kind != "jpeg" or dtype == np.uint8],
)
def test_every_window_of_a_tiff_is_that_part_of_the_whole(tmp_path, monkeypatch, kind, dtype):
    monkeypatch.setattr(tiff_windows, "SMALL", 0)
    path = tmp_path / "a.tif"
    pixels = noise(3, *SIZE, dtype=dtype) if "planar" in kind else noise(*SIZE, 3, dtype=dtype)
    tifffile.imwrite(path, pixels, photometric="rgb", **KINDS[kind])
    source = open_source(Picture(path))
    assert isinstance(source, TiffSource)
    assert (source.size, source.bands) == (SIZE, 3)
    if kind == "jpeg":  # lossy: Pillow and imagecodecs may round differently
        np.testing.assert_allclose(source.read(0, 0, *SIZE).pixels.astype(int), read_image(path).astype(int), atol=3)
    else:
        windows_equal(source, read_image(path))
    source.close()


def test_palettes_inverted_grey_one_bit_and_alpha_are_read_in_windows_as_in_the_whole(tmp_path):
    colours = noise(3, 256, dtype=np.uint16) * 257
    tifffile.imwrite(tmp_path / "palette.tif", noise(*SIZE), photometric="palette", colormap=colours, tile=(64, 64))
    tifffile.imwrite(tmp_path / "inverted.tif", noise(*SIZE), photometric="miniswhite", tile=(64, 64))
    tifffile.imwrite(tmp_path / "bits.tif", noise(*SIZE) > 99, tile=(64, 64))
    tifffile.imwrite(tmp_path / "alpha.tif", noise(*SIZE, 4), photometric="rgb", extrasamples=["unassalpha"], tile=(64, 64))
    for picture in find_sources([tmp_path]):
        source = open_source(picture)
        assert isinstance(source, TiffSource)
        windows_equal(source, read_image(picture), count=4)


def test_a_pyramid_gives_its_full_picture_and_a_stack_its_pages(tmp_path):
    pixels = noise(*SIZE)
    with tifffile.TiffWriter(tmp_path / "pyramid.tif") as file:
        file.write(pixels, tile=(64, 64), subifds=1)
        file.write(pixels[::2, ::2], tile=(64, 64), subfiletype=1)
    volume = noise(3, *SIZE)
    tifffile.imwrite(tmp_path / "stack.tif", volume, photometric="minisblack", tile=(64, 64))
    pictures = find_sources([tmp_path])
    assert [picture.name for picture in pictures] == ["pyramid", "stack_0000", "stack_0001", "stack_0002"]
    for picture, whole in zip(pictures, [pixels, *volume], strict=True):
        windows_equal(open_source(picture), whole[None], count=3)


def test_channels_of_an_ome_tiff_are_bands_and_its_depth_slices(tmp_path):
    values = noise(2, 3, *SIZE, dtype=np.uint16)  # Z, C
    tifffile.imwrite(tmp_path / "cells.ome.tif", values, metadata={"axes": "ZCYX"}, photometric="minisblack", tile=(64, 64))
    pictures = find_sources([tmp_path])
    assert [picture.page for picture in pictures] == [0, 1]
    for picture, whole in zip(pictures, values, strict=True):
        source = open_source(picture)
        assert source.bands == 3
        windows_equal(source, whole, count=3)


def test_an_ome_tiff_that_lost_pages_is_refused_once_and_its_bands_are_not_taken_for_pictures(tmp_path):
    values = noise(2, 3, *SIZE)
    tifffile.imwrite(tmp_path / "a.ome.tif", values, metadata={"axes": "ZCYX"}, photometric="minisblack", tile=(64, 64), compression="zlib")
    data = (tmp_path / "a.ome.tif").read_bytes()
    (tmp_path / "a.ome.tif").write_bytes(data[: len(data) // 2])
    (picture,) = find_sources([tmp_path / "a.ome.tif"])
    with pytest.raises(ValueError, match=r"a\.ome\.tif: the file is cut off: directories of pages are lost"):
        open_source(picture)


def test_a_strip_is_decoded_once_for_a_row_of_blocks(tmp_path, monkeypatch):
    monkeypatch.setattr(tiff_windows, "SMALL", 0)
    monkeypatch.setattr(tiff_windows, "KEPT_BYTES", 1)
    tifffile.imwrite(tmp_path / "a.tif", noise(640, 200), rowsperstrip=16, compression="zlib")
    source = open_source(Picture(tmp_path / "a.tif"))
    decoded = []
    inner = source.page.decode
    monkeypatch.setattr(source.page, "decode", lambda data, number, **rest: decoded.append(number) or inner(data, number, **rest))
    source.keep(64)
    source.read(0, 0, 1, 1)
    decoded.clear()
    for top in range(0, 640, 64):
        for left in range(0, 200, 50):
            source.read(top, left, 64, 50)
    assert sorted(decoded) == list(range(1, 640 // 16))  # the first was decoded before
    assert sum(part.nbytes for part in source.decoded._kept.values()) <= (64 + 16) * 200


def test_the_limit_on_pixels_is_for_what_is_decoded_whole(tmp_path, monkeypatch):
    tifffile.imwrite(tmp_path / "tiled.tif", noise(*SIZE), tile=(64, 64), compression="zlib")
    tifffile.imwrite(tmp_path / "whole.tif", noise(*SIZE), rowsperstrip=150, compression="zlib")
    monkeypatch.setenv("PERPIXEL_MAX_PIXELS", "5000")
    assert open_source(Picture(tmp_path / "tiled.tif")).read(0, 0, 100, 100).pixels.shape == (1, 100, 100)
    monkeypatch.setattr(tiff_windows, "SMALL", 0)
    with pytest.raises(ValueError, match=r"whole\.tif: is compressed in pieces of 150x210 pixels, .* limit .* 5,000\. Write it tiled"):
        open_source(Picture(tmp_path / "whole.tif"))


def break_tile(path, number):
    with tifffile.TiffFile(path) as tiff:
        offset, count = tiff.pages[0].dataoffsets[number], tiff.pages[0].databytecounts[number]
    with path.open("r+b") as file:
        file.seek(offset)
        file.write(b"\xff" * count)


def test_a_damaged_tile_is_named_by_its_place_and_the_rest_is_read(tmp_path):
    pixels = noise(*SIZE)
    tifffile.imwrite(tmp_path / "a.tif", pixels, tile=(64, 64), compression="zlib")
    break_tile(tmp_path / "a.tif", 5)  # second row of tiles, second of four
    window = open_source(Picture(tmp_path / "a.tif")).read(0, 0, *SIZE)
    assert list(window.damage) == [(64, 64, 64, 64)]
    expected = np.ones(SIZE, bool)
    expected[64:128, 64:128] = False
    assert np.array_equal(window.known, expected)
    assert np.array_equal(window.pixels[0][expected], pixels[expected])


CUT = {
    "tiled": {"tile": (64, 48), "compression": "zlib"},
    "small_and_striped": {"rowsperstrip": 7, "compression": "zlib"},
    "strips_as_they_lie": {"rowsperstrip": 11},
    "one_strip_as_it_lies": {"rowsperstrip": 150},
    "planar": {"tile": (32, 32), "planarconfig": "separate", "compression": "zlib"},
}


@pytest.mark.parametrize("kind", CUT)
def test_of_a_file_that_was_cut_off_all_that_lies_before_its_end_is_read_and_the_rest_is_damage(tmp_path, kind):
    pixels = noise(3, *SIZE) if kind == "planar" else noise(*SIZE, 3)
    tifffile.imwrite(tmp_path / "a.tif", pixels, photometric="rgb", **CUT[kind])
    data = (tmp_path / "a.tif").read_bytes()
    length = int(len(data) * (0.85 if kind == "planar" else 0.6))  # planar: within the last band
    (tmp_path / "cut.tif").write_bytes(data[:length])
    expected = np.ones(SIZE, bool)
    with tifffile.TiffFile(tmp_path / "a.tif") as tiff:
        page = tiff.pages[0]
        high, wide = (page.tilelength, page.tilewidth) if page.is_tiled else (page.rowsperstrip, SIZE[1])
        across = -(-SIZE[1] // wide)
        for number, (offset, count) in enumerate(zip(page.dataoffsets, page.databytecounts, strict=True)):
            y, x = number % (across * -(-SIZE[0] // high)) // across * high, number % across * wide
            if "as_it_lies" in kind or "as_they_lie" in kind:
                for row in range(y, min(y + high, SIZE[0])):
                    expected[row] &= offset + (row - y + 1) * SIZE[1] * 3 <= length
            else:
                expected[y : y + high, x : x + wide] &= offset + count <= length
    source = open_source(Picture(tmp_path / "cut.tif"))
    assert 0.1 < expected.mean() < 0.9
    whole = read_image(tmp_path / "a.tif")
    for top, left, height, width in ((0, 0, *SIZE), (50, 60, 70, 80)):
        window = source.read(top, left, height, width)
        part = (slice(top, top + height), slice(left, left + width))
        assert np.array_equal(window.known, expected[part])
        assert np.array_equal(window.pixels[:, window.known], whole[:, *part][:, window.known])
    told = np.zeros(SIZE, bool)
    for top, left, height, width in source.read(0, 0, *SIZE).damage:
        told[top : top + height, left : left + width] = True
    assert np.array_equal(told, ~expected)
    assert set(source.read(0, 0, *SIZE).damage.values()) == {f"the file is cut off after {length:,} bytes"}
    with pytest.raises(ValueError, match=r"cut\.tif\[0\]: the file is cut off: it is .* Copy or export it again, or take it away"):
        read_image(tmp_path / "cut.tif")


@pytest.mark.parametrize("kind", CUT)
def test_a_file_of_which_no_row_or_tile_is_left_is_refused(tmp_path, kind):
    tifffile.imwrite(tmp_path / "a.tif", noise(3, *SIZE) if kind == "planar" else noise(*SIZE, 3), photometric="rgb", **CUT[kind])
    with tifffile.TiffFile(tmp_path / "a.tif") as tiff:
        start = min(tiff.pages[0].dataoffsets)
    (tmp_path / "a.tif").write_bytes((tmp_path / "a.tif").read_bytes()[: start + 100])
    with pytest.raises(ValueError, match=r"a\.tif\[0\]: the file is cut off: it is [\d,]+ bytes long, but its content reaches to byte"):
        open_source(Picture(tmp_path / "a.tif"))


def test_damaged_neighbours_are_told_as_one_rectangle():
    tiles = {(y, x, 64, 64): "cut off" for y in (64, 128) for x in (0, 64, 128)} | {(0, 128, 64, 64): "cut off", (0, 0, 64, 64): "odd"}
    assert hole_lines("a", tiles) == [
        "a: rows 0 to 63, columns 0 to 63 are damaged (odd)",
        "a: rows 0 to 63, columns 128 to 191 are damaged (cut off)",
        "a: rows 64 to 191, columns 0 to 191 are damaged (cut off)",
    ]


@pytest.mark.parametrize("place", ["inside", "beside"])
@pytest.mark.parametrize("tiled", [True, False])
def test_what_a_mask_hides_is_not_known_as_gdal_says(tmp_path, place, tiled):
    """GDAL's `dataset_mask` is the judge: the mask alone counts, not the number for "no data" (which some seen pixels have)."""
    pixels, seen = noise(3, *SIZE), noise(*SIZE, seed=3) > 99
    pixels[:, 40:60, 40:60] = 0
    options = {"driver": "GTiff", "width": SIZE[1], "height": SIZE[0], "count": 3, "dtype": "uint8", "nodata": 0, "compress": "deflate"}
    options |= {"tiled": True, "blockxsize": 64, "blockysize": 32} if tiled else {"blockysize": 7}
    with rasterio.Env(GDAL_TIFF_INTERNAL_MASK=place == "inside"), rasterio.open(tmp_path / "a.tif", "w", **options) as file:
        file.write(pixels)
        file.write_mask(seen)
    assert (tmp_path / "a.tif.msk").exists() == (place == "beside")
    with rasterio.open(tmp_path / "a.tif") as file:
        expected = file.dataset_mask() > 0
    assert np.array_equal(expected, seen)
    (picture,) = find_sources([tmp_path / "a.tif"])
    source = open_source(picture)
    for top, left, height, width in ((0, 0, *SIZE), (50, 60, 70, 80)):
        window = source.read(top, left, height, width)
        assert np.array_equal(window.known, expected[top : top + height, left : left + width])
        assert np.array_equal(window.pixels, pixels[:, top : top + height, left : left + width])
    source.close()


def test_each_page_has_the_mask_that_follows_it_and_overviews_have_none(tmp_path):
    pages, masks = noise(2, *SIZE), noise(2, *SIZE, seed=1) > 99
    with tifffile.TiffWriter(tmp_path / "a.tif") as file:
        for number, (page, mask) in enumerate(zip(pages, masks, strict=True)):
            file.write(page, photometric="minisblack")
            file.write(page[::2, ::2], photometric="minisblack", subfiletype=1)
            file.write(mask[::2, ::2], photometric="mask", subfiletype=5)
            if number:
                file.write(mask, photometric="mask", subfiletype=4)
    first, second = (open_source(picture).read(0, 0, *SIZE) for picture in find_sources([tmp_path / "a.tif"]))
    assert first.known is None
    assert np.array_equal(second.known, masks[1])
    assert np.array_equal(second.pixels[0], pages[1])


def test_a_mask_beside_of_another_size_is_refused(tmp_path):
    tifffile.imwrite(tmp_path / "a.tif", noise(*SIZE))
    tifffile.imwrite(tmp_path / "a.tif.msk", noise(9, 9))
    with pytest.raises(ValueError, match=r"a\.tif\.msk: is the mask of .*a\.tif, but has 9x9 pixels, and the picture 150x210"):
        open_source(Picture(tmp_path / "a.tif"))


@pytest.mark.parametrize("kind", ["tiled", "striped", "strips_as_they_lie"])
def test_where_the_system_cannot_read_at_a_place_threads_read_the_same(tmp_path, monkeypatch, kind):
    """Windows has no `os.pread`."""
    monkeypatch.delattr("os.pread")
    pixels = noise(*SIZE, 3)
    tifffile.imwrite(tmp_path / "a.tif", pixels, photometric="rgb", **KINDS[kind])
    source = open_source(Picture(tmp_path / "a.tif"))
    monkeypatch.setattr(tiff_windows, "KEPT_BYTES", 0)
    source.keep(0)
    places = [(top, left) for top in range(0, 150, 30) for left in range(0, 210, 30)] * 5
    with ThreadPoolExecutor(8) as pool:
        for (top, left), window in zip(places, pool.map(lambda place: source.read(*place, 30, 30), places), strict=True):
            assert np.array_equal(window.pixels, pixels[top : top + 30, left : left + 30].transpose(2, 0, 1))
    (tmp_path / "a.tif").write_bytes((tmp_path / "a.tif").read_bytes()[:50_000])
    window = open_source(Picture(tmp_path / "a.tif")).read(0, 0, *SIZE)
    assert 0 < window.known.mean() < 1
    assert np.array_equal(window.pixels[:, window.known], pixels.transpose(2, 0, 1)[:, window.known])


def test_without_the_decoder_of_a_compression_pillow_reads_what_it_can(tmp_path, monkeypatch):
    pixels = noise(*SIZE, 3)
    tifffile.imwrite(tmp_path / "a.tif", pixels, photometric="rgb", tile=(64, 64), compression="lzw")

    def missing(*_, **__):
        raise ValueError("<COMPRESSION.LZW: 5> requires the 'imagecodecs' package")

    monkeypatch.setattr(tifffile.TiffPage, "decode", property(lambda _: missing))
    monkeypatch.setattr(tifffile.TiffPage, "asarray", missing)
    assert np.array_equal(open_source(Picture(tmp_path / "a.tif")).read(0, 0, *SIZE).pixels, pixels.transpose(2, 0, 1))


def test_numbers_that_float32_does_not_hold_are_not_known(tmp_path):
    values = noise(*SIZE, dtype=np.float64)
    values[3, 4], values[5, 6], values[7, 8] = np.nan, 1e300, -np.inf
    tifffile.imwrite(tmp_path / "a.tif", values)
    window = open_source(Picture(tmp_path / "a.tif")).read(0, 0, *SIZE)
    assert np.argwhere(~window.known).tolist() == [[3, 4], [5, 6], [7, 8]]
    assert np.isfinite(window.pixels).all()


def test_nodata_and_not_a_number_are_not_known(tmp_path):
    pixels = noise(*SIZE)
    tifffile.imwrite(tmp_path / "a.tif", pixels, tile=(64, 64), extratags=[(42113, 2, 0, "7", True)])
    values = noise(*SIZE, dtype=np.float32)
    values[3, 4] = np.nan
    tifffile.imwrite(tmp_path / "b.tif", values, tile=(64, 64))
    window = open_source(Picture(tmp_path / "a.tif")).read(0, 0, *SIZE)
    assert np.array_equal(window.known, pixels != 7)
    window = open_source(Picture(tmp_path / "b.tif")).read(0, 0, 9, 9)
    assert np.argwhere(~window.known).tolist() == [[3, 4]]
    assert np.isfinite(window.pixels).all()


def test_zarr_and_ome_zarr_are_read_in_windows_and_a_broken_chunk_is_damage(tmp_path):
    zarr = pytest.importorskip("zarr")
    values = noise(2, 3, *SIZE, dtype=np.uint16)
    group = zarr.create_group(tmp_path / "cells.zarr")
    array = group.create_array("0", shape=values.shape, chunks=(1, 1, 64, 64), dtype="uint16")
    array[:] = values
    axes = [{"name": name} for name in "zcyx"]
    group.attrs["ome"] = {"version": "0.5", "multiscales": [{"axes": axes, "datasets": [{"path": "0"}]}]}
    colour = zarr.create_array(tmp_path / "colour.zarr", shape=(*SIZE, 3), chunks=(64, 64, 3), dtype="uint8")
    colour[:] = noise(*SIZE, 3)
    pictures = find_sources([tmp_path])
    assert [picture.name for picture in pictures] == ["cells_0000", "cells_0001", "colour"]
    for picture, whole in zip(pictures, [*values, noise(*SIZE, 3).transpose(2, 0, 1)], strict=True):
        windows_equal(open_source(picture), whole, count=3)
    (tmp_path / "colour.zarr" / "c" / "1" / "0" / "0").write_bytes(b"no")
    window = open_source(pictures[2]).read(10, 10, 100, 100)
    assert list(window.damage) == [(64, 0, 64, 64)]
    assert not window.known[54:, :54].any()
    assert window.known.sum() == 100 * 100 - 46 * 54


def test_what_is_no_zarr_picture_is_refused(tmp_path):
    zarr = pytest.importorskip("zarr")
    zarr.create_array(tmp_path / "line.zarr", shape=(9,), chunks=(3,), dtype="uint8")
    with pytest.raises(ValueError, match=r"line\.zarr: an array with axes \[\] and shape \(9,\) is not a picture"):
        open_source(Picture(tmp_path / "line.zarr"))


@pytest.mark.parametrize(
    ("shape", "bands", "count", "place"),  # place in the array of the pixel (3, 4) of the last band of the first picture
    [
        ((6, 20, 30), 6, 1, (5, 3, 4)),  # as many as the model has
        ((6, 20, 30), 1, 6, (0, 3, 4)),  # a stack, as the pages of a TIFF
        ((3, 20, 30), 1, 3, (0, 3, 4)),
        ((3, 20, 30), 3, 1, (2, 3, 4)),
        ((1, 20, 30), 3, 1, (0, 3, 4)),  # one grey band does for three
        ((20, 30), 3, 1, (3, 4)),
        ((20, 30, 3), 1, 1, (3, 4, 2)),  # colours are no columns
        ((20, 30, 6), 6, 1, (3, 4, 5)),
        ((5, 6, 20, 30), 6, 5, (0, 5, 3, 4)),
        ((5, 6, 20, 30), 1, 30, (0, 0, 3, 4)),
        ((5, 20, 30, 3), 3, 5, (0, 3, 4, 2)),
        ((2, 4, 5, 20, 30), 4, 10, (0, 3, 0, 3, 4)),
        ((2, 4, 5, 20, 30), 5, 8, (0, 0, 4, 3, 4)),
        ((6, 20, 30), None, 1, (5, 3, 4)),
    ],
)
def test_axes_without_names_are_read_as_pictures_of_the_model_s_bands(tmp_path, shape, bands, count, place):
    zarr = pytest.importorskip("zarr")
    values = np.arange(np.prod(shape), dtype=np.uint16).reshape(shape)
    zarr.create_array(tmp_path / "a.zarr", shape=shape, chunks=shape, dtype="uint16")[:] = values
    pictures = find_sources([tmp_path / "a.zarr"], bands)
    assert len(pictures) == count
    source = open_source(pictures[0], bands)
    assert source.size == (20, 30)
    assert source.read(3, 4, 1, 1).pixels[-1].item() == values[place]


@pytest.mark.parametrize("bands", [3, 5])
def test_where_no_axis_has_the_model_s_bands_the_error_says_how_to_name_them_and_that_helps(tmp_path, bands):
    zarr = pytest.importorskip("zarr")
    group = zarr.create_group(tmp_path / "a.zarr")
    group.create_array("raw", shape=(40, 20, 30), chunks=(1, 20, 30), dtype="uint8")[:] = noise(40, 20, 30)
    (picture,) = find_sources([tmp_path / "a.zarr"], bands)
    with pytest.raises(
        ValueError, match=rf"a\.zarr: the axes .* no names, and its shape \(40, 20, 30\) .* where {bands} bands lie"
    ) as said:
        open_source(picture, bands)
    typed = str(said.value).partition('python -c "')[2].partition('"')[0]
    subprocess.run([sys.executable, "-c", typed], check=True)
    pictures = find_sources([tmp_path / "a.zarr"], bands)
    assert len(pictures) == 40
    assert np.array_equal(open_source(pictures[7], bands).read(0, 0, 20, 30).pixels[0], noise(40, 20, 30)[7])


@pytest.mark.parametrize("tiled", [True, False])
def test_a_cut_that_may_have_taken_the_mask_of_a_page_is_told_and_that_of_a_page_with_a_successor_is_not(tmp_path, tiled):
    options = {"photometric": "minisblack", **({"tile": (64, 64)} if tiled else {})}
    for name in ("masked", "stack"):
        with tifffile.TiffWriter(tmp_path / f"{name}.tif") as file:
            file.write(noise(*SIZE), **options)
            file.write(noise(*SIZE, seed=2) > 99, **({"photometric": "mask", "subfiletype": 4} if name == "masked" else options))
            file.write(noise(*SIZE), **options)
    cuts = {}
    for name, lost in (("masked", 1), ("stack", 2)):
        with tifffile.TiffFile(tmp_path / f"{name}.tif") as tiff:
            assert lost == 2 or tiff.pages[lost].is_mask
            cuts[name] = tiff.pages[lost].offset
        (tmp_path / f"{name}.tif").write_bytes((tmp_path / f"{name}.tif").read_bytes()[: cuts[name]])
    for picture, told in (
        (Picture(tmp_path / "masked.tif", 0), 1),
        (Picture(tmp_path / "stack.tif", 0), 0),
        (Picture(tmp_path / "stack.tif", 1), 1),
    ):
        window = open_source(picture).read(3, 4, 60, 70)
        assert (
            hole_lines("a", window.damage)
            == [
                "a: rows 0 to 149, columns 0 to 209 are damaged "
                "(the file is cut off, and with it perhaps the mask that says where it has no data)"
            ][:told]
        )
        assert window.known is None


def test_to_open_a_page_of_a_long_stack_few_directories_are_read(tmp_path, monkeypatch):
    """All those behind each page would take a time that grows with the square of their number."""
    with tifffile.TiffWriter(tmp_path / "a.tif") as file:
        for number in range(30):
            file.write(noise(8, 8, seed=number), photometric="minisblack", contiguous=False)
    seen, own = [], tifffile.TiffPage.__init__
    monkeypatch.setattr(tifffile.TiffPage, "__init__", lambda self, *given, **named: (seen.append(1), own(self, *given, **named))[1])
    assert np.array_equal(open_source(Picture(tmp_path / "a.tif", 0)).read(0, 0, 8, 8).pixels[0], noise(8, 8))
    assert len(seen) < 12
