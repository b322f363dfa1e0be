"""Maximum flow on a pixel grid, by search trees that grow from both terminals and are mended instead of rebuilt.

Source: Boykov & Kolmogorov 2004, "An experimental comparison of min-cut/max-flow algorithms for energy minimization in vision",
section 3: growth, augmentation, adoption, and the distance marks of section 3.2.3. Written from the paper.

The grid is flat and framed by one row and column of pixels on every side, so that a neighbour is a fixed offset away and nothing asks
whether it exists: capacities into the frame are zero. Edges are not stored; direction 2k and direction 2k + 1 are each other's reverse.
"""

from typing import NamedTuple

import numpy as np
from numba import njit

FREE, SOURCE, SINK = 0, 1, 2  # of which tree a pixel is
ROOT, ORPHAN = -1, -2  # in place of the direction towards the parent


class Flow(NamedTuple):
    """A network on a framed grid of n pixels with D directions, and the state of its search trees."""

    terminal: np.ndarray  # (n,) float64: what is left of the capacity from the source if positive, minus that to the sink if negative
    residual: np.ndarray  # (n, D) float64: what is left of the capacity from a pixel in each direction; zero out of and into other pixels
    offsets: np.ndarray  # (D,) int64: from a pixel to its neighbour; offsets[d ^ 1] == -offsets[d]
    tree: np.ndarray  # (n,) int8; FREE wherever a pixel takes no part
    parent: np.ndarray  # (n,) int8: direction towards the parent, ROOT or ORPHAN
    distance: np.ndarray  # (n,) int32: edges to the terminal, right if `stamp` is new, else a guess
    stamp: np.ndarray  # (n,) int32: number of the augmentation after which `distance` was last known to be right
    queued: np.ndarray  # (n,) int8: whether a pixel waits to grow


def new_offsets(width: int, neighbours: int) -> np.ndarray:
    """(D,) int64 from a pixel to its neighbours right, left, down, up; and with 8, right-down, left-up, left-down, right-up."""
    row = width + 2
    return np.array([1, -1, row, -row, row + 1, -row - 1, row - 1, 1 - row][:neighbours])


def new_flow(height: int, width: int, neighbours: int) -> Flow:
    """An empty network on the framed grid of an image of height x width pixels; `frame_index` says where its pixels are."""
    size = (height + 2) * (width + 2)
    marks = [np.zeros(size, dtype) for dtype in (np.int8, np.int8, np.int32, np.int32, np.int8)]
    return Flow(np.zeros(size), np.zeros((size, neighbours)), new_offsets(width, neighbours), *marks)


def frame_index(height: int, width: int) -> np.ndarray:
    """(height, width) int64: where each pixel of the image is in the flat framed grid."""
    found: np.ndarray = np.arange((height + 2) * (width + 2)).reshape(height + 2, width + 2)[1:-1, 1:-1]
    return found


@njit(cache=True, nogil=True)
def _augment(flow: Flow, pixel: int, direction: int, orphans: np.ndarray) -> tuple[float, int]:
    """Push what fits through the path root - pixel - neighbour in this direction - other root; the flow, and how many orphans it left."""
    terminal, residual, offsets, parent = flow.terminal, flow.residual, flow.offsets, flow.parent
    start, end = pixel, pixel + offsets[direction]
    push = residual[start, direction]
    here = start
    while parent[here] != ROOT:
        towards = parent[here]
        here += offsets[towards]
        push = min(push, residual[here, towards ^ 1])
    push = min(push, terminal[here])
    here = end
    while parent[here] != ROOT:
        push = min(push, residual[here, parent[here]])
        here += offsets[parent[here]]
    push = min(push, -terminal[here])

    count = 0
    residual[start, direction] -= push
    residual[end, direction ^ 1] += push
    for first in (start, end):
        here = first
        while parent[here] != ROOT:
            towards = parent[here]
            above = here + offsets[towards]
            # Flow runs from the source's root down to `start`, and from `end` up to the sink's root.
            tail, out, head = (above, towards ^ 1, here) if first == start else (here, towards, above)
            residual[tail, out] -= push
            residual[head, out ^ 1] += push
            if residual[tail, out] == 0:
                parent[here] = ORPHAN
                orphans[count] = here
                count += 1
            here = above
        terminal[here] += -push if first == start else push
        if terminal[here] == 0:
            parent[here] = ORPHAN
            orphans[count] = here
            count += 1
    return push, count


@njit(cache=True, nogil=True)
def _distance(flow: Flow, pixel: int, clock: int) -> int:
    """Edges from a pixel to the terminal of its tree, or -1 if its branch hangs on an orphan. Marks the way for the next that asks."""
    offsets, parent, stamp, distance = flow.offsets, flow.parent, flow.stamp, flow.distance
    here, steps = pixel, 0
    while stamp[here] != clock:
        if parent[here] == ORPHAN:
            return -1
        steps += 1
        if parent[here] == ROOT:
            stamp[here], distance[here] = clock, 1
            break
        here += offsets[parent[here]]
    else:
        steps += distance[here]
    here, left = pixel, steps
    while stamp[here] != clock:
        stamp[here], distance[here] = clock, left
        here += offsets[parent[here]]
        left -= 1
    return steps


@njit(cache=True, nogil=True)
def _adopt(flow: Flow, orphans: np.ndarray, count: int, waiting: np.ndarray, last: int, clock: int) -> int:
    """Find each orphan a new parent in its tree, or set it free and orphan its children; the new end of the ring `waiting`."""
    residual, offsets, tree, parent = flow.residual, flow.offsets, flow.tree, flow.parent
    first, size = 0, orphans.size
    while count:
        orphan = orphans[first]
        first, count = (first + 1) % size, count - 1
        own, nearest, best = tree[orphan], 2**31 - 1, ORPHAN
        for direction in range(offsets.size):
            other = orphan + offsets[direction]
            open_edge = residual[other, direction ^ 1] > 0 if own == SOURCE else residual[orphan, direction] > 0
            if open_edge and tree[other] == own:
                steps = _distance(flow, other, clock)
                if 0 <= steps < nearest:
                    nearest, best = steps, direction
        if best != ORPHAN:
            parent[orphan], flow.distance[orphan], flow.stamp[orphan] = best, nearest + 1, clock
            continue
        for direction in range(offsets.size):
            other = orphan + offsets[direction]
            if tree[other] != own:
                continue
            if parent[other] == direction ^ 1:
                parent[other] = ORPHAN
                orphans[(first + count) % size] = other
                count += 1
            open_edge = residual[other, direction ^ 1] > 0 if own == SOURCE else residual[orphan, direction] > 0
            if open_edge and not flow.queued[other]:  # it may grow into the pixel that is now free
                flow.queued[other] = 1
                waiting[last] = other
                last = (last + 1) % waiting.size
        tree[orphan] = FREE
    return last


@njit(cache=True, nogil=True)
def _grow(flow: Flow, pixel: int, waiting: np.ndarray, last: int) -> tuple[int, int]:
    """Take free neighbours into the pixel's tree until the other tree is met: the direction of the meeting, or -1; the end of `waiting`."""
    residual, offsets, tree = flow.residual, flow.offsets, flow.tree
    own = tree[pixel]
    for direction in range(offsets.size):
        other = pixel + offsets[direction]
        if (residual[pixel, direction] if own == SOURCE else residual[other, direction ^ 1]) <= 0:
            continue
        if tree[other] == FREE:
            tree[other], flow.parent[other] = own, direction ^ 1
            flow.distance[other], flow.stamp[other] = flow.distance[pixel] + 1, flow.stamp[pixel]
            if not flow.queued[other]:
                flow.queued[other] = 1
                waiting[last] = other
                last = (last + 1) % waiting.size
        elif tree[other] != own:
            return direction, last
        elif flow.stamp[other] <= flow.stamp[pixel] and flow.distance[other] > flow.distance[pixel] + 1:
            flow.parent[other] = direction ^ 1  # a shorter way to the terminal
            flow.distance[other], flow.stamp[other] = flow.distance[pixel] + 1, flow.stamp[pixel]
    return -1, last


@njit(cache=True, nogil=True)
def max_flow(flow: Flow, pixels: np.ndarray) -> float:
    """The largest flow from source to sink; changes `flow` in place.

    Args:
        flow: `terminal` and `residual` hold the capacities. Afterwards `tree` is SOURCE exactly on the source's side of a minimum cut
            (the smallest such side), SINK or FREE elsewhere.
        pixels: (m,) indices into the framed grid of those that take part; the capacities of all others, in and out, must be zero.

    Returns:
        The flow: the sum over edges of the minimum cut, where a pixel with both terminals is taken to have passed on the smaller already.
    """
    tree = flow.tree
    # A pixel is in each ring once at most, so neither overflows.
    waiting, orphans = np.empty(pixels.size + 1, np.int64), np.empty(pixels.size + 1, np.int64)
    last = 0
    for pixel in pixels:
        tree[pixel], flow.queued[pixel] = FREE, 0
        flow.stamp[pixel], flow.distance[pixel], flow.parent[pixel] = 0, 1, ROOT
        if flow.terminal[pixel] != 0:
            tree[pixel] = SOURCE if flow.terminal[pixel] > 0 else SINK
            flow.queued[pixel] = 1
            waiting[last] = pixel
            last += 1
    total, clock, first = 0.0, 0, 0
    while first != last:
        pixel = waiting[first]
        first = (first + 1) % waiting.size
        flow.queued[pixel] = 0
        while tree[pixel] != FREE:
            direction, last = _grow(flow, pixel, waiting, last)
            if direction < 0:
                break
            clock += 1
            if tree[pixel] == SOURCE:
                push, count = _augment(flow, pixel, direction, orphans)
            else:
                push, count = _augment(flow, pixel + flow.offsets[direction], direction ^ 1, orphans)
            total += push
            last = _adopt(flow, orphans, count, waiting, last, clock)
    return total
