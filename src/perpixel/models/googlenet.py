"""The GoogLeNet of 2014: trunk of FCN-GoogLeNet. Source: Szegedy et al. 2014, arXiv:1409.4842, table 1 and Fig. 3.

torchvision's GoogLeNet is a later one, with batch norm and without 5x5 filters: `torchvision_trunks.py`.
"""

import torch
from torch import Tensor, nn

from perpixel.models.layers import initialise
from perpixel.models.model import Features

_PUBLISHED_WIDTH = 64  # maps of conv1

# Maps of each module at that width: 1x1; before the 3x3, 3x3; before the 5x5, 5x5; behind the pooling. Source: arXiv:1409.4842, table 1.
STAGES: tuple[tuple[tuple[int, ...], ...], ...] = (
    ((64, 96, 128, 16, 32, 32), (128, 128, 192, 32, 96, 64)),
    (
        (192, 96, 208, 16, 48, 64),
        (160, 112, 224, 24, 64, 64),
        (128, 128, 256, 24, 64, 64),
        (112, 144, 288, 32, 64, 64),
        (256, 160, 320, 32, 128, 128),
    ),
    ((256, 160, 320, 32, 128, 128), (384, 192, 384, 48, 128, 128)),
)


class Inception(nn.Module):
    """Four branches on one map, concatenated: 1x1; 1x1 and 3x3; 1x1 and 5x5; 3x3 max pooling and 1x1. ReLU after every convolution."""

    def __init__(self, channels_in: int, maps: tuple[int, ...]) -> None:
        super().__init__()
        one, before3, three, before5, five, pooled = maps
        self.channels = one + three + five + pooled
        self.one = _rectified(nn.Conv2d(channels_in, one, 1))
        self.three = nn.Sequential(*_rectified(nn.Conv2d(channels_in, before3, 1)), *_rectified(nn.Conv2d(before3, three, 3, padding=1)))
        self.five = nn.Sequential(*_rectified(nn.Conv2d(channels_in, before5, 1)), *_rectified(nn.Conv2d(before5, five, 5, padding=2)))
        self.pooled = nn.Sequential(nn.MaxPool2d(3, 1, 1), *_rectified(nn.Conv2d(channels_in, pooled, 1)))

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([self.one(x), self.three(x), self.five(x), self.pooled(x)], dim=1)


class GoogLeNet2014Path(nn.Module):
    """Image -> maps at strides 8, 16 and 32: inception 3b, 4e and 5b, the last with dropout; an `Encoder`.

    22 layers with weights up to the scores, along the deepest branch. Poolings are 3x3, subsample by 2 and round up, as in Caffe. The
    normalisations across maps stand where Fig. 3 has them: behind the first pooling and before the second.

    Args:
        in_channels: bands of the image.
        width: maps of conv1, a multiple of 4; 64 as published. All other layers follow in proportion.
        dropout: share of values dropped from the last map while training.
    """

    def __init__(self, in_channels: int = 3, width: int = _PUBLISHED_WIDTH, dropout: float = 0.4) -> None:
        super().__init__()
        if in_channels < 1 or width < 4 or width % 4:
            raise ValueError(f"in_channels is {in_channels} and width {width}; need at least 1 band, and a width that is a multiple of 4")

        def scaled(maps: int) -> int:
            return maps * width // _PUBLISHED_WIDTH

        # Caffe counts alpha over the window of 5, as PyTorch does.
        self.stem = nn.Sequential(
            *_rectified(nn.Conv2d(in_channels, width, 7, stride=2, padding=100)), _pool(), nn.LocalResponseNorm(5, 1e-4, 0.75, k=1),
            *_rectified(nn.Conv2d(width, width, 1)), *_rectified(nn.Conv2d(width, 3 * width, 3, padding=1)),
            nn.LocalResponseNorm(5, 1e-4, 0.75, k=1), _pool(),
        )  # fmt: skip
        self.stages = nn.ModuleList()
        self.channels, self.strides = list[int](), [8, 16, 32]
        before = 3 * width
        for modules in STAGES:
            stage = nn.Sequential()
            for maps in modules:
                stage.append(Inception(before, tuple(scaled(count) for count in maps)))
                before = sum(scaled(maps[i]) for i in (0, 2, 4, 5))
            self.stages.append(stage)
            self.channels.append(before)
        self.pool, self.drop = _pool(), nn.Dropout(dropout)
        initialise(self)

    def forward(self, image: Tensor) -> Features:
        x, maps = self.stem(image), []
        for number, stage in enumerate(self.stages):
            x = stage(self.pool(x) if number else x)
            maps.append(x)
        return Features([*maps[:-1], self.drop(x)])


def _rectified(convolution: nn.Conv2d) -> nn.Sequential:
    return nn.Sequential(convolution, nn.ReLU(inplace=True))


def _pool() -> nn.MaxPool2d:
    return nn.MaxPool2d(3, 2, ceil_mode=True)
