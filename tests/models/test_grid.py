"""Every decoder on every encoder: the whole grid by shape, the small networks by a step of training."""

from itertools import product

import pytest
import torch

from perpixel.models import build
from perpixel.tiling import predict_whole

# Narrow decoders, where a model has the option: the grid is about what fits, not about size.
MODELS = {
    "fcn": {},
    "unet": {},
    "deeplab_v1": {"width": 8},
    "deeplab_v2": {},
    "deeplab_v3": {"width": 8},
    "deeplab_v3plus": {"width": 8},
}
VIT = "vit_tiny_patch16_224"  # its limit: every map at stride 16, so that no decoder finds finer detail in it
SMALL = ["resnet18", "mobilenetv2_100", "efficientnet_b0", "convnext_atto", "regnety_004", VIT]
LARGE = ["resnet34", "resnet50", "resnet101", "vgg16", "vgg16_bn", "convnext_tiny", "swin_tiny_patch4_window7_224"]
# Output stride of the coarsest map by itself, 32 for all others; where DeepLab can dilate, its default is 16.
OWN = {VIT: 16}
CANNOT_DILATE = [VIT, "swin_tiny_patch4_window7_224"]


@pytest.mark.parametrize("encoder", [*SMALL, *LARGE])
@pytest.mark.parametrize("model", MODELS)
def test_every_decoder_on_every_encoder_labels_images_of_odd_sizes(model, encoder):
    with torch.device("meta"):
        network = build(model, 7, encoder, in_channels=4, **MODELS[model]).eval()
        assert network(torch.zeros(1, 4, 97, 131)).shape == (1, 7, 97, 131)
    dilated = "deeplab" in model and encoder not in CANNOT_DILATE
    stride = 16 if dilated else OWN.get(encoder, 32)
    assert network.encoder.strides[-1] == stride
    assert (network.geometry.multiple, network.geometry.minimum, network.geometry.margin) == (stride, 2 * stride, 0)


@pytest.mark.parametrize("encoder", ["vgg16", "vgg16_bn"])
def test_segnet_on_vgg_labels_images_of_odd_sizes(encoder):
    with torch.device("meta"):
        assert build("segnet", 7, encoder, in_channels=4).eval()(torch.zeros(1, 4, 97, 131)).shape == (1, 7, 97, 131)


@pytest.mark.parametrize("encoder", [name for name in (*SMALL, *LARGE) if not name.startswith("vgg")])
def test_segnet_refuses_every_encoder_whose_poolings_it_could_not_undo(encoder):
    with pytest.raises(ValueError, match=f"'{encoder}' has no 2x2 max poolings to undo.*Those that can: vgg11.*On other encoders use unet"):
        build("segnet", 7, encoder)


@pytest.mark.parametrize("bands", [1, 3, 5])
@pytest.mark.parametrize(("model", "encoder"), [*product(MODELS, SMALL), ("segnet", "vgg16"), ("segnet", "vgg16_bn")])
def test_one_image_of_odd_sides_and_any_bands_trains_every_parameter(model, encoder, bands):
    torch.manual_seed(0)
    network = build(model, 3, encoder, in_channels=bands, **MODELS.get(model, {"width": 4})).to(memory_format=torch.channels_last).train()
    logits = network(torch.randn(1, bands, 97, 131).contiguous(memory_format=torch.channels_last))
    assert logits.shape == (1, 3, 97, 131)
    torch.nn.functional.cross_entropy(logits, torch.randint(0, 3, (1, 97, 131))).backward()
    lacking = [n for n, p in network.named_parameters() if p.requires_grad and (p.grad is None or not p.grad.isfinite().all())]
    assert lacking == []


@pytest.mark.parametrize("model", [*MODELS, "segnet"])
def test_prediction_takes_the_image_as_it_is(model):
    torch.manual_seed(0)
    network = build(model, 3, "vgg11" if model == "segnet" else "mobilenetv3_small_050", **MODELS.get(model, {"width": 4})).eval()
    logits = predict_whole(network, torch.randn(3, 97, 131))
    assert logits.shape == (3, 97, 131)
    assert logits.isfinite().all()
