"""The classes of `pydensecrf.densecrf`, on our CPU engine. Method and argument names are that package's, so that its users find them."""

from collections.abc import Sequence
from enum import IntEnum
from numbers import Number
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

if TYPE_CHECKING:  # numba takes as long to load as everything else here together; it is loaded when inference begins
    from perpixel.refinement.mean_field_cpu import MeanField

Array = NDArray[np.float32]
Bandwidths = float | Sequence[float]

# How far above the largest finite energy +inf becomes: exp(-1000) is 0 in float32, and differences of the others stay exact to 1e-4.
_IMPOSSIBLE = 1000.0


class KernelType(IntEnum):
    """How many parameters of a kernel could be learned in the original code. Inference does not depend on it."""

    CONST_KERNEL = 0
    DIAG_KERNEL = 1
    FULL_KERNEL = 2


class NormalizationType(IntEnum):
    """Where the filter's row sums are divided out; NO_NORMALIZATION leaves messages growing with the number of like pixels."""

    NO_NORMALIZATION = 0
    NORMALIZE_BEFORE = 1
    NORMALIZE_AFTER = 2
    NORMALIZE_SYMMETRIC = 3


CONST_KERNEL, DIAG_KERNEL, FULL_KERNEL = KernelType
NO_NORMALIZATION, NORMALIZE_BEFORE, NORMALIZE_AFTER, NORMALIZE_SYMMETRIC = NormalizationType
_NORMALIZATION = ("none", "before", "after", "symmetric")


class Unary:
    """(nlabels, npoints) energies for `setUnary`."""

    def __init__(self, energies: Array):
        self.energies = energies


class ConstUnary(Unary):
    """Given energies."""

    def __init__(self, u: ArrayLike):
        super().__init__(_floats("unary energies", u, 2))


class LogisticUnary(Unary):
    """L @ f of (nlabels, d) coefficients and (d, npoints) features."""

    def __init__(self, L: ArrayLike, f: ArrayLike):  # noqa: N803
        coefficients, features = _floats("coefficients L", L, 2), _floats("features f", f, 2)
        if coefficients.shape[1] != len(features):
            raise ValueError(f"coefficients L are {coefficients.shape} and features f {features.shape}; give (nlabels, d) and (d, npoints)")
        super().__init__(coefficients @ features)


class DenseCRF:
    """A dense CRF over any points.

    Args:
        nvar: number of points.
        nlabels: number of labels.
    """

    def __init__(self, nvar: int, nlabels: int):
        if nvar < 1 or nlabels < 1:
            raise ValueError(f"{nvar} points and {nlabels} labels; there is at least one of each")
        self._nvar, self._nlabel = int(nvar), int(nlabels)
        self._unary: Array | None = None
        self._pairwise: list[tuple[Array, Array, str]] = []
        self._engine: MeanField | None = None
        self._stepped: Array | None = None

    def addPairwiseEnergy(  # noqa: N802
        self,
        features: ArrayLike,
        compat: float | ArrayLike,
        kernel: int = DIAG_KERNEL,
        normalization: int = NORMALIZE_SYMMETRIC,
    ) -> None:
        """Add a Gaussian kernel exp(-|f_i - f_j|^2 / 2).

        Args:
            features: (d, nvar), already divided by their bandwidths.
            compat: a number w rewards like labels by w (Potts); an (nlabels,) vector or (nlabels, nlabels) matrix, symmetrised, is added to
                the energy as it is, so that -w on the diagonal is Potts.
            kernel: a `KernelType`; makes no difference to inference.
            normalization: a `NormalizationType`.
        """
        points = _floats("features", features, 2)
        if points.shape[1] != self._nvar:
            raise ValueError(f"features are {points.shape}; give (dimensions, {self._nvar}): one column per point")
        self._add(np.ascontiguousarray(points.T), compat, kernel, normalization)

    def setUnary(self, u: Unary) -> None:  # noqa: N802
        """Set the unary energies from a `ConstUnary` or `LogisticUnary`."""
        self._set(u.energies)

    def setUnaryEnergy(self, u: ArrayLike, f: ArrayLike | None = None) -> None:  # noqa: N802
        """Set the unary energies, negative logarithms of probabilities: u, (nlabels, nvar), or u @ f with features f."""
        self._set(ConstUnary(u).energies if f is None else LogisticUnary(u, f).energies)

    def inference(self, niter: int) -> Array:
        """(nlabels, nvar) marginals after `niter` iterations of mean field from the unary energies."""
        if niter < 0:
            raise ValueError(f"{niter} iterations; give 0 or more")
        field = self._field()
        field.start()
        field.run(niter)
        return field.q

    def startInference(self) -> tuple[Array, Array, Array]:  # noqa: N802
        """The first marginals, for `stepInference`, and two arrays that it has no need of."""
        empty = np.empty((0, 0), np.float32)
        if self._unary is None:
            return np.zeros((self._nlabel, self._nvar), np.float32), empty, empty.copy()
        field = self._field()
        field.start()
        self._stepped = field.q
        return self._stepped.copy(), empty, empty.copy()

    def stepInference(self, Q: Array, tmp1: Any = None, tmp2: Any = None) -> None:  # noqa: N802, N803
        """One iteration of mean field; changes Q in place. tmp1 and tmp2 are pydensecrf's working space and are left as they are."""
        field = self._continued(Q)
        if Q.any():
            field.step()
        else:  # what `startInference` gives without a unary: nothing is known of any point, and no message is sent
            field.start()
        self._stepped = field.q
        Q[...] = self._stepped

    def klDivergence(self, Q: Array) -> float:  # noqa: N802, N803
        """Sum of Q log Q + Q unary + Q (pairwise energy): the KL divergence from the model up to a constant, had it halved the last term.

        Every pair of points is counted twice, as in the original code, so that the numbers are the same.
        """
        return float(self._continued(Q).kl_divergence())

    def _set(self, energies: Array) -> None:
        if energies.shape != (self._nlabel, self._nvar):
            raise ValueError(
                f"unary energies are {energies.shape}; give (labels, points) = {(self._nlabel, self._nvar)}: labels first, pixels flat"
            )
        if np.isnan(energies).any() or (energies == -np.inf).any():
            raise ValueError("unary energies contain NaN or -inf; they are negative logarithms of probabilities, finite or +inf")
        impossible = energies == np.inf
        if impossible.any():
            energies = np.where(impossible, np.max(energies, where=~impossible, initial=0) + _IMPOSSIBLE, energies)
        self._unary, self._engine = energies.astype(np.float32), None

    def _add(self, points: Array, compat: float | ArrayLike, kernel: int, normalization: int) -> None:
        if not np.isfinite(points).all():
            raise ValueError("features contain NaN or infinite values; check bandwidths and image")
        KernelType(kernel)
        self._pairwise.append((points, self._energy_of(compat), _NORMALIZATION[NormalizationType(normalization)]))
        self._engine = None

    def _energy_of(self, compat: float | ArrayLike) -> Array:
        if isinstance(compat, Number):
            return np.asarray(-np.float32(compat))
        energy = np.asarray(compat, np.float32)
        if energy.shape not in ((self._nlabel,), (self._nlabel, self._nlabel)):
            raise ValueError(f"compat has shape {energy.shape}; give a number, ({self._nlabel},) or ({self._nlabel}, {self._nlabel})")
        return energy if energy.ndim == 1 else np.float32(0.5) * (energy + energy.T)

    def _field(self) -> "MeanField":
        """The engine with its lattices, built once for all calls."""
        if self._engine is None:
            from perpixel.refinement.mean_field_cpu import GaussianKernel, MeanField

            unary = np.zeros((self._nlabel, self._nvar), np.float32) if self._unary is None else self._unary
            self._engine = MeanField(unary, [GaussianKernel(*term) for term in self._pairwise])  # type: ignore[arg-type]
            self._stepped = None
        return self._engine

    def _continued(self, q: Array) -> "MeanField":
        """The engine at the caller's marginals, which may have been changed since we gave them."""
        if not isinstance(q, np.ndarray) or q.shape != (self._nlabel, self._nvar):
            raise ValueError(f"Q is {np.shape(q)}; give the {(self._nlabel, self._nvar)} array that startInference returned")
        field = self._field()
        if self._stepped is None or not np.array_equal(q, self._stepped):
            field.start(q)
        return field


class DenseCRF2D(DenseCRF):
    """A dense CRF over the pixels of an image, row by row.

    Args:
        w: width. h: height. In this order.
        nlabels: number of labels.
    """

    def __init__(self, w: int, h: int, nlabels: int):
        super().__init__(w * h, nlabels)
        self._w, self._h = int(w), int(h)

    def addPairwiseGaussian(  # noqa: N802
        self, sxy: Bandwidths, compat: float | ArrayLike, kernel: int = DIAG_KERNEL, normalization: int = NORMALIZE_SYMMETRIC
    ) -> None:
        """Add a kernel of pixels' positions. sxy: bandwidth in pixels, or (x, y); the rest as in `addPairwiseEnergy`."""
        self._add(self._positions(sxy), compat, kernel, normalization)

    def addPairwiseBilateral(  # noqa: N802
        self,
        sxy: Bandwidths,
        srgb: Bandwidths,
        rgbim: ArrayLike,
        compat: float | ArrayLike,
        kernel: int = DIAG_KERNEL,
        normalization: int = NORMALIZE_SYMMETRIC,
    ) -> None:
        """Add a kernel of pixels' positions and colours.

        Args:
            sxy: bandwidth in pixels, or (x, y).
            srgb: bandwidth of colours 0..255, or one for each of the three.
            rgbim: (h, w, 3) uint8. For other images see `utils.create_pairwise_bilateral` and `addPairwiseEnergy`.
            compat, kernel, normalization: as in `addPairwiseEnergy`.
        """
        image = np.asarray(rgbim)
        if image.shape != (self._h, self._w, 3) or image.dtype != np.uint8:
            raise ValueError(
                f"rgbim is {image.shape} {image.dtype}; give {(self._h, self._w, 3)} uint8. For other bands or types make features with "
                "utils.create_pairwise_bilateral and add them with addPairwiseEnergy"
            )
        colours = image.reshape(-1, 3).astype(np.float32) / _bandwidths("srgb", srgb, 3)
        self._add(np.concatenate([self._positions(sxy), colours], 1), compat, kernel, normalization)

    def _positions(self, sxy: Bandwidths) -> Array:
        y, x = np.divmod(np.arange(self._nvar), self._w)
        return np.stack([x, y], 1).astype(np.float32) / _bandwidths("sxy", sxy, 2)


def _bandwidths(name: str, value: Bandwidths, count: int) -> Array:
    numbers = np.broadcast_to(np.asarray(value, np.float32), count) if np.size(value) in (1, count) else np.zeros(0, np.float32)
    if not numbers.size or not (numbers > 0).all():
        raise ValueError(f"{name}={value}; give a positive number, or {count} of them")
    return numbers


def _floats(name: str, value: ArrayLike, dimensions: int) -> Array:
    """The array as contiguous float32."""
    array = np.asarray(value)
    if array.ndim != dimensions or not array.size or array.dtype.kind not in "fiub":
        raise ValueError(f"{name}: shape {array.shape}, {array.dtype}; give a real array of {dimensions} dimensions")
    return np.ascontiguousarray(array, np.float32)
