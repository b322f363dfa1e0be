"""Encoders from torchvision: SqueezeNet's maps, its weights in every general model. GoogLeNet's are in test_fcn."""

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from torchvision import models as torchvision_models

from conftest import SHARED
from perpixel.bundle import import_weights
from perpixel.models import build
from perpixel.models.torchvision_trunks import IMAGENET_MEAN, IMAGENET_STD, GoogLeNetPath, SqueezeNetPath, any_encoder

GENERAL = ["fcn", "unet", "deeplab_v1", "deeplab_v2", "deeplab_v3", "deeplab_v3plus"]


def test_squeezenet_s_last_map_is_torchvision_s_wherever_no_border_reaches():
    """torchvision pads neither the first convolution nor the poolings: its pixel i lies at 16 i + 17 of the image, ours at 16 i."""
    torch.manual_seed(0)
    theirs, ours = torchvision_models.squeezenet1_0().double().eval(), SqueezeNetPath().double().eval()
    ours.load_classifier(theirs.state_dict())
    image = torch.randn(1, 3, 320, 304, dtype=torch.float64)
    with torch.inference_mode():
        own, whole = ours(image).maps[-1], theirs.features(image[..., 15:, 15:])
    assert own.shape[-2:] == (20, 19)
    torch.testing.assert_close(own[..., 8:13, 8:12], whole[..., 6:11, 6:10])
    assert not torch.allclose(own[..., 7:12, 8:12], whole[..., 6:11, 6:10])


def test_squeezenet_s_maps_have_half_the_size_each_rounded_up():
    with torch.device("meta"):
        path = SqueezeNetPath(5)
        maps = path(torch.zeros(1, 5, 97, 131)).maps
    assert [tuple(m.shape[1:]) for m in maps] == [(96, 49, 66), (256, 25, 33), (512, 13, 17), (512, 7, 9)]
    assert (path.channels, path.strides) == ([96, 256, 512, 512], [2, 4, 8, 16])
    # 1,248,424 as published, less the 1x1 convolution to 1000 classes; and the filters of two more bands
    assert sum(p.numel() for p in path.parameters()) == 1_248_424 - 513_000 + 2 * 96 * 49


def test_squeezenet_at_output_stride_8_sees_at_every_second_place_what_the_plain_one_sees():
    torch.manual_seed(0)
    plain, dilated = SqueezeNetPath().double().eval(), SqueezeNetPath(output_stride=8).double().eval()
    dilated.load_state_dict(plain.state_dict())
    image = torch.randn(1, 3, 96, 96, dtype=torch.float64)
    with torch.inference_mode():
        torch.testing.assert_close(dilated(image).maps[-1][..., ::2, ::2], plain(image).maps[-1])


@pytest.mark.parametrize("encoder", ["squeezenet1_0", "googlenet"])
@pytest.mark.parametrize("model", GENERAL)
def test_every_general_model_takes_torchvision_s_trunks(model, encoder):
    with torch.device("meta"):
        made = build(model, 4, encoder=encoder, in_channels=5)
        side = made.geometry.fit(97)
        assert made(torch.zeros(1, 5, side, side)).shape == (1, 4, side, side)


def test_a_file_of_weights_is_the_same_as_importing_it_and_bands_get_the_mean_filter(tmp_path):
    torch.manual_seed(0)
    theirs = torchvision_models.squeezenet1_0()
    save_file(theirs.state_dict(), tmp_path / "squeezenet1_0.safetensors")
    one = build("fcn", 2, encoder="squeezenet1_0", encoder_weights=str(tmp_path / "squeezenet1_0.safetensors"))
    other = build("fcn", 2, encoder="squeezenet1_0")
    import_weights(other, theirs.state_dict(), "torchvision")
    for model in (one, other):
        given = {f"encoder.layers.{key.removeprefix('features.')}": value for key, value in theirs.state_dict().items()}
        assert all(torch.equal(value, given[key]) for key, value in model.state_dict().items() if key.startswith("encoder."))
    path = any_encoder("squeezenet1_0", 5, str(tmp_path / "squeezenet1_0.safetensors"))
    mean = theirs.features[0].weight.mean(1, keepdim=True) * 3 / 5
    torch.testing.assert_close(path.layers["0"].weight, mean.expand(-1, 5, -1, -1))


@pytest.mark.parametrize("bands", [1, 5])
def test_googlenet_maps_other_than_three_bands_to_the_mean_of_what_it_maps_three_to(bands):
    """Its weights are of images -1..1, whatever the bands: ImageNet's mean and deviation are averaged as the filters are."""
    grey = torch.randn(1, 1, 4, 4)
    mean = GoogLeNetPath().as_trained(grey.expand(-1, 3, -1, -1)).mean(1, keepdim=True)
    assert not torch.allclose(mean, grey, atol=0.05)
    torch.testing.assert_close(GoogLeNetPath(bands).as_trained(grey.expand(-1, bands, -1, -1)), mean.expand(-1, bands, -1, -1))


def test_weights_of_another_network_and_other_strides_are_refused():
    with pytest.raises(ValueError, match=r"not the weights of torchvision's squeezenet1_0: it lacks features\.0\.weight"):
        SqueezeNetPath().load_classifier({})
    with torch.device("meta"):
        state = torchvision_models.squeezenet1_1().state_dict()
        with pytest.raises(ValueError, match=r"not the weights of torchvision's squeezenet1_0|has shape"):
            SqueezeNetPath().load_classifier(state)
        with pytest.raises(ValueError, match="cannot have output stride 8; its own is 32"):
            build("deeplab_v3", 2, encoder="googlenet", output_stride=8)


@pytest.mark.shared_data
def test_the_real_classifier_s_head_says_nearly_the_same_of_our_last_map():
    """On a photograph; only the borders differ, where torchvision's net is not padded."""
    state = load_file(SHARED / "weights" / "squeezenet1_0.safetensors")
    path, theirs = SqueezeNetPath().eval(), torchvision_models.squeezenet1_0().eval()
    path.load_classifier(state)
    theirs.load_state_dict(state)
    photograph = sorted((SHARED / "data" / "msrc21" / "JPEGImages").iterdir())[0]
    image = torch.from_numpy(np.array(Image.open(photograph).convert("RGB"))).permute(2, 0, 1)[None] / 255
    image = (image - torch.tensor(IMAGENET_MEAN)[:, None, None]) / torch.tensor(IMAGENET_STD)[:, None, None]
    with torch.inference_mode():
        own, expected = theirs.classifier(path(image).maps[-1]).flatten(1), theirs(image)
    assert torch.corrcoef(torch.cat([own, expected]))[0, 1] > 0.9
