"""Layers that more than one model is made of."""

from typing import Literal, get_args

import torch
from torch import Tensor, nn
from torch.nn import functional

Upsampling = Literal["bilinear", "nearest"]


def double_convolution(channels_in: int, channels_out: int, padding: int = 1, batch_norm: bool = True) -> nn.Sequential:
    """Two 3x3 convolutions, each followed by ReLU; (N, channels_in, H, W) -> (N, channels_out, H', W').

    Args:
        padding: zero pixels added at each side; 0 makes H' = H - 4 and W' = W - 4.
        batch_norm: normalise between convolution and ReLU; the convolutions then have no bias of their own.
    """
    layers: list[nn.Module] = []
    for channels in (channels_in, channels_out):
        layers.append(nn.Conv2d(channels, channels_out, 3, padding=padding, bias=not batch_norm))
        if batch_norm:
            layers.append(nn.BatchNorm2d(channels_out))
        layers.append(nn.ReLU(inplace=True))
    return nn.Sequential(*layers)


def initialise(module: nn.Module) -> None:
    """Weights of every convolution from N(0, 2 / fan_in), biases 0, in place.

    fan_in is the size of a filter as stored: C_in * k * k, and C_out * k * k for an up-convolution, whose weight is (C_in, C_out, k, k).
    Source: He et al. 2015, arXiv:1502.01852, eq. 10; Caffe's `msra` filler counts the same way.
    """
    for layer in module.modules():
        if isinstance(layer, nn.Conv2d | nn.ConvTranspose2d):
            nn.init.kaiming_normal_(layer.weight, mode="fan_in", nonlinearity="relu")
            if layer.bias is not None:
                nn.init.zeros_(layer.bias)


def resize(x: Tensor, size: tuple[int, int], mode: Upsampling = "bilinear") -> Tensor:
    """(N, C, H, W) -> (N, C, *size), with pixels as areas (align_corners=False). Untouched where the size is already right."""
    if x.shape[-2:] == size:
        return x
    if mode == "nearest":
        return functional.interpolate(x, size=size, mode="nearest")
    return functional.interpolate(x, size=size, mode="bilinear", align_corners=False)


def resize_logits(logits: Tensor, size: tuple[int, int]) -> Tensor:
    """Bilinear `resize` of logits, in float32 at least: bfloat16 keeps 8 bits, too few to weigh neighbours by."""
    if logits.shape[-2:] == size:
        return logits
    return resize(logits.to(torch.promote_types(logits.dtype, torch.float32)), size)


def doubled_biases(module: nn.Module, prefix: str = "") -> dict[str, tuple[float, float]]:
    """Factors on learning rate and decay for the biases of convolutions: (2, 0), as in the `param` blocks of the Caffe releases.

    Args:
        prefix: put before the names that parameters have in `module`.
    """
    convolutions = {name: layer for name, layer in module.named_modules() if isinstance(layer, nn.Conv2d) and layer.bias is not None}
    return {f"{prefix}{name}.bias": (2.0, 0.0) for name in convolutions}


def center_crop(x: Tensor, size: tuple[int, int]) -> Tensor:
    """The middle of a map as a view: (N, C, H, W) -> (N, C, *size)."""
    top, left = (x.shape[-2] - size[0]) // 2, (x.shape[-1] - size[1]) // 2
    return x[..., top : top + size[0], left : left + size[1]]


class ImageMean(nn.Module):
    """The mean of every map over the image: (N, C, H, W) -> (N, C, 1, 1). A layer of its own, so that tiles can be given the whole's."""

    def forward(self, x: Tensor) -> Tensor:
        return x.mean((2, 3), keepdim=True)


class ImagePooling(nn.Module):
    """Appends what the whole image shows to every pixel: (N, C, H, W) -> (N, 2 * C, H, W).

    The mean of each map goes through a linear layer and ReLU (no batch norm: one image gives it a single value) and is
    repeated at every position. Source: global context as in ParseNet, Liu et al. 2015, arXiv:1506.04579, sec. 3.1.
    """

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.mean, self.mix = ImageMean(), nn.Linear(channels, channels)

    def forward(self, x: Tensor) -> Tensor:
        context = functional.relu(self.mix(self.mean(x).flatten(1)))
        # Added to zeros in place of a mere expand: the sum keeps the memory format of x, and cat with it.
        return torch.cat([x, torch.zeros_like(x) + context[:, :, None, None]], dim=1)


def check_upsampling(mode: str) -> Upsampling:
    """`mode` itself where it is a known way of upsampling, otherwise ValueError."""
    for known in get_args(Upsampling):
        if mode == known:
            return known
    raise ValueError(f"unknown upsampling {mode!r}. Known: {', '.join(get_args(Upsampling))}")


def checked_width(width: int) -> int:
    """`width`; ValueError where it is below 1."""
    if width < 1:
        raise ValueError(f"width is {width}; it must be at least 1")
    return width
