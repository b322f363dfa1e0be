"""The convolutional part of VGG-11 to VGG-19: trunk of FCN, SegNet, DeepLab v1 and v2."""

from collections.abc import Sequence

from torch import Tensor, nn

from perpixel.models.layers import initialise
from perpixel.models.model import Features

# 3x3 convolutions per stage. Source: Simonyan & Zisserman 2014, arXiv:1409.1556, table 1, columns A, B, D and E.
CONVOLUTIONS: dict[int, tuple[int, ...]] = {11: (1, 1, 2, 2, 2), 13: (2, 2, 2, 2, 2), 16: (2, 2, 3, 3, 3), 19: (2, 2, 4, 4, 4)}


class VGGPath(nn.Module):
    """Five stages of 3x3 convolutions with ReLU, a max pooling after each; an `Encoder` whose maps are the five pooled ones.

    Args:
        depth: 11, 13, 16 or 19.
        in_channels: bands of the image.
        width: channels of the first stage, doubled up to 8 times that; 64 as published.
        batch_norm: normalise between convolution and ReLU; the convolutions keep their bias, as in torchvision and SegNet.
        first_padding: zeros around the image at the first convolution; 100 in FCN.
        pool: side of the pooling windows; 3 in DeepLab.
        pool_strides: of each pooling; DeepLab's last two are 1.
        dilations: of the convolutions of each stage.
        indices: give the positions of the maxima, for SegNet.

    Sizes are rounded up at each pooling, as Caffe does.
    """

    def __init__(
        self,
        depth: int = 16,
        in_channels: int = 3,
        width: int = 64,
        batch_norm: bool = False,
        first_padding: int = 1,
        pool: int = 2,
        pool_strides: Sequence[int] = (2, 2, 2, 2, 2),
        dilations: Sequence[int] = (1, 1, 1, 1, 1),
        indices: bool = False,
    ) -> None:
        super().__init__()
        if depth not in CONVOLUTIONS:
            raise ValueError(f"depth is {depth}; VGG has {', '.join(map(str, CONVOLUTIONS))} layers with weights")
        if in_channels < 1 or width < 1:
            raise ValueError(f"in_channels is {in_channels} and width {width}; both must be at least 1")
        self.channels = [width * min(8, 1 << stage) for stage in range(5)]
        self.strides: list[int] = []
        self.indices = indices
        self.stages, self.pools = nn.ModuleList(), nn.ModuleList()
        before, stride = in_channels, 1
        for stage, (count, after) in enumerate(zip(CONVOLUTIONS[depth], self.channels, strict=True)):
            layers: list[nn.Module] = []
            for number in range(count):
                dilation = dilations[stage]
                padding = first_padding if stage == number == 0 else dilation
                layers.append(nn.Conv2d(before, after, 3, padding=padding, dilation=dilation))
                if batch_norm:
                    layers.append(nn.BatchNorm2d(after))
                layers.append(nn.ReLU(inplace=True))
                before = after
            self.stages.append(nn.Sequential(*layers))
            self.pools.append(nn.MaxPool2d(pool, pool_strides[stage], (pool - 1) // 2, ceil_mode=True, return_indices=indices))
            stride *= pool_strides[stage]
            self.strides.append(stride)
        initialise(self)

    def forward(self, image: Tensor) -> Features:
        x, maps, indices = image, [], []
        for stage, pool in zip(self.stages, self.pools, strict=True):
            x = pool(stage(x))
            if self.indices:
                x, index = x
                indices.append(index)
            maps.append(x)
        return Features(maps, indices if self.indices else None)
