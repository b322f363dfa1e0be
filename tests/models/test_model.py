"""Sizes, errors, names: what all models share."""

import pytest
import torch
from torch import Tensor, nn

from perpixel.models import ENCODERS, MODELS, build
from perpixel.models.dependency import dependency
from perpixel.models.model import Features, InputGeometry, SegmentationModel, whole_cells


class Identity(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.channels, self.strides = [3], [1]

    def forward(self, image: Tensor) -> Features:
        return Features([image])


class Middle(nn.Module):
    def forward(self, features: Features, size: tuple[int, int]) -> Tensor:
        top, left = ((have - want) // 2 for have, want in zip(features.maps[0].shape[-2:], size, strict=True))
        return features.maps[0][..., top : top + size[0], left : left + size[1]]


@pytest.mark.parametrize(
    "geometry",
    [
        InputGeometry(),
        InputGeometry(32, minimum=64),
        InputGeometry(16, 12, 92, 188),
        InputGeometry(8, 4, minimum=9),
        InputGeometry(5, 2, 1, 3),
    ],
)
def test_fit_finds_the_first_legal_side_that_a_search_finds(geometry):
    for side in range(1, 260):
        legal = [s for s in range(1, 600) if s % geometry.multiple == geometry.remainder and s >= geometry.minimum]
        assert geometry.fit(side) == next(s for s in legal if s >= side)
        assert geometry.fits(side) == (side in legal)


@pytest.mark.parametrize(
    "wrong",
    [
        {"multiple": 0},
        {"multiple": 4, "remainder": 4},
        {"margin": -1},
        {"margin": 3, "minimum": 6},
        {"margin": 1, "minimum": 8, "pads": True},
    ],
)
def test_a_geometry_that_contradicts_itself_is_refused(wrong):
    with pytest.raises(ValueError, match="need"):
        InputGeometry(**wrong)


def test_an_illegal_size_is_answered_with_the_rule_and_the_next_legal_size():
    model = SegmentationModel(Identity(), Middle(), 3, InputGeometry(16, 12, 92, 188))
    expected = (
        r"image is 560x570 pixels \(height x width\); this model needs sides of 16\*k \+ 12, at least 188\. "
        r"Pad it to 572x572, or call predict_tiled, which pads for you\."
    )
    with pytest.raises(ValueError, match=expected):
        model(torch.zeros(1, 3, 560, 570))


def test_a_legal_image_loses_exactly_the_margin():
    model = SegmentationModel(Identity(), Middle(), 3, InputGeometry(4, 0, margin=3, minimum=8))
    image = torch.randn(2, 3, 12, 16)
    torch.testing.assert_close(model(image), image[..., 3:-3, 3:-3])


class Whole(nn.Module):
    def forward(self, features: Features, size: tuple[int, int]) -> Tensor:
        assert features.maps[0].shape[-2:] == size  # what the decoder is asked for is what the encoder saw
        return features.maps[0]


@pytest.mark.parametrize("size", [(1, 1), (9, 17), (16, 16), (24, 33)])
def test_a_model_that_pads_sees_its_last_pixels_again_at_the_right_and_below_up_to_a_legal_size(size):
    model, seen = SegmentationModel(Identity(), Whole(), 3, whole_cells([2, 8])), []
    model.encoder.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0]))
    image = torch.randn(2, 3, *size)
    assert torch.equal(model(image), image)
    sides = [max(-(-side // 8) * 8, 16) for side in size]
    assert list(seen[0].shape[-2:]) == sides
    rows, columns = (torch.arange(side).clamp_max(own - 1) for side, own in zip(sides, size, strict=True))
    assert torch.equal(seen[0], image[:, :, rows][..., columns])


def test_wrong_parts_and_shapes_are_refused():
    with pytest.raises(ValueError, match=r"takes \(N, C, H, W\)"):
        SegmentationModel(Identity(), Middle(), 3, InputGeometry())(torch.zeros(3, 8, 8))
    with pytest.raises(ValueError, match="at least 1 class"):
        SegmentationModel(Identity(), Middle(), 0, InputGeometry())
    with pytest.raises(TypeError, match="torch modules"):
        SegmentationModel(Identity(), lambda features, size: features.maps[0], 3, InputGeometry())


def test_a_misspelt_name_is_answered_with_the_nearest_one():
    with pytest.raises(ValueError, match=r"unknown model 'unnet'. Did you mean 'unet'\? Known: .*unet, unet_paper"):
        build("unnet", classes=2)
    with pytest.raises(ValueError, match=r"unknown encoder 'resnet3x4'. Did you mean 'resnet34'"):
        build("unet", classes=2, encoder="resnet3x4")


def test_an_option_that_a_model_does_not_have_is_refused():
    with pytest.raises(ValueError, match="'unet_paper' has no option 'encoder'; it takes in_channels, width, dropout"):
        build("unet_paper", classes=2, encoder="resnet34")


@pytest.mark.parametrize(("name", "encoder"), [("unet", "plain"), ("deeplab_v3", "resnet18"), ("unet_paper", None)])
def test_an_image_of_other_bands_is_refused_with_both_numbers(name, encoder):
    model = build(name, 2, encoder, in_channels=3, **({"width": 2} if name != "deeplab_v3" else {}))
    with pytest.raises(ValueError, match=r"image has 5 bands; this model takes 3\. Build it with in_channels=5"):
        model(torch.zeros(1, 5, 188, 188))


def test_an_encoder_that_folds_pixels_into_bands_takes_the_image_s_own_bands():
    """TResNet begins with 4x4 pixels as 16 times the bands (arXiv:2003.13630, sec. 2.2): its first convolution sees 80 of 5."""
    with torch.device("meta"):
        model = build("unet", 2, "tresnet_m", in_channels=5)
        assert model.bands == 5
        assert model(torch.zeros(1, 5, 64, 64)).shape == (1, 2, 64, 64)
    with pytest.raises(ValueError, match="image has 3 bands; this model takes 5"):
        model(torch.zeros(1, 3, 64, 64))
    assert "body_s2d cuts the image into parts" in dependency(model).obstacle  # it is walked with the same bands


def test_build_passes_every_option_on():
    options = {"decoder_channels": [24, 12], "head_stride": 4, "upsampling": "nearest", "image_pooling": True, "dropout": 0.25, "width": 3}
    model = build("unet", 4, "plain", in_channels=5, **options)
    assert [stage.convolve[0].out_channels for stage in model.decoder.stages] == [24, 12]
    assert {stage.upsampling for stage in model.decoder.stages} == {"nearest"}
    assert model.encoder.levels[0][0].weight.shape == (3, 5, 3, 3)
    assert model.decoder.drop.p == 0.25
    assert model.decoder.pool.mix.in_features == 48
    assert build("unet_paper", 2, width=2).encoder.levels[0][0].in_channels == 1  # one band, as published


@pytest.mark.parametrize(
    ("name", "encoder", "geometry"),
    [
        ("unet", "mobilenetv2_100", InputGeometry(multiple=32, minimum=64, pads=True)),
        ("unet", "plain", InputGeometry(multiple=16, minimum=32, pads=True)),
        ("deeplab_v3", "resnet18", InputGeometry(multiple=16, minimum=32, pads=True)),
        ("unet_paper", None, InputGeometry(16, 12, 92, 188)),
    ],
)
def test_a_model_takes_multiples_of_its_coarsest_stride(name, encoder, geometry):
    with torch.device("meta"):
        assert build(name, 2, encoder).geometry == geometry


@pytest.mark.parametrize("encoder", ENCODERS)
def test_every_recommended_encoder_exists(encoder):
    with torch.device("meta"):
        assert build("unet", 2, encoder).geometry.fits(256)


def test_classes_that_are_no_number_are_refused():
    with pytest.raises(TypeError, match="classes is '5'; give their number"):
        build("unet", "5")


@pytest.mark.parametrize("classes", [0, -2])
@pytest.mark.parametrize("name", ["unet", "segnet", "deeplab_v3_paper"])
def test_less_than_one_class_is_refused_before_anything_is_built(name, classes):
    with pytest.raises(ValueError, match=f"^a model needs at least 1 class, not {classes}$"):
        build(name, classes)


@pytest.mark.parametrize("name", MODELS)
def test_tiles_of_every_model_start_in_phase_with_its_coarsest_map(name):
    with torch.device("meta"):
        model = MODELS[name](2)
    geometry = model.geometry
    assert (geometry.cell or geometry.multiple) % max(model.encoder.strides) == 0


def test_a_cell_is_whole_multiples():
    with pytest.raises(ValueError, match="cell 12, multiple 8: need a multiple of it, or 0"):
        InputGeometry(multiple=8, cell=12)
