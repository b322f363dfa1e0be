"""Region scores against sets of pixels counted one by one, and numbers worked out by hand."""

import json
import math

import numpy as np
import pytest
import sklearn.metrics
import torch
from torchmetrics.classification import MulticlassJaccardIndex

from perpixel.metrics import ABSENT_RULE, ABSENT_RULES, Confusion
from perpixel.metrics.region import Region

VOID = 255


def confusion(labels, predicted, classes):
    matrix = Confusion(classes)
    matrix.update(np.array(labels), np.array(predicted))
    return matrix


def test_every_score_equals_its_definition_over_sets_of_pixels():
    """Long et al. 2015, section 5, computed with masks of the pixels, class by class, instead of a matrix."""
    rng = np.random.default_rng(0)
    labels = rng.integers(0, 5, (7, 30, 40)).astype(np.uint8)
    predicted = np.where(rng.random(labels.shape) < 0.6, labels, rng.integers(0, 5, labels.shape)).astype(np.uint8)
    labels[rng.random(labels.shape) < 0.1] = VOID
    matrix = Confusion(5)
    for truth, guess in zip(labels, predicted, strict=True):  # streamed, picture by picture
        matrix.update(truth, guess)
    known = labels != VOID
    truth, guess = labels[known], predicted[known]
    both = [((truth == k) & (guess == k)).sum() for k in range(5)]
    either = [((truth == k) | (guess == k)).sum() for k in range(5)]
    size = [(truth == k).sum() for k in range(5)]
    iou = [b / e for b, e in zip(both, either, strict=True)]
    np.testing.assert_allclose(matrix.iou, iou)
    assert matrix.miou == pytest.approx(np.mean(iou))
    assert matrix.pixel_accuracy == pytest.approx((truth == guess).mean())
    np.testing.assert_allclose(matrix.class_accuracy, [b / s for b, s in zip(both, size, strict=True)])
    assert matrix.mean_accuracy == pytest.approx(np.mean([b / s for b, s in zip(both, size, strict=True)]))
    assert matrix.fwiou == pytest.approx(sum(s * i for s, i in zip(size, iou, strict=True)) / known.sum())
    np.testing.assert_allclose(matrix.dice, [2 * i / (1 + i) for i in iou])
    assert matrix.mean_dice == pytest.approx(np.mean([2 * i / (1 + i) for i in iou]))
    assert matrix.pixels == known.sum()


def test_counts_are_truth_by_prediction():
    """Rows are the truth: one pixel of class 0 called 2."""
    matrix = confusion([0, 1, 1], [2, 1, 1], 3)
    np.testing.assert_array_equal(matrix.counts, [[0, 0, 1], [0, 2, 0], [0, 0, 0]])
    assert matrix.counts.dtype == torch.int64


def test_six_pixels_worked_out_by_hand():
    """Truth 0 0 0 1 1 1, guess 0 0 1 1 1 1: IoU 2/3 and 3/4, accuracies 2/3 and 1, Dice 4/5 and 6/7."""
    matrix = confusion([0, 0, 0, 1, 1, 1], [0, 0, 1, 1, 1, 1], 2)
    assert matrix.miou == pytest.approx((2 / 3 + 3 / 4) / 2)
    assert matrix.pixel_accuracy == pytest.approx(5 / 6)
    assert matrix.mean_accuracy == pytest.approx(5 / 6)
    assert matrix.fwiou == pytest.approx((3 * 2 / 3 + 3 * 3 / 4) / 6)
    assert matrix.mean_dice == pytest.approx((4 / 5 + 6 / 7) / 2)


def test_the_set_is_scored_by_one_matrix_not_by_the_mean_of_images():
    """Image 1: IoU of class 1 is 1/1; image 2: 0/3. Together 1/4, where a mean of images would say 1/2."""
    matrix = Confusion(2)
    matrix.update(np.array([1, 0, 0, 0]), np.array([1, 0, 0, 0]))
    matrix.update(np.array([1, 1, 1, 0]), np.array([0, 0, 0, 0]))
    assert matrix.iou[1].item() == 0.25


def test_a_perfect_prediction_scores_one_everywhere():
    labels = np.array([0, 1, 2, 2, VOID])
    matrix = confusion(labels, np.where(labels == VOID, 0, labels), 3)
    assert [matrix.pixel_accuracy, matrix.mean_accuracy, matrix.miou, matrix.fwiou, matrix.mean_dice] == [1.0] * 5


def test_a_class_in_neither_truth_nor_prediction_is_left_out():
    matrix = confusion([0, 0, 1], [0, 1, 1], 4)
    assert matrix.iou[2:].isnan().all()
    assert matrix.miou == pytest.approx((1 / 2 + 1 / 2) / 2)
    assert matrix.mean_dice == pytest.approx(2 / 3)
    assert matrix.fwiou == pytest.approx(1 / 2)
    assert "left out of every mean" in ABSENT_RULE


def test_a_class_predicted_but_absent_counts_as_zero():
    """FCN's score: IoU 0 enters the mean; accuracy has no pixel to speak of and leaves it out."""
    matrix = confusion([0, 0, 0, 0], [0, 0, 0, 1], 2)
    assert matrix.iou.tolist() == [0.75, 0.0]
    assert matrix.miou == 0.375
    assert matrix.dice[1] == 0
    assert matrix.mean_accuracy == 0.75
    assert matrix.fwiou == 0.75


def test_nothing_labelled_gives_nan_and_poisons_nothing():
    """An all-void image among others adds nothing; alone, every score is NaN, and null in JSON."""
    matrix = confusion([VOID, VOID], [0, 1], 2)
    assert all(math.isnan(value) for value in (matrix.pixel_accuracy, matrix.mean_accuracy, matrix.miou, matrix.fwiou, matrix.mean_dice))
    assert json.loads(json.dumps(matrix.to_dict(["a", "b"]), allow_nan=False))["miou"] is None
    matrix.update(np.array([0, 1]), np.array([0, 1]))
    assert matrix.miou == 1


def test_merging_equals_seeing_all_pixels_at_once():
    rng = np.random.default_rng(1)
    labels, predicted = rng.integers(0, 3, (2, 2, 50))
    first, second = (confusion(a, b, 3) for a, b in zip(labels, predicted, strict=True))
    first.merge(second)
    np.testing.assert_array_equal(first.counts, confusion(labels, predicted, 3).counts)
    with pytest.raises(ValueError, match="3 and 4 classes"):
        first.merge(Confusion(4))


@pytest.mark.parametrize("dtype", ["uint8", "uint16", "int32", "int64"])
def test_arrays_and_tensors_of_every_integer_type_count_the_same(dtype):
    labels, predicted = np.array([0, 1, 1, VOID], dtype), np.array([0, 0, 1, 1], dtype)
    expected = [[1, 0], [1, 1]]
    for convert in (np.asarray, torch.from_numpy):
        matrix = Confusion(2)
        matrix.update(convert(labels), convert(predicted))
        np.testing.assert_array_equal(matrix.counts, expected)


def test_sixteen_bit_labels_ignore_65535():
    matrix = Confusion(300)
    matrix.update(np.array([299, 255, 65535], np.uint16), np.array([299, 255, 7], np.uint16), ignore=65535)
    assert matrix.pixels == 2
    assert matrix.pixel_accuracy == 1
    with pytest.raises(ValueError, match="65535 above 255 classes"):
        matrix.update(np.array([1]), np.array([1]))


def test_what_is_predicted_on_void_does_not_matter_even_if_it_is_no_class():
    assert confusion([0, VOID], [0, VOID], 2).pixels == 1


def test_values_that_are_no_class_are_named_and_nothing_is_added():
    matrix = Confusion(3)
    with pytest.raises(ValueError, match=r"labels: 2 pixels have a value that is not one of the 3 classes 0..2 \(7, 9\)"):
        matrix.update(np.array([7, 9, 1]), np.array([0, 0, 0]))
    with pytest.raises(ValueError, match=r"predicted: 1 pixels .*\(-1\)"):
        matrix.update(np.array([0, 1]), np.array([0, -1]))
    with pytest.raises(ValueError, match="same shape"):
        matrix.update(np.zeros((2, 3), int), np.zeros((3, 2), int))
    with pytest.raises(TypeError, match="argmax"):
        matrix.update(np.zeros(2, int), np.zeros(2, np.float32))
    assert matrix.pixels == 0
    with pytest.raises(ValueError, match="at least 1"):
        Confusion(0)


def test_the_report_is_json_with_a_row_for_each_class():
    report = json.loads(json.dumps(confusion([0, 0, 1], [0, 1, 1], 3).to_dict(["sky", "bird", "fish"]), allow_nan=False))
    assert report["classes"][0] == {"name": "sky", "pixels": 2, "accuracy": 0.5, "iou": 0.5, "dice": pytest.approx(2 / 3)}
    assert report["classes"][2] == {"name": "fish", "pixels": 0, "accuracy": None, "iou": None, "dice": None}
    assert report["confusion"] == [[1, 1, 0], [0, 1, 0], [0, 0, 0]]
    assert report["absent_rule"] == ABSENT_RULE
    with pytest.raises(ValueError, match="1 names for 3 classes"):
        confusion([0], [0], 3).to_dict(["sky"])


def images(count=5, classes=4, seed=2):
    """Images with a class of their own each, so that not every image shows every class; a little void."""
    rng = np.random.default_rng(seed)
    for number in range(count):
        labels = rng.integers(0, 1 + number % classes, (20, 30)).astype(np.uint8)
        predicted = np.where(rng.random(labels.shape) < 0.7, labels, rng.integers(0, classes - 1, labels.shape)).astype(np.uint8)
        labels[rng.random(labels.shape) < 0.1] = VOID
        yield labels, predicted


def test_scores_equal_those_of_scikit_learn_and_torchmetrics():
    """jaccard_score, f1_score, recall_score and MulticlassJaccardIndex over the labelled pixels."""
    labels, predicted = (np.stack(values) for values in zip(*images(classes=3), strict=True))
    matrix = confusion(labels, predicted, 3)
    known = labels != VOID
    truth, guess = labels[known], predicted[known]
    np.testing.assert_allclose(matrix.iou, sklearn.metrics.jaccard_score(truth, guess, average=None))
    np.testing.assert_allclose(matrix.dice, sklearn.metrics.f1_score(truth, guess, average=None))
    assert matrix.mean_accuracy == pytest.approx(sklearn.metrics.recall_score(truth, guess, average="macro"))
    assert matrix.fwiou == pytest.approx(sklearn.metrics.jaccard_score(truth, guess, average="weighted"))
    theirs = MulticlassJaccardIndex(3, ignore_index=VOID)(torch.from_numpy(predicted).long(), torch.from_numpy(labels).long())
    assert matrix.miou == pytest.approx(float(theirs), abs=1e-6)


def test_the_set_and_its_images_are_scored_side_by_side():
    """The mean of images is that of each image scored alone, and is another number than the set's."""
    region = Region(4)
    alone = []
    for number, (labels, predicted) in enumerate(images()):
        region.update(labels, predicted, name=str(number))
        alone.append(confusion(labels, predicted, 4))
    region.update(np.full((2, 2), VOID), np.zeros((2, 2), int), name="void")  # poisons no mean
    both = region.side_by_side()
    for name in ("pixel_accuracy", "mean_accuracy", "miou", "fwiou", "mean_dice"):
        assert both["images"][name] == pytest.approx(np.mean([getattr(matrix, name) for matrix in alone]))
        assert both["set"][name] == pytest.approx(getattr(region.confusion, name))
    assert abs(both["images"]["miou"] - both["set"]["miou"]) > 0.05
    assert region.images.table.shape == (6, 4, 3)
    np.testing.assert_array_equal(region.images.total, region.confusion.tally)


def test_merged_regions_equal_one_stream():
    whole, parts = Region(4), [Region(4), Region(4)]
    for number, pair in enumerate(images()):
        whole.update(*pair, name=str(number))
        parts[number // 3].update(*pair, name=str(number))
    parts[0].merge(parts[1])
    assert parts[0].images.names == whole.images.names
    np.testing.assert_array_equal(parts[0].images.table, whole.images.table)
    np.testing.assert_array_equal(parts[0].confusion.counts, whole.confusion.counts)


def test_each_rule_for_absent_classes_divides_by_what_it_says():
    """IoU 3/4 for a class in both, 0 for one that is predicted only, one class in neither: means over 2, 1 and 3 classes."""
    matrix = confusion([0, 0, 0, 0], [0, 0, 0, 1], 3)
    expected = {"union": 0.75 / 2, "truth": 0.75, "zero": 0.75 / 3}
    assert set(expected) == set(ABSENT_RULES)
    for rule, miou in expected.items():
        report = matrix.to_dict(["a", "b", "c"], rule)
        assert report["miou"] == pytest.approx(miou)
        assert report["absent_rule"] == ABSENT_RULES[rule]
        assert report["mean_accuracy"] == pytest.approx(0.25 if rule == "zero" else 0.75)
        assert confusion([VOID], [0], 3).to_dict(["a", "b", "c"], rule)["miou"] is None
    with pytest.raises(ValueError, match="'present'; the rules for absent classes are union, truth, zero"):
        matrix.to_dict(["a", "b", "c"], "present")


def test_the_fast_loop_and_the_bins_of_torch_count_the_same():
    """The bins are what runs on a GPU."""
    labels, predicted = list(images())[3]
    matrix = confusion(labels, predicted, 4)
    np.testing.assert_array_equal(matrix.counts, Confusion(4)._count_by_bins(torch.from_numpy(labels), torch.from_numpy(predicted), VOID))
