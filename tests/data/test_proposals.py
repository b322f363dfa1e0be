"""What mask values mean, decided from masks made for each encoding that people use."""

import re
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from PIL import Image

from perpixel.data.display import default_colors
from perpixel.data.evidence import looks_damaged
from perpixel.data.images import find_pictures
from perpixel.data.masks import IGNORE, read_mask
from perpixel.data.proposals import Proposal, ValueCounter

RNG = np.random.default_rng(0)


def scene(classes: int, height: int = 96, width: int = 128) -> np.ndarray:
    """(H, W) uint8 class indices in flat regions (the nearest of random seeds), every class present."""
    count = 3 * classes
    ys, xs = RNG.integers(0, height, count), RNG.integers(0, width, count)
    grid = np.mgrid[:height, :width]
    owner = ((grid[0][..., None] - ys) ** 2 + (grid[1][..., None] - xs) ** 2).argmin(-1)
    return (owner % classes).astype(np.uint8)


def outlined(labels: np.ndarray, value: int = 255) -> np.ndarray:
    """Contours of 4 pixels between the classes, as in Pascal VOC."""
    result = labels.copy()
    for dy, dx in ((0, 1), (0, -1), (1, 0), (-1, 0), (0, 2), (2, 0), (0, -2), (-2, 0)):
        result[np.roll(labels, (dy, dx), (0, 1)) != labels] = value
    return result


def propose(*masks: np.ndarray, **known) -> Proposal:
    counter = ValueCounter()
    for mask in masks:
        counter.add(mask)
    return counter.propose(**known)


def propose_files(tmp_path, images: dict[str, Image.Image], **known) -> Proposal:
    counter = ValueCounter()
    for name, image in images.items():
        image.save(tmp_path / name, **({"quality": 75} if name.endswith("jpg") else {}))
        counter.add(read_mask(tmp_path / name), tmp_path / name)
    return counter.propose(**known)


LABELS = scene(5)
NAMES = ["sky", "water", "reeds", "bird", "fish"]


@pytest.mark.parametrize(
    ("mask", "known", "values", "encoding", "reason"),
    [
        (LABELS, {}, {0: 0, 1: 1, 2: 2, 3: 3, 4: 4}, "class numbers 0 to 4", "without gaps"),
        (LABELS % 2, {}, {0: 0, 1: 1}, "binary 0/1", "without gaps"),
        (LABELS % 2 * 255, {}, {0: 0, 255: 1}, "binary 0/255", "255 is class 1 and not a mark"),
        (outlined(LABELS * 0, 0) + outlined(LABELS) // 255 * 255, {}, {0: 0, 255: 1}, "binary 0/255", "only 0 and 255 occur"),
        (LABELS + 1, {}, {1: 0, 2: 1, 3: 2, 4: 3, 5: 4}, "class numbers 1 to 5", "count from 1"),
        (LABELS * 50, {}, {0: 0, 50: 1, 100: 2, 150: 3, 200: 4}, "grey levels in ascending order", "gaps"),
        (LABELS % 3 * 127, {}, {0: 0, 127: 1, 254: 2}, "grey levels in ascending order", "gaps"),
        (np.array([0, 128, 255], np.uint8)[LABELS % 3], {}, {0: 0, 128: 1, 255: 2}, "grey levels in ascending order", "gaps"),
        (outlined(LABELS % 2 * 128), {}, {0: 0, 128: 1, 255: IGNORE}, "grey levels in ascending order", "only forms lines"),
        (np.where(LABELS == 4, 255, LABELS).astype(np.uint8), {}, {0: 0, 1: 1, 2: 2, 3: 3, 255: IGNORE}, "numbers 0 to 3", "far below"),
        (np.where(LABELS == 4, np.uint16(65535), LABELS), {}, {0: 0, 1: 1, 2: 2, 3: 3, 65535: IGNORE}, "0 to 3", "far below"),
        (LABELS.astype(np.int16) - 1, {}, {-1: IGNORE, 0: 0, 1: 1, 2: 2, 3: 3}, "class numbers 0 to 3", "negative"),
        (LABELS, {"names": NAMES[:4]}, {0: 0, 1: 1, 2: 2, 3: 3, 4: IGNORE}, "class numbers 0 to 3", "this is the one more"),
        (LABELS, {"names": [*NAMES, "frog", "toad"]}, {i: i for i in range(7)}, "class numbers 0 to 6", "positions in the list"),
        (LABELS + 1, {"names": NAMES}, {1: 0, 2: 1, 3: 2, 4: 3, 5: 4}, "class numbers 1 to 5", "count from 1"),
        (LABELS * 50, {"names": NAMES}, {0: 0, 50: 1, 100: 2, 150: 3, 200: 4}, "grey levels", "ascending order"),
        (LABELS, {"overrides": {0: IGNORE}}, {0: IGNORE, 1: 0, 2: 1, 3: 2, 4: 3}, "class numbers 1 to 4", "as given by --label"),
        (LABELS, {"overrides": {4: 1}}, {0: 0, 1: 1, 2: 2, 3: 3, 4: 1}, "class numbers 0 to 3", "4 is class 1: as given"),
        (LABELS % 2 * 255, {"overrides": {255: IGNORE, 0: 1}}, {0: 1, 255: IGNORE}, "as given by --label", "255 is ignored"),
    ],
)
def test_the_encoding_of_number_masks_is_recognised_with_a_reason(mask, known, values, encoding, reason):
    proposal = propose(mask, **known)
    assert dict(proposal.label_map.values) == values
    assert encoding in proposal.encoding
    assert re.search(reason, " | ".join(proposal.reasons))
    assert proposal.problems == ()
    assert len(proposal.names) == len(proposal.colors) == proposal.label_map.classes


def test_one_bit_masks_are_recognised(tmp_path):
    proposal = propose_files(tmp_path, {"a.png": Image.fromarray(LABELS > 2)})
    assert dict(proposal.label_map.values) == {0: 0, 1: 1}
    assert proposal.encoding == "1-bit, binary 0/1"


def test_palette_masks_keep_their_colours_and_their_void(tmp_path):
    image = Image.fromarray(outlined(LABELS))
    palette = [(i, 255 - i, 200) for i in range(256)]
    image.putpalette([part for color in palette for part in color])
    proposal = propose_files(tmp_path, {"a.png": image})
    assert dict(proposal.label_map.values) == {0: 0, 1: 1, 2: 2, 3: 3, 4: 4, 255: IGNORE}
    assert proposal.encoding == "palette, class numbers 0 to 4"
    assert list(proposal.colors) == [(i, 255 - i, 200) for i in range(5)]


COLORS = [(200, 30, 10), (20, 200, 30), (250, 250, 0), (0, 30, 220), (90, 90, 90)]


def painted(labels: np.ndarray, colors: list[tuple[int, int, int]]) -> Image.Image:
    return Image.fromarray(np.array(colors, np.uint8)[labels])


def test_colours_are_numbered_by_frequency(tmp_path):
    proposal = propose_files(tmp_path, {"a.png": painted(LABELS, COLORS)})
    by_size = np.bincount(LABELS.ravel()).argsort()[::-1]
    assert list(proposal.colors) == [COLORS[i] for i in by_size]
    assert proposal.label_map.rgb
    assert proposal.problems == ()
    np.testing.assert_array_equal(by_size[proposal.label_map(read_mask(tmp_path / "a.png"))], LABELS)


def test_a_class_file_with_colours_decides_which_colour_is_which_class(tmp_path):
    proposal = propose_files(tmp_path, {"a.png": painted(LABELS, COLORS)}, names=NAMES, colors=COLORS)
    assert (proposal.names, proposal.colors) == (tuple(NAMES), tuple(COLORS))
    np.testing.assert_array_equal(proposal.label_map(read_mask(tmp_path / "a.png")), LABELS)


def test_colours_of_pascal_voc_keep_its_order_and_its_void(tmp_path):
    proposal = propose_files(tmp_path, {"a.png": painted(outlined(LABELS), default_colors(256))}, names=[*NAMES, "frog"])
    assert proposal.problems == ()
    labels = proposal.label_map(read_mask(tmp_path / "a.png"))
    np.testing.assert_array_equal(labels, outlined(LABELS))


def test_names_without_colours_cannot_be_matched_and_the_problem_says_what_to_write(tmp_path):
    proposal = propose_files(tmp_path, {"a.png": painted(LABELS, COLORS)}, names=NAMES)
    assert "which of the 5 colours" in proposal.problems[0]
    assert "name,red,green,blue" in proposal.problems[0]


def test_a_black_and_white_mask_in_a_colour_set_is_read_with_the_others(tmp_path):
    colors = [(0, 0, 0), (255, 255, 255), (200, 30, 10)]
    images = {"a.png": painted(LABELS % 3, colors), "b.png": painted(LABELS % 2, colors)}
    proposal = propose_files(tmp_path, images)
    assert sorted(proposal.colors) == sorted(colors)
    assert proposal.label_map(read_mask(tmp_path / "b.png"), "b").shape == LABELS.shape


def agreement(proposal: Proposal, mask: np.ndarray, truth: np.ndarray) -> float:
    return float((proposal.label_map(mask) == truth).mean())


def test_binary_masks_damaged_by_jpeg_are_repaired(tmp_path):
    proposal = propose_files(tmp_path, {"a.jpg": Image.fromarray(LABELS % 2 * 255)})
    assert dict(proposal.label_map.values) == {0: 0, 255: 1}
    assert proposal.encoding == "JPEG-damaged binary 0/255"
    assert len(np.unique(read_mask(tmp_path / "a.jpg"))) > 20
    assert agreement(proposal, read_mask(tmp_path / "a.jpg"), LABELS % 2) > 0.995


def test_colour_masks_damaged_by_jpeg_are_repaired(tmp_path):
    proposal = propose_files(tmp_path, {"a.jpg": painted(LABELS, default_colors(5))}, names=NAMES)
    assert proposal.encoding == "JPEG-damaged RGB colours of Pascal VOC"
    assert proposal.problems == ()
    assert agreement(proposal, read_mask(tmp_path / "a.jpg"), LABELS) > 0.97
    proposal = propose_files(tmp_path, {"b.jpg": painted(LABELS, COLORS)}, names=NAMES, colors=COLORS)
    assert agreement(proposal, read_mask(tmp_path / "b.jpg"), LABELS) > 0.97


def test_damage_is_seen_in_a_png_too(tmp_path):
    smooth = Image.fromarray(LABELS % 2 * 255).resize((301, 205), Image.Resampling.BICUBIC)
    proposal = propose_files(tmp_path, {"a.png": smooth})
    assert dict(proposal.label_map.values) == {0: 0, 255: 1}
    assert proposal.label_map.nearest


def test_class_numbers_in_a_jpeg_are_a_problem_that_says_so(tmp_path):
    proposal = propose_files(tmp_path, {"a.jpg": Image.fromarray(scene(12))})
    assert "JPEG cannot keep class numbers" in proposal.problems[0]


@pytest.mark.parametrize("classes", [20, 150, 256])
def test_many_classes_with_a_long_tail_are_not_taken_for_damage(classes):
    counts = {value: int(10**7 * 0.9 ** (value % 50)) + 5 for value in range(classes)}
    assert not looks_damaged(counts, rgb=False, lossy=False)


def test_256_classes_are_told_apart_from_ignore():
    proposal = propose(np.arange(300, dtype=np.uint16).reshape(20, 15))
    assert proposal.label_map.ignore == 65535
    assert proposal.label_map.classes == 300
    named = propose(np.arange(256, dtype=np.uint8).reshape(16, 16), names=[f"kind {i}" for i in range(256)])
    assert (named.label_map.values[255], named.label_map.ignore, named.problems) == (255, 65535, ())


def test_a_value_beyond_the_classes_is_a_problem_with_file_count_and_remedy(tmp_path):
    images = {f"{i}.png": Image.fromarray(np.where(LABELS == 3, 9, LABELS % 2).astype(np.uint8)) for i in range(3)}
    proposal = propose_files(tmp_path, images, names=["sky", "water"])
    wanted = (
        f"{tmp_path}/0.png: value 9 in 3 files is not one of 2 classes. To make it class 1: --label 9=1; to ignore it: --label 9=ignore"
    )
    assert proposal.problems == (wanted,)
    repaired = propose_files(tmp_path, images, names=["sky", "water"], overrides={9: IGNORE})
    assert repaired.problems == ()


def test_a_colour_beyond_the_class_file_is_a_problem_but_voc_void_is_not(tmp_path):
    known = {"names": NAMES[:4], "colors": COLORS[:4]}
    proposal = propose_files(tmp_path, {"a.png": painted(LABELS, COLORS)}, **known)
    assert "value #5a5a5a in 1 file is not one of 4 classes" in proposal.problems[0]
    void = propose_files(tmp_path, {"a.png": painted(LABELS, [*COLORS[:4], (224, 224, 192)])}, **known)
    assert void.problems == ()
    assert void.label_map.values[0xE0E0C0] == IGNORE


def test_masks_of_one_value_are_a_problem():
    assert "fewer than two classes" in propose(np.zeros((4, 4), np.uint8)).problems[0]
    assert "fewer than two classes" in propose().problems[0]
    assert propose(np.zeros((4, 4), np.uint8), names=NAMES).problems == ()


def test_a_label_beyond_the_class_list_is_a_problem():
    proposal = propose(LABELS % 2, names=NAMES[:2], overrides={1: 6})
    assert "there are 2 class names for 7 classes" in proposal.problems[0]


def test_counting_from_many_threads_gives_what_one_thread_gives():
    masks = [scene(4, 20, 30) for _ in range(30)]
    alone, together = ValueCounter(), ValueCounter()
    for mask in masks:
        alone.add(mask)
    with ThreadPoolExecutor(4) as pool:
        list(pool.map(together.add, masks))
    assert alone.counts == together.counts == dict(enumerate(np.bincount(np.concatenate(masks).ravel()).tolist()))
    assert alone.masks == together.masks == dict.fromkeys(range(4), 30)


def test_photographs_given_as_masks_do_not_fill_the_memory(monkeypatch):
    monkeypatch.setattr("perpixel.data.proposals._KEPT", 1000)
    counter = ValueCounter()
    for _ in range(4):
        counter.add(RNG.integers(0, 2**24, (40, 40), dtype=np.int32))
    assert len(counter.counts) <= 1000


@pytest.mark.shared_data
def test_real_sets_are_recognised(shared):
    names = (shared / "data" / "camvid" / "classes.txt").read_text().split()
    expected = {
        "camvid/valannot": ({"names": names}, {i: i for i in range(11)} | {11: IGNORE}, "class numbers 0 to 10"),
        "msrc21/SegmentationClass": ({}, {i: i for i in range(21)} | {255: IGNORE}, "palette, class numbers 0 to 20"),
        "isbi2012/train-labels.tif": ({}, {0: 0, 255: 1}, "binary 0/255"),
        "crf_examples/anno*.png": ({}, {i: i for i in range(4)}, "palette, class numbers 0 to 3"),
    }
    for where, (known, values, encoding) in expected.items():
        counter = ValueCounter()
        for picture in find_pictures([shared / "data" / where]):
            counter.add(read_mask(picture), picture)
        proposal = counter.propose(**known)
        assert dict(proposal.label_map.values) == values, where
        assert proposal.encoding == encoding, where
        assert proposal.problems == (), where
