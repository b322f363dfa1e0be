"""DeepLab v3+ in the layout of segmentation_models.pytorch, to take its checkpoints.

Source: Chen et al. 2018, arXiv:1802.02611, with separable convolutions; layer by layer as that library's `DeepLabV3Plus` computes it.
"""

import torch
from timm.models import split_model_name_tag
from torch import Tensor, nn

from perpixel.models.atrous import AtrousPyramid, normalised, separable_convolution, zoom
from perpixel.models.encoders import EncoderWeights, TimmEncoder, timm_encoder
from perpixel.models.layers import initialise
from perpixel.models.model import Features

RATES = (12, 24, 36)  # its default at output stride 8 and 16 alike
RESNETS = ("resnet18", "resnet34", "resnet50", "resnet101", "resnet152")


class SmpDecoder(nn.Module):
    """Separable pyramid, a separable 3x3 convolution, 48 maps of the map at stride 4 beside it, another one, scores.

    Maps are enlarged with corners on corners.

    Args:
        channels: of the map at stride 4 and of the coarsest one.
        classes: K.
        width: maps of pyramid and decoder.
        dropout: share of values dropped behind the pyramid while training.
        fine: index of the map at stride 4 among the encoder's.
    """

    def __init__(self, channels: tuple[int, int], classes: int, width: int = 256, dropout: float = 0.5, fine: int = 1) -> None:
        super().__init__()
        self.fine = fine
        self.mix = normalised(separable_convolution(width, width))
        self.reduce = normalised(nn.Conv2d(channels[0], 48, 1, bias=False))
        self.convolve = normalised(separable_convolution(width + 48, width))
        self.classify = nn.Conv2d(width, classes, 1)
        initialise(self)
        self.pyramid = AtrousPyramid(channels[1], RATES, width, dropout=dropout, separable=True)

    def forward(self, features: Features, size: tuple[int, int]) -> Tensor:
        fine = self.reduce(features.maps[self.fine])
        height, width = fine.shape[-2:]
        coarse = zoom(self.mix(self.pyramid(features.maps[-1])), (height, width)).to(fine.dtype)
        scores = self.classify(self.convolve(torch.cat([coarse, fine], dim=1)))
        return zoom(scores, size)


def smp_encoder(name: str, in_channels: int = 3, weights: EncoderWeights = None, output_stride: int = 16) -> TimmEncoder:
    """An encoder of timm at output stride 8 or 16, dilated as segmentation_models.pytorch does.

    In a ResNet every convolution of a stage that no longer subsamples dilates, the first too, where timm lets that one see its
    neighbours still. Others are timm's own there as well (their names begin with "tu-" there).

    Raises:
        ValueError: as `timm_encoder`; and for another output stride, or an encoder that cannot have it.
    """
    if output_stride not in (8, 16):
        raise ValueError(f"output_stride is {output_stride}; with variant 'smp' it must be 8 or 16")
    if split_model_name_tag(name)[0] in RESNETS:
        encoder = timm_encoder(name, in_channels, weights)
        for stage, rate in (("layer3", 2), ("layer4", 4)) if output_stride == 8 else (("layer4", 2),):
            _dilate(encoder.network.get_submodule(stage), rate)
        encoder.strides = [min(stride, output_stride) for stride in encoder.strides]
    else:
        encoder = timm_encoder(name, in_channels, weights, output_stride)
    if 4 not in encoder.strides or encoder.strides[-1] != output_stride:
        raise ValueError(
            f"encoder {name!r} has maps at strides {encoder.strides}; variant 'smp' needs one at 4 and the last at {output_stride}"
        )
    return encoder


def _dilate(stage: nn.Module, rate: int) -> None:
    for layer in stage.modules():
        if isinstance(layer, nn.Conv2d):
            layer.stride, layer.dilation = (1, 1), (rate, rate)
            layer.padding = (layer.kernel_size[0] // 2 * rate, layer.kernel_size[1] // 2 * rate)
