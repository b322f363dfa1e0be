"""What refiners gain on real scores, strong and weak, with Potts and learned label costs; writes benchmarks/results/refinement-SET.json.

python benchmarks/refinement.py SET IMAGES STRONG WEAK [--minutes M] [--pictures FOLDER]

STRONG and WEAK are bundles.

For each bundle and each refiner the options are searched on the validation images as `perpixel tune` does, for M minutes with Potts' costs
and for as many with learned ones in every candidate; then every image is scored with what was best on the other half. Trimap scores are
accuracies in a band of so many pixels around every change of label.
"""

import argparse
import itertools
import json
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from record import write

from perpixel.bundle import load_bundle
from perpixel.data.dataset import LabelledImages
from perpixel.data.display import overlay
from perpixel.data.layouts import find_layout
from perpixel.data.writing import write_rgb
from perpixel.metrics import tallies
from perpixel.metrics.bands import Trimap
from perpixel.metrics.intervals import difference
from perpixel.metrics.region import Region
from perpixel.refinement.candidates import SEARCHED, Candidate
from perpixel.search import MeanIou, Search, learned_costs

WIDTHS = (1, 2, 3, 5, 10, 15, 20, 30, 40)


def scores(search: Search, by_image: list[Candidate | None]) -> tuple[dict[str, Any], np.ndarray]:
    """Scores of the set where each image is refined by its own candidate, and the tallies of the images."""
    region, trimap = Region(search.classes), Trimap(search.classes, WIDTHS)
    for index, candidate in enumerate(by_image):
        for _, labels, predicted in search.labelled(candidate, [index]):
            region.update(labels, predicted, ignore=search.ignore, name=str(index))
            trimap.update(labels, predicted, ignore=search.ignore)
    tally = region.images.total
    row = {
        "global": float(tallies.pixel_accuracy(tally)),
        "average": float(tallies.mean_accuracy(tally)),
        "miou": float(search.aim.score(tally)),
        "trimap": {str(width): float(tallies.pixel_accuracy(counts)) for width, counts in zip(WIDTHS, trimap.counts, strict=True)},
    }
    return row, region.images.table


def cross_fitted(search: Search, entries: list[tuple[Candidate, np.ndarray]]) -> list[Candidate | None]:
    """For each image, the candidate that is best on the other half."""
    chosen: list[Candidate | None] = [None] * len(search.scores)
    for fold, (winner, _) in zip(search.folds, search.cross_fitted(entries), strict=True):
        for index in np.flatnonzero(fold):
            chosen[index] = winner
    return chosen


def main() -> None:
    """Both bundles, every refiner, with and without learned costs."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("set")
    parser.add_argument("images", type=Path)
    parser.add_argument("strong", type=Path)
    parser.add_argument("weak", type=Path)
    parser.add_argument("--minutes", type=float, default=2.0, help="for each refiner on each bundle")
    parser.add_argument("--pictures", type=Path, help="folder for image, truth, scores before and after")
    given = parser.parse_args()
    result: dict[str, Any] = {"set": given.set, "minutes_per_refiner": given.minutes, "rows": []}
    for unary, path in (("strong", given.strong), ("weak", given.weak)):
        bundle = load_bundle(path)
        card = bundle.card
        train, val = (find_layout(given.images).labelled(part, card.val_fraction, card.split_seed) for part in ("train", "val"))
        data = LabelledImages(val, bundle.label_map, card.bands, card.dtype, cache=False)
        search = Search(bundle, data, float("inf"), None, MeanIou(len(card.classes)))
        costs = learned_costs([pair.mask for pair in train if pair.mask], bundle.label_map, len(card.classes))
        plain, base = scores(search, [None] * len(search.scores))
        result["rows"].append({"unary": unary, "model": card.model, "refiner": "none", "images": len(search.scores), **plain})
        for name, learned in itertools.product(SEARCHED, (False, True)):
            search.forget()
            until = time.monotonic() + 60 * given.minutes
            search.explore(name, costs if learned else None, until, only_learned=learned)
            entries = list(search.tables.values())
            by_image = cross_fitted(search, entries)
            row, table = scores(search, by_image)
            gain = difference(base, table, search.aim.score)
            best = search.best(entries, np.ones(len(search.scores), bool))[0]
            shown = {key: value for key, value in best.options.items() if key != "compatibility"}
            extra = {"refiner": name, "label_costs": "learned" if learned else "Potts", "candidates": len(entries), "options": shown}
            interval = [float(gain.value), float(gain.low), float(gain.high)]
            result["rows"].append({"unary": unary, "model": card.model, **extra, **row, "miou_gain": interval})
            sys.stdout.write(json.dumps(result["rows"][-1]) + "\n")
            sys.stdout.flush()
            if given.pictures and not learned:
                draw(search, by_image, card.colors, given.pictures, f"{unary}-{name}")
    write(f"refinement-{given.set}", result, ("torch", "numba", "scipy"))


def draw(search: Search, by_image: list[Candidate | None], colors: list[tuple[int, int, int]], folder: Path, name: str) -> None:
    """The image, its truth, and its labels before and after, of the three images whose labels change most."""
    changed = []
    for index, candidate in enumerate(by_image):
        ((_, labels, before),) = search.labelled(None, [index])
        ((_, _, after),) = search.labelled(candidate, [index])
        changed.append((int((before != after).sum()), index, labels, before, after))
    for _, index, labels, before, after in sorted(changed, key=lambda entry: -entry[0])[:3]:
        image = search.scores[index][1][0].numpy()
        parts = [overlay(image, part.numpy().astype(np.uint8), colors, ignore=search.ignore) for part in (labels, before, after)]
        write_rgb(folder / f"{name}-{index}.jpg", np.hstack([np.moveaxis(image, 0, -1), *parts]))


if __name__ == "__main__":
    torch.set_grad_enabled(False)
    main()
