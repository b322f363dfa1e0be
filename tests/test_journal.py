"""What a run leaves behind: notes, parts and open files; and by what it tells that nothing has changed since."""

import os
import time
from pathlib import Path

import numpy as np
import pytest
import rasterio
import tifffile
import torch
from PIL import Image

from perpixel import budget, predict
from perpixel.budget import Limits
from perpixel.data import writing
from perpixel.data.images import Picture
from perpixel.data.mosaics import Mosaic
from perpixel.predict import Task, load, predict_files
from perpixel.streaming import Streamer

SIZE = (300, 420)


@pytest.fixture
def segmenter(make_bundle):
    return load(make_bundle(tile=64, overlap=16), device="cpu")


def noise(*shape, seed=0):
    return np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)


def tiff(path, seed=0):
    tifffile.imwrite(path, noise(*SIZE, 3, seed=seed), photometric="rgb", tile=(64, 64), compression="zlib")
    return path


def stopped(monkeypatch, *arguments, after=3):
    """`predict_files` that ends with the block `after` the first."""
    own, made = Streamer.scores, []

    def scores(self, region):
        if len(made) == after:
            raise KeyboardInterrupt
        made.append(region)
        return own(self, region)

    with monkeypatch.context() as patch:
        patch.setattr(Streamer, "scores", scores)
        with pytest.raises(KeyboardInterrupt):
            predict_files(*arguments)


def still_open(path):
    return [link for link in Path("/proc/self/fd").iterdir() if os.path.realpath(link) == str(path)]


# ---- what has changed


def test_weights_that_were_changed_in_python_do_not_go_on_with_the_parts_of_the_file_s(segmenter, tmp_path, monkeypatch, small_blocks):
    image, out = tiff(tmp_path / "a.tif"), tmp_path / "out"
    stopped(monkeypatch, segmenter, [image], out, Task(format="tif"))
    with torch.no_grad():
        segmenter.bundle.model.decoder.classify.weight.neg_()
    predict_files(segmenter, [image], out, Task(format="tif"))
    assert np.array_equal(tifffile.imread(out / "a.tif"), segmenter.predict(image))


@pytest.mark.filterwarnings("ignore::rasterio.errors.NotGeoreferencedWarning")
def test_a_mosaic_of_files_is_another_picture_once_one_of_its_sheets_is(segmenter, tmp_path):
    for seed, name in enumerate("ab"):
        profile = {"width": 64, "height": 64, "count": 3, "dtype": "uint8", "driver": "GTiff"}
        with rasterio.open(tmp_path / f"{name}.tif", "w", **profile) as file:
            file.write(noise(3, 64, 64, seed=seed))
    source = '<SimpleSource><SourceFilename relativeToVRT="1">{}.tif</SourceFilename><SourceBand>{}</SourceBand></SimpleSource>'
    bands = "".join(
        f'<VRTRasterBand dataType="Byte" band="{band}">{source.format("a", band)}{source.format("b", band)}</VRTRasterBand>'
        for band in (1, 2, 3)
    )
    vrt = tmp_path / "whole.vrt"
    vrt.write_text(f'<VRTDataset rasterXSize="64" rasterYSize="64">{bands}</VRTDataset>')

    def key():
        return predict._Run(segmenter, Task(), tmp_path / "out", [], set(), lambda *_: None, lambda _: None).key(Picture(vrt))

    before = key()
    assert key() == before
    os.utime(tmp_path / "b.tif", (0, 0))
    assert key() != before


# ---- shares


def test_a_share_of_an_ordinary_picture_of_many_classes_makes_its_blocks(make_bundle, tmp_path, monkeypatch):
    """Its scores are too large for one block, so it is no single share's."""
    monkeypatch.setattr("perpixel.segmenter.MOST", 2**19)
    monkeypatch.setattr(budget, "SCORES", 2**19)
    segmenter, out = load(make_bundle(tile=64, overlap=16), device="cpu"), tmp_path / "out"
    Image.fromarray(noise(*SIZE, 3)).save(tmp_path / "a.png")
    results = [predict_files(segmenter, [tmp_path / "a.png"], out, Task(shard=(number, 2))) for number in range(2)]
    assert [result.shared for result in results] == [1, 0]
    assert np.array_equal(np.asarray(Image.open(out / "a.png")), segmenter.predict(tmp_path / "a.png"))


def test_a_share_that_opened_a_picture_before_another_finished_it_does_not_wait(segmenter, tmp_path, monkeypatch):
    image, out, own = tiff(tmp_path / "a.tif"), tmp_path / "out", predict._Run._agreed

    def late(self, *arguments):
        monkeypatch.setattr(predict._Run, "_agreed", own)
        predict_files(segmenter, [image], out, Task(format="tif", shard=(0, 2)))
        return own(self, *arguments)

    monkeypatch.setattr(predict._Run, "_agreed", late)
    result = predict_files(segmenter, [image], out, Task(format="tif", shard=(1, 2)))
    assert (result.shared, result.written) == (0, [out / "a.tif"])
    assert [path.name for path in out.iterdir()] == ["a.tif"]


def test_shares_of_one_ordinary_picture_leave_nothing_whatever_their_order(segmenter, tmp_path):
    Image.fromarray(noise(40, 50, 3)).save(tmp_path / "a.png")
    for order in ((0, 1, 2), (2, 1, 0)):
        out = tmp_path / f"out{order[0]}"
        for number in order:
            predict_files(segmenter, [tmp_path / "a.png"], out, Task(shard=(number, 3)))
        assert [path.name for path in out.iterdir()] == ["a.png"]


def test_a_share_whose_limit_does_not_hold_the_blocks_begun_with_says_so(segmenter, tmp_path, small_blocks, monkeypatch):
    image = tiff(tmp_path / "a.tif")
    predict_files(segmenter, [image], tmp_path / "out", Task(format="tif", shard=(0, 2)))
    monkeypatch.setattr(budget, "_measured", lambda *_: (0.0, 0, 0, 0))
    monkeypatch.setattr(budget, "_block_bytes", lambda model, tiler, source, grid, needs: (grid.block[0] * 2**20, 0))
    tight = Task(format="tif", shard=(1, 2), limits=Limits(ram=60 * 2**20))
    with pytest.raises(ValueError, match=r"blocks of 96x96, begun with, need about 96 MB .* give all shares"):
        predict_files(segmenter, [image], tmp_path / "out", tight)


# ---- what is left


def test_parts_that_nobody_goes_on_with_are_removed_and_those_of_others_stay(segmenter, tmp_path, monkeypatch, small_blocks):
    image, out = tiff(tmp_path / "a.tif"), tmp_path / "out"
    for task in (Task(format="tif", entropy=True), Task(format="tif", probabilities=True)):
        stopped(monkeypatch, segmenter, [image], out, task)
    old, young = sorted(out.glob(".perpixel-*/*.parts"), key=lambda parts: parts.stat().st_mtime)
    os.utime(old, (time.time() - 31 * 24 * 3600,) * 2)
    predict_files(segmenter, [image], out, Task(format="tif"))
    assert young.is_dir()
    assert not old.parent.exists()


def test_what_a_kill_left_while_parts_were_removed_goes_with_the_next_run(segmenter, tmp_path, monkeypatch, small_blocks):
    image, out = tiff(tmp_path / "a.tif"), tmp_path / "out"

    def killed(self):
        os.rename(self.folder, f"{self.folder}.0123")

    with monkeypatch.context() as patch:
        patch.setattr(Mosaic, "remove", killed)
        patch.setattr("perpixel.data.mosaics.Journal.close", lambda *_: None)
        predict_files(segmenter, [image], out, Task(format="tif"))
    assert list(out.glob(".perpixel-*/*.parts.0123"))
    predict_files(segmenter, [image], out, Task(format="tif"))
    assert [path.name for path in out.iterdir()] == ["a.tif"]


@pytest.mark.parametrize("stage", ["write", "predict", "another share's"])
def test_files_are_closed_when_a_run_ends_whatever_has_ended_it(segmenter, tmp_path, monkeypatch, stage):
    image, out = tiff(tmp_path / "a.tif"), tmp_path / "out"
    if stage == "another share's":
        assert predict_files(segmenter, [image], out, Task(format="png", shard=(1, 2))).written == []
    elif stage == "predict":
        stopped(monkeypatch, segmenter, [image, tiff(tmp_path / "b.tif")], out, after=0)
    else:

        def full(*_):
            raise OSError(28, "No space left on device")

        monkeypatch.setattr(writing.os, "replace", full)
        with pytest.raises(OSError, match="disk is full"):
            predict_files(segmenter, [image], out)
    assert not still_open(image)
    assert not still_open(tmp_path / "b.tif")
