"""The convolutional part of VGG-11 to VGG-19: trunk of FCN, SegNet, DeepLab v1 and v2; and torchvision's weights for it."""

import re
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor, nn
from torchvision.models import get_model_weights

from perpixel.models.encoders import NO_WEIGHTS, EncoderWeights, fit_bands, read_weights
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
    def load_classifier(self, state: Mapping[str, Tensor], source: str = "the state dict", without_norms: bool = False) -> None:
        """Takes the convolutions (and norms) of a published VGG classifier; its fully connected layers are not looked at.

        Args:
            state: of `vgg11` .. `vgg19_bn` in torchvision's or timm's keys, with the classifier or without. Where the image has other
                than 3 bands, the first filters are averaged over theirs and rescaled (`encoders.fit_bands`).
            source: where it came from, for messages.
            without_norms: a path with norms also takes weights without; its norms then stay as they are.

        Raises:
            ValueError: if it is another network's, or this path is not of the published width; then nothing is changed.
        """
        given: dict[int, dict[str, Tensor]] = {}  # by number in `features`, where poolings and ReLUs count too
        for key, value in state.items():
            if match := re.fullmatch(r"(?:model\.)?features[._](\d+)[._](\w+)", key):
                given.setdefault(int(match[1]), {})[match[2]] = value
        theirs = [given[number] for number in sorted(given)]
        normalised = any("running_mean" in layer for layer in theirs)
        kinds = (nn.Conv2d,) if without_norms and not normalised else (nn.Conv2d, nn.BatchNorm2d)
        own = [layer for layer in self.modules() if isinstance(layer, kinds)]
        if len(own) != len(theirs) or (normalised and not self.batch_norm):
            suffixes = ["", "_bn"] if without_norms and self.batch_norm else ["_bn"] if self.batch_norm else [""]
            wanted = " or ".join(f"'vgg{self.depth}{suffix}'" for suffix in suffixes)
            raise ValueError(
                f"{source}: not the weights of {wanted}: {len(theirs)} layers in its `features`, not {len(own)}. "
                f"Give the file made for {wanted}"
            )
        for layer, values in zip(own, theirs, strict=True):
            for part, target in layer.state_dict().items():
                if part in values:
                    values[part] = _fitted(values[part], target, f"{source}: {part} of a layer in `features`", first=layer is own[0])
                elif part != "num_batches_tracked":  # a counter of batches, which old files lack
                    raise ValueError(f"{source}: a layer in its `features` lacks {part}; give the whole file")
        for layer, values in zip(own, theirs, strict=True):
            for part, target in layer.state_dict().items():
                if part in values:
                    target.copy_(values[part])


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
        raise ValueError(f"{source}: {first} has {fc6.shape[1]} inputs, no map of {side}x{side} pixels; give a classifier of 224x224")
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
            f"there is a network and give the file's path as encoder_weights, or train without: {NO_WEIGHTS}"
        ) from error


def source_of(weights: EncoderWeights, name: str) -> str:
    """What `classifier_weights` reads, for messages."""
    return f"torchvision's {name}" if weights is True else str(weights)


def _fitted(value: Tensor, target: Tensor, what: str, first: bool) -> Tensor:
    if first and value.ndim == 4 and value.shape[:1] + value.shape[2:] == target.shape[:1] + target.shape[2:]:
        return fit_bands(value, target, what)
    if value.shape != target.shape:
        raise ValueError(
            f"{what} has shape {tuple(value.shape)}, but the path needs {tuple(target.shape)}; published weights need width=64"
        )
    return value
