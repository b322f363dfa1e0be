"""SegNet and Bayesian SegNet; SegNet-Basic is in `segnet_basic.py`.

Sources: Badrinarayanan, Kendall & Cipolla 2017, arXiv:1511.00561, Fig. 2 and sec. 3.1; Kendall, Badrinarayanan & Cipolla 2015,
arXiv:1511.02680. What the papers leave open follows the authors' published layer files.
"""

import difflib
from collections.abc import Sequence

from timm.models import split_model_name_tag
from torch import Tensor, nn

from perpixel.models.encoders import EncoderWeights
from perpixel.models.layers import doubled_biases, initialise
from perpixel.models.model import Features, InputGeometry, SegmentationModel
from perpixel.models.unpooling import PoolThenDrop, max_unpool
from perpixel.models.vgg import CONVOLUTIONS, VGGPath, classifier_weights, source_of

# Encoders whose poolings give the positions that unpooling needs, by name: depth, and whether they normalise.
VGG_FAMILY = {f"vgg{depth}{suffix}": (depth, bool(suffix)) for depth in CONVOLUTIONS for suffix in ("", "_bn")}

SHIFT = 0.001  # of every batch norm at the start, as in the authors' files

# The stages of a VGG whose pooled maps are dropped out, and those of the decoder, finest first: the central six of arXiv:1511.02680.
DROPPED_POOLS = (2, 3, 4)
DROPPED_STAGES = (2, 3, 4)


class SegNetDecoder(nn.Module):
    """A VGG in reverse: each stage unpools at the positions of the maxima, then convolves; batch norm and ReLU after every convolution.

    The last convolution of a stage has as many maps as the stage after it; the very last one is the classifier, 3x3 like the others.

    Args:
        channels: maps of each stage of the encoder, finest first.
        convolutions: their number in each stage, finest first.
        classes: K.
        dropout: share of values dropped after the three coarsest stages.
    """

    def __init__(self, channels: Sequence[int], convolutions: Sequence[int], classes: int, dropout: float = 0.0) -> None:
        super().__init__()
        self.stages, self.drops = nn.ModuleList(), nn.ModuleList()
        for stage in reversed(range(len(channels))):
            width = channels[stage]
            outputs = [width] * (convolutions[stage] - 1) + ([channels[stage - 1]] if stage else [])
            layers: list[nn.Module] = []
            for before, after in zip([width, *outputs], outputs, strict=False):
                layers += [nn.Conv2d(before, after, 3, padding=1), nn.BatchNorm2d(after), nn.ReLU(inplace=True)]
            self.stages.append(nn.Sequential(*layers))
            self.drops.append(nn.Dropout(dropout if stage in DROPPED_STAGES else 0.0))
        self.classify = nn.Conv2d(channels[0], classes, 3, padding=1)
        initialise(self)

    def forward(self, features: Features, size: tuple[int, int]) -> Tensor:
        x, indices = features.maps[-1], pool_indices(features)
        sizes = [size, *((m.shape[-2], m.shape[-1]) for m in features.maps[:-1])]
        for stage, drop, index, finer in zip(self.stages, self.drops, reversed(indices), reversed(sizes), strict=True):
            x = drop(stage(max_unpool(x, index, finer)))
        logits: Tensor = self.classify(x)
        return logits


def pool_indices(features: Features) -> list[Tensor]:
    """The positions of the maxima; ValueError where the encoder gave none."""
    if features.pool_indices is None:
        raise ValueError("the encoder gives no pooling indices, which unpooling needs; build it with indices=True")
    return features.pool_indices


def start_norms(model: nn.Module) -> None:
    """Scale 1 and shift 0.001 in every batch norm, as SegNet starts."""
    for layer in model.modules():
        if isinstance(layer, nn.BatchNorm2d):
            nn.init.ones_(layer.weight)
            nn.init.constant_(layer.bias, SHIFT)


def multipliers(model: nn.Module, decay_shift: bool) -> dict[str, tuple[float, float]]:
    """The authors' `lr_mult` and `decay_mult`: biases of convolutions twice the rate and no decay; norms the run's own rate and decay.

    Args:
        decay_shift: whether the shift of a norm decays: not in the full net, but in Basic, whose files leave norms as they are.
    """
    found = doubled_biases(model)
    for name, layer in model.named_modules():
        if isinstance(layer, nn.BatchNorm2d):
            found |= {f"{name}.weight": (1.0, 1.0), f"{name}.bias": (1.0, float(decay_shift))}
    return found


def segnet_paper(
    classes: int, in_channels: int = 3, encoder_weights: EncoderWeights = None, width: int = 64, dropout: float = 0.0
) -> SegmentationModel:
    """SegNet as published: VGG-16 without its fully connected layers, and its mirror; 29,449,355 parameters for 11 classes.

    Args:
        classes: K.
        in_channels: bands of the image.
        encoder_weights: None; True (torchvision's VGG-16 is downloaded) or a file: VGG-16 (`vgg16` or `vgg16_bn`) with torchvision's
            or timm's keys. The paper starts from VGG-16 without batch norm: its norms then start at scale 1 and shift 0.001.
        width: maps of the first stage; 64 in the paper.
        dropout: of the Bayesian form, see `bayesian_segnet_paper`; 0 in the paper's tables.

    Any image size: poolings round up and unpooling restores the exact size, as the authors' files do for 360x480.

    Deviations: eps of batch norm is 1e-5 instead of 1e-9, which would blow up maps that are 0 everywhere. Images are normalised RGB,
    not BGR of 0..255. Batch norm keeps running averages while it trains; statistics by one pass over the training set, as published,
    are `train.batch_norm_pass` in a recipe.
    """
    path = VGGPath(16, in_channels, width, batch_norm=True, indices=True)
    model = _mirrored(path, 16, classes, dropout)
    start_norms(model)
    if encoder_weights:
        path.load_classifier(classifier_weights(encoder_weights, "vgg16"), source_of(encoder_weights, "vgg16"), without_norms=True)
    model.multipliers = multipliers(model, decay_shift=False)
    return model


def bayesian_segnet_paper(
    classes: int, in_channels: int = 3, encoder_weights: EncoderWeights = None, width: int = 64, dropout: float = 0.5
) -> SegmentationModel:
    """Bayesian SegNet: `segnet_paper` with dropout of single values after pool3 to pool5 and after the three coarsest decoder stages.

    Weights are interchangeable with those of `segnet_paper`. `monte_carlo` gives its mean probabilities and uncertainty; without it
    dropout is off in prediction, which is the paper's "weight averaging".

    Source: arXiv:1511.02680, sec. 3 and 4 ("central enc-dec"). Arguments and deviations as `segnet_paper`.
    """
    return segnet_paper(classes, in_channels, encoder_weights, width, dropout)


def segnet(
    classes: int,
    encoder: str = "vgg16_bn",
    encoder_weights: EncoderWeights = None,
    in_channels: int = 3,
    width: int = 64,
    dropout: float = 0.0,
) -> SegmentationModel:
    """SegNet's decoder on any VGG; labels every pixel of the image.

    Args:
        classes: K.
        encoder: vgg11, vgg13, vgg16, vgg19, or one of them with "_bn": only their poolings say where each maximum was.
        encoder_weights: None, True (torchvision's are downloaded), or a .safetensors/.pth file with torchvision's or timm's keys.
        in_channels: bands of the image.
        width: maps of the first stage; published weights need 64.
        dropout: share of values dropped after the three coarsest poolings and decoder stages; see `monte_carlo`.

    Raises:
        ValueError: for another encoder, and for weights that do not belong to it.
    """
    name, _ = split_model_name_tag(encoder)
    if name not in VGG_FAMILY:
        close = difflib.get_close_matches(encoder, VGG_FAMILY, n=1, cutoff=0.8)
        hint = f" Did you mean {close[0]!r}?" if close else ""
        raise ValueError(
            f"encoder {encoder!r} has no 2x2 max poolings to undo, which SegNet's decoder is made of.{hint} "
            f"Those that can: {', '.join(VGG_FAMILY)}. On other encoders use unet"
        )
    depth, batch_norm = VGG_FAMILY[name]
    path = VGGPath(depth, in_channels, width, batch_norm, indices=True)
    model = _mirrored(path, depth, classes, dropout)
    if encoder_weights:
        path.load_classifier(classifier_weights(encoder_weights, name), source_of(encoder_weights, name))
    # Small first logits: training starts from a cost of about log K.
    nn.init.normal_(model.decoder.classify.weight, std=0.01)  # type: ignore[union-attr, arg-type]
    return model


def _mirrored(path: VGGPath, depth: int, classes: int, dropout: float) -> SegmentationModel:
    """A VGG path and its mirror, with dropout at the places of Bayesian SegNet."""
    if not 0 <= dropout < 1:
        raise ValueError(f"dropout is {dropout}; it must be at least 0 and less than 1")
    if dropout:
        for stage in DROPPED_POOLS:
            path.pools[stage] = PoolThenDrop(path.pools[stage], dropout)
    decoder = SegNetDecoder(path.channels, CONVOLUTIONS[depth], classes, dropout)
    # The coarsest convolutions are at stride 16: 17 pixels leave them 2 per side, so that batch norm can train on a batch of one.
    return SegmentationModel(path, decoder, classes, InputGeometry(minimum=17, cell=32))
