"""What the names of folders and files say: image or mask, train or val, and which image a mask belongs to."""

import re
from typing import Literal

Role = Literal["image", "mask"]
Split = Literal["train", "val", "test"]

SPLIT_WORDS: dict[str, Split] = {
    "training": "train",
    "train": "train",
    "validation": "val",
    "valid": "val",
    "val": "val",
    "testing": "test",
    "test": "test",
}
# Lower case, without separators; "leftimg8bit" and "gtfine" are Cityscapes'.
IMAGE_FOLDERS = frozenset(
    {"image", "images", "img", "imgs", "im", "jpegimages", "photo", "photos", "input", "inputs", "rgb", "leftimg8bit"}
)
MASK_FOLDERS = frozenset(
    {
        "mask",
        "masks",
        "label",
        "labels",
        "annotation",
        "annotations",
        "annot",
        "annots",
        "anno",
        "annos",
        "gt",
        "gts",
        "groundtruth",
        "truth",
        "seg",
        "segs",
        "segmentation",
        "segmentations",
        "segmentationclass",
        "target",
        "targets",
        "output",
        "outputs",
        "trimap",
        "trimaps",
        "gtfine",
        "gtcoarse",
    }
)
IMAGE_WORDS = r"image|img|im|volume|rgb|photo|leftImg8bit|training"
MASK_WORDS = (
    r"gtFine_labelTrainIds|gtFine_labelIds|labelTrainIds|labelIds|ground[_-]?truth|segmentation|annotations?|annot|anno|trimap|"
    r"masks?|labels?|target|gt|seg|manual1?"
)


def _around(words: str) -> tuple[re.Pattern[str], re.Pattern[str]]:
    """A word before the rest of a stem (`anno1`, `mask_a`), and one behind it (`a_mask`, `train-labels`)."""
    return (
        re.compile(rf"(?i)^(?:{words})(?:[_\-. ]+|(?=\d))(?=.)"),
        re.compile(rf"(?i)(?<=.)(?:[_\-. ]+)(?:{words})$"),
    )


_IMAGE_BEFORE, _IMAGE_BEHIND = _around(IMAGE_WORDS)
_MASK_BEFORE, _MASK_BEHIND = _around(MASK_WORDS)
_CAMVID_BEHIND = re.compile(r"(?<=.)_L$")  # a_L.png, as CamVid came; a small l is rather the left eye of a stereo pair


def meaning(folder: str) -> tuple[Split | None, Role | None] | None:
    """The split and the role that a folder's name gives ("trainannot": train, mask), or None where it is just a name."""
    word = re.sub(r"[^a-z0-9]", "", folder.lower())
    if word in IMAGE_FOLDERS:
        return None, "image"
    if word in MASK_FOLDERS:
        return None, "mask"
    for part, split in SPLIT_WORDS.items():
        for rest in (word.removeprefix(part), word.removesuffix(part)):
            if rest == word:
                continue
            if not rest or rest.isdigit():  # train2017
                return split, None
            if rest in IMAGE_FOLDERS | MASK_FOLDERS:
                return split, "image" if rest in IMAGE_FOLDERS else "mask"
    return None


def plain_key(stem: str) -> str:
    """The stem itself, whatever its case."""
    return stem.casefold()


def image_key(stem: str) -> str:
    """The stem without words for images: `train-volume` -> `train`, `im1` -> `1`."""
    return _without(stem, _IMAGE_BEFORE, _IMAGE_BEHIND)


def mask_key(stem: str) -> str:
    """The stem without words for masks: `a_mask` -> `a`, `train-labels` -> `train`, `anno1` -> `1`."""
    return _without(_CAMVID_BEHIND.sub("", stem), _MASK_BEFORE, _MASK_BEHIND)


def has_mask_word(stem: str) -> bool:
    """Is this, by its name alone, a mask?"""
    return mask_key(stem) != plain_key(stem)


def unnumbered(stem: str) -> str:
    """The stem without a number behind it: `a_mask_1` -> `a_mask`."""
    return re.sub(r"(?<=.)[_\-. ]\d+$", "", stem)


def _without(stem: str, *patterns: re.Pattern[str]) -> str:
    previous = ""
    while stem != previous:
        previous = stem
        for pattern in patterns:
            stem = pattern.sub("", stem)
    return stem.casefold()
