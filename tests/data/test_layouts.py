"""Each layout that people have is found, and each way it can be broken is named."""

import os
from pathlib import Path

import numpy as np
import pytest
import tifffile
from PIL import Image

from perpixel.data.images import Picture
from perpixel.data.layouts import Layout, Pair, _roles_by_name, find_layout, split_pairs
from perpixel.data.pairing import File

SHARED = Path(__file__).parents[3] / "shared" / "data"


def touch(root: Path, *names: str) -> None:
    """Tiny pictures; layouts look at names only, except for TIFF stacks."""
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        Image.new("L", (2, 2)).save(root / name)


def stack(path: Path, pages: int) -> None:
    tifffile.imwrite(path, np.zeros((pages, 16, 16), dtype=np.uint8), photometric="minisblack")


def relative(layout: Layout, root: Path) -> set[tuple[str, str | None, str | None]]:
    return {(p.image.path.relative_to(root).as_posix(), p.mask and p.mask.path.relative_to(root).as_posix(), p.split) for p in layout.pairs}


@pytest.mark.parametrize(
    "mask", ["a.png", "a_mask.png", "a_label.png", "a-labels.png", "a_gt.png", "a.seg.png", "a_L.png", "mask_a.png", "A.PNG"]
)
def test_two_folders_are_paired_by_stem_whatever_the_usual_suffix(tmp_path: Path, mask: str) -> None:
    touch(tmp_path, "photos/a.jpg", "photos/b.jpg", f"drawn/{mask}", "drawn/other.png")
    found = find_layout(tmp_path / "photos", tmp_path / "drawn")
    assert relative(found, tmp_path) == {("photos/a.jpg", f"drawn/{mask}", None), ("photos/b.jpg", None, None)}
    assert [str(p.path.name) for p in found.orphan_masks] == ["other.png"]
    assert found.kind == "two folders"


def test_an_equal_stem_wins_over_one_with_a_word_for_masks(tmp_path: Path) -> None:
    touch(tmp_path, "images/a.png", "images/a_mask.png", "masks/GT_a.png", "masks/a.png", "masks/a_mask.png")
    found = find_layout(tmp_path / "images", tmp_path / "masks")
    assert relative(found, tmp_path) == {("images/a.png", "masks/a.png", None), ("images/a_mask.png", "masks/a_mask.png", None)}
    assert [picture.path.name for picture in found.orphan_masks] == ["GT_a.png"]


@pytest.mark.parametrize(
    ("image", "mask"),
    [
        ("images/train/a.jpg", "masks/train/a.png"),
        ("train/images/a.jpg", "train/labels/a.png"),
        ("train/a.jpg", "trainannot/a.png"),
        ("train/a.jpg", "train_masks/a_mask.gif"),
        ("img/training/a.jpg", "gt/training/a.png"),
        ("leftImg8bit/train/ulm/a_leftImg8bit.png", "gtFine/train/ulm/a_gtFine_labelIds.png"),
        ("train/a.jpg", "train/a_mask.png"),
    ],
)
def test_split_folders_are_found_in_either_order(tmp_path: Path, image: str, mask: str) -> None:
    other = {"train": "val", "training": "validation"}
    val_image, val_mask = (name.replace("training", "validation").replace("train", other["train"]) for name in (image, mask))
    touch(tmp_path, image, mask, val_image, val_mask)
    found = find_layout(tmp_path)
    assert relative(found, tmp_path) == {(image, mask, "train"), (val_image, val_mask, "val")}
    assert found.kind == "split folders"


def test_two_folders_that_are_each_divided_keep_the_division(tmp_path: Path) -> None:
    touch(tmp_path, "x/train/a.jpg", "x/val/a.jpg", "y/train/a.png", "y/val/a.png")
    pairs = relative(find_layout(tmp_path / "x", tmp_path / "y"), tmp_path)
    assert pairs == {("x/train/a.jpg", "y/train/a.png", "train"), ("x/val/a.jpg", "y/val/a.png", "val")}


def test_masks_below_the_folder_of_images_are_not_taken_for_images(tmp_path: Path) -> None:
    touch(tmp_path, "a.jpg", "deep/a.png")
    assert relative(find_layout(tmp_path, tmp_path / "deep"), tmp_path) == {("a.jpg", "deep/a.png", None)}
    touch(tmp_path, "masks/a.png")
    assert ("a.jpg", "masks/a.png", None) in relative(find_layout(tmp_path), tmp_path)


@pytest.mark.parametrize(
    ("image", "mask"), [("x.jpg", "x_mask.png"), ("im1.png", "anno1.png"), ("x_img.png", "x_gt.png"), ("x.jpg", "x.png")]
)
def test_one_folder_holds_images_and_masks(tmp_path: Path, image: str, mask: str) -> None:
    touch(tmp_path, image, mask)
    assert relative(find_layout(tmp_path), tmp_path) == {(image, mask, None)}
    assert relative(find_layout(tmp_path, tmp_path), tmp_path) == {(image, mask, None)}  # the same folder said twice


def test_a_mask_in_one_folder_whose_image_is_missing_is_an_orphan_not_an_image(tmp_path: Path) -> None:
    touch(tmp_path, "x.jpg", "x_mask.png", "y_mask.png", "z.jpg")
    found = find_layout(tmp_path)
    assert relative(found, tmp_path) == {("x.jpg", "x_mask.png", None), ("z.jpg", None, None)}
    assert [p.path.name for p in found.orphan_masks] == ["y_mask.png"]


@pytest.mark.parametrize(
    ("files", "said"),
    [
        (["images/day/1.jpg", "images/night/1.jpg", "masks/dusk_night/1.png", "masks/z_day/1.png"], ["2 masks", "dusk_night/1", "z_day/1"]),
        (["raw/a.jpg", "overlay/a.png", "masks/a.png"], ["2 images", "raw/a.jpg", "overlay/a.png", "folder of masks as two arguments"]),
        (["images/a.jpg", "masks/road/a.png", "masks/water/a.png"], ["2 masks", "masks/road/a.png", "masks/water/a.png"]),
        (["a.jpg", "a_mask.png", "a_gt.png"], ["2 masks", "a_mask.png", "a_gt.png"]),
        (["images/a.jpg", "images/a.png", "masks/a.png"], ["2 images", "images/a.jpg", "images/a.png"]),
        (["images/train/a.jpg", "images/val/a.jpg", "masks/a.png"], ["2 images", "train/a.jpg", "val/a.jpg"]),
    ],
)
def test_what_fits_several_files_is_refused_and_they_are_named(tmp_path: Path, files: list[str], said: list[str]) -> None:
    touch(tmp_path, *files)
    with pytest.raises(ValueError, match="fit it by name") as refused:
        find_layout(tmp_path)
    assert [words for words in said if words not in str(refused.value)] == []


def test_equal_names_in_equal_folders_are_no_rivals(tmp_path: Path) -> None:
    touch(tmp_path, *(f"{kind}/{place}/1.png" for kind in ("images", "masks") for place in ("day", "night")), "overlay/day/1.png")
    pairs = {(image, mask) for image, mask, _ in relative(find_layout(tmp_path), tmp_path) if mask}
    assert pairs == {("images/day/1.png", "masks/day/1.png"), ("images/night/1.png", "masks/night/1.png")}


def test_a_numbered_mask_beside_another_is_an_orphan_and_a_numbered_photograph_is_not(tmp_path: Path) -> None:
    """BUSI: `benign (4)_mask_1.png` is a second lesion of `benign (4).png`."""
    touch(tmp_path, "b (4).png", "b (4)_mask.png", "b (4)_mask_1.png", "b (4)_1.png", "b (5)_mask_1.png")
    found = find_layout(tmp_path)
    assert relative(found, tmp_path) >= {("b (4).png", "b (4)_mask.png", None), ("b (4)_1.png", None, None)}
    assert [picture.path.name for picture in found.orphan_masks] == ["b (4)_mask_1.png"]
    assert "b (4)_mask_1.png" in found.notes[0]


def test_a_list_tells_equal_names_in_two_folders_apart(tmp_path: Path) -> None:
    touch(tmp_path, *(f"{kind}/{place}/1.png" for kind in ("images", "masks") for place in ("s1", "s2")))
    expected = {("images/s1/1.png", "masks/s1/1.png", "train"), ("images/s2/1.png", "masks/s2/1.png", "val")}
    for start, end in (("", ".png"), ("", ""), ("images/", ".png"), ("/elsewhere/images/", ".jpg"), ("images\\", ".png")):
        (tmp_path / "train.txt").write_text(f"{start}s1/1{end}\n")
        (tmp_path / "val.txt").write_text(f"{start}s2/1{end}\n")
        assert relative(find_layout(tmp_path), tmp_path) == expected
    (tmp_path / "val.txt").write_text("1.png\n")
    with pytest.raises(ValueError, match=r"val.txt, line 1: '1.png' fits 2 images: .*s1/1.png, .*s2/1.png. .*such as images/s1/1.png"):
        find_layout(tmp_path)


@pytest.mark.parametrize("lines", ["a.jpg a.png\na.jpg a.png\nb.jpg b.png\n", "a\nb\na.jpg\n"])
def test_a_line_that_is_repeated_counts_once_and_is_told(tmp_path: Path, lines: str) -> None:
    touch(tmp_path, "a.jpg", "a.png", "b.jpg", "b.png")
    (tmp_path / "train.txt").write_text(lines)
    found = find_layout(tmp_path)
    assert [pair.image.name for pair in found.pairs] == ["a", "b"]
    assert found.notes == ("listed more than once and taken once: 1 of the pairs",)


@pytest.mark.parametrize("name", ["set.txt", "set.lst", "set.csv", "set.TSV"])
def test_a_list_may_end_otherwise_than_in_txt(tmp_path: Path, name: str) -> None:
    touch(tmp_path, "im/a.jpg", "an/a.png")
    (tmp_path / name).write_text("im/a.jpg,an/a.png\n" if "csv" in name else "im/a.jpg\tan/a.png\n")
    assert relative(find_layout(tmp_path / name), tmp_path) == {("im/a.jpg", "an/a.png", None)}
    with pytest.raises(ValueError, match="leave the second path"):
        find_layout(tmp_path / name, tmp_path / "an")


def test_a_file_that_is_neither_picture_nor_list_is_refused_with_both_named(tmp_path: Path) -> None:
    (tmp_path / "set.json").write_text("[]")
    with pytest.raises(ValueError, match=r"set.json: by its name neither a picture .*\.png.* nor a list .*\.txt"):
        find_layout(tmp_path / "set.json")


def test_lists_ending_in_lst_divide_a_folder_and_tables_do_not(tmp_path: Path) -> None:
    touch(tmp_path, "images/a.jpg", "masks/a.png", "images/b.jpg", "masks/b.png")
    (tmp_path / "train.csv").write_text("id,diagnosis\n7,none\n")
    assert find_layout(tmp_path).kind == "images and masks folders"
    (tmp_path / "train.lst").write_text("images/a.jpg\tmasks/a.png\n")
    (tmp_path / "val.lst").write_text("images/b.jpg\tmasks/b.png\n")
    assert {split for *_, split in relative(find_layout(tmp_path), tmp_path)} == {"train", "val"}


def test_a_large_flat_folder_is_sorted_into_roles_without_comparing_all_with_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Files are compared by suffix: the number of `==` between files must not grow with the square of their number."""
    files = [File(tmp_path / f"{i}.{kind}") for i in range(1000) for kind in ("jpg", "png")]
    compared = []
    real = File.__eq__
    monkeypatch.setattr(File, "__eq__", lambda one, two: compared.append(1) or real(one, two))
    images, masks = _roles_by_name(files)
    assert (len(images), len(masks)) == (1000, 1000)
    assert len(compared) < 10 * len(files)


@pytest.mark.parametrize("line", ["{i} {m}", "{i}\t{m}", "{i},{m}", "/SegNet/CamVid/{i} /SegNet/CamVid/{m}"])
def test_list_files_name_image_and_mask_even_from_another_machine(tmp_path: Path, line: str) -> None:
    touch(tmp_path, "im/a.jpg", "an/a.png", "im/b.jpg", "an/b.png")
    (tmp_path / "train.txt").write_text("# image mask\n" + line.format(i="im/a.jpg", m="an/a.png") + "\n\n")
    (tmp_path / "val.txt").write_text(line.format(i="im/b.jpg", m="an/b.png"))
    assert relative(find_layout(tmp_path), tmp_path) == {("im/a.jpg", "an/a.png", "train"), ("im/b.jpg", "an/b.png", "val")}
    alone = find_layout(tmp_path / "val.txt")
    assert relative(alone, tmp_path) == {("im/b.jpg", "an/b.png", None)}


def test_names_with_spaces_in_a_list_are_divided_where_both_files_exist(tmp_path: Path) -> None:
    touch(tmp_path, "my photos/a 1.jpg", "my masks/a 1.png")
    (tmp_path / "train.txt").write_text("my photos/a 1.jpg my masks/a 1.png")
    assert relative(find_layout(tmp_path), tmp_path) == {("my photos/a 1.jpg", "my masks/a 1.png", "train")}


def test_what_a_list_names_but_is_not_there_is_named_with_its_line(tmp_path: Path) -> None:
    touch(tmp_path, "a.jpg", "a.png", "b.jpg")
    (tmp_path / "train.txt").write_text("a.jpg a.png\nb.jpg b.png\nc.jpg a.png\n")
    found = find_layout(tmp_path)
    assert relative(found, tmp_path) == {("a.jpg", "a.png", "train"), ("b.jpg", None, "train")}
    assert "train.txt, line 2" in found.damaged[str(tmp_path / "b.png")]
    assert "train.txt, line 3" in found.damaged[str(tmp_path / "c.jpg")]


def test_lists_of_names_alone_divide_the_folders_beside_them(tmp_path: Path) -> None:
    touch(tmp_path, "images/a.jpg", "images/b.jpg", "images/c.jpg", "masks/a.png", "masks/b.png", "masks/c.png")
    (tmp_path / "train.txt").write_text("a\n")
    (tmp_path / "val.txt").write_text("b.jpg\n")
    found = find_layout(tmp_path)
    assert relative(found, tmp_path) == {("images/a.jpg", "masks/a.png", "train"), ("images/b.jpg", "masks/b.png", "val")}
    assert "1 of the images with masks left out" in found.notes[0]


@pytest.mark.parametrize("root", [".", "VOCdevkit/VOC2012"])
def test_pascal_voc_with_its_lists(tmp_path: Path, root: str) -> None:
    names = [f"{root}/{name}" for name in ("JPEGImages/a.jpg", "JPEGImages/b.jpg", "SegmentationClass/a.png", "SegmentationClass/b.png")]
    touch(tmp_path, *names, f"{root}/SegmentationObject/a.png", f"{root}/JPEGImages/unlabelled.jpg")
    lists = tmp_path / root / "ImageSets" / "Segmentation"
    lists.mkdir(parents=True)
    (lists / "train.txt").write_text("a\n")
    (lists / "val.txt").write_text("b\nmissing\n")
    found = find_layout(tmp_path)
    pairs = {(Path(image).name, mask and Path(mask).name, split) for image, mask, split in relative(found, tmp_path)}
    assert pairs == {("a.jpg", "a.png", "train"), ("b.jpg", "b.png", "val"), ("unlabelled.jpg", None, None)}
    assert (found.kind, list(found.damaged)) == ("Pascal VOC", [str(tmp_path / root / "JPEGImages" / "missing")])


def test_stacks_are_paired_page_against_page_and_split_at_their_end(tmp_path: Path) -> None:
    stack(tmp_path / "train-volume.tif", 10)
    stack(tmp_path / "train-labels.tif", 10)
    stack(tmp_path / "test-volume.tif", 3)
    by_files = find_layout(tmp_path / "train-volume.tif", tmp_path / "train-labels.tif")
    assert by_files.kind == "stacks"
    assert [(p.image.page, p.mask and p.mask.page) for p in by_files.pairs] == [(i, i) for i in range(10)]
    by_folder = find_layout(tmp_path)
    assert {p for p in by_folder.pairs if p.mask} == set(by_files.pairs)
    assert sum(p.mask is None for p in by_folder.pairs) == 3
    val = [p.image.page for p in split_pairs(by_files.pairs) if p.split == "val"]
    assert val == [8, 9]


def test_stacks_of_unequal_length_are_not_paired_by_chance(tmp_path: Path) -> None:
    stack(tmp_path / "volume.tif", 5)
    stack(tmp_path / "labels.tif", 4)
    found = find_layout(tmp_path / "volume.tif", tmp_path / "labels.tif")
    assert found.pairs == ()
    assert "5 pages" in found.damaged[str(tmp_path / "volume.tif")]
    assert "has 4" in found.damaged[str(tmp_path / "volume.tif")]


def test_a_single_image_and_its_mask(tmp_path: Path) -> None:
    touch(tmp_path, "x.jpg", "y.png", "x_mask.png")
    assert relative(find_layout(tmp_path / "x.jpg", tmp_path / "y.png"), tmp_path) == {("x.jpg", "y.png", None)}
    assert relative(find_layout(tmp_path / "x.jpg"), tmp_path) == {("x.jpg", "x_mask.png", None)}


def test_hidden_files_are_left_out(tmp_path: Path) -> None:
    touch(tmp_path, "images/a.jpg", "masks/a.png", "images/._a.jpg", "masks/.b.png", "__MACOSX/images/a.jpg")
    assert relative(find_layout(tmp_path), tmp_path) == {("images/a.jpg", "masks/a.png", None)}


def test_nothing_to_pair_says_what_was_looked_for(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    touch(tmp_path, "images/a.jpg", "masks/b.png", "lonely/a.jpg")
    (tmp_path / "list.txt").write_text("images/a.jpg masks/b.png extra/words here.png")
    (tmp_path / "notes.txt").write_text("to do\nask Ann")
    cases = [
        (("nowhere",), "no such file or folder"),
        (("empty",), "no images in this folder.*png"),
        (("lonely",), "1 .jpg.*no masks.*list files.*JPEGImages.*second argument: .*lonely MASKS"),
        (("images", "masks"), "no mask is named like an image.*'a.jpg'.*'b.png'"),
        (("images/a.jpg", "images/a.jpg"), "a.jpg is given both as images and as masks"),
        (("images", "masks/b.png"), "is a folder and .* is a file"),
        (("images", "empty"), "empty: no masks in this folder"),
        (("list.txt",), "list.txt, line 1: .* should be `image mask`"),
        (("notes.txt",), "a .txt file is taken for a list .* no line of its 2 names an image that exists"),
        (("list.txt", "masks"), "leave the second path"),
    ]
    for names, message in cases:
        with pytest.raises(ValueError, match=message):
            find_layout(*(tmp_path / name for name in names))


def test_an_unreadable_folder_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Root may read everything, so the refusal is simulated."""
    touch(tmp_path, "images/a.jpg", "masks/a.png")
    real = os.scandir

    def refuse(path: Path) -> object:
        if Path(path).name == "masks":
            raise PermissionError(13, "Permission denied", str(path))
        return real(path)

    monkeypatch.setattr(os, "scandir", refuse)
    with pytest.raises(ValueError, match=r"masks: this folder can't be read \(Permission denied\)"):
        find_layout(tmp_path / "images", tmp_path / "masks")


# ---- splits


def pairs_of(count: int, split: str | None = None) -> list[Pair]:
    return [Pair(Picture(Path(f"{i}.png")), Picture(Path(f"m{i}.png")), split) for i in range(count)]  # type: ignore[arg-type]


def test_a_split_is_seeded_covers_all_and_does_not_depend_on_the_order() -> None:
    pairs = pairs_of(50)
    split = split_pairs(pairs, 0.2, seed=3)
    assert [p.image for p in split] == [p.image for p in pairs]
    assert sum(p.split == "val" for p in split) == 10
    assert set(split) == set(split_pairs(pairs[::-1], 0.2, seed=3))
    assert set(split) != set(split_pairs(pairs, 0.2, seed=4))


@pytest.mark.parametrize("count", [2, 3, 4, 7])
@pytest.mark.parametrize("fraction", [0.01, 0.5, 0.99])
def test_two_pairs_or_more_always_give_one_of_each(count: int, fraction: float) -> None:
    assert {p.split for p in split_pairs(pairs_of(count), fraction)} == {"train", "val"}
    pages = [Pair(Picture(Path("v.tif"), i), Picture(Path("l.tif"), i)) for i in range(count)]
    divided = split_pairs(pages, fraction)
    assert [p.split for p in divided] == sorted(p.split or "" for p in divided)  # all train before all val: contiguous
    assert {p.split for p in divided} == {"train", "val"}


def test_one_pair_serves_twice_and_none_is_none() -> None:
    assert [p.split for p in split_pairs(pairs_of(1))] == ["train", "val"]
    assert split_pairs([]) == []


def test_given_splits_stay() -> None:
    given = [*pairs_of(3, "train"), *pairs_of(2, "val"), *pairs_of(1, "test"), *pairs_of(1)]
    assert [p.split for p in split_pairs(given)] == ["train"] * 3 + ["val"] * 2 + ["test", "train"]
    without_val = split_pairs([*pairs_of(4, "train"), *pairs_of(2, "test")])
    assert sorted(p.split or "" for p in without_val) == ["test", "test", "train", "train", "train", "val"]


@pytest.mark.parametrize("fraction", [0, 1, -0.1, 20])
def test_a_fraction_out_of_range_is_refused(fraction: float) -> None:
    with pytest.raises(ValueError, match="more than 0 and less than 1"):
        split_pairs(pairs_of(3), fraction)


# ---- real sets


@pytest.mark.shared_data
@pytest.mark.parametrize(
    ("paths", "kind", "train", "val"),
    [
        (["camvid"], "list files", 367, 101),  # ../shared/data/README.md
        (["msrc21"], "Pascal VOC", 276, 59),
        (["isbi2012/train-volume.tif", "isbi2012/train-labels.tif"], "stacks", 24, 6),
        (["crf_examples"], "one folder", 2, 1),
    ],
)
def test_real_sets_have_their_published_numbers_of_pairs(paths: list[str], kind: str, train: int, val: int) -> None:
    found = find_layout(*(SHARED / path for path in paths))
    splits = [pair.split for pair in split_pairs(found.pairs)]
    assert (found.kind, splits.count("train"), splits.count("val")) == (kind, train, val)
