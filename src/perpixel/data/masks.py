"""Masks as found in the user's files, and their translation to labels."""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from perpixel.data.decoding import decode, read_file_palette
from perpixel.data.images import Picture, PictureError, as_picture, pixel_limit

IGNORE = 255  # label without a class, in uint8 labels
MASK_VALUES = 64  # a photograph has more of them, and of a mask one would hardly see them
IGNORE_16 = 65535  # the same in uint16 labels, which maps of more than 255 classes give


def read_mask(picture: Picture | Path) -> np.ndarray:
    """The values of a mask, as found in the file.

    Palette files give their indices; 1-bit files 0 and 1; grey files of 2, 4, 8 or 16 bits, and PGM, the stored values; colour files
    r << 16 | g << 8 | b, or the grey value where red, green and blue are equal in every pixel. Alpha is dropped. Orientation is
    applied as in `read_image`, so that a mask stays on its image.

    Returns:
        (H, W): uint8 or uint16; int16 where values are negative; int32 for colours, and only for those.

    Raises:
        PictureError (a ValueError): as `read_image`, and if the file holds fractions or numbers beyond 16 bits.
    """
    picture = as_picture(picture)
    return mask_values(decode(picture.path, picture.page, pixel_limit(), as_numbers=True).pixels, picture)


def mask_values(stored: np.ndarray, picture: Picture) -> np.ndarray:
    """(H, W) values of a mask, or of a window of one, from its pixels (C, H, W) as stored; see `read_mask`."""
    bands = stored.shape[0]
    if bands == 1:
        return _whole_numbers(stored[0], picture)
    if bands != 3:
        raise PictureError(f"{picture}: has {bands} bands; a mask has 1 (class values) or 3 (colours). Is it an image?")
    if stored.dtype != np.uint8:
        raise PictureError(f"{picture}: colours of type {stored.dtype}; a colour mask has 8 bits a band. Export it as 8-bit RGB")
    red, green, blue = stored
    if (red == green).all() and (green == blue).all():
        return red.copy()
    return red.astype(np.int32) << 16 | green.astype(np.int32) << 8 | blue


def _whole_numbers(values: np.ndarray, picture: Picture) -> np.ndarray:
    """The smallest of uint8 (kept), uint16 and int16 that holds the values."""
    if values.dtype in (np.uint8, np.uint16):
        return values
    if values.dtype.kind == "f" and not (np.isfinite(values).all() and (values == np.floor(values)).all()):
        raise PictureError(f"{picture}: holds fractions or NaN (type {values.dtype}); a mask holds one whole number per pixel")
    low, high = int(values.min(initial=0)), int(values.max(initial=0))
    if low < -32768 or high > (65535 if low >= 0 else 32767):
        raise PictureError(f"{picture}: holds values {low} to {high}; legal is 0 to 65535. Number the classes from 0")
    return values.astype(np.int16 if low < 0 else np.uint8 if high < 256 else np.uint16)


def read_palette(picture: Picture | Path) -> list[tuple[int, int, int]] | None:
    """The RGB colours of a palette file by index, or None where it has no palette. Raises as `read_mask`."""
    picture = as_picture(picture)
    palette = read_file_palette(picture.path, picture.page, pixel_limit())
    return None if palette is None else [(int(r), int(g), int(b)) for r, g, b in palette]


class ColorValue(int):
    """A mask value that was written as a colour, `#rrggbb`: '#0000ff' is not the number 255."""


def parse_label(text: str) -> tuple[int, int]:
    """One `--label` option: `255=1`, `255=ignore`, or a colour, `#e0e0c0=ignore`.

    Returns:
        The mask value (r << 16 | g << 8 | b for a colour) and the class index, IGNORE for `ignore`.

    Raises:
        ValueError: if the text has another form.
    """
    match = re.fullmatch(r"\s*(?:#([0-9a-fA-F]{6})|(-?\d{1,8}))\s*=\s*(?:(\d{1,5})|ignore)\s*", text)
    if match is None:
        raise ValueError(
            f"--label {text}: legal is VALUE=CLASS or VALUE=ignore, classes by number from 0: 255=1, 255=ignore or '#e0e0c0=ignore'"
        )
    color, number, target = match.groups()
    return ColorValue(color, 16) if color else int(number), IGNORE if target is None else int(target)


def value_name(value: int, rgb: bool) -> str:
    """A mask value as people write it, and as `parse_label` reads it: `17`, or `#e0e0c0` for a colour."""
    return f"#{value:06x}" if rgb else str(value)


def label_advice(value: int, rgb: bool, classes: int) -> str:
    """What to type about a mask value that is not a class."""
    last = max(classes - 1, 0)
    return f"To make it class {last}: {label_option(value, last, rgb)}; to ignore it: {label_option(value, None, rgb)}"


def label_option(value: int, target: int | None, rgb: bool) -> str:
    """The option to type, such as `--label 255=1`; `target` None for ignore. Colours are quoted, for shells read # as a comment."""
    quote = "'" if rgb else ""
    return f"--label {quote}{value_name(value, rgb)}={'ignore' if target is None else target}{quote}"


@dataclass(frozen=True)
class LabelMap:
    """From mask values to class indices.

    Raises:
        ValueError: on construction, if a class index is negative or above `ignore`, or a value is not one of a mask.
    """

    values: Mapping[int, int]  # mask value (r << 16 | g << 8 | b when `rgb`) -> class index, or `ignore`
    rgb: bool = False
    nearest: bool = False  # for masks damaged by JPEG: a value not listed counts as the nearest listed one
    ignore: int = IGNORE  # IGNORE_16 for more than 255 classes

    def __post_init__(self) -> None:
        if self.ignore not in (IGNORE, IGNORE_16):
            raise ValueError(f"label map: ignore is {self.ignore}; legal is {IGNORE}, or {IGNORE_16} for more than 255 classes")
        if not self.values:
            raise ValueError("label map: no values; it needs at least one mask value and its class")
        if bad := [c for c in self.values.values() if not 0 <= c <= self.ignore]:
            raise ValueError(f"label map: class {bad[0]} is not in 0 to {self.ignore - 1} (or {self.ignore} to ignore)")
        low, high = (0, 0xFFFFFF) if self.rgb else (-32768, 65535)
        if wrong := [v for v in self.values if not low <= v <= high]:
            raise ValueError(f"label map: {wrong[0]} is no mask value; legal is {low} to {high}")

    @property
    def classes(self) -> int:
        """One more than the largest class index; 0 where everything is ignored."""
        return 1 + max((c for c in self.values.values() if c != self.ignore), default=-1)

    def __call__(self, mask: np.ndarray, source: str = "mask") -> np.ndarray:
        """The labels of one mask.

        Args:
            mask: (H, W) as `read_mask` gives it. A grey mask in a colour map counts as the colours (v, v, v).
            source: what to call the mask in an error, such as its file.

        Returns:
            (H, W) class indices and `ignore`: uint8, or uint16 where `ignore` is 65535.

        Raises:
            ValueError: if the mask holds values that are not listed (and not `nearest`), with their number of pixels.
        """
        if self.rgb and mask.dtype != np.int32:
            mask = mask.astype(np.int32) * 0x010101
        elif not self.rgb and mask.dtype == np.int32:
            raise ValueError(
                f"{source}: holds colours, but the classes are given as single values; save it like the other masks, if it is one"
            )
        if mask.dtype == np.uint8:
            labels, known = self._byte_table
            if self.nearest or known.all() or known[mask].all():
                return np.asarray(labels[mask])
            self._refuse(mask, known[mask], source)
        if self.nearest:
            present, positions = np.unique(mask, return_inverse=True)
            return np.asarray(self._nearest(present)[positions.reshape(mask.shape)])
        keys, targets = self._sorted
        positions = np.minimum(np.searchsorted(keys, mask), len(keys) - 1)
        known = keys[positions] == mask
        if not known.all():
            self._refuse(mask, known, source)
        return np.asarray(targets[positions])

    @cached_property
    def _sorted(self) -> tuple[np.ndarray, np.ndarray]:
        """Mask values in ascending order, and the label of each."""
        pairs = sorted(self.values.items())
        kind = np.uint8 if self.ignore == IGNORE else np.uint16
        return np.array([v for v, _ in pairs], np.int32), np.array([c for _, c in pairs], kind)

    @cached_property
    def _byte_table(self) -> tuple[np.ndarray, np.ndarray]:
        """For the 256 values of 8-bit masks: the label of each, and whether it is listed."""
        every = np.arange(256, dtype=np.int32)
        return self._nearest(every), np.isin(every, self._sorted[0])

    def _nearest(self, present: np.ndarray) -> np.ndarray:
        """The label of the listed value closest to each of `present`: Euclidean in RGB, by difference in grey."""
        keys, targets = self._sorted
        best = np.full(present.shape, np.iinfo(np.int64).max)
        found = np.zeros(present.shape, targets.dtype)
        for key, target in zip(keys, targets, strict=True):
            far = _squared_distance(present, int(key), self.rgb)
            closer = far < best
            best[closer], found[closer] = far[closer], target
        return found

    def _refuse(self, mask: np.ndarray, known: np.ndarray, source: str) -> None:
        strange, pixels = np.unique(mask[~known], return_counts=True)
        listed = ", ".join(f"{value_name(int(v), self.rgb)} ({n} pixels)" for v, n in zip(strange[:5], pixels[:5], strict=True))
        more = f" and {len(strange) - 5} more values" if len(strange) > 5 else ""
        is_not = "is not one" if len(strange) == 1 else "are not among the values"
        advice = label_advice(int(strange[0]), self.rgb, self.classes)
        if len(strange) > MASK_VALUES:
            advice = "So many are a photograph's rather than a mask's: are images and masks swapped?"
        raise ValueError(f"{source}: value {listed}{more} {is_not} of {self.classes} classes. {advice}")

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON types; `from_dict` reads them back."""
        values = {str(value): label for value, label in sorted(self.values.items())}
        return {"values": values, "rgb": self.rgb, "nearest": self.nearest, "ignore": self.ignore}

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> "LabelMap":
        """The map that `to_dict` wrote. Raises ValueError where keys or types are others."""
        try:
            values = {int(value): int(label) for value, label in data["values"].items()}
            rgb, nearest, ignore = data.get("rgb", False), data.get("nearest", False), int(data.get("ignore", IGNORE))
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise ValueError(f"label map: {error!r} in {dict(data)!r:.200}; legal is what LabelMap.to_dict writes") from error
        if unknown := set(data) - {"values", "rgb", "nearest", "ignore"}:
            raise ValueError(f"label map: unknown key {min(unknown)!r}; legal: values, rgb, nearest, ignore")
        return cls(values, bool(rgb), bool(nearest), ignore)


def _squared_distance(values: np.ndarray, key: int, rgb: bool) -> np.ndarray:
    """int64, of mask values to one mask value."""
    if not rgb:
        return (values.astype(np.int64) - key) ** 2
    wide = values.astype(np.int64)
    return sum((((wide >> shift) & 255) - (key >> shift & 255)) ** 2 for shift in (16, 8, 0))  # type: ignore[return-value]
