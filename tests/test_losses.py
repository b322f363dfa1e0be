"""Losses against loops over pixels, torch's own functions, definitions, and numbers worked out by hand."""

import itertools
import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from perpixel import losses as module
from perpixel.losses import LOSSES, border_weights, class_weights, combined, cost, cross_entropy, dice, focal, lovasz_softmax

VOID = 255


def scene(samples=3, classes=4, side=6, dtype=torch.float64, seed=0):
    """Random logits and labels with some void; class 3 is missing from sample 1."""
    rng = torch.Generator().manual_seed(seed)
    logits = torch.randn(samples, classes, side, side + 1, generator=rng, dtype=dtype)
    labels = torch.randint(0, classes, (samples, side, side + 1), generator=rng)
    labels[1:2][labels[1:2] == 3] = 0
    labels[torch.rand(labels.shape, generator=rng) < 0.2] = VOID
    return logits, labels.to(torch.uint8)


def softmax_by_hand(logits):
    powers = np.exp(logits.double().numpy())
    return powers / powers.sum(1, keepdims=True)


def confident(labels, classes, scale=200.0):
    """Logits that are sure of the labels (class 0 where void)."""
    index = labels.long().where(labels != VOID, 0)
    return scale * F.one_hot(index, classes).permute(0, 3, 1, 2).double()


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_cross_entropy_is_the_weighted_sum_over_pixels_divided_by_their_count(smoothing):
    """Caffe's reduction: the divisor is the number of labelled pixels, not the sum of weights (SegNet, U-Net, DeepLab)."""
    logits, labels = scene()
    by_class = torch.tensor([0.5, 2.0, 3.0, 7.0])
    by_pixel = torch.rand(labels.shape)
    probability = softmax_by_hand(logits)
    expected = []
    for n in range(3):
        total, count = 0.0, 0
        for y, x in itertools.product(range(6), range(7)):
            label = int(labels[n, y, x])
            if label == VOID:
                continue
            count += 1
            entropies = -np.log(probability[n, :, y, x]) * by_class.numpy()
            total += float(by_pixel[n, y, x]) * ((1 - smoothing) * entropies[label] + smoothing * entropies.mean())
        expected.append(total / count)
    found = cross_entropy(logits, labels, class_weights=by_class, pixel_weights=by_pixel, label_smoothing=smoothing)
    np.testing.assert_allclose(found, expected, rtol=1e-6)


def test_weighted_cross_entropy_divides_by_pixels_where_torch_divides_by_weights():
    """Two pixels of classes 0 and 1, logits 0, weights 1 and 3: Caffe gives (1 + 3) ln 2 / 2, torch (1 + 3) ln 2 / 4."""
    logits, labels, weights = torch.zeros(1, 2, 1, 2), torch.tensor([[[0, 1]]]), torch.tensor([1.0, 3.0])
    assert cross_entropy(logits, labels, class_weights=weights).item() == pytest.approx(2 * math.log(2))
    assert F.cross_entropy(logits, labels, weights).item() == pytest.approx(math.log(2))


def test_unweighted_cross_entropy_is_torchs_mean_of_each_sample():
    logits, labels = scene()
    expected = [F.cross_entropy(a[None], b[None].long(), ignore_index=VOID) for a, b in zip(logits, labels, strict=True)]
    torch.testing.assert_close(cross_entropy(logits, labels), torch.stack(expected))


@pytest.mark.parametrize("gamma", [0.5, 2.0])
def test_focal_is_cross_entropy_scaled_by_the_power_of_what_is_missing(gamma):
    """Lin et al. 2017, eq. 5, pixel by pixel."""
    logits, labels = scene()
    by_class = torch.tensor([0.5, 2.0, 3.0, 7.0])
    probability = softmax_by_hand(logits)
    expected = []
    for n in range(3):
        pixels = [
            float(by_class[label]) * -((1 - probability[n, label, y, x]) ** gamma) * np.log(probability[n, label, y, x])
            for (y, x), label in np.ndenumerate(labels[n].numpy())
            if label != VOID
        ]
        expected.append(np.mean(pixels))
    np.testing.assert_allclose(focal(logits, labels, gamma=gamma, class_weights=by_class), expected, rtol=1e-6)


def test_focal_with_gamma_zero_is_cross_entropy():
    logits, labels = scene()
    torch.testing.assert_close(focal(logits, labels, gamma=0.0), cross_entropy(logits, labels))


def test_focal_below_gamma_one_has_a_finite_gradient_where_the_model_is_sure_and_right():
    """The derivative of x^0.5 is infinite at x = 0, which a confident model reaches."""
    logits = torch.tensor([100.0, 0.0]).view(1, 2, 1, 1).requires_grad_()
    focal(logits, torch.zeros(1, 1, 1, dtype=torch.long), gamma=0.5).sum().backward()
    assert not logits.grad.any()


def test_focal_of_a_known_probability():
    """p = 0.9, gamma = 2: the loss is 100 times smaller than cross entropy (Lin et al. 2017, section 3.2)."""
    logits = torch.tensor([math.log(0.9), math.log(0.1)]).view(1, 2, 1, 1)
    assert focal(logits, torch.zeros(1, 1, 1, dtype=torch.long)).item() == pytest.approx(-math.log(0.9) / 100, rel=1e-5)


def test_dice_is_the_mean_over_present_classes_of_the_soft_coefficient():
    logits, labels = scene()
    probability = softmax_by_hand(logits)
    expected = []
    for n in range(3):
        known = labels[n].numpy() != VOID
        coefficients = []
        for k in range(4):
            truth = (labels[n].numpy() == k) & known
            if truth.any():
                p = probability[n, k]
                coefficients.append(2 * p[truth].sum() / (p[known].sum() + truth.sum()))
        expected.append(1 - np.mean(coefficients))
    np.testing.assert_allclose(dice(logits, labels), expected, rtol=1e-6)


def test_dice_of_even_odds_worked_out_by_hand():
    """4 pixels, 3 of class 0, p = 1/2: Dice 2 * 1.5 / (2 + 3) = 0.6 and 2 * 0.5 / (2 + 1) = 1/3."""
    labels = torch.tensor([[[0, 0], [0, 1]]])
    assert dice(torch.zeros(1, 2, 2, 2), labels).item() == pytest.approx(1 - (0.6 + 1 / 3) / 2)


def test_dice_counts_thousands_of_pixels_exactly():
    """All of class 0 at even odds: 2 P/2 / (P/2 + P) = 2/3 for any P; 4095 is no bfloat16 number."""
    found = dice(torch.zeros(1, 2, 63, 65, dtype=torch.bfloat16), torch.zeros(1, 63, 65, dtype=torch.uint8))
    assert found.item() == pytest.approx(1 / 3)


def jaccard_loss(truth, guess):
    union = (truth | guess).sum()
    return 1 - (truth & guess).sum() / union if union else 0.0


def lovasz_by_thresholds(errors, truth):
    """The Lovasz extension as an integral: of the set function of {error >= t} over t from 0 to 1."""
    total, below = 0.0, 0.0
    for level in np.unique(errors):
        total += (level - below) * jaccard_loss(truth, truth ^ (errors >= level))
        below = level
    return total


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_lovasz_softmax_integrates_the_jaccard_loss_over_thresholds(dtype):
    """Against the integral form of the Lovasz extension (Lovasz 1983), which sorts nothing; present classes only."""
    logits, labels = scene(dtype=dtype)
    probability = softmax_by_hand(logits)
    expected = []
    for n in range(3):
        known = labels[n].numpy() != VOID
        terms = []
        for k in range(4):
            truth = (labels[n].numpy() == k)[known]
            if truth.any():
                terms.append(lovasz_by_thresholds(np.abs(truth - probability[n, k][known]), truth))
        expected.append(np.mean(terms))
    np.testing.assert_allclose(lovasz_softmax(logits, labels), expected, rtol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_lovasz_equals_the_jaccard_loss_at_every_vertex_of_the_cube(dtype):
    """Hard predictions of 4 pixels, all 16 x 16 pairs of truth and guess: 1 - mean IoU over the classes in the truth."""
    masks = torch.tensor(list(itertools.product([0, 1], repeat=4))).view(16, 1, 2, 2)
    truth, guess = masks.repeat_interleave(16, 0)[:, 0], masks.repeat(16, 1, 1, 1)[:, 0]
    found = lovasz_softmax(confident(guess, 2).to(dtype), truth)
    for value, t, g in zip(found.tolist(), truth.numpy(), guess.numpy(), strict=True):
        expected = np.mean([jaccard_loss(t == k, g == k) for k in (0, 1) if (t == k).any()])
        assert value == pytest.approx(expected, abs=1e-6)


def test_the_compiled_lovasz_slopes_equal_those_by_sorting():
    """float32 on the CPU takes a radix sort; float64 takes torch's. Many pixels, few labelled, errors of 0, 1 and near ties included."""
    rng = torch.Generator().manual_seed(1)
    errors = torch.rand(5, 4000, generator=rng) ** 8
    errors[:, ::97] = 0
    errors[:, ::89] = 1
    labelled = torch.rand(errors.shape, generator=rng) < 0.7
    truth = (torch.rand(errors.shape, generator=rng) < 0.1) & labelled
    slow = module._lovasz_slopes(errors.double(), truth, labelled)
    fast = module._lovasz_slopes(errors, truth, labelled)
    ties = (errors == 0) | (errors == 1)
    torch.testing.assert_close(fast[~ties], slow[~ties].float(), rtol=1e-5, atol=1e-9)
    torch.testing.assert_close((fast * errors).sum(1), (slow * errors).sum(1).float(), rtol=1e-5, atol=1e-6)
    assert not fast[~labelled].any()


def test_lovasz_of_a_diverged_model_is_nan_and_reads_no_foreign_memory():
    assert lovasz_softmax(torch.full((1, 2, 3, 3), math.nan), torch.zeros(1, 3, 3, dtype=torch.long)).isnan().all()


@pytest.mark.parametrize("name", LOSSES)
def test_gradients_equal_numeric_gradients(name):
    logits, labels = scene(samples=2, side=3)
    assert torch.autograd.gradcheck(lambda x: LOSSES[name](x, labels), logits.requires_grad_(), fast_mode=True)


def test_gradients_with_weights_equal_numeric_gradients():
    logits, labels = scene(samples=2, side=3)
    weights = {"class_weights": torch.tensor([0.5, 2.0, 3.0, 7.0]), "pixel_weights": torch.rand(labels.shape)}
    for loss in (cross_entropy, focal):
        assert torch.autograd.gradcheck(lambda x, loss=loss: loss(x, labels, **weights), logits.requires_grad_(), fast_mode=True)


def test_the_float32_lovasz_gradient_equals_the_float64_one():
    logits, labels = scene(samples=2, side=20)
    gradients = []
    for dtype in (torch.float32, torch.float64):
        x = logits.to(dtype).requires_grad_()
        lovasz_softmax(x, labels).sum().backward()
        gradients.append(x.grad.double())
    torch.testing.assert_close(*gradients, rtol=1e-3, atol=1e-7)


@pytest.mark.parametrize("name", LOSSES)
def test_the_right_answer_costs_nothing_and_the_wrong_one_much(name):
    _, labels = scene()
    right = confident(labels, 4)
    torch.testing.assert_close(LOSSES[name](right, labels), torch.zeros(3, dtype=torch.float64), rtol=0, atol=1e-9)
    wrong = right.roll(1, dims=1)
    assert (LOSSES[name](wrong, labels) > 0.99).all()


@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_sample_without_labels_costs_nothing_and_pulls_nowhere(name, dtype):
    logits, labels = scene(dtype=dtype)
    labels[0] = VOID
    logits.requires_grad_()
    found = LOSSES[name](logits, labels)
    cost(found).backward()
    assert found[0] == 0
    assert (found[1:] > 0).all()
    assert not logits.grad[0].any()
    assert logits.grad[1:].isfinite().all()
    assert logits.grad[1:].any()


@pytest.mark.parametrize("name", LOSSES)
def test_a_whole_batch_without_labels_gives_zero_gradients(name):
    logits, labels = scene(dtype=torch.float32)
    logits.requires_grad_()
    cost(LOSSES[name](logits, torch.full_like(labels, VOID))).backward()
    assert not logits.grad.any()


@pytest.mark.parametrize("name", LOSSES)
def test_what_the_model_says_where_nothing_is_known_does_not_matter(name):
    logits, labels = scene()
    void = (labels == VOID)[:, None]
    other = torch.where(void, 50 * torch.randn(logits.shape, dtype=torch.float64), logits)
    torch.testing.assert_close(LOSSES[name](other, labels), LOSSES[name](logits, labels))
    other.requires_grad_()
    LOSSES[name](other, labels).sum().backward()
    assert not other.grad[void.expand_as(other)].any()


@pytest.mark.parametrize("name", LOSSES)
def test_a_sample_has_the_same_loss_alone_and_in_a_batch(name):
    logits, labels = scene()
    alone = torch.cat([LOSSES[name](a[None], b[None]) for a, b in zip(logits, labels, strict=True)])
    torch.testing.assert_close(LOSSES[name](logits, labels), alone)


@pytest.mark.parametrize("name", LOSSES)
def test_bfloat16_logits_are_added_up_in_float32_inside_autocast_too(name):
    """A sum of 16384 numbers in bfloat16 (8 bits) would be wrong by percents."""
    logits, labels = scene(side=127, dtype=torch.bfloat16)
    with torch.autocast("cpu", torch.bfloat16):
        found = LOSSES[name](logits, labels)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, LOSSES[name](logits.double(), labels).float(), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", LOSSES)
def test_channels_last_logits_give_the_same(name):
    logits, labels = scene(dtype=torch.float32)
    torch.testing.assert_close(LOSSES[name](logits.to(memory_format=torch.channels_last), labels), LOSSES[name](logits, labels))


def test_uint16_labels_ignore_65535():
    logits, labels = scene()
    wide = labels.int()
    wide[labels == VOID] = 65535
    for loss in LOSSES.values():
        torch.testing.assert_close(loss(logits, wide.to(torch.uint16), ignore=65535), loss(logits, labels))


def test_the_summed_cross_entropy_of_a_batch_costs_the_sum_over_pixels_divided_by_the_samples():
    """Caffe's `normalize: false`, by which FCN was trained: torch's own sum over N; one image gives the plain sum."""
    logits, labels = scene()
    expected = F.cross_entropy(logits, labels.long(), ignore_index=VOID, reduction="sum") / len(logits)
    torch.testing.assert_close(cost(combined([("cross_entropy", 1.0)], reduction="sum")(logits, labels)), expected)
    counts = (labels != VOID).sum((1, 2))
    torch.testing.assert_close(cross_entropy(logits, labels, reduction="sum"), cross_entropy(logits, labels) * counts)
    with pytest.raises(ValueError, match="reduction is 'total'; it must be 'mean' or 'sum'"):
        cross_entropy(logits, labels, reduction="total")
    with pytest.raises(ValueError, match="reduction 'sum' is for cross_entropy alone"):
        combined([("cross_entropy", 1.0), ("dice", 1.0)], reduction="sum")


def test_combined_is_the_sum_of_its_terms():
    logits, labels = scene()
    by_class, by_pixel = torch.tensor([0.5, 2.0, 3.0, 7.0]), torch.rand(labels.shape)
    terms = [("cross_entropy", 1.0), ("dice", 0.5), ("focal", 2.0), ("lovasz_softmax", 0.25)]
    found = combined(terms, class_weights=by_class, label_smoothing=0.1, gamma=1.5)(logits, labels, by_pixel)
    expected = (
        cross_entropy(logits, labels, class_weights=by_class, pixel_weights=by_pixel, label_smoothing=0.1)
        + 0.5 * dice(logits, labels)
        + 2 * focal(logits, labels, gamma=1.5, class_weights=by_class, pixel_weights=by_pixel)
        + 0.25 * lovasz_softmax(logits, labels)
    )
    torch.testing.assert_close(found, expected)


def test_combined_refuses_what_it_would_silently_leave_unused():
    with pytest.raises(ValueError, match=r"unknown loss 'dise'\. Known: cross_entropy, dice"):
        combined([("dise", 1.0)])
    with pytest.raises(ValueError, match="no loss given"):
        combined([])
    with pytest.raises(ValueError, match="factor of dice is 0"):
        combined([("dice", 0.0)])
    with pytest.raises(ValueError, match="class weights do nothing to dice"):
        combined([("dice", 1.0)], class_weights=torch.ones(4))
    with pytest.raises(ValueError, match="label_smoothing does nothing to focal"):
        combined([("focal", 1.0)], label_smoothing=0.1)
    logits, labels = scene()
    with pytest.raises(ValueError, match="pixel weights do nothing to dice"):
        combined([("dice", 1.0)])(logits, labels, torch.ones(labels.shape))


def test_the_cost_is_the_mean_of_the_losses_whatever_is_labelled():
    """Two processes with half the batch each and their gradients averaged (DDP) give the gradient of the whole batch."""
    logits, labels = scene(samples=4)
    labels[0] = VOID
    logits.requires_grad_()
    whole = torch.autograd.grad(cost(cross_entropy(logits, labels)), logits)[0]
    halves = [torch.autograd.grad(cost(cross_entropy(logits[part], labels[part])), logits)[0] for part in (slice(0, 2), slice(2, 4))]
    torch.testing.assert_close((halves[0] + halves[1]) / 2, whole)


def test_bad_arguments_of_a_loss_are_named():
    logits, labels = scene()
    with pytest.raises(ValueError, match=r"labels \(3, 6, 6\).*Crop the labels"):
        dice(logits, labels[:, :, :6])
    labels[0, 0, :3] = 9
    with pytest.raises(ValueError, match=r"3 labels are not one of the 4 classes 0..3 nor 255 = ignore \(9\)"):
        cross_entropy(logits, labels)
    with pytest.raises(ValueError, match=r"class_weights are \(3,\); 4 classes need \(4,\)"):
        cross_entropy(logits, torch.zeros_like(labels), class_weights=torch.ones(3))
    with pytest.raises(ValueError, match="pixel_weights are"):
        cross_entropy(logits, torch.zeros_like(labels), pixel_weights=torch.ones(3, 6, 6))
    with pytest.raises(ValueError, match="ignore = 3 is one of the 4 classes"):
        focal(logits, labels, ignore=3)
    with pytest.raises(ValueError, match="gamma is -1"):
        focal(logits, labels, gamma=-1)
    with pytest.raises(TypeError, match="integer labels"):
        dice(logits, labels.float())


def test_median_frequency_weights_worked_out_by_hand():
    """Frequencies 600/1000, 300/1000, 100/500: median 0.3, weights 0.5, 1, 1.5 (Eigen & Fergus 2015, section 6.3.2)."""
    torch.testing.assert_close(class_weights("median_frequency", [600, 300, 100], [1000, 1000, 500]), torch.tensor([0.5, 1.0, 1.5]))


def test_median_frequency_without_image_counts_uses_shares_of_all_pixels():
    """Shares 0.6, 0.3, 0.1, and of four classes the mean of the middle two (0.5, 0.2, 0.2, 0.1: 0.2)."""
    torch.testing.assert_close(class_weights("median_frequency", [600, 300, 100]), torch.tensor([0.5, 1.0, 3.0]))
    torch.testing.assert_close(class_weights("median_frequency", [50, 30, 10, 10]), torch.tensor([0.4, 2 / 3, 2.0, 2.0]))


def test_inverse_log_weights_span_the_published_range():
    """ENet, section 5.2: 1 / ln(1.02 + p) lies between 1 and 50."""
    weights = class_weights("inverse_log", [10**9 - 1, 1])
    assert weights[0].item() == pytest.approx(1 / math.log(2.02))
    assert weights[1].item() == pytest.approx(1 / math.log(1.02), rel=1e-4)


@pytest.mark.parametrize("kind", ["none", "median_frequency", "inverse_log"])
def test_a_class_never_seen_weighs_one_and_moves_no_other(kind):
    with_absent = class_weights(kind, [600, 0, 300, 100], [1000, 0, 1000, 500])
    assert with_absent[1] == 1
    torch.testing.assert_close(with_absent[[0, 2, 3]], class_weights(kind, [600, 300, 100], [1000, 1000, 500]))
    torch.testing.assert_close(class_weights(kind, [0, 0]), torch.ones(2))


def test_bad_arguments_of_class_weights_are_named():
    with pytest.raises(ValueError, match=r"unknown class weights 'median'\. Known: none, median_frequency, inverse_log"):
        class_weights("median", [1, 2])
    with pytest.raises(ValueError, match="pixels_where_present"):
        class_weights("median_frequency", [5, 5], [10, 4])
    with pytest.raises(ValueError, match="0 or more"):
        class_weights("none", [-1])


def discs(height, width, centres, radius):
    y, x = np.mgrid[:height, :width]
    labels = np.zeros((height, width), np.uint8)
    for row, column in centres:
        labels[(y - row) ** 2 + (x - column) ** 2 <= radius**2] = 1
    return labels


def test_between_two_discs_the_border_weight_is_the_formula_of_the_paper():
    """Discs of radius 8 with 7 pixels between them: in the middle d1 = d2 = 4, so the weight is 10 exp(-64 / 50)."""
    labels = discs(40, 60, [(20, 15), (20, 39)], 8)
    weights = border_weights(labels)
    assert weights[20, 23] == 0  # the rim of the left disc
    assert weights[20, 27] == pytest.approx(10 * math.exp(-64 / 50))
    assert weights.dtype == np.float32
    assert not weights[labels == 1].any()


@pytest.mark.parametrize(("w0", "sigma"), [(10.0, 5.0), (3.0, 1.5)])
def test_border_weights_equal_distances_by_brute_force(w0, sigma):
    """Three discs, two of which touch only at a corner, a cell of a second class against the first, and void."""
    labels = discs(36, 44, [(10, 10), (10, 24), (27, 18)], 5)
    labels[30:34, 30:34] = 1
    labels[34:36, 34:36] = 1  # touches the square above at a corner only
    labels[20:24, 36:40] = 2
    labels[20:24, 40:44] = 1
    labels[0:3, 30:40] = VOID
    cells = [discs(36, 44, [centre], 5) == 1 for centre in [(10, 10), (10, 24), (27, 18)]]
    for rows, columns in [((30, 34), (30, 34)), ((34, 36), (34, 36)), ((20, 24), (36, 40)), ((20, 24), (40, 44))]:
        cell = np.zeros(labels.shape, bool)
        cell[slice(*rows), slice(*columns)] = True
        cells.append(cell)
    y, x = np.mgrid[:36, :44]
    distances = []
    for cell in cells:
        at = np.argwhere(cell)
        distances.append(np.sqrt((y[..., None] - at[:, 0]) ** 2 + (x[..., None] - at[:, 1]) ** 2).min(-1))
    d1, d2 = np.sort(distances, 0)[:2]
    expected = np.where(labels == 0, w0 * np.exp(-((d1 + d2) ** 2) / (2 * sigma**2)), 0)
    np.testing.assert_allclose(border_weights(labels, w0, sigma), expected, rtol=1e-6, atol=1e-8)


def test_fewer_than_two_cells_have_no_border_between_them():
    assert not border_weights(discs(30, 30, [(15, 15)], 6)).any()
    assert not border_weights(np.zeros((5, 5), np.uint8)).any()
    assert not border_weights(np.full((5, 5), VOID, np.uint8)).any()


def test_cells_may_be_zero_on_a_background_of_one():
    """ISBI 2012 codes the membrane 0 or 1: `background` says which value lies between the cells."""
    labels = discs(30, 50, [(15, 15), (15, 32)], 7)
    np.testing.assert_array_equal(border_weights(1 - labels, background=1), border_weights(labels))


def test_bad_arguments_of_border_weights_are_named():
    with pytest.raises(ValueError, match=r"need \(H, W\) integers"):
        border_weights(np.zeros((2, 2)))
    with pytest.raises(ValueError, match="sigma is 0"):
        border_weights(np.zeros((2, 2), np.uint8), sigma=0)
