"""Alpha-expansion and alpha-beta swap: many pixels change at once, each move the best of its kind by one minimum cut.

Source: Boykov, Veksler & Zabih 2001, "Fast approximate energy minimization via graph cuts". The cut of one move is written as by
Kolmogorov & Zabih 2004, "What energy functions can be minimized via graph cuts?", section 4: no auxiliary pixels.

Labels and weights lie on the framed flat grid of max_flow.py: of D directions, edge k of a pixel is the one in direction 2k.
"""

from typing import NamedTuple

import numpy as np
from numba import njit

from perpixel.refinement.max_flow import FREE, SINK, SOURCE, Flow, frame_index, max_flow, new_flow, new_offsets

# A move counts only if it lowers the energy by more than rounding could: float64 sums of up to 10^8 terms.
LEAST_GAIN = 1e-9


class Problem(NamedTuple):
    """The energy of one image of n framed pixels, K labels and D directions."""

    unary: np.ndarray  # (K, H * W) float: costs of labels
    inside: np.ndarray  # (H * W,) int64: where the image's pixels are in the frame
    weights: np.ndarray  # (D / 2, n) float64: of the edge from a pixel in direction 2k; zero into the frame
    costs: np.ndarray  # (K, K) float64: symmetric label costs, zero diagonal
    offsets: np.ndarray  # (D,) int64, as in max_flow.Flow


def framed(weights: list[np.ndarray], height: int, width: int) -> np.ndarray:
    """(D / 2, n) weights on the framed grid.

    Args:
        weights: of the edges right, down, and with 8 neighbours right-down and left-down, as `grid_edges.edge_weights` lists them
            for one image: each as large as the image less the rows and columns that the edge spans.
    """
    frame = np.zeros((len(weights), height + 2, width + 2))
    for k, weight in enumerate(weights):
        left = 2 if k == 3 else 1  # the edge left-down starts at the second column
        frame[k, 1 : 1 + weight.shape[0], left : left + weight.shape[1]] = weight
    return frame.reshape(len(weights), -1)


@njit(cache=True, nogil=True)
def labelling_energy(problem: Problem, labels: np.ndarray) -> float:
    """Energy of a framed labelling (n,)."""
    total = 0.0
    for number, pixel in enumerate(problem.inside):
        own = labels[pixel]
        total += problem.unary[own, number]
        for k in range(problem.weights.shape[0]):
            weight = problem.weights[k, pixel]
            if weight != 0:
                total += weight * problem.costs[own, labels[pixel + problem.offsets[2 * k]]]
    return total


@njit(cache=True, nogil=True)
def _expansion_network(problem: Problem, labels: np.ndarray, alpha: int, flow: Flow, pixels: np.ndarray) -> int:
    """Fill the network of the move "keep, or take alpha"; how many pixels have the choice. On the source's side a pixel keeps its label."""
    unary, weights, costs, offsets = problem.unary, problem.weights, problem.costs, problem.offsets
    count = 0
    for number, pixel in enumerate(problem.inside):
        own = labels[pixel]
        flow.terminal[pixel], flow.tree[pixel] = 0, FREE
        if own != alpha:
            pixels[count] = pixel
            count += 1
            flow.terminal[pixel] = np.float64(unary[alpha, number]) - np.float64(unary[own, number])
    for pixel in problem.inside:
        own = labels[pixel]
        for k in range(weights.shape[0]):
            other = pixel + offsets[2 * k]
            weight, theirs = weights[k, pixel], labels[other]
            neither, second, first = weight * costs[own, theirs], weight * costs[own, alpha], weight * costs[alpha, theirs]
            # neither + (first - neither) y_p - first y_q + (second + first - neither) (1 - y_p) y_q, where y = 1 takes alpha.
            # A metric makes the last bracket at least 0; what rounding leaves below is no edge.
            flow.residual[pixel, 2 * k], flow.residual[other, 2 * k + 1] = max(second + first - neither, 0.0), 0.0
            if own == alpha or theirs == alpha:
                flow.residual[pixel, 2 * k] = 0.0  # exactly: one of the two takes no part
            if own != alpha:
                flow.terminal[pixel] += first - neither
            if weight != 0 and theirs != alpha:
                flow.terminal[other] -= first
    return count


@njit(cache=True, nogil=True)
def _swap_network(problem: Problem, labels: np.ndarray, pair: tuple[int, int], flow: Flow, members: np.ndarray, pixels: np.ndarray) -> None:
    """Fill the network of the move in which pixels of two labels choose between them anew; on the source's side is the first."""
    unary, weights, costs, offsets = problem.unary, problem.weights, problem.costs, problem.offsets
    first, second = pair
    for place, number in enumerate(members):
        pixel = problem.inside[number]
        pixels[place] = pixel
        terminal = np.float64(unary[second, number]) - np.float64(unary[first, number])
        for direction in range(offsets.size):
            other = pixel + offsets[direction]
            weight = weights[direction // 2, pixel if direction % 2 == 0 else other]
            theirs = labels[other]
            inner = weight != 0 and theirs in pair
            flow.residual[pixel, direction] = weight * costs[first, second] if inner else 0.0
            if not inner:
                terminal += weight * (costs[second, theirs] - costs[first, theirs])
        flow.terminal[pixel] = terminal


@njit(cache=True, nogil=True)
def expand(problem: Problem, labels: np.ndarray, flow: Flow, cycles: int) -> None:
    """Alpha-expansion moves, label after label, until none lowers the energy or so many cycles are done; changes `labels`."""
    classes = problem.unary.shape[0]
    pixels = np.empty(problem.inside.size, np.int64)
    energy, quiet = labelling_energy(problem, labels), 0
    for move in range(cycles * classes):
        if quiet == classes:
            break
        alpha = move % classes
        count = _expansion_network(problem, labels, alpha, flow, pixels)
        max_flow(flow, pixels[:count])
        before = labels.copy()
        for pixel in pixels[:count]:
            if flow.tree[pixel] == SINK:
                labels[pixel] = alpha
        after = labelling_energy(problem, labels)
        quiet += 1
        if after < energy - LEAST_GAIN * max(1.0, abs(energy)):
            energy, quiet = after, 1  # this label has just had its move
        else:
            labels[:] = before


@njit(cache=True, nogil=True)
def _by_label(problem: Problem, labels: np.ndarray, order: np.ndarray) -> np.ndarray:
    """Sort the image's pixels by label into `order`; (K + 1,) where each label starts."""
    starts = np.zeros(problem.unary.shape[0] + 1, np.int64)
    for pixel in problem.inside:
        starts[labels[pixel] + 1] += 1
    starts = np.cumsum(starts)
    place = starts.copy()
    for number, pixel in enumerate(problem.inside):
        order[place[labels[pixel]]] = number
        place[labels[pixel]] += 1
    return starts


@njit(cache=True, nogil=True)
def _members_energy(problem: Problem, labels: np.ndarray, pair: tuple[int, int], members: np.ndarray) -> float:
    """What a swap of two labels can change of the energy, given all pixels that have either."""
    total = 0.0
    for number in members:
        pixel = problem.inside[number]
        own = labels[pixel]
        total += problem.unary[own, number]
        for direction in range(problem.offsets.size):
            other = pixel + problem.offsets[direction]
            weight = problem.weights[direction // 2, pixel if direction % 2 == 0 else other]
            if weight != 0:
                theirs = labels[other]
                share = 0.5 if theirs in pair else 1.0  # an edge between two members is met twice
                total += share * weight * problem.costs[own, theirs]
    return total


@njit(cache=True, nogil=True)
def swap(problem: Problem, labels: np.ndarray, flow: Flow, cycles: int) -> None:
    """Alpha-beta swap moves, pair after pair, until none lowers the energy or so many cycles are done; changes `labels`."""
    classes = problem.unary.shape[0]
    pixels, order = np.empty(problem.inside.size, np.int64), np.empty(problem.inside.size, np.int64)
    quiet, pairs = 0, classes * (classes - 1) // 2
    starts = _by_label(problem, labels, order)
    for _ in range(cycles):
        for first in range(classes):
            for second in range(first + 1, classes):
                if quiet == pairs:
                    return
                quiet += 1
                members = np.concatenate((order[starts[first] : starts[first + 1]], order[starts[second] : starts[second + 1]]))
                if members.size == 0:
                    continue
                then = _members_energy(problem, labels, (first, second), members)
                _swap_network(problem, labels, (first, second), flow, members, pixels)
                max_flow(flow, pixels[: members.size])
                before = labels[pixels[: members.size]].copy()
                for pixel in pixels[: members.size]:
                    labels[pixel] = first if flow.tree[pixel] == SOURCE else second
                    flow.residual[pixel], flow.tree[pixel] = 0, FREE  # the pixels of the next pair may border on these
                now = _members_energy(problem, labels, (first, second), members)
                if now < then - LEAST_GAIN * max(1.0, abs(then)):
                    quiet = 1
                    starts = _by_label(problem, labels, order)
                else:
                    labels[pixels[: members.size]] = before


def posed(unary: np.ndarray, weights: list[np.ndarray], costs: np.ndarray) -> Problem:
    """The problem of one image.

    Args:
        unary: (K, H, W) float costs of labels.
        weights: of the edges, one array per direction, as `framed` takes them; not negative.
        costs: (K, K) symmetric label costs with zero diagonal.
    """
    classes, height, width = unary.shape
    return Problem(
        np.ascontiguousarray(unary.reshape(classes, -1)),
        np.ascontiguousarray(frame_index(height, width).ravel()),
        framed(weights, height, width),
        np.ascontiguousarray(costs, dtype=np.float64),
        new_offsets(width, 2 * len(weights)),
    )


def graph_cut(unary: np.ndarray, weights: list[np.ndarray], costs: np.ndarray, cycles: int, swaps: bool = False) -> np.ndarray:
    """A labelling of low energy, from the best label of each pixel by itself onwards.

    Args:
        unary, weights, costs: as for `posed`; the costs a metric, or with `swaps` a semi-metric (no triangle inequality).
        cycles: the most times that every label, or pair of labels, has its move.
        swaps: alpha-beta swap in place of alpha-expansion.

    Returns:
        (H, W) int64 labels. By expansion the energy is at most twice the lowest times the largest label cost over the smallest.
    """
    problem = posed(unary, weights, costs)
    height, width = unary.shape[1:]
    flow = new_flow(height, width, 2 * len(weights))
    labels = np.zeros(flow.terminal.size, np.int64)
    labels[problem.inside] = unary.argmin(0).ravel()
    (swap if swaps else expand)(problem, labels, flow, cycles)
    found: np.ndarray = labels[problem.inside].reshape(height, width)
    return found
