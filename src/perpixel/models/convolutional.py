"""From classifier to dense prediction: fully connected layers are convolutions that see the whole map.

Source: Long, Shelhamer & Darrell 2015, arXiv:1411.4038, sec. 3.1 and Fig. 2.
"""

import copy

import torch
from torch import Tensor, nn


class FullyConvolutional(nn.Module):
    """A classifier whose fully connected layers have become convolutions; made by `convolutionize`.

    Attributes:
        features: the classifier's convolutions and poolings.
        classifier: the first fully connected layer as a convolution of the size of the map at the training size, the others as 1x1.
        side: (height, width) of that map; (1, 1) where the classifier was made of 1x1 convolutions already.
    """

    def __init__(self, features: nn.Module, classifier: nn.Sequential, side: tuple[int, int]) -> None:
        super().__init__()
        self.features, self.classifier, self.side = features, classifier, side

    def forward(self, image: Tensor) -> Tensor:
        """(N, 3, H, W) as the classifier was trained -> (N, K, h, w) scores; 1x1 at 224x224, one more per 32 pixels of a side.

        SqueezeNet: 13x13 at 224x224, one more per 16 pixels. The softmax of channel k, upsampled to the image, is the heat map of class k.
        """
        x: Tensor = self.features(image)
        height, width = self.side
        if x.shape[-2] < height or x.shape[-1] < width:
            raise ValueError(
                f"image is {image.shape[-2]}x{image.shape[-1]} pixels (height x width), which leaves a map of {x.shape[-2]}x{x.shape[-1]}; "
                f"the classifier sees {height}x{width} at once. Give an image of at least its training size (224x224)"
            )
        scores: Tensor = self.classifier(x)
        return scores


def convolutionize(classifier: nn.Module, dropout: bool = True) -> FullyConvolutional:
    """Turns a classifier with fully connected layers into a fully convolutional one that shares no memory with it.

    At the training size (224x224 for torchvision's) its 1x1 output equals the classifier's scores: there the adaptive average pooling
    between the two parts is the identity, and it is left out. Larger images give a map of scores, each for a 224x224 window at a stride
    of 32 pixels, but with the neighbourhood in place of padding: not quite what the classifier says of a cut-out window.

    A classifier that scores every place by 1x1 convolutions and then averages (SqueezeNet) loses the average: the mean of its map of
    scores equals the classifier's scores, at any size.

    Args:
        classifier: torchvision's `alexnet`, `vgg11` .. `vgg19_bn` or `squeezenet1_0` and `1_1`; or any module with `features`, an `avgpool`
            of fixed size, and `classifier`, a sequence of linear layers, activations and dropout; or with `features` and `classifier`, a
            sequence of 1x1 convolutions, activations and dropout that ends with a global average. Its mode (train or eval) is kept.
        dropout: keep its dropout layers, which act while training.

    Raises:
        ValueError: if it has no such parts, for instance because it averages the whole map before one linear layer (ResNet).

    Source: Long, Shelhamer & Darrell 2015, arXiv:1411.4038, sec. 3.1.
    """
    features, pool, layers = (getattr(classifier, name, None) for name in ("features", "avgpool", "classifier"))
    name = type(classifier).__name__
    if isinstance(features, nn.Module) and isinstance(layers, nn.Sequential):
        if pool is None and len(layers) and _averages_all(layers[-1]):
            side, layers = (1, 1), layers[:-1]
            scored = any(isinstance(layer, nn.Conv2d) for layer in layers)
        else:
            side, scored = _side(pool) or (0, 0), any(isinstance(layer, nn.Linear) for layer in layers)
        if scored and side != (0, 0):
            head = nn.Sequential(*_as_convolutions(layers, side, dropout, name))
            return FullyConvolutional(copy.deepcopy(features), head, side).train(classifier.training)
    raise ValueError(
        f"{name} can't be turned: it needs `features`, an `avgpool` to a fixed size above 1x1, and `classifier`, a sequence with "
        "linear layers. Give torchvision's alexnet or vgg11 to vgg19_bn, or a squeezenet, whose scores are averaged last"
    )


def _as_convolutions(layers: nn.Sequential, side: tuple[int, int], dropout: bool, name: str) -> list[nn.Module]:
    turned: list[nn.Module] = []
    for layer in layers:
        if isinstance(layer, nn.Linear):
            turned.append(_as_convolution(layer, side))
            side = (1, 1)
        elif isinstance(layer, nn.Dropout):
            turned += [copy.deepcopy(layer)] if dropout else []
        elif isinstance(layer, nn.ReLU) or (isinstance(layer, nn.Conv2d) and layer.kernel_size == side == (1, 1)):
            turned.append(copy.deepcopy(layer))
        else:
            raise ValueError(f"{name} can't be turned: its classifier holds {layer}; known are linear, 1x1 convolution, ReLU and dropout")
    return turned


def _averages_all(layer: nn.Module) -> bool:
    return isinstance(layer, nn.AdaptiveAvgPool2d) and layer.output_size in (1, (1, 1))


def _side(pool: object) -> tuple[int, int] | None:
    """(height, width) that an adaptive pooling fixes; None where it fixes nothing or a mere pixel."""
    size = getattr(pool, "output_size", None) if isinstance(pool, nn.AdaptiveAvgPool2d) else None
    both = (size, size) if isinstance(size, int) else size
    if both is None or None in both or max(both) < 2:
        return None
    return int(both[0]), int(both[1])


@torch.no_grad()
def _as_convolution(layer: nn.Linear, side: tuple[int, int]) -> nn.Conv2d:
    """A linear layer on a flattened (C, *side) map as a convolution."""
    channels, rest = divmod(layer.in_features, side[0] * side[1])
    if rest:
        raise ValueError(f"a linear layer of {layer.in_features} inputs does not see a map of {side[0]}x{side[1]} pixels")
    weight = layer.weight
    made = nn.Conv2d(channels, layer.out_features, side, bias=layer.bias is not None, device=weight.device, dtype=weight.dtype)
    made.weight.copy_(weight.view(layer.out_features, channels, *side))
    if made.bias is not None:
        made.bias.copy_(layer.bias)
    return made
