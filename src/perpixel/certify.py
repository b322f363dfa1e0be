"""`perpixel certify`: does a model predict an image by parts as it predicts it whole? Measured, and where it can't, why."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.markup import escape
from rich.table import Table
from torch import Tensor

from perpixel.bundle import Bundle, load_bundle
from perpixel.data.dataset import conform
from perpixel.data.images import read_image
from perpixel.models.dependency import dependency
from perpixel.tiling import Overlap, Tiler, mirror_pad, reader

TOLERANCE = 1e-5  # of the largest logit, in float32: what sums in another order may differ by
SMALLEST_TILE = 64  # pixels; what is measured holds for tiles of any size, and small ones cut an image often


@dataclass(frozen=True)
class Certificate:
    """What was measured.

    Attributes:
        model, encoder: of the bundle.
        exact: whether overlap "exact" is possible and every logit was the same, to `TOLERANCE` of the largest.
        obstacle: why parts can't give what the whole gives; "" where they can.
        size: (height, width) of the image in pixels.
        whole: (height, width) that one pass over the whole image labels.
        tile, overlap: that the image was cut by; the overlap is a number where "exact" is not possible.
        windows: their number.
        before, after: the halo, pixels that a window shows before and behind the part that it gives, beyond the margin.
        cell, margin: parts begin at multiples of a cell; pixels at each border that are seen and never labelled.
        two_passes: whether a first pass takes the mean of the encoder's map over the image.
        difference: largest one of a logit.
        largest: absolute logit.
        labels_changed: share of pixels whose best class differs.
        wasted: share of the pixels that windows of the bundle's tile see of a large image twice.
    """

    model: str
    encoder: str | None
    exact: bool
    obstacle: str
    size: tuple[int, int]
    whole: tuple[int, int]
    tile: int
    overlap: Overlap
    windows: int
    before: int
    after: int
    cell: int
    margin: int
    two_passes: bool
    difference: float
    largest: float
    labels_changed: float
    wasted: float

    def to_json(self) -> dict[str, Any]:
        """Plain types."""
        return asdict(self) | {"size": list(self.size), "whole": list(self.whole)}


@contextmanager
def full_float32() -> Iterator[None]:
    """In which products of float32 are computed in float32; GPUs round the operands of convolutions to TF32 by default."""
    backends: Any = torch.backends  # whose modules turn into objects with the attributes below
    places = [backends.cuda.matmul, backends.cudnn.conv, backends.mkldnn.matmul, backends.mkldnn.conv]
    before = [place.fp32_precision for place in places]
    for place in places:
        place.fp32_precision = "ieee"
    try:
        yield
    finally:
        for place, precision in zip(places, before, strict=True):
            place.fp32_precision = precision


@full_float32()
@torch.inference_mode()
def certify(
    bundle: Bundle | Path | str, image: Path | str | None = None, tile: int | None = None, device: str | None = None
) -> Certificate:
    """Predicts an image whole and by parts, in float32, and compares.

    Args:
        bundle: a loaded bundle or its path.
        image: a file; None: noise of an odd size that takes several windows along both axes.
        tile: side of the parts in pixels; None: the smallest whole cells from 64 on.
        device: where a bundle given as a path runs; None: on the GPU where there is one.

    Raises:
        ValueError: not a bundle, an unreadable image or one of other bands, or an image that a single window shows whole.

    One pass over the whole image has to fit into memory.
    """
    if not isinstance(bundle, Bundle):
        bundle = load_bundle(Path(bundle), device or ("cuda" if torch.cuda.is_available() else "cpu"))
    model, card = bundle.model.float(), bundle.card
    field = dependency(model)
    side = tile or -(-SMALLEST_TILE // field.cell) * field.cell
    overlap: Overlap = "exact"
    if field.obstacle:  # blended as the bundle says, so that it is seen what that costs
        overlap = card.overlap if isinstance(card.overlap, int) else 0
        side = max(side, overlap + field.cell)
    tiler = Tiler(model, side, overlap)
    pixels = _noise(bundle, tiler) if image is None else _pixels(bundle, Path(image))
    size = (pixels.shape[-2], pixels.shape[-1])
    if (windows := tiler.windows(size)) == 1:
        raise ValueError(
            f"{image}: {size[0]}x{size[1]} pixels; one window of {tiler.window} shows all of it, so there is nothing to compare. "
            "Give a larger image, or none"
        )
    read = reader(pixels)
    tiled = tiler.prepared(read, size).block(read, size, 0, 0, *size)
    whole = _in_one_pass(tiler, pixels)
    difference, largest = float((tiled - whole).abs().max()), float(whole.abs().max())
    large = Tiler(model, max(card.tile, side), overlap)
    return Certificate(
        model=card.model,
        encoder=card.encoder,
        exact=not field.obstacle and difference <= TOLERANCE * largest,
        obstacle=field.obstacle,
        size=size,
        whole=tiler.whole_size(size),
        tile=side,
        overlap=overlap,
        windows=windows,
        before=field.before,
        after=field.after,
        cell=field.cell,
        margin=model.geometry.margin,
        two_passes=bool(field.means),
        difference=difference,
        largest=largest,
        labels_changed=float((tiled.argmax(0) != whole.argmax(0)).double().mean()),
        wasted=1 - (large.step / large.window) ** 2,
    )


def _noise(bundle: Bundle, tiler: Tiler) -> Tensor:
    """Normalised pixels that no layer can guess, of odd sides; at least two windows along each."""
    generator = torch.Generator().manual_seed(0)
    height, width = (tiler.window + extra * tiler.cell + 2 * tiler.step for extra in (1, 2))
    noise = torch.randn(bundle.card.bands, height | 1, width | 1, generator=generator)
    return noise.to(next(bundle.model.parameters()).device)


def _pixels(bundle: Bundle, path: Path) -> Tensor:
    pixels = conform(read_image(path), bundle.card.bands, bundle.card.dtype, str(path))
    return bundle.normalize(torch.from_numpy(pixels).to(next(bundle.model.parameters()).device))


def _in_one_pass(tiler: Tiler, image: Tensor) -> Tensor:
    """Without any window: the mirrored image through the model."""
    height, width = image.shape[-2:]
    margin = tiler.model.geometry.margin
    down, right = (labelled - side for labelled, side in zip(tiler.whole_size((height, width)), (height, width), strict=True))
    logits: Tensor = tiler.model(mirror_pad(image, margin, margin + down, margin, margin + right)[None])[0, :, :height, :width]
    return logits


def render(certificate: Certificate, console: Console) -> None:
    """For people."""
    result = certificate
    table = Table(show_header=False, box=None)
    height, width = result.size
    more = "" if result.whole == result.size else f", mirrored to {result.whole[0]}x{result.whole[1]}"
    rows = [
        ("model", result.model if result.encoder is None else f"{result.model} on {result.encoder}"),
        ("image", f"{height}x{width} pixels{more}"),
        ("cut into", f"{result.windows} windows, tile {result.tile}, overlap {result.overlap}"),
    ]
    if not result.obstacle:
        rows.append(("halo", f"{result.before} pixels before a part, {result.after} behind it, margin {result.margin}, cell {result.cell}"))
    if result.two_passes:
        rows.append(("passes", "2: the first takes the mean of the encoder's map over the image"))
    rows += [
        ("largest difference", f"{result.difference:.3g} in logits up to {result.largest:.3g}"),
        ("labels changed", f"{result.labels_changed:.4%} of the pixels"),
        ("wasted", f"{result.wasted:.0%} of what windows of the bundle's tile see"),
    ]
    for name, value in rows:
        table.add_row(name, escape(value))
    console.print(table)
    if result.obstacle:
        console.print(f"[yellow]not exact:[/] {escape(result.obstacle)}", soft_wrap=True)
    elif result.exact:
        console.print("[green]exact:[/] the parts give what the whole gives")
    else:
        console.print("[bold red]not exact:[/] the difference is larger than rounding explains")
