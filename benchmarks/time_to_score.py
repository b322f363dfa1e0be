"""Time to a mean IoU: `perpixel train` against the plain loop that people copy; writes benchmarks/results/speed-time-to-score.json.

python benchmarks/time_to_score.py --weights mobilenetv2_100.safetensors [--data ../shared/data] [--until 0.45] [--minutes 6]
                                   [--validations 5] [--threads 2]

Ours is what a person types, `perpixel train camvid --minutes M --set model.encoder_weights=FILE`, as planned for this machine. The plain
loop is that of plain_training.py: the U-Net of segmentation_models.pytorch on the same encoder with the same weights, with the crop,
batch, zoom and light that our plan chose. Each trains for so many minutes at most in a process of its own and validates on the whole
validation part equally often; the plain loop ends when it gets there, ours keeps to its schedule. The time is that at the first
validation that reaches the score, counted from the start of the process, without this last validation itself: on the wall, and of the
processor, which other work on the machine hardly touches.
"""

import argparse
import csv
import json
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from plain_training import Task, curve
from process_tree import Watched, watched
from record import write

NET = "unet_tu-mobilenetv2_100"


def our_curve(given: argparse.Namespace, out: Path, began: float) -> list[list[float]]:
    """[seconds since `began`, mean IoU on the validation part] at each validation."""
    from rich.console import Console

    from perpixel.train import train

    settings = [f"model.encoder_weights={given.weights}", f"train.validations={given.validations}", "train.report=false"]
    started = time.monotonic()
    train(given.data / "camvid", out=out, minutes=given.minutes, settings=settings, console=Console(quiet=True))
    with (out / "metrics.csv").open() as file:
        rows = [row for row in csv.DictReader(file) if row["val_miou"]]
    return [[started - began + float(row["seconds"]), float(row["val_miou"])] for row in rows]


def plain_curve(given: argparse.Namespace, out: Path, began: float) -> list[list[float]]:
    """The same of the plain loop, with the numbers of our recipe."""
    from perpixel.recipe import read_recipe

    planned = read_recipe(out / "recipe.yaml")["train"]
    augment = planned["augment"]
    task = Task(given.data / "camvid", planned["batch"], tuple(planned["crop"]), tuple(augment["scale"]), augment["brightness"])
    return curve(NET, given.weights, task, given.until, 60 * given.minutes, given.validations, began)


def reached(found: Watched, rows: list[list[float]], until: float) -> dict[str, Any]:
    """The validations of one side, and when the score was reached; None where it was not."""
    at = next((seconds for seconds, miou in rows if miou >= until), None)
    return {
        "best_miou": round(max(miou for _, miou in rows), 4),
        "seconds": None if at is None else round(at, 1),
        "processor_seconds": None if at is None else round(found.processor_seconds(found.began, found.began + at), 1),
        "validations": [
            [round(seconds), round(found.processor_seconds(found.began, found.began + seconds)), round(miou, 4)] for seconds, miou in rows
        ],
    }


def main() -> None:
    """Measure both sides and write the file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=Path("../shared/data"))
    parser.add_argument("--weights", type=Path, required=True, help="of timm's mobilenetv2_100")
    parser.add_argument("--until", type=float, default=0.45)
    parser.add_argument("--minutes", type=float, default=6)
    parser.add_argument("--validations", type=int, default=5)
    parser.add_argument("--threads", type=int, help="of the network on both sides; every core without it")
    parser.add_argument("--side", choices=["ours", "plain"], help=argparse.SUPPRESS)
    parser.add_argument("--out", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--began", type=float, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.side:
        side = our_curve if given.side == "ours" else plain_curve
        sys.stdout.write(json.dumps(side(given, given.out, given.began)) + "\n")
        return
    threads = {} if given.threads is None else {"OMP_NUM_THREADS": str(given.threads)}
    sides: dict[str, dict[str, Any]] = {}
    with tempfile.TemporaryDirectory() as folder:
        for name in ("ours", "plain"):
            own = ["--side", name, "--out", f"{folder}/run", "--began", str(time.monotonic())]
            found = watched([sys.executable, *sys.argv, *own], threads)
            sides[name] = reached(found, json.loads(found.output.splitlines()[-1]), given.until)
            sys.stdout.write(f"{name} {json.dumps(sides[name])}\n")
            sys.stdout.flush()
    content = {"set": "camvid", "until": given.until, "minutes": given.minutes, "threads": given.threads, **sides}
    write("speed-time-to-score", content, packages=("torch", "torchvision", "segmentation-models-pytorch"))


if __name__ == "__main__":
    main()
