"""What no labelling of a grid can cost less than: the energy shared out among chains, each solved exactly.

Source: Wainwright, Jaakkola & Willsky 2005 (tree-reweighted bound); raised without ever falling by the sequential scheme of Kolmogorov
2006, "Convergent tree-reweighted message passing for energy minimization", section 3.4, Fig. 3. Written from the paper. Chains follow
the order of reading, so that a pass is one walk over the image; a pixel is in as many as it has edges onwards, or backwards if more.
"""

import numpy as np
from numba import njit

from perpixel.refinement.expansion import Problem


@njit(cache=True, nogil=True)
def _send(sender: np.ndarray, share: float, message: np.ndarray, weight: float, costs: np.ndarray, potts: bool) -> float:
    """Renew one message in place from the opposite one it holds: least over k of share * sender(k) - message(k) + weight costs[k, l].

    Its smallest entry is subtracted and returned.
    """
    classes = message.size
    rest = share * sender - message
    least = rest.min()
    if potts:
        for label in range(classes):
            message[label] = min(rest[label] - least, weight)
        return least
    for label in range(classes):
        best = np.inf
        for k in range(classes):
            best = min(best, rest[k] + weight * costs[k, label])
        message[label] = best
    least = message.min()
    message -= least
    return least


@njit(cache=True, nogil=True)
def _pass(problem: Problem, messages: np.ndarray, potts: bool, backwards: bool) -> float:
    """One walk over the image, in the order of reading or against it. Walked backwards, what is returned bounds the energy from below."""
    weights, offsets = problem.weights, problem.offsets
    kinds = weights.shape[0]
    belief = np.empty(problem.unary.shape[0])
    bound = 0.0
    for turn in range(problem.inside.size):
        number = problem.inside.size - 1 - turn if backwards else turn
        pixel = problem.inside[number]
        belief[:] = problem.unary[:, number]
        onward, back = 0, 0
        for k in range(kinds):
            before = pixel - offsets[2 * k]
            if weights[k, pixel] != 0:
                belief += messages[pixel, k]
                onward += 1
            if weights[k, before] != 0:
                belief += messages[before, k]
                back += 1
        share = 1.0 / max(onward, back, 1)
        least = belief.min()
        belief -= least
        bound += least
        for k in range(kinds):
            start = pixel - offsets[2 * k] if backwards else pixel
            if weights[k, start] != 0:
                bound += _send(belief, share, messages[start, k], weights[k, start], problem.costs, potts)
    return bound


@njit(cache=True, nogil=True)
def lower_bound(problem: Problem, potts: bool, iterations: int) -> float:
    """A bound that rises with the iterations; on an image of one row or column, or with two labels in the limit, the lowest energy itself.

    Args:
        problem: as for graph cuts; any symmetric label costs. The messages take 8 bytes per pixel, label and two directions.
        potts: whether `problem.costs` is 1 off the diagonal: time then grows with the labels, not with their square.
        iterations: walks over the image there and back, at least 1.
    """
    messages = np.zeros((problem.weights.shape[1], problem.weights.shape[0], problem.unary.shape[0]))
    bound = -np.inf
    for _ in range(iterations):
        _pass(problem, messages, potts, False)
        bound = max(bound, _pass(problem, messages, potts, True))
    return bound
