"""Find the pairs of image and mask in the folders that people really have.

images/a.jpg  masks/a.png                    two folders, equal stems; suffixes such as _mask, _gt, _L are tolerated
images/train/a.jpg  masks/train/a.png        split folders, in either order; also train/ and trainannot/ side by side
train.txt: "train/a.jpg trainannot/a.png"    list files, paths relative to the list
JPEGImages/  SegmentationClass/  ImageSets/  Pascal VOC
a.jpg  a_mask.png                            one folder; also im1.png with anno1.png, and a.jpg with a.png
volume.tif  labels.tif                       stacks: page against page
"""

import random
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from perpixel.data.class_names import find_classes_file
from perpixel.data.images import IMAGE_SUFFIXES, Picture, expand
from perpixel.data.names import Split, has_mask_word, unnumbered
from perpixel.data.pairing import File, Matched, match, walk

__all__ = ["Layout", "Pair", "Split", "find_layout", "split_pairs"]
SPLITS: tuple[Split, ...] = ("train", "val", "test")
LIST_SUFFIXES = (".txt", ".lst", ".csv", ".tsv")  # of a list given by its name; in a folder, tables may be anything, so only:
FOLDER_LIST_SUFFIXES = (".txt", ".lst")
LISTS: dict[Split, tuple[str, ...]] = {"train": ("train", "training"), "val": ("val", "valid", "validation"), "test": ("test", "testing")}


@dataclass(frozen=True)
class Pair:
    """An image, its mask (None where there is none), and the part of the set it belongs to (None where nothing says so)."""

    image: Picture
    mask: Picture | None
    split: Split | None = None


@dataclass(frozen=True)
class Layout:
    """What was found: the kind in words, the pairs in a stable order, and what did not fit."""

    kind: str
    pairs: tuple[Pair, ...]
    orphan_masks: tuple[Picture, ...] = ()
    classes_file: Path | None = None
    damaged: Mapping[str, str] = field(default_factory=dict)  # file -> why it can't be part of a pair
    notes: tuple[str, ...] = ()  # what else a person should know of the pairing

    def labelled(self, split: str | None, val_fraction: float, seed: int) -> list[Pair]:
        """The pairs with masks of one part of the set, "train", "val" or "test"; open parts are made as `split_pairs` makes them.

        None is "val" where the layout has a part for training or validation, else everything.

        Raises:
            ValueError: if there is none; names the parts there are.
        """
        pairs = [pair for pair in self.pairs if pair.mask is not None]
        if not pairs:
            raise ValueError(f"no image with a mask was found in these data ({self.kind}).")
        if split is None and not any(pair.split in ("train", "val") for pair in pairs):
            return pairs
        split = split or "val"
        pairs = split_pairs(pairs, val_fraction, seed)
        if chosen := [pair for pair in pairs if pair.split == split]:
            return chosen
        parts = ", ".join(sorted({str(pair.split) for pair in pairs if pair.split}))
        raise ValueError(f"no labelled images in the part '{split}' of these data ({self.kind}). Parts here: {parts}.")


def find_layout(images: str | Path, masks: str | Path | None = None) -> Layout:
    """The pairs in IMAGES, or in IMAGES and MASKS.

    Args:
        images: a folder, a list file (.txt, .lst, .csv or .tsv with `image mask` per line), a stack or one image.
        masks: a folder, a stack or one mask; None where IMAGES holds both.

    Raises:
        ValueError: if something is missing, unreadable or ambiguous, or no image has a mask; says what was looked for.
    """
    images, masks = Path(images), None if masks is None else Path(masks)
    refuse_missing(images, masks)
    if masks is not None and images.is_file() and images.samefile(masks):
        raise ValueError(f"{images} is given both as images and as masks. Give the masks second.")
    found = _alone(images) if masks is None else _two(images, masks)
    classes_file = found.classes_file or find_classes_file(images, masks)
    labelled = [pair for pair in found.pairs if pair.mask is not None]
    if not labelled and not found.damaged:
        raise ValueError(_nothing(images, masks, found))
    if labelled and all(pair.image.page is not None for pair in labelled):
        found = replace(found, kind="stacks" if found.kind in ("two files", "one folder", "two folders") else f"{found.kind}, stacks")
    pairs = tuple(dict.fromkeys(found.pairs))
    if again := len(found.pairs) - len(pairs):
        found = replace(found, pairs=pairs, notes=(*found.notes, f"listed more than once and taken once: {again} of the pairs"))
    return replace(found, classes_file=classes_file)


def refuse_missing(*paths: Path | None) -> None:
    """ValueError, naming the first of the paths where neither file nor folder is."""
    for path in paths:
        if path is not None and not _exists(path):
            raise ValueError(f"{path}: there is no such file or folder. Correct the path.")


def split_pairs(pairs: Sequence[Pair], val_fraction: float = 0.2, seed: int = 0) -> list[Pair]:
    """The same pairs, every labelled one with a split; given splits stay, unlabelled pairs are passed through.

    Where no validation part is given, it is taken from the training pairs: files by a seeded shuffle of their sorted names, stacks by
    their last pages, because neighbouring slices look alike and would make the scores lie. Two pairs or more always give one of each;
    a pair that is alone comes back twice, as "train" and as "val".

    Raises:
        ValueError: if `val_fraction` is not between 0 and 1, both excluded.
    """
    if not 0 < val_fraction < 1:
        raise ValueError(
            f"val_fraction is {val_fraction}; it is the part kept for validation, so more than 0 and less than 1, such as 0.2."
        )
    free = [pair for pair in pairs if pair.mask is not None and pair.split in (None, "train")]
    if any(pair.split == "val" and pair.mask is not None for pair in pairs):
        return [replace(pair, split="train") if pair.split is None and pair.mask is not None else pair for pair in pairs]
    if not free:
        return list(pairs)
    if len(free) == 1:
        both = [replace(free[0], split="train"), replace(free[0], split="val")]
        return [part for pair in pairs for part in (both if pair == free[0] else [pair])]
    chosen = _validation(free, val_fraction, seed)
    divided = {pair: replace(pair, split="val" if pair in chosen else "train") for pair in free}
    return [divided.get(pair, pair) for pair in pairs]


def _validation(pairs: Sequence[Pair], fraction: float, seed: int) -> set[Pair]:
    """Which of two pairs or more go to validation: at least one, never all."""
    stacks: dict[Path, list[Pair]] = defaultdict(list)
    for pair in pairs:
        stacks[pair.image.path].append(pair)
    chosen: list[Pair] = []
    for pages in stacks.values():
        if len(pages) > 1:
            pages.sort(key=lambda pair: pair.image.page or 0)
            chosen += pages[len(pages) - round(len(pages) * fraction) :]
    files = sorted((pages[0] for pages in stacks.values() if len(pages) == 1), key=lambda pair: str(pair.image))
    random.Random(seed).shuffle(files)
    chosen += files[: round(len(files) * fraction)]
    ordered = [*files, *(page for pages in reversed(stacks.values()) if len(pages) > 1 for page in reversed(pages))]
    chosen = chosen or ordered[:1]
    return set(chosen) if len(set(chosen)) < len(set(pairs)) else set(chosen) - {ordered[-1]}


# ---- one path, or two


def _alone(images: Path) -> Layout:
    """IMAGES holds the masks too."""
    if images.is_file():
        return _list_files({None: images}, images.parent) if _is_list(images) else _beside(images)
    for root in (images, *sorted(images.glob("*/")), *sorted(images.glob("*/*/"))):
        if (root / "JPEGImages").is_dir() and (root / "SegmentationClass").is_dir():
            return _pascal_voc(root)
    lists = _split_lists(images)
    if lists and (columns := _columns(lists.values())):
        return _list_files(lists, images) if columns == 2 else _listed(_folder(images), lists, "list files", images)
    return _folder(images)


def _two(images: Path, masks: Path) -> Layout:
    """Images here, masks there."""
    if images.absolute() == masks.absolute():
        return _alone(images)
    if images.is_file() and _is_list(images):
        raise ValueError(f"{images}: a list names the masks itself, so leave the second path ({masks}) out.")
    if images.is_dir() != masks.is_dir():
        file, folder = (masks, images) if images.is_dir() else (images, masks)
        raise ValueError(f"{folder} is a folder and {file} is a file. Give two folders, or two files.")
    if images.is_file():
        return _paired("two files", [(File(images), File(masks))], [])
    below_masks = [found for found in walk(masks) if not (images != masks and _inside(images, masks) and _inside(found.path, images))]
    below_images = [found for found in walk(images) if not (images != masks and _inside(masks, images) and _inside(found.path, masks))]
    if not below_images:
        raise ValueError(f"{images}: no images in this folder. Known kinds: {', '.join(sorted(IMAGE_SUFFIXES))}.")
    if not below_masks:
        raise ValueError(f"{masks}: no masks in this folder. Known kinds: {', '.join(sorted(IMAGE_SUFFIXES))}.")
    matched, orphans = match(below_images, below_masks)
    return _paired(_folder_kind(matched, "two folders"), matched, orphans)


def _folder(root: Path) -> Layout:
    """One folder: roles by the names of its sub-folders, else by the names of its files."""
    found = walk(root)
    if not found:
        raise ValueError(f"{root}: no images in this folder. Known kinds: {', '.join(sorted(IMAGE_SUFFIXES))}.")
    masks = [file for file in found if file.role == "mask"]
    images = [file for file in found if file.role != "mask"]
    if masks and images:
        matched, orphans = match(images, masks)
        return _paired(_folder_kind(matched, "images and masks folders"), matched, orphans)
    images, masks = _roles_by_name(found)
    matched, orphans = match(images, masks)
    matched, further = _further_masks(matched)
    layout = _paired(_folder_kind(matched, "one folder"), matched, orphans + further)
    if not further:
        return layout
    names = ", ".join(file.path.name for file in further[:3]) + (", ..." if len(further) > 3 else "")
    return replace(layout, notes=(f"{len(further)} further masks of images that have one are not used ({names}); merge them into one",))


def _beside(image: Path) -> Layout:
    """One image file, whose mask lies beside it."""
    if image.suffix.lower() not in IMAGE_SUFFIXES:
        known = f"a picture ({', '.join(sorted(IMAGE_SUFFIXES))}) nor a list of pictures ({', '.join(LIST_SUFFIXES)})"
        raise ValueError(f"{image}: by its name neither {known}. Rename it, or give a folder. A list has `image mask` per line.")
    whole = _folder(image.parent)
    pairs = tuple(pair for pair in whole.pairs if pair.image.path == image)
    return Layout("image with its mask beside it", pairs, damaged={k: v for k, v in whole.damaged.items() if k == str(image)})


def _roles_by_name(found: Sequence[File]) -> tuple[list[File], list[File]]:
    """Images and masks of files in one folder: `a_mask.png` is a mask where `a.jpg` is there, or where other masks are called so too."""
    suspects = [file for file in found if has_mask_word(file.path.stem)]
    others = [file for file in found if not has_mask_word(file.path.stem)]
    if any(mask is not None for _, mask in match(others, suspects)[0]):
        return others, suspects
    drawings = [file for file in found if file.path.suffix.lower() in (".png", ".bmp", ".gif")]
    photographs = [file for file in found if file.path.suffix.lower() in (".jpg", ".jpeg")]
    if any(mask is not None for _, mask in match(photographs, drawings)[0]):
        return [file for file in found if file.path.suffix.lower() not in (".png", ".bmp", ".gif")], drawings
    return list(found), []


def _further_masks(matched: Matched) -> tuple[Matched, list[File]]:
    """`a_mask_1.png` beside `a_mask.png` (as in BUSI, one file for each lesion) is a mask without an image, not an image without a mask."""
    masks = {(mask.path.parent, mask.path.stem) for _, mask in matched if mask is not None}

    def is_further(file: File, mask: File | None) -> bool:
        first = unnumbered(file.path.stem)
        return mask is None and has_mask_word(first) and (file.path.parent, first) in masks

    return [couple for couple in matched if not is_further(*couple)], [file for file, mask in matched if is_further(file, mask)]


# ---- lists


def _is_list(path: Path) -> bool:
    return path.suffix.lower() in LIST_SUFFIXES


def _split_lists(folder: Path) -> dict[Split | None, Path]:
    """The list file of each split that has one."""
    lists: dict[Split | None, Path] = {}
    for split, names in LISTS.items():
        paths = [folder / f"{name}{suffix}" for suffix in FOLDER_LIST_SUFFIXES for name in names]
        if there := [path for path in paths if path.is_file()]:
            lists[split] = there[0]
    return lists


def _columns(lists: Iterable[Path]) -> int:
    """2 where the lists name images and masks, 1 where they name images only, 0 where they are empty."""
    return max((min(len(line.replace(",", " ").split()), 2) for path in lists for _, line in _lines(path)), default=0)


def _lines(path: Path) -> Iterator[tuple[int, str]]:
    """Numbered lines of a list, without blank ones and comments."""
    try:
        text = path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(
            f"{path}: can't be read as a list of images ({error}). It should be UTF-8 text with `image mask` per line."
        ) from error
    for number, line in enumerate(text.splitlines(), 1):
        if line.strip() and not line.lstrip().startswith("#"):
            yield number, line.strip()


def _list_files(lists: Mapping[Split | None, Path], root: Path) -> Layout:
    """Pairs named line by line."""
    matched: list[tuple[File, File | None]] = []
    damaged: dict[str, str] = {}
    listed = 0
    for split, path in lists.items():
        for number, line in _lines(path):
            names = _two_names(line, root)
            if names is None:
                raise ValueError(
                    f"{path}, line {number}: {line!r} should be `image mask`, two paths relative to the list. "
                    f"(A {path.suffix} file is taken for a list of them, one pair per line.)"
                )
            there = [None if name is None else _resolve(name, root) for name in names]
            for name, file in zip(names, there, strict=True):
                if name is not None and file is None:
                    damaged[str(root / name)] = (
                        f"named in {path.name}, line {number}, but there is no such file. Correct the path or remove the line."
                    )
            listed += 1
            if there[0] is not None:
                matched.append((File(there[0], split=split), None if there[1] is None else File(there[1])))
    if not matched:
        path = next(iter(lists.values()))
        raise ValueError(
            f"{path}: a {path.suffix} file is taken for a list with `image mask` per line, and no line of its {listed} names an image that "
            "exists. Paths are relative to the list; to check pictures, give their folder."
        )
    found = _paired("list files" if len(lists) > 1 else "list file", matched, [])
    return replace(found, damaged={**damaged, **found.damaged}, classes_file=find_classes_file(root, None))


def _two_names(line: str, root: Path) -> tuple[str, str | None] | None:
    """The two paths of a line: separated by a tab, a comma or a space; where paths hold spaces, the division that exists. An image alone
    has no mask."""
    for mark in ("\t", ","):
        if line.count(mark) == 1:
            first, second = line.split(mark)
            return first.strip(), second.strip()
    words = line.split()
    if len(words) == 1 or (root / line).is_file():
        return line, None
    divisions = [(" ".join(words[:cut]), " ".join(words[cut:])) for cut in range(1, len(words))]
    real = [division for division in divisions if all(_resolve(name, root) for name in division)]
    return real[0] if real else divisions[0] if len(divisions) == 1 else None


def _resolve(name: str, root: Path) -> Path | None:
    """A path of a list: relative to the list or its parent; lists made on another machine (`/SegNet/CamVid/train/a.png`) by their tails."""
    parts = Path(name.replace("\\", "/")).parts
    for candidate in (root / name, root.parent / name, *(root.joinpath(*parts[cut:]) for cut in range(1, len(parts)))):
        if candidate.is_file():
            return candidate
    return None


def _pascal_voc(root: Path) -> Layout:
    """JPEGImages, SegmentationClass, and the split in ImageSets/Segmentation where it is given."""
    matched, orphans = match(walk(root / "JPEGImages"), walk(root / "SegmentationClass"))
    found = replace(_paired("Pascal VOC", matched, orphans), classes_file=find_classes_file(root, None))
    lists = _split_lists(root / "ImageSets" / "Segmentation")
    return _listed(found, lists, "Pascal VOC", root / "JPEGImages") if lists else found


def _listed(found: Layout, lists: Mapping[Split | None, Path], kind: str, root: Path) -> Layout:
    """`found`, with splits from lists of image names; labelled images that no list names are left out, and said so.

    Raises:
        ValueError: if a name fits several images equally well.
    """
    by_path: dict[Path, list[Pair]] = defaultdict(list)  # several where the image is a stack
    for pair in found.pairs:
        by_path[pair.image.path].append(pair)
    by_tail: dict[str, list[Path]] = defaultdict(list)
    for image in by_path:
        for tail in _tails(image.relative_to(root)):
            by_tail[tail].append(image)
    pairs, damaged, named = [], dict(found.damaged), set()
    for split, path in lists.items():
        for number, line in _lines(path):
            there = next((by_tail[tail] for tail in _tails(Path(line.replace("\\", "/"))) if tail in by_tail), [])
            if len(there) > 1:
                names = ", ".join(map(str, there[:4])) + (", ..." if len(there) > 4 else "")
                full = there[0].relative_to(root).as_posix()
                raise ValueError(f"{path}, line {number}: {line!r} fits {len(there)} images: {names}. Write the path, such as {full}.")
            if not there:
                damaged[str(root / line)] = f"named in {path.name}, line {number}, but there is no such image. Add it or remove the line."
            for image in there:
                pairs += [replace(pair, split=split) for pair in by_path[image]]
                named.update(by_path[image])
    left_out = sum(pair.mask is not None for pair in found.pairs if pair not in named)
    names = ", ".join(path.name for path in lists.values())
    notes = (*found.notes, f"{left_out} of the images with masks left out: in none of the lists ({names})") if left_out else found.notes
    pairs += [pair for pair in found.pairs if pair.mask is None and pair not in named]
    return replace(found, kind=kind, pairs=tuple(pairs), damaged=damaged, notes=notes)


def _tails(path: Path) -> Iterator[str]:
    """What a list may call an image: its path, the ends of it, and each without the suffix; the longest, and so the surest, first."""
    for cut in range(len(path.parts)):
        tail = Path(*path.parts[cut:])
        yield tail.as_posix()
        if tail.suffix.lower() in IMAGE_SUFFIXES:
            yield tail.with_suffix("").as_posix()


# ---- from files to pictures


def _paired(kind: str, matched: Iterable[tuple[File, File | None]], orphans: Iterable[File]) -> Layout:
    """Files to pictures: stacks are opened, page against page."""
    pairs: list[Pair] = []
    damaged: dict[str, str] = {}
    for image, mask in matched:
        pages = expand(image.path)
        split = image.split or (mask.split if mask else None)
        if mask is None:
            pairs += [Pair(page, None, split) for page in pages]
            continue
        mask_pages = expand(mask.path)
        if len(pages) != len(mask_pages):
            damaged[str(image.path)] = (
                f"{len(pages)} page{'s' * (len(pages) != 1)}, but {mask.path} has {len(mask_pages)}. "
                "Image and mask stacks need the same number of pages; one of them may be truncated."
            )
            continue
        pairs += [Pair(page, mask_page, split) for page, mask_page in zip(pages, mask_pages, strict=True)]
    return Layout(kind, tuple(pairs), tuple(page for mask in orphans for page in expand(mask.path)), damaged=damaged)


def _folder_kind(matched: Matched, otherwise: str) -> str:
    """ "split folders" where the folders divide the set."""
    splits = {image.split or mask.split for image, mask in matched if mask is not None}
    return "split folders" if splits - {None} else otherwise


# ---- what went wrong


def _nothing(images: Path, masks: Path | None, found: Layout) -> str:
    """What to say where no image has a mask."""
    if masks is not None:
        there = ", ".join(
            f"{len(names)} {kind} such as {names[0]!r}" if names else f"no {kind}"
            for kind, names in (
                ("images", [pair.image.path.name for pair in found.pairs]),
                ("masks", [mask.path.name for mask in found.orphan_masks]),
            )
        )
        return (
            f"{images} and {masks}: no mask is named like an image ({there}). "
            "Give both the same stem (a.jpg and a.png, or a_mask.png), or a list file with `image mask` per line."
        )
    kinds = Counter(pair.image.path.suffix.lower() for pair in found.pairs)
    what = ", ".join(f"{count} {suffix}" for suffix, count in kinds.most_common(3))
    return (
        f"{images}: images ({what}), but no masks. Looked for list files (train.txt, val.txt with `image mask` per line), JPEGImages with "
        "SegmentationClass, sub-folders images and masks, and a_mask.png beside a.jpg. "
        f"Give the folder of masks as second argument: {images} MASKS"
    )


def _exists(path: Path) -> bool:
    try:
        path.stat()
    except PermissionError as error:
        raise ValueError(f"{path}: can't be read ({error.strerror}). Check its permissions.") from error
    except OSError:
        return False
    return True


def _inside(path: Path, folder: Path) -> bool:
    return path.absolute().is_relative_to(folder.absolute())
