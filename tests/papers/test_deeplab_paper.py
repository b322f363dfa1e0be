"""DeepLab v1 to v3+ as published: arXiv:1412.7062, 1606.00915, 1706.05587 and 1802.02611, and the authors' released nets."""

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from perpixel.models.deeplab_v1 import VARIANTS, deeplab_v1_paper
from perpixel.models.deeplab_v2 import deeplab_v2_resnet101_paper, deeplab_v2_vgg16_paper
from perpixel.models.deeplab_v3 import deeplab_v3_paper, deeplab_v3plus_paper
from perpixel.models.resnet import strides_and_rates


def parameters(builder, **options):
    """(all, frozen) for 21 classes."""
    with torch.device("meta"):
        model = builder(21, **options)
    return sum(p.numel() for p in model.parameters()), sum(p.numel() for p in model.parameters() if not p.requires_grad)


@pytest.mark.parametrize(
    ("options", "count"),
    [
        ({}, 20_505_429),
        ({"variant": "7x7"}, 134_346_581),
        ({"variant": "4x4"}, 65_140_565),
        ({"variant": "4x4_r8"}, 65_140_565),
        ({"multi_scale": True}, 21_711_550),
    ],
)
def test_v1_has_as_many_parameters_as_published(options, count):
    assert parameters(deeplab_v1_paper, **options) == (count, 0)


def test_v2_has_as_many_parameters_as_released_and_resnet_s_norms_are_frozen():
    assert parameters(deeplab_v2_vgg16_paper) == (37_877_652, 0)
    assert parameters(deeplab_v2_vgg16_paper, variant="aspp_s") == (37_877_652, 0)
    assert parameters(deeplab_v2_resnet101_paper) == (44_048_532, 105_344)
    assert parameters(deeplab_v2_resnet101_paper, variant="largefov")[0] == 42_887_253


def test_v3_and_its_decoder_have_the_parameters_of_the_released_nets():
    assert parameters(deeplab_v3_paper) == (58_164_437, 0)
    assert parameters(deeplab_v3_paper, depth=50)[0] == 39_172_309
    assert parameters(deeplab_v3_paper, variant="7x7")[0] == 58_040_661
    assert parameters(deeplab_v3plus_paper)[0] == 59_468_085
    assert parameters(deeplab_v3plus_paper, depth=50)[0] == 40_475_957


@pytest.mark.parametrize(
    ("depth", "counts"),
    [(50, (23_674_837, 37_062_613, 50_450_389, 63_838_165)), (101, (42_666_965, 56_054_741, 69_442_517, 82_830_293))],
)
def test_a_cascade_grows_by_one_block_at_a_time(depth, counts):
    got = tuple(parameters(deeplab_v3_paper, depth=depth, modules="cascade", blocks=blocks)[0] for blocks in (4, 5, 6, 7))
    assert got == counts


@pytest.mark.parametrize("variant", [*VARIANTS, "multi_scale"])
def test_v1_trains_on_41_pixels_of_321_and_predicts_all(variant):
    options = {"multi_scale": True} if variant == "multi_scale" else {"variant": variant}
    with torch.device("meta"):
        model = deeplab_v1_paper(21, width=4, **options)
        shapes = [tuple(x.shape) for x in model.supervised(torch.zeros(1, 3, 321, 321))]
        assert model.encoder(torch.zeros(1, 3, 513, 513)).maps[-1].shape[-1] == 65
        assert model(torch.zeros(1, 3, 321, 321)).shape == (1, 21, 321, 321)
    assert shapes == [(1, 21, 41, 41)]
    assert model.loss_weights == (1.0,)


def test_v2_on_three_scales_takes_four_losses_on_maps_of_41_31_and_21():
    with torch.device("meta"):
        model = deeplab_v2_resnet101_paper(21, depth=50, width=4)
        sides = [x.shape[-1] for x in model.supervised(torch.zeros(1, 3, 321, 321))]
    assert sides == [41, 41, 31, 21]
    assert model.loss_weights == (1.0, 1.0, 1.0, 1.0)


def test_vgg_s_maps_have_the_sizes_of_the_released_net():
    with torch.device("meta"):
        maps = deeplab_v1_paper(21, width=4).encoder(torch.zeros(1, 3, 321, 321)).maps
    assert [m.shape[-1] for m in maps] == [161, 81, 41, 41, 41]


@pytest.mark.parametrize(("output_stride", "side", "rates"), [(16, 33, [2, 4, 8]), (8, 65, [4, 8, 16])])
def test_v3_s_maps_and_rates_at_513(output_stride, side, rates):
    """Sheet of the released net: 129 at stride 4, multi-grid (1, 2, 4) times the rate of block 4."""
    with torch.device("meta"):
        model = deeplab_v3_paper(21, depth=50, width=4, output_stride=output_stride)
        maps = model.encoder(torch.zeros(1, 3, 513, 513)).maps
    assert [m.shape[-1] for m in maps] == [129, side]
    assert [unit.convolve[0].dilation[0] for unit in model.encoder.blocks[3]] == rates


def test_strides_sit_where_slim_and_msra_put_them():
    slim = strides_and_rates((3, 4, 6, 3), 16, "slim", (1, 2, 4))
    assert slim == [[(1, 1)] * 2 + [(2, 1)], [(1, 1)] * 3 + [(2, 1)], [(1, 1)] * 6, [(1, 2), (1, 4), (1, 8)]]
    msra = strides_and_rates((3, 4, 23, 3), 8, "msra")
    assert msra == [[(1, 1)] * 3, [(2, 1)] + [(1, 1)] * 3, [(1, 2)] * 23, [(1, 4)] * 3]
    cascade = strides_and_rates((3, 4, 6, 3, 3, 3, 3), 16, "slim")
    assert [block[0][1] for block in cascade[3:]] == [2, 4, 8, 16]
    wide = strides_and_rates((3, 4, 6, 3, 3, 3, 3), 256, "slim")
    assert [block[-1][0] for block in wide] == [2] * 6 + [1]


def walked(layers):
    """Side of the receptive field and stride of a chain of convolutions and poolings."""
    field, stride = 1, 1
    for layer in layers:
        kernel, step, rate = (value if isinstance(value, int) else value[0] for value in (layer.kernel_size, layer.stride, layer.dilation))
        field, stride = field + (kernel - 1) * rate * stride, stride * step
    return field, stride


def chain(encoder):
    """The layers on the longest way through a ResNet."""
    yield from (layer for layer in encoder.stem if isinstance(layer, nn.Conv2d))
    yield encoder.pool
    for block in encoder.blocks:
        for unit in block:
            yield from (unit.reduce[0], unit.convolve[0], unit.expand[0])


@pytest.mark.parametrize(
    ("builder", "options", "field", "stride"),
    [
        (deeplab_v3_paper, {"depth": 50}, 743, 16),
        (deeplab_v3_paper, {"depth": 101}, 1287, 16),
        (deeplab_v3_paper, {"depth": 101, "output_stride": 8}, 1287, 8),
        (deeplab_v2_resnet101_paper, {"multi_scale": False}, 1027, 8),
    ],
)
def test_a_resnet_sees_as_far_as_its_layer_table_says(builder, options, field, stride):
    with torch.device("meta"):
        assert walked(chain(builder(21, width=1, **options).encoder)) == (field, stride)


def positive(model):
    """Every weight 0.1, biases and means 0: then no gradient cancels, and it is above 0 exactly where a pixel is seen."""
    for name, value in [*model.named_parameters(), *model.named_buffers()]:
        if value.is_floating_point() and "running" not in name:
            value.data.fill_(0.1 if value.ndim > 1 else float(name.endswith("weight")))
    return model.double().eval()


def measured(scores, image):
    """Columns of `image` from the first to the last that a score depends on."""
    scores.sum().backward()
    seen = image.grad.abs().sum((0, 1, 2)).nonzero().flatten()
    return int(seen[-1] - seen[0]) + 1


def averaged(model):
    """Max pooling hands its gradient to one pixel of the window; an average of the same shape shows all that it looks at."""
    for parent in list(model.modules()):
        for name, layer in list(parent.named_children()):
            if isinstance(layer, nn.MaxPool2d) and layer.kernel_size > 1:
                setattr(parent, name, nn.AvgPool2d(layer.kernel_size, layer.stride, layer.padding, layer.ceil_mode))
            elif isinstance(layer, nn.MaxPool2d):
                layer.forward = lambda x, stride=layer.stride: x[..., ::stride, ::stride]
    return model


def test_largefov_sees_435_pixels():
    """Sheet of the released net: 3x3 poolings and pool5a included. Measured along one row of a narrow image."""
    model = averaged(positive(deeplab_v1_paper(1, 1, width=1)))
    image = torch.ones(1, 1, 9, 633, dtype=torch.float64, requires_grad=True)
    scores = model.decoder.scores(model.encoder(image))
    assert measured(scores[..., scores.shape[-1] // 2], image) == 435


@pytest.mark.parametrize(("variant", "field"), [("aspp_s", 419), ("aspp_l", 611)])
def test_the_pyramid_on_vgg_sees_as_far_as_its_largest_rate(variant, field):
    model = averaged(positive(deeplab_v2_vgg16_paper(1, 1, width=1, variant=variant)))
    image = torch.ones(1, 1, 9, 833, dtype=torch.float64, requires_grad=True)
    scores = model.decoder.scores(model.encoder(image))
    assert measured(scores[..., scores.shape[-1] // 2], image) == field


def test_a_narrow_v3_trunk_sees_743_pixels():
    encoder = averaged(positive(deeplab_v3_paper(1, 1, depth=50, width=1).encoder))
    image = torch.ones(1, 1, 17, 961, dtype=torch.float64, requires_grad=True)
    last = encoder(image).maps[-1]
    assert measured(last[..., last.shape[-1] // 2], image) == 743


def test_scores_learn_ten_times_as_fast_and_no_bias_decays():
    model = deeplab_v1_paper(3, width=4)
    factors = model.multipliers
    assert factors["decoder.head.1.fc8.weight"] == (10.0, 1.0)
    assert factors["decoder.head.1.fc8.bias"] == (20.0, 0.0)
    others = [name for name, _ in model.named_parameters() if name.endswith("bias") and "fc8" not in name]
    assert len(others) == 15
    assert all(factors[name] == (2.0, 0.0) for name in others)
    assert len(factors) == 17
    assert set(deeplab_v2_resnet101_paper(3, depth=50, width=2).multipliers.values()) == {(10.0, 1.0), (20.0, 0.0)}


def test_scores_start_from_n_0_01_and_those_of_side_branches_from_n_0_001():
    torch.manual_seed(0)
    model = deeplab_v1_paper(21, width=32, multi_scale=True)
    assert model.decoder.head[1].fc8.weight.std().item() == pytest.approx(0.01, rel=0.05)
    assert model.decoder.branches[4][0].weight.std().item() == pytest.approx(0.001, rel=0.05)
    assert not model.decoder.head[1].fc8.bias.any()


def test_average_pooling_before_fc6_counts_its_padding():
    pool = deeplab_v1_paper(3, width=1).decoder.head[0]
    assert pool(torch.ones(1, 1, 3, 3))[0, 0, 0].tolist() == pytest.approx([4 / 9, 6 / 9, 4 / 9])


def test_frozen_norms_stay_as_they_are_in_training():
    torch.manual_seed(0)
    model = deeplab_v2_resnet101_paper(2, depth=50, width=2).train()
    before = {name: value.clone() for name, value in model.named_buffers()}
    assert all(p.isfinite().all() and p.abs().max() < 1e3 for p in model.supervised(torch.randn(1, 3, 33, 33)))
    assert all(torch.equal(value, before[name]) for name, value in model.named_buffers())


def test_fusion_takes_the_largest_score_of_the_scales():
    torch.manual_seed(0)
    model = deeplab_v2_resnet101_paper(2, depth=50, width=2).eval()
    with torch.no_grad():
        fused, whole, *smaller = model.supervised(torch.randn(1, 3, 65, 65))
        for x in smaller:
            resized = nn.functional.interpolate(x, size=whole.shape[-2:], mode="bilinear", align_corners=True)
            whole = torch.maximum(whole, resized)
    torch.testing.assert_close(fused, whole)


def test_v2_on_several_scales_starts_from_a_bundle_of_itself_and_from_one_of_a_single_scale(tmp_path):
    torch.manual_seed(0)
    for scales in (True, False):
        trained = deeplab_v2_resnet101_paper(2, depth=50, width=2, multi_scale=scales)
        save_file(trained.state_dict(), tmp_path / "own.safetensors")
        started = deeplab_v2_resnet101_paper(5, depth=50, width=2, encoder_weights=tmp_path / "own.safetensors")
        first, second = (dict(model.encoder.named_parameters()) for model in (trained, started))
        assert all(torch.equal(value, first[name if scales else name.removeprefix("trunk.")]) for name, value in second.items())
    with pytest.raises(ValueError, match=r"own\.safetensors: not the weights of this encoder: it has .* where the encoder has") as refused:
        deeplab_v3_paper(2, depth=50, width=2, encoder_weights=tmp_path / "own.safetensors")
    assert len(str(refused.value)) < 300


def test_weights_trained_at_output_stride_16_predict_at_8():
    sixteen, eight = (deeplab_v3_paper(2, depth=50, width=2, output_stride=stride) for stride in (16, 8))
    eight.load_state_dict(sixteen.state_dict())


@pytest.mark.parametrize("builder", [deeplab_v3_paper, deeplab_v3plus_paper])
def test_v3_trains_on_one_image_of_its_smallest_size(builder):
    torch.manual_seed(0)
    model = builder(3, depth=50, width=2).train()
    side = model.geometry.minimum
    model(torch.randn(1, 3, side, side)).square().mean().backward()
    assert side == 17
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())


def test_illegal_options_name_the_legal_ones():
    for builder, options, message in (
        (deeplab_v1_paper, {"variant": "small"}, "Known: largefov, 7x7, 4x4, 4x4_r8"),
        (deeplab_v2_vgg16_paper, {"variant": "aspp"}, "Known: aspp_l, aspp_s, largefov"),
        (deeplab_v3_paper, {"modules": "both"}, "Known: aspp, cascade"),
        (deeplab_v3_paper, {"blocks": 5}, "4 to 7 with modules 'cascade', and 4 with 'aspp'"),
        (deeplab_v3_paper, {"depth": 34}, "one of 50, 101"),
        (deeplab_v3_paper, {"output_stride": 64}, "from 8 to 32"),
        (deeplab_v3_paper, {"multi_grid": (1, 2)}, "three whole numbers"),
        (deeplab_v3_paper, {"encoder_weights": True}, "give a file"),
    ):
        with torch.device("meta"), pytest.raises(ValueError, match=message):
            builder(2, width=1, **options)


def test_multi_grid_is_an_option_of_every_block_from_the_fourth():
    plan = strides_and_rates((3, 4, 6, 3, 3), 16, "slim", (1, 2, 1))
    assert [[rate for _, rate in block] for block in plan[3:]] == [[2, 4, 2], [4, 8, 4]]
    assert all(first == 1 for block in plan[:3] for _, first in block)
