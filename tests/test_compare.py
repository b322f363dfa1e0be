"""Runs side by side: paired by image, equal to each run's own scores, with a verdict that follows from the interval."""

import json
import re

import numpy as np
import pytest

from perpixel.compare import compare, read_scores
from perpixel.compare_page import write_page
from perpixel.evaluate import Evaluation
from perpixel.metrics.region import Region
from perpixel.scores import Scores

CLASSES = ["sky", "sea", "land"]


def evaluation(rate, seed=0, folder="set", numbers=range(12), classes=CLASSES, truth_seed=5) -> Evaluation:
    """Images of blocks, of which a share `rate` of the pixels is wrong."""
    random = np.random.default_rng(seed)
    result = Evaluation(Region(len(classes)), list(classes), scores=Scores(["boundary"], classes))
    for number in numbers:
        name = f"{folder}/{number:02d}.png"
        truth = np.random.default_rng((truth_seed, number)).integers(0, 3, (4, 4)).repeat(6, 0).repeat(6, 1)
        truth = np.array([classes.index(name) for name in CLASSES])[truth]
        guess = np.where(random.random(truth.shape) < rate, random.integers(0, 3, truth.shape), truth)
        result.region.update(truth, guess, name=name)
        result.scores.boundaries.contours.update(truth, guess, name=name)
        result.losses[name] = rate + 0.01 * float(random.random())
    return result


@pytest.fixture
def file(tmp_path):
    def write(name, *arguments, **options):
        path = tmp_path / f"{name}.json"
        evaluation(*arguments, **options).to_file(path)
        return path

    return write


def test_a_file_gives_back_the_counts_of_each_image(file, tmp_path):
    made = evaluation(0.3)
    read = read_scores(file("a", 0.3))
    assert read.images == made.region.images.names
    assert np.array_equal(read.region, made.region.images.table)
    assert np.array_equal(read.contours, made.scores.boundaries.contours.images.table)
    assert read.losses.tolist() == list(made.losses.values())


@pytest.mark.parametrize("absent", ["union", "truth", "zero"])
def test_values_are_each_run_s_own_and_differences_their_difference(file, absent):
    """Beside the scores that `evaluate` states of each run."""
    one, two = evaluation(0.5), evaluation(0.2, seed=1)
    (found,) = compare([file("a", 0.5), file("b", 0.2, seed=1)], absent)
    told = found.to_json()
    for key in ("miou", "pixel_accuracy", "mean_accuracy", "fwiou", "mean_dice"):
        own = [run.confusion.to_dict(CLASSES, absent)[key] for run in (one, two)]
        assert [told["scores"][key][which] for which in ("first", "second")] == pytest.approx(own)
        assert told["scores"][key]["difference"] == pytest.approx(own[1] - own[0])
    assert told["scores"]["cost"]["first"] == pytest.approx(one.cost)
    assert told["scores"]["bf"]["second"] == pytest.approx(two.scores.boundaries.contours.score)
    assert [row["difference"] for row in told["classes"]] == pytest.approx((two.confusion.iou - one.confusion.iou).tolist())
    assert [row["second"] for row in told["classes"]] == pytest.approx(two.confusion.iou.tolist())


def test_the_interval_is_that_of_drawing_the_same_images_for_both(file):
    """A slow bootstrap of its own, with other draws: the ends agree to a fifth of the width."""
    one, two = evaluation(0.5), evaluation(0.45, seed=1)
    (found,) = compare([file("a", 0.5), file("b", 0.45, seed=1)])
    random, gains = np.random.default_rng(99), []
    for _ in range(2000):
        drawn = random.integers(0, 12, 12)
        scores = []
        for run in (one, two):
            both, truth, guess = run.region.images.table[drawn].sum(0).T
            scores.append(np.mean(both / (truth + guess - both)))
        gains.append(scores[1] - scores[0])
    low, high = np.quantile(gains, [0.025, 0.975])
    found = found.differences["miou"]
    assert [found.low, found.high] == pytest.approx([low, high], abs=0.2 * (high - low))


def test_images_that_one_run_wins_are_named_with_the_gain_of_their_own_miou(file):
    one, two = evaluation(0.5), evaluation(0.45, seed=1)
    told = compare([file("a", 0.5), file("b", 0.45, seed=1)])[0].to_json()

    def own(run, row):
        both, truth, guess = run.region.images.table[row].T
        union = truth + guess - both
        return np.mean(both[union > 0] / union[union > 0])

    gains = {f"set/{row:02d}.png": own(two, row) - own(one, row) for row in range(12)}
    assert told["won_by_second"] == pytest.approx({name: gain for name, gain in gains.items() if gain > 0})
    assert told["won_by_first"] == pytest.approx({name: -gain for name, gain in gains.items() if gain < 0})
    assert list(told["won_by_first"].values()) == sorted(told["won_by_first"].values(), reverse=True)


def test_a_clear_gain_is_real_whichever_comes_first_and_a_run_beside_itself_is_not(file):
    good, bad = file("good", 0.1), file("bad", 0.6, seed=1)
    for order in ([good, bad], [bad, good]):
        assert f"the difference is real, {good} is better" in compare(order)[0].verdict
    same = compare([good, good])[0]
    assert same.wins == {}
    assert "no difference is shown" in same.verdict
    assert same.differences["miou"].low == same.differences["miou"].high == 0


@pytest.mark.parametrize("images", [1, 5])
def test_few_images_tell_nothing_of_others_however_much_they_agree(file, images):
    (found,) = compare([file("a", 0.1, numbers=range(images)), file("b", 0.6, numbers=range(images))])
    assert "tell nothing of others" in found.verdict
    assert not any(row["real"] for row in [*found.to_json()["scores"].values(), *found.to_json()["classes"]])
    json.dumps(found.to_json(), allow_nan=False)


def two_that_differ_in_a_stray_pixel(folder, images_of_the_rare_class):
    """Files of two runs on 12 images of three classes; the second predicts one pixel of the last class in every image."""
    truth = np.arange(64) % 2
    for name, stray in (("a", 0), ("b", 1)):
        region = Region(3)
        for number in range(12):
            labels = np.full(64, 2) if number < images_of_the_rare_class else truth
            predicted = labels.copy()
            predicted[:stray] = 2
            region.update(labels, predicted, name=f"{number}.png")
        Evaluation(region, list("xyz"), {f"{n}.png": 0.1 for n in range(12)}).to_file(folder / f"{name}.json")
    return [folder / "a.json", folder / "b.json"]


@pytest.mark.parametrize("absent", ["union", "truth"])
def test_resamples_that_miss_a_class_do_not_tilt_the_difference(tmp_path, absent):
    (found,) = compare(two_that_differ_in_a_stray_pixel(tmp_path, 1), absent)
    assert -0.1 < found.differences["miou"].low <= found.differences["miou"].high < 0


def test_a_stray_pixel_of_a_class_that_no_image_holds_costs_a_class_by_the_rule_of_the_union_only(tmp_path):
    runs = two_that_differ_in_a_stray_pixel(tmp_path, 0)
    assert compare(runs)[0].differences["miou"].value > -0.02
    union = compare(runs, "union")[0].differences["miou"]
    assert union.value < -0.3
    assert union.below_zero


@pytest.mark.parametrize("absent", ["union", "truth", "zero"])
@pytest.mark.parametrize("rare", [0, 1, 3])
def test_every_rule_s_difference_lies_within_its_interval(tmp_path, absent, rare):
    found = compare(two_that_differ_in_a_stray_pixel(tmp_path, rare), absent)[0].differences["miou"]
    assert found.low <= found.value <= found.high


def test_several_runs_are_each_compared_with_the_first(file):
    found = compare([file(name, rate) for name, rate in (("a", 0.3), ("b", 0.2), ("c", 0.1))])
    assert [(pair.first[-6:], pair.second[-6:]) for pair in found] == [("a.json", "b.json"), ("a.json", "c.json")]


def test_images_are_paired_whatever_folder_they_lay_in(file):
    here, there = file("a", 0.3), file("b", 0.3, folder="/mnt/other/set")
    assert compare([here, there])[0].wins == {}


def test_only_images_in_both_are_compared_and_it_is_said(file):
    (found,) = compare([file("a", 0.3), file("b", 0.3, numbers=range(4, 15))])
    assert found.images == 8
    assert found.notes == [f"8 images are in both and compared; left out are 4 only in {found.first} and 3 only in {found.second}"]


def test_classes_are_paired_by_name(file):
    """The same pixels under another order of the classes: nothing differs."""
    (found,) = compare([file("a", 0.0), file("b", 0.0, classes=["land", "sky", "sea"])])
    assert found.classes == CLASSES
    assert np.array_equal(np.asarray(found.differences["iou"].value), np.zeros(3))


def test_other_masks_no_common_image_and_files_without_counts_are_refused(file, tmp_path):
    first = file("a", 0.3)
    with pytest.raises(
        ValueError, match=r"the truth of \d+ images is not that of .*a\.json, such as set/.*other masks, or another label map"
    ):
        compare([first, file("b", 0.3, truth_seed=6)])
    with pytest.raises(ValueError, match=r"have no images in common: set/00\.png"):
        compare([first, file("c", 0.3, numbers=range(20, 24))])
    old = tmp_path / "old.json"
    for text, why in (('{"miou": 0.5}', "holds no counts of each image"), ("{", "not a file of scores")):
        old.write_text(text)
        with pytest.raises(ValueError, match=rf"old\.json: {why}.*perpixel evaluate --json-out"):
            compare([first, old])
    content = json.loads(first.read_text())
    content["per_image"]["region"][3] = [99, 1]
    old.write_text(json.dumps(content))
    with pytest.raises(ValueError, match=r"old\.json: its scores are damaged: the counts of set/03\.png"):
        compare([first, old])
    with pytest.raises(ValueError, match=r"nowhere: no such file|nowhere.*evaluation"):
        compare([first, tmp_path / "nowhere"])
    with pytest.raises(ValueError, match="1 run given"):
        compare([first])


def test_the_page_holds_every_number_is_escaped_and_draws_better_to_the_right(file, tmp_path):
    found = compare([file("a<b>", 0.5), file("b", 0.2, seed=1)])
    write_page(found, tmp_path / "page.html")
    text = (tmp_path / "page.html").read_text()
    told = found[0].to_json()
    assert "a<b>" not in text
    assert "a&lt;b&gt;" in text
    assert "http" not in text
    for row in [*told["classes"], told["scores"]["miou"]]:
        assert f"<td>{100 * row['difference']:+.2f}</td>" in text
    assert f"<td>{told['scores']['cost']['difference']:+.4f}</td>" in text
    centres = [float(place) for place in re.findall(r'class="up" cx="([\d.]+)"', text)]
    assert len(centres) == 10  # the better run gains in six scores, three classes and the cost, which falls
    assert all(place > 130 for place in centres)


def test_the_command_compares_a_run_with_a_file_of_evaluate(run, sample_set, tmp_path, command):
    out = tmp_path / "again.json"
    said = command("evaluate", run / "best.safetensors", sample_set / "images", sample_set / "masks", "--json-out", out)
    assert said.code == 0
    said = command("compare", run, out)
    assert said.code == 0
    assert "so few images tell nothing of others" in said.out
    told = json.loads(command("compare", run, out, "--json").out)
    assert told[0]["images"] == 4
    assert command("compare", run, out, "--html", tmp_path / "page.html").code == 0
    assert "so few images tell nothing of others" in (tmp_path / "page.html").read_text()
    assert command("compare", run).code == 2
