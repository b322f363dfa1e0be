"""The convolutional part of VGG-11 to VGG-19: trunk of FCN, SegNet, DeepLab v1 and v2; and torchvision's weights for it."""

from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor, nn
from torchvision.models import get_model_weights

from perpixel.models.encoders import EncoderWeights, fit_bands, read_weights
from perpixel.models.layers import initialise
from perpixel.models.model import Features

# 3x3 convolutions per stage. Source: Simonyan & Zisserman 2014, arXiv:1409.1556, table 1, columns A, B, D and E.
CONVOLUTIONS: dict[int, tuple[int, ...]] = {11: (1, 1, 2, 2, 2), 13: (2, 2, 2, 2, 2), 16: (2, 2, 3, 3, 3), 19: (2, 2, 4, 4, 4)}


class VGGPath(nn.Module):
    """Five stages of 3x3 convolutions with ReLU, a max pooling after each; an `Encoder` whose maps are the five pooled ones.

    Args:
        depth: 11, 13, 16 or 19.
        in_channels: bands of the image.
        width: channels of the first stage, doubled up to 8 times that; 64 as published.
        batch_norm: normalise between convolution and ReLU; the convolutions keep their bias, as in torchvision and SegNet.
        first_padding: zeros around the image at the first convolution; 100 in FCN.
        pool: side of the pooling windows; 3 in DeepLab.
        pool_strides: of each pooling; DeepLab's last two are 1.
        dilations: of the convolutions of each stage.
        indices: give the positions of the maxima, for SegNet.

    Sizes are rounded up at each pooling, as Caffe does.
    """

    def __init__(
        self,
        depth: int = 16,
        in_channels: int = 3,
        width: int = 64,
        batch_norm: bool = False,
        first_padding: int = 1,
        pool: int = 2,
        pool_strides: Sequence[int] = (2, 2, 2, 2, 2),
        dilations: Sequence[int] = (1, 1, 1, 1, 1),
        indices: bool = False,
    ) -> None:
        super().__init__()
        if depth not in CONVOLUTIONS:
            raise ValueError(f"depth is {depth}; VGG has {', '.join(map(str, CONVOLUTIONS))} layers with weights")
        if in_channels < 1 or width < 1:
            raise ValueError(f"in_channels is {in_channels} and width {width}; both must be at least 1")
        self.channels = [width * min(8, 1 << stage) for stage in range(5)]
        self.strides: list[int] = []
        self.depth, self.batch_norm, self.indices = depth, batch_norm, indices
        self.stages, self.pools = nn.ModuleList(), nn.ModuleList()
        before, stride = in_channels, 1
        for stage, (count, after) in enumerate(zip(CONVOLUTIONS[depth], self.channels, strict=True)):
            layers: list[nn.Module] = []
            for number in range(count):
                dilation = dilations[stage]
                padding = first_padding if stage == number == 0 else dilation
                layers.append(nn.Conv2d(before, after, 3, padding=padding, dilation=dilation))
                if batch_norm:
                    layers.append(nn.BatchNorm2d(after))
                layers.append(nn.ReLU(inplace=True))
                before = after
            self.stages.append(nn.Sequential(*layers))
            self.pools.append(nn.MaxPool2d(pool, pool_strides[stage], (pool - 1) // 2, ceil_mode=True, return_indices=indices))
            stride *= pool_strides[stage]
            self.strides.append(stride)
        initialise(self)

    def forward(self, image: Tensor) -> Features:
        x, maps, indices = image, [], []
        for stage, pool in zip(self.stages, self.pools, strict=True):
            x = pool(stage(x))
            if self.indices:
                x, index = x
                indices.append(index)
            maps.append(x)
        return Features(maps, indices if self.indices else None)

    @torch.no_grad()
    def load_classifier(self, state: Mapping[str, Tensor], source: str = "the state dict") -> None:
        """Takes the convolutions of one of torchvision's VGG classifiers; its fully connected layers are not looked at.

        Args:
            state: `state_dict()` of torchvision's `vgg11` .. `vgg19_bn`. Where the image has other than 3 bands, the first filters
                are averaged over theirs and rescaled (`encoders.fit_bands`).
            source: where it came from, for messages.

        Raises:
            ValueError: if it is another network's, or this path is not of the published width.
        """
        theirs = self._torchvision_names()
        name = f"vgg{self.depth}{'_bn' if self.batch_norm else ''}"
        features = {key for key in state if key.startswith("features.")}
        wanted = {f"features.{number}.{part}" for number, layer in theirs.items() for part in layer.state_dict()}
        if {key for key in wanted ^ features if not key.endswith("num_batches_tracked")}:
            raise ValueError(f"{source}: not the weights of torchvision's {name} (its `features` differ); give the file made for {name}")
        for number, layer in theirs.items():
            for part, own in layer.state_dict().items():
                key = f"features.{number}.{part}"
                if key in state:
                    own.copy_(
                        fit_bands(state[key], own, f"{source}: {key}")
                        if number == 0 and part == "weight"
                        else _same(state, key, own, source)
                    )

    def _torchvision_names(self) -> dict[int, nn.Module]:
        """The layers with weights, by their number in torchvision's `features`; poolings count there too."""
        numbered: dict[int, nn.Module] = {}
        number = 0
        for stage in self.stages:
            for layer in stage.children():
                if not isinstance(layer, nn.ReLU):
                    numbered[number] = layer
                number += 1
            number += 1
        return numbered


def fully_connected(state: Mapping[str, Tensor], side: int = 7, source: str = "the state dict") -> dict[str, Tensor]:
    """fc6 and fc7 of a torchvision VGG (side 7) or AlexNet (side 6) as convolutions that compute the same.

    Args:
        state: the classifier's `state_dict()`.
        side: of the map that fc6 sees, in pixels.

    Returns:
        "fc6.weight" (4096, C, side, side), "fc6.bias", "fc7.weight" (4096, 4096, 1, 1), "fc7.bias".

    Raises:
        ValueError: if the layers are missing or of another size.

    Source: Long et al. 2015, arXiv:1411.4038, sec. 3.1.
    """
    first, second = ("classifier.0", "classifier.3") if side == 7 else ("classifier.1", "classifier.4")  # AlexNet's begins with dropout
    if f"{first}.weight" not in state or f"{second}.weight" not in state:
        raise ValueError(f"{source}: holds no fully connected layers {first} and {second}; give the weights of the whole classifier")
    fc6, fc7 = state[f"{first}.weight"], state[f"{second}.weight"]
    if fc6.shape[1] % side**2:
        raise ValueError(
            f"{source}: {first} has {fc6.shape[1]} inputs, no map of {side}x{side} pixels; give a VGG or AlexNet of 224x224 pixels"
        )
    return {
        "fc6.weight": fc6.reshape(len(fc6), -1, side, side),
        "fc6.bias": state[f"{first}.bias"],
        "fc7.weight": fc7[..., None, None],
        "fc7.bias": state[f"{second}.bias"],
    }


def classifier_weights(weights: EncoderWeights, name: str) -> dict[str, Tensor]:
    """The state dict of a torchvision classifier; True downloads `name`, a path is read.

    Raises:
        ValueError: if the file cannot be read or there is no network; the message says which file to fetch and where to name it.
    """
    if not isinstance(weights, bool) and weights is not None:
        return read_weights(Path(weights))
    published = get_model_weights(name).DEFAULT
    try:
        return dict(published.get_state_dict(progress=False, check_hash=True))
    except Exception as error:  # whatever the client raises: the person needs the way around, not its class
        raise ValueError(
            f"the weights of {name!r} could not be downloaded ({type(error).__name__}: {str(error)[:200]}). Fetch {published.url} where "
            "there is a network and give the file's path as encoder_weights, or train without: encoder_weights=None"
        ) from error


def _same(state: Mapping[str, Tensor], key: str, own: Tensor, source: str) -> Tensor:
    if state[key].shape != own.shape:
        raise ValueError(
            f"{source}: {key} has shape {tuple(state[key].shape)}, but the path needs {tuple(own.shape)}; published weights need width=64"
        )
    return state[key]
