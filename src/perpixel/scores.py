"""Scores beside the confusion matrix: where the cost lies, boundaries, distances, calibration, neurites.

Each group takes one image after the other, keeps counts and no prediction, and merges with what other processes have gathered.
docs/scores.md has the definitions.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, Self

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from perpixel.metrics.calibration import Calibration
from perpixel.metrics.intervals import Interval, values_table
from perpixel.metrics.measures import MEASURES, TRIMAP_KEPT


@dataclass(frozen=True)
class Scored:
    """One image that has been scored, as it is handed to observers: nothing is kept of it unless they do.

    Attributes:
        name: as `predict` names its output.
        path: the file; a stack's is that of all its pages.
        image: (C, H, W) as read, on the CPU.
        labels: (H, W) int64 class indices, or `ignore`.
        logits: (K, H, W) float32, refined where there is a refiner, on the device of `labels`.
        loss: mean cross-entropy of its labelled pixels in nats; NaN where none is labelled.
        ignore: the label of pixels that do not count.
    """

    name: str
    path: Path
    image: Tensor
    labels: Tensor
    logits: Tensor
    loss: float
    ignore: int


Observer = Callable[[Scored], None]


class Group(Protocol):
    """One kind of scores: takes images, merges, and says what it found."""

    def update(self, seen: Scored, labels: np.ndarray, predicted: np.ndarray) -> None:
        """Add one image; labels and predicted are (H, W) on the CPU."""

    def merge(self, other: Self) -> None:
        """Add what another process gathered with the same settings."""

    def to_json(self, absent: str) -> dict[str, Any]:
        """Plain types; None where there is no number."""


class CostShares:
    """How much of the cost lies in each class, and near the boundaries.

    The cost is the mean over the images of their mean loss, and so are its parts: a pixel weighs 1 / (labelled pixels of its image). The
    shares of pixels are weighed alike, so that a class whose pixels all have the same loss as all others has two equal shares. The band
    has the pixels within BF's tolerance (0.75 % of the diagonal, at least one pixel) of a change of the truth.
    """

    def __init__(self, classes: int) -> None:
        self.sums = np.zeros((classes + 1, 2))  # cost and pixels of each class; last, those of the band

    def update(self, seen: Scored, labels: np.ndarray, predicted: np.ndarray) -> None:
        """Add one image."""
        known = labels != seen.ignore
        if not known.any() or not math.isfinite(seen.loss):
            return
        losses = pixel_losses(seen.logits, seen.labels, seen.ignore)
        image = CostShares(len(self.sums) - 1)
        image.add_block(losses, labels, known & near_change(labels, band_width(labels.shape)), seen.ignore)
        self.add_image(image)

    def add_block(self, losses: np.ndarray, labels: np.ndarray, band: np.ndarray, ignore: int) -> None:
        """Add pixels (h, w) of one image, `band` those that count for the boundaries; the sums are then not those of a set."""
        known = labels != ignore
        for column, weights in enumerate((losses[known], None)):
            self.sums[:-1, column] += np.bincount(labels[known], weights, len(self.sums) - 1)
        self.sums[-1] += np.array([losses[band & known].sum(dtype=np.float64), (band & known).sum()])

    def add_image(self, image: Self) -> None:
        """Add an image whose pixels are the blocks of `image`."""
        if np.isfinite(image.sums).all() and (pixels := image.sums[:-1, 1].sum()):
            self.sums += image.sums / pixels

    def merge(self, other: Self) -> None:
        """Add the sums of another one of as many classes."""
        self.sums += other.sums

    def to_json(self, absent: str) -> dict[str, Any]:
        """Shares from 0 to 1 of the cost and of the pixels: lists by class, and those of the band."""
        total = self.sums[:-1].sum(0)
        shares = np.divide(self.sums, total, out=np.full(self.sums.shape, np.nan), where=total > 0)
        names = ("cost", "pixels")
        return {
            "classes": {name: plain(column[:-1]) for name, column in zip(names, shares.T, strict=True)},
            "boundary_band": {name: plain(column[-1]) for name, column in zip(names, shares.T, strict=True)},
        }


def pixel_losses(logits: Tensor, labels: Tensor, ignore: int) -> np.ndarray:
    """(h, w) float32 cross-entropy of each pixel in nats, 0 where the label is `ignore`."""
    return F.cross_entropy(logits[None], labels[None], ignore_index=ignore, reduction="none")[0].cpu().numpy()


def band_width(size: Sequence[int]) -> int:
    """Pixels from a change of the truth that an image's boundary band reaches."""
    from perpixel.metrics.boundary import TOLERANCE

    return max(1, round(TOLERANCE * math.hypot(*size)))


def near_change(labels: np.ndarray, width: int) -> np.ndarray:
    """(h, w) bool: pixels within `width` king's moves of a change of the truth."""
    from perpixel.metrics.bands import steps_to_change

    return np.asarray(steps_to_change(labels.astype(np.int32), width, border=False) <= width)


class Boundaries:
    """BF score, IoU in bands of 1 to 40 pixels along the true boundaries, and Boundary IoU."""

    def __init__(self, classes: int) -> None:
        from perpixel.metrics.bands import BoundaryIoU, Trimap  # numba loads only where it is needed
        from perpixel.metrics.boundary import BoundaryF

        self.contours, self.trimap, self.bands = BoundaryF(classes), Trimap(classes, kept=TRIMAP_KEPT), BoundaryIoU(classes)

    def update(self, seen: Scored, labels: np.ndarray, predicted: np.ndarray) -> None:
        """Add one image."""
        for part in (self.contours, self.trimap, self.bands):
            part.update(labels, predicted, seen.ignore)

    def merge(self, other: Self) -> None:
        """Append the images of another one."""
        self.contours.merge(other.contours)
        self.trimap.merge(other.trimap)
        self.bands.merge(other.bands)

    def to_json(self, absent: str) -> dict[str, Any]:
        """Scores, their settings, and the curve over the widths of the band."""
        return {
            "bf": plain(self.contours.score),
            "bf_tolerance": self.contours.tolerance,
            "bf_classes": plain(self.contours.per_class),
            "boundary_iou": plain(self.bands.mean(absent)),
            "boundary_iou_width": self.bands.width,
            "boundary_iou_classes": plain(self.bands.per_class),
            "trimap": {
                "widths": list(self.trimap.widths),
                "accuracy": plain(self.trimap.accuracy),
                "miou": plain(self.trimap.miou(absent)),
            },
        }

    def tables(self) -> dict[str, np.ndarray]:
        """Contours, inner bands, and three of the trimap's bands, as `metrics.measures` names them."""
        widths = zip(self.trimap.kept, np.moveaxis(self.trimap.images.table, 1, 0), strict=True)
        found = {"contours": self.contours.images.table, "bands": self.bands.images.table}
        return found | {f"trimap_{width}": table for width, table in widths}


class Surfaces:
    """Distances between true and predicted surfaces, in pixels."""

    def __init__(self, classes: int) -> None:
        from perpixel.metrics.surface import SurfaceDistance

        self.distances = SurfaceDistance(classes)

    def update(self, seen: Scored, labels: np.ndarray, predicted: np.ndarray) -> None:
        """Add one image."""
        self.distances.update(labels, predicted, seen.ignore)

    def merge(self, other: Self) -> None:
        """Append the images of another one."""
        self.distances.merge(other.distances)

    def to_json(self, absent: str) -> dict[str, Any]:
        """Means over images, by class; images where a class is in one of the two only, which the means leave out."""
        found = self.distances
        return {
            "percentile": found.percentile,
            "assd_classes": plain(found.assd),
            "hausdorff_classes": plain(found.hausdorff),
            "missed_classes": found.missed.tolist(),
            "invented_classes": found.invented.tolist(),
        }

    def tables(self) -> dict[str, np.ndarray]:
        """Both distances of each image and class."""
        return {"surface": values_table(self.distances.table)}


class Reliability:
    """Calibration of the probabilities as the network gives them, and divided by the bundle's temperature."""

    def __init__(self, temperature: float) -> None:
        self.temperature = temperature
        self.before = Calibration()
        self.after = None if temperature == 1 else Calibration()
        self.not_finite = 0  # images whose scores overflowed

    def update(self, seen: Scored, labels: np.ndarray, predicted: np.ndarray) -> None:
        """Add one image."""
        if not torch.isfinite(seen.logits).all():
            self.not_finite += 1
            return
        for top in range(0, len(seen.labels), 256):  # it computes in float64
            self.add_block(seen.logits[:, top : top + 256], seen.labels[top : top + 256], seen.ignore)

    def add_block(self, logits: Tensor, labels: Tensor, ignore: int) -> None:
        """Add pixels, logits (K, h, w) and labels (h, w), of one image."""
        if not torch.isfinite(logits).all():
            self.not_finite += 1
            return
        self.before.update(logits[None], labels[None], ignore)
        if self.after is not None:
            self.after.update(logits[None] / self.temperature, labels[None], ignore)

    def add_image(self, image: Self) -> None:
        """Add an image that `image` has seen block by block."""
        if image.not_finite:
            self.not_finite += 1
        else:
            self.merge(image)

    def merge(self, other: Self) -> None:
        """Add the counts of another one of the same temperature."""
        self.before.merge(other.before)
        if self.after is not None and other.after is not None:
            self.after.merge(other.after)
        self.not_finite += other.not_finite

    def to_json(self, absent: str) -> dict[str, Any]:
        """Expected calibration error, Brier score and reliability curve, before and (None without a temperature) after scaling."""
        return {
            "temperature": self.temperature,
            "before": calibration_json(self.before),
            "after": None if self.after is None else calibration_json(self.after),
            "images_not_finite": self.not_finite,
        }


class Neurites:
    """Scores of cells or neurites in a set of two classes: the inside and what parts them. Segments are 4-connected parts of the inside.

    They are of the most probable class, and, as the boards of the EM challenge have them, the best over thresholds of the probability of
    the inside. A pixel without truth is outside in both.
    """

    def __init__(self, classes: Sequence[str], inside: int) -> None:
        from perpixel.metrics.segments import Objects, Segments
        from perpixel.metrics.thresholds import Board
        from perpixel.metrics.warping import Warping

        if len(classes) != 2:
            raise ValueError(
                f"neurite scores need two classes, the inside and what parts it; there are {len(classes)}: {', '.join(classes)}"
            )
        self.inside, self.name = inside, classes[inside]
        self.segments, self.objects, self.warping, self.board = Segments(), Objects(), Warping(), Board()

    def update(self, seen: Scored, labels: np.ndarray, predicted: np.ndarray) -> None:
        """Add one image."""
        from perpixel.metrics.segments import segments_of

        truth, known = labels == self.inside, labels != seen.ignore
        guess = (predicted == self.inside) & known
        true_segments, segments = segments_of(truth), segments_of(guess)
        self.segments.update(true_segments, segments)
        self.objects.update(true_segments, segments)
        self.warping.update(truth, guess, known)
        # Where scores overflowed nothing is inside.
        probability = seen.logits.softmax(0)[self.inside].nan_to_num(0.0).clamp(0, 1)
        self.board.update(truth, probability, known)

    def merge(self, other: Self) -> None:
        """Append the images of another one."""
        self.segments.merge(other.segments)
        self.objects.merge(other.objects)
        self.warping.merge(other.warping)
        self.board.merge(other.board)

    def to_json(self, absent: str) -> dict[str, Any]:
        """Every score, with the name of the class that is inside."""
        f1 = zip(self.objects.thresholds, self.objects.f1.tolist(), strict=True)
        return {
            "inside": self.name,
            "pixel_error": plain(self.warping.pixel_error),
            "warping_error": plain(self.warping.warping_error),
            **{name: plain(value) for name, value in self.segments.means().items()},
            "seg": plain(self.objects.seg),
            "f1": {f"{threshold:g}": plain(value) for threshold, value in f1},
            "board": {
                "thresholds": list(self.board.thresholds),
                **{name: plain(curve) for name, curve in self.board.curves().items()},
                "best": {name: {"value": plain(value), "threshold": plain(at)} for name, (value, at) in self.board.best().items()},
            },
        }

    def tables(self) -> dict[str, np.ndarray]:
        """What each score is computed from, of the most probable class and on the board."""
        objects = self.objects.images.table[:, :3]  # true, predicted, pairs at IoU 0.5
        return {
            "flips": self.warping.images.table,
            "segments": values_table(self.segments.table[:, [0, 1, 4]]),
            "objects": np.concatenate([objects, np.reshape(self.objects.overlaps, (-1, 1))], 1),
            "board_pairs": self.board.pairs.table,
            "board_insides": self.board.insides.table,
            "board_breaks": self.board.pixels.table,
            "board_thinned": values_table(self.board.thinned),
        }


GROUPS = ("cost", "boundary", "surface", "calibration", "neurite")
BLOCKWISE = ("cost", "calibration")  # those that large images, of which no part is held long, are counted in
DEFAULT_GROUPS = ("cost", "boundary", "calibration")  # surface distances cost more time than the network on many classes


class Scores:
    """The groups of scores that were asked for; an observer of `evaluate.score`."""

    def __init__(self, groups: Sequence[str], classes: Sequence[str], temperature: float = 1.0, inside: str | None = None) -> None:
        """`inside` names the class of neurite scores that is inside; None: the last class.

        Raises:
            ValueError: an unknown group or class, or neurite scores of other than two classes.
        """
        if unknown := [name for name in groups if name not in GROUPS]:
            raise ValueError(f"unknown scores {unknown[0]!r}. Known: region (always there), {', '.join(GROUPS)}")
        if inside is not None and inside not in classes:
            raise ValueError(f"there is no class {inside!r} to be inside; the classes are {', '.join(classes)}")
        place = len(classes) - 1 if inside is None else list(classes).index(inside)
        makers: dict[str, Callable[[], Group]] = {
            "cost": lambda: CostShares(len(classes)),
            "boundary": lambda: Boundaries(len(classes)),
            "surface": lambda: Surfaces(len(classes)),
            "calibration": lambda: Reliability(temperature),
            "neurite": lambda: Neurites(classes, place),
        }
        self.groups: dict[str, Group] = {name: makers[name]() for name in GROUPS if name in groups}
        self.seen_whole: list[bool] = []  # of each image; only those that were are in the groups' tables

    def __call__(self, seen: Scored) -> None:
        """Add one image to every group."""
        self.seen_whole.append(True)
        if self.groups:
            labels, predicted = seen.labels.cpu().numpy(), seen.logits.argmax(0).cpu().numpy()
            for group in self.groups.values():
                group.update(seen, labels, predicted)

    def skip_image(self) -> None:
        """Note an image that was scored block by block: it counts in no table, which stay in step with those of the region."""
        self.seen_whole.append(False)

    def merge(self, other: "Scores") -> None:
        """Add what another process gathered of the same groups."""
        self.seen_whole += other.seen_whole
        for name, group in self.groups.items():
            group.merge(other.groups[name])

    def to_json(self, absent: str = "union") -> dict[str, Any]:
        """Group -> its scores in plain types; where the cost lies under "cost_shares", because "cost" is the cost itself."""
        return {"cost_shares" if name == "cost" else name: group.to_json(absent) for name, group in self.groups.items()}

    def tables(self) -> dict[str, np.ndarray]:
        """Name -> (N, *shape) of what is kept of each image, as `metrics.measures` knows it; 0 for images that were not seen whole."""
        found = {}
        for name, rows in self._rows().items():
            found[name] = np.zeros((len(self.seen_whole), *rows.shape[1:]), rows.dtype)
            found[name][self.seen_whole] = rows
        return found

    def intervals(self, absent: str = "union") -> dict[str, Interval]:
        """Score -> its interval over the images, of the groups that keep counts of each image."""
        rows = self._rows()
        return {name: measure.interval(rows[measure.table], absent) for name, measure in MEASURES.items() if measure.table in rows}

    def _rows(self) -> dict[str, np.ndarray]:
        found: dict[str, np.ndarray] = {}
        for group in self.groups.values():
            if isinstance(group, Boundaries | Surfaces | Neurites):
                found |= group.tables()
        return found


def parse_groups(text: str) -> tuple[str, ...]:
    """Groups from "boundary,calibration"; "region" is always there and stands for none, "all" for all but neurite."""
    names = [name.strip() for name in text.split(",") if name.strip()]
    if "all" in names:
        names += [name for name in GROUPS if name != "neurite"]
    return tuple(dict.fromkeys(name for name in names if name not in ("all", "region")))


def calibration_json(found: Calibration) -> dict[str, Any]:
    """Error, Brier score and reliability curve in plain types."""
    confidence, accuracy = found.curve
    curve = {"confidence": plain(confidence), "accuracy": plain(accuracy), "pixels": found.counts[:, 0].tolist()}
    return {"ece": plain(found.error), "brier": plain(found.brier), "reliability": curve}


def plain(value: Any) -> Any:
    """A float or an array as plain JSON types, None where a number is not finite."""
    if isinstance(value, np.ndarray) and value.ndim:
        return [plain(item) for item in value]
    return float(value) if math.isfinite(value) else None
