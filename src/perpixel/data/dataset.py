"""Pairs of image and mask as tensors, read once; and the endless stream of augmented samples, a pure function of (seed, number)."""

import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from perpixel.data.images import FULL_SCALE, Picture, read_image
from perpixel.data.layouts import Pair
from perpixel.data.masks import LabelMap, read_mask
from perpixel.data.transforms import Augmentation, Cut


@dataclass(frozen=True)
class Example:
    """One image with its labels, as read: image (C, H, W), labels (H, W), weights (H, W) float32 or None."""

    image: Tensor
    labels: Tensor
    weights: Tensor | None
    name: str


def conform(image: np.ndarray, bands: int, dtype: str, source: str) -> np.ndarray:
    """(C, H, W) of any depth as a model of `bands` and `dtype` expects it.

    Grey is repeated for a three-band model and three equal bands are taken as one; depth is converted by full range (255 = 65535 = 1.0).

    Raises:
        ValueError: the bands differ in another way, or floats beyond 0..1 come to a model of integers.
    """
    if image.shape[0] == 1 and bands == 3:
        image = np.repeat(image, 3, axis=0)
    elif image.shape[0] == 3 and bands == 1 and np.array_equal(image[0], image[1]) and np.array_equal(image[0], image[2]):
        image = image[:1]
    if image.shape[0] != bands:
        raise ValueError(
            f"{source}: {image.shape[0]} bands; the model was trained on {bands}. Give images with {bands}, or train on these."
        )
    if image.dtype == dtype:
        return image
    if image.dtype == np.float32 and (image.min() < 0 or image.max() > 1):
        found = f"values of neither uint8 nor uint16, from {image.min():g} to {image.max():g}"
        raise ValueError(f"{source}: {found}; this model was trained on {dtype}. Give {dtype} values, or floats from 0 to 1.")
    unit = image.astype(np.float32) / np.float32(FULL_SCALE[str(image.dtype)])
    return unit if dtype == "float32" else np.rint(unit.clip(0, 1) * FULL_SCALE[dtype]).astype(dtype)


def mask_of(pair: Pair) -> Picture:
    """The mask of a pair; ValueError where it has none."""
    if pair.mask is None:
        raise ValueError(f"{pair.image}: has no mask, so it can't be trained or scored on.")
    return pair.mask


def refuse_other_size(pair: Pair, image: Sequence[int], mask: Sequence[int]) -> None:
    """ValueError where image and mask differ in size (height, width)."""
    if tuple(image) != tuple(mask):
        sizes = f"{image[0]}x{image[1]} but {pair.mask} is {mask[0]}x{mask[1]}"
        raise ValueError(f"{pair.image} is {sizes} pixels (height x width). Image and mask must have equal size.")


class LabelledImages(Dataset[Example]):
    """Images with labels, decoded at most once when `cache` is on.

    Args:
        pairs: every one with a mask.
        label_map: from mask values to class indices.
        bands, dtype: what the model expects; see `conform`.
        weigh: labels (H, W) -> weights (H, W), such as U-Net's border weights; computed whenever an image is decoded.
        cache: keep the decoded arrays in RAM.
    """

    def __init__(
        self,
        pairs: Sequence[Pair],
        label_map: LabelMap,
        bands: int,
        dtype: str,
        weigh: Callable[[np.ndarray], np.ndarray] | None = None,
        cache: bool = True,
    ) -> None:
        self.pairs, self.label_map, self.bands, self.dtype, self.weigh = list(pairs), label_map, bands, dtype, weigh
        self._kept: list[Example] | None = None
        if cache:
            with ThreadPoolExecutor(min(16, os.cpu_count() or 1)) as pool:
                self._kept = list(pool.map(self._read, range(len(self.pairs))))
            self.weigh = None  # done, so it need not travel to worker processes

    def __len__(self) -> int:
        return len(self.pairs)

    def __getitem__(self, index: int) -> Example:
        return self._kept[index] if self._kept is not None else self._read(index)

    def _read(self, index: int) -> Example:
        pair = self.pairs[index]
        mask = mask_of(pair)
        image = conform(read_image(pair.image), self.bands, self.dtype, str(pair.image))
        labels = self.label_map(read_mask(mask), str(mask))
        refuse_other_size(pair, image.shape[1:], labels.shape)
        weights = None if self.weigh is None else torch.from_numpy(self.weigh(labels))
        return Example(torch.from_numpy(image), torch.from_numpy(labels), weights, pair.image.name)


Batch = tuple[Tensor, Tensor, Tensor | None]


class SampleStream(Dataset[Batch]):
    """Sample `number` of an endless, shuffled, augmented stream: a pure function of (seed, number), whatever came before.

    Every image comes once per epoch of len(images) numbers.
    """

    def __init__(self, images: LabelledImages, augmentation: Augmentation, seed: int) -> None:
        self.images, self.augmentation, self.seed = images, augmentation, seed
        self._orders: dict[int, list[int]] = {}  # of the epochs in use; a plain dict, so that worker processes can be handed a copy

    def __getitem__(self, number: int) -> Batch:
        return self.augmentation(*self.drawn(number))

    def drawn(self, number: int) -> tuple[Tensor, Tensor, torch.Generator, Tensor | None]:
        """What the augmentation takes: image, labels, the sample's random numbers, weights."""
        epoch, place = divmod(number, len(self.images))
        example = self.images[self._order(epoch)[place]]
        return example.image, example.labels, _generator(self.seed, 1, number), example.weights

    def cuts(self) -> "CutStream":
        """The same samples, their images not made yet."""
        return CutStream(self)

    def _order(self, epoch: int) -> list[int]:
        order = self._orders.get(epoch)
        if order is None:
            if len(self._orders) >= 4:
                self._orders.clear()
            order = self._orders[epoch] = torch.randperm(len(self.images), generator=_generator(self.seed, 0, epoch)).tolist()
        return order


class CutStream(Dataset[tuple[Cut, Tensor, Tensor | None]]):
    """The samples of a stream, each image as what it is to be made from."""

    def __init__(self, stream: SampleStream) -> None:
        self.stream = stream

    def __getitem__(self, number: int) -> tuple[Cut, Tensor, Tensor | None]:
        cut, labels, weights = self.stream.augmentation.cut(*self.stream.drawn(number))
        # A copy: a view would take its whole picture along to another process.
        return cut._replace(region=cut.region.clone(memory_format=torch.contiguous_format)), labels, weights


def collate(samples: Sequence[tuple[Tensor | Cut, Tensor, Tensor | None]]) -> tuple[Tensor | list[Cut], Tensor, Tensor | None]:
    """Samples to a batch: images (N, C, h, w), labels (N, h, w), weights (N, h, w) or None; cuts, which differ in size, stay a list."""
    images, labels, weights = zip(*samples, strict=True)
    whole = list(images) if isinstance(images[0], Cut) else torch.stack(images)
    return whole, torch.stack(labels), None if weights[0] is None else torch.stack(weights)


class DevicePrefetcher:
    """Batches of cuts as batches of images made on a device, in a thread and a stream of their own, one ahead of the training step.

    Labels and weights are moved there too.

    Args:
        loader: batches of `collate` over a `CutStream`.
        augmentation: of that stream.
        device: where the images are made and wanted.
    """

    def __init__(self, loader: Iterable[Any], augmentation: Augmentation, device: torch.device) -> None:
        self.loader, self.augmentation, self.device = loader, augmentation, device
        self.stream = _side_stream(device) if device.type == "cuda" else None

    def __iter__(self) -> Iterator[Batch]:
        cuts = iter(self.loader)
        with ThreadPoolExecutor(1, initializer=self._settle) as ahead:
            coming = ahead.submit(self._next, cuts)
            while (batch := coming.result()) is not None:
                coming = ahead.submit(self._next, cuts)
                yield self._handed_over(batch)

    def _settle(self) -> None:
        """A thread's own device is the first one until it is told otherwise; pinning would hold memory there."""
        if self.stream is not None:
            torch.cuda.set_device(self.device)

    def _next(self, cuts: Iterator[Any]) -> Batch | None:
        """The next batch, made; None at the end."""
        batch = next(cuts, None)
        if batch is None:
            return None
        images, labels, weights = batch
        with nullcontext() if self.stream is None else torch.cuda.stream(self.stream):
            made = torch.stack([self.augmentation.render(cut, self.device) for cut in images])
            labels = labels.to(self.device, non_blocking=True)
            weights = None if weights is None else weights.to(self.device, non_blocking=True)
        if self.stream is not None:
            self.stream.synchronize()  # this thread waits, so that the step's own stream need not
        return made, labels, weights

    def _handed_over(self, batch: Batch) -> Batch:
        """The batch, its memory kept from reuse until the step that gets it is done with it."""
        if self.stream is not None:
            for part in batch:
                if part is not None:
                    part.record_stream(torch.cuda.current_stream(self.device))
        return batch


@cache
def _side_stream(device: torch.device) -> torch.cuda.Stream:
    """One for a process and device: what a stream has allocated stays its own, so each new one would hold memory anew."""
    return torch.cuda.Stream(device)


def sample_numbers(first_step: int, batch: int, rank: int = 0, world: int = 1) -> Iterator[list[int]]:
    """This process's share of each global batch, from `first_step` on, without end."""
    share = batch // world
    step = first_step
    while True:
        start = step * batch + rank * share
        yield list(range(start, start + share))
        step += 1


def _generator(seed: int, purpose: int, number: int) -> torch.Generator:
    """An own random stream for each (seed, purpose, number); NumPy's SeedSequence mixes them so that no two are alike."""
    mixed = np.random.SeedSequence([seed, purpose, number]).generate_state(1, np.uint64)[0]
    return torch.Generator().manual_seed(int(mixed >> 1))
