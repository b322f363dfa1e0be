"""Recipes: what may stand in them, and what a mistake gets."""

import re
from importlib.resources import files
from itertools import product

import pytest
import yaml

from perpixel.recipe import Recipe, merge, read_recipe, read_settings, shipped, to_yaml


def test_a_misspelt_key_names_the_file_the_key_and_the_nearest_legal_key(tmp_path):
    path = tmp_path / "street.yaml"
    path.write_text("model:\n  encodr: resnet34\n")
    with pytest.raises(ValueError, match=r"street\.yaml: model\.encodr: unknown key; did you mean 'encoder'\?"):
        read_recipe(path)


def test_a_misspelt_key_in_a_list_of_losses_is_found_too(tmp_path):
    path = tmp_path / "a.yaml"
    path.write_text("train:\n  loss:\n    - {name: dice, wieght: 2}\n")
    with pytest.raises(ValueError, match=r"train\.loss\.0\.wieght: unknown key; did you mean 'weight'\?"):
        read_recipe(path)


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ("train.lr=-1", "train.lr is -1; legal is more than 0"),
        ("train.lr=fast", "train.lr is 'fast'; legal is a number"),
        ("train.lr=null", "train.lr is null; legal is a number"),
        ("train.steps=1.5", "train.steps is 1.5; legal is a whole number"),
        ("train.report=maybe", "train.report is 'maybe'; legal is true or false"),
        ("train.augment.hue=0.7", "train.augment.hue is 0.7; legal is 0.5 or less"),
        ("train.optimizer=adm", "train.optimizer is 'adm'; legal is 'adamw' or 'sgd'"),
        ("model.name=3", "model.name is 3; legal is text"),
        ("train.crop=64", "train.crop is 64; legal is a list: [a, b]"),
        ("train.crop=[1]", "train.crop is [1]; value number 2 is missing"),
        ("train.crop=[1, 2, 3]", "train.crop is [1, 2, 3]; legal is 2 values, not 3"),
        ("train.loss=[{weight: 2}]", "train.loss.0 is {'weight': 2}; the key 'name' is missing"),
        ("train=3", "train is 3; legal is a section, with keys such as 'steps'"),
        ("predict.overlap=x", "predict.overlap is 'x'; legal is a whole number or 'exact'"),
        ("train.class_weights=[-1]", "train.class_weights.0 is -1; legal is 0 or more"),
        ("train.class_weights=[.inf]", "train.class_weights.0 is inf; legal is a finite number"),
    ],
)
def test_an_illegal_value_says_in_one_line_what_came_and_what_is_legal(setting, message):
    with pytest.raises(ValueError) as told:
        read_settings([setting])
    assert str(told.value) == f"--set: {message}"


def test_no_key_answers_a_value_of_another_kind_in_the_words_of_pydantic():
    """Eight values for each key of every section."""
    places = {"OptionsSection": "model.options", "AugmentSection": "train.augment", "LossTerm": "train.loss"}
    told = []
    for section, content in Recipe.model_json_schema()["$defs"].items():
        name = places.get(section, section.removesuffix("Section").lower())
        for key, value in product(content["properties"], ("text", "3", "-1", "1.5", "true", "null", "[]", "{a: 1}")):
            try:
                read_settings([f"{name}=[{{{key}: {value}}}]" if section == "LossTerm" else f"{name}.{key}={value}"])
            except ValueError as error:
                told += str(error).splitlines()
    assert len(told) > 100
    assert [text for text in told if "should" in text or not re.search(r"; legal is|is missing$|: unknown key;", text)] == []


@pytest.mark.parametrize(("text", "message"), [("- 1\n", "mapping"), ("a: [", "not valid YAML"), ("3", "mapping")])
def test_a_file_that_is_no_recipe_is_refused(tmp_path, text, message):
    path = tmp_path / "a.yaml"
    path.write_text(text)
    with pytest.raises(ValueError, match=message):
        read_recipe(path)


def test_an_unknown_name_gets_the_nearest_shipped_recipe():
    with pytest.raises(ValueError, match="Did you mean 'unet_paper'"):
        read_recipe("unet_papr")


def test_settings_are_yaml_values_at_dotted_keys():
    parts = read_settings(["train.lr=1e-3", "train.crop=[64, 96]", "model.encoder_weights=true", "train.ema=null"])
    assert parts == {"train": {"lr": 0.001, "crop": [64, 96], "ema": None}, "model": {"encoder_weights": True}}


def test_a_setting_without_a_value_is_refused():
    with pytest.raises(ValueError, match="key=value"):
        read_settings(["train.lr"])


def test_one_setting_may_stand_alone_and_what_is_no_text_is_refused_by_type():
    assert read_settings("train.lr=3") == read_settings(["train.lr=3"])
    for wrong in ({"train.lr": 3}, {"train": {"lr": 3}}, [("train.lr", 3)], [{"train.lr": 3}]):
        with pytest.raises(TypeError, match=r"settings are .*train.*; give key=value texts"):
            read_settings(wrong)


def test_a_written_recipe_reads_back_equal(tmp_path):
    recipe = Recipe.model_validate({"train": {"steps": 7, "lr": 0.5}, "data": {"classes": ["a", "b"], "label_map": {"values": {"0": 0}}}})
    path = tmp_path / "recipe.yaml"
    path.write_text(to_yaml(recipe, {"train.lr": "0.5 - as you asked: twice"}))
    assert Recipe.model_validate(read_recipe(path)) == recipe


def test_later_parts_win_and_lists_are_replaced_whole():
    assert merge({"a": {"b": [1, 2], "c": 3}}, {"a": {"b": [4]}}) == {"a": {"b": [4], "c": 3}}


@pytest.mark.parametrize("name", shipped())
def test_every_shipped_recipe_is_valid_and_states_paper_command_and_expectation(name):
    parts = read_recipe(name)
    assert parts["model"]["name"]
    text = (files("perpixel") / "recipes" / f"{name}.yaml").read_text()
    head = "\n".join(line for line in text.splitlines() if line.startswith("#"))
    assert all(word in head for word in ("arXiv", "Command:", "Expect"))
    if name.endswith("_paper"):  # the paper's figure, to compare with
        assert re.search(r"Expect [^.]*\d\.\d", head)
    assert yaml.safe_load(text) == parts


def test_a_key_outside_its_section_is_told_where_it_belongs():
    with pytest.raises(ValueError, match=r"--set: lr: unknown key; did you mean 'train\.lr'\?"):
        read_settings(["lr=0.1"])


def test_python_s_none_means_null_in_a_setting():
    assert read_settings(["model.encoder_weights=None"]) == read_settings(["model.encoder_weights=null"])
