"""The training loop that people copy, as the measure of ours: one epoch after the other, nothing clever.

float32, NCHW, a Dataset that decodes each image with Pillow and augments it with torchvision's transforms, DataLoader with a worker for
each core, Adam at 2e-4 as in the examples of segmentation_models.pytorch (at 1e-3 a pretrained encoder gets worse and worse),
cross-entropy.
"""

import math
import os
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.data import DataLoader, Dataset
from torchvision import tv_tensors
from torchvision.transforms import v2

CLASSES, IGNORE = 11, 255
MEAN, STD = [0.485, 0.456, 0.406], [0.229, 0.224, 0.225]


@dataclass(frozen=True)
class Task:
    """What both sides are given: the set, the batch, the crop and how it is augmented.

    Attributes:
        scale: least and most zoom of a crop. light: most change of brightness and contrast, as a share.
    """

    data: Path
    batch: int
    crop: tuple[int, int]
    scale: tuple[float, float]
    light: float


class Pairs(Dataset[tuple[Tensor, Tensor]]):
    """A part of CamVid as its list file names it, decoded anew each time; augmented for training."""

    def __init__(self, task: Task, split: str) -> None:
        self.pairs = [[task.data / name for name in line.split()] for line in (task.data / f"{split}.txt").read_text().splitlines()]
        width, height = Image.open(self.pairs[0][0]).size
        share = task.crop[0] * task.crop[1] / (height * width)
        area = tuple(min(1.0, share / zoom**2) for zoom in reversed(task.scale))
        changed = [
            v2.RandomResizedCrop(task.crop, scale=area, ratio=(task.crop[1] / task.crop[0],) * 2, antialias=True),
            v2.RandomHorizontalFlip(),
            v2.ColorJitter(task.light, task.light),
        ]
        read = [v2.ToDtype({tv_tensors.Image: torch.float32, "others": None}, scale=True), v2.Normalize(MEAN, STD)]
        self.transform = v2.Compose([*changed, *read] if split == "train" else read)

    def __len__(self) -> int:
        return len(self.pairs)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        image, mask = (Image.open(path) for path in self.pairs[index])
        labels = tv_tensors.Mask(v2.functional.pil_to_tensor(mask)[0].long())
        labels[labels >= CLASSES] = IGNORE
        return self.transform(tv_tensors.Image(v2.functional.pil_to_tensor(image.convert("RGB"))), labels)


def plain_net(name: str, weights: Path | None = None) -> nn.Module:
    """The peer's net; `weights` of its encoder, a timm file."""
    if name == "deeplabv3_resnet50":
        from torchvision.models.segmentation import deeplabv3_resnet50

        return deeplabv3_resnet50(weights=None, weights_backbone=None, num_classes=CLASSES, aux_loss=True)
    import segmentation_models_pytorch as smp

    net: nn.Module = smp.Unet(name.removeprefix("unet_"), encoder_weights=None, classes=CLASSES)
    if weights is not None:
        from safetensors.torch import load_file

        missing = net.encoder.model.load_state_dict(load_file(weights), strict=False).missing_keys  # the classifier is left over
        if missing := [key for key in missing if not key.endswith("num_batches_tracked")]:
            raise ValueError(f"{weights} lacks {len(missing)} tensors of the encoder of {name}, the first {missing[0]}")
    return net


def updates(model: nn.Module, task: Task) -> Iterator[int]:
    """Trains on and on; after each update its number, from 1."""
    loader = DataLoader(Pairs(task, "train"), task.batch, shuffle=True, num_workers=os.cpu_count() or 1, drop_last=True)
    optimizer, criterion = torch.optim.Adam(model.parameters(), 2e-4), nn.CrossEntropyLoss(ignore_index=IGNORE)
    done = 0
    while True:
        for images, labels in loader:
            found = model.train()(images)
            maps = [found] if isinstance(found, Tensor) else [found["out"], found["aux"]]
            # The auxiliary classifier counts half, as in torchvision's references/segmentation.
            cost = sum(share * criterion(logits, labels) for share, logits in zip((1, 0.5), maps, strict=False))
            optimizer.zero_grad()
            cost.backward()
            optimizer.step()
            done += 1
            yield done


def marks(name: str, task: Task, steps: int) -> list[float]:
    """`time.monotonic()` after half of the steps and after all of them."""
    torch.manual_seed(0)
    found: list[float] = []
    for done in updates(plain_net(name), task):
        if done in (steps // 2, steps):
            found.append(time.monotonic())
        if done == steps:
            return found
    raise ValueError("there are no images")


def curve(name: str, weights: Path, task: Task, until: float, seconds: float, validations: int, began: float) -> list[list[float]]:
    """[seconds since `began`, mean IoU on the validation part] at each validation: until it is reached or the time is over."""
    torch.manual_seed(0)
    model, found = plain_net(name, weights), list[list[float]]()
    for _ in updates(model, task):
        now = time.monotonic() - began
        if now >= seconds * (len(found) + 1) / validations:
            found.append([now, mean_iou(model, task)])
            if found[-1][1] >= until or time.monotonic() - began >= seconds:
                break
    return found


@torch.inference_mode()
def mean_iou(model: nn.Module, task: Task) -> float:
    """Mean IoU over the classes that occur, of whole images, padded to a size that the net takes."""
    model.eval()
    counts = torch.zeros(CLASSES, CLASSES)
    for images, labels in DataLoader(Pairs(task, "val"), 4, num_workers=os.cpu_count() or 1):
        height, width = labels.shape[-2:]
        below, right = -height % 32, -width % 32
        found = model(functional.pad(images, (0, right, 0, below)))[..., :height, :width].argmax(1)
        known = labels != IGNORE
        counts += torch.bincount(labels[known] * CLASSES + found[known], minlength=CLASSES**2).reshape(CLASSES, CLASSES)
    iou = counts.diag() / (counts.sum(0) + counts.sum(1) - counts.diag())
    return float(iou[counts.sum(1) > 0].mean()) if counts.sum() else math.nan
