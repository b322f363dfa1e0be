"""DeepLab v1. Source: Chen et al. 2015 (ICLR), arXiv:1412.7062; the layers are those of the authors' released prototxt files."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from perpixel.models.atrous import (
    CellDecoder,
    CoarselyTrainedDecoder,
    atrous_convolution,
    atrous_encoder,
    small_scores,
    summed,
)
from perpixel.models.encoders import EncoderWeights
from perpixel.models.layers import checked_width, doubled_biases, initialise
from perpixel.models.model import Features, InputGeometry, SegmentationModel, whole_cells
from perpixel.models.vgg import VGGPath, classifier_weights, fully_connected, source_of


@dataclass(frozen=True)
class Fc6:
    """What a variant makes of VGG's fc6: side of the kernel, atrous rate, maps of fc6 and fc7."""

    kernel: int
    rate: int
    width: int


# Source: arXiv:1412.7062, tables 1 and 2.
VARIANTS: dict[str, Fc6] = {"largefov": Fc6(3, 12, 1024), "7x7": Fc6(7, 4, 4096), "4x4": Fc6(4, 4, 4096), "4x4_r8": Fc6(4, 8, 4096)}

SIDE_STRIDES = (8, 4, 2, 1, 1)  # of the branches on the image and pool1 to pool4, so that all end at output stride 8
GEOMETRY = InputGeometry(multiple=8, remainder=1, minimum=9)


class AtrousClassifier(nn.Module):
    """VGG's fc6, fc7 and the scores, as convolutions, fc6 atrous: (N, C, H, W) -> (N, K, H, W)."""

    def __init__(self, channels_in: int, classes: int, fc6: Fc6, dropout: float = 0.5) -> None:
        super().__init__()
        self.fc6 = atrous_convolution(channels_in, fc6.width, fc6.kernel, fc6.rate)
        self.fc7 = nn.Conv2d(fc6.width, fc6.width, 1)
        self.fc8 = nn.Conv2d(fc6.width, classes, 1)
        self.relu, self.drop = nn.ReLU(inplace=True), nn.Dropout(dropout)
        initialise(self)

    def forward(self, x: Tensor) -> Tensor:
        x = self.drop(self.relu(self.fc6(x)))
        return self.fc8(self.drop(self.relu(self.fc7(x))))

    def decimated(self, state: Mapping[str, Tensor], source: str = "the state dict", seed: int = 0) -> dict[str, Tensor]:
        """fc6 and fc7 of torchvision's VGG-16 classifier as this head takes them (`decimate`); ValueError if they do not fit."""
        kept = decimate(fully_connected(state, source=source), self.fc6.kernel_size[0], self.fc6.out_channels, seed)
        for key, value in kept.items():
            own = self.get_parameter(key)
            if own.shape != value.shape:
                raise ValueError(
                    f"{source}: {key} has shape {tuple(value.shape)}, the model {tuple(own.shape)}; published weights need width=64"
                )
        return kept


def decimate(fully_connected: Mapping[str, Tensor], kernel: int, width: int, seed: int = 0) -> dict[str, Tensor]:
    """fc6 and fc7 with fewer taps and maps: evenly spaced taps of the 7x7, and a random choice of the 4096 filters.

    Args:
        fully_connected: "fc6.weight" (M, C, S, S), "fc6.bias" (M,), "fc7.weight" (M, M, 1, 1), "fc7.bias" (M,).
        kernel: taps kept per axis, the outermost among them: of 7, 3 keeps 0, 3 and 6, and 4 keeps 0, 2, 4 and 6.
        width: filters kept of fc6 and of fc7; fc7 keeps the inputs that fc6 still gives.
        seed: of the choice; v1 says that filters are dropped, v2 that the choice is random.

    Returns:
        The four tensors for fc6 of (width, C, kernel, kernel) and fc7 of (width, width, 1, 1).

    Raises:
        ValueError: if more is asked for than there is.

    Source: arXiv:1412.7062, section 3.2 and 4.1.
    """
    maps, _, side, _ = fully_connected["fc6.weight"].shape
    if not 1 <= kernel <= side or not 1 <= width <= maps:
        raise ValueError(f"kernel is {kernel} and width {width}; decimation keeps at most {side} taps per axis and {maps} filters")
    taps = torch.linspace(0, side - 1, kernel).round().long()
    generator = torch.Generator().manual_seed(seed)
    first, second = (
        torch.arange(maps) if width == maps else torch.randperm(maps, generator=generator)[:width].sort().values for _ in range(2)
    )
    return {
        "fc6.weight": fully_connected["fc6.weight"][first][:, :, taps][..., taps],
        "fc6.bias": fully_connected["fc6.bias"][first],
        "fc7.weight": fully_connected["fc7.weight"][second][:, first],
        "fc7.bias": fully_connected["fc7.bias"][second],
    }


class SideBranch(nn.Sequential):
    """Scores of a fine map: 3x3 convolution that brings it to output stride 8, 1x1 convolution, scores; N(0, 0.001) weights."""

    def __init__(self, channels_in: int, classes: int, stride: int, width: int, dropout: float) -> None:
        super().__init__(
            nn.Conv2d(channels_in, width, 3, stride, 1), nn.ReLU(inplace=True), nn.Dropout(dropout),
            nn.Conv2d(width, width, 1), nn.ReLU(inplace=True), nn.Dropout(dropout),
            nn.Conv2d(width, classes, 1),
        )  # fmt: skip
        small_scores(self, std=0.001)


class ImageBeside(VGGPath):
    """A `VGGPath` whose first map is the image itself."""

    def forward(self, image: Tensor) -> Features:
        return Features([image, *super().forward(image).maps])


class MultiScaleDecoder(CoarselyTrainedDecoder):
    """The head's scores plus those of branches on the image and the first four pooled maps."""

    def __init__(self, head: nn.Module, channels: Sequence[int], classes: int, width: int, dropout: float) -> None:
        super().__init__(head)
        self.branches = nn.ModuleList(
            SideBranch(before, classes, stride, width, dropout) for before, stride in zip(channels, SIDE_STRIDES, strict=False)
        )

    def scores(self, features: Features) -> Tensor:
        sides = [branch(x) for branch, x in zip(self.branches, features.maps, strict=False)]
        return summed([super().scores(features), *sides])


def deeplab_v1_paper(
    classes: int,
    in_channels: int = 3,
    encoder_weights: EncoderWeights = None,
    variant: str = "largefov",
    multi_scale: bool = False,
    dropout: float = 0.5,
    width: int = 64,
) -> SegmentationModel:
    """DeepLab v1 on VGG-16 as published, before its CRF; 20,505,429 parameters for 21 classes (multi-scale: 21,711,550).

    Args:
        classes: K.
        in_channels: bands of the image.
        encoder_weights: torchvision's VGG-16 classifier (True: download; or a file): its convolutions, and fc6 and fc7 decimated.
        variant: "largefov" (3x3 at rate 12, 1024 maps), "7x7" (rate 4, 4096), "4x4" (rate 4) or "4x4_r8" (rate 8).
        multi_scale: branches on the image and pool1 to pool4. The paper trains them alone, on a net that is trained already
            (arXiv:1412.7062, section 4.3): `model.start_from` and `train.frozen`, as in the recipe.
        dropout: share of values dropped after fc6, fc7 and in the branches while training.
        width: maps of VGG's first stage; 64 as published. fc6, fc7 and the branches follow it.

    Poolings are 3x3, the last two with stride 1, conv5 has rate 2, and an average pooling with its padding counted follows: sides of
    8 k + 1 give maps of k + 1 (321 -> 41, 513 -> 65). It is trained on that map, against every eighth label, and predicts with the
    scores enlarged, corners on corners. Learning rates: scores x10, their bias x20; other biases x2; no decay of biases.

    Deviations: weights are for normalised RGB, not Caffe's BGR less its mean. The branches' scores are summed, where the paper
    concatenates maps before one linear classifier: the same function, with redundant biases. The 4x4 variants pad alike at both sides.
    """
    if variant not in VARIANTS:
        raise ValueError(f"unknown variant {variant!r}. Known: {', '.join(VARIANTS)}")
    chosen = VARIANTS[variant]
    fc6 = Fc6(chosen.kernel, chosen.rate, chosen.width * width // 64)
    encoder = vgg_trunk(in_channels, width, image_beside=multi_scale)
    classifier = AtrousClassifier(encoder.channels[-1], classes, fc6, dropout)
    load_vgg(encoder, classifier, encoder_weights)
    small_scores(classifier.fc8)
    # Caffe's average counts the padding: 9 in every window.
    head = nn.Sequential(nn.AvgPool2d(3, 1, 1, count_include_pad=True), classifier)
    if multi_scale:
        decoder: CoarselyTrainedDecoder = MultiScaleDecoder(head, encoder.channels, classes, 2 * width, dropout)
    else:
        decoder = CoarselyTrainedDecoder(head)
    return SegmentationModel(encoder, decoder, classes, GEOMETRY, caffe_multipliers(encoder, decoder))


def vgg_trunk(in_channels: int, width: int, image_beside: bool = False) -> VGGPath:
    """VGG-16 at output stride 8: 3x3 poolings, the last two with stride 1, conv5 at rate 2."""
    make = ImageBeside if image_beside else VGGPath
    trunk = make(16, in_channels, width, pool=3, pool_strides=(2, 2, 2, 1, 1), dilations=(1, 1, 1, 1, 2))
    if image_beside:
        trunk.channels, trunk.strides = [in_channels, *trunk.channels], [1, *trunk.strides]
    return trunk


def load_vgg(encoder: VGGPath, head: nn.Module, weights: EncoderWeights) -> None:
    """Gives trunk and head published weights: True downloads torchvision's VGG-16, a file is read, None leaves all as it is."""
    if weights:
        load_classifier(encoder, head, classifier_weights(weights, "vgg16"), source_of(weights, "vgg16"))


def load_classifier(encoder: VGGPath, head: nn.Module, state: Mapping[str, Tensor], source: str = "the state dict") -> None:
    """Gives a trunk and every `AtrousClassifier` in `head` the weights of VGG-16; each chooses filters of its own.

    Raises:
        ValueError: if they are another network's, lack fc6 and fc7, or the model is not of the published width; then nothing is changed.
    """
    parts = [part for part in head.modules() if isinstance(part, AtrousClassifier)]
    kept = [part.decimated(state, source, seed) for seed, part in enumerate(parts)]
    encoder.load_classifier(state, source)
    for part, weights in zip(parts, kept, strict=True):
        part.load_state_dict(weights, strict=False)


def caffe_multipliers(encoder: nn.Module, decoder: nn.Module) -> dict[str, tuple[float, float]]:
    """Factors on learning rate and decay: scores (10, 1), their biases (20, 0), other biases (2, 0).

    Source: the released train.prototxt.
    """
    factors = doubled_biases(encoder, "encoder.") | doubled_biases(decoder, "decoder.")
    for name, layer in decoder.named_modules():
        if isinstance(layer, nn.Conv2d) and _gives_scores(name):
            factors |= {f"decoder.{name}.weight": (10.0, 1.0), f"decoder.{name}.bias": (20.0, 0.0)}
    return factors


def _gives_scores(name: str) -> bool:
    """Whether this convolution of a decoder gives scores: fc8, the last of a side branch, those of a summed pyramid."""
    parts = name.split(".")
    return parts[-1] == "fc8" or (parts[0] == "branches" and parts[-1] == "6") or (parts[0] == "head" and parts[-2] == "branches")


def deeplab_v1(
    classes: int,
    encoder: str = "resnet34",
    encoder_weights: EncoderWeights = None,
    in_channels: int = 3,
    output_stride: int | None = None,
    width: int = 256,
    dropout: float = 0.5,
) -> SegmentationModel:
    """DeepLab v1's large field of view on any encoder; labels every pixel of an image of any size.

    Args:
        classes: K.
        encoder: any timm network with feature maps.
        encoder_weights: None, True (download through timm), or a .safetensors/.pth file with timm's keys.
        in_channels: bands of the image.
        output_stride: 8 or 16 for encoders that can dilate, 32 for those that end there; None: 16 where possible, else the encoder's own
            (`atrous_encoder`).
        width: maps of the atrous 3x3 convolution and of the 1x1 that follows; 1024 in the paper.
        dropout: share of values dropped after each of them while training.

    The rate is 12 at output stride 8, as published, 6 at 16 and 3 at 32: the same field of view in pixels of the image.
    Unlike the `_paper` net it is trained on its logits at full size.

    Raises:
        ValueError: for an unknown encoder, one that cannot have `output_stride`, and weights that do not belong to it.
    """
    path = atrous_encoder(encoder, in_channels, encoder_weights, output_stride)
    stride = path.strides[-1]
    head = AtrousClassifier(path.channels[-1], classes, Fc6(3, max(96 // stride, 1), checked_width(width)), dropout)
    return SegmentationModel(path, CellDecoder(head), classes, whole_cells(path.strides))
