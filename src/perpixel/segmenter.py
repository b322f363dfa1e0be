"""A bundle in use: an image of any kind and size to logits, probabilities, labels."""

import os
import warnings
from collections.abc import Iterator
from contextlib import closing
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from perpixel.augmented import AugmentedTiler, View, views
from perpixel.budget import MOST, WHOLE, Limits, Needs, Plan, batch_beside, one_block, plan
from perpixel.bundle import Bundle, Card, load_bundle
from perpixel.data.decoding import PictureError
from perpixel.data.images import Picture
from perpixel.data.mosaics import Block, Grid
from perpixel.data.sources import find_sources, open_source
from perpixel.data.windows import Source, WholeSource
from perpixel.data.zarr_windows import is_zarr
from perpixel.models.monte_carlo import MonteCarlo, active_dropouts, monte_carlo
from perpixel.streaming import CONTEXT, PRECISIONS, WAITING, Region, Streamer, ahead, computing, labels_of
from perpixel.tiling import Noted, Tiler, at_once

# Bytes a pixel, beside 48 for each class, that a dense CRF takes at worst, where all six vertices around each pixel are its own (noise):
# their weights and numbers, and of each vertex its place, slot and twelve neighbours. Photographs take a tenth.
LATTICE = 600
COMPILED = 2**28  # bytes that a refiner's loops take while they are compiled


class Segmenter:
    """A bundle in use: `perpixel.load("RUN/best.safetensors").predict("photo.jpg")`.

    Args:
        bundle: on its device.
        refine: see `load`.
        precision: "float32", or "bf16", in which the network computes faster; up to 0.5 labels in a hundred differ, with SegNet, whose
            poolings break ties otherwise, up to 3.
        augment: "flips,rotations,scales", or some of them: the mean of the scores of so many views; see `augmented.views`.
    """

    def __init__(self, bundle: Bundle, refine: str = "bundle", precision: str = "float32", augment: str = "") -> None:
        if precision not in PRECISIONS:
            raise ValueError(f"precision is {precision!r}; legal is {' or '.join(PRECISIONS)}")
        self.bundle, self.refine, self.refiner, self.precision = bundle, refine, bundle.refiner(refine), precision
        self.augment, self.views, self.temperature = augment, views(augment), bundle.temperature(refine)
        self._batch: int | None = None  # of windows on a GPU, once it is measured

    @property
    def device(self) -> torch.device:
        """Where the model is."""
        return next(self.bundle.model.parameters()).device

    @property
    def classes(self) -> list[str]:
        """Names of the classes, in the order of the indices that `predict` returns."""
        return self.bundle.card.classes

    @property
    def colors(self) -> list[tuple[int, int, int]]:
        """RGB colours of the classes, 0..255."""
        return self.bundle.card.colors

    def logits(self, image: np.ndarray | Tensor | Path | str) -> Tensor:
        """(K, H, W) float32 real scores before softmax, at exactly the image's size, whatever its size; refined where there is a refiner.

        They are held as a whole; `blocks` gives them piece by piece.

        Args:
            image: a file; an array (H, W) or (H, W, C); or a tensor (C, H, W); uint8, uint16 or floats 0..1.

        Raises:
            ValueError: unreadable file, or bands or values that differ from those the model was trained on.
            TypeError: neither a path nor an array or tensor of real numbers.
        """
        source, name = _opened(image, self.bundle.card)
        with closing(source):
            streamer = self.streamer(source, name, one_block(source.size))
            return streamer.scores(streamer.region(streamer.grid.blocks[0]))

    def blocks(
        self, image: np.ndarray | Tensor | Path | str, limits: Limits | None = None
    ) -> Iterator[tuple[Block, np.ndarray | None, Tensor]]:
        """The logits of an image of any size, block by block, at constant memory: what a large image is scored by.

        Yields:
            The block (top, left, height, width); (h, w) bool that is False where the file is damaged or has no data, or None where all
            is known; and the block's logits (K, h, w) float32, refined where there is a refiner. Blocks cover the image once, row by row.

        Raises:
            ValueError: as `logits`.
        """
        source, name = _opened(image, self.bundle.card)
        with closing(source):
            planned = None if limits is None else self.plan(source, limits)
            streamer = self.streamer(source, name) if planned is None else self.streamer(source, name, planned.grid, planned.tiler)
            for region, scores in streamer.blocks(streamer.grid.blocks):
                yield region.block, region.known, scores

    def plan(self, source: Source, limits: Limits, maps: int = 0, samples: int | None = None, cut: tuple[int, Grid] | None = None) -> Plan:
        """Blocks, tiles and batch for an image; see `perpixel.budget.plan`."""
        card, scales = self.bundle.card, [view.scale**2 for view in self.views]
        refined = self.refiner is not None and samples is None
        # A refiner works on copies; of views the sum is held, and the scores of one before and after they are resized.
        copies = 2 + 4 * refined + (1 + 2 * max(scales) if len(scales) > 1 else 0) + 5 * (samples is not None)
        lattice = (LATTICE + 48 * len(card.classes)) * refined
        needs = Needs(card.bands, maps, copies, lattice, COMPILED * refined, CONTEXT * refined, self._viewed)
        with computing(self.device, self.precision):
            once = plan(self.bundle.model, source, card.tile, card.overlap, limits, needs, cut)
        return replace(once, seconds=once.seconds * sum(scales) * (samples or 1))

    def is_small(self, size: tuple[int, int]) -> bool:
        """Whether an image is one block without being planned: its scores are few, or a refiner wants to see all of it."""
        pixels = size[0] * size[1]
        return pixels <= WHOLE and (self.refiner is not None or 4 * len(self.classes) * pixels <= MOST)

    def tiler(self, size: tuple[int, int]) -> Tiler:
        """For an image that is not planned: the bundle's tile, and on a GPU as many at a time as it holds, which is measured once."""
        card, model = self.bundle.card, self.bundle.model
        tiler = Tiler(model, card.tile, card.overlap)
        if self.device.type != "cpu" and tiler.windows(size) > 1:
            if self._batch is None:
                with computing(self.device, self.precision):
                    self._batch = batch_beside(model, tiler, card.bands, 2 * MOST)  # the scores of most images, and a copy
            tiler.batch = self._batch
        return tiler

    def _viewed(self, tiler: Tiler) -> Tiler | AugmentedTiler:
        return tiler if self.views == [View()] else AugmentedTiler(tiler, self.views)

    def streamer(
        self,
        source: Source,
        name: str,
        grid: Grid | None = None,
        tiler: Tiler | None = None,
        refined: bool = True,
        noted: Noted = at_once,
        begin: float = 0.0,
    ) -> Streamer:
        """The engine for one image; `grid` and `tiler` are planned, or the bundle's tile and blocks that the scores allow."""
        if grid is None:
            planned = None if self.is_small(source.size) else self.plan(source, Limits())
            grid, tiler = (one_block(source.size), tiler) if planned is None else (planned.grid, tiler or planned.tiler)
        tiler = tiler or self.tiler(source.size)
        refiner = self.refiner if refined else None
        return Streamer(self.bundle, refiner, source, self._viewed(tiler), grid, self.precision, name, noted, begin)

    def monte_carlo(self, image: np.ndarray | Tensor | Path | str, samples: int, seed: int = 0) -> MonteCarlo:
        """Mean and variance of the probabilities, (K, H, W) each, over `samples` predictions with dropout on; see `models.monte_carlo`.

        They are not refined: a refiner works on scores, and what the samples disagree about would be smoothed away.

        Its `uncertainty` (H, W) is the mean of the variance over the classes.

        Raises:
            ValueError: as `logits`, and where the model has no dropout or `samples` is less than 1.
        """
        self.refuse_samples()
        source, name = _opened(image, self.bundle.card)
        with closing(source):
            streamer = self.streamer(source, name, one_block(source.size), refined=False)
            return sampled(streamer, streamer.region(streamer.grid.blocks[0]), samples, seed)

    def refuse_samples(self) -> None:
        """Raises ValueError where samples with dropout make no sense: a model without it, or a refiner that was asked for by name."""
        active_dropouts(self.bundle.model)
        if self.refine not in ("bundle", "none"):
            raise ValueError(f"samples with dropout are not refined; leave out either the samples or the refiner ({self.refine})")

    def probabilities(self, image: np.ndarray | Tensor | Path | str) -> np.ndarray:
        """(K, H, W) float32 softmax probabilities, at the temperature that the bundle was calibrated to; see `logits`."""
        return (self.logits(image) / self.temperature).softmax(0).cpu().numpy()

    def predict(self, image: np.ndarray | Tensor | Path | str, samples: int | None = None) -> np.ndarray:
        """(H, W) class indices, uint8 (uint16 above 255 classes); see `logits`, and `monte_carlo` for `samples`.

        A large file is read and predicted block by block; only its labels are held. The type's highest number stands where it is damaged.
        """
        if samples is not None:
            self.refuse_samples()
        source, name = _opened(image, self.bundle.card)
        with closing(source):
            streamer = self.streamer(source, name, refined=samples is None)
            labels = np.empty(source.size, np.uint8 if len(self.classes) <= 255 else np.uint16)
            with ahead(map(streamer.region, streamer.grid.blocks), WAITING) as regions:
                for region in regions:
                    block = region.block
                    scores = streamer.scores(region) if samples is None else sampled(streamer, region, samples).mean
                    inside = labels[block.top : block.top + block.height, block.left : block.left + block.width]
                    inside[:] = labels_of(scores, len(self.classes), region.known)
        return labels


def load(bundle: Path | str, device: str | None = None, refine: str = "bundle", precision: str = "float32", augment: str = "") -> Segmenter:
    """A segmenter from a bundle file, on the GPU where there is one (its own, of several processes) unless `device` says otherwise.

    `refine`: "bundle": its scores are refined as it says, which `perpixel tune` found best; "none"; or the name of a refiner.
    `precision`, `augment`: see `Segmenter`.

    Raises:
        ValueError: not a bundle, truncated, a pickle, or from a newer perpixel.
    """
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:  # PyTorch without CUDA asserts
        raise ValueError(f"device {device!r} cannot be used here: {str(error).splitlines()[0]}") from None
    own = f"cuda:{int(os.environ.get('LOCAL_RANK', 0))}" if torch.cuda.is_available() else "cpu"
    return Segmenter(load_bundle(Path(bundle), device or own), refine, precision, augment)


def sampled(streamer: Streamer, region: Region, samples: int, seed: int = 0) -> MonteCarlo:
    anything = torch.empty(0)  # the streamer reads what the model sees
    return monte_carlo(streamer.bundle.model, anything, samples, seed, lambda _, __: streamer.stitched(region))


def _opened(image: np.ndarray | Tensor | Path | str, card: Card) -> tuple[Source, str]:
    """A source, and what names it in errors."""
    bands = card.bands
    if isinstance(image, str | Path):
        if Path(image).is_dir() and not is_zarr(Path(image)):
            raise PictureError(f"{image}: is a folder; give one file at a time, or the folder to `perpixel predict`")
        if (count := len(find_sources([image], bands))) > 1:
            warnings.warn(f"{image}: holds {count} pictures; only the first is used. `perpixel predict` takes all", stacklevel=3)
        return open_source(Picture(Path(image)), bands), str(image)
    array = _as_bands(image)
    floats = image.dtype.is_floating_point if isinstance(image, Tensor) else image.dtype.kind == "f"
    if array.dtype == np.float32 and not floats and card.dtype != "float32":
        raise ValueError(f"image: its values are of type {image.dtype}; this model was trained on {card.dtype}. Give them as {card.dtype}")
    return WholeSource(array), "image"


def _as_bands(image: np.ndarray | Tensor) -> np.ndarray:
    """(C, H, W) from an array (H, W) or (H, W, C), or a tensor (C, H, W)."""
    if not isinstance(image, np.ndarray | Tensor):
        legal = "a path, an array (H, W) or (H, W, C), or a tensor (C, H, W)"
        raise TypeError(f"the image is a {type(image).__name__}; legal is {legal}. Give np.asarray(image) of what holds pixels")
    if isinstance(image, Tensor):
        if image.ndim != 3:
            raise ValueError(f"a tensor image must be (C, H, W), got {tuple(image.shape)}")
        image = image.detach()
        array = (image.float() if image.dtype == torch.bfloat16 else image).cpu().numpy()
    elif image.ndim == 2:
        array = image[None]
    elif image.ndim == 3:
        array = np.moveaxis(image, -1, 0)
    else:
        raise ValueError(f"an array image must be (H, W) or (H, W, C), got {image.shape}")
    if 0 in array.shape:
        raise ValueError(f"the image has no pixels: its shape is {tuple(image.shape)}")
    if array.dtype.kind not in "buif":
        raise TypeError(f"the image holds values of type {array.dtype}; legal is uint8, uint16, bool, or floats from 0 to 1")
    if array.dtype == bool:
        array = array.astype(np.uint8) * 255
    if array.dtype not in (np.uint8, np.uint16):
        array = array.astype(np.float32)
        if not np.isfinite(array).all():
            raise ValueError(f"the image has {int((~np.isfinite(array)).sum())} values that are NaN or infinite; replace them first")
    return np.ascontiguousarray(array)
