"""What a report keeps of single images: the worst, the costliest confusions, suspected label errors."""

import io
import math
import pickle

import numpy as np
import pytest
from PIL import Image
from report_scenes import COLORS, scored, stream
from scipy import ndimage

from perpixel.report.atlas import Atlas
from perpixel.report.findings import Findings
from perpixel.report.seen import look
from perpixel.report.thumbnails import around, error_layer, label_layer, photo, shown_colors, shrunk


def pixels(picture):
    """(H, W, 4) uint8."""
    return np.asarray(Image.open(io.BytesIO(picture)).convert("RGBA"))


def test_what_is_seen_of_an_image_equals_the_definitions_pixel_by_pixel():
    given = scored([[0, 255], [1, 2]], [[0, 1], [2, 2]], sureness=2.0)
    seen = look(given)
    probability = np.exp(given.logits.double().numpy())
    probability /= probability.sum(0)
    assert seen.truth.tolist() == [[0, -1], [1, 2]]
    assert seen.guess.tolist() == [[0, 1], [2, 2]]
    np.testing.assert_allclose(seen.confidence, probability.max(0), rtol=1e-6)
    np.testing.assert_allclose(seen.entropy, -(probability * np.log(probability)).sum(0) / np.log(3), rtol=1e-6)
    np.testing.assert_allclose(seen.truth_probability, [[probability[0, 0, 0], 0], [probability[1, 1, 0], probability[2, 1, 1]]], rtol=1e-6)
    np.testing.assert_allclose(seen.pixel_losses.sum() / 3, given.loss, rtol=1e-6)
    assert seen.wrong.tolist() == [[False, False], [True, False]]


def test_the_atlas_keeps_the_images_with_the_largest_loss_in_order():
    images = list(stream(40))
    atlas = Atlas(COLORS, count=7, side=16)
    for image in images:
        atlas.add(look(image))
    expected = sorted(images, key=lambda image: -image.loss)[:7]
    assert [entry.name for entry in atlas.entries] == [image.name for image in expected]
    for entry, image in zip(atlas.entries, expected, strict=True):
        labels, guess = image.labels.numpy(), image.logits.argmax(0).numpy()
        known = labels != 255
        assert entry.accuracy == pytest.approx((labels == guess)[known].mean())
        for k in range(3):
            either = known & ((labels == k) | (guess == k))
            assert entry.iou[k] == pytest.approx((known & (labels == k) & (guess == k)).sum() / either.sum())


def test_findings_of_two_processes_merge_to_those_of_one():
    images = list(stream(30, size=(20, 25)))
    whole, first, second = (Findings(COLORS) for _ in range(3))
    for number, image in enumerate(images):
        whole(image)
        (first if number < 17 else second)(image)
    first = pickle.loads(pickle.dumps(first))  # as it travels between processes
    first.merge(second)
    assert [entry.name for entry in first.atlas.entries] == [entry.name for entry in whole.atlas.entries]
    assert [(c.truth, c.guess, c.pixels) for c in first.confusions.worst()] == [
        (c.truth, c.guess, c.pixels) for c in whole.confusions.worst()
    ]
    assert [c.crops for c in first.confusions.worst()] == [c.crops for c in whole.confusions.worst()]
    assert [s.score for s in first.suspects.ranked()] == pytest.approx([s.score for s in whole.suspects.ranked()])


def test_an_image_without_labels_or_with_scores_that_overflowed_leaves_no_trace():
    findings = Findings(COLORS)
    findings(scored([[255, 255]], [[0, 1]]))
    broken = scored([[0, 1]], [[0, 1]])
    broken.logits[0, 0, 0] = math.inf
    findings(broken)
    assert findings.atlas.entries == []
    assert findings.confusions.worst() == []
    assert findings.suspects.pairs.sum() == 0


def test_what_is_kept_does_not_grow_with_the_number_of_images():
    """Memory is flat: 300 images leave no more pictures than 75 do."""

    def kept(count):
        findings = Findings(COLORS)
        for image in stream(count, size=(12, 12)):
            findings(image)
        return len(pickle.dumps(findings))

    assert kept(300) < 1.2 * kept(75)


def test_costs_of_confusions_are_the_losses_summed_over_their_pixels():
    findings = Findings(COLORS)
    sums, counts = np.zeros((3, 3)), np.zeros((3, 3), int)
    for image in stream(6):
        findings(image)
        each = -image.logits.double().log_softmax(0).numpy()
        guess = image.logits.argmax(0).numpy()
        for (y, x), label in np.ndenumerate(image.labels.numpy()):
            if label != 255:
                sums[label, guess[y, x]] += each[label, y, x]
                counts[label, guess[y, x]] += 1
    for found in findings.confusions.worst(6):
        assert found.share == pytest.approx(sums[found.truth, found.guess] / sums.sum(), rel=1e-5)
        assert found.pixels == counts[found.truth, found.guess]
    off = np.where(np.eye(3, dtype=bool), 0, sums)
    assert [(f.truth, f.guess) for f in findings.confusions.worst(6)] == [divmod(int(k), 3) for k in np.argsort(-off, axis=None)[:6]]


def test_the_crop_of_a_confusion_shows_its_costliest_region():
    truth = np.zeros((200, 300), int)
    guess = truth.copy()
    guess[10:14, 10:14] = 1
    guess[120:150, 200:240] = 1
    findings = Findings(COLORS)
    findings(scored(truth, guess))
    (found,) = findings.confusions.worst()
    (crop,) = found.crops
    assert crop.region == (120, 200, 150, 240)
    top, left, bottom, right = crop.box
    assert top <= 120
    assert left <= 200
    assert bottom >= 150
    assert right >= 240
    assert pixels(crop.photo).shape[:2] == (bottom - top, right - left)
    assert (pixels(crop.guess)[120 - top : 150 - top, 200 - left : 240 - left] == [*COLORS[1], 255]).all()
    assert (pixels(crop.truth) == [*COLORS[0], 255]).all()


def test_a_planted_label_error_ranks_before_confusions_that_are_common():
    """Masks of 8 images are right but one, in which a disc of class 1 is labelled 0; the model often takes 2 for 0, and is sure of it."""
    random = np.random.default_rng(1)
    findings = Findings(COLORS)
    for number in range(8):
        truth = np.zeros((120, 160), int)
        truth[:, 100:] = 2
        y, x = np.mgrid[:120, :160]
        disc = (y - 60) ** 2 + (x - 40) ** 2 < 25**2
        truth[disc] = 1
        guess = truth.copy()
        top = int(random.integers(0, 60))
        guess[top : top + 50, 110:150] = 0  # the model's own weakness
        if number == 5:
            truth[disc] = 0
        findings(scored(truth, guess, f"im{number}", sureness=5.0))
    ranked = findings.suspects.ranked()
    assert (ranked[0].crop.name, ranked[0].truth, ranked[0].guess) == ("im5", 0, 1)
    assert ranked[0].crop.region[0] >= 35
    core = ndimage.binary_erosion((y - 60) ** 2 + (x - 40) ** 2 < 25**2, iterations=2)
    assert ranked[0].pixels == core.sum()
    assert all(suspect.score < ranked[0].score / 2 for suspect in ranked[1:])


def halves():
    """Truth with class 1 on the right, and a guess that sees it in a piece of the left as well."""
    truth = np.zeros((100, 100), int)
    truth[:, 50:] = 1
    guess = truth.copy()
    guess[20:60, 10:40] = 1
    return truth, guess


def test_a_boundary_three_pixels_off_is_not_suspect():
    truth, _ = halves()
    shifted = np.roll(truth, 3, axis=1)
    shifted[:, :3] = 0
    findings = Findings(COLORS)
    findings(scored(truth, shifted))
    assert findings.suspects.ranked() == []


def test_a_region_less_sure_than_its_class_usually_is_is_not_suspect():
    """Class 1 has a probability of 0.98 where the masks name it, and 0.62 in the region; as sure as usual, the region is suspect."""
    truth, guess = halves()
    for sureness, suspects in ((1.2, 0), (5.0, 1)):
        findings = Findings(COLORS)
        findings(scored(truth, truth, sureness=5.0))
        findings(scored(np.zeros_like(truth), np.where(truth == 1, 0, guess), sureness=sureness))
        assert len(findings.suspects.ranked()) == suspects


def test_what_the_model_gives_less_than_half_is_not_suspect():
    """Its best class has 38 % everywhere, so no region is less sure than usual."""
    findings = Findings(COLORS)
    findings(scored(*halves(), sureness=0.2))
    assert findings.suspects.ranked() == []


def test_the_threshold_of_a_class_is_its_mean_probability_where_it_is_labelled():
    """Northcutt et al. 2021, arXiv:1911.00068, eq. 2."""
    images = list(stream(5))
    findings = Findings(COLORS)
    sums, counts = np.zeros(3), np.zeros(3)
    for image in images:
        findings(image)
        probability = image.logits.double().softmax(0).numpy()
        for (y, x), label in np.ndenumerate(image.labels.numpy()):
            if label != 255:
                sums[label] += probability[label, y, x]
                counts[label] += 1
    np.testing.assert_allclose(findings.suspects.thresholds, sums / counts, rtol=1e-5)


def test_label_layers_hold_the_exact_colours_and_are_clear_where_nothing_is_known():
    truth, guess = np.array([[0, -1, 2]]), np.array([[0, 1, 1]])
    assert pixels(label_layer(truth, COLORS, 10)).tolist()[0][::2] == [[200, 0, 0, 255], [0, 0, 200, 255]]
    assert pixels(label_layer(truth, COLORS, 10))[0, 1, 3] == 0
    errors = pixels(error_layer(truth, guess, 10))
    assert errors[0, 0, 3] == 0
    assert errors[0, 2, 3] == 255
    assert errors[0, 1, :3].tolist() == [128, 128, 128]


@pytest.mark.parametrize("dtype", ["uint8", "uint16", "float32"])
@pytest.mark.parametrize("bands", [1, 2, 5])
def test_photos_of_any_bands_and_depth_keep_their_shape(dtype, bands):
    image = (np.random.default_rng(0).random((bands, 300, 150)) * 200).astype(dtype)
    assert pixels(photo(image, 100)).shape == (100, 50, 4)


def test_shrunk_labels_are_labels_nearest_to_the_centres():
    labels = np.arange(12).reshape(3, 4)
    assert shrunk(labels, 2).tolist() == [[1, 3], [9, 11]]  # centres of rows at 0.75 and 2.25, of columns at 1 and 3
    assert np.array_equal(shrunk(labels, 9), labels)


@pytest.mark.parametrize("box", [(0, 0, 1, 1), (90, 190, 100, 200), (0, 0, 100, 200), (10, 0, 12, 200), (50, 50, 60, 70)])
def test_surroundings_lie_within_the_image_and_hold_the_box(box):
    top, left, bottom, right = around(box, (100, 200))
    assert 0 <= top <= box[0] < box[2] <= bottom <= 100
    assert 0 <= left <= box[1] < box[3] <= right <= 200


def test_colours_nobody_chose_become_ones_that_the_colour_blind_tell_apart():
    from perpixel.data.images import default_colors

    assert shown_colors(COLORS) == COLORS
    assert shown_colors(default_colors(3)) != default_colors(3)
    assert len(set(shown_colors(default_colors(8)))) == 8
    assert shown_colors(default_colors(21)) == default_colors(21)
