"""Atrous convolution, and what DeepLab's four versions build on it: the pyramid, enlarging of scores, decoders, dilated encoders."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional

from perpixel.models.depthwise import DepthwiseConv2d
from perpixel.models.encoders import DilationError, EncoderWeights, TimmEncoder, timm_encoder
from perpixel.models.layers import ImageMean, initialise, resize_logits
from perpixel.models.model import Features
from perpixel.models.torchvision_trunks import TorchvisionTrunk, any_encoder

CAN_DILATE = (
    "resnet18/34/50/101, vgg11 to vgg19 (with or without _bn), mobilenetv2_100, efficientnet_b0, convnext_*, regnety_*, squeezenet1_0"
)


def field_of_view(kernel: int, rate: int) -> int:
    """Pixels from the first to the last that an atrous kernel touches: k + (k - 1)(r - 1).

    Source: Chen et al. 2017, arXiv:1606.00915, section 3.1.
    """
    return kernel + (kernel - 1) * (rate - 1)


def atrous_convolution(channels_in: int, channels_out: int, kernel: int, rate: int, bias: bool = True) -> nn.Conv2d:
    """A convolution whose taps lie `rate` pixels apart: (N, C, H, W) -> (N, C', H, W), the size kept by zeros at each side.

    It equals a convolution with a kernel of side `field_of_view(kernel, rate)` that is zero between the taps, at the price of the
    small kernel. Half the holes go to each side, for even kernels too: 4 taps at rate 4 lie at -6, -2, 2 and 6.

    Raises:
        ValueError: if kernel or rate is below 1, or the padding would not be the same at both sides (even kernel at odd rate).
    """
    if kernel < 1 or rate < 1:
        raise ValueError(f"kernel is {kernel} and rate {rate}; both must be at least 1")
    holes = field_of_view(kernel, rate) - 1
    if holes % 2:
        raise ValueError(f"kernel {kernel} at rate {rate} has no middle; an even kernel keeps the size of a map at even rates only")
    return nn.Conv2d(channels_in, channels_out, kernel, padding=holes // 2, dilation=rate, bias=bias)


def separable_convolution(channels_in: int, channels_out: int, rate: int = 1) -> nn.Sequential:
    """A 3x3 convolution of each map by itself, its taps `rate` apart, and a 1x1 one that mixes them; (N, C, H, W) -> (N, C', H, W).

    Source: Chen et al. 2018, arXiv:1802.02611, section 3.1, without a norm between the two.
    """
    single = DepthwiseConv2d(channels_in, channels_in, 3, padding=rate, dilation=rate, groups=channels_in, bias=False)
    return nn.Sequential(single, nn.Conv2d(channels_in, channels_out, 1, bias=False))


def zoom(x: Tensor, size: tuple[int, int], precise: bool = False) -> Tensor:
    """(N, C, H, W) -> (N, C, *size), bilinear, corner pixels on corner pixels, in float32 at least; Caffe's `Interp` layer.

    `precise`: in float64. PyTorch computes the place of a pixel in the precision of its value; at factors other than powers of two
    float32 misses by what grows with the distance from the corner, so that a part of an image would not get what the whole gets.
    """
    if x.shape[-2:] == size:
        return x
    own = torch.promote_types(x.dtype, torch.float32)
    wide = x.to(torch.float64 if precise else own)
    return functional.interpolate(wide, size=size, mode="bilinear", align_corners=True).to(own)


def checked_rates(asked: Sequence[int] | None, published: Sequence[int]) -> Sequence[int]:
    """The rates asked for, or the published ones; ValueError where they are none or below 1."""
    if asked is None:
        return published
    if not asked or min(asked) < 1:
        raise ValueError(f"rates are {list(asked)}; give one or more whole numbers of at least 1, such as {list(published)}")
    return asked


class ContextNorm(nn.BatchNorm2d):
    """Batch norm that takes its running statistics, unchanged, where a batch gives it one value a channel: that has no variance."""

    def forward(self, x: Tensor) -> Tensor:
        if self.training and x.numel() == x.shape[1]:
            return functional.batch_norm(x, self.running_mean, self.running_var, self.weight, self.bias, False, 0.0, self.eps)
        return super().forward(x)


def normalised(convolution: nn.Conv2d | nn.Sequential, momentum: float = 0.1, norm: type[nn.BatchNorm2d] = nn.BatchNorm2d) -> nn.Sequential:
    """Convolution (or several, the last of which gives the maps), batch norm, ReLU."""
    *_, last = (layer for layer in convolution.modules() if isinstance(layer, nn.Conv2d))
    return nn.Sequential(convolution, norm(last.out_channels, momentum=momentum), nn.ReLU(inplace=True))


class AtrousPyramid(nn.Module):
    """Atrous spatial pyramid pooling with batch norm: (N, C, H, W) -> (N, width, H, W).

    A 1x1 convolution, a 3x3 one at each rate and the mean over the image, each `width` maps; concatenated (the mean first, then the
    1x1, then the rates), mixed by a 1x1 convolution. While training on a batch of one, the norm behind the mean has a single value a
    channel and uses its running statistics (`ContextNorm`). `separable`: the 3x3 ones are separable convolutions.

    Source: Chen et al. 2017, arXiv:1706.05587, Fig. 5 and section 3.3; the order is that of the authors' TensorFlow code.
    """

    def __init__(
        self,
        channels_in: int,
        rates: Sequence[int],
        width: int = 256,
        image_pooling: bool = True,
        dropout: float = 0.1,
        momentum: float = 0.1,
        separable: bool = False,
    ) -> None:
        super().__init__()
        self.mean = ImageMean()
        self.context = normalised(nn.Conv2d(channels_in, width, 1, bias=False), momentum, ContextNorm) if image_pooling else None
        rated = [
            separable_convolution(channels_in, width, rate) if separable else atrous_convolution(channels_in, width, 3, rate, bias=False)
            for rate in rates
        ]
        branches = [nn.Conv2d(channels_in, width, 1, bias=False), *rated]
        self.branches = nn.ModuleList(normalised(branch, momentum) for branch in branches)
        count = len(branches) + bool(image_pooling)
        self.project = normalised(nn.Conv2d(count * width, width, 1, bias=False), momentum)
        self.drop = nn.Dropout(dropout)
        initialise(self)

    def forward(self, x: Tensor) -> Tensor:
        maps = [branch(x) for branch in self.branches]
        if self.context is not None:
            # Added to zeros in place of a mere expand: the sum keeps the memory format of the maps, and cat with it.
            maps.insert(0, torch.zeros_like(maps[0]) + self.context(self.mean(x)))
        return self.drop(self.project(torch.cat(maps, dim=1)))


class SummedPyramid(nn.Module):
    """Scores as the sum of 3x3 convolutions at several rates: (N, C, H, W) -> (N, K, H, W).

    Source: Chen et al. 2017, arXiv:1606.00915, section 3.2, on ResNet-101.
    """

    def __init__(self, channels_in: int, classes: int, rates: Sequence[int]) -> None:
        super().__init__()
        self.branches = nn.ModuleList(atrous_convolution(channels_in, classes, 3, rate) for rate in rates)
        initialise(self)

    def forward(self, x: Tensor) -> Tensor:
        return summed([branch(x) for branch in self.branches])


def summed(maps: Sequence[Tensor]) -> Tensor:
    """The sum of score maps of one size, in float32 at least: sums in half precision would blur their order."""
    total = maps[0].to(torch.promote_types(maps[0].dtype, torch.float32))
    for more in maps[1:]:
        total = total + more
    return total


def small_scores(module: nn.Module, std: float = 0.01) -> None:
    """Weights of the convolutions in `module`, which give scores, from N(0, std), their biases 0, in place; as published.

    Nets on any encoder start their scores like other layers: small ones hold back, for hundreds of updates, all that lies before them.
    """
    for layer in module.modules():
        if isinstance(layer, nn.Conv2d):
            nn.init.normal_(layer.weight, std=std)
            if layer.bias is not None:
                nn.init.zeros_(layer.bias)


class CornerDecoder(nn.Module):
    """A head on the coarsest map; its scores are enlarged with corners on corners, as the papers do."""

    def __init__(self, head: nn.Module) -> None:
        super().__init__()
        self.head = head

    def scores(self, features: Features) -> Tensor:
        """(N, K, h, w) at the size of the coarsest map."""
        scores: Tensor = self.head(features.maps[-1])
        return scores

    def forward(self, features: Features, size: tuple[int, int]) -> Tensor:
        return zoom(self.scores(features), size)


class CoarselyTrainedDecoder(CornerDecoder):
    """Trained on its scores before they are enlarged, against every eighth label: DeepLab v1 and v2."""

    loss_weights: tuple[float, ...] = (1.0,)

    def supervised(self, features: Features, size: tuple[int, int]) -> list[Tensor]:
        return [self.scores(features)]


class CellDecoder(nn.Module):
    """A head on the coarsest map of any encoder, each pixel of it a cell of the image."""

    def __init__(self, head: nn.Module) -> None:
        super().__init__()
        self.head = head

    def forward(self, features: Features, size: tuple[int, int]) -> Tensor:
        return resize_logits(self.head(features.maps[-1]), size)


def atrous_encoder(
    name: str, in_channels: int = 3, weights: EncoderWeights = None, output_stride: int | None = None
) -> TimmEncoder | TorchvisionTrunk:
    """An encoder from timm or torchvision whose coarsest map has the stride asked for, by atrous convolution in its last stages.

    Args:
        name, in_channels, weights: as for `any_encoder`.
        output_stride: 8 or 16; 32, or whatever the network has by itself, leaves it as it is. None: 16 where it can dilate, otherwise
            its own.

    Raises:
        ValueError: as `any_encoder`; and where the network cannot have `output_stride`, with the names of those that can.

    Poolings of VGG that no longer subsample become 3x3 with stride 1, as in DeepLab v1; what follows them is dilated. Swin and
    plain ViT cannot dilate (32 and 16 are what they have), nor can networks of which timm does not know it.
    """
    if name == "plain":
        raise ValueError(f"encoder 'plain' is U-Net's own; DeepLab takes timm's networks. These can dilate: {CAN_DILATE}")
    wanted = 16 if output_stride is None else output_stride
    if wanted not in (8, 16, 32):
        raise ValueError(f"output_stride is {output_stride}; it must be 8, 16 or 32")
    if name.startswith("vgg"):
        vgg = timm_encoder(name, in_channels, weights)
        if vgg.strides[-1] > wanted:
            dilate_vgg(vgg, wanted)
        encoder: TimmEncoder | TorchvisionTrunk = vgg
    else:
        encoder = _dilated(name, in_channels, weights, wanted, natural=output_stride is None)
    return encoder


def _dilated(name: str, in_channels: int, weights: EncoderWeights, wanted: int, natural: bool) -> TimmEncoder | TorchvisionTrunk:
    """Dilated by timm; or as it is where that is what is wanted, or where anything is and it cannot dilate (`natural`)."""
    if wanted < 32:
        try:
            encoder = any_encoder(name, in_channels, weights, wanted)
        except DilationError:
            pass  # as it is, then, or an error that names those that can
        else:
            if encoder.strides[-1] == wanted:
                return encoder
    encoder = any_encoder(name, in_channels, weights)
    if not natural and encoder.strides[-1] != wanted:
        raise ValueError(
            f"encoder {name!r} cannot have output stride {wanted}; its own is {encoder.strides[-1]}: leave output_stride out, or take one "
            f"that can dilate: {CAN_DILATE}"
        )
    return encoder


def apply_multi_grid(encoder: nn.Module, multi_grid: Sequence[int]) -> bool:
    """Multiplies the rates of an encoder's last atrous units, one factor each, in place; False where fewer than two units dilate.

    A unit is a residual unit of ResNet, MobileNet and the like, or a layer of VGG, of those that dilate most. The last one takes the last
    factor, and so on backwards; units before them keep their rate, and so does timm's first unit of a ResNet's block, which has the rate
    of the block before: two are left there.

    Source: arXiv:1706.05587, section 3.2.1.
    """
    units = _atrous_units(encoder)
    if len(units) < 2:
        return False
    for factor, layers in zip(reversed(multi_grid), reversed(units), strict=False):
        for layer in layers:
            layer.dilation = (layer.dilation[0] * factor, layer.dilation[1] * factor)
            if not isinstance(layer.padding, str):  # timm's own layers with TensorFlow's padding pad by the rate as they run
                layer.padding = (layer.padding[0] * factor, layer.padding[1] * factor)
    return True


def _atrous_units(encoder: nn.Module) -> list[list[nn.Conv2d]]:
    """The convolutions that dilate most, by unit: below what holds them all, each part that is more than a list of parts."""
    convolutions = {name: layer for name, layer in encoder.named_modules() if isinstance(layer, nn.Conv2d) and max(layer.kernel_size) > 1}
    most = max((max(layer.dilation) for layer in convolutions.values()), default=1)
    atrous = {tuple(name.split(".")): layer for name, layer in convolutions.items() if max(layer.dilation) == most > 1}
    shared = next((place for place, parts in enumerate(zip(*atrous, strict=False)) if len(set(parts)) > 1), 0)
    units: dict[str, list[nn.Conv2d]] = {}
    for path, layer in atrous.items():
        ways = (".".join(path[: shared + deeper]) for deeper in range(1, len(path)))
        unit = next(way for way in ways if not isinstance(encoder.get_submodule(way), nn.Sequential | nn.ModuleList | nn.ModuleDict))
        units.setdefault(unit, []).append(layer)
    return list(units.values())


def dilate_vgg(encoder: TimmEncoder, output_stride: int) -> None:
    """Poolings beyond `output_stride` become 3x3 with stride 1, convolutions after each dilate twice as much; in place."""
    stride, rate = 1, 1
    for name, layer in list(encoder.network.named_children()):
        if isinstance(layer, nn.MaxPool2d):
            if stride < output_stride:
                stride *= 2
            else:
                encoder.network.add_module(name, nn.MaxPool2d(3, stride=1, padding=1))
                rate *= 2
        elif isinstance(layer, nn.Conv2d):
            layer.dilation = layer.padding = (rate, rate)
    encoder.strides = [min(own, output_stride) for own in encoder.strides]
