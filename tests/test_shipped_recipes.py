"""Every recipe that ships: that it is there for each model, trains, and says what its paper says."""

from inspect import signature

import pytest

from perpixel.bundle import load_bundle
from perpixel.models import MODELS
from perpixel.recipe import read_recipe
from perpixel.train import train

# Options that make each model small, and the side of its crops.
NARROW: dict[str, tuple[str, int]] = {
    "fcn": ("{}", 64),
    "fcn_resnet": ("{depth: 18}", 64),
    "fcn32s_paper": ("{width: 1}", 64),
    "fcn16s_paper": ("{width: 1, learn_upsampling: true}", 64),
    "fcn8s_paper": ("{width: 1}", 64),
    "fcn8s_atonce_paper": ("{width: 1}", 64),
    "fcn32s_alexnet_paper": ("{width: 6}", 64),
    "fcn_googlenet_paper": ("{width: 4}", 64),
    "segnet": ("{width: 4}", 64),
    "segnet_paper": ("{width: 2}", 64),
    "segnet_basic_paper": ("{width: 2}", 64),
    "bayesian_segnet_paper": ("{width: 2}", 64),
    "bayesian_segnet_basic_paper": ("{width: 2}", 64),
    "unet": ("{}", 64),
    "unet_paper": ("{width: 1}", 188),
    "unet_release_paper": ("{width: 1}", 188),
    "deeplab_v1": ("{width: 8}", 64),
    "deeplab_v1_paper": ("{width: 4, multi_scale: true}", 33),
    "deeplab_v2": ("{}", 64),
    "deeplab_v2_vgg16_paper": ("{width: 4}", 33),
    "deeplab_v2_resnet101_paper": ("{width: 1, depth: 50}", 33),
    "deeplab_v3": ("{width: 8}", 64),
    "deeplab_v3_paper": ("{width: 1, depth: 50}", 33),
    "deeplab_v3_torchvision": ("{depth: 50}", 33),
    "deeplab_v3plus": ("{width: 8}", 64),
    "deeplab_v3plus_paper": ("{width: 1, depth: 50}", 33),
}

# Momentum, weight decay, schedule and reduction of the loss, by the first letters of the name: sheets 1 to 6.
PUBLISHED = {
    "fcn32s_alexnet": (0.9, 5e-4, "constant", "mean"),
    "fcn_googlenet": (0.9, 5e-4, "constant", "mean"),
    "fcn": (0.99, 5e-4, "constant", "sum"),
    "unet": (0.99, 0.0, "constant", "mean"),
    "segnet": (0.9, 5e-4, "constant", "mean"),
    "bayesian_segnet": (0.9, 5e-4, "constant", "mean"),
    "deeplab_v1": (0.9, 5e-4, "step", "mean"),
    "deeplab_v2": (0.9, 5e-4, "poly", "mean"),
    "deeplab_v3": (0.9, 1e-4, "poly", "mean"),
}


def test_every_model_has_a_recipe_of_its_name():
    assert NARROW.keys() == MODELS.keys()
    assert all(read_recipe(name)["model"]["name"] == name for name in MODELS)


@pytest.mark.parametrize("name", NARROW)
def test_each_recipe_trains_its_model_for_20_steps(sample_set, tmp_path, name):
    options, side = NARROW[name]
    settings = [f"model.options={options}", "model.encoder_weights=null", f"train.crop=[{side}, {side}]", "train.batch=1"]
    if "encoder" in signature(MODELS[name]).parameters:
        settings.append(f"model.encoder={'vgg11' if name == 'segnet' else 'mobilenetv3_small_050'}")
    if not name.endswith("_paper"):
        settings.append("train.precision=32-true")
    settings.append("train.validations=1")
    steps = 3 if name == "deeplab_v3_torchvision" else 20  # which has one size alone, torchvision's, and takes a second a step
    outcome = train(sample_set / "images", sample_set / "masks", out=tmp_path, recipe=name, steps=steps, settings=settings)
    assert outcome.step == steps
    assert outcome.recipe.train.precision == "32-true"
    assert load_bundle(tmp_path / "last.safetensors").card.model == name


@pytest.mark.parametrize("name", [name for name in MODELS if name.endswith("_paper")])
def test_a_published_recipe_trains_as_its_paper_does(name):
    section = read_recipe(name)["train"]
    published = next(values for start, values in PUBLISHED.items() if name.startswith(start))
    found = (section["momentum"], section["weight_decay"], section["schedule"], section.get("loss_reduction", "mean"))
    assert found == published
    assert section["optimizer"] == "sgd"
