"""Find and open pictures of any kind and size, to be read window by window."""

import os
import warnings
from collections.abc import Iterable, Sequence
from pathlib import Path

from perpixel.data.decoding import PictureError, explained, is_tiff, lacks_codec
from perpixel.data.geo import GEO_SUFFIXES, files_of, open_raster
from perpixel.data.images import IMAGE_SUFFIXES, Picture, find_pictures, read_image
from perpixel.data.tiff_windows import BandPages, TiffSource, knows_place, mask_file, ome_slices, tiff_in_parts
from perpixel.data.windows import Source, WholeSource
from perpixel.data.zarr_windows import ZarrSource, is_zarr, zarr_slices


def find_sources(inputs: Sequence[str | Path], bands: int | None = None) -> list[Picture]:
    """As `find_pictures`; also zarr stores and rasters for GDAL, named or in a folder. Each slice of a store or an OME-TIFF is a picture.

    `bands`: of the pictures, where that is known; it tells slices from bands in a zarr array whose axes have no names.

    Raises:
        ValueError: as `find_pictures`.
    """
    found: list[Picture] = []
    for given in inputs:
        path = Path(given)
        beside = [path] if is_zarr(path) else sorted(filter(_special, path.iterdir())) if path.is_dir() else []
        for special in beside:
            found += zarr_slices(special, bands) if is_zarr(special) else [Picture(special)]
        if not beside or any(_is_ordinary(inside) for inside in path.iterdir() if not is_zarr(path)):
            found += find_pictures([given])
    if not inputs:
        return find_pictures(inputs)  # which says what is missing
    return _with_bands_together(dict.fromkeys(found))


def files_behind(path: Path) -> list[tuple[str, Path]]:
    """All that the pictures of a path are read from, by names that do not depend on where it lies."""
    if path.is_dir():
        return [(inside.relative_to(path).as_posix(), inside) for inside in sorted(path.rglob("*")) if inside.is_file()]
    sheets = files_of(path) if path.suffix.lower() in GEO_SUFFIXES else [path, mask_file(path)]
    return [(file.name, file) for file in sheets if os.path.exists(file)]  # False where the name is too long


def _special(path: Path) -> bool:
    return not path.name.startswith(".") and (path.suffix.lower() in GEO_SUFFIXES or is_zarr(path))


def _is_ordinary(path: Path) -> bool:
    return path.is_file() and path.suffix.lower() in IMAGE_SUFFIXES


def _with_bands_together(pictures: Iterable[Picture]) -> list[Picture]:
    """Pages that are bands of an OME-TIFF become its slices, numbered as `open_source` takes them."""
    found: dict[Picture, None] = {}
    slices: dict[Path, list[Picture]] = {}
    for picture in pictures:
        if picture.page is not None and picture.path not in slices:
            try:
                count = len(ome_slices(picture.path) or [])
            except PictureError:
                count = 1  # what is wrong with it is told when it is read
            slices[picture.path] = [Picture(picture.path, number if count > 1 else None) for number in range(count)]
        found.update(dict.fromkeys(slices.get(picture.path) or [picture]))
    return list(found)


def open_source(picture: Picture, bands: int | None = None) -> Source:
    """The picture, to be read window by window. `bands`: as for `find_sources`.

    Raises:
        PictureError (a ValueError): as `read_image`. PERPIXEL_MAX_PIXELS limits only what has to be decoded whole.
    """
    path = picture.path
    if is_zarr(path):
        return ZarrSource(picture, bands)
    if path.suffix.lower() in GEO_SUFFIXES:
        return open_raster(picture)
    if (slices := ome_slices(path)) is not None:
        if not 0 <= (picture.page or 0) < len(slices):
            raise PictureError(f"{picture}: there is no such slice, only 0 to {len(slices) - 1}")
        return BandPages([Picture(path, page) for page in slices[picture.page or 0]])
    source = open_page(picture)
    if isinstance(source, WholeSource):
        _warn_of_lost_place(picture)
    return source


def _warn_of_lost_place(picture: Picture) -> None:
    """What Pillow decodes, or what is turned upright, comes without its tags."""
    with explained(picture.path, picture.page):
        if is_tiff(picture.path) and knows_place(picture):
            why = "is not stored as upright rows of plain bands, so where it lies or what of it is no data is lost"
            warnings.warn(f"{picture}: {why}. Write it anew without an orientation, as grey or RGB", stacklevel=3)


def open_page(picture: Picture) -> Source:
    """As `open_source`, for pictures whose number is that of a page of the file, as data sets have them."""
    with explained(picture.path, picture.page):
        if is_tiff(picture.path) and tiff_in_parts(picture, small=True):
            try:
                return TiffSource(picture, masked=True)
            except (ImportError, ValueError) as error:
                if not lacks_codec(error):
                    raise  # else Pillow may know the compression, or the error says what to install
                if knows_place(picture):
                    lost = "without it would be lost where it lies or what of it is no data"
                    raise PictureError(f"{picture}: needs imagecodecs: {lost}; pip install 'perpixel[tiff]' adds it") from None
    return WholeSource(read_image(picture))
