"""ResNet-50 and -101 as DeepLab v2 and v3 use them: strides where MSRA's Caffe nets and TensorFlow's slim put them, atrous beyond.

Source: He et al. 2015, arXiv:1512.03385, table 1. timm's and torchvision's ResNets put the stride on the 3x3 convolution of the FIRST
unit of a block. The layers are the same, so weights could be renamed to fit; what they compute then differs.
"""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Literal

from torch import Tensor, nn
from torch.nn import functional

from perpixel.models.batch_norm import FrozenBatchNorm
from perpixel.models.encoders import EncoderWeights, read_weights
from perpixel.models.layers import initialise
from perpixel.models.model import Features

# Units per block. Source: arXiv:1512.03385, table 1.
UNITS: dict[int, tuple[int, ...]] = {50: (3, 4, 6, 3), 101: (3, 4, 23, 3)}

# Where a block of stride 2 subsamples. "msra": the first 1x1 of its first unit (Caffe). "slim": the 3x3 of its last unit (TensorFlow).
Style = Literal["msra", "slim"]


def strides_and_rates(
    units: Sequence[int], output_stride: int, style: Style, multi_grid: Sequence[int] = (1, 1, 1)
) -> list[list[tuple[int, int]]]:
    """(stride, atrous rate) of every unit of every block, for a stem of stride 4.

    A block that would go beyond `output_stride` keeps the size instead, and what follows doubles its rate. From the fourth block on
    the rates of a block's units are multiplied by `multi_grid` (arXiv:1706.05587, section 3.2.1).
    """
    stride, rate = 4, 1
    plan: list[list[tuple[int, int]]] = []
    last = len(units) - 1
    for block, count in enumerate(units):
        rows = [(1, rate)] * count
        # Caffe's blocks subsample as they begin, so the first does not; slim's as they end, so the last does not.
        subsamples = block > 0 if style == "msra" else block < last
        place = 0 if style == "msra" else count - 1
        if subsamples and stride < output_stride:
            stride *= 2
            rows[place] = (2, rate)
        elif subsamples:
            rate *= 2
            if style == "msra":
                rows = [(1, rate)] * count
        if block >= 3:
            rows = [(s, r * multi_grid[unit % len(multi_grid)]) for unit, (s, r) in enumerate(rows)]
        plan.append(rows)
    return plan


class Unit(nn.Module):
    """Bottleneck: 1x1 to `width` maps, 3x3, 1x1 to 4 * width, each with a norm, on top of a shortcut.

    The shortcut is the input itself, every second pixel of it at stride 2, or a 1x1 convolution where the number of maps changes.
    """

    def __init__(self, channels_in: int, width: int, stride: int, rate: int, style: Style, norm: Callable[[int], nn.Module]) -> None:
        super().__init__()
        first, second = (stride, 1) if style == "msra" else (1, stride)
        self.reduce = nn.Sequential(nn.Conv2d(channels_in, width, 1, first, bias=False), norm(width), nn.ReLU(inplace=True))
        atrous = nn.Conv2d(width, width, 3, second, padding=rate, dilation=rate, bias=False)
        self.convolve = nn.Sequential(atrous, norm(width), nn.ReLU(inplace=True))
        self.expand = nn.Sequential(nn.Conv2d(width, 4 * width, 1, bias=False), norm(4 * width))
        self.shortcut: nn.Module = nn.Identity()
        if channels_in != 4 * width:
            self.shortcut = nn.Sequential(nn.Conv2d(channels_in, 4 * width, 1, stride, bias=False), norm(4 * width))
        elif stride > 1:
            self.shortcut = nn.MaxPool2d(1, stride)

    def forward(self, x: Tensor) -> Tensor:
        return functional.relu(self.expand(self.convolve(self.reduce(x))) + self.shortcut(x), inplace=True)


def checked_grid(multi_grid: Sequence[int] | None) -> Sequence[int]:
    """Three factors on the rates of a block's units, 1 where None; ValueError for anything else."""
    grid = (1, 1, 1) if multi_grid is None else multi_grid
    if len(grid) != 3 or min(grid) < 1 or not all(isinstance(factor, int) for factor in grid):
        raise ValueError(f"multi_grid is {tuple(grid)}; it must be three whole numbers of at least 1, one for each unit of a block")
    return grid


class AtrousCascade(nn.Sequential):
    """Blocks behind any encoder, each of three bottleneck units, rates doubling from block to block: (N, C, H, W) -> (N, C', H, W).

    Args:
        channels: C; C' is the next multiple of 4, as a unit gives four times its inner maps.
        blocks: their number; 3 are the paper's blocks 5 to 7, none gives back what comes.
        rate: of the first block: 4 behind an encoder at output stride 16, whose own last block has 2.
        multi_grid: factors on the rates of a block's units.

    On a ResNet-50 they are the paper's copies of block 4, with weights of their own. Source: arXiv:1706.05587, section 3.2 and Fig. 3.
    """

    def __init__(self, channels: int, blocks: int, rate: int, multi_grid: Sequence[int] = (1, 1, 1)) -> None:
        inner = -(-channels // 4)
        rates = [rate * factor * 2**block for block in range(blocks) for factor in multi_grid]
        super().__init__(*(Unit(channels if n == 0 else 4 * inner, inner, 1, own, "slim", nn.BatchNorm2d) for n, own in enumerate(rates)))
        self.channels = 4 * inner if blocks else channels
        initialise(self)


class ResNetPath(nn.Module):
    """A dilated ResNet; an `Encoder` whose maps are one at stride 4 and the last one.

    Args:
        units: of each block; from the fifth block on, copies of the fourth (DeepLab v3's cascade).
        style: where strides sit, "msra" or "slim".
        output_stride: of the last map; a power of two from 4 on.
        in_channels: bands of the image.
        width: maps of the stem; 64 as published.
        multi_grid: factors on the rates of the units of block 4 and later.
        deep_stem: three 3x3 convolutions (64, 64 and 128 maps) in place of the 7x7; the "beta" nets of TensorFlow's DeepLab.
        frozen_norm: batch norm with statistics, scale and bias as loaded, never trained (DeepLab v2).
        momentum: of batch norm; 1 - TensorFlow's decay.

    The map at stride 4 is what the last unit before the stride of block 2 gives: the last of block 1 with strides in Caffe's places, the
    last but one with slim's.
    """

    def __init__(
        self,
        units: Sequence[int],
        style: Style,
        output_stride: int,
        in_channels: int = 3,
        width: int = 64,
        multi_grid: Sequence[int] = (1, 1, 1),
        deep_stem: bool = False,
        frozen_norm: bool = False,
        momentum: float = 0.1,
    ) -> None:
        super().__init__()
        if in_channels < 1 or width < 1:
            raise ValueError(f"in_channels is {in_channels} and width {width}; both must be at least 1")

        def norm(channels: int) -> nn.Module:
            return FrozenBatchNorm(channels) if frozen_norm else nn.BatchNorm2d(channels, momentum=momentum)

        self.stem = _stem(in_channels, width, deep_stem, norm)
        # Caffe rounds sizes of poolings up; at sides of 8 k + 1 both give the same.
        self.pool = nn.MaxPool2d(3, 2, 1, ceil_mode=style == "msra")
        self.blocks = nn.ModuleList()
        channels = 2 * width if deep_stem else width
        for block, rows in enumerate(strides_and_rates(units, output_stride, style, multi_grid)):
            inner = width << min(block, 3)
            layers = []
            for stride, rate in rows:
                layers.append(Unit(channels, inner, stride, rate, style, norm))
                channels = 4 * inner
            self.blocks.append(nn.Sequential(*layers))
        self.fine_unit = units[0] - 1 if style == "msra" else max(units[0] - 2, 0)
        self.channels, self.strides = [4 * width, channels], [4, output_stride]
        initialise(self)
        if frozen_norm:
            _tame(self, sum(units))

    def forward(self, image: Tensor) -> Features:
        x = self.pool(self.stem(image))
        fine = x
        for number, unit in enumerate(self.blocks[0].children()):
            x = unit(x)
            if number == self.fine_unit:
                fine = x
        for block in self.blocks[1:]:
            x = block(x)
        return Features([fine, x])


def _stem(in_channels: int, width: int, deep: bool, norm: Callable[[int], nn.Module]) -> nn.Sequential:
    """The layers before the first pooling, of stride 2."""
    if not deep:
        return nn.Sequential(nn.Conv2d(in_channels, width, 7, 2, 3, bias=False), norm(width), nn.ReLU(inplace=True))
    layers: list[nn.Module] = []
    for before, after, stride in ((in_channels, width, 2), (width, width, 1), (width, 2 * width, 1)):
        layers += [nn.Conv2d(before, after, 3, stride, 1, bias=False), norm(after), nn.ReLU(inplace=True)]
    return nn.Sequential(*layers)


def _tame(path: ResNetPath, units: int) -> None:
    """Keeps random weights from exploding where frozen norms normalise nothing yet: what units add up stays of the size of one.

    As in Zhang et al. 2019, arXiv:1901.09321; weights that are loaded replace it.
    """
    for layer in path.modules():
        if isinstance(layer, Unit):
            layer.expand[0].weight.data.mul_(units**-0.5)  # type: ignore[operator]


def load_own_weights(encoder: nn.Module, weights: EncoderWeights) -> None:
    """Weights of an encoder that nobody publishes in its own form, from a file written by it.

    Raises:
        ValueError: if a download is asked for, or the file does not fit.
    """
    if weights is True:
        raise ValueError(
            "encoder_weights is true, but this paper's network has strides where no published PyTorch weights have them; give a file "
            "of this encoder's own weights, or use the model without _paper, whose encoder has published ones"
        )
    if not weights:
        return
    state = read_weights(Path(weights))
    # A bundle's encoder may hold the path as the trunk that it shows several scales of an image.
    state = {key.removeprefix("encoder.").removeprefix("trunk."): value for key, value in state.items() if not key.startswith("decoder.")}
    own = encoder.state_dict()
    for name in [*own, *state]:
        there, here = (tuple(part[name].shape) if name in part else "nothing" for part in (state, own))
        if there != here:
            raise ValueError(f"{weights}: not the weights of this encoder: it has {there} where the encoder has {here} for {name}")
    encoder.load_state_dict(state)
