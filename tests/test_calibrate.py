"""Temperature: found again where it is known, written only where it helps, and applied to probabilities alone."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from perpixel.bundle import RefinerCard, TemperatureCard, load_bundle, save_bundle
from perpixel.calibrate import PixelSample, calibrate, fitted
from perpixel.predict import load
from perpixel.scores import Scored


def scored(number, sharpness=3.0, classes=4, size=(40, 40)) -> Scored:
    """Labels drawn from softmax(scores), and logits that are `sharpness` times those scores: the temperature is `sharpness`."""
    random = torch.Generator().manual_seed(number)
    scores = torch.randn(classes, *size, generator=random)
    labels = torch.multinomial(scores.flatten(1).softmax(0).T, 1, generator=random)[:, 0].view(size)
    return Scored(f"{number}", Path(f"{number}.png"), torch.zeros(1, *size), labels, sharpness * scores, 0.0, 255)


def sampled(images, **options) -> PixelSample:
    sample = PixelSample(**options)
    for image in images:
        sample(image)
    return sample


@pytest.fixture
def bundle(make_bundle):
    return make_bundle(bands=1)


@pytest.fixture
def folder(tmp_path, bundle):
    """Images of noise with masks drawn from the bundle's own probabilities at a temperature of 1/4, so it is not sure enough."""
    random, segmenter = np.random.default_rng(0), load(bundle)
    for kind in ("images", "masks"):
        (tmp_path / kind).mkdir()
    for number in range(20):
        image = tmp_path / "images" / f"{number:02d}.png"
        Image.fromarray(random.integers(0, 256, (48, 48), dtype=np.uint8)).save(image)
        scores = segmenter.logits(image).numpy() * 4
        labels = (scores + random.gumbel(size=scores.shape)).argmax(0)  # a draw from softmax(scores)
        Image.fromarray(labels.astype(np.uint8)).save(tmp_path / "masks" / image.name)
    return tmp_path


def test_the_temperature_that_made_the_labels_is_found_again():
    """To 3 %: 20,000 pixels are drawn from the labels' own distribution."""
    found = fitted(sampled(scored(number) for number in range(20)))
    assert found.temperature == pytest.approx(3, rel=0.03)
    assert found.accepted
    assert found.ece_after < 0.02 < found.ece_before
    assert found.cost_after < found.cost_before
    assert found.brier_after < found.brier_before


def test_a_temperature_that_does_not_carry_over_is_not_accepted():
    """The second half of the images asks for the opposite, so what is fitted on one half harms the other."""
    found = fitted(sampled(scored(number, sharpness=4.0 if number < 3 else 0.5) for number in range(6)))
    assert not found.accepted
    assert found.card is None
    assert fitted(sampled([scored(0)])).card is None


def test_frames_that_follow_each_other_lie_in_one_half():
    """In order of their names, whatever the order they came in; the first half has the middle one."""
    images = {number: scored(number, size=(4, 5)) for number in (3, 0, 4, 2, 1)}
    sample = sampled(images.values(), pixels=7)
    for which, expected in ((0, (0, 1, 2)), (1, (3, 4)), (None, range(5))):
        scores, labels = sample.half(which)
        each = [sample.images[f"{number}.png {number}"] for number in expected]
        assert torch.equal(scores[0, :, :, 0].T, torch.cat([scores for scores, _ in each]))
        assert torch.equal(labels[0, :, 0], torch.cat([labels for _, labels in each]))


@pytest.mark.parametrize("opposite", [True, False])
def test_scores_that_no_temperature_mends_keep_theirs(opposite):
    """Large scores for a wrong class ask for an endless temperature, correct ones for none; the search ends at its limits."""
    images = []
    for number in range(4):
        labels = torch.randint(0, 2, (40, 50), generator=torch.Generator().manual_seed(number))
        sure = 50.0 * torch.nn.functional.one_hot(1 - labels if opposite else labels, 2).permute(2, 0, 1)
        images.append(Scored(f"{number}", Path(f"{number}.png"), torch.zeros(1, 40, 50), labels, sure, 0.0, 255))
    found = fitted(sampled(images))
    assert found.at_limit is opposite  # scores without a mistake leave nothing to gain, at any temperature
    assert found.card is None


def test_a_sample_is_the_same_in_any_order_and_however_it_was_shared():
    images = [scored(number) for number in range(6)]
    options = {"pixels": 500, "scores": 4 * 6 * 200}
    whole, turned = sampled(images, **options), sampled(images[::-1], **options)
    first, second = sampled(images[:2], **options), sampled(images[2:], **options)
    first.merge(second)
    for other in (turned, first):
        assert other.images.keys() == whole.images.keys()
        for name, (scores, labels) in whole.images.items():
            assert torch.equal(scores, other.images[name][0])
            assert torch.equal(labels, other.images[name][1])


def test_many_images_keep_fewer_pixels_each_and_no_more_memory():
    sample = sampled((scored(number, size=(8, 8)) for number in range(70)), pixels=64, scores=4 * 1000)
    assert {len(labels) for _, labels in sample.images.values()} == {sample.pixels}
    assert sum(scores.numel() for scores, _ in sample.images.values()) <= 4000
    assert sample.pixels == 8  # 64, 32, 16: 70 * 16 * 4 is above 4000
    assert all(scores.untyped_storage().nbytes() == 4 * 4 * 8 for scores, _ in sample.images.values())


def test_void_and_scores_that_overflowed_are_not_sampled():
    image = scored(0)
    half = image.labels.clone()
    half[:20] = 255
    sample = sampled([
        Scored("half", Path("h"), image.image, half, image.logits, 0.0, 255),
        Scored("void", Path("v"), image.image, torch.full_like(half, 255), image.logits, 0.0, 255),
        Scored("exploded", Path("e"), image.image, image.labels, image.logits * torch.inf, 0.0, 255),
    ])  # fmt: skip
    ((_, labels),) = sample.images.values()
    assert (labels != 255).all()


def test_calibrating_changes_probabilities_as_stated_and_no_label(bundle, folder):
    before = load(bundle)
    found = calibrate(bundle, folder / "images", folder / "masks")
    after = load(bundle)
    assert found.accepted
    assert found.temperature == pytest.approx(0.25, rel=0.2)
    assert after.temperature == found.temperature == after.bundle.card.temperature.value != 1
    assert after.bundle.card.temperature.images == found.images == 4  # a fifth of the set is its validation part
    image = folder / "images" / "00.png"
    expected = (before.logits(image) / found.temperature).softmax(0)
    torch.testing.assert_close(torch.from_numpy(after.probabilities(image)), expected)
    assert np.array_equal(before.predict(image), after.predict(image))


def test_a_dry_run_leaves_the_bundle_as_it_is(bundle, folder):
    bytes_before = bundle.read_bytes()
    assert calibrate(bundle, folder / "images", folder / "masks", write=False).accepted
    assert bundle.read_bytes() == bytes_before


def test_masks_that_count_otherwise_are_fitted_on_by_their_labels(bundle, folder, command):
    """As the message for classes of another order says: `--label 10=0` and so on."""
    expected = calibrate(bundle, folder / "images", folder / "masks", write=False)
    for path in (folder / "masks").iterdir():
        Image.fromarray(np.asarray(Image.open(path)) + 10).save(path)
    labels = {value + 10: value for value in range(3)}
    assert calibrate(bundle, folder / "images", folder / "masks", labels=labels, write=False) == expected
    options = [word for value, label in labels.items() for word in ("--label", f"{value}={label}")]
    said = command("calibrate", bundle, folder / "images", folder / "masks", "--dry-run", "--json", *options)
    assert json.loads(said.out)["temperature"] == pytest.approx(expected.temperature)


def test_the_command_says_what_was_found_and_refuses_one_image(bundle, folder, command):
    said = command("calibrate", bundle, folder / "images", folder / "masks", "--dry-run")
    assert said.out.rstrip().endswith("the bundle stays as it is")
    said = command("calibrate", bundle, folder / "images", folder / "masks")
    assert said.code == 0
    assert "the network was not sure enough" in said.out
    assert said.out.rstrip().endswith("written into the bundle")
    said = command("calibrate", bundle, folder / "images", folder / "masks")
    assert said.out.rstrip().endswith(f"written into the bundle, in place of {load(bundle).temperature:.3f}")
    said = command("evaluate", bundle, folder / "images", folder / "masks", "--scores", "calibration")
    assert "with the bundle's temperature" in said.out
    for file in sorted((folder / "masks").iterdir())[1:]:
        file.write_bytes(b"")
    said = command("calibrate", bundle, folder / "images", folder / "masks", "--split", "train")
    assert said.code == 2


def test_a_temperature_where_none_helps_is_taken_out_and_told(bundle, folder, command):
    loaded = load_bundle(bundle)
    card = loaded.card.model_copy(update={"temperature": TemperatureCard(value=3.0)})
    for file in (folder / "masks").iterdir():  # without a mistake
        Image.fromarray(load(bundle).predict(folder / "images" / file.name)).save(file)
    save_bundle(bundle, loaded.model.state_dict(), card)
    said = command("calibrate", bundle, folder / "images", folder / "masks")
    assert said.out.rstrip().endswith("taken out of the bundle: its temperature of 3.000")
    assert load_bundle(bundle).card.temperature is None


def test_a_temperature_holds_only_for_scores_refined_as_those_it_was_fitted_on(make_bundle):
    path = make_bundle()
    bundle = load_bundle(path)
    bundle.card.temperature = TemperatureCard(value=2.0)
    save_bundle(path, bundle.model.state_dict(), bundle.card)
    assert [load_bundle(path).temperature(choice) for choice in ("bundle", "none", "dense_crf")] == [2, 2, 1]
    bundle.card.refiner = RefinerCard(name="dense_crf")
    save_bundle(path, bundle.model.state_dict(), bundle.card)
    assert [load_bundle(path).temperature(choice) for choice in ("bundle", "none", "dense_crf")] == [2, 1, 1]


def test_a_run_ends_with_a_calibrated_bundle_and_all_scores_in_its_evaluation(run):
    told = json.loads((run / "evaluation.json").read_text())
    card = load_bundle(run / "best.safetensors").card
    assert told["calibration"]["temperature"] == (1.0 if card.temperature is None else card.temperature.value)
    assert {"cost_shares", "boundary", "calibration", "intervals", "per_image"} <= told.keys()
    assert len(told["per_image"]["names"]) == told["images"]
