"""How a large image is cut into blocks, tiles and batches, so that memory stays below a limit; and what it will take."""

import ctypes
import os
import re
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, Protocol

import torch
from torch import Tensor

from perpixel.data.mosaics import Grid
from perpixel.data.windows import Source
from perpixel.models.model import SegmentationModel
from perpixel.tiling import KEPT, Tiler

WHOLE = 2**22  # pixels; an image up to this size is one block, so that a refiner sees all of it
SIDE = 2048  # pixels, the largest side of a block: larger ones gain little and hold more
SCORES = 2**28  # bytes of a block's scores where no limit is given
MOST = 2**30  # bytes of the scores of an image that is one block all the same
BATCH = 16  # windows at a time on a GPU at most
LOOKED_AT = 32  # blocks along a side that are looked at for the one that reads most; how they cut windows repeats after a few
SHARE = 0.8  # of the free memory of a GPU that is used where no limit is given
LONG = 0.5  # seconds of a window that is timed once
MANY = 100  # windows of an image from which on a second run of one, to time it, costs a hundredth at most
ALIKE = "raise the limit here, or give all shares and runs of this work the same one"
UNITS = {"": 1, "K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}


@dataclass(frozen=True)
class Limits:
    """Bytes that the whole process (ram) and its GPU (vram) may hold; None: blocks as ever, smaller where the machine has less to give."""

    ram: int | None = None
    vram: int | None = None


@dataclass(frozen=True)
class Plan:
    """What a large image will take."""

    tiler: Tiler
    grid: Grid
    windows: int
    ram: int  # bytes, the peak that is expected of the process
    vram: int  # bytes, of the GPU
    seconds: float  # for all windows and both passes, by the time of one window
    shares: int = 1  # processes that the blocks are dealt out to

    def __str__(self) -> str:
        height, width = self.grid.size
        memory = f"about {self.ram / 2**20:,.0f} MB of memory" + (f", {self.vram / 2**20:,.0f} MB of the GPU's" if self.vram else "")
        blocks = f"{len(self.grid.blocks)} blocks of {self.grid.block[0]}x{self.grid.block[1]}"
        tiles = f"{self.windows:,} tiles of {self.tiler.window} pixels, {self.tiler.batch} at a time"
        alone = f"the network alone about {_spoken(self.seconds / self.shares)}"
        whose = f" for each of {self.shares} shares" if self.shares > 1 else ""
        return f"{height:,} x {width:,} pixels: {blocks}, {tiles}; {memory}; {alone}{whose}"


def parse_bytes(text: str) -> int:
    """ "800M", "2G", "1.5GB", "2GiB" as bytes; units are powers of 1024.

    Raises:
        ValueError: for anything else.
    """
    found = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([KMGT]?)(?:i?B)?\s*", text, re.IGNORECASE)
    if found is None or not float(found[1]):
        raise ValueError(f"memory limit is {text!r}; legal is a number with a unit, such as 800M or 2G")
    return int(float(found[1]) * UNITS[found[2].upper()])


def shard_of(text: str | None) -> tuple[int, int]:
    """(i, n), i from 0, of "1/4" (the first of four); None: what torchrun says (RANK, WORLD_SIZE), else the whole.

    Raises:
        ValueError: for another text.
    """
    if text is None:
        by_torchrun = "TORCHELASTIC_RUN_ID" in os.environ  # job systems set the others too, for commands that know nothing of them
        return (int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])) if by_torchrun else (0, 1)
    part, slash, parts = text.partition("/")
    if not (slash and part.isdecimal() and parts.isdecimal() and 1 <= int(part) <= int(parts)):
        raise ValueError(f"shard is {text!r}; legal is i/n with 1 <= i <= n, such as 2/4")
    return int(part) - 1, int(parts)


def keep_freed_memory() -> bool:
    """Memory that a window's maps have left stays with the process for those of the next, instead of going back to the system each time.

    Fetching it anew takes a sixth of the time of a narrow network on a processor. For the whole process; only glibc is asked (mallopt(3)).

    Returns:
        Whether that is so now.
    """
    trim_threshold, mmap_threshold = -1, -3  # malloc.h; 32 MiB is the most that the second takes
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError, TypeError):  # another C library, macOS, Windows
        return False
    return bool(mallopt(trim_threshold, 2**30) and mallopt(mmap_threshold, 2**25))


def one_block(size: tuple[int, int]) -> Grid:
    """The whole image as one block."""
    height, width = (-(-side // unit) * unit for side in size for unit in [256 if side > 256 else 16])
    return Grid(size, (height, width))


class Reaching(Protocol):
    """A tiler, or one of several views."""

    def reach(self, size: tuple[int, int], top: int, left: int, height: int, width: int) -> tuple[int, int, int, int]:
        """See `Tiler.reach`."""


@dataclass(frozen=True)
class Needs:
    """What is computed of each block besides the model's scores.

    Attributes:
        bands: that the model takes.
        maps: values written per pixel beside the label (probabilities, entropy).
        copies: of a block's scores that are held at a time; a refiner, samples and views hold more than 2.
        extra: bytes for each pixel that is scored, beside those.
        once: bytes beside all these, whatever the block.
        context: pixels around a block that are scored too.
        viewed: what reads the windows: the tiler itself, or several views of it.
    """

    bands: int
    maps: int = 0
    copies: float = 2
    extra: int = 0
    once: int = 0
    context: int = 0
    viewed: Callable[[Tiler], Reaching] = lambda tiler: tiler


def plan(
    model: SegmentationModel,
    source: Source,
    tile: int,
    overlap: int | Literal["exact"],
    limits: Limits,
    needs: Needs,
    cut: tuple[int, Grid] | None = None,
) -> Plan:
    """Blocks, tile and batch for an image, below the limits; one window is run to see what it takes.

    Args:
        model: in eval mode, on its device.
        source: the image.
        tile, overlap: the bundle's; a smaller tile is taken only where the limits ask for it.
        limits: on memory.
        needs: of each block.
        cut: tile and blocks, where they are settled already: what these take.

    Raises:
        ValueError: if even the smallest tile and block, or those settled, do not fit, saying what they would need.
    """
    least, room = 0, _free_ram()
    while True:
        tiler = Tiler(model, tile if cut is None else cut[0], overlap)
        seconds, base, vram, vram_growth = _measured(model, tiler, needs.bands, source.size)
        room_vram = limits.vram if limits.vram is not None else int(SHARE * _free_vram(model))
        grids = _grids(tiler, source.size) if cut is None else [cut[1]]
        for grid in grids:
            scores, held = _block_bytes(model, tiler, source, grid, needs)
            on_gpu = vram > 0
            ram = base + held + (0 if on_gpu else scores)
            gpu = vram + scores if on_gpu else 0
            least = ram if not least else min(least, ram)
            # Without a limit the memory of the moment decides on blocks only, not on tiles, on which scores depend.
            fits = ram <= limits.ram if limits.ram is not None else (scores <= SCORES and ram <= room) or grid is grids[-1]
            if fits and (not on_gpu or gpu <= room_vram):
                batch = _batch(gpu, vram_growth, room_vram) if on_gpu else 1
                tiler.batch = batch
                total = seconds * tiler.windows(source.size)
                return Plan(tiler, grid, tiler.windows(source.size), ram, gpu + (batch - 1) * vram_growth, total)
        need = f"about {least / 2**20:,.0f} MB of memory" + (f" and {vram / 2**20:,.0f} MB of the GPU's" if vram else "")
        if cut is not None:
            begun = f"tiles of {cut[0]} pixels and blocks of {cut[1].block[0]}x{cut[1].block[1]}, begun with"
            raise ValueError(f"{begun}, need {need}; {ALIKE}")
        smaller = tile // 2
        least_tile = 1 if overlap == "exact" else overlap + 1
        if smaller < least_tile or Tiler(model, smaller, overlap).window >= tiler.window:
            raise ValueError(f"the smallest tile and block of this model need {need}; raise the limit, or take a smaller model")
        tile = smaller


def _grids(tiler: Tiler, size: tuple[int, int]) -> list[Grid]:
    """Blocks to try, largest first, the whole where it is small. They hold whole steps of the tiler where a label TIFF's tiles fit."""
    unit = tiler.step if tiler.step % 64 == 0 or (tiler.step % 16 == 0 and tiler.step <= 512) else 256
    sides = [unit * n for n in range(max(SIDE // unit, 1), 0, -1)] + [side for side in (512, 256) if side < unit]
    whole = [one_block(size)] if size[0] * size[1] <= WHOLE else []
    return whole + [Grid(size, (side, side)) for side in sides]


def _block_bytes(model: SegmentationModel, tiler: Tiler, source: Source, grid: Grid, needs: Needs) -> tuple[int, int]:
    """Bytes of a block's scores with what is computed from them and kept of windows; and of pixels read and outputs that wait.

    Of the block that needs most: which windows a block cuts, and so how far around it is read, differs from one to the next.
    """
    several, size = len(grid.blocks) > 1, grid.size
    around, reach = needs.context * several, needs.viewed(tiler).reach
    height, width = (min(side, full) for side, full in zip(grid.block, size, strict=True))
    rows, read_rows = _most(size[0], height, around, lambda first, count: reach(size, first, 0, count, width)[2])
    columns, read_columns = _most(size[1], width, around, lambda first, count: reach(size, 0, first, height, count)[3])
    scores = int(rows * columns * (4 * model.classes * needs.copies + needs.extra))
    if several:  # what windows over the borders say of the next block and, up to a limit, of those below
        across = 4 * model.classes * tiler.window
        scores += min(KEPT, across * size[1]) + across * rows
    region = read_rows * read_columns * source.bands * 4
    held = source.held(grid.block[0] + 2 * tiler.window)
    return scores, 3 * region + held + 3 * height * width * (1 + 2 * needs.maps) + needs.once


def _most(side: int, block: int, around: int, read: Callable[[int, int], int]) -> tuple[int, int]:
    """Of blocks along a side: how many pixels are scored for one at most, with those around it, and how many are read."""
    starts = range(0, side, block)
    seen = [(max(start - around, 0), min(start + block + around, side)) for start in {*starts[:LOOKED_AT], *starts[-2:]}]
    return max(last - first for first, last in seen), max(read(first, last - first) for first, last in seen)


def batch_beside(model: SegmentationModel, tiler: Tiler, bands: int, beside: int) -> int:
    """Windows that a GPU takes at a time, beside so many bytes; 1 on a processor, where more bring nothing."""
    _, _, vram, growth = _measured(model, tiler, bands, (tiler.window, tiler.window))
    return _batch(vram + beside, growth, int(SHARE * _free_vram(model))) if vram else 1


def _measured(model: SegmentationModel, tiler: Tiler, bands: int, size: tuple[int, int]) -> tuple[float, int, int, int]:
    """Seconds of a window of an image of `size` pixels, in the first pass too where there is one; the process's peak memory in bytes with
    a window; the GPU's, and what one adds there, 0 where there is none.
    """
    parameter = next(model.parameters())
    window = torch.zeros(1, bands, tiler.window, tiler.window, device=parameter.device, dtype=parameter.dtype)
    window = window.contiguous(memory_format=torch.channels_last)
    gpu = parameter.device.type == "cuda"
    before = torch.cuda.memory_allocated(parameter.device) if gpu else 0
    if gpu:
        torch.cuda.reset_peak_memory_stats(parameter.device)
    with _watched() as held:
        seconds = _timed(model, window)
        # The first one also waits for memory and libraries (on a GPU for long); of a long one that is a small part.
        if gpu or (seconds < LONG and tiler.windows(size) >= MANY):
            seconds = min(seconds, _timed(model, window))
        if tiler.two_passes(size):
            seconds += _timed(lambda given: model.encoder(given).maps[-1], window)
    peak = torch.cuda.max_memory_allocated(parameter.device) if gpu else 0
    return seconds, max(held), peak, peak - before


def _timed(network: Callable[[Tensor], Tensor], window: Tensor) -> float:
    start = time.perf_counter()
    with torch.inference_mode():
        network(window).sum().item()  # the sum waits for the GPU
    return time.perf_counter() - start


def _batch(gpu: int, growth: int, room: int) -> int:
    batch = 1
    while batch < BATCH and gpu + (2 * batch - 1) * growth <= room:
        batch *= 2
    return batch


def _free_vram(model: SegmentationModel) -> int:
    device = next(model.parameters()).device
    return torch.cuda.mem_get_info(device)[0] + torch.cuda.memory_reserved(device) if device.type == "cuda" else 0


def _free_ram() -> int:
    """Bytes that the process may hold, with those it has: what the machine can give (Linux, proc(5), meminfo) and its control group may."""
    room = 2**63
    with suppress(OSError):
        if found := re.search(r"MemAvailable:\s+(\d+) kB", Path("/proc/meminfo").read_text("ascii")):
            room = int(found[1]) * 1024 + _resident()
    with suppress(OSError, ValueError):  # "max" where there is no limit
        room = min(room, int(Path("/sys/fs/cgroup/memory.max").read_text("ascii")))
    return room


def _resident() -> int:
    """Bytes of the process that are in memory (Linux, proc(5), statm); 0 where the system does not say."""
    try:
        return int(Path("/proc/self/statm").read_text("ascii").split()[1]) * os.sysconf("SC_PAGE_SIZE")
    except OSError:
        return 0


@contextmanager
def _watched() -> Iterator[list[int]]:
    """What the process holds, looked at every few milliseconds by a thread. (The system's own peak is that of all its life.)"""
    held, done = [_resident()], threading.Event()

    def watch() -> None:
        while not done.wait(0.003):
            held.append(_resident())

    thread = threading.Thread(target=watch, name="watch", daemon=True)
    thread.start()
    try:
        yield held
    finally:
        done.set()
        thread.join()
        held.append(_resident())


def _spoken(seconds: float) -> str:
    if seconds < 90:
        return f"{max(round(seconds), 1)} seconds"
    return f"{seconds / 60:.0f} minutes" if seconds < 5400 else f"{seconds / 3600:.1f} hours"
