"""overlap="exact": parts of an image are predicted as one pass over the whole image predicts them, or refused with the reason."""

from collections.abc import Callable
from itertools import pairwise

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional
from torch.overrides import TorchFunctionMode

from perpixel.models import MODELS, build
from perpixel.models.batch_norm import FrozenBatchNorm
from perpixel.models.dependency import dependency
from perpixel.models.model import SegmentationModel
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
    "unet on convnext": ("unet", {"encoder": "test_convnext"}),
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


@pytest.mark.parametrize("case", EXACT)
def test_whole_equals_tiled(case, monkeypatch, one_thread):
    """To 1e-5 in float32. Images are long and narrow, so that many windows cost little; both orientations are drawn."""
    monkeypatch.setitem(UNITS, 50, (1, 1, 1, 1))  # DeepLab's own ResNets with one unit a block
    model = random_model(EXACT[case][0], **EXACT[case][1])
    field = dependency(model)
    assert not field.obstacle

    @settings(max_examples=3, deadline=None, suppress_health_check=list(HealthCheck))
    @given(
        tile=st.integers(1, 3), more=st.integers(1, 3 * field.cell), short=st.integers(1, 40), tall=st.booleans(), batch=st.integers(1, 3)
    )
    def check(tile: int, more: int, short: int, tall: bool, batch: int) -> None:
        tile = tile * field.cell - more % min(field.cell, 5)  # rounded up to whole cells
        long = field.before + field.after + 2 * (tile + field.cell) + more
        image = torch.randn(bands(model), *((long, short) if tall else (short, long)))
        tiler = Tiler(model, tile, "exact", batch)
        assert len(tiler._lattice(long).cuts) > 1
        whole = one_pass(model, image, field.aligned)
        torch.testing.assert_close(predict_tiled(model, image, tile, "exact", batch), whole, rtol=0, atol=1e-5)

    check()
