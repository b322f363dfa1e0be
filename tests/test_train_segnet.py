"""SegNet's recipes: literal class weights, statistics of batch norm by one pass, and that each recipe trains."""

import copy
import re
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from perpixel.bundle import load_bundle
from perpixel.losses import cross_entropy
from perpixel.models.batch_norm import batch_norms, measure_batch_norm
from perpixel.recipe import Recipe, read_settings
from perpixel.run import Run
from perpixel.train import train
from perpixel.weighting import training_class_weights

NARROW = ("model.options.width=2", "model.encoder_weights=null", "train.crop=[64, 96]", "train.batch=4", "train.precision=32-true")


class _Report:
    classes = ("sky", "road", "car")
    pixels = {"train": [60, 30, 10]}  # noqa: RUF012
    pixels_where_present = {"train": [100, 100, 50]}  # noqa: RUF012


def test_a_list_of_class_weights_is_taken_as_it_is_and_a_computed_one_has_mean_1():
    literal = training_class_weights([0.2595, 4.564, 9.6446], _Report)
    torch.testing.assert_close(literal, torch.tensor([0.2595, 4.564, 9.6446]))
    computed = training_class_weights("median_frequency", _Report)
    assert float(computed @ torch.tensor([0.6, 0.3, 0.1])) == pytest.approx(1)


def test_literal_weights_multiply_and_the_sum_is_divided_by_the_pixels_as_in_caffe():
    logits, labels = torch.randn(1, 3, 4, 5), torch.randint(0, 3, (1, 4, 5))
    weights = torch.tensor([0.2595, 4.564, 9.6446])
    expected = -(logits.log_softmax(1).gather(1, labels[:, None])[:, 0] * weights[labels]).sum() / 20
    torch.testing.assert_close(cross_entropy(logits, labels, class_weights=weights)[0], expected)


def test_class_weights_of_another_number_of_classes_are_refused(sample_set, tmp_path):
    with pytest.raises(ValueError, match=r"train.class_weights has 2 numbers; there are 5 classes: give one for each of sky, water"):
        train(
            sample_set / "images", sample_set / "masks", out=tmp_path, steps=1, recipe="segnet_basic_paper",
            settings=[*NARROW, "train.class_weights=[1, 2]"],
        )  # fmt: skip


@pytest.mark.parametrize(
    ("wrong", "told"),
    [
        ("median", " is 'median'; legal is 'none', 'median_frequency'"),
        ("[1, -2]", ".1 is -2; legal is 0 or more"),
        ("[1, .inf]", ".1 is inf; legal is a finite number"),
        ("[a]", ".0 is 'a'; legal is a number"),
    ],
)
def test_wrong_class_weights_are_refused_with_their_key(wrong, told):
    with pytest.raises(ValueError, match=re.escape(f"--set: train.class_weights{told}")):
        read_settings([f"train.class_weights={wrong}"])


def test_freezing_batch_norm_and_measuring_it_contradict_each_other():
    with pytest.raises(ValueError, match="choose one of them"):
        read_settings(["train.freeze_batch_norm=all", "train.batch_norm_pass=true"])


def test_a_pass_beside_a_frozen_part_measures_the_rest_on_what_that_part_gives_with_its_own_statistics():
    torch.manual_seed(0)
    frozen, rest = nn.Sequential(nn.Conv2d(2, 3, 1), nn.BatchNorm2d(3)), nn.BatchNorm2d(3)
    frozen[1].running_mean.fill_(0.5)
    network, batches = nn.Sequential(frozen, rest), [torch.randn(4, 2, 5, 5) for _ in range(3)]
    measure_batch_norm(network, batches, batch_norms(frozen))
    assert torch.equal(frozen[1].running_mean, torch.full((3,), 0.5))
    with torch.no_grad():
        seen = [frozen.eval()(batch).mean((0, 2, 3)) for batch in batches]
    torch.testing.assert_close(rest.running_mean, torch.stack(seen).mean(0))


def test_one_pass_gives_the_averages_of_the_batches_means_and_unbiased_variances():
    """The authors' script: variance of the m values of a batch times m / (m - 1), then the mean over the batches."""
    torch.manual_seed(0)
    network = nn.Sequential(nn.Conv2d(2, 3, 3), nn.BatchNorm2d(3, momentum=0.3), nn.ReLU(), nn.Conv2d(3, 2, 1), nn.BatchNorm2d(2)).eval()
    batches = [3 * torch.randn(4, 2, 6, 7) + shift for shift in (0, 1, 5)]
    weights = copy.deepcopy(dict(network.named_parameters()))
    measure_batch_norm(network, batches)
    means, variances = [], []
    with torch.no_grad():
        for batch in batches:
            x = network[0](batch)
            flat = x.transpose(0, 1).flatten(1)
            means.append(flat.mean(1))
            variances.append(flat.var(1, correction=0) * flat.shape[1] / (flat.shape[1] - 1))
    torch.testing.assert_close(network[1].running_mean, torch.stack(means).mean(0))
    torch.testing.assert_close(network[1].running_var, torch.stack(variances).mean(0))
    assert (network[1].momentum, network[4].momentum, network.training) == (0.3, 0.1, False)
    assert all(torch.equal(value, weights[name]) for name, value in network.named_parameters())


def test_a_pass_records_no_gradients():
    recorded = []
    network = nn.Sequential(nn.Conv2d(2, 3, 1), nn.BatchNorm2d(3))
    network.register_forward_hook(lambda _, __, output: recorded.append(output.requires_grad))
    measure_batch_norm(network, [torch.randn(4, 2, 5, 5) for _ in range(3)])
    assert recorded == [False] * 3


def test_without_images_the_statistics_stay():
    network = nn.Sequential(nn.BatchNorm2d(2))
    network[0].running_mean.fill_(3)
    with pytest.raises(ValueError, match="no images"):
        measure_batch_norm(network, [])
    assert (network[0].running_mean == 3).all()


@pytest.mark.parametrize("average", ["null", "0.9"])
def test_a_run_with_passes_goes_on_bit_identically_and_ends_with_statistics_of_its_last_weights(sample_set, tmp_path, monkeypatch, average):
    settings = [*NARROW, "train.validations=4", f"train.ema={average}"]
    images, masks, save = sample_set / "images", sample_set / "masks", Run.save
    train(images, masks, out=tmp_path / "whole", recipe="bayesian_segnet_basic_paper", steps=8, settings=settings)
    stopped_at = []

    def save_and_stop(run):
        save(run)
        stopped_at.append(run.place.step)
        raise KeyboardInterrupt

    monkeypatch.setattr(Run, "save", save_and_stop)
    with pytest.raises(KeyboardInterrupt):
        train(images, masks, out=tmp_path / "stopped", recipe="bayesian_segnet_basic_paper", steps=8, settings=settings)
    monkeypatch.setattr(Run, "save", save)
    again = {"recipe": "bayesian_segnet_basic_paper", "steps": 8, "settings": settings}  # the same command and --resume
    train(images, masks, out=tmp_path / "stopped", resume=True, **again)
    assert stopped_at[0] < 8
    first, second = (load_file(tmp_path / name / "last.safetensors") for name in ("whole", "stopped"))
    assert all(torch.equal(first[name], second[name]) for name in first)
    model = load_bundle(tmp_path / "whole" / "last.safetensors").model
    assert {int(norm.num_batches_tracked) for norm in batch_norms(model)} == {2}  # 8 images in batches of 4, and no step since


def test_two_processes_measure_batch_norm_on_their_shares_and_average(sample_set, tmp_path):
    """The first norm sees what is linear in the image, so the mean of the shares' means is that of whole batches in one process."""
    settings = [*NARROW, "train.validations=1", "train.lr=1e-30", "train.ema=null", "train.report=false"]
    sets = (str(sample_set / "images"), str(sample_set / "masks"))
    train(*sets, out=tmp_path / "one", recipe="segnet_basic_paper", steps=1, settings=settings)
    words = ["perpixel", "train", *sets, "--recipe", "segnet_basic_paper", "--steps", "1", "-o", str(tmp_path / "two")]
    words += [word for setting in settings for word in ("--set", setting)]
    launcher = ["-m", "torch.distributed.run", "--nproc_per_node", "2", "--master_port", "0", "--standalone", "-m"]
    subprocess.run([sys.executable, *launcher, *words], check=True, capture_output=True)
    first, second = (load_file(tmp_path / name / "last.safetensors") for name in ("one", "two"))
    torch.testing.assert_close(second["encoder.stages.0.1.running_mean"], first["encoder.stages.0.1.running_mean"], rtol=1e-4, atol=1e-4)


def test_the_old_kinds_of_class_weights_and_lists_come_back_from_yaml():
    for value in ("none", [0.5, 2.0]):
        recipe = Recipe.model_validate({"train": {"class_weights": value}})
        assert Recipe.model_validate(recipe.model_dump(mode="json")).train.class_weights == value


def test_segnet_basic_sees_values_up_to_255_as_its_first_normalisation_expects(sample_set, tmp_path):
    """As in the authors' files, sheet 2: on shares of 1, 1 + alpha / n * (sum of squares) is 1 to four digits."""
    settings = [*NARROW, "train.validations=1"]
    train(sample_set / "images", sample_set / "masks", out=tmp_path, recipe="segnet_basic_paper", steps=1, settings=settings)
    bundle = load_bundle(tmp_path / "best.safetensors")
    seen = bundle.normalize(torch.full((1, bundle.card.bands, 16, 16), 255, dtype=torch.uint8))
    torch.testing.assert_close(seen, torch.full_like(seen, 255.0))
    after = bundle.model.encoder.normalise(seen)
    assert after.amax() < 0.5 * seen.amax()
