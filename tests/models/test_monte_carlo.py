"""Monte Carlo dropout against the samples kept one by one."""

import pytest
import torch
from torch import nn

from perpixel.models import build
from perpixel.models.monte_carlo import monte_carlo

SAMPLES = 7


@pytest.fixture
def model():
    torch.manual_seed(0)
    return build("bayesian_segnet_basic_paper", 3, width=4).eval()


@pytest.fixture
def image():
    return torch.randn(2, 3, 21, 18, generator=torch.Generator().manual_seed(1))


def kept_samples(model, image, seed):
    """(samples, N, K, H, W) probabilities, everything in eval mode but dropout."""
    for layer in model.modules():
        if isinstance(layer, nn.Dropout):
            layer.train()
    torch.manual_seed(seed)
    with torch.no_grad():
        samples = torch.stack([model(image).softmax(1) for _ in range(SAMPLES)])
    model.eval()
    return samples.double()


def test_mean_and_variance_are_those_of_all_samples_kept(model, image):
    samples = kept_samples(model, image, seed=5)
    result = monte_carlo(model, image, SAMPLES, seed=5)
    torch.testing.assert_close(result.mean.double(), samples.mean(0), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(result.variance.double(), samples.var(0, correction=0), rtol=1e-4, atol=1e-7)
    torch.testing.assert_close(result.uncertainty, result.variance.mean(1))
    assert (result.uncertainty > 0).any()


def test_the_same_seed_gives_the_same_bits_and_another_seed_others(model, image):
    first, again, other = (monte_carlo(model, image, 3, seed=seed) for seed in (1, 1, 2))
    assert torch.equal(first.mean, again.mean)
    assert torch.equal(first.variance, again.variance)
    assert not torch.equal(first.mean, other.mean)


@pytest.mark.parametrize("training", [False, True])
def test_modes_statistics_and_the_random_state_are_left_as_they_were(model, image, training):
    model.train(training)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    state = torch.get_rng_state()
    monte_carlo(model, image, 2)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert {layer.training for layer in model.modules()} == {training}
    assert torch.equal(torch.get_rng_state(), state)


def test_one_sample_has_no_variance(model, image):
    assert not monte_carlo(model, image, 1).variance.any()


def test_what_cannot_be_sampled_is_refused(model, image):
    with pytest.raises(ValueError, match="samples is 0"):
        monte_carlo(model, image, 0)
    with pytest.raises(ValueError, match="has no dropout, so samples would all be the same"):
        monte_carlo(build("segnet_basic_paper", 3, width=2), image, 2)
