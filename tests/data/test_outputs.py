"""Parts put together: by two processes at once, and without holding more than a block."""

import tracemalloc

import numpy as np
import pytest
import tifffile

from perpixel.data.images import Picture
from perpixel.data.mosaics import Grid, Layer, Mosaic
from perpixel.data.outputs import Legend, write_layer
from perpixel.data.sources import open_source
from perpixel.data.windows import NO_PLACE

LEGEND = Legend(("a", "b"), ((0, 0, 0), (255, 255, 255)))


def mosaic_of(folder, maps, block):
    """Parts of maps: layer -> (H, W) or (bands, H, W)."""
    layers = [Layer(name, len(values) if values.ndim == 3 else 0, str(values.dtype)) for name, values in maps.items()]
    mosaic = Mosaic(folder, Grid(next(iter(maps.values())).shape[-2:], block), layers)
    for part in mosaic.grid.blocks:
        rows, columns = slice(part.top, part.top + part.height), slice(part.left, part.left + part.width)
        mosaic.put(part, {name: values[..., rows, columns] for name, values in maps.items()})
    return mosaic


def labels(height, width, seed=0):
    return np.random.default_rng(seed).integers(0, 2, (height, width)).astype(np.uint8)


def test_two_that_join_a_zarr_output_at_once_leave_a_whole_one(tmp_path):
    """The other ends, and removes the parts, right after this one has read the last of them."""
    zarr = pytest.importorskip("zarr")
    values, path = labels(40, 50), tmp_path / "out" / "a.zarr"
    mine, other = (mosaic_of(tmp_path / "parts", {"labels": values}, (16, 16)) for _ in range(2))
    own = mine.array

    def last_read_then_other(block, name):
        array = own(block, name)
        if block == mine.grid.blocks[-1]:
            write_layer(path, other, "labels", LEGEND, NO_PLACE)
            other.remove()
        return array

    mine.array = last_read_then_other
    write_layer(path, mine, "labels", LEGEND, NO_PLACE)
    assert np.array_equal(zarr.open(path, mode="r")[:], values)
    assert [inside.name for inside in tmp_path.rglob("*.zarr*")] == ["a.zarr"]
    assert not (tmp_path / "parts").exists()


def test_a_zarr_output_replaces_an_older_one_only_when_it_is_whole(tmp_path):
    zarr = pytest.importorskip("zarr")
    path, old, new = tmp_path / "a.zarr", labels(40, 50), labels(33, 20, seed=1)
    write_layer(path, mosaic_of(tmp_path / "old", {"labels": old}, (16, 16)), "labels", LEGEND, NO_PLACE)
    mosaic = mosaic_of(tmp_path / "new", {"labels": new}, (16, 16))
    last = next((tmp_path / "new").glob("0000032_0000016_*.labels"))
    last.rename(tmp_path / "away")
    with pytest.raises(FileNotFoundError):
        write_layer(path, mosaic, "labels", LEGEND, NO_PLACE)
    assert np.array_equal(zarr.open(path, mode="r")[:], old)
    (tmp_path / "away").rename(last)
    (tmp_path / ".a.part.zarr").mkdir()  # of a process that was killed
    (tmp_path / ".a.part.zarr" / "zarr.json").write_text("{}", "utf-8")
    write_layer(path, mosaic, "labels", LEGEND, NO_PLACE)
    assert np.array_equal(zarr.open(path, mode="r")[:], new)
    assert [inside.name for inside in tmp_path.glob("*a*.zarr*")] == ["a.zarr"]


@pytest.mark.parametrize("bands", [0, 3])
def test_an_npy_map_is_joined_without_holding_a_row_of_blocks(tmp_path, bands):
    values = np.random.default_rng(0).random((bands, 90, 8192) if bands else (90, 8192)).astype(np.float16)
    mosaic = mosaic_of(tmp_path / "parts", {"entropy": values, "labels": labels(90, 8192)}, (64, 64))
    tracemalloc.start()
    write_layer(tmp_path / "a.npy", mosaic, "entropy", LEGEND, NO_PLACE)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert np.array_equal(np.load(tmp_path / "a.npy"), values)
    assert peak < max(bands, 1) * 64 * 8192 * 2 / 2  # half a row of blocks


@pytest.mark.parametrize("name", ["Landesvermessung Thüringen|", "測地系|"])
def test_names_of_places_that_are_not_ascii_are_copied_byte_by_byte(tmp_path, name):
    """GDAL writes UTF-8 into GeoAsciiParams, which is 7-bit by OGC 19-008r4."""
    stored = name.encode() + b"\0"
    tags = [(33550, "d", 3, (1.0, 1.0, 0.0), True), (34737, 2, len(stored), stored, True)]
    tifffile.imwrite(tmp_path / "a.tif", labels(40, 50), extratags=tags)
    place = open_source(Picture(tmp_path / "a.tif")).place
    write_layer(tmp_path / "b.tif", mosaic_of(tmp_path / "parts", {"labels": labels(40, 50)}, (16, 16)), "labels", LEGEND, place)
    assert stored in (tmp_path / "b.tif").read_bytes()
    with tifffile.TiffFile(tmp_path / "a.tif") as before, tifffile.TiffFile(tmp_path / "b.tif") as after:
        for code in (33550, 34737):
            assert after.pages[0].tags[code].value == before.pages[0].tags[code].value
