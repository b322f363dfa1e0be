"""Prediction block by block: the same labels as in one piece, whatever is killed, shared, damaged or short of memory."""

import errno
import json
import os
import subprocess
import sys
import threading
import time

import numpy as np
import pytest
import tifffile
import torch

from perpixel import budget, streaming
from perpixel.budget import Limits, parse_bytes, shard_of
from perpixel.data import writing
from perpixel.data.images import Picture
from perpixel.data.mosaics import Block, Grid
from perpixel.data.sources import open_source
from perpixel.predict import Task, load, predict_files
from perpixel.streaming import Streamer, ahead, behind
from perpixel.tiling import Tiler

SIZE = (300, 420)

pytestmark = pytest.mark.usefixtures("small_blocks")


@pytest.fixture
def bundle(make_bundle):
    return make_bundle(tile=64, overlap=16)


@pytest.fixture
def image(tmp_path):
    return write(tmp_path / "a.tif")


def write(path, seed=0, **options):
    pixels = np.random.default_rng(seed).integers(0, 256, (*SIZE, 3), dtype=np.uint8)
    tifffile.imwrite(path, pixels, photometric="rgb", tile=(64, 64), compression="zlib", **options)
    return path


def whole(bundle, image, **options):
    """Labels and scores in one piece."""
    scores = load(bundle, device="cpu", **options).logits(tifffile.imread(image))
    return scores.argmax(0).numpy(), scores


# ---- blocks


@pytest.mark.parametrize("model", ["unet", "unet_paper"])
def test_blocks_have_the_scores_of_the_whole_image(make_bundle, image, model):
    segmenter = load(make_bundle(model=model, tile=64, overlap=16), device="cpu")
    expected, seen = segmenter.logits(tifffile.imread(image)), np.zeros(SIZE, int)
    for block, known, scores in segmenter.blocks(image):
        part = (slice(block.top, block.top + block.height), slice(block.left, block.left + block.width))
        torch.testing.assert_close(scores, expected[:, *part], rtol=1e-5, atol=1e-5)
        assert known is None
        seen[part] += 1
    assert (seen == 1).all()
    assert np.array_equal(segmenter.predict(image), expected.argmax(0).numpy())


def test_windows_over_a_border_of_blocks_are_run_once_and_no_score_changes(bundle, image):
    segmenter, runs = load(bundle, device="cpu"), []
    segmenter.bundle.model.register_forward_hook(lambda _, given, __: runs.append(len(given[0])))
    tiler = Tiler(segmenter.bundle.model, 64, 16)
    streamer = Streamer(segmenter.bundle, None, open_source(Picture(image)), tiler, Grid(SIZE, (96, 96)), "float32", "a")
    with_kept = [scores for _, scores in streamer.blocks(streamer.grid.blocks)]
    assert sum(runs) == tiler.windows(SIZE)
    runs.clear()
    tiler.kept = None
    without = [scores for _, scores in streamer.blocks(streamer.grid.blocks)]
    assert sum(runs) > 1.5 * tiler.windows(SIZE)
    assert all(torch.equal(a, b) for a, b in zip(with_kept, without, strict=True))


def test_output_is_a_tiled_tiff_with_palette_class_names_and_all_maps(bundle, image, tmp_path):
    said = []
    task = Task(format="tif", probabilities=True, entropy=True, overlay=True)
    result = predict_files(load(bundle, device="cpu"), [image], tmp_path / "out", task, tell=said.append)
    labels, scores = whole(bundle, image)
    assert result.written == [tmp_path / "out" / "a.tif"]
    assert "20 blocks of 96x96, 54 tiles of 64 pixels" in said[0]
    with tifffile.TiffFile(result.written[0]) as tiff:
        page = tiff.pages[0]
        assert np.array_equal(page.asarray(), labels)
        assert (page.tilewidth, page.compression.name, page.photometric.name) == (96, "ADOBE_DEFLATE", "PALETTE")
        described = json.loads(page.description)
        assert (described["classes"], described["ignore"]) == (["class 0", "class 1", "class 2"], 255)
        assert (page.colormap.T[:3] // 257).tolist() == described["colors"]
    shares = scores.double().softmax(0).numpy()
    np.testing.assert_allclose(tifffile.imread(tmp_path / "out" / "probabilities" / "a.tif"), shares, atol=1e-3)
    entropy = -(shares * np.log(np.maximum(shares, 1e-30))).sum(0)
    np.testing.assert_allclose(tifffile.imread(tmp_path / "out" / "entropy" / "a.tif"), entropy, atol=2e-3)
    names = sorted(path.name for path in (tmp_path / "out").iterdir())
    assert names == ["a.tif", "entropy", "overlays", "probabilities"], "the journal is gone"


@pytest.mark.parametrize("kind", ["png", "zarr"])
def test_png_npy_and_zarr_hold_the_same(bundle, image, tmp_path, kind):
    if kind == "zarr":
        pytest.importorskip("zarr")
    predict_files(load(bundle, device="cpu"), [image], tmp_path / "out", Task(format=kind, probabilities=True))
    labels, scores = whole(bundle, image)
    if kind == "zarr":
        import zarr

        found, shares = zarr.open(tmp_path / "out" / "a.zarr")[:], zarr.open(tmp_path / "out" / "probabilities" / "a.zarr")[:]
    else:
        from PIL import Image

        found, shares = np.asarray(Image.open(tmp_path / "out" / "a.png")), np.load(tmp_path / "out" / "probabilities" / "a.npy")
    assert np.array_equal(found, labels)
    np.testing.assert_allclose(shares, scores.softmax(0), atol=1e-3)


def test_more_than_255_classes_are_uint16(make_bundle, image, tmp_path):
    bundle = make_bundle(classes=300, width=1, tile=64, overlap=16)
    predict_files(load(bundle, device="cpu"), [image], tmp_path / "out", Task(format="tif"))
    found = tifffile.imread(tmp_path / "out" / "a.tif")
    assert found.dtype == np.uint16
    assert np.array_equal(found, whole(bundle, image)[0])


@pytest.mark.parametrize("shear", [0.0, 2.0])
def test_a_geotiff_keeps_its_place_and_pixels_without_data_are_not_labelled(bundle, tmp_path, shear):
    rasterio = pytest.importorskip("rasterio")
    path, place = tmp_path / "map.tif", rasterio.Affine(10, shear, 500_000, shear / 2, -10, 4_600_000)
    pixels = np.random.default_rng(0).integers(1, 256, (3, *SIZE), dtype=np.uint8)
    pixels[:, :50, :60] = 0
    profile = {"driver": "GTiff", "height": SIZE[0], "width": SIZE[1], "count": 3, "dtype": "uint8", "nodata": 0, "tiled": True}
    with rasterio.open(path, "w", **profile, crs="EPSG:32633", transform=place, blockxsize=64, blockysize=64) as file:
        file.write(pixels)
    result = predict_files(load(bundle, device="cpu"), [path], tmp_path / "out")
    with rasterio.open(result.written[0]) as file:
        assert (file.crs, file.transform, file.nodata) == (rasterio.crs.CRS.from_epsg(32633), place, 255)
        labels = file.read(1)
    assert (labels[:50, :60] == 255).all()
    assert (labels == 255).sum() == 50 * 60


def test_a_place_that_an_orientation_takes_is_not_lost_silently(bundle, tmp_path):
    scale = (33550, 12, 3, (0.5, 0.5, 0.0), True)  # ModelPixelScale
    orientation = (274, 3, 1, 6, True)
    tifffile.imwrite(tmp_path / "turned.tif", np.zeros((40, 30, 3), np.uint8), extratags=[scale, orientation], metadata=None)
    with pytest.warns(UserWarning, match=r"turned\.tif: is not stored as upright rows .* where it lies or what of it is no data is lost"):
        predict_files(load(bundle, device="cpu"), [tmp_path / "turned.tif"], tmp_path / "out")


# ---- interrupted, damaged, full


def test_blocks_that_are_there_are_not_made_again(bundle, image, tmp_path, monkeypatch):
    segmenter, made = load(bundle, device="cpu"), []
    scores = Streamer.scores

    def counted(self, region):
        if len(made) == 7:
            raise KeyboardInterrupt
        made.append(region.block)
        return scores(self, region)

    monkeypatch.setattr(Streamer, "scores", counted)
    with pytest.raises(KeyboardInterrupt):
        predict_files(segmenter, [image], tmp_path / "out", Task(format="tif"))
    first, made[:] = list(made), []
    monkeypatch.setattr(Streamer, "scores", lambda self, region: made.append(region.block) or scores(self, region))
    monkeypatch.setattr(budget, "_timed", lambda *_: 3600.0)
    hours, told = segmenter.plan(open_source(Picture(image)), Limits()).windows * (20 - len(first)) / 20, []
    predict_files(segmenter, [image], tmp_path / "out", Task(format="tif"), tell=told.append)
    assert told[0] == f"{image}: {len(first)} of 20 blocks are there, going on"
    assert f"the network alone about {hours:.1f} hours" in told[1]
    assert len(made) == 20 - len(first)
    assert not set(made) & set(first)
    assert np.array_equal(tifffile.imread(tmp_path / "out" / "a.tif"), whole(bundle, image)[0])


def test_a_full_disk_is_told_and_the_same_command_goes_on(bundle, image, tmp_path, monkeypatch):
    segmenter, out, written = load(bundle, device="cpu"), tmp_path / "out", []
    replace = os.replace

    def full_after_five(source, target):
        written.append(target)
        if len(written) > 5:
            raise OSError(errno.ENOSPC, "No space left on device")
        replace(source, target)

    monkeypatch.setattr(writing.os, "replace", full_after_five)
    with pytest.raises(OSError, match=r"disk is full while writing .*nothing already written is lost"):
        predict_files(segmenter, [image], out, Task(format="tif"))
    assert not (out / "a.tif").exists()
    monkeypatch.setattr(writing.os, "replace", replace)
    assert len(list(out.glob(".perpixel-*/*.parts/*.labels"))) == 5
    predict_files(segmenter, [image], out, Task(format="tif"))
    assert np.array_equal(tifffile.imread(out / "a.tif"), whole(bundle, image)[0])


def break_tile(path, number):
    with tifffile.TiffFile(path) as tiff:
        offset, count = tiff.pages[0].dataoffsets[number], tiff.pages[0].databytecounts[number]
    with path.open("r+b") as file:
        file.seek(offset)
        file.write(b"\xff" * count)


def test_a_damaged_tile_is_reported_once_with_its_place_and_labelled_as_not_known(command, bundle, image, tmp_path):
    break_tile(image, 9)  # second of five rows of seven: rows 64 to 127, columns 128 to 191
    said = command("predict", bundle, image, "-o", tmp_path / "out", "--format", "tif")
    assert said.code == 2
    assert said.out.count("a.tif: rows 64 to 127, columns 128 to 191 are damaged") == 1
    labels = tifffile.imread(tmp_path / "out" / "a.tif")
    assert (labels[64:128, 128:192] == 255).all()
    assert (labels == 255).sum() == 64 * 64


def test_strict_stops_at_a_damaged_tile(command, bundle, image, tmp_path):
    break_tile(image, 9)
    said = command("predict", bundle, image, "-o", tmp_path / "out", "--format", "tif", "--strict")
    assert (said.code, said.out) == (2, said.out)
    assert "rows 64 to 127, columns 128 to 191 are damaged" in said.err
    assert not (tmp_path / "out" / "a.tif").exists()


# ---- shared between processes


def test_shards_write_what_one_process_writes_whatever_their_order(bundle, tmp_path):
    images = [write(tmp_path / f"{name}.tif", seed) for seed, name in enumerate("abc")]
    segmenter = load(bundle, device="cpu")
    predict_files(segmenter, images, tmp_path / "one", Task(format="tif"))
    results = [predict_files(segmenter, images, tmp_path / "many", Task(format="tif", shard=(part, 3))) for part in (2, 0, 1)]
    assert [result.shared for result in results] == [3, 3, 0]
    assert [len(result.written) for result in results] == [0, 0, 3]
    for name in ("a.tif", "b.tif", "c.tif"):
        assert (tmp_path / "many" / name).read_bytes() == (tmp_path / "one" / name).read_bytes()
    assert sorted(path.name for path in (tmp_path / "many").iterdir()) == ["a.tif", "b.tif", "c.tif"]


def test_shards_that_run_at_the_same_time_agree(bundle, image, tmp_path):
    segmenters = [load(bundle, device="cpu") for _ in range(3)]
    failed = []

    def work(part):
        try:
            predict_files(segmenters[part], [image], tmp_path / "out", Task(format="tif", shard=(part, 3)))
        except BaseException as error:
            failed.append(error)

    threads = [threading.Thread(target=work, args=(part,)) for part in range(3)]
    [thread.start() for thread in threads]
    [thread.join() for thread in threads]
    assert not failed
    assert np.array_equal(tifffile.imread(tmp_path / "out" / "a.tif"), whole(bundle, image)[0])


def test_shards_are_named_from_one_and_torchrun_names_its_own(monkeypatch):
    assert shard_of("2/4") == (1, 4)
    assert shard_of(None) == (0, 1)
    monkeypatch.setenv("RANK", "3")
    monkeypatch.setenv("WORLD_SIZE", "5")
    assert shard_of(None) == (0, 1), "job systems set these for commands that know nothing of them"
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "none")
    assert shard_of(None) == (3, 5)
    for wrong in ("0/2", "3/2", "2", "a/b", "/"):
        with pytest.raises(ValueError, match=f"shard is '{wrong}'; legal is i/n with 1 <= i <= n"):
            shard_of(wrong)


# ---- limits


def test_a_batch_that_memory_does_not_hold_is_halved_and_no_label_changes(bundle, image, tmp_path):
    segmenter, batches = load(bundle, device="cpu"), []

    def small_device(_, given):
        batches.append(len(given[0]))
        if batches[-1] > 2:
            raise torch.OutOfMemoryError("the device is full")

    expected = whole(bundle, image)[0]
    segmenter.bundle.model.register_forward_pre_hook(small_device)
    tiler = Tiler(segmenter.bundle.model, 64, 16, batch=8)
    streamer = Streamer(segmenter.bundle, None, open_source(Picture(image)), tiler, Grid(SIZE, (192, 192)), "float32", "a")
    for region, scores in streamer.blocks(streamer.grid.blocks):
        block = region.block
        assert np.array_equal(scores.argmax(0), expected[block.top : block.top + block.height, block.left : block.left + block.width])
    assert batches[:3] == [8, 4, 2]
    assert max(batches[3:]) == 2


def test_one_window_that_memory_does_not_hold_is_an_error_that_says_what_to_do(bundle, image):
    segmenter = load(bundle, device="cpu")

    def no_memory(*_):
        raise torch.OutOfMemoryError("full")

    segmenter.bundle.model.register_forward_pre_hook(no_memory)
    with pytest.raises(ValueError, match=r"memory of cpu does not hold a window of 64 pixels and its block; give --max-ram"):
        segmenter.logits(tifffile.imread(image))


def test_a_limit_that_nothing_fits_says_what_is_needed_and_a_lower_one_makes_smaller_blocks(make_bundle, image, monkeypatch):
    monkeypatch.setattr(budget, "SIDE", 2048)
    segmenter = load(make_bundle(tile=128, overlap=32, classes=21), device="cpu")
    source = open_source(Picture(image))
    source.size = (20_000, 20_000)  # only planned
    free = segmenter.plan(source, Limits())
    tight = segmenter.plan(source, Limits(ram=free.ram - 2**26))
    assert tight.ram <= free.ram - 2**26
    assert tight.grid.block[0] < free.grid.block[0]
    with pytest.raises(ValueError, match=r"the smallest tile and block of this model need about [\d,]+ MB of memory; raise the limit"):
        segmenter.plan(source, Limits(ram=2**20))


@pytest.mark.parametrize(("text", "expected"), [("800M", 800 * 2**20), ("2G", 2**31), ("1.5GB", 3 * 2**29), ("2 GiB", 2**31), ("77", 77)])
def test_memory_is_given_with_a_unit(text, expected):
    assert parse_bytes(text) == expected


@pytest.mark.parametrize("text", ["", "much", "-1G", "0", "2X"])
def test_other_memory_is_refused(command, bundle, image, text):
    said = command("predict", bundle, image, f"--max-ram={text}")
    assert said.code == 2
    assert f"memory limit is '{text}'; legal is a number with a unit" in said.err


# ---- refined, half precision, stages


class FarMean(torch.nn.Module):
    """A refiner that looks exactly as far as `reach`: the mean of the scores over a square."""

    def __init__(self, reach):
        super().__init__()
        self.reach = reach

    def forward(self, logits, _):
        for side in ((2 * self.reach + 1, 1), (1, 2 * self.reach + 1)):
            pad = (side[0] // 2, side[1] // 2)
            logits = torch.nn.functional.avg_pool2d(logits, side, stride=1, padding=pad, count_include_pad=False)
        return logits


@pytest.mark.parametrize(("reach", "equal"), [(24, True), (27, False)])
def test_a_refiner_that_looks_no_farther_than_the_context_makes_of_blocks_what_it_makes_of_all(bundle, image, reach, equal, monkeypatch):
    monkeypatch.setattr(streaming, "CONTEXT", 24)
    segmenter = load(bundle, device="cpu")
    segmenter.refiner = FarMean(reach)
    expected = segmenter.logits(tifffile.imread(image))
    found = [
        torch.allclose(scores, expected[:, block.top : block.top + block.height, block.left : block.left + block.width], atol=1e-4)
        for block, _, scores in segmenter.blocks(image)
    ]
    assert all(found) == equal


def test_a_dense_crf_by_blocks_hardly_differs_from_the_whole_and_would_without_its_context(make_bundle, tmp_path, monkeypatch):
    rows, columns = np.mgrid[:256, :384]
    pixels = np.stack([rows, columns % 256, (rows // 40 + columns // 40) % 2 * 200], -1)
    pixels = np.clip(pixels + np.random.default_rng(0).normal(0, 12, pixels.shape), 0, 255).astype(np.uint8)
    tifffile.imwrite(tmp_path / "a.tif", pixels, photometric="rgb", tile=(64, 64))
    segmenter = load(make_bundle(tile=64, overlap=16, width=4), device="cpu", refine="dense_crf")
    with torch.no_grad():
        segmenter.bundle.model.decoder.classify.weight *= 4  # scores as sure of themselves as those of a trained net
    whole = segmenter.logits(pixels).argmax(0).numpy()
    assert (np.bincount(whole.ravel(), minlength=3) > 0.1 * whole.size).all()
    assert (segmenter.predict(tmp_path / "a.tif") != whole).mean() < 0.01
    monkeypatch.setattr(streaming, "CONTEXT", 0)
    assert (segmenter.predict(tmp_path / "a.tif") != whole).mean() > 0.03


def test_bf16_labels_nearly_as_float32_does(bundle, image):
    half = load(bundle, device="cpu", precision="bf16")
    assert 0.9 < (half.predict(image) == whole(bundle, image)[0]).mean() < 1
    with pytest.raises(ValueError, match="precision is 'fp8'; legal is float32 or bf16"):
        load(bundle, device="cpu", precision="fp8")


def test_stages_overlap_hold_little_and_pass_errors_on():
    made, done = [], []

    def items():
        for number in range(20):
            made.append(number)
            yield number

    with ahead(items(), 1) as numbers:
        next(numbers)
        time.sleep(0.05)
        assert len(made) <= 3, "one is used, one waits, one is held out"
    with ahead((1 // n for n in [1, 0]), 1) as numbers, pytest.raises(ZeroDivisionError):
        list(numbers)
    with behind(1) as do:
        for number in range(9):
            do(done.append, number)
    assert done == list(range(9))
    with pytest.raises(ZeroDivisionError), behind(1) as do:
        do(lambda: 1 // 0)


@pytest.mark.slow
def test_twenty_thousand_pixels_square_stay_below_two_gib(make_bundle, tmp_path):
    """A process of its own, `perpixel predict` from file to file, as the system counts its memory."""
    tile = np.random.default_rng(0).integers(0, 256, (512, 512, 3), dtype=np.uint8)
    side, path = 20_000, tmp_path / "large.tif"
    grid = -(-side // 512)
    tifffile.imwrite(path, (tile for _ in range(grid * grid)), shape=(side, side, 3), dtype="uint8", tile=(512, 512), photometric="rgb")
    bundle = make_bundle(tile=512, overlap=32, width=1)
    child = subprocess.Popen([sys.executable, "-m", "perpixel", "predict", str(bundle), str(path), "-o", str(tmp_path / "out")])
    _, status, usage = os.wait4(child.pid, 0)
    assert status == 0
    assert usage.ru_maxrss * 1024 < 2 * 2**30
    with tifffile.TiffFile(tmp_path / "out" / "large.tif") as tiff:
        assert tiff.pages[0].shape == (side, side)


def test_a_grid_s_blocks_cover_the_image_once():
    grid, seen = Grid((100, 70), (48, 32)), np.zeros((100, 70), int)
    for block in grid.blocks:
        seen[block.top : block.top + block.height, block.left : block.left + block.width] += 1
    assert (seen == 1).all()
    assert grid.blocks[-1] == Block(96, 64, 4, 6)
    assert grid.tile == 16
