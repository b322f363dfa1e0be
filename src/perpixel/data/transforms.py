"""Normalisation, and the augmentation of an image together with its labels.

Every random number comes from the generator that is passed in, so a sample is a pure function of (seed, sample number).
Scale jitter and crop are one resized crop: only the window that is kept is read and resampled. Rotation and elastic deformation are
one resampling of that window. Brightness, contrast, saturation and hue are one linear map of colours, rounded once.
Labels and weights are only ever picked (nearest neighbour): no value appears that was not in them, but `ignore` and 0 outside the picture.
"""

import math
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional
from torchvision.transforms import InterpolationMode
from torchvision.transforms.v2.functional import resize

# Luma and chroma of NTSC colour (FCC 1953; luma weights as in ITU-R BT.601): rows Y, I, Q over R, G, B in any linear range.
YIQ = ((0.299, 0.587, 0.114), (0.5959, -0.2746, -0.3213), (0.2115, -0.5227, 0.3112))
LIMITS = {torch.uint8: 255.0, torch.uint16: 65535.0}  # integer images are clipped to what their type holds; float images have no limit
DRAWS = 14  # uniform numbers per sample: a fixed count, so that switching one step on or off leaves the others' numbers alone


@dataclass(frozen=True)
class Normalize:
    """Stored values to the numbers a model sees: (x / scale - mean) / std, band by band.

    Args:
        scale: what the largest stored value is divided by: 255 (uint8), 65535 (uint16), 1 (float).
        mean, std: of x / scale, one per band.
    """

    scale: float
    mean: tuple[float, ...]
    std: tuple[float, ...]

    def __post_init__(self) -> None:
        if len(self.mean) != len(self.std):
            raise ValueError(
                f"normalisation has {len(self.mean)} means and {len(self.std)} standard deviations. Give one of each per band."
            )
        if not self.scale > 0 or not all(deviation > 0 for deviation in self.std):
            raise ValueError(f"scale {self.scale} and std {list(self.std)} must be above 0. A constant band takes std 1.")

    def __call__(self, image: Tensor) -> Tensor:
        """Normalise an image or a batch.

        Args:
            image: (..., C, H, W) uint8, uint16 or float, as read.

        Returns:
            (..., C, H, W) float32, in the memory format of `image`.

        Raises:
            ValueError: if C is not the number of means.
        """
        if image.ndim < 3 or image.shape[-3] != len(self.mean):
            raise ValueError(
                f"image of shape {tuple(image.shape)} does not fit a normalisation of {len(self.mean)} bands: "
                f"(..., {len(self.mean)}, height, width) is expected. Was it made for images of another kind?"
            )
        gain = [1 / (self.scale * deviation) for deviation in self.std]
        shift = [-mean / deviation for mean, deviation in zip(self.mean, self.std, strict=True)]
        if image.dtype == torch.float32:
            image = image.clone()
        per_band = torch.tensor([gain, shift], device=image.device).view(2, -1, 1, 1)
        return image.to(torch.float32).mul_(per_band[0]).add_(per_band[1])


@dataclass(frozen=True)
class Window:
    """The rectangle of source pixels that becomes the crop; it may reach beyond the picture."""

    top: int
    left: int
    height: int
    width: int


class Cut(NamedTuple):
    """What the image of a sample is made from; a tuple, so that `DataLoader` can put its tensors in pinned memory."""

    region: Tensor  # (C, h, w) uint8 or float32, cut from the picture
    size: tuple[int, int]  # that it is resized to
    grid: Tensor | None  # (h, w, 2): where each pixel is then taken from, from -1 to 1 across and down; None: it is the crop
    flips: list[int]
    turns: int
    limit: float | None  # of the picture's values
    colour: Tensor | None  # (C + 1, C): the linear map of colours, and what the mean over the crop adds to each


@dataclass(frozen=True)
class Augmentation:
    """Random window, geometry and colour for one image and its labels. Everything is off unless asked for.

    Args:
        crop: (height, width) of the returned image, in pixels.
        margin: pixels per side the model does not label; the returned labels are `crop` less the margin on each side.
        scale: range of the zoom (above 1 enlarges), drawn uniformly in its logarithm.
        flip_horizontal, flip_vertical: mirrored in half of the samples.
        rotate90: a quarter turn 0 to 3 times, each as likely.
        rotation: largest angle in degrees, either way.
        brightness, contrast, saturation: factors are drawn from 1 - value to 1 + value. As in torchvision: brightness scales, contrast
            moves away from the crop's mean grey, saturation away from each pixel's grey.
        hue: largest shift in turns of the colour circle, either way (a rotation in the chroma plane of YIQ, which keeps luma).
        elastic_sigma: standard deviation of the elastic displacement, in pixels of the crop (10 in arXiv:1505.04597, section 3.1).
        elastic_grid: nodes of the displacement grid per side (3 in the same section).
        rare_class_probability: share of the samples whose window is laid around a pixel of a class drawn from those in this picture,
            with odds 1 / `class_pixels`; the pixel falls into the middle half of the labelled window where the picture allows.
        class_pixels: pixels of each class in the training set; needed for rare classes.
        ignore: label of pixels nothing is known about.

    Colour steps apply to images of 1 or 3 bands; saturation and hue to 3 bands only. Other images keep their values.

    Raises:
        ValueError: if an argument is out of range.
    """

    crop: tuple[int, int]
    margin: int = 0
    scale: tuple[float, float] = (1.0, 1.0)
    flip_horizontal: bool = False
    flip_vertical: bool = False
    rotate90: bool = False
    rotation: float = 0.0
    brightness: float = 0.0
    contrast: float = 0.0
    saturation: float = 0.0
    hue: float = 0.0
    elastic_sigma: float = 0.0
    elastic_grid: int = 3
    rare_class_probability: float = 0.0
    class_pixels: tuple[int, ...] = ()
    ignore: int = 255

    def __post_init__(self) -> None:
        low, high = self.scale
        rules = {
            f"crop {self.crop} less margin {self.margin} per side": self.margin >= 0 and min(self.crop) > 2 * self.margin,
            f"scale {self.scale} (0 < least <= most)": 0 < low <= high,
            f"rotation {self.rotation} (0 to 180 degrees)": 0 <= self.rotation <= 180,
            f"brightness {self.brightness} (0 to 1)": 0 <= self.brightness <= 1,
            f"contrast {self.contrast} (0 to 1)": 0 <= self.contrast <= 1,
            f"saturation {self.saturation} (0 to 1)": 0 <= self.saturation <= 1,
            f"hue {self.hue} (0 to 0.5 turns)": 0 <= self.hue <= 0.5,
            f"elastic_sigma {self.elastic_sigma} (0 or more pixels)": self.elastic_sigma >= 0,
            f"elastic_grid {self.elastic_grid} (2 or more nodes)": self.elastic_grid >= 2,
            f"rare_class_probability {self.rare_class_probability} (0 to 1)": 0 <= self.rare_class_probability <= 1,
            "rare_class_probability without class_pixels": not self.rare_class_probability or bool(self.class_pixels),
        }
        if broken := [rule for rule, holds in rules.items() if not holds]:
            raise ValueError(f"augmentation cannot be done: {'; '.join(broken)}. Mend the value in the recipe.")

    def __call__(
        self, image: Tensor, labels: Tensor, rng: torch.Generator, weights: Tensor | None = None
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        """Draw one sample.

        Args:
            image: (C, H, W) uint8, uint16 or float, as read; any size from 1x1.
            labels: (H, W) integers.
            rng: on the CPU; advanced by the draw. The result depends on it and the other arguments only.
            weights: (H, W) float loss weights per pixel, moved like the labels.

        Returns:
            The image (C, *crop), contiguous: uint8 for uint8, otherwise float32 in the range as read; the labels, and the weights if
            given, (crop less margin) in their own dtypes. Beyond the picture's border the image goes on as its mirror image (without
            repeating the edge pixel, as often as needed), labels are `ignore` and weights 0: nothing is learned from a reflection.
            Undeformed, the labelled part always shows the picture; rotation and elastic deformation may move its edge out of sight.

        Raises:
            ValueError: if the shapes do not belong together.
        """
        cut, labels, weights = self.cut(image, labels, rng, weights)
        return self.render(cut), labels, weights

    def cut(self, image: Tensor, labels: Tensor, rng: torch.Generator, weights: Tensor | None = None) -> tuple[Cut, Tensor, Tensor | None]:
        """The cheap half of `__call__`, on the CPU: all that is drawn, the pixels that the crop is made from, the finished labels.

        Arguments and errors as there. `render` makes the image of it, on any device.
        """
        self._check(image, labels, weights)
        draw = torch.rand(DRAWS, generator=rng).tolist()
        turns = int(draw[0] * 4) if self.rotate90 else 0
        # The window is cut before the quarter turn, which swaps its sides.
        size = self.crop if turns % 2 == 0 else (self.crop[1], self.crop[0])
        window = self._window(labels, size, draw[1:7])
        fields = [(labels, self.ignore)] if weights is None else [(labels, self.ignore), (weights, 0)]
        grid = None
        if self.rotation or self.elastic_sigma:
            rows, columns = self._positions(window, size, math.radians(self.rotation) * (2 * draw[7] - 1), rng)
            down, across = window.height / size[0], window.width / size[1]
            window = _seen(rows, columns)
            resized = max(1, round(window.height / max(1.0, down))), max(1, round(window.width / max(1.0, across)))
            grid = _sampling_grid(rows, columns, window)
        else:
            rows, columns = _sources(window.top, window.height, size[0])[:, None], _sources(window.left, window.width, size[1])[None]
            resized = size
        picked = [_pick(field, self._inner(rows), self._inner(columns), outside) for field, outside in fields]
        flips = [axis for axis, wanted, u in ((-2, self.flip_vertical, draw[8]), (-1, self.flip_horizontal, draw[9])) if wanted and u < 0.5]
        picked = [_turned(field, flips, turns) for field in picked]
        with torch.autocast("cpu", enabled=False):  # of a caller, whose network it is for: colours would lose bits
            colour = self._colour_map(image.shape[0], draw[10:14])
        cut = Cut(_region(image, window), resized, grid, flips, turns, LIMITS.get(image.dtype), colour)
        return cut, picked[0], picked[1] if weights is not None else None

    def render(self, cut: Cut, device: torch.device | str = "cpu") -> Tensor:
        """The image (C, *crop) of a `cut`, made on `device`; it waits for nothing there.

        A GPU's resampling rounds otherwise than a processor's: values differ by one step of the image's type here and there, before the
        colours, which multiply it.
        """
        region = cut.region.to(device, non_blocking=True)
        with torch.autocast(region.device.type, enabled=False):  # as in `cut`
            # Zooming out, too, shrinks with the resizer's low-pass first, because bilinear sampling at wide steps would alias.
            taken = region if region.shape[-2:] == cut.size else _resize(region, cut.size)
            if cut.grid is not None:
                taken = _sampled(taken, cut.grid.to(device, non_blocking=True))
            taken = _turned(taken, cut.flips, cut.turns)
            return taken if cut.colour is None else _recoloured(taken, cut.colour.to(device, non_blocking=True), cut.limit)

    def _check(self, image: Tensor, labels: Tensor, weights: Tensor | None) -> None:
        shapes = [tuple(labels.shape)] + ([] if weights is None else [tuple(weights.shape)])
        if image.ndim != 3 or image.numel() == 0 or any(shape != tuple(image.shape[1:]) for shape in shapes):
            raise ValueError(
                f"image {tuple(image.shape)} and labels (and weights) {shapes} do not belong together: (bands, height, width) with "
                f"(height, width) of at least one pixel is expected. Pass the image band first, and labels of the same picture."
            )

        if self.ignore > torch.iinfo(labels.dtype).max:
            raise ValueError(f"ignore {self.ignore} does not fit labels of {labels.dtype}. Give uint16 labels, or ignore=255.")

    def _window(self, labels: Tensor, size: tuple[int, int], draw: list[float]) -> Window:
        """The source rectangle: zoomed, and placed so that its labelled part lies in the picture (or the picture in it)."""
        low, high = self.scale
        zoom = low * (high / low) ** draw[0]
        height, width = (max(1, round(side / zoom)) for side in size)
        target = self._rare_pixel(labels, draw[4], draw[5]) if draw[3] < self.rare_class_probability else None
        row, column = (None, None) if target is None else target
        top = _place(labels.shape[0], height, self.margin * height / size[0], draw[1], row)
        left = _place(labels.shape[1], width, self.margin * width / size[1], draw[2], column)
        return Window(top, left, height, width)

    def _rare_pixel(self, labels: Tensor, which: float, where: float) -> tuple[int, int] | None:
        """(row, column) of a pixel of a class of this picture, drawn with odds 1 / class_pixels; None where nothing is labelled."""
        classes = len(self.class_pixels)
        flat = labels.flatten().to(torch.int64)
        present = torch.bincount(flat, minlength=classes)[:classes] > 0
        if self.ignore < classes:
            present[self.ignore] = False
        odds = (present / torch.tensor(self.class_pixels, dtype=torch.float64).clamp(min=1)).cumsum(0)
        if not present.any():
            return None
        chosen = min(int(torch.searchsorted(odds, which * odds[-1], right=True)), int(present.nonzero().max()))
        pixels = (flat == chosen).nonzero().flatten()
        return divmod(int(pixels[int(where * len(pixels))]), labels.shape[1])

    def _positions(self, window: Window, size: tuple[int, int], angle: float, rng: torch.Generator) -> tuple[Tensor, Tensor]:
        """Rows and columns (h, w), in fractional source pixels, of the pixels of the deformed crop."""
        height, width = size
        rows = (torch.arange(height) + 0.5 - height / 2)[:, None].expand(size)
        columns = (torch.arange(width) + 0.5 - width / 2)[None].expand(size)
        if self.elastic_sigma:
            displacement = elastic_displacement(height, width, rng, self.elastic_grid, self.elastic_sigma)
            rows, columns = rows + displacement[0], columns + displacement[1]
        rows, columns = math.cos(angle) * rows + math.sin(angle) * columns, math.cos(angle) * columns - math.sin(angle) * rows
        rows = rows * (window.height / height) + (window.top + window.height / 2 - 0.5)
        return rows, columns * (window.width / width) + (window.left + window.width / 2 - 0.5)

    def _inner(self, positions: Tensor) -> Tensor:
        """The labelled part of (h, w), (h, 1) or (1, w) positions, to the nearest source pixel."""
        if positions.is_floating_point():
            positions = (positions + 0.5).floor().to(torch.int64)
        for dim, side in enumerate(positions.shape):
            if side > 1:
                positions = positions.narrow(dim, self.margin, side - 2 * self.margin)
        return positions

    def _colour_map(self, bands: int, draw: list[float]) -> Tensor | None:
        """Brightness, contrast, saturation and hue as one linear map; None where colours stay."""
        amounts = (self.brightness, self.contrast, self.saturation if bands == 3 else 0.0, self.hue if bands == 3 else 0.0)
        if bands not in (1, 3) or not any(amounts):
            return None
        shifts = [amount * (2 * u - 1) for amount, u in zip(amounts, draw, strict=True)]
        brightness, contrast, saturation = (1 + shift for shift in shifts[:3])
        luma = torch.tensor(YIQ[0] if bands == 3 else (1.0,))
        mixing = saturation * torch.eye(bands) + (1 - saturation) * luma.expand(bands, bands)
        if shifts[3]:
            mixing = _hue_rotation(2 * math.pi * shifts[3]) @ mixing
        # Grey is left as it is by saturation and hue, so contrast's mean grey passes through as one constant.
        return torch.cat([mixing * (brightness * contrast), luma[None] * (brightness * (1 - contrast))])


def elastic_displacement(height: int, width: int, rng: torch.Generator, grid: int = 3, sigma: float = 10.0) -> Tensor:
    """A smooth random displacement of every pixel of a tile.

    Args:
        height, width: of the tile, in pixels.
        rng: on the CPU.
        grid: nodes per side; the outer nodes lie on the tile's corner pixels (the paper does not say where they lie).
        sigma: standard deviation of the nodes' displacement, in pixels.

    Returns:
        (2, H, W) float32: displacement along rows and along columns, in pixels.

    Source: random vectors on a coarse 3 x 3 grid, Gaussian with 10 pixels standard deviation, bicubic interpolation between them:
    Ronneberger et al. 2015, arXiv:1505.04597, section 3.1.
    """
    nodes = sigma * torch.randn(1, 2, grid, grid, generator=rng)
    return functional.interpolate(nodes, (height, width), mode="bicubic", align_corners=True)[0]


def _place(side: int, extent: int, border: float, draw: float, target: int | None) -> int:
    """First source pixel of a window along one axis.

    Args:
        side: of the picture. extent: of the window. border: unlabelled part of the window at each end, all in source pixels.
        draw: uniform number. target: a pixel to have in the middle half of the labelled part, if any.
    """
    ends = sorted((-border, side - extent + border))
    first, last = math.ceil(ends[0]), math.floor(ends[1])
    if first > last:  # one position only, and it is not a whole number
        return round(sum(ends) / 2)
    if target is None:
        return first + min(int(draw * (last - first + 1)), last - first)
    wanted = target - border - (extent - 2 * border) * (0.25 + 0.5 * draw)
    return min(max(round(wanted), first), last)


def _sources(start: int, extent: int, size: int) -> Tensor:
    """The source pixel that holds the centre of each of `size` pixels spread over `extent` source pixels, in exact integer arithmetic."""
    return torch.div((2 * torch.arange(size) + 1) * extent, 2 * size, rounding_mode="floor") + start


def _pick(field: Tensor, rows: Tensor, columns: Tensor, outside: int) -> Tensor:
    """Values of (H, W) at integer positions, (h, 1) and (1, w) or both (h, w); `outside` beyond the picture."""
    height, width = field.shape
    kind = field.dtype
    if kind == torch.uint16:  # torch indexes few unsigned types; the bits are the same
        field, outside = field.view(torch.int16), outside - (outside > 32767) * 65536
    inside_rows, inside_columns = rows.clamp(0, height - 1), columns.clamp(0, width - 1)
    if rows.shape[1] == 1 and columns.shape[0] == 1:  # a rectangle: two passes along the axes are quicker than one over all positions
        picked = field.index_select(0, inside_rows[:, 0]).index_select(1, inside_columns[0])
    else:
        picked = field[inside_rows, inside_columns]
    beyond = [positions != inside for positions, inside in ((rows, inside_rows), (columns, inside_columns))]
    for mask in beyond:
        if mask.any():
            picked = picked.masked_fill(mask, outside)
    return picked.view(kind)


def _region(image: Tensor, window: Window) -> Tensor:
    """(C, h, w) of a window; beyond the border the picture goes on mirrored, without repeating the edge pixel."""
    for dim, start, extent in ((1, window.top, window.height), (2, window.left, window.width)):
        side = image.shape[dim]
        if start >= 0 and start + extent <= side:
            image = image.narrow(dim, start, extent)
        else:
            period = max(1, 2 * (side - 1))
            index = torch.arange(start, start + extent).remainder(period)
            image = image.index_select(dim, torch.minimum(index, period - index) if side > 1 else index)
    return image if image.dtype == torch.uint8 else image.to(torch.float32)


def _resize(region: Tensor, size: tuple[int, int]) -> Tensor:
    return resize(region, list(size), InterpolationMode.BILINEAR, antialias=True)


def _seen(rows: Tensor, columns: Tensor) -> Window:
    """The rectangle of source pixels that bilinear sampling at these positions touches."""
    top, left = math.floor(rows.min()), math.floor(columns.min())
    return Window(top, left, math.ceil(rows.max()) - top + 1, math.ceil(columns.max()) - left + 1)


def _sampling_grid(rows: Tensor, columns: Tensor, window: Window) -> Tensor:
    """(h, w, 2) for `grid_sample` on the window, whatever size that is resized to: pixels as areas."""
    across = (columns - window.left + 0.5) * (2 / window.width) - 1
    return torch.stack((across, (rows - window.top + 0.5) * (2 / window.height) - 1), dim=-1)


def _sampled(region: Tensor, grid: Tensor) -> Tensor:
    """The region (C, h, w) at the places of the grid (h', w', 2), in its own type."""
    taken = functional.grid_sample(region.to(torch.float32)[None], grid[None], mode="bilinear", padding_mode="border", align_corners=False)
    return taken[0].round_().clamp_(0, 255).to(torch.uint8) if region.dtype == torch.uint8 else taken[0]


def _turned(x: Tensor, flips: list[int], turns: int) -> Tensor:
    """Mirrored along the axes, then turned by so many quarters; contiguous."""
    return torch.rot90(x.flip(flips) if flips else x, turns, (-2, -1)).contiguous()


def _recoloured(image: Tensor, colour: Tensor, limit: float | None) -> Tensor:
    """The image (C, h, w) under a linear map of its colours, with one rounding."""
    values = image.to(torch.float32).flatten(1)
    grey = colour[-1] @ values.mean(1)
    changed = torch.addmm(grey.expand(image.shape[0], 1), colour[:-1], values)
    if limit is not None:
        changed.clamp_(0, limit)
    return (changed.round_().to(torch.uint8) if image.dtype == torch.uint8 else changed).view_as(image)


def _hue_rotation(angle: float) -> Tensor:
    """(3, 3) map of RGB that turns chroma by `angle` radians and keeps luma."""
    yiq = torch.tensor(YIQ, dtype=torch.float64)
    turn = torch.eye(3, dtype=torch.float64)
    turn[1:, 1:] = torch.tensor([[math.cos(angle), -math.sin(angle)], [math.sin(angle), math.cos(angle)]])
    return (torch.linalg.inv(yiq) @ turn @ yiq).to(torch.float32)
