"""What a zarr store says is what is read: number types, and which failures are damage."""

import numpy as np
import pytest

from perpixel.data.images import Picture
from perpixel.data.sources import open_source

zarr = pytest.importorskip("zarr")


def store(path, values, version=3, chunks=(16, 16)):
    """Big-endian as each version has it: in the number type (2), or in the codec that makes bytes (3)."""
    big = values.dtype.str.startswith(">") and version == 3
    options = {"serializer": zarr.codecs.BytesCodec(endian="big")} if big else {}
    array = zarr.create_array(path, shape=values.shape, chunks=chunks, dtype=values.dtype, zarr_format=version, **options)
    array[:] = values
    return path


@pytest.mark.parametrize("version", [2, 3])
@pytest.mark.parametrize("kind", [">u2", ">f4", "<u2", ">i2"])
def test_the_byte_order_of_a_store_changes_neither_numbers_nor_their_type(tmp_path, version, kind):
    """A uint16 that became float32 would be scaled by 1 in place of 65535."""
    values = (np.arange(32 * 40).reshape(32, 40) * 17).astype(kind)
    window = open_source(Picture(store(tmp_path / "a.zarr", values, version))).read(3, 5, 20, 30)
    assert window.pixels.dtype == (np.uint16 if kind.endswith("u2") else np.float32)
    assert window.pixels.dtype.isnative
    assert np.array_equal(window.pixels[0], values[3:23, 5:35])


@pytest.mark.parametrize(
    ("error", "told"),
    [
        (MemoryError("no room"), (MemoryError, "no room")),
        (PermissionError(13, "denied"), (ValueError, r"a\.zarr: no permission to read it")),
        (ModuleNotFoundError("No module named 'pcodec'"), (ValueError, r"a\.zarr: a decoder .* \(No module named 'pcodec'\); pip install")),
    ],
)
def test_what_is_wrong_with_this_machine_is_not_called_damage_of_every_chunk(tmp_path, monkeypatch, error, told):
    source = open_source(Picture(store(tmp_path / "a.zarr", np.ones((32, 40), np.uint8))))

    async def broken(*_, **__):
        raise error

    monkeypatch.setattr(zarr.storage.LocalStore, "get", broken)
    with pytest.raises(told[0], match=told[1]):
        source.read(0, 0, 32, 40)
