"""U-Net from few images: 5-fold cross-validation on ISBI 2012's 30 slices; writes benchmarks/results/unet-isbi2012-WIDTH-STEPS.json.

python benchmarks/unet_isbi.py --data FOLDER [--steps N] [--width 8 | --weights FILE] [--folds 0 1 2 3 4] [--rows NAME ...] [--runs FOLDER]

FOLDER holds isbi2012. A fold keeps six neighbouring slices apart, chooses nothing on them but the best of three validations and the
temperature, and every slice is scored once, by the net that has not seen it. Each row changes one thing in what `perpixel train` plans for
such images (paper: Ronneberger et al. 2015, arXiv:1505.04597): elastic deformation, border weights, dropout, number of slices; "rotations"
are the same nets with `--tta rotations,flips`, "watershed" with `--refine watershed`. "Fitted seed" is the one of SEEDS whose Rand error
is least on the slices of the other folds, as their own nets predict them, which were trained on the slices that are scored, but chose
nothing by them; no temperature there. The differences have intervals over the slices, which are neighbours in one volume: they are too
narrow for other volumes. The board scored the best of ten thresholds of a probability map; so are these, thresholds chosen on all slices.
Where wrong pixels lie is told at the threshold of 0.5, beside the share of them on slices that the nets were trained on.

With --weights it is the general U-Net on the encoder that FILE is for, at full resolution; the encoder's own rate is a fifth of the others'
and its batch norm is trained, since photographs tell it little about electron micrographs.
"""

import argparse
import json
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import tifffile
from PIL import Image
from record import write
from scipy import ndimage

from perpixel.metrics.intervals import values_table
from perpixel.metrics.measures import MEASURES
from perpixel.metrics.thresholds import Board
from perpixel.predict import load
from perpixel.refine import refine
from perpixel.refinement import Watershed

SLICES, FOLDS = 30, 5
# Row -> settings beside the common ones, slices to train on.
ROWS: dict[str, tuple[list[str], int]] = {
    "as planned": ([], 24),
    "no elastic deformation": (["train.augment.elastic_sigma=0"], 24),
    "border weights": (["train.border_weights=true"], 24),
    "dropout": (["model.options.dropout=0.2"], 24),
    "10 slices": ([], 10),
    "5 slices": ([], 5),
    "2 slices": ([], 2),
    "1 slice": ([], 1),
}
VIEWS = "rotations,flips"
SEED = Watershed().seed
SEEDS = (0.8, 0.85, 0.9, 0.95, 0.97)
Seeds = Sequence[float | None]  # for a watershed to choose from; None: no watershed
# Row -> the row whose nets it predicts with, the views and the seeds.
OTHERWISE: dict[str, tuple[str, str, Seeds]] = {
    "rotations": ("as planned", VIEWS, (None,)),
    "watershed": ("as planned", "", (SEED,)),
    "rotations, watershed": ("as planned", VIEWS, (SEED,)),
    "rotations, watershed, fitted seed, no temperature": ("as planned", VIEWS, SEEDS),
    "border weights, rotations": ("border weights", VIEWS, (None,)),
}
NEAR = (1, 2)  # pixels from an edge of the truth
# Of the general U-Net: the plan, made for photographs, trains the encoder at a fiftieth of the rate and stops at stride 2.
ON_ENCODER = ("model.options.head_stride=1", "train.encoder_lr_scale=0.2", "train.freeze_batch_norm=false")
# The paper's on the hidden test slices (table 1), which is older than V_rand.
BOARD = {"warping_error": 0.000353, "rand_error": 0.0382, "pixel_error": 0.0611}


def parts_of(fold: int, slices: int) -> tuple[list[int], list[int]]:
    """The fold's six slices, and `slices` of the others, evenly spread, to train on."""
    apart = list(range(fold * SLICES // FOLDS, (fold + 1) * SLICES // FOLDS))
    others = [number for number in range(SLICES) if number not in apart]
    return apart, [others[round((place + 0.5) * len(others) / slices - 0.5)] for place in range(slices)]


def write_fold(data: Path, out: Path, fold: int, slices: int) -> None:
    """images/{train,val} and masks/{train,val} with the fold's slices as val."""
    images, masks = (tifffile.imread(data / "isbi2012" / f"train-{kind}.tif") for kind in ("volume", "labels"))
    apart, kept = parts_of(fold, slices)
    for part, numbers in (("train", kept), ("val", apart)):
        for kind, stack in (("images", images), ("masks", masks)):
            folder = out / kind / part
            folder.mkdir(parents=True, exist_ok=True)
            for number in numbers:
                Image.fromarray(stack[number]).save(folder / f"{number:02d}.png")


def trained(given: argparse.Namespace, name: str, fold: int, settings: Sequence[str], slices: int) -> Path:
    """The best bundle of a row's fold, by the command a person would type; a run that is there goes on, or is found to be finished."""
    run = given.runs / f"{name} {net_of(given)} {given.steps} crop {given.crop} fold {fold}".replace(" ", "-")
    with tempfile.TemporaryDirectory() as folder:
        write_fold(given.data, Path(folder), fold, slices)
        words = [sys.executable, "-m", "perpixel", "train", str(Path(folder) / "images"), str(Path(folder) / "masks"), "-o", str(run)]
        words += ["--classes", "membrane,cell", "--steps", str(given.steps), "--resume"]
        net = [f"model.encoder_weights={given.weights}", *ON_ENCODER] if given.weights else [f"model.options.width={given.width}"]
        for setting in [*net, f"train.crop=[{given.crop}, {given.crop}]", "train.validations=3", "train.report=false", *settings]:
            words += ["--set", setting]
        subprocess.run(words, check=True)
    return run / "best.safetensors"


def net_of(given: argparse.Namespace) -> str:
    """In names of files: the width of the paper's net, or the encoder of the general one."""
    return str(given.weights.stem if given.weights else given.width)


def predicted(bundle: Path, data: Path, fold: int, slices: int, views: str, calibrated: bool) -> dict[int, np.ndarray]:
    """(2, H, W) probabilities of the fold's slices, and of up to five that the net was trained on."""
    held, kept = parts_of(fold, slices)
    segmenter, images = load(bundle, refine="none", augment=views), tifffile.imread(data / "isbi2012" / "train-volume.tif")
    if not calibrated:
        segmenter.temperature = 1.0
    return {number: segmenter.probabilities(images[number]) for number in [*held, *kept[:: -(-len(kept) // 5)]]}


def divided(probabilities: np.ndarray, seed: float | None) -> np.ndarray:
    """As `--refine watershed` does it, with another seed; None leaves them as they are."""
    if seed is None:
        return probabilities
    return refine(np.zeros(probabilities.shape[1:], np.uint8), probabilities, "watershed", {"seed": seed}, kind="probabilities")


def scored(probabilities: Mapping[int, np.ndarray], data: Path, fold: int) -> tuple[Board, np.ndarray]:
    """The board's scores of the fold's slices, and (wrong, those of them NEAR an edge, pixels, wrong and pixels of others).

    The others are those that the net was trained on.
    """
    held, masks = parts_of(fold, 0)[0], tifffile.imread(data / "isbi2012" / "train-labels.tif")
    board, counts = Board(), np.zeros(4 + len(NEAR), np.int64)
    for number, (_, probability) in probabilities.items():
        inside = masks[number] > 0
        wrong = inside != (probability > 0.5)
        if number in held:
            board.update(masks[number], probability, name=str(number))
            distance = np.maximum(ndimage.distance_transform_edt(inside), ndimage.distance_transform_edt(~inside))
            counts[:-2] += [wrong.sum(), *((wrong & (distance <= near)).sum() for near in NEAR), wrong.size]
        else:
            counts[-2:] += [wrong.sum(), wrong.size]
    return board, counts


def fitted(boards: Mapping[float | None, Sequence[Board]], fold: int) -> float | None:
    """The seed whose Rand error is least on the slices of all folds but this place's."""
    errors = {}
    for seed, of_folds in boards.items():
        others = Board()
        for board in [*of_folds[:fold], *of_folds[fold + 1 :]]:
            others.merge(board)
        errors[seed] = others.best()["rand_error"][0]
    return min(errors, key=errors.__getitem__)


def divided_and_scored(
    given: argparse.Namespace, bundles: Sequence[Path], slices: int, views: str, seeds: Seeds
) -> tuple[Board, np.ndarray, list[float | None]]:
    """As `scored`, of all folds, and each fold's seed: the one there is, or the one that is `fitted`."""
    found: dict[float | None, list[tuple[Board, np.ndarray]]] = {seed: [] for seed in seeds}
    for bundle, fold in zip(bundles, given.folds, strict=True):
        plain = predicted(bundle, given.data, fold, slices, views, calibrated=len(seeds) == 1)
        for seed, of_folds in found.items():
            of_folds.append(scored({number: divided(each, seed) for number, each in plain.items()}, given.data, fold))
    boards = {seed: [board for board, _ in of_folds] for seed, of_folds in found.items()}
    chosen = [fitted(boards, place) for place in range(len(bundles))] if len(seeds) > 1 else list(seeds) * len(bundles)
    board, counts = Board(), np.zeros(4 + len(NEAR), np.int64)
    for place, seed in enumerate(chosen):
        board.merge(found[seed][place][0])
        counts += found[seed][place][1]
    return board, counts, chosen


def shares_of(counts: np.ndarray) -> dict[str, Any]:
    """See `scored`."""
    wrong, *near, pixels, seen_wrong, seen_pixels = counts.tolist()
    within = {str(reach): round(count / max(wrong, 1), 3) for reach, count in zip(NEAR, near, strict=True)}
    return {"wrong": round(wrong / pixels, 5), "of_them_near_an_edge": within, "wrong_where_trained": round(seen_wrong / seen_pixels, 5)}


def row_of(board: Board, first: Board) -> dict[str, Any]:
    """Scores at the best threshold over the slices and at that of labels, and the gain over the first row with its interval."""
    row: dict[str, Any] = {"slices": len(board.pairs.names)}
    labels = {name: round(float(curve[board.thresholds.index(0.5)]), 5) for name, curve in board.curves().items()}
    row["scores"] = {
        name: {"value": round(value, 5), "threshold": threshold, "of_labels": labels[name]}
        for name, (value, threshold) in board.best().items()
    }
    if board is not first:
        gains = {}
        for name in row["scores"]:
            measure = MEASURES[f"board_{name.removesuffix('_thinned')}"]
            found = measure.difference(*(tables_of(one)[measure.table] for one in (first, board)), "truth")
            gains[name] = [round(float(value), 5) for value in (found.value, found.low, found.high)]
        row["against_the_first_row"] = gains
    return row


def tables_of(board: Board) -> dict[str, np.ndarray]:
    """By slice, as the measures take them."""
    counts = {"board_pairs": board.pairs.table, "board_insides": board.insides.table, "board_breaks": board.pixels.table}
    return {**counts, "board_thinned": values_table(board.thinned)}


def main() -> None:
    """Train what is missing, score, write the file after each row."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=Path("../shared/data"))
    parser.add_argument("--steps", type=int, default=250)
    parser.add_argument("--width", type=int, default=8)
    parser.add_argument("--weights", type=Path, help="of an encoder; without them the paper's net of --width")
    parser.add_argument("--crop", type=int, default=192)
    parser.add_argument("--folds", type=int, nargs="+", default=list(range(FOLDS)))
    every = [*ROWS, *OTHERWISE]
    parser.add_argument("--rows", nargs="+", choices=every, default=every)
    parser.add_argument("--runs", type=Path, help="where the runs stay; a temporary folder without it")
    given = parser.parse_args()
    if fitting := [name for name in given.rows if len(OTHERWISE.get(name, ("", "", ()))[2]) > 1 and len(given.folds) == 1]:
        parser.error(f"'{fitting[0]}' chooses on other folds, and --folds is one; name other --rows")
    given.runs = given.runs or Path(tempfile.mkdtemp())
    rows: dict[str, dict[str, Any]] = {}
    bundles: dict[str, list[Path]] = {}
    first: Board | None = None
    for name in given.rows:
        nets, views, seeds = OTHERWISE.get(name, (name, "", (None,)))
        settings, slices = ROWS[nets]
        if nets not in bundles:
            bundles[nets] = [trained(given, nets, fold, settings, slices) for fold in given.folds]
        board, counts, chosen = divided_and_scored(given, bundles[nets], slices, views, seeds)
        first = board if first is None else first
        rows[name] = row_of(board, first) | {"pixels": shares_of(counts)} | ({} if None in chosen else {"seeds": chosen})
        net = {"encoder": given.weights.stem} if given.weights else {"width": given.width}
        content = {"steps": given.steps, **net, "crop": given.crop, "folds": given.folds, "board": BOARD, "rows": rows}
        write(f"unet-isbi2012-{net_of(given)}-{given.steps}", content)
        sys.stdout.write(json.dumps({name: rows[name]}) + "\n")


if __name__ == "__main__":
    main()
