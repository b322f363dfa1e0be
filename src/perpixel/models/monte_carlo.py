"""Monte Carlo dropout: how sure a model with dropout is. Source: Kendall et al. 2015, arXiv:1511.02680, sec. 3."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.modules.dropout import _DropoutNd

from perpixel.models.model import SegmentationModel


class MonteCarlo(NamedTuple):
    """What the samples say of each pixel; (..., K, H, W) each.

    Attributes:
        mean: of the class probabilities over the samples.
        variance: of the class probabilities over the samples, divided by their number.
    """

    mean: Tensor
    variance: Tensor

    @property
    def uncertainty(self) -> Tensor:
        """(..., H, W) mean of the variance over the classes."""
        return self.variance.mean(-3)


@torch.inference_mode()
def monte_carlo(
    model: SegmentationModel,
    image: Tensor,
    samples: int,
    seed: int = 0,
    predict: Callable[[SegmentationModel, Tensor], Tensor] | None = None,
) -> MonteCarlo:
    """Mean and variance of class probabilities over forward passes with dropout on and everything else, batch norm too, as in prediction.

    Args:
        model: with dropout somewhere; its modes are restored.
        image: as `model` or `predict` takes it, e.g. (N, C, H, W).
        samples: forward passes; the paper needs about 6 to beat weight averaging and takes 50.
        seed: of the dropout masks. The same seed gives the same result on the same machine; PyTorch's own random state is left alone.
        predict: (model, image) -> logits (..., K, H, W); None calls the model.

    Returns:
        float32 (float64 where the logits are) sums that run along, so memory does not grow with `samples`.

    Raises:
        ValueError: if the model has no dropout, or `samples` is less than 1.
    """
    if samples < 1:
        raise ValueError(f"samples is {samples}; Monte Carlo dropout needs at least 1")
    drops = active_dropouts(model)
    mean = squares = torch.zeros(())
    # torch.manual_seed seeds every device, so the state of every one is kept.
    with torch.random.fork_rng(), _only(drops, model):
        torch.manual_seed(seed)
        for number in range(1, samples + 1):
            logits = model(image) if predict is None else predict(model, image)
            probabilities = logits.to(torch.promote_types(logits.dtype, torch.float32)).softmax(-3)
            if number == 1:
                mean, squares = torch.zeros_like(probabilities), torch.zeros_like(probabilities)
            # Welford's update: a difference of sums of squares would cancel where all samples agree.
            before = probabilities - mean
            mean += before / number
            squares += before * (probabilities - mean)
    return MonteCarlo(mean, squares / samples)


def active_dropouts(model: nn.Module) -> list[nn.Module]:
    """The dropout layers of a model that drop anything; ValueError where there is none."""
    drops: list[nn.Module] = [layer for layer in model.modules() if isinstance(layer, _DropoutNd) and layer.p > 0]
    if not drops:
        raise ValueError(
            "this model has no dropout, so samples would all be the same; leave samples out, or train one that has, "
            "e.g. bayesian_segnet_paper, or another with model.options.dropout"
        )
    return drops


@contextmanager
def _only(drops: list[nn.Module], model: nn.Module) -> Iterator[None]:
    """Nothing but `drops` in training mode, for a while."""
    modes = [(layer, layer.training) for layer in model.modules()]
    model.eval()
    for layer in drops:
        layer.train()
    try:
        yield
    finally:
        for layer, mode in modes:
            layer.training = mode
