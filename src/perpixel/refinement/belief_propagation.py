"""Loopy belief propagation on a pixel grid: neighbours tell each other what each label would cost them.

Source: Pearl 1988; on grids, with the shortcut for Potts costs in time linear in the labels, Felzenszwalb & Huttenlocher 2006,
"Efficient belief propagation for early vision", section 3.1. A message is kept as costs, its smallest entry (min-sum) or minus the
logarithm of its sum (sum-product) subtracted.
"""

from collections.abc import Callable

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from perpixel.refinement.grid_edges import STEPS, ends

Send = Callable[[Tensor, Tensor], Tensor]  # (costs (N, K, ...) of the sender's labels, weights (N, 1, ...)) -> (N, K, ...)
Messages = dict[tuple[int, int], tuple[Tensor, Tensor]]  # step of the edges -> messages to their second and to their first ends


def min_sum(costs: Tensor | None) -> Send:
    """Messages m(l) = min over k of h(k) + w costs[k, l], whose beliefs are min-marginals; `costs` None is Potts."""

    def potts(sender: Tensor, weight: Tensor) -> Tensor:
        return torch.minimum(sender - sender.amin(1, keepdim=True), weight)

    def general(sender: Tensor, weight: Tensor, costs: Tensor) -> Tensor:
        best = sender[:, :1] + weight * _row(costs, 0, weight)
        for k in range(1, costs.shape[0]):
            best = torch.minimum(best, sender[:, k : k + 1] + weight * _row(costs, k, weight))
        return best - best.amin(1, keepdim=True)

    return potts if costs is None else _remade(general, costs)


def sum_product(costs: Tensor | None) -> Send:
    """Messages m(l) = -log of the sum over k of exp(-h(k) - w costs[k, l]), whose beliefs are -log of marginals; `costs` None is Potts."""

    # A label that no sender's label allows would have a message of infinity; it has -log of the smallest normal number: 87 in float32.
    def log_of(x: Tensor) -> Tensor:
        return x.clamp(min=torch.finfo(x.dtype).tiny).log()

    def potts(sender: Tensor, weight: Tensor) -> Tensor:
        belief, other = torch.softmax(-sender, 1), torch.exp(-weight)
        return -log_of(other + (1 - other) * belief)

    def general(sender: Tensor, weight: Tensor, costs: Tensor) -> Tensor:
        belief = torch.softmax(-sender, 1)
        total = belief[:, :1] * torch.exp(-weight * _row(costs, 0, weight))
        for k in range(1, costs.shape[0]):
            total = total + belief[:, k : k + 1] * torch.exp(-weight * _row(costs, k, weight))
        return -log_of(total)

    return potts if costs is None else _remade(general, costs)


def _row(costs: Tensor, k: int, like: Tensor) -> Tensor:
    """(1, K, 1, ...): costs of the label k beside each other."""
    return costs[k].view(1, -1, *[1] * (like.ndim - 2))


def _remade(general: Callable[[Tensor, Tensor, Tensor], Tensor], costs: Tensor) -> Send:
    """`general` with these costs, its K steps done again for the gradient instead of kept: they would be K times the scores each."""

    def send(sender: Tensor, weight: Tensor) -> Tensor:
        if torch.is_grad_enabled() and any(x.requires_grad for x in (sender, weight, costs)):
            made: Tensor = checkpoint(general, sender, weight, costs, use_reentrant=False)
            return made
        return general(sender, weight, costs)

    return send


def _collected(unary: Tensor, messages: Messages) -> Tensor:
    """Beliefs: costs of labels plus all messages that came in."""
    belief = unary.clone()
    for step, (onward, back) in messages.items():
        ends(belief, step)[0].add_(back)
        ends(belief, step)[1].add_(onward)  # a view of its own: one taken before the first addition would miss the messages' gradient
    return belief


def synchronous(unary: Tensor, weights: list[Tensor], send: Send, iterations: int, damping: float) -> Tensor:
    """All messages at once from those of the iteration before.

    Args:
        unary: (N, K, H, W) costs of labels.
        weights: of the edges, from `grid_edges.edge_weights`; not negative.
        send: what a message says, `min_sum(costs)` or `sum_product(costs)`.
        iterations: how often; news travels one pixel in each.
        damping: share of its old value that a message keeps, 0 <= damping < 1.

    Returns:
        (N, K, H, W) beliefs, as costs: the smaller the likelier.
    """
    steps = STEPS[2 * len(weights)]
    messages: Messages = {step: (torch.zeros_like(ends(unary, step)[0]),) * 2 for step in steps}
    for _ in range(iterations):
        belief = _collected(unary, messages)
        renewed = {}
        for step, weight in zip(steps, weights, strict=True):
            (first, second), (onward, back) = ends(belief, step), messages[step]
            # The receiver's own message is taken out of what the sender believes.
            sent = send(first - back, weight), send(second - onward, weight)
            renewed[step] = (torch.lerp(sent[0], onward, damping), torch.lerp(sent[1], back, damping)) if damping else sent
        messages = renewed
    return _collected(unary, messages)


def sweeps(unary: Tensor, weights: list[Tensor], send: Send, iterations: int, damping: float) -> Tensor:
    """Along all columns down, then up, then along all rows, each message from the newest: news crosses the image in one iteration.

    Arguments and result as `synchronous`; 4 neighbours only. On an image of one row or column one iteration is exact.
    Source: Tappen & Freeman 2003, "Comparison of graph cuts with belief propagation for stereo", section 3.1 (accelerated propagation).
    """
    across, down = STEPS[4]
    messages: Messages = {step: (torch.zeros_like(ends(unary, step)[0]),) * 2 for step in STEPS[4]}
    for _ in range(iterations):
        held = _collected(unary, {across: messages[across]})
        messages[down] = _chain(held, weights[1], messages[down], send, damping)
        held = _collected(unary, {down: messages[down]}).mT.contiguous()
        before = messages[across][0].mT, messages[across][1].mT
        onward, back = _chain(held, weights[0].mT.contiguous(), before, send, damping)
        messages[across] = onward.mT, back.mT
    return _collected(unary, messages)


def _chain(held: Tensor, weight: Tensor, before: tuple[Tensor, Tensor], send: Send, damping: float) -> tuple[Tensor, Tensor]:
    """Messages (N, K, H - 1, W) down and up all columns, from what the pixels hold besides those."""
    if held.shape[2] == 1:
        return before
    # unbind and stack: the gradient of one slice of a tensor is as large as the whole tensor.
    pixels, weights = held.unbind(2), weight.unbind(2)

    def pass_along(old: Tensor, backwards: bool) -> Tensor:
        kept, sent = old.unbind(2), list(pixels[:-1])
        message = torch.zeros_like(pixels[0])
        for edge in range(len(weights))[:: -1 if backwards else 1]:
            message = send(pixels[edge + backwards] + message, weights[edge])
            sent[edge] = message = torch.lerp(message, kept[edge], damping) if damping else message
        return torch.stack(sent, 2)

    return pass_along(before[0], False), pass_along(before[1], True)
