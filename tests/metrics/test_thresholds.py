"""The EM challenge's scores over thresholds, against loops over pairs of pixels, formulas written out, and scikit-image's watershed."""

import itertools
import math

import numpy as np
import pytest
from scipy import ndimage
from skimage.segmentation import watershed
from sklearn.metrics import f1_score

from perpixel.metrics.segments import overlaps, segments_of, v_info, v_rand
from perpixel.metrics.thresholds import THRESHOLDS, Board, thinned_segments


def section(seed, shape=(40, 50)):
    """True inside of cells, and a blurred probability of it with noise."""
    rng = np.random.default_rng(seed)
    cells = ndimage.gaussian_filter(rng.standard_normal((6, *shape)), (0, 4, 4)).argmax(0)
    inside = ndimage.morphological_gradient(cells, 3) == 0
    blurred = ndimage.gaussian_filter(np.roll(inside, 1, 1).astype(float), 1) + 0.15 * rng.standard_normal(shape)
    return inside, blurred.clip(0, 1)


def board(seeds, **options) -> Board:
    made = Board(**options)
    for seed in seeds:
        made.update(*section(seed), name=str(seed))
    return made


@pytest.mark.parametrize("seed", range(4))
def test_pairs_equal_those_counted_one_by_one_with_each_pixel_outside_a_segment_of_its_own(seed):
    inside, probability = section(seed, (9, 10))
    truth, drawn = segments_of(inside), segments_of(probability > 0.5)
    together = np.zeros(3, int)
    for a, b in itertools.product(np.flatnonzero(truth), repeat=2):
        true = truth.flat[a] == truth.flat[b]
        guess = a == b or drawn.flat[a] == drawn.flat[b] != 0
        together += (true and guess, guess, true)
    made = Board([0.5])
    made.update(inside, probability)
    assert made.pairs.table.tolist() == [[together.tolist()]]
    precision, recall = together[0] / together[1], together[0] / together[2]
    assert made.curves()["rand_error"] == pytest.approx(1 - 2 * precision * recall / (precision + recall))


@pytest.mark.parametrize("seed", range(4))
def test_v_rand_and_v_info_with_pixels_alone_are_the_sums_and_entropies_over_shares(seed):
    """Arganda-Carreras et al. 2015, with a share of 1 / n for each of the n true-inside pixels that is predicted to be outside."""
    inside, probability = section(seed)
    truth, drawn = segments_of(inside), segments_of(probability > 0.5).astype(int)
    drawn[drawn == 0] = np.arange(drawn.max() + 1, drawn.max() + 1 + (drawn == 0).sum())
    t, s = truth[inside], drawn[inside]
    p = np.zeros((s.max() + 1, t.max() + 1))
    np.add.at(p, (s, t), 1 / len(t))
    pairs = overlaps(truth, segments_of(probability > 0.5))
    squares = (p**2).sum() / ((p.sum(0) ** 2).sum() / 2 + (p.sum(1) ** 2).sum() / 2)
    assert v_rand(pairs, alone=True).score == pytest.approx(squares)
    h_joint, h_true, h_guess = (-(x[x > 0] * np.log(x[x > 0])).sum() for x in (p, p.sum(0), p.sum(1)))
    assert v_info(pairs, alone=True).score == pytest.approx(2 * (h_true + h_guess - h_joint) / (h_true + h_guess))


def test_the_board_s_rand_error_is_the_best_of_the_thresholds_with_pairs_summed_over_sections():
    made, errors = board(range(3)), []
    for threshold in THRESHOLDS:
        sums = np.zeros(3)
        for seed in range(3):
            inside, probability = section(seed)
            truth, drawn = segments_of(inside), segments_of(probability > threshold)
            shared, of_drawn = np.zeros((truth.max() + 1, drawn.max() + 1)), np.zeros(drawn.max() + 1)
            np.add.at(shared, (truth[inside], drawn[inside]), 1)
            of_drawn = shared.sum(0)
            alone = shared[:, 0].sum()  # pixels predicted to be outside, each a segment of its own
            sums += [(shared[:, 1:] ** 2).sum() + alone, (of_drawn[1:] ** 2).sum() + alone, (shared.sum(1) ** 2).sum()]
        precision, recall = sums[0] / sums[1], sums[0] / sums[2]
        errors.append(1 - 2 * precision * recall / (precision + recall))
    np.testing.assert_allclose(made.curves()["rand_error"], errors)
    assert made.best()["rand_error"] == (pytest.approx(min(errors)), THRESHOLDS[int(np.argmin(errors))])


def test_differing_pixels_at_a_threshold_are_those_of_the_map_cut_there():
    made = board(range(2), thresholds=[0.3, 0.6])
    for place, threshold in enumerate((0.3, 0.6)):
        differ = [(section(seed)[0] != (section(seed)[1] > threshold)).mean() for seed in range(2)]
        assert made.curves()["differing_pixels"][place] == pytest.approx(np.mean(differ))


def test_splits_and_mergers_at_each_threshold_are_as_many_as_the_organisers_program_counts():
    """Numbers of a port of its warping and classification (fiji/Trainable_Segmentation, radius 20), which shares no code with ours."""
    expected = [
        [521, 403, 216, 96, 43, 24, 29, 52, 68, 127],
        [437, 305, 171, 80, 42, 29, 27, 45, 67, 108],
    ]
    made = Board()
    for seed in range(2):
        inside, probability = section(seed, (60, 70))
        made.update(inside, probability.astype(np.float32))
    assert made.pixels.table[:, :, 2].tolist() == expected
    assert made.best()["warping_error"] == ((24 + 29) / (2 * 60 * 70), 0.5)


def test_the_board_s_pixel_error_is_1_minus_scikit_learn_s_f_score_of_the_pixels_inside():
    made = board(range(3))
    cut = [np.concatenate([section(seed)[place].ravel() for seed in range(3)]) for place in (0, 1)]
    errors = [1 - f1_score(cut[0], cut[1] > threshold) for threshold in THRESHOLDS]
    np.testing.assert_allclose(made.curves()["pixel_error"], errors)
    assert made.best()["pixel_error"] == (pytest.approx(min(errors)), THRESHOLDS[int(np.argmin(errors))])
    assert made.best()["pixel_error"][0] < made.best()["differing_pixels"][0]  # most pixels are inside, and count twice in F


def test_a_thick_membrane_is_thinned_to_its_middle_line():
    segments = np.array([[1, 1, 0, 0, 0, 2, 2]] * 3)
    assert thinned_segments(segments).tolist() == [[1, 1, 1, 0, 2, 2, 2]] * 3
    corner = np.array([[1, 0, 0], [0, 0, 0], [0, 0, 2]])
    assert thinned_segments(corner).tolist() == [[1, 1, 0], [1, 0, 2], [0, 2, 2]]


def test_thinning_makes_a_prediction_that_is_right_but_for_thick_membranes_perfect_on_2015_s_board_only():
    """True membranes are two lines; the predicted ones are seven pixels wide around them."""
    distance = np.abs(np.arange(60) - np.array([[20], [40]])).min(0)
    inside, drawn = (np.tile(distance > reach, (30, 1)) for reach in (0, 3))
    made = Board([0.5])
    made.update(inside, drawn.astype(float))
    assert made.curves()["v_rand_thinned"] == made.curves()["v_info_thinned"] == [1]
    plain = overlaps(segments_of(inside), segments_of(drawn))
    assert v_rand(plain, alone=True).score < 0.9
    assert v_rand(plain).score < v_rand(plain, alone=True).score


@pytest.mark.parametrize("seed", range(4))
def test_thinned_segments_keep_apart_leave_lines_only_and_score_as_those_of_scikit_image_s_watershed(seed):
    """Where two fronts meet, the two programs may leave the line on either side of the middle."""
    inside, probability = section(seed, (90, 110))
    segments = segments_of(probability > 0.5)
    thin = thinned_segments(segments)
    np.testing.assert_array_equal(thin[segments > 0], segments[segments > 0])
    across = [(thin[1:], thin[:-1]), (thin[:, 1:], thin[:, :-1])]
    assert all(((a == b) | (a == 0) | (b == 0)).all() for a, b in across)
    np.testing.assert_array_equal(np.unique(segments_of(thin)), np.unique(segments))
    beside = np.pad(thin, 1)
    beside = np.stack([beside[:-2, 1:-1], beside[2:, 1:-1], beside[1:-1, :-2], beside[1:-1, 2:]])
    assert (beside[:, thin == 0] > 0).any(0).mean() > 0.99
    theirs = watershed(segments == 0, segments, connectivity=1, watershed_line=True)
    assert (thin == 0).sum() == pytest.approx((theirs == 0).sum(), rel=0.05)
    assert ((thin != theirs) & (thin > 0) & (theirs > 0)).mean() < 0.002
    truth = segments_of(inside)
    assert v_rand(overlaps(truth, thin), True).score == pytest.approx(v_rand(overlaps(truth, theirs), True).score, abs=0.01)


def test_a_perfect_probability_has_no_error_and_is_found_at_its_threshold():
    inside, _ = section(0)
    made = Board()
    made.update(inside, np.where(inside, 0.75, 0.35))
    found = made.best()
    assert {name: value for name, (value, _) in found.items()} == pytest.approx(
        {"rand_error": 0, "warping_error": 0, "pixel_error": 0, "differing_pixels": 0, "v_rand_thinned": 1, "v_info_thinned": 1}
    )
    assert {threshold for _, threshold in found.values()} == {0.4}


def test_a_shift_by_a_pixel_costs_pixels_and_no_topology():
    """Segments stay what they are, so that few pairs and no warping are lost."""
    inside = np.ones((40, 60), bool)
    inside[:, 20:22] = inside[18:20] = False
    made = Board([0.5])
    made.update(inside, np.roll(inside, 1, 1).astype(float))
    curves = made.curves()
    assert curves["warping_error"] == [0]
    assert curves["differing_pixels"] > 0.02
    assert 0 < curves["rand_error"] < 0.1


def test_nothing_inside_no_image_and_void_alone_are_nan_and_poison_nothing():
    empty = Board()
    assert all(math.isnan(value) for value, _ in empty.best().values())
    flat = np.zeros((6, 6))
    empty.update(flat.astype(int), flat)
    assert math.isnan(empty.best()["rand_error"][0])
    assert math.isnan(empty.best()["pixel_error"][0])
    assert empty.best()["differing_pixels"][0] == 0
    both, one = board([1]), board([1])
    inside, probability = section(2)
    both.update(inside, probability, np.zeros(inside.shape, bool))
    assert both.best() == one.best()


def test_merged_parts_equal_one_stream_and_counts_are_whole_numbers():
    whole, part = board(range(4)), board(range(2))
    part.merge(board(range(2, 4)))
    assert part.best() == whole.best()
    assert part.pairs.names == list("0123")
    assert whole.pairs.table.dtype == whole.insides.table.dtype == whole.pixels.table.dtype == np.int64
    with pytest.raises(ValueError, match="cannot merge"):
        whole.merge(Board([0.5]))


def test_bad_input_is_named():
    with pytest.raises(ValueError, match="must rise"):
        Board([0.5, 0.2])
    with pytest.raises(ValueError, match="same"):
        Board().update(np.ones((2, 2), int), np.ones((2, 3)))
    with pytest.raises(ValueError, match="softmax"):
        Board().update(np.ones((2, 2), int), np.full((2, 2), 3.0))
    with pytest.raises(ValueError, match="softmax"):
        Board().update(np.ones((2, 2), int), np.full((2, 2), math.nan))
