"""Masks as found, and label maps against a loop over pixels."""

import json
import struct
import zlib

import numpy as np
import pytest
import tifffile
from PIL import Image

from perpixel.data.images import Picture, expand, find_pictures, read_image
from perpixel.data.masks import IGNORE, ColorValue, LabelMap, parse_label, read_mask, read_palette

RNG = np.random.default_rng(0)
VALUES = RNG.integers(0, 4, (9, 14), dtype=np.uint8)


def test_palette_masks_give_indices_and_their_colours(tmp_path):
    image = Image.fromarray(VALUES)
    image.putpalette([9, 8, 7, 50, 60, 70, 128, 0, 0, 0, 128, 0])
    image.save(tmp_path / "a.png")
    np.testing.assert_array_equal(read_mask(tmp_path / "a.png"), VALUES)
    assert read_palette(tmp_path / "a.png")[:4] == [(9, 8, 7), (50, 60, 70), (128, 0, 0), (0, 128, 0)]
    image.save(tmp_path / "a.gif")
    colors = np.array(read_palette(tmp_path / "a.gif"))[read_mask(tmp_path / "a.gif")]  # GIF may renumber, not recolour
    np.testing.assert_array_equal(colors, np.array([[9, 8, 7], [50, 60, 70], [128, 0, 0], [0, 128, 0]])[VALUES])


def test_palette_tiffs_give_indices_too(tmp_path):
    colormap = RNG.integers(0, 65536, (3, 256), dtype=np.uint16)
    tifffile.imwrite(tmp_path / "a.tif", VALUES, photometric="palette", colormap=colormap)
    np.testing.assert_array_equal(read_mask(tmp_path / "a.tif"), VALUES)
    assert read_palette(tmp_path / "a.tif")[3] == tuple(colormap[:, 3] >> 8)


@pytest.mark.parametrize(
    ("stored", "name", "wanted"),
    [
        (VALUES, "grey.png", np.uint8),
        (VALUES.astype(np.uint16) * 9000, "deep.png", np.uint16),
        (VALUES.astype(np.uint16) * 9000, "deep.tif", np.uint16),
        (VALUES.astype(np.uint32) * 9000, "wide.tif", np.uint16),
        (VALUES.astype(np.int32), "int.tif", np.uint8),
        (VALUES.astype(np.int16) - 1, "signed.tif", np.int16),
        (VALUES.astype(np.float32), "float.tif", np.uint8),
    ],
)
def test_whole_numbers_come_back_whatever_type_holds_them(tmp_path, stored, name, wanted):
    if name.endswith("tif"):
        tifffile.imwrite(tmp_path / name, stored)
    else:
        Image.fromarray(stored).save(tmp_path / name)
    mask = read_mask(tmp_path / name)
    assert mask.dtype == wanted
    np.testing.assert_array_equal(mask, stored)


@pytest.mark.parametrize("suffix", ["png", "tif", "bmp"])
def test_one_bit_masks_give_0_and_1(tmp_path, suffix):
    Image.fromarray(VALUES > 1).save(tmp_path / f"a.{suffix}")
    mask = read_mask(tmp_path / f"a.{suffix}")
    if suffix == "bmp":  # a palette of black and white
        assert set(np.unique(mask)) <= {0, 1, 255}
        mask = mask > 0
    np.testing.assert_array_equal(mask, VALUES > 1)


@pytest.mark.parametrize("bits", [2, 4])
def test_grey_masks_of_few_bits_give_the_stored_numbers_not_grey_levels(tmp_path, bits):
    """Pillow would give 0, 17, 34, ... for the values of a 4-bit PNG. Written by hand: W3C PNG, section 5."""
    values, per_byte = RNG.integers(0, 2**bits, (5, 8), dtype=np.uint8), 8 // bits
    shifts = bits * np.arange(per_byte - 1, -1, -1)
    packed = (values.reshape(5, -1, per_byte).astype(int) << shifts).sum(-1).astype(np.uint8)

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    pixels = zlib.compress(b"".join(b"\0" + row.tobytes() for row in packed))
    header = struct.pack(">IIBBBBB", 8, 5, bits, 0, 0, 0, 0)
    (tmp_path / "a.png").write_bytes(b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", pixels) + chunk(b"IEND", b""))
    np.testing.assert_array_equal(read_mask(tmp_path / "a.png"), values)


def test_colours_become_24_bit_numbers_and_alpha_is_dropped(tmp_path):
    rgb = RNG.integers(0, 256, (9, 14, 3), dtype=np.uint8)
    for name, pixels in (("rgb.png", rgb), ("rgba.png", np.dstack([rgb, VALUES]))):
        Image.fromarray(pixels).save(tmp_path / name)
        mask = read_mask(tmp_path / name)
        assert mask.dtype == np.int32
        np.testing.assert_array_equal(mask, rgb.astype(int) @ [65536, 256, 1])


def test_grey_stored_as_rgb_gives_the_grey_value(tmp_path):
    Image.fromarray(np.dstack([VALUES] * 3)).save(tmp_path / "a.png")
    mask = read_mask(tmp_path / "a.png")
    assert mask.dtype == np.uint8
    np.testing.assert_array_equal(mask, VALUES)


def test_masks_whose_0_is_white_are_not_inverted(tmp_path):
    """MINISWHITE is about brightness (TIFF 6.0, section 4); a class number has none."""
    tifffile.imwrite(tmp_path / "a.tif", VALUES, photometric="miniswhite")
    np.testing.assert_array_equal(read_mask(tmp_path / "a.tif"), VALUES)
    np.testing.assert_array_equal(read_image(tmp_path / "a.tif")[0], 255 - VALUES)


def test_what_is_no_mask_is_refused_by_name(tmp_path):
    tifffile.imwrite(tmp_path / "half.tif", VALUES / 2)
    with pytest.raises(ValueError, match=r"half\.tif: holds fractions"):
        read_mask(tmp_path / "half.tif")
    tifffile.imwrite(tmp_path / "nan.tif", np.full((3, 3), np.nan, np.float32))
    with pytest.raises(ValueError, match=r"nan\.tif: holds fractions or NaN"):
        read_mask(tmp_path / "nan.tif")
    tifffile.imwrite(tmp_path / "huge.tif", VALUES.astype(np.int32) * 70000)
    with pytest.raises(ValueError, match=r"huge\.tif: holds values 0 to 210000; legal is 0 to 65535"):
        read_mask(tmp_path / "huge.tif")
    tifffile.imwrite(tmp_path / "five.tif", np.zeros((5, 4, 4), np.uint8), planarconfig="separate", photometric="minisblack")
    with pytest.raises(ValueError, match=r"five\.tif: has 5 bands; a mask has 1"):
        read_mask(tmp_path / "five.tif")
    (tmp_path / "empty.png").write_bytes(b"")
    with pytest.raises(ValueError, match=r"empty\.png: is empty"):
        read_mask(tmp_path / "empty.png")


def by_loop(label_map: LabelMap, mask: np.ndarray) -> np.ndarray:
    """The slow and obvious label map."""

    def parts(value: int) -> list[int]:
        return [value >> 16, value >> 8 & 255, value & 255] if label_map.rgb else [value]

    labels = np.zeros(mask.shape, np.int64)
    for index, value in np.ndenumerate(mask):
        value = int(value) * 0x010101 if label_map.rgb and mask.dtype == np.uint8 else int(value)
        far = {key: sum((a - b) ** 2 for a, b in zip(parts(key), parts(value), strict=True)) for key in sorted(label_map.values)}
        nearest = min(far, key=lambda key: far[key])
        assert label_map.nearest or far[nearest] == 0
        labels[index] = label_map.values[nearest]
    return labels


@pytest.mark.parametrize("nearest", [False, True])
@pytest.mark.parametrize("dtype", [np.uint8, np.uint16, np.int16])
def test_a_label_map_of_numbers_equals_a_loop_over_pixels(dtype, nearest):
    values = {0: 2, 7: 0, 50: 1, 255: IGNORE} | ({-3: 4} if dtype == np.int16 else {}) | ({900: 3} if dtype != np.uint8 else {})
    mask = RNG.choice(list(values), (20, 30)).astype(dtype)
    if nearest:
        mask = RNG.integers(np.iinfo(np.int16).min if dtype == np.int16 else 0, min(np.iinfo(dtype).max, 2000), (20, 30)).astype(dtype)
    label_map = LabelMap(values, nearest=nearest)
    labels = label_map(mask)
    assert labels.dtype == np.uint8
    np.testing.assert_array_equal(labels, by_loop(label_map, mask))


@pytest.mark.parametrize("nearest", [False, True])
def test_a_label_map_of_colours_equals_a_loop_over_pixels(nearest):
    values = {0x000000: 0, 0x8000FF: 1, 0xFFFFFF: 2, 0xE0E0C0: IGNORE}
    label_map = LabelMap(values, rgb=True, nearest=nearest)
    mask = RNG.integers(0, 2**24, (15, 16), dtype=np.int32) if nearest else RNG.choice(list(values), (15, 16)).astype(np.int32)
    np.testing.assert_array_equal(label_map(mask), by_loop(label_map, mask))
    black_and_white = RNG.choice([0, 255], (5, 6)).astype(np.uint8)  # read_mask gives such a colour mask as grey
    np.testing.assert_array_equal(label_map(black_and_white), by_loop(label_map, black_and_white))


def test_more_than_255_classes_give_16_bit_labels():
    label_map = LabelMap({value: value for value in range(300)} | {65535: 65535}, ignore=65535)
    mask = RNG.integers(0, 300, (9, 9)).astype(np.uint16)
    mask[0, 0] = 65535
    labels = label_map(mask)
    assert labels.dtype == np.uint16
    np.testing.assert_array_equal(labels, mask)
    assert label_map.classes == 300
    np.testing.assert_array_equal(label_map(np.full((2, 2), 255, np.uint8)), 255)  # here 255 is a class


@pytest.mark.parametrize(("values", "told"), [(64, "--label 2=ignore"), (65, "are images and masks swapped?")])
def test_more_values_than_a_mask_has_are_taken_for_a_photograph(values, told):
    mask = np.arange(2, 2 + values, dtype=np.uint8)[None]
    with pytest.raises(ValueError, match=f"and {values - 5} more values are not among the values of 2 classes") as caught:
        LabelMap({0: 0, 1: 1})(mask, "masks/a.png")
    assert str(caught.value).endswith(told)


def test_a_value_that_is_no_class_is_named_counted_and_explained():
    mask = np.zeros((4, 5), np.uint8)
    mask[0, :3] = 255
    with pytest.raises(ValueError, match=r"masks/a\.png: value 255 \(3 pixels\) is not one of 2 classes\.") as caught:
        LabelMap({0: 0, 1: 1})(mask, "masks/a.png")
    assert str(caught.value).endswith("To make it class 1: --label 255=1; to ignore it: --label 255=ignore")
    colors = np.full((4, 5), 0x0A0B0C, np.int32)
    with pytest.raises(ValueError, match=r"value #0a0b0c \(20 pixels\).*--label '#0a0b0c=ignore'"):
        LabelMap({0: 0, 0xFF0000: 1}, rgb=True)(colors, "masks/a.png")
    with pytest.raises(ValueError, match=r"masks/a\.png: holds colours, but the classes are given as single values"):
        LabelMap({0: 0, 1: 1})(colors, "masks/a.png")


def test_a_label_map_survives_json():
    for label_map in (LabelMap({0: 0, 255: IGNORE}), LabelMap({-1: 255, 0xE0E0: 1}), LabelMap({0xFF0000: 3}, rgb=True, nearest=True)):
        assert LabelMap.from_dict(json.loads(json.dumps(label_map.to_dict()))) == label_map


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ({}, "KeyError"),
        ({"values": {"a": 1}}, "invalid literal"),
        ({"values": [1]}, "AttributeError"),
        ({"values": {"1": 0}, "near": True}, "unknown key 'near'"),
        ({"values": {}}, "no values"),
        ({"values": {"1": 256}}, "class 256 is not in 0 to 254"),
        ({"values": {"70000": 0}}, "70000 is no mask value; legal is -32768 to 65535"),
        ({"values": {"1": 0}, "ignore": 7}, "ignore is 7; legal is 255"),
    ],
)
def test_a_broken_label_map_is_refused(data, message):
    with pytest.raises(ValueError, match=message):
        LabelMap.from_dict(data)


def test_label_options_are_read_as_people_write_them():
    assert parse_label("255=1") == (255, 1)
    assert parse_label(" 255 = ignore ") == (255, IGNORE)
    assert parse_label("-1=ignore") == (-1, IGNORE)
    assert parse_label("#E0e0C0=3") == (0xE0E0C0, 3)
    assert isinstance(parse_label("#0000ff=1")[0], ColorValue)
    assert not isinstance(parse_label("255=1")[0], ColorValue)
    for text in ("255", "255=", "=1", "255=cow", "#e0e0=1", "255=-1", "1=2=3"):
        with pytest.raises(ValueError, match="legal is VALUE=CLASS or VALUE=ignore"):
            parse_label(text)


@pytest.mark.shared_data
def test_real_masks_read_as_pillow_and_tifffile_read_them(shared):
    for picture in find_pictures([shared / "data" / "msrc21" / "SegmentationClass", shared / "data" / "camvid" / "valannot"])[::50]:
        with Image.open(picture.path) as image:
            np.testing.assert_array_equal(read_mask(picture), np.asarray(image))
    pages = expand(shared / "data" / "isbi2012" / "train-labels.tif")
    assert pages[4] == Picture(shared / "data" / "isbi2012" / "train-labels.tif", 4)
    np.testing.assert_array_equal(read_mask(pages[4]), tifffile.imread(pages[4].path, key=4))
