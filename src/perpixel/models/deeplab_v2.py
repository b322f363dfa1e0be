"""DeepLab v2. Source: Chen et al. 2017, arXiv:1606.00915; the layers are those of the authors' released prototxt files."""

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor, nn

from perpixel.models.atrous import (
    CellDecoder,
    CoarselyTrainedDecoder,
    SummedPyramid,
    atrous_encoder,
    checked_rates,
    small_scores,
    summed,
    zoom,
)
from perpixel.models.deeplab_v1 import GEOMETRY, AtrousClassifier, Fc6, caffe_multipliers, load_vgg, vgg_trunk
from perpixel.models.encoders import EncoderWeights
from perpixel.models.model import Encoder, Features, SegmentationModel, whole_cells
from perpixel.models.resnet import UNITS, ResNetPath, load_own_weights

# Rates of the branches. Source: arXiv:1606.00915, section 4.1.2.
RATES: dict[str, tuple[int, ...]] = {"aspp_l": (6, 12, 18, 24), "aspp_s": (2, 4, 8, 12), "largefov": (12,)}

SCALES = (0.75, 0.5)  # of the image, beside 1. Source: arXiv:1606.00915, section 4.1.2


class SummedClassifiers(nn.Module):
    """Branches of fc6, fc7 and scores, each with a rate of its own; their scores are summed: (N, C, H, W) -> (N, K, H, W)."""

    def __init__(self, channels_in: int, classes: int, rates: Sequence[int], width: int, dropout: float) -> None:
        super().__init__()
        self.branches = nn.ModuleList(AtrousClassifier(channels_in, classes, Fc6(3, rate, width), dropout) for rate in rates)

    def forward(self, x: Tensor) -> Tensor:
        return summed([branch(x) for branch in self.branches])


def deeplab_v2_vgg16_paper(
    classes: int,
    in_channels: int = 3,
    encoder_weights: EncoderWeights = None,
    variant: str = "aspp_l",
    dropout: float = 0.5,
    width: int = 64,
) -> SegmentationModel:
    """DeepLab v2 on VGG-16 as published, before its CRF; 37,877,652 parameters for 21 classes.

    Args:
        classes: K.
        in_channels: bands of the image.
        encoder_weights: torchvision's VGG-16 classifier (True: download; or a file); each branch decimates fc6 and fc7 for itself.
        variant: "aspp_l" (rates 6, 12, 18, 24), "aspp_s" (2, 4, 8, 12) or "largefov" (12 alone; 20,505,429 parameters).
        dropout: share of values dropped after each fc6 and fc7 while training.
        width: maps of VGG's first stage; 64 as published. fc6 and fc7 follow it.

    Sizes, the map it is trained on and learning rates are those of `deeplab_v1_paper`; the average pooling before fc6 is gone.

    Deviations: weights are for normalised RGB, not Caffe's BGR less its mean. "largefov" has no average pooling either, though the
    paper takes that row over from v1.
    """
    rates = _rates(variant)
    encoder = vgg_trunk(in_channels, width)
    head = SummedClassifiers(encoder.channels[-1], classes, rates, 16 * width, dropout)
    for branch in head.branches:
        small_scores(branch.get_submodule("fc8"))
    load_vgg(encoder, head, encoder_weights)
    decoder = CoarselyTrainedDecoder(head)
    return SegmentationModel(encoder, decoder, classes, GEOMETRY, caffe_multipliers(encoder, decoder))


class ScaledEncoder(nn.Module):
    """The last map of one encoder for the image at several scales, the largest first; an `Encoder`.

    Images are shrunk with corners on corners: 321 -> 241 at 0.75 and 161 at 0.5.
    """

    def __init__(self, trunk: Encoder, scales: Sequence[float] = SCALES) -> None:
        super().__init__()
        self.trunk = trunk
        self.scales = tuple(scales)
        self.channels = [trunk.channels[-1]] * (1 + len(self.scales))
        self.strides = [trunk.strides[-1], *(round(trunk.strides[-1] / scale) for scale in self.scales)]

    def forward(self, image: Tensor) -> Features:
        height, width = image.shape[-2:]
        smaller = [(1 + round((height - 1) * scale), 1 + round((width - 1) * scale)) for scale in self.scales]
        # In the precision of the image: what autocast does with it is the trunk's affair.
        return Features([self.trunk(x).maps[-1] for x in (image, *(zoom(image, size, precise=True) for size in smaller))])


class MaxFusionDecoder(nn.Module):
    """One head on the map of every scale; the largest score of a class at a pixel is its score.

    Trained on the fused scores and on those of each scale, each at its own size against the labels there: losses of equal weight.
    Source: arXiv:1606.00915, section 4.1.2; the four losses are those of the released nets.
    """

    def __init__(self, head: nn.Module, scales: int) -> None:
        super().__init__()
        self.head = head
        self.loss_weights: tuple[float, ...] = (1.0,) * (1 + scales)

    def scores(self, features: Features) -> list[Tensor]:
        """(N, K, h, w) fused, then those of each scale, the largest first."""
        each = [self.head(x) for x in features.maps]
        fused = each[0]
        for smaller in each[1:]:
            fused = torch.maximum(fused, zoom(smaller, (fused.shape[-2], fused.shape[-1]), precise=True))
        return [fused, *each]

    def forward(self, features: Features, size: tuple[int, int]) -> Tensor:
        return zoom(self.scores(features)[0], size)

    def supervised(self, features: Features, size: tuple[int, int]) -> list[Tensor]:
        return self.scores(features)


def deeplab_v2_resnet101_paper(
    classes: int,
    in_channels: int = 3,
    encoder_weights: EncoderWeights = None,
    variant: str = "aspp_l",
    multi_scale: bool = True,
    depth: int = 101,
    width: int = 64,
) -> SegmentationModel:
    """DeepLab v2 on ResNet-101 as published, before its CRF; 44,048,532 parameters for 21 classes, 105,344 of them frozen.

    Args:
        classes: K.
        in_channels: bands of the image.
        encoder_weights: a file of this encoder's own weights, or None.
        variant: "aspp_l" (four 3x3 convolutions to scores, rates 6, 12, 18, 24, summed), "aspp_s" (2, 4, 8, 12) or "largefov"
            (12 alone; 42,887,253 parameters).
        multi_scale: three passes, at 1, 0.75 and 0.5 of the image, fused by their largest scores; training takes four losses.
        depth: 101 in the paper, or 50.
        width: maps of the stem; 64 as published.

    Strides sit where MSRA's nets have them, in the first 1x1 convolution of a block; blocks 3 and 4 have rates 2 and 4. Batch norm is
    frozen: statistics, scale and bias. Sizes are 8 k + 1 (321 -> 41, and 31 and 21 at the smaller scales). Learning rates: scores x10,
    their biases x20 without decay.

    Deviations: weights are for normalised RGB, not Caffe's BGR less its mean. Without published weights, which the paper starts from
    (pretrained on MS-COCO), frozen norms normalise nothing: what units add is then scaled by the root of their number.
    """
    rates = _rates(variant)
    if depth not in UNITS:
        raise ValueError(f"depth is {depth}; it must be one of {', '.join(map(str, UNITS))}")
    trunk = ResNetPath(UNITS[depth], "msra", 8, in_channels, width, frozen_norm=True)
    load_own_weights(trunk, encoder_weights)
    head = SummedPyramid(trunk.channels[-1], classes, rates)
    small_scores(head)
    if not multi_scale:
        decoder = CoarselyTrainedDecoder(head)
        return SegmentationModel(trunk, decoder, classes, GEOMETRY, caffe_multipliers(trunk, decoder))
    encoder, fusion = ScaledEncoder(trunk), MaxFusionDecoder(head, 1 + len(SCALES))
    return SegmentationModel(encoder, fusion, classes, replace(GEOMETRY, cell=32), caffe_multipliers(encoder, fusion))


def _rates(variant: str) -> tuple[int, ...]:
    if variant not in RATES:
        raise ValueError(f"unknown variant {variant!r}. Known: {', '.join(RATES)}")
    return RATES[variant]


def deeplab_v2(
    classes: int,
    encoder: str = "resnet34",
    encoder_weights: EncoderWeights = None,
    in_channels: int = 3,
    output_stride: int | None = None,
    dropout: float = 0.0,
    rates: Sequence[int] | None = None,
) -> SegmentationModel:
    """DeepLab v2's pyramid on any encoder: four atrous convolutions to scores, summed; labels every pixel of an image of any size.

    Args:
        classes: K.
        encoder: any timm network with feature maps.
        encoder_weights: None, True (download through timm), or a .safetensors/.pth file with timm's keys.
        in_channels: bands of the image.
        output_stride: 8 or 16 for encoders that can dilate, 32 for those that end there; None: 16 where possible, else the encoder's own
            (`atrous_encoder`).
        dropout: share of whole maps of the encoder dropped before the pyramid while training.
        rates: of the atrous convolutions, in pixels of the coarsest map; None: 6, 12, 18 and 24 at output stride 8, as published, and half
            that at 16: the same field of view in pixels of the image.

    Unlike the `_paper` net it is trained on its logits at full size.

    Raises:
        ValueError: for an unknown encoder, one that cannot have `output_stride`, rates below 1, and weights that do not belong to it.
    """
    path = atrous_encoder(encoder, in_channels, encoder_weights, output_stride)
    stride = path.strides[-1]
    taken = checked_rates(rates, [max(8 * rate // stride, 1) for rate in RATES["aspp_l"]])
    pyramid = SummedPyramid(path.channels[-1], classes, taken)
    head = nn.Sequential(nn.Dropout2d(dropout), pyramid)
    return SegmentationModel(path, CellDecoder(head), classes, whole_cells(path.strides))
