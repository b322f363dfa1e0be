"""What do the values of these masks mean? From the evidence to a label map, with the reason for each decision."""

import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from perpixel.data.display import default_colors
from perpixel.data.evidence import VOID_COLOR, VOID_VALUES, Evidence, depth, looks_damaged, share_near, strong_values, tally
from perpixel.data.images import Picture, as_picture, inspect
from perpixel.data.masks import IGNORE, IGNORE_16, LabelMap, label_advice, read_palette, value_name

Color = tuple[int, int, int]
_LOSSY = {".jpg", ".jpeg", ".jfif", ".jpe"}
_KEPT = 2**18  # distinct colours to remember; photographs given by mistake hold millions


@dataclass(frozen=True)
class Proposal:
    """A label map, and why."""

    label_map: LabelMap
    encoding: str  # a few words for people, such as "binary 0/255"
    reasons: tuple[str, ...]
    problems: tuple[str, ...]  # why training cannot start yet; each says what to do
    names: tuple[str, ...]  # as given, or made up from the values
    colors: tuple[Color, ...]


@dataclass
class _Draft:
    """A proposal while it is being reasoned out. Class -1 stands for ignore until the number of classes is known."""

    evidence: Evidence
    names: Sequence[str] | None
    given_colors: Sequence[Color] | None
    targets: dict[int, int]
    free: list[int]  # values still without a meaning, ascending
    encoding: str = ""
    reasons: list[str] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)

    def ignore(self, value: int, why: str) -> None:
        self.targets[value] = -1
        self.free.remove(value)
        share = self.evidence.counts.get(value, 0) / max(sum(self.evidence.counts.values()), 1)
        size = "" if self.evidence.damaged else f" ({share:.1%} of the pixels)"
        self.reasons.append(f"{value_name(value, self.evidence.rgb)} is ignored{size}: {why}")

    def classes(self, order: Mapping[int, int], encoding: str, why: str) -> None:
        self.targets.update(order)
        self.free = [value for value in self.free if value not in order]
        self.encoding = encoding
        self.reasons.append(why)


def propose_label_map(
    evidence: Evidence,
    names: Sequence[str] | None = None,
    colors: Sequence[Color] | None = None,
    overrides: Mapping[int, int] | None = None,
) -> Proposal:
    """Decide what each mask value means.

    Args:
        evidence: from `ValueCounter.evidence`.
        names: of the classes in their order, where the user gave them.
        colors: of the classes, where the class file lists them; in colour masks they say which colour is which class.
        overrides: the --label options, mask value -> class index, or IGNORE. They come before every guess.

    Returns:
        A proposal. It is always complete as far as it goes; `problems` says where the user has to decide.
    """
    overrides = dict(overrides or {})
    values = sorted(evidence.counts)
    draft = _Draft(evidence, names, colors, {v: -1 if c == IGNORE else c for v, c in overrides.items()}, [])
    if evidence.damaged:
        values = sorted(_undamaged(draft))
    draft.free = [value for value in values if value not in overrides]
    if overrides:
        said = ", ".join(f"{value_name(v, evidence.rgb)} is {'ignored' if c == IGNORE else f'class {c}'}" for v, c in overrides.items())
        draft.reasons.append(f"{said}: as given by --label")
    if evidence.rgb:
        _read_colors(draft)
    else:
        _find_void(draft)
        _read_numbers(draft)
    return _finished(draft)


def _undamaged(draft: _Draft) -> list[int]:
    """The values that the masks held before JPEG spread them."""
    evidence = draft.evidence
    if evidence.rgb and draft.given_colors:
        found = [_packed(color) for color in draft.given_colors]
    else:
        found = strong_values(evidence.counts, evidence.rgb)
        if evidence.rgb:  # colour conversion may shift a flat area by a level or two
            close = {c: v for v in found for c in _VOC if max(abs((c >> s & 255) - (v >> s & 255)) for s in (16, 8, 0)) <= 4}
            found = list(close) if len(close) == len(found) else found
    near = share_near(evidence.counts, found, evidence.rgb)
    spread = f"{len(evidence.counts)} values, {near:.0%} of the pixels at or beside {len(found)} of them"
    draft.reasons.append(f"the masks were stored with loss (JPEG, or smooth resizing): {spread}; each counts as the nearest of these")
    return found


def _packed(color: Color) -> int:
    return color[0] << 16 | color[1] << 8 | color[2]


_VOC = {_packed(color): i for i, color in enumerate(default_colors(64))} | {VOID_COLOR: 255}  # colour -> position in VOC's map


def _find_void(draft: _Draft) -> None:
    """Grey and palette values that mark unknown pixels."""
    for value in [v for v in draft.free if v < 0]:
        draft.ignore(value, "negative numbers are no class")
    names, free = draft.names, draft.free
    top = free[-1] if free else 0
    several = len(free) + len(_classes_given(draft)) > 2 or (names is not None and len(names) > 2)  # else 255 is class 1 of two
    if top in VOID_VALUES and several and not (names and top < len(names)):
        others = free[:-1]
        if draft.evidence.palette is not None:
            draft.ignore(top, "the last of a palette is Pascal VOC's mark for unknown pixels")
        elif top in draft.evidence.thin:
            draft.ignore(top, "it only forms lines between the other classes")
        elif _like_indices(others, names):
            draft.ignore(top, f"the other values ({_listed(others)}) are class numbers, far below it")
    if names and draft.free and draft.free[-1] == len(names) and 0 in draft.free and len(draft.free) > 2:
        last = f"there are {len(names)} class names for the values 0 to {len(names)}, and this is the one more"
        draft.ignore(len(names), last)


def _classes_given(draft: _Draft) -> set[int]:
    return {c for c in draft.targets.values() if c >= 0}


def _like_indices(values: Sequence[int], names: Sequence[str] | None) -> bool:
    """Small numbers without wide gaps, rather than grey levels spread out for people to see."""
    return not values or values[-1] < (len(names) if names else 4 * len(values) + 16)


def _listed(values: Sequence[int]) -> str:
    if len(values) > 4 and values[-1] - values[0] == len(values) - 1:
        return f"{values[0]} to {values[-1]}"
    return ", ".join(map(str, values[:8])) + (", ..." if len(values) > 8 else "")


def _read_numbers(draft: _Draft) -> None:
    """Classes of grey and palette values."""
    free, count = draft.free, len(draft.names) if draft.names else None
    number = len(free)
    if not free:
        draft.encoding = "as given by --label"
    elif count is not None and free[-1] < count:
        why = f"the values {_listed(free)} are positions in the list of {count} class names"
        draft.classes({i: i for i in range(count) if i not in draft.targets}, f"class numbers 0 to {count - 1}", why)
    elif free == [0, 255] and count in (None, 2):
        draft.classes({0: 0, 255: 1}, "binary 0/255", "only 0 and 255 occur, so 255 is class 1 and not a mark for unknown pixels")
    elif free == list(range(number)) and count is None:
        kind = "binary 0/1" if number == 2 else f"class numbers 0 to {number - 1}"
        draft.classes({v: v for v in free}, kind, f"the values {_listed(free)} are class numbers without gaps")
    elif free[0] >= 1 and not _classes_given(draft) and free[-1] == (number if count is None else count):
        last = free[-1]
        why = f"the values go from {free[0]} to {last} and 0 does not occur, so classes count from 1"
        draft.classes({v: v - 1 for v in range(1, last + 1) if v not in draft.targets}, f"class numbers 1 to {last}", why)
    elif count in (None, number):
        why = f"the values {_listed(free)} have gaps; they are numbered in ascending order"
        hint = "" if count else ". Where the gaps are classes that do not occur, list all classes with --classes"
        draft.classes({v: i for i, v in enumerate(free)}, "grey levels in ascending order", why + hint)
    else:  # fewer or more names than values: what is left in draft.free becomes a problem
        inside = {i: i for i in range(count) if i not in draft.targets}
        draft.classes(inside, f"class numbers 0 to {count - 1}", f"the {count} class names stand for the values 0 to {count - 1}")
    if draft.evidence.lossy and not draft.evidence.damaged and max(draft.evidence.counts, default=0) < 64 and number > 1:
        draft.problems.append("JPEG cannot keep class numbers that differ by one: the masks are wrong at every border. Export them as PNG")


def _read_colors(draft: _Draft) -> None:
    """Classes of RGB colours."""
    free, counts = draft.free, draft.evidence.counts
    void = VOID_COLOR in free and _packed_list(draft.given_colors).count(VOID_COLOR) == 0
    if void and (draft.given_colors or VOID_COLOR in draft.evidence.thin or _voc_order(free) is not None):
        draft.ignore(VOID_COLOR, "Pascal VOC's colour for unknown pixels")
        free = draft.free
    voc = _voc_order(free)
    count = len(draft.names) if draft.names else None
    if draft.given_colors:
        order = {c: i for i, c in enumerate(_packed_list(draft.given_colors)) if c not in draft.targets}
        draft.classes(order, "RGB colours", "colours and classes as listed in the class file")
    elif voc is not None and (count is None or max(voc) < count):
        order = dict(zip(_packed_list(default_colors(count)), range(count), strict=True)) if count else _ranked(free, voc)
        order = {c: i for c, i in order.items() if c not in draft.targets}
        draft.classes(order, "RGB colours of Pascal VOC", "all colours are from Pascal VOC's colour map, whose order they keep")
    else:
        order = {c: i for i, c in enumerate(sorted(free, key=lambda c: (-counts.get(c, 0), c)))}
        draft.classes(order, "RGB colours", f"{len(order)} colours, numbered from the most to the least frequent")
        if draft.names and order:
            found = ", ".join(value_name(c, True) for c in list(order)[:6])
            draft.problems.append(
                f"which of the {len(order)} colours ({found}) is which class? Write a class file with lines of name,red,green,blue"
            )
    if draft.evidence.palette is not None:
        draft.problems.append("some masks hold colours and others palette indices. Convert them all to one kind")


def _packed_list(colors: Sequence[Color] | None) -> list[int]:
    return [_packed(color) for color in colors or ()]


def _voc_order(values: Sequence[int]) -> list[int] | None:
    """Positions in Pascal VOC's colour map, if all colours are among its first 64 (or its void)."""
    return [_VOC[v] for v in values] if values and all(v in _VOC for v in values) else None


def _ranked(values: Sequence[int], keys: Sequence[int]) -> dict[int, int]:
    return {value: rank for rank, (_, value) in enumerate(sorted(zip(keys, values, strict=True)))}


def _finished(draft: _Draft) -> Proposal:
    """Check what is left, and put names and colours to the classes."""
    evidence, named = draft.evidence, len(draft.names) if draft.names else None
    classes = 1 + max(draft.targets.values(), default=-1)
    if named is not None and classes > named:
        draft.problems.append(f"there are {named} class names for {classes} classes. List all classes with --classes")
    classes = max(classes, named or 0)
    draft.problems.extend(_not_a_class(draft, value, classes) for value in draft.free[:5])
    if len(draft.free) > 5:
        draft.problems.append(f"{len(draft.free) - 5} more values are not one of {classes} classes")
    if classes < 2:
        held = ", ".join(value_name(v, evidence.rgb) for v in list(evidence.counts)[:5]) or "nothing"
        draft.problems.append(f"the masks hold {held}: fewer than two classes, so there is nothing to tell apart. Are these the masks?")
    ignore = IGNORE if classes <= IGNORE else IGNORE_16
    values = {v: ignore if c < 0 else c for v, c in sorted(draft.targets.items())} or {0: 0}
    label_map = LabelMap(values, evidence.rgb, evidence.damaged, ignore)
    sources = {c: v for v, c in sorted(draft.targets.items(), reverse=True) if c >= 0}
    renumbered = any(i != v for i, v in sources.items())
    names = tuple(draft.names or (_made_up(i, sources.get(i, i), evidence.rgb, renumbered) for i in range(classes)))
    names += tuple(f"class_{i}" for i in range(len(names), classes))
    encoding = " ".join([*(["JPEG-damaged"] if evidence.damaged else []), draft.encoding])
    kind = "1-bit, " if evidence.bilevel else "palette, " if evidence.palette is not None and not evidence.rgb else ""
    return Proposal(label_map, kind + encoding, tuple(draft.reasons), tuple(draft.problems), names, _colors(draft, sources, classes))


def _not_a_class(draft: _Draft, value: int, classes: int) -> str:
    evidence = draft.evidence
    files = evidence.masks.get(value, 0)
    where = f"in {files} file{'s' if files != 1 else ''}" if files else f"in {evidence.counts.get(value, 0)} pixels"
    source = evidence.sources.get(value, "masks")
    advice = label_advice(value, evidence.rgb, classes)
    return f"{source}: value {value_name(value, evidence.rgb)} {where} is not one of {classes} classes. {advice}"


def _made_up(index: int, value: int, rgb: bool, renumbered: bool) -> str:
    return f"color_{value:06x}" if rgb else f"value_{value}" if renumbered else f"class_{index}"


def _colors(draft: _Draft, sources: Mapping[int, int], classes: int) -> tuple[Color, ...]:
    """As given; else as in the masks; else Pascal VOC's, whose first is black."""
    evidence, colors = draft.evidence, default_colors(classes)
    for index in range(classes):
        value = sources.get(index, -1)
        if draft.given_colors and index < len(draft.given_colors):
            colors[index] = draft.given_colors[index]
        elif evidence.rgb and value >= 0:
            colors[index] = (value >> 16, value >> 8 & 255, value & 255)
        elif evidence.palette is not None and 0 <= value < len(evidence.palette) and any(map(any, evidence.palette)):
            colors[index] = evidence.palette[value]
    return tuple(colors)


class ValueCounter:
    """Counts the values of masks as they stream by; `add` may be called from several threads."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._tallies: dict[bool, dict[int, list[int]]] = {False: {}, True: {}}  # colour? -> value -> [pixels, masks]
        self._sources: dict[bool, dict[int, str]] = {False: {}, True: {}}
        self._deep: dict[int, list[int]] = {}  # void candidate -> [pixels, of them far from other values]
        self._looked = False
        self._lossy = self._bilevel = False
        self._palette: list[tuple[int, int, int]] | None = None

    def add(self, mask: np.ndarray, picture: Picture | Path | None = None) -> None:
        """Count one mask, as `read_mask(picture)` gave it. `picture` is asked for its palette, bit depth and format."""
        color = mask.dtype == np.int32
        values, pixels = tally(mask)
        depths = {int(v): depth(mask, int(v)) for v in values if v in ((VOID_COLOR,) if color else VOID_VALUES)}
        name = "mask" if picture is None else str(picture)
        with self._lock:
            self._look(picture)
            known, sources = self._tallies[color], self._sources[color]
            for value, count in zip(values.tolist(), pixels.tolist(), strict=True):
                entry = known.setdefault(value, [0, 0])
                entry[0] += count
                entry[1] += 1
                if name < sources.setdefault(value, name):  # whatever the order of threads, the first by name
                    sources[value] = name
            for value, (whole, deep) in depths.items():
                entry = self._deep.setdefault(value, [0, 0])
                entry[0] += whole
                entry[1] += deep
            if len(known) > _KEPT:
                self._forget_rare(color)

    def _look(self, picture: Picture | Path | None) -> None:
        """Header of the first file; the others of a set are like it."""
        if picture is None:
            return
        picture = as_picture(picture)
        self._lossy = self._lossy or picture.path.suffix.lower() in _LOSSY
        if not self._looked:
            self._looked = True
            self._palette = read_palette(picture)
            self._bilevel = inspect(picture).dtype == "bool"

    def _forget_rare(self, color: bool) -> None:
        known = self._tallies[color]
        common = sorted(known, key=lambda value: known[value], reverse=True)[: _KEPT // 2]
        self._tallies[color] = {value: known[value] for value in common}
        self._sources[color] = {value: self._sources[color][value] for value in common}

    @property
    def rgb(self) -> bool:
        """Whether any mask holds colours."""
        return bool(self._tallies[True])

    @property
    def counts(self) -> dict[int, int]:
        """Value -> pixels; where any mask holds colours, the grey masks' values v count as colours (v, v, v)."""
        return {value: entry[0] for value, entry in self._merged().items()}

    @property
    def masks(self) -> dict[int, int]:
        """Value -> number of masks that hold it."""
        return {value: entry[1] for value, entry in self._merged().items()}

    def _merged(self) -> dict[int, list[int]]:
        with self._lock:
            if not self.rgb:
                return dict(sorted(self._tallies[False].items()))
            merged = {value: list(entry) for value, entry in self._tallies[True].items()}
            for value, (pixels, masks) in self._tallies[False].items():
                entry = merged.setdefault(value * 0x010101 & 0xFFFFFF, [0, 0])
                entry[0] += pixels
                entry[1] += masks
            return dict(sorted(merged.items()))

    def evidence(self) -> Evidence:
        """All that was seen so far."""
        counts, rgb = self.counts, self.rgb
        sources = {value * 0x010101 & 0xFFFFFF if rgb else value: name for value, name in self._sources[False].items()}
        sources.update(self._sources[True])
        thin = frozenset(value for value, (whole, deep) in self._deep.items() if deep < 0.1 * whole)
        damaged = looks_damaged(counts, rgb, self._lossy)
        return Evidence(counts, rgb, damaged, self._lossy, self._bilevel, self._palette, thin, self.masks, sources)

    def propose(
        self,
        names: Sequence[str] | None = None,
        colors: Sequence[Color] | None = None,
        overrides: Mapping[int, int] | None = None,
    ) -> Proposal:
        """`propose_label_map` on what was seen so far."""
        return propose_label_map(self.evidence(), names, colors, overrides)
