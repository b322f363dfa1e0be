"""Runs side by side: paired by image, equal to each run's own scores, with a verdict that follows from the interval."""

import json
import re
from pathlib import Path

import numpy as np
import pytest
import torch

from perpixel.compare import compare, read_scores
from perpixel.compare_page import WIDTH, write_page
from perpixel.evaluate import Evaluation
from perpixel.metrics.measures import MEASURES
from perpixel.metrics.region import Region
from perpixel.scores import Scored, Scores

CLASSES = ["sky", "sea", "land"]


def evaluation(
    rate, seed=0, folder="set", numbers=range(12), classes=CLASSES, truth_seed=5, groups=("boundary",), inside=None, streamed=()
) -> Evaluation:
    """Images of blocks, of which a share `rate` of the pixels is wrong; those of `streamed` as if scored block by block."""
    random = np.random.default_rng(seed)
    result = Evaluation(Region(len(classes)), list(classes), scores=Scores(groups, classes, inside=inside))
    order = np.array([classes.index(name) for name in CLASSES if name in classes])
    for number in numbers:
        name = f"{folder}/{number:02d}.png"
        truth = order[np.random.default_rng((truth_seed, number)).integers(0, len(classes), (4, 4)).repeat(6, 0).repeat(6, 1)]
        guess = np.where(random.random(truth.shape) < rate, random.integers(0, len(classes), truth.shape), truth)
        result.region.update(truth, guess, name=name)
        result.losses[name] = rate + 0.01 * float(random.random())
        if number in streamed:
            result.scores.skip_image()
            continue
        sure = torch.from_numpy(random.uniform(0.5, 3, truth.shape))
        logits = (sure * torch.nn.functional.one_hot(torch.from_numpy(guess), len(classes)).movedim(-1, 0)).float()
        result.scores(Scored(name, Path(name), torch.zeros(3, 24, 24), torch.from_numpy(truth), logits, result.losses[name], 255))
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
    kept = made.scores.tables()
    assert {"contours", "bands", "trimap_5"} <= kept.keys() <= read.tables.keys()
    assert all(np.array_equal(read.tables[name], table) for name, table in kept.items())
    assert read.tables["losses"].tolist() == list(made.losses.values())


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
    boundary = two.scores.to_json(absent)["boundary"]
    assert told["scores"]["bf"]["second"] == pytest.approx(boundary["bf"])
    assert told["scores"]["boundary_iou"]["second"] == pytest.approx(boundary["boundary_iou"])
    assert told["scores"]["trimap_5"]["second"] == pytest.approx(boundary["trimap"]["miou"][4])
    for name in ("bf", "boundary_iou"):
        assert [row["second"] for row in told["class_scores"][name]] == pytest.approx(boundary[f"{name}_classes"])
    assert [row["difference"] for row in told["classes"]] == pytest.approx((two.confusion.iou - one.confusion.iou).tolist())
    assert [row["second"] for row in told["classes"]] == pytest.approx(two.confusion.iou.tolist())


def test_neurite_scores_and_surface_distances_are_each_run_s_own(file):
    """Beside what `evaluate` states of each; both runs have every class in every image, so that no distance is left out."""
    options = {"classes": CLASSES[:2], "groups": ("surface", "neurite")}
    runs = evaluation(0.3, **options), evaluation(0.1, seed=1, **options)
    told = compare([file("a", 0.3, **options), file("b", 0.1, seed=1, **options)])[0].to_json()["scores"]
    for key, run in zip(("first", "second"), runs, strict=True):
        found = run.scores.to_json()
        neurite, surface = found["neurite"], found["surface"]
        for name in ("pixel_error", "warping_error", "rand_error", "v_rand", "v_info", "seg"):
            assert told[name][key] == pytest.approx(neurite[name], rel=1e-6)
        assert told["f1"][key] == pytest.approx(neurite["f1"]["0.5"])
        for name in ("rand_error", "warping_error", "pixel_error", "differing_pixels", "v_rand", "v_info"):
            own = f"{name}_thinned" if name.startswith("v_") else name
            assert told[f"board_{name}"][key] == pytest.approx(neurite["board"]["best"][own]["value"], rel=1e-6)
        for name in ("assd", "hausdorff"):
            assert told[name][key] == pytest.approx(np.mean(surface[f"{name}_classes"]), rel=1e-6)
    assert told["rand_error"]["real"]
    assert told["rand_error"]["high"] < 0
    assert all(row["low"] <= row["difference"] <= row["high"] for row in told.values())


def test_the_interval_of_the_board_s_rand_error_draws_sections_and_chooses_the_threshold_anew(file):
    """A slow bootstrap of its own, with other draws."""
    options = {"classes": CLASSES[:2], "groups": ("neurite",)}
    one, two = (evaluation(rate, seed=seed, **options).scores.tables()["board_pairs"] for seed, rate in enumerate((0.06, 0.05)))
    found = compare([file("a", 0.06, **options), file("b", 0.05, seed=1, **options)])[0].differences["board_rand_error"]
    random, gains = np.random.default_rng(3), []
    for _ in range(2000):
        drawn = random.integers(0, 12, 12)
        best = [max(2 * both / (guess + truth) for both, guess, truth in table[drawn].sum(0)) for table in (one, two)]
        gains.append(best[0] - best[1])
    low, high = np.quantile(gains, [0.012, 0.988])  # where Student's t puts the bounds for 12 images
    assert [found.low, found.high] == pytest.approx([low, high], abs=0.2 * (high - low))


def test_distances_are_compared_where_both_runs_find_the_class_so_that_missing_it_gains_nothing(tmp_path):
    """One image is hard; the second run misses the class there, and is no better elsewhere."""
    labels = np.zeros((20, 20), int)
    labels[5:15, 5:15] = 1
    files = []
    for name, hard in (("a", np.roll(labels, 4, 1)), ("b", np.zeros_like(labels))):
        result = Evaluation(Region(2), ["x", "y"], scores=Scores(["surface"], ["x", "y"]))
        for number in range(8):
            guess = hard if number == 0 else np.roll(labels, 1, 1)
            logits = 9.0 * torch.eye(2)[torch.from_numpy(guess)].movedim(-1, 0)
            result.region.update(labels, guess, name=f"{number}.png")
            result.losses[f"{number}.png"] = 0.1
            result.scores(Scored(name, Path(f"{number}.png"), torch.zeros(3, 20, 20), torch.from_numpy(labels), logits, 0.1, 255))
        files.append(tmp_path / f"{name}.json")
        result.to_file(files[-1])
    found = compare(files)[0]
    rows = found.to_json()["class_scores"]["assd"]
    assert rows[1]["first"] == rows[1]["second"]
    assert rows[1]["difference"] == 0
    assert any("1 only in the first" in note for note in found.notes)


def test_scores_of_one_run_only_and_of_other_insides_are_left_out_and_it_is_said(file):
    options = {"classes": CLASSES[:2], "groups": ("neurite",)}
    first = file("a", 0.3, **options)
    (found,) = compare([first, file("b", 0.3, classes=CLASSES[:2])])
    assert "rand_error" not in found.differences
    (lone,) = found.notes
    assert lone.startswith("scored in one of the two only, and not compared: ")
    assert {"adapted Rand error", "boundary F (BF)"} <= set(lone.partition(": ")[2].split(", "))
    (found,) = compare([first, file("c", 0.3, inside="sky", **options)])
    assert "rand_error" not in found.differences
    assert "neurite scores are not compared: one took sea, the other sky for the inside" in found.notes


def test_a_class_in_five_images_is_never_called_better(tmp_path):
    """All five agree, which chance does once in sixteen."""
    for name, hits in (("a", 10), ("b", 30)):
        region = Region(2)
        for number in range(20):
            labels = np.arange(64) % 2 if number < 5 else np.zeros(64, int)
            region.update(labels, np.where(np.arange(64) < hits, labels, 0), name=f"{number}.png")
        Evaluation(region, ["x", "y"], {f"{n}.png": 0.1 for n in range(20)}).to_file(tmp_path / f"{name}.json")
    rows = compare([tmp_path / "a.json", tmp_path / "b.json"])[0].to_json()["classes"]
    assert rows[1]["difference"] > 0.3
    assert not rows[1]["real"]


def test_images_that_one_run_scored_block_by_block_are_left_out_of_scores_of_shape_and_it_is_said(file):
    """The same predictions: a run has no contours of an image it did not hold whole, which is no difference."""
    whole, blocks = file("a", 0.0), file("b", 0.0, streamed=range(0, 12, 2))
    for order in ([whole, blocks], [blocks, whole]):
        (found,) = compare(order)
        for name in ("bf", "boundary_iou", "trimap_5"):
            assert (found.differences[name].value, found.differences[name].images) == (0, 6)
            assert found.values[name] == (1, 1)
        assert found.differences["miou"].images == 12
        (note,) = found.notes
        assert note.startswith("6 of 12 images were scored block by block in one run or both, and are left out of: boundary F (BF),")


def test_runs_that_held_no_image_whole_in_both_are_compared_by_regions_alone(file):
    (found,) = compare([file("a", 0.1, streamed=range(6)), file("b", 0.3, streamed=range(6, 12))])
    assert set(found.differences) == {"miou", "pixel_accuracy", "mean_accuracy", "fwiou", "mean_dice", "cost"}
    assert "12 of 12 images" in found.notes[0]


def test_images_without_a_labelled_pixel_have_no_say_in_what_is_real(tmp_path):
    """Two images agree, which shows nothing; ten of void alone add nothing."""
    truth = np.arange(64) % 2
    for name, hits in (("a", 10), ("b", 50)):
        region = Region(2)
        for number in range(12):
            labels = truth if number < 2 else np.full(64, 255)
            region.update(labels, np.where(np.arange(64) < hits, truth, 1 - truth), ignore=255, name=f"{number}.png")
        Evaluation(region, ["x", "y"], {f"{n}.png": 0.1 for n in range(2)}).to_file(tmp_path / f"{name}.json")
        assert Evaluation(region, ["x", "y"]).intervals()["miou"].images == 2
    (found,) = compare([tmp_path / "a.json", tmp_path / "b.json"])
    assert "(95 % " in found.verdict
    assert ", 2 images); so few images tell nothing of others" in found.verdict
    assert not any(row["real"] for row in found.to_json()["scores"].values())


def with_contours_invented_by_the_first(folder):
    """Files of two runs on 12 images, three of which hold the last class; the first draws it in all the others too."""
    truth, plain_truth = np.zeros((16, 16), int), np.zeros((16, 16), int)
    truth[4:12, 4:12] = 1
    for name in ("a", "b"):
        result = Evaluation(Region(2), ["x", "y"], scores=Scores(["boundary", "surface"], ["x", "y"]))
        for number in range(12):
            labels = truth if number < 3 else plain_truth
            guess = np.roll(truth, 1 + number % 3, 1) if name == "a" or number == 1 else labels
            logits = 9.0 * torch.eye(2)[torch.from_numpy(guess)].movedim(-1, 0)
            result.region.update(labels, guess, name=f"{number}.png")
            result.losses[f"{number}.png"] = 0.1
            result.scores(Scored(f"{number}", Path(f"{number}.png"), torch.zeros(3, 16, 16), torch.from_numpy(labels), logits, 0.1, 255))
        result.to_file(folder / f"{name}.json")
    return folder / "a.json", folder / "b.json"


def test_the_order_of_the_runs_only_turns_the_signs(tmp_path):
    a, b = with_contours_invented_by_the_first(tmp_path)
    (one,), (two,) = compare([a, b]), compare([b, a])
    pairs = [(one.differences[name], two.differences[name]) for name in one.differences]
    pairs += [(one.by_class[name].found, two.by_class[name].found) for name in one.by_class]
    for left, right in pairs:
        np.testing.assert_allclose(np.asarray(left.value), -np.asarray(right.value))
        np.testing.assert_allclose(np.asarray(left.low), -np.asarray(right.high), atol=1e-12)
        np.testing.assert_array_equal(left.images, right.images)
        np.testing.assert_array_equal(left.above_zero, right.below_zero)


def test_contours_that_a_run_invents_do_not_count_as_images_of_the_class(tmp_path):
    (found,) = compare(with_contours_invented_by_the_first(tmp_path))
    bf = found.by_class["bf"].found
    assert np.asarray(bf.images).tolist() == [3, 3]
    assert not (bf.above_zero | bf.below_zero).any()


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
    """Three images of the class: of one alone, on which a third of the mean would rest, nothing is known."""
    (found,) = compare(two_that_differ_in_a_stray_pixel(tmp_path, 3), absent)
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
    assert np.array_equal(np.asarray(found.by_class["miou"].found.value), np.zeros(3))


def test_other_masks_no_common_image_and_files_without_counts_are_refused(file, tmp_path):
    first = file("a", 0.3)
    with pytest.raises(
        ValueError, match=r"the truth of \d+ images is not that of .*a\.json, such as set/.*other masks, or another label map"
    ):
        compare([first, file("b", 0.3, truth_seed=6)])
    with pytest.raises(ValueError, match=r"have no images in common: set/00\.png"):
        compare([first, file("c", 0.3, numbers=range(20, 24))])
    other = json.loads(first.read_text())
    for number, row in enumerate(other["classes"]):
        row["name"] = f"value_{number}"
    (tmp_path / "d.json").write_text(json.dumps(other))
    with pytest.raises(ValueError, match=r"have no classes in common: .*Train both with the same --classes"):
        compare([first, tmp_path / "d.json"])
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


def test_a_file_name_that_is_no_text_stops_neither_the_tables_nor_the_page(tmp_path, command):
    """Names of files are bytes to Linux, and those that are no UTF-8 come as lone surrogates, which no encoder takes."""
    for name, rate in (("a", 0.5), ("b", 0.1)):
        evaluation(rate, folder="set\udcff").to_file(tmp_path / f"{name}.json")
    page = tmp_path / "page.html"
    said = command("compare", tmp_path / "a.json", tmp_path / "b.json", "--html", page)
    assert said.code == 0
    assert re.search(r"points  set\\udcff/\d\d\.png", said.out)
    assert re.search(r"points: set\?/\d\d\.png", page.read_text("utf-8"))


def test_runs_scored_in_other_ways_are_compared_and_it_is_said(tmp_path):
    for name, change in (("a", {}), ("b", {"precision": "bf16", "refined": "dense_crf (its defaults)", "augment": "flips"})):
        made = evaluation(0.3)
        vars(made).update(change)
        made.to_file(tmp_path / f"{name}.json")
    (found,) = compare([tmp_path / "a.json", tmp_path / "b.json"])
    assert found.notes == [
        "the runs differ in precision of the network: float32 and bf16",
        "the runs differ in refinement: none and dense_crf (its defaults)",
        "the runs differ in views of each image: one and flips",
    ]


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
    scores, classes = [row["real"] for row in told["scores"].values()], [told["classes"], *told["class_scores"].values()]
    assert len(centres) == sum(scores) + sum(row["real"] for rows in classes for row in rows)
    assert sum(scores) == 11  # the better run gains in every score, and the cost falls
    assert all(place > WIDTH / 2 for place in centres)


def test_the_page_tells_in_words_what_its_colours_tell(file, tmp_path):
    """For who does not see them: a column, the label of each drawing, and headers that belong to rows and columns."""
    good, bad = file("good", 0.1), file("bad", 0.45, numbers=range(12), seed=1)
    for runs, word, other in (([bad, good], "better", "worse"), ([good, bad], "worse", "better")):
        write_page(compare(runs), tmp_path / "page.html")
        body = (tmp_path / "page.html").read_text().split("</style>")[1]
        rows = re.findall(r'<th scope="row">([^<]+)</th>(.+?)</tr>', body, re.DOTALL)
        told = compare(runs)[0].to_json()
        real = {row["words"]: row["real"] for row in told["scores"].values()} | {row["name"]: row["real"] for row in told["classes"]}
        assert {name for name, _ in rows} == real.keys()
        assert f"<td>{other}</td>" not in body
        for name, cells in rows[: len(real)]:
            assert (f"<td>{word}</td>" in cells) == real[name]
            assert (f': {word}">' in cells) == real[name]
            assert (': not real">' in cells) == (not real[name])
        assert "<th>" not in body


def test_less_is_drawn_as_better_in_scores_of_errors(file, tmp_path):
    options = {"classes": CLASSES[:2], "groups": ("surface", "neurite")}
    found = compare([file("a", 0.4, **options), file("b", 0.05, seed=1, **options)])
    write_page(found, tmp_path / "page.html")
    text = (tmp_path / "page.html").read_text()
    assert 'class="down"' not in text.split("</style>")[1]
    for name in ("rand_error", "hausdorff", "board_rand_error"):
        assert found[0].differences[name].below_zero
        assert f">{MEASURES[name].words}</th>" in text


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
