"""Predictions that are interrupted, repeated with other options, or share a folder: nothing is mixed, lost or forgotten."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import rasterio
import tifffile
import zarr
from PIL import Image

from perpixel import budget, predict, streaming
from perpixel.budget import Limits, one_block
from perpixel.data.images import Picture
from perpixel.data.sources import open_source
from perpixel.predict import Task, load, predict_files


class Stopped(BaseException):
    """Instead of a killed process."""


def noise(*shape, seed=0):
    return np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)


def tiff(path, *shape, seed=0, **options):
    tifffile.imwrite(path, noise(*shape, 3, seed=seed), photometric="rgb", tile=(64, 64), compression="zlib", **options)
    return path


def pngs(folder, names):
    folder.mkdir()
    for seed, name in enumerate(names):
        Image.fromarray(noise(40, 50, 3, seed=seed)).save(folder / f"{name}.png")
    return folder


def interrupted(monkeypatch, what, after, *arguments, **options):
    """`predict_files` that ends at the call `after` (from 0) of `what`, a (module or class, name)."""
    calls = [0]
    own = getattr(*what)

    def stop(*given, **named):
        if calls[0] == after:
            raise Stopped
        calls[0] += 1
        return own(*given, **named)

    with monkeypatch.context() as patch:
        patch.setattr(*what, stop)
        with pytest.raises(Stopped):
            predict_files(*arguments, **options)


PICTURE, JOIN, BLOCK = (predict._Run, "picture"), (predict, "write_layer"), (streaming.Streamer, "scores")


DRIVER = '''
import os, random, signal, sys, time
from pathlib import Path

import perpixel.budget, perpixel.segmenter
from perpixel.data.mosaics import Journal, Mosaic
from perpixel.predict import Task, load, predict_files
from perpixel.streaming import Streamer

for part in (perpixel.budget, perpixel.segmenter):
    part.WHOLE = 0
perpixel.budget.SIDE = 48
segmenter, image, out = load(sys.argv[1], device="cpu"), sys.argv[2], Path(sys.argv[3])


def predict(tell, stage, number):
    """In a child: says to which stage it comes, piece by piece; the piece of a short stage in which it is to die waits for that."""
    met = []

    def come(to):
        met.append(to)
        os.write(tell, to[0].encode())
        if to == stage and met.count(to) == number and to in ("join", "finish"):
            time.sleep(60)

    def telling(owner, name, stage):
        own = getattr(owner, name)

        def told(*given):
            come(stage)
            return own(*given)

        setattr(owner, name, told)

    telling(Streamer, "region", "read")
    telling(Streamer, "scores", "network")
    telling(Mosaic, "put", "write")
    tiles = Mosaic.encoded
    Mosaic.encoded = lambda self, name: (come("join") or tile for tile in tiles(self, name))
    telling(Journal, "settle", "finish")
    telling(Mosaic, "remove", "finish")
    predict_files(segmenter, [image], out, Task(format="tif", entropy=True))
    os._exit(0)


random.seed(0)
stages = ["read", "network", "write"] * 2 + [random.choice(["read", "network", "write"])]
random.shuffle(stages)
moments = [(stage, random.randint(1, 9), random.uniform(0, 0.02)) for stage in stages]
moments += [("join", random.randint(1, 63), 0), ("join", random.randint(64, 126), 0), ("finish", random.randint(1, 2), 0)]
for stage, number, delay in [*moments, ("end", 1, 0)]:
    ear, tell = os.pipe()
    if not (child := os.fork()):
        predict(tell, stage, number)
    os.close(tell)
    heard = ""
    while heard.count(stage[0]) < number and (more := os.read(ear, 1)):
        heard += more.decode()
    time.sleep(delay)
    if stage != "end":
        os.kill(child, signal.SIGKILL)
    status = os.waitpid(child, 0)[1]
    os.close(ear)
    parts = len(list(out.glob(".perpixel-*/*.parts/[!.]*.labels")))
    print(stage, os.waitstatus_to_exitcode(status), parts, int((out / "a.tif").exists()))
'''


def test_killed_at_ten_random_moments_the_output_is_that_of_an_uninterrupted_run(make_bundle, tmp_path, monkeypatch, small_blocks):
    """SIGKILL up to 20 ms after any of the first pieces is read, predicted or written, twice while parts are joined, once after it."""
    monkeypatch.setattr(budget, "SIDE", 48)
    bundle, image = make_bundle(tile=64, overlap=16), tiff(tmp_path / "a.tif", 300, 420)
    predict_files(load(bundle, device="cpu"), [image], tmp_path / "once", Task(format="tif", entropy=True))
    command = [sys.executable, "-c", DRIVER, str(bundle), str(image), str(tmp_path / "killed")]
    said = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert said.returncode == 0, said.stderr
    stages, ends, parts, there = zip(*(line.split() for line in said.stdout.splitlines()), strict=True)
    assert ends == (str(-signal.SIGKILL),) * 10 + ("0",)
    assert set(stages[:7]) == {"read", "network", "write"}
    assert stages[7:] == ("join", "join", "finish", "end")
    made = [int(count) for count in parts]
    assert made[:10] == sorted(made[:10]), "nothing that was written is lost"
    assert len(set(made[:7])) >= 4, "kills are spread over the blocks"
    assert made[6] < 63, "of 7 rows of 9 blocks"
    assert made[7:] == [63, 63, 63, 0]
    assert there == ("0",) * 9 + ("1", "1")
    for name in ("a.tif", "entropy/a.tif"):
        assert (tmp_path / "killed" / name).read_bytes() == (tmp_path / "once" / name).read_bytes()
    assert sorted(path.name for path in (tmp_path / "killed").iterdir()) == ["a.tif", "entropy"]


def test_a_picture_of_one_block_is_not_mixed_with_the_blocks_of_a_smaller_limit(make_bundle, tmp_path, monkeypatch):
    segmenter = load(make_bundle(tile=256, overlap=32), device="cpu")
    image = tiff(tmp_path / "a.tif", 700, 700)
    task = Task(format="tif")
    interrupted(monkeypatch, JOIN, 0, segmenter, [image], tmp_path / "out", task)
    monkeypatch.setattr(budget, "SIDE", 256)
    for name in ("perpixel.segmenter.WHOLE", "perpixel.budget.WHOLE"):
        monkeypatch.setattr(name, 0)  # so that a limit of any size asks for blocks
    told = []
    limited = Task(format="tif", limits=Limits(ram=2**40))
    predict_files(segmenter, [image], tmp_path / "out", limited, tell=told.append)
    assert "blocks of 224x224" in told[0]
    assert np.array_equal(tifffile.imread(tmp_path / "out" / "a.tif"), segmenter.predict(image))


def test_a_prediction_that_ends_leaves_the_parts_of_another_in_the_same_folder(make_bundle, tmp_path, monkeypatch, small_blocks):
    segmenter = load(make_bundle(tile=64, overlap=16), device="cpu")
    large, other = tiff(tmp_path / "large.tif", 300, 420), tiff(tmp_path / "other.tif", 100, 100)
    out, task = tmp_path / "out", Task(format="tif")
    interrupted(monkeypatch, BLOCK, 8, segmenter, [large], out, task)
    parts = sorted(out.glob(".perpixel-*/*.parts/[!.]*.labels"))
    assert len(parts) >= 6
    predict_files(segmenter, [other], out, task)
    assert sorted(out.glob(".perpixel-*/*.parts/[!.]*.labels")) == parts
    predict_files(segmenter, [large], out, task)
    assert sorted(path.name for path in out.iterdir()) == ["large.tif", "other.tif"]


def test_pictures_that_another_bundle_has_overwritten_are_predicted_again(make_bundle, tmp_path, monkeypatch):
    first = load(make_bundle("a.safetensors"), device="cpu")
    second = load(make_bundle("b.safetensors", width=3), device="cpu")
    images, out = pngs(tmp_path / "in", "abc"), tmp_path / "out"
    interrupted(monkeypatch, PICTURE, 1, first, [images], out)
    predict_files(second, [images], out)
    predict_files(first, [images], out)
    for name in "abc":
        assert np.array_equal(np.asarray(Image.open(out / f"{name}.png")), first.predict(images / f"{name}.png"))


def test_an_option_added_when_resuming_holds_for_every_picture(make_bundle, tmp_path, monkeypatch):
    segmenter = load(make_bundle(), device="cpu")
    images, out = pngs(tmp_path / "in", "abc"), tmp_path / "out"
    interrupted(monkeypatch, PICTURE, 2, segmenter, [images], out)
    predict_files(segmenter, [images], out, Task(overlay=True))
    assert sorted(path.stem for path in (out / "overlays").iterdir()) == ["a", "b", "c"]


def test_damage_is_told_again_when_a_prediction_is_resumed(make_bundle, tmp_path, monkeypatch, small_blocks):
    segmenter = load(make_bundle(tile=64, overlap=16), device="cpu")
    paths = [tiff(tmp_path / f"{name}.tif", 130, 130) for name in "ab"]
    with tifffile.TiffFile(paths[0]) as file:
        offset = file.pages[0].dataoffsets[3]
    with paths[0].open("rb+") as file:
        file.seek(offset)
        file.write(b"\xff" * 20)
    out, task = tmp_path / "out", Task(format="tif")
    interrupted(monkeypatch, PICTURE, 1, segmenter, paths, out, task)
    result = predict_files(segmenter, paths, out, task)
    assert list(result.holes) == [str(paths[0])]
    assert "columns 0 to 63" in result.holes[str(paths[0])][0]


def test_an_error_of_the_writer_is_not_blamed_on_other_pictures(make_bundle, tmp_path, monkeypatch):
    images = pngs(tmp_path / "in", "abcd")

    def broken(path, *_):
        raise ValueError(f"{path.name} cannot be drawn")

    monkeypatch.setattr(predict, "write_rgb", broken)
    with pytest.raises(ValueError, match=r"a\.jpg cannot be drawn"):
        predict_files(load(make_bundle(), device="cpu"), [images], tmp_path / "out", Task(overlay=True))


@pytest.mark.parametrize("kind", ["tif", "zarr"])
def test_whoever_comes_second_to_the_join_is_content(make_bundle, tmp_path, monkeypatch, small_blocks, kind):
    segmenter = load(make_bundle(tile=64, overlap=16), device="cpu")
    image, out = tiff(tmp_path / "a.tif", 300, 420), tmp_path / "out"
    shares = [Task(format=kind, shard=(part, 2)) for part in (0, 1)]
    assert predict_files(segmenter, [image], out, shares[1]).shared == 1
    own, first = predict.write_layer, [True]

    def slow(*arguments):
        if first.pop() if first else False:
            predict_files(segmenter, [image], out, shares[1])
        own(*arguments)

    monkeypatch.setattr(predict, "write_layer", slow)
    assert predict_files(segmenter, [image], out, shares[0]).written == [out / f"a.{kind}"]
    assert [path.name for path in out.iterdir()] == [f"a.{kind}"]
    labels = tifffile.imread(out / "a.tif") if kind == "tif" else zarr.open(out / "a.zarr", mode="r")[:]
    assert np.array_equal(labels, segmenter.predict(image))


def test_a_share_of_ordinary_pictures_does_not_decode_those_of_others(make_bundle, tmp_path, monkeypatch):
    opened = []
    monkeypatch.setattr(predict, "open_source", lambda picture, bands: opened.append(picture.name) or open_source(picture, bands))
    images = pngs(tmp_path / "in", "abcde")
    predict_files(load(make_bundle(), device="cpu"), [images], tmp_path / "out", Task(shard=(1, 5)))
    assert opened == ["b"]


def test_a_rewritten_zarr_store_is_another_picture(make_bundle, tmp_path):
    store = zarr.create_array(tmp_path / "a.zarr", shape=(64, 64, 3), chunks=(32, 32, 3), dtype="uint8")
    store[:] = noise(64, 64, 3)
    segmenter, picture = load(make_bundle(), device="cpu"), Picture(tmp_path / "a.zarr")
    first, second, third = (predict._Run(segmenter, Task(), tmp_path / "out", [], set(), lambda *_: None, lambda _: None) for _ in range(3))
    before = first.key(picture)
    assert second.key(picture) == before
    store[:32] = noise(32, 64, 3, seed=1)
    assert third.key(picture) != before
    assert first.key(picture) == before  # its parts stay its own


def test_the_files_of_a_zarr_store_are_looked_at_once_for_all_its_slices(make_bundle, tmp_path, monkeypatch):
    zarr.create_array(tmp_path / "a.zarr", shape=(20, 32, 32), chunks=(1, 32, 32), dtype="uint8")[:] = noise(20, 32, 32)
    run = predict._Run(load(make_bundle(), device="cpu"), Task(), tmp_path / "out", [], set(), lambda *_: None, lambda _: None)
    seen, own = [], Path.stat
    monkeypatch.setattr(Path, "stat", lambda path, **rest: seen.append(path) or own(path, **rest))
    keys = {run.key(Picture(tmp_path / "a.zarr", page)) for page in range(20) for _ in range(4)}
    assert len(keys) == 20
    assert len(seen) < 10 * 21  # a few for each file


@pytest.mark.parametrize("kind", ["alpha", "mask", "number"])
def test_what_a_map_says_is_without_data_is_labelled_not_known_and_has_no_entropy(make_bundle, tmp_path, kind):
    pixels = np.moveaxis(noise(128, 160, 4), -1, 0).clip(1)
    pixels[:, :40, :50], pixels[3, 40:], pixels[3, :40, 50:] = 0, 255, 255
    place = rasterio.transform.from_origin(5e5, 4.6e6, 10, 10)
    profile = {"width": 160, "height": 128, "dtype": "uint8", "crs": "EPSG:32633", "transform": place}
    tiled = {"driver": "GTiff", "tiled": True, "blockxsize": 64, "blockysize": 64}
    path = tmp_path / "a.tif"
    if kind == "alpha":
        with rasterio.open(path, "w", **profile, **tiled, count=4, photometric="RGB", alpha="YES") as file:
            file.write(pixels)
    elif kind == "number":
        with rasterio.open(path, "w", **profile, **tiled, count=3, nodata=0) as file:
            file.write(pixels[:3])
    else:  # read by GDAL
        path = tmp_path / "a.img"
        with rasterio.open(path, "w", **profile, driver="HFA", count=3, nodata=0) as file:
            file.write(pixels[:3])
    predict_files(load(make_bundle(), device="cpu"), [path], tmp_path / "out", Task(format="tif", entropy=True))
    labels, entropy = (tifffile.imread(tmp_path / "out" / name) for name in ("a.tif", "entropy/a.tif"))
    expected = np.zeros((128, 160), bool)
    expected[:40, :50] = True
    assert np.array_equal(labels == 255, expected)
    assert np.array_equal(np.isnan(entropy), expected)


def test_a_very_long_picture_has_an_overlay_and_its_scales_take_no_more_memory_than_it(make_bundle, tmp_path):
    bundle = make_bundle(tile=512)
    Image.fromarray(noise(1, 70000, 3)).save(tmp_path / "long.png")
    predict_files(load(bundle, device="cpu"), [tmp_path / "long.png"], tmp_path / "out", Task(overlay=True))
    assert max(Image.open(tmp_path / "out" / "overlays" / "long.jpg").size) <= 4096
    segmenter = load(bundle, device="cpu", augment="scales")
    assert segmenter.predict(noise(1, 20000, 3)).shape == (1, 20000)


def test_a_limit_shrinks_the_tiles_of_an_exact_bundle_and_no_label_changes(make_bundle, tmp_path, monkeypatch):
    # In place of what the process holds just then, which the tests before this one have a part in.
    monkeypatch.setattr(budget, "_measured", lambda model, tiler, bands, size: (0.0, 2**28 + 64 * tiler.window**2, 0, 0))
    segmenter = load(make_bundle(tile=512, overlap="exact", width=4), device="cpu")
    image = tiff(tmp_path / "a.tif", 600, 700)
    source = open_source(Picture(image))
    free = segmenter.plan(source, Limits())
    less = segmenter.plan(source, Limits(ram=free.ram - 2**24))
    assert less.tiler.tile < free.tiler.tile == 512
    assert less.tiler.window < free.tiler.window
    labels = []
    for plan in (free, less):
        streamer = segmenter.streamer(source, "a", one_block(source.size), plan.tiler)
        labels += [scores.argmax(0) for _, scores in streamer.blocks(streamer.grid.blocks)]
    np.testing.assert_array_equal(*labels)


def test_files_are_closed_once_their_scores_are_there(make_bundle, tmp_path):
    segmenter, image = load(make_bundle(), device="cpu"), tiff(tmp_path / "a.tif", 100, 100)
    segmenter.logits(image)
    before = len(os.listdir("/proc/self/fd"))
    for _ in range(5):
        segmenter.logits(image)
    assert len(os.listdir("/proc/self/fd")) <= before
