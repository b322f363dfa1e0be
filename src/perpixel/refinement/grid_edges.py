"""Edges between neighbouring pixels: who is whose neighbour, and how much an edge weighs where the image changes."""

import math

import torch
from torch import Tensor

# (rows, columns) from an edge's first end to its second; every unordered pair once. graph cuts (expansion.py) count on this order.
STEPS = {4: ((0, 1), (1, 0)), 8: ((0, 1), (1, 0), (1, 1), (1, -1))}


def ends(x: Tensor, step: tuple[int, int]) -> tuple[Tensor, Tensor]:
    """Views (..., H - rows, W - |columns|) of (..., H, W): values at the first and at the second ends of all edges of one step."""
    rows, columns = step
    height, width = x.shape[-2:]
    left, right = max(-columns, 0), max(columns, 0)
    first = x[..., : max(height - rows, 0), left : max(width - right, left)]
    second = x[..., rows:, right : max(width - left, right)]
    return first, second


def edge_weights(image: Tensor, neighbours: int, beta: float | None, floor: float) -> list[Tensor]:
    """Weights g_pq = (floor + exp(-beta |I_p - I_q|^2)) / dist(p, q) of all edges.

    Args:
        image: (N, C, H, W) float, on the scale of its file.
        neighbours: 4 or 8.
        beta: on that scale; None takes 1 / (2 mean |I_p - I_q|^2), the mean over all edges of each image by itself. Where the image is
            flat that mean is 0 and beta counts as 0.
        floor: what an edge weighs across the sharpest border.

    Returns:
        One (N, 1, rows, columns) tensor per step of `STEPS[neighbours]`, as large as `ends` returns for it.

    Source: Boykov & Jolly 2001, "Interactive graph cuts for optimal boundary & region segmentation in N-D images", equation of B_pq;
        beta as in Rother, Kolmogorov & Blake 2004, "GrabCut", equation 5; diagonal edges count 1 / sqrt(2), as there.
    """
    steps = STEPS[neighbours]
    lengths = [math.hypot(*step) for step in steps]
    if beta == 0:
        shapes = [ends(image[:, :1], step)[0] for step in steps]
        return [torch.full_like(shape, (floor + 1) / length) for shape, length in zip(shapes, lengths, strict=True)]
    if beta is None:
        # With beta from the image its scale cancels; without this, squares of very large or small values would leave float32's range.
        seen = image.detach()
        low, high = seen.amin((1, 2, 3), keepdim=True), seen.amax((1, 2, 3), keepdim=True)
        half = high / 2 - low / 2  # in halves: the difference of the extremes may overflow
        image = (image / 2 - low / 2) / torch.where(half > 0, half, 1)
    squares = [(second - first).square().sum(1, keepdim=True) for first, second in (ends(image, step) for step in steps)]
    if beta is None:
        count = max(sum(square[0].numel() for square in squares), 1)
        mean = torch.stack([square.sum((1, 2, 3)) for square in squares]).sum(0)[:, None, None, None] / count
        twice = torch.where(mean > 0, 2 * mean, 1)
        squares = [square / twice for square in squares]
        beta = 1.0
    return [(floor + torch.exp(-beta * square)) / length for square, length in zip(squares, lengths, strict=True)]
