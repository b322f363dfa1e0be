"""Class names and colours, from a file or from the command line."""

import re
from pathlib import Path

Color = tuple[int, int, int]

FILES = ("classes.txt", "classes.csv", "class_names.txt", "class_dict.csv", "label_colors.txt", "labelmap.txt", "names.txt", "labels.txt")
_MARK = r"[\s,;:]+"
_NAME_FIRST = re.compile(rf"(.*?\D.*?){_MARK}(\d+){_MARK}(\d+){_MARK}(\d+)[\s,;:]*")
_COLOR_FIRST = re.compile(rf"(\d+){_MARK}(\d+){_MARK}(\d+){_MARK}(.*)")
_NUMBERED = re.compile(rf"(\d+){_MARK}(.*\D.*)")


def find_classes_file(images: Path, masks: Path | None) -> Path | None:
    """The classes file in the folder of the images, of the masks, or in the one that holds both folders."""
    folders = [path if path.is_dir() else path.parent for path in (images, masks) if path is not None]
    if len(folders) == 2 and folders[0].absolute().parent == folders[1].absolute().parent:
        folders.append(folders[0].parent)
    return next((folder / name for folder in folders for name in FILES if (folder / name).is_file()), None)


def read_classes(spec: str | Path) -> tuple[list[str], list[Color] | None]:
    """Names in the order of their class index, and their colours where every line has one.

    Args:
        spec: a file with one class per line (`name`, or `name,r,g,b` or `r g b name`; commas, semicolons, colons, tabs or spaces;
            a header, comments and leading numbers are understood), or the names themselves: `sky,water,reeds`.

    Raises:
        ValueError: naming the file, if it can't be read, a name comes twice, there are fewer than two, or only some lines have a colour.
    """
    if _is_file(spec):
        return _read_file(Path(spec))
    text = str(spec)
    if isinstance(spec, Path) or "," not in text:
        raise ValueError(
            f"classes: there is no file {text!r}. Give a file with one class per line, or the names with commas: sky,water,reeds."
        )
    names = [name.strip() for name in text.split(",") if name.strip()]
    return _checked(names, "classes"), None


def _is_file(spec: str | Path) -> bool:
    try:
        return Path(spec).is_file()
    except (OSError, ValueError):  # a long list of names is no legal path
        return False


def _read_file(path: Path) -> tuple[list[str], list[Color] | None]:
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
    return _checked(_unnumbered(names), str(path)), colors or None


def _row(line: str) -> tuple[str, Color | None]:
    if found := _COLOR_FIRST.fullmatch(line):
        r, g, b, name = found.groups()
    elif found := _NAME_FIRST.fullmatch(line):
        name, r, g, b = found.groups()
    else:
        return line.rstrip(",;:").strip(), None
    return name.strip(" ,;:\t"), (int(r), int(g), int(b))


def _unnumbered(names: list[str]) -> list[str]:
    """Names without their numbers, where every one is numbered in order from 0 or 1: `0: sky`, `1: water`."""
    found = [_NUMBERED.fullmatch(name) for name in names]
    numbers = [int(match[1]) for match in found if match]
    for first in (0, 1):
        if names and numbers == list(range(first, first + len(names))):
            return [match[2].strip() for match in found if match]
    return names


def _checked(names: list[str], source: str) -> list[str]:
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise ValueError(f"{source}: class {twice[0]!r} comes twice. Every class needs its own name.")
    if len(names) < 2 or not all(names):
        raise ValueError(
            f"{source}: {len(names)} classes. Give at least two names, one per line; a single object needs `background` as well."
        )
    return names
