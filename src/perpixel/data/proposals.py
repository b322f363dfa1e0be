"""What do the values of these masks mean? From the evidence to a label map, with the reason for each decision."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise

from perpixel.data.display import default_colors
from perpixel.data.evidence import VOID_COLOR, VOID_VALUES, Evidence, ValueCounter, blurred_from, share_near
from perpixel.data.masks import IGNORE, IGNORE_16, ColorValue, LabelMap, label_advice, label_option, value_name

__all__ = ["Proposal", "ValueCounter", "propose_label_map"]

Color = tuple[int, int, int]
_BACKGROUND = {"background", "bg", "backgr", "none", "nothing", "other"}


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
    stated: dict[int, int] = field(default_factory=dict)  # by the class file
    said: set[int] = field(default_factory=set)  # values that --label gives
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
    stated: Mapping[int, int] | None = None,
) -> Proposal:
    """Decide what each mask value means.

    Args:
        evidence: from `ValueCounter.evidence`.
        names: of the classes in their order, where the user gave them.
        colors: of the classes, where the class file lists them; in colour masks they say which colour is which class.
        overrides: the --label options, mask value -> class index, or IGNORE. They come before every guess.
        stated: the same from the class file, where its lines are numbered or say what to ignore; after `overrides`.

    Returns:
        A proposal. It is always complete as far as it goes; `problems` says where the user has to decide.
    """
    overrides = dict(overrides or {})
    values = sorted(evidence.counts)
    draft = _Draft(evidence, names, colors, {}, [], dict(stated or {}))
    _take_overrides(draft, overrides)
    if evidence.damaged or _spread_but_told(draft):
        values = sorted(_undamaged(draft))
    draft.free = [value for value in values if value not in draft.targets]
    if evidence.rgb:
        _read_colors(draft)
    else:
        _find_void(draft)
        _read_numbers(draft)
    _doubt(draft)
    return _finished(draft)


def _take_overrides(draft: _Draft, overrides: Mapping[int, int]) -> None:
    """What --label says comes first; what it says of values that these masks cannot hold is a problem."""
    evidence, said = draft.evidence, []
    limit = max(len(draft.names or ()), len(evidence.counts))
    for value, target in overrides.items():
        colored = isinstance(value, ColorValue) or value > 65535
        option = label_option(value, None if target == IGNORE else target, colored)
        kind = "colours" if evidence.rgb else "numbers"
        held = ", ".join(value_name(v, evidence.rgb) for v in list(evidence.counts)[:6]) + (", ..." if len(evidence.counts) > 6 else "")
        told = "--label '#rrggbb=CLASS'" if evidence.rgb else "--label VALUE=CLASS"
        if (colored and not evidence.rgb) or (evidence.rgb and not colored and value <= 255):
            draft.problems.append(f"{option}: these masks hold {kind} ({held}). Write {told}")
        elif value not in evidence.counts and target != IGNORE and not evidence.damaged and not evidence.lossy:
            draft.problems.append(f"{option}: no mask holds {value_name(value, evidence.rgb)}; they hold {held}. Take the option away")
        elif target != IGNORE and target >= limit and not draft.names:
            draft.problems.append(f"{option}: there are at most {limit} classes, 0 to {limit - 1}. List all classes with --classes")
        else:
            draft.said.add(int(value))
            draft.targets[int(value)] = -1 if target == IGNORE else target
            said.append(f"{value_name(value, evidence.rgb)} is {'ignored' if target == IGNORE else f'class {target}'}")
    if said:
        draft.reasons.append(f"{', '.join(said)}: as given by --label")


def _spread_but_told(draft: _Draft) -> bool:
    """JPEG masks too unclear to read by themselves, where --label gives the values to round to."""
    return draft.evidence.lossy and len({draft.targets[v] for v in draft.said} - {-1}) > 1


def _undamaged(draft: _Draft) -> list[int]:
    """The values that the masks held before JPEG spread them."""
    evidence = draft.evidence
    if evidence.rgb and draft.given_colors:
        found = [_packed(color) for color in draft.given_colors]
    else:
        found = blurred_from(evidence.counts, evidence.flat, evidence.rgb, evidence.lossy)
        if evidence.rgb:  # colour conversion may shift a flat area by a level or two
            close = {c: v for v in found for c in _VOC if max(abs((c >> s & 255) - (v >> s & 255)) for s in (16, 8, 0)) <= 4}
            found = list(close) if len(close) == len(found) else found
    found = sorted({*found, *draft.targets} if evidence.damaged else draft.said)
    near = share_near(evidence.counts, found, evidence.rgb)
    spread = f"{len(evidence.counts)} values, {near:.0%} of the pixels at or beside {len(found)} of them"
    draft.reasons.append(f"the masks were stored with loss (JPEG, or smooth resizing): {spread}; each counts as the nearest of these")
    far = [v for v in evidence.counts if min((_gap(v, f, evidence.rgb) for f in found), default=0) > 24 and evidence.flat.get(v, 0) > 0]
    if far and len(evidence.counts) < 4096:
        most = sorted(far, key=lambda v: -evidence.flat[v])[:4]
        listed = ", ".join(f"{value_name(v, evidence.rgb)} ({evidence.counts[v]} pixels)" for v in most)
        keep = label_option(most[0], None, evidence.rgb).replace("ignore", "CLASS")
        draft.reasons.append(f"small flat areas of {listed} were merged into these too. Where one is a class: {keep}")
    return found


def _gap(a: int, b: int, rgb: bool) -> int:
    return max(abs((a >> s & 255) - (b >> s & 255)) for s in (16, 8, 0)) if rgb else abs(a - b)


def _packed(color: Color) -> int:
    return color[0] << 16 | color[1] << 8 | color[2]


_VOC = {_packed(color): i for i, color in enumerate(default_colors(64))} | {VOID_COLOR: 255}  # colour -> position in VOC's map


def _find_void(draft: _Draft) -> None:
    """Grey and palette values that mark unknown pixels."""
    for value in [v for v in draft.free if v < 0]:
        draft.ignore(value, "negative numbers are no class")
    for value, target in draft.stated.items():
        if target == IGNORE and value in draft.free:
            draft.ignore(value, "as the class file says")
    names, free, evidence = draft.names, draft.free, draft.evidence
    known = [value for value in sorted({*free, *draft.targets}) if draft.targets.get(value, 0) >= 0]
    top = free[-1] if free else 0
    if evidence.both_binary and free == [0, 1, 255] and len(names or "12") == 2:
        return  # decided in _read_numbers
    in_void_color = top == 255 and list((evidence.palette or ())[255:]) == default_colors(256)[255:]
    several = len(known) > 2 or (names is not None and len(names) > 2)  # else 255 is class 1 of two
    if top in VOID_VALUES and several and not (names and top < len(names)):
        others = [value for value in known if value != top]
        if top in evidence.thin:
            draft.ignore(top, "it only forms lines between the other classes")
        elif in_void_color:
            draft.ignore(top, "it has the colour of Pascal VOC's mark for unknown pixels")
        elif _like_indices(others, names):
            if names and len(known) in (2, len(names)):
                _ask(draft, f"{top} may mark unknown pixels, or be one of the {len(names)} classes", {top: (len(names) - 1, None)})
            draft.ignore(top, f"the other values ({_listed(others)}) are class numbers, far below it")
    elif in_void_color and len(known) == 2 and not names:
        what = f"{top} has the colour of Pascal VOC's mark for unknown pixels, but only {known[0]} occurs beside it"
        _ask(draft, what, {top: (0 if 1 in _classes_given(draft) else 1, None)})
    free, stated = draft.free, draft.stated
    if names and not stated and free and free[-1] == len(names) and 0 in free and (len(free) > 2 or len(_classes_given(draft)) > 1):
        _one_more_than_names(draft, len(names))


def _one_more_than_names(draft: _Draft, last: int) -> None:
    """Values 0..K for K names: is K unknown pixels, or is 0 a background that nobody named?"""
    evidence = draft.evidence
    share = evidence.counts[last] / sum(evidence.counts.values())
    touching, first = evidence.touching.get(last, 0.0), evidence.touching.get(0, 0.0)
    spread = evidence.masks.get(last, 0) >= 0.8 * evidence.number and touching >= 0.85 and share <= 0.1
    named = draft.names is not None and draft.names[0].strip("_ ").lower() in _BACKGROUND
    if (spread or last in evidence.thin) and (named or (last > 3 and touching >= first + 0.2)):
        how = f"it lies all around the others (it touches {touching:.0%} of those in its masks, 0 only {first:.0%})"
        draft.ignore(last, f"there are {last} class names for the values 0 to {last}, and {how}")
        return
    what = f"there are {last} class names for the values 0 to {last}. Which of them has no name?"
    first_named = f"--classes background,{','.join(draft.names or ())}"
    _ask(draft, f"{what} If 0 is a background, name it first: {first_named}", {last: (None,), 0: (None,)})
    draft.targets[last] = -1
    draft.free.remove(last)


def _ask(draft: _Draft, what: str, options: Mapping[int, Sequence[int | None]]) -> None:
    """A problem that the evidence cannot decide, with what to type for each way out."""
    typed = [label_option(value, target, draft.evidence.rgb) for value, targets in options.items() for target in targets]
    draft.problems.append(f"{what}. Say which: {', or '.join(typed)}")


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
    taken = _classes_given(draft)
    whole = sorted({*free, *(v for v in draft.said if draft.targets[v] == v)})  # --label 0=0 only says what holds anyway
    if draft.stated:
        order = {v: c for v, c in draft.stated.items() if c != IGNORE and v not in draft.targets}
        draft.classes(order, "class numbers as in the class file", "values and classes as the class file numbers them")
    elif draft.evidence.both_binary and free == [0, 1, 255] and count in (None, 2):
        why = "some masks hold 0 and 1, others 0 and 255, none both 1 and 255: both are class 1"
        draft.classes({0: 0, 1: 1, 255: 1}, "binary 0/1 and 0/255", why)
    elif not free:
        draft.encoding = "as given by --label"
    elif count is not None and free[-1] < count:
        if 0 not in draft.evidence.counts and draft.names and draft.names[0].strip("_ ").lower() not in _BACKGROUND:
            _ask_where_counting_starts(draft, free, count)
        why = f"the values {_listed(free)} are positions in the list of {count} class names"
        draft.classes({i: i for i in range(count) if i not in draft.targets}, f"class numbers 0 to {count - 1}", why)
    elif free == [0, 255] and count in (None, 2) and not taken:
        draft.classes({0: 0, 255: 1}, "binary 0/255", "only 0 and 255 occur, so 255 is class 1 and not a mark for unknown pixels")
    elif whole == list(range(len(whole))) and count is None:
        kind = "binary 0/1" if len(whole) == 2 else f"class numbers 0 to {whole[-1]}"
        draft.classes({v: v for v in free}, kind, f"the values {_listed(free)} are class numbers without gaps")
    elif free[0] >= 1 and not _classes_given(draft) and free[-1] == (number if count is None else count):
        last = free[-1]
        why = f"the values go from {free[0]} to {last} and 0 does not occur, so classes count from 1"
        draft.classes({v: v - 1 for v in range(1, last + 1) if v not in draft.targets}, f"class numbers 1 to {last}", why)
    elif count is None or count - len(taken) == number or count == number:
        why = f"the values {_listed(free)} have gaps; they are numbered in ascending order"
        hint = "" if count else ". Where the gaps are classes that do not occur, list all classes with --classes"
        unused = [i for i in range(number + len(taken)) if i not in taken] if count is None or count != number else list(range(number))
        draft.classes(dict(zip(free, unused, strict=False)), "grey levels in ascending order", why + hint)
        if count is None and (beside := _beside(free)):
            near, other = beside
            ways = {other: (draft.targets[near],)}
            _ask(draft, f"{other} lies right beside {near}, as rounding does it. To merge them type this; else list the --classes", ways)
    else:  # fewer or more names than values: what is left in draft.free becomes a problem
        inside = {i: i for i in range(count) if i not in draft.targets}
        draft.classes(inside, f"class numbers 0 to {count - 1}", f"the {count} class names stand for the values 0 to {count - 1}")


def _ask_where_counting_starts(draft: _Draft, free: Sequence[int], count: int) -> None:
    zero, one = (" ".join(f"--label {v}={v - first}" for v in free) for first in (0, 1))
    what = f"no mask holds 0, and there are {count} class names for the values {_listed(free)}: do classes count from 0 or from 1?"
    draft.problems.append(
        f"{what} Say which: {zero}, or {one}; or number the lines of the class file, such as 1: {(draft.names or [''])[0]}"
    )


def _beside(values: Sequence[int]) -> tuple[int, int] | None:
    """Two neighbours far above the others, such as 254 and 255 of 0, 1, 254, 255: grey levels for people are not made like this."""
    wide = next((i for i in range(1, len(values)) if values[i] - values[i - 1] >= 32), len(values))
    high = values[wide:]
    return next(((b, a) for a, b in pairwise(high) if b - a <= 4), None) if len(values) <= 16 else None


def _doubt(draft: _Draft) -> None:
    """What makes a set of masks implausible as a whole."""
    evidence, say = draft.evidence, draft.problems.append
    classes = len([v for v in evidence.counts if draft.targets.get(v, -1) >= 0])
    rounded = evidence.damaged or _spread_but_told(draft)
    if evidence.lossy and not rounded and len(evidence.counts) > 2:
        if max(evidence.counts) < 64:
            say("JPEG cannot keep class numbers that differ by one: the masks are wrong at every border. Export them as PNG")
        else:
            ways = "--label '#rrggbb=0' --label '#rrggbb=1'" if evidence.rgb else "--label 0=0 --label 255=1"
            say(f"JPEG spread the mask values and the classes cannot be told apart. Export PNG, or give the values to round to: {ways}")
    if recolored := [v for v in evidence.recolored if v not in draft.said]:
        _say_recolored(draft, recolored[0])
    strange = [(v, f) for v, f in evidence.grey_only.items() if v * 0x010101 not in _packed_list(draft.given_colors)]
    if strange:
        say("{1} holds the number {0}, other masks hold colours. Save all masks in one way".format(*min(strange)))
    if draft.names or rounded:
        return
    alone = sum(1 for v in evidence.counts if evidence.masks.get(v) == 1)
    if evidence.numbered_each or (classes > 20 and evidence.number > 2 and alone > classes / 2):
        say(f"the masks look like numbered instances, not classes ({classes} values, many in few masks). If they are: list the --classes")
    elif classes > min(16 + 16 * max(evidence.number, 1), 256):
        say(f"{classes} values in {evidence.number} masks are too many for classes. Are these the masks? If so, list the --classes")
    elif not evidence.lossy and not evidence.rgb and classes > 8 and max(evidence.counts) >= 64 and _mostly_borders(evidence):
        say(f"most of the {classes} values hold no flat area, as after smooth resizing. Redo the masks, or list the --classes")


def _mostly_borders(evidence: Evidence) -> bool:
    return sum(evidence.flat.get(v, 0) <= 0.1 * n for v, n in evidence.counts.items()) > 0.75 * len(evidence.counts)


def _say_recolored(draft: _Draft, value: int) -> None:
    first, second = draft.evidence.recolored[value]
    keep = " ".join(f"--label {v}={v}" for v in list(draft.evidence.recolored)[:12])
    what = f"the palettes of {first} and {second} give the value {value} different colours, so numbers do not mean the same"
    draft.problems.append(f"{what}. Save all with one palette or as RGB; to go by the numbers all the same: {keep}")


def _read_colors(draft: _Draft) -> None:
    """Classes of RGB colours."""
    free, counts = draft.free, draft.evidence.counts
    for value, target in draft.stated.items():
        if target == IGNORE and value in draft.free and draft.given_colors:
            draft.ignore(value, "as the class file says")
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
        unused = [i for i in range(len(free) + len(draft.targets)) if i not in _classes_given(draft)]
        order = dict(zip(sorted(free, key=lambda c: (-counts.get(c, 0), c)), unused, strict=False))
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
    if classes > IGNORE_16:
        classes = _too_many(draft, classes)
    if named and len(draft.free) > 2:
        draft.problems.append(_too_few_names(draft, named))
    else:
        draft.problems.extend(_not_a_class(draft, value, classes) for value in draft.free[:5])
        if len(draft.free) > 5:
            draft.problems.append(f"{len(draft.free) - 5} more values are not one of {classes} classes")
    held_classes = {c for v, c in draft.targets.items() if c >= 0 and (v in evidence.counts or evidence.damaged)}
    if len(held_classes) < 2:
        held = ", ".join(value_name(v, evidence.rgb) for v in list(evidence.counts)[:5]) or "nothing"
        what = "fewer than two classes with pixels, so there is nothing to tell apart. Are these the masks?"
        draft.problems.append(f"the masks hold {held}: {what}")
    ignore = IGNORE if classes <= IGNORE else IGNORE_16
    values = {v: ignore if c < 0 else c for v, c in sorted(draft.targets.items())} or {0: 0}
    label_map = LabelMap(values, evidence.rgb, evidence.damaged or _spread_but_told(draft), ignore)
    sources = {c: v for v, c in sorted(draft.targets.items(), reverse=True) if c >= 0}
    renumbered = any(i != v for i, v in sources.items())
    names = tuple(draft.names or (_made_up(i, sources.get(i), evidence.rgb, renumbered) for i in range(classes)))
    names += tuple(_unlike(f"class_{i}", names) for i in range(len(names), classes))
    encoding = " ".join([*(["JPEG-damaged"] if evidence.damaged or _spread_but_told(draft) else []), draft.encoding])
    kind = "1-bit, " if evidence.bilevel else "palette, " if evidence.palette is not None and not evidence.rgb else ""
    return Proposal(label_map, kind + encoding, tuple(draft.reasons), tuple(draft.problems), names, _colors(draft, sources, classes))


def _too_many(draft: _Draft, classes: int) -> int:
    """A problem of more classes than any mask can hold; the classes that are left to be shown, and their values."""
    source = draft.evidence.sources.get(max(draft.targets, key=lambda value: draft.targets[value]), "masks")
    draft.problems.insert(
        0,
        f"{source}: the masks hold {classes} different values, as photographs do; a mask has at most {IGNORE_16} classes, one plain value "
        "each. Give the folder of the images first and that of the masks second, or list the classes with --classes",
    )
    draft.targets = {value: target for value, target in draft.targets.items() if target < IGNORE}
    return IGNORE


def _too_few_names(draft: _Draft, named: int) -> str:
    """One problem for all values that the names do not reach."""
    evidence, first = draft.evidence, draft.free[0]
    held = ", ".join(value_name(v, evidence.rgb) for v in list(evidence.counts)[:12]) + (", ..." if len(evidence.counts) > 12 else "")
    ways = f"{label_option(first, named - 1, evidence.rgb)} or {label_option(first, None, evidence.rgb)}"
    return (
        f"{evidence.sources.get(first, 'masks')}: {named} names for {len(evidence.counts)} values ({held}). Name all classes with "
        f"--classes, or say of each of the other {len(draft.free)} what it is, such as {ways}"
    )


def _not_a_class(draft: _Draft, value: int, classes: int) -> str:
    evidence = draft.evidence
    files = evidence.masks.get(value, 0)
    where = f"in {files} file{'s' if files != 1 else ''}" if files else f"in {evidence.counts.get(value, 0)} pixels"
    source = evidence.sources.get(value, "masks")
    advice = label_advice(value, evidence.rgb, classes)
    return f"{source}: value {value_name(value, evidence.rgb)} {where} is not one of {classes} classes. {advice}"


def _made_up(index: int, value: int | None, rgb: bool, renumbered: bool) -> str:
    return f"class_{index}" if value is None or not (rgb or renumbered) else f"color_{value:06x}" if rgb else f"value_{value}"


def _unlike(name: str, names: Sequence[str]) -> str:
    return _unlike(name + "_", names) if name in names else name


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
