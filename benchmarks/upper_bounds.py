"""How well a net could do whose scores are 1/128 to 1/4 as fine as the image; writes benchmarks/results/upper-bounds.json.

python benchmarks/upper_bounds.py [--data FOLDER]

The truth of the validation part of each set is made coarser and enlarged again, and scored: no training. Source: Long et al. 2015,
arXiv:1411.4038v1, appendix A, whose figures are for Pascal VOC. Two ways: "nearest" takes the label in the middle of each cell for all of
it; "bilinear" takes the share of each class in the cell, interpolates the shares and then the likeliest class, as a net that upsamples.
"""

import argparse
from pathlib import Path

import torch
from record import write
from torch import Tensor
from torch.nn import functional

from perpixel.check import check
from perpixel.data.masks import read_mask
from perpixel.metrics import Confusion

FACTORS = (128, 64, 32, 16, 8, 4)
PAPER = dict(zip(FACTORS, (50.9, 73.3, 86.1, 92.8, 96.4, 98.5), strict=True))  # percent, Pascal VOC


def nearest(labels: Tensor, factor: int) -> Tensor:
    """Labels (H, W), each cell of `factor` x `factor` pixels with the label in its middle."""
    rows, columns = ((torch.arange(side) // factor * factor + factor // 2).clamp(max=side - 1) for side in labels.shape)
    return labels[rows[:, None], columns]


def bilinear(labels: Tensor, factor: int, classes: int) -> Tensor:
    """Labels (H, W) from the share of each class in cells of `factor` x `factor` pixels, interpolated to full size."""
    height, width = labels.shape
    known = torch.stack([labels == index for index in range(classes)])[None].float()
    shares = functional.avg_pool2d(known, factor, ceil_mode=True, count_include_pad=False)
    return functional.interpolate(shares, scale_factor=factor, mode="bilinear")[0, :, :height, :width].argmax(0)


def bounds(images: Path) -> dict[str, dict[str, float]]:
    """Way -> factor -> mean IoU over the validation part, in percent."""
    report = check(images)
    classes = len(report.classes)
    ways = {"nearest": nearest, "bilinear": lambda labels, factor: bilinear(labels, factor, classes)}
    tallies = {(way, factor): Confusion(classes) for way in ways for factor in FACTORS}
    for pair in report.split("val"):
        labels = torch.from_numpy(report.label_map(read_mask(pair.mask), str(pair.mask))).long()
        for (way, factor), tally in tallies.items():
            coarse = ways[way](labels, factor)
            # A void pixel in the middle of a cell says nothing of its other pixels, so they do not count.
            tally.update(labels.masked_fill(coarse >= classes, report.label_map.ignore), coarse.clamp(max=classes - 1))
    return {way: {str(factor): round(100 * tallies[way, factor].miou, 1) for factor in FACTORS} for way in ways}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=Path("../shared/data"))
    given = parser.parse_args()
    sets = {name: bounds(given.data / name) for name in ("camvid", "msrc21")}
    write("upper-bounds", {"paper_pascal_voc": {str(factor): value for factor, value in PAPER.items()}, "sets": sets})


if __name__ == "__main__":
    main()
