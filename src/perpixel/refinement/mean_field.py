"""Mean-field inference of dense CRFs in torch operations: batches, any device, gradients.

Source: Krähenbühl & Koltun, "Efficient Inference in Fully Connected CRFs with Gaussian Edge Potentials", NIPS 2011, arXiv:1210.5644.
Everything here is pixel by pixel: (N * P, K) rows of N images with P pixels each, one column per label.
"""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Pairwise:
    """What one Gaussian kernel adds to the energy of a pixel: its neighbours' labels, filtered, and what they cost.

    `transform` is the cost of label l beside label l': a number or a (K,) diagonal where only like labels matter (negative: a reward), or
    a (K, K) matrix.
    """

    filter: Callable[[Tensor], Tensor]
    transform: Tensor

    def __call__(self, q: Tensor) -> Tensor:
        near = self.filter(q)
        return near @ self.transform.T if self.transform.ndim == 2 else near * self.transform


def message(q: Tensor, pairwise: list[Pairwise]) -> Tensor:
    """(N * P, K) expected cost of each label at each pixel, given the marginals of all, its own included as everywhere."""
    return sum((term(q) for term in pairwise), torch.zeros_like(q))


def mean_field(
    unary: Tensor, pairwise: list[Pairwise], iterations: int, images: int, damping: float = 1.0, tolerance: float = 0.0
) -> Iterator[Tensor]:
    """The logarithms of the marginals at the start, softmax(-unary), and after every iteration: (N * P, K) each.

    Args:
        unary: (N * P, K) energies.
        pairwise: the kernels.
        iterations: how many at most; all pixels change at once.
        images: N.
        damping: new marginals are damping * updated + (1 - damping) * old; 1 is the update of the paper.
        tolerance: an image is left alone once none of its marginals moved by as much; 0 goes on to the last iteration.
    """
    log_q = (-unary).log_softmax(1)
    yield log_q
    moving = torch.ones(images, dtype=torch.bool, device=unary.device)
    for _ in range(iterations):
        q = log_q.exp()
        updated = (-unary - message(q, pairwise)).log_softmax(1)
        if damping < 1:
            updated = torch.logaddexp(updated + math.log(damping), log_q + math.log1p(-damping))
        if tolerance > 0:
            updated = torch.where(moving.repeat_interleave(len(q) // images)[:, None], updated, log_q)
            moving = (updated.detach().exp() - q.detach()).abs().view(images, -1).amax(1) >= tolerance
        log_q = updated
        yield log_q
        if tolerance > 0 and not moving.any():
            return


def free_energy(log_q: Tensor, unary: Tensor, pairwise: list[Pairwise], images: int) -> Tensor:
    """(N,) KL divergence of the marginals from the model, less the constant log Z: what mean field wants small.

    Every pair of pixels counts once, so that the sum over all ordered pairs is halved.
    """
    q = log_q.exp()
    return (q * (log_q + unary + 0.5 * message(q, pairwise))).view(images, -1).sum(1)
