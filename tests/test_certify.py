"""`perpixel certify`: whole against parts."""

import json
import re
from dataclasses import replace

import numpy as np
import pytest
import torch

from perpixel.bundle import load_bundle
from perpixel.certify import certify
from perpixel.data.writing import write_rgb
from perpixel.models.dependency import dependency
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


def test_a_halo_that_is_too_small_shows_and_is_told(make_bundle, command, monkeypatch):
    """The same bundle, certified as it is and with one cell less of halo than its layers need (Dependency understated)."""
    bundle = make_bundle(overlap="exact", tile=32)
    right = command("certify", bundle, "--json")
    assert right.code == 0
    understated = lambda model: replace(dependency(model), before=96, after=94)  # noqa: E731
    for module in ("perpixel.certify", "perpixel.tiling"):
        monkeypatch.setattr(f"{module}.dependency", understated)
    wrong = command("certify", bundle, "--json")
    assert wrong.code == 2
    assert not json.loads(wrong.out)["exact"]
    assert json.loads(wrong.out)["difference"] > 1e-4 * json.loads(wrong.out)["largest"] > 10 * json.loads(right.out)["difference"]
    said = command("certify", bundle)
    assert said.code == 2
    assert "not exact: the difference is larger than rounding explains" in said.out


def test_a_layer_that_hides_what_it_depends_on_is_found_out_by_measuring(make_bundle):
    """It reads eight rows further than the walk can see, as a mistake in a custom operation would."""
    bundle = load_bundle(make_bundle(overlap="exact", tile=32))
    bundle.model.encoder.levels[0].register_forward_hook(lambda _, __, out: out + out.roll(8, -2) if out.device.type != "meta" else out)
    certificate = certify(bundle)
    assert not certificate.obstacle
    assert not certificate.exact


def test_a_model_that_can_t_be_exact_says_why_and_what_blending_leaves(make_bundle, command, monkeypatch):
    path = make_bundle(overlap=16)
    bundle = load_bundle(path)
    bundle.model.encoder.levels[0][1] = torch.nn.InstanceNorm2d(2)
    monkeypatch.setattr("perpixel.certify.load_bundle", lambda *_: bundle)
    said = command("certify", path)
    assert said.code == 2
    assert "not exact: encoder.levels.0.1 normalises by the statistics of the batch" in said.out
    assert re.search(r"cut into +\d+ windows, tile \d+, overlap 16", said.out)
    assert re.search(r"largest difference +0\.\d", said.out)


@pytest.fixture
def rounding_gpu():
    """Products in TF32 also where the default is float32; the places where PyTorch keeps that."""
    places = [torch.backends.cuda.matmul, torch.backends.cudnn.conv, torch.backends.mkldnn.matmul, torch.backends.mkldnn.conv]
    before, places[0].fp32_precision = places[0].fp32_precision, "tf32"
    yield places
    places[0].fp32_precision = before


def test_float32_is_not_rounded_while_it_is_certified_and_the_settings_come_back(make_bundle, rounding_gpu):
    """GPUs compute convolutions in TF32 by default, with 10 bits of the mantissa."""
    before = [place.fp32_precision for place in rounding_gpu]
    assert "tf32" in before
    bundle, seen = load_bundle(make_bundle()), set()
    bundle.model.register_forward_pre_hook(lambda *_: seen.update(place.fp32_precision for place in rounding_gpu))
    certify(bundle)
    assert seen == {"ieee"}
    assert [place.fp32_precision for place in rounding_gpu] == before
    assert torch.backends.cudnn.allow_tf32, "the older way to ask is not broken"
