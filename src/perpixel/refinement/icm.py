"""Iterated conditional modes: every pixel takes the label that is cheapest given its neighbours, one quarter of the pixels at a time.

Source: Besag 1986, "On the statistical analysis of dirty pictures"; coding sets after Besag 1974. A quarter is the pixels of even or odd
row and even or odd column: none is another's neighbour, even of 8, so the energy never rises.
"""

import itertools

import torch
from torch import Tensor

from perpixel.refinement.grid_edges import STEPS, ends


def neighbour_costs(labels: Tensor, weights: list[Tensor], costs: Tensor) -> Tensor:
    """What each label would cost at each pixel, given the labels of its neighbours.

    Args:
        labels: (N, H, W) int64.
        weights: of the edges, from `grid_edges.edge_weights`.
        costs: (K, K) symmetric label costs.

    Returns:
        (N, K, H, W): sum over the neighbours q of w_pq costs[l, x_q].
    """
    batch, height, width = labels.shape
    total = costs.new_zeros(batch, costs.shape[0], height, width)
    for step, weight in zip(STEPS[2 * len(weights)], weights, strict=True):
        here, there = ends(labels, step)
        first, second = ends(total, step)
        first += weight * costs[:, there].movedim(0, 1)
        second += weight * costs[:, here].movedim(0, 1)
    return total


def _framed(weights: list[Tensor], shape: tuple[int, int, int]) -> list[tuple[tuple[int, int], Tensor]]:
    """(step, weight (N, H + 2, W + 2)) of the edges from each pixel, in all 4 or 8 directions; 0 where there is no neighbour."""
    batch, height, width = shape
    found = []
    for step, weight in zip(STEPS[2 * len(weights)], weights, strict=True):
        both = weight.new_zeros(2, batch, height, width)
        for side, view in enumerate(ends(both, step)):
            view[side] = weight[:, 0]
        there, back = torch.nn.functional.pad(both, (1, 1, 1, 1))
        found += [(step, there), ((-step[0], -step[1]), back)]
    return found


def icm(unary: Tensor, weights: list[Tensor], costs: Tensor, sweeps: int) -> Tensor:
    """A labelling that no change of one pixel makes cheaper, or what so many sweeps came to.

    Args:
        unary: (N, K, H, W) costs of labels.
        weights: of the edges, from `grid_edges.edge_weights`; not negative.
        costs: (K, K) symmetric label costs with zero diagonal.
        sweeps: the most times that every pixel has its turn.

    Returns:
        (N, H, W) int64 labels.
    """
    batch, _, height, width = unary.shape
    labels = torch.nn.functional.pad(unary.argmin(1), (1, 1, 1, 1))
    edges = _framed(weights, (batch, height, width))
    for _ in range(sweeps):
        changed = False
        for top, left in itertools.product(range(min(2, height)), range(min(2, width))):
            cost = unary[:, :, top::2, left::2].clone()
            for (rows, columns), weight in edges:
                turn = weight[:, None, 1 + top : 1 + height : 2, 1 + left : 1 + width : 2]
                theirs = labels[:, 1 + top + rows : 1 + height + rows : 2, 1 + left + columns : 1 + width + columns : 2]
                cost += turn * costs[:, theirs].movedim(0, 1)
            own = labels[:, 1 + top : 1 + height : 2, 1 + left : 1 + width : 2]
            lowest, best = cost.min(1)
            moves = lowest < cost.gather(1, own[:, None])[:, 0]  # at equal cost a pixel stays, or sweeps would never end
            changed |= bool(moves.any())
            own[moves] = best[moves]
        if not changed:
            break
    return labels[:, 1:-1, 1:-1]
