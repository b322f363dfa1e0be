"""U-Net. Source: Ronneberger, Fischer & Brox 2015, arXiv:1505.04597, Fig. 1."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from perpixel.models.encoders import EncoderWeights, TimmEncoder, UNetPath
from perpixel.models.layers import (
    ImagePooling,
    Upsampling,
    center_crop,
    check_upsampling,
    checked_width,
    double_convolution,
    initialise,
    resize,
    resize_logits,
)
from perpixel.models.model import Features, InputGeometry, SegmentationModel, whole_cells
from perpixel.models.torchvision_trunks import TorchvisionTrunk, any_encoder


class UpConvolution(nn.Module):
    """One step of the expansive path: 2x2 up-convolution, the skip's middle beside it, two unpadded 3x3 convolutions.

    Args:
        channels: maps of the skip and of the result.
        up_channels: maps of the up-convolution.
        relu: after the up-convolution, as in the authors' release.
    """

    def __init__(self, channels: int, up_channels: int, relu: bool) -> None:
        super().__init__()
        self.up = nn.ConvTranspose2d(2 * channels, up_channels, 2, stride=2)
        self.relu = nn.ReLU(inplace=True) if relu else nn.Identity()
        self.convolve = double_convolution(channels + up_channels, channels, padding=0, batch_norm=False)

    def forward(self, x: Tensor, skip: Tensor) -> Tensor:
        x = self.relu(self.up(x))
        return self.convolve(torch.cat([x, center_crop(skip, (x.shape[-2], x.shape[-1]))], dim=1))


class UNetPaperDecoder(nn.Module):
    """The expansive path of Fig. 1; crops 4, 16, 40 and 88 pixels off each side of the skips, coarsest first.

    Args:
        channels: maps of the contracting path, finest first.
        classes: K.
        release: as the authors released it: ReLU after each up-convolution, and twice as many maps in the last one.
    """

    def __init__(self, channels: Sequence[int], classes: int, release: bool = False) -> None:
        super().__init__()
        wide = {channels[0]: 2 * channels[0]} if release else {}
        self.stages = nn.ModuleList(UpConvolution(c, wide.get(c, c), release) for c in reversed(channels[:-1]))
        self.classify = nn.Conv2d(channels[0], classes, 1)

    def forward(self, features: Features, size: tuple[int, int]) -> Tensor:
        x = features.maps[-1]  # (N, 16 * width, ...); the unpadded convolutions end at `size` by themselves
        for stage, skip in zip(self.stages, reversed(features.maps[:-1]), strict=True):
            x = stage(x, skip)
        return self.classify(x)


def unet_paper(classes: int, in_channels: int = 1, width: int = 64, dropout: float = 0.5) -> SegmentationModel:
    """U-Net as published: unpadded, 572x572 -> 388x388; 31,030,658 parameters for 1 band and 2 classes.

    Args:
        classes: K.
        in_channels: bands of the image.
        width: maps of the first level, doubled at each of the four others; 64 in the paper.
        dropout: share of values dropped at the end of the contracting path while training.

    Deviations: none in the layer table. The paper leaves open where "the end of the contracting path" drops and how it counts the
    inputs N of an up-convolution in N(0, 2/N): both follow the authors' release (after the last two levels, before the fourth one's
    skip; N = 4 C_out). The release itself differs from Fig. 1: `unet_release_paper`.
    """
    return _unpadded(classes, in_channels, width, dropout, release=False)


def unet_release_paper(classes: int, in_channels: int = 1, width: int = 64, dropout: float = 0.5) -> SegmentationModel:
    """U-Net as its authors released it (`phseg_v5`): 31,100,354 parameters for 1 band and 2 classes.

    It differs from Fig. 1, that is from `unet_paper`, in two things: ReLU after each of the four up-convolutions, and 128 instead of 64
    maps in the last one. Sizes, dropout, initial weights and arguments are the same.

    Deviations: none known in the layer table, which was read from ports of the release. Released weights are not imported.
    """
    return _unpadded(classes, in_channels, width, dropout, release=True)


def _unpadded(classes: int, in_channels: int, width: int, dropout: float, release: bool) -> SegmentationModel:
    encoder = UNetPath(in_channels, checked_width(width), padding=0, batch_norm=False, dropout=dropout)
    decoder = UNetPaperDecoder(encoder.channels, classes, release)
    initialise(encoder)
    initialise(decoder)
    # Each level of unpadded convolutions and the poolings after it fix the phase: input = 16 k + 60, output = 16 k - 124, k >= 8.
    return SegmentationModel(encoder, decoder, classes, InputGeometry(multiple=16, remainder=12, margin=92, minimum=188))


class Stage(nn.Module):
    """One step of `UNetDecoder`: upsample to the skip's size, append the skip, two 3x3 convolutions with batch norm."""

    def __init__(self, channels_in: int, skip_channels: int, channels: int, upsampling: Upsampling) -> None:
        super().__init__()
        self.upsampling = upsampling
        self.convolve = double_convolution(channels_in + skip_channels, channels)

    def forward(self, x: Tensor, skip: Tensor | None, size: tuple[int, int]) -> Tensor:
        x = resize(x, size, self.upsampling)
        return self.convolve(x if skip is None else torch.cat([x, skip], dim=1))


def decoder_stages(strides: Sequence[int], head_stride: int) -> list[tuple[int, int | None]]:
    """The stride of every decoder stage, coarsest first, and the index of the encoder map it takes (None: no map at that stride).

    Strides halve from stage to stage: an encoder that starts at stride 4 gets stages at 2 and 1 without a skip.
    """
    if head_stride < 1 or head_stride & (head_stride - 1) or head_stride > strides[-1]:
        raise ValueError(f"head_stride is {head_stride}; it must be a power of two from 1 to {strides[-1]}, the encoder's coarsest stride")
    stages: list[tuple[int, int | None]] = []
    stride = strides[-1]
    skips = [i for i in reversed(range(len(strides) - 1)) if strides[i] >= head_stride]
    for target, index in [*((strides[i], i) for i in skips), (head_stride, None)]:
        while stride > 2 * target or (index is None and stride > target):
            stride //= 2
            stages.append((stride, None))
        if index is not None:
            stages.append((target, index))
            stride = target
    return stages


class UNetDecoder(nn.Module):
    """The expansive path on any encoder: padded, batch-normalised, each stage at exactly the size of its skip.

    Args:
        channels: maps of the encoder, finest first.
        strides: their strides.
        classes: K.
        decoder_channels: output channels of each stage, coarsest first; None halves from 256 down to 16.
        head_stride: stride of the last stage; logits are resized bilinearly from there.
        upsampling: "bilinear" or "nearest".
        image_pooling: append the mean of the coarsest maps to each of their pixels.
        dropout: share of whole maps dropped before the classifier while training.
        stage_scores: every stage has a classifier of its own, and the logits are their sum, coarse ones resized bilinearly.
        head_kernel: side of the classifier's filters, odd.
    """

    def __init__(
        self,
        channels: Sequence[int],
        strides: Sequence[int],
        classes: int,
        decoder_channels: Sequence[int] | None = None,
        head_stride: int = 1,
        upsampling: str = "bilinear",
        image_pooling: bool = False,
        dropout: float = 0.0,
        stage_scores: bool = False,
        head_kernel: int = 1,
    ) -> None:
        super().__init__()
        self.plan = decoder_stages(strides, head_stride)
        widths = _widths(decoder_channels, [stride for stride, _ in self.plan])
        mode = check_upsampling(upsampling)
        self.pool = ImagePooling(channels[-1]) if image_pooling else nn.Identity()
        incoming = 2 * channels[-1] if image_pooling else channels[-1]
        self.stages = nn.ModuleList()
        for (_, index), width in zip(self.plan, widths, strict=True):
            self.stages.append(Stage(incoming, 0 if index is None else channels[index], width, mode))
            incoming = width
        self.drop = nn.Dropout2d(dropout)
        self.coarse_classifiers = nn.ModuleList(nn.Conv2d(width, classes, 1) for width in widths[:-1] if stage_scores)
        self.classify = nn.Conv2d(incoming, classes, head_kernel, padding=head_kernel // 2)
        initialise(self)

    def forward(self, features: Features, size: tuple[int, int]) -> Tensor:
        x, coarser = self.pool(features.maps[-1]), None
        for number, (stage, (stride, index)) in enumerate(zip(self.stages, self.plan, strict=True)):
            skip = None if index is None else features.maps[index]
            height, width = (-(-size[0] // stride), -(-size[1] // stride)) if skip is None else skip.shape[-2:]
            x = stage(x, skip, (height, width))
            if number < len(self.coarse_classifiers):
                coarser = _add(self.coarse_classifiers[number](self.drop(x)), coarser)
        return resize_logits(_add(self.classify(self.drop(x)), coarser), size)


def _add(scores: Tensor, coarser: Tensor | None) -> Tensor:
    """The sum of two maps of scores, the coarser one resized; in float32 at least."""
    return scores if coarser is None else scores + resize_logits(coarser, (scores.shape[-2], scores.shape[-1]))


def _widths(decoder_channels: Sequence[int] | None, strides: list[int]) -> list[int]:
    if decoder_channels is None:
        return [max(256 >> i, 16) for i in range(len(strides))]
    if len(decoder_channels) != len(strides) or min(decoder_channels, default=1) < 1:
        raise ValueError(
            f"decoder_channels is {tuple(decoder_channels)}; this encoder's decoder has {len(strides)} stages, "
            f"at strides {', '.join(map(str, strides))}: give {len(strides)} positive numbers, coarsest first"
        )
    return list(decoder_channels)


def unet(
    classes: int,
    encoder: str = "resnet34",
    encoder_weights: EncoderWeights = None,
    in_channels: int = 3,
    decoder_channels: Sequence[int] | None = None,
    width: int | None = None,
    head_stride: int = 1,
    upsampling: str | None = None,
    image_pooling: bool = False,
    dropout: float = 0.0,
    stage_scores: bool = False,
    variant: str | None = None,
) -> SegmentationModel:
    """U-Net's decoder on any encoder; labels every pixel of an image of any size.

    Args:
        classes: K.
        encoder: any timm network with feature maps, torchvision's "googlenet" or "squeezenet1_0", or "plain": the paper's path, padded
            and with batch norm.
        encoder_weights: None, True (download through timm), or a .safetensors/.pth file with timm's keys.
        in_channels: bands of the image.
        decoder_channels: output channels of each decoder stage, coarsest first; None halves from 256 down to 16
            (and mirrors the path for "plain").
        width: maps of the first level of the "plain" encoder, 32 by None; others have their own.
        head_stride: 1 decodes to full resolution; 2 or 4 stop there and resize the logits bilinearly: faster, edges a little softer.
        upsampling: "bilinear" (so too by None) or "nearest", between decoder stages.
        image_pooling: give the coarsest maps their mean over the image as context.
        dropout: share of whole maps dropped before the classifier while training.
        stage_scores: classify at every decoder stage and sum the scores, as FCN does with its skips: what the coarse maps know reaches
            the logits past the finer stages, and a trained encoder is put to use within a few hundred updates.
        variant: "smp": as `Unet` of segmentation_models.pytorch, with nearest upsampling and 3x3 filters in the classifier, so that
            its checkpoints can be read (`bundle.import_weights`).

    Raises:
        ValueError: for an unknown encoder or illegal option, and for weights that do not belong to the encoder.
    """
    if variant not in (None, "smp"):
        raise ValueError(f"variant is {variant!r}; it must be 'smp', or left out")
    if variant == "smp" and (upsampling not in (None, "nearest") or stage_scores or image_pooling):
        raise ValueError("variant 'smp' has nearest upsampling, and neither stage_scores nor image_pooling; leave these out")
    upsampling, head_kernel = ("nearest", 3) if variant == "smp" else (upsampling or "bilinear", 1)
    path: TimmEncoder | TorchvisionTrunk | UNetPath
    if encoder == "plain":
        if encoder_weights:
            raise ValueError(f"encoder_weights is {encoder_weights!r}, but no weights are published for encoder 'plain'; leave it out")
        path = UNetPath(in_channels, 32 if width is None else width)
        initialise(path)
        if decoder_channels is None:
            decoder_channels = [path.channels[0] * stride for stride, _ in decoder_stages(path.strides, head_stride)]
    else:
        path = any_encoder(encoder, in_channels, encoder_weights)
        if width is not None:
            raise ValueError(f"width is {width}, but encoder {encoder!r} has its own; leave it out, or take encoder 'plain'")
    options = (decoder_channels, head_stride, upsampling, image_pooling, dropout, stage_scores, head_kernel)
    decoder = UNetDecoder(path.channels, path.strides, classes, *options)
    return SegmentationModel(path, decoder, classes, whole_cells(path.strides))
