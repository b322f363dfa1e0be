"""Batch norm: freezing it, and giving norms that were folded away the statistics of their real input."""

import copy

import numpy as np
import pytest
import timm
import torch
from torch import nn

from perpixel.models.batch_norm import batch_norms, freeze_batch_norm, unfold_batch_norm

EPS = 1e-3


def folded_network() -> nn.Sequential:
    """Three convolutions whose norms are folded: mean 0, variance 1 - eps, scale 1, and the shift that is left of them."""
    torch.manual_seed(0)
    layers: list[nn.Module] = []
    for channels_in, channels_out in ((3, 6), (6, 8), (8, 4)):
        norm = nn.BatchNorm2d(channels_out, eps=EPS)
        norm.running_var.fill_(1 - EPS)
        nn.init.normal_(norm.bias)
        convolution = nn.Conv2d(channels_in, channels_out, 3, padding=1, bias=False)
        nn.init.normal_(convolution.weight, std=0.5)
        layers += [convolution, norm, nn.ReLU()]
    return nn.Sequential(*layers)


@pytest.fixture
def images() -> list[torch.Tensor]:
    """Batches of different sizes, far from mean 0 and deviation 1."""
    rng = torch.Generator().manual_seed(1)
    return [3 * torch.randn(n, 3, side, side, generator=rng) + 1 for n, side in ((1, 12), (3, 8), (2, 10))]


def inputs_of_norms(network: nn.Sequential, images: list[torch.Tensor]) -> list[np.ndarray]:
    """Every value (C, all pixels of all images) that each norm sees in eval mode, float64, layer by layer."""
    exact = copy.deepcopy(network).double().eval()
    seen: list[list[np.ndarray]] = [[] for _ in batch_norms(network)]
    for batch in images:
        x, count = batch.double(), 0
        for layer in exact:
            if isinstance(layer, nn.BatchNorm2d):
                seen[count].append(x.detach().numpy().transpose(1, 0, 2, 3).reshape(x.shape[1], -1))
                count += 1
            x = layer(x)
    return [np.concatenate(parts, axis=1) for parts in seen]


def difference(first: torch.Tensor, second: torch.Tensor) -> float:
    """Relative root mean square difference."""
    return float((first - second).norm() / second.norm())


def test_unfolding_leaves_the_eval_function_as_it_was(images):
    network = folded_network().eval()
    before = [network(batch) for batch in images]
    unfold_batch_norm(network, images)
    assert not network.training
    for batch, expected in zip(images, before, strict=True):
        torch.testing.assert_close(network(batch), expected, rtol=1e-4, atol=1e-4)


def test_after_unfolding_running_statistics_are_those_of_all_pixels_by_brute_force(images):
    network = folded_network()
    seen = inputs_of_norms(network, images)
    unfold_batch_norm(network, images)
    for norm, values in zip(batch_norms(network), seen, strict=True):
        np.testing.assert_allclose(norm.running_mean.numpy(), values.mean(axis=1), rtol=1e-4, atol=1e-5)
        np.testing.assert_allclose(norm.running_var.numpy(), values.var(axis=1), rtol=1e-4)


def test_in_train_mode_an_unfolded_network_is_nearly_the_function_that_a_folded_one_is_far_from():
    rng = torch.Generator().manual_seed(2)
    measured, batch = (3 * torch.randn(40, 3, 10, 10, generator=rng) + 1 for _ in range(2))
    network = folded_network()
    unfolded = copy.deepcopy(network)
    unfold_batch_norm(unfolded, measured.split(8))
    with torch.no_grad():
        expected = copy.deepcopy(network).eval()(batch)
        assert difference(network.train()(batch), expected) > 0.5
        assert difference(unfolded.train()(batch), expected) < 0.05


def test_statistics_of_a_large_mean_and_a_small_spread_do_not_cancel():
    """E[x^2] - E[x]^2 loses seven digits here in float32."""
    network = nn.Sequential(nn.BatchNorm2d(2))
    images = [1000 + 0.5 * torch.randn(4, 2, 32, 32, generator=torch.Generator().manual_seed(n)) for n in range(3)]
    unfold_batch_norm(network, images)
    values = torch.cat(images).double().numpy().transpose(1, 0, 2, 3).reshape(2, -1)
    np.testing.assert_allclose(network[0].running_var.numpy(), values.var(axis=1), rtol=1e-3)


def test_a_network_of_timm_is_unfolded_just_so():
    torch.manual_seed(0)
    network = timm.create_model("mobilenetv2_050", features_only=True, pretrained=False).eval()
    for norm in batch_norms(network):
        norm.running_var.fill_(1 - norm.eps)
        nn.init.normal_(norm.bias, std=0.3)
    image = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        before = network(image)
        unfold_batch_norm(network, [image])
        after = network(image)
    assert any((norm.running_mean != 0).any() for norm in batch_norms(network))
    for first, second in zip(after, before, strict=True):
        torch.testing.assert_close(first, second, rtol=1e-3, atol=1e-4)


def test_no_hook_stays_behind_even_where_an_image_fails():
    network = folded_network()
    with pytest.raises(RuntimeError):
        unfold_batch_norm(network, [torch.randn(1, 5, 8, 8)])
    assert all(not norm._forward_pre_hooks for norm in batch_norms(network))


def test_a_frozen_norm_neither_follows_nor_uses_the_batch(images):
    network = folded_network().train()
    state = copy.deepcopy(network.state_dict())
    expected = copy.deepcopy(network).eval()(images[0])
    freeze_batch_norm(network)
    torch.testing.assert_close(network(images[0]), expected)
    assert all(torch.equal(value, state[name]) for name, value in network.state_dict().items())
    network.train()
    network(images[0])
    assert not torch.equal(network[1].running_mean, state["1.running_mean"])
