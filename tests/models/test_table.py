"""`perpixel models`: the figures of its rows, by the sheets and by what the networks themselves do."""

from io import StringIO

import pytest
import torch
from rich.console import Console
from torch import nn

from perpixel.models import ENCODERS, MODELS, build
from perpixel.models.layers import resize
from perpixel.models.model import Features, InputGeometry, SegmentationModel
from perpixel.models.receptive_field import View, coarsest_view
from perpixel.models.table import describe, render, to_json


@pytest.fixture(scope="module")
def rows():
    return {row.name: row for row in describe()}


def test_every_model_has_a_row_with_its_parameters_and_margin(rows):
    assert list(rows) == list(MODELS)
    assert rows["unet_paper"].parameters == 31_030_658  # arXiv:1505.04597, Fig. 1, for 1 band and 2 classes
    assert {name: row.margin for name, row in rows.items() if row.margin} == {"unet_paper": 92, "unet_release_paper": 92}
    assert rows["unet"].parameters == sum(p.numel() for p in build("unet", 2).parameters())


@pytest.mark.parametrize(
    ("name", "field", "stride"),
    [
        # FCN: fc7 and its scores, arXiv:1411.4038, table 1.
        ("fcn32s_paper", 404, 32),
        ("fcn16s_paper", 404, 32),
        ("fcn8s_paper", 404, 32),
        ("fcn8s_atonce_paper", 404, 32),
        ("fcn32s_alexnet_paper", 355, 32),
        ("fcn_googlenet_paper", 715, 32),  # the paper's 907 count the 7x7 average pooling that it drops
        # SegNet: pool5, and pool4 of Basic, whose four levels have one 7x7 convolution each: 1 + (6 + 1) * (1 + 2 + 4 + 8).
        ("segnet_paper", 212, 32),
        ("bayesian_segnet_paper", 212, 32),
        ("segnet_basic_paper", 106, 16),
        ("bayesian_segnet_basic_paper", 106, 16),
        # U-Net: two 3x3 convolutions on each of five levels, 2x2 poolings between: 4 * (1 + 2 + 4 + 8 + 16) + (1 + 2 + 4 + 8) + 1.
        ("unet_paper", 140, 16),
        ("unet_release_paper", 140, 16),
        # DeepLab: scores on the map at stride 8; ResNet-101 alone sees 1027, rate 24 adds 48 pixels of stride 8.
        ("deeplab_v1_paper", 435, 8),
        ("deeplab_v2_vgg16_paper", 611, 8),
        ("deeplab_v2_resnet101_paper", 1027 + 48 * 8, 8),
        ("deeplab_v3_paper", "image", 16),
        ("deeplab_v3plus_paper", "image", 16),
        ("deeplab_v3_torchvision", "image", 8),
        # ResNet-34: 11 behind stem and pooling, then 7, 8, 12 and 5 convolutions at strides 4 to 32.
        ("fcn", 11 + 2 * (7 * 4 + 8 * 8 + 12 * 16 + 5 * 32), 32),
        ("unet", 899, 32),
        ("segnet", 212, 32),
        ("deeplab_v3", "image", 16),
    ],
)
def test_stride_and_receptive_field_of_the_coarsest_map_are_those_of_the_sheets(rows, name, field, stride):
    assert (rows[name].receptive_field, rows[name].output_stride) == (field, stride)


class Convolved(nn.Module):
    """Two branches at stride 2, a narrow and a wide one."""

    channels, strides = (4,), (2,)

    def __init__(self) -> None:
        super().__init__()
        self.first, self.pool = nn.Conv2d(1, 2, 3, padding=1), nn.MaxPool2d(3, 2, 1)
        self.near, self.far = nn.Conv2d(2, 2, 1), nn.Conv2d(2, 2, 3, padding=2, dilation=2)

    def forward(self, image):
        x = self.pool(self.first(image))
        return Features([torch.cat([self.near(x), self.far(x) + 1], dim=1)])


class Blurred(nn.Module):
    """A wide convolution after the map has been enlarged, which must not count."""

    def __init__(self) -> None:
        super().__init__()
        self.last = nn.Conv2d(4, 2, 15, padding=7)

    def forward(self, features, size):
        return self.last(resize(features.maps[0], size))


def test_the_view_is_the_widest_of_all_branches_before_anything_is_resized():
    """Against the gradient at the input of a branching net in which nothing cancels."""
    model = SegmentationModel(Convolved(), Blurred(), 2, InputGeometry(2, minimum=32)).double()
    for parameter in model.parameters():
        nn.init.constant_(parameter, 0.1)
    model.encoder.pool = nn.AvgPool2d(3, 2, 1)  # as wide as max pooling, and its gradient shows all of it
    image = torch.ones(1, 1, 4, 33, dtype=torch.float64, requires_grad=True)
    model.encoder(image).maps[0][..., 8].sum().backward()
    seen = image.grad.sum((0, 1, 2)).nonzero().flatten()
    assert coarsest_view(model.float().to("meta"), 1) == View(int(seen[-1] - seen[0]) + 1, 2)


def test_people_see_whole_names_and_figures_in_120_columns():
    console = Console(width=120, record=True, file=StringIO())
    render(console)
    text = console.export_text()
    assert max(len(line.rstrip()) for line in text.splitlines()) <= 120
    assert "\N{HORIZONTAL ELLIPSIS}" not in text
    for row in describe():
        words = next(words for words in map(str.split, text.splitlines()) if words[:1] == [row.name])
        assert all(word in words for word in (f"{row.parameters:,}", str(row.receptive_field), str(row.output_stride), str(row.year)))
    assert all(name in text for name in ENCODERS)


def test_80_columns_show_whole_names_and_figures_and_say_what_is_left_out():
    console = Console(width=80, record=True, file=StringIO())
    render(console)
    text = console.export_text()
    assert "\N{HORIZONTAL ELLIPSIS}" not in text
    assert "120 columns" in text
    for row in describe():
        words = next(words for words in map(str.split, text.splitlines()) if words[:1] == [row.name])
        assert words[1:] == [f"{row.parameters:,}", str(row.output_stride), str(row.receptive_field), str(row.margin)]


def test_programs_get_the_same_rows(rows):
    told = to_json()
    assert [row["name"] for row in told["models"]] == list(rows)
    assert told["models"][2]["receptive_field"] == 404
    assert [row["name"] for row in told["encoders"]] == list(ENCODERS)
