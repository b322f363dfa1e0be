"""Tuning: a refiner goes into a bundle only where its gain is shown on images that it was not searched on."""

import json

import numpy as np
import pytest
import torch
from PIL import Image

from perpixel.bundle import load_bundle
from perpixel.evaluate import evaluate
from perpixel.predict import load
from perpixel.refinement.candidates import Candidate, coarse_grid, neighbours
from perpixel.refinement.refiners import build_refiner
from perpixel.tune import _evenly, _Search, tune

SIDE = 40


@pytest.fixture
def scenes(tmp_path):
    """Ten pictures of three flat patches, with masks: images/, masks/."""
    rng = np.random.default_rng(1)
    colours = np.array([[40, 60, 80], [200, 180, 60], [90, 200, 120]], np.uint8)
    for folder in ("images", "masks"):
        (tmp_path / folder).mkdir()
    for number in range(10):
        across, down = rng.integers(12, 28, 2)
        labels = np.zeros((SIDE, SIDE), np.uint8)
        labels[:, across:] = 1
        labels[down:, :across] = 2
        Image.fromarray(colours[labels]).save(tmp_path / "images" / f"{number}.png")
        Image.fromarray(labels).save(tmp_path / "masks" / f"{number}.png")
    return tmp_path


def gives(monkeypatch, scores):
    """Instead of a network: `scores(labels, generator)` -> (K, H, W) logits of each image."""

    def predict(self, images, until):
        generator = torch.Generator().manual_seed(0)
        for index in range(len(images)):
            example = images[index]
            self.scores.append((scores(example.labels.long(), generator)[None], example.image[None], example.labels))
        return 0

    monkeypatch.setattr(_Search, "_predict", predict)


def noisy(labels, generator):
    return torch.nn.functional.one_hot(labels, 3).permute(2, 0, 1) + 1.5 * torch.randn(3, SIDE, SIDE, generator=generator)


def perfect(labels, generator):
    return 9.0 * torch.nn.functional.one_hot(labels, 3).permute(2, 0, 1).float()


def miou_by_numpy(truth, guess):
    each = [((truth == k) & (guess == k)).sum() / ((truth == k) | (guess == k)).sum() for k in range(3)]
    return float(np.mean(each))


def test_a_refiner_that_helps_is_written_with_its_gain_and_then_used(scenes, make_bundle, monkeypatch):
    path = make_bundle()
    gives(monkeypatch, noisy)
    result = tune(path, scenes / "images", scenes / "masks", refiners=["dense_crf"], minutes=0.05, split="train")
    card = load_bundle(path).card
    assert result.accepted
    assert result.miou.low > 0.05
    assert (card.refiner.name, card.refiner.options) == (result.chosen.name, result.chosen.options)
    assert card.refiner.gain["miou_gain"]["low"] == pytest.approx(result.miou.low)
    # The same two scores, counted by NumPy; with one candidate tried, cross-validation refines all images by it.
    search = _Search.__new__(_Search)
    search.scores = []
    _Search._predict(search, _images(scenes, path), 0)
    refiner = build_refiner(card.refiner.name, card.refiner.options)
    truth = np.stack([labels.numpy() for _, _, labels in search.scores])
    plain = np.stack([logits[0].argmax(0).numpy() for logits, _, _ in search.scores])
    refined = np.stack([refiner(logits, image)[0].argmax(0).numpy() for logits, image, _ in search.scores])
    assert result.before == pytest.approx(miou_by_numpy(truth, plain))
    assert miou_by_numpy(truth, refined) == pytest.approx(result.best["dense_crf"][1])


def _images(scenes, path):
    from perpixel.data.dataset import LabelledImages
    from perpixel.data.layouts import find_layout, split_pairs

    bundle = load_bundle(path)
    pairs = split_pairs(find_layout(scenes / "images", scenes / "masks").pairs, bundle.card.val_fraction, bundle.card.split_seed)
    chosen = [pair for pair in pairs if pair.split == "train"]
    return LabelledImages(chosen, bundle.label_map, bundle.card.bands, bundle.card.dtype)


@pytest.mark.parametrize("refiner", ["dense_crf", "grid_mrf", "gaussian_crf"])
def test_scores_that_are_right_already_leave_the_bundle_as_it_is_and_say_why(scenes, make_bundle, monkeypatch, refiner):
    path = make_bundle()
    before = path.read_bytes()
    gives(monkeypatch, perfect)
    result = tune(path, scenes / "images", scenes / "masks", refiners=[refiner], minutes=0.02, split="train")
    assert not result.accepted
    assert "the bundle stays as it is" in result.verdict
    assert path.read_bytes() == before


def test_one_image_tells_nothing_of_others(scenes, make_bundle, monkeypatch):
    path = make_bundle()
    for number in range(2, 10):
        (scenes / "images" / f"{number}.png").unlink()
        (scenes / "masks" / f"{number}.png").unlink()
    gives(monkeypatch, noisy)
    result = tune(path, scenes / "images", scenes / "masks", refiners=["dense_crf"], minutes=0.02, split="train")
    assert not result.accepted
    assert "tell nothing of others" in result.verdict


def test_each_half_is_scored_with_what_was_best_on_the_other(scenes, make_bundle, monkeypatch):
    """Of two candidates one is perfect on even images and wrong on odd ones, the other the reverse: nothing is left of either."""
    gives(monkeypatch, noisy)
    path = make_bundle()
    search = _Search(load_bundle(path), _images(scenes, path), 0, None)
    good = np.stack([search.plain.sum(0) * 0 + np.array([10, 10, 10])] * len(search.plain))
    bad = np.stack([search.plain.sum(0) * 0 + np.array([0, 10, 10])] * len(search.plain))
    even = (np.arange(len(search.plain)) % 2 == 0)[:, None, None]
    options = next(coarse_grid("dense_crf", 1.0)).options
    for name, table in (("a", np.where(even, good, bad)), ("b", np.where(even, bad, good))):
        candidate = Candidate("dense_crf", {**options, "iterations": 1 if name == "a" else 2})
        search.tables[candidate.key] = (candidate, table)
    assert search.result().after == 0.0


def test_evaluate_and_predict_use_the_bundle_s_refiner_unless_told_otherwise(scenes, make_bundle, monkeypatch):
    path = make_bundle()
    bundle = load_bundle(path)
    spec = {"name": "grid_mrf", "options": {"strength": 0.5, "method": "icm"}}
    bundle.card.refiner = type(bundle.card).model_fields["refiner"].annotation.__args__[0](**spec)
    image = scenes / "images" / "0.png"
    from perpixel.predict import Segmenter

    plain = Segmenter(bundle, "none").logits(image)
    pixels = torch.from_numpy(np.moveaxis(np.asarray(Image.open(image)), -1, 0).copy())
    for choice, expected in (
        ("bundle", build_refiner("grid_mrf", spec["options"])),
        ("dense_crf", build_refiner("dense_crf")),
    ):
        refined = Segmenter(bundle, choice).logits(image)
        torch.testing.assert_close(refined, expected(plain[None], pixels[None])[0])
    torch.testing.assert_close(load(path).logits(image), plain)
    results = {choice: evaluate(bundle, scenes / "images", scenes / "masks", refine=choice) for choice in ("bundle", "none")}
    counts = {choice: result.confusion.counts for choice, result in results.items()}
    assert counts["bundle"].sum() == counts["none"].sum()
    with pytest.raises(ValueError, match=r"unknown refiner 'crf'\. Known: dense_crf, grid_mrf, gaussian_crf"):
        evaluate(bundle, scenes / "images", scenes / "masks", refine="crf")


def test_learned_label_costs_are_among_what_is_tried():
    costs = [[0.0, 2.0, 0.5], [2.0, 0.0, 0.5], [0.5, 0.5, 0.0]]
    for name in ("dense_crf", "grid_mrf", "gaussian_crf"):
        around = list(neighbours(next(coarse_grid(name, 1.0)), 1.2, costs))
        assert around[0].options["compatibility"] == costs
        for candidate in around:
            build_refiner(candidate.name, candidate.options)(torch.randn(1, 3, 4, 5), torch.rand(1, 3, 4, 5))


@pytest.mark.parametrize("count", [0, 1, 2, 7, 101])
def test_every_beginning_of_the_order_is_spread_over_all_images(count):
    order = _evenly(count)
    assert sorted(order) == list(range(count))
    assert all(abs(np.mean(order[:4]) - (count - 1) / 2) < count / 6 for _ in [0] if count >= 8)


def test_wrong_requests_are_refused(scenes, make_bundle):
    path = make_bundle()
    for arguments, message in [
        ({"refiners": ["crf"]}, "unknown refiner 'crf'"),
        ({"minutes": 0}, "needs more than 0"),
        ({"split": "test"}, "no labelled images in the part 'test'"),
    ]:
        with pytest.raises(ValueError, match=message):
            tune(path, scenes / "images", scenes / "masks", **arguments)


def test_the_command_prints_the_gain_and_what_it_did(scenes, make_bundle, command):
    said = command("tune", make_bundle(), scenes / "images", scenes / "masks", "--minutes", "0.05", "--refiner", "dense_crf", "--json")
    assert said.code == 0
    found = json.loads(said.out)
    assert found["candidates"] >= 1
    assert {"miou_gain", "boundary_f_gain", "accepted", "verdict"} <= found.keys()
