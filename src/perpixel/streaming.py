"""Scores of an image of any size, block by block: reading, network and writing overlap, and memory does not grow with the image."""

import queue
import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor, nn

from perpixel.augmented import AugmentedTiler
from perpixel.bundle import Bundle
from perpixel.data.dataset import conform
from perpixel.data.mosaics import Block, Grid
from perpixel.data.windows import Source, Window
from perpixel.data.writing import write_array
from perpixel.tiling import Kept, Noted, Tiler, at_once

CONTEXT = 128  # pixels around a block that a refiner sees too: 2.6 bandwidths of DenseCRF's widest kernel (49), see docs/large_images.md
WAITING = 1  # blocks that wait between two stages: one is read, one waits, one is predicted, one waits, one is written
ROWS = 256  # of a block that become labels or probabilities at a time, which needs a few copies of them
PRECISIONS = ("float32", "bf16")
T = TypeVar("T")


@dataclass(frozen=True)
class Region:
    """What is read for a block: pixels (C, h, w) from (top, left) on, as the model's data were; what is known of the block and of all that
    was read, and damage of the block."""

    block: Block
    top: int
    left: int
    pixels: np.ndarray
    known: np.ndarray | None  # (block.height, block.width) bool; None: all
    damage: dict[tuple[int, int, int, int], str]
    known_around: np.ndarray | None  # (h, w) bool, as `pixels`; None: all


class Streamer:
    """The scores of blocks of one image: normalised, tiled, through the model, stitched, refined.

    A block's scores do not depend on which other blocks are made. A refiner sees a block with CONTEXT pixels around it; where the image
    is one block, it sees the whole.

    Args:
        bundle: its model on any device.
        refiner: of its scores, or None.
        source: the image.
        tiler: for the bundle's model; its batch is halved where the device's memory does not hold it.
        grid: blocks of the image.
        precision: "float32", or "bf16": the network computes in bfloat16 where that is safe (autocast).
        name: of the image, for errors.
        noted, begin: for what has to be known of the whole image first, see `Tiler.prepared`.
    """

    def __init__(
        self,
        bundle: Bundle,
        refiner: nn.Module | None,
        source: Source,
        tiler: Tiler | AugmentedTiler,
        grid: Grid,
        precision: str,
        name: str,
        noted: Noted = at_once,
        begin: float = 0.0,
    ) -> None:
        self.bundle, self.refiner, self.source, self.grid, self.precision, self.name = bundle, refiner, source, grid, precision, name
        self.device = next(bundle.model.parameters()).device
        source.keep(grid.block[0] + 2 * tiler.window)
        self.tiler: Tiler | AugmentedTiler = tiler
        with self._computing():
            self.tiler = self._halving(lambda: tiler.prepared(self._reader(None), source.size, noted, begin))
        if len(grid.blocks) > 1:
            self.tiler.kept = Kept()

    def blocks(self, blocks: Iterable[Block]) -> Iterator[tuple[Region, Tensor]]:
        """Each block as read, and its scores (K, h, w), float32 on the model's device; the next ones are read meanwhile."""
        with ahead(map(self.region, blocks), WAITING) as regions:
            for region in regions:
                yield region, self.scores(region)

    def region(self, block: Block, rim: int = 0) -> Region:
        """Read what a block needs, and at least `rim` pixels around it where the image has them.

        Raises:
            ValueError: bands or values that differ from those the model was trained on, or a file that cannot be read.
        """
        seen = self._seen(block)
        top, left, height, width = self.tiler.reach(self.source.size, seen.top, seen.left, seen.height, seen.width)
        if rim:
            bottom = max(top + height, min(block.top + block.height + rim, self.source.size[0]))
            right = max(left + width, min(block.left + block.width + rim, self.source.size[1]))
            top, left = min(top, max(block.top - rim, 0)), min(left, max(block.left - rim, 0))
            height, width = bottom - top, right - left
        window = self.source.read(top, left, height, width)  # 1 read
        inside = (slice(block.top - top, block.top - top + block.height), slice(block.left - left, block.left - left + block.width))
        known = None if window.known is None or window.known[inside].all() else window.known[inside].copy()
        damage = {where: why for where, why in window.damage.items() if _meet(where, block)}
        return Region(block, top, left, self._conformed(window), known, damage, window.known)

    @torch.inference_mode()
    def scores(self, region: Region) -> Tensor:
        """(K, h, w) float32 real scores of the block before softmax."""
        seen, block = self._seen(region.block), region.block
        where = (seen.top, seen.left, seen.height, seen.width)
        with self._computing():
            logits = self._halving(
                lambda: self.tiler.block(self._reader(region), self.source.size, *where).float()
            )  # 3 tile, 4 model, 5 stitch
        if self.refiner is None:
            return logits
        y, x = seen.top - region.top, seen.left - region.left
        image = torch.from_numpy(region.pixels[:, y : y + seen.height, x : x + seen.width])
        refined: Tensor = self.refiner(logits[None], image[None])[0]  # 6 refine
        y, x = block.top - seen.top, block.left - seen.left
        return refined[:, y : y + block.height, x : x + block.width]

    def stitched(self, region: Region) -> Tensor:
        """As `scores`, not refined: for samples with dropout on."""
        block = region.block
        self.tiler.kept = None  # each sample drops other units
        with self._computing():
            return self._halving(
                lambda: self.tiler.block(self._reader(region), self.source.size, block.top, block.left, block.height, block.width).float()
            )

    def _seen(self, block: Block) -> Block:
        """With the context that a refiner needs."""
        if self.refiner is None or len(self.grid.blocks) == 1:
            return block
        top, left = max(block.top - CONTEXT, 0), max(block.left - CONTEXT, 0)
        bottom = min(block.top + block.height + CONTEXT, self.grid.size[0])
        return Block(top, left, bottom - top, min(block.left + block.width + CONTEXT, self.grid.size[1]) - left)

    def _reader(self, region: Region | None) -> Callable[[int, int, int, int], Tensor]:
        """Normalised pixels for the tiler: from the region, or from the source what lies beyond it."""

        def read(top: int, left: int, height: int, width: int) -> Tensor:
            inside = region is not None and _covers(region, top, left, height, width)
            if region is not None and inside:
                y, x = top - region.top, left - region.left
                pixels = region.pixels[:, y : y + height, x : x + width]
            else:
                pixels = self._conformed(self.source.read(top, left, height, width))
            return self.bundle.normalize(torch.from_numpy(pixels).to(self.device, non_blocking=True))  # 2 normalise

        return read

    def _conformed(self, window: Window) -> np.ndarray:
        return conform(window.pixels, self.bundle.card.bands, self.bundle.card.dtype, self.name)

    def _computing(self) -> AbstractContextManager[Any]:
        return computing(self.device, self.precision)

    def _halving(self, compute: Callable[[], T]) -> T:
        """The result; where the device has too little memory for the batch, of half the batch, and so it stays."""
        while True:
            try:
                return compute()
            except RuntimeError as error:
                if not (isinstance(error, torch.OutOfMemoryError) or "can't allocate memory" in str(error)):
                    raise
                if self.tiler.batch == 1:
                    limit = "--max-vram" if self.device.type == "cuda" else "--max-ram"
                    what = f"{self.name}: the memory of {self.device} does not hold a window of {self.tiler.window} pixels and its block"
                    raise ValueError(f"{what}; give {limit}, so that smaller ones are taken") from error
                self.tiler.batch = max(self.tiler.batch // 2, 1)
            if self.device.type == "cuda":
                torch.cuda.empty_cache()


def computing(device: torch.device, precision: str) -> AbstractContextManager[Any]:
    """In which a network computes in "float32", or in "bf16" where that is safe (autocast)."""
    return torch.autocast(device.type, torch.bfloat16) if precision == "bf16" else nullcontext()


def noted_in(folder: Path, tell: Callable[[str], None]) -> Noted:
    """Keeps what is computed in a folder, for the other processes that work on the image and for the next run.

    Args:
        tell: called with the name of what is computed now.
    """

    def noted(name: str, compute: Callable[[], Tensor]) -> Tensor:
        path = folder / f"{name}.npy"
        with suppress(FileNotFoundError):
            return torch.from_numpy(np.load(path))
        tell(name)
        found = compute()
        write_array(path, found.numpy())
        return found

    return noted


def labels_of(scores: Tensor, classes: int, known: np.ndarray | None = None) -> np.ndarray:
    """(h, w) class indices of (K, h, w) scores, uint8 (uint16 above 255 classes); the highest number of the type where not known."""
    dtype = np.uint8 if classes <= 255 else np.uint16
    labels = np.empty(scores.shape[1:], dtype)
    for top in range(0, len(labels), ROWS):
        # `max` gives the first of equal scores, as `argmax` does, and takes a tenth of its time along the first axis on a processor.
        labels[top : top + ROWS] = scores[:, top : top + ROWS].max(0).indices.cpu().numpy()
    if known is not None:
        labels[~known] = np.iinfo(dtype).max
    return labels


def maps_of(scores: Tensor, probabilities: bool, entropy: bool, temperature: float | None) -> dict[str, np.ndarray]:
    """float16 probabilities (K, h, w) of scores divided by a temperature, and their entropy (h, w) in nats, 0 to log K.

    Without a temperature the scores are probabilities already.
    """
    found: dict[str, np.ndarray] = {}
    if probabilities:
        found["probabilities"] = np.empty(tuple(scores.shape), np.float16)
    if entropy:
        found["entropy"] = np.empty(tuple(scores.shape[1:]), np.float16)
    for top in range(0, scores.shape[1] if found else 0, ROWS):
        part = scores[:, top : top + ROWS]
        shares = part if temperature is None else (part / temperature).softmax(0)
        if probabilities:
            found["probabilities"][:, top : top + ROWS] = shares.half().cpu().numpy()
        if entropy:
            found["entropy"][top : top + ROWS] = torch.special.entr(shares).sum(0).half().cpu().numpy()
    return found


def _covers(region: Region, top: int, left: int, height: int, width: int) -> bool:
    _, rows, columns = region.pixels.shape
    down = region.top <= top and top + height <= region.top + rows
    return down and region.left <= left and left + width <= region.left + columns


def _meet(where: tuple[int, int, int, int], block: Block) -> bool:
    top, left, height, width = where
    down = top < block.top + block.height and block.top < top + height
    return down and left < block.left + block.width and block.left < left + width


# ---- stages that overlap

_END = object()


@contextmanager
def ahead(items: Iterator[T], waiting: int) -> Iterator[Iterator[T]]:
    """The items of an iterator, made by a thread of their own, `waiting` of them before they are asked for. Its errors come out here."""
    ready: queue.Queue[Any] = queue.Queue(waiting)
    stop = threading.Event()
    failed: list[BaseException] = []

    def offer(item: object) -> None:
        while not stop.is_set():
            try:
                ready.put(item, timeout=0.1)
                return
            except queue.Full:
                continue

    def make() -> None:
        try:
            for item in items:
                offer(item)
                if stop.is_set():
                    return
        except BaseException as error:
            failed.append(error)
        offer(_END)

    def taken() -> Iterator[T]:
        while (item := ready.get()) is not _END:
            yield item
        if failed:
            raise failed[0]

    thread = threading.Thread(target=make, name="ahead", daemon=True)
    thread.start()
    try:
        yield taken()
    finally:
        stop.set()
        thread.join()


@contextmanager
def behind(waiting: int) -> Iterator[Callable[..., None]]:
    """Calls `do(function, *arguments)` in the order given by a thread of their own; at most `waiting` wait.

    An error of one is raised by the next `do`, or at the end, and what waits is dropped.
    """
    due: queue.Queue[Any] = queue.Queue(waiting)
    failed: list[BaseException] = []

    def work() -> None:
        while (job := due.get()) is not _END:
            if failed:
                continue
            try:
                job[0](*job[1:])
            except BaseException as error:
                failed.append(error)

    def do(function: Callable[..., Any], *arguments: Any) -> None:
        if failed:
            raise failed[0]
        due.put((function, *arguments))

    thread = threading.Thread(target=work, name="behind", daemon=True)
    thread.start()
    try:
        yield do
    finally:
        due.put(_END)
        thread.join()
    if failed:
        raise failed[0]
