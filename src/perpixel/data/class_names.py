"""Class names and colours, from a file or from the command line."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from perpixel.data.masks import LabelMap, label_option

Color = tuple[int, int, int]

FILES = (
    "classes.txt",
    "_classes.csv",
    "classes.csv",
    "class_names.txt",
    "class_dict.csv",
    "label_colors.txt",
    "labelmap.txt",
    "names.txt",
    "labels.txt",
)
SHOWN = 6  # classes in a message
_MARK = r"[\s,;:]+"
_NAME_FIRST = re.compile(rf"(.*?\D.*?){_MARK}(\d+){_MARK}(\d+){_MARK}(\d+)[\s,;:]*")
_COLOR_FIRST = re.compile(rf"(\d+){_MARK}(\d+){_MARK}(\d+){_MARK}(.*)")
_NUMBERED = re.compile(rf"(\d+){_MARK}(.*\D.*)")
_MADE_UP = re.compile(r"class[ _]?\d+|value_\d+|color_[0-9a-f]{6}")  # names that `perpixel check` gives where nobody did
_IGNORED = {"ignore", "ignored", "void", "unlabelled", "unlabeled"}


@dataclass(frozen=True)
class ClassList:
    """Classes in the order of their index."""

    names: list[str]
    colors: list[Color] | None = None
    values: Mapping[int, int] = field(default_factory=dict)  # mask value (with `colors` r << 16 | g << 8 | b) -> class, or 255 to ignore


def find_classes_file(images: Path, masks: Path | None) -> Path | None:
    """The classes file in the folder of the images, of the masks, or in the one that holds both folders."""
    folders = [path if path.is_dir() else path.parent for path in (images, masks) if path is not None]
    if len(folders) == 2 and folders[0].absolute().parent == folders[1].absolute().parent:
        folders.append(folders[0].parent)
    return next((folder / name for folder in folders for name in FILES if (folder / name).is_file()), None)


def read_classes(spec: str | Path) -> ClassList:
    """Names in the order of their class index, their colours where every line has one, and what numbered lines say of mask values.

    Args:
        spec: a file with one class per line (`name`, or `name,r,g,b` or `r g b name`; commas, semicolons, colons, tabs or spaces;
            a header and comments are understood; `3: name` binds the name to the mask value 3; `__ignore__` and `void` are ignored),
            or the names themselves: `sky,water,reeds`.

    Raises:
        ValueError: naming the file, if it can't be read, a name or number comes twice, there are fewer than two names, or only some
            lines have a colour or number.
    """
    if _is_file(spec):
        return _read_file(Path(spec))
    text = str(spec)
    if isinstance(spec, Path) or "," not in text:
        raise ValueError(
            f"classes: {text!r} without a comma is taken for a file, and there is no such file. Give a file with one class per line, or at "
            f"least two names with commas: background,{text.strip() or 'object'}."
        )
    names = [name.strip() for name in text.split(",") if name.strip()]
    return ClassList(_checked(names, "classes"))


def _is_file(spec: str | Path) -> bool:
    try:
        return Path(spec).is_file()
    except (OSError, ValueError):  # a long list of names is no legal path
        return False


def _read_file(path: Path) -> ClassList:
    try:
        text = path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(
            f"{path}: can't be read as a list of classes ({error}). It should be UTF-8 text with one class per line."
        ) from error
    lines = [line.strip().strip('"') for line in text.splitlines()]
    rows = [_row(line) for line in lines if line and not line.startswith("#")]
    if rows and rows[0][1] is None and len(rows) > 1 and all(color is not None for _, color in rows[1:]):
        rows = rows[1:]  # a header: name,r,g,b
    names, colors = [name for name, _ in rows], [color for _, color in rows if color is not None]
    if colors and len(colors) < len(rows):
        bare = next(name for name, color in rows if color is None)
        raise ValueError(f"{path}: class {bare!r} has no colour, but others have. Write `name,r,g,b` on every line, or names only.")
    if any(value > 255 for color in colors for value in color):
        raise ValueError(f"{path}: a colour has a value above 255. Colours are `name,r,g,b` with 0..255 each.")
    if colors:
        void = [i for i, name in enumerate(names) if _means_ignore(name)]
        values = {r << 16 | g << 8 | b: 255 for r, g, b in (colors[i] for i in void)}
        kept = [i for i in range(len(names)) if i not in void]
        return ClassList(_checked([names[i] for i in kept], str(path)), [colors[i] for i in kept], values)
    return _numbered(names, str(path))


def _means_ignore(name: str) -> bool:
    return name.strip(" _").lower() in _IGNORED


def _row(line: str) -> tuple[str, Color | None]:
    if found := _COLOR_FIRST.fullmatch(line):
        r, g, b, name = found.groups()
    elif found := _NAME_FIRST.fullmatch(line):
        name, r, g, b = found.groups()
    else:
        return line.rstrip(",;:").strip(), None
    return name.strip(" ,;:\t"), (int(r), int(g), int(b))


def _numbered(lines: list[str], source: str) -> ClassList:
    """Names bound to the mask values they are numbered with: `0: sky`, `1: water`, in any order and with gaps."""
    found = [_NUMBERED.fullmatch(line) for line in lines]
    if len(found) > 2 and found[0] is None and all(found[1:]):  # a header, such as `Pixel Value, Class`
        found = found[1:]
    numbered = {int(match[1]): match[2].strip() for match in found if match}
    if not numbered:
        first = -1 if lines and lines[0] == "__ignore__" else 0  # LabelMe: -1, stored as 255
        numbered = dict(enumerate(lines, first))
        if not any(map(_means_ignore, lines)):
            return ClassList(_checked(lines, source))
    elif not all(found) or len(numbered) < len(found):
        bare = next((line for line, match in zip(lines[-len(found) :], found, strict=True) if match is None), None)
        what = f"{bare!r} has no number, but others have" if bare else "a number comes twice"
        raise ValueError(f"{source}: {what}. Write `number: name` on every line, each number once, or names only.")
    names = [name for _, name in sorted(numbered.items()) if not _means_ignore(name)]
    order = [value for value, name in sorted(numbered.items()) if not _means_ignore(name)]
    ignored = {value: 255 for value, name in numbered.items() if _means_ignore(name)}
    if -1 in ignored:
        ignored[255] = 255
    return ClassList(_checked(names, source), None, ignored | {value: i for i, value in enumerate(order)})


def _checked(names: list[str], source: str) -> list[str]:
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise ValueError(f"{source}: class {twice[0]!r} comes twice. Every class needs its own name.")
    if len(names) < 2 or not all(names):
        raise ValueError(
            f"{source}: {len(names)} classes. Give at least two names, one per line; a single object needs `background` as well."
        )
    return names


# ---- a set and a model, each with names of its own


def refuse_other_names(path: Path, names: Sequence[str], label_map: LabelMap, labels: Mapping[int, int]) -> None:
    """Refuses a set whose mask values mean other classes to it than to a model: its scores would be of classes mixed up.

    Args:
        path: the classes file of the set.
        names: the model's classes.
        label_map: of the model. A list without numbers and colours names its classes in their order, as in training.
        labels: what was said of mask values by hand, value -> class index or 255; these are not doubted.

    Raises:
        ValueError: with the differences, and the options to type for scores by name.
    """
    own = read_classes(path)
    if [_plain(name) for name in own.names] == [_plain(name) for name in names]:
        return
    by_name = {_plain(name): index for index, name in enumerate(names)}
    found: list[str] = []
    options: list[str] = []
    for index, name in enumerate(own.names):
        target = by_name.get(_plain(name))
        values: list[int | None] = [*_values_of(own, index, label_map, len(names))]
        for value in values or [None]:
            meant = None if value is None else label_map.values.get(value)
            if value in labels or meant == label_map.ignore or (meant is not None and _same(name, names[meant])):
                continue
            if meant is None and (labels or target is not None):  # a value that the model does not know is refused where it occurs
                continue
            found.append(
                f"{name!r} is class {index} of the set, and "
                + (f"{names[meant]!r} that of the bundle" if meant is not None else "none of the bundle's")
            )
            if value is not None:
                options.append(label_option(value, target, label_map.rgb))
    if found:
        raise ValueError(_other_names(path, own.names, names, found, options))


def _same(name: str, other: str) -> bool:
    return _plain(name) == _plain(other) or _MADE_UP.fullmatch(other) is not None


def _plain(name: str) -> str:
    """A name without what people do not mean: case, and how its words are divided."""
    return re.sub(r"[\s_-]+", " ", name).strip().casefold()


def _values_of(own: ClassList, index: int, label_map: LabelMap, count: int) -> list[int]:
    """The mask values of a class of the set, as far as its file and the model's label map say."""
    if own.colors and label_map.rgb:
        red, green, blue = own.colors[index]
        return [red << 16 | green << 8 | blue]
    if own.values and not own.colors:
        return [value for value, target in own.values.items() if target == index]
    known = [value for value, target in label_map.values.items() if target == index]
    from_zero = not label_map.rgb and all(label_map.values.get(k) == k for k in range(count))
    return known or ([index] if from_zero else [])


def _other_names(path: Path, own: Sequence[str], names: Sequence[str], found: Sequence[str], options: Sequence[str]) -> str:
    """What to say of a set whose classes are not the bundle's."""
    order = (
        "the bundle's classes in another order"
        if sorted(map(_plain, own)) == sorted(map(_plain, names))
        else "other classes than the bundle"
    )
    differences = "; ".join(found[:SHOWN]) + (f"; and {len(found) - SHOWN} more" if len(found) > SHOWN else "")
    by_name = f" To score by name: {' '.join(options)}." if options else ""
    return (
        f"{path} names {order}: {', '.join(own[:SHOWN])}{', ...' * (len(own) > SHOWN)} against "
        f"{', '.join(names[:SHOWN])}{', ...' * (len(names) > SHOWN)}. {differences}.{by_name} "
        f"If the masks hold the bundle's numbers all the same, move {path.name} out of the set."
    )
