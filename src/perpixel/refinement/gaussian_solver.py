"""The linear system of a Gaussian CRF on the pixel grid: solved exactly, without ever writing the matrix down, and differentiated.

E(x) = 1/2 x^T M x - b^T x has one minimum, which is also the mean of the Gaussian exp(-E), where M is positive definite: M x = b. M has
lambda on its diagonal and a weight or a block of labels on every edge between neighbouring pixels.

Source: Chandra & Kokkinos 2016, arXiv:1603.08358, sections 2.1 to 2.3 (system and derivatives); Hestenes & Stiefel 1952, Journal of
Research of the National Bureau of Standards 49(6) (conjugate gradient); Gershgorin 1931 (the bound).
"""

import warnings
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

Offset = tuple[int, int]
DIAGONALS = ("dominant", "constant")
# Asking a GPU whether all is done makes it wait; a few iterations too many are cheaper.
ITERATIONS_BETWEEN_LOOKS = 8


class SolveReport(NamedTuple):
    """How solving went, one entry an image: (N,) each, on the device of the scores."""

    iterations: Tensor  # int64: of its slowest label
    residual: Tensor  # |b - M x| / |b| in the norm of the preconditioner, of its worst label, computed afresh at the end
    converged: Tensor  # bool: where False, the solution is b / lambda, as if there were no edges
    certain: Tensor  # bool: Gershgorin's circles show M positive definite; where False it may be so all the same


class System(NamedTuple):
    """M without its numbers on the grid written out. `edges` are zero where they lead out of the image."""

    edges: Tensor  # (N, D, H, W), or (N, D, K, K, H, W): blocks [label here, label there]
    offsets: tuple[Offset, ...]  # D of them: (down, right) from here to there
    lam: Tensor  # scalar
    matrix: Tensor | None  # (K, K) symmetric, the labels' part of an edge; None is the identity; None for blocks
    dominant: bool

    def times(self, x: Tensor) -> Tensor:
        """M x of (N, K, H, W); differentiable in everything."""
        if self.edges.ndim == 6:
            return (self.lam + self.degree()) * x + self._neighbours(x)
        messages = self._neighbours(x)
        if self.dominant:
            messages = messages + self.degree() * x
        return self.lam * x + (messages if self.matrix is None else _labels_times(self.matrix, messages))

    def degree(self) -> Tensor:
        """What makes the diagonal dominant: the sum of an unknown's edges, absolute; (N, 1, H, W), of blocks (N, K, H, W).

        Not yet times `matrix`. Zero where the diagonal is constant.
        """
        return self.absolute_sums() if self.dominant else torch.zeros_like(self.lam)

    def absolute_sums(self) -> Tensor:
        """Sum over the edges of each unknown of their absolute values; shapes as in `degree`."""
        size = self.edges.abs()
        if self.edges.ndim == 6:
            out, into = size.sum(3), size.sum(2)  # over the labels there, over the labels here: (N, D, K, H, W)
        else:
            out = into = size[:, :, None]
        total = torch.zeros_like(out[:, 0])
        for d, offset in enumerate(self.offsets):
            here, there = ends(offset, self.edges.shape[-2:])
            total[here] += out[:, d][here]
            total[there] += into[:, d][here]
        return total

    def certainly_positive(self) -> Tensor:
        """(N,) bool: every diagonal entry exceeds what stands beside it (Gershgorin)."""
        if self.dominant:
            return torch.isfinite(self.edges).flatten(1).all(1)
        scale = 1.0 if self.matrix is None else torch.linalg.matrix_norm(self.matrix, 2)
        return self.absolute_sums().flatten(1).amax(1) * scale < self.lam

    def _neighbours(self, x: Tensor) -> Tensor:
        """Sum over the edges of each pixel: weight times the score at the other end."""
        total = torch.zeros_like(x)
        for d, offset in enumerate(self.offsets):
            here, there = ends(offset, x.shape[-2:])
            if self.edges.ndim == 6:
                block = self.edges[:, d][(slice(None), *here)]
                total[here] += (block * x[there][:, None]).sum(2)
                total[there] += (block * x[here][:, :, None]).sum(1)
            else:
                weight = self.edges[:, d, None][here]
                total[here].addcmul_(weight, x[there])
                total[there].addcmul_(weight, x[here])
        return total


def gaussian_solve(
    scores: Tensor,
    edges: Tensor,
    offsets: tuple[Offset, ...],
    lam: Tensor | float,
    matrix: Tensor | None = None,
    *,
    diagonal: str = "dominant",
    tolerance: float = 1e-5,
    iterations: int = 1000,
    on_failure: str = "unary",
) -> tuple[Tensor, SolveReport]:
    """x with M x = scores, differentiable in scores, edges, lam and matrix by one more solve with the same M.

    Args:
        scores: (N, K, H, W) right-hand sides b, float32 or float64.
        edges: (N, D, H, W): weight of the edge from a pixel to the one at offset d from it; what leads out of the image is ignored.
            Positive pushes the scores at its ends apart, negative draws them together. Or (N, D, K, K, H, W), a block of labels an edge.
        offsets: D of (down, right).
        lam: more than 0; a number, or a tensor of one.
        matrix: (K, K), only its symmetric part counts: the block of an edge is its weight times this. None is the identity, where
            every label is solved for itself (Potts; Chandra & Kokkinos 2016, section 2.4).
        diagonal: "dominant": beside lambda each unknown gets the sum of its edges' absolute values (times `matrix`), so that M is
            positive definite whatever the edges are; with negative edges and a positive semidefinite matrix E is then
            1/2 lambda |x|^2 + 1/2 sum |w_pq| (x_p - x_q)^T matrix (x_p - x_q) - b^T x. "constant": lambda alone, as Chandra & Kokkinos
            have it, which is positive definite where lambda exceeds every pixel's sum.
        tolerance: of the residual, relative to the scores', in the norm of the preconditioner (M's diagonal).
        iterations: of conjugate gradient at most.
        on_failure: where an image does not converge, or M proves not positive definite: "unary" warns (RuntimeWarning) and gives
            scores / lam for that image, with the gradients of that; "error" raises.

    Returns:
        (N, K, H, W) solution, and the report.

    Raises:
        ValueError: if shapes do not fit, an option is not legal, lam is not positive, or the diagonal is to be dominant and `matrix` is
            not positive semidefinite.
        RuntimeError: with on_failure="error".
    """
    _check(scores, edges, offsets, diagonal, tolerance, iterations, on_failure)
    lam = torch.as_tensor(lam, dtype=scores.dtype, device=scores.device)
    if not bool(lam > 0):
        raise ValueError(f"lambda is {float(lam)}; it must be more than 0")
    if matrix is not None:
        if edges.ndim == 6 or matrix.shape != (scores.shape[1],) * 2:
            raise ValueError(f"matrix has shape {tuple(matrix.shape)}; it is (K, K) for K = {scores.shape[1]}, and blocks go without one")
        matrix = ((matrix + matrix.T) / 2).to(scores)
    edges = _inside(edges, offsets)
    system = System(edges.detach(), offsets, lam.detach(), None if matrix is None else matrix.detach(), diagonal == "dominant")
    with torch.no_grad():
        x, report = _solve(system, scores.detach(), tolerance, iterations)
    if not bool(report.converged.all()):
        _tell(report, system, on_failure)
        # Without its edges the image's system is lambda x = b, which the solution and all gradients then follow.
        ok = report.converged.view(-1, *[1] * (edges.ndim - 1))
        edges = torch.where(ok, edges, torch.zeros_like(edges))
        x = torch.where(report.converged.view(-1, 1, 1, 1), x, scores.detach() / system.lam)
    # Gradients need not come from how x was found: they follow from M x = b.
    solved: Tensor = _Implicit.apply(scores, edges, lam, matrix, x, (offsets, system.dominant, tolerance, iterations))
    return solved, report


def neighbourhood(neighbours: int) -> tuple[Offset, ...]:
    """Offsets to one half of a pixel's neighbours, nearest first, so that every edge is there once: 4, or (2r + 1)^2 - 1 of a window.

    Raises:
        ValueError: if no window has so many.
    """
    reach = round((max(neighbours + 1, 0) ** 0.5 - 1) / 2)
    if neighbours == 4:
        return ((0, 1), (1, 0))
    if reach < 1 or (2 * reach + 1) ** 2 - 1 != neighbours:
        raise ValueError(f"neighbours is {neighbours}; it must be 4, 8 (3x3 pixels), 24 (5x5), 48 (7x7) or another odd window less one")
    half = [(y, x) for y in range(reach + 1) for x in range(-reach, reach + 1) if (y, x) > (0, 0)]
    return tuple(sorted(half, key=lambda offset: (offset[0] ** 2 + offset[1] ** 2, offset)))


def ends(offset: Offset, size: Any) -> tuple[tuple[Any, ...], tuple[Any, ...]]:
    """Indices of (..., H, W) with one axis between N and H: where the edges of an offset start, and where they end."""
    (down, right), (height, width) = offset, size
    rows, columns = max(height - abs(down), 0), max(width - abs(right), 0)
    top, left = max(-down, 0), max(-right, 0)
    here = slice(top, top + rows), slice(left, left + columns)
    there = slice(top + down, top + down + rows) if rows else slice(0), slice(left + right, left + right + columns) if columns else slice(0)
    if not rows or not columns:
        here = there = (slice(0), slice(0))
    return (slice(None), slice(None), *here), (slice(None), slice(None), *there)


class _Implicit(torch.autograd.Function):
    """x of M x = b, known already; only its derivatives are found here (Chandra & Kokkinos 2016, equations 7 and 10)."""

    @staticmethod
    def forward(ctx: Any, scores: Tensor, edges: Tensor, lam: Tensor, matrix: Tensor | None, x: Tensor, rest: tuple[Any, ...]) -> Tensor:
        ctx.save_for_backward(edges, lam, matrix, x)
        ctx.rest = rest
        return x.clone()

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        offsets, dominant, tolerance, iterations = ctx.rest
        edges, lam, matrix, x = ctx.saved_tensors
        with torch.no_grad():
            of_scores, report = _solve(System(edges, offsets, lam, matrix, dominant), gradient, tolerance, iterations)
        finite = torch.isfinite(gradient).flatten(1).all(1)
        of_scores = of_scores.masked_fill(~finite.view(-1, 1, 1, 1), torch.nan)  # what scales losses in half precision looks for it
        lost = finite & ~report.converged
        if bool(lost.any()):
            warnings.warn(
                f"Gaussian CRF: the gradient of {int(lost.sum())} images did not converge (residual "
                f"{float(report.residual[lost].max()):.1e}); it is used as far as it got",
                RuntimeWarning,
                stacklevel=2,
            )
        # d x = M^-1 (d b - d M x), so every number in M has the gradient - (M^-1 g)^T (d M) x.
        # One product by autograd gives them all, whatever form M has.
        wanted = ctx.needs_input_grad[1:4]
        edges, lam = (value.detach().requires_grad_(w) for value, w in zip((edges, lam), wanted, strict=False))
        matrix = None if matrix is None else matrix.detach().requires_grad_(wanted[2])
        inputs = [value for value, w in zip((edges, lam, matrix), wanted, strict=True) if value is not None and w]
        found: list[Tensor | None] = [None, None, None]
        if inputs:
            with torch.enable_grad():
                product = System(edges, offsets, lam, matrix, dominant).times(x)
            grads = iter(torch.autograd.grad(product, inputs, -of_scores))
            found = [next(grads) if w else None for w in wanted]
        return of_scores, *found, None, None


def _solve(system: System, scores: Tensor, tolerance: float, iterations: int) -> tuple[Tensor, SolveReport]:
    """Conjugate gradient, by label where labels do not speak to each other."""
    if system.edges.ndim == 6:
        diagonal = (system.lam + system.degree()).expand_as(scores)
        x, done, steps, residual = _conjugate_gradient(system.times, scores, diagonal, tolerance, iterations, (1, 2, 3))
        return x, _report(system, done, steps, residual, tolerance)
    # In the directions of the eigenvectors of a shared matrix each is a system of its own: K products with K labels less an iteration.
    basis, strength = None, None
    if system.matrix is not None:
        values, basis = torch.linalg.eigh(system.matrix)
        if system.dominant and float(values[0]) < -1e-5 * max(float(values[-1]), 1e-30):
            raise ValueError(
                f"matrix has an eigenvalue of {float(values[0]):.3g}; with a dominant diagonal it must be positive semidefinite, as a "
                'product L @ L.T is; any symmetric matrix goes with diagonal="constant"'
            )
        strength = (values.clamp_min(0) if system.dominant else values).view(1, -1, 1, 1)
        scores = _labels_times(basis.T, scores)
    solve = _by_label if scores.device.type == "cpu" else _by_tensors
    x, report = solve(system, scores, strength, tolerance, iterations)
    return (x if basis is None else _labels_times(basis, x)), report


def _by_label(system: System, scores: Tensor, strength: Tensor | None, tolerance: float, iterations: int) -> tuple[Tensor, SolveReport]:
    """On a processor."""
    from perpixel.refinement.gaussian_loops import conjugate_gradient_by_label  # numba takes a moment to load, and a GPU never needs it

    degree = system.degree() if system.dominant else None
    x, done, steps, residual = conjugate_gradient_by_label(
        scores, system.edges, system.offsets, float(system.lam), degree, strength, tolerance, iterations
    )
    return x, _report(system, done, steps, residual, tolerance)


def _by_tensors(system: System, scores: Tensor, strength: Tensor | None, tolerance: float, iterations: int) -> tuple[Tensor, SolveReport]:
    """On any device, by torch's operations on whole batches."""
    degree = system.degree()
    diagonal = system.lam + (degree if strength is None else strength * degree)
    diagonal = diagonal.expand(scores.shape[0], diagonal.shape[1] if diagonal.ndim else 1, *scores.shape[2:])
    weights = [(offset, system.edges[:, d, None]) for d, offset in enumerate(system.offsets)]

    def times(p: Tensor) -> Tensor:
        product = diagonal * p
        source = p if strength is None else strength * p
        for offset, weight in weights:
            here, there = ends(offset, p.shape[-2:])
            product[here].addcmul_(weight[here], source[there])
            product[there].addcmul_(weight[here], source[here])
        return product

    x, done, steps, residual = _conjugate_gradient(times, scores, diagonal, tolerance, iterations, (2, 3))
    return x, _report(system, done, steps, residual, tolerance)


def _conjugate_gradient(
    times: Callable[[Tensor], Tensor], b: Tensor, diagonal: Tensor, tolerance: float, iterations: int, dims: tuple[int, ...]
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Preconditioned with the diagonal, from x = 0; each of the systems over `dims` has its own steps and stops for itself.

    Returns x, and by system whether it reached the tolerance, its iterations, and its residual computed afresh, since rounding lets the
    running one drift from it.
    """
    x, residual = torch.zeros_like(b), b.clone()
    z = residual / diagonal
    p = z.clone()
    size = (residual * z).sum(dims, keepdim=True)
    whole = torch.where(size > 0, size, 1.0)
    target = tolerance**2 * size
    sound = torch.isfinite(size)
    steps = torch.zeros_like(size, dtype=torch.int64)
    every = 1 if b.device.type == "cpu" else ITERATIONS_BETWEEN_LOOKS
    for iteration in range(iterations):
        active = sound & (size > target)
        if iteration % every == 0 and not bool(active.any()):
            break
        product = times(p)
        curvature = (p * product).sum(dims, keepdim=True)
        sound = sound & (~active | (curvature > 0))  # not so, or NaN: M is not positive definite
        active = active & sound
        step = torch.where(active, size / curvature, 0.0)
        x.addcmul_(step, p)
        residual.addcmul_(-step, product)
        torch.div(residual, diagonal, out=z)
        new = (residual * z).sum(dims, keepdim=True)
        p.mul_(torch.where(active, new / size, 0.0)).add_(z)
        size = torch.where(active, new, size)
        steps += active
    left = b - times(x)
    return x, sound & (size <= target), steps, ((left * left / diagonal).sum(dims, keepdim=True) / whole).sqrt()


def _report(system: System, done: Tensor, steps: Tensor, residual: Tensor, tolerance: float) -> SolveReport:
    """What became of each image, from what became of each of its systems."""
    exact = residual <= max(10 * tolerance, 100 * torch.finfo(residual.dtype).eps)
    converged = (done & exact).flatten(1).all(1)
    return SolveReport(steps.flatten(1).amax(1), residual.flatten(1).amax(1), converged, system.certainly_positive())


def _tell(report: SolveReport, system: System, on_failure: str) -> None:
    failed = ~report.converged
    words = (
        f"Gaussian CRF: {int(failed.sum())} of {len(failed)} images did not converge (after up to {int(report.iterations.max())} "
        f"iterations, residual {float(report.residual[failed].max()):.1e})"
    )
    if not bool(report.certain[failed].all()):
        largest = float(system.absolute_sums().flatten(1).amax(1)[failed].max())
        words += (
            f": lambda is {float(system.lam):.3g} and the edges of a pixel sum up to {largest:.3g}, so the matrix may not be positive "
            'definite; use diagonal="dominant" or a larger lambda'
        )
    else:
        words += "; allow more iterations, a larger tolerance, or take smaller weights"
    if on_failure == "error":
        raise RuntimeError(words)
    warnings.warn(words + ". Their scores are returned as they came", RuntimeWarning, stacklevel=3)


def _labels_times(matrix: Tensor, x: Tensor) -> Tensor:
    """(K, K) times (N, K, H, W) over the labels."""
    return (matrix @ x.flatten(2)).view_as(x)


def _inside(edges: Tensor, offsets: tuple[Offset, ...]) -> Tensor:
    """The edges with zeros where they lead out of the image, whatever stood there: NaN times nothing would be NaN."""
    mask = torch.zeros(1, len(offsets), *edges.shape[-2:], dtype=torch.bool, device=edges.device)
    for d, offset in enumerate(offsets):
        mask[:, d : d + 1][ends(offset, edges.shape[-2:])[0]] = True
    mask = mask if edges.ndim == 4 else mask[:, :, None, None]
    return torch.where(mask, edges, torch.zeros_like(edges))


def _check(
    scores: Tensor, edges: Tensor, offsets: tuple[Offset, ...], diagonal: str, tolerance: float, iterations: int, on_failure: str
) -> None:
    if scores.ndim != 4 or scores.dtype not in (torch.float32, torch.float64):
        raise ValueError(f"scores are {scores.dtype} of shape {tuple(scores.shape)}; they must be float32 or float64 (N, K, H, W)")
    batch, labels, height, width = scores.shape
    sizes = (batch, len(offsets), height, width), (batch, len(offsets), labels, labels, height, width)
    if tuple(edges.shape) not in sizes:
        raise ValueError(
            f"edges have shape {tuple(edges.shape)}; for these scores and {len(offsets)} offsets it is {sizes[0]} or {sizes[1]}"
        )
    if diagonal not in DIAGONALS or on_failure not in ("unary", "error"):
        raise ValueError(f"diagonal is {diagonal!r}, on_failure {on_failure!r}; known: {', '.join(DIAGONALS)}; unary, error")
    if not 0 < tolerance < 1 or iterations < 0:
        raise ValueError(f"tolerance is {tolerance}, iterations {iterations}; the one lies between 0 and 1, the other is 0 or more")
