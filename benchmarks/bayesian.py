"""Bayesian SegNet: accuracy against Monte Carlo samples, uncertainty against error; writes benchmarks/results/bayesian-camvid.json.

python benchmarks/bayesian.py --data FOLDER [--steps 300] [--images 40] [--samples 1 2 4 8 16 32] [--runs FOLDER]

Kendall et al. 2015, arXiv:1511.02680: the mean of samples with dropout beats "weight averaging" (dropout off) from about 6 samples on,
gains little after 40, and pixels that the samples agree about are labelled better. FOLDER holds camvid; the net is Bayesian SegNet-Basic,
narrow and from scratch on camvid at half its size, as SegNet's rows in papers.py, so that two cores can do it. Scores are those of evenly
spread images of the validation part; the gain over dropout off has its 95 % interval over them.
"""

import argparse
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
from record import write

from papers import NARROW_WIDTH, halved_camvid, narrow_segnet, settings
from perpixel.check import check
from perpixel.data.images import read_image
from perpixel.data.masks import read_mask
from perpixel.metrics import tallies
from perpixel.metrics.intervals import difference
from perpixel.metrics.region import Region
from perpixel.predict import load

CERTAIN = (10, 25, 50, 75, 90, 100)  # percent of the pixels, the most certain first


def trained(images: Path, run: Path, steps: int) -> Path:
    """The bundle of the command that a person would type; a run that is there goes on, or changes nothing."""
    words = [sys.executable, "-m", "perpixel", "train", str(images), "-o", str(run), "--steps", str(steps), "--resume"]
    words += narrow_segnet("bayesian_segnet_basic_paper")
    words += settings("train.class_weights=median_frequency", "train.report=false", "train.validations=3")
    subprocess.run(words, check=True)
    return run / "best.safetensors"


def measured(bundle: Path, images: Path, count: int, samples: list[int]) -> dict[str, Any]:
    """Rows by number of samples, 0 being dropout off; and accuracy of the most certain pixels."""
    segmenter, report = load(bundle), check(images)
    classes, ignore = len(report.classes), report.label_map.ignore
    pairs = [pair for pair in report.pairs if pair.split == "val"]
    chosen = [pairs[round(place)] for place in np.linspace(0, len(pairs) - 1, count)]
    regions = {number: Region(classes) for number in (0, *samples)}
    certainty: dict[str, list[np.ndarray]] = {"low variance of the samples": [], "low entropy of their mean": []}
    right: list[np.ndarray] = []
    for pair in chosen:
        assert pair.mask is not None  # of a set whose every image has one
        image = read_image(pair.image).transpose(1, 2, 0)
        labels = report.label_map(read_mask(pair.mask), str(pair.mask))
        regions[0].update(labels, segmenter.predict(image), ignore=ignore, name=pair.image.name)
        total = squares = np.zeros(1)
        for number in range(1, max(samples) + 1):
            drawn = segmenter.monte_carlo(image, 1, seed=number).mean.numpy()
            total, squares = total + drawn, squares + drawn**2
            if number in samples:
                regions[number].update(labels, total.argmax(0), ignore=ignore, name=pair.image.name)
        known = labels != ignore
        mean = total / max(samples)
        doubts = (squares / max(samples) - mean**2).mean(0), -(mean * np.log(np.maximum(mean, 1e-12))).sum(0)
        for values, doubt in zip(certainty.values(), doubts, strict=True):
            values.append(-doubt[known])
        right.append((total.argmax(0) == labels)[known])
    correct = np.concatenate(right)
    return {
        "images": len(chosen),
        "rows": {str(key): row_of(region, regions[0]) for key, region in regions.items()},
        "certain": {name: accuracies(correct, np.concatenate(values)) for name, values in certainty.items()},
    }


def accuracies(correct: np.ndarray, certainty: np.ndarray) -> dict[str, float]:
    """Share of the pixels that are right, among each share of the most certain ones."""
    ordered = correct[np.argsort(-certainty, kind="stable")]
    return {str(share): round(float(ordered[: max(1, len(ordered) * share // 100)].mean()), 4) for share in CERTAIN}


def row_of(region: Region, off: Region) -> dict[str, Any]:
    """Scores of the set, and the gain in mIoU over dropout off with its interval."""
    tally = region.images.total
    gain = difference(off.images.table, region.images.table, lambda sums: tallies.miou(sums, "truth"))
    scores = {"global": tallies.pixel_accuracy(tally), "average": tallies.mean_accuracy(tally), "miou": tallies.miou(tally, "truth")}
    return {
        **{key: round(float(value), 4) for key, value in scores.items()},
        "gain": [round(float(v), 4) for v in (gain.value, gain.low, gain.high)],
    }


def main() -> None:
    """Train, sample, write the file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=Path("../shared/data"))
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--images", type=int, default=40)
    parser.add_argument("--samples", type=int, nargs="+", default=[1, 2, 4, 8, 16, 32])
    parser.add_argument("--runs", type=Path, help="where run and images stay; a temporary folder without it")
    given = parser.parse_args()
    runs = given.runs or Path(tempfile.mkdtemp())
    images = halved_camvid(given.data, runs / "camvid-half")
    bundle = trained(images, runs / f"bayesian {given.steps}".replace(" ", "-"), given.steps)
    write("bayesian-camvid", {"steps": given.steps, "width": NARROW_WIDTH, **measured(bundle, images, given.images, given.samples)})


if __name__ == "__main__":
    main()
