"""Gaussian filtering of many values at once: the permutohedral lattice, in torch operations.

Source: Adams, Baek & Davis, "Fast High-Dimensional Filtering Using the Permutohedral Lattice", Eurographics 2010.
A pixel's features (position, colour, ...) lie in one simplex of a lattice. Its value is spread over the d + 1 corners ("splat"), corners
exchange values with their neighbours along d + 1 axes ("blur"), and the pixel reads its corners again ("slice"). Only corners that some
pixel touches exist, so that the work grows with the pixels and not with the volume of the feature space.
"""

import math
import random
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

# Lattice units from 0 beyond which a float has too few bits left to place a pixel inside its simplex.
_LARGEST = {torch.float32: 2.0**20, torch.float64: 2.0**48}
# A sum of more rows than this is taken in two steps: one thread of a GPU adds up a run of rows by itself.
_RUN = 64

NORMALISATIONS = ("none", "before", "after", "symmetric")


class PermutohedralLattice:
    """The lattice that the pixels of a batch of images need: built once, filtered with as often as one likes.

    Images of a batch never mix. `weights`, (N * P, d + 1), are differentiable in the features: the gradient is that of the simplex a pixel
    lies in, and which corners exist is taken as given.

    Args:
        features: (N, P, d) of N images with P pixels each, divided by the bandwidths; float32 or float64, on any device.

    Raises:
        ValueError: if a feature is so many bandwidths from 0 that its place in the lattice is lost to rounding.
    """

    def __init__(self, features: Tensor) -> None:
        images, pixels, self.dimensions = features.shape
        elevated = _elevated(features.reshape(images * pixels, self.dimensions).T)
        with torch.no_grad():
            origin, rank = _simplex(elevated)
            image = torch.arange(images, device=features.device).repeat_interleave(pixels)
            self._number(torch.cat([origin[:-1].long(), image[None]]), rank, features.dtype)
        self.weights = _corner_weights(elevated, origin, rank).T.contiguous()

    def _number(self, place: Tensor, rank: Tensor, dtype: torch.dtype) -> None:
        """Number the corners that exist, list the pixels at each, and find its neighbours.

        `place` holds the first d coordinates of a pixel's corner 0 (the last one follows from them) and its image, (d + 1, N * P).
        """
        strides = _exact_strides(place)
        exact, coordinates, attempt = strides is not None, None, 0
        while True:
            strides = strides or _random_strides(self.dimensions + 1, attempt)
            keys, order = _corner_keys(place, rank, strides).T.flatten().sort()
            first = torch.ones_like(keys, dtype=torch.bool)
            torch.ne(keys[1:], keys[:-1], out=first[1:])
            corner = torch.empty_like(order).scatter_(0, order, first.cumsum(0) - 1).view(-1, self.dimensions + 1)
            starts = first.nonzero().squeeze(1)
            if exact:
                break
            coordinates = _coordinates(place, rank, corner, len(starts))
            if coordinates is not None:
                break
            strides, attempt = None, attempt + 1  # two corners shared a key, which random strides make as rare as one in 2**20 images
        index = torch.int32 if keys.numel() < 2**31 else torch.int64
        self.size, self.corners, self.order = len(starts), corner.to(index), order
        self._pixels, self._runs = (order // (self.dimensions + 1)).to(index), _runs(starts, len(keys), index)
        self._neighbours, self._blur = _neighbours(keys[starts], strides, coordinates, index, dtype)

    def splat(self, values: Tensor, weights: Tensor) -> Tensor:
        """(N * P, C) values of pixels to (size, C) values of corners; `weights` are sorted as `order` has it."""
        table = _weighted_sums(self._pixels, values, weights, self._runs[0])
        for starts in self._runs[1:]:
            rows = torch.arange(len(table), device=table.device, dtype=starts.dtype)
            table = _weighted_sums(rows, table, table.new_ones(len(table)), starts)
        return table

    def blur(self, table: Tensor, transposed: bool = False) -> Tensor:
        """Add half of both neighbours along every axis in turn; the axes do not commute, so the transpose takes them backwards."""
        axes = range(self.dimensions + 1)
        for axis in reversed(axes) if transposed else axes:
            table = _weighted_sums(self._neighbours[axis], table, self._blur[axis])
        return table

    def slice(self, table: Tensor, weights: Tensor) -> Tensor:
        """(size, C) values of corners to (N * P, C) values of pixels; `weights` are (N * P, d + 1)."""
        return _weighted_sums(self.corners, table, weights)

    def sorted(self, weights: Tensor) -> Tensor:
        """(N * P, d + 1) weights in the order in which `splat` needs them."""
        return weights.flatten()[self.order]


class GaussianFilter:
    """Multiplies by a matrix close to exp(-|f_i - f_j|^2 / 2), pixel with itself included, normalised in one of four ways.

    With n_i, the sum of row i of the matrix K, and D = diag(n): "before" is K D^-1, "after" D^-1 K (rows add up to 1), "symmetric"
    D^-1/2 K D^-1/2, and "none" K as it is, whose messages grow with the number of like pixels. These are the four of pydensecrf
    (which works out one factor for "none" and does not use it). The lattice is an approximation: where pixels lie densely, within some
    per cent of the largest value.

    Args:
        features: (N, P, d) as for `PermutohedralLattice`.
        normalisation: one of `NORMALISATIONS`.
    """

    def __init__(self, features: Tensor, normalisation: str) -> None:
        images, pixels, dimensions = features.shape
        self.lattice = lattice = PermutohedralLattice(features)
        splat = lattice.weights
        # Scales the filter at a point amid evenly spread pixels to the Gaussian's own sum (Adams et al.'s reference code).
        slice_ = lattice.weights / (1 + 2.0**-dimensions)
        total = _Filter.apply(features.new_ones(images * pixels, 1), splat, slice_, lattice, lattice.sorted(splat.detach()))
        total = total + 1e-20  # a row's sum contains its own pixel and cannot vanish but by rounding
        if normalisation in ("before", "symmetric"):
            splat = splat / (total if normalisation == "before" else total.sqrt())
        if normalisation in ("after", "symmetric"):
            slice_ = slice_ / (total if normalisation == "after" else total.sqrt())
        self._splat, self._slice, self._sorted = splat, slice_, lattice.sorted(splat.detach())

    def __call__(self, values: Tensor) -> Tensor:
        """Filter (N * P, C) values, image after image; differentiable in them and in the features."""
        return _Filter.apply(values, self._splat, self._slice, self.lattice, self._sorted)


class _Filter(torch.autograd.Function):
    """Splat, blur, slice. Nothing of the size of all corners' values is kept for the way back: it is computed anew."""

    @staticmethod
    def forward(ctx: Any, values: Tensor, splat: Tensor, slice_: Tensor, lattice: PermutohedralLattice, sorted_splat: Tensor) -> Tensor:
        ctx.save_for_backward(values, splat, slice_, sorted_splat)
        ctx.lattice = lattice
        return lattice.slice(lattice.blur(lattice.splat(values, sorted_splat)), slice_)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        values, splat, slice_, sorted_splat = ctx.saved_tensors
        lattice, grad = ctx.lattice, grad.contiguous()
        needs_values, needs_splat, needs_slice = ctx.needs_input_grad[:3]
        grad_values = grad_splat = grad_slice = None
        if needs_values or needs_splat:
            table = lattice.blur(lattice.splat(grad, lattice.sorted(slice_)), transposed=True)
            grad_values = lattice.slice(table, splat) if needs_values else None
            grad_splat = _products(values, table, lattice.corners) if needs_splat else None
        if needs_slice:
            table = lattice.blur(lattice.splat(values, sorted_splat))
            grad_slice = _products(grad, table, lattice.corners)
        return grad_values, grad_splat, grad_slice, None, None


def _weighted_sums(index: Tensor, rows: Tensor, weights: Tensor, starts: Tensor | None = None) -> Tensor:
    """Sums of weighted rows, without writing the rows out: over the last axis of `index`, or over the runs that begin at `starts`."""
    return F.embedding_bag(index, rows, starts, mode="sum", per_sample_weights=weights)


def _products(pixels: Tensor, table: Tensor, corners: Tensor) -> Tensor:
    """(N * P, d + 1) scalar products of each pixel's row with the rows of its corners."""
    return torch.stack([(pixels * table[corner]).sum(1) for corner in corners.T], 1)


def _elevated(features: Tensor) -> Tensor:
    """(d, n) features on the hyperplane of d + 1 coordinates that add up to 0; Adams et al. 2010, section 4.1 and its scale for blurring.

    The order of operations is the one that pydensecrf has, so that pixels on the border of two simplices fall into the same one.
    """
    d = len(features)
    spread = _rounded(math.sqrt(2 / 3) * (d + 1), features.dtype)
    rows: list[Tensor] = []
    total = torch.zeros_like(features[0])
    for axis in range(d, 0, -1):
        part = features[axis - 1] * _rounded(1 / math.sqrt(axis * (axis + 1)) * spread, features.dtype)
        rows.append(total - axis * part)
        total = total + part
    elevated = torch.stack([total, *reversed(rows)])
    largest = float(elevated.detach().abs().max())
    if not largest < _LARGEST[features.dtype]:
        raise ValueError(
            f"features reach {float(features.detach().abs().max()):.3g} bandwidths, too many for {features.dtype} to tell pixels apart; "
            "use larger bandwidths"
        )
    return elevated


def _rounded(number: float, dtype: torch.dtype) -> float:
    return torch.tensor(number, dtype=dtype).item()


def _simplex(elevated: Tensor) -> tuple[Tensor, Tensor]:
    """The simplex around each point: its corner of remainder 0, (d + 1, n), and the rank of each coordinate's distance from it."""
    corners = len(elevated)
    cells = (elevated * (1 / corners)).round()
    excess = cells.sum(0)
    origin = cells * corners
    distance = elevated - origin
    rank = excess.long().expand(corners, -1).clone()
    for i in range(corners):
        for j in range(i + 1, corners):
            behind = distance[i] < distance[j]
            rank[i] += behind
            rank[j] += ~behind
    # Rounding left the hyperplane by `excess` cells: as many coordinates, those that were rounded furthest, go back by one.
    shift = corners * ((rank < 0).long() - (rank >= corners).long())
    return origin + shift, rank + shift


def _corner_weights(elevated: Tensor, origin: Tensor, rank: Tensor) -> Tensor:
    """(d + 1, n) barycentric coordinates: differences of the sorted distances, whatever is left going to corner 0."""
    distance = (elevated - origin) * (1 / len(elevated))
    ordered = torch.zeros_like(distance).scatter(0, rank, distance)
    return torch.cat([(ordered[-1] + (1 - ordered[0]))[None], (ordered[:-1] - ordered[1:]).flip(0)])


def _exact_strides(place: Tensor) -> list[int] | None:
    """Factors that make one integer of the coordinates of every corner and neighbour, none like another; None if 63 bits do not do."""
    d = len(place) - 1
    low, high = torch.stack([place.amin(1), place.amax(1)]).tolist()
    strides, size = [], 1
    for i, (least, most) in enumerate(zip(low, high, strict=True)):
        strides.append(size)
        reach = 2 * d if i < d else 0  # a corner is up to d from corner 0, and a neighbour d further
        size *= most - least + 2 * reach + 1
    # Corner 0's own keys are not shifted to begin at 0, so that they take one more bit, and the sign another.
    bound = sum(stride * (max(abs(least), abs(most)) + 2 * d) for stride, least, most in zip(strides, low, high, strict=True))
    return strides if bound < 2**62 else None


def _random_strides(count: int, attempt: int) -> list[int]:
    """Odd 64-bit factors for a hash that wraps around; the same in every run, others with every attempt."""
    draw = random.Random(attempt)
    return [draw.getrandbits(64) | 1 for _ in range(count)]


def _wrapped(number: int) -> int:
    """`number` modulo 2**64, as a signed 64-bit integer."""
    return (number + 2**63) % 2**64 - 2**63


def _corner_keys(place: Tensor, rank: Tensor, strides: list[int]) -> Tensor:
    """(d + 1, n) keys of all corners of each pixel: the coordinates times the strides, added up.

    Going from corner k - 1 to k adds 1 to every coordinate and takes d + 1 from the one of rank d + 1 - k.
    """
    d = len(place) - 1
    step = torch.tensor([_wrapped(s) for s in [*strides[:d], 0]], device=place.device)
    by_rank = torch.empty_like(rank).scatter_(0, rank, step[:, None].expand_as(rank))
    keys = [sum(row * _wrapped(stride) for row, stride in zip(place, strides, strict=True))]
    for k in range(1, d + 1):
        keys.append(keys[-1] + _wrapped(sum(strides[:d])) - (d + 1) * by_rank[d + 1 - k])
    return torch.stack(keys)


def _coordinates(place: Tensor, rank: Tensor, corner: Tensor, size: int) -> Tensor | None:
    """(d + 1, size) coordinates and image of every corner; None if two corners were given one number."""
    d = len(place) - 1
    found = place.new_empty(d + 1, size)
    for i in range(d + 1):
        rows = [place[i] + (k - (d + 1) * (rank[i] > d - k) if i < d else 0) for k in range(d + 1)]
        for k, row in enumerate(rows):
            found[i, corner[:, k]] = row
        if any(bool((found[i, corner[:, k]] != row).any()) for k, row in enumerate(rows)):
            return None
    return found


def _neighbours(
    keys: Tensor, strides: list[int], coordinates: Tensor | None, index: torch.dtype, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """(d + 1, size, 3): each corner and its two neighbours along every axis, with weights 1, 1/2, 1/2; 0 where there is none.

    Along axis j a neighbour is d further in coordinate j and 1 back in all others, or the reverse.
    """
    d = len(strides) - 1
    own = torch.arange(len(keys), device=keys.device)
    rows, weights = [own] * (3 * (d + 1)), [torch.ones_like(own, dtype=dtype)] * (3 * (d + 1))
    for axis in range(d + 1):
        step = (d + 1) * (strides[axis] if axis < d else 0) - sum(strides[:d])
        for side, sign in ((1, 1), (2, -1)):
            wanted = keys + _wrapped(sign * step)
            at = torch.searchsorted(keys, wanted).clamp_(max=len(keys) - 1)
            there = keys[at] == wanted
            for i in range(d + 1 if coordinates is not None else 0):
                apart = 0 if i == d else sign * (d if i == axis else -1)
                there &= coordinates[i, at] == coordinates[i] + apart  # type: ignore[index]
            rows[3 * axis + side] = torch.where(there, at, own)
            weights[3 * axis + side] = there.to(dtype) / 2
    shape = (d + 1, 3, len(keys))
    return tuple(torch.stack(x).view(shape).transpose(1, 2).contiguous() for x in ([r.to(index) for r in rows], weights))  # type: ignore[return-value]


def _runs(starts: Tensor, total: int, index: torch.dtype) -> list[Tensor]:
    """Where sums begin: of each corner's entries, or, where one has many, of runs of them and then of each corner's runs."""
    lengths = torch.diff(starts, append=starts.new_tensor([total]))
    if int(lengths.max()) <= 4 * _RUN:
        return [starts.to(index)]
    runs = (lengths + _RUN - 1) // _RUN
    first = runs.cumsum(0) - runs
    corner = torch.arange(len(starts), device=starts.device).repeat_interleave(runs)
    within = torch.arange(len(corner), device=starts.device) - first[corner]
    return [(starts[corner] + _RUN * within).to(index), first.to(index)]
