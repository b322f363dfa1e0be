"""What is planned before it is used: the most that any block takes, batches, and what the machine has to give."""

import numpy as np
import pytest
import torch

from perpixel import budget
from perpixel.augmented import AugmentedTiler, views
from perpixel.budget import Limits, Needs
from perpixel.data.mosaics import Grid
from perpixel.data.windows import WholeSource
from perpixel.models import build
from perpixel.predict import load
from perpixel.tiling import Tiler, reader


def noise(*shape):
    return np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8)


@pytest.mark.parametrize("kinds", ["", "flips,rotations", "scales"])
@pytest.mark.parametrize(("size", "side"), [((130, 700), 128), ((500, 300), 96), ((400, 900), 32)])
@pytest.mark.parametrize("around", [0, 20])
def test_the_estimate_reads_as_much_as_the_block_that_reads_most(make_bundle, size, side, around, kinds):
    """Compared with every block; the second row of the first case is two pixels high, the blocks of the last are part of a step."""
    tiler = Tiler(load(make_bundle(), device="cpu").bundle.model, 64, 16)
    reach = AugmentedTiler(tiler, views(kinds)).reach
    scored, read = (0, 0), (0, 0)
    for block in Grid(size, (side, side)).blocks:
        top, left = max(block.top - around, 0), max(block.left - around, 0)
        bottom, right = min(block.top + block.height + around, size[0]), min(block.left + block.width + around, size[1])
        part = reach(size, top, left, bottom - top, right - left)
        scored, read = np.maximum(scored, (bottom - top, right - left)), np.maximum(read, part[2:])
    rows = budget._most(size[0], side, around, lambda first, count: reach(size, first, 0, count, size[1])[2])
    columns = budget._most(size[1], side, around, lambda first, count: reach(size, 0, first, size[0], count)[3])
    assert [rows[0], columns[0]] == list(scored)
    assert [rows[1], columns[1]] == list(read)


def test_without_a_limit_a_machine_with_little_memory_gets_smaller_blocks_and_the_same_tiles(make_bundle, monkeypatch):
    model, source = (
        load(make_bundle(tile=64, overlap=16, classes=9), device="cpu").bundle.model,
        WholeSource(np.empty((3, 9000, 9000), np.uint8)),
    )
    monkeypatch.setattr(budget, "_measured", lambda *_: (0.0, 2**28, 0, 0))
    grids = {}
    for room in (2**34, 2**29, 2**20):
        monkeypatch.setattr(budget, "_free_ram", lambda room=room: room)
        planned = budget.plan(model, source, 64, 16, Limits(), Needs(3))
        grids[room] = planned.grid.block[0]
        assert planned.tiler.tile == 64
        assert planned.ram <= room or room == 2**20  # what nothing fits is not refused
    assert grids[2**34] > grids[2**29] > grids[2**20] > 0


def test_windows_of_the_first_pass_run_in_batches_and_the_mean_is_the_same():
    torch.manual_seed(0)
    model = build("unet", 3, encoder="plain", width=1, image_pooling=True).eval().double()
    size, means, batches = (70, 300), [], []
    image = torch.randn(3, *size, dtype=torch.float64)
    model.encoder.register_forward_hook(lambda _, given, __: batches.append(len(given[0])))
    for batch in (1, 4):
        tiler = Tiler(model, 16, "exact", batch)
        batches.clear()  # of what the tiler has asked the model
        means.append(tiler.prepared(reader(image), size).mean)
        assert max(batches) == batch
        assert sum(batches) == tiler.windows(size)
    torch.testing.assert_close(means[0], means[1], rtol=1e-12, atol=1e-12)


def test_a_device_that_is_no_processor_gets_windows_in_batches_measured_once(make_bundle, monkeypatch):
    """PyTorch's "meta" device stands for a GPU where the batch is chosen; the windows then run here."""
    segmenter, asked, batches = load(make_bundle(tile=64, overlap=16), device="cpu"), [], []
    expected = segmenter.logits(noise(150, 200, 3))
    monkeypatch.setattr(type(segmenter), "device", torch.device("meta"))
    monkeypatch.setattr("perpixel.segmenter.computing", lambda *_: torch.inference_mode())
    monkeypatch.setattr("perpixel.segmenter.batch_beside", lambda *given: asked.append(given) or 4)
    segmenter.bundle.model.register_forward_pre_hook(lambda _, given: batches.append(len(given[0])))
    for _ in range(2):
        torch.testing.assert_close(segmenter.logits(noise(150, 200, 3)), expected, rtol=1e-5, atol=1e-5)
    assert len(asked) == 1
    assert max(batches) == 4
    batches.clear()
    segmenter.logits(noise(40, 50, 3))
    assert batches == [1]
