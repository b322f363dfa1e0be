"""DeepLab v3 and v3+. Source: Chen et al. 2017, arXiv:1706.05587, and Chen et al. 2018, arXiv:1802.02611."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from perpixel.models.atrous import (
    AtrousPyramid,
    CellDecoder,
    CornerDecoder,
    apply_multi_grid,
    atrous_encoder,
    checked_rates,
    normalised,
    small_scores,
    zoom,
)
from perpixel.models.deeplab_v3_smp import SmpDecoder, smp_encoder
from perpixel.models.encoders import EncoderWeights, TimmEncoder, timm_encoder
from perpixel.models.fcn_resnet import FCNHead
from perpixel.models.layers import checked_width, initialise, resize_logits
from perpixel.models.model import Features, InputGeometry, SegmentationModel, whole_cells
from perpixel.models.resnet import UNITS, AtrousCascade, ResNetPath, checked_grid, load_own_weights
from perpixel.models.torchvision_trunks import TorchvisionTrunk

# PyTorch counts the new share of a running mean, TensorFlow the old: decay 0.9997 (arXiv:1706.05587, section 4.1).
MOMENTUM = 0.0003


def pyramid_rates(output_stride: int) -> tuple[int, int, int]:
    """6, 12 and 18 at output stride 16 and above, doubled at 8. Source: arXiv:1706.05587, section 3.3."""
    return (12, 24, 36) if output_stride == 8 else (6, 12, 18)


class FineDecoder(nn.Module):
    """Decoder of v3+: the pyramid's maps beside 48 of a finer one, two 3x3 convolutions, scores.

    Args:
        channels: of the fine and of the coarse map.
        classes: K.
        rates: of the pyramid.
        width: maps of pyramid and decoder.
        fine_width: maps that the fine one is reduced to (arXiv:1802.02611, table 1).
        corners: enlarge with corner pixels on corner pixels, as published; otherwise with pixels as areas.
        fine, coarse: which of the encoder's maps these are.
    """

    def __init__(
        self,
        channels: tuple[int, int],
        classes: int,
        rates: Sequence[int],
        width: int = 256,
        fine_width: int = 48,
        image_pooling: bool = True,
        dropout: float = 0.1,
        momentum: float = 0.1,
        corners: bool = True,
        fine: int = 0,
    ) -> None:
        super().__init__()
        self.enlarge, self.fine = zoom if corners else resize_logits, fine
        self.reduce = normalised(nn.Conv2d(channels[0], fine_width, 1, bias=False), momentum)
        convolutions = [nn.Conv2d(before, width, 3, padding=1, bias=False) for before in (width + fine_width, width)]
        self.convolve = nn.Sequential(*(normalised(layer, momentum) for layer in convolutions))
        self.classify = nn.Conv2d(width, classes, 1)
        initialise(self)
        self.pyramid = AtrousPyramid(channels[1], rates, width, image_pooling, dropout, momentum)

    def forward(self, features: Features, size: tuple[int, int]) -> Tensor:
        fine = self.reduce(features.maps[self.fine])
        coarse = self.enlarge(self.pyramid(features.maps[-1]), (fine.shape[-2], fine.shape[-1]))
        x = self.classify(self.convolve(torch.cat([coarse.to(fine.dtype), fine], dim=1)))
        return self.enlarge(x, size)


def _scores_of(maps: AtrousPyramid | AtrousCascade, width: int, classes: int) -> nn.Sequential:
    classify = nn.Conv2d(width, classes, 1)
    initialise(classify)
    return nn.Sequential(maps, classify)


def deeplab_v3_paper(
    classes: int,
    in_channels: int = 3,
    encoder_weights: EncoderWeights = None,
    depth: int = 101,
    modules: str = "aspp",
    blocks: int | None = None,
    multi_grid: Sequence[int] = (1, 2, 4),
    output_stride: int = 16,
    image_pooling: bool | None = None,
    variant: str = "beta",
    dropout: float | None = None,
    width: int = 64,
) -> SegmentationModel:
    """DeepLab v3 as published; 58,164,437 parameters for 21 classes.

    Args:
        classes: K.
        in_channels: bands of the image.
        encoder_weights: a file of this encoder's own weights, or None.
        depth: 50 or 101 layers.
        modules: "aspp", the pyramid behind block 4, or "cascade", blocks 5 to 7 as copies of block 4.
        blocks: the last block, 4 to 7; None: 4 with "aspp" (nothing else is defined), 7 with "cascade".
        multi_grid: factors on the rates of the three units of block 4 and later.
        output_stride: 8, 16 or 32; a cascade also of the larger ones of table 1, up to 256. Weights fit every one, so that a model may
            be trained at 16 and predict at 8.
        image_pooling: the mean over the image in the pyramid; None: with "aspp".
        variant: the layers before the first pooling: "beta", three 3x3 convolutions as in the released code, or "7x7" (58,040,661).
        dropout: share of values dropped before the scores of the pyramid; None: 0.1.
        width: maps of the stem; 64 in the paper. The pyramid's 256 follow it.

    Strides sit in the last unit of a block, as in TensorFlow's slim. Logits are enlarged with corners on corners and trained at full
    size. While training on a batch of one image, the norm behind the image pooling has one value a channel, and uses its running
    statistics.

    Deviations: sides are 16 k + 1 (513, 769), where TensorFlow's "same" padding, which we do not have, agrees with a symmetric one. The
    scores' first weights are from N(0, 0.01), others by He et al.; the pooling is over the whole image, as in the text, where the
    released code has a window of 33x33. The head of the cascade, a 1x1 convolution, is not spelled out in the paper.
    """
    cascade, last = modules == "cascade", _last_block(modules, blocks)
    if cascade and image_pooling:
        raise ValueError("image_pooling is a part of modules 'aspp'; a cascade has none. Leave it out")
    if cascade and dropout is not None:
        raise ValueError("dropout is a part of modules 'aspp'; a cascade has none. Leave it out")
    encoder = _slim_encoder(depth, last, output_stride, multi_grid, variant, in_channels, width, encoder_weights)
    if cascade:
        head: nn.Module = nn.Conv2d(encoder.channels[-1], classes, 1)
        small_scores(head)
    else:
        pooling = image_pooling is not False
        share = 0.1 if dropout is None else dropout
        pyramid = AtrousPyramid(encoder.channels[-1], pyramid_rates(output_stride), 4 * width, pooling, share, MOMENTUM)
        head = _scores_of(pyramid, 4 * width, classes)
        small_scores(head[1])
    return SegmentationModel(encoder, CornerDecoder(head), classes, _geometry(output_stride))


def _last_block(modules: str, blocks: int | None) -> int:
    """4 to 7, the block that scores are computed from; ValueError for a choice that is not defined."""
    if modules not in ("aspp", "cascade"):
        raise ValueError(f"unknown modules {modules!r}. Known: aspp, cascade")
    last = (7 if modules == "cascade" else 4) if blocks is None else blocks
    if not 4 <= last <= 7 or (last > 4 and modules != "cascade"):
        raise ValueError(f"blocks is {blocks}; it is 4 to 7 with modules 'cascade', and 4 with 'aspp'")
    return last


def deeplab_v3plus_paper(
    classes: int,
    in_channels: int = 3,
    encoder_weights: EncoderWeights = None,
    depth: int = 101,
    multi_grid: Sequence[int] = (1, 2, 4),
    output_stride: int = 16,
    image_pooling: bool = True,
    variant: str = "beta",
    dropout: float = 0.1,
    width: int = 64,
) -> SegmentationModel:
    """DeepLab v3+ on ResNet as published; 59,468,085 parameters for 21 classes. Arguments as in `deeplab_v3_paper`.

    The fine map is what the last unit before block 1 subsamples gives (Conv2 in the paper's words), reduced to 48 maps; two 3x3
    convolutions of 256 follow.

    Deviations: as in `deeplab_v3_paper`. The release takes the fine map from the residual branch of block1/unit_2 (conv3, before the
    addition), ours is the unit's output, as the paper's "Conv2 before striding" allows. The Xception variant and separable convolutions
    are left out.
    """
    encoder = _slim_encoder(depth, 4, output_stride, multi_grid, variant, in_channels, width, encoder_weights)
    decoder = FineDecoder(
        (encoder.channels[0], encoder.channels[-1]),
        classes,
        pyramid_rates(output_stride),
        width=4 * width,
        fine_width=max(3 * width // 4, 1),
        image_pooling=image_pooling,
        dropout=dropout,
        momentum=MOMENTUM,
    )
    small_scores(decoder.classify)
    return SegmentationModel(encoder, decoder, classes, _geometry(output_stride))


def _geometry(output_stride: int) -> InputGeometry:
    # Two pixels per side at the coarsest map, so that batch norm can train on a batch of one.
    return InputGeometry(multiple=output_stride, remainder=1, minimum=output_stride + 1)


def _slim_encoder(
    depth: int,
    blocks: int,
    output_stride: int,
    multi_grid: Sequence[int],
    variant: str,
    in_channels: int,
    width: int,
    weights: EncoderWeights,
) -> ResNetPath:
    if depth not in UNITS:
        raise ValueError(f"depth is {depth}; it must be one of {', '.join(map(str, UNITS))}")
    largest = 4 << (blocks - 1)
    if output_stride not in (8, 16, 32, 64, 128, 256) or output_stride > largest:
        raise ValueError(f"output_stride is {output_stride}; with {blocks} blocks it must be a power of two from 8 to {largest}")
    multi_grid = checked_grid(multi_grid)
    if variant not in ("beta", "7x7"):
        raise ValueError(f"unknown variant {variant!r}. Known: beta, 7x7")
    units = (*UNITS[depth], *[UNITS[depth][-1]] * (blocks - 4))
    encoder = ResNetPath(units, "slim", output_stride, in_channels, width, multi_grid, variant == "beta", momentum=MOMENTUM)
    load_own_weights(encoder, weights)
    return encoder


def deeplab_v3(
    classes: int,
    encoder: str = "resnet34",
    encoder_weights: EncoderWeights = None,
    in_channels: int = 3,
    output_stride: int | None = None,
    width: int | None = None,
    image_pooling: bool | None = None,
    dropout: float | None = None,
    rates: Sequence[int] | None = None,
    modules: str = "aspp",
    blocks: int | None = None,
    multi_grid: Sequence[int] | None = None,
) -> SegmentationModel:
    """DeepLab v3's pyramid, or its cascade, on any encoder; labels every pixel of an image of any size.

    Args:
        classes: K.
        encoder: any timm network with feature maps.
        encoder_weights: None, True (download through timm), or a .safetensors/.pth file with timm's keys.
        in_channels: bands of the image.
        output_stride: 8 or 16 for encoders that can dilate, 32 for those that end there; None: 16 where possible, else the encoder's own
            (`atrous_encoder`).
        width: maps of each branch of the pyramid; None: 256, as in the paper.
        image_pooling: give the pyramid the mean over the image; None: yes.
        dropout: share of values dropped before the scores of the pyramid while training; None: 0.1.
        rates: of the pyramid, in pixels of the coarsest map; None: 6, 12 and 18 at output stride 16 and above, doubled at 8.
        modules: "aspp", the pyramid, or "cascade", blocks 5 to 7 behind the encoder (`AtrousCascade`) and a 1x1 convolution; `width`,
            `image_pooling`, `dropout` and `rates` are the pyramid's.
        blocks: the last block, 4 to 7; None: 4 with "aspp" (nothing else is defined), 7 with "cascade". 4 is the encoder alone.
        multi_grid: factors on the rates of the encoder's last units (`apply_multi_grid`) and of the units of each added block; None: 1.

    While training on a batch of one image, the norm behind the image pooling uses its running statistics (`ContextNorm`).

    Raises:
        ValueError: for an unknown encoder, one that cannot have `output_stride`, rates below 1, weights that do not belong to it,
            options of the pyramid with a cascade, and `multi_grid` where it has no unit to act on, in the encoder or added.
    """
    last = _last_block(modules, blocks)
    of_pyramid = {"width": width, "image_pooling": image_pooling, "rates": rates, "dropout": dropout}
    if modules == "cascade" and (given := [name for name, value in of_pyramid.items() if value is not None]):
        raise ValueError(f"{' and '.join(given)}: a part of modules 'aspp'; a cascade has none. Leave it out")
    path = atrous_encoder(encoder, in_channels, encoder_weights, output_stride)
    stride = path.strides[-1]
    _with_multi_grid(path, encoder, multi_grid, needed=last == 4)
    if modules == "cascade":
        cascade = AtrousCascade(path.channels[-1], last - 4, max(1, 64 // stride), checked_grid(multi_grid))
        head = _scores_of(cascade, cascade.channels, classes)
    else:
        maps, asked = checked_width(256 if width is None else width), checked_rates(rates, pyramid_rates(stride))
        pyramid = AtrousPyramid(path.channels[-1], asked, maps, image_pooling is not False, 0.1 if dropout is None else dropout)
        head = _scores_of(pyramid, maps, classes)
    return SegmentationModel(path, CellDecoder(head), classes, whole_cells(path.strides))


def _with_multi_grid(path: TimmEncoder | TorchvisionTrunk, name: str, multi_grid: Sequence[int] | None, needed: bool = True) -> None:
    """Multi-grid in the encoder, in place, where it is given; ValueError where it is `needed` and too few units dilate."""
    if multi_grid is not None and not apply_multi_grid(path, checked_grid(multi_grid)) and needed:
        raise ValueError(
            f"multi_grid is {list(multi_grid)}, but at output stride {path.strides[-1]} fewer than two units of encoder {name!r} dilate; "
            "take an encoder more of whose units do, e.g. 'resnet50', an output_stride of 8, or leave it out"
        )


def deeplab_v3plus(
    classes: int,
    encoder: str = "resnet34",
    encoder_weights: EncoderWeights = None,
    in_channels: int = 3,
    output_stride: int | None = None,
    width: int = 256,
    image_pooling: bool = True,
    dropout: float | None = None,
    variant: str | None = None,
    multi_grid: Sequence[int] | None = None,
) -> SegmentationModel:
    """DeepLab v3+ on any encoder: the pyramid of v3 beside the encoder's map at stride 4. Arguments and errors as in `deeplab_v3`.

    An encoder without a map at stride 4 gives its coarsest one that is finer, or its finest; a plain ViT has all its maps at one stride
    (16), so there the decoder adds depth but no detail.

        dropout: None: 0.1, and 0.5 with variant "smp".
        variant: "smp": as `DeepLabV3Plus` of segmentation_models.pytorch, with separable convolutions and rates 12, 24, 36, so that its
            checkpoints can be read (`bundle.import_weights`); 12,329,493 parameters on resnet18 for 21 classes.
        multi_grid: factors on the rates of the encoder's last units; not with variant "smp".
    """
    if variant not in (None, "smp"):
        raise ValueError(f"variant is {variant!r}; it must be 'smp', or left out")
    checked_width(width)
    path: TimmEncoder | TorchvisionTrunk
    decoder: FineDecoder | SmpDecoder
    if variant == "smp":
        if not image_pooling:
            raise ValueError("image_pooling is a part of variant 'smp'. Leave it out")
        if multi_grid is not None:
            raise ValueError("variant 'smp' has no multi_grid. Leave it out")
        path = smp_encoder(encoder, in_channels, encoder_weights, 16 if output_stride is None else output_stride)
        fine = path.strides.index(4)
        decoder = SmpDecoder((path.channels[fine], path.channels[-1]), classes, width, 0.5 if dropout is None else dropout, fine)
    else:
        path = atrous_encoder(encoder, in_channels, encoder_weights, output_stride)
        _with_multi_grid(path, encoder, multi_grid)
        fine = max((i for i, stride in enumerate(path.strides) if stride <= 4), default=0)
        decoder = FineDecoder(
            (path.channels[fine], path.channels[-1]),
            classes,
            pyramid_rates(path.strides[-1]),
            width=width,
            image_pooling=image_pooling,
            dropout=0.1 if dropout is None else dropout,
            corners=False,
            fine=fine,
        )
    return SegmentationModel(path, decoder, classes, whole_cells(path.strides))


class TorchvisionDecoder(nn.Module):
    """Head of torchvision's DeepLab v3, and an FCN head on the map before the last, which training takes half a loss on.

    The pyramid is followed by another 3x3 convolution; logits are resized with pixels as areas. Pyramid and order of its branches are
    torchvision's: 1x1, rates, image pooling. Their weights are put in ours by `key_maps`.
    """

    loss_weights: tuple[float, ...] = (1.0, 0.5)

    def __init__(self, channels: Sequence[int], classes: int, width: int = 256, dropout: float = 0.5) -> None:
        super().__init__()
        self.pyramid = AtrousPyramid(channels[-1], pyramid_rates(8), width, dropout=dropout)
        self.convolve = normalised(nn.Conv2d(width, width, 3, padding=1, bias=False))
        self.classify = nn.Conv2d(width, classes, 1)
        self.auxiliary = FCNHead(channels[-2], classes)
        initialise(self)

    def forward(self, features: Features, size: tuple[int, int]) -> Tensor:
        return resize_logits(self.classify(self.convolve(self.pyramid(features.maps[-1]))), size)

    def supervised(self, features: Features, size: tuple[int, int]) -> list[Tensor]:
        return [self(features, size), resize_logits(self.auxiliary(features.maps[-2]), size)]


def deeplab_v3_torchvision(
    classes: int, in_channels: int = 3, encoder_weights: EncoderWeights = None, depth: int = 50
) -> SegmentationModel:
    """torchvision's `deeplabv3_resnet50` or `_resnet101`, auxiliary head included; 42,004,074 and 60,996,202 parameters for 21 classes.

    Args:
        classes: K.
        in_channels: bands of the image.
        encoder_weights: None, True (download through timm), or a .safetensors/.pth file with timm's keys.
        depth: 50 or 101.

    It is there to take torchvision's weights (`bundle.import_weights`), and computes what torchvision does. Other than in
    `deeplab_v3_paper`: strides in the first unit's 3x3, output stride 8 without multi-grid, dropout 0.5.
    """
    if depth not in UNITS:
        raise ValueError(f"depth is {depth}; it must be one of {', '.join(map(str, UNITS))}")
    path = timm_encoder(f"resnet{depth}", in_channels, encoder_weights, output_stride=8)
    return SegmentationModel(path, TorchvisionDecoder(path.channels, classes), classes, InputGeometry(minimum=9, cell=8))
