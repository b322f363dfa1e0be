"""The torch lattice against a lattice made of a dictionary and loops, and against the Gaussian itself."""

import math

import pytest
import torch
from torch import Tensor

from perpixel.refinement import permutohedral
from perpixel.refinement.permutohedral import GaussianFilter, PermutohedralLattice


def dense_lattice(features: Tensor) -> Tensor:
    """(P, P) matrix of the filter for (P, d) features: Adams et al. 2010, sections 3 and 4, with a dictionary of corners."""
    points, d = features.shape
    scale = math.sqrt(2 / 3) * (d + 1)
    corners: dict[tuple[int, ...], int] = {}
    weights = []
    for point in features.tolist():
        scaled = [f * scale / math.sqrt((i + 1) * (i + 2)) for i, f in enumerate(point)]
        y = [sum(scaled)] + [sum(scaled[i:]) - i * scaled[i - 1] for i in range(1, d + 1)]
        # The nearest lattice point of remainder 0: round every coordinate to a multiple of d + 1, then give back what was rounded furthest.
        cells = [round(v / (d + 1)) for v in y]
        distance = [v - (d + 1) * c for v, c in zip(y, cells, strict=True)]
        by_distance = sorted(range(d + 1), key=lambda i: distance[i])
        for _ in range(sum(cells)):
            cells[by_distance.pop(0)] -= 1
        by_distance = sorted(range(d + 1), key=lambda i: -distance[i])
        for _ in range(-sum(cells)):
            cells[by_distance.pop(0)] += 1
        origin = [(d + 1) * c for c in cells]
        order = sorted(range(d + 1), key=lambda i: y[i] - origin[i], reverse=True)
        residual = [(y[i] - origin[i]) / (d + 1) for i in order]
        row = {}
        for k in range(d + 1):
            corner = list(origin)
            for i in range(d + 1):
                corner[i] += k
            for i in order[d + 1 - k :]:
                corner[i] -= d + 1
            weight = residual[d - k] - residual[d - k + 1] if k else 1 + residual[d] - residual[0]
            row[corners.setdefault(tuple(corner), len(corners))] = weight
        weights.append(row)
    splat = torch.zeros(len(corners), points, dtype=torch.float64)
    for p, row in enumerate(weights):
        for corner, weight in row.items():
            splat[corner, p] = weight
    blur = torch.eye(len(corners), dtype=torch.float64)
    for axis in range(d + 1):
        step = torch.eye(len(corners), dtype=torch.float64)
        for corner, number in corners.items():
            for sign in (1, -1):
                neighbour = tuple(c + sign * (d if i == axis else -1) for i, c in enumerate(corner))
                if neighbour in corners:
                    step[number, corners[neighbour]] = 0.5
        blur = step @ blur
    return splat.T @ blur @ splat / (1 + 2.0**-d)


def matrix(gaussian: GaussianFilter, pixels: int) -> Tensor:
    return gaussian(torch.eye(pixels, dtype=torch.float64))


def scattered(points: int, d: int, spread: float, seed: int = 0) -> Tensor:
    return torch.randn(points, d, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) * spread


@pytest.mark.parametrize(("d", "spread"), [(1, 3.0), (2, 2.0), (3, 0.7), (5, 1.5), (5, 20.0), (7, 1.0)])
def test_filter_equals_the_lattice_built_with_a_dictionary(d, spread):
    features = scattered(40, d, spread)
    torch.testing.assert_close(matrix(GaussianFilter(features[None], "none"), 40), dense_lattice(features), rtol=1e-9, atol=1e-12)


def test_filter_is_close_to_the_gaussian_where_pixels_lie_densely():
    y, x = torch.meshgrid(torch.arange(30.0), torch.arange(30.0), indexing="ij")
    colour = 3 * torch.sin(x / 8) * torch.cos(y / 9)
    features = torch.stack([x / 6, y / 6, colour], -1).view(1, -1, 3).double()
    exact = torch.exp(-0.5 * torch.cdist(features[0], features[0]) ** 2)
    exact = exact / exact.sum(1, keepdim=True)
    values = torch.stack([(x > 15).double(), torch.sin(x / 5) + y / 30], -1).view(-1, 2).double()
    got = GaussianFilter(features, "after")(values)
    assert (got - exact @ values).abs().max() < 0.05 * (values.max() - values.min())


@pytest.mark.parametrize(("normalisation", "power"), [("before", 1.0), ("symmetric", 0.5), ("after", 0.0)])
def test_each_normalisation_keeps_its_own_power_of_the_row_sums(normalisation, power):
    """K D^-1 n = n, D^-1/2 K D^-1/2 n^1/2 = n^1/2 and D^-1 K 1 = 1, with n = K 1."""
    features = scattered(300, 3, 1.0)[None]
    kept = GaussianFilter(features, "none")(torch.ones(300, 1, dtype=torch.float64)) ** power
    torch.testing.assert_close(GaussianFilter(features, normalisation)(kept), kept)


def test_images_of_a_batch_never_mix():
    features = scattered(300, 4, 1.0).view(3, 100, 4)
    features[1] = features[0]
    values = scattered(300, 6, 1.0, seed=1)
    alone = torch.cat([GaussianFilter(f[None], "symmetric")(v) for f, v in zip(features, values.view(3, 100, 6), strict=True)])
    torch.testing.assert_close(GaussianFilter(features, "symmetric")(values), alone)


def test_keys_that_would_overflow_are_hashed_to_the_same_result(monkeypatch):
    """Twenty features, ten bandwidths wide each, take about 20 * 9 bits."""
    features, hashed = scattered(16, 20, 5.0), []
    monkeypatch.setattr(permutohedral, "_random_strides", lambda *a, call=permutohedral._random_strides: hashed.append(1) or call(*a))
    torch.testing.assert_close(matrix(GaussianFilter(features[None], "none"), 16), dense_lattice(features), rtol=1e-9, atol=1e-12)
    assert hashed


def test_corners_that_share_a_hash_are_told_apart(monkeypatch):
    """A hash that sums up the coordinates sends different corners to one key, and must be given up for the next."""
    honest = permutohedral._random_strides
    tried = []

    def clashing(count: int, attempt: int) -> list[int]:
        tried.append(attempt)
        return [1] * count if attempt == 0 else honest(count, attempt)

    monkeypatch.setattr(permutohedral, "_exact_strides", lambda place: None)
    monkeypatch.setattr(permutohedral, "_random_strides", clashing)
    features = scattered(80, 3, 2.0)
    torch.testing.assert_close(matrix(GaussianFilter(features[None], "none"), 80), dense_lattice(features), rtol=1e-9, atol=1e-12)
    assert tried == [0, 1]


def test_a_neighbour_that_only_shares_a_hash_is_not_a_neighbour(monkeypatch):
    """Small factors give corners different keys and yet send a missing neighbour to the key of some other corner."""
    features = scattered(12, 2, 6.0)
    honest, neighbours = permutohedral._random_strides, permutohedral._neighbours
    monkeypatch.setattr(permutohedral, "_exact_strides", lambda place: None)
    misled = 0
    for factor in range(8, 28):
        strides = [1, factor, 10**9]
        monkeypatch.setattr(permutohedral, "_random_strides", lambda n, attempt, s=strides: honest(n, attempt) if attempt else s)
        torch.testing.assert_close(matrix(GaussianFilter(features[None], "none"), 12), dense_lattice(features), rtol=1e-9, atol=1e-12)
        unchecked = lambda keys, strides, coordinates, *rest: neighbours(keys, strides, None, *rest)  # noqa: E731
        monkeypatch.setattr(permutohedral, "_neighbours", unchecked)
        misled += not torch.allclose(matrix(GaussianFilter(features[None], "none"), 12), dense_lattice(features))
        monkeypatch.setattr(permutohedral, "_neighbours", neighbours)
    assert misled


def test_thousands_of_like_pixels_at_one_corner_are_summed_in_runs():
    features = torch.zeros(2, 5000, 2, dtype=torch.float64)
    values = scattered(10000, 3, 1.0)
    means = values.view(2, 5000, 3).mean(1, keepdim=True).expand(-1, 5000, -1).reshape(-1, 3)
    lattice = PermutohedralLattice(features)
    assert len(lattice._runs) == 2
    torch.testing.assert_close(GaussianFilter(features, "after")(values), means)


def test_features_too_many_bandwidths_from_zero_are_refused():
    with pytest.raises(ValueError, match="use larger bandwidths"):
        PermutohedralLattice(torch.full((1, 4, 2), 1e7))


@pytest.mark.parametrize("normalisation", permutohedral.NORMALISATIONS)
def test_gradients_of_values_and_features_are_those_of_the_filter(normalisation):
    features = scattered(8, 2, 1.0).view(2, 4, 2).requires_grad_()
    values = scattered(8, 2, 1.0, seed=1).requires_grad_()
    assert torch.autograd.gradcheck(lambda f, v: GaussianFilter(f, normalisation)(v), (features, values))


def test_float32_agrees_with_float64():
    features, values = scattered(500, 5, 2.0)[None], scattered(500, 4, 1.0, seed=1)
    single = GaussianFilter(features.float(), "symmetric")(values.float())
    torch.testing.assert_close(single.double(), GaussianFilter(features, "symmetric")(values), rtol=1e-4, atol=1e-4)
