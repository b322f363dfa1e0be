"""Whole models of other libraries under our names, by our decoder: torchvision's FCN and DeepLab v3, smp's U-Net and DeepLab v3+."""

import re
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from perpixel.models.deeplab_v3 import TorchvisionDecoder
from perpixel.models.deeplab_v3_smp import SmpDecoder
from perpixel.models.fcn_resnet import FCNResNetDecoder
from perpixel.models.unet import UNetDecoder


@dataclass(frozen=True)
class KeyMap:
    """How a library names what one of our decoders, and the encoder before it, are made of.

    Attributes:
        pairs: regular expression for the beginning of their keys, ours; the first that fits counts.
        optional: beginning of our keys of a part that their checkpoints may lack as a whole.
        image_pooling_last: our key of the 1x1 convolution that mixes the pyramid: its first maps are the image pooling's here, which are
            the last there, so that its weights are reordered.
    """

    pairs: tuple[tuple[str, str], ...]
    optional: str | None = None
    image_pooling_last: str | None = None

    def name(self, key: str) -> str | None:
        """Their key in our names; None where no beginning fits."""
        for theirs, ours in self.pairs:
            renamed, fits = re.subn(f"^{theirs}", ours, key)
            if fits:
                return renamed
        return None

    def rename(self, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Their weights under our names; keys without a place are left out."""
        renamed = {new: value for key, value in state.items() if (new := self.name(key)) is not None}
        if self.image_pooling_last in renamed:
            *others, context = renamed[self.image_pooling_last].chunk(5, dim=1)
            renamed[self.image_pooling_last] = torch.cat([context, *others], dim=1)
        return renamed


_MIX = "decoder.pyramid.project.0.weight"

TORCHVISION: dict[type[nn.Module], KeyMap] = {
    FCNResNetDecoder: KeyMap(
        (
            (r"backbone\.", "encoder.network."),
            (r"classifier\.", "decoder.classifier."),
            (r"aux_classifier\.", "decoder.aux_classifier."),
        ),
        optional="decoder.aux_classifier.",
    ),
    # Its pyramid is classifier.0: convs.0 to convs.3 are 1x1 and rates, convs.4 the image pooling.
    TorchvisionDecoder: KeyMap(
        (
            (r"backbone\.", "encoder.network."),
            (r"classifier\.0\.convs\.4\.1\.", "decoder.pyramid.context.0."),
            (r"classifier\.0\.convs\.4\.2\.", "decoder.pyramid.context.1."),
            (r"classifier\.0\.convs\.(\d)\.", r"decoder.pyramid.branches.\1."),
            (r"classifier\.0\.project\.", "decoder.pyramid.project."),
            (r"classifier\.1\.", "decoder.convolve.0."),
            (r"classifier\.2\.", "decoder.convolve.1."),
            (r"classifier\.4\.", "decoder.classify."),
            (r"aux_classifier\.", "decoder.auxiliary."),
        ),
        optional="decoder.auxiliary.",
        image_pooling_last=_MIX,
    ),
}

# Encoders named "tu-..." there are timm's, as `encoder.model`; of the others, ResNets have the names of timm and torchvision.
_SMP_ENCODER = ((r"encoder\.model\.", "encoder.network."), (r"encoder\.", "encoder.network."))

SMP: dict[type[nn.Module], KeyMap] = {
    UNetDecoder: KeyMap(
        (
            *_SMP_ENCODER,
            (r"decoder\.blocks\.(\d+)\.conv1\.0\.", r"decoder.stages.\1.convolve.0."),
            (r"decoder\.blocks\.(\d+)\.conv1\.1\.", r"decoder.stages.\1.convolve.1."),
            (r"decoder\.blocks\.(\d+)\.conv2\.0\.", r"decoder.stages.\1.convolve.3."),
            (r"decoder\.blocks\.(\d+)\.conv2\.1\.", r"decoder.stages.\1.convolve.4."),
            (r"segmentation_head\.0\.", "decoder.classify."),
        )
    ),
    SmpDecoder: KeyMap(
        (
            *_SMP_ENCODER,
            (r"decoder\.aspp\.0\.convs\.4\.1\.", "decoder.pyramid.context.0."),
            (r"decoder\.aspp\.0\.convs\.4\.2\.", "decoder.pyramid.context.1."),
            (r"decoder\.aspp\.0\.convs\.(\d)\.", r"decoder.pyramid.branches.\1."),
            (r"decoder\.aspp\.0\.project\.", "decoder.pyramid.project."),
            (r"decoder\.aspp\.1\.", "decoder.mix.0."),
            (r"decoder\.aspp\.2\.", "decoder.mix.1."),
            (r"decoder\.block1\.", "decoder.reduce."),
            (r"decoder\.block2\.", "decoder.convolve."),
            (r"segmentation_head\.0\.", "decoder.classify."),
        ),
        image_pooling_last=_MIX,
    ),
}
