"""U-Net as its authors released it (phseg_v5), which differs from Fig. 1 of arXiv:1505.04597."""

import torch
from torch import nn

from perpixel.models import unet_paper, unet_release_paper


def test_parameters_are_as_many_as_released():
    with torch.device("meta"):
        assert sum(p.numel() for p in unet_release_paper(2).parameters()) == 31_100_354


def test_it_differs_from_figure_1_in_the_last_up_convolution_and_the_concatenation_after_it_only():
    with torch.device("meta"):
        shapes = [[tuple(p.shape) for p in builder(2).parameters()] for builder in (unet_paper, unet_release_paper)]
    changed = [(old, new) for old, new in zip(*shapes, strict=True) if old != new]
    assert changed == [((128, 64, 2, 2), (128, 128, 2, 2)), ((64,), (128,)), ((64, 128, 3, 3), (64, 192, 3, 3))]


def test_relu_follows_every_up_convolution():
    torch.manual_seed(0)
    model = unet_release_paper(2, width=2).eval()
    joined, ups = [], []
    for stage in model.decoder.stages:
        stage.up.register_forward_hook(lambda layer, inputs, output: ups.append(output.clone()))
        stage.convolve.register_forward_pre_hook(lambda layer, inputs: joined.append(inputs[0].clone()))
    with torch.inference_mode():
        logits = model(torch.randn(1, 1, 188, 204))
    assert logits.shape == (1, 2, 4, 20)
    assert len(ups) == 4
    for up, together in zip(ups, joined, strict=True):
        assert (up < 0).any()
        torch.testing.assert_close(together[:, : up.shape[1]], up.relu())


def test_geometry_and_dropout_are_those_of_figure_1():
    release, figure = unet_release_paper(2, width=1), unet_paper(2, width=1)
    assert release.geometry == figure.geometry
    assert [m.p for m in release.modules() if isinstance(m, nn.Dropout)] == [0.5, 0.5]
