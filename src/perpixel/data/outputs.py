"""From the parts of a mosaic to one file: label PNG, tiled TIFF with everything that belongs to it, .npy, zarr. A part at a time."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path

import numpy as np
import tifffile

from perpixel.data.geo import NODATA_TAG
from perpixel.data.mosaics import Mosaic
from perpixel.data.windows import Place, Source
from perpixel.data.writing import PREDICTED, VOID_COLOR, replacing, replacing_folder, write_labels

TIFF_LIMIT = 2**32 - 2**24  # bytes of encoded tiles that leave a classic TIFF room for its tags
FORMATS = ("auto", "png", "tif", "zarr")
PNG_PIXELS = 2**26  # a label PNG is encoded as a whole, in memory
OVERLAY_SIDE = 4096  # pixels; the picture for people of a larger image shows every second, third, ... of its pixels


@dataclass(frozen=True)
class Legend:
    """What the numbers of a label image mean: names and RGB colours 0..255 of the classes."""

    classes: Sequence[str]
    colors: Sequence[tuple[int, int, int]]


def format_of(choice: str, path: Path, size: tuple[int, int], place: Place) -> str:
    """png, tif or zarr: "auto" is zarr for zarr, tif for what has a place on Earth or is too large for PNG, else png.

    Raises:
        ValueError: for another choice, or a PNG of too many pixels.
    """
    large = size[0] * size[1] > PNG_PIXELS
    if choice not in FORMATS:
        raise ValueError(f"format is {choice!r}; legal is {', '.join(FORMATS)}")
    if choice == "png" and large:
        raise ValueError(
            f"{path}: {size[0]}x{size[1]} pixels are too many for a label PNG (limit {PNG_PIXELS:,}); use --format tif or zarr"
        )
    if choice != "auto":
        return choice
    return "zarr" if path.is_dir() else "tif" if large or place.tags else "png"


def write_layer(path: Path, mosaic: Mosaic, name: str, legend: Legend, place: Place) -> None:
    """Put a layer's parts together, as the suffix of `path` says: .png (labels), .npy, .tif or .zarr.

    Raises:
        OSError: see `replacing`.
        ValueError: a .zarr without zarr installed.
    """
    if path.suffix == ".png":
        write_labels(path, _whole(mosaic, name), legend.colors, predicted=True)
    elif path.suffix == ".npy":
        _write_npy(path, mosaic, name)
    elif path.suffix == ".zarr":
        _write_zarr(path, mosaic, name, legend)
    else:
        _write_tiff(path, mosaic, name, legend, place)


def _whole(mosaic: Mosaic, name: str) -> np.ndarray:
    out = np.empty(mosaic.grid.size, mosaic.layers[name].dtype)
    for block in mosaic.grid.blocks:
        out[block.top : block.top + block.height, block.left : block.left + block.width] = mosaic.array(block, name)
    return out


def _write_tiff(path: Path, mosaic: Mosaic, name: str, legend: Legend, place: Place) -> None:
    """Tiled and deflated, BigTIFF where it has to be; the encoded tiles are copied as they are.

    Labels have the palette (uint8), names and colours as JSON in ImageDescription, and GDAL_NODATA says which number is no class.
    """
    layer = mosaic.layers[name]
    described: dict[str, object] = {"layer": name, "classes": list(legend.classes)}
    extra = list(place.tags)
    colormap = None
    if name == "labels":
        ignore = int(np.iinfo(layer.dtype).max)
        described |= {"colors": [list(color) for color in legend.colors], "ignore": ignore, PREDICTED[0].lower(): PREDICTED[1]}
        extra.append((NODATA_TAG, 2, 0, str(ignore), True))
        if layer.dtype == "uint8":
            colormap = np.zeros((3, 256), np.uint16)
            colormap[:, 255] = np.array(VOID_COLOR) * 257
            colormap[:, : len(legend.colors)] = np.asarray(legend.colors, np.uint16).reshape(-1, 3).T * 257
    else:
        extra.append((NODATA_TAG, 2, 0, "nan", True))
    with replacing(path) as temporary:
        tifffile.imwrite(
            temporary,
            mosaic.encoded(name),
            shape=(layer.bands, *mosaic.grid.size) if layer.bands else mosaic.grid.size,
            dtype=layer.dtype,
            tile=(mosaic.grid.tile, mosaic.grid.tile),
            compression="adobe_deflate",
            photometric="minisblack" if colormap is None else "palette",
            planarconfig="separate" if layer.bands > 1 else None,
            colormap=colormap,
            bigtiff=mosaic.encoded_size(name) > TIFF_LIMIT,
            description=json.dumps(described),
            metadata=None,
            extratags=extra,
        )


def _write_npy(path: Path, mosaic: Mosaic, name: str) -> None:
    """As `write_array`, a block at a time: each row of it goes to its place in the file."""
    layer, (height, width) = mosaic.layers[name], mosaic.grid.size
    shape = (layer.bands, height, width) if layer.bands else (height, width)
    header = {"descr": np.lib.format.dtype_to_descr(np.dtype(layer.dtype)), "fortran_order": False, "shape": shape}
    item = np.dtype(layer.dtype).itemsize
    with replacing(path) as temporary, temporary.open("wb") as file:
        np.lib.format.write_array_header_1_0(file, header)
        start = file.tell()
        for block in mosaic.grid.blocks:
            for band, part in enumerate(mosaic.array(block, name).reshape(-1, block.height, block.width)):
                for row, values in enumerate(part, block.top):
                    file.seek(start + ((band * height + row) * width + block.left) * item)
                    file.write(values.data)


def _write_zarr(path: Path, mosaic: Mosaic, name: str, legend: Legend) -> None:
    """A zarr array with a chunk for each block and the classes as attributes; made beside it under another name and renamed."""
    try:
        zarr = import_module("zarr")
    except ImportError:
        raise ValueError(f"{path}: writing zarr needs zarr; pip install 'perpixel[zarr]' adds it") from None
    layer, size = mosaic.layers[name], mosaic.grid.size
    block = tuple(min(side, full) for side, full in zip(mosaic.grid.block, size, strict=True))
    shape, chunks = ((layer.bands, *size), (1, *block)) if layer.bands else (size, block)
    with replacing_folder(path) as temporary:
        array = zarr.create_array(
            temporary,
            shape=shape,
            chunks=chunks,
            dtype=layer.dtype,
            dimension_names=["c", "y", "x"][-len(shape) :],
            attributes={
                "classes": list(legend.classes),
                "colors": [list(color) for color in legend.colors],
                "layer": name,
                **({PREDICTED[0].lower(): PREDICTED[1]} if name == "labels" else {}),
            },
        )
        for part in mosaic.grid.blocks:
            array[..., part.top : part.top + part.height, part.left : part.left + part.width] = mosaic.array(part, name)


def thinned(source: Source, mosaic: Mosaic) -> tuple[np.ndarray, np.ndarray]:
    """Image (C, h, w) and labels (h, w) of every n-th pixel, so that no side is above OVERLAY_SIDE; n is 1 for all but large images."""
    step = -(-max(source.size) // OVERLAY_SIDE)
    height, width = (-(-side // step) for side in source.size)
    labels = np.empty((height, width), mosaic.layers["labels"].dtype)
    image = np.empty((source.bands, height, width), source.read(0, 0, 1, 1).pixels.dtype)
    for block in mosaic.grid.blocks:
        skip_rows, skip_columns = -block.top % step, -block.left % step
        pixels = source.read(block.top, block.left, block.height, block.width).pixels[:, skip_rows::step, skip_columns::step]
        top, left = (block.top + skip_rows) // step, (block.left + skip_columns) // step
        into = (slice(top, top + pixels.shape[1]), slice(left, left + pixels.shape[2]))
        image[(slice(None), *into)] = pixels
        labels[into] = mosaic.array(block, "labels")[skip_rows::step, skip_columns::step]
    return image, labels
