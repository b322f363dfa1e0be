"""`perpixel models`: what can be built, from which paper, how large it is and how far it sees."""

import inspect
import math
from dataclasses import asdict, dataclass
from functools import cache

import torch
from rich.box import SIMPLE
from rich.console import Console
from rich.table import Table

from perpixel.models import ENCODERS, MODELS
from perpixel.models.receptive_field import coarsest_view


@dataclass(frozen=True)
class ModelRow:
    """One line of `perpixel models`: a model as built for 2 classes with default options.

    Attributes:
        name: for `build`.
        paper, year: authors and number of the paper, and when it appeared.
        parameters: their number, frozen ones included.
        output_stride: image pixels between two pixels of the coarsest map.
        receptive_field: side, in pixels, of the square of the image that a pixel of the coarsest map, or a score on it, sees; "image"
            where all of it. What the decoder adds beyond is not counted: after unpooling it would depend on the image.
        margin: pixels at each border of the image that are seen but not labelled.
        note: what to know before choosing it.
    """

    name: str
    paper: str
    year: int
    parameters: int
    output_stride: int
    receptive_field: int | str
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


@cache
def describe() -> tuple[ModelRow, ...]:
    """What can be built, in the order of `MODELS`; nothing is allocated or downloaded."""
    rows = []
    for name, builder in MODELS.items():
        with torch.device("meta"):
            model = builder(classes=2)
        parameters = sum(parameter.numel() for parameter in model.parameters())
        view = coarsest_view(model, inspect.signature(builder).parameters["in_channels"].default)
        field = "image" if math.isinf(view.field) else int(view.field)
        paper, year, note = _PAPERS[name]
        rows.append(ModelRow(name, paper, year, parameters, view.stride, field, model.geometry.margin, note))
    return tuple(rows)


def to_json() -> dict[str, list[dict[str, object]]]:
    """What can be built, for programs: {"models": rows, "encoders": the recommended ones}."""
    encoders: list[dict[str, object]] = [{"name": name, "note": note} for name, note in ENCODERS.items()]
    return {"models": [asdict(row) for row in describe()], "encoders": encoders}


def render(console: Console) -> None:
    """What can be built, as tables for people; fewer than 120 columns leave out papers and notes."""
    table = Table(box=SIMPLE, title="--set model.name=NAME", title_justify="left", padding=(0, 2, 0, 0))
    wide = console.width >= 120
    table.add_column("model", no_wrap=True)
    if wide:
        table.add_column("paper", no_wrap=True)
    for heading in ("parameters", "stride", "sees", "margin"):
        table.add_column(heading, justify="right", no_wrap=True)
    if wide:
        table.add_column("")
    for row in describe():
        paper = row.paper.replace(" et al., ", f" {row.year}\n", 1)
        figures = [f"{row.parameters:,}", str(row.output_stride), str(row.receptive_field), str(row.margin)]
        table.add_row(*([row.name, paper, *figures, row.note] if wide else [row.name, *figures]))
    console.print(table)
    if not wide:
        console.print("120 columns, or --json, show the papers and notes too.")
    console.print(
        "parameters: for 2 classes, with default options. stride: image pixels between two pixels of the coarsest map. sees: side in "
        "pixels of what such a pixel, or a score on it, sees of the image. margin: border pixels that are seen but not labelled.\n"
    )
    table = Table(box=SIMPLE, title="--set model.encoder=NAME", title_justify="left", pad_edge=False)
    table.add_column("encoder", no_wrap=True)
    table.add_column("any timm network with feature maps; these are recommended")
    for name, note in ENCODERS.items():
        table.add_row(name, note)
    console.print(table)
