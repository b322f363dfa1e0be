"""Bootstrap intervals against a plain loop over drawn images, scipy's bootstrap and normal theory."""

import math
import time

import numpy as np
import pytest
from scipy import stats

from perpixel.metrics import tallies
from perpixel.metrics.intervals import _reach, difference, interval, value_mean, values_table
from perpixel.metrics.measures import MEASURES
from perpixel.metrics.tallies import PerImage, iou, miou, pixel_accuracy


def counts(seed, images=60, classes=4, skill=0.8):
    """Tallies of made-up images; the last class is rare."""
    rng = np.random.default_rng(seed)
    truth = rng.integers(0, 500, (images, classes))
    truth[:, -1] *= rng.random(images) < 0.05
    hits = rng.binomial(truth, np.clip(rng.normal(skill, 0.1, truth.shape), 0, 1))
    return np.stack([hits, truth, hits + rng.poisson(40, truth.shape) * (truth > 0)], -1)


def test_interval_of_miou_equals_the_quantiles_of_a_plain_loop_over_drawn_images():
    """Efron & Tibshirani 1993, chapter 13. Not the same draws: with 20,000 of each, the ends agree to a few thousandths."""
    table, rng = counts(0), np.random.default_rng(99)
    scores = []
    for _ in range(20_000):
        total = table[rng.choice(len(table), len(table))].sum(0)
        per_class = [hit / (t + p - hit) for hit, t, p in total if t + p]
        scores.append(np.mean(per_class))
    got = interval(table, miou, resamples=20_000)
    assert got.value == pytest.approx(miou(table.sum(0)))
    expanded = stats.norm.cdf(stats.t(59).ppf([0.025, 0.975]) * math.sqrt(60 / 59))  # Hesterberg 2015, section 4.3
    assert (got.low, got.high) == pytest.approx(tuple(np.quantile(scores, expanded)), abs=3e-3)


def test_interval_of_a_mean_equals_scipys_percentile_bootstrap():
    values = np.random.default_rng(1).gamma(2, 1, 80)
    level = 1 - 2 * stats.norm.sf(stats.t(79).ppf(0.975) * math.sqrt(80 / 79))
    expected = stats.bootstrap(
        (values,), np.mean, n_resamples=20_000, method="percentile", rng=0, confidence_level=level
    ).confidence_interval
    got = interval(values_table(values), value_mean, resamples=20_000)
    assert (got.low, got.high) == pytest.approx((expected.low, expected.high), abs=0.01)
    assert got.value == pytest.approx(values.mean())


@pytest.mark.parametrize("images", [8, 15, 40])
def test_intervals_hold_the_truth_as_often_as_they_say_however_few_the_images(images):
    """Means of normal values. Plain percentiles hold it in 83 % of cases at 8 images, where 90 % are meant."""
    rng = np.random.default_rng(2)
    held = 0
    for _ in range(600):
        got = interval(values_table(rng.normal(3, 1, images)), value_mean, resamples=400, level=0.9)
        held += got.low <= 3 <= got.high
    assert 0.87 < held / 600 < 0.93


def few_of_many(rng, holding, images=40):
    """Tallies (N, 1, 3) of a class in some of the images, recognised well in some and less in others, with false pixels everywhere."""
    truth = np.where(np.arange(images) < holding, rng.integers(200, 2000, images), 0)
    hits = np.round(truth * rng.beta(6, 2, images)).astype(np.int64)
    return np.stack([hits, truth, hits + rng.poisson(np.where(truth > 0, 100, 3))], -1)[:, None]


@pytest.mark.parametrize("holding", [3, 4, 5, 8, 15])
def test_the_interval_of_a_class_in_few_of_many_images_holds_the_truth_as_often_as_it_says(holding):
    """Plain percentiles hold it in 80 % of cases where three images have the class, and 86 % where four have it; 95 % are meant."""
    rng = np.random.default_rng(holding)
    truth = iou(np.sum([few_of_many(rng, holding).sum(0) for _ in range(1000)], 0))[0]
    held = 0
    for _ in range(200):
        table = few_of_many(rng, holding)
        got = interval(table, iou, resamples=300, held=tallies.holding(table), bounds=(0, 1))
        held += got.low[0] <= truth <= got.high[0]
        assert 0 <= got.low[0] <= got.value[0] <= got.high[0] <= 1
    assert held / 200 > 0.915  # 0.95 less two deviations


def rare_classes(rng, images, share, classes=21):
    """Tallies (N, K, 3) of classes that are each in a share of the images, recognised well in some and less in others."""
    truth = np.where(rng.random((images, classes)) < share, rng.integers(200, 2000, (images, classes)), 0)
    hits = np.round(truth * rng.beta(6, 2, truth.shape)).astype(np.int64)
    return np.stack([hits, truth, hits + rng.poisson(np.where(truth > 0, 150, 50 * share))], -1)


@pytest.mark.parametrize(("images", "share"), [(60, 0.05), (100, 0.05), (40, 0.1), (59, 0.2)])
def test_the_interval_of_miou_of_rare_classes_holds_the_truth_as_often_as_it_says(images, share):
    """Expanded percentiles alone hold it in 76, 68, 73 and 87 % of cases: they are too narrow and lie too low."""
    rng, score = np.random.default_rng(images), MEASURES["miou"]
    truth = miou(sum(rare_classes(rng, 2000, share).sum(0) for _ in range(15)), "truth")
    missed = np.zeros(2, int)
    for _ in range(150):
        table = rare_classes(rng, images, share)
        (bound,), sums_score = score.bind([table], "truth")
        got = interval(bound, sums_score, resamples=200, held=tallies.holding(table), bounds=(0, 1))
        missed += (truth < got.low, truth > got.high)
    assert missed.sum() < 15  # 5 % are 7.5; three deviations are 8
    assert missed.max() < 12


def test_how_far_a_mean_over_classes_varies_beyond_resamples_is_what_classes_in_few_images_take_from_them():
    """Beside draws: means of values, of classes in 2 to 30 images, of which resamples show (h - 1) / h of the variance."""
    held, rng = np.array([2, 3, 4, 30]), np.random.default_rng(6)
    shown, true = [], []
    for _ in range(4000):
        values = [rng.normal(0, 1, h) for h in held]
        true.append(np.mean([v.mean() for v in values]))
        shown.append(sum(v.var() / len(v) for v in values) / len(held) ** 2)  # the variance of resamples, without drawing them
    freedom, widening = _reach(held, 39)
    assert widening**2 == pytest.approx(np.var(true) / np.mean(shown), rel=0.06)
    # A sum of variances spreads as that of `freedom` squares does: its relative variance is 2 / freedom.
    weighed = [sum(rng.chisquare(h - 1) / (h - 1) / h for h in held) for _ in range(20_000)]
    assert freedom == pytest.approx(2 * np.mean(weighed) ** 2 / np.var(weighed), rel=0.06)
    assert _reach(np.array([1, 0, 1]), 2)[0] == 0
    assert _reach(np.array([7]), 7) == pytest.approx((6, math.sqrt(7 / 6)))


def test_few_images_have_the_spread_of_the_resamples_times_student_s_t_and_no_score_out_of_range():
    values = np.array([0.9, 0.99, 1.0, 0.97])
    drawn = np.random.default_rng(5).choice(values, (100_000, 4)).mean(1)
    reach = stats.t(3).ppf(0.975) * math.sqrt(4 / 3) * drawn.std()
    got = interval(values_table(values), value_mean, resamples=20_000, bounds=(0, 1))
    assert got.low == pytest.approx(values.mean() - reach, abs=2e-3)
    assert got.high == 1
    assert values.mean() + reach > 1


def test_pairing_finds_a_small_gain_that_two_separate_intervals_hide():
    hard = np.random.default_rng(3).uniform(0.2, 0.9, 50)
    gain = np.random.default_rng(4).normal(0.01, 0.01, 50)
    got = difference(values_table(hard), values_table(hard + gain), value_mean)
    assert got.value == pytest.approx(gain.mean())
    assert got.above_zero
    one, other = (interval(values_table(values), value_mean) for values in (hard, hard + gain))
    assert other.low < one.high
    assert difference(values_table(hard + gain), values_table(hard), value_mean).below_zero


def test_a_run_against_itself_differs_by_exactly_nothing():
    table = counts(5)
    got = difference(table, table, iou)
    assert got.value.tolist()[:3] == got.low.tolist()[:3] == got.high.tolist()[:3] == [0, 0, 0]
    assert not got.above_zero.any()


def test_each_class_has_its_interval_and_rare_ones_are_wide():
    table = counts(6, images=200)
    got = interval(table, iou)
    assert got.value.shape == got.low.shape == (4,)
    assert (got.low <= got.value).all()
    assert (got.value <= got.high).all()
    assert got.high[3] - got.low[3] > 2 * (got.high[0] - got.low[0])


def test_a_class_that_resamples_miss_keeps_an_interval_around_its_score():
    """Class 2 is in one image of ten, all right but for false pixels of it in the others."""
    table = np.zeros((10, 3, 3), np.int64)
    table[:, :2] = (90, 100, 95)
    table[0, 2], table[1:, 2] = (900, 1000, 950), (0, 0, 2)
    score = tallies.iou(table.sum(0))[2]
    with_missed = interval(table, tallies.iou)
    found = interval(table, lambda sums: tallies.iou(tallies.without_missed(sums, table.sum(0))))
    assert with_missed.low[2] == 0
    assert 0.8 < found.low[2] <= score <= found.high[2] < 0.9


def test_the_same_seed_draws_the_same_whatever_the_size_of_the_blocks(monkeypatch):
    table = counts(7)
    whole = interval(table, miou, seed=3)
    monkeypatch.setattr("perpixel.metrics.intervals._DRAWS", 7 * len(table))
    assert interval(table, miou, seed=3) == whole
    assert interval(table, miou, seed=4) != whole


def test_one_image_none_and_nan_values_give_nan_not_a_false_certainty():
    one = interval(counts(8)[:1], pixel_accuracy)
    assert math.isfinite(one.value)
    assert math.isnan(one.low)
    none = interval(counts(8)[:0], miou)
    assert math.isnan(none.value)
    assert math.isnan(none.high)
    assert not none.above_zero
    some = interval(values_table(np.array([0.5, math.nan, 0.5])), value_mean)
    assert (some.value, some.low, some.high) == (0.5, 0.5, 0.5)
    absent = interval(np.zeros((9, 2, 3)), iou)
    assert np.isnan(absent.low).all()


def test_runs_are_paired_by_the_names_of_their_images():
    table = counts(9, images=3)
    a, b = PerImage((4, 3)), PerImage((4, 3))
    for place in (0, 1, 2):
        a.add(table[place], f"{place}.png")
    for place in (2, 0, 1):
        b.add(table[place], f"{place}.png")
    first, second = a.paired_with(b)
    np.testing.assert_array_equal(first, table)
    np.testing.assert_array_equal(second, table)
    b.add(table[0], "3.png")
    with pytest.raises(ValueError, match=r"1 images .*3\.png"):
        a.paired_with(b)
    b.add(table[0], "3.png")
    with pytest.raises(ValueError, match="two have the same"):
        a.paired_with(b)
    with pytest.raises(ValueError, match="cannot be paired"):
        difference(table, table[:2], iou)


def test_bad_settings_are_named():
    with pytest.raises(ValueError, match="level"):
        interval(counts(0), miou, level=95)
    with pytest.raises(ValueError, match="resamples"):
        interval(counts(0), miou, resamples=0)


def test_a_thousand_resamples_of_a_thousand_images_take_less_than_two_seconds_of_the_processor():
    table = counts(10, images=1000, classes=21)
    start = time.process_time()
    interval(table, miou)
    assert time.process_time() - start < 2
