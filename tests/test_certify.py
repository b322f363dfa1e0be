"""`perpixel certify`: whole against parts."""

import json

import numpy as np
import pytest

from perpixel.certify import certify
from perpixel.data.writing import write_rgb
from perpixel.predict import load
from perpixel.recipe import PredictSection


def test_a_bundle_that_can_be_exact_is_certified_and_predicts_so(make_bundle, command, tmp_path):
    write_rgb(tmp_path / "photo.png", np.random.default_rng(0).integers(0, 256, (330, 301, 3), dtype=np.uint8))
    bundle = make_bundle(overlap="exact", tile=32)
    said = command("certify", bundle, tmp_path / "photo.png", "--tile", 32, "--json")
    found = json.loads(said.out)
    assert said.code == 0
    assert found["exact"]
    assert found["difference"] <= 1e-5 * found["largest"]
    assert (found["before"], found["after"], found["cell"], found["whole"]) == (112, 110, 16, [336, 304])
    assert found["windows"] > 4
    whole = load(make_bundle("whole.safetensors", tile=512), "cpu").probabilities(tmp_path / "photo.png")
    np.testing.assert_allclose(load(bundle, "cpu").probabilities(tmp_path / "photo.png"), whole, atol=1e-5)


def test_an_image_that_one_window_shows_whole_proves_nothing(make_bundle, tmp_path):
    write_rgb(tmp_path / "photo.png", np.zeros((40, 40, 3), np.uint8))
    with pytest.raises(ValueError, match=r"one window of .* shows all of it"):
        certify(make_bundle(), tmp_path / "photo.png")


def test_recipes_take_exact_as_overlap():
    assert PredictSection(overlap="exact").overlap == "exact"
    with pytest.raises(ValueError, match="overlap"):
        PredictSection(overlap="some")
