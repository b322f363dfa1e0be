"""Networks of torchvision that timm lacks, as encoders, and `any_encoder`, which makes one of these or one of timm's by its name.

Sources: GoogLeNet, Szegedy et al. 2014, arXiv:1409.4842, table 1; SqueezeNet, Iandola et al. 2016, arXiv:1602.07360, table 1.
"""

from collections.abc import Mapping

import torch
from torch import Tensor, nn
from torchvision.models.googlenet import GoogLeNet
from torchvision.models.squeezenet import SqueezeNet

from perpixel.models.encoders import DilationError, EncoderWeights, TimmEncoder, fit_bands, timm_encoder
from perpixel.models.model import Features
from perpixel.models.vgg import classifier_weights, source_of

IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # of the images that torchvision's networks saw, 0..1


class TorchvisionTrunk(nn.Module):
    """A classifier of torchvision without its head, as an `Encoder`.

    Attributes:
        name: torchvision's.
        layers: its layers by torchvision's names.
        prefix: what torchvision puts before those names.
        channels, strides: of the maps, finest first.
    """

    def __init__(self, name: str, layers: nn.ModuleDict, channels: list[int], strides: list[int], prefix: str = "") -> None:
        super().__init__()
        self.name, self.layers, self.prefix = name, layers, prefix
        self.channels, self.strides = channels, strides

    def forward(self, image: Tensor) -> Features:
        x, maps = self.as_trained(image), []
        for layer in self.layers.values():
            if isinstance(layer, nn.MaxPool2d):
                maps.append(x)
            x = layer(x)
        return Features([*maps, x])

    def as_trained(self, image: Tensor) -> Tensor:
        """The image, normalised by ImageNet's mean and deviation, as the weights know it."""
        return image

    @torch.no_grad()
    def load_classifier(self, state: Mapping[str, Tensor], source: str = "the state dict") -> None:
        """Takes the trunk of torchvision's classifier of this name; other than 3 bands as in `encoders.fit_bands`.

        Raises:
            ValueError: if it is another network's.
        """
        own = self.layers.state_dict()
        lacking = [name for name in own if f"{self.prefix}{name}" not in state]
        if lacking:
            raise ValueError(
                f"{source}: not the weights of torchvision's {self.name}: it lacks {self.prefix}{lacking[0]}; "
                f"give the file made for {self.name}"
            )
        fitted = {name: fit_bands(state[f"{self.prefix}{name}"], value, f"{source}: {self.prefix}{name}") for name, value in own.items()}
        self.layers.load_state_dict(fitted)


class GoogLeNetPath(TorchvisionTrunk):
    """Image -> five maps at strides 2 to 32: the last before each pooling, and inception 5b.

    It is torchvision's variant, so that its weights fit: with batch norm, and 3x3 where the paper has 5x5 (which is
    `fcn_googlenet_paper`). The average pooling, the classifier and the two auxiliary classifiers are left out, as in FCN
    (arXiv:1411.4038, sec. 4.1).

    Args:
        in_channels: bands of the image.
    """

    gain: Tensor
    shift: Tensor

    def __init__(self, in_channels: int = 3) -> None:
        whole = GoogLeNet(aux_logits=False, transform_input=False, init_weights=True)
        layers = nn.ModuleDict({name: part for name, part in whole.named_children() if name not in ("avgpool", "dropout", "fc")})
        if in_channels != 3:
            first = nn.Conv2d(in_channels, 64, 7, stride=2, padding=3, bias=False)
            nn.init.trunc_normal_(first.weight, std=0.01, a=-2, b=2)  # as torchvision does
            layers["conv1"].conv = first
        super().__init__("googlenet", layers, [64, 192, 480, 832, 1024], [2, 4, 8, 16, 32])
        mean, deviation = torch.tensor(IMAGENET_MEAN), torch.tensor(IMAGENET_STD)
        self.register_buffer("gain", (deviation / 0.5)[:, None, None], persistent=False)
        self.register_buffer("shift", ((mean - 0.5) / 0.5)[:, None, None], persistent=False)

    def as_trained(self, image: Tensor) -> Tensor:
        """Its weights come from a training on values -1..1; other than 3 bands get the mean of what red, green and blue get."""
        if image.shape[1] == 3:
            return image * self.gain + self.shift
        return image * self.gain.mean() + self.shift.mean()  # as their filters are the mean (`fit_bands`)


class SqueezeNetPath(TorchvisionTrunk):
    """Image -> four maps at strides 2 to 16: the last before each pooling, and fire 9; SqueezeNet 1.0 has 735,424 parameters so far.

    Args:
        in_channels: bands of the image.
        output_stride: 16, or 8: the last pooling then does not subsample, and the 3x3 convolutions behind it dilate.

    Its first convolution and its poolings are padded (by 3 and 1), which torchvision's are not: so each map covers the whole image, and
    has half the size of the one before, rounded up. Values whose filters do not reach the border are the same.
    """

    def __init__(self, in_channels: int = 3, output_stride: int = 16) -> None:
        features = SqueezeNet("1_0").features
        layers = nn.ModuleDict(dict(features.named_children()))
        first = nn.Conv2d(in_channels, 96, 7, stride=2, padding=3)
        nn.init.kaiming_uniform_(first.weight)  # as torchvision does
        nn.init.zeros_(first.bias)  # type: ignore[arg-type]
        layers["0"] = first
        poolings = [name for name, part in layers.items() if isinstance(part, nn.MaxPool2d)]
        for name in poolings:
            layers[name] = nn.MaxPool2d(3, 2, padding=1)
        if output_stride == 8:
            layers[poolings[-1]] = nn.MaxPool2d(3, 1, padding=1)
            for part in layers["12"].modules():
                if isinstance(part, nn.Conv2d) and part.kernel_size == (3, 3):
                    part.padding, part.dilation = (2, 2), (2, 2)
        super().__init__("squeezenet1_0", layers, [96, 256, 512, 512], [2, 4, 8, output_stride], prefix="features.")


TRUNKS = ("googlenet", "squeezenet1_0")


def any_encoder(
    name: str, in_channels: int = 3, weights: EncoderWeights = None, output_stride: int | None = None
) -> TimmEncoder | TorchvisionTrunk:
    """An encoder by its name: one of `TRUNKS` from torchvision, or one of timm's. Arguments and errors as `timm_encoder`.

    Weights of a trunk are torchvision's: True downloads them; a file holds its state dict, with the classifier or without.
    """
    if name not in TRUNKS:
        return timm_encoder(name, in_channels, weights, output_stride)
    if in_channels < 1:
        raise ValueError(f"in_channels is {in_channels}; an image has at least 1 band")
    own = 32 if name == "googlenet" else 16
    wanted = output_stride or own
    if wanted != own and not (name == "squeezenet1_0" and wanted == 8):
        legal = "32" if name == "googlenet" else "8 or 16"
        raise DilationError(f"encoder {name!r} gives no feature maps at output stride {wanted}; it has {legal}")
    path = GoogLeNetPath(in_channels) if name == "googlenet" else SqueezeNetPath(in_channels, wanted)
    if weights:
        path.load_classifier(classifier_weights(weights, name), source_of(weights, name))
    return path
