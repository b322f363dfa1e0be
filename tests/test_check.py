"""`perpixel check` names everything that is wrong with a set, counts what is right, and proposes what training needs."""

import json
import shutil
import time
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tifffile
from PIL import Image
from rich.console import Console

from perpixel.check import Check, _class_pixels, check, render
from perpixel.check_report import bar
from perpixel.data import survey
from perpixel.data.duplicates import fingerprint
from perpixel.data.evidence import tally
from perpixel.data.images import Picture, read_image
from perpixel.data.layouts import Pair
from perpixel.data.masks import IGNORE, LabelMap, read_mask
from perpixel.data.survey import Reading

SHARED = Path(__file__).parents[2] / "shared" / "data"


def photograph(seed: int, size: tuple[int, int] = (24, 32)) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (*size, 3), dtype=np.uint8)


def blocks(*values: int, size: tuple[int, int] = (24, 32)) -> np.ndarray:
    """A mask of vertical stripes of equal width."""
    return np.repeat(np.asarray(values, dtype=np.uint8), size[1] // len(values))[None].repeat(size[0], axis=0)


def make(root: Path, masks: list[np.ndarray], val: int = 2) -> Path:
    """images/{train,val} and masks/{train,val} with one image per mask; the last `val` are for validation."""
    for index, mask in enumerate(masks):
        part = "val" if index >= len(masks) - val else "train"
        for folder in ("images", "masks"):
            (root / folder / part).mkdir(parents=True, exist_ok=True)
        Image.fromarray(photograph(index, mask.shape[:2])).save(root / "images" / part / f"{index}.png")
        Image.fromarray(mask).save(root / "masks" / part / f"{index}.png")
    return root


@pytest.fixture
def sound(tmp_path: Path) -> Path:
    return make(tmp_path, [blocks(0, 1, 1, 2)] * 4 + [blocks(0, 0, 1, 1)] * 2)


def printed(report: Check, width: int = 150) -> str:
    console = Console(width=width, record=True, file=open("/dev/null", "w"))  # noqa: SIM115
    render(report, console)
    return console.export_text()


def test_a_sound_set_is_ready_and_counted_as_numpy_counts_it(sound: Path) -> None:
    report = check(sound)
    assert report.ready
    assert report.damaged == report.size_mismatches == {}
    assert [len(report.split(name)) for name in ("train", "val", "test")] == [4, 2, 0]
    assert (report.bands, report.dtype, report.scale, report.sizes) == (3, "uint8", 255.0, {(24, 32): 6})
    for split in ("train", "val"):
        labels = np.stack([report.label_map(read_mask(pair.mask)) for pair in report.split(split) if pair.mask])
        present = np.array([[(label == k).any() for k in range(3)] for label in labels])
        assert report.pixels[split] == np.bincount(labels.ravel(), minlength=3).tolist()
        assert report.images_with[split] == present.sum(axis=0).tolist()
        assert report.pixels_where_present[split] == (present * 24 * 32).sum(axis=0).tolist()
    assert report.absent == {"val": [report.classes[2]]}
    assert any("in no val mask" in warning for warning in report.warnings)


def test_mean_and_deviation_are_those_of_all_training_pixels(sound: Path) -> None:
    report = check(sound)
    stored = np.concatenate([read_image(pair.image).reshape(3, -1) for pair in report.split("train")], axis=1) / 255
    np.testing.assert_allclose(report.mean, stored.mean(axis=1), rtol=1e-12)
    np.testing.assert_allclose(report.std, stored.std(axis=1), rtol=1e-9)


@pytest.mark.parametrize(("dtype", "scale"), [(np.uint16, 65535.0), (np.float32, 1.0)])
def test_stacks_of_many_bits_are_described_in_their_own_range(tmp_path: Path, dtype: type, scale: float) -> None:
    stored = (np.random.default_rng(0).random((5, 20, 30)) * 1000 + 60000).astype(dtype)
    tifffile.imwrite(tmp_path / "volume.tif", stored, photometric="minisblack")
    tifffile.imwrite(tmp_path / "labels.tif", (stored > 60500).astype(np.uint8), photometric="minisblack")
    report = check(tmp_path / "volume.tif", tmp_path / "labels.tif")
    assert report.ready
    assert (report.layout, report.dtype, report.scale, report.bands) == ("stacks", np.dtype(dtype).name, scale, 1)
    np.testing.assert_allclose(report.mean, stored[:4].astype(float).mean() / scale, rtol=1e-6)
    np.testing.assert_allclose(report.std, stored[:4].astype(float).std() / scale, rtol=1e-4)
    assert [pair.image.page for pair in report.split("val")] == [4]


def test_damage_is_named_counted_and_not_fatal(sound: Path) -> None:
    images, masks = sound / "images" / "train", sound / "masks" / "train"
    (images / "0.png").write_bytes((images / "0.png").read_bytes()[:900])
    (masks / "1.png").write_bytes(b"")
    (images / "2.png").write_text("this is a text")
    report = check(sound)
    assert report.ready
    assert {Path(file).name for file in report.damaged} == {"0.png", "1.png", "2.png"}
    assert all(name in message for name, message in report.damaged.items())
    assert [pair.image.name for pair in report.split("train")] == ["3"]
    assert "3 files can't be used" in " ".join(report.warnings)


def test_nothing_usable_is_a_problem_that_names_a_file(sound: Path) -> None:
    for file in (sound / "images").glob("*/*.png"):
        file.write_bytes(b"")
    report = check(sound)
    assert not report.ready
    assert "no usable pair" in report.problems[0]
    assert ".png: is empty" in report.problems[0]
    assert "none usable" in printed(report)
    json.dumps(report.to_json(), allow_nan=False)


def test_a_few_unequal_sizes_are_left_out_and_many_are_a_problem(tmp_path: Path) -> None:
    root = make(tmp_path, [blocks(0, 1)] * 12)
    Image.fromarray(blocks(0, 1, size=(32, 24))).save(root / "masks" / "train" / "0.png")
    report = check(root)
    assert report.ready
    assert len(report.split("train")) == 9
    (message,) = report.size_mismatches.values()
    assert "is 24x32 but" in message
    assert "is 32x24 pixels (height x width). One of them lies on its side" in message
    Image.fromarray(blocks(0, 1, size=(12, 16))).save(root / "masks" / "train" / "1.png")
    report = check(root)
    assert not report.ready
    assert "2 of 12 masks have another size than their image" in report.problems[0]


def test_images_without_masks_and_masks_without_images_are_counted(sound: Path) -> None:
    (sound / "masks" / "train" / "0.png").unlink()
    (sound / "images" / "train" / "1.png").unlink()
    report = check(sound)
    assert report.ready
    assert [picture.path for picture in report.unlabelled] == [sound / "images" / "train" / "0.png"]
    assert [picture.path for picture in report.orphan_masks] == [sound / "masks" / "train" / "1.png"]
    text = " ".join(report.warnings)
    assert "1 image without a mask" in text
    assert "1 mask without an image" in text


def test_a_value_outside_the_classes_is_the_problem_that_design_md_words(tmp_path: Path) -> None:
    """design.md, "Bad input"."""
    root = make(tmp_path, [blocks(0, 1)] * 3 + [blocks(0, 7, 1, 1)] * 3)
    report = check(root, classes="sky,sea")
    assert not report.ready
    first = root / "masks" / "train" / "3.png"
    assert report.problems == [
        f"{first}: value 7 in 3 files is not one of 2 classes. To make it class 1: --label 7=1; to ignore it: --label 7=ignore"
    ]
    assert report.pixels["train"] == [4 * 24 * 16 - 24 * 8, 3 * 24 * 16 + 24 * 16]  # what is legal is counted all the same
    ignoring = check(root, classes="sky,sea", labels={7: IGNORE})
    assert ignoring.ready
    assert ignoring.ignore_share == pytest.approx(3 / 4 / 6)
    assert check(root, classes="sky,sea", labels={7: 1}).pixels["val"] == [2 * 24 * 8, 2 * 24 * 24]


def test_copies_of_training_images_in_val_are_reported(sound: Path) -> None:
    train, val = sound / "images" / "train", sound / "images" / "val"
    (val / "4.png").write_bytes((train / "2.png").read_bytes())
    slightly = np.asarray(Image.open(train / "3.png")).copy()
    slightly[0, 0] ^= 1
    Image.fromarray(slightly).save(val / "5.png")
    report = check(sound)
    assert report.duplicates == [
        ("exact", str(train / "2.png"), str(val / "4.png")),
        ("near", str(train / "3.png"), str(val / "5.png")),
    ]
    assert report.ready


def test_grey_among_colour_is_read_as_colour_and_other_bands_are_left_out(tmp_path: Path) -> None:
    root = make(tmp_path, [blocks(0, 1)] * 12)
    Image.fromarray(photograph(50)[..., 0]).save(root / "images" / "train" / "0.png")
    (root / "images" / "train" / "1.png").unlink()
    tifffile.imwrite(
        root / "images" / "train" / "1.tif", np.zeros((24, 32, 5), dtype=np.uint8), photometric="minisblack", planarconfig="contig"
    )
    report = check(root)
    assert report.ready
    assert report.bands == 3
    assert [Path(file).name for file in report.damaged] == ["1.tif"]
    assert "1 grey image among colour ones" in " ".join(report.warnings)
    grey = photograph(50)[..., 0].ravel()
    others = [read_image(pair.image)[0].ravel() for pair in report.split("train") if pair.image.name != "0"]
    assert report.mean[0] == pytest.approx(np.concatenate([grey, *others]).mean() / 255)


def test_one_pair_alone_serves_both_parts_and_says_so(tmp_path: Path) -> None:
    Image.fromarray(photograph(0)).save(tmp_path / "x.png")
    Image.fromarray(blocks(0, 1)).save(tmp_path / "x_mask.png")
    report = check(tmp_path)
    assert report.ready
    assert [pair.split for pair in report.pairs] == ["train", "val"]
    assert report.duplicates == []
    assert sum(report.sizes.values()) == 1
    assert any("train and val are the same picture" in warning for warning in report.warnings)


def test_one_pair_alone_is_read_and_counted_once(tmp_path: Path) -> None:
    Image.fromarray(photograph(0)).save(tmp_path / "x.png")
    Image.fromarray(blocks(0, 1)).save(tmp_path / "x_mask.png")
    seen: list[int] = []
    text = printed(check(tmp_path, progress=lambda done, of, name: seen.append(of)))
    assert seen == [1]
    assert "1 usable (1 train, 1 val, the same picture)" in text
    assert "ready to train on 1 image" in text


def test_a_pair_of_unequal_sizes_is_explained_once(tmp_path: Path) -> None:
    Image.fromarray(photograph(0)).save(tmp_path / "x.png")
    Image.fromarray(blocks(0, 1, size=(12, 16))).save(tmp_path / "x_mask.png")
    report = check(tmp_path)
    text = printed(report, width=400)
    assert "1 of 1 masks have another size than their image" in text
    assert text.count(report.size_mismatches[str(tmp_path / "x.png")]) == 1
    assert report.size_mismatches[str(tmp_path / "x.png")] in report.problems[0]  # who sees only the problems is told why


def test_two_images_of_which_one_is_damaged_still_train(tmp_path: Path) -> None:
    for name in "xy":
        Image.fromarray(photograph(0)).save(tmp_path / f"{name}.png")
        Image.fromarray(blocks(0, 1)).save(tmp_path / f"{name}_mask.png")
    for name in "xy":
        whole = (tmp_path / f"{name}.png").read_bytes()
        (tmp_path / f"{name}.png").write_bytes(b"")
        report = check(tmp_path)
        assert report.ready
        assert [pair.split for pair in report.pairs] == ["train", "val"]
        (tmp_path / f"{name}.png").write_bytes(whole)


def test_a_band_that_never_changes_can_be_divided_by_its_deviation(tmp_path: Path) -> None:
    root = make(tmp_path, [blocks(0, 1)] * 4)
    for file in (root / "images").glob("*/*.png"):
        picture = np.asarray(Image.open(file)).copy()
        picture[..., 1] = 7
        Image.fromarray(picture).save(file)
    report = check(root)
    assert report.std[1] == 1.0
    assert report.mean[1] == pytest.approx(7 / 255)
    assert any("band 1 has one value" in warning for warning in report.warnings)


def test_warnings_of_the_readers_reach_the_report(tmp_path: Path) -> None:
    root = make(tmp_path, [blocks(0, 1)] * 4)
    frames = [Image.fromarray(photograph(seed)) for seed in (7, 8)]
    (root / "images" / "train" / "0.png").unlink()
    frames[0].save(root / "images" / "train" / "0.gif", save_all=True, append_images=frames[1:])
    assert any("0.gif" in warning and "animation" in warning for warning in check(root).warnings)


def test_the_split_of_the_sound_does_not_move_when_one_file_breaks(tmp_path: Path) -> None:
    for index in range(10):
        Image.fromarray(photograph(index)).save(tmp_path / f"{index}.png")
        Image.fromarray(blocks(0, 1)).save(tmp_path / f"{index}_mask.png")
    before = {pair.image.name: pair.split for pair in check(tmp_path).pairs}
    (tmp_path / "3.png").write_bytes(b"")
    after = {pair.image.name: pair.split for pair in check(tmp_path).pairs}
    assert after == {name: split for name, split in before.items() if name != "3"}


@pytest.mark.parametrize(("ignored", "masks"), [(slice(0, 4), "training"), (slice(4, 6), "validation")])
def test_a_part_without_a_labelled_pixel_is_a_problem(tmp_path: Path, ignored: slice, masks: str) -> None:
    stripes = [blocks(0, 1, 1, 2)] * 6
    stripes[ignored] = [blocks(255)] * len(stripes[ignored])
    root = make(tmp_path, stripes)
    for classes in (None, "sky,sea,reeds"):
        report = check(root, classes=classes, labels={255: IGNORE})
        assert report.problems == [
            f"no labelled pixel in the {masks} masks: every one is ignored. Give a value a class with --label VALUE=CLASS"
        ]
        printed(report)
        json.dumps(report.to_json(), allow_nan=False)


def test_validation_files_that_are_all_damaged_are_a_problem(sound: Path) -> None:
    for file in (sound / "images" / "val").iterdir():
        file.write_bytes(b"")
    assert "no usable pair for validation" in " ".join(check(sound).problems)


def lists(root: Path, **lines: str) -> Path:
    """Images 0.png to 5.png and their masks in one folder each, of which one has five bands; and the lists."""
    make(root, [blocks(0, 1)] * 6, val=0)
    (root / "images" / "train" / "5.png").unlink()
    bands = np.random.default_rng(5).integers(0, 256, (24, 32, 5), dtype=np.uint8)
    tifffile.imwrite(root / "images" / "train" / "5.tif", bands, photometric="minisblack", planarconfig="contig")
    for split, names in lines.items():
        (root / f"{split}.txt").write_text("\n".join(names.split()))
    return root


def test_a_line_listed_twice_is_taken_once_with_a_warning_also_beside_an_image_of_other_bands(tmp_path: Path) -> None:
    report = check(lists(tmp_path, train="0 1 1 2 5", val="3 4"))
    assert [pair.image.name for pair in report.split("train")] == ["0", "1", "2"]
    assert "listed more than once and taken once: 1 of the pairs" in report.warnings
    assert [Path(file).name for file in report.damaged] == ["5.tif"]


def test_an_image_listed_in_two_parts_is_a_problem(tmp_path: Path) -> None:
    report = check(lists(tmp_path, train="0 1 2", val="2 3 4"))
    image = tmp_path / "images" / "train" / "2.png"
    assert report.problems == [f"1 image in more than one part, first {image} in train and val. Keep each in one list only."]


@pytest.mark.parametrize(
    ("label_map", "mask", "expected"),
    [
        (LabelMap({0: 0, 7: 1, 9: IGNORE}), np.array([0, 7, 9, 3], np.uint8), ([1, 1], 1)),
        (LabelMap({0: 0, 7: 1, 9: IGNORE}), np.array([0, 7, 9, 3], np.uint16), ([1, 1], 1)),
        (LabelMap({0: 0, 7: 1}), np.array([0, 7, -4, 7], np.int16), ([1, 2], 0)),
        (LabelMap({0: 0, 7: 1}), np.array([0, 7, 9, 9], np.int32), ([0, 0], 0)),
        (LabelMap({0: 0, 0xFF0000: 1}, rgb=True), np.array([0, 0xFF0000, 5, 0xFF0000], np.int32), ([1, 2], 0)),
        (LabelMap({0: 0, 0x070707: 1}, rgb=True), np.array([0, 7, 7, 9], np.uint8), ([1, 2], 0)),
        (LabelMap({0: 0, 0x070707: 1}, rgb=True), np.array([0, 7, -1, -1], np.int16), ([1, 1], 0)),
        (LabelMap({0: 0, 100: 1}, nearest=True), np.array([3, 90, 110, 0], np.uint8), ([2, 2], 0)),
    ],
)
def test_pixels_are_counted_by_value_and_values_that_the_map_lacks_are_left_out(
    tmp_path: Path, label_map: LabelMap, mask: np.ndarray, expected: tuple[list[int], int]
) -> None:
    values, counts = tally(mask[None])
    reading = Reading(
        Pair(Picture(tmp_path), None), (1, 4), 1, "uint8", np.zeros(1), np.zeros(1), values, counts, fingerprint(mask[None, None])
    )
    pixels, ignored = _class_pixels(reading, label_map, 2)
    assert (pixels.tolist(), ignored) == expected


def test_warnings_come_in_one_order_whatever_the_threads(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    root = make(tmp_path, [blocks(0, 1)] * 6)
    real = survey.survey

    def noisy(*arguments: object) -> object:
        for name in ("z.png", "a.png", "m.png", "a.png"):
            warnings.warn(f"{name}: strange", stacklevel=1)
        return real(*arguments)

    monkeypatch.setitem(check.__globals__, "survey", noisy)
    assert [line for line in check(root).warnings if "strange" in line] == [f"{name}.png: strange" for name in "amz"]


def test_progress_counts_every_pair(sound: Path) -> None:
    seen: list[tuple[int, int]] = []
    check(sound, progress=lambda done, of, name: seen.append((done, of)))
    assert seen == [(i, 6) for i in range(1, 7)]


def test_json_is_plain_complete_and_the_same_twice(sound: Path) -> None:
    one, two = (json.dumps(check(sound).to_json(), allow_nan=False) for _ in range(2))
    assert one == two
    found = json.loads(one)
    assert list(found)[:2] == ["format", "ready"]
    assert (found["format"], found["ready"]) == (1, True)
    assert found["splits"] == {"train": 4, "val": 2}
    assert found["images"]["sizes"] == [{"height": 24, "width": 32, "images": 6}]
    assert [entry["pixels"] for entry in found["classes"]] == [
        {"train": 768, "val": 768},
        {"train": 1536, "val": 768},
        {"train": 768, "val": 0},
    ]
    assert found["pairs"][0] == {
        "image": str(sound / "images/train/0.png"),
        "mask": str(sound / "masks/train/0.png"),
        "split": "train",
    }


def test_the_table_names_classes_shares_and_images(sound: Path) -> None:
    text = printed(check(sound, classes="sky,[sea],reeds"))
    assert "6 usable (4 train, 2 val)" in text
    row = next(line for line in text.splitlines() if "[sea]" in line and "%" in line)  # brackets are no markup
    assert "50.0%" in row
    assert row.split()[-2:] == ["4/4", "2/2"]
    assert "0/2" in text
    assert "ready to train on 4 images" in text
    assert max(map(len, printed(check(sound), width=80).splitlines())) <= 80


@pytest.mark.parametrize(("share", "expected"), [(0, ""), (1, "████"), (0.5, "██"), (1e-9, "▏"), (0.28, "█▏")])
def test_a_bar_is_as_long_as_its_share(share: float, expected: str) -> None:
    assert bar(share, width=4) == expected


@pytest.mark.shared_data
@pytest.mark.parametrize(
    ("paths", "pairs", "classes", "ignored"),
    [
        (["msrc21"], 335, 21, True),
        (["isbi2012/train-volume.tif", "isbi2012/train-labels.tif"], 30, 2, False),
    ],
)
def test_real_sets_are_ready_with_nothing_configured(paths: list[str], pairs: int, classes: int, ignored: bool) -> None:
    start = time.monotonic()
    report = check(*(SHARED / path for path in paths))
    assert report.ready
    assert (len(report.pairs), len(report.classes), report.ignore_share > 0) == (pairs, classes, ignored)
    assert report.damaged == {}
    assert time.monotonic() - start < 60


@pytest.mark.shared_data
def test_camvid_value_11_is_ignored_because_there_are_11_names() -> None:
    report = check(SHARED / "camvid" / "val.txt")
    assert report.ready
    assert report.label_map.values[11] == IGNORE
    assert report.classes[0] == "sky"
    assert sum(map(sum, report.pixels.values())) == round(101 * 360 * 480 * (1 - report.ignore_share))


def test_where_the_names_of_the_classes_come_from_is_said(tmp_path: Path) -> None:
    root = make(tmp_path, [blocks(0, 1)] * 4)
    assert check(root / "images", root / "masks").classes_from == "the masks' values"
    assert check(root / "images", root / "masks", classes="sea,land").classes_from == "the classes given"
    (root / "images" / "classes.txt").write_text("sea\nland\n")
    found = check(root / "images", root / "masks")
    assert (found.classes_from, found.classes) == ("classes.txt", ["sea", "land"])


def test_swapped_folders_are_recognised(tmp_path: Path) -> None:
    root = make(tmp_path, [blocks(0, 1, 1, 2, size=(300, 400))] * 4)
    report = check(root / "masks", root / "images")
    assert len(report.problems) == 1  # what else is wrong follows from it
    assert report.problems[0].endswith(f"swapped? Try {root}/images {root}/masks")
    assert not any("swapped" in problem for problem in check(root / "images", root / "masks").problems)


@pytest.mark.parametrize("labels", [{"255": "ignore"}, ["255=1"]])
def test_labels_that_are_no_numbers_are_named_with_what_is_legal(tmp_path: Path, labels: Any) -> None:
    with pytest.raises(TypeError, match=r"labels is .*; give mask values and their classes by number, .*\{255: 1\}"):
        check(make(tmp_path, [blocks(0, 1)]) / "images", labels=labels)


def test_more_values_than_classes_can_be_are_told_with_the_file_and_the_table_is_cut_short(tmp_path: Path) -> None:
    """Two images of noise have more than 65,535 colours; each is one class too many."""
    root = make(tmp_path, [blocks(0, 1, 1, 2, size=(300, 400))] * 4)
    shutil.copytree(root / "images", root / "photos")
    report = check(root / "photos", root / "images")
    assert any(problem.startswith(f"{root}/images/") and "a mask has at most 65535 classes" in problem for problem in report.problems)
    text = printed(report)
    assert f"and {len(report.classes) - 30} more; --json names them all" in text
    assert len(text.splitlines()) < 60
