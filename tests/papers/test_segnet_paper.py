"""SegNet as published: arXiv:1511.00561, Fig. 2, sec. 3.1, Table 1, and the authors' layer files; Bayesian SegNet: arXiv:1511.02680."""

import math

import pytest
import torch
from torch import nn

from perpixel.models import bayesian_segnet_basic_paper, bayesian_segnet_paper, segnet_basic_paper, segnet_paper
from perpixel.models.segnet_basic import VARIANTS
from perpixel.models.unpooling import PoolThenDrop
from perpixel.optimisation import make_optimizer
from perpixel.recipe import TrainSection

# (channels, height, width) after every convolution at 360x480 and 11 classes, from the image to the logits.
SEGNET = [
    *[(64, 360, 480)] * 2, *[(128, 180, 240)] * 2, *[(256, 90, 120)] * 3, *[(512, 45, 60)] * 3, *[(512, 23, 30)] * 3,
    *[(512, 23, 30)] * 3, *[(512, 45, 60)] * 2, (256, 45, 60), *[(256, 90, 120)] * 2, (128, 90, 120),
    (128, 180, 240), (64, 180, 240), (64, 360, 480), (11, 360, 480),
]  # fmt: skip
BASIC = [
    (64, 360, 480), (64, 180, 240), (64, 90, 120), (64, 45, 60),
    (64, 45, 60), (64, 90, 120), (64, 180, 240), (64, 360, 480), (11, 360, 480),
]  # fmt: skip


def parameters(model):
    return sum(p.numel() for p in model.parameters())


def convolutions(model):
    return [layer for layer in model.modules() if isinstance(layer, nn.Conv2d)]


@pytest.mark.parametrize(("builder", "published"), [(segnet_paper, SEGNET), (segnet_basic_paper, BASIC)])
def test_every_convolution_has_the_published_size_and_channels(builder, published):
    """45 rows become 23 and 12 (rounded up) and come back: 12, 23, 45, 90, 180, 360."""
    table = []
    with torch.device("meta"):
        model = builder(11).eval()
        for layer in convolutions(model):
            layer.register_forward_hook(lambda layer, inputs, output: table.append(tuple(output.shape[1:])))
        logits = model(torch.zeros(1, 3, 360, 480))
    assert table == published
    assert logits.shape == (1, 11, 360, 480)


@pytest.mark.parametrize(("classes", "count"), [(11, 29_449_355), (37, 29_464_357), (21, 29_455_125)])
def test_segnet_has_the_published_parameters(classes, count):
    """117 MB for 11 classes in Table 6: 4 bytes each."""
    with torch.device("meta"):
        model = segnet_paper(classes)
        assert parameters(model) == count
        assert parameters(model.encoder) == 14_714_688 + 8_448  # convolutions of VGG-16, and norms
        assert all(p.requires_grad for p in model.parameters())


def by_hand(classes, maps=64):
    """Parameters of each variant of Table 1, counted from its description."""
    norm = 2 * maps
    path = (7 * 7 * 3 * maps + maps + norm) + 3 * (7 * 7 * maps * maps + maps + norm)
    classify = maps * classes + classes
    dense, single = 7 * 7 * maps * maps + maps + norm, 7 * 7 * maps + maps + norm
    return {
        "bilinear": path + classify,
        "basic": path + 4 * dense + classify,
        "encoder_addition": path + 4 * dense + classify,
        "single_channel": path + 4 * single + classify,
        "fcn": path + 4 * classify + 4 * 8 * 8 * classes * classes,
        "fcn_no_addition": path + classify + 4 * 8 * 8 * classes * classes,
        "fcn_no_reduction": path + 4 * 8 * 8 * maps * maps + classify,
        "fcn_no_addition_no_reduction": path + 4 * 8 * 8 * maps * maps + classify,
    }


PUBLISHED = {
    "bilinear": 0.625, "basic": 1.425, "encoder_addition": 1.425, "single_channel": 0.625,
    "fcn": 0.65, "fcn_no_addition": 0.65, "fcn_no_reduction": 1.625, "fcn_no_addition_no_reduction": 1.625,
}  # fmt: skip


@pytest.mark.parametrize("variant", PUBLISHED)
def test_variants_of_table_1_have_the_parameters_of_their_description(variant):
    """The paper rounds to 25,000 and no way of counting gives all of its figures: within 2.5 percent of each."""
    with torch.device("meta"):
        count = parameters(segnet_basic_paper(11, variant=variant))
    assert count == by_hand(11)[variant]
    assert abs(count / 1e6 / PUBLISHED[variant] - 1) < 0.025


def test_segnet_basic_has_the_parameters_of_the_authors_files():
    with torch.device("meta"):
        assert parameters(segnet_basic_paper(11)) == 1_416_587
    assert set(PUBLISHED) == set(VARIANTS)


def test_every_convolution_but_the_last_is_followed_by_batch_norm_and_relu():
    layers = [m for m in segnet_paper(11, width=2).modules() if isinstance(m, nn.Conv2d | nn.BatchNorm2d | nn.ReLU)]
    assert [type(m) for m in layers] == [nn.Conv2d, nn.BatchNorm2d, nn.ReLU] * 25 + [nn.Conv2d]
    assert {m.kernel_size for m in layers if isinstance(m, nn.Conv2d)} == {(3, 3)}


def test_the_decoder_of_segnet_basic_has_no_relu():
    model = segnet_basic_paper(11, width=2)
    kinds = nn.Conv2d | nn.BatchNorm2d | nn.ReLU
    assert [type(m) for m in model.encoder.modules() if isinstance(m, kinds)] == [nn.Conv2d, nn.BatchNorm2d, nn.ReLU] * 4
    assert [type(m) for m in model.decoder.modules() if isinstance(m, kinds)] == [nn.Conv2d, nn.BatchNorm2d] * 4 + [nn.Conv2d]
    assert [m.kernel_size[0] for m in convolutions(model)] == [7] * 8 + [1]


def test_segnet_basic_normalises_across_bands_as_caffe_does():
    """x / (1 + alpha / n * sum of squares over n bands)^beta, n = 5, alpha = 1e-4, beta = 0.75."""
    x = 100 * torch.randn(1, 4, 2, 2, dtype=torch.float64)
    expected = torch.empty_like(x)
    for band in range(4):
        around = x[:, max(0, band - 2) : band + 3].square().sum(1)
        expected[:, band] = x[:, band] / (1 + 1e-4 / 5 * around) ** 0.75
    torch.testing.assert_close(segnet_basic_paper(2, 4, width=1).encoder.normalise(x), expected)


@pytest.mark.parametrize("builder", [segnet_paper, segnet_basic_paper])
def test_initial_weights_are_he_s_with_shift_one_thousandth(builder):
    torch.manual_seed(0)
    for name, layer in builder(11, width=16).named_modules():
        if isinstance(layer, nn.BatchNorm2d):
            assert (layer.weight == 1).all()
            assert (layer.bias == 0.001).all()
        elif isinstance(layer, nn.Conv2d):
            sigma, n = math.sqrt(2 / layer.weight[0].numel()), layer.weight.numel()
            assert abs(layer.weight.std().item() / sigma - 1) < 5 / math.sqrt(2 * n), name
            assert not layer.bias.any(), name


@pytest.mark.parametrize(("builder", "shift_decays"), [(segnet_paper, False), (segnet_basic_paper, True)])
def test_biases_learn_twice_as_fast_and_only_they_and_the_full_net_s_shifts_do_not_decay(builder, shift_decays):
    model = builder(3, width=1)
    section = TrainSection(optimizer="sgd", lr=0.1, weight_decay=5e-4)
    groups = {id(p): group for group in make_optimizer(model, section).param_groups for p in group["params"]}
    for layer in model.modules():
        if isinstance(layer, nn.Conv2d | nn.BatchNorm2d):
            weight, bias = groups[id(layer.weight)], groups[id(layer.bias)]
            assert (weight["scale"], weight["weight_decay"]) == (1, 5e-4)
            expected = (2, 0) if isinstance(layer, nn.Conv2d) else (1, 5e-4 if shift_decays else 0)
            assert (bias["scale"], bias["weight_decay"]) == expected


@pytest.mark.parametrize(("builder", "seen", "stride"), [(segnet_paper, 212, 32), (segnet_basic_paper, 106, 16)])
def test_the_last_pooled_map_is_seen_through_the_published_pixels(builder, seen, stride):
    """Measured: one column becomes NaN, which spreads to all that depends on it. pool5 of the full net, pool4 of Basic."""
    torch.manual_seed(0)
    path = builder(2, width=1).encoder.eval()
    side = (seen // stride + 5) * stride
    with torch.inference_mode():
        depends = torch.stack([path(marked(column, side)).maps[-1][0, 0, 0].isnan() for column in range(side)])
    middle = depends.shape[1] // 2
    first, last = (int(depends[:, middle].nonzero()[i]) for i in (0, -1))
    assert last - first + 1 == int(depends[:, middle].sum()) == seen
    assert int(depends[:, middle + 1].nonzero()[0]) - first == stride
    assert path.strides[-1] == stride


def marked(column, side, height=16):
    image = torch.zeros(1, 3, height, side)
    image[..., column] = torch.nan
    return image


@pytest.mark.parametrize("variant", VARIANTS)
def test_every_variant_labels_every_pixel_of_odd_images(variant):
    torch.manual_seed(0)
    model = segnet_basic_paper(3, 2, width=4, variant=variant).train()
    logits = model(torch.randn(1, 2, 37, 51))
    assert logits.shape == (1, 3, 37, 51)
    logits.square().mean().backward()
    assert all(p.grad is not None for p in model.parameters())


@pytest.mark.parametrize("variant", ["fcn", "fcn_no_reduction"])
def test_deconvolutions_start_as_bilinear_interpolation(variant):
    model = segnet_basic_paper(3, width=4, variant=variant)
    x = torch.randn(1, model.decoder.up[0].in_channels, 9, 9)
    expected = nn.functional.interpolate(x, scale_factor=2, mode="bilinear", align_corners=False)
    assert [up.kernel_size for up in model.decoder.up] == [(8, 8)] * 4
    for up in model.decoder.up:
        torch.testing.assert_close(up(x)[..., 2:-2, 2:-2], expected[..., 2:-2, 2:-2])


def test_the_addition_variants_add_a_map_of_the_encoder_in_each_stage():
    """With a decoder that says nothing, logits depend on the encoder maps alone: before pooling for indices, pooled for FCN."""
    torch.manual_seed(0)
    model = segnet_basic_paper(2, width=3, variant="encoder_addition").eval()
    for stage in model.decoder.stages:
        nn.init.zeros_(stage[0].weight)
        nn.init.zeros_(stage[1].bias)
    image = torch.randn(1, 3, 20, 28)
    finest = model.encoder.stages[0](model.encoder.normalise(image))
    torch.testing.assert_close(model(image), model.decoder.classify(finest))
    fcn = segnet_basic_paper(2, width=3, variant="fcn").eval()
    with torch.no_grad():
        fcn.decoder.up[2].weight.zero_()
        pooled = fcn.encoder(image).maps[0]
        torch.testing.assert_close(fcn(image), fcn.decoder.up[3](fcn.decoder.reduce[3](pooled)))


def test_dropout_stands_in_the_centre_of_the_bayesian_nets():
    """After pool3 to pool5 and conv5_1_D, conv4_1_D, conv3_1_D; in Basic after pool3, pool4, conv_decode4 and conv_decode3."""
    for builder, pools, stages in (
        (bayesian_segnet_paper, [0, 0, 0.5, 0.5, 0.5], [0.5, 0.5, 0.5, 0, 0]),
        (bayesian_segnet_basic_paper, [0, 0, 0.5, 0.5], [0.5, 0.5, 0, 0]),
    ):
        model = builder(2, width=1)
        assert [pool.drop.p if isinstance(pool, PoolThenDrop) else 0 for pool in model.encoder.pools] == pools
        assert [drop.p for drop in model.decoder.drops] == stages
        assert {type(m) for m in model.modules() if "Dropout" in type(m).__name__} == {nn.Dropout}  # of values, not of maps


def test_plain_and_bayesian_nets_take_each_other_s_weights():
    model, plain = bayesian_segnet_paper(2, width=2).eval(), segnet_paper(2, width=2).eval()
    plain.load_state_dict(model.state_dict())
    image = torch.randn(1, 3, 33, 40)
    torch.testing.assert_close(plain(image), model(image))
