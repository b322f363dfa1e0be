"""Labels of a mask, window by window: a large TIFF is never held whole."""

from dataclasses import dataclass

import numpy as np

from perpixel.data.decoding import explained, is_tiff, lacks_codec
from perpixel.data.images import Picture
from perpixel.data.masks import LabelMap, mask_values, read_mask
from perpixel.data.tiff_windows import TiffSource, tiff_in_parts
from perpixel.data.windows import Window


@dataclass(frozen=True)
class Labels:
    """A window of a mask."""

    labels: np.ndarray  # (h, w) class indices, and `ignore` also where the mask is damaged
    damage: dict[tuple[int, int, int, int], str]  # (top, left, height, width) of a piece of the file -> why it cannot be decoded


class LabelSource:
    """A mask through a label map; TIFFs that are tiled, large or georeferenced are read in windows, all others decoded once.

    In a colour mask that is read in windows, one that is grey all over counts as grey.

    Raises:
        PictureError (a ValueError): as `read_mask`.
    """

    def __init__(self, picture: Picture, label_map: LabelMap) -> None:
        self.picture, self.label_map = picture, label_map
        self._file: TiffSource | None = None
        with explained(picture.path, picture.page):
            if is_tiff(picture.path) and tiff_in_parts(picture):
                try:
                    self._file = TiffSource(picture)
                except (ImportError, ValueError) as error:
                    if not lacks_codec(error):
                        raise  # else `read_mask` may know the compression, or says what to install
        if self._file is None:
            self._whole = read_mask(picture)
            self.size: tuple[int, int] = (self._whole.shape[0], self._whole.shape[1])
        else:
            self.size = self._file.size

    def keep(self, rows: int) -> None:
        """Windows of `rows` rows come from left to right."""
        if self._file is not None:
            self._file.keep(rows)

    def close(self) -> None:
        """Nothing more is read."""
        if self._file is not None:
            self._file.close()

    def read(self, top: int, left: int, height: int, width: int) -> Labels:
        """A window that lies wholly inside the mask.

        Raises:
            ValueError: a value that the label map does not list, or numbers that are none of a mask.
        """
        if self._file is None:
            return Labels(self._mapped(self._whole[top : top + height, left : left + width]), {})
        window: Window = self._file.numbers(top, left, height, width)
        values = mask_values(window.pixels, self.picture)
        if window.known is None:
            return Labels(self._mapped(values), window.damage)
        labels = np.full(values.shape, self.label_map.ignore, np.uint8 if self.label_map.ignore <= 255 else np.uint16)
        labels[window.known] = self._mapped(values[window.known])  # zeros stand for what is damaged, and need not be listed
        return Labels(labels, window.damage)

    def _mapped(self, values: np.ndarray) -> np.ndarray:
        return self.label_map(values, str(self.picture))
