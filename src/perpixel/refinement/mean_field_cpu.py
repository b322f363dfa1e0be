"""Mean-field inference of a fully connected CRF with Gaussian kernels, on the processor. numpy in, numpy out.

Source: Kraehenbuehl & Koltun 2011, "Efficient inference in fully connected CRFs with Gaussian edge potentials", algorithm 1.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numba import njit
from numpy.typing import NDArray

from perpixel.refinement.permutohedral_cpu import Lattices, lattices
from perpixel.refinement.team import team_size

Array = NDArray[np.float32]
Normalization = Literal["none", "before", "after", "symmetric"]


@dataclass(frozen=True)
class GaussianKernel:
    """One pairwise term: pixels with similar features pay for their labels.

    Attributes:
        features: (P, d) float32 per pixel, already divided by the bandwidths; the kernel is exp(-|f_i - f_j|^2 / 2).
        transform: scalar, (K,) diagonal or (K, K): the energy of the labels grows by transform @ (normalised filter of Q).
            Potts of weight w is the scalar -w.
        normalization: with n = K 1, the filter of ones: "none" takes the filter as it is, "before" filters Q / n, "after" divides the
            filtered Q by n, "symmetric" does both with the root of n.
    """

    features: Array
    transform: Array
    normalization: Normalization = "symmetric"


class MeanField:
    """Inference step by step. Lattices and normalisers are built once, here.

    Args:
        unary: (K, P) energies, finite.
        kernels: the pairwise terms.
        threads: as in `mean_field`.
    """

    def __init__(self, unary: Array, kernels: Sequence[GaussianKernel], *, threads: int | None = None):
        self.unary = np.ascontiguousarray(unary, np.float32)
        self.kernels = list(kernels)
        self._parts = [_Filter(kernel, team_size(threads)) for kernel in kernels]
        self.start()

    @property
    def log_q(self) -> Array:
        """(K, P) log-probabilities."""
        return self._log_q

    @property
    def q(self) -> Array:
        """(K, P) marginals."""
        return np.exp(self._log_q)

    @q.setter
    def q(self, marginals: Array) -> None:
        """Go on from these marginals."""
        self._log_q = np.log(np.maximum(marginals, np.finfo(np.float32).tiny))

    def start(self) -> None:
        """Back to the softmax of the negative unary energies."""
        self._log_q = _log_softmax(-self.unary)

    def step(self) -> None:
        """One update of all pixels."""
        self.run(1)

    def run(self, iterations: int, *, damping: float = 1.0, tolerance: float = 0.0) -> None:
        """Several updates, at most; fewer where no marginal changes by `tolerance`."""
        for _ in range(iterations):
            q = self.q
            energy = self.unary.copy()
            for part in self._parts:
                energy += _transformed(part.kernel.transform, part(q))
            self._log_q = _log_softmax(-energy)
            if damping != 1:
                self._log_q = np.log(np.maximum(damping * self.q + (1 - damping) * q, 1e-30)).astype(np.float32)
            if tolerance > 0 and np.abs(self.q - q).max() < tolerance:
                break

    def kl_divergence(self) -> float:
        """KL divergence of the marginals from the model's distribution, up to a constant: sum of Q log Q + Q unary + Q (pairwise energy).

        The pairwise energy is that of a pixel with all others, so that each pair counts twice, as in the authors' code.
        """
        q = self.q.astype(np.float64)
        total = (q * (np.maximum(self._log_q, -46.0) + self.unary)).sum()
        for part in self._parts:
            total += (q * _transformed(part.kernel.transform, part(self.q))).sum()
        return float(total)


def mean_field(
    unary: Array,
    kernels: Sequence[GaussianKernel],
    iterations: int,
    *,
    damping: float = 1.0,
    tolerance: float = 0.0,
    fast: bool = False,
    threads: int | None = None,
) -> Array:
    """Mean field from the softmax of the negative unary energies.

    Args:
        unary: (K, P) energies, finite.
        kernels: the pairwise terms.
        iterations: updates of all pixels, >= 0.
        damping: Q becomes damping * new + (1 - damping) * old; in (0, 1], 1 is none.
        tolerance: stop when no marginal changes by as much; 0 never stops.
        fast: early iterations on every second pixel.
        threads: None is one for each processor.

    Returns:
        (K, P) log-probabilities.
    """
    state = MeanField(unary, kernels, threads=threads)
    state.run(iterations, damping=damping, tolerance=tolerance)
    return state.log_q


def filtered(values: Array, kernel: GaussianKernel, *, threads: int | None = None) -> Array:
    """The kernel's normalised filter of values (K, P), before its transform."""
    return _Filter(kernel, team_size(threads))(np.ascontiguousarray(values, np.float32))


def _transformed(transform: Array, messages: Array) -> Array:
    transform = np.asarray(transform, np.float32)
    if transform.ndim == 2:
        return transform @ messages
    return transform.reshape(-1, 1) * messages


def _log_softmax(scores: Array) -> Array:
    scores = scores - scores.max(0)
    return scores - np.log(np.exp(scores).sum(0))


class _Filter:
    """A kernel with its lattice and normaliser."""

    def __init__(self, kernel: GaussianKernel, threads: int):
        self.kernel = kernel
        self.lattices = lattices([np.ascontiguousarray(kernel.features, np.float32)], threads)
        ones = np.ones((1, len(kernel.features)), np.float32)
        n = _filter(ones, self.lattices)
        how = kernel.normalization
        self.before = {"none": 1, "before": 1 / n, "after": 1, "symmetric": n**-0.5}[how]
        self.after = {"none": 1, "before": 1, "after": 1 / n, "symmetric": n**-0.5}[how]

    def __call__(self, values: Array) -> Array:
        return (_filter(values * self.before, self.lattices) * self.after).astype(np.float32)


def _filter(values: Array, lattice: Lattices) -> Array:
    return _splat_blur_slice(np.ascontiguousarray(values.T, np.float32), lattice.rows, lattice.weights, lattice.neighbours).T


@njit(cache=True, nogil=True)
def _splat_blur_slice(values, rows, weights, neighbours):  # type: ignore[no-untyped-def]
    axes, size, _ = neighbours.shape
    table = np.zeros((size, values.shape[1]), np.float32)
    other = np.zeros((size, values.shape[1]), np.float32)
    for p in range(len(rows)):
        for j in range(axes):
            for c in range(values.shape[1]):
                table[rows[p, j], c] += weights[p, j] * values[p, c]
    half = np.float32(0.5)
    for axis in range(axes):
        for r in range(1, size):
            for c in range(values.shape[1]):
                other[r, c] = table[r, c] + half * (table[neighbours[axis, r, 0], c] + table[neighbours[axis, r, 1], c])
        table, other = other, table
    out = np.zeros(values.shape, np.float32)
    scale = np.float32(1 / (1 + 2.0 ** (1 - axes)))
    for p in range(len(rows)):
        for j in range(axes):
            for c in range(values.shape[1]):
                out[p, c] += scale * weights[p, j] * table[rows[p, j], c]
    return out
