"""The U-Net decoder on any encoder."""

import pytest
import torch
from torch import nn
from torch.nn import functional

from perpixel.models.layers import resize_logits
from perpixel.models.unet import decoder_stages, unet, unet_paper


@pytest.mark.parametrize("encoder", ["plain", "convnext_atto"])  # from stride 1 and from stride 4; all others: test_grid.py
@pytest.mark.parametrize("head_stride", [1, 2, 4])
def test_logits_have_the_image_s_own_size_wherever_the_decoder_stops(encoder, head_stride):
    with torch.device("meta"):
        model = unet(7, encoder, in_channels=4, head_stride=head_stride)
        assert model(torch.zeros(2, 4, 97, 131)).shape == (2, 7, 97, 131)


def test_stages_halve_the_stride_and_take_a_skip_where_there_is_one():
    assert decoder_stages([2, 4, 8, 16, 32], 1) == [(16, 3), (8, 2), (4, 1), (2, 0), (1, None)]
    assert decoder_stages([2, 4, 8, 16, 32], 2) == [(16, 3), (8, 2), (4, 1), (2, 0)]
    assert decoder_stages([4, 8, 16, 32], 1) == [(16, 2), (8, 1), (4, 0), (2, None), (1, None)]
    assert decoder_stages([1, 2, 4, 8, 16], 2) == [(8, 3), (4, 2), (2, 1)]
    assert decoder_stages([2, 8, 32], 4) == [(16, None), (8, 1), (4, None)]
    assert decoder_stages([2, 4, 8, 8, 8], 2) == [(8, 3), (8, 2), (4, 1), (2, 0)]


@pytest.mark.parametrize("head_stride", [0, 3, 64, -2])
def test_a_head_stride_that_cannot_be_is_refused(head_stride):
    with pytest.raises(ValueError, match="must be a power of two from 1 to 16"):
        unet(2, "plain", width=2, head_stride=head_stride)


def test_illegal_options_are_refused_with_what_is_legal():
    with pytest.raises(ValueError, match="has 4 stages, at strides 8, 4, 2, 1: give 4 positive numbers"):
        unet(2, "plain", width=2, decoder_channels=(8, 8, 8))
    with pytest.raises(ValueError, match=r"unknown upsampling 'cubic'. Known: bilinear, nearest"):
        unet(2, "plain", width=2, upsampling="cubic")
    with pytest.raises(ValueError, match="no weights are published for encoder 'plain'"):
        unet(2, "plain", encoder_weights=True)
    with pytest.raises(ValueError, match="at least 1"):
        unet(2, "plain", in_channels=0)


def test_a_width_that_the_encoder_cannot_have_is_refused_with_what_to_do():
    with torch.device("meta"):
        with pytest.raises(ValueError, match="width is 16, but encoder 'resnet18' has its own; leave it out, or take encoder 'plain'"):
            unet(2, "resnet18", width=16)
        assert unet(2, "resnet18", width=None).encoder.channels[0] == 64
        assert unet(2, "plain", width=None).encoder.channels[0] == 32


@pytest.mark.parametrize("options", [{"head_stride": 2}, {"image_pooling": True, "upsampling": "nearest", "dropout": 0.2}])
def test_a_batch_of_one_smallest_image_trains_every_parameter(options):
    torch.manual_seed(0)
    model = unet(3, "mobilenetv3_small_050", **options).train()
    side = model.geometry.minimum
    model(torch.randn(1, 3, side, side)).square().mean().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())


def test_bfloat16_autocast_keeps_parameters_and_statistics_in_float32():
    torch.manual_seed(0)
    model = unet(3, "plain", width=4).to(memory_format=torch.channels_last).train()
    image = torch.randn(2, 3, 32, 48).contiguous(memory_format=torch.channels_last)
    with torch.autocast("cpu", torch.bfloat16):
        low = model(image)
    low.float().square().mean().backward()
    assert {t.dtype for t in [*model.parameters(), *(b for b in model.buffers() if b.is_floating_point())]} == {torch.float32}
    assert {p.grad.dtype for p in model.parameters()} == {torch.float32}
    full = model(image)
    assert (low.float() - full).norm() < 0.1 * full.norm()


@pytest.mark.parametrize("options", [{}, {"head_stride": 2, "image_pooling": True}])
@pytest.mark.parametrize("encoder", ["mobilenetv2_100", "plain", "convnext_atto"])
def test_no_convolution_of_the_decoder_has_to_reorder_its_input(encoder, options):
    """channels_last in, channels_last at every convolution: a reordering copy costs as much as a small convolution."""
    model = unet(3, encoder, **options).to(memory_format=torch.channels_last).eval()
    seen = []

    def look(layer, inputs):
        seen.append(inputs[0].is_contiguous(memory_format=torch.channels_last))

    for layer in model.decoder.modules():
        if isinstance(layer, nn.Conv2d):
            layer.register_forward_pre_hook(look)
    with torch.inference_mode():
        model(torch.randn(2, 3, 64, 96).contiguous(memory_format=torch.channels_last))
    assert len(seen) >= 7
    assert all(seen)


def test_image_pooling_lets_a_far_corner_matter():
    torch.manual_seed(0)
    image = torch.randn(1, 3, 32, 512)
    changed = image.clone()
    changed[..., 480:] += 3
    for pooling in (False, True):
        model = unet(2, "plain", width=2, image_pooling=pooling).eval()
        same = torch.equal(model(image)[..., :16], model(changed)[..., :16])
        assert same is not pooling


def test_resized_logits_keep_at_least_float32():
    for dtype, expected in ((torch.bfloat16, torch.float32), (torch.float32, torch.float32), (torch.float64, torch.float64)):
        assert resize_logits(torch.zeros(1, 2, 4, 4, dtype=dtype), (8, 8)).dtype == expected


def test_narrow_paper_models_keep_the_geometry():
    model = unet_paper(3, in_channels=2, width=1, dropout=0.0)
    assert model(torch.zeros(1, 2, 188, 204)).shape == (1, 3, 4, 20)
    with pytest.raises(ValueError, match="width is 0"):
        unet_paper(2, width=0)


def test_stage_scores_are_the_sum_of_each_stage_s_own_classifier_resized_step_by_step():
    torch.manual_seed(0)
    model = unet(3, encoder="resnet18", stage_scores=True, head_stride=2).double().eval()
    image = torch.randn(1, 3, 64, 96, dtype=torch.float64)
    decoder, maps = model.decoder, model.encoder(image).maps
    x, total = maps[-1], None
    for number, (stage, skip) in enumerate(zip(decoder.stages, [maps[3], maps[2], maps[1], maps[0]], strict=True)):
        x = stage(x, skip, tuple(skip.shape[-2:]))
        classifier = decoder.classify if number == 3 else decoder.coarse_classifiers[number]
        scores = torch.einsum("nchw,kc->nkhw", x, classifier.weight[:, :, 0, 0]) + classifier.bias[:, None, None]
        up = 0 if total is None else functional.interpolate(total, size=scores.shape[-2:], mode="bilinear", align_corners=False)
        total = scores + up
    expected = functional.interpolate(total, size=(64, 96), mode="bilinear", align_corners=False)
    torch.testing.assert_close(model(image), expected, rtol=1e-10, atol=1e-10)


def test_without_stage_scores_there_is_one_classifier():
    plain, summed = (unet(3, encoder="resnet18", stage_scores=asked) for asked in (False, True))
    extra = sum(p.numel() for p in summed.parameters()) - sum(p.numel() for p in plain.parameters())
    assert extra == 3 * (256 + 128 + 64 + 32 + 4)  # widths of the four coarser stages, and their biases
