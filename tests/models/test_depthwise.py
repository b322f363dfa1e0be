"""Gradients of depthwise convolutions under bfloat16 autocast on the processor."""

import copy

import pytest
import torch
from torch import nn

from perpixel.models import build
from perpixel.models.depthwise import DepthwiseConv2d, with_safe_gradients


def gradients(network: nn.Module, image: torch.Tensor, bf16: bool) -> dict[str, torch.Tensor]:
    """Of the mean square of what the network gives, computed over memory that holds NaN."""
    network.zero_grad()
    soiled = [torch.full((100_000,), torch.nan) for _ in range(16)]
    del soiled
    with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
        logits = network(image)
    logits.float().square().mean().backward()
    return {name: parameter.grad.clone() for name, parameter in network.named_parameters() if parameter.grad is not None}


@pytest.mark.parametrize(("kernel", "stride", "rate"), [(3, 1, 1), (3, 1, 2), (5, 1, 4), (3, 2, 1), (5, 2, 2)])
def test_gradients_in_bf16_are_those_of_float32_to_its_8_bits(kernel, stride, rate):
    torch.manual_seed(0)
    padding = rate * (kernel // 2)
    layer = nn.Conv2d(32, 32, kernel, stride=stride, padding=padding, dilation=rate, groups=32)
    layer = with_safe_gradients(layer.to(memory_format=torch.channels_last))
    image = torch.randn(2, 32, 40, 40).to(memory_format=torch.channels_last).requires_grad_()
    wanted, wanted_image = gradients(layer, image, bf16=False), image.grad.clone()
    for _ in range(3):
        image.grad = None
        got = gradients(layer, image, bf16=True)
        for name, gradient in wanted.items():
            assert (got[name] - gradient).norm() < 0.02 * gradient.norm()
        assert (image.grad - wanted_image).norm() < 0.02 * wanted_image.norm()


@pytest.mark.parametrize(("model", "encoder"), [("deeplab_v3", "mobilenetv2_100"), ("deeplab_v3plus", "tf_efficientnet_b0")])
def test_gradients_of_an_atrous_model_in_bf16_are_finite_and_repeat_bit_for_bit(model, encoder):
    torch.manual_seed(0)
    network = build(model, 3, encoder, output_stride=8, dropout=0.0).to(memory_format=torch.channels_last).train()
    for layer in network.modules():
        if hasattr(layer, "drop_prob"):
            layer.drop_prob = 0.0
    image = torch.randn(2, 3, 64, 64).to(memory_format=torch.channels_last)
    first, second = gradients(network, image, bf16=True), gradients(network, image, bf16=True)
    assert any(isinstance(layer, DepthwiseConv2d) and max(layer.dilation) > 1 for layer in network.modules())
    assert all(gradient.isfinite().all() for gradient in first.values())
    assert [name for name in first if not torch.equal(first[name], second[name])] == []


@pytest.mark.parametrize("model", ["deeplab_v3", "deeplab_v3plus"])
@pytest.mark.parametrize("encoder", ["mobilenetv2_100", "efficientnet_b0", "tf_efficientnet_b0", "convnext_atto"])
def test_no_dilated_depthwise_convolution_is_left_as_it_was(model, encoder):
    network = build(model, 3, encoder, output_stride=8)
    single = [m for m in network.modules() if isinstance(m, nn.Conv2d) and 1 < m.groups == m.in_channels]
    assert single
    assert [layer for layer in single if type(layer).__module__ != DepthwiseConv2d.__module__] == []


def test_prediction_and_the_names_of_weights_are_untouched():
    torch.manual_seed(0)
    plain = nn.Sequential(nn.Conv2d(3, 8, 1), nn.Conv2d(8, 8, 3, padding=2, dilation=2, groups=8)).eval()
    safe = with_safe_gradients(copy.deepcopy(plain))
    image = torch.randn(1, 3, 20, 20)
    with torch.inference_mode(), torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(plain(image), safe(image))
    assert list(plain.state_dict()) == list(safe.state_dict())
    assert type(copy.deepcopy(safe)[1]) is DepthwiseConv2d
