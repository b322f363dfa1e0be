"""Training: `perpixel train` against the plain loop that people copy; writes benchmarks/results/speed-training.json.

python benchmarks/speed_training.py [--data ../shared/data] [--nets unet_resnet34 deeplabv3_resnet50] [--steps 40] [--repeats 3]
                                    [--batch 4] [--crop 224 288]

The plain loop: the net of segmentation_models.pytorch or torchvision, float32, NCHW, a Dataset that decodes each image with Pillow and
augments it with torchvision's transforms, DataLoader with a worker for each core, Adam, cross-entropy. Ours: the same net of ours through
the command, as it plans for this machine, with the crop, batch and augmentation given to both. Weights are new, as none can be
downloaded everywhere. Each run is a process of its own, in turns; images/s are those of the second half of its steps, with reading and
augmentation, without validation. Memory is the peak of resident memory, with the workers' own (Linux, proc(5)).
"""

import argparse
import csv
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from record import write
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset
from torchvision import tv_tensors
from torchvision.transforms import v2

CLASSES, IGNORE = 11, 255
NETS = {"unet_resnet34": ["unet", "resnet34", "{variant: smp}"], "deeplabv3_resnet50": ["deeplab_v3_torchvision", None, "{}"]}
SCALE, BRIGHTNESS = (0.5, 2.0), 0.2


class Pairs(Dataset[tuple[Tensor, Tensor]]):
    """CamVid as the list file names it, decoded anew each time."""

    def __init__(self, folder: Path, crop: tuple[int, int]) -> None:
        self.pairs = [[folder / name for name in line.split()] for line in (folder / "train.txt").read_text().splitlines()]
        area = (1 / SCALE[1] ** 2, 1.0)
        self.transform = v2.Compose(
            [
                v2.RandomResizedCrop(crop, scale=area, ratio=(crop[1] / crop[0],) * 2, antialias=True),
                v2.RandomHorizontalFlip(),
                v2.ColorJitter(BRIGHTNESS, BRIGHTNESS),
                v2.ToDtype({tv_tensors.Image: torch.float32, "others": None}, scale=True),
                v2.Normalize([0.485, 0.456, 0.406], [0.229, 0.224, 0.225]),
            ]
        )

    def __len__(self) -> int:
        return len(self.pairs)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        image, mask = (Image.open(path) for path in self.pairs[index])
        labels = tv_tensors.Mask(v2.functional.pil_to_tensor(mask)[0].long())
        labels[labels >= CLASSES] = IGNORE
        return self.transform(tv_tensors.Image(v2.functional.pil_to_tensor(image.convert("RGB"))), labels)


def plain_net(name: str) -> nn.Module:
    """The peer's net."""
    if name == "unet_resnet34":
        import segmentation_models_pytorch as smp

        return smp.Unet("resnet34", encoder_weights=None, classes=CLASSES)
    from torchvision.models.segmentation import deeplabv3_resnet50

    return deeplabv3_resnet50(weights=None, weights_backbone=None, num_classes=CLASSES)


def plain(name: str, data: Path, steps: int, batch: int, crop: tuple[int, int]) -> dict[str, float]:
    """The loop that people copy; images/s of its second half."""
    torch.manual_seed(0)
    model = plain_net(name).train()
    loader = DataLoader(Pairs(data / "camvid", crop), batch, shuffle=True, num_workers=os.cpu_count() or 1, drop_last=True)
    optimizer, criterion = torch.optim.Adam(model.parameters(), 1e-3), nn.CrossEntropyLoss(ignore_index=IGNORE)
    done, half = 0, 0.0
    while done < steps:
        for images, labels in loader:
            if done == steps // 2:
                half = time.perf_counter()
            found = model(images)
            optimizer.zero_grad()
            criterion(found["out"] if isinstance(found, dict) else found, labels).backward()
            optimizer.step()
            done += 1
            if done == steps:
                break
    return {"images_per_second": (steps - steps // 2) * batch / (time.perf_counter() - half), "megabytes": peak()}


def ours(name: str, data: Path, steps: int, batch: int, crop: tuple[int, int]) -> dict[str, float]:
    """`perpixel train`, as planned but for what both are given; images/s of its second half."""
    from rich.console import Console

    from perpixel.train import train

    model, encoder, options = NETS[name]
    settings = [f"model.name={model}", f"model.options={options}", "model.encoder_weights=false", f"train.batch={batch}"]
    settings += [f"train.crop=[{crop[0]}, {crop[1]}]", "train.validations=1", "train.report=false", "train.freeze_batch_norm=false"]
    settings += [f"train.augment={{scale: [{SCALE[0]}, {SCALE[1]}], brightness: {BRIGHTNESS}, contrast: {BRIGHTNESS}}}"]
    settings += ["train.loss=[{name: cross_entropy}]"]
    settings += [f"model.encoder={encoder}"] if encoder else []
    with tempfile.TemporaryDirectory() as folder:
        train(data / "camvid", out=Path(folder) / "run", steps=steps, settings=settings, console=Console(quiet=True))
        with (Path(folder) / "run" / "metrics.csv").open() as file:
            rows = [float(row["images_per_second"]) for row in csv.DictReader(file)]
    return {"images_per_second": statistics.median(rows[len(rows) // 2 :]), "megabytes": peak()}


def peak() -> float:
    """MB of resident memory that this process held at most, and the sum of what its workers did."""
    from resource import RUSAGE_CHILDREN, RUSAGE_SELF, getrusage

    return (getrusage(RUSAGE_SELF).ru_maxrss + getrusage(RUSAGE_CHILDREN).ru_maxrss) / 1024


def in_process(side: str, arguments: list[str]) -> dict[str, float]:
    """One side in a process of its own."""
    done = subprocess.run([sys.executable, __file__, *arguments, "--side", side], capture_output=True, text=True)
    if done.returncode:
        sys.exit(done.stderr)
    found: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return found


def main() -> None:
    """Measure and write the file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=Path("../shared/data"))
    parser.add_argument("--nets", nargs="+", choices=NETS, default=list(NETS))
    parser.add_argument("--steps", type=int, default=40, help="a multiple of 40, as speeds are noted every 20 steps")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--crop", type=int, nargs=2, default=[224, 288])
    parser.add_argument("--side", choices=["ours", "plain"], help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.side:
        side = ours if given.side == "ours" else plain
        found = side(given.nets[0], given.data, given.steps, given.batch, tuple(given.crop))
        sys.stdout.write(json.dumps(found) + "\n")
        return
    rows: list[dict[str, Any]] = []
    for name in given.nets:
        words = ["--data", given.data, "--nets", name, "--steps", given.steps, "--batch", given.batch, "--crop", *given.crop]
        runs: dict[str, list[dict[str, float]]] = {"ours": [], "plain": []}
        for number in range(given.repeats):
            for side in ("ours", "plain") if number % 2 else ("plain", "ours"):
                runs[side].append(in_process(side, [str(word) for word in words]))
        speed, memory = ({side: [run[key] for run in many] for side, many in runs.items()} for key in ("images_per_second", "megabytes"))
        ratios = sorted(mine / theirs for mine, theirs in zip(speed["ours"], speed["plain"], strict=True))
        rows.append(
            {
                "net": name,
                "ours": round(statistics.median(speed["ours"]), 2),
                "plain": round(statistics.median(speed["plain"]), 2),
                "times_faster": round(statistics.median(ratios), 2),
                "range": [round(ratios[0], 2), round(ratios[-1], 2)],
                "ours_megabytes": round(statistics.median(memory["ours"])),
                "plain_megabytes": round(statistics.median(memory["plain"])),
            }
        )
        sys.stdout.write(json.dumps(rows[-1]) + "\n")
        sys.stdout.flush()
    content = {"steps": given.steps, "batch": given.batch, "crop": given.crop, "rows": rows}
    write("speed-training", content, packages=("torch", "torchvision", "segmentation-models-pytorch"))


if __name__ == "__main__":
    main()
