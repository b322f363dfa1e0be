"""FCN as released: Long, Shelhamer & Darrell 2015, arXiv:1411.4038, and the prototxts of the authors' release."""

from itertools import pairwise

import pytest
import torch
from torch import nn
from torch.nn import functional

from perpixel.models import fcn8s_atonce_paper, fcn8s_paper, fcn16s_paper, fcn32s_alexnet_paper, fcn32s_paper, start_from
from perpixel.models.fcn import bilinear_kernel
from perpixel.optimisation import make_optimizer
from perpixel.recipe import TrainSection

ON_VGG16 = [fcn32s_paper, fcn16s_paper, fcn8s_paper, fcn8s_atonce_paper]
LAYERS = nn.Conv2d | nn.ConvTranspose2d | nn.MaxPool2d

# (channels, side at 500x500, parameters) of every layer as it runs, from the prototxts.
VGG16 = [
    (64, 698, 1_792), (64, 698, 36_928), (64, 349, 0),
    (128, 349, 73_856), (128, 349, 147_584), (128, 175, 0),
    (256, 175, 295_168), (256, 175, 590_080), (256, 175, 590_080), (256, 88, 0),
    (512, 88, 1_180_160), (512, 88, 2_359_808), (512, 88, 2_359_808), (512, 44, 0),
    (512, 44, 2_359_808), (512, 44, 2_359_808), (512, 44, 2_359_808), (512, 22, 0),
    (4096, 16, 102_764_544), (4096, 16, 16_781_312), (21, 16, 86_037),
]  # fmt: skip
FCN32S = [*VGG16, (21, 544, 1_806_336)]
FCN16S = [*VGG16, (21, 34, 7_056), (21, 44, 10_773), (21, 560, 451_584)]
FCN8S = [*VGG16, (21, 34, 7_056), (21, 44, 10_773), (21, 70, 7_056), (21, 88, 5_397), (21, 568, 112_896)]
ALEXNET = [
    (96, 173, 34_944), (96, 86, 0), (256, 86, 307_456), (256, 43, 0), (384, 43, 885_120), (384, 43, 663_936), (256, 43, 442_624),
    (256, 21, 0), (4096, 16, 37_752_832), (4096, 16, 16_781_312), (21, 16, 86_037), (21, 543, 1_750_329),
]  # fmt: skip


def on_meta(build, classes=21, **options):
    with torch.device("meta"):
        return build(classes, **options).eval()


def run_table(model, height, width):
    table = []

    def note(layer, inputs, output):
        table.append((output.shape[1], output.shape[-2], output.shape[-1], sum(p.numel() for p in layer.parameters())))

    hooks = [layer.register_forward_hook(note) for layer in model.modules() if isinstance(layer, LAYERS)]
    model(torch.zeros(1, 3, height, width, device="meta"))
    for hook in hooks:
        hook.remove()
    return table


@pytest.mark.parametrize(
    ("build", "published"),
    [(fcn32s_paper, FCN32S), (fcn16s_paper, FCN16S), (fcn8s_paper, FCN8S), (fcn8s_atonce_paper, FCN8S), (fcn32s_alexnet_paper, ALEXNET)],
)
def test_every_layer_has_the_released_size_channels_and_parameters(build, published):
    table = run_table(on_meta(build), 500, 500)
    assert [(channels, height, parameters) for channels, height, _, parameters in table] == published
    assert [height for _, height, _, _ in table] == [width for _, _, width, _ in table]


@pytest.mark.parametrize(
    ("side", "pools", "fc6", "upscores"),
    [
        (500, (88, 44, 22), 16, (34, 70, 568, 560, 544)),
        (375, (72, 36, 18), 12, (26, 54, 440, 432, 416)),
        (333, (67, 34, 17), 11, (24, 50, 408, 400, 384)),
        (256, (57, 29, 15), 9, (20, 42, 344, 336, 320)),
    ],
)
def test_maps_have_the_sizes_of_caffe_which_rounds_poolings_up(side, pools, fc6, upscores):
    heights = [row[1] for row in run_table(on_meta(fcn8s_paper), side, 500)]
    assert (heights[9], heights[13], heights[17]) == pools
    assert heights[18] == fc6
    assert (heights[21], heights[23], heights[25]) == upscores[:3]
    assert run_table(on_meta(fcn16s_paper), side, 500)[-1][1] == upscores[3]
    assert run_table(on_meta(fcn32s_paper), side, 500)[-1][1] == upscores[4]


@pytest.mark.parametrize(
    ("build", "classes", "trainable", "frozen"),
    [
        (fcn32s_paper, 21, 134_346_581, 1_806_336),
        (fcn16s_paper, 21, 134_357_354, 458_640),
        (fcn8s_paper, 21, 134_362_751, 127_008),
        (fcn8s_atonce_paper, 21, 134_362_751, 127_008),
        (fcn32s_paper, 40, 134_424_424, 6_553_600),
        (fcn8s_paper, 60, 134_552_564, 1_036_800),
        (fcn32s_alexnet_paper, 21, 56_954_261, 1_750_329),
    ],
)
def test_parameters_are_as_many_as_released(build, classes, trainable, frozen):
    """Table 1 of the paper rounds them to 134M and 57M."""
    parameters = list(on_meta(build, classes).parameters())
    assert sum(p.numel() for p in parameters if p.requires_grad) == trainable
    assert sum(p.numel() for p in parameters if not p.requires_grad) == frozen


@pytest.mark.parametrize("build", [*ON_VGG16, fcn32s_alexnet_paper])
def test_images_of_any_size_are_labelled_whole(build):
    model = on_meta(build, 2, width=6)
    for side in (*range(1, 66), 97, 131):
        size = (side, 2 * side + 1)
        assert model(torch.zeros(1, 3, *size, device="meta")).shape[-2:] == size


def read_field(model, maps_index):
    """(first, last) image column that each of two neighbours on an encoder's map depends on: the gradient, all weights positive.

    Maxima would pass the gradient to one position only, so poolings average here; their windows are the same.
    """
    model.double().eval()
    for parent in model.modules():
        for name, layer in list(parent.named_children()):
            if isinstance(layer, nn.MaxPool2d):
                setattr(parent, name, nn.AvgPool2d(layer.kernel_size, layer.stride, layer.padding, ceil_mode=layer.ceil_mode))
            if isinstance(layer, nn.LocalResponseNorm):
                setattr(parent, name, nn.Identity())
    for parameter in model.parameters():
        parameter.data.abs_().add_(1e-3)
    image = torch.ones(1, 3, 8, 700, dtype=torch.float64, requires_grad=True)
    rows = model.encoder(image).maps[maps_index][0, 0]
    line = rows[len(rows) // 2]
    fields = []
    for position in (len(line) // 2, len(line) // 2 + 1):
        (gradient,) = torch.autograd.grad(line[position], image, retain_graph=True)
        columns = gradient[0].abs().sum((0, 1)).nonzero()
        fields.append((int(columns.min()), int(columns.max())))
    return fields


@pytest.mark.parametrize(
    ("build", "width", "index", "field", "stride"),
    [
        (fcn8s_paper, 1, 4, 404, 32),
        (fcn8s_paper, 1, 3, 100, 16),
        (fcn8s_paper, 1, 2, 44, 8),
        (fcn32s_alexnet_paper, 6, 2, 355, 32),
    ],
)
def test_receptive_field_and_output_stride_are_as_published(build, width, index, field, stride):
    """Table 1: 404 and 355 pixels, stride 32; measured."""
    torch.manual_seed(0)
    (first, last), (next_first, _) = read_field(build(2, width=width, dropout=0.0), index)
    assert last - first + 1 == field
    assert next_first - first == stride


def test_bilinear_kernels_are_those_of_the_release():
    line = torch.tensor([0.25, 0.75, 0.75, 0.25])
    torch.testing.assert_close(bilinear_kernel(4), torch.outer(line, line))
    torch.testing.assert_close(bilinear_kernel(3), torch.outer(torch.tensor([0.5, 1, 0.5]), torch.tensor([0.5, 1, 0.5])))
    for side in (4, 16, 32, 63, 64):  # upsampling by f spreads a total of f * f
        assert bilinear_kernel(side).sum().item() == pytest.approx(((side + 1) // 2) ** 2, rel=1e-5)


@pytest.mark.parametrize("build", [*ON_VGG16, fcn32s_alexnet_paper])
def test_scores_start_at_zero_and_upsampling_is_bilinear_per_class_and_frozen(build):
    layers = build(3, width=6).decoder.layers
    for name, layer in layers.items():
        if name.startswith("score"):
            assert not layer.weight.any(), name
            assert not layer.bias.any(), name
            assert layer.weight.requires_grad, name
        else:
            kernel = layer.kernel_size[0]
            for one in range(3):
                for other in range(3):
                    expected = bilinear_kernel(kernel) if one == other else torch.zeros(kernel, kernel)
                    torch.testing.assert_close(layer.weight[one, other], expected)
            assert layer.bias is None
            assert not layer.weight.requires_grad, name


def test_upsampling_by_deconvolution_is_bilinear_interpolation():
    """Away from the border it equals PyTorch's, pixels as areas."""
    x = torch.randn(1, 2, 6, 7, dtype=torch.float64)
    up = fcn8s_paper(2, width=1).double().decoder.layers["upscore2"]
    expected = functional.interpolate(x, scale_factor=2, mode="bilinear", align_corners=False)
    torch.testing.assert_close(up(x)[..., 2:-2, 2:-2], expected[..., 1:-1, 1:-1])


def test_only_the_upsampling_of_the_skips_is_learned_on_request():
    """Sec. 4.3: "the final layer deconvolutional filters are fixed to bilinear interpolation, while intermediate ... are initialized"."""
    layers = fcn8s_paper(3, width=1, learn_upsampling=True).decoder.layers
    learned = {name: layer.weight.requires_grad for name, layer in layers.items() if name.startswith("up")}
    assert learned == {"upscore2": True, "upscore_pool4": True, "upscore8": False}


@pytest.mark.parametrize(("build", "published"), [(fcn32s_paper, 13), (fcn16s_paper, 13), (fcn8s_paper, 13), (fcn8s_atonce_paper, 13)])
def test_biases_learn_twice_as_fast_and_do_not_decay(build, published):
    section = TrainSection(optimizer="sgd", lr=1e-10, momentum=0.99, weight_decay=5e-4)
    model = build(2, width=1)
    groups = {(group["scale"], group["weight_decay"]): group["params"] for group in make_optimizer(model, section).param_groups}
    scores = len(model.decoder.skips) + 1
    assert {key: len(group) for key, group in groups.items()} == {(1.0, 5e-4): published + 2 + scores, (2.0, 0.0): published + 2 + scores}
    assert all(parameter.ndim == 1 for parameter in groups[2.0, 0.0])


def test_alexnet_has_rates_of_its_own_for_the_score_alone():
    """Its trunk has no `param` blocks: biases learn at the base rate and decay."""
    section = TrainSection(optimizer="sgd", lr=1e-4, weight_decay=5e-4)
    groups = make_optimizer(fcn32s_alexnet_paper(2, width=6), section).param_groups
    assert {(group["scale"], group["weight_decay"]): len(group["params"]) for group in groups} == {(1.0, 5e-4): 15, (2.0, 0.0): 1}


def test_dropout_of_one_half_follows_fc6_and_fc7_value_by_value():
    for build in (fcn8s_paper, fcn32s_alexnet_paper):
        encoder = build(2, width=6).encoder
        calls = []
        assert type(encoder.drop) is nn.Dropout
        assert encoder.drop.p == 0.5
        encoder.drop.register_forward_hook(lambda layer, inputs, output, calls=calls: calls.append(inputs[0].shape[1]))
        encoder(torch.zeros(1, 3, 8, 8))
        assert calls == [encoder.channels[-1]] * 2


def test_at_once_scales_pool4_by_a_hundredth_and_pool3_by_a_ten_thousandth():
    torch.manual_seed(0)
    plain, scaled = fcn8s_paper(2, width=1).double().eval(), fcn8s_atonce_paper(2, width=1).double().eval()
    for name in ("score_fr", "score_pool4", "score_pool3"):
        nn.init.normal_(plain.decoder.layers[name].weight)
    scaled.load_state_dict(plain.state_dict())
    with torch.no_grad():
        plain.decoder.layers["score_pool4"].weight *= 0.01
        plain.decoder.layers["score_pool3"].weight *= 0.0001
        image = torch.randn(1, 3, 40, 50, dtype=torch.float64)
        torch.testing.assert_close(scaled(image), plain(image))


def decoders(classes):
    """The decoders of FCN-32s, 16s and 8s with the same random score of fc7, all other scores zero."""
    torch.manual_seed(0)
    models = [build(classes, width=1).double().eval() for build in (fcn32s_paper, fcn16s_paper, fcn8s_paper)]
    nn.init.normal_(models[0].decoder.layers["score_fr"].weight)
    for coarser, model in pairwise(models):
        start_from(model, coarser)
    return models


def test_crops_put_the_scores_of_all_three_nets_on_the_same_pixels():
    """Upsampling by 32, by 2 and 16, and by 2, 2 and 8 all keep a ramp a ramp, so the nets agree inside, if the offsets are right."""
    models = decoders(2)
    side, maps = 500, models[2].encoder(torch.zeros(1, 3, 500, 500, dtype=torch.float64))
    row = torch.arange(16, dtype=torch.float64)
    maps.maps[-1] = (row[:, None] * 3 + row).expand(1, 64, 16, 16)
    with torch.no_grad():
        logits = [model.decoder(maps, (side, side)) for model in models]
        slope = models[0].decoder.layers["score_fr"].weight[:, :, 0, 0].sum(1)
    inside = slice(40, -40)
    for other in logits[1:]:
        torch.testing.assert_close(other[..., inside, inside], logits[0][..., inside, inside])
    # Row r of the scores lies at pixel 32 r + 12.5: 31.5, the middle of the 64 kernel, less the crop of 19.
    pixel = torch.arange(side, dtype=torch.float64).sub(12.5).div(32)
    expected = slope[:, None, None] * (pixel[:, None] * 3 + pixel)
    torch.testing.assert_close(logits[0][0][:, inside, inside], expected[:, inside, inside])


def test_a_net_that_starts_from_the_coarser_one_keeps_its_scores():
    """Equal before the last upsampling; after it, as far as interpolating twice differs from once: an eighth of second differences."""
    models = decoders(3)
    image = torch.randn(1, 3, 90, 120, dtype=torch.float64)
    with torch.no_grad():
        scores = models[0].decoder.layers["score_fr"](models[0].encoder(image).maps[-1])
        logits = [model(image) for model in models]
        seen = []
        for model in models[1:]:
            last = model.decoder.layers[model.decoder.last.name]
            last.register_forward_pre_hook(lambda layer, inputs: seen.append(inputs[0]))
            model(image)
        twice = models[1].decoder.layers["upscore2"](scores)
        torch.testing.assert_close(seen[0], twice, rtol=0, atol=0)
        torch.testing.assert_close(seen[1], models[2].decoder.layers["upscore_pool4"](twice), rtol=0, atol=0)
    around = functional.pad(scores, (2, 2, 2, 2))
    bound = sum(around.diff(n=2, dim=axis).abs().max() for axis in (2, 3)) / 8
    assert bound > 0
    assert (logits[1] - logits[0]).abs().max() <= bound
    between = functional.pad(twice, (2, 2, 2, 2))
    assert (logits[2] - logits[1]).abs().max() <= sum(between.diff(n=2, dim=axis).abs().max() for axis in (2, 3)) / 8


def test_starting_from_the_coarser_net_copies_shared_names_and_zeroes_new_scores(tmp_path):
    from safetensors.torch import save_file

    torch.manual_seed(0)
    coarse = fcn32s_paper(3, width=2)
    nn.init.normal_(coarse.decoder.layers["score_fr"].weight)
    file = tmp_path / "best.safetensors"
    save_file(coarse.state_dict(), file)
    fine = fcn16s_paper(3, width=2, encoder_weights=file)
    ours, theirs = fine.state_dict(), coarse.state_dict()
    shared = [name for name in ours if name in theirs]
    assert len(shared) == len(theirs) - 1  # all but upscore
    assert all(torch.equal(ours[name], theirs[name]) for name in shared)
    assert set(ours) - set(shared) == {f"decoder.layers.{name}" for name in (
        "score_pool4.weight", "score_pool4.bias", "upscore2.weight", "upscore16.weight")}  # fmt: skip
    assert not ours["decoder.layers.score_pool4.weight"].any()
    nn.init.ones_(fine.decoder.layers["score_pool4"].weight)
    start_from(fine, coarse)
    assert not fine.decoder.layers["score_pool4"].weight.any()


@pytest.mark.parametrize(("classes", "options"), [(4, {}), (3, {"in_channels": 1}), (3, {"width": 1})])
def test_a_net_of_other_classes_bands_or_width_is_no_start(tmp_path, classes, options):
    with pytest.raises(ValueError, match="not an FCN that this one can start from"):
        start_from(fcn16s_paper(classes, **{"width": 2, **options}), fcn32s_paper(3, width=2), "run32/best.safetensors")
    with pytest.raises(ValueError, match=r"has nothing where this has encoder\."):
        start_from(fcn16s_paper(3, width=2), {})
