"""Training: `perpixel train` against the plain loop that people copy; writes benchmarks/results/speed-training.json.

python benchmarks/speed_training.py [--data ../shared/data] [--nets unet_resnet34 deeplabv3_resnet50] [--steps 40] [--repeats 3]
                                    [--batch 4] [--crop 224 288] [--threads 2]

The plain loop is that of plain_training.py, with the net of segmentation_models.pytorch or torchvision. Ours: the same net of ours through
the command, as it plans for this machine, with the crop, batch, loss and augmentation given to both. Weights are new, as none can be
downloaded everywhere. Each run is a process of its own, in turns; images/s are those of the second half of its steps, with reading,
augmentation and checkpoints, without validation. Beside them stands the processor's time for an image, on all cores and with the workers'
own, which other work on the machine hardly touches. Memory is the most that a run's processes held at once; ours keeps decoded images in
memory as planned, and is run without that too ("uncached").
"""

import argparse
import csv
import json
import statistics
import sys
import tempfile
import time
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

from plain_training import Task, marks
from process_tree import watched
from record import write

NETS = {"unet_resnet34": ["unet", "resnet34", "{variant: smp}"], "deeplabv3_resnet50": ["deeplab_v3_torchvision", None, "{}"]}
IMAGE = (360, 480)  # of the set, (height, width)


class TrainingIsOverError(Exception):
    """Training has made its steps."""


def task_of(data: Path, batch: int, crop: tuple[int, int]) -> Task:
    """Crops show from all of the image's height or width to half of it."""
    least = max(side / whole for side, whole in zip(crop, IMAGE, strict=True))
    return Task(data / "camvid", batch, crop, (least, 2 * least), 0.2)


def our_marks(name: str, task: Task, steps: int, cache: bool = True) -> list[float]:
    """`marks` of `perpixel train`, as planned but for what both sides are given; `cache`: decoded images stay in memory, as planned."""
    from rich.console import Console

    from perpixel import progress
    from perpixel.run import Run
    from perpixel.train import train

    def end(*_: object) -> None:
        raise TrainingIsOverError

    progress.EVERY = steps // 2  # so that a row of metrics.csv is written after half of the steps
    Run.validate = end  # type: ignore[assignment, method-assign]  # neither its time nor its memory is to be compared
    model, encoder, options = NETS[name]
    settings = [
        f"model.name={model}",
        f"model.options={options}",
        "model.encoder_weights=false",
        f"train.batch={task.batch}",
        f"train.cache={str(cache).lower()}",
    ]
    settings += [
        f"train.crop=[{task.crop[0]}, {task.crop[1]}]",
        "train.validations=1",
        "train.report=false",
        "train.freeze_batch_norm=false",
    ]
    settings += [f"train.augment={{scale: [{task.scale[0]}, {task.scale[1]}], saturation: 0}}"]
    settings += [f"train.augment.{key}={task.light}" for key in ("brightness", "contrast")]
    settings += ["train.loss=[{name: cross_entropy}]", "train.class_weights=none"]
    settings += [f"model.encoder={encoder}"] if encoder else []
    with tempfile.TemporaryDirectory() as folder:
        out, started = Path(folder) / "run", time.monotonic()
        with suppress(TrainingIsOverError):
            train(task.data, out=out, steps=steps, settings=settings, console=Console(quiet=True))
        with (out / "metrics.csv").open() as file:
            seconds = {int(row["step"]): float(row["seconds"]) for row in csv.DictReader(file)}
    return [started + seconds[step] for step in (steps // 2, steps)]


SIDES = {"plain": marks, "ours": our_marks, "uncached": partial(our_marks, cache=False)}


def run(side: str, name: str, given: argparse.Namespace) -> dict[str, float]:
    """One side in a process of its own: images a second, processor seconds an image, MB."""
    words = ["--data", given.data, "--nets", name, "--steps", given.steps, "--batch", given.batch, "--crop", *given.crop, "--side", side]
    threads = {} if given.threads is None else {"OMP_NUM_THREADS": str(given.threads)}
    found = watched([sys.executable, __file__, *map(str, words)], threads)
    half, end = json.loads(found.output.splitlines()[-1])
    images = (given.steps - given.steps // 2) * given.batch
    return {
        "images_per_second": images / (end - half),
        "processor_seconds": found.processor_seconds(half, end) / images,
        "megabytes": found.peak,
    }


def row_of(name: str, runs: dict[str, list[dict[str, float]]]) -> dict[str, Any]:
    """Medians of both sides; ratios of the pairs of runs that followed each other."""
    row: dict[str, Any] = {"net": name}
    for key, digits in (("images_per_second", 3), ("processor_seconds", 3), ("megabytes", 0)):
        for side, many in runs.items():
            row[f"{side}_{key}"] = round(statistics.median(each[key] for each in many), digits)
    pairs = list(zip(runs["ours"], runs["plain"], strict=True))
    for key, ratios in (
        ("times_faster", sorted(mine["images_per_second"] / theirs["images_per_second"] for mine, theirs in pairs)),
        ("times_less_processor", sorted(theirs["processor_seconds"] / mine["processor_seconds"] for mine, theirs in pairs)),
    ):
        row[key] = [round(ratio, 2) for ratio in (statistics.median(ratios), ratios[0], ratios[-1])]
    return row


def main() -> None:
    """Measure and write the file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=Path("../shared/data"))
    parser.add_argument("--nets", nargs="+", choices=NETS, default=list(NETS))
    parser.add_argument("--steps", type=int, default=40, help="an even number")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--crop", type=int, nargs=2, default=[224, 288])
    parser.add_argument("--threads", type=int, help="of the network on both sides; every core without it")
    parser.add_argument("--side", choices=SIDES, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.side:
        made = SIDES[given.side](given.nets[0], task_of(given.data, given.batch, tuple(given.crop)), given.steps)
        sys.stdout.write(json.dumps(made) + "\n")
        return
    rows: list[dict[str, Any]] = []
    for name in given.nets:
        runs: dict[str, list[dict[str, float]]] = {side: [] for side in SIDES}
        for number in range(given.repeats):
            for turn in list(SIDES)[:: -1 if number % 2 else 1]:
                runs[turn].append(run(turn, name, given))
                sys.stderr.write(f"{name} {turn} {runs[turn][-1]}\n")
        rows.append(row_of(name, runs))
        sys.stdout.write(json.dumps(rows[-1]) + "\n")
        sys.stdout.flush()
    content = {"steps": given.steps, "batch": given.batch, "crop": given.crop, "threads": given.threads, "rows": rows}
    write("speed-training", content, packages=("torch", "torchvision", "segmentation-models-pytorch"))


if __name__ == "__main__":
    main()
