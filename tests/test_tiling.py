"""Cutting and stitching: nothing is lost, nothing is invented."""

from itertools import pairwise

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from perpixel.models import unet, unet_paper
from perpixel.models.model import Features, InputGeometry, SegmentationModel
from perpixel.tiling import mirror_pad, predict_tiled, predict_whole


@pytest.fixture(scope="module")
def paper_model():
    """The published layer table at width 1, in float64."""
    torch.manual_seed(0)
    return unet_paper(2, width=1).double().eval()


class Pointwise(nn.Module):
    """A model that looks at one pixel at a time: (image, 2 * image) of one band."""

    channels, strides = (1,), (1,)

    def forward(self, image: Tensor) -> Features:
        return Features([image])


class Doubled(nn.Module):
    def forward(self, features: Features, size: tuple[int, int]) -> Tensor:
        return torch.cat([features.maps[0], 2 * features.maps[0]], dim=1)


def pointwise(multiple: int) -> SegmentationModel:
    return SegmentationModel(Pointwise(), Doubled(), 2, InputGeometry(multiple=multiple, minimum=multiple))


@pytest.mark.parametrize("size", [(1, 1), (1, 7), (2, 3), (5, 4), (6, 2)])
@pytest.mark.parametrize("pads", [(0, 0, 0, 0), (1, 0, 0, 2), (3, 5, 8, 13), (40, 0, 1, 31)])
def test_mirror_padding_equals_numpy_even_where_the_pad_exceeds_the_image(size, pads):
    image = torch.randn(3, *size)
    top, bottom, left, right = pads
    expected = np.pad(image.numpy(), ((0, 0), (top, bottom), (left, right)), mode="reflect")
    np.testing.assert_array_equal(mirror_pad(image, *pads).numpy(), expected)


@pytest.mark.parametrize(("size", "tile", "overlap"), [((132, 148), 68, 4), ((68, 116), 36, 0), ((52, 36), 20, 4), ((84, 20), 20, 16)])
def test_tiles_of_an_unpadded_network_equal_one_big_prediction(paper_model, size, tile, overlap):
    """No context is lost at a tile border (arXiv:1505.04597, Fig. 2). Sides of 16 k + 4 make a legal image with 92 px at each side."""
    image = torch.randn(1, *size, dtype=torch.float64)
    with torch.no_grad():
        whole = paper_model(mirror_pad(image, 92, 92, 92, 92)[None])[0]
    torch.testing.assert_close(predict_tiled(paper_model, image, tile, overlap, batch=2), whole, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(predict_whole(paper_model, image), whole, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("size", [(61, 45), (1, 75), (33, 3)])
def test_tiles_equal_the_whole_where_the_image_itself_is_no_legal_size(paper_model, size):
    image = torch.randn(1, *size, dtype=torch.float64)
    whole = predict_whole(paper_model, image)
    assert whole.shape == (2, *size)
    torch.testing.assert_close(predict_tiled(paper_model, image, tile=20, overlap=3), whole, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(("tile", "overlap"), [(8, 0), (8, 7), (11, 4), (16, 8), (100, 10)])
@pytest.mark.parametrize("multiple", [1, 4])
@pytest.mark.parametrize("size", [(1, 1), (29, 40), (8, 3)])
def test_blending_weights_add_up_to_one_at_every_pixel(size, tile, overlap, multiple):
    """Where a window's border plays no role, tiles change nothing."""
    image = torch.randn(1, *size, dtype=torch.float64)
    expected = torch.cat([image, 2 * image])
    torch.testing.assert_close(predict_tiled(pointwise(multiple), image, tile, overlap, batch=2), expected)


def test_a_padded_network_s_tiles_agree_with_the_whole_up_to_its_padding():
    """Padding inside a window is felt near its border; overlapping windows hide most of it."""
    torch.manual_seed(0)
    model = unet(2, "plain", width=2).double().eval()
    image = torch.randn(3, 150, 170, dtype=torch.float64)
    whole = predict_whole(model, image)
    spread = whole.std()
    errors = [(predict_tiled(model, image, 96, overlap) - whole).abs().mean() / spread for overlap in (0, 64)]
    assert errors[1] < errors[0]
    assert errors[1] < 0.15
    torch.testing.assert_close(predict_tiled(model, image, 400, 32), whole)


@pytest.mark.parametrize("size", [(1, 1), (1, 40), (2, 65), (33, 31), (64, 64)])
def test_any_side_from_one_pixel_is_labelled(size):
    model = unet(3, "plain", width=2).eval()
    image = torch.randn(3, *size)
    for logits in (predict_whole(model, image), predict_tiled(model, image, 32, 8)):
        assert logits.shape == (3, *size)
        assert logits.isfinite().all()


@pytest.mark.parametrize("low", [False, True])
def test_logits_have_the_image_s_type_and_can_be_trained_on(low):
    """A refiner that learns from logits keeps them for its backward pass; tensors born in inference mode cannot be kept."""
    model = unet(3, "plain", width=2).eval()
    weight = torch.ones(1, requires_grad=True)
    with torch.autocast("cpu", torch.bfloat16, enabled=low):
        predicted = [predict_whole(model, torch.randn(3, 96, 64)), predict_tiled(model, torch.randn(3, 70, 40), 32, 8)]
    for logits in predicted:
        assert logits.dtype == torch.float32
        assert logits.is_contiguous()
        assert not logits.requires_grad
        (logits * weight).sum().backward()


@pytest.mark.parametrize(("multiple", "tile", "overlap"), [(1, 8, 5), (4, 8, 3), (8, 8, 6), (8, 9, 8)])
def test_neighbouring_windows_share_the_overlap_asked_for_and_start_in_phase(multiple, tile, overlap):
    """The image holds its own column numbers, so every window tells where it was cut."""
    model, starts = pointwise(multiple), []
    model.register_forward_pre_hook(lambda module, inputs: starts.append((int(inputs[0][0, 0, 0, 0]), inputs[0].shape[-1])))
    predict_tiled(model, torch.arange(61.0).expand(1, 1, 61), tile, overlap)
    assert len(starts) > 1
    assert all(start % multiple == 0 for start, _ in starts)
    assert all(one + side - other >= overlap for (one, side), (other, _) in pairwise(starts))
    assert starts[-1][0] + starts[-1][1] >= 61


def test_tiles_smaller_than_a_cell_of_the_model_leave_no_gaps():
    """A model whose sides are free may subsample all the same; its tiles start at whole cells, and each cell gets one."""
    model = SegmentationModel(Pointwise(), Doubled(), 2, InputGeometry(minimum=1, cell=32))
    image = torch.randn(1, 80, 70)
    torch.testing.assert_close(predict_tiled(model, image, tile=8, overlap=0), torch.cat([image, 2 * image]))


def test_windows_run_in_batches_of_at_most_the_number_asked_for():
    model = pointwise(4)
    sizes = []
    model.register_forward_pre_hook(lambda module, inputs: sizes.append(tuple(inputs[0].shape)))
    predict_tiled(model, torch.randn(1, 24, 20), tile=8, overlap=0, batch=4)
    assert sizes == [(4, 1, 8, 8), (4, 1, 8, 8), (1, 1, 8, 8)]


def test_out_of_range_arguments_say_what_is_legal():
    model, image = pointwise(1), torch.zeros(1, 4, 4)
    for arguments, message in [
        ((8, 8), "overlap < tile"),
        ((8, -1), "0 <= overlap"),
        ((0, 0), "overlap < tile"),
        ((8, 0, 0), "at least 1"),
    ]:
        with pytest.raises(ValueError, match=message):
            predict_tiled(model, image, *arguments)
    for wrong in (torch.zeros(4, 4), torch.zeros(1, 1, 4, 4), torch.zeros(1, 0, 4)):
        with pytest.raises(ValueError, match=r"one image \(C, H, W\)"):
            predict_whole(model, wrong)
    with pytest.raises(ValueError, match="takes a float image"):
        predict_whole(model, torch.zeros(1, 4, 4, dtype=torch.uint8))
    with pytest.raises(ValueError, match="none may be negative"):
        mirror_pad(image, 0, -1, 0, 0)
