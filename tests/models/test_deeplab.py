"""Atrous convolution, DeepLab on any encoder, and weights of others in it."""

from itertools import pairwise

import pytest
import timm
import torch
import torchvision
from torch import nn

from perpixel.models import build
from perpixel.models.atrous import ContextNorm, atrous_convolution, atrous_encoder, field_of_view, summed, zoom
from perpixel.models.deeplab_v1 import AtrousClassifier, Fc6, decimate
from perpixel.models.deeplab_v3 import deeplab_v3_torchvision
from perpixel.models.encoders import DilationError
from perpixel.models.importing import import_weights
from perpixel.models.torchvision_trunks import any_encoder

GENERAL = ["deeplab_v1", "deeplab_v2", "deeplab_v3", "deeplab_v3plus"]


@pytest.mark.parametrize(("kernel", "rate"), [(3, 1), (3, 2), (3, 12), (7, 4), (4, 4), (4, 8), (1, 5), (5, 3)])
def test_atrous_convolution_is_one_whose_kernel_has_zeros_in_its_holes(kernel, rate):
    torch.manual_seed(0)
    layer = atrous_convolution(2, 3, kernel, rate).double()
    side = field_of_view(kernel, rate)
    filled = torch.zeros(3, 2, side, side, dtype=torch.float64)
    filled[..., ::rate, ::rate] = layer.weight
    image = torch.randn(1, 2, 40, 31, dtype=torch.float64)
    whole = nn.functional.conv2d(image, filled, layer.bias, padding=(side - 1) // 2)
    torch.testing.assert_close(layer(image), whole)
    assert whole.shape[-2:] == image.shape[-2:]


def test_an_even_kernel_at_an_odd_rate_is_refused():
    with pytest.raises(ValueError, match="kernel 4 at rate 3 has no middle"):
        atrous_convolution(1, 1, 4, 3)


def test_fields_of_view_are_those_of_the_paper():
    """arXiv:1606.00915, section 3.1: k + (k - 1)(r - 1)."""
    assert [field_of_view(3, 12), field_of_view(7, 4), field_of_view(4, 4), field_of_view(4, 8), field_of_view(1, 9)] == [25, 25, 13, 25, 1]


@pytest.mark.parametrize(("kernel", "taps"), [(3, [0, 3, 6]), (4, [0, 2, 4, 6]), (7, [0, 1, 2, 3, 4, 5, 6])])
def test_decimation_keeps_evenly_spaced_taps_and_the_same_filters_in_fc7(kernel, taps):
    """Weights that state where they come from: 10^4 filter + 100 row + column."""
    filters, side = torch.arange(8.0), torch.arange(7.0)
    fc6 = 1e4 * filters[:, None, None, None] + 100 * side[:, None] + side
    whole = {
        "fc6.weight": fc6.expand(8, 2, 7, 7),
        "fc6.bias": filters,
        "fc7.weight": (10 * filters[:, None] + filters)[..., None, None],
        "fc7.bias": filters,
    }
    small = decimate(whole, kernel, 5)
    first, second = small["fc6.bias"].long(), small["fc7.bias"].long()
    assert len(set(first.tolist())) == len(set(second.tolist())) == 5
    assert (small["fc6.weight"][0, 0] - 1e4 * first[0]).tolist() == [[100.0 * row + column for column in taps] for row in taps]
    assert torch.equal(small["fc6.weight"][:, 0, 0, 0], 1e4 * first)
    assert torch.equal(small["fc7.weight"][..., 0, 0], (10 * second[:, None] + first).float())
    assert torch.equal(decimate(whole, kernel, 8)["fc6.bias"], filters)  # nothing is shuffled where all are kept
    with pytest.raises(ValueError, match="at most 7 taps per axis and 8 filters"):
        decimate(whole, kernel, 9)


def test_scores_of_branches_are_added_up_in_float32():
    """256 ones and one half in bfloat16, which has 8 bits, would lose the half."""
    maps = [torch.full((1, 1, 1, 1), value, dtype=torch.bfloat16) for value in (256.0, 0.5)]
    assert summed(maps).item() == 256.5


def test_an_encoder_that_cannot_dilate_is_an_error_of_its_own_kind():
    with pytest.raises(DilationError, match="at output stride 8"):
        any_encoder("googlenet", output_stride=8)
    with pytest.raises(ValueError, match="unknown encoder") as unknown:
        any_encoder("resnet35", output_stride=8)
    assert not isinstance(unknown.value, DilationError)


def test_fc6_and_fc7_of_a_vgg_classifier_land_in_the_head():
    state = {
        "classifier.0.weight": torch.randn(12, 2 * 49),
        "classifier.0.bias": torch.randn(12),
        "classifier.3.weight": torch.randn(12, 12),
        "classifier.3.bias": torch.randn(12),
    }
    head = AtrousClassifier(2, 3, Fc6(7, 4, 12))
    head.load_state_dict(head.decimated(state), strict=False)
    torch.testing.assert_close(head.fc6.weight.flatten(1), state["classifier.0.weight"])
    torch.testing.assert_close(head.fc7.weight[..., 0, 0], state["classifier.3.weight"])


@pytest.mark.parametrize(
    "encoder", ["resnet18", "resnet50", "mobilenetv2_100", "efficientnet_b0", "convnext_atto", "regnety_004", "vgg16_bn"]
)
def test_every_encoder_that_can_dilate_gives_maps_at_stride_8(encoder):
    with torch.device("meta"):
        path = atrous_encoder(encoder, output_stride=8).eval()
        assert path.strides[-1] == 8
        assert path(torch.zeros(1, 3, 64, 96)).maps[-1].shape[-2:] == (8, 12)


@pytest.mark.parametrize(("encoder", "stride"), [("swin_tiny_patch4_window7_224", 16), ("vit_tiny_patch16_224", 8)])
def test_an_encoder_that_cannot_dilate_is_refused_with_those_that_can(encoder, stride):
    with torch.device("meta"), pytest.raises(ValueError, match=f"cannot have output stride {stride}.*resnet18/34/50/101.*mobilenetv2_100"):
        atrous_encoder(encoder, output_stride=stride)


def test_illegal_encoders_and_strides_are_refused():
    with torch.device("meta"):
        with pytest.raises(ValueError, match="must be 8, 16 or 32"):
            atrous_encoder("resnet18", output_stride=4)
        with pytest.raises(ValueError, match="Did you mean 'resnet18'"):
            atrous_encoder("resnet18x")
        with pytest.raises(ValueError, match="U-Net's own"):
            atrous_encoder("plain")


@pytest.mark.parametrize("model", GENERAL)
def test_one_image_of_the_smallest_size_trains_every_parameter_of_the_decoder(model):
    torch.manual_seed(0)
    network = build(model, 3, encoder="mobilenetv3_small_050", **({} if model == "deeplab_v2" else {"width": 8})).train()
    side = network.geometry.minimum
    assert side == 32
    network(torch.randn(1, 3, side, side)).square().mean().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in network.decoder.parameters())


@pytest.mark.parametrize("model", GENERAL)
def test_bfloat16_and_channels_last_give_float32_logits(model):
    torch.manual_seed(0)
    network = build(model, 3, encoder="mobilenetv3_small_050").to(memory_format=torch.channels_last).eval()
    image = torch.randn(2, 3, 64, 48).contiguous(memory_format=torch.channels_last)
    with torch.inference_mode():
        with torch.autocast("cpu", torch.bfloat16):
            low = network(image)
        full = network(image)
    assert low.dtype == torch.float32
    assert (low - full).norm() < 0.1 * full.norm()


def test_a_dilated_vgg_sees_at_every_place_what_the_plain_one_sees_at_some():
    """With poolings that only pick a pixel, the dilated map at stride 8 holds the plain one's pixels at stride 16."""
    torch.manual_seed(0)
    plain, dilated = timm.create_model("vgg11", features_only=True).eval(), atrous_encoder("vgg11", output_stride=8).eval()
    dilated.network.load_state_dict(plain.state_dict())
    pools = [[layer for layer in network.modules() if isinstance(layer, nn.MaxPool2d)] for network in (plain, dilated.network)]
    for one, other in zip(*pools, strict=True):
        one.forward = lambda x: x[..., ::2, ::2]
        other.forward = lambda x, stride=other.stride: x[..., ::stride, ::stride]
    image = torch.randn(1, 3, 64, 64)
    with torch.inference_mode():
        coarse, fine = plain(image)[4], dilated(image).maps[4]
    torch.testing.assert_close(fine[..., ::2, ::2], coarse)


def test_context_norm_is_batch_norm_except_for_a_single_value():
    torch.manual_seed(0)
    own, theirs = ContextNorm(4).train(), nn.BatchNorm2d(4).train()
    x = torch.randn(2, 4, 1, 1)
    torch.testing.assert_close(own(x), theirs(x))
    before = own.running_mean.clone()
    torch.testing.assert_close(own(x[:1]), theirs.eval()(x[:1]))
    assert torch.equal(own.running_mean, before)


def test_zoom_puts_corner_pixels_on_corner_pixels():
    x = torch.arange(5.0).expand(1, 1, 5, 5)
    torch.testing.assert_close(zoom(x, (33, 33))[0, 0, 0], torch.arange(33.0) / 8)


@pytest.mark.parametrize("size", [(65, 97), (64, 50)])
def test_torchvision_s_weights_give_torchvision_s_logits(size):
    torch.manual_seed(0)
    theirs = torchvision.models.segmentation.deeplabv3_resnet50(weights=None, weights_backbone=None, num_classes=5, aux_loss=True).eval()
    ours = deeplab_v3_torchvision(5).eval()
    import_weights(ours, theirs.state_dict(), "torchvision")
    image = torch.randn(1, 3, *size)
    with torch.inference_mode():
        expected, got = theirs(image), ours.supervised(image)
    torch.testing.assert_close(got[0], expected["out"], atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(got[1], expected["aux"], atol=1e-5, rtol=1e-5)
    assert ours.loss_weights == (1.0, 0.5)


@pytest.mark.parametrize(("depth", "count"), [(50, 42_004_074), (101, 60_996_202)])
def test_torchvision_s_layout_has_torchvision_s_parameters(depth, count):
    with torch.device("meta"):
        assert sum(p.numel() for p in deeplab_v3_torchvision(21, depth=depth).parameters()) == count
        theirs = getattr(torchvision.models.segmentation, f"deeplabv3_resnet{depth}")(weights=None, weights_backbone=None, aux_loss=True)
        import_weights(deeplab_v3_torchvision(21, depth=depth), theirs.state_dict(), "torchvision")  # every key has its place


@pytest.mark.parametrize("name", ["deeplab_v2", "deeplab_v3"])
def test_rates_choose_how_many_branches_a_pyramid_has_and_how_far_apart_their_taps_lie(name):
    """v3 has a 1x1 branch besides; at output stride 16 the published rates are 3, 6, 9, 12 (v2, halved) and 6, 12, 18 (v3)."""

    def dilations(rates):
        model = build(name, 3, encoder="resnet18", output_stride=16, rates=rates)
        return [layer.dilation[0] for layer in model.decoder.modules() if isinstance(layer, nn.Conv2d) and layer.kernel_size == (3, 3)]

    assert dilations([5]) == [5]
    assert dilations([1, 7]) == [1, 7]
    assert dilations(None) == ([3, 6, 9, 12] if name == "deeplab_v2" else [6, 12, 18])
    for wrong in ([], [6, 0]):
        with pytest.raises(ValueError, match="rates are"):
            build(name, 3, encoder="resnet18", rates=wrong)


@pytest.mark.parametrize(("output_stride", "rates"), [(32, [2, 4, 8]), (16, [4, 8, 16]), (8, [8, 16, 32])])
def test_a_cascade_on_resnet50_adds_the_paper_s_blocks_at_the_paper_s_rates(output_stride, rates):
    """A block of the paper's Fig. 3 holds 13,387,776 parameters (37,062,613 less 23,674,837 of the net); rates times (1, 2, 1)."""
    with torch.device("meta"):
        nets = [
            build("deeplab_v3", 21, "resnet50", modules="cascade", blocks=blocks, output_stride=output_stride, multi_grid=grid)
            for blocks, grid in ((4, None), (5, [1, 2, 1]), (6, [1, 2, 1]), (7, [1, 2, 1]))
        ]
    sizes = [sum(p.numel() for p in net.parameters()) for net in nets]
    assert [more - less for less, more in pairwise(sizes)] == [37_062_613 - 23_674_837] * 3
    found = [layer.dilation[0] for layer in nets[-1].decoder.modules() if isinstance(layer, nn.Conv2d) and layer.kernel_size == (3, 3)]
    assert found == [rate * factor for rate in rates for factor in (1, 2, 1)]


@pytest.mark.parametrize("encoder", ["mobilenetv3_small_050", "swin_tiny_patch4_window7_224", "squeezenet1_0"])
def test_a_cascade_behind_any_encoder_labels_every_pixel_and_trains_every_parameter(encoder):
    torch.manual_seed(0)
    network = build("deeplab_v3", 3, encoder, modules="cascade", blocks=5, multi_grid=[1, 2, 1] if encoder != "squeezenet1_0" else None)
    logits = network.train()(torch.randn(2, 3, 70, 64))
    assert logits.shape == (2, 3, 70, 64)
    logits.square().mean().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() and p.grad.any() for p in network.decoder.parameters())


@pytest.mark.parametrize(
    ("encoder", "output_stride", "rates"),
    [
        ("resnet50", 16, [4, 8]),  # timm's first unit of a block keeps the rate of the block before
        ("resnet50", 8, [2] * 6 + [8, 16]),
        ("resnet18", 16, [4, 8, 8]),  # two convolutions in a unit
        ("mobilenetv2_100", 16, [2, 4, 8]),
        ("regnety_002", 16, [2, 2, 2, 2, 4, 8]),
        ("vgg11", 8, [4, 8]),
        ("res2net50_26w_4s", 16, [4, 4, 4, 8, 8, 8]),  # several convolutions side by side in a unit
        ("mixnet_s", 16, [4] * 4 + [8] * 4),  # kernels of several sizes in a layer
    ],
)
def test_multi_grid_multiplies_the_rates_of_an_encoder_s_last_units(encoder, output_stride, rates):
    network = build("deeplab_v3", 2, encoder, output_stride=output_stride, multi_grid=[1, 2, 4]).encoder
    atrous = [layer for layer in network.modules() if isinstance(layer, nn.Conv2d) and layer.dilation[0] > 1]
    assert [layer.dilation[0] for layer in atrous] == rates
    assert all(
        layer.padding == tuple(rate * (side // 2) for rate, side in zip(layer.dilation, layer.kernel_size, strict=True)) for layer in atrous
    )


def test_multi_grid_keeps_weights_and_sizes_and_changes_what_is_seen():
    plain, spread = (build("deeplab_v3plus", 2, "mobilenetv2_100", multi_grid=grid).eval() for grid in (None, [1, 2, 4]))
    spread.load_state_dict(plain.state_dict())
    image = torch.randn(1, 3, 96, 96)
    with torch.inference_mode():
        maps, others = plain.encoder(image).maps, spread.encoder(image).maps
    assert [m.shape for m in maps] == [m.shape for m in others]
    assert all(torch.equal(a, b) for a, b in zip(maps[:-1], others[:-1], strict=True))
    assert not torch.allclose(maps[-1], others[-1], atol=1e-3)


def test_illegal_modules_are_refused_with_what_is_legal():
    for options, message in (
        ({"modules": "both"}, "Known: aspp, cascade"),
        ({"blocks": 5}, "4 to 7 with modules 'cascade'"),
        ({"modules": "cascade", "blocks": 8}, "4 to 7 with modules 'cascade'"),
        ({"modules": "cascade", "rates": [6], "image_pooling": True}, "image_pooling and rates: a part of modules 'aspp'"),
        ({"multi_grid": [1, 2]}, "three whole numbers"),
        ({"multi_grid": [1, 2, 0]}, "at least 1"),
        ({"multi_grid": [1, 2, 1.5]}, "whole numbers"),
        ({"modules": "cascade", "width": 64}, "width: a part of modules 'aspp'"),
        ({"multi_grid": [1, 2, 4], "output_stride": 32}, "fewer than two units of encoder 'resnet18' dilate"),
    ):
        with torch.device("meta"), pytest.raises(ValueError, match=message):
            build("deeplab_v3", 2, "resnet18", **options)


@pytest.mark.parametrize("dropout", [0.0, 0.7])
def test_the_paper_s_cascade_refuses_dropout_which_only_the_pyramid_has(dropout):
    with torch.device("meta"):
        with pytest.raises(ValueError, match="dropout is a part of modules 'aspp'; a cascade has none"):
            build("deeplab_v3_paper", 2, modules="cascade", depth=50, dropout=dropout)
        for asked, share in ((None, 0.1), (dropout, dropout)):
            decoder = build("deeplab_v3_paper", 2, depth=50, dropout=asked).decoder
            assert [layer.p for layer in decoder.modules() if isinstance(layer, nn.Dropout)] == [share]


@pytest.mark.parametrize(
    ("name", "options"), [("deeplab_v1", {}), ("deeplab_v3", {}), ("deeplab_v3plus", {}), ("deeplab_v3plus", {"variant": "smp"})]
)
def test_a_head_without_maps_is_refused(name, options):
    with torch.device("meta"), pytest.raises(ValueError, match="width is 0; it must be at least 1"):
        build(name, 2, "resnet18", width=0, **options)
