"""Which mask belongs to which image, where only the names of folders and files say it."""

import os
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from perpixel.data.images import IMAGE_SUFFIXES
from perpixel.data.names import Role, Split, image_key, mask_key, meaning, plain_key

DEPTH = 6  # folders below the one given: deep enough for city/sequence/camera, and an end where links go round in circles


@dataclass(frozen=True)
class File:
    """A picture below the folder that was given; `place` holds the folders that say neither role nor split."""

    path: Path
    role: Role | None = None
    split: Split | None = None
    place: tuple[str, ...] = ()


Matched = list[tuple[File, File | None]]


def walk(root: Path, parts: tuple[str, ...] = ()) -> list[File]:
    """Every picture below a folder, sorted, with what the names of the folders on the way say; hidden files are left out.

    Raises:
        ValueError: if a folder can't be read.
    """
    files: list[File] = []
    try:
        entries = sorted(os.scandir(root), key=lambda entry: entry.name)
    except OSError as error:
        raise ValueError(f"{root}: this folder can't be read ({error.strerror}). Check its permissions.") from error
    for entry in entries:
        if entry.name.startswith((".", "__MACOSX")):
            continue
        if entry.is_dir():
            files += walk(root / entry.name, (*parts, entry.name)) if len(parts) < DEPTH else []
        elif Path(entry.name).suffix.lower() in IMAGE_SUFFIXES:
            files.append(_classified(root / entry.name, parts))
    return files


def _classified(path: Path, parts: tuple[str, ...]) -> File:
    """The role and split that the folders above a file give it."""
    role: Role | None = None
    split: Split | None = None
    place: list[str] = []
    for part in parts:
        known = meaning(part)
        if known is None:
            place.append(part)
        else:
            split, role = known[0] or split, known[1] or role
    return File(path, role, split, tuple(place))


def match(images: Sequence[File], masks: Sequence[File]) -> tuple[Matched, list[File]]:
    """Each image with its mask or None, in the order of the images; and the masks that are left.

    Raises:
        ValueError: if several masks fit an image, or several images a mask, equally well; names them.
    """
    partner: dict[File, File] = {}
    for places in (True, False):  # where sub-folders differ (annotations/trimaps/a.png), names alone must do
        for of_image, of_mask in ((plain_key, plain_key), (plain_key, mask_key), (image_key, plain_key), (image_key, mask_key)):
            _pass(images, masks, partner, of_image, of_mask, places)
        if partner:
            break
    taken = set(partner.values())
    return [(image, partner.get(image)) for image in images], [mask for mask in masks if mask not in taken]


def _pass(
    images: Sequence[File],
    masks: Sequence[File],
    partner: dict[File, File],
    of_image: Callable[[str], str],
    of_mask: Callable[[str], str],
    places: bool,
) -> None:
    """Add to `partner` the free images and masks whose keys are equal; a split that only one of the two states is no obstacle."""
    taken = set(partner.values())
    groups: dict[tuple[tuple[str, ...], str], tuple[list[File], list[File]]] = defaultdict(lambda: ([], []))
    for image in images:
        if image not in partner:
            groups[image.place if places else (), of_image(image.path.stem)][0].append(image)
    for mask in masks:
        if mask not in taken:
            groups[mask.place if places else (), of_mask(mask.path.stem)][1].append(mask)
    for ours, theirs in groups.values():
        equal = [(image, mask) for image in ours for mask in theirs if image.split == mask.split]
        partner.update(_one_to_one(equal))
        done = {file for couple in equal for file in couple}
        left = [mask for mask in theirs if mask not in done]
        loose = [(i, m) for i in ours if i not in done for m in left if i.split is None or m.split is None]
        partner.update(_one_to_one(loose))


def _one_to_one(couples: list[tuple[File, File]]) -> list[tuple[File, File]]:
    """The couples, where nothing occurs in two: which of them is meant, a person must say."""
    rivals: dict[tuple[str, File], list[File]] = defaultdict(list)
    for image, mask in couples:
        rivals["masks", image].append(mask)
        rivals["images", mask].append(image)
    for (what, file), several in rivals.items():
        if len(several) > 1:
            names = ", ".join(str(rival.path) for rival in several[:4]) + (", ..." if len(several) > 4 else "")
            raise ValueError(
                f"{file.path}: {len(several)} {what} fit it by name: {names}. Each image takes one mask: give the folder of images and "
                "the folder of masks as two arguments, or a list file with `image mask` per line, or take the wrong ones out."
            )
    return couples
