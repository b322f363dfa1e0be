"""Models by name: `build` makes one, `table.py` lists them. Each name is one line of a dict."""

import difflib
import inspect
from collections.abc import Callable, Sequence

from perpixel.models.convolutional import FullyConvolutional, convolutionize
from perpixel.models.deeplab_v1 import deeplab_v1, deeplab_v1_paper
from perpixel.models.deeplab_v2 import deeplab_v2, deeplab_v2_resnet101_paper, deeplab_v2_vgg16_paper
from perpixel.models.deeplab_v3 import deeplab_v3, deeplab_v3_paper, deeplab_v3_torchvision, deeplab_v3plus, deeplab_v3plus_paper
from perpixel.models.encoders import EncoderWeights
from perpixel.models.fcn import (
    fcn,
    fcn8s_atonce_paper,
    fcn8s_paper,
    fcn16s_paper,
    fcn32s_alexnet_paper,
    fcn32s_paper,
    fcn_googlenet_paper,
    start_from,
)
from perpixel.models.fcn_resnet import fcn_resnet
from perpixel.models.model import Features, InputGeometry, SegmentationModel
from perpixel.models.segnet import bayesian_segnet_paper, segnet, segnet_paper
from perpixel.models.segnet_basic import bayesian_segnet_basic_paper, segnet_basic_paper
from perpixel.models.unet import unet, unet_paper, unet_release_paper

MODELS: dict[str, Callable[..., SegmentationModel]] = {
    "fcn": fcn,
    "fcn_resnet": fcn_resnet,
    "fcn32s_paper": fcn32s_paper,
    "fcn16s_paper": fcn16s_paper,
    "fcn8s_paper": fcn8s_paper,
    "fcn8s_atonce_paper": fcn8s_atonce_paper,
    "fcn32s_alexnet_paper": fcn32s_alexnet_paper,
    "fcn_googlenet_paper": fcn_googlenet_paper,
    "unet": unet,
    "unet_paper": unet_paper,
    "unet_release_paper": unet_release_paper,
    "segnet": segnet,
    "segnet_paper": segnet_paper,
    "segnet_basic_paper": segnet_basic_paper,
    "bayesian_segnet_paper": bayesian_segnet_paper,
    "bayesian_segnet_basic_paper": bayesian_segnet_basic_paper,
    "deeplab_v1": deeplab_v1,
    "deeplab_v1_paper": deeplab_v1_paper,
    "deeplab_v2": deeplab_v2,
    "deeplab_v2_vgg16_paper": deeplab_v2_vgg16_paper,
    "deeplab_v2_resnet101_paper": deeplab_v2_resnet101_paper,
    "deeplab_v3": deeplab_v3,
    "deeplab_v3_paper": deeplab_v3_paper,
    "deeplab_v3_torchvision": deeplab_v3_torchvision,
    "deeplab_v3plus": deeplab_v3plus,
    "deeplab_v3plus_paper": deeplab_v3plus_paper,
}

# Recommended encoders; models on any encoder take every timm network that gives feature maps.
ENCODERS: dict[str, str] = {
    "plain": "U-Net's own path with batch norm; no published weights",
    "mobilenetv2_100": "the quickest on a processor",
    "resnet18": "quick and robust",
    "resnet34": "the default",
    "efficientnet_b0": "few parameters",
    "regnety_004": "few parameters, quick",
    "convnext_atto": "the smallest ConvNeXt; first map at stride 4",
    "vgg16_bn": "large and slow; first map at full resolution",
    "squeezenet1_0": "torchvision's; the fewest parameters, coarsest map at stride 16",
    "googlenet": "torchvision's, with batch norm",
}


def build(
    name: str,
    classes: int,
    encoder: str | None = None,
    encoder_weights: EncoderWeights = None,
    in_channels: int | None = None,
    *,
    width: int | None = None,
    dropout: float | None = None,
    decoder_channels: Sequence[int] | None = None,
    head_stride: int | None = None,
    upsampling: str | None = None,
    image_pooling: bool | None = None,
    stage_scores: bool | None = None,
    output_stride: int | None = None,
    variant: str | None = None,
    multi_scale: bool | None = None,
    depth: int | None = None,
    modules: str | None = None,
    blocks: int | None = None,
    multi_grid: Sequence[int] | None = None,
    rates: Sequence[int] | None = None,
    learn_upsampling: bool | None = None,
) -> SegmentationModel:
    """A model by its name in `MODELS`. Options left at None take the model's own default.

    Args:
        name: a key of `MODELS`.
        classes: K, the number of logits per pixel.
        encoder: "plain" or any timm network with feature maps.
        encoder_weights: None, True (download through timm), or a .safetensors/.pth file with timm's keys.
        in_channels: bands of the image.
        output_stride: input pixels per pixel of the coarsest map, for models on atrous convolutions.
        width, dropout and the others: as in the model's own function.

    Raises:
        ValueError: for an unknown name or encoder, for an option that the model does not have, and for less than 1 class.
    """
    if not isinstance(classes, int):
        raise TypeError(f"classes is {classes!r}; give their number, e.g. 5")
    if classes < 1:
        raise ValueError(f"a model needs at least 1 class, not {classes}")
    if name not in MODELS:
        close = difflib.get_close_matches(name, MODELS, n=1)
        hint = f" Did you mean {close[0]!r}?" if close else ""
        raise ValueError(f"unknown model {name!r}.{hint} Known: {', '.join(sorted(MODELS))}")
    asked = {
        "encoder": encoder,
        "encoder_weights": encoder_weights or None,  # False says the same as None
        "in_channels": in_channels,
        "width": width,
        "dropout": dropout,
        "decoder_channels": decoder_channels,
        "head_stride": head_stride,
        "upsampling": upsampling,
        "image_pooling": image_pooling,
        "stage_scores": stage_scores,
        "output_stride": output_stride,
        "variant": variant,
        "multi_scale": multi_scale,
        "depth": depth,
        "modules": modules,
        "blocks": blocks,
        "multi_grid": multi_grid,
        "rates": rates,
        "learn_upsampling": learn_upsampling,
    }
    given = {option: value for option, value in asked.items() if value is not None}
    known = [parameter for parameter in inspect.signature(MODELS[name]).parameters if parameter != "classes"]
    for option in given:
        if option not in known:
            raise ValueError(f"model {name!r} has no option {option!r}; it takes {', '.join(known)}")
    return MODELS[name](classes, **given)


__all__ = [
    "ENCODERS",
    "MODELS",
    "Features",
    "FullyConvolutional",
    "InputGeometry",
    "SegmentationModel",
    "bayesian_segnet_basic_paper",
    "bayesian_segnet_paper",
    "build",
    "convolutionize",
    "deeplab_v1",
    "deeplab_v1_paper",
    "deeplab_v2",
    "deeplab_v2_resnet101_paper",
    "deeplab_v2_vgg16_paper",
    "deeplab_v3",
    "deeplab_v3_paper",
    "deeplab_v3_torchvision",
    "deeplab_v3plus",
    "deeplab_v3plus_paper",
    "fcn",
    "fcn8s_atonce_paper",
    "fcn8s_paper",
    "fcn16s_paper",
    "fcn32s_alexnet_paper",
    "fcn32s_paper",
    "fcn_googlenet_paper",
    "fcn_resnet",
    "segnet",
    "segnet_basic_paper",
    "segnet_paper",
    "start_from",
    "unet",
    "unet_paper",
    "unet_release_paper",
]
