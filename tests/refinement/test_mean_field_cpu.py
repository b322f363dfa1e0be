"""Mean field on the processor against the sum over all pairs of pixels that it stands for (Kraehenbuehl & Koltun 2011, algorithm 1)."""

import subprocess
import sys
import threading

import numpy as np
import pytest
from numba import njit

from perpixel.refinement.mean_field_cpu import GaussianKernel, MeanField, Rows, filtered, mean_field
from perpixel.refinement.vectors import LOWEST, lanes, load, power, store

NORMALISATIONS = ["none", "before", "after", "symmetric"]


def pixels(seed=0, height=5, width=6):
    """Features of an appearance and a smoothness kernel on a small image of two flat halves and noise."""
    rng = np.random.default_rng(seed)
    y, x = np.mgrid[:height, :width].astype(np.float32)
    colour = np.where(x < width / 2, 0.0, 3.0)[..., None] + rng.normal(0, 0.3, (height, width, 3))
    appearance = np.concatenate([np.stack([x, y], -1) / 4, colour], -1).reshape(-1, 5).astype(np.float32)
    return appearance, np.stack([x, y], -1).reshape(-1, 2) / np.float32(1.5)


def energies(labels, size, seed=0, scale=2.0):
    return (scale * np.random.default_rng(seed).normal(size=(labels, size))).astype(np.float32)


def softmax(scores):
    powers = np.exp(scores - scores.max(0))
    return powers / powers.sum(0)


def matrix_of(kernel):
    """(P, P) of a kernel's filter, from its answers to unit vectors, three at a time; float64."""
    size = len(kernel.features)
    parts = np.array_split(np.eye(size, dtype=np.float32), size // 3)
    return np.concatenate([filtered(part, kernel, threads=1) for part in parts]).T.astype(np.float64)


def slow_mean_field(unary, kernels, iterations, damping=1.0):
    unary = unary.astype(np.float64)
    matrices = [matrix_of(kernel) for kernel in kernels]
    q = softmax(-unary)
    for _ in range(iterations):
        energy = unary.copy()
        for kernel, matrix in zip(kernels, matrices, strict=True):
            message = q @ matrix.T
            transform = np.asarray(kernel.transform, np.float64)
            energy += transform @ message if transform.ndim == 2 else transform.reshape(-1, 1) * message
        q = damping * softmax(-energy) + (1 - damping) * q
    return q


TRANSFORMS = {
    "potts": lambda k: np.float32(-3),
    "repelling": lambda k: np.float32(0.5),
    "diagonal": lambda k: -np.linspace(0.5, 4, k).astype(np.float32),
    "full": lambda k: np.random.default_rng(9).normal(0, 2, (k, k)).astype(np.float32),
}


@pytest.mark.parametrize("how", NORMALISATIONS)
@pytest.mark.parametrize("transform", TRANSFORMS)
@pytest.mark.parametrize("labels", [2, 4])
def test_marginals_equal_the_sum_over_all_pairs(labels, transform, how):
    appearance, place = pixels()
    kernels = [
        GaussianKernel(appearance, TRANSFORMS[transform](labels), how),
        GaussianKernel(place, np.float32(-1.5), "symmetric"),
    ]
    unary = energies(labels, len(place))
    for threads in (1, 3):
        result = np.exp(mean_field(unary, kernels, 5, threads=threads))
        np.testing.assert_allclose(result, slow_mean_field(unary, kernels, 5), atol=2e-5)


def test_two_kernels_with_label_matrices_each_get_their_own():
    appearance, place = pixels()
    kernels = [GaussianKernel(appearance, TRANSFORMS["full"](4), "after"), GaussianKernel(place, TRANSFORMS["diagonal"](4), "before")]
    unary = energies(4, len(place))
    np.testing.assert_allclose(np.exp(mean_field(unary, kernels, 4)), slow_mean_field(unary, kernels, 4), atol=2e-5)


def potts(how="symmetric"):
    appearance, place = pixels()
    return [GaussianKernel(appearance, np.float32(-3), how), GaussianKernel(place, np.float32(-1.5), how)]


@pytest.mark.parametrize("damping", [0.3, 0.9])
def test_damping_mixes_new_and_old_marginals(damping):
    kernels, unary = potts(), energies(4, 30)
    result = np.exp(mean_field(unary, kernels, 4, damping=damping))
    np.testing.assert_allclose(result, slow_mean_field(unary, kernels, 4, damping), atol=2e-5)


def test_tolerance_stops_at_the_fixed_point():
    kernels, unary = potts(), energies(4, 30)
    many = mean_field(unary, kernels, 200)
    np.testing.assert_allclose(np.exp(mean_field(unary, kernels, 10**6, tolerance=1e-6, threads=2)), np.exp(many), atol=1e-4)
    early = np.exp(mean_field(unary, kernels, 10**6, tolerance=0.5))
    assert np.abs(early - np.exp(many)).max() > 1e-3  # a large tolerance does stop earlier


def test_steps_equal_a_run_and_start_again():
    kernels, unary = potts(), energies(4, 30)
    state = MeanField(unary, kernels)
    np.testing.assert_allclose(state.q, softmax(-unary), atol=1e-6)
    for _ in range(3):
        state.step()
    np.testing.assert_allclose(state.q, np.exp(mean_field(unary, kernels, 3)), atol=1e-5)
    state.start()
    state.run(2)
    state.run(1)
    np.testing.assert_allclose(state.q, np.exp(mean_field(unary, kernels, 3)), atol=1e-5)
    given = softmax(energies(4, 30, seed=5))
    state.start(given)
    np.testing.assert_allclose(state.q, given, atol=1e-6)


@pytest.mark.parametrize("transform", TRANSFORMS)
def test_kl_divergence_is_that_of_its_definition(transform):
    appearance, place = pixels()
    kernels = [GaussianKernel(appearance, TRANSFORMS[transform](4), "symmetric"), GaussianKernel(place, np.float32(-1.5), "after")]
    unary = energies(4, 30)
    state = MeanField(unary, kernels)
    for _ in range(3):
        q = state.q.astype(np.float64)
        expected = (q * np.log(q)).sum() + (q * unary).sum()
        for kernel in kernels:
            message = q @ matrix_of(kernel).T
            square = kernel.transform if kernel.transform.ndim == 2 else np.diag(np.broadcast_to(kernel.transform, 4))
            expected += (q * (square @ message)).sum()
        assert state.kl_divergence() == pytest.approx(expected, rel=1e-4, abs=1e-3)
        state.step()


def test_one_label_is_certain_everywhere():
    kernels = potts()
    np.testing.assert_array_equal(mean_field(energies(1, 30), kernels, 5), 0)
    assert MeanField(energies(1, 30), kernels).kl_divergence() == pytest.approx(energies(1, 30).sum(), abs=1e-3)


def test_two_hundred_labels_equal_the_sum_over_all_pairs():
    kernels, unary = potts(), energies(200, 30)
    np.testing.assert_allclose(np.exp(mean_field(unary, kernels, 3)), slow_mean_field(unary, kernels, 3), atol=2e-5)


@pytest.mark.parametrize("labels", [1, 2, 4])
def test_one_pixel(labels):
    kernel = GaussianKernel(np.zeros((1, 2), np.float32), np.float32(-3), "after")
    unary = energies(labels, 1)
    np.testing.assert_allclose(np.exp(mean_field(unary, [kernel], 3)), slow_mean_field_of_one(unary), atol=1e-5)


def slow_mean_field_of_one(unary):
    """A pixel alone, its own neighbour with weight 1 by normalisation."""
    q = softmax(-unary)
    for _ in range(3):
        q = softmax(-unary + 3 * q)
    return q


@pytest.mark.parametrize("kernels", [[], [GaussianKernel(pixels()[0], np.float32(0))]])
def test_no_kernel_or_a_weight_of_zero_changes_nothing(kernels):
    unary = energies(4, 30)
    for damping in (1.0, 0.5):
        np.testing.assert_allclose(np.exp(mean_field(unary, kernels, 5, damping=damping)), softmax(-unary), atol=1e-6)


def test_no_iterations_change_nothing():
    unary = energies(4, 30)
    np.testing.assert_allclose(np.exp(mean_field(unary, potts(), 0)), softmax(-unary), atol=1e-6)


@pytest.mark.parametrize("scale", [1e3, 1e6, 1e20, 2e37])
def test_unaries_of_any_size_give_finite_scores_and_their_own_labels(scale):
    unary = energies(4, 30, scale=1).clip(-3, 3) * np.float32(scale)
    result = mean_field(unary, potts(), 5)
    assert np.isfinite(result).all()
    np.testing.assert_array_equal(result.argmax(0), unary.argmin(0))
    assert np.isfinite(mean_field(unary, potts(), 5, damping=0.5)).all()


def test_a_constant_added_to_a_pixels_energies_changes_nothing():
    unary = energies(4, 30)
    shifted = unary + np.linspace(-500, 500, 30, dtype=np.float32)
    np.testing.assert_allclose(np.exp(mean_field(shifted, potts(), 5)), np.exp(mean_field(unary, potts(), 5)), atol=1e-4)


@njit
def _powers(values, out):
    for i in range(0, len(values), 16):
        store(out, i, power(load(values, i, _SIXTEEN)))


_SIXTEEN = lanes(16)


def test_power_is_exp_and_never_a_denormal():
    values = np.linspace(-120, 0, 16 * 4000).astype(np.float32)
    out = np.empty_like(values)
    _powers(values, out)
    inside = values >= LOWEST
    np.testing.assert_allclose(out[inside], np.exp(values[inside].astype(np.float64)), rtol=4e-7)
    assert (out[~inside] == 0).all()
    assert out[inside].min() > 1e-30


@pytest.mark.parametrize("width", [80, 81])
def test_fast_mode_keeps_nearly_all_labels(width):
    """Two flat regions with noisy scores, an odd and an even width; the docstring states what photographs keep."""
    height = 60
    appearance, place = pixels(height=height, width=width)
    kernels = [GaussianKernel(appearance, np.float32(-10)), GaussianKernel(place, np.float32(-3))]
    unary = energies(4, height * width, scale=1)
    unary[0, appearance[:, 2] < 1.5] -= 1
    unary[1, appearance[:, 2] >= 1.5] -= 1
    full, fast = (mean_field(unary, kernels, 5, fast=fast, width=width) for fast in (False, True))
    assert (full.argmax(0) == fast.argmax(0)).mean() > 0.995
    assert not np.array_equal(full, fast)  # a few updates more, and both have converged to the same bits
    np.testing.assert_allclose(np.exp(fast).sum(0), 1, atol=1e-4)


def test_threads_and_python_threads_side_by_side_agree():
    kernels, unary = potts(), energies(4, 30)
    expected = mean_field(unary, kernels, 10, threads=1)
    results = [None] * 4

    def work(number):
        results[number] = mean_field(unary, kernels, 10, threads=1 + number)

    workers = [threading.Thread(target=work, args=(number,)) for number in range(4)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    for result in results:
        np.testing.assert_allclose(result, expected, atol=1e-4)


def test_input_need_not_be_contiguous_and_is_left_alone():
    appearance, _ = pixels()
    unary = energies(4, 30)
    kept = unary.copy(), appearance.copy()
    wide = np.asfortranarray(appearance)
    one = mean_field(unary, [GaussianKernel(appearance, np.float32(-3))], 3)
    two = mean_field(np.asfortranarray(unary), [GaussianKernel(wide, np.float32(-3))], 3)
    np.testing.assert_array_equal(one, two)
    np.testing.assert_array_equal(unary, kept[0])
    np.testing.assert_array_equal(appearance, kept[1])


def test_rows_waste_little():
    for channels in range(1, 300):
        rows = Rows(channels)
        assert channels <= rows.width <= max(channels + 7, 1.25 * channels)
        assert rows.lanes <= 64
    assert (Rows(1).lanes, Rows(2).lanes, Rows(20).lanes, Rows(199).chunks) == (1, 2, 24, 4)


@pytest.mark.parametrize(
    ("unary", "kernel", "options", "words"),
    [
        (np.zeros(30), {}, {}, r"\(K, P\)"),
        (np.full((4, 30), np.nan), {}, {}, "finite"),
        (np.zeros((4, 29)), {}, {}, "29"),
        (np.zeros((4, 30)), {"transform": np.zeros(3)}, {}, "transform"),
        (np.zeros((4, 30)), {"transform": np.float32(np.inf)}, {}, "finite"),
        (np.zeros((4, 30)), {"normalization": "both"}, {}, "symmetric"),
        (np.zeros((4, 30)), {}, {"iterations": -1}, "iterations"),
        (np.zeros((4, 30)), {}, {"damping": 0}, "damping"),
        (np.zeros((4, 30)), {}, {"tolerance": -1}, "tolerance"),
        (np.zeros((4, 30)), {}, {"tolerance": 0.1, "fast": True}, "fast"),
        (np.zeros((4, 30)), {}, {"threads": 0}, "threads"),
    ],
)
def test_bad_input_is_refused_with_what_came(unary, kernel, options, words):
    made = GaussianKernel(**{"features": pixels()[0], "transform": np.float32(-1), **kernel})
    with pytest.raises(ValueError, match=words):
        mean_field(unary.astype(np.float32), [made], **{"iterations": 1, **options})


def test_a_second_process_starts_from_the_cache():
    """Nothing is compiled in it: numba reports the loops as loaded. The tests above have compiled them."""
    code = """
import numpy as np
from perpixel.refinement import mean_field_cpu, mean_field_loops, permutohedral_cpu
kernel = mean_field_cpu.GaussianKernel(np.zeros((9, 2), np.float32), np.float32(-1))
mean_field_cpu.mean_field(np.zeros((4, 9), np.float32), [kernel], 1)
for loops in (mean_field_loops.infer, mean_field_loops.pass_through, permutohedral_cpu._place):
    assert not loops.stats.cache_misses, loops
    assert loops.stats.cache_hits, loops
"""
    mean_field(np.zeros((4, 9), np.float32), [GaussianKernel(np.zeros((9, 2), np.float32), np.float32(-1))], 1)
    subprocess.run([sys.executable, "-c", code], check=True, timeout=300)
