"""FCN-GoogLeNet: Long et al. 2015, arXiv:1411.4038, table 1, on Szegedy et al. 2014, arXiv:1409.4842, table 1. Never released."""

import pytest
import torch
from torch import nn

from perpixel.models import fcn_googlenet_paper
from perpixel.models.fcn import bilinear_kernel
from perpixel.optimisation import make_optimizer
from perpixel.recipe import TrainSection


def test_parameters_are_as_many_as_the_layer_table_gives():
    """Table 1 of the FCN paper rounds them to 6M; frozen is the 63x63 upsampling of 21 classes by 21."""
    with torch.device("meta"):
        parameters = list(fcn_googlenet_paper(21).parameters())
    assert sum(p.numel() for p in parameters if p.requires_grad) == 5_995_077
    assert sum(p.numel() for p in parameters if not p.requires_grad) == 21 * 21 * 63 * 63


def test_the_trunk_has_the_modules_of_2014():
    """arXiv:1409.4842, table 1: maps that come out, and parameters of each row in units of 1024, without biases.

    Two rows of the table are not what its own filters make: 4c (463, but 498) and 5a (1072, but 1018); the others are within 3 %.
    """
    with torch.device("meta"):
        encoder = fcn_googlenet_paper(21).encoder
    modules = [module for stage in encoder.stages for module in stage]
    assert [module.channels for module in modules] == [256, 480, 512, 512, 512, 528, 832, 832, 1024]
    weights = [sum(p.numel() for p in module.parameters() if p.ndim == 4) for module in modules]
    published = [159, 380, 364, 437, 463, 580, 840, 1072, 1388]
    assert [w / 1024 for w in weights] == pytest.approx(published, rel=0.08)
    assert not any(isinstance(layer, nn.BatchNorm2d) for layer in encoder.modules())
    assert sum(isinstance(layer, nn.LocalResponseNorm) for layer in encoder.modules()) == 2


@pytest.mark.parametrize(("side", "sizes"), [(500, (86, 43, 21)), (224, (52, 26, 13))])
def test_maps_have_the_sizes_of_poolings_that_round_up_around_100_zeros(side, sizes):
    """By hand, 224: 424 with the zeros -> 209 -> 104 -> 51.5, so 52 -> 25.5, so 26 -> 12.5, so 13."""
    with torch.device("meta"):
        maps = fcn_googlenet_paper(3, width=4).encoder(torch.zeros(1, 3, side, side)).maps
    assert tuple(m.shape[-1] for m in maps) == sizes


def test_images_of_any_size_are_labelled_whole():
    with torch.device("meta"):
        model = fcn_googlenet_paper(2, width=4).eval()
        for side in (1, 2, 3, 7, 31, 32, 33, 97, 131, 500):
            assert model(torch.zeros(1, 3, side, 2 * side + 1)).shape == (1, 2, side, 2 * side + 1)


def positive(model):
    """All weights positive and poolings averaging: a gradient reaches whatever is seen."""
    model.double().eval()
    for parent in list(model.encoder.modules()):
        for name, layer in list(parent.named_children()):
            if isinstance(layer, nn.MaxPool2d):
                setattr(parent, name, nn.AvgPool2d(layer.kernel_size, layer.stride, layer.padding, ceil_mode=layer.ceil_mode))
            if isinstance(layer, nn.LocalResponseNorm):
                setattr(parent, name, nn.Identity())
    for parameter in model.encoder.parameters():
        parameter.data.abs_().add_(1e-3)
    return model


def test_receptive_field_is_715_and_its_middle_lies_where_the_upsampled_score_is_put():
    """715 + 6 * 32 = 907 of the paper's table 1, which counts the 7x7 average pooling that FCN drops; stride 32.

    The crop: pixel i of the 63x63 upsampling by 32 has its middle at 32 i + 31 - crop, and there lies the middle of what it sees.
    """
    torch.manual_seed(0)
    model = positive(fcn_googlenet_paper(2, width=4))
    image = torch.ones(1, 3, 4, 1500, dtype=torch.float64, requires_grad=True)
    rows = model.encoder(image).maps[-1][0].sum(0)  # of all branches: the 5x5 sees most
    line = rows[len(rows) // 2]
    fields = []
    middle = len(line) // 2
    for position in (middle, middle + 1):
        (gradient,) = torch.autograd.grad(line[position], image, retain_graph=True)
        columns = gradient[0].abs().sum((0, 1)).nonzero()
        fields.append((int(columns.min()), int(columns.max())))
    (first, last), (following, _) = fields
    assert last - first + 1 == 715
    assert following - first == 32
    assert (first + last) / 2 == 32 * middle + 31 - model.decoder.last.crop


def test_scores_start_at_zero_and_upsampling_is_bilinear_and_frozen():
    layers = fcn_googlenet_paper(3, width=4).decoder.layers
    assert not layers["score_fr"].weight.any()
    assert not layers["upscore"].weight.requires_grad
    for one in range(3):
        for other in range(3):
            expected = bilinear_kernel(63) if one == other else torch.zeros(63, 63)
            torch.testing.assert_close(layers["upscore"].weight[one, other], expected)


def test_biases_learn_twice_as_fast_and_do_not_decay():
    """Sec. 4.3; 57 convolutions in the trunk (3 and 9 modules of 6) and the score."""
    groups = make_optimizer(fcn_googlenet_paper(2, width=4), TrainSection(optimizer="sgd", lr=5e-5, weight_decay=5e-4)).param_groups
    assert {(group["scale"], group["weight_decay"]): len(group["params"]) for group in groups} == {(1.0, 5e-4): 58, (2.0, 0.0): 58}


def test_illegal_widths_and_downloads_are_refused():
    with pytest.raises(ValueError, match="width 6; need at least 1 band, and a width that is a multiple of 4"):
        fcn_googlenet_paper(2, width=6)
    with pytest.raises(ValueError, match="no library offers the GoogLeNet of 2014"):
        fcn_googlenet_paper(2, width=4, encoder_weights=True)
