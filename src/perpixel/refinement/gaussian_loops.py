"""The conjugate gradient of `gaussian_solver.py` on a processor: the same steps, with one label in the cache at a time.

Torch's operations carry every score of every label through memory some fifteen times an iteration. Here each label of each image is
solved from start to end by one thread, in three passes over arrays that its cache can hold.
"""

from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import torch
from numba import njit
from torch import Tensor

# Sums may be taken in any order, so that they run in vector registers; NaN and infinity keep their meaning, they tell of failure.
FAST = {"reassoc", "contract", "arcp", "nsz"}


def conjugate_gradient_by_label(
    b: Tensor,
    edges: Tensor,
    offsets: tuple[tuple[int, int], ...],
    lam: float,
    degree: Tensor | None,
    strength: Tensor | None,
    tolerance: float,
    iterations: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Solve (lam + c_k degree) x_k + c_k sum over edges of weight times x_k at the other end = b_k for every label k of every image.

    Args:
        b: (N, K, H, W) on the processor, float32 or float64.
        edges: (N, D, H, W), zero where they lead out of the image.
        offsets: D of them.
        lam: more than 0.
        degree: (N, 1, H, W), or None for 0.
        strength: K numbers c_k; None is 1 for all.
        tolerance, iterations: as in `gaussian_solve`.

    Returns:
        x, and by label (N, K): whether it reached the tolerance, its iterations, its residual computed afresh.
    """
    batch, labels = b.shape[:2]
    arrays = [np.ascontiguousarray(v.numpy()) for v in (b, edges)]
    degrees = np.zeros((batch, *b.shape[2:]), arrays[0].dtype) if degree is None else np.ascontiguousarray(degree[:, 0].numpy())
    factors = np.ones(labels) if strength is None else strength.double().flatten().numpy()
    steps = np.array(offsets, np.int64).reshape(-1, 2)
    x = np.zeros_like(arrays[0])

    def solve(number: int) -> Any:
        image, label = divmod(number, labels)
        factor = factors.astype(x.dtype)[label]
        return _solve_label(
            arrays[0][image, label],
            arrays[1][image],
            steps,
            x.dtype.type(lam),
            degrees[image],
            factor,
            tolerance,
            iterations,
            x[image, label],
        )

    # Threads of Python's, since the loops let go of its lock: they may be called from any thread and after any fork.
    with ThreadPoolExecutor(torch.get_num_threads()) as pool:
        rows = list(pool.map(solve, range(batch * labels)))
    found = torch.tensor(rows, dtype=torch.float64).view(batch, labels, 3)
    return torch.from_numpy(x), found[..., 0] > 0, found[..., 1].long(), found[..., 2].to(b.dtype)


@njit(cache=True, nogil=True, fastmath=FAST)
def _solve_label(
    b: np.ndarray,
    edges: np.ndarray,
    offsets: np.ndarray,
    lam: Any,
    degree: np.ndarray,
    factor: Any,
    tolerance: float,
    iterations: int,
    x: np.ndarray,
) -> tuple[float, float, float]:
    """Writes x; returns 1.0 where it converged, the iterations, and the residual."""
    height, width = b.shape
    diagonal = lam + factor * degree
    inverse = lam / lam / diagonal  # a 1 of their precision
    residual = b.copy()
    p = residual * inverse
    product = np.empty_like(b)
    size = 0.0
    for y in range(height):
        size += (residual[y] * p[y]).sum()
    whole = size
    target = tolerance**2 * whole
    step = 0
    sound = np.isfinite(size)
    while step < iterations and sound and size > target:
        curvature = _times(p, edges, offsets, diagonal, factor, product)
        if not curvature > 0:  # nor where it is NaN
            sound = False
            break
        a = b.dtype.type(size / curvature)
        new = 0.0
        for y in range(height):
            xs, ps, rs, qs, inv = x[y], p[y], residual[y], product[y], inverse[y]
            row = xs[0] - xs[0]  # 0 of their precision; the sum over rows is in double
            for i in range(width):
                xs[i] += a * ps[i]
                rs[i] -= a * qs[i]
                row += rs[i] * rs[i] * inv[i]
            new += row
        beta = b.dtype.type(new / size)
        for y in range(height):
            ps, rs, inv = p[y], residual[y], inverse[y]
            for i in range(width):
                ps[i] = rs[i] * inv[i] + beta * ps[i]
        size = new
        step += 1
    _times(x, edges, offsets, diagonal, factor, product)
    left = 0.0
    for y in range(height):
        gap = b[y] - product[y]
        left += (gap * gap * inverse[y]).sum()
    return 1.0 if sound and size <= target else 0.0, float(step), np.sqrt(left / whole) if whole > 0 else np.sqrt(left)


@njit(cache=True, nogil=True, fastmath=FAST)
def _times(p: np.ndarray, edges: np.ndarray, offsets: np.ndarray, diagonal: np.ndarray, factor: Any, product: np.ndarray) -> float:
    """Writes M p into `product`; returns p^T M p. Row by row, so that a row is still in the cache when the next offset needs it."""
    height, width = p.shape
    total = 0.0
    for y in range(height):
        out, ps = product[y], p[y]
        for i in range(width):
            out[i] = 0
        for d in range(len(offsets)):
            down, right = offsets[d]
            first = max(-right, 0)
            last = max(first, min(width - right, width))
            # Slices, since the loops become vector instructions only where no index can be negative.
            if 0 <= y + down < height:  # the edges that start here
                weight, near, far = edges[d, y, first:last], out[first:last], p[y + down, first + right : last + right]
                for i in range(len(weight)):
                    near[i] += weight[i] * far[i]
            if 0 <= y - down < height:  # the edges that end here
                weight, near, far = edges[d, y - down, first:last], out[first + right : last + right], p[y - down, first:last]
                for i in range(len(weight)):
                    near[i] += weight[i] * far[i]
        row, diag = ps[0] - ps[0], diagonal[y]
        for i in range(width):
            out[i] = diag[i] * ps[i] + factor * out[i]
            row += ps[i] * out[i]
        total += row
    return total
