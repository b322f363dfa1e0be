"""Mean-field inference of a fully connected CRF with Gaussian kernels, on the processor. numpy in, numpy out.

Source: Kraehenbuehl & Koltun 2011, "Efficient inference in fully connected CRFs with Gaussian edge potentials", algorithm 1.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from perpixel.refinement.mean_field_loops import BLOCK, infer, pass_through, scaled, to_rows
from perpixel.refinement.permutohedral_cpu import lattices
from perpixel.refinement.team import gate, in_team, share, team_size
from perpixel.refinement.vectors import PART, lanes

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


# As many lanes as a vector may have: 64 floats are half of the registers of AVX-512, and compile in seconds. More classes take several.
WIDEST = 64
# Updates of all pixels that end a run in fast mode.
FULL = 5


@dataclass(frozen=True)
class Rows:
    """How the numbers of a pixel, or of a vertex of a lattice, lie in memory: chunks of equally many lanes, the last ones unused (0)."""

    channels: int

    @property
    def chunks(self) -> int:
        """How many vectors a row has."""
        return -(-self.channels // WIDEST)

    @property
    def lanes(self) -> int:
        """How many numbers a vector has: 1, 2, 4 or a multiple of PART."""
        each = -(-self.channels // self.chunks)
        return next((few for few in (1, 2, 4) if each <= few), -(-each // PART) * PART)

    @property
    def width(self) -> int:
        """How many numbers a row has in memory."""
        return self.chunks * self.lanes


def aligned(count: int, size: int) -> Array:
    """(count, size) numbers, not yet written, that begin at a multiple of 64 bytes."""
    room = np.empty(count * size + 15, np.float32)
    start = -room.ctypes.data % 64 // 4
    return room[start : start + count * size].reshape(count, size)


class _Terms:
    """Pairwise terms that share their pixels: lattices, and weights with normalisers, strengths and the lattice's scale folded in."""

    def __init__(self, kernels: Sequence[GaussianKernel], labels: int, threads: int):
        self.threads = threads
        self.kernels = kernels
        self.lattices = lattices([np.ascontiguousarray(kernel.features, np.float32) for kernel in kernels], threads)
        strengths = [_strength(kernel.transform, labels) for kernel in kernels]
        both = all(kernel.normalization in ("none", "symmetric") for kernel in kernels) and all(s is None or s >= 0 for s in strengths)
        # One array of weights for splatting and slicing alike, where the two are the same, saves a quarter of the memory traffic.
        self.splat = self.slice = self.lattices.weights
        factors = [self._factors(k, 1.0 if s is None else s) for k, s in enumerate(strengths)]
        if not both:
            self.slice = self.splat.copy()
        for k, (before, after) in enumerate(factors):
            own = self.columns(k)
            for weights, factor in ((self.splat, np.sqrt(before * after)),) if both else ((self.splat, before), (self.slice, after)):
                self._scale(weights, own, factor[:, 0])
        self.matrices = [None if s is not None else _square(kernel.transform, labels) for kernel, s in zip(kernels, strengths, strict=True)]

    def _scale(self, weights: Array, own: slice, factors: Array) -> None:
        pixels = len(weights)
        in_team(lambda number, team: scaled(weights, own.start, own.stop, factors, *share(0, pixels, number, team)), self.threads)

    def columns(self, k: int) -> slice:
        """Where in rows and weights a kernel is."""
        return slice(int(self.lattices.columns[k]), int(self.lattices.columns[k + 1]))

    def _factors(self, k: int, strength: float) -> tuple[Array, Array]:
        """(P or 1, 1) factors of a kernel's weights before and after the filter."""
        own = self.columns(k)
        scale = np.float32(1 / (1 + 2.0 ** (1 + own.start - own.stop)))  # makes up for the blur's sum over d + 1 axes
        n = scale * self.filter(k, np.ones((len(self.splat), 1), np.float32), Rows(1))
        one = np.ones((1, 1), np.float32)
        how = self.kernels[k].normalization
        n = np.maximum(n, np.float32(1e-20))
        before = {"none": one, "before": 1 / n, "after": one, "symmetric": 1 / np.sqrt(n)}[how]
        after = {"none": one, "before": one, "after": 1 / n, "symmetric": 1 / np.sqrt(n)}[how]
        return before.astype(np.float32), (scale * np.float32(strength) * after).astype(np.float32)

    def filter(self, k: int, values: Array, rows: Rows) -> Array:
        """Splat, blur and slice (P, width) with the weights of kernel k as they are now."""
        out = np.empty_like(values)
        tables, opened = self._tables(rows), gate()

        def work(number: int, team: int) -> None:
            pass_through(number, team, opened, lanes(rows.lanes), lanes(rows.chunks), values, out, *self._arrays(), tables, k)

        in_team(work, min(self.threads, len(values)))
        return out

    def _tables(self, rows: Rows) -> Array:
        """Where each thread splats, and one more."""
        tables = aligned(self.threads + 1, int(self.lattices.starts[-1]) * rows.width)
        tables[:, : rows.width] = 0  # the row that no pixel touches; threads clear the rest themselves
        return tables

    def _arrays(self) -> tuple[Any, ...]:
        found = self.lattices
        return (found.rows, self.splat, self.slice, found.columns, found.starts, found.chains, found.links)


class MeanField:
    """Inference step by step. Lattices and normalisers are built once, here.

    Args:
        unary: (K, P) energies, finite.
        kernels: the pairwise terms.
        threads: as in `mean_field`.

    Raises:
        ValueError: as `mean_field`.
    """

    def __init__(self, unary: Array, kernels: Sequence[GaussianKernel], *, threads: int | None = None):
        self.unary = np.ascontiguousarray(unary, np.float32)
        self.labels, self.pixels = _checked(self.unary, kernels)
        self._threads = min(team_size(threads), self.pixels)
        # A kernel of strength 0 says nothing, and one label has nothing to be told.
        heard = [kernel for kernel in kernels if np.any(kernel.transform) and self.labels > 1]
        self._terms = _Terms(heard, self.labels, self._threads) if heard else None
        self._rows = Rows(max(self.labels - 1, 1))
        self._scores = self._to_rows(self.unary)
        self._add_constants()
        self._log_q: Array | None = None

    def _to_rows(self, energies: Array) -> Array:
        """Scores relative to the last label, (P, width)."""
        rows = aligned(self.pixels, self._rows.width)
        in_team(lambda number, team: to_rows(energies, rows, self.labels - 1, *share(0, self.pixels, number, team)), self._threads)
        return rows

    def _add_constants(self) -> None:
        """What a matrix of labels adds to every pixel's scores because rows hold differences to the last label.

        With F the filter of Q, E = T F, f = the filter of Q - Q_last and N that of ones: F_l = f_l + (N - sum f) / K. So
        E_c - E_last = sum_l [(T_cl - T_last,l) - r_c / K] f_l + N r_c / K, where r_c = sum_l (T_cl - T_last,l).
        """
        self._matrices = np.zeros((len(self._kernels), self.labels - 1, self._rows.width), np.float32)
        self._mixed = np.zeros(len(self._kernels), np.bool_)
        if self._terms is None:
            return
        for k, transform in enumerate(self._terms.matrices):
            if transform is None:
                continue
            relative = (transform - transform[-1])[:-1].astype(np.float64)
            constant = relative.sum(1, keepdims=True) / self.labels
            self._matrices[k, :, : self.labels - 1] = -(relative[:, :-1] - constant).T
            self._mixed[k] = True
            if np.any(constant):
                ones = self._terms.filter(k, np.ones((self.pixels, 1), np.float32), Rows(1))
                self._scores[:, : self.labels - 1] -= ones * constant.T.astype(np.float32)

    @property
    def _kernels(self) -> Sequence[GaussianKernel]:
        return self._terms.kernels if self._terms else ()

    @property
    def log_q(self) -> Array:
        """(K, P) log-probabilities."""
        if self._log_q is None:
            with np.errstate(over="ignore"):
                shifted = np.maximum(self.unary.min(0) - self.unary, np.float32(-3e38))
            self._log_q = shifted - np.log(np.exp(shifted).sum(0))
        return self._log_q

    @property
    def q(self) -> Array:
        """(K, P) marginals."""
        found: Array = np.exp(self.log_q)
        return found

    def start(self, q: Array | None = None) -> None:
        """From these marginals (K, P), or from the softmax of the negative unary energies."""
        if q is not None and q.shape != self.unary.shape:
            raise ValueError(f"marginals have shape {q.shape} and the unary {self.unary.shape}; give the same")
        self._log_q = None if q is None else np.log(np.maximum(q, np.float32(1e-30))).astype(np.float32)

    def step(self) -> None:
        """One update of all pixels."""
        self.run(1)

    def run(self, iterations: int, *, damping: float = 1.0, tolerance: float = 0.0, fast: bool = False, width: int = 1) -> None:
        """Several updates of all pixels; the arguments are those of `mean_field`."""
        _checked_run(iterations, damping, tolerance, fast)
        if iterations == 0:
            return
        if self._terms is None:
            old, left = self.q, (1 - damping) ** iterations
            self._log_q = None
            if left > 0:
                self._log_q = np.log(np.maximum((1 - left) * self.q + left * old, np.float32(1e-30)))
            return
        if self._log_q is None and not self._mixed.any():
            begin = self._scores
        else:
            begin = self._to_rows(self.unary if self._log_q is None else -self._log_q)
        rows = self._rows
        tables, opened = self._terms._tables(rows), gate()
        blocks = aligned(self._threads, 2 * BLOCK * (rows.width + 1))
        keeps = damping != 1 or tolerance > 0
        kept = np.zeros((self.pixels if keeps else 0, rows.width + rows.lanes), np.float32)
        out = np.empty((self.labels, self.pixels), np.float32)
        changes = np.zeros(self._threads, np.float32)
        coarse = max(0, iterations - FULL + 1) if fast else 0

        terms = self._terms

        def work(number: int, team: int) -> None:
            infer(
                number, team, opened, lanes(rows.lanes), lanes(rows.chunks), lanes(terms.splat.shape[1]), self.labels - 1,
                self._scores.reshape(-1), begin.reshape(-1),
                *terms._arrays(), tables, blocks, self._matrices, self._mixed, kept, changes, out,
                iterations, np.float32(damping), np.float32(tolerance), coarse, 0 if width % 2 else width,
            )  # fmt: skip

        in_team(work, self._threads)
        self._log_q = out

    def kl_divergence(self) -> float:
        """KL divergence of the marginals from the model's distribution, up to a constant: sum of Q log Q + Q unary + Q (pairwise energy).

        The pairwise energy is that of a pixel with all others, itself included, so that each pair counts twice, as in pydensecrf.
        """
        q = self.q
        total = float(np.sum(q * (np.maximum(self.log_q, np.float32(-46)) + self.unary), dtype=np.float64))
        if self._terms is None:
            return total
        rows = Rows(self.labels)
        for k, transform in enumerate(self._terms.matrices):
            values = np.zeros((self.pixels, rows.width), np.float32)
            values[:, : self.labels] = q.T
            message = self._terms.filter(k, values, rows)[:, : self.labels].T
            total += float(np.sum(q * (-message if transform is None else transform @ message), dtype=np.float64))
        return total


def mean_field(
    unary: Array,
    kernels: Sequence[GaussianKernel],
    iterations: int,
    *,
    damping: float = 1.0,
    tolerance: float = 0.0,
    fast: bool = False,
    width: int = 1,
    threads: int | None = None,
) -> Array:
    """Mean field from the softmax of the negative unary energies.

    With symmetric normalisation and Potts costs the result is pydensecrf's, to 1e-5 in marginals. All transforms run in the same loops: a
    diagonal or full one is applied to the vertices of the lattice, which are fewer than the pixels.

    Args:
        unary: (K, P) energies of any size, finite; only their differences within a pixel count.
        kernels: the pairwise terms. One with a transform of zeros is left out.
        iterations: updates of all pixels, >= 0.
        damping: Q becomes damping * new + (1 - damping) * old; in (0, 1], 1 is none. Log-probabilities then end at -69.
        tolerance: one more update after the first that changes every marginal by less is the last; 0 never stops early.
        fast: updates before the last five are of every second pixel, in turns, which stands for its neighbour too. It changes 1 to
            8 labels in 1,000; on two threads it takes from a quarter less to a third more time than the exact mode (docs/results.md).
        width: pixels in a row of the image, for `fast`: those in turn then are a checkerboard.
        threads: None is one for each processor, at most 16, or NUMBA_NUM_THREADS where that is less. Each holds a table of its own.

    Returns:
        (K, P) float32 log-probabilities.

    Raises:
        ValueError: if shapes do not fit, a number is not finite or out of its range, or features span more than float32 resolves.

    Source: Kraehenbuehl & Koltun 2011, algorithm 1; each pixel is its own neighbour too, as in the authors' code.
    """
    state = MeanField(unary, kernels, threads=threads)
    state.run(iterations, damping=damping, tolerance=tolerance, fast=fast, width=width)
    return state.log_q


def filtered(values: Array, kernel: GaussianKernel, *, threads: int | None = None) -> Array:
    """The kernel's normalised filter of values (K, P) float32, before its transform; same shape. Pixels are their own neighbours too."""
    values = np.asarray(values, np.float32)
    one = GaussianKernel(kernel.features, np.array(-1, np.float32), kernel.normalization)
    rows = Rows(len(values))
    padded = np.zeros((values.shape[1], rows.width), np.float32)
    padded[:, : len(values)] = values.T
    return np.ascontiguousarray(_Terms([one], 2, min(team_size(threads), len(padded))).filter(0, padded, rows)[:, : len(values)].T)


def _checked_run(iterations: int, damping: float, tolerance: float, fast: bool) -> None:
    if iterations < 0:
        raise ValueError(f"iterations is {iterations}; give 0 or more")
    if not 0 < damping <= 1:
        raise ValueError(f"damping is {damping}; give a number above 0, at most 1 (none)")
    if not tolerance >= 0:
        raise ValueError(f"tolerance is {tolerance}; give 0 (never stop) or more")
    if fast and (damping != 1 or tolerance > 0):
        raise ValueError("fast skips pixels in early iterations, so their changes say nothing; use it without damping and tolerance")


def _checked(unary: Array, kernels: Sequence[GaussianKernel]) -> tuple[int, int]:
    """Labels and pixels."""
    if unary.ndim != 2 or 0 in unary.shape:
        raise ValueError(f"unary has shape {unary.shape}; give (K, P): labels, pixels, at least one of each")
    with np.errstate(over="ignore", invalid="ignore"):
        quick = np.isfinite(unary.sum())  # a third of the time; finite numbers may add up to infinity, which the second look forgives
    if not quick and not np.isfinite(unary).all():
        raise ValueError("unary has NaN or infinite energies; give finite ones")
    labels, pixels = unary.shape
    for kernel in kernels:
        features, shape = kernel.features, np.shape(kernel.transform)
        if features.ndim != 2 or len(features) != pixels or features.shape[1] == 0:
            raise ValueError(f"features have shape {features.shape}; give (P, d) with P = {pixels}, as many as the unary has pixels")
        if shape not in ((), (labels,), (labels, labels)):
            raise ValueError(f"transform has shape {shape}; give a scalar, ({labels},) or ({labels}, {labels})")
        if not np.isfinite(kernel.transform).all():
            raise ValueError("transform has NaN or infinite entries; give finite ones")
        if kernel.normalization not in ("none", "before", "after", "symmetric"):
            raise ValueError(f"normalization is {kernel.normalization!r}; give 'none', 'before', 'after' or 'symmetric'")
    return labels, pixels


def _square(transform: Array, labels: int) -> NDArray[np.float64]:
    """The transform as a (K, K) matrix."""
    square: NDArray[np.float64] = np.asarray(transform, np.float64)
    return square if square.ndim == 2 else np.diag(np.broadcast_to(square, labels))


def _strength(transform: Array, labels: int) -> float | None:
    """w where the transform is -w times the identity, else None."""
    square = _square(transform, labels)
    return -float(square[0, 0]) if np.array_equal(square, square[0, 0] * np.eye(labels)) else None
