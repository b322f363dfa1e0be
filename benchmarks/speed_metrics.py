"""Our scores against the same scores of torchmetrics and scipy; writes benchmarks/results/speed-metrics.json.

OMP_NUM_THREADS=1 python benchmarks/speed_metrics.py [--repeats 15] [--only WORD ...]

Both sides see the same maps, made by a rule from a seed, in turns, on one thread; both results must agree before anything is timed. The
time is the processor's, which other work hardly touches, and the ratio the median over the pairs of calls of our time by theirs. Where no
peer has the score, our own time alone is measured against its limit. Compilation by numba is not in the times: it happens once per machine.
"""

import argparse
import json
import math
import platform
import statistics
import sys
import time
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from scipy import ndimage
from torchmetrics.classification import MulticlassConfusionMatrix

from perpixel.metrics import Confusion
from perpixel.metrics.bands import BoundaryIoU, Trimap
from perpixel.metrics.boundary import BoundaryF
from perpixel.metrics.intervals import difference
from perpixel.metrics.pairs import filled, labelled_pair
from perpixel.metrics.segments import Segments, segments_of
from perpixel.metrics.surface import SurfaceDistance
from perpixel.metrics.tallies import iou, miou
from perpixel.metrics.warping import Warping
from perpixel.plan import this_machine

RESULTS = Path(__file__).parent / "results"
Call = Callable[[], Any]


def label_maps(size: tuple[int, int], classes: int, smoothness: float, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Truth with 2 % void, and prediction, uint8: regions of about `smoothness` pixels, some of them moved or changed in the prediction."""
    random = np.random.default_rng(seed)

    def fields() -> np.ndarray:
        return np.stack([ndimage.gaussian_filter(random.standard_normal(size, np.float32), smoothness) for _ in range(classes)])

    true = fields()
    labels, predicted = true.argmax(0).astype(np.uint8), (true + 0.3 * fields()).argmax(0).astype(np.uint8)
    void = ndimage.gaussian_filter(random.standard_normal(size, np.float32), smoothness)
    labels[void > np.quantile(void, 0.98)] = 255
    return labels, predicted


def membranes(size: tuple[int, int]) -> tuple[np.ndarray, np.ndarray]:
    """Insides of cells, true and predicted with a shift, gaps and specks."""
    random = np.random.default_rng(0)
    cells = ndimage.gaussian_filter(random.standard_normal((12, *size)), (0, 9, 9)).argmax(0)
    inside = ndimage.morphological_gradient(cells, 3) == 0
    return inside, np.roll(inside, 2, 1) ^ (random.random(size) < 0.02)


def region() -> tuple[Call, Call]:
    """Confusion matrix of a street scene of 19 classes; ours counts uint8 truth and int64 prediction, theirs int64 both."""
    labels, predicted = label_maps((1024, 2048), 19, 20)
    truth, guess = torch.from_numpy(labels), torch.from_numpy(predicted).long()
    wide = truth.long()

    def ours() -> torch.Tensor:
        matrix = Confusion(19)
        matrix.update(truth, guess)
        return matrix.counts

    def theirs() -> torch.Tensor:
        matrix = MulticlassConfusionMatrix(19, ignore_index=255)
        matrix.update(guess, wide)
        return matrix.compute()

    return ours, theirs


def boundary_iou() -> tuple[Call, Call]:
    """Boundary IoU of 11 classes; theirs erodes each class's mask as often as the band is wide, by scipy, of maps whose void is filled."""
    labels, predicted = label_maps((360, 480), 11, 12)
    known, filled_pair = labels != 255, filled(*labelled_pair(labels, predicted, 11))
    depth, square = max(1, round(0.02 * math.hypot(*labels.shape))), np.ones((3, 3), bool)

    def ours() -> np.ndarray:
        score = BoundaryIoU(11)
        score.update(labels, predicted)
        return score.images.total

    def theirs() -> np.ndarray:
        counts = np.zeros((11, 3), np.int64)
        for k in range(11):
            masks = (np.pad(values == k, 1) for values in filled_pair)
            bands = (mask & ~ndimage.binary_erosion(mask, square, depth) for mask in masks)
            true, drawn = (band[1:-1, 1:-1] & known for band in bands)
            counts[k] = (true & drawn).sum(), true.sum(), drawn.sum()
        return counts

    return ours, theirs


def alone(make: Callable[[], Any], pair: tuple[np.ndarray, np.ndarray]) -> tuple[Call, None]:
    """A score that sees one pair of maps; no peer has it."""
    return lambda: make().update(*pair), None


def bootstrap() -> tuple[Call, None]:
    """1,000 paired resamples of 10,000 images of 21 classes, for mIoU and each class's IoU."""
    random = np.random.default_rng(0)
    truth = random.integers(0, 5000, (10_000, 21))
    first, second = (np.stack([random.binomial(truth, p), truth, truth], -1) for p in (0.80, 0.81))
    return lambda: (difference(first, second, miou), difference(first, second, iou)), None


# Name -> (what makes the calls, largest ratio to the peer, most milliseconds); None where no limit was set.
COMPARISONS: dict[str, tuple[Callable[[], tuple[Call, Call | None]], float | None, float | None]] = {
    "confusion matrix, 1024x2048, 19 classes, torchmetrics": (region, 1 / 5, 10),
    "Boundary IoU, 360x480, 11 classes, erosion by scipy": (boundary_iou, 1 / 5, None),
    "warping error, 512x512": (lambda: alone(Warping, membranes((512, 512))), None, 2000),
    "Rand and information, 512x512": (
        lambda: alone(Segments, tuple(segments_of(inside) for inside in membranes((512, 512)))),  # type: ignore[arg-type]
        None,
        None,
    ),
    "BF score, 360x480, 11 classes": (lambda: alone(lambda: BoundaryF(11), label_maps((360, 480), 11, 12)), None, None),
    "trimap of 40 widths, 360x480, 11 classes": (lambda: alone(lambda: Trimap(11), label_maps((360, 480), 11, 12)), None, None),
    "surface distances, 360x480, 11 classes": (lambda: alone(lambda: SurfaceDistance(11), label_maps((360, 480), 11, 12)), None, None),
    "bootstrap, 10,000 images, 21 classes": (bootstrap, None, None),
}


def seconds(call: Call) -> float:
    """Of the processor."""
    start = time.process_time()
    call()
    return time.process_time() - start


def compare(name: str, repeats: int) -> dict[str, Any]:
    """One row of the file; ValueError where the two results differ."""
    make, ratio_limit, limit = COMPARISONS[name]
    ours, theirs = make()
    result = ours()
    ours_times, theirs_times = [], []
    if theirs is not None and not np.array_equal(np.asarray(result), np.asarray(theirs())):
        raise ValueError(f"{name}: the results differ; the times would say nothing")
    for number in range(repeats):
        for turn in ("ours", "theirs") if number % 2 else ("theirs", "ours"):
            if turn == "ours":
                ours_times.append(seconds(ours))
            elif theirs is not None:
                theirs_times.append(seconds(theirs))
    row: dict[str, Any] = {"name": name, "ours_ms": round(1000 * statistics.median(ours_times), 2), "runs": repeats}
    if theirs is not None:
        ratios = [a / b for a, b in zip(ours_times, theirs_times, strict=True)]
        row |= {"theirs_ms": round(1000 * statistics.median(theirs_times), 2), "ratio": round(statistics.median(ratios), 4)}
    row |= {"ratio_limit": ratio_limit, "limit_ms": limit}
    row["kept"] = row.get("ratio", 0) <= (ratio_limit or math.inf) and row["ours_ms"] <= (limit or math.inf)
    return row


def main() -> None:
    """Run every comparison, and write the file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--only", nargs="+", default=[], metavar="WORD", help="comparisons whose name has one of these; writes no file")
    given = parser.parse_args()
    torch.set_num_threads(1)
    rows = []
    for name in COMPARISONS:
        if not given.only or any(word in name for word in given.only):
            rows.append(compare(name, given.repeats))
            sys.stdout.write(json.dumps(rows[-1]) + "\n")
            sys.stdout.flush()
    if not given.only:
        names = ("torch", "torchmetrics", "scipy", "numpy", "numba", "perpixel")
        result = {
            "command": f"OMP_NUM_THREADS=1 python benchmarks/speed_metrics.py {' '.join(sys.argv[1:])}".strip(),
            "machine": this_machine().words,
            "threads": 1,
            "clock": "processor",
            "versions": {"python": platform.python_version(), **{name: version(name) for name in names}},
            "rows": rows,
        }
        RESULTS.mkdir(exist_ok=True)
        (RESULTS / "speed-metrics.json").write_text(json.dumps(result, indent=1) + "\n")
    slow = [row["name"] for row in rows if not row["kept"]]
    if slow:
        sys.exit(f"slower than their limits: {', '.join(slow)}")


if __name__ == "__main__":
    main()
