"""Encoders: their maps, and weights from files."""

import pickle
from pathlib import Path

import pytest
import timm
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from perpixel.models import build
from perpixel.models.encoders import UNetPath, batch_norm_is_folded, read_weights, timm_encoder

SHARED = Path(__file__).resolve().parents[3] / "shared"
SMALL = "mobilenetv3_small_050"  # under a million parameters


@pytest.fixture(scope="module")
def whole():
    """A complete timm network, classifier and all, with batch norm statistics of its own."""
    torch.manual_seed(1)
    network = timm.create_model(SMALL).eval()
    for layer in network.modules():
        if isinstance(layer, torch.nn.BatchNorm2d):
            layer.running_mean.normal_(std=0.1)
            layer.running_var.uniform_(0.8, 1.3)
    return network


@pytest.mark.parametrize(
    "name", ["resnet18", "mobilenetv2_100", "efficientnet_b0", "regnety_004", "convnext_atto", "vgg16_bn", "swin_tiny_patch4_window7_224"]
)
def test_maps_have_the_channels_and_strides_that_the_encoder_states(name):
    with torch.device("meta"):
        encoder = timm_encoder(name, in_channels=5)
        maps = encoder(torch.zeros(2, 5, 64, 96)).maps
    assert encoder.strides == sorted(encoder.strides)
    assert [tuple(m.shape) for m in maps] == [
        (2, channels, 64 // stride, 96 // stride) for channels, stride in zip(encoder.channels, encoder.strides, strict=True)
    ]


def test_output_stride_dilates_instead_of_subsampling():
    assert timm_encoder("resnet18", output_stride=8).strides == [2, 4, 8, 8, 8]
    with pytest.raises(ValueError, match="'vgg16_bn' gives no feature maps at output stride 8"):
        timm_encoder("vgg16_bn", output_stride=8)


@pytest.mark.parametrize("suffix", [".safetensors", ".pth"])
def test_weights_of_the_whole_network_give_its_own_maps(whole, tmp_path, suffix):
    path = tmp_path / f"weights{suffix}"
    if suffix == ".safetensors":
        save_file(whole.state_dict(), path)
    else:
        torch.save({"state_dict": {f"module.{key}": value for key, value in whole.state_dict().items()}}, path)
    encoder = timm_encoder(SMALL, weights=str(path)).eval()
    image = torch.randn(1, 3, 64, 64)
    torch.testing.assert_close(encoder(image).maps, whole.forward_intermediates(image, intermediates_only=True))
    assert not encoder.batch_norm_folded


def test_more_bands_of_grey_give_the_response_that_rgb_grey_gives(whole, tmp_path):
    """The sum of the first convolution's weights over bands is kept, whatever their number."""
    path = tmp_path / "weights.safetensors"
    save_file(whole.state_dict(), path)
    grey = torch.randn(1, 1, 32, 32)
    expected = timm_encoder(SMALL, 3, path).eval()(grey.expand(-1, 3, -1, -1)).maps
    for bands in (1, 2, 7):
        torch.testing.assert_close(timm_encoder(SMALL, bands, path).eval()(grey.expand(-1, bands, -1, -1)).maps, expected)


def test_weights_of_another_network_are_refused_by_name(whole, tmp_path):
    path = tmp_path / "other.safetensors"
    save_file(whole.state_dict(), path)
    with pytest.raises(
        ValueError, match=r"other\.safetensors: not the weights of encoder 'resnet18': it lacks conv1\.weight.*has the foreign"
    ):
        timm_encoder("resnet18", weights=path)


def test_a_bundle_in_place_of_an_encoder_s_weights_is_told_where_it_belongs(make_bundle):
    with pytest.raises(ValueError, match=r"model\.safetensors: a whole model of perpixel.*--set model\.start_from=BUNDLE"):
        timm_encoder("resnet18", weights=make_bundle())


@pytest.mark.parametrize(("change", "message"), [("lacks", "lacks conv_stem.weight"), ("foreign", "foreign extra"), ("shape", "has shape")])
def test_a_file_with_one_wrong_tensor_is_refused(whole, tmp_path, change, message):
    state = dict(whole.state_dict())
    if change == "lacks":
        del state["conv_stem.weight"]
    elif change == "foreign":
        state["extra.weight"] = torch.zeros(2)
    else:
        state["conv_stem.weight"] = state["conv_stem.weight"][:4].clone()
    save_file(state, tmp_path / "w.safetensors")
    with pytest.raises(ValueError, match=message):
        timm_encoder(SMALL, weights=tmp_path / "w.safetensors")


class Trap:
    def __reduce__(self):
        return (exec, ("raise SystemExit('executed')",))


def test_files_that_are_no_weights_are_refused_by_name(tmp_path):
    (tmp_path / "pickle.pth").write_bytes(pickle.dumps(Trap()))
    torch.save({"a": Trap()}, tmp_path / "trap.pth")
    torch.save([1, 2], tmp_path / "list.pth")
    save_file({"a": torch.zeros(100)}, tmp_path / "whole.safetensors")
    (tmp_path / "cut.safetensors").write_bytes((tmp_path / "whole.safetensors").read_bytes()[:-50])
    torch.save({"a": torch.zeros(1)}, tmp_path / "saved.safetensors")
    for name in ("photo.jpg", "photo.safetensors"):
        Image.new("RGB", (8, 8)).save(tmp_path / name, "jpeg")
    (tmp_path / "note.pth").write_text("hello, world")
    for suffix in ("pth", "safetensors"):
        (tmp_path / f"empty.{suffix}").write_bytes(b"")
        (tmp_path / f"page.{suffix}").write_text("<!DOCTYPE html><html>not found</html>")
    messages = {
        "pickle.pth": "not executed",
        "trap.pth": "not executed",
        "list.pth": "no plain dictionary",
        "cut.safetensors": "damaged",
        "saved.safetensors": r"name it \.pth",
        "photo.jpg": "no file of weights",
        "photo.safetensors": "no file of weights",
        "note.pth": "no file of weights",
        "empty.pth": "the file is empty",
        "empty.safetensors": "the file is empty",
        "page.pth": "a web page",
        "page.safetensors": "a web page",
        "absent.pth": "no such file",
    }
    for name, message in messages.items():
        with pytest.raises(ValueError, match=rf"{name}: .*{message}"):
            read_weights(tmp_path / name)


def test_a_failed_download_names_the_file_and_the_option(monkeypatch):
    def unreachable(*arguments, **options):
        raise OSError("no route to host")

    encoder = timm_encoder(SMALL)
    assert encoder.channels
    monkeypatch.setattr(timm, "create_model", lambda *a, pretrained=False, **k: unreachable() if pretrained else encoder.network)
    with pytest.raises(ValueError, match=r"could not be downloaded \(OSError: no route to host\).*huggingface\.co/timm/.*encoder_weights"):
        timm_encoder("resnet18", weights=True)


def test_folded_batch_norm_is_told_from_measured_and_from_fresh(whole):
    eps = 1e-5
    folded = {
        "bn.running_mean": torch.zeros(4),
        "bn.running_var": torch.full((4,), 1 - eps),
        "bn.weight": torch.ones(4),
        "bn.bias": torch.randn(4),
    }
    assert batch_norm_is_folded(folded)
    assert not batch_norm_is_folded(whole.state_dict())
    assert not batch_norm_is_folded({**folded, "bn.bias": torch.zeros(4)})  # as initialised
    assert not batch_norm_is_folded({**folded, "bn.weight": torch.full((4,), 0.5)})
    assert not batch_norm_is_folded({"conv.weight": torch.zeros(1)})


@pytest.mark.shared_data
def test_the_shared_mobilenet_weights_load_and_are_seen_to_be_folded():
    path = SHARED / "weights" / "mobilenetv2_100.safetensors"
    encoder = timm_encoder("mobilenetv2_100", weights=path)
    assert encoder.batch_norm_folded
    torch.testing.assert_close(encoder.network.conv_stem.weight, load_file(path)["conv_stem.weight"])


def test_a_size_that_a_network_cannot_take_is_a_value_error():
    encoder = timm_encoder("mixer_s32_224")
    with pytest.raises(ValueError, match="'mixer_s32_224' does not take images of 64x96 pixels"):
        encoder(torch.zeros(1, 3, 64, 96))


@pytest.mark.parametrize("name", ["levit_128", "inception_v3"])
def test_a_size_that_only_pytorch_refuses_is_a_value_error_too(name):
    """LeViT's tables of positions do not fit, Inception's last windows are larger than the map."""
    encoder = timm_encoder(name).eval()
    with pytest.raises(ValueError, match=f"'{name}' does not take images of 64x64 pixels .*choose another encoder"):
        encoder(torch.zeros(1, 3, 64, 64))


def test_other_errors_of_a_network_pass_unchanged():
    encoder = timm_encoder(SMALL)
    encoder.network.forward = lambda image: torch.zeros(2, 3) @ image
    with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
        encoder(torch.zeros(2, 3))


def test_the_plain_path_asked_of_another_model_is_said_to_be_unet_s():
    with pytest.raises(ValueError, match="encoder 'plain' is U-Net's own path; build unet on it, or choose one of timm's"):
        build("fcn", 2, "plain")


def test_the_u_net_path_drops_only_after_its_last_two_levels():
    path = UNetPath(1, width=2, dropout=0.5)
    assert [any(isinstance(layer, torch.nn.Dropout) for layer in level) for level in path.levels] == [False, False, False, True, True]
