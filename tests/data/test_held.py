"""What sources hold of a picture between windows, beside the window in hand: measured, and as they say it."""

import gc
import os
import threading
import tracemalloc

import numpy as np
import pytest
import tifffile

from perpixel.data import tiff_windows
from perpixel.data.images import Picture
from perpixel.data.sources import open_source
from perpixel.data.tiff_windows import TiffSource
from perpixel.data.windows import WholeSource

SIZE, SIDE = (1536, 2048), 256


@pytest.fixture(autouse=True)
def _small_limits(monkeypatch):
    monkeypatch.setattr(tiff_windows, "SMALL", 0)
    monkeypatch.setattr(tiff_windows, "KEPT_BYTES", 2**18)


def noise(*shape, dtype=np.uint16):
    return np.random.default_rng(0).integers(0, 2**16, shape).astype(dtype)


def written(path, kind):
    if kind == "zarr":
        zarr = pytest.importorskip("zarr")
        zarr.create_array(path / "a.zarr", shape=SIZE, chunks=(64, 64), dtype="uint16")[:] = noise(*SIZE)
        return path / "a.zarr"
    ways = {
        "tiled": {"tile": (128, 128), "compression": "zlib"},
        "striped": {"rowsperstrip": 16, "compression": "zlib"},
        "tall_strips": {"rowsperstrip": 512, "compression": "zlib"},
        "as_it_lies": {},
        "ome": {"tile": (128, 128), "compression": "zlib", "metadata": {"axes": "CYX"}, "photometric": "minisblack"},
        "striped_ome": {"rowsperstrip": 16, "compression": "zlib", "metadata": {"axes": "CYX"}, "photometric": "minisblack"},
    }
    file = path / ("a.ome.tif" if "ome" in kind else "a.tif")
    tifffile.imwrite(file, noise(3, *SIZE) if "ome" in kind else noise(*SIZE), **ways[kind])
    return file


@pytest.mark.parametrize("kind", ["tiled", "striped", "tall_strips", "as_it_lies", "ome", "striped_ome", "zarr"])
def test_a_source_holds_no_more_than_it_says_over_two_rows_of_blocks_and_says_no_more_than_four_times_that(tmp_path, kind):
    path = written(tmp_path, kind)
    open_source(Picture(path)).close()  # libraries are loaded
    tracemalloc.start()
    source = open_source(Picture(path))
    source.keep(SIDE)
    most = 0
    for top in (128, 400):
        for left in range(0, SIZE[1], SIDE):
            window = source.read(top, left, SIDE, SIDE)
            most = max(most, tracemalloc.get_traced_memory()[0] - window.pixels.nbytes)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    slack = 2**18  # futures, tags
    assert most <= source.held(SIDE) + slack
    assert peak <= source.held(SIDE) + 4 * window.pixels.nbytes + slack
    assert source.held(SIDE) <= 4 * peak
    source.close()


def test_a_picture_decoded_whole_holds_all_of_it():
    assert WholeSource(noise(3, 50, 70)).held(10) == 3 * 50 * 70 * 2


def test_the_pages_of_an_ome_tiff_share_one_limit_and_the_threads_of_one(tmp_path):
    values = noise(12, 512, 512)
    tifffile.imwrite(
        tmp_path / "a.ome.tif", values, metadata={"axes": "CYX"}, photometric="minisblack", tile=(128, 128), compression="zlib"
    )
    before = threading.active_count()
    source = open_source(Picture(tmp_path / "a.ome.tif"))
    source.keep(SIDE)
    tracemalloc.start()
    assert np.array_equal(source.read(0, 0, 512, 512).pixels, values)
    held = tracemalloc.get_traced_memory()[0]
    tracemalloc.stop()
    assert held < 2 * tiff_windows.KEPT_BYTES  # twelve of them before
    assert source.held(SIDE) == tiff_windows.KEPT_BYTES + tiff_windows.THREADS * 128 * 128 * 2
    assert threading.active_count() - before <= tiff_windows.THREADS
    source.close()
    assert threading.active_count() == before


def test_a_file_that_is_refused_is_closed_and_leaves_no_threads(tmp_path, monkeypatch):
    tifffile.imwrite(tmp_path / "a.tif", noise(150, 210), tile=(64, 64), compression="zlib")
    tifffile.imwrite(tmp_path / "a.tif.msk", noise(9, 9))
    tifffile.imwrite(
        tmp_path / "b.ome.tif", noise(3, 150, 210), metadata={"axes": "CYX"}, photometric="minisblack", tile=(64, 64), compression="zlib"
    )
    tifffile.imwrite(tmp_path / "c.tif", noise(150, 210), tile=(64, 64), compression="zlib")
    data = (tmp_path / "c.tif").read_bytes()
    with tifffile.TiffFile(tmp_path / "c.tif") as tiff:
        (tmp_path / "c.tif").write_bytes(data[: tiff.pages[0].dataoffsets[0] + 9])
    gc.collect()
    files, threads = len(os.listdir("/proc/self/fd")), threading.active_count()
    refused = []  # which keep what they went through alive

    def refuse(name, why):
        with pytest.raises(ValueError, match=why) as said:
            open_source(Picture(tmp_path / name))
        refused.append(said)

    refuse("a.tif", "is the mask of")
    refuse("c.tif", "is cut off")
    own = TiffSource.read
    monkeypatch.setattr(TiffSource, "read", lambda source, *box: own(source, *box) if source.picture.page < 2 else own(None, *box))
    with pytest.raises(AttributeError):  # the third of three pages
        open_source(Picture(tmp_path / "b.ome.tif"))
    assert (len(os.listdir("/proc/self/fd")), threading.active_count()) == (files, threads)
