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

# Rate, momentum, weight decay, schedule, reduction of the loss, batch and crop: sheets 1 to 6. The rate of U-Net is not published.
PUBLISHED = {
    "fcn32s_paper": (1e-10, 0.99, 5e-4, "constant", "sum", 1, 500),
    "fcn16s_paper": (1e-12, 0.99, 5e-4, "constant", "sum", 1, 500),
    "fcn8s_paper": (1e-14, 0.99, 5e-4, "constant", "sum", 1, 500),
    "fcn8s_atonce_paper": (1e-10, 0.99, 5e-4, "constant", "sum", 1, 500),
    "fcn32s_alexnet_paper": (1e-4, 0.9, 5e-4, "constant", "mean", 20, 500),
    "fcn_googlenet_paper": (5e-5, 0.9, 5e-4, "constant", "mean", 20, 500),
    "unet_paper": (1e-3, 0.99, 0.0, "constant", "mean", 1, 572),
    "unet_release_paper": (1e-3, 0.99, 0.0, "constant", "mean", 1, 572),
    "segnet_paper": (1e-3, 0.9, 5e-4, "constant", "mean", 4, 360),
    "bayesian_segnet_paper": (1e-3, 0.9, 5e-4, "constant", "mean", 4, 360),
    "segnet_basic_paper": (0.1, 0.9, 5e-4, "constant", "mean", 12, 360),
    "bayesian_segnet_basic_paper": (0.1, 0.9, 5e-4, "constant", "mean", 4, 360),
    "deeplab_v1_paper": (1e-3, 0.9, 5e-4, "step", "mean", 20, 321),
    "deeplab_v2_vgg16_paper": (1e-3, 0.9, 5e-4, "poly", "mean", 10, 321),
    "deeplab_v2_resnet101_paper": (2.5e-4, 0.9, 5e-4, "poly", "mean", 10, 321),
    "deeplab_v3_paper": (7e-3, 0.9, 1e-4, "poly", "mean", 16, 513),
    "deeplab_v3plus_paper": (7e-3, 0.9, 1e-4, "poly", "mean", 16, 513),
}


def test_every_model_has_a_recipe_of_its_name():
    assert NARROW.keys() == MODELS.keys()
    assert all(read_recipe(name)["model"]["name"] == name for name in MODELS)


@pytest.mark.parametrize("name", NARROW)
def test_each_recipe_trains_its_model_for_20_steps_or_3_where_it_has_one_size_alone(sample_set, tmp_path, name):
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
    assert load_bundle(tmp_path / "last.safetensors").card.model == name


@pytest.mark.parametrize("name", [name for name in MODELS if name.endswith("_paper")])
def test_a_published_recipe_trains_as_its_paper_does(name):
    section = read_recipe(name)["train"]
    keys = ("lr", "momentum", "weight_decay", "schedule")
    found = (*(section[key] for key in keys), section.get("loss_reduction", "mean"), section["batch"], section["crop"][0])
    assert found == PUBLISHED[name]
    assert (section["optimizer"], section["precision"]) == ("sgd", "32-true")
    system = name.removeprefix("bayesian_")
    assert section.get("class_weights", "none") == ("median_frequency" if system.startswith(("segnet", "unet")) else "none")
    assert section.get("border_weights", False) == system.startswith("unet")
    assert section["augment"]["elastic_sigma"] == (10 if system.startswith("unet") else 0)
    assert section.get("poly_power", 0.9) == 0.9


@pytest.mark.parametrize("name", ["segnet_basic_paper", "unet_paper"])
def test_fast_keeps_the_paper_s_network_and_input_and_leaves_its_training_to_the_plan(sample_set, tmp_path, name):
    published = read_recipe(name)
    settings = ["model.options={width: 2}", f"train.crop=[{NARROW[name][1]}, {NARROW[name][1]}]"]
    outcome = train(sample_set / "images", sample_set / "masks", out=tmp_path, recipe=name, fast=True, steps=2, settings=settings)
    taken = outcome.recipe
    assert taken.model.name == name
    assert taken.data.mean[0] == published.get("data", {}).get("mean", taken.data.mean)[0]
    assert (taken.train.optimizer, taken.train.schedule, taken.train.ema) == ("adamw", "one_cycle", 0.99)
    assert taken.train.lr != published["train"]["lr"]


def test_fast_without_a_recipe_is_refused(sample_set, tmp_path):
    with pytest.raises(ValueError, match="without a recipe training is fast as it is"):
        train(sample_set / "images", sample_set / "masks", out=tmp_path, fast=True, steps=2)
