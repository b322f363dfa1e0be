"""SegNet's decoder on every VGG, and the weights of published ones."""

import pytest
import timm
import torch
import torchvision
from safetensors.torch import save_file
from torch import nn
from torchvision.models import vgg

from perpixel.models import build, segnet, segnet_paper
from perpixel.models.segnet import VGG_FAMILY

NAMES = ["segnet", "segnet_paper", "segnet_basic_paper", "bayesian_segnet_paper", "bayesian_segnet_basic_paper"]


@pytest.mark.parametrize("encoder", VGG_FAMILY)
def test_every_vgg_gives_logits_of_the_image_s_own_size(encoder):
    with torch.device("meta"):
        assert segnet(7, encoder, in_channels=4)(torch.zeros(2, 4, 97, 131)).shape == (2, 7, 97, 131)


@pytest.mark.parametrize("encoder", VGG_FAMILY)
def test_the_decoder_has_as_many_convolutions_as_the_encoder(encoder):
    model = segnet(3, encoder, width=1)
    count = [sum(isinstance(m, nn.Conv2d) for m in part.modules()) for part in (model.encoder, model.decoder)]
    assert count[0] == count[1] == int(encoder.removeprefix("vgg").removesuffix("_bn")) - 3


@pytest.mark.parametrize("encoder", ["resnet34", "plain", "vgg16_gn", "convnext_atto"])
def test_an_encoder_without_positions_is_refused_with_those_that_can(encoder):
    with pytest.raises(ValueError, match=r"no 2x2 max poolings to undo.*Those that can: vgg11, vgg11_bn, vgg13, .*vgg19_bn"):
        segnet(2, encoder)


def test_a_tag_in_a_vgg_s_name_says_nothing_of_its_layers():
    with torch.device("meta"):
        plain, tagged = (segnet(2, name, width=1) for name in ("vgg16_bn", "vgg16_bn.tv_in1k"))
    assert [(name, p.shape) for name, p in plain.named_parameters()] == [(name, p.shape) for name, p in tagged.named_parameters()]


@pytest.mark.parametrize("bands", [1, 3, 5])
@pytest.mark.parametrize("name", NAMES)
def test_odd_images_and_any_bands_train_every_parameter_from_the_smallest_size_on(name, bands):
    torch.manual_seed(0)
    model = build(name, 3, in_channels=bands, width=2).to(memory_format=torch.channels_last).train()
    smallest = model.geometry.minimum
    for height, width in ((smallest, smallest), (45, 61)):
        logits = model(torch.randn(1, bands, height, width).contiguous(memory_format=torch.channels_last))
        assert logits.shape == (1, 3, height, width)
        model.zero_grad()
        logits.square().mean().backward()
        assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())


@pytest.mark.parametrize("name", NAMES)
def test_bfloat16_autocast_keeps_parameters_in_float32_and_the_function_nearly_the_same(name):
    torch.manual_seed(0)
    model = build(name, 3, width=4, dropout=0.0).to(memory_format=torch.channels_last).eval()
    image = torch.randn(1, 3, 41, 56).contiguous(memory_format=torch.channels_last)
    with torch.autocast("cpu", torch.bfloat16):
        low = model(image)
    low.float().square().mean().backward()
    assert {p.grad.dtype for p in model.parameters()} == {torch.float32}
    full = model(image)
    assert nn.functional.cosine_similarity(low.float().flatten(), full.flatten(), dim=0) > 0.9  # maxima may change places


@pytest.mark.parametrize("name", NAMES[:3])
def test_no_convolution_has_to_reorder_its_input(name):
    model = build(name, 3, width=8).to(memory_format=torch.channels_last).eval()
    seen = []
    for layer in model.modules():
        if isinstance(layer, nn.Conv2d):
            layer.register_forward_pre_hook(lambda layer, inputs: seen.append(inputs[0].is_contiguous(memory_format=torch.channels_last)))
    with torch.inference_mode():
        model(torch.randn(2, 3, 45, 60).contiguous(memory_format=torch.channels_last))
    assert len(seen) >= 9
    assert all(seen)


@pytest.mark.parametrize("encoder", ["vgg11", "vgg13_bn"])
@pytest.mark.parametrize("source", ["timm", "torchvision"])
def test_published_weights_give_the_maps_of_the_published_network(tmp_path, source, encoder):
    """Against the other library's own forward pass, its classifier cut off; weights are random ones of its own."""
    torch.manual_seed(0)
    network = (getattr(torchvision.models, encoder)() if source == "torchvision" else timm.create_model(encoder)).eval()
    for layer in network.modules():
        if isinstance(layer, nn.BatchNorm2d):
            nn.init.uniform_(layer.running_mean, -0.2, 0.2)
            nn.init.uniform_(layer.running_var, 0.5, 2)
    save_file(
        {key: value.contiguous() for key, value in network.state_dict().items() if key.startswith("features")}, tmp_path / "vgg.safetensors"
    )
    model = segnet(2, encoder, tmp_path / "vgg.safetensors").eval()
    image = torch.randn(1, 3, 64, 32)
    with torch.inference_mode():
        torch.testing.assert_close(model.encoder(image).maps[-1], network.features(image))


def test_vgg16_without_norms_starts_the_paper_s_net(tmp_path):
    """Sec. 3: the encoder is initialised with VGG-16; norms start at scale 1 and shift 0.001. Grey images get the sum of the bands."""
    torch.manual_seed(0)
    features = vgg.make_layers(vgg.cfgs["D"])
    save_file({f"features.{key}": value for key, value in features.state_dict().items()}, tmp_path / "vgg16.safetensors")
    model = segnet_paper(2, in_channels=1, encoder_weights=tmp_path / "vgg16.safetensors")
    given = [layer for layer in features if isinstance(layer, nn.Conv2d)]
    own = [layer for layer in model.encoder.modules() if isinstance(layer, nn.Conv2d)]
    torch.testing.assert_close(own[0].weight, given[0].weight.sum(1, keepdim=True))
    for ours, theirs in zip(own[1:], given[1:], strict=True):
        torch.testing.assert_close(ours.weight, theirs.weight)
    assert all((m.bias == 0.001).all() for m in model.encoder.modules() if isinstance(m, nn.BatchNorm2d))


@pytest.mark.parametrize(("file_of", "encoder"), [("vgg11", "vgg13"), ("vgg11", "vgg11_bn"), ("vgg11_bn", "vgg11"), ("resnet18", "vgg11")])
def test_another_network_s_weights_are_refused(tmp_path, file_of, encoder):
    with torch.device("meta"):
        state = getattr(torchvision.models, file_of)().state_dict()
    file = tmp_path / "w.safetensors"
    save_file({key: torch.zeros(value.shape) for key, value in state.items() if "classifier" not in key}, file)
    with pytest.raises(ValueError, match=f"w.safetensors: not the weights of '{encoder}'.*Give the file made for '{encoder}'"):
        segnet(2, encoder, file)


def test_a_narrow_path_refuses_published_weights_and_says_why(tmp_path):
    with torch.device("meta"):
        state = torchvision.models.vgg11().state_dict()
    file = tmp_path / "w.safetensors"
    save_file({key: torch.zeros(value.shape) for key, value in state.items() if "classifier" not in key}, file)
    with pytest.raises(ValueError, match="published weights need width=64"):
        segnet(2, "vgg11", file, width=8)


def test_illegal_options_are_refused_with_what_is_legal():
    with pytest.raises(ValueError, match=r"unknown variant 'fnc' of segnet_basic_paper. Known: bilinear, basic, "):
        build("segnet_basic_paper", 2, variant="fnc")
    with pytest.raises(ValueError, match="has no dropout in the paper"):
        build("segnet_basic_paper", 2, variant="fcn", dropout=0.5)
    for name in ("segnet_paper", "segnet_basic_paper"):
        with pytest.raises(ValueError, match=r"dropout is 1.5; it must be at least 0 and less than 1"):
            build(name, 2, dropout=1.5)
        with pytest.raises(ValueError, match="must be at least 1"):
            build(name, 2, width=0)
