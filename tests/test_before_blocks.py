"""What is done and told before the blocks of an image: plan, progress, and the first pass for layers that take a mean of all of it."""

import platform
import re
import resource
import threading
from collections import Counter

import numpy as np
import pytest
import tifffile
import torch

from perpixel import budget
from perpixel.augmented import AugmentedTiler, views
from perpixel.budget import Limits, keep_freed_memory
from perpixel.data.images import Picture
from perpixel.data.sources import open_source
from perpixel.models import build
from perpixel.predict import Task, load, predict_files
from perpixel.streaming import noted_in
from perpixel.tiling import Tiler, reader

SIZE = (420, 380)


@pytest.fixture(autouse=True)
def blocks_of_128(small_blocks, monkeypatch):
    monkeypatch.setattr(budget, "SIDE", 128)


@pytest.fixture
def bundle(make_bundle):
    return make_bundle(tile=32, overlap="exact", width=1, image_pooling=True)


@pytest.fixture
def image(tmp_path):
    pixels = np.random.default_rng(0).integers(0, 256, (*SIZE, 3), dtype=np.uint8)
    tifffile.imwrite(tmp_path / "a.tif", pixels, photometric="rgb", tile=(64, 64), compression="zlib")
    return tmp_path / "a.tif"


def counted_rows(segmenter, monkeypatch):
    """How often each row of windows is summed up."""
    rows, own = Counter(), Tiler._sum_of_row

    def sum_of_row(self, read, size, rows_, columns, row):
        rows[row.start] += 1
        return own(self, read, size, rows_, columns, row)

    monkeypatch.setattr(Tiler, "_sum_of_row", sum_of_row)
    return rows


def test_shares_write_what_one_process_writes_and_compute_the_first_pass_once(bundle, image, tmp_path, monkeypatch):
    segmenter = load(bundle, device="cpu")
    rows = counted_rows(segmenter, monkeypatch)
    predict_files(segmenter, [image], tmp_path / "one", Task(format="tif"))
    assert set(rows.values()) == {1}
    alone = dict(rows)
    rows.clear()
    for part in (2, 0, 1):
        predict_files(segmenter, [image], tmp_path / "many", Task(format="tif", shard=(part, 3)))
    assert rows == alone
    assert (tmp_path / "many" / "a.tif").read_bytes() == (tmp_path / "one" / "a.tif").read_bytes()
    assert [path.name for path in (tmp_path / "many").iterdir()] == ["a.tif"]
    whole = load(bundle, device="cpu").predict(tifffile.imread(image))
    assert (tifffile.imread(tmp_path / "one" / "a.tif") == whole).mean() > 0.9999


def test_processes_that_run_at_the_same_time_begin_at_different_rows(bundle, image, tmp_path, monkeypatch):
    """Each of two waits for the other after its first row, so that both are under way."""
    together, first, own = threading.Barrier(2), {}, Tiler._sum_of_row

    def sum_of_row(self, read, size, rows, columns, row):
        if threading.get_ident() not in first:
            first[threading.get_ident()] = row.start
            together.wait(60)
        return own(self, read, size, rows, columns, row)

    monkeypatch.setattr(Tiler, "_sum_of_row", sum_of_row)
    segmenters = [load(bundle, device="cpu") for _ in range(2)]
    work = [
        threading.Thread(target=predict_files, args=(segmenters[part], [image], tmp_path / "out", Task(format="tif", shard=(part, 2))))
        for part in range(2)
    ]
    [thread.start() for thread in work]
    [thread.join() for thread in work]
    assert len(set(first.values())) == 2
    assert (tmp_path / "out" / "a.tif").exists()


def test_an_interrupted_first_pass_goes_on_and_its_mean_is_the_same_to_the_last_bit(tmp_path):
    torch.manual_seed(0)
    model = build("unet", 2, encoder="plain", width=1, image_pooling=True).eval()
    pixels, done = torch.randn(3, 300, 200), []
    for tiler in (Tiler(model, 16, "exact"), AugmentedTiler(Tiler(model, 16, "exact"), views("flips,rotations"))):
        folder = tmp_path / type(tiler).__name__
        folder.mkdir()
        plain = tiler.prepared(reader(pixels), (300, 200))
        with pytest.raises(KeyboardInterrupt):
            tiler.prepared(reader(pixels), (300, 200), noted_in(folder, interrupted_at(3)), begin=0.6)
        before = {path.name for path in folder.iterdir()}
        noted = tiler.prepared(reader(pixels), (300, 200), noted_in(folder, done.append))
        assert before
        assert not before & {f"{name}.npy" for name in done}
        for one, other in zip(getattr(plain, "tilers", [plain]), getattr(noted, "tilers", [noted]), strict=True):
            assert torch.equal(one.mean, other.mean)


def interrupted_at(number):
    """The `number`-th computation is interrupted."""
    left = iter(range(1, number))

    def tell(_):
        if next(left, None) is None:
            raise KeyboardInterrupt

    return tell


def test_the_plan_counts_both_passes_and_says_the_time_of_a_share(bundle, make_bundle, image, monkeypatch, tmp_path):
    """A network and its encoder that take a minute and half of one, by the clock that is asked."""
    monkeypatch.setattr(budget, "_timed", lambda network, _: 60.0 if hasattr(network, "geometry") else 30.0)
    segmenter, source = load(bundle, device="cpu"), open_source(Picture(image))
    planned = segmenter.plan(source, Limits())
    assert planned.seconds == pytest.approx(90 * planned.windows)
    one_pass = load(make_bundle("other.safetensors", tile=32, overlap="exact", width=1), device="cpu").plan(source, Limits())
    assert one_pass.seconds == pytest.approx(60 * one_pass.windows)
    doubled = load(bundle, device="cpu", augment="flips").plan(source, Limits())
    assert doubled.seconds == pytest.approx(180 * planned.windows)
    told: list[str] = []
    predict_files(segmenter, [image], tmp_path / "out", Task(format="tif", shard=(0, 3)), tell=told.append)
    minutes = round(planned.seconds / 3 / 60)
    assert re.search(rf"the network alone about {minutes} minutes for each of 3 shares$", told[0])


def test_the_plan_is_of_the_precision_that_is_predicted_in(make_bundle, image):
    segmenter, seen = load(make_bundle(tile=64, overlap=16), device="cpu", precision="bf16"), []
    segmenter.bundle.model.register_forward_hook(lambda _, __, out: seen.append(out.dtype))
    segmenter.plan(open_source(Picture(image)), Limits())
    assert set(seen) == {torch.bfloat16}


@pytest.mark.parametrize(("side", "runs"), [(420, 1), (9000, 2)])
def test_a_window_is_run_again_to_time_it_only_where_that_is_a_hundredth_of_the_work(make_bundle, image, side, runs):
    segmenter, seen = load(make_bundle(tile=64, overlap=16), device="cpu"), []
    segmenter.bundle.model.register_forward_pre_hook(lambda *_: seen.append(1))
    source = open_source(Picture(image))
    source.size = (side, side)
    segmenter.plan(source, Limits())
    assert len(seen) == runs


def test_progress_grows_within_an_image_and_over_all_and_names_the_first_pass(bundle, image, tmp_path):
    (tmp_path / "b.tif").write_bytes(image.read_bytes())
    seen: list[tuple[float, int, str]] = []
    predict_files(
        load(bundle, device="cpu"), [image, tmp_path / "b.tif"], tmp_path / "out", Task(format="tif"), lambda *told: seen.append(told)
    )
    done = [number for number, _, _ in seen]
    assert done == sorted(done)
    assert done[-1] == 2
    assert {of for _, of, _ in seen} == {2}
    blocks = {number: what for number, _, what in seen if "block" in what}
    assert blocks[0.25] == "a, block 3 of 12"
    assert blocks[1.5] == "b, block 6 of 12"
    assert sum("b, first pass over the image, row 1 of" in what for _, _, what in seen) == 1


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="mallopt is glibc's")
def test_memory_that_was_freed_is_not_fetched_from_the_system_again():
    """By the page faults of the thread: 64 MiB in pieces are 16,384 pages of 4 KiB."""
    assert keep_freed_memory()
    faults = []
    for _ in range(3):
        before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
        pieces = [torch.ones(2**20) for _ in range(16)]
        del pieces
        faults.append(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
    assert faults[2] < 2000
