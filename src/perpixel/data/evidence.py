"""What is known about the values of a set of masks, and the signs that tell classes from contours and from damage."""

import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from perpixel.data.images import Picture, as_picture, inspect
from perpixel.data.masks import read_palette

VOID_VALUES = (255, 65535)  # what grey and palette masks mark unknown pixels with (Pascal VOC: 255)
VOID_COLOR = 0xE0E0C0  # the same in colours: index 255 of the Pascal VOC colour map
_MODE_SHARE = 0.002  # of all pixels: fewer are not taken for a class that JPEG has spread
_CANDIDATES = 512
_LOSSY = {".jpg", ".jpeg", ".jfif", ".jpe"}
_KEPT = 2**18  # distinct colours to remember; photographs given by mistake hold millions
_FLAT_SIDE, _DEEP_SIDE = 3, 9  # windows of one value: no smooth border has the first, no contour (Pascal VOC: 5 pixels wide) the second
_MODE_DISTANCE = {False: 12.0, True: 40.0}  # grey levels; Euclidean in RGB. Tried on JPEGs of quality 60 to 95 of real masks (msrc21)


@dataclass(frozen=True)
class Evidence:
    """What is known about the values of a set of masks."""

    counts: Mapping[int, int]  # value -> pixels
    rgb: bool = False  # values are r << 16 | g << 8 | b
    damaged: bool = False  # values are spread around a few strong ones, as JPEG or smooth resizing does
    lossy: bool = False  # the files are JPEGs
    bilevel: bool = False  # the files are 1-bit
    palette: Sequence[tuple[int, int, int]] | None = None  # colours of the values that occur; black elsewhere
    recolored: Mapping[int, tuple[str, str]] = field(default_factory=dict)  # value -> two files whose palettes give it other colours
    thin: frozenset[int] = frozenset()  # values that only form lines, such as the contours of Pascal VOC
    flat: Mapping[int, int] = field(default_factory=dict)  # value -> pixels whose 3x3 neighbours all hold it too
    touching: Mapping[int, float] = field(default_factory=dict)  # value -> share of the values in the same mask that it borders on
    masks: Mapping[int, int] = field(default_factory=dict)  # value -> number of masks that hold it
    sources: Mapping[int, str] = field(default_factory=dict)  # value -> the first mask that holds it
    number: int = 0  # of masks
    both_binary: bool = False  # masks of 0 and 1, and masks of 0 and 255, none with both 1 and 255
    numbered_each: bool = False  # every mask counts from 1 without gaps, to a number of its own: instances, not classes
    grey_only: Mapping[int, str] = field(default_factory=dict)  # in a set with colours: grey values that no colour mask holds -> file


def tally(mask: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The values of one mask and their pixels."""
    if mask.dtype.kind == "u":
        pixels = np.bincount(mask.ravel())
        values = np.flatnonzero(pixels)
        return values, pixels[values]
    return np.unique(mask, return_counts=True)


def uniform(mask: np.ndarray, side: int) -> np.ndarray:
    """(H, W) bool: where all of the side x side window (odd; clipped at the borders of the mask) holds one value."""
    wide = np.pad(mask, side // 2, mode="edge")
    rows = _runs((wide[:, 1:] == wide[:, :-1]).T, side - 1).T
    columns = _runs(wide[1:] == wide[:-1], side - 1)
    return np.asarray(_runs(rows, side) & columns[:, : mask.shape[1]])


def _runs(flags: np.ndarray, length: int) -> np.ndarray:
    """Where `length` flags in a row, down the first axis, are all set; by doubling."""
    done = 1
    while done < length:
        step = min(done, length - done)
        flags = flags[:-step] & flags[step:]
        done += step
    return flags


def borders(mask: np.ndarray) -> np.ndarray:
    """(n, 2) pairs of values that lie side by side somewhere, in both orders."""
    wide = mask.astype(np.int64) + 2**16  # int16 masks hold negative values
    codes = [(a << 32 | b)[a != b] for a, b in ((wide[:, 1:], wide[:, :-1]), (wide[1:], wide[:-1]))]
    found = np.unique(np.concatenate(codes))
    pairs = np.stack([found >> 32, found & 0xFFFFFFFF], 1) - 2**16
    return np.asarray(np.unique(np.concatenate([pairs, pairs[:, ::-1]]), axis=0))


def strong_values(counts: Mapping[int, int], rgb: bool) -> list[int]:
    """The values that flat areas hold, strongest first.

    JPEG may move a flat area by a level or two, so pixels are counted in a ball around each candidate. A flat area fills its
    ball but not the shell of twice the radius; ringing at borders, which is spread evenly, fills both.
    """
    values, pixels = _arrays(counts)
    least, radius = _MODE_SHARE * pixels.sum(), _MODE_DISTANCE[rgb]
    covered = np.zeros(len(values), bool)
    found: list[int] = []
    for index in np.argsort(-pixels, kind="stable")[:_CANDIDATES]:
        if covered[index]:
            continue
        distance = _distances(values, [int(values[index])], rgb)[:, 0]
        ball, wide = pixels[distance <= radius / 2].sum(), pixels[distance <= radius].sum()
        if ball >= least and ball >= 0.7 * wide:
            found.append(int(values[index]))
            covered |= distance <= radius
    return found


def _arrays(counts: Mapping[int, int]) -> tuple[np.ndarray, np.ndarray]:
    """Values, and the pixels of each."""
    return np.fromiter(counts, np.int64, len(counts)), np.fromiter(counts.values(), np.int64, len(counts))


def _distances(values: np.ndarray, to: Sequence[int], rgb: bool) -> np.ndarray:
    """(values, to) Euclidean."""
    ends = np.asarray(to, np.int64)
    if not rgb:
        return np.abs(values[:, None].astype(np.float64) - ends)
    shifts = np.array([16, 8, 0])
    difference = (values[:, None].astype(np.int64) >> shifts & 255)[:, None] - (ends[:, None] >> shifts & 255)
    return np.sqrt((difference**2).sum(-1))


def looks_damaged(counts: Mapping[int, int], flat: Mapping[int, int], rgb: bool, lossy: bool) -> bool:
    """Whether the values are a few strong ones blurred by JPEG (or by a smooth resize), rather than classes of their own.

    JPEG files: many values, few of them strong, and most pixels on or beside those, since colour conversion may shift whole areas.
    Other files: values that no flat area holds reach all the way from one solid value to another, as only smooth borders do.
    """
    values, pixels = _arrays(counts)
    if len(values) < 3 or (not rgb and (values.max() > 255 or values.max() < 64 or values.min() < 0)):
        return False
    strong = blurred_from(counts, flat, rgb, lossy)
    if len(strong) < 2 or len(values) <= len(strong):
        return False
    if lossy:
        return share_near(counts, strong, rgb) >= 0.6
    rest = [value for value in counts if value not in strong]
    share = sum(counts[value] for value in rest) / max(pixels.sum(), 1)
    if len(rest) < max(4, len(strong)) or share > 0.5 or sum(flat.get(v, 0) for v in rest) > 0.15 * sum(counts[v] for v in rest):
        return False
    low, high = min(strong), max(strong)
    return rgb or (low <= min(rest) <= low + (high - low) / 4 and high - (high - low) / 4 <= max(rest) <= high)


def blurred_from(counts: Mapping[int, int], flat: Mapping[int, int], rgb: bool, lossy: bool) -> list[int]:
    """The values that damaged masks held before; where the foreground is too small for a flat area, the extreme grey level counts."""
    if lossy:
        strong = strong_values(counts, rgb)
    else:
        solid = [value for value, count in counts.items() if flat.get(value, 0) > 0.1 * count]
        strong = sorted(solid, key=lambda value: -counts[value])
    if rgb or len(strong) != 1 or len(counts) < 3:
        return strong
    only = strong[0]
    far = max(counts, key=lambda value: abs(value - only))
    beyond = sum(count for value, count in counts.items() if abs(value - only) > 2 * _MODE_DISTANCE[False])
    beside = sum(count for value, count in counts.items() if abs(value - far) <= _MODE_DISTANCE[False])
    if abs(far - only) < 128 or beside < 0.3 * beyond:
        return strong
    return [only, 255 if far >= 255 - _MODE_DISTANCE[False] else 0 if far <= _MODE_DISTANCE[False] else far]


def share_near(counts: Mapping[int, int], strong: Sequence[int], rgb: bool) -> float:
    """Of all pixels, those as close to one of the strong values as JPEG leaves them."""
    values, pixels = _arrays(counts)
    near = _to_nearest(values, strong, rgb) <= _MODE_DISTANCE[rgb]
    return float(pixels[near].sum() / max(pixels.sum(), 1))


def _to_nearest(values: np.ndarray, strong: Sequence[int], rgb: bool) -> np.ndarray:
    """Distance of each value to the closest strong one; in parts, since there may be 100,000 colours."""
    parts = np.array_split(values, len(values) // 4096 + 1)
    return np.concatenate([_distances(part, strong, rgb).min(1) for part in parts])


class ValueCounter:
    """Counts the values of masks as they stream by; `add` may be called from several threads, in any order."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._tallies: dict[bool, dict[int, np.ndarray]] = {False: {}, True: {}}  # colour? -> value -> _Entry below
        self._sources: dict[bool, dict[int, str]] = {False: {}, True: {}}
        self._palettes: dict[int, dict[tuple[int, int, int], str]] = {}  # value -> colour -> first file that gives it
        self._kinds: set[str] = set()  # of binary masks: "1", "255", "both"
        self._last: set[int] = set()  # n of each mask that counts from 1 to n without gaps; -1 for a mask that does not
        self._number = 0
        self._lossy, self._bilevel = False, True

    def add(self, mask: np.ndarray, picture: Picture | Path | None = None) -> None:
        """Count one mask, as `read_mask(picture)` gave it. `picture` is asked for its palette, bit depth and format."""
        color = mask.dtype == np.int32
        entries = _entries(mask, color)
        name = "mask" if picture is None else str(picture)
        picture = None if picture is None else as_picture(picture)
        palette = None if picture is None or color else read_palette(picture)
        bilevel = picture is not None and max(entries, default=0) <= 1 and inspect(picture).dtype == "bool"
        with self._lock:
            self._number += 1
            self._lossy = self._lossy or (picture is not None and picture.path.suffix.lower() in _LOSSY)
            self._bilevel = self._bilevel and bilevel
            known, sources = self._tallies[color], self._sources[color]
            for value, entry in entries.items():
                known[value] = known[value] + entry if value in known else entry
                sources[value] = min(name, sources.get(value, name))  # whatever the order of threads, the first by name
                if palette is not None and 0 <= value < len(palette):
                    files = self._palettes.setdefault(value, {})
                    files[palette[value]] = min(name, files.get(palette[value], name))
            if not color:
                self._note_numbers(set(entries))
            if len(known) > _KEPT:
                self._forget_rare(color)

    def _note_numbers(self, values: set[int]) -> None:
        if values & {1, 255}:
            self._kinds.add("both" if {1, 255} <= values else "1" if 1 in values else "255")
        inner = values - {0, 255}
        self._last.add(len(inner) if inner == set(range(1, len(inner) + 1)) else -1)

    def _forget_rare(self, color: bool) -> None:
        known = self._tallies[color]
        common = sorted(known, key=lambda value: (-known[value][0], value))[: _KEPT // 2]
        self._tallies[color] = {value: known[value] for value in common}
        self._sources[color] = {value: self._sources[color][value] for value in common}

    @property
    def rgb(self) -> bool:
        """Whether any mask holds colours."""
        return bool(self._tallies[True])

    @property
    def counts(self) -> dict[int, int]:
        """Value -> pixels; where any mask holds colours, the grey masks' values v count as colours (v, v, v)."""
        return {value: int(entry[0]) for value, entry in self._merged().items()}

    @property
    def masks(self) -> dict[int, int]:
        """Value -> number of masks that hold it."""
        return {value: int(entry[1]) for value, entry in self._merged().items()}

    def _merged(self) -> dict[int, np.ndarray]:
        with self._lock:
            if not self.rgb:
                return dict(sorted(self._tallies[False].items()))
            merged = dict(self._tallies[True])
            for value, entry in self._tallies[False].items():
                color = _as_color(value)
                merged[color] = merged[color] + entry if color in merged else entry
            return dict(sorted(merged.items()))

    def evidence(self) -> Evidence:
        """All that was seen so far."""
        merged, counts, rgb = self._merged(), self.counts, self.rgb
        flat = {value: int(entry[2]) for value, entry in merged.items()}
        sources = {_as_color(value) if rgb else value: name for value, name in self._sources[False].items()}
        sources.update(self._sources[True])
        colors = {value: sorted(files, key=lambda color: (files[color], color)) for value, files in self._palettes.items()}
        palette = [colors[value][0] if value in colors else (0, 0, 0) for value in range(1 + max(colors))] if colors else None
        return Evidence(
            counts,
            rgb,
            looks_damaged(counts, flat, rgb, self._lossy),
            self._lossy,
            self._bilevel and self._number > 0,
            palette,
            recolored={v: (self._palettes[v][c[0]], self._palettes[v][c[1]]) for v, c in sorted(colors.items()) if len(c) > 1},
            thin=frozenset(value for value, entry in merged.items() if entry[3] < 0.1 * entry[0]),
            flat=flat,
            touching={value: float(entry[4] / entry[5]) for value, entry in merged.items() if entry[5]},
            masks=self.masks,
            sources=sources,
            number=self._number,
            both_binary=self._kinds == {"1", "255"},
            numbered_each=-1 not in self._last and len(self._last) > 2 and max(self._last) >= 8,
            grey_only={v: n for v, n in self._sources[False].items() if rgb and _as_color(v) not in self._tallies[True]},
        )


def _as_color(grey: int) -> int:
    return grey * 0x010101 & 0xFFFFFF


def _entries(mask: np.ndarray, color: bool) -> dict[int, np.ndarray]:
    """Value -> (6,): pixels, masks, flat pixels, deep pixels, values bordered on, other values there."""
    values, pixels = tally(mask)
    rows = np.zeros((len(values), 6), np.int64)
    rows[:, 0], rows[:, 1] = pixels, 1
    for column, side in ((2, _FLAT_SIDE), (3, _DEEP_SIDE)):
        inside, number = tally(mask[uniform(mask, side)])
        rows[np.searchsorted(values, inside), column] = number
    if not color and 1 < len(values) <= 256:
        touched, number = np.unique(borders(mask)[:, 0], return_counts=True)
        rows[np.searchsorted(values, touched), 4] = number
        rows[:, 5] = len(values) - 1
    return dict(zip(values.tolist(), rows, strict=True))
