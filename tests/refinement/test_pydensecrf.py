"""The drop-in against results of pydensecrf itself, and the examples of its README in our words."""

import subprocess
import sys

import numpy as np
import pytest
from pydensecrf_cases import CASES, RECORDED, scene

import perpixel.refinement.pydensecrf as package
import perpixel.refinement.pydensecrf.densecrf as dcrf
from perpixel.refinement.pydensecrf import utils
from perpixel.refinement.pydensecrf.utils import create_pairwise_bilateral, create_pairwise_gaussian, unary_from_labels, unary_from_softmax

THEIRS = np.load(RECORDED)


@pytest.mark.parametrize("name", [name for name in CASES if name not in ("KL of steps", "labels of a picture")])
def test_marginals_equal_those_of_pydensecrf(name):
    ours = CASES[name](dcrf, utils)
    assert ours.shape == THEIRS[name].shape
    assert ours.dtype == np.float32
    np.testing.assert_allclose(ours, THEIRS[name], rtol=0, atol=1e-4)
    np.testing.assert_array_equal(ours.argmax(0), THEIRS[name].argmax(0))


def test_kl_divergences_of_steps_equal_those_of_pydensecrf():
    np.testing.assert_allclose(CASES["KL of steps"](dcrf, utils), THEIRS["KL of steps"], rtol=1e-4)


def test_labels_of_a_picture_agree_with_pydensecrf_in_9999_of_10000_pixels():
    ours = CASES["labels of a picture"](dcrf, utils)
    energies = scene(120, 160, 8, seed=5)[0]
    assert (ours == THEIRS["labels of a picture"]).mean() >= 0.9999
    assert (ours == energies.argmin(0)).mean() < 0.8  # the refinement had something to do


def test_readme_a_picture_from_unary_to_map():
    """Usage: width, height, labels; energies of shape (5, h, w) flattened; short and full forms of the two kernels; argmax."""
    width, height = 40, 30
    draw = np.random.default_rng(0)
    image = draw.integers(0, 256, (height, width, 3), dtype=np.uint8)
    probabilities = draw.dirichlet(np.ones(5), (height, width)).astype(np.float32)  # labels last, as a network may give them
    energies = -np.log(probabilities).transpose(2, 0, 1).reshape((5, -1))

    short = package.DenseCRF2D(width, height, 5)
    short.setUnaryEnergy(energies)
    short.addPairwiseGaussian(sxy=3, compat=3)
    short.addPairwiseBilateral(sxy=80, srgb=13, rgbim=image, compat=10)

    full = dcrf.DenseCRF2D(width, height, 5)
    full.setUnary(dcrf.ConstUnary(np.ascontiguousarray(energies)))
    full.addPairwiseGaussian(sxy=(3, 3), compat=3, kernel=dcrf.DIAG_KERNEL, normalization=dcrf.NORMALIZE_SYMMETRIC)
    full.addPairwiseBilateral(
        sxy=(80, 80), srgb=(13, 13, 13), rgbim=image, compat=10, kernel=dcrf.DIAG_KERNEL, normalization=dcrf.NORMALIZE_SYMMETRIC
    )
    q = np.array(short.inference(5))
    np.testing.assert_array_equal(q, np.array(full.inference(5)))
    assert np.argmax(q, axis=0).reshape((height, width)).shape == (height, width)
    np.testing.assert_allclose(q.sum(0), 1, rtol=1e-5)


def test_readme_inference_by_hand_equals_inference():
    energies, image = scene(12, 10, 3)
    d = dcrf.DenseCRF2D(10, 12, 3)
    d.setUnaryEnergy(energies)
    d.addPairwiseGaussian(sxy=3, compat=3)
    d.addPairwiseBilateral(sxy=8, srgb=13, rgbim=image, compat=5)
    q, tmp1, tmp2 = d.startInference()
    divergences = []
    for _ in range(5):
        divergences.append(d.klDivergence(q))
        d.stepInference(q, tmp1, tmp2)
    assert divergences[-1] < divergences[0]
    np.testing.assert_allclose(q, d.inference(5), atol=1e-5)


def test_a_step_goes_on_from_marginals_that_the_caller_changed():
    energies, _ = scene(8, 9, 3)
    d = dcrf.DenseCRF2D(9, 8, 3)
    d.setUnaryEnergy(energies)
    d.addPairwiseGaussian(sxy=3, compat=3)
    q, *rest = d.startInference()
    once = q.copy()
    d.stepInference(once, *rest)
    d.stepInference(q, *rest)
    d.stepInference(q, *rest)
    d.stepInference(once, *rest)  # from the state of one step, while the object last stood at two
    np.testing.assert_allclose(once, q, atol=1e-6)


def test_readme_points_with_seven_features():
    draw = np.random.default_rng(0)
    d = dcrf.DenseCRF(100, 5)
    d.setUnaryEnergy(draw.normal(0, 1, (5, 100)).astype(np.float32))
    d.addPairwiseEnergy(
        draw.normal(0, 1, (7, 100)).astype(np.float32), compat=3, kernel=dcrf.FULL_KERNEL, normalization=dcrf.NO_NORMALIZATION
    )
    assert np.array(d.inference(5)).shape == (5, 100)


def test_readme_functions_for_any_dimension_equal_the_methods_for_two():
    """The lattice is not symmetric in its axes, and the functions put y first: equal up to the filter's own error."""
    energies, image = scene(20, 24, 4)
    special, general = dcrf.DenseCRF2D(24, 20, 4), dcrf.DenseCRF(24 * 20, 4)
    for d in (special, general):
        d.setUnaryEnergy(energies)
    special.addPairwiseGaussian(sxy=(4, 3), compat=3)
    special.addPairwiseBilateral(sxy=(9, 8), srgb=13, rgbim=image, compat=5)
    general.addPairwiseEnergy(create_pairwise_gaussian(sdims=(3, 4), shape=(20, 24)), compat=3)
    general.addPairwiseEnergy(create_pairwise_bilateral(sdims=(8, 9), schan=(13, 13, 13), img=image, chdim=2), compat=5)
    a, b = special.inference(5), general.inference(5)
    assert (a.argmax(0) == b.argmax(0)).mean() > 0.99


@pytest.mark.parametrize(
    ("compat", "same"), [(3, True), (np.full(4, -3, np.float32), True), (-3 * np.eye(4, dtype=np.float32), True), (2, False)]
)
def test_readme_numbers_vectors_and_matrices_as_compatibilities(compat, same):
    energies, _ = scene(10, 10, 4)
    found = []
    for value in (3, compat):
        d = dcrf.DenseCRF2D(10, 10, 4)
        d.setUnaryEnergy(energies)
        d.addPairwiseGaussian(sxy=3, compat=value)
        found.append(d.inference(3))
    assert np.allclose(*found, atol=1e-5) == same


def test_matrices_are_symmetrised():
    energies, _ = scene(10, 10, 4)
    matrix = np.random.default_rng(0).normal(0, 1, (4, 4)).astype(np.float32)
    found = []
    for value in (matrix, (matrix + matrix.T) / 2):
        d = dcrf.DenseCRF2D(10, 10, 4)
        d.setUnaryEnergy(energies)
        d.addPairwiseGaussian(3, value)
        found.append(d.inference(3))
    np.testing.assert_allclose(*found, atol=1e-6)


def test_energies_of_labels_by_hand():
    labels = np.array([[0, 1, 2], [2, 1, 0]])
    u, p, n = np.log(2), -np.log(0.8), -np.log(0.2)
    np.testing.assert_allclose(unary_from_labels(labels, 2, 0.8), [[u, p, n, n, p, u], [u, n, p, p, n, u]], rtol=1e-6)
    n = -np.log(0.1)
    expected = [[p, n, n, n, n, p], [n, p, n, n, p, n], [n, n, p, p, n, n]]
    np.testing.assert_allclose(unary_from_labels(labels, 3, 0.8, zero_unsure=False), expected, rtol=1e-6)


def test_energies_of_probabilities_by_hand():
    probabilities = np.array([[[0.0, 0.5]], [[1.0, 0.5]]])
    np.testing.assert_allclose(unary_from_softmax(probabilities), -np.log([[1e-5, 0.5], [1.0, 0.5]]), atol=1e-7)
    np.testing.assert_allclose(unary_from_softmax(probabilities, scale=0.6), -np.log([[0.2, 0.5], [0.8, 0.5]]), atol=1e-7)
    assert unary_from_softmax(probabilities, clip=1e-3)[0, 0] == pytest.approx(-np.log(1e-3))


def test_old_names_of_functions_warn_and_work():
    with pytest.warns(DeprecationWarning, match="unary_from_labels"):
        np.testing.assert_array_equal(utils.compute_unary(np.array([0, 1, 2]), 2), unary_from_labels(np.array([0, 1, 2]), 2, 0.5))
    with pytest.warns(DeprecationWarning, match="unary_from_softmax"):
        np.testing.assert_allclose(utils.softmax_to_unary(np.array([[0.3], [0.7]])), -np.log([[0.3], [0.7]]), rtol=1e-6)


def test_features_by_hand():
    np.testing.assert_allclose(create_pairwise_gaussian((2, 4), (2, 3)), [[0, 0, 0, 0.5, 0.5, 0.5], [0, 0.25, 0.5, 0, 0.25, 0.5]])
    image = np.arange(12).reshape(2, 3, 2)
    features = create_pairwise_bilateral((2, 4), (1, 2), image, chdim=2)
    np.testing.assert_allclose(features[2:], [[0, 2, 4, 6, 8, 10], [0.5, 1.5, 2.5, 3.5, 4.5, 5.5]])
    np.testing.assert_allclose(create_pairwise_bilateral((1, 1), 10, image[..., 0])[2], [0, 0.2, 0.4, 0.6, 0.8, 1.0])


def test_energies_of_any_real_type_and_layout_are_taken():
    energies, _ = scene(6, 7, 3)
    found = []
    for value in (energies, energies.astype(np.float64), np.asfortranarray(energies)):
        d = dcrf.DenseCRF2D(7, 6, 3)
        d.setUnaryEnergy(value)
        d.addPairwiseGaussian(sxy=np.float32(2), compat=np.float32(2))
        found.append(d.inference(2))
    np.testing.assert_array_equal(found[0], found[1])
    np.testing.assert_array_equal(found[0], found[2])


def test_a_label_of_infinite_energy_is_never_chosen_and_others_are_as_without_it():
    energies, _ = scene(6, 7, 3)
    found = []
    for value in (energies[:2], np.concatenate([energies[:2], np.full((1, 42), np.inf, np.float32)])):
        d = dcrf.DenseCRF2D(7, 6, len(value))
        d.setUnaryEnergy(value)
        d.addPairwiseGaussian(sxy=3, compat=3)
        found.append(d.inference(5))
    assert (found[1][2] == 0).all()
    np.testing.assert_allclose(found[1][:2], found[0], atol=1e-4)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (lambda d: d.setUnaryEnergy(np.zeros((12, 4), np.float32)), "labels first, pixels flat"),
        (lambda d: d.setUnaryEnergy(np.zeros((4, 3, 4), np.float32)), "2 dimensions"),
        (lambda d: d.setUnaryEnergy(np.full((4, 12), np.nan, np.float32)), "NaN"),
        (lambda d: d.addPairwiseEnergy(np.zeros((5, 11), np.float32), 3), "one column per point"),
        (lambda d: d.addPairwiseEnergy(np.full((5, 12), np.inf, np.float32), 3), "infinite"),
        (lambda d: d.addPairwiseGaussian(0, 3), "positive number"),
        (lambda d: d.addPairwiseGaussian((1, 2, 3), 3), "or 2 of them"),
        (lambda d: d.addPairwiseGaussian(3, np.ones(3, np.float32)), r"\(4, 4\)"),
        (lambda d: d.addPairwiseBilateral(3, 13, np.zeros((4, 3, 3), np.uint8), 3), r"give \(3, 4, 3\) uint8"),
        (lambda d: d.addPairwiseBilateral(3, 13, np.zeros((3, 4, 3)), 3), "create_pairwise_bilateral"),
        (lambda d: d.addPairwiseGaussian(3, 3, normalization=9), "9 is not a valid"),
        (lambda d: d.inference(-1), "0 or more"),
        (lambda d: d.klDivergence(np.zeros((3, 12), np.float32)), "startInference"),
        (lambda d: unary_from_labels(np.array([0, 3]), 2, 0.5), "from 0 to 3"),
        (lambda d: unary_from_labels(np.array([0, 1]), 2, 1.0), r"\(0, 1\)"),
        (lambda d: unary_from_softmax(np.ones((2, 3)), scale=2), r"\(0, 1\]"),
        (lambda d: create_pairwise_gaussian((1, 2, 3), (4, 5)), "one each"),
    ],
)
def test_wrong_shapes_and_values_are_refused_with_what_is_legal(wrong, message):
    with pytest.raises(ValueError, match=message):
        wrong(dcrf.DenseCRF2D(4, 3, 4))


def test_importing_the_drop_in_loads_neither_torch_nor_numba():
    script = "import sys, perpixel.refinement.pydensecrf; print([m for m in ('torch', 'numba') if m in sys.modules])"
    assert subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True).stdout.strip() == "[]"
