"""Encoders: any timm network, and the contracting path of U-Net."""

import difflib
import logging
import pickle
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import timm
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from perpixel.models.depthwise import with_safe_gradients
from perpixel.models.layers import double_convolution
from perpixel.models.model import Features
from perpixel.weight_files import is_pickled, no_weights

EncoderWeights = None | bool | str | Path
NO_WEIGHTS = "encoder_weights=None (in a command --set model.encoder_weights=null)"

# Transformers whose position tables are tied to one image size unless asked otherwise: timm's argument, by family.
_ANY_SIZE: dict[str, dict[str, bool]] = {"swin": {"strict_img_size": False}, "vit_": {"dynamic_img_size": True}}

# What PyTorch says where a table or a window does not fit a map, of networks that do not look at the size themselves.
_MISFIT = re.compile(r"must match the size|is invalid for input of size|Kernel size can't")


class UNetPath(nn.Module):
    """U-Net's contracting path: five levels of two 3x3 convolutions, 2x2 max pooling between them, channels doubling.

    Args:
        in_channels: bands of the image.
        width: channels of the first level.
        levels: their number.
        padding: 0 as published, 1 to keep the size of a level.
        batch_norm: not in the paper.
        dropout: share of values dropped after each of the last two levels, before the pooling and the skip.

    Source: Ronneberger et al. 2015, arXiv:1505.04597, Fig. 1 and sec. 3.1.
    """

    def __init__(
        self, in_channels: int, width: int = 64, levels: int = 5, padding: int = 1, batch_norm: bool = True, dropout: float = 0.0
    ) -> None:
        super().__init__()
        if in_channels < 1 or width < 1:
            raise ValueError(f"in_channels is {in_channels} and width {width}; both must be at least 1")
        self.channels = [width << level for level in range(levels)]
        self.strides = [1 << level for level in range(levels)]
        self.pool = nn.MaxPool2d(2)
        self.levels = nn.ModuleList()
        for level, (before, after) in enumerate(zip([in_channels, *self.channels], self.channels, strict=False)):
            block = double_convolution(before, after, padding, batch_norm)
            if dropout and level >= levels - 2:
                block.append(nn.Dropout(dropout))
            self.levels.append(block)

    def forward(self, image: Tensor) -> Features:
        maps = [self.levels[0](image)]
        for level in self.levels[1:]:
            maps.append(level(self.pool(maps[-1])))
        return Features(maps)


class DilationError(ValueError):
    """An encoder that has no maps at the output stride asked for."""


class TimmEncoder(nn.Module):
    """A timm network as an `Encoder`.

    Attributes:
        in_channels: bands of the image; the first convolution sees more where pixels are folded into bands before it (TResNet).
        channels: of each map, finest first.
        strides: of each map.
        batch_norm_folded: the loaded file carried batch norm as biases only (mean 0, variance 1 - eps, scale 1); the statistics
            must then be measured anew before batch norm is trained.
    """

    def __init__(self, name: str, in_channels: int, output_stride: int | None = None) -> None:
        super().__init__()
        self.name, self.in_channels = name, in_channels
        self.network = with_safe_gradients(_create(name, in_channels, output_stride))
        info = self.network.feature_info
        self.channels: list[int] = list(info.channels())  # type: ignore[union-attr, operator]
        self.strides: list[int] = list(info.reduction())  # type: ignore[union-attr, operator]
        self.batch_norm_folded = False
        layout = getattr(self.network, "output_fmt", None)
        self._maps_are_nhwc = getattr(layout, "value", "NCHW") == "NHWC"

    def forward(self, image: Tensor) -> Features:
        try:
            maps: list[Tensor] = list(self.network(image))
        except (AssertionError, RuntimeError) as error:  # timm's way of saying so, and PyTorch's
            if isinstance(error, RuntimeError) and not _MISFIT.search(str(error)):
                raise
            height, width = image.shape[-2:]
            raise ValueError(
                f"encoder {self.name!r} does not take images of {height}x{width} pixels ({_first_line(error)}); "
                "it is tied to certain sizes: choose another encoder, e.g. 'resnet34'"
            ) from error
        return Features([m.permute(0, 3, 1, 2) for m in maps] if self._maps_are_nhwc else maps)


def timm_encoder(name: str, in_channels: int = 3, weights: EncoderWeights = None, output_stride: int | None = None) -> TimmEncoder:
    """An encoder from timm, with random or published weights.

    Args:
        name: any timm network with feature maps, e.g. "resnet34".
        in_channels: bands of the image. A first convolution trained on other bands is averaged over them and scaled by
            (its bands / in_channels), so that the sum over bands keeps its size.
        weights: None or False: random; True: download through timm; a path: .safetensors or .pth with timm's keys. Layers beyond
            the last map (classifier, head) are left out.
        output_stride: 8 or 16 dilates the last stages instead of subsampling, for networks that can.

    Raises:
        ValueError: if the name is unknown, the network gives no maps or cannot take `output_stride`, or the weights cannot be
            had, read, or do not belong to the network.
    """
    if in_channels < 1:
        raise ValueError(f"in_channels is {in_channels}; an image has at least 1 band")
    encoder = TimmEncoder(name, in_channels, output_stride)
    if weights is None or weights is False:
        return encoder
    if weights is True:
        load_timm(encoder.network, _download(name), f"timm's weights of {name!r}", name)
    else:
        state = read_weights(Path(weights))
        load_timm(encoder.network, state, str(weights), name)
        encoder.batch_norm_folded = batch_norm_is_folded(state)
    return encoder


def read_weights(path: Path) -> dict[str, Tensor]:
    """The tensors of a .safetensors or .pth file; nothing in it is executed.

    Raises:
        ValueError: naming the file, if it is missing, damaged, of another kind, or a pickle of more than tensors.
    """
    if not path.is_file():
        raise ValueError(f"{path}: no such file; encoder_weights takes a .safetensors or .pth file, true (download) or none: {NO_WEIGHTS}")
    try:
        content = load_file(path) if path.suffix == ".safetensors" else torch.load(path, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, SafetensorError, RuntimeError, EOFError, OSError, KeyError, ValueError) as error:
        raise ValueError(f"{path}: {_why_unread(path, error)}") from error
    for wrapper in ("state_dict", "model", "model_state_dict"):
        if isinstance(content, Mapping) and isinstance(content.get(wrapper), Mapping):
            content = content[wrapper]
    if not isinstance(content, Mapping) or not all(isinstance(value, Tensor) for value in content.values()):
        raise ValueError(f"{path}: holds no plain dictionary of tensors; save model.state_dict()")
    return {str(key).removeprefix("module."): value for key, value in content.items()}


def _why_unread(path: Path, error: Exception) -> str:
    """What is wrong with a file of weights, by its first bytes."""
    if isinstance(error, OSError):
        return f"can't be read ({error.strerror or error})"
    if other := no_weights(path):
        return other
    if is_pickled(path) and path.suffix == ".safetensors":
        return "written by torch.save, so no .safetensors file; name it .pth"
    if is_pickled(path) and isinstance(error, pickle.UnpicklingError):
        return "not a file of tensors only; anything else is refused, not executed. Save model.state_dict()"
    return f"damaged or cut short ({_first_line(error)}); fetch it again"


def batch_norm_is_folded(state: Mapping[str, Tensor]) -> bool:
    """Whether every batch norm in `state` is a mere bias: mean 0, variance 1 - eps (or 1), scale 1, and some bias is not 0."""
    norms = [key.removesuffix("running_mean") for key in state if key.endswith("running_mean")]
    if not norms:
        return False
    identity = all(
        not state[f"{norm}running_mean"].any()
        and bool(((state[f"{norm}running_var"] - 1).abs() <= 2e-3).all())  # 1e-3 is the largest eps among timm's networks
        and bool((state[f"{norm}weight"] == 1).all())
        for norm in norms
    )
    return identity and any(bool(state[f"{norm}bias"].any()) for norm in norms)


def _create(name: str, in_channels: int, output_stride: int | None = None, pretrained: bool = False) -> nn.Module:
    if name == "plain":
        raise ValueError("encoder 'plain' is U-Net's own path; build unet on it, or choose one of timm's networks, e.g. 'resnet34'")
    if not timm.is_model(name):
        close = difflib.get_close_matches(name, timm.list_models(), n=1)
        hint = f" Did you mean {close[0]!r}?" if close else ""
        raise ValueError(f"unknown encoder {name!r}.{hint} Known: 'plain' and every network of timm.list_models()")
    options: dict[str, Any] = {}
    for family, arguments in _ANY_SIZE.items():
        if name.startswith(family):
            options.update(arguments)
    if output_stride is not None:
        options["output_stride"] = output_stride
    try:
        network: nn.Module = timm.create_model(name, features_only=True, in_chans=in_channels, pretrained=pretrained, **options)
    except (RuntimeError, AssertionError, TypeError, AttributeError, NotImplementedError) as error:
        if pretrained:
            raise
        wish, kind = ("", ValueError) if output_stride is None else (f" at output stride {output_stride}", DilationError)
        raise kind(f"encoder {name!r} gives no feature maps{wish} ({_first_line(error)}); choose another, e.g. 'resnet34'") from error
    return network


def _download(name: str) -> dict[str, Tensor]:
    cfg = timm.get_pretrained_cfg(name)
    if cfg is None or not cfg.has_weights:
        raise ValueError(f"no weights are published for encoder {name!r}; give a file, another encoder, or {NO_WEIGHTS}")
    before = logging.root.manager.disable
    logging.disable(logging.CRITICAL)  # the hub's client logs page after page while it tries again
    try:
        return dict(_create(name, 3, pretrained=True).state_dict())
    except Exception as error:  # whatever the hub client raises: the person needs the way around, not its class
        where = f"https://huggingface.co/{cfg.hf_hub_id}/resolve/main/model.safetensors" if cfg.hf_hub_id else cfg.url
        raise ValueError(
            f"the weights of encoder {name!r} could not be downloaded ({_first_line(error)}). "
            f"Fetch {where} where there is a network and give the file's path as encoder_weights, or train without: {NO_WEIGHTS}"
        ) from error
    finally:
        logging.disable(before)


def load_timm(network: nn.Module, state: Mapping[str, Tensor], source: str, name: str) -> None:
    """Copies `state`, in timm's keys of the whole network, into the part that makes the maps; all of it must be there."""
    own = network.state_dict()
    given = {_flat(key): value for key, value in state.items()}
    missing = [key for key in own if _flat(key) not in given and not key.endswith("num_batches_tracked")]
    extra = [key for key in state if _flat(key) not in {_flat(k) for k in own}]
    if extra:
        legal = _whole_network_keys(name)
        extra = [key for key in extra if _flat(key) not in legal]
    if missing and {key.partition(".")[0] for key in state} == {"encoder", "decoder"}:
        raise ValueError(
            f"{source}: a whole model of perpixel, not the weights of encoder {name!r} alone. A training goes on from such a bundle with "
            "--set model.start_from=BUNDLE"
        )
    if missing or extra:
        parts = [f"{what} {_some(keys)}" for what, keys in (("lacks", missing), ("has the foreign", extra)) if keys]
        raise ValueError(
            f"{source}: not the weights of encoder {name!r}: it {' and '.join(parts)}. Give the file made for {name!r}, or the name of the "
            "encoder that this one was made for (in a command --set model.encoder=NAME)"
        )
    fitted = {key: fit_bands(given[_flat(key)], value, f"{source}: {key}") for key, value in own.items() if _flat(key) in given}
    network.load_state_dict(fitted, strict=False)


def fit_bands(weight: Tensor, target: Tensor, what: str) -> Tensor:
    """The filters `weight` with as many input bands as `target`, where they differ in nothing else.

    Other than 3 bands each get the mean over the 3, times 3 / bands, so that the sum over bands keeps its size.

    Raises:
        ValueError: naming `what`, where the shapes differ in more.
    """
    if weight.shape == target.shape:
        return weight
    same_but_bands = weight.ndim == target.ndim == 4 and weight.shape[0] == target.shape[0] and weight.shape[2:] == target.shape[2:]
    if not (same_but_bands and weight.shape[1] == 3):
        raise ValueError(f"{what} has shape {tuple(weight.shape)}, but the encoder needs {tuple(target.shape)}; give the file made for it")
    bands = target.shape[1]
    return weight.mean(1, keepdim=True).mul(weight.shape[1] / bands).expand(-1, bands, -1, -1)


def _flat(key: str) -> str:
    # timm's feature extraction renames `stem.0` to `stem_0` and may wrap the network as `model.`
    return key.removeprefix("model.").replace(".", "_")


def _whole_network_keys(name: str) -> set[str]:
    try:
        with torch.device("meta"):
            whole = timm.create_model(name)
    except (RuntimeError, NotImplementedError):  # a constructor that computes with its weights
        whole = timm.create_model(name)
    return {_flat(key) for key in whole.state_dict()}


def _some(keys: list[str]) -> str:
    shown = ", ".join(keys[:3])
    return f"{shown} and {len(keys) - 3} more" if len(keys) > 3 else shown


def _first_line(error: Exception) -> str:
    return f"{type(error).__name__}: {str(error).splitlines()[0]}" if str(error) else type(error).__name__
