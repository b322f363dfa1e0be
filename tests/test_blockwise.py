"""Large images are scored block by block: the same counts and losses as in one piece, at constant memory, damage left out."""

import json

import numpy as np
import pytest
import tifffile

from perpixel import blockwise
from perpixel.bundle import TemperatureCard, load_bundle
from perpixel.calibrate import calibrate
from perpixel.compare import compare
from perpixel.data.images import Picture
from perpixel.data.label_windows import LabelSource
from perpixel.data.masks import LabelMap, read_mask
from perpixel.evaluate import evaluate
from perpixel.report.make import evaluate_and_report
from perpixel.segmenter import Segmenter

SIZE = (300, 420)
PALETTE = np.random.default_rng(5).integers(0, 65536, (3, 256)).astype(np.uint16)


@pytest.fixture
def bundle(make_bundle):
    return load_bundle(make_bundle(tile=64, overlap=16))


@pytest.fixture
def scenes(tmp_path):
    """Two tiled TIFFs with masks that have a palette: blots of classes 0 to 2, and 255 here and there."""
    for folder in ("images", "masks"):
        (tmp_path / folder).mkdir()
    for number, name in enumerate("ab"):
        random = np.random.default_rng(number)
        pixels = random.integers(0, 256, (*SIZE, 3), dtype=np.uint8)
        truth = random.choice(np.array([0, 1, 2, 2, 255], np.uint8), (10, 14)).repeat(30, 0).repeat(30, 1)
        options = {"tile": (64, 64), "compression": "zlib"}
        tifffile.imwrite(tmp_path / "images" / f"{name}.tif", pixels, photometric="rgb", **options)
        tifffile.imwrite(tmp_path / "masks" / f"{name}.tif", truth, photometric="palette", colormap=PALETTE, **options)
    return tmp_path


def scored(bundle, scenes, monkeypatch, pixels, **options):
    """The set scored with so many pixels as the limit of what is held whole."""
    monkeypatch.setattr(blockwise, "WHOLE_PIXELS", pixels)
    return evaluate(bundle, scenes / "images", scenes / "masks", labels={255: 255}, **options)


def broken(path, row, column):
    """Overwrite one tile of 64 pixels with nonsense."""
    with tifffile.TiffFile(path) as tiff:
        page = tiff.pages[0]
        place = row * -(-page.imagewidth // 64) + column
        offset, count = page.dataoffsets[place], page.databytecounts[place]
    with path.open("r+b") as file:
        file.seek(offset)
        file.write(b"\xff" * count)


def test_blocks_give_the_counts_losses_shares_and_calibration_of_the_whole(bundle, scenes, monkeypatch, small_blocks):
    bundle.card = bundle.card.model_copy(update={"temperature": TemperatureCard(value=1.7, images=2)})
    whole = scored(bundle, scenes, monkeypatch, 2**25)
    blocks = scored(bundle, scenes, monkeypatch, 0)
    assert blocks.confusion.counts.tolist() == whole.confusion.counts.tolist()
    assert blocks.region.images.table.tolist() == whole.region.images.table.tolist()
    assert blocks.losses == pytest.approx(whole.losses, rel=1e-6)
    one, other = whole.to_json(), blocks.to_json()
    for when in ("before", "after"):
        first, second = one["calibration"][when], other["calibration"][when]
        assert second["reliability"]["pixels"] == first["reliability"]["pixels"]
        for name in ("ece", "brier"):
            assert second[name] == pytest.approx(first[name], rel=1e-9)
    for part in ("classes", "boundary_band"):
        for name in ("cost", "pixels"):
            assert other["cost_shares"][part][name] == pytest.approx(one["cost_shares"][part][name], rel=1e-6)


def test_scores_are_those_of_the_labels_that_predict_gives(bundle, scenes, monkeypatch, small_blocks):
    found = scored(bundle, scenes, monkeypatch, 0).confusion.counts.numpy()
    expected = np.zeros((3, 3), np.int64)
    for name in "ab":
        truth = tifffile.imread(scenes / "masks" / f"{name}.tif")
        labels = Segmenter(bundle).predict(scenes / "images" / f"{name}.tif")
        np.add.at(expected, (truth[truth != 255], labels[truth != 255]), 1)
    assert found.tolist() == expected.tolist()


def test_what_needs_the_whole_picture_leaves_large_images_out_and_says_so_once(bundle, scenes, monkeypatch, small_blocks):
    seen = []
    result = scored(bundle, scenes, monkeypatch, 0, observers=[seen.append], scores=("cost", "boundary", "surface", "calibration"))
    assert seen == []
    (said,) = [said for said in result.warnings if "block by block" in said]
    assert said.startswith("2 images are too large to be held whole")
    assert said.endswith("left out of: boundary, surface, pictures and samples (report, calibrate)")
    json.dumps(result.to_json(), allow_nan=False)


def test_one_large_image_in_a_set_leaves_the_rest_as_it_is_and_runs_can_be_compared(bundle, scenes, monkeypatch, small_blocks, tmp_path):
    small = np.s_[:100, :100]
    for folder, options in (("images", {"photometric": "rgb"}), ("masks", {"photometric": "palette", "colormap": PALETTE})):
        path = scenes / folder / "b.tif"
        pixels = tifffile.imread(path)[small]
        tifffile.imwrite(path, pixels, tile=(64, 64), compression="zlib", **options)
    seen = []
    mixed = scored(bundle, scenes, monkeypatch, 20_000, observers=[seen.append])
    assert [scene.name for scene in seen] == ["b"]
    assert len(mixed.losses) == 2
    mixed.to_file(tmp_path / "mixed.json")
    whole = scored(bundle, scenes, monkeypatch, 2**25)
    whole.to_file(tmp_path / "whole.json")
    assert mixed.region.images.table.tolist() == whole.region.images.table.tolist()
    compare([tmp_path / "mixed.json", tmp_path / "whole.json"])
    compare([tmp_path / "mixed.json", tmp_path / "mixed.json"])


@pytest.mark.parametrize("pixels", [0, 2**25])
@pytest.mark.parametrize("folder", ["images", "masks"])
def test_damaged_pieces_do_not_count_and_are_named(bundle, scenes, monkeypatch, small_blocks, folder, pixels):
    sound = scored(bundle, scenes, monkeypatch, pixels)
    broken(scenes / folder / "a.tif", 1, 2)
    result = scored(bundle, scenes, monkeypatch, pixels)
    image = str(scenes / "images" / "a.tif")
    assert list(result.holes) == [image]
    (hole,) = result.holes[image]
    assert f"{folder}/a.tif: rows 64 to 127, columns 128 to 191 are damaged" in hole
    truth = tifffile.imread(scenes / "masks" / "b.tif") if folder == "images" else None
    lost = sound.confusion.pixels - result.confusion.pixels
    if truth is not None:
        kept = tifffile.imread(scenes / "masks" / "a.tif")[64:128, 128:192]
        assert lost == (kept != 255).sum()
    assert 0 < lost <= 64 * 64
    assert result.to_json()["holes"] == result.holes


def test_a_mask_of_another_size_is_left_out_with_both_sizes(bundle, scenes, monkeypatch, small_blocks):
    tifffile.imwrite(scenes / "masks" / "a.tif", np.zeros((299, 420), np.uint8), tile=(64, 64))
    result = scored(bundle, scenes, monkeypatch, 0)
    assert list(result.damaged) == [str(scenes / "images" / "a.tif")]
    assert "is 300x420 but" in next(iter(result.damaged.values()))
    assert "is 299x420 pixels (height x width). Image and mask must have equal size." in next(iter(result.damaged.values()))


def test_a_value_that_is_no_class_in_the_last_block_leaves_nothing_of_the_image(bundle, scenes, monkeypatch, small_blocks):
    path = scenes / "masks" / "a.tif"
    values = tifffile.imread(path)
    values[-1, -1] = 77
    tifffile.imwrite(path, values, tile=(64, 64), photometric="palette", colormap=PALETTE)
    result = scored(bundle, scenes, monkeypatch, 0)
    assert "value 77 (1 pixels) is not one of 3 classes" in result.damaged[str(scenes / "images" / "a.tif")]
    path.unlink()
    (scenes / "images" / "a.tif").unlink()
    alone = scored(bundle, scenes, monkeypatch, 0)
    assert result.losses == alone.losses
    assert result.to_json()["cost_shares"] == alone.to_json()["cost_shares"]
    assert result.to_json()["calibration"] == alone.to_json()["calibration"]


def test_the_band_along_boundaries_is_that_of_the_whole_beside_a_damaged_piece_that_ends_where_a_block_does(
    bundle, scenes, monkeypatch, small_blocks
):
    """Columns 128 to 191 are lost, and a block begins at 192: its first pixels lie along an edge of void that is not in the block."""
    broken(scenes / "images" / "a.tif", 1, 2)
    whole, blocks = (scored(bundle, scenes, monkeypatch, pixels, scores=("cost",)).to_json() for pixels in (2**25, 0))
    for name in ("cost", "pixels"):
        shares = [found["cost_shares"]["boundary_band"][name] for found in (blocks, whole)]
        assert shares[0] == pytest.approx(shares[1], rel=1e-6)


# ---- masks in windows


@pytest.mark.parametrize(
    ("dtype", "options"),
    [
        (np.uint8, {"photometric": "palette", "colormap": PALETTE, "tile": (64, 64), "compression": "zlib"}),
        (np.uint8, {"photometric": "miniswhite", "tile": (64, 64)}),
        (np.uint16, {"tile": (32, 64), "compression": "zlib"}),
        (np.int16, {"tile": (64, 32)}),
        (np.float32, {"rowsperstrip": 16, "compression": "zlib"}),
        (np.uint8, {"photometric": "rgb", "tile": (64, 64)}),
    ],
)
def test_windows_of_a_mask_hold_the_labels_of_the_whole_mask(tmp_path, monkeypatch, dtype, options):
    monkeypatch.setattr("perpixel.data.tiff_windows.SMALL", 0)
    path, rgb = tmp_path / "mask.tif", options.get("photometric") == "rgb"
    values = np.random.default_rng(0).integers(0, 4, (*SIZE, 3) if rgb else SIZE).astype(dtype)
    tifffile.imwrite(path, values, **options)
    keys = np.unique(read_mask(path)).tolist()
    label_map = LabelMap({key: place % 7 for place, key in enumerate(keys)}, rgb=rgb)
    expected = label_map(read_mask(path))
    source = LabelSource(Picture(path), label_map)
    assert source._file is not None, "it should be read in windows, or the test says nothing"
    for top, left, height, width in [(0, 0, *SIZE), (17, 33, 100, 200), (299, 419, 1, 1), (64, 128, 64, 64)]:
        assert np.array_equal(source.read(top, left, height, width).labels, expected[top : top + height, left : left + width])
    source.close()


def test_a_report_of_large_images_alone_is_a_page_without_their_pictures(make_bundle, scenes, monkeypatch, small_blocks, tmp_path):
    monkeypatch.setattr(blockwise, "WHOLE_PIXELS", 0)
    page = tmp_path / "out" / "report.html"
    bundle = make_bundle(tile=64, overlap=16)
    result = evaluate_and_report(bundle, scenes / "images", scenes / "masks", labels={255: 255}, report=page)
    assert len(result.losses) == 2
    assert "block by block" in page.read_text("utf-8")


def test_large_images_alone_cannot_calibrate_and_the_message_says_why(make_bundle, scenes, monkeypatch, small_blocks):
    monkeypatch.setattr(blockwise, "WHOLE_PIXELS", 0)
    for file in (scenes / "masks").iterdir():
        tifffile.imwrite(file, np.zeros(SIZE, np.uint8), tile=(64, 64))
    with pytest.raises(ValueError, match="too large to be held whole are not sampled"):
        calibrate(make_bundle(tile=64, overlap=16), scenes / "images", scenes / "masks", split=None)
