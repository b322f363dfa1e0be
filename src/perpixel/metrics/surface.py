"""Distances between true and predicted surfaces of each class: the mean (ASSD) and the 95th percentile (Hausdorff).

Source of the definitions: Maier-Hein et al. 2024 (Nature Methods 21, "Metrics reloaded"): average symmetric surface
distance, and the larger of the two directed percentiles.
"""

from collections.abc import Sequence

import numpy as np
from scipy.spatial import KDTree
from torch import Tensor

from perpixel.metrics.pairs import VOID, filled, labelled_pair


class SurfaceDistance:
    """Streaming surface distances of K classes, image by image.

    The surface of a class has its pixels with one of the four neighbours not of the class, or outside the image; its points are the
    pixels' centres. ASSD is the sum of all distances from each surface to the nearest point of the other, by their number; the Hausdorff
    distance is the larger of the two directed percentiles (linear between ranks), 100 giving the classic maximum. A pixel without truth
    is in both what the nearest pixel with truth is (`pairs.filled`).

    There is no distance where a class is in one of the two only: such images are counted in `missed` (truth alone) and `invented`
    (prediction alone), (K,) int64 each, and must be reported beside the means, which leave them out.
    """

    def __init__(self, classes: int, percentile: float = 95.0, spacing: Sequence[float] = (1.0, 1.0)) -> None:
        """`spacing` is the (height, width) of a pixel in the unit the distances shall have; default pixels."""
        if classes < 1:
            raise ValueError(f"classes is {classes}; a score needs at least 1")
        if not 0 < percentile <= 100:
            raise ValueError(f"percentile is {percentile}; it must be above 0 and at most 100")
        if len(spacing) != 2 or min(spacing) <= 0:
            raise ValueError(f"spacing is {tuple(spacing)}; give the (height, width) of a pixel, both above 0")
        self.classes = classes
        self.percentile = percentile
        self.spacing = tuple(spacing)
        self.missed = np.zeros(classes, np.int64)
        self.invented = np.zeros(classes, np.int64)
        self.names: list[str] = []
        self._rows: list[np.ndarray] = []

    def update(self, labels: Tensor | np.ndarray, predicted: Tensor | np.ndarray, ignore: int = 255, name: str = "") -> None:
        """Add one image, (H, W) each; errors as in `labelled_pair`."""
        truth, guess = labelled_pair(labels, predicted, self.classes, ignore)
        row = np.full((self.classes, 2), np.nan)
        true, drawn = (_surfaces(values, self.spacing) for values in filled(truth, guess))
        for k in true.keys() | drawn.keys():
            if k not in drawn:
                self.missed[k] += 1
            elif k not in true:
                self.invented[k] += 1
            else:
                there, back = KDTree(drawn[k]).query(true[k])[0], KDTree(true[k]).query(drawn[k])[0]
                row[k, 0] = (there.sum() + back.sum()) / (len(there) + len(back))
                row[k, 1] = max(np.percentile(there, self.percentile), np.percentile(back, self.percentile))
        self.names.append(name)
        self._rows.append(row)

    def merge(self, other: "SurfaceDistance") -> None:
        """Append the images of another score of the same settings."""
        if (other.classes, other.percentile, other.spacing) != (self.classes, self.percentile, self.spacing):
            raise ValueError("cannot merge surface distances of different classes, percentiles or spacings")
        self.missed += other.missed
        self.invented += other.invented
        self.names += other.names
        self._rows += other._rows

    @property
    def table(self) -> np.ndarray:
        """(N, K, 2) ASSD and Hausdorff distance of each image and class; NaN where the class is not in both."""
        return np.stack(self._rows) if self._rows else np.zeros((0, self.classes, 2))

    @property
    def assd(self) -> np.ndarray:
        """(K,) mean ASSD over the images with the class in both; NaN where there is none."""
        return self._means()[:, 0]

    @property
    def hausdorff(self) -> np.ndarray:
        """(K,) mean Hausdorff distance over the images with the class in both; NaN where there is none."""
        return self._means()[:, 1]

    def _means(self) -> np.ndarray:
        counts = (~np.isnan(self.table)).sum(0)
        return np.where(counts > 0, np.nansum(self.table, 0) / np.maximum(counts, 1), np.nan)


def _surfaces(labels: np.ndarray, spacing: tuple[float, ...]) -> dict[int, np.ndarray]:
    """Class -> (n, 2) places of its surface pixels, for the classes that occur."""
    framed = np.pad(labels, 1, constant_values=VOID)
    inner = framed[1:-1, 1:-1]
    edge = np.zeros(labels.shape, bool)
    for neighbour in (framed[:-2, 1:-1], framed[2:, 1:-1], framed[1:-1, :-2], framed[1:-1, 2:]):
        edge |= neighbour != inner
    edge &= inner != VOID
    rows, columns = np.nonzero(edge)
    found = labels[rows, columns]
    order = np.argsort(found, kind="stable")
    places = (np.stack([rows, columns], 1) * np.array(spacing))[order]
    present, starts = np.unique(found[order], return_index=True)
    return dict(zip(present.tolist(), np.split(places, starts[1:]), strict=True)) if len(present) else {}
