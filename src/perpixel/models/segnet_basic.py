"""SegNet-Basic, its seven decoder variants, and its Bayesian form.

Sources: Badrinarayanan, Kendall & Cipolla 2017, arXiv:1511.00561, sec. 3.1, Fig. 3 and Table 1; Kendall et al. 2015, arXiv:1511.02680.
What the papers leave open follows the authors' published layer files.
"""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from perpixel.models.layers import initialise, resize_logits
from perpixel.models.model import Decoder, Features, InputGeometry, SegmentationModel
from perpixel.models.segnet import multipliers, pool_indices, start_norms
from perpixel.models.unpooling import PoolThenDrop, max_unpool

STAGES = 4


@dataclass(frozen=True)
class Variant:
    """A decoder of Table 1: how it upsamples, and what it takes of the encoder."""

    upsampling: str  # "bilinear", "indices" or "deconvolution"
    addition: bool = False  # encoder maps are added
    single_channel: bool = False  # one filter per map
    reduction: bool = False  # encoder maps are reduced to K first


# Table 1, by the paper's names without "SegNet-Basic-".
VARIANTS: dict[str, Variant] = {
    "bilinear": Variant("bilinear"),
    "basic": Variant("indices"),
    "encoder_addition": Variant("indices", addition=True),
    "single_channel": Variant("indices", single_channel=True),
    "fcn": Variant("deconvolution", addition=True, reduction=True),
    "fcn_no_addition": Variant("deconvolution", reduction=True),
    "fcn_no_reduction": Variant("deconvolution", addition=True),
    "fcn_no_addition_no_reduction": Variant("deconvolution"),
}


class SegNetBasicPath(nn.Module):
    """Four stages of a 7x7 convolution with batch norm, ReLU and 2x2 max pooling, all of the same width.

    Args:
        in_channels: bands of the image.
        width: maps of every convolution.
        dropout: share of values dropped after the last two poolings.
        unpooled: its maps are the four before pooling and the last pooled one, at strides 1 to 16; otherwise the four pooled ones.
    """

    def __init__(self, in_channels: int, width: int = 64, dropout: float = 0.0, unpooled: bool = False) -> None:
        super().__init__()
        if in_channels < 1 or width < 1:
            raise ValueError(f"in_channels is {in_channels} and width {width}; both must be at least 1")
        self.unpooled = unpooled
        self.strides = [1, 2, 4, 8, 16] if unpooled else [2, 4, 8, 16]
        self.channels = [width] * len(self.strides)
        # Krizhevsky's normalisation across bands, which in the authors' files stands for the paper's local contrast normalisation.
        self.normalise = nn.LocalResponseNorm(5, alpha=1e-4, beta=0.75)
        self.stages, self.pools = nn.ModuleList(), nn.ModuleList()
        for stage in range(STAGES):
            convolution = nn.Conv2d(width if stage else in_channels, width, 7, padding=3)
            self.stages.append(nn.Sequential(convolution, nn.BatchNorm2d(width), nn.ReLU(inplace=True)))
            pool: nn.Module = nn.MaxPool2d(2, ceil_mode=True, return_indices=True)
            self.pools.append(PoolThenDrop(pool, dropout) if dropout and stage >= STAGES - 2 else pool)

    def forward(self, image: Tensor) -> Features:
        x, maps, indices = self.normalise(image), [], []
        for stage, pool in zip(self.stages, self.pools, strict=True):
            wide = stage(x)
            x, index = pool(wide)
            maps.append(wide if self.unpooled else x)
            indices.append(index)
        return Features([*maps, x] if self.unpooled else maps, indices)


class UnpoolingDecoder(nn.Module):
    """Unpool, one 7x7 convolution, batch norm, no ReLU; four times, then a 1x1 classifier.

    Args:
        addition: add the encoder's map of the same stage, as it was before pooling, to each decoder map.
        single_channel: each map is convolved with one filter of its own.
        dropout: share of values dropped after the two coarsest stages.
    """

    def __init__(self, width: int, classes: int, addition: bool, single_channel: bool, dropout: float) -> None:
        super().__init__()
        self.addition = addition
        groups = width if single_channel else 1
        self.stages, self.drops = nn.ModuleList(), nn.ModuleList()
        for stage in reversed(range(STAGES)):
            self.stages.append(nn.Sequential(nn.Conv2d(width, width, 7, padding=3, groups=groups), nn.BatchNorm2d(width)))
            self.drops.append(nn.Dropout(dropout if stage >= STAGES - 2 else 0.0))
        self.classify = nn.Conv2d(width, classes, 1)

    def forward(self, features: Features, size: tuple[int, int]) -> Tensor:
        *finer, x = features.maps
        planes = [size, *((m.shape[-2], m.shape[-1]) for m in (finer[1:] if self.addition else finer))]
        for number, index in enumerate(reversed(pool_indices(features))):
            x = self.stages[number](max_unpool(x, index, planes[-1 - number]))
            if self.addition:
                x = x + finer[-1 - number]
            x = self.drops[number](x)
        logits: Tensor = self.classify(x)
        return logits


class DeconvolutionDecoder(nn.Module):
    """FCN's way: four learned 8x8 deconvolutions of stride 2 that start as bilinear interpolation; pooled encoder maps may be added.

    Args:
        addition: add the pooled map of the encoder after each of the first three.
        reduction: 1x1 convolutions reduce encoder maps to K before everything else; otherwise one classifies at the end.
    """

    def __init__(self, width: int, classes: int, addition: bool, reduction: bool) -> None:
        super().__init__()
        self.addition = addition
        carried = classes if reduction else width
        used = STAGES if addition else 1
        self.reduce = nn.ModuleList(nn.Conv2d(width, classes, 1) if reduction else nn.Identity() for _ in range(used))
        self.up = nn.ModuleList(nn.ConvTranspose2d(carried, carried, 8, stride=2, padding=3, bias=False) for _ in range(STAGES))
        self.classify: nn.Module = nn.Identity() if reduction else nn.Conv2d(width, classes, 1)

    def forward(self, features: Features, size: tuple[int, int]) -> Tensor:
        maps = list(reversed(features.maps))
        x = self.reduce[0](maps[0])
        for number, up in enumerate(self.up):
            height, width = size if number == STAGES - 1 else maps[number + 1].shape[-2:]
            x = up(x)[..., :height, :width]  # poolings round up: an odd side comes back one pixel too long
            if self.addition and number < STAGES - 1:
                x = x + self.reduce[number + 1](maps[number + 1])
        logits: Tensor = self.classify(x)
        return logits


class BilinearDecoder(nn.Module):
    """A 1x1 classifier on the coarsest maps, and fixed bilinear interpolation."""

    def __init__(self, width: int, classes: int) -> None:
        super().__init__()
        self.classify = nn.Conv2d(width, classes, 1)

    def forward(self, features: Features, size: tuple[int, int]) -> Tensor:
        return resize_logits(self.classify(features.maps[-1]), size)


@torch.no_grad()
def start_bilinear(layer: nn.ConvTranspose2d) -> None:
    """Bilinear interpolation by the layer's stride, map by map: the tent of 2 * stride pixels in the middle of the filter, 0 around it."""
    side, stride = layer.kernel_size[0], layer.stride[0]
    distance = (torch.arange(side, dtype=layer.weight.dtype, device=layer.weight.device) - (side - 1) / 2).abs()
    tent = (1 - distance / stride).clamp_min(0)
    layer.weight.zero_()
    for channel in range(min(layer.weight.shape[:2])):
        layer.weight[channel, channel] = tent[:, None] * tent


def segnet_basic_paper(
    classes: int, in_channels: int = 3, width: int = 64, variant: str = "basic", dropout: float = 0.0
) -> SegmentationModel:
    """SegNet-Basic as published, or one of the seven other decoders of Table 1 on its encoder; 1,416,587 parameters for 11 classes.

    Args:
        classes: K.
        in_channels: bands of the image.
        width: maps of every convolution; 64 in the paper.
        variant: "basic"; "bilinear": fixed interpolation, no decoder; "encoder_addition": encoder maps are added to the decoder's;
            "single_channel": one filter per map; "fcn": learned deconvolution of K maps, reduced pooled encoder maps added;
            "fcn_no_addition"; "fcn_no_reduction": deconvolution of all maps, pooled encoder maps added; "fcn_no_addition_no_reduction".
        dropout: of the Bayesian form, see `bayesian_segnet_basic_paper`; for "basic" and its addition and single-channel variants.

    Any image size: poolings round up and unpooling restores the exact size.

    Deviations: convolutions have biases, as in the authors' files (the paper says they have none), and LRN stands for the paper's local
    contrast normalisation, as there. eps of batch norm is 1e-5 instead of 1e-9, which would blow up maps that are 0 everywhere. Images
    are RGB; the recipe leaves their values at 0 to 255, for which LRN's constants are made (to normalised ones it does nothing). Left
    open and chosen here: the maps that "encoder_addition" adds are those before pooling, the only ones of the decoder maps' size in
    every stage; deconvolutions have no bias and start as bilinear interpolation by 2 in the middle of the 8x8 filter; "bilinear"
    classifies before it interpolates.

    Raises:
        ValueError: for an unknown variant, and for dropout in a variant that has no place for it.
    """
    if variant not in VARIANTS:
        raise ValueError(f"unknown variant {variant!r} of segnet_basic_paper. Known: {', '.join(VARIANTS)}")
    if not 0 <= dropout < 1:
        raise ValueError(f"dropout is {dropout}; it must be at least 0 and less than 1")
    kind = VARIANTS[variant]
    if dropout and kind.upsampling != "indices":
        with_place = ", ".join(name for name, other in VARIANTS.items() if other.upsampling == "indices")
        raise ValueError(f"variant {variant!r} has no dropout in the paper; leave it out, or choose one of {with_place}")
    path = SegNetBasicPath(in_channels, width, dropout, unpooled=kind.upsampling == "indices" and kind.addition)
    decoder: Decoder
    if kind.upsampling == "indices":
        decoder = UnpoolingDecoder(width, classes, kind.addition, kind.single_channel, dropout)
    elif kind.upsampling == "deconvolution":
        decoder = DeconvolutionDecoder(width, classes, kind.addition, kind.reduction)
    else:
        decoder = BilinearDecoder(width, classes)
    # The coarsest convolutions are at stride 8: 9 pixels leave them 2 per side, so that batch norm can train on a batch of one.
    model = SegmentationModel(path, decoder, classes, InputGeometry(minimum=9, cell=16))
    initialise(model)
    start_norms(model)
    for layer in model.modules():
        if isinstance(layer, nn.ConvTranspose2d):
            start_bilinear(layer)
    model.multipliers = multipliers(model, decay_shift=True)
    return model


def bayesian_segnet_basic_paper(classes: int, in_channels: int = 3, width: int = 64, dropout: float = 0.5) -> SegmentationModel:
    """Bayesian SegNet-Basic: dropout of single values after pool3, pool4 and the two coarsest decoder stages ("central enc-dec").

    Weights are interchangeable with those of `segnet_basic_paper`; see `bayesian_segnet_paper` and `monte_carlo`.

    Source: arXiv:1511.02680, sec. 4, Table 1. Arguments and deviations as `segnet_basic_paper`.
    """
    return segnet_basic_paper(classes, in_channels, width, "basic", dropout)
