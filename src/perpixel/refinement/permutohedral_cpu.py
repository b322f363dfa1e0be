"""The permutohedral lattice of per-pixel features: which vertices a pixel lies between, and which vertices are neighbours.

A Gaussian filter of the features is then: splat the pixels' values on the vertices, blur along each of the lattice's d + 1 axes with
(1/2, 1, 1/2), and slice them back. It takes time in proportion to pixels times features; its kernel exp(-|f_i - f_j|^2 / 2) is approximate.

Source: Adams, Baek & Davis 2010, "Fast high-dimensional filtering using the permutohedral lattice", sections 3 and 4.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numba import njit
from numpy.typing import NDArray

from perpixel.refinement.team import in_team, share
from perpixel.refinement.vectors import fetch, put

# Lattice coordinates are exact integers in float32 up to 2**24; the margin leaves room for vertices around the last pixel.
FARTHEST = 2.0**22
BLOCK = 16  # pixels placed at a time


@dataclass(frozen=True)
class Lattices:
    """The lattices of several kernels side by side, as rows of one table.

    Row 0 belongs to no kernel and holds zeros: it stands for every neighbour that no pixel touches.

    Attributes:
        rows: (P, J) int32, the table rows that a pixel lies between; J is the sum of d + 1 over the kernels.
        weights: (P, J) float32, barycentric; those of one kernel add up to 1.
        columns: kernel k has columns[k] to columns[k + 1] of `rows` and `weights`.
        starts: kernel k has table rows starts[k] to starts[k + 1]; the last is the number of rows.
        chains: int32, table rows in the order in which they are neighbours along an axis, with a 0 before, between and after chains. Rows
            without a neighbour along an axis are in none.
        links: (kernels, A + 1): kernel k's chains along axis a begin with the 0 at links[k, a] and end with that before links[k, a + 1].
    """

    rows: NDArray[np.int32]
    weights: NDArray[np.float32]
    columns: NDArray[np.int64]
    starts: NDArray[np.int64]
    chains: NDArray[np.int32]
    links: NDArray[np.int64]


def lattices(features: Sequence[NDArray[np.float32]], threads: int) -> Lattices:
    """The lattices of kernels whose features are (P, d) each, already divided by the bandwidths.

    Raises:
        ValueError: if features are not finite, or so large that float32 cannot tell neighbouring vertices apart.
    """
    pixels = len(features[0])
    columns = np.cumsum([0, *(f.shape[1] + 1 for f in features)])
    rows = np.empty((pixels, columns[-1]), np.int32)
    weights = np.empty((pixels, columns[-1]), np.float32)
    axes = max(f.shape[1] for f in features) + 1
    starts = [1]
    chains, lengths = [], np.zeros((len(features), axes), np.int64)
    for k, values in enumerate(features):
        count, found = _one_lattice(values, rows, weights, int(columns[k]), starts[-1], threads)
        starts.append(starts[-1] + count)
        chains += found
        lengths[k, : len(found)] = [len(axis) for axis in found]
    ends = np.cumsum(lengths).reshape(lengths.shape)
    links = np.hstack([ends[:, :1] - lengths[:, :1], ends])
    return Lattices(rows, weights, columns, np.array(starts), np.concatenate(chains), links)


def scales(d: int) -> NDArray[np.float32]:
    """What each feature is multiplied by before it is lifted to d + 1 dimensions, so that the blur has standard deviation 1."""
    deviation = float(np.float32(math.sqrt(2 / 3) * (d + 1)))
    return np.array([deviation / math.sqrt((i + 1) * (i + 2)) for i in range(d)], np.float32)


def _packing(features: NDArray[np.float32]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """How d coordinates of a vertex become one 64-bit word, or several where they span too much: lowest coordinates, (words, d) strides.

    A coordinate is a digit of a number in mixed radix, so the key of a neighbour is the key plus a constant.
    """
    d = features.shape[1]
    low, high = _extent(features).astype(float)
    bounds = np.array([low, high]) * scales(d)
    lows, spans = np.empty(d, np.int64), []
    for i in range(d):  # coordinate i is the sum of the features from i on, less i times the one before
        ends = bounds[:, i:].sum(1) - i * (bounds[::-1, i - 1] if i else 0)
        if not np.abs(ends).max() < FARTHEST:
            raise ValueError(
                f"features reach from {low.min():.3g} to {high.max():.3g} bandwidths, which is too far for float32; "
                "they must be finite, and bandwidths larger"
            )
        lows[i] = math.floor(ends[0]) - 3 * (d + 1)
        spans.append(math.ceil(ends[1]) + 3 * (d + 1) - int(lows[i]) + 1)
    words: list[list[int]] = [[0] * d]
    size = 1
    for i, span in enumerate(spans):
        if size * span >= 2**63:
            words.append([0] * d)
            size = 1
        words[-1][i] = size
        size *= span
    return lows, np.array(words, np.int64)


def _one_lattice(
    features: NDArray[np.float32], rows: NDArray[np.int32], weights: NDArray[np.float32], column: int, start: int, threads: int
) -> tuple[int, list[NDArray[np.int32]]]:
    """Fill the kernel's columns of `rows` and `weights`; how many vertices it has, and their chains along each axis."""
    d = features.shape[1]
    lows, strides = _packing(features)
    pixels = len(features)

    def place(number: int, team: int) -> tuple[Any, ...]:
        own = start if number == 0 else 0  # the first thread's table becomes the common one, so its numbers are final
        return _place(features, *share(0, pixels, number, team), scales(d), lows, strides, rows, weights, column, own)

    (slots, keys, count), *others = in_team(place, min(threads, pixels))
    names = [np.empty(0, np.int32)]
    for _, more, size in others:
        slots, keys = _roomy(slots, keys, count, size)
        names.append(np.empty(size, np.int32))
        count = _absorb(slots, keys, count, more, names[-1], start)
    steps = (d + 1) * np.hstack([strides, np.zeros((len(strides), 1), np.int64)]) - strides.sum(1, keepdims=True)
    chains = [np.empty(0, np.int32)] * (d + 1)

    def finish(number: int, team: int) -> None:
        for part in range(1 + number, len(names), team):
            _rename(rows, *share(0, pixels, part, len(names)), column, d + 1, names[part])
        for axis in range(number, d + 1, team):
            chains[axis] = _chains(slots, keys, count, np.ascontiguousarray(steps[:, axis]), start)

    in_team(finish, len(names))
    return count, chains


@njit(cache=True, nogil=True, forceinline=True)  # a call would pass some thirty numbers on the stack
def _slot(slots, known, words, keys, at, step):  # type: ignore[no-untyped-def]
    """Where in `slots` a key is, or the empty slot where it belongs. The key's words are at `at`, `at` + step, ... in `keys`.

    A slot holds the vertex's number plus 1; 0 is empty. `known` has the words of the numbered vertices. The multiplier is 2**64 over the
    golden ratio, and the slot is taken from the highest bits of the product, which are the ones that it spreads keys in equal steps over
    (Knuth vol. 3, 6.4). Lower bits had seven probes a key on a photograph's grid of places, these have one.
    """
    mask = len(slots) - 1
    key = fetch(keys, at)
    mixed = np.uint64(key) * np.uint64(0x9E3779B97F4A7C15)
    for w in range(1, words):
        mixed = (mixed ^ np.uint64(fetch(keys, at + w * step))) * np.uint64(0x9E3779B97F4A7C15)
    slot = np.int64((mixed >> np.uint64(32)) * np.uint64(len(slots)) >> np.uint64(32))
    while True:
        number = fetch(slots, slot)
        if number == 0:
            break
        vertex = (number - 1) * words
        if fetch(known, vertex) == key:
            same = True
            for w in range(1, words):
                same &= fetch(known, vertex + w) == fetch(keys, at + w * step)
            if same:
                break
        slot = (slot + 1) & mask
    return slot


@njit(cache=True, nogil=True)
def _roomy(slots, keys, count, more):  # type: ignore[no-untyped-def]
    """The same table, larger if it would be more than half full with so many more keys."""
    if 2 * (count + more) <= len(slots):
        return slots, keys
    size = 2 * len(slots)
    while 2 * (count + more) > size:
        size *= 2
    words = keys.shape[1]
    new = np.zeros(size, np.int32)
    wide = np.empty((size // 2, words), np.int64)
    wide[:count] = keys[:count]
    for number in range(count):
        slot = _slot(new, wide, words, keys, number * words, 1)
        new[slot] = number + 1
    return new, wide


@njit(cache=True, nogil=True, error_model="numpy")
def _simplices(features, first, count, scale, lifted, nearest, rank):  # type: ignore[no-untyped-def]
    """Of up to BLOCK pixels: the place in the plane, the lattice point of remainder 0 next to it, the rank of each coordinate's rest.

    The inner loops run over pixels that lie side by side, which the compiler turns into vector instructions.
    """
    d = features.shape[1]
    per, whole = np.float32(1 / (d + 1)), np.float32(d + 1)
    off = lifted[d + 1]  # by how many steps the point lies off the plane
    total = nearest[d + 1]
    total[:] = 0
    for i in range(d, 0, -1):
        for n in range(count):
            f = features[first + n, i - 1] * scale[i - 1]
            lifted[i, n] = total[n] - np.float32(i) * f
            total[n] += f
    off[:] = 0
    for i in range(d + 1):
        for n in range(BLOCK):
            if i == 0:
                lifted[0, n] = total[n]
            step = np.rint(lifted[i, n] * per)
            nearest[i, n] = step * whole
            off[n] += step
            rank[i, n] = 0
    for i in range(d):
        for j in range(i + 1, d + 1):
            for n in range(BLOCK):
                lower = np.float32(lifted[i, n] - nearest[i, n] < lifted[j, n] - nearest[j, n])
                rank[i, n] += lower
                rank[j, n] += np.float32(1) - lower
    for i in range(d + 1):
        for n in range(BLOCK):
            r = rank[i, n] + off[n]
            move = whole if r < 0 else (-whole if r >= whole else np.float32(0))
            rank[i, n] = r + move
            nearest[i, n] += move
            lifted[i, n] = (lifted[i, n] - nearest[i, n]) * per


@njit(cache=True, nogil=True, error_model="numpy")
def _corners(lifted, nearest, ranks, count, lows, strides, rest, drop, shares, keys):  # type: ignore[no-untyped-def]
    """From what `_simplices` found: weights (d + 1, BLOCK) and keys (d + 1, words, BLOCK) of the vertices around each pixel."""
    d = len(ranks) - 1
    words = len(strides)
    for i in range(d + 1):
        for n in range(count):
            r = int(ranks[i, n])
            put(rest, r * BLOCK + n, lifted[i, n])
            for w in range(words):
                put(drop, (r * words + w) * BLOCK + n, (d + 1) * strides[w, i] if i < d else 0)
    for n in range(BLOCK):
        shares[0, n] = np.float32(1) + rest[d, n] - rest[0, n]
    for r in range(1, d + 1):
        for n in range(BLOCK):
            shares[r, n] = rest[d - r, n] - rest[d - r + 1, n]
    # From one vertex of the simplex to the next: a step up in every coordinate, d + 1 down in that of the highest rank left.
    for w in range(words):
        keys[0, w] = 0
        for i in range(d):
            for n in range(BLOCK):
                keys[0, w, n] += strides[w, i] * (np.int64(nearest[i, n]) - lows[i])
        up = strides[w].sum()
        for r in range(1, d + 1):
            for n in range(BLOCK):
                keys[r, w, n] = keys[r - 1, w, n] + up - drop[d - r + 1, w, n]


@njit(cache=True, nogil=True, error_model="numpy")
def _place(features, first, last, scale, lows, strides, rows, weights, column, start):  # type: ignore[no-untyped-def]
    """Vertices and weights of the pixels from first to last; the table of their keys. `rows` gets vertex numbers from `start` on."""
    d = features.shape[1]
    words = len(strides)
    slots = np.zeros(1 << 14, np.int32)
    known = np.empty((1 << 13, words), np.int64)
    width = rows.shape[1]
    count = 0
    lifted = np.zeros((d + 2, BLOCK), np.float32)
    nearest = np.zeros((d + 2, BLOCK), np.float32)
    ranks = np.zeros((d + 1, BLOCK), np.float32)
    rest = np.zeros((d + 1, BLOCK), np.float32)  # by rank
    drop = np.zeros((d + 1, words, BLOCK), np.int64)
    shares = np.empty((d + 1, BLOCK), np.float32)
    keys = np.empty((d + 1, words, BLOCK), np.int64)
    for block in range(first, last, BLOCK):
        size = min(BLOCK, last - block)
        slots, known = _roomy(slots, known, count, size * (d + 1))
        _simplices(features, block, size, scale, lifted, nearest, ranks)
        _corners(lifted, nearest, ranks, size, lows, strides, rest, drop, shares, keys)
        for n in range(size):
            at = (block + n) * width + column
            for r in range(d + 1):
                put(weights, at + r, fetch(shares, r * BLOCK + n))
                here = r * words * BLOCK + n
                slot = _slot(slots, known, words, keys, here, BLOCK)
                number: Any = np.int64(fetch(slots, slot))
                if number == 0:
                    for w in range(words):
                        put(known, count * words + w, fetch(keys, here + w * BLOCK))
                    count += 1
                    number = count
                    put(slots, slot, np.int32(number))
                put(rows, at + r, np.int32(start + number - 1))
    return slots, known, count


@njit(cache=True, nogil=True)
def _absorb(slots, keys, count, others, names, start):  # type: ignore[no-untyped-def]
    """Add other keys to a table that has room; how many it has then. `names` gets the rows of the others."""
    words = keys.shape[1]
    for number in range(len(names)):
        slot = _slot(slots, keys, words, others, number * words, 1)
        if slots[slot] == 0:
            keys[count] = others[number]
            count += 1
            slots[slot] = count
        names[number] = start + slots[slot] - 1
    return count


@njit(cache=True, nogil=True)
def _rename(rows, first, last, column, width, names):  # type: ignore[no-untyped-def]
    """A thread's own vertex numbers become rows of the common table."""
    for p in range(first, last):
        for j in range(column, column + width):
            rows[p, j] = names[rows[p, j]]


@njit(cache=True, nogil=True)
def _chains(slots, keys, count, step, start):  # type: ignore[no-untyped-def]
    """The rows of vertices that follow one another in steps, chain after chain, a 0 before each and after the last."""
    words = keys.shape[1]
    key = np.empty(words, np.int64)
    after = np.zeros(count + 1, np.int32)  # numbers plus 1, as in `slots`; 0 is none
    follows = np.zeros(count + 1, np.bool_)
    for vertex in range(count):
        for w in range(words):
            key[w] = keys[vertex, w] + step[w]
        number = slots[_slot(slots, keys, words, key, 0, 1)]
        after[vertex + 1] = number
        follows[number] = True
    chains = np.empty(count + count // 2 + 2, np.int32)  # a chain has two rows or more, and one 0
    chains[0] = 0
    size = 1
    for number in range(1, count + 1):
        if follows[number] or after[number] == 0:
            continue
        link = number
        while link:
            chains[size] = start + link - 1
            size += 1
            link = after[link]
        chains[size] = 0
        size += 1
    return chains[:size].copy()


@njit(cache=True, nogil=True)
def _extent(features):  # type: ignore[no-untyped-def]
    """Lowest and highest value of each feature, (2, d)."""
    ends = np.empty((2, features.shape[1]), np.float32)
    ends[0], ends[1] = features[0], features[0]
    for p in range(len(features)):
        for i in range(features.shape[1]):
            ends[0, i] = min(ends[0, i], features[p, i])
            ends[1, i] = max(ends[1, i], features[p, i])
            if not np.isfinite(features[p, i]):
                ends[1, i] = np.inf
    return ends
