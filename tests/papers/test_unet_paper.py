"""U-Net as published: Ronneberger, Fischer & Brox 2015, arXiv:1505.04597, Fig. 1 and sections 2 and 3."""

import math

import pytest
import torch
from torch import nn

from perpixel.models import unet_paper

# (output side, output channels) of every layer at 572x572, read off Fig. 1 from left to right.
CONTRACTING = [
    [(570, 64), (568, 64)],
    [(284, 64), (282, 128), (280, 128)],
    [(140, 128), (138, 256), (136, 256)],
    [(68, 256), (66, 512), (64, 512)],
    [(32, 512), (30, 1024), (28, 1024)],
]
EXPANSIVE = [
    [(56, 512), (56, 1024), (54, 512), (52, 512)],  # up-convolution, concatenation, two convolutions
    [(104, 256), (104, 512), (102, 256), (100, 256)],
    [(200, 128), (200, 256), (198, 128), (196, 128)],
    [(392, 64), (392, 128), (390, 64), (388, 64)],
    [(388, 2)],
]


def published_table():
    return [row for level in [*CONTRACTING, *EXPANSIVE] for row in level]


def test_every_layer_has_the_published_size_and_channels():
    with torch.device("meta"):
        model = unet_paper(2).eval()
    table = []
    shown = nn.Conv2d | nn.ConvTranspose2d | nn.MaxPool2d

    def note(layer, inputs, output):
        table.append((output.shape[-1], output.shape[1]))

    for layer in model.modules():
        if isinstance(layer, shown):
            layer.register_forward_hook(note)
    for stage in model.decoder.stages:  # what enters the convolutions of a stage is the concatenation
        stage.convolve.register_forward_pre_hook(lambda layer, inputs: table.append((inputs[0].shape[-1], inputs[0].shape[1])))
    logits = model(torch.zeros(1, 1, 572, 572, device="meta"))
    assert table == published_table()
    assert logits.shape == (1, 2, 388, 388)


def test_parameters_and_convolutions_are_as_many_as_published():
    """23 convolutional layers (sec. 2): 18 of 3x3, 4 up-convolutions, 1 of 1x1; none padded, none followed by batch norm."""
    with torch.device("meta"):
        model = unet_paper(2)
        assert sum(p.numel() for p in model.parameters()) == 31_030_658
        assert sum(p.numel() for p in unet_paper(21, in_channels=3).parameters()) == 31_033_045
    kernels = [layer.kernel_size for layer in model.modules() if isinstance(layer, nn.Conv2d | nn.ConvTranspose2d)]
    assert (kernels.count((3, 3)), kernels.count((2, 2)), kernels.count((1, 1)), len(kernels)) == (18, 4, 1, 23)
    assert all(layer.padding == (0, 0) for layer in model.modules() if isinstance(layer, nn.Conv2d))
    assert not any(isinstance(layer, nn.BatchNorm2d) for layer in model.modules())


@pytest.mark.parametrize(("side", "labelled"), [(188, 4), (204, 20), (220, 36), (572, 388)])
def test_valid_sizes_give_the_published_output(side, labelled):
    with torch.device("meta"):
        assert unet_paper(2)(torch.zeros(1, 1, side, side)).shape[-2:] == (labelled, labelled)


def test_legal_sides_are_those_where_every_pooling_sees_an_even_map():
    """Sec. 2: "it is important to select the input tile size such that all 2x2 max-pooling operations are applied to an even size"."""

    def even_everywhere(side):
        for _ in range(4):
            side -= 4
            if side <= 0 or side % 2:
                return False
            side //= 2
        for _ in range(4):
            side = 2 * (side - 4)
        return side - 4 > 0

    geometry = unet_paper(2, width=1).geometry
    assert [s for s in range(1, 700) if geometry.fits(s)] == [s for s in range(1, 700) if even_everywhere(s)]


@pytest.fixture(scope="module")
def narrow_at_572():
    """A width-1 network with what it computed: the skips, and what entered and left each stage of the expansive path."""
    torch.manual_seed(0)
    model = unet_paper(2, width=1).eval()
    ups, joined = [], []
    for stage in model.decoder.stages:
        stage.up.register_forward_hook(lambda layer, inputs, output: ups.append(output))
        stage.convolve.register_forward_pre_hook(lambda layer, inputs: joined.append(inputs[0].clone()))
    with torch.no_grad():
        image = torch.randn(1, 1, 572, 572)
        model(image)
        skips = model.encoder(image).maps[-2::-1]
    return ups, joined, skips


def test_skips_are_cropped_in_the_centre_by_4_16_40_and_88_pixels(narrow_at_572):
    _, joined, skips = narrow_at_572
    for offset, together, skip in zip((4, 16, 40, 88), joined, skips, strict=True):
        torch.testing.assert_close(together[:, skip.shape[1] :], skip[..., offset:-offset, offset:-offset])


def test_concatenation_puts_the_upsampled_map_before_the_skip(narrow_at_572):
    ups, joined, _ = narrow_at_572
    for up, together in zip(ups, joined, strict=True):
        torch.testing.assert_close(together[:, : up.shape[1]], up)


def test_initial_weights_are_normal_with_variance_2_by_fan_in_and_biases_zero():
    """Sec. 3: a Gaussian of standard deviation sqrt(2/N); its example is N = 9 * 64 = 576."""
    torch.manual_seed(0)
    model = unet_paper(2, width=32)
    for name, layer in model.named_modules():
        if not isinstance(layer, nn.Conv2d | nn.ConvTranspose2d):
            continue
        weight = layer.weight.detach().double()
        fan_in = weight[0].numel()  # as Caffe counts: count / num
        sigma, n = math.sqrt(2 / fan_in), weight.numel()
        assert abs(weight.std().item() / sigma - 1) < 5 / math.sqrt(2 * n), name
        assert abs(weight.mean().item()) < 5 * sigma / math.sqrt(n), name
        if n > 10_000:  # a normal distribution has kurtosis 3, a uniform one 1.8
            assert abs(((weight / sigma) ** 4).mean().item() - 3) < 0.4, name
        assert not layer.bias.any(), name
    assert model.encoder.levels[1][2].weight[0].numel() == 576  # 3x3 on 64 channels


def test_a_pixel_of_the_output_is_seen_through_188_or_204_pixels():
    """Measured: one input column after the other becomes NaN, and NaN spreads to all that depends on it. 100 and 288 columns of 388."""
    torch.manual_seed(0)
    model = unet_paper(1, width=1).eval()
    side, labelled = 204, 20
    first, last = range(24), range(side - 24, side)  # where footprints begin and end; what lies between is seen in any case
    seen = {}
    with torch.inference_mode():
        for column in (*first, *last):
            image = torch.zeros(1, 1, 188, side)
            image[..., column] = torch.nan
            seen[column] = model(image)[0, 0, 0].isnan()
    begins = [next(c for c in first if seen[c][output]) for output in range(labelled)]
    ends = [next(c for c in reversed(last) if seen[c][output]) for output in range(labelled)]
    footprints = [end - begin + 1 for begin, end in zip(begins, ends, strict=True)]
    assert set(footprints) == {188, 204}
    whole = [footprints[output % 16] for output in range(388)]  # phases repeat every 16 columns
    assert (whole.count(188), whole.count(204)) == (100, 288)


def test_dropout_follows_the_last_two_levels_of_the_contracting_path():
    """Sec. 3.1: "drop-out layers at the end of the contracting path"; where exactly: the authors' release."""
    levels = unet_paper(2, width=1).encoder.levels
    assert [[layer.p for layer in level if isinstance(layer, nn.Dropout)] for level in levels] == [[], [], [], [0.5], [0.5]]
