"""What to label next: of images without masks, those that the model is least sure of, and no two alike."""

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from PIL import Image

from perpixel.data.display import to_display
from perpixel.report.glance import Glance
from perpixel.report.thumbnails import heat, label_layer, photo

LIMIT = 500  # images looked at; more say little new and take long
GRID = 8  # cells a side that an image is compared by


@dataclass(frozen=True)
class Proposal:
    """An image to label; pictures are encoded WebP, `guess` a layer to lie over the photo.

    `uncertainty` is the mean entropy of its pixels, as a share of ln K.
    """

    name: str
    size: tuple[int, int]  # (height, width) in pixels
    uncertainty: float
    photo: bytes
    guess: bytes
    entropy: bytes

    @property
    def bytes(self) -> int:
        return len(self.photo) + len(self.guess) + len(self.entropy)


def choose(uncertainty: np.ndarray, descriptors: np.ndarray, count: int) -> list[int]:
    """Indices of up to `count` items, each uncertain and unlike those before it.

    The first is the most uncertain; each next one has the largest product of its uncertainty and its distance to the nearest one chosen.

    Args:
        uncertainty: (N,) not negative.
        descriptors: (N, D); unlike items lie far apart.

    Raises:
        ValueError: if the lengths differ or `count` is below 1.
    """
    if len(uncertainty) != len(descriptors) or count < 1:
        raise ValueError(f"{len(uncertainty)} uncertainties, {len(descriptors)} descriptors, count {count}; give as many, and 1 or more")
    chosen: list[int] = []
    nearest = np.ones(len(uncertainty))
    free = np.ones(len(uncertainty), bool)
    while free.any() and len(chosen) < count:
        # Where nothing is left but copies of what is chosen, uncertainty alone decides.
        worth = uncertainty * nearest if (nearest[free] > 0).any() else uncertainty
        best = int(np.argmax(np.where(free, worth, -1.0)))
        distance = np.linalg.norm(descriptors - descriptors[best], axis=1)
        nearest = distance if not chosen else np.minimum(nearest, distance)
        free[best] = False
        chosen.append(best)
    return chosen


def descriptor(seen: Glance) -> np.ndarray:
    """What an image shows, and what the model sees in it, as (K + 192,) float32 for `choose`.

    Square roots of the classes' shares (their distance is Hellinger's, at most the square root of 2) and a thumbnail of 8x8 colours
    weighed to count about as much: frames of one scene come out alike by both.
    """
    shares = np.sqrt(seen.shares)
    small = np.asarray(Image.fromarray(to_display(seen.pixels)).resize((GRID, GRID), Image.Resampling.BOX), np.float32)
    return np.concatenate([shares, small.ravel() / (255 * math.sqrt(small.size) / 2)]).astype(np.float32)


@torch.inference_mode()
def propose(
    names: Sequence[str],
    look: Callable[[int], Glance],
    colors: Sequence[tuple[int, int, int]],
    count: int = 12,
    side: int = 320,
    limit: int = LIMIT,
    progress: Callable[[int, int, str], None] | None = None,
) -> tuple[list[Proposal], list[str]]:
    """The images to label next of those named, and why some could not be read.

    Args:
        names: of the images, at most `limit` of which, evenly spread, are looked at.
        look: number of an image -> what it shows (`glance.glance`); ValueError where it is damaged.
        colors: of the K classes.

    Only descriptors are kept; the images chosen are looked at once more to be drawn.
    """
    todo = list(evenly(range(len(names)), limit))
    looked, uncertain, known, damaged = list[int](), list[float](), list[np.ndarray](), list[str]()
    for done, index in enumerate(todo, 1):
        try:
            seen = look(index)
        except ValueError as error:
            damaged.append(str(error))
            continue
        looked.append(index)
        uncertain.append(seen.uncertainty)
        known.append(descriptor(seen))
        if progress is not None:
            progress(done, len(todo), names[index])
    proposals = []
    for place in choose(np.array(uncertain), np.stack(known), count) if looked else []:
        seen = look(looked[place])
        proposals.append(
            Proposal(
                name=names[looked[place]],
                size=seen.size,
                uncertainty=uncertain[place],
                photo=photo(seen.pixels, side),
                guess=label_layer(seen.guess, colors, side),
                entropy=heat(seen.entropy, side),
            )
        )
    return proposals, damaged


def evenly(numbers: Iterable[int], most: int) -> list[int]:
    """At most so many of the numbers, evenly spread."""
    every = list(numbers)
    return every if len(every) <= most else [every[k * len(every) // most] for k in range(most)]
