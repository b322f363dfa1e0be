"""FCN. Source: Long, Shelhamer & Darrell 2015, arXiv:1411.4038; numbers of the layers as in the authors' release.

An image goes through a classifier whose fully connected layers have become convolutions; 1x1 convolutions score its coarsest map and,
in FCN-16s and FCN-8s, finer ones; the scores are upsampled bilinearly, summed on the way, and cropped to the image.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from perpixel.models.alexnet import CaffeNetPath
from perpixel.models.encoders import NO_WEIGHTS, EncoderWeights, read_weights
from perpixel.models.googlenet import GoogLeNet2014Path
from perpixel.models.layers import doubled_biases, initialise, resize_logits
from perpixel.models.model import Features, InputGeometry, SegmentationModel, whole_cells
from perpixel.models.torchvision_trunks import any_encoder
from perpixel.models.vgg import VGGPath, classifier_weights, fully_connected, source_of


class FCNPath(nn.Module):
    """VGG-16 with fc6 and fc7 as convolutions; an `Encoder` whose maps are the first four poolings and fc7.

    100 zeros around the image make room for the 7x7 window of fc6, so that an image of any size gets a score.

    Args:
        in_channels: bands of the image.
        width: maps of the first stage; 64 as published. fc6 and fc7 have 64 times that.
        dropout: share of values dropped after fc6 and fc7 while training.
    """

    def __init__(self, in_channels: int = 3, width: int = 64, dropout: float = 0.5) -> None:
        super().__init__()
        self.path = VGGPath(16, in_channels, width, first_padding=100)
        hidden = 64 * width
        self.channels, self.strides = [*self.path.channels[:-1], hidden], self.path.strides
        self.fc6 = nn.Conv2d(self.path.channels[-1], hidden, 7)
        self.fc7 = nn.Conv2d(hidden, hidden, 1)
        self.relu, self.drop = nn.ReLU(inplace=True), nn.Dropout(dropout)
        initialise(self)

    def forward(self, image: Tensor) -> Features:
        *skips, x = self.path(image).maps
        x = self.drop(self.relu(self.fc6(x)))
        return Features([*skips, self.drop(self.relu(self.fc7(x)))])

    @torch.no_grad()
    def load_classifier(self, state: Mapping[str, Tensor], source: str = "the state dict") -> None:
        """Takes torchvision's VGG-16 whole, its last layer apart; ValueError as in `VGGPath.load_classifier`."""
        full = fully_connected(state, 7, source)
        own = {name: value for name, value in self.state_dict().items() if name in full}
        for name, value in own.items():
            if full[name].shape != value.shape:
                raise ValueError(f"{source}: {name} has shape {tuple(full[name].shape)}, not {tuple(value.shape)}; it needs width=64")
        self.path.load_classifier(state, source)
        for name, value in own.items():
            value.copy_(full[name])

    def caffe_layers(self) -> dict[str, str]:
        """Caffe's name of each layer -> its name here, from the image on."""
        names: dict[str, str] = {}
        for number, stage in enumerate(self.path.stages):
            convolutions = [index for index, layer in stage.named_children() if isinstance(layer, nn.Conv2d)]
            names |= {f"conv{number + 1}_{i + 1}": f"path.stages.{number}.{index}" for i, index in enumerate(convolutions)}
        return names | {"fc6": "fc6", "fc7": "fc7"}


class BilinearDeconvolution(nn.ConvTranspose2d):
    """Upsampling by `stride` as a deconvolution of all channels by all, which starts as bilinear interpolation of each.

    Frozen unless `learned`. It runs in float32 at least, inside autocast too: interpolation in bfloat16 would blur the scores' order.

    Source: upsample filters of the release, surgery.py: w(i) = 1 - |i - centre| / f with f = (kernel + 1) // 2.
    """

    def __init__(self, channels: int, kernel: int, stride: int, learned: bool = False) -> None:
        super().__init__(channels, channels, kernel, stride, bias=False)
        with torch.no_grad():
            self.weight.zero_()
            for channel in range(channels):
                self.weight[channel, channel] = bilinear_kernel(kernel)
        self.weight.requires_grad_(learned)

    def forward(self, x: Tensor, output_size: list[int] | None = None) -> Tensor:
        with torch.autocast("cpu" if x.is_meta else x.device.type, enabled=False):  # PyTorch knows no autocast on meta
            return super().forward(x.to(self.weight.dtype), output_size)


def bilinear_kernel(side: int) -> Tensor:
    """(side, side) weights of bilinear upsampling by (side + 1) // 2."""
    factor = (side + 1) // 2
    centre = factor - 1 if side % 2 else factor - 0.5
    line = 1 - (torch.arange(side) - centre).abs() / factor
    return torch.outer(line, line)


@dataclass(frozen=True)
class Skip:
    """Where a finer map joins: the deconvolution (4x4, stride 2) before it and its own score, both by Caffe's name.

    Attributes:
        up: the deconvolution that brings the coarser scores to this map's stride.
        score: the 1x1 convolution on the map.
        index: of the map among the encoder's.
        crop: pixels that the padding puts before the first score that counts.
        scale: fixed factor on the map ("at once").
    """

    up: str
    score: str
    index: int
    crop: int
    scale: float = 1.0


# Source: the release, voc-fcn16s and voc-fcn8s/train.prototxt; scales: voc-fcn8s-atonce/net.py.
_POOL4 = Skip("upscore2", "score_pool4", index=3, crop=5)
_POOL3 = Skip("upscore_pool4", "score_pool3", index=2, crop=9)
_AT_ONCE = (Skip("upscore2", "score_pool4", 3, 5, scale=0.01), Skip("upscore_pool4", "score_pool3", 2, 9, scale=0.0001))


@dataclass(frozen=True)
class Last:
    """The last deconvolution: its name, kernel and stride, and the pixels to crop before the image begins."""

    name: str
    kernel: int
    stride: int
    crop: int


class FCNPaperDecoder(nn.Module):
    """Scores of fc7 and of the skips, upsampled, summed and cropped as in the release.

    `layers` holds them by Caffe's names, which the nets share: "score_fr", "upscore2", "score_pool4", ...
    Scores start at zero (the release has no filler, so Caffe's 0; the paper found random ones no better, sec. 4.3).

    Args:
        channels: of the encoder's maps, finest first.
        classes: K.
        skips: coarsest first.
        last: the final upsampling.
        learn_upsampling: train the deconvolutions of the skips; the last one is always fixed.
    """

    def __init__(self, channels: list[int], classes: int, skips: tuple[Skip, ...], last: Last, learn_upsampling: bool = False) -> None:
        super().__init__()
        self.skips, self.last = skips, last
        self.layers = nn.ModuleDict({"score_fr": _score(channels[-1], classes)})
        for skip in skips:
            self.layers[skip.up] = BilinearDeconvolution(classes, 4, 2, learn_upsampling)
            self.layers[skip.score] = _score(channels[skip.index], classes)
        self.layers[last.name] = BilinearDeconvolution(classes, last.kernel, last.stride)

    def forward(self, features: Features, size: tuple[int, int]) -> Tensor:
        x = self.layers["score_fr"](features.maps[-1])
        for skip in self.skips:
            x = self.layers[skip.up](x)
            fine = features.maps[skip.index]
            scores = self.layers[skip.score](fine if skip.scale == 1 else fine * skip.scale)
            x = x + _crop(scores, skip.crop, (x.shape[-2], x.shape[-1]))
        return _crop(self.layers[self.last.name](x), self.last.crop, size)


def _score(channels: int, classes: int) -> nn.Conv2d:
    """1x1 scores that start at zero."""
    layer = nn.Conv2d(channels, classes, 1)
    nn.init.zeros_(layer.weight)
    if layer.bias is not None:
        nn.init.zeros_(layer.bias)
    return layer


def _crop(x: Tensor, offset: int, size: tuple[int, int]) -> Tensor:
    return x[..., offset : offset + size[0], offset : offset + size[1]]


def fcn32s_paper(
    classes: int, in_channels: int = 3, encoder_weights: EncoderWeights = None, width: int = 64, dropout: float = 0.5
) -> SegmentationModel:
    """FCN-32s on VGG-16 as released: 134,346,581 trainable parameters for 21 classes, images of any size.

    Args:
        classes: K.
        in_channels: bands of the image.
        encoder_weights: None (random); True: torchvision's VGG-16 is downloaded; a file with the state dict of torchvision's
            `vgg16`, or a bundle of a coarser FCN for the same classes, from which the net starts as `start_from` says.
        width: maps of the first stage; published weights need 64.
        dropout: share of values dropped after fc6 and fc7 while training.

    Deviations: images are RGB, normalised as the run says, in place of Caffe's BGR minus a mean; VGG-16 is torchvision's training of
    it. fc6 and fc7 of a run from scratch start at N(0, 2 / fan_in).
    """
    return _on_vgg16(classes, in_channels, encoder_weights, width, dropout, (), Last("upscore", 64, 32, 19))


def fcn16s_paper(
    classes: int,
    in_channels: int = 3,
    encoder_weights: EncoderWeights = None,
    width: int = 64,
    dropout: float = 0.5,
    learn_upsampling: bool = False,
) -> SegmentationModel:
    """FCN-16s on VGG-16 as released: `fcn32s_paper` and scores of pool4; 134,357,354 trainable parameters for 21 classes.

    Args and deviations as in `fcn32s_paper`; encoder_weights is meant to be the bundle of a trained FCN-32s.
        learn_upsampling: train the 2x deconvolution, as the paper of 2015 does (sec. 4.3); the release froze it and saw no difference.
    """
    return _on_vgg16(classes, in_channels, encoder_weights, width, dropout, (_POOL4,), Last("upscore16", 32, 16, 27), learn_upsampling)


def fcn8s_paper(
    classes: int,
    in_channels: int = 3,
    encoder_weights: EncoderWeights = None,
    width: int = 64,
    dropout: float = 0.5,
    learn_upsampling: bool = False,
) -> SegmentationModel:
    """FCN-8s on VGG-16 as released: `fcn16s_paper` and scores of pool3; 134,362,751 trainable parameters for 21 classes.

    Args and deviations as in `fcn16s_paper`; encoder_weights is meant to be the bundle of a trained FCN-16s.
    """
    skips = (_POOL4, _POOL3)
    return _on_vgg16(classes, in_channels, encoder_weights, width, dropout, skips, Last("upscore8", 16, 8, 31), learn_upsampling)


def fcn8s_atonce_paper(
    classes: int,
    in_channels: int = 3,
    encoder_weights: EncoderWeights = None,
    width: int = 64,
    dropout: float = 0.5,
    learn_upsampling: bool = False,
) -> SegmentationModel:
    """FCN-8s that is trained at once from VGG-16, without FCN-32s and FCN-16s before it.

    pool4 is scaled by 0.01 and pool3 by 0.0001, so that all scores learn at one rate. Args and deviations as in `fcn8s_paper`; and the
    two scales are constants here, where the release repeats them per channel in a frozen layer.
    """
    return _on_vgg16(classes, in_channels, encoder_weights, width, dropout, _AT_ONCE, Last("upscore8", 16, 8, 31), learn_upsampling)


def fcn32s_alexnet_paper(
    classes: int, in_channels: int = 3, encoder_weights: EncoderWeights = None, width: int = 96, dropout: float = 0.5
) -> SegmentationModel:
    """FCN-AlexNet as released: 56,954,261 trainable parameters for 21 classes, images of any size.

    Args:
        classes: K.
        in_channels: bands of the image.
        encoder_weights: None, or the bundle of a net of the same kind. Torchvision's AlexNet is another network (64 maps in its
            first layer, no groups, no normalisation); blobs of CaffeNet are read by `bundle.import_weights(..., source="caffe_npz")`.
        width: maps of conv1, a multiple of 6; 96 as published.
        dropout: share of values dropped after fc6 and fc7 while training.

    Deviations: as in `fcn32s_paper`.
    """
    encoder = CaffeNetPath(in_channels, width, dropout)
    decoder = FCNPaperDecoder(encoder.channels, classes, (), Last("upscore", 63, 32, 18))
    # The trunk has no rates of its own in the release: its biases learn and decay like weights.
    rates = {f"encoder.{name}": (1.0, 1.0) for name, parameter in encoder.named_parameters() if parameter.ndim == 1}
    model = SegmentationModel(encoder, decoder, classes, InputGeometry(cell=32), rates | doubled_biases(decoder, "decoder."))
    return _from_own_kind(model, encoder_weights, "CaffeNet's weights for download; import blobs of it, or train without")


def fcn_googlenet_paper(
    classes: int, in_channels: int = 3, encoder_weights: EncoderWeights = None, width: int = 64, dropout: float = 0.4
) -> SegmentationModel:
    """FCN-GoogLeNet of the paper's table 1: 5,995,077 trainable parameters for 21 classes, images of any size.

    Args:
        classes: K.
        in_channels: bands of the image.
        encoder_weights: None, or the bundle of a net of the same kind. torchvision's GoogLeNet is another network (batch norm, 3x3 in
            place of 5x5 filters): `fcn(encoder="googlenet")` takes it.
        width: maps of the first layer, a multiple of 4; 64 as published.
        dropout: share of values dropped from the last map while training.

    The net was never released. From the papers: the trunk of 2014 (no batch norm, 5x5 filters, poolings rounded up) without its
    average pooling and auxiliary classifiers, 1x1 scores, bilinear upsampling by 32, biases at twice the learning rate. Inferred from
    the released nets: 100 zeros around the image, scores that start at zero, a frozen 63x63 upsampling (odd, as where scores lie on
    pixels, in FCN-AlexNet), no decay of biases. Computed for these: the crop of 98. Inferred from the classifier: dropout of 0.4.
    Normalisations across maps as in Caffe's: 5 maps, alpha 1e-4, beta 0.75.

    A map's pixel sees 715 pixels of the image; the paper's 907 count the 7x7 average pooling that it drops (715 + 6 * 32).

    Deviations: as in `fcn32s_paper`. The authors started from their own training of the classifier, which was not released either.
    """
    encoder = GoogLeNet2014Path(in_channels, width, dropout)
    decoder = FCNPaperDecoder(encoder.channels, classes, (), Last("upscore", 63, 32, 98))
    rates = doubled_biases(encoder, "encoder.") | doubled_biases(decoder, "decoder.")
    model = SegmentationModel(encoder, decoder, classes, InputGeometry(cell=32), rates)
    return _from_own_kind(model, encoder_weights, "the GoogLeNet of 2014 for download; take fcn on 'googlenet', or train without")


def _from_own_kind(model: SegmentationModel, weights: EncoderWeights, missing: str) -> SegmentationModel:
    """`model`, started from a bundle of its kind where one is given; for nets whose classifier nobody publishes."""
    if weights is True:
        raise ValueError(f"no library offers {missing}; train without: {NO_WEIGHTS}")
    if weights:
        start_from(model, read_weights(Path(weights)), str(weights))
    return model


def _on_vgg16(
    classes: int,
    in_channels: int,
    weights: EncoderWeights,
    width: int,
    dropout: float,
    skips: tuple[Skip, ...],
    last: Last,
    learn_upsampling: bool = False,
) -> SegmentationModel:
    encoder = FCNPath(in_channels, width, dropout)
    decoder = FCNPaperDecoder(encoder.channels, classes, skips, last, learn_upsampling)
    rates = doubled_biases(encoder, "encoder.") | doubled_biases(decoder, "decoder.")
    model = SegmentationModel(encoder, decoder, classes, InputGeometry(cell=32), rates)
    if weights:
        state = classifier_weights(weights, "vgg16")
        source = source_of(weights, "vgg16")
        if any(name.startswith("encoder.") for name in state):
            start_from(model, state, source)
        else:
            encoder.load_classifier(state, source)
    return model


@torch.no_grad()
def start_from(model: SegmentationModel, coarser: SegmentationModel | Mapping[str, Tensor], source: str = "the coarser net") -> None:
    """Staged training: `model`, an FCN-16s or FCN-8s, starts from a trained FCN-32s or FCN-16s.

    Layers that both have are copied by name; scores that the coarser net lacks are set to zero, upsampling it lacks stays as it is.
    So the scores before the last upsampling are those of the coarser net, interpolated once more by the new net's deconvolution. The
    two ways of interpolating agree wherever the scores are linear from place to place, and elsewhere differ by at most an eighth of
    their second difference in each direction: labels move only at the borders between classes.

    Args:
        model: changed in place.
        coarser: the trained net, or its state dict (for instance of a bundle).
        source: where it came from, for messages.

    Raises:
        ValueError: if it has another encoder, width or number of bands or classes.

    Source: Long et al. 2015, arXiv:1411.4038, sec. 4.2; the release's solve.py.
    """
    state = coarser.state_dict() if isinstance(coarser, nn.Module) else coarser
    own = model.state_dict()
    lacks = [name for name in own if name not in state and (name.startswith("encoder.") or name.startswith("decoder.layers.score_fr."))]
    other = [name for name in own if name in state and state[name].shape != own[name].shape]
    if lacks or other:
        name = (lacks or other)[0]
        theirs = f"{tuple(state[name].shape)}" if name in state else "nothing"
        raise ValueError(
            f"{source}: not an FCN that this one can start from: it has {theirs} where this has {name} of {tuple(own[name].shape)}. "
            "Both need the same encoder, width, bands and classes"
        )
    for name, value in own.items():
        if name in state:
            value.copy_(state[name])
        elif name.startswith("decoder.layers.score_"):
            value.zero_()


class FCNDecoder(nn.Module):
    """Scores of the encoder's maps, coarsest first, each resized bilinearly to the next finer map and added to its scores.

    Args:
        channels: of the encoder's maps, finest first.
        strides: their strides.
        classes: K.
        head_stride: the finest stride at which a map is scored; the sum is resized from there.
        dropout: share of values dropped from the coarsest map while training.
    """

    def __init__(self, channels: list[int], strides: list[int], classes: int, head_stride: int = 8, dropout: float = 0.1) -> None:
        super().__init__()
        if not 1 <= head_stride <= strides[-1] or head_stride & (head_stride - 1):
            raise ValueError(
                f"head_stride is {head_stride}; it must be a power of two from 1 to {strides[-1]}, the encoder's coarsest stride. "
                f"The encoder has maps at strides {', '.join(map(str, strides))}"
            )
        self.scored = [i for i in reversed(range(len(strides))) if strides[i] >= head_stride]
        self.drop = nn.Dropout(dropout)
        self.scores = nn.ModuleList(_score(channels[i], classes) for i in self.scored)

    def forward(self, features: Features, size: tuple[int, int]) -> Tensor:
        total = self.scores[0](self.drop(features.maps[self.scored[0]]))
        for index, score in zip(self.scored[1:], self.scores[1:], strict=True):
            x = score(features.maps[index])
            total = x + resize_logits(total, (x.shape[-2], x.shape[-1]))
        return resize_logits(total, size)


def fcn(
    classes: int,
    encoder: str = "resnet34",
    encoder_weights: EncoderWeights = None,
    in_channels: int = 3,
    head_stride: int = 8,
    dropout: float = 0.1,
) -> SegmentationModel:
    """FCN on any encoder: scores of its maps, summed from coarse to fine, upsampled bilinearly; labels every pixel of an image of any size.

    Args:
        classes: K.
        encoder: any timm network with feature maps, or torchvision's "googlenet" (with batch norm) or "squeezenet1_0".
        encoder_weights: None, True (download through timm or torchvision), or a .safetensors/.pth file with their keys.
        in_channels: bands of the image.
        head_stride: 32: scores of the coarsest map alone (FCN-32s); 16 and 8 add finer maps (FCN-16s, FCN-8s).
        dropout: share of values dropped from the coarsest map while training; 0.5 in the paper, for 4096 of them.

    Unlike the `_paper` nets it pads in the usual way instead of 100 pixels, resizes with pixels as areas, and has no fc6 and fc7.
    Scores start at zero as there, so training starts from a cost of log K.

    Raises:
        ValueError: for an unknown encoder or illegal option, and for weights that do not belong to the encoder.
    """
    path = any_encoder(encoder, in_channels, encoder_weights)
    decoder = FCNDecoder(path.channels, path.strides, classes, head_stride, dropout)
    return SegmentationModel(path, decoder, classes, whole_cells(path.strides))
