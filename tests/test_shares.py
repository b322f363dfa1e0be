"""Shares of one work, and memory that is planned before it is used: what one process would write, within what it was allowed."""

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import tifffile
from PIL import Image

from perpixel import budget
from perpixel.budget import Limits
from perpixel.predict import Task, load, predict_files

SIZE = (300, 420)


@pytest.fixture
def image(tmp_path):
    pixels = np.random.default_rng(0).integers(0, 256, (*SIZE, 3), dtype=np.uint8)
    tifffile.imwrite(tmp_path / "a.tif", pixels, photometric="rgb", tile=(64, 64), compression="zlib")
    return tmp_path / "a.tif"


def hidden(folder):
    return [path.name for path in folder.iterdir() if path.name.startswith(".")]


def test_shares_that_name_a_file_differently_complete_one_output(make_bundle, image, tmp_path, monkeypatch, small_blocks):
    segmenter, out = load(make_bundle(tile=64, overlap=16), device="cpu"), tmp_path / "out"
    monkeypatch.chdir(tmp_path)
    first = predict_files(segmenter, ["a.tif"], out, Task(format="tif", shard=(0, 2)))
    last = predict_files(segmenter, [image.resolve()], out, Task(format="tif", shard=(1, 2)))
    assert (first.shared, last.written) == (1, [out / "a.tif"])
    assert np.array_equal(tifffile.imread(out / "a.tif"), segmenter.predict(image))
    assert hidden(out) == []


def test_a_share_that_comes_after_the_work_is_done_finds_it_done_and_the_last_one_tidies_up(make_bundle, image, tmp_path):
    """A picture of one block is a single share's; the two others have nothing to wait for, and leave nothing behind."""
    segmenter, out = load(make_bundle(tile=64, overlap=16), device="cpu"), tmp_path / "out"
    for number in range(3):
        result = predict_files(segmenter, [image], out, Task(format="tif", shard=(number, 3)))
        assert (result.shared, result.written) == (0, [out / "a.tif"])
        assert bool(hidden(out)) is (number < 2)


def test_the_plan_that_is_told_is_the_plan_that_runs(make_bundle, image, tmp_path, small_blocks):
    """A second share has no limit of its own and takes the smaller tiles that the first one's asked for; both tell the same."""
    bundle, told = make_bundle(tile=256, overlap=0), []
    least = next(limit for limit in range(200, 4000, 20) if _tile(bundle, image, limit) is not None)
    for number, limits in enumerate((Limits(ram=least * 2**20), Limits())):
        predict_files(load(bundle, device="cpu"), [image], tmp_path / "out", Task(limits=limits, shard=(number, 2)), tell=told.append)
    first, second = (line.split("; about")[0] for line in told)
    assert first == second


def _tile(bundle, image, megabytes):
    """The tile that so much memory allows, or None."""
    from perpixel.data.images import Picture
    from perpixel.data.sources import open_source

    try:
        return load(bundle, device="cpu").plan(open_source(Picture(image)), Limits(ram=megabytes * 2**20)).tiler.tile
    except ValueError:
        return None


def test_blocks_keep_the_tile_that_their_limit_asks_for(make_bundle, image, monkeypatch, small_blocks):
    segmenter, seen = load(make_bundle(tile=256, overlap=0), device="cpu"), []
    own = segmenter.streamer
    monkeypatch.setattr(segmenter, "streamer", lambda *given, **named: seen.append(own(*given, **named)) or seen[-1])
    monkeypatch.setattr(budget, "_measured", lambda model, tiler, bands, size: (0.0, 2**20 * tiler.window, 0, 0))  # a MiB a pixel of side
    limits = Limits(ram=2**20 * 128)
    assert sum(block.height * block.width for block, _, _ in segmenter.blocks(image, limits)) == SIZE[0] * SIZE[1]
    assert seen[0].tiler.window < 128 < 256


def test_samples_do_not_label_what_is_damaged(make_bundle, image):
    """Both ways name the same pixels as not known."""
    with tifffile.TiffFile(image) as tiff:
        offset = tiff.pages[0].dataoffsets[8]  # the tile of rows 64 to 127 and columns 64 to 127
    with image.open("r+b") as file:
        file.seek(offset)
        file.write(b"\xff" * 64)
    segmenter = load(make_bundle("unet", dropout=0.5), device="cpu")
    for samples in (None, 2):
        unknown = segmenter.predict(image, samples) == 255
        assert unknown[64:128, 64:128].all()
        assert unknown.sum() == 64 * 64


def test_a_stack_of_which_one_picture_is_predicted_says_so(make_bundle, tmp_path):
    pages = np.random.default_rng(0).integers(0, 256, (3, 32, 40), dtype=np.uint8)
    tifffile.imwrite(tmp_path / "stack.tif", pages, photometric="minisblack")
    segmenter = load(make_bundle(bands=1), device="cpu")
    with pytest.warns(UserWarning, match=r"stack\.tif: holds 3 pictures; only the first is used"):
        labels = segmenter.predict(tmp_path / "stack.tif")
    assert np.array_equal(labels, segmenter.predict(pages[0]))


def test_files_are_closed_when_an_image_is_refused(make_bundle, tmp_path):
    Path("/proc/self/fd").exists() or pytest.fail("this test looks at /proc")
    tifffile.imwrite(tmp_path / "bands.tif", np.zeros((5, 64, 64), np.uint8), planarconfig="separate", photometric="minisblack")
    segmenter = load(make_bundle(), device="cpu")
    for _ in range(3):
        with pytest.raises(ValueError, match="bands"):
            segmenter.predict(tmp_path / "bands.tif")
    assert not [link for link in Path("/proc/self/fd").iterdir() if "bands.tif" in os.path.realpath(link)]


# `ru_maxrss` of a child begins with the size of its parent, which other tests made large.
PEAK = r"""
import pathlib, re, sys
from perpixel.cli import main
status = 0
try:
    main()
except SystemExit as end:
    status = end.code or 0
print("peak", int(re.search(r"VmHWM:\s+(\d+) kB", pathlib.Path("/proc/self/status").read_text())[1]) // 1024)
sys.exit(status)
"""


@pytest.mark.parametrize("extra", [[], ["--refine", "dense_crf"]], ids=["scores", "refined"])
def test_a_process_stays_below_its_limit_on_memory(make_bundle, tmp_path, extra):
    """Tall strips of float32, which have to be held for a whole row of blocks, and noise, of which a dense CRF makes the largest lattice;
    the system counts the peak of the whole process.
    """
    pixels = np.random.default_rng(0).random((1100, 1000, 3), np.float32)
    tifffile.imwrite(tmp_path / "strips.tif", pixels, photometric="rgb", rowsperstrip=512, compression="zlib")
    bundle, limit = make_bundle(tile=256, overlap=32, dtype="float32"), 1300
    words = ["predict", str(bundle), str(tmp_path / "strips.tif"), "-o", str(tmp_path / "out"), "--max-ram", f"{limit}M", *extra]
    done = subprocess.run([sys.executable, "-c", PEAK, *words], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert int(done.stdout.split("peak")[-1]) <= limit, done.stdout
    with Image.open(next((tmp_path / "out").glob("strips.*"))) as labels:
        assert labels.size == (1000, 1100)
