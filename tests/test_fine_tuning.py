"""Training that goes on from a bundle: all of its weights, some of them frozen."""

import io
import shutil

import pytest
import torch
from PIL import Image
from rich.console import Console
from safetensors.torch import load_file

from perpixel.bundle import load_bundle, save_bundle, start_from_bundle
from perpixel.models import build
from perpixel.recipe import read_recipe
from perpixel.run import Run
from perpixel.train import train

SMALL = ("train.batch=2", "train.validations=1", "train.ema=null", "train.precision=32-true")


def run(sample_set, out, *settings, **options):
    crop = [] if options.get("resume") else [f"train.crop={[33, 33] if 'recipe' in options else [64, 64]}"]
    own = [] if options.get("resume") else SMALL
    return train(sample_set / "images", sample_set / "masks", out=out, settings=[*own, *crop, *settings], **options)


def flat(source, target):
    """Every file below `source`, copied side by side."""
    target.mkdir()
    for path in source.rglob("*.png"):
        shutil.copy(path, target / path.name)
    return target


def test_deeplab_v1_trains_its_side_branches_alone_on_a_trained_net(sample_set, tmp_path):
    """arXiv:1412.7062, section 4.3. Branches start at N(0, 0.001), so the scores of the net hardly change."""
    narrow = ("model.options.width=4", "model.encoder_weights=null")
    run(sample_set, tmp_path / "one", *narrow, recipe="deeplab_v1_paper", steps=2)
    start = tmp_path / "one" / "best.safetensors"
    second = [f"model.start_from={start}", "model.options.multi_scale=true", "train.frozen=[encoder, decoder.head]"]
    run(sample_set, tmp_path / "two", *second, recipe="deeplab_v1_paper", steps=3)
    before, after = load_file(start), load_file(tmp_path / "two" / "last.safetensors")
    assert all(torch.equal(after[name], value) for name, value in before.items())
    assert {name.split(".")[1] for name in after.keys() - before.keys()} == {"branches"}
    first, second = load_bundle(start), load_bundle(tmp_path / "two" / "last.safetensors")
    assert first.card.mean == second.card.mean
    untrained = build("deeplab_v1_paper", first.model.classes, width=4, multi_scale=True).eval()
    start_from_bundle(untrained, start)
    image = torch.randn(1, 3, 33, 41)
    with torch.no_grad():
        torch.testing.assert_close(untrained(image), first.model(image), atol=1e-3, rtol=0)


def test_deeplab_v3_goes_on_at_output_stride_8_with_every_norm_as_it_was(sample_set, tmp_path):
    """arXiv:1706.05587, section 4.1: the second stage trains at a finer stride, batch norm frozen."""
    run(
        sample_set,
        tmp_path / "one",
        "model.options={width: 2, depth: 50}",
        "model.encoder_weights=null",
        recipe="deeplab_v3_paper",
        steps=2,
    )
    start = tmp_path / "one" / "best.safetensors"
    second = [f"model.start_from={start}", "model.options.output_stride=8", "train.freeze_batch_norm=all", "train.lr=0.001"]
    outcome = run(sample_set, tmp_path / "two", *second, recipe="deeplab_v3_paper", steps=2)
    assert outcome.recipe.model.options.depth == 50
    before, after = load_file(start), load_file(tmp_path / "two" / "last.safetensors")
    assert before.keys() == after.keys()
    running = [name for name in before if "running" in name]
    assert running
    assert all(torch.equal(before[name], after[name]) for name in running)
    assert not torch.equal(before["decoder.head.1.weight"], after["decoder.head.1.weight"])


def test_validation_images_are_those_of_the_run_before(sample_set, tmp_path):
    """Or images that the bundle was trained on would be validated on."""
    folders = [flat(sample_set / name, tmp_path / name) for name in ("images", "masks")]  # without parts, so that it is split anew
    small = ["model.options.width=4", "model.encoder_weights=false", "data.split_seed=5", "data.val_fraction=0.4"]
    first = train(*folders, out=tmp_path / "one", steps=1, settings=[*SMALL, "train.crop=[64, 64]", *small])
    start = [f"model.start_from={tmp_path / 'one' / 'best.safetensors'}"]
    second = train(*folders, out=tmp_path / "two", steps=1, settings=[*SMALL, "train.crop=[64, 64]", *start])
    assert second.recipe.data.split_seed == 5
    assert second.scores["losses"].keys() == first.scores["losses"].keys()


@pytest.mark.parametrize("average", ["null", "0.9"])
@pytest.mark.parametrize("measured", ["false", "true"])
def test_frozen_parts_keep_their_statistics_of_batch_norm_too(sample_set, tmp_path, average, measured):
    run(sample_set, tmp_path / "one", "model.options.width=4", "model.encoder_weights=false", steps=1)
    start = tmp_path / "one" / "best.safetensors"
    second = [f"model.start_from={start}", "train.frozen=[encoder, decoder.stages]", "train.freeze_batch_norm=false"]
    run(sample_set, tmp_path / "two", *second, f"train.ema={average}", f"train.batch_norm_pass={measured}", steps=2)
    before, after = load_file(start), load_file(tmp_path / "two" / "last.safetensors")
    changed = {name for name, value in before.items() if not torch.equal(value, after[name])}
    assert changed
    assert all(name.startswith(("decoder.classify", "decoder.coarse_classifiers")) for name in changed)


def test_a_bundle_of_colour_starts_a_net_for_grey_by_the_sum_of_its_bands(sample_set, tmp_path):
    run(sample_set, tmp_path / "one", "model.options.width=4", "model.encoder_weights=false", steps=1)
    start = tmp_path / "one" / "best.safetensors"
    grey, masks = flat(sample_set / "images", tmp_path / "grey"), flat(sample_set / "masks", tmp_path / "masks")
    for path in grey.iterdir():
        Image.open(path).convert("L").save(path)
    settings = [*SMALL, "train.crop=[64, 64]", f"model.start_from={start}"]
    outcome = train(grey, masks, out=tmp_path / "two", steps=1, settings=settings)
    assert (outcome.recipe.data.bands, len(outcome.recipe.data.mean)) == (1, 1)
    other = build("unet", load_bundle(start).model.classes, encoder="plain", width=4, in_channels=1, stage_scores=True)
    assert start_from_bundle(other, start) == []
    first = next(name for name, value in load_file(start).items() if value.ndim == 4 and value.shape[1] == 3)
    torch.testing.assert_close(other.state_dict()[first].sum(1), load_file(start)[first].sum(1))


def test_other_names_for_as_many_classes_are_told_and_two_starts_are_refused(sample_set, tmp_path):
    run(sample_set, tmp_path / "one", "model.options.width=4", "model.encoder_weights=false", steps=1)
    start = f"model.start_from={tmp_path / 'one' / 'best.safetensors'}"
    said = io.StringIO()
    options = {"classes": "a,b,c,d,e", "console": Console(file=said, width=1000), "steps": 1}
    run(sample_set, tmp_path / "two", start, **options)
    assert "made for sky, water, reeds, bird, fish, goes on as that of a, b, c, d, e" in said.getvalue()
    with pytest.raises(ValueError, match="both say where the encoder starts"):
        run(sample_set, tmp_path / "three", start, "model.encoder_weights=true", steps=1)


@pytest.mark.parametrize("optimizer", ["adamw", "sgd"])
def test_a_fine_tuning_that_is_stopped_goes_on_bit_identically(sample_set, tmp_path, monkeypatch, optimizer):
    """With parts frozen, the optimiser has no state of theirs."""
    run(sample_set, tmp_path / "one", "model.options.width=4", "model.encoder_weights=false", steps=1)
    start = tmp_path / "one" / "best.safetensors"
    settings = [f"model.start_from={start}", "train.frozen=[encoder]", f"train.optimizer={optimizer}", "train.validations=4"]
    run(sample_set, tmp_path / "whole", *settings, steps=4)
    save = Run.save

    def save_and_stop(self):
        save(self)
        raise KeyboardInterrupt

    monkeypatch.setattr(Run, "save", save_and_stop)
    with pytest.raises(KeyboardInterrupt):
        run(sample_set, tmp_path / "stopped", *settings, steps=4)
    monkeypatch.setattr(Run, "save", save)
    start.unlink()
    again = [*SMALL, "train.crop=[64, 64]", *settings]  # the same command and --resume
    folders = (sample_set / "images", sample_set / "masks")
    assert train(*folders, out=tmp_path / "stopped", settings=again, steps=4, resume=True).step == 4
    first, second = (load_file(tmp_path / name / "last.safetensors") for name in ("whole", "stopped"))
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_a_resumed_fine_tuning_needs_its_bundle_no_longer(sample_set, tmp_path):
    run(sample_set, tmp_path / "one", "model.options.width=4", "model.encoder_weights=false", steps=2)
    start = tmp_path / "one" / "best.safetensors"
    run(sample_set, tmp_path / "two", f"model.start_from={start}", steps=2)
    start.unlink()
    assert run(sample_set, tmp_path / "two", resume=True).step == 2
    assert read_recipe(tmp_path / "two" / "recipe.yaml")["model"]["options"]["width"] == 4


def test_other_classes_keep_a_new_classifier_and_another_encoder_is_refused(sample_set, tmp_path):
    run(sample_set, tmp_path / "one", "model.options.width=4", "model.encoder_weights=false", steps=1)
    start = tmp_path / "one" / "best.safetensors"
    model = load_bundle(start).model
    other = build("unet", model.classes + 2, encoder="plain", width=4, stage_scores=True)
    fresh = other.state_dict()["decoder.classify.weight"].clone()
    stayed = start_from_bundle(other, start)
    assert stayed
    assert all("classif" in name for name in stayed)
    assert torch.equal(other.state_dict()["decoder.classify.weight"], fresh)
    assert torch.equal(next(other.encoder.parameters()), next(model.encoder.parameters()))
    with pytest.raises(ValueError, match=r"another encoder's weights: it has .* leave model\.name, model\.encoder and model\.options"):
        start_from_bundle(build("unet", 3, encoder="plain", width=6), start)


def test_parts_to_freeze_that_do_not_exist_are_refused_with_those_that_do(sample_set, tmp_path):
    for wrong, message in [
        ("head", r"no part 'head'\. Known: encoder, decoder, decoder\."),
        ("encoder, decoder", "leave nothing to train"),
    ]:
        with pytest.raises(ValueError, match=message):
            run(sample_set, tmp_path, "model.options.width=4", "model.encoder_weights=false", f"train.frozen=[{wrong}]", steps=1)


def test_the_card_holds_the_output_stride_that_the_encoder_came_to(sample_set, tmp_path):
    """Rates of the pyramid follow from it, so a bundle must not depend on a default."""
    run(sample_set, tmp_path, "model={name: deeplab_v3, encoder: resnet18, encoder_weights: false, options: {width: 8}}", steps=1)
    bundle = load_bundle(tmp_path / "best.safetensors")
    assert bundle.card.options["output_stride"] == bundle.model.encoder.strides[-1] == 16
    save_bundle(tmp_path / "again.safetensors", bundle.model.state_dict(), bundle.card)
    load_bundle(tmp_path / "again.safetensors")
