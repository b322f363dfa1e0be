"""Max unpooling: every pooled value goes back to where its maximum was, zeros go everywhere else."""

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional


def max_unpool(x: Tensor, indices: Tensor, size: tuple[int, int]) -> Tensor:
    """Inverse of 2x2 max pooling with stride 2, as far as there is one: (N, C, h, w) -> (N, C, *size).

    Args:
        x: pooled maps.
        indices: (N, C, h, w) int64 positions within a plane of `size`, as `MaxPool2d(2, return_indices=True)` gives them.
        size: (height, width) of the map that was pooled; with `ceil_mode` it may be odd.

    Returns:
        The same as `nn.MaxUnpool2d(2)`, forward and backward, in the memory format of `x`. PyTorch's own backward works on planes:
        on channels_last maps it copies twice and takes 3 to 14 times as long (measured on 64x360x480 and 128x180x240, one core).

    Source: Badrinarayanan et al. 2017, arXiv:1511.00561, Fig. 3.
    """
    unpooled: Tensor = _MaxUnpool.apply(x, indices, size)
    return unpooled


class _MaxUnpool(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, indices: Tensor, size: tuple[int, int]) -> Tensor:
        ctx.save_for_backward(indices)
        if x.device.type == "cuda" and x.is_contiguous(memory_format=torch.channels_last):
            return scattered(x, indices, size)  # PyTorch's kernel there knows planes only
        return functional.max_unpool2d(x, indices, (2, 2), output_size=size)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None]:
        (indices,), (gradient,) = ctx.saved_tensors, gradients
        n, c, h, w = indices.shape
        if not gradient.is_contiguous(memory_format=torch.channels_last):
            return gradient.flatten(2).gather(2, indices.flatten(2)).view(n, c, h, w), None, None
        return _pixels(gradient).gather(1, _pixels(indices)).view(n, h, w, c).permute(0, 3, 1, 2), None, None


def scattered(x: Tensor, indices: Tensor, size: tuple[int, int]) -> Tensor:
    """`max_unpool` by one scatter along the pixels, channels innermost; the result is channels_last."""
    n, c = x.shape[:2]
    plane = x.new_zeros(n, size[0] * size[1], c)
    return plane.scatter_(1, _pixels(indices), _pixels(x)).view(n, *size, c).permute(0, 3, 1, 2)


def _pixels(x: Tensor) -> Tensor:
    """(N, C, H, W) -> (N, H * W, C), a view where `x` is channels_last."""
    return x.permute(0, 2, 3, 1).flatten(1, 2)


class PoolThenDrop(nn.Module):
    """A pooling that gives positions, followed by dropout of single values; it has no weights, so plain and Bayesian nets share theirs."""

    def __init__(self, pool: nn.Module, dropout: float) -> None:
        super().__init__()
        self.pool, self.drop = pool, nn.Dropout(dropout)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        x, indices = self.pool(x)
        return self.drop(x), indices
