"""Groups of scores: equal to slow definitions, the same whether one process or two see the images, and silent about void."""

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch

from perpixel.metrics.calibration import Calibration
from perpixel.scores import DEFAULT_GROUPS, GROUPS, Scored, Scores, parse_groups

CLASSES = ["membrane", "cell"]


def scored(number, classes=2, size=(24, 30), void=0.1, sharpness=2.0) -> Scored:
    """A blocky scene, and logits that are right in most places."""
    random = torch.Generator().manual_seed(number)
    labels = torch.randint(classes, (size[0] // 6, size[1] // 6), generator=random).repeat_interleave(6, 0).repeat_interleave(6, 1)
    logits = sharpness * torch.nn.functional.one_hot(labels, classes).movedim(-1, 0) + torch.randn(classes, *size, generator=random)
    labels = labels.masked_fill(torch.rand(size, generator=random) < void, 255)
    known = labels != 255
    losses = -logits.log_softmax(0).gather(0, labels.masked_fill(~known, 0)[None])[0][known]
    loss = float(losses.mean()) if known.any() else math.nan
    return Scored(f"{number}", Path(f"{number}.png"), torch.zeros(3, *size, dtype=torch.uint8), labels, logits, loss, 255)


def gathered(images, groups=GROUPS, classes=CLASSES, **options) -> Scores:
    scores = Scores(groups, classes, **options)
    for image in images:
        scores(image)
    return scores


def close(one, two):
    """The same, whatever is nested, up to the order in which floats were added."""
    if isinstance(one, dict):
        assert one.keys() == two.keys()
        for key in one:
            close(one[key], two[key])
    elif isinstance(one, list):
        assert len(one) == len(two)
        for left, right in zip(one, two, strict=True):
            close(left, right)
    else:
        assert one == (pytest.approx(two) if isinstance(two, float) else two)


def test_two_processes_that_merge_tell_what_one_tells():
    images = [scored(number) for number in range(6)]
    halves = gathered(images[:2], temperature=1.5), gathered(images[2:], temperature=1.5)
    halves[0].merge(halves[1])
    whole = gathered(images, temperature=1.5)
    for rule in ("union", "zero"):
        close(halves[0].to_json(rule), whole.to_json(rule))
    merged, own = halves[0].intervals(), whole.intervals()
    assert merged.keys() == own.keys() > {"bf", "boundary_iou", "hausdorff", "rand_error", "v_rand", "board_rand_error"}
    assert all(merged[name].low == pytest.approx(own[name].low) for name in own)


def test_shares_of_the_cost_equal_those_of_loops_over_the_pixels():
    """Each image's loss is a mean over its pixels, and the cost the mean over images: a pixel of a small image weighs more."""
    images = [scored(0, 3), scored(1, 3, (12, 18)), scored(2, 3, (18, 12), void=0.5)]
    cost, pixels, near = np.zeros(3), np.zeros(3), np.zeros(2)
    for image in images:
        labels, height, width = image.labels.numpy(), *image.labels.shape
        log_p = image.logits.log_softmax(0).double().numpy()
        number = (labels != 255).sum()
        reach = max(1, round(0.0075 * math.hypot(height, width)))
        for y in range(height):
            for x in range(width):
                if (k := labels[y, x]) == 255:
                    continue
                loss = -log_p[k, y, x] / number
                cost[k], pixels[k] = cost[k] + loss, pixels[k] + 1 / number
                rows, columns = range(max(0, y - reach), min(height, y + reach + 1)), range(max(0, x - reach), min(width, x + reach + 1))
                if any(labels[v, u] != k for v in rows for u in columns):
                    near += (loss, 1 / number)
    found = gathered(images, ["cost"], ["a", "b", "c"]).to_json()["cost_shares"]
    assert found["classes"]["cost"] == pytest.approx((cost / cost.sum()).tolist(), rel=1e-5)
    assert found["classes"]["pixels"] == pytest.approx((pixels / pixels.sum()).tolist())
    assert found["boundary_band"] == pytest.approx({"cost": near[0] / cost.sum(), "pixels": near[1] / 3}, rel=1e-5)


def test_calibration_after_is_that_of_the_scores_divided_by_the_temperature():
    images, divided = [scored(number, 3) for number in range(3)], Calibration()
    for image in images:
        divided.update(image.logits[None] / 2.5, image.labels[None])
    found = gathered(images, ["calibration"], ["a", "b", "c"], temperature=2.5).to_json()["calibration"]
    assert found["after"]["ece"] == divided.error
    assert found["after"]["brier"] == divided.brier
    assert found["before"]["ece"] != found["after"]["ece"]
    assert gathered(images, ["calibration"], ["a", "b", "c"]).to_json()["calibration"]["after"] is None


def test_a_perfect_prediction_has_the_best_of_every_score():
    image = scored(3, void=0.0)
    perfect = Scored(image.name, image.path, image.image, image.labels, 50.0 * torch.eye(2)[image.labels].movedim(-1, 0), 0.0, 255)
    found = gathered([perfect]).to_json()
    assert found["boundary"]["bf"] == found["boundary"]["boundary_iou"] == 1
    assert set(found["boundary"]["trimap"]["miou"]) == {1.0}
    assert found["surface"]["assd_classes"] == found["surface"]["hausdorff_classes"] == [0, 0]
    assert found["calibration"]["before"]["ece"] == pytest.approx(0, abs=1e-6)
    neurite = found["neurite"]
    assert neurite["pixel_error"] == neurite["warping_error"] == neurite["rand_error"] == 0
    assert neurite["v_rand"] == neurite["v_info"] == neurite["seg"] == neurite["f1"]["0.9"] == 1


def test_an_image_of_void_alone_poisons_no_score():
    images = [scored(number) for number in range(3)]
    close(gathered([*images, scored(9, void=1.1)]).to_json(), gathered(images).to_json())


def test_nothing_seen_and_scores_that_overflowed_make_plain_json():
    json.dumps(gathered([]).to_json(), allow_nan=False)
    image = scored(0)
    exploded = Scored(image.name, image.path, image.image, image.labels, image.logits * math.inf, math.nan, 255)
    found = gathered([exploded, scored(1)]).to_json()
    json.dumps(found, allow_nan=False)
    assert found["calibration"]["images_not_finite"] == 1
    assert found["calibration"]["before"]["ece"] == gathered([scored(1)]).to_json()["calibration"]["before"]["ece"]


def test_the_inside_of_cells_can_be_named():
    images = [scored(number) for number in range(2)]
    last, first = (gathered(images, ["neurite"], inside=name).to_json()["neurite"] for name in (None, "membrane"))
    assert (last["inside"], first["inside"]) == ("cell", "membrane")
    assert last["v_rand"] != first["v_rand"]


def test_what_cannot_be_scored_is_refused_with_what_can():
    with pytest.raises(ValueError, match=r"unknown scores 'bounday'\. Known: region \(always there\), cost, boundary"):
        Scores(["bounday"], CLASSES)
    with pytest.raises(ValueError, match=r"need two classes, .* there are 3: sky, sea, land"):
        Scores(["neurite"], ["sky", "sea", "land"])
    with pytest.raises(ValueError, match="no class 'axon' to be inside; the classes are membrane, cell"):
        Scores(["neurite"], CLASSES, inside="axon")


def test_groups_are_parsed_as_people_write_them():
    assert parse_groups("region") == ()
    assert parse_groups("boundary, calibration,boundary") == ("boundary", "calibration")
    assert set(parse_groups("all,neurite")) == set(GROUPS)
    assert parse_groups(",".join(DEFAULT_GROUPS)) == DEFAULT_GROUPS
