"""What is in these folders? Finds the pairs, reads every file once, proposes classes and label map, and names what is damaged."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rich.console import Console

from perpixel.data.images import Picture
from perpixel.data.layouts import Pair
from perpixel.data.masks import LabelMap

Progress = Callable[[int, int, str], None]  # files done, files in all, name of the file just read


@dataclass
class Check:
    """Everything that training needs to know of a data set, and everything that a person should know of it."""

    layout: str
    pairs: list[Pair]  # only usable ones: both files readable, sizes equal; every one has a mask and a split
    classes: list[str]
    colors: list[tuple[int, int, int]]
    label_map: LabelMap
    encoding: str
    reasons: list[str]
    bands: int
    dtype: str
    scale: float  # the stored value that stands for 1.0: 255, 65535, or 1 for float images
    mean: list[float]  # per band, over the training images, in units of `scale`
    std: list[float]
    sizes: dict[tuple[int, int], int]  # (height, width) in pixels -> images
    pixels: dict[str, list[int]]  # split -> pixels of each class
    images_with: dict[str, list[int]]  # split -> images that show each class
    ignore_share: float  # of all mask pixels of usable pairs, 0..1
    unlabelled: list[Picture] = field(default_factory=list)
    orphan_masks: list[Picture] = field(default_factory=list)
    damaged: dict[str, str] = field(default_factory=dict)  # file -> message
    size_mismatches: dict[str, str] = field(default_factory=dict)  # image file -> message
    absent: dict[str, list[str]] = field(default_factory=dict)  # split -> names of classes never seen in it
    duplicates: list[tuple[str, str, str]] = field(default_factory=list)  # ("exact" | "near", train file, val file)
    warnings: list[str] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)

    @property
    def ready(self) -> bool:
        """True where training can start."""
        return not self.problems

    def split(self, name: str) -> list[Pair]:
        """The pairs of one split ("train", "val" or "test")."""
        return [pair for pair in self.pairs if pair.split == name]

    def to_json(self) -> dict[str, Any]:
        """Plain, stable JSON types."""
        raise NotImplementedError


def check(
    images: Path,
    masks: Path | None = None,
    *,
    classes: str | None = None,
    labels: Mapping[int, int] | None = None,
    val_fraction: float = 0.2,
    seed: int = 0,
    progress: Progress | None = None,
) -> Check:
    """Diagnose a data set.

    Raises:
        ValueError: if no images are found at all, or an argument is out of range. Everything else ends up in `problems`.
    """
    raise NotImplementedError


def render(report: Check, console: Console) -> None:
    """Print the diagnosis as a table for people."""
    raise NotImplementedError
