"""Batch norm whose statistics are not what training needs: freezing it, and measuring it anew."""

from collections.abc import Collection, Iterable

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.modules.batchnorm import _BatchNorm


def batch_norms(module: nn.Module) -> list[_BatchNorm]:
    """Every batch norm in `module`."""
    return [part for part in module.modules() if isinstance(part, _BatchNorm)]


def freeze_batch_norm(module: nn.Module) -> None:
    """Batch norm uses its running statistics and leaves them as they are, until the next call of `train()`."""
    for norm in batch_norms(module):
        norm.eval()


def is_frozen(norm: nn.Module) -> bool:
    """Whether a batch norm belongs to a frozen part: its statistics stay too."""
    return norm.weight is not None and not norm.weight.requires_grad


@torch.no_grad()
def measure_batch_norm(network: nn.Module, batches: Iterable[Tensor], kept: Collection[nn.Module] = ()) -> None:
    """Running statistics of batch norm from one pass: the averages of the batches' means and of their unbiased variances.

    In place of the moving averages that training leaves, which remember the weights of some steps ago.

    Args:
        network: in any mode, which is restored; its layers work as in training, so dropout drops.
        batches: (N, C, H, W), as in training. A variance over m values is multiplied by m / (m - 1).
        kept: the batch norms of it that use their statistics, and keep them.

    Raises:
        ValueError: if there is no batch.

    Source: Ioffe & Szegedy 2015, arXiv:1502.03167, algorithm 2; SegNet's test-time statistics (arXiv:1511.00561) are made just so.
    """
    tracking = (norm for norm in batch_norms(network) if norm.running_mean is not None and norm.num_batches_tracked is not None)
    norms = [norm for norm in tracking if norm not in kept]
    settings = [(norm, norm.momentum) for norm in norms]
    modes = [(layer, layer.training) for layer in network.modules()]
    before = [[buffer.clone() for buffer in norm.buffers()] for norm in norms]
    count = 0
    network.train()
    for norm in kept:
        norm.eval()
    for norm in norms:
        norm.reset_running_stats()
        norm.momentum = None  # PyTorch's word for the average of all batches
    try:
        for batch in batches:
            network(batch)
            count += 1
    finally:
        for norm, momentum in settings:
            norm.momentum = momentum
        for layer, mode in modes:
            layer.training = mode
    for norm, buffers in zip(norms, before, strict=True):
        if not norm.num_batches_tracked:  # no batch reached it, or none with more than one value a channel: what it had is better
            for buffer, old in zip(norm.buffers(), buffers, strict=True):
                buffer.copy_(old)
    if not count:
        raise ValueError("no images to measure batch norm on; give at least one batch")


@torch.no_grad()
def unfold_batch_norm(network: nn.Module, images: Iterable[Tensor]) -> None:
    """Gives batch norm that was folded into a bias the statistics of its real input; in eval mode the network stays the same function.

    A network of folded norms (mean 0, variance 1, scale 1) would be another function the moment it normalises by the statistics
    of a batch. Here the mean m and variance v of each norm's input are measured, and scale and bias take up what they change:
    with s = scale / sqrt(old variance + eps), the new scale is s sqrt(v + eps) and the new bias is bias + s (m - old mean).

    Args:
        network: with norms that have scale and bias; left in eval mode.
        images: batches (N, C, H, W), normalised as in training.
    """
    sums: dict[_BatchNorm, list[Tensor]] = {}

    def gather(norm: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        x = inputs[0].double()  # in float32 the difference of squares below would cancel
        parts = [torch.tensor(x.numel() / x.shape[1], dtype=torch.float64), x.sum((0, 2, 3)), x.square().sum((0, 2, 3))]
        sums[norm] = [old + new for old, new in zip(sums[norm], parts, strict=True)] if norm in sums else parts  # type: ignore[index]

    hooks = [norm.register_forward_pre_hook(gather) for norm in batch_norms(network)]
    network.eval()
    try:
        for batch in images:
            network(batch)
    finally:
        for hook in hooks:
            hook.remove()
    for norm, (count, total, squares) in sums.items():
        if norm.weight is None or norm.running_mean is None or norm.running_var is None:
            continue
        mean = total / count
        variance = (squares / count - mean.square()).clamp_min(1e-8)
        slope = norm.weight.double() / (norm.running_var.double() + norm.eps).sqrt()
        norm.bias.copy_(norm.bias.double() + slope * (mean - norm.running_mean.double()))
        norm.weight.copy_(slope * (variance + norm.eps).sqrt())
        norm.running_mean.copy_(mean)
        norm.running_var.copy_(variance)


class FrozenBatchNorm(nn.Module):
    """Batch norm that always uses its statistics as loaded, and whose scale and bias are not trained: (N, C, H, W) -> (N, C, H, W).

    No batch norm to the rest of the house: nothing sets its mode, measures it anew or synchronises it. Source: `use_global_stats` and
    learning rate 0 in the released DeepLab v2 nets on ResNet-101.
    """

    running_mean: Tensor
    running_var: Tensor

    def __init__(self, channels: int, eps: float = 1e-5) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(channels), requires_grad=False)
        self.bias = nn.Parameter(torch.zeros(channels), requires_grad=False)
        self.register_buffer("running_mean", torch.zeros(channels))
        self.register_buffer("running_var", torch.ones(channels))

    def forward(self, x: Tensor) -> Tensor:
        return functional.batch_norm(x, self.running_mean, self.running_var, self.weight, self.bias, False, 0.0, self.eps)
