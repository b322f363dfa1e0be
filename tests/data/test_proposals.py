"""What mask values mean, decided from masks made for each encoding that people use."""

import re
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from PIL import Image

from perpixel.data.display import default_colors
from perpixel.data.evidence import ValueCounter, looks_damaged
from perpixel.data.images import find_pictures
from perpixel.data.masks import IGNORE, ColorValue, read_mask
from perpixel.data.proposals import Proposal, propose_label_map

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
    return propose_label_map(counter.evidence(), **known)


def propose_files(tmp_path, images: dict[str, Image.Image], **known) -> Proposal:
    counter = ValueCounter()
    for name, image in images.items():
        image.save(tmp_path / name, **({"quality": 75} if name.endswith("jpg") else {}))
        counter.add(read_mask(tmp_path / name), tmp_path / name)
    return propose_label_map(counter.evidence(), **known)


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
        (LABELS, {"names": [*NAMES, "frog", "toad"]}, {i: i for i in range(7)}, "class numbers 0 to 6", "positions in the list"),
        (LABELS + 1, {"names": NAMES}, {1: 0, 2: 1, 3: 2, 4: 3, 5: 4}, "class numbers 1 to 5", "count from 1"),
        (LABELS * 50, {"names": NAMES}, {0: 0, 50: 1, 100: 2, 150: 3, 200: 4}, "grey levels", "ascending order"),
        (LABELS, {"overrides": {0: IGNORE}}, {0: IGNORE, 1: 0, 2: 1, 3: 2, 4: 3}, "class numbers 1 to 4", "as given by --label"),
        (LABELS, {"overrides": {0: 0, 2: 2}}, {0: 0, 1: 1, 2: 2, 3: 3, 4: 4}, "class numbers 0 to 4", "without gaps"),
        (LABELS, {"overrides": {4: 1}}, {0: 0, 1: 1, 2: 2, 3: 3, 4: 1}, "class numbers 0 to 3", "4 is class 1: as given"),
        (LABELS % 2 * 255, {"overrides": {255: 0, 0: 1}}, {0: 1, 255: 0}, "as given by --label", "255 is class 0, 0 is class 1"),
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


@pytest.mark.parametrize("first", [0, 15])
def test_two_values_of_which_one_has_the_void_colour_of_pascal_voc_are_asked_about(tmp_path, first):
    image = Image.fromarray(np.where(LABELS % 2, 255, first).astype(np.uint8), "L")
    image.putpalette([channel for color in default_colors(256) for channel in color])
    (question,) = propose_files(tmp_path, {"a.png": image}).problems
    assert question.endswith("Say which: --label 255=1, or --label 255=ignore")
    told = propose_files(tmp_path, {"a.png": image}, overrides={255: 1})
    assert (values(told), told.problems) == ({first: 0, 255: 1}, ())
    assert propose_files(tmp_path, {"a.png": image}, overrides={255: IGNORE}).label_map.values[255] == IGNORE
    named = propose_files(tmp_path, {"a.png": image}, names=["no", "yes"])
    assert (values(named), named.problems) == ({first: 0, 255: 1}, ())


def test_a_palette_too_short_for_the_grey_masks_beside_it_says_nothing_of_their_255(tmp_path):
    colored = Image.fromarray(LABELS % 2, "L")
    colored.putpalette([0, 0, 0, 255, 0, 0])
    grey = Image.fromarray(np.where(LABELS == 4, 255, LABELS % 3).astype(np.uint8))
    assert values(propose_files(tmp_path, {"a.png": colored, "b.png": grey})) == {0: 0, 1: 1, 2: 2, 255: IGNORE}


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
    assert not looks_damaged(counts, {v: n // 2 for v, n in counts.items()}, rgb=False, lossy=False)


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
    assert "fewer than two classes with pixels" in propose(np.zeros((4, 4), np.uint8), names=NAMES).problems[0]


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
    monkeypatch.setattr("perpixel.data.evidence._KEPT", 1000)
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
        "crf_examples/anno*.png": ({"overrides": {i: i for i in range(3)}}, {i: i for i in range(4)}, "palette, class numbers 0 to 3"),
    }
    for where, (known, values, encoding) in expected.items():
        counter = ValueCounter()
        for picture in find_pictures([shared / "data" / where]):
            counter.add(read_mask(picture), picture)
        proposal = propose_label_map(counter.evidence(), **known)
        assert dict(proposal.label_map.values) == values, where
        assert proposal.encoding == encoding, where
        assert proposal.problems == (), where


def values(proposal: Proposal) -> dict[int, int]:
    return dict(proposal.label_map.values)


def test_one_value_more_than_names_is_void_only_where_it_lies_around_all_others():
    pets = np.zeros((90, 120), np.uint8)
    pets[10:40, 10:40], pets[50:80, 60:110] = 1, 2
    proposal = propose(pets, names=["cat", "dog"])
    assert "--label 2=ignore, or --label 0=ignore" in proposal.problems[0]
    assert "--classes background,cat,dog" in proposal.problems[0]
    assert values(propose(pets, names=["cat", "dog"], overrides={0: IGNORE})) == {0: IGNORE, 1: 0, 2: 1}
    strips = np.repeat(np.arange(5, dtype=np.uint8), 24)[None].repeat(90, 0)  # each class borders on two others
    scattered = strips.copy()
    scattered[::9, ::9] = 5
    assert values(propose(scattered, names=NAMES))[5] == IGNORE
    assert propose(scattered, names=NAMES).problems == ()
    assert "has no name" in propose(np.where(strips == 4, 5, strips).astype(np.uint8), names=NAMES).problems[0]


def test_masks_of_0_and_1_among_masks_of_0_and_255_are_the_same_class():
    binary = LABELS % 2
    proposal = propose(binary, binary * 255)
    assert (values(proposal), proposal.problems) == ({0: 0, 1: 1, 255: 1}, ())
    assert values(propose(binary, outlined(binary)))[255] == IGNORE


def test_palettes_that_disagree_are_a_problem_in_any_order_of_files(tmp_path):
    for name, colors in (("a.png", [0, 0, 0, 255, 0, 0, 0, 255, 0]), ("b.png", [0, 0, 0, 0, 255, 0, 255, 0, 0])):
        image = Image.fromarray(LABELS % 3)
        image.putpalette(colors)
        image.save(tmp_path / name)
    found = []
    for names in (("a.png", "b.png"), ("b.png", "a.png")):
        counter = ValueCounter()
        for name in names:
            counter.add(read_mask(tmp_path / name), tmp_path / name)
        found.append(propose_label_map(counter.evidence()))
    assert found[0] == found[1]
    assert "a.png and" in found[0].problems[0]
    assert "give the value 1 different colours" in found[0].problems[0]
    assert "--label 1=1 --label 2=2" in found[0].problems[0]
    assert propose_label_map(counter.evidence(), overrides={1: 1, 2: 2}).problems == ()


def test_many_sound_categories_are_not_taken_for_damage():
    """0 is background, 61 categories in small rectangles, 255 void: nine of ten pixels hold one of two values."""
    masks = []
    for start in range(0, 61, 4):
        mask = np.zeros((100, 100), np.uint8)
        for i in range(4):
            mask[5 + 20 * i : 12 + 20 * i, 10:20] = 1 + (start + i) % 61
        mask[:, 90:] = 255
        masks.append(mask)
    proposal = propose(*masks)
    assert not proposal.label_map.nearest
    assert proposal.label_map.classes == 62
    assert proposal.label_map.values[255] == IGNORE


def test_a_tiny_smooth_foreground_is_one_class_or_a_problem_never_many_classes(tmp_path):
    spot = np.zeros((400, 400), np.uint8)
    spot[200:209, 200:209] = 255  # 0.05 % of the pixels
    proposal = propose_files(tmp_path, {"a.jpg": Image.fromarray(spot)})
    assert values(proposal) == {0: 0, 255: 1}
    assert agreement(proposal, read_mask(tmp_path / "a.jpg"), spot > 0) > 0.9995
    smooth = Image.fromarray(spot).resize((500, 500), Image.Resampling.BICUBIC)
    assert values(propose_files(tmp_path, {"a.png": smooth})) == {0: 0, 255: 1}
    rounded = np.array([0, 1, 254, 255], np.uint8)[LABELS % 4]
    assert "lies right beside" in propose(rounded).problems[0]


def test_jpeg_masks_that_stay_unclear_can_be_told_what_to_round_to(tmp_path):
    noise = Image.fromarray(RNG.integers(0, 256, (64, 64), dtype=np.uint8))
    assert "--label 0=0 --label 255=1" in " ".join(propose_files(tmp_path, {"a.jpg": noise}).problems)
    told = propose_files(tmp_path, {"a.jpg": noise}, overrides={0: 0, 255: 1})
    assert (values(told), told.label_map.nearest, told.problems) == ({0: 0, 255: 1}, True, ())


@pytest.mark.parametrize(
    ("grey", "given", "expected"),
    [
        ([0, 50, 100], {50: 1}, {0: 0, 50: 1, 100: 2}),
        ([0, 128, 255], {255: 1}, {0: 0, 128: 2, 255: 1}),
        ([0, 128, 255], {128: 0}, {0: 1, 128: 0, 255: 2}),
    ],
)
def test_a_class_given_by_label_is_not_given_again(grey, given, expected):
    proposal = propose(np.array(grey, np.uint8)[LABELS % 3], overrides=given)
    assert (values(proposal), proposal.problems) == (expected, ())


def test_the_last_of_a_palette_may_be_a_class(tmp_path):
    image = Image.fromarray(np.array([0, 128, 255], np.uint8)[LABELS % 3])
    image.putpalette([level for level in range(256) for _ in range(3)])
    assert values(propose_files(tmp_path, {"a.png": image})) == {0: 0, 128: 1, 255: 2}


def test_a_missing_zero_leaves_two_readings_and_both_are_offered():
    proposal = propose(LABELS % 4 + 1, names=NAMES)
    assert "--label 1=1 --label 2=2" in proposal.problems[0]
    assert "--label 1=0 --label 2=1" in proposal.problems[0]
    assert propose(LABELS % 4 + 1, names=["background", *NAMES[1:]]).problems == ()


@pytest.mark.parametrize(
    ("masks", "known", "message"),
    [
        ([RNG.integers(0, 2**24, (60, 60), dtype=np.int32)], {}, "too many for classes"),
        ([LABELS % 2, LABELS % 2 * np.int32(0xFF0000)], {}, "holds the number 1, other masks hold colours"),
        ([np.repeat(np.arange(n, dtype=np.uint8), 9)[None].repeat(5, 0) for n in (4, 12, 20)], {}, "numbered instances"),
        ([LABELS * 0], {"names": NAMES}, "fewer than two classes with pixels"),
        ([LABELS % 2 * 255], {"names": NAMES[:3]}, "--label 255=2, or --label 255=ignore"),
        ([LABELS], {"overrides": {0: 300}}, "--label 0=300: there are at most 5 classes"),
        ([LABELS], {"overrides": {7: 1}}, "--label 7=1: no mask holds 7"),
        ([LABELS % 2 * np.int32(0xFF0000)], {"overrides": {255: IGNORE}}, "--label 255=ignore: these masks hold colours"),
        ([LABELS], {"overrides": {ColorValue(0xFF0000): 2}}, "--label '#ff0000=2': these masks hold numbers (0, 1, 2, 3, 4)"),
    ],
)
def test_nonsense_is_a_problem_that_says_why(masks, known, message):
    assert message in " | ".join(propose(*masks, **known).problems)


def test_made_up_names_are_unique():
    proposal = propose(LABELS, names=["class_4", "a", "b", "c"], overrides={4: 4})
    assert len(set(proposal.names)) == len(proposal.names) == 5


def test_what_the_class_file_states_binds_names_to_values():
    stated = {1: 0, 2: 1}
    assert values(propose(LABELS % 2 + 1, names=["cat", "dog"], stated=stated)) == {1: 0, 2: 1}
    assert "value 0 in 1 file is not one of 2 classes" in propose(LABELS % 3, names=["cat", "dog"], stated=stated).problems[0]
    assert values(propose(LABELS % 3, names=["a", "b"], stated={0: 0, 1: 1, 2: IGNORE})) == {0: 0, 1: 1, 2: IGNORE}


@pytest.mark.shared_data
def test_a_real_set_whose_palettes_differ_from_file_to_file_is_not_trained_on_unasked(shared):
    """Black is index 2 in anno1 and anno2, but 1 in anno3."""
    counter = ValueCounter()
    for picture in find_pictures([shared / "data" / "crf_examples" / "anno*.png"]):
        counter.add(read_mask(picture), picture)
    assert "anno1.png and" in propose_label_map(counter.evidence()).problems[0]


def test_fewer_names_than_values_are_told_once(tmp_path):
    problems = propose(scene(11), names=["a", "b"]).problems
    told = [problem for problem in problems if "2 names for 11 values (0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10)" in problem]
    assert len(told) == 1
    assert sum("--label" in problem for problem in problems) == 1
    assert "--label 2=1 or --label 2=ignore" in told[0]
