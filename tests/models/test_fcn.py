"""FCN on any encoder, and torchvision's FCN on a dilated ResNet."""

import pytest
import torch
from torch import nn
from torch.nn import functional
from torchvision import models as torchvision_models

from perpixel.models import build, fcn, fcn8s_paper, fcn32s_alexnet_paper, fcn_resnet
from perpixel.models.model import SupervisedDecoder
from perpixel.models.torchvision_trunks import GoogLeNetPath
from perpixel.train import train


@pytest.mark.parametrize("encoder", ["resnet18", "googlenet"])  # all others: test_grid.py
@pytest.mark.parametrize("head_stride", [32, 16, 8])
def test_the_head_s_stride_is_that_of_the_finest_map_scored(encoder, head_stride):
    with torch.device("meta"):
        model = fcn(7, encoder, in_channels=5, head_stride=head_stride)
        assert model(torch.zeros(2, 5, 97, 131)).shape == (2, 7, 97, 131)
        assert len(model.decoder.scores) == {32: 1, 16: 2, 8: 3}[head_stride]


def test_scores_are_summed_from_coarse_to_fine():
    torch.manual_seed(0)
    model = fcn(3, "mobilenetv3_small_050").eval()
    for score in model.decoder.scores:
        nn.init.normal_(score.weight, std=0.01)
    image = torch.randn(1, 3, 97, 131)
    with torch.no_grad():
        maps = model.encoder(functional.pad(image, (0, 29, 0, 31), mode="replicate")).maps  # to whole cells of 32 pixels
        coarse, middle, fine = (score(maps[i]) for score, i in zip(model.decoder.scores, (4, 3, 2), strict=True))
        total = functional.interpolate(coarse, middle.shape[-2:], mode="bilinear") + middle
        total = functional.interpolate(total, fine.shape[-2:], mode="bilinear") + fine
        torch.testing.assert_close(model(image), functional.interpolate(total, (128, 160), mode="bilinear")[..., :97, :131])


def test_training_starts_from_a_cost_of_log_k():
    logits = fcn(8, "mobilenetv3_small_050")(torch.randn(2, 3, 64, 64))
    cost = functional.cross_entropy(logits, torch.randint(0, 8, (2, 64, 64)))
    torch.testing.assert_close(cost, torch.tensor(8.0).log())


@pytest.mark.parametrize("make", [lambda: fcn(3, "mobilenetv3_small_050"), lambda: fcn_resnet(3, 18)])
def test_a_batch_of_one_smallest_image_trains_every_parameter(make):
    torch.manual_seed(0)
    model = make().train()
    for score in getattr(model.decoder, "scores", []):
        nn.init.normal_(score.weight)  # zero scores would pass no gradient to the encoder at the first step
    side = model.geometry.minimum
    sum(logits.square().mean() for logits in model.supervised(torch.randn(1, 3, side, side))).backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())


@pytest.mark.parametrize(
    "make",
    [
        lambda: fcn(3, "mobilenetv3_small_050"),
        lambda: fcn8s_paper(3, width=2, dropout=0.0),
        lambda: fcn32s_alexnet_paper(3, width=6, dropout=0.0),
    ],
)
def test_bfloat16_autocast_and_channels_last_give_nearly_the_same_logits_in_float32(make):
    torch.manual_seed(0)
    model = make().to(memory_format=torch.channels_last).eval()
    for layer in model.decoder.modules():
        if isinstance(layer, nn.Conv2d):
            nn.init.normal_(layer.weight, std=0.1)
    image = torch.randn(2, 3, 97, 131).contiguous(memory_format=torch.channels_last)
    with torch.autocast("cpu", torch.bfloat16):
        low = model(image)
    assert low.dtype == torch.float32
    low.square().mean().backward()
    assert (low - model(image)).norm() < 0.1 * low.norm()


@pytest.mark.parametrize("head_stride", [0, 64, -8, 7])
def test_a_head_stride_that_cannot_be_is_refused(head_stride):
    with (
        torch.device("meta"),
        pytest.raises(ValueError, match=r"must be a power of two from 1 to 32, the encoder's coarsest stride. .* 2, 4, 8, 16, 32"),
    ):
        fcn(2, "resnet18", head_stride=head_stride)


def test_illegal_options_are_refused_with_what_is_legal():
    with pytest.raises(ValueError, match="depth is 20; a ResNet has 18, 34, 50, 101 or 152"):
        fcn_resnet(2, 20)
    with pytest.raises(ValueError, match="output_stride is 4; it must be 8, 16 or 32"):
        fcn_resnet(2, 50, output_stride=4)
    with pytest.raises(ValueError, match="width 8; need at least 1 band, and a width that is a multiple of 6"):
        fcn32s_alexnet_paper(2, width=8)
    with pytest.raises(ValueError, match="no library offers CaffeNet's weights"):
        fcn32s_alexnet_paper(2, width=6, encoder_weights=True)
    with pytest.raises(ValueError, match="model 'fcn32s_paper' has no option 'learn_upsampling'"):
        build("fcn32s_paper", 2, learn_upsampling=True)


@pytest.mark.parametrize(("depth", "parameters"), [(50, 35_322_218), (101, 54_314_346)])
def test_fcn_resnet_has_as_many_parameters_as_torchvision_publishes(depth, parameters):
    """With auxiliary head, for 21 classes: torchvision's model cards."""
    with torch.device("meta"):
        model = fcn_resnet(21, depth)
        assert sum(p.numel() for p in model.parameters()) == parameters
        assert model.encoder.strides == [2, 4, 8, 8, 8]
        assert isinstance(model.decoder, SupervisedDecoder)
        assert model.loss_weights == (1.0, 0.5)
        assert [tuple(logits.shape) for logits in model.supervised(torch.zeros(1, 3, 97, 131))] == [(1, 21, 97, 131)] * 2


def test_googlenet_s_last_map_is_that_of_torchvision_s_classifier():
    torch.manual_seed(0)
    whole = torchvision_models.GoogLeNet(aux_logits=True, transform_input=True, init_weights=False).eval()
    path = GoogLeNetPath().eval()
    path.load_classifier(whole.state_dict())
    seen = []
    whole.inception5b.register_forward_hook(lambda layer, inputs, output: seen.append(output))
    image = torch.randn(1, 3, 97, 131)
    with torch.inference_mode():
        whole(image)
        maps = path(image).maps
    torch.testing.assert_close(maps[-1], seen[0])
    assert [m.shape[1] for m in maps] == path.channels
    assert [m.shape[-2] for m in maps] == [49, 24, 12, 6, 3]  # its poolings round up, and pad nothing


def test_weights_of_another_network_are_no_googlenet():
    with pytest.raises(ValueError, match=r"not the weights of torchvision's googlenet: it lacks conv1\.conv\.weight"):
        GoogLeNetPath().load_classifier({})


def test_stages_follow_one_another_from_bundle_to_bundle(sample_set, tmp_path):
    start = None
    for name in ("fcn32s_paper", "fcn16s_paper", "fcn8s_paper"):
        weights = "null" if start is None else str(start)
        settings = ["model.options={width: 1}", f"model.encoder_weights={weights}", "train.crop=[64, 64]", "train.validations=1"]
        train(sample_set / "images", sample_set / "masks", out=tmp_path / name, recipe=name, steps=1, settings=settings)
        start = tmp_path / name / "last.safetensors"
    assert start.exists()
