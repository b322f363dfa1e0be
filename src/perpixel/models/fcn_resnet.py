"""FCN on a dilated ResNet, in the layout of torchvision's fcn_resnet50 and fcn_resnet101.

Sources: Long, Shelhamer & Darrell 2015, arXiv:1411.4038; dilation in place of stride as in Chen et al. 2017, arXiv:1706.05587;
the auxiliary head as in Zhao et al. 2016, arXiv:1612.01105, sec. 3.4.
"""

from torch import Tensor, nn

from perpixel.models.encoders import EncoderWeights, timm_encoder
from perpixel.models.layers import initialise, resize_logits
from perpixel.models.model import Features, InputGeometry, SegmentationModel


class FCNHead(nn.Sequential):
    """A 3x3 convolution to a quarter of the maps, batch norm, ReLU, dropout, scores; (N, C, H, W) -> (N, K, H, W)."""

    def __init__(self, channels: int, classes: int, dropout: float = 0.1) -> None:
        hidden = channels // 4
        super().__init__(
            nn.Conv2d(channels, hidden, 3, padding=1, bias=False),
            nn.BatchNorm2d(hidden),
            nn.ReLU(inplace=True),
            nn.Dropout(dropout),
            nn.Conv2d(hidden, classes, 1),
        )
        initialise(self)


class FCNResNetDecoder(nn.Module):
    """One head on the coarsest map, resized to the image; a `SupervisedDecoder` with a second head on the map before it.

    The second head is for training only: it counts half (torchvision's references/segmentation).
    """

    loss_weights = (1.0, 0.5)

    def __init__(self, channels: list[int], classes: int, dropout: float = 0.1) -> None:
        super().__init__()
        self.classifier = FCNHead(channels[-1], classes, dropout)
        self.aux_classifier = FCNHead(channels[-2], classes, dropout)

    def forward(self, features: Features, size: tuple[int, int]) -> Tensor:
        return resize_logits(self.classifier(features.maps[-1]), size)

    def supervised(self, features: Features, size: tuple[int, int]) -> list[Tensor]:
        return [self(features, size), resize_logits(self.aux_classifier(features.maps[-2]), size)]


def fcn_resnet(
    classes: int,
    depth: int = 50,
    encoder_weights: EncoderWeights = None,
    in_channels: int = 3,
    output_stride: int = 8,
    dropout: float = 0.1,
) -> SegmentationModel:
    """torchvision's fcn_resnet50 or fcn_resnet101 with auxiliary head: 35,322,218 or 54,314,346 parameters for 21 classes.

    Args:
        classes: K.
        depth: 18, 34, 50, 101 or 152; torchvision publishes 50 and 101.
        encoder_weights: None, True (download through timm), or a .safetensors/.pth file with timm's keys of the ResNet. A whole
            model of torchvision is read by `bundle.import_weights`.
        in_channels: bands of the image.
        output_stride: 8 as in torchvision; 16 or 32 dilate less.
        dropout: share of values dropped before the scores while training.

    Raises:
        ValueError: for another depth or output stride, and for weights that do not belong to the encoder.
    """
    if depth not in (18, 34, 50, 101, 152):
        raise ValueError(f"depth is {depth}; a ResNet has 18, 34, 50, 101 or 152 layers")
    if output_stride not in (8, 16, 32):
        raise ValueError(f"output_stride is {output_stride}; it must be 8, 16 or 32")
    path = timm_encoder(f"resnet{depth}", in_channels, encoder_weights, None if output_stride == 32 else output_stride)
    decoder = FCNResNetDecoder(path.channels, classes, dropout)
    # Two pixels per side at the coarsest map, so that batch norm can train on a batch of one.
    return SegmentationModel(path, decoder, classes, InputGeometry(minimum=2 * max(path.strides), cell=max(path.strides)))
