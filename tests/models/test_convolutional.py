"""Classifiers turned fully convolutional: arXiv:1411.4038, sec. 3.1."""

from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import save_file
from torch import nn
from torchvision import models
from torchvision.models.vgg import cfgs, make_layers

import perpixel
from perpixel.models.convolutional import convolutionize


def narrow(classifier, channels, side, hidden=12, classes=5):
    """A torchvision classifier on the meta device with linear layers so small that it fits a test, in float64 and with dropout."""
    linear = [channels * side * side, hidden, hidden, classes]
    for index, layer in enumerate(classifier.classifier):
        if isinstance(layer, nn.Linear):
            classifier.classifier[index] = nn.Linear(linear.pop(0), linear[0], device="meta")
    classifier = classifier.to_empty(device="cpu").double()
    torch.manual_seed(0)
    for parameter in classifier.parameters():
        nn.init.normal_(parameter, std=0.1)
    for module in classifier.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.reset_running_stats()
    return classifier.eval()


def narrow_vgg(depth="A", batch_norm=False):
    layers = [size if size == "M" else size // 64 for size in cfgs[depth]]
    with torch.device("meta"):
        return narrow(models.VGG(make_layers(layers, batch_norm), init_weights=False), 8, 7)


def narrow_alexnet():
    with torch.device("meta"):
        return narrow(models.AlexNet(), 256, 6)


@pytest.mark.parametrize(
    "make", [narrow_alexnet, *(lambda d=d, b=b: narrow_vgg(d, b) for d in "ABDE" for b in (False, True))],
    ids=["alexnet", *(f"vgg{d}{b}" for d in (11, 13, 16, 19) for b in ("", "_bn"))],
)  # fmt: skip
def test_at_the_training_size_the_output_is_the_classifier_s_scores(make):
    classifier = make()
    image = torch.randn(2, 3, 224, 224, dtype=torch.float64)
    with torch.inference_mode():
        scores = convolutionize(classifier)(image)
        assert scores.shape == (2, 5, 1, 1)
        torch.testing.assert_close(scores[..., 0, 0], classifier(image), rtol=1e-10, atol=1e-10)


def test_the_published_alexnet_is_turned_with_all_its_weights():
    torch.manual_seed(0)
    classifier = models.alexnet().eval()
    turned = convolutionize(classifier)
    assert sum(p.numel() for p in turned.parameters()) == sum(p.numel() for p in classifier.parameters()) == 61_100_840
    image = torch.randn(1, 3, 224, 224)
    with torch.inference_mode():
        torch.testing.assert_close(turned(image)[..., 0, 0], classifier(image), rtol=1e-4, atol=1e-5)


def test_a_larger_image_gives_a_heat_map_with_a_score_every_32_pixels():
    """Each score is that of its own 7x7 window of the map."""
    classifier = narrow_vgg()
    with torch.device("meta"):
        assert convolutionize(models.alexnet())(torch.zeros(1, 3, 500, 500)).shape == (1, 1000, 9, 9)
        assert convolutionize(models.vgg16())(torch.zeros(1, 3, 500, 500)).shape == (1, 1000, 9, 9)
    image = torch.randn(1, 3, 288, 352, dtype=torch.float64)
    with torch.inference_mode():
        scores, features = convolutionize(classifier)(image), classifier.features(image)
        assert scores.shape == (1, 5, 3, 5)
        for row in range(3):
            for column in range(5):
                window = features[..., row : row + 7, column : column + 7].flatten(1)
                torch.testing.assert_close(scores[..., row, column], classifier.classifier(window))


@pytest.mark.parametrize(("size", "scored"), [((224, 224), (13, 13)), ((235, 301), (14, 18))])
def test_the_mean_over_squeezenet_s_map_is_the_classifier_s_scores(size, scored):
    """Its classifier is a 1x1 convolution already; only the average goes. 13 scores a side at 224, one more every 16 pixels."""
    torch.manual_seed(0)
    classifier = models.squeezenet1_0(num_classes=7).double().eval()
    image = torch.randn(1, 3, *size, dtype=torch.float64)
    with torch.inference_mode():
        scores = convolutionize(classifier)(image)
        assert scores.shape == (1, 7, *scored)
        torch.testing.assert_close(scores.mean((2, 3)), classifier(image))


def test_dropout_is_kept_only_where_wanted_and_the_mode_stays():
    classifier = narrow_vgg().train()
    kept, without = convolutionize(classifier), convolutionize(classifier, dropout=False)
    assert kept.training
    assert sum(isinstance(layer, nn.Dropout) for layer in kept.modules()) == 2
    assert not any(isinstance(layer, nn.Dropout) for layer in without.modules())
    assert not convolutionize(classifier.eval()).training


def test_the_turned_network_shares_no_memory_with_the_classifier():
    classifier = narrow_vgg()
    turned = convolutionize(classifier)
    image = torch.randn(1, 3, 224, 224, dtype=torch.float64)
    with torch.no_grad():
        before = turned(image)
        for parameter in classifier.parameters():
            parameter.zero_()
        torch.testing.assert_close(turned(image), before, rtol=0, atol=0)


def test_what_cannot_be_turned_is_refused_with_what_can():
    with torch.device("meta"):
        for other in (models.resnet18(), models.mobilenet_v2(), nn.Linear(3, 3)):
            with pytest.raises(ValueError, match=r"can't be turned: .* Give torchvision's alexnet or vgg11 to vgg19_bn"):
                convolutionize(other)


def test_an_image_too_small_for_one_score_is_refused():
    with pytest.raises(ValueError, match="which leaves a map of 6x7; the classifier sees 7x7 at once"):
        convolutionize(narrow_vgg())(torch.zeros(1, 3, 223, 224, dtype=torch.float64))


def test_it_is_a_public_name():
    assert perpixel.convolutionize is convolutionize


def test_the_example_of_the_docs_draws_a_picture(tmp_path, monkeypatch):
    torch.manual_seed(0)
    photograph, weights, picture = (str(tmp_path / name) for name in ("photograph.png", "weights.safetensors", "picture.jpg"))
    Image.new("RGB", (150, 101), (200, 80, 30)).save(photograph)
    save_file(models.squeezenet1_0().state_dict(), weights)
    monkeypatch.setattr("sys.argv", ["example", photograph, weights, picture])
    page = (Path(__file__).parents[2] / "docs" / "convolutionize.md").read_text("utf-8")
    exec(compile(page.split("```python\n")[1].split("```")[0], "docs/convolutionize.md", "exec"), {})
    assert Image.open(picture).size == (3 * 150 // 2, 50)
