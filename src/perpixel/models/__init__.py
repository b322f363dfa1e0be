"""Models by name: `build` makes one, `describe` lists them. Each name is one line of a dict."""

import difflib
import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from rich.console import Console
from rich.table import Table

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

# Recommended encoders; every timm network that gives feature maps is taken.
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


@dataclass(frozen=True)
class ModelRow:
    """One line of `perpixel models`; parameters as built for 2 classes with default options, margin in pixels."""

    name: str
    paper: str
    year: int
    parameters: int
    margin: int
    note: str


_PAPERS: dict[str, tuple[str, int, str]] = {
    "fcn": ("Long et al., arXiv:1411.4038", 2015, "summed scores of any encoder's maps; default resnet34; takes googlenet"),
    "fcn_resnet": ("Long et al., arXiv:1411.4038", 2015, "torchvision's fcn_resnet50 and 101, with auxiliary head"),
    "fcn32s_paper": ("Long et al., arXiv:1411.4038", 2015, "VGG-16, padding 100, crop 19; frozen bilinear upsampling"),
    "fcn16s_paper": ("Long et al., arXiv:1411.4038", 2015, "and scores of pool4; starts from FCN-32s"),
    "fcn8s_paper": ("Long et al., arXiv:1411.4038", 2015, "and scores of pool3; starts from FCN-16s"),
    "fcn8s_atonce_paper": ("Shelhamer et al., arXiv:1605.06211", 2016, "FCN-8s straight from VGG-16, skips scaled"),
    "fcn32s_alexnet_paper": ("Long et al., arXiv:1411.4038", 2015, "CaffeNet, crop 18"),
    "fcn_googlenet_paper": ("Long et al., arXiv:1411.4038", 2015, "the GoogLeNet of 2014; never released, parts inferred; crop 98"),
    "unet": ("Ronneberger et al., arXiv:1505.04597", 2015, "its decoder on any encoder; default resnet34"),
    "unet_paper": ("Ronneberger et al., arXiv:1505.04597", 2015, "as published: unpadded, 572x572 -> 388x388"),
    "unet_release_paper": (
        "Ronneberger et al., arXiv:1505.04597",
        2015,
        "as released: 128 maps in the last up-convolution, ReLU after each",
    ),
    "segnet": ("Badrinarayanan et al., arXiv:1511.00561", 2015, "its decoder on any VGG; default vgg16_bn"),
    "segnet_paper": ("Badrinarayanan et al., arXiv:1511.00561", 2015, "as published: VGG-16 and its mirror"),
    "segnet_basic_paper": ("Badrinarayanan et al., arXiv:1511.00561", 2015, "as published; variant= seven other decoders of Table 1"),
    "bayesian_segnet_paper": ("Kendall et al., arXiv:1511.02680", 2015, "as published: SegNet with dropout for Monte Carlo samples"),
    "bayesian_segnet_basic_paper": ("Kendall et al., arXiv:1511.02680", 2015, "as published: SegNet-Basic with dropout"),
    "deeplab_v1": ("Chen et al., arXiv:1412.7062", 2015, "its large field of view on any encoder; default resnet34"),
    "deeplab_v1_paper": ("Chen et al., arXiv:1412.7062", 2015, "as published on VGG-16, without its CRF; 321x321, LargeFOV"),
    "deeplab_v2": ("Chen et al., arXiv:1606.00915", 2017, "its atrous pyramid on any encoder; default resnet34"),
    "deeplab_v2_vgg16_paper": ("Chen et al., arXiv:1606.00915", 2017, "as published on VGG-16, without its CRF; 321x321, ASPP-L"),
    "deeplab_v2_resnet101_paper": (
        "Chen et al., arXiv:1606.00915",
        2017,
        "as published on ResNet-101, without its CRF; three scales, largest score",
    ),
    "deeplab_v3": ("Chen et al., arXiv:1706.05587", 2017, "its pyramid with image pooling on any encoder; default resnet34"),
    "deeplab_v3_paper": ("Chen et al., arXiv:1706.05587", 2017, "as published on ResNet-101; 513x513, output stride 16"),
    "deeplab_v3_torchvision": ("Chen et al., arXiv:1706.05587", 2017, "torchvision's deeplabv3_resnet50, to take its weights"),
    "deeplab_v3plus": ("Chen et al., arXiv:1802.02611", 2018, "v3 with a finer map in its decoder, on any encoder; default resnet34"),
    "deeplab_v3plus_paper": ("Chen et al., arXiv:1802.02611", 2018, "as published on ResNet-101; 513x513, output stride 16"),
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
        ValueError: for an unknown name or encoder, and for an option that the model does not have.
    """
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
        "learn_upsampling": learn_upsampling,
    }
    given = {option: value for option, value in asked.items() if value is not None}
    known = [parameter for parameter in inspect.signature(MODELS[name]).parameters if parameter != "classes"]
    for option in given:
        if option not in known:
            raise ValueError(f"model {name!r} has no option {option!r}; it takes {', '.join(known)}")
    return MODELS[name](classes, **given)


def describe() -> list[ModelRow]:
    """What can be built, in the order of `MODELS`; nothing is allocated or downloaded."""
    rows = []
    for name, builder in MODELS.items():
        with torch.device("meta"):
            model = builder(classes=2)
        parameters = sum(parameter.numel() for parameter in model.parameters())
        paper, year, note = _PAPERS[name]
        rows.append(ModelRow(name, paper, year, parameters, model.geometry.margin, note))
    return rows


def render(console: Console) -> None:
    """What can be built, as tables for people."""
    table = Table("model", "paper", "parameters", "margin", "", title="--set model.name=NAME")
    for row in describe():
        table.add_row(row.name, f"{row.paper}, {row.year}", f"{row.parameters:,}", str(row.margin), row.note)
    console.print(table)
    table = Table("encoder", "", title="--set model.encoder=NAME: any timm network with feature maps; these are recommended")
    for name, note in ENCODERS.items():
        table.add_row(name, note)
    console.print(table)


__all__ = [
    "ENCODERS",
    "MODELS",
    "Features",
    "FullyConvolutional",
    "InputGeometry",
    "ModelRow",
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
    "describe",
    "fcn",
    "fcn8s_atonce_paper",
    "fcn8s_paper",
    "fcn16s_paper",
    "fcn32s_alexnet_paper",
    "fcn32s_paper",
    "fcn_googlenet_paper",
    "fcn_resnet",
    "render",
    "segnet",
    "segnet_basic_paper",
    "segnet_paper",
    "start_from",
    "unet",
    "unet_paper",
    "unet_release_paper",
]
