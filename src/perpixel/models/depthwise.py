"""Depthwise convolutions whose gradients hold on a processor in bfloat16."""

import torch
from timm.layers.conv2d_same import Conv2dSame
from torch import Tensor, nn


class _InFloat32WhereTrained:
    """Dilated and strided convolutions under bfloat16 autocast on a processor run in float32 while gradients are recorded.

    PyTorch's kernel (oneDNN) for the weight gradient of a dilated depthwise convolution in bfloat16 with channels last gives
    what was in memory before: other numbers in each pass, sometimes 1e30 or NaN. The strided one is right, at six times the
    time of float32. Prediction stays in bfloat16, which is right and quicker.
    """

    def forward(self: nn.Conv2d, x: Tensor) -> Tensor:  # type: ignore[misc]
        plain = max(self.dilation) == 1 and max(self.stride) == 1
        if plain or x.device.type != "cpu" or not torch.is_grad_enabled() or not _in_bfloat16(x):
            return super().forward(x)  # type: ignore[misc]
        with torch.autocast("cpu", enabled=False):
            maps: Tensor = super().forward(x.float())  # type: ignore[misc]
        return maps.bfloat16()


class DepthwiseConv2d(_InFloat32WhereTrained, nn.Conv2d):
    """A depthwise `nn.Conv2d`: (N, C, H, W) -> (N, C, H', W'). Trained in float32 where bfloat16 would give wrong gradients."""


class DepthwiseConv2dSame(_InFloat32WhereTrained, Conv2dSame):
    """The same for timm's convolution with TensorFlow's padding."""


_SAFE: dict[type[nn.Module], type[nn.Module]] = {nn.Conv2d: DepthwiseConv2d, Conv2dSame: DepthwiseConv2dSame}


def with_safe_gradients(network: nn.Module) -> nn.Module:
    """The network, its depthwise convolutions turned in place into `DepthwiseConv2d`; parameters and their names stay."""
    for layer in network.modules():
        if type(layer) in _SAFE and 1 < layer.groups == layer.in_channels:  # type: ignore[operator]
            layer.__class__ = _SAFE[type(layer)]
    return network


def _in_bfloat16(x: Tensor) -> bool:
    return torch.is_autocast_enabled("cpu") and torch.get_autocast_dtype("cpu") == torch.bfloat16
