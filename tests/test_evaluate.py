"""Scores of a bundle: equal to NumPy's over the labels that `predict` writes, split as said, with damage named and left out."""

import io
import json
import math
import re
import shutil
import sys
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image
from rich.console import Console

from perpixel.bundle import load_bundle
from perpixel.data.masks import parse_label, read_mask
from perpixel.evaluate import Evaluation, evaluate, render
from perpixel.metrics.intervals import interval
from perpixel.metrics.region import Region
from perpixel.predict import Segmenter

NAMES = ("class 0", "class 1", "class 2")


@pytest.fixture
def bundle(make_bundle):
    return load_bundle(make_bundle())


@pytest.fixture
def scenes(tmp_path):
    """Twelve pairs of noise with masks of classes 0..2 and 255: images/, masks/."""
    rng = np.random.default_rng(0)
    for number in range(12):
        for folder in ("images", "masks"):
            (tmp_path / folder).mkdir(exist_ok=True)
        size = (20 + number, 30)
        Image.fromarray(rng.integers(0, 256, (*size, 3), dtype=np.uint8)).save(tmp_path / "images" / f"{number:02d}.png")
        values = np.array([0, 1, 2], np.uint8).repeat((1, 3, 5))
        Image.fromarray(rng.choice(values, size)).save(tmp_path / "masks" / f"{number:02d}.png")
    return tmp_path


def matrix_by_numpy(segmenter, folder, names, classes=3, ignore=255) -> np.ndarray:
    """(K, K) [truth, prediction], pixel by pixel."""
    counts = np.zeros((classes, classes), np.int64)
    for name in names:
        truth = np.asarray(Image.open(folder / "masks" / f"{name}.png"))
        np.add.at(counts, (truth[truth != ignore], segmenter.predict(folder / "images" / f"{name}.png")[truth != ignore]), 1)
    return counts


def loss_by_numpy(segmenter, image, mask, ignore=255) -> float:
    """Mean of -log p over the labelled pixels, float64."""
    truth = np.asarray(Image.open(mask)).astype(int)
    logits = segmenter.logits(image).numpy().astype(np.float64)
    logits -= logits.max(axis=0)
    log_p = logits - np.log(np.exp(logits).sum(axis=0))
    rows, columns = np.nonzero(truth != ignore)
    return float(-log_p[truth[rows, columns], rows, columns].mean())


def test_scores_equal_numpy_s_over_what_predict_gives(bundle, scenes):
    """Definitions of arXiv:1411.4038, section 5, on the matrix counted by NumPy."""
    result = evaluate(bundle, scenes / "images", scenes / "masks").to_json()
    n = matrix_by_numpy(Segmenter(bundle), scenes, [f"{k:02d}" for k in range(12)])
    assert result["confusion"] == n.tolist()
    assert (n.sum(axis=0) > 0).all(), "every class should be predicted, or the test says little"
    truth, guess, hits = n.sum(axis=1), n.sum(axis=0), n.diagonal()
    iou = hits / (truth + guess - hits)
    expected = {
        "pixels": n.sum(),
        "pixel_accuracy": hits.sum() / n.sum(),
        "mean_accuracy": (hits / truth).mean(),
        "miou": iou.mean(),
        "fwiou": (truth * iou).sum() / n.sum(),
        "mean_dice": (2 * hits / (truth + guess)).mean(),
    }
    for name, value in expected.items():
        assert result[name] == pytest.approx(value), name
    assert [row["iou"] for row in result["classes"]] == pytest.approx(iou.tolist())
    assert [row["name"] for row in result["classes"]] == list(NAMES)


def test_the_cost_is_the_mean_of_the_losses_of_images_whatever_their_size(bundle, scenes):
    result = evaluate(bundle, scenes / "images", scenes / "masks")
    files = sorted((scenes / "images").iterdir())
    expected = {str(file): loss_by_numpy(Segmenter(bundle), file, scenes / "masks" / file.name) for file in files}
    assert result.losses == pytest.approx(expected, rel=1e-4)
    assert result.cost == pytest.approx(np.mean(list(expected.values())), rel=1e-4)


def test_the_ten_worst_are_those_with_the_largest_losses(bundle, scenes):
    result = evaluate(bundle, scenes / "images", scenes / "masks")
    worst = result.worst()
    assert len(result.losses) == 12
    assert [loss for _, loss in worst] == sorted(result.losses.values(), reverse=True)[:10]
    assert result.to_json()["worst"] == [name for name, _ in worst]


def test_images_without_a_loss_that_is_a_number_come_before_the_worst():
    """NaN compares with nothing: in a sort by the loss alone it may stand anywhere, and hide the largest ones."""
    losses = {"a": 1.0, "b": math.nan, "c": 3.0, "d": math.inf, "e": math.nan, "f": 2.0}
    assert [name for name, _ in Evaluation(Region(2), ["a", "b"], losses).worst(5)] == ["b", "e", "d", "c", "f"]


def test_ignored_pixels_count_nowhere_and_an_image_of_nothing_else_has_no_loss(bundle, scenes):
    for number in range(12):
        file = scenes / "masks" / f"{number:02d}.png"
        mask = np.array(Image.open(file))
        mask[: 10 if number else None] = 9
        Image.fromarray(mask).save(file)
    result = evaluate(bundle, scenes / "images", scenes / "masks", labels={9: 255})
    expected = matrix_by_numpy(Segmenter(bundle), scenes, [f"{k:02d}" for k in range(12)], ignore=9)
    assert result.confusion.counts.tolist() == expected.tolist()
    assert {name[-6:-4] for name in result.losses} == {f"{k:02d}" for k in range(1, 12)}
    second = scenes / "images" / "01.png"
    assert result.losses[str(second)] == pytest.approx(loss_by_numpy(Segmenter(bundle), second, scenes / "masks" / "01.png", 9), rel=1e-4)


def test_images_of_one_name_in_two_folders_both_count(bundle, scenes, tmp_path):
    for kind in ("images", "masks"):
        for place, number in (("monday", "00"), ("tuesday", "01")):
            folder = tmp_path / "week" / kind / place
            folder.mkdir(parents=True)
            shutil.copy(scenes / kind / f"{number}.png", folder / "a.png")
    result = evaluate(bundle, tmp_path / "week" / "images", tmp_path / "week" / "masks")
    assert len(result.losses) == 2
    assert result.cost == pytest.approx(sum(result.losses.values()) / 2)


# ---- which part


def test_a_set_with_parts_is_scored_on_val_unless_another_part_is_named(run, sample_set):
    bundle = load_bundle(run / "best.safetensors")
    whole = {split: evaluate(bundle, sample_set / "images", sample_set / "masks", split=split) for split in (None, "val", "train")}
    assert {split: len(result.losses) for split, result in whole.items()} == {None: 4, "val": 4, "train": 8}
    assert whole[None].losses == whole["val"].losses
    expected = matrix_by_numpy(Segmenter(bundle), sample_set, [f"val/{k:04d}" for k in range(4)], classes=5)
    assert whole["val"].confusion.counts.tolist() == expected.tolist()


def test_the_scores_of_a_run_are_those_that_evaluate_gives_its_bundle(run, sample_set):
    told = json.loads((run / "evaluation.json").read_text())
    again = evaluate(run / "best.safetensors", sample_set / "images", sample_set / "masks").to_json()
    assert again["confusion"] == told["confusion"]
    assert again["cost"] == pytest.approx(told["cost"], rel=1e-5)


def test_a_set_without_parts_is_scored_whole_or_split_as_training_splits_it(bundle, scenes):
    from perpixel.check import check

    assert len(evaluate(bundle, scenes / "images", scenes / "masks").losses) == 12
    trained_on = check(scenes / "images", scenes / "masks")
    for split in ("train", "val"):
        scored = evaluate(bundle, scenes / "images", scenes / "masks", split=split).losses
        assert set(scored) == {str(pair.image) for pair in trained_on.split(split)}


@pytest.mark.parametrize(("folders", "scored"), [(("train",), 1), (("test",), 3), (("train", "test"), 1)])
def test_a_set_with_other_parts_than_val_is_scored_on_what_training_held_back(bundle, scenes, tmp_path, folders, scored):
    root = tmp_path / "parts"
    for kind in ("images", "masks"):
        for number in range(3 * len(folders)):
            folder = root / kind / folders[number // 3]
            folder.mkdir(parents=True, exist_ok=True)
            shutil.copy(scenes / kind / f"{number:02d}.png", folder)
    assert len(evaluate(bundle, root / "images", root / "masks").losses) == scored


def test_a_part_that_is_not_there_names_those_that_are(bundle, sample_set, tmp_path):
    for kind in ("images", "masks"):
        (tmp_path / kind).symlink_to(sample_set / kind)  # away from classes.txt, which names other classes
    with pytest.raises(ValueError, match=r"no labelled images in the part 'test' .*\. Parts here: train, val"):
        evaluate(bundle, tmp_path / "images", tmp_path / "masks", split="test")


# ---- what is damaged, or not as the bundle expects


def test_damaged_files_are_named_left_out_and_do_not_change_the_rest(bundle, scenes):
    (scenes / "images" / "03.png").write_bytes((scenes / "images" / "03.png").read_bytes()[:300])
    (scenes / "masks" / "05.png").write_bytes(b"")
    Image.new("L", (7, 7)).save(scenes / "masks" / "07.png")
    Image.fromarray(np.full((29, 30), 200, np.uint8)).save(scenes / "masks" / "09.png")
    sound = [f"{k:02d}" for k in range(12) if k not in (3, 5, 7, 9)]
    result = evaluate(bundle, scenes / "images", scenes / "masks")
    assert result.confusion.counts.tolist() == matrix_by_numpy(Segmenter(bundle), scenes, sound).tolist()
    assert len(result.losses) == 8
    told = {file.rpartition("/")[2]: why for file, why in result.damaged.items()}
    assert told.keys() == {"03.png", "05.png", "07.png", "09.png"}
    assert "images/03.png: is damaged or cut off" in told["03.png"]
    assert "masks/05.png: is empty" in told["05.png"]
    assert "masks/07.png is 7x7 pixels" in told["07.png"]
    assert "masks/09.png: value 200" in told["09.png"]
    assert "--label 200=ignore" in told["09.png"]


def test_a_file_that_a_list_names_but_that_is_not_there_is_named(bundle, scenes):
    (scenes / "val.txt").write_text("images/00.png masks/00.png\nimages/99.png masks/99.png\n")
    result = evaluate(bundle, scenes)
    assert len(result.losses) == 1
    assert any("99.png" in why and "no such file" in why for why in result.damaged.values())


def test_where_nothing_can_be_scored_the_first_reason_is_given(bundle, scenes):
    for file in (scenes / "masks").iterdir():
        file.write_bytes(b"")
    with pytest.raises(ValueError, match=r"images: none of 12 images could be scored\. The first: .*00\.png: is empty"):
        evaluate(bundle, scenes / "images", scenes / "masks")


def test_a_label_overrides_the_bundle_s_own_map(bundle, scenes):
    plain = evaluate(bundle, scenes / "images", scenes / "masks").confusion.counts
    moved = evaluate(bundle, scenes / "images", scenes / "masks", labels={2: 1}).confusion.counts
    assert moved[1].tolist() == (plain[1] + plain[2]).tolist()
    assert moved[2].sum() == 0


def test_a_label_that_the_bundle_does_not_know_is_refused(bundle, scenes):
    with pytest.raises(ValueError, match=r"label 2=7: the bundle has no class 7, only 0 to 2"):
        evaluate(bundle, scenes / "images", scenes / "masks", labels={2: 7})


# ---- what is told


def test_json_holds_no_nan_where_a_class_is_nowhere(bundle, scenes):
    for file in (scenes / "masks").iterdir():
        Image.fromarray(np.zeros_like(np.array(Image.open(file)))).save(file)
    result = evaluate(bundle, scenes / "images", scenes / "masks")
    plain = json.loads(json.dumps(result.to_json(), allow_nan=False))
    assert plain["classes"][2]["accuracy"] is None
    assert plain["images"] == 12
    assert "absent" in plain["absent_rule"]


def test_json_holds_no_nan_of_an_empty_set_or_a_model_that_exploded():
    for losses in ({}, {"a.png": math.nan, "b.png": math.inf}):
        plain = Evaluation(Region(2), ["a", "b"], losses).to_json()
        json.dumps(plain, allow_nan=False)
        assert plain["cost"] is None
        assert all(loss is None for loss in plain["losses"].values())


def test_image_means_and_intervals_are_of_the_images_counts_and_the_rule_is_the_one_asked_for(bundle, scenes):
    """Image by image with NumPy; the interval beside a slow bootstrap with draws of its own, to a fifth of its width."""
    for number in range(12):  # no image shows class 0 in its mask
        file = scenes / "masks" / f"{number:02d}.png"
        mask = np.array(Image.open(file))
        mask[mask == 0] = 1
        Image.fromarray(mask).save(file)
    each = np.stack([matrix_by_numpy(Segmenter(bundle), scenes, [f"{k:02d}"]) for k in range(12)])

    def miou(n):
        truth, guess = n.sum(-1), n.sum(-2)
        return np.where(truth > 0, np.diagonal(n, axis1=-2, axis2=-1) / (truth + guess - np.diagonal(n, axis1=-2, axis2=-1)), 0).mean(-1)

    told = evaluate(bundle, scenes / "images", scenes / "masks", absent="zero", scores=()).to_json()
    assert "divisor is always the number of classes" in told["absent_rule"]
    assert told["miou"] == pytest.approx(miou(each.sum(0)))
    assert told["image_means"]["miou"] == pytest.approx(miou(each).mean())
    drawn = np.random.default_rng(7).integers(0, 12, (2000, 12))
    low, high = np.quantile(miou(each[drawn].sum(1)), [0.025, 0.975])
    assert told["intervals"]["miou"] == pytest.approx([low, high], abs=0.2 * (high - low))
    with pytest.raises(ValueError, match="absent is 'null'; the rules for absent classes are union, truth, zero"):
        evaluate(bundle, scenes / "images", scenes / "masks", absent="null")


def test_intervals_are_computed_once_for_what_there_is(monkeypatch):
    calls = []
    monkeypatch.setattr(
        sys.modules["perpixel.evaluate"], "interval", lambda *given, **options: calls.append(1) or interval(*given, **options)
    )
    made = Evaluation(Region(2), ["a", "b"])
    for number in range(3):
        made.region.update(np.array([[0, 1]]), np.array([[0, number % 2]]), name=f"{number}.png")
        made.losses[f"{number}.png"] = 0.1
    made.to_json()
    render(made, Console(quiet=True))
    assert len(calls) == 1
    assert made.intervals() is made.intervals()
    made.absent = "zero"
    made.to_json()
    made.region.update(np.array([[0, 1]]), np.array([[0, 0]]), name="3.png")
    assert made.intervals()["miou"].images == 4
    assert len(calls) == 3


def test_the_table_names_every_class_the_rule_and_what_was_left_out(bundle, scenes):
    (scenes / "masks" / "05.png").write_bytes(b"")
    console = Console(width=200, record=True, quiet=False, file=open("/dev/null", "w"))  # noqa: SIM115
    render(evaluate(bundle, scenes / "images", scenes / "masks"), console)
    text = console.export_text()
    assert all(name in text for name in NAMES)
    assert "11 images" in text
    assert "left out of every mean" in text
    assert "masks/05.png: is empty" in text


def test_progress_counts_every_image_that_was_scored(bundle, scenes):
    seen = []
    evaluate(bundle, scenes / "images", scenes / "masks", progress=lambda *told: seen.append(told))
    assert seen == [(number + 1, 12, f"{number:02d}") for number in range(12)]


def test_observers_see_every_image_once_with_the_logits_that_predict_gives(bundle, scenes):
    (scenes / "masks" / "05.png").write_bytes(b"")
    seen = []
    result = evaluate(bundle, scenes / "images", scenes / "masks", observers=[seen.append])
    assert [image.name for image in seen] == [f"{k:02d}" for k in range(12) if k != 5]
    for image in seen:
        assert image.path == scenes / "images" / f"{image.name}.png"
        assert np.array_equal(image.image.movedim(0, -1), np.asarray(Image.open(image.path)))
        assert np.array_equal(image.labels, np.asarray(Image.open(scenes / "masks" / image.path.name)))
        torch.testing.assert_close(image.logits, Segmenter(bundle).logits(image.path))
        assert image.loss == result.losses[str(image.path)]
        assert image.ignore == 255


def test_masks_of_a_run_are_read_as_check_reads_them(run, sample_set):
    """The palette masks of the sample set hold the class indices themselves."""
    bundle = load_bundle(run / "best.safetensors")
    file = sample_set / "masks" / "val" / "0000.png"
    assert np.array_equal(bundle.label_map(read_mask(file)), np.asarray(Image.open(file)))


def test_masks_that_show_one_class_only_are_called_doubtful(bundle, scenes):
    assert evaluate(bundle, scenes / "images", scenes / "masks").warnings == []
    for path in (scenes / "masks").iterdir():
        Image.fromarray(np.zeros_like(np.asarray(Image.open(path)))).save(path)
    result = evaluate(bundle, scenes / "images", scenes / "masks")
    assert result.to_json()["warnings"] == result.warnings
    assert "nothing but 'class 0'" in result.warnings[0]
    console = Console(record=True, width=200)
    render(result, console)
    assert "nothing but 'class 0'" in console.export_text()


def test_a_model_that_labels_everything_alike_is_told(bundle, scenes):
    with torch.no_grad():
        bundle.model.decoder.classify.bias[1] += 1e6
    warnings = evaluate(bundle, scenes / "images", scenes / "masks").warnings
    assert len(warnings) == 1
    assert "labels everything 'class 1'" in warnings[0]


def named(make_bundle, *names):
    """A bundle with these class names."""
    found = load_bundle(make_bundle(classes=len(names)))
    return replace(found, card=found.card.model_copy(update={"classes": list(names)}))


def test_a_set_whose_classes_are_in_another_order_is_refused_with_the_options_that_score_it_by_name(make_bundle, scenes):
    """The options of the message give what the masks give once their values are exchanged by hand."""
    bundle = named(make_bundle, "sky", "sea", "reeds")
    (scenes / "classes.txt").write_text("sea\nSky\nreeds\n")
    with pytest.raises(ValueError, match="in another order") as caught:
        evaluate(bundle, scenes / "images", scenes / "masks")
    assert "'sea' is class 0 of the set, and 'sky' that of the bundle" in str(caught.value)
    options = re.findall(r"--label (\S+=\w+)", str(caught.value))
    assert options == ["0=1", "1=0"]
    by_name = evaluate(bundle, scenes / "images", scenes / "masks", labels=dict(map(parse_label, options)))
    (scenes / "classes.txt").unlink()
    for path in (scenes / "masks").iterdir():
        values = np.asarray(Image.open(path))
        Image.fromarray(np.array([1, 0, *range(2, 256)], np.uint8)[values]).save(path)
    by_hand = evaluate(bundle, scenes / "images", scenes / "masks")
    assert torch.equal(by_name.confusion.counts, by_hand.confusion.counts)


@pytest.mark.parametrize(
    ("of_bundle", "of_set", "told"),
    [
        ("sky sea reeds", "bird sea sky", "--label 0=ignore --label 2=0"),
        (
            "sky sea reeds",
            "sky sea reeds bird",
            "'bird' is class 3 of the set, and none of the bundle's. To score by name: --label 3=ignore",
        ),
        ("sky sea reeds", "2:sky 0:sea 1:reeds", "--label 0=1 --label 1=2 --label 2=0"),
    ],
)
def test_a_set_with_other_classes_is_refused(of_bundle, of_set, told, make_bundle, scenes):
    (scenes / "classes.txt").write_text(of_set.replace(" ", "\n"))
    with pytest.raises(ValueError, match=re.escape(told)):
        evaluate(named(make_bundle, *of_bundle.split()), scenes / "images", scenes / "masks")


@pytest.mark.parametrize(
    ("of_bundle", "of_set"),
    [
        ("sky sea reeds", "sky sea reeds"),
        ("sky sea_side reeds", "Sky Sea-Side reeds"),
        ("sky sea reeds", "sky sea"),  # what it has not it cannot confuse
        ("class_0 class_1 class_2", "sky sea reeds"),  # nobody named them in training
    ],
)
def test_a_set_whose_names_agree_is_scored_as_without_them(of_bundle, of_set, make_bundle, scenes):
    bundle = named(make_bundle, *of_bundle.split())
    before = evaluate(bundle, scenes / "images", scenes / "masks").confusion.counts
    (scenes / "classes.txt").write_text(of_set.replace(" ", "\n"))
    assert torch.equal(evaluate(bundle, scenes / "images", scenes / "masks").confusion.counts, before)


def test_of_many_images_left_out_some_are_named_and_all_are_counted(bundle, scenes):
    for number in range(11):
        (scenes / "images" / f"{number:02d}.png").write_bytes(b"no picture")
    console = Console(record=True, width=200, file=io.StringIO())
    render(evaluate(bundle, scenes / "images", scenes / "masks"), console)
    lines = [line for line in console.export_text().splitlines() if line.startswith("left out")]
    assert sum("images/" in line for line in lines) == 8
    assert lines[-1] == "left out and 3 more, 11 in all; --json names them"
