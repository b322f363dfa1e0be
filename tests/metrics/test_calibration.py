"""Calibration against torchmetrics, scikit-learn and scipy's minimiser."""

import math

import numpy as np
import pytest
import torch
from scipy.optimize import minimize_scalar
from sklearn.calibration import calibration_curve
from sklearn.metrics import brier_score_loss
from torch.nn.functional import cross_entropy
from torchmetrics.classification import MulticlassCalibrationError

from perpixel.metrics.calibration import Calibration, fit_temperature

VOID = 255


def batch(seed, classes=4, temperature=0.5, size=(2, 20, 25)):
    """Labels drawn from softmax(temperature * logits): calibrated at T = 1 / temperature."""
    rng = torch.Generator().manual_seed(seed)
    logits = 3 * torch.randn(size[0], classes, *size[1:], generator=rng, dtype=torch.float64)
    chance = (temperature * logits).softmax(1).movedim(1, -1)
    labels = torch.multinomial(chance.reshape(-1, classes), 1, generator=rng).reshape(size)
    labels[torch.rand(size, generator=rng) < 0.1] = VOID
    return logits, labels


def streamed(batches, **options):
    score = Calibration(**options)
    for logits, labels in batches:
        score.update(logits, labels)
    return score


@pytest.mark.parametrize("bins", [1, 10, 15])
def test_expected_calibration_error_equals_torchmetrics(bins):
    """Guo et al. 2017, equation 3."""
    batches = [batch(seed) for seed in range(3)]
    theirs = MulticlassCalibrationError(4, n_bins=bins, norm="l1", ignore_index=VOID)
    for logits, labels in batches:
        theirs.update(logits.softmax(1), labels)
    assert streamed(batches, bins=bins).error == pytest.approx(float(theirs.compute()), abs=1e-6)


def test_the_curve_equals_scikit_learns():
    logits, labels = batch(0)
    known = labels != VOID
    confidence, guess = logits.softmax(1).max(1)
    accuracy, mean = calibration_curve((guess == labels)[known].numpy(), confidence[known].numpy(), n_bins=10)
    ours_mean, ours_accuracy = streamed([(logits, labels)], bins=10).curve
    np.testing.assert_allclose(ours_mean[~np.isnan(ours_mean)], mean)
    np.testing.assert_allclose(ours_accuracy[~np.isnan(ours_mean)], accuracy)


def test_brier_equals_scikit_learns():
    """brier_score_loss of several classes, unscaled: from 0 to 2."""
    logits, labels = batch(1)
    known = labels != VOID
    expected = brier_score_loss(labels[known].numpy(), logits.softmax(1).movedim(1, -1)[known].numpy(), scale_by_half=False)
    assert streamed([(logits, labels)]).brier == pytest.approx(expected)


def test_the_temperature_is_where_scipys_minimiser_finds_the_least_cross_entropy():
    batches = [batch(seed) for seed in range(3)]
    logits, labels = (torch.cat(values) for values in zip(*batches, strict=True))
    expected = minimize_scalar(
        lambda log: float(cross_entropy(logits / math.exp(log), labels, ignore_index=VOID)), bounds=(-3, 3), options={"xatol": 1e-9}
    )
    found = fit_temperature(batches)
    assert found == pytest.approx(math.exp(expected.x), rel=1e-5)
    assert found == pytest.approx(2, rel=0.1)  # how the labels were drawn


def test_the_temperature_calibrates_other_images_of_the_same_kind_and_changes_no_label():
    temperature = fit_temperature([batch(seed) for seed in range(3)])
    others = [batch(seed) for seed in range(10, 14)]
    mended = [(logits / temperature, labels) for logits, labels in others]
    assert streamed(others).error > 0.1
    assert streamed(mended).error < 0.02
    assert streamed(mended).brier < streamed(others).brier
    assert all((a.argmax(1) == b.argmax(1)).all() for (a, _), (b, _) in zip(others, mended, strict=True))


def test_a_set_without_a_mistake_or_without_sense_ends_at_the_limits():
    logits, _ = batch(2)
    assert fit_temperature([(logits, logits.argmax(1))]) == pytest.approx(0.05, rel=1e-3)
    assert fit_temperature([(logits, logits.argmin(1))]) == pytest.approx(20, rel=1e-3)


def test_a_common_offset_and_half_precision_do_no_harm():
    logits, labels = batch(3)
    assert fit_temperature([(logits + 1e6, labels)]) == pytest.approx(fit_temperature([(logits, labels)]), rel=1e-6)
    assert streamed([(logits.half(), labels)]).error == pytest.approx(streamed([(logits, labels)]).error, abs=1e-3)


def test_certain_and_right_is_perfect_and_certain_and_wrong_the_worst():
    labels = torch.tensor([[[0, 1], [1, 0]]])
    logits = 1000.0 * torch.nn.functional.one_hot(labels, 2).movedim(-1, 1)
    right, wrong = streamed([(logits, labels)]), streamed([(logits, 1 - labels)])
    assert (right.error, right.brier) == (0, 0)
    assert (wrong.error, wrong.brier) == (1, 2)


def test_void_alone_gives_nan_and_poisons_nothing():
    logits, labels = batch(4)
    score = streamed([(logits, torch.full_like(labels, VOID))])
    assert math.isnan(score.error)
    assert math.isnan(score.brier)
    score.update(logits, labels)
    assert score.error == streamed([(logits, labels)]).error


def test_merged_parts_equal_one_stream():
    whole, parts = streamed([batch(seed) for seed in range(4)]), [streamed([batch(a), batch(a + 1)]) for a in (0, 2)]
    parts[0].merge(parts[1])
    np.testing.assert_array_equal(parts[0].counts, whole.counts)
    assert whole.counts.dtype == np.int64
    assert (parts[0].error, parts[0].brier) == pytest.approx((whole.error, whole.brier))
    with pytest.raises(ValueError, match="bins"):
        whole.merge(Calibration(3))


def test_bad_input_is_named():
    logits, labels = batch(5)
    with pytest.raises(ValueError, match=r"give \(N, K, H, W\)"):
        Calibration().update(logits[0], labels)
    with pytest.raises(ValueError, match="not all among the 4 classes"):
        Calibration().update(logits, labels + 1, ignore=256)
    with pytest.raises(ValueError, match="NaN"):
        Calibration().update(logits * math.nan, labels)
    with pytest.raises(ValueError, match="bins"):
        Calibration(0)
    with pytest.raises(ValueError, match="no labelled pixel"):
        fit_temperature([(logits, torch.full_like(labels, VOID))])
    with pytest.raises(ValueError, match="only once"):
        fit_temperature(iter([(logits, labels)]))
    with pytest.raises(ValueError, match="limits"):
        fit_temperature([(logits, labels)], limits=(2, 1))
