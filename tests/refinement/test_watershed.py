"""The watershed: what touches is divided, by the same flood as scikit-image's, and nothing else changes."""

import heapq
import itertools

import numpy as np
import pytest
import torch
from PIL import Image
from scipy import ndimage
from skimage.segmentation import watershed as flood_of_scikit_image

from perpixel.bundle import RefinerCard, TemperatureCard, load_bundle, save_bundle
from perpixel.calibrate import calibrate
from perpixel.metrics.thresholds import Board
from perpixel.predict import load
from perpixel.refine import refine
from perpixel.refinement import Watershed, build_refiner
from perpixel.refinement.watershed import _flood, dividing_lines
from perpixel.tune import tune

IMAGE = torch.zeros(1, 1, 60, 90)


def logits_of(objects):
    """(1, 2, H, W) of the probability of class 1."""
    objects = torch.as_tensor(objects, dtype=torch.float32).clamp(1e-6, 1 - 1e-6)
    return torch.stack([(1 - objects).log(), objects.log()])[None]


def two_cells(gap=12):
    """(60, 90) probability of the inside of two cells, and the truth: a membrane between them with a gap of so many rows."""
    inside = np.zeros((60, 90), np.float32)
    inside[4:56, 4:86] = 0.98
    truth = inside > 0.5
    truth[:, 43:46] = False
    inside[:, 43:46] = np.minimum(inside[:, 43:46], 0.05)
    inside[24 : 24 + gap, 43:46] = 0.7  # likelier inside than not
    return inside, truth


def noise(seed, shape=(60, 90), sigma=2.5):
    smooth = ndimage.gaussian_filter(np.random.default_rng(seed).normal(size=shape), sigma)
    return ((smooth - smooth.min()) / np.ptp(smooth)).astype(np.float32)


@pytest.mark.parametrize("seed", range(4))
def test_the_flood_is_that_of_scikit_image(seed):
    heights = np.argsort(np.argsort((1 - noise(seed)).ravel())).reshape(60, 90).astype(np.uint16)  # each once
    seeds, count = ndimage.label(noise(seed + 10) > 0.75)
    assert count > 3
    expected = flood_of_scikit_image(heights, seeds, connectivity=1)
    basins = seeds.copy()
    _flood(heights, basins)
    assert (basins != 0).all()
    assert np.array_equal(basins, expected)


def flooded(heights, seeds):
    """The definition, slowly: the lowest of the pixels that wait, and of equal ones the first that came, gives its number to its sides."""
    basins, came = seeds.copy(), itertools.count()
    waiting = [(heights[place], next(came), place) for place in zip(*np.nonzero(seeds), strict=True)]
    heapq.heapify(waiting)
    while waiting:
        y, x = heapq.heappop(waiting)[2]
        for v, u in ((y - 1, x), (y, x - 1), (y, x + 1), (y + 1, x)):
            if 0 <= v < heights.shape[0] and 0 <= u < heights.shape[1] and basins[v, u] == 0:
                basins[v, u] = basins[y, x]
                heapq.heappush(waiting, (heights[v, u], next(came), (v, u)))
    return basins


@pytest.mark.parametrize("levels", [1, 3, 50, 60000])
def test_of_equal_heights_the_first_that_came_is_first(levels):
    heights = (noise(1, (40, 30)) * (levels - 1)).astype(np.uint16)
    seeds = ndimage.label(noise(2, (40, 30)) > 0.75)[0]
    basins = seeds.copy()
    _flood(heights, basins)
    assert np.array_equal(basins, flooded(heights, seeds))


def test_a_membrane_with_a_gap_is_closed_and_one_cell_is_two():
    inside, truth = two_cells()
    plain = logits_of(inside)
    refined = Watershed()(plain, IMAGE)
    components = [ndimage.label(scores[0].argmax(0).numpy())[1] for scores in (plain, refined)]
    assert components == [1, 2]
    errors = []
    for scores in (plain, refined):
        board = Board()
        board.update(truth, scores.softmax(1)[0, 1].numpy())
        errors.append(board.curves()["rand_error"][5])
    assert errors[0] > 0.3
    assert errors[1] < 0.02


@pytest.mark.parametrize("seed", range(6))
def test_lines_divide_whatever_has_two_seeds_at_every_threshold_also_by_corners_and_raise_no_object(seed):
    objects = noise(seed)
    plain = logits_of(objects)
    refined = Watershed(seed=0.7, smallest=5)(plain, IMAGE)
    after, before = (scores.softmax(1)[0, 1].numpy() for scores in (refined, plain))
    seeds = ndimage.label(before > 0.7)[0]
    assert (np.bincount(seeds.ravel())[1:] >= 5).sum() > 2
    large = np.where((np.bincount(seeds.ravel()) >= 5)[seeds], seeds, 0)
    assert (after <= before + 1e-6).all()
    for threshold, corners in itertools.product((0.1, 0.3, 0.5, 0.7), (False, True)):
        touching = np.ones((3, 3)) if corners else None
        pieces, number = ndimage.label(after > threshold, touching)
        for piece in range(1, number + 1):
            assert len(np.setdiff1d(np.unique(large[pieces == piece]), [0])) <= 1


def test_a_line_through_a_straight_gap_is_one_pixel_wide_and_all_other_scores_stay():
    plain = logits_of(two_cells()[0])
    refined = Watershed()(plain, IMAGE)
    changed = (refined != plain).any(1)[0].numpy()
    assert np.array_equal(refined[:, 1], plain[:, 1])
    assert changed.sum(1).max() == 1
    assert set(np.flatnonzero(changed.any(0))) <= {43, 44, 45}


@pytest.mark.parametrize("objects", [np.zeros((60, 90)), np.ones((60, 90)), np.full((60, 90), 0.6)], ids=["none", "one", "unsure"])
def test_where_fewer_than_two_seeds_are_nothing_changes(objects):
    plain = logits_of(objects)
    assert torch.equal(Watershed()(plain, IMAGE), plain)


def test_seeds_that_are_too_small_or_not_sure_enough_divide_nothing():
    plain = logits_of(two_cells()[0])
    for options in ({"smallest": 52 * 40}, {"seed": 0.99}):
        assert torch.equal(Watershed(**options)(plain, IMAGE), plain)


def test_a_pixel_alone_and_a_single_row_are_flooded_too():
    assert torch.equal(Watershed()(logits_of(np.ones((1, 1))), IMAGE[..., :1, :1]), logits_of(np.ones((1, 1))))
    row = np.array([[0.99, 0.6, 0.5, 0.4, 0.7, 0.99]], np.float32)
    assert dividing_lines(row, 0.9, 1).tolist() == [[False, False, False, True, False, False]]


def test_the_class_between_may_be_any_of_several():
    inside, _ = two_cells()
    two = logits_of(inside)
    three = torch.stack([two[:, 1] - 0.5, two[:, 0], two[:, 1] - 0.5], 1)  # the inside is shared by classes 0 and 2
    refined = Watershed(between=1)(three, IMAGE)
    assert torch.equal(refined[:, [0, 2]], three[:, [0, 2]])
    assert ndimage.label(three[0].argmax(0).numpy() != 1)[1] == 1
    assert ndimage.label(refined[0].argmax(0).numpy() != 1)[1] == 2


def test_a_batch_is_refined_as_its_images_are_one_by_one():
    batch = torch.cat([logits_of(noise(seed)) for seed in range(3)])
    refiner = Watershed(seed=0.7, smallest=5)
    together = refiner(batch, IMAGE.expand(3, -1, -1, -1))
    assert torch.equal(together, torch.cat([refiner(one[None], IMAGE) for one in batch]))
    assert not torch.equal(together, batch)


def test_gradients_pass_through_the_scores_that_stay_and_from_a_line_to_the_largest():
    plain = logits_of(two_cells()[0]).requires_grad_()
    refined = Watershed()(plain, IMAGE)
    refined[:, 0].sum().backward()
    line = (refined != plain).any(1)
    assert line.any()
    assert (plain.grad[:, 0][~line] == 1).all()
    assert (plain.grad[:, 1][~line] == 0).all()
    largest = plain.argmax(1)
    assert torch.equal(plain.grad.gather(1, largest[:, None])[:, 0][line], torch.ones(int(line.sum())))
    assert (plain.grad.sum(1)[line] == 1).all()


@pytest.mark.parametrize(
    ("given", "kept"), [(torch.float64, torch.float64), (torch.float32, torch.float32), (torch.float16, torch.float32)]
)
def test_the_type_of_the_scores_is_kept_but_half_precision(given, kept):
    plain = logits_of(two_cells()[0]).to(given)
    refined = Watershed()(plain, IMAGE)
    assert refined.dtype == kept
    assert torch.equal(refined[:, 1], plain[:, 1].to(kept))
    assert (refined != plain.to(kept)).any()


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({"between": -1}, "between=-1"),
        ({"between": 1.0}, "between=1.0"),
        ({"between": True}, "between=True"),
        ({"seed": 1.0}, "seed=1.0"),
        ({"seed": float("nan")}, "seed=nan"),
        ({"smallest": 0}, "smallest=0"),
        ({"smallest": 2.5}, "smallest=2.5"),
        ({"temperature": 0}, "temperature=0"),
        ({"temperature": float("inf")}, "temperature=inf"),
        ({"temperature": "hot"}, "wrong kind.*temperature is 'hot'"),
        ({"lines": 2}, "no option 'lines'; it takes between, seed, smallest, temperature"),
        ({"seed": "high"}, "wrong kind.*seed is 'high'"),
        ({"seed": False}, "wrong kind.*seed is False"),
    ],
    ids=str,
)
def test_illegal_options_are_refused_by_name(options, told):
    with pytest.raises(ValueError, match=told):
        build_refiner("watershed", options)


@pytest.mark.parametrize(("classes", "between"), [(1, 0), (2, 2)])
def test_scores_without_the_class_between_or_another_are_refused(classes, between):
    with pytest.raises(ValueError, match=rf"between={between}, and the scores are of {classes} classes"):
        Watershed(between=between)(torch.zeros(1, classes, 60, 90), IMAGE)


def test_options_build_it_again():
    options = {"between": 1, "seed": 0.8, "smallest": 7, "temperature": 1.5}
    assert build_refiner("watershed", build_refiner("watershed", options).options()).options() == options


def test_a_bundle_can_carry_it_and_prediction_refines_by_it(make_bundle, tmp_path):
    bundle = load_bundle(make_bundle(classes=2))
    options = {"seed": 0.5, "smallest": 3}
    bundle.card.refiner = RefinerCard(name="watershed", options=options)
    save_bundle(tmp_path / "divided.safetensors", bundle.model.state_dict(), bundle.card)
    image = np.random.default_rng(0).integers(0, 256, (40, 50, 3), np.uint8)
    plain = load(tmp_path / "divided.safetensors", refine="none").logits(image)
    refined = load(tmp_path / "divided.safetensors").logits(image)
    assert torch.equal(refined, build_refiner("watershed", options)(plain[None], torch.zeros(1, 3, 40, 50))[0])


def test_scores_of_other_tools_are_divided_by_the_command_and_its_options(tmp_path, command):
    inside, _ = two_cells()
    Image.fromarray(np.zeros((60, 90), np.uint8)).save(tmp_path / "slice.png")
    np.save(tmp_path / "slice.npy", np.stack([inside, 1 - inside]))  # class 1 lies between
    words = ("refine", tmp_path / "slice.png", tmp_path / "slice.npy", "--refiner", "watershed", "--set", "between=1")
    assert command(*words, "-o", tmp_path / "divided").code == 0
    labels = np.asarray(Image.open(tmp_path / "divided" / "slice.png"))
    assert ndimage.label(labels == 0)[1] == 2


def test_it_keeps_the_temperature_that_other_refiners_drop(make_bundle):
    bundle = load_bundle(make_bundle(classes=2))
    bundle.card.temperature = TemperatureCard(value=1.5)
    assert [bundle.temperature(choice) for choice in ("none", "watershed", "dense_crf")] == [1.5, 1.5, 1.0]
    bundle.card.refiner = RefinerCard(name="watershed")
    assert [bundle.temperature(choice) for choice in ("bundle", "none", "watershed", "dense_crf")] == [1.5, 1.5, 1.5, 1.0]
    assert bundle.refiner_words() == "watershed, as the bundle has it"


@pytest.mark.parametrize("carried", [False, True], ids=["by name", "in the bundle"])
def test_its_seeds_are_taken_at_the_temperature_of_the_bundle(make_bundle, carried):
    path, choice, options = make_bundle(classes=2), "bundle" if carried else "watershed", {"seed": 0.8} if carried else {}
    bundle, pixels = load_bundle(path), (255 * np.stack([noise(band, (200, 300), 6) for band in range(3)], -1)).astype(np.uint8)
    logits = load(path).logits(pixels).numpy()
    temperature = float((logits[1] - logits[0]).std() / 2)  # of the scores as they are hardly a probability reaches a seed's
    refiner = RefinerCard(name="watershed", options=options) if carried else None
    cards = {"temperature": TemperatureCard(value=temperature), "refiner": refiner}
    save_bundle(path, bundle.model.state_dict(), bundle.card.model_copy(update=cards))
    segmenter = load(path, refine=choice)
    plain, calibrated = (torch.from_numpy(logits / divisor).softmax(0)[1].numpy() for divisor in (1, temperature))
    assert not dividing_lines(plain, 0.8, 50).any()
    lines = dividing_lines(calibrated, options.get("seed", 0.9), 50)
    assert lines.any()
    assert np.array_equal((segmenter.logits(pixels).numpy() != logits).any(0), lines)
    written = refine(pixels, np.stack([1 - calibrated, calibrated]), "watershed", options)  # as on what `predict --probabilities` wrote
    assert np.allclose(segmenter.probabilities(pixels), written, atol=1e-4)


@pytest.mark.parametrize("temperature", [0.5, 4.0])
def test_scores_at_a_temperature_are_divided_as_those_divided_by_it(temperature):
    plain = logits_of(two_cells()[0])
    divided = Watershed()(plain, IMAGE)
    assert (divided != plain).any()
    torch.testing.assert_close(Watershed(temperature=temperature)(temperature * plain, IMAGE), temperature * divided)


def test_calibrating_a_bundle_with_it_gives_the_temperature_of_the_scores_between_lines_again_and_again(make_bundle, tmp_path):
    path, rng = make_bundle(classes=2), np.random.default_rng(0)
    for folder in ("images", "masks"):
        (tmp_path / folder).mkdir()
    for number in range(4):
        pixels = (255 * np.stack([noise(3 * number + band, (96, 96), 4) for band in range(3)], -1)).astype(np.uint8)
        wrong = rng.random((96, 96)) < 0.2
        Image.fromarray(pixels).save(tmp_path / "images" / f"{number}.png")
        Image.fromarray(load(path).predict(pixels) ^ wrong).save(tmp_path / "masks" / f"{number}.png")
    bundle = load_bundle(path)
    sure = {name: 50 * tensor if "classify" in name else tensor for name, tensor in bundle.model.state_dict().items()}
    temperatures, kept = [], []
    # What `tune` writes states the temperature; what was put there in Python need not.
    for options in (None, {}, {}, {}, {"temperature": 1.0}, {"temperature": 3.0}):
        card = load_bundle(path).card
        refiner = None if options is None else RefinerCard(name="watershed", options={"seed": 0.9, "smallest": 5, **options})
        save_bundle(path, sure, card.model_copy(update={"refiner": refiner, "temperature": None if options else card.temperature}))
        before = load(path).predict(tmp_path / "images" / "0.png")
        assert calibrate(path, tmp_path / "images", tmp_path / "masks", split="train").accepted
        temperatures.append(load_bundle(path).temperature())
        kept.append(np.array_equal(load(path).predict(tmp_path / "images" / "0.png"), before))
    assert temperatures[0] > 1.5
    assert set(temperatures) == {temperatures[0]}
    assert all(kept)


def test_tune_puts_nothing_in_its_place(make_bundle, tmp_path):
    path = make_bundle(classes=2)
    bundle = load_bundle(path)
    bundle.card.refiner = RefinerCard(name="watershed")
    save_bundle(path, bundle.model.state_dict(), bundle.card)
    with pytest.raises(ValueError, match="has the watershed, which mIoU can't judge"):
        tune(path, tmp_path, tmp_path)
