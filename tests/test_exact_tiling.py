"""overlap="exact": parts of an image are predicted as one pass over the whole image predicts them, or refused with the reason."""

import re
import sys
from itertools import product

import pytest
import torch
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional
from torch.overrides import TorchFunctionMode

from perpixel.models import MODELS, build
from perpixel.models.batch_norm import FrozenBatchNorm
from perpixel.models.dependency import dependency
from perpixel.models.encoders import timm_encoder
from perpixel.models.model import Features, InputGeometry, SegmentationModel
from perpixel.models.resnet import UNITS
from perpixel.tiling import Tiler, mirror_pad, predict_tiled, predict_whole, reader

TINY = {"encoder": "test_resnet"}  # timm's own test network: strides 2 to 32, one unit a stage

# Every model of the catalogue as narrow and as shallow as it can be built, and some variants: all of them admit exactness.
EXACT: dict[str, tuple[str, dict[str, object]]] = {
    "fcn": ("fcn", TINY),
    "fcn_resnet": ("fcn_resnet", {"depth": 18}),
    "fcn32s_paper": ("fcn32s_paper", {"width": 1}),
    "fcn16s_paper": ("fcn16s_paper", {"width": 1}),
    "fcn8s_paper": ("fcn8s_paper", {"width": 1}),
    "fcn8s_atonce_paper": ("fcn8s_atonce_paper", {"width": 1}),
    "fcn32s_alexnet_paper": ("fcn32s_alexnet_paper", {"width": 6}),
    "fcn_googlenet_paper": ("fcn_googlenet_paper", {"width": 4}),
    "unet": ("unet", TINY),
    "unet on its own path": ("unet", {"encoder": "plain", "width": 2}),
    "unet with image pooling, sums of scores, head at stride 4": (
        "unet",
        {"encoder": "plain", "width": 1, "image_pooling": True, "stage_scores": True, "head_stride": 4},
    ),
    "fcn on convnext": ("fcn", {"encoder": "test_convnext", "head_stride": 32}),
    "unet_paper": ("unet_paper", {"width": 1}),
    "unet_release_paper": ("unet_release_paper", {"width": 1}),
    "segnet": ("segnet", {"encoder": "vgg11_bn", "width": 2}),
    "segnet_paper": ("segnet_paper", {"width": 1}),
    "segnet_basic_paper": ("segnet_basic_paper", {"width": 2}),
    "segnet_basic_paper, bilinear": ("segnet_basic_paper", {"width": 2, "variant": "bilinear"}),
    "segnet_basic_paper, fcn": ("segnet_basic_paper", {"width": 2, "variant": "fcn"}),
    "bayesian_segnet_paper": ("bayesian_segnet_paper", {"width": 1}),
    "bayesian_segnet_basic_paper": ("bayesian_segnet_basic_paper", {"width": 2}),
    "deeplab_v1": ("deeplab_v1", {**TINY, "width": 4}),
    "deeplab_v1_paper": ("deeplab_v1_paper", {"width": 1, "variant": "4x4"}),
    "deeplab_v1_paper, branches": ("deeplab_v1_paper", {"width": 1, "multi_scale": True}),
    "deeplab_v2": ("deeplab_v2", TINY),
    "deeplab_v2_vgg16_paper": ("deeplab_v2_vgg16_paper", {"width": 1}),
    "deeplab_v2_resnet101_paper": ("deeplab_v2_resnet101_paper", {"width": 1, "depth": 50}),
    "deeplab_v3": ("deeplab_v3", {**TINY, "width": 4}),
    "deeplab_v3_paper": ("deeplab_v3_paper", {"width": 1, "depth": 50}),
    "deeplab_v3_torchvision": ("deeplab_v3_torchvision", {"depth": 50}),
    "deeplab_v3plus": ("deeplab_v3plus", {**TINY, "width": 4}),
    "deeplab_v3plus_paper": ("deeplab_v3plus_paper", {"width": 1, "depth": 50}),
}


# One example of each is enough for the time it takes, or because another case has the same layers.
SLOW = {
    "deeplab_v2_resnet101_paper", "deeplab_v3_torchvision", "deeplab_v3_paper", "deeplab_v3plus_paper", "fcn on convnext", "fcn_resnet",
    "fcn8s_atonce_paper", "bayesian_segnet_paper", "bayesian_segnet_basic_paper", "unet_release_paper", "fcn_googlenet_paper",
    "deeplab_v1", "deeplab_v2", "deeplab_v3",
}  # fmt: skip


@torch.no_grad()
def random_model(name: str, **options: object) -> SegmentationModel:
    """With random weights everywhere, statistics of norms too, and logits of about the size of one."""
    torch.manual_seed(0)
    model = build(name, 2, **options).eval()  # type: ignore[arg-type]
    for layer in model.modules():
        if isinstance(layer, nn.Conv2d) and not layer.weight.any():
            nn.init.kaiming_normal_(layer.weight)
        elif isinstance(layer, nn.BatchNorm2d | FrozenBatchNorm):
            layer.running_mean.normal_(0, 0.1)
            layer.running_var.uniform_(0.8, 1.2)
    return model


def bands(model: SegmentationModel) -> int:
    return next(layer for layer in model.encoder.modules() if isinstance(layer, nn.Conv2d)).in_channels


def one_pass(model: SegmentationModel, image: Tensor, aligned: bool) -> Tensor:
    """The whole image through the model at once; mirrored to whole cells first where the model resizes maps."""
    height, width = image.shape[-2:]
    if not aligned:
        return predict_whole(model, image)
    cell, geometry = model.geometry.cell, model.geometry
    sides = [geometry.fit(side) for side in (height, width)]
    sides = [side + (geometry.remainder - side) % cell for side in sides]
    with torch.no_grad():
        return model(mirror_pad(image, 0, sides[0] - height, 0, sides[1] - width)[None])[0, :, :height, :width]


def test_the_whole_catalogue_is_tried():
    assert {name for name, _ in EXACT.values()} == set(MODELS)


def tiny_encoder(name: str, in_channels: int = 3, weights: None = None, output_stride: int | None = None) -> object:
    return timm_encoder("test_resnet", in_channels, weights, output_stride)


@pytest.mark.parametrize("case", EXACT)
def test_whole_equals_tiled(case, monkeypatch, one_thread):
    """To 1e-5 in float32. Images are long and narrow, so that many windows cost little; both orientations are drawn."""
    monkeypatch.setitem(UNITS, 50, (1, 1, 1, 1))  # DeepLab's own ResNets with one unit a block
    for module in ("deeplab_v3", "fcn_resnet"):  # torchvision's layouts, on the small network
        monkeypatch.setattr(sys.modules[f"perpixel.models.{module}"], "timm_encoder", tiny_encoder)
    model = random_model(EXACT[case][0], **EXACT[case][1])
    field = dependency(model)
    assert not field.obstacle

    @settings(max_examples=1 if case in SLOW else 2, deadline=None, phases=[Phase.explicit, Phase.generate])
    @given(st.integers(1, 3), st.integers(0, 4), st.integers(1, 3 * field.cell), st.integers(1, 24), st.booleans(), st.integers(1, 3))
    def check(cells: int, less: int, more: int, short: int, tall: bool, batch: int) -> None:
        tile = cells * field.cell - less % field.cell  # rounded up to whole cells
        long = field.before + field.after + 2 * (tile + field.cell) + more
        size = (long, short) if tall else (short, long)
        image = torch.randn(bands(model), *size)
        assert Tiler(model, tile, "exact", batch).windows(size) > 1
        whole = one_pass(model, image, field.aligned)
        torch.testing.assert_close(predict_tiled(model, image, tile, "exact", batch), whole, rtol=0, atol=1e-5)

    check()


# Narrow models of small fields, for images that take several windows along both axes: unpadded, skips, positions of maxima, resized maps,
# sums of scores at several strides, atrous branches.
SQUARE = [
    "unet_paper", "unet on its own path", "segnet_basic_paper", "segnet_basic_paper, bilinear", "deeplab_v1_paper, branches", "fcn",
    "unet with image pooling, sums of scores, head at stride 4",
]  # fmt: skip


@pytest.mark.parametrize("case", SQUARE)
@given(data=st.data())
@settings(max_examples=3, deadline=None, phases=[Phase.generate], suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_whole_equals_tiled_in_rectangles_of_any_size(case, data, one_thread):
    """To 1e-5 in float32: both sides, tile and batch drawn, so that windows meet at corners and lie at two borders of the image at once."""
    model = random_model(EXACT[case][0], **EXACT[case][1])
    field = dependency(model)
    tile = data.draw(st.integers(1, 3 * field.cell), "tile")
    halo = max(field.before + field.after + tile - field.cell, 0)  # of images a little larger, most take several windows along an axis
    size = tuple(data.draw(st.integers(1, 4 * field.cell), side) + halo for side in ("height", "width"))
    image = torch.randn(bands(model), *size)
    tiled = predict_tiled(model, image, tile, "exact", data.draw(st.integers(1, 3), "batch"))
    torch.testing.assert_close(tiled, one_pass(model, image, field.aligned), rtol=0, atol=1e-5)


@given(st.integers(1, 90), st.integers(1, 90), st.integers(1, 70), st.integers(0, 60), st.integers(1, 3))
@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_the_unpadded_unet_is_the_same_whatever_size_tile_and_stride(unpadded, height, width, tile, overlap, batch):
    """In float64, to rounding: any overlap is exact, for a window labels nothing that its border could have changed."""
    image = torch.randn(1, height, width, dtype=torch.float64)
    tiled = predict_tiled(unpadded, image, tile, min(overlap, tile - 1), batch)
    torch.testing.assert_close(tiled, predict_whole(unpadded, image), rtol=0, atol=1e-12)


@pytest.fixture(scope="module")
def unpadded():
    return random_model("unet_paper", width=1).double()


@pytest.mark.parametrize("case", ["unet on its own path", "segnet", "fcn32s_alexnet_paper"])
@given(data=st.data())
@settings(max_examples=2, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_any_part_is_that_of_the_whole_and_reads_nothing_outside_the_image(case, data, one_thread):
    model = random_model(EXACT[case][0], **EXACT[case][1])
    field = dependency(model)
    size = tuple(field.before + field.after + field.cell + data.draw(st.integers(1, 90)) for _ in range(2))
    image = torch.randn(bands(model), *size)
    top, left = (data.draw(st.integers(0, side - 1)) for side in size)
    height, width = data.draw(st.integers(1, size[0] - top)), data.draw(st.integers(1, size[1] - left))

    def read(first: int, start: int, rows: int, columns: int) -> Tensor:
        assert 0 <= first < first + rows <= size[0]
        assert 0 <= start < start + columns <= size[1]
        return reader(image)(first, start, rows, columns)

    part = Tiler(model, field.cell, "exact").block(read, size, top, left, height, width)
    whole = predict_whole(model, image)[:, top : top + height, left : left + width]
    torch.testing.assert_close(part, whole, rtol=0, atol=1e-5)


class InOrder(TorchFunctionMode):
    """Convolutions as sums over taps and maps in one fixed order; BLAS chooses one by the size of a map and the place in it."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if func is torch.conv2d:
            x, weight, bias = args[:3]
            side = weight.shape[-1]
            height, width = x.shape[-2] - side + 1, x.shape[-1] - side + 1
            total = x.new_zeros(len(x), len(weight), height, width)
            for band, down, right in product(range(x.shape[1]), range(side), range(side)):
                total += x[:, band, None, down : down + height, right : right + width] * weight[:, band, down, right, None, None]
            return total if bias is None else total + bias[:, None, None]
        if func is torch.conv_transpose2d:
            x, weight, bias = args[:3]
            up = x.new_zeros(len(x), weight.shape[1], 2 * x.shape[-2], 2 * x.shape[-1])
            for band, down, right in product(range(x.shape[1]), range(2), range(2)):
                up[..., down::2, right::2] += x[:, band, None] * weight[band, :, down, right, None, None]
            return up + bias[:, None, None]
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("name", ["unet_paper", "unet_release_paper"])
def test_the_unpadded_unet_is_equal_to_the_last_bit_in_float64_where_sums_have_an_order(name, one_thread):
    """arXiv:1505.04597, Fig. 2: nothing is approximated. PyTorch's own convolutions differ by rounding, see the next test."""
    model = random_model(name, width=1).double()
    image = torch.randn(1, 61, 75, dtype=torch.float64)
    tiler = Tiler(model, 16, "exact", batch=2)
    with InOrder():
        whole, tiled = predict_whole(model, image), tiler.block(reader(image), (61, 75), 0, 0, 61, 75)
    assert torch.equal(tiled, whole)
    torch.testing.assert_close(whole, predict_whole(model, image), rtol=1e-12, atol=1e-12)  # it is the same network


def test_the_unpadded_unet_is_equal_to_the_last_bit_in_float64_where_nothing_is_rounded(one_thread):
    """Whole numbers, all far below 2^53, so that PyTorch's own convolutions are exact in whatever order they add."""
    model = random_model("unet_paper", width=2).double()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randint(-1, 2, parameter.shape))
    tiler, largest = Tiler(model, 32, "exact", batch=3), list[float]()
    for layer in model.modules():
        if isinstance(layer, nn.Conv2d | nn.ConvTranspose2d):
            layer.register_forward_hook(lambda _, __, out: largest.append(float(out.abs().max())))
    image = torch.randint(-3, 4, (1, 90, 70)).double()
    whole = predict_whole(model, image)
    assert torch.equal(tiler.block(reader(image), (90, 70), 0, 0, 90, 70), whole)
    assert whole.std() > 100
    assert max(largest) < 2**50


def made_transparent(model: SegmentationModel) -> SegmentationModel:
    """Every dependency shows in gradients: weights above 0, no activation stops, poolings take means, norms do nothing."""
    for parent in list(model.modules()):
        for name, layer in list(parent.named_children()):
            if isinstance(layer, nn.ReLU | nn.BatchNorm2d):
                setattr(parent, name, nn.Identity())
            elif isinstance(layer, nn.MaxPool2d):
                setattr(parent, name, nn.AvgPool2d(layer.kernel_size, layer.stride, layer.padding, layer.ceil_mode))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.full_like(parameter, 1 / parameter[0].numel()))
    return model.double()


@pytest.mark.parametrize("case", ["unet on its own path", "fcn32s_paper", "fcn8s_paper", "fcn_googlenet_paper", "deeplab_v1_paper"])
def test_the_field_is_what_gradients_reach(case, monkeypatch, one_thread):
    """Neither less, which would be wrong, nor more, which would be waste: for the first and last rows of a cell, of all phases."""
    model = random_model(EXACT[case][0], **EXACT[case][1])
    field = dependency(model)
    transparent = made_transparent(model)
    monkeypatch.setattr("torch.nn.functional.local_response_norm", lambda x, *_: x)
    side = model.geometry.fit(2 * (field.before + field.after + field.cell))
    image = torch.zeros(1, bands(model), side, model.geometry.fit(64), dtype=torch.float64, requires_grad=True)
    begin = -(-field.before // field.cell) * field.cell + field.cell
    logits = transparent(image)[0, :, begin : begin + field.cell]
    (seen,) = torch.autograd.grad(logits.sum(), image)
    rows = seen.abs().sum((0, 1, 3)).nonzero().flatten()
    before, after = begin - int(rows[0]), int(rows[-1]) + 1 - begin - field.cell
    assert -(-before // field.cell) * field.cell == field.before
    assert after == field.after


class Spread(nn.Module):
    """Two layers, the second of which is given: (N, 1, H, W) -> (N, 2, H, W)."""

    channels, strides = (1,), (1,)

    def __init__(self, second: nn.Module) -> None:
        super().__init__()
        self.first, self.second = nn.Conv2d(1, 2, 3, padding=1), second

    def forward(self, image: Tensor) -> Features:
        return Features([self.second(self.first(image))])


class Given(nn.Module):
    def forward(self, features: Features, size: tuple[int, int]) -> Tensor:
        return features.maps[0]


class Squeezed(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x * x.mean((2, 3), keepdim=True).sigmoid()


class Positions(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x + torch.arange(x.shape[-1], device=x.device)


class Fixed(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return functional.interpolate(functional.avg_pool2d(x, 2), x.shape[-2:], mode="bilinear", align_corners=True)


class Attention(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        places = x.flatten(2).transpose(1, 2)
        return ((places @ places.transpose(1, 2)).softmax(-1) @ places).transpose(1, 2).reshape(x.shape)


@pytest.mark.parametrize(
    ("layer", "why"),
    [
        (nn.GroupNorm(1, 2), "encoder.second normalises by statistics of the whole image"),
        (nn.InstanceNorm2d(2), "encoder.second"),
        (nn.BatchNorm2d(2, track_running_stats=False), "encoder.second normalises by the statistics of the batch"),
        (Squeezed(), "encoder.second takes a mean over the whole image"),
        (nn.AdaptiveAvgPool2d(4), "encoder.second"),
        (Positions(), "encoder.second adds a table that holds a value for each position"),
        (Fixed(), "encoder.second resizes a map by a factor that changes with the size of the image"),
        (Attention(), "encoder.second"),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, nn.Module) else "",
)
def test_what_can_t_be_exact_is_refused_with_the_layer_and_the_reason(layer, why):
    model = SegmentationModel(Spread(layer), Given(), 2, InputGeometry(multiple=4, minimum=4)).eval()
    with pytest.raises(ValueError, match=f"can't be predicted exactly by parts: {why}"):
        Tiler(model, 64, "exact")
    Tiler(model, 64, 16)  # with a number it is blended


@pytest.mark.parametrize(
    ("name", "options", "why"),
    [
        ("unet", {"encoder": "efficientnet_b0"}, r"encoder\.network\.blocks\.0\.0\.se takes a mean over the whole image"),
        ("unet", {"encoder": "test_vit"}, "encoder"),
        ("deeplab_v3plus", {"encoder": "resnet18", "variant": "smp"}, "decoder resizes a map by a factor that changes with the size"),
    ],
)
def test_models_of_the_catalogue_that_can_t_be_exact_say_why(name, options, why):
    assert re.match(why, dependency(build(name, 2, **options)).obstacle)


def test_a_model_with_a_mean_over_the_image_asks_for_the_first_pass():
    model = random_model("unet", encoder="plain", width=1, image_pooling=True)
    image, size = torch.randn(3, 300, 20), (300, 20)
    tiler = Tiler(model, 16, "exact")
    with pytest.raises(ValueError, match="call prepared"):
        tiler.block(reader(image), size, 0, 0, 8, 8)
    prepared = tiler.prepared(reader(image), size)
    coarsest = model.encoder(mirror_pad(image, 0, 4, 0, 12)[None]).maps[-1]
    torch.testing.assert_close(prepared.mean.float(), coarsest.mean((2, 3), keepdim=True))
    assert tiler.mean is None


def test_the_walk_sees_the_same_in_inference_mode_and_leaves_the_model_as_it_was():
    model = random_model("unet", encoder="plain", width=1).train()
    with torch.inference_mode():
        inside = dependency(model)
    assert inside == dependency(model)
    assert model.training
    assert all(layer.training for layer in model.modules())
    assert all(parameter.device.type == "cpu" for parameter in model.parameters())
