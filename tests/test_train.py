"""Training: the loop, what it writes, and that nothing is lost when it is killed."""

import contextlib
import csv
import json
import os
import pickle
import signal
import subprocess
import sys
import time

import pytest
import torch
from rich.console import Console
from safetensors.torch import load_file
from timm.layers import convert_sync_batchnorm

from perpixel import run as run_module
from perpixel.data.images import read_image
from perpixel.data.writing import write_labels, write_rgb
from perpixel.models import build
from perpixel.recipe import Recipe, read_recipe
from perpixel.run import Run
from perpixel.train import train


def command(sample_set, out, settings, *more):
    options = [part for setting in settings for part in ("--set", setting)]
    return ["-m", "perpixel", "train", str(sample_set / "images"), str(sample_set / "masks"), "-o", str(out), *options, *more]


def same(first, second):
    first, second = load_file(first), load_file(second)
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


def test_a_run_leaves_everything_the_readme_names(run):
    files = {"best.safetensors", "last.safetensors", "resume.safetensors", "recipe.yaml", "metrics.csv", "evaluation.json", "validation"}
    assert files <= {path.name for path in run.iterdir()}
    pictures = sorted((run / "validation").iterdir())
    assert len(pictures) == 4
    assert read_image(pictures[0]).shape == (3, 64, 3 * 96)


def test_training_lowers_the_cost(sample_set, tmp_path, tiny_settings):
    settings = [*tiny_settings, "train.lr=0.01", "train.loss=[{name: cross_entropy}]"]
    train(sample_set / "images", sample_set / "masks", out=tmp_path, steps=80, settings=settings)
    with (tmp_path / "metrics.csv").open() as file:
        costs = [float(row["cost"]) for row in csv.DictReader(file)]
    assert costs[-1] < 0.6 * costs[0]


def test_killed_at_any_moment_and_resumed_it_ends_with_the_weights_of_an_uninterrupted_run(sample_set, tmp_path, tiny_settings):
    """SIGKILL after the first checkpoint, again a little later, then --resume to the end: every weight is bit-equal."""
    settings = [*tiny_settings, "train.validations=8", "train.ema=0.9", "train.augment.rotation=20"]
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    environment = dict(os.environ, OMP_NUM_THREADS="2")
    state = killed / "resume.safetensors"
    subprocess.run([sys.executable, *command(sample_set, whole, settings, "--steps", "40")], check=True, env=environment)
    for pause in (0.0, 0.4):
        resumed = [sys.executable, *command(sample_set, killed, settings, "--steps", "40", "--resume")]
        process = subprocess.Popen(resumed, env=environment)
        before = state.stat().st_mtime_ns if state.exists() else 0
        while process.poll() is None and not (state.exists() and state.stat().st_mtime_ns > before):
            time.sleep(0.005)
        time.sleep(pause)
        process.send_signal(signal.SIGKILL)
        assert process.wait() == -signal.SIGKILL, "the run ended before it could be killed; make it longer"
    subprocess.run([sys.executable, *command(sample_set, killed, settings, "--resume")], check=True, env=environment)
    assert same(whole / "last.safetensors", killed / "last.safetensors")
    assert same(whole / "best.safetensors", killed / "best.safetensors")
    with (whole / "metrics.csv").open() as first, (killed / "metrics.csv").open() as second:
        assert [row["step"] for row in csv.DictReader(first)] == [row["step"] for row in csv.DictReader(second)]


@pytest.mark.parametrize("optimizer", ["adamw", "sgd"])
def test_a_run_stopped_within_a_process_goes_on_bit_identically_for_each_optimizer(
    sample_set, tmp_path, tiny_settings, monkeypatch, optimizer
):
    """bf16, dropout and averaged weights included; the optimiser's state must come back in the layout of its parameters."""
    settings = [*tiny_settings, f"train.optimizer={optimizer}", "train.lr=0.01", "model.options.dropout=0.2", "train.ema=0.9"]
    settings[settings.index("train.precision=32-true")] = "train.precision=bf16-mixed"
    images, masks, save = sample_set / "images", sample_set / "masks", Run.save
    train(images, masks, out=tmp_path / "whole", steps=12, settings=settings)

    def save_and_stop(run):
        save(run)
        raise KeyboardInterrupt

    monkeypatch.setattr(Run, "save", save_and_stop)
    with pytest.raises(KeyboardInterrupt):
        train(images, masks, out=tmp_path / "stopped", steps=12, settings=settings)
    monkeypatch.setattr(Run, "save", save)
    outcome = train(images, masks, out=tmp_path / "stopped", resume=True)
    assert outcome.step == 12
    for name in ("last.safetensors", "best.safetensors"):
        assert same(tmp_path / "whole" / name, tmp_path / "stopped" / name)


def test_images_made_on_the_device_train_the_same_weights(sample_set, tmp_path, tiny_settings):
    settings = [*tiny_settings, "train.augment.rotation=20", "train.augment.hue=0.1", "train.batch_norm_pass=true"]
    for name in ("false", "true"):
        asked = [*settings, f"train.augment_on_device={name}"]
        train(sample_set / "images", sample_set / "masks", out=tmp_path / name, steps=6, settings=asked)
    assert same(tmp_path / "false" / "last.safetensors", tmp_path / "true" / "last.safetensors")


def test_a_resumed_run_keeps_its_recipe(sample_set, run):
    with pytest.raises(ValueError, match=r"recipe\.yaml says otherwise about train\.lr\."):
        train(sample_set / "images", sample_set / "masks", out=run, resume=True, settings=["train.lr=0.5"])


def test_resuming_where_nothing_is_says_so_and_trains(sample_set, tmp_path, tiny_settings):
    console = Console(record=True, width=200)
    images, masks = sample_set / "images", sample_set / "masks"
    assert train(images, masks, out=tmp_path / "new", steps=1, settings=tiny_settings, resume=True, console=console).step == 1
    assert "nothing to resume" in console.export_text()


def test_pictures_of_the_validation_are_those_of_the_best_bundle(sample_set, tmp_path, tiny_settings, monkeypatch):
    """Every validation after the first is made to score nothing, so the first stays the best."""
    drawn, draw, honest = [], Run._draw, run_module.score

    def score(*arguments, **named):
        result = honest(*arguments, **named)
        if validations := len(scored):
            with torch.inference_mode():
                result.confusion.counts[:, 0] += validations * 10**6
        scored.append(result)
        return result

    scored = []
    monkeypatch.setattr(run_module, "score", score)
    monkeypatch.setattr(Run, "_draw", lambda run, *rest: (drawn.append(run.place.step), draw(run, *rest)))
    outcome = train(sample_set / "images", sample_set / "masks", out=tmp_path, steps=6, settings=[*tiny_settings, "train.validations=3"])
    assert len(scored) == 4  # and once more in the end, for all scores of the best
    assert set(drawn) == {outcome.best_step} == {2}


@pytest.mark.parametrize(("precision", "dtype"), [("bf16-mixed", torch.bfloat16), ("32-true", torch.float32)])
def test_the_network_trains_in_the_precision_of_the_recipe(sample_set, tmp_path, tiny_settings, monkeypatch, precision, dtype):
    seen, convolve = set(), torch.nn.Conv2d.forward

    def forward(layer, x):
        out = convolve(layer, x)
        if layer.training:
            seen.add(out.dtype)
        return out

    monkeypatch.setattr(torch.nn.Conv2d, "forward", forward)
    settings = [setting for setting in tiny_settings if "precision" not in setting]
    train(sample_set / "images", sample_set / "masks", out=tmp_path, steps=1, settings=[*settings, f"train.precision={precision}"])
    told = json.loads((tmp_path / "evaluation.json").read_text())["precision"]
    assert told == {torch.bfloat16: "bf16", torch.float32: "float32"}[dtype]  # that of its scores, in the words of `evaluate`
    assert seen == {dtype}


def test_a_finished_run_that_is_resumed_changes_nothing(sample_set, run):
    before = {path.name: path.read_bytes() for path in run.iterdir() if path.is_file()}
    outcome = train(sample_set / "images", sample_set / "masks", out=run, resume=True)
    assert outcome.step == 12
    assert {path.name: path.read_bytes() for path in run.iterdir() if path.is_file()} == before


def test_a_budget_that_reading_uses_up_is_an_error_and_no_model(sample_set, tmp_path, tiny_settings):
    with pytest.raises(ValueError, match="were over before the first step"):
        train(sample_set / "images", sample_set / "masks", out=tmp_path, minutes=1e-6, settings=tiny_settings)
    assert not (tmp_path / "best.safetensors").exists()


def test_a_misspelt_model_option_names_the_nearest_legal_one(sample_set, tmp_path):
    with pytest.raises(ValueError, match=r"--set: model\.options\.widht: unknown key; did you mean 'width'"):
        train(sample_set / "images", sample_set / "masks", out=tmp_path, steps=2, settings=["model.options.widht=4"])


def test_converting_norms_for_several_gpus_keeps_the_network_the_same_function():
    """timm's norms hold an activation, which PyTorch's own conversion would drop."""
    model = build("unet", 2, encoder="mobilenetv2_100", decoder_channels=[8, 8, 8, 8], head_stride=2).eval()
    image = torch.randn(1, 3, 64, 64)
    with torch.inference_mode():
        before = model.encoder(image).maps
        after = convert_sync_batchnorm(model).eval().encoder(image).maps
    for one, other in zip(before, after, strict=True):
        torch.testing.assert_close(one, other)


def test_two_gloo_processes_give_the_weights_of_one_for_the_same_global_batch(sample_set, tmp_path):
    """DDP averages gradients of equal shares, and the cost is a mean over samples, so nothing may differ beyond rounding.

    The U-Net of 2015 has no batch norm, whose statistics are per process.
    """
    settings = ["model.name=unet_paper", "model.options={width: 2, dropout: 0.0}", "train.crop=[188, 188]", "train.batch=4"]
    settings += ["train.precision=32-true", "train.validations=1", "train.ema=null", "train.optimizer=sgd", "train.lr=0.1"]
    one, two = tmp_path / "one", tmp_path / "two"
    train(sample_set / "images", sample_set / "masks", out=one, steps=4, settings=settings)
    launcher = ["-m", "torch.distributed.run", "--nproc_per_node", "2", "--master_port", "0", "--standalone"]
    subprocess.run([sys.executable, *launcher, *command(sample_set, two, settings, "--steps", "4")], check=True, capture_output=True)
    first, second = load_file(one / "last.safetensors"), load_file(two / "last.safetensors")
    for name, weight in first.items():
        torch.testing.assert_close(second[name], weight, rtol=1e-4, atol=1e-6)


def test_the_written_recipe_is_itself_a_valid_input_and_gives_the_same_weights(sample_set, run, tmp_path):
    recipe = Recipe.model_validate(read_recipe(run / "recipe.yaml"))
    assert recipe.train.steps == 12
    train(sample_set / "images", sample_set / "masks", out=tmp_path, recipe=run / "recipe.yaml")
    assert same(run / "last.safetensors", tmp_path / "last.safetensors")


def test_minutes_are_a_wall_clock_budget(sample_set, tmp_path, tiny_settings):
    start = time.monotonic()
    outcome = train(sample_set / "images", sample_set / "masks", out=tmp_path, minutes=0.15, settings=tiny_settings)
    assert outcome.step > 1
    assert time.monotonic() - start < 60  # the budget is 9 seconds; the rest is room for a busy machine


def test_a_finished_run_is_not_overwritten_without_resume(sample_set, run, tiny_settings):
    before = (run / "last.safetensors").read_bytes()
    with pytest.raises(ValueError, match="--resume"):
        train(sample_set / "images", sample_set / "masks", out=run, steps=2, settings=tiny_settings)
    assert (run / "last.safetensors").read_bytes() == before


def test_a_run_resumed_on_other_images_is_refused(sample_set, run, tmp_path, tiny_settings):
    from perpixel.data.samples import write_samples

    write_samples(tmp_path, train=5, val=2, height=64, width=96)
    with pytest.raises(ValueError, match="not those that this run was started on"):
        train(tmp_path / "images", tmp_path / "masks", out=run, resume=True)


def test_a_batch_of_one_trains(sample_set, tmp_path, tiny_settings):
    outcome = train(sample_set / "images", sample_set / "masks", out=tmp_path, steps=2, settings=[*tiny_settings, "train.batch=1"])
    assert outcome.step == 2


def test_a_data_set_of_one_image_smaller_than_the_crop_trains(tmp_path, tiny_settings):
    rng = torch.Generator().manual_seed(0)
    for folder in ("images", "masks"):
        (tmp_path / folder).mkdir()
    write_rgb(tmp_path / "images" / "a.png", torch.randint(0, 256, (40, 50, 3), dtype=torch.uint8, generator=rng).numpy())
    labels = torch.randint(0, 2, (40, 50), dtype=torch.uint8, generator=rng).numpy()
    write_labels(tmp_path / "masks" / "a.png", labels, [(0, 0, 0), (255, 0, 0)])
    outcome = train(tmp_path / "images", tmp_path / "masks", out=tmp_path / "run", steps=2, settings=tiny_settings)
    assert outcome.step == 2


def test_a_class_never_seen_trains_and_is_left_out_of_the_mean(sample_set, tmp_path, tiny_settings):
    names = "sky,water,reeds,bird,fish,boat"
    outcome = train(sample_set / "images", sample_set / "masks", out=tmp_path, steps=2, classes=names, settings=tiny_settings)
    boat = outcome.scores["classes"][5]
    assert boat["name"] == "boat"
    assert boat["pixels"] == 0


def test_a_cost_that_explodes_stops_with_advice(sample_set, tmp_path, tiny_settings):
    settings = [*tiny_settings, "train.lr=1e30", "train.clip=null", "train.optimizer=sgd", "train.warmup=0"]
    with pytest.raises(ValueError, match=r"the cost became .* Try a lower learning rate"):
        train(sample_set / "images", sample_set / "masks", out=tmp_path, steps=20, settings=settings)


def test_a_crop_that_the_model_cannot_take_names_the_nearest_legal_one(sample_set, tmp_path):
    settings = ["model.name=unet_paper", "train.crop=[200, 200]"]
    with pytest.raises(ValueError, match=r"200x200; unet_paper needs sides of 16\*k \+ 12, at least 188\. The nearest is 204x204"):
        train(sample_set / "images", sample_set / "masks", out=tmp_path, steps=2, settings=settings)


@pytest.mark.parametrize("loss", ["cross_entropy", "dice", "focal", "lovasz_softmax"])
def test_every_loss_trains(sample_set, tmp_path, tiny_settings, loss):
    settings = [*tiny_settings, f"train.loss=[{{name: {loss}}}]", "train.validations=1"]
    assert train(sample_set / "images", sample_set / "masks", out=tmp_path, steps=2, settings=settings).step == 2


@pytest.mark.parametrize("schedule", ["poly", "one_cycle", "step", "constant"])
@pytest.mark.parametrize("optimizer", ["adamw", "sgd"])
def test_every_schedule_and_optimizer_trains(sample_set, tmp_path, tiny_settings, schedule, optimizer):
    settings = [*tiny_settings, f"train.schedule={schedule}", f"train.optimizer={optimizer}", "train.validations=1"]
    assert train(sample_set / "images", sample_set / "masks", out=tmp_path, steps=2, settings=settings).step == 2


def test_training_from_python_says_nothing_that_was_not_asked_for(sample_set, tmp_path, tiny_settings, capfd):
    settings = [*tiny_settings, "train.precision=bf16-mixed", "train.validations=1"]
    train(sample_set / "images", sample_set / "masks", out=tmp_path, steps=1, settings=settings)
    assert capfd.readouterr() == ("", "")


def test_classes_or_labels_that_contradict_the_recipe_are_refused_and_those_that_repeat_it_are_not(sample_set, run, tmp_path):
    own = read_recipe(run / "recipe.yaml")["data"]
    names = ",".join(own["classes"])
    for out, more in ((run, {"resume": True}), (tmp_path, {"recipe": str(run / "recipe.yaml")})):
        with pytest.raises(ValueError, match="--classes names other classes than the recipe"):
            train(sample_set / "images", sample_set / "masks", out=out, classes="a," + names, **more)
        with pytest.raises(ValueError, match=r"--label 2=255, but the recipe makes 2 of 2"):
            train(sample_set / "images", sample_set / "masks", out=out, labels={2: 255}, **more)
    same = train(sample_set / "images", sample_set / "masks", out=run, classes=names, labels={2: 2}, resume=True)
    assert same.recipe.data.classes == own["classes"]


@pytest.mark.parametrize(("setting", "length"), [("train.steps=5", {"minutes": 1.0}), ("train.minutes=1", {"steps": 5})])
def test_a_length_among_the_settings_and_another_are_refused(sample_set, tmp_path, setting, length):
    with pytest.raises(ValueError, match="are given; give one of them"):
        train(sample_set / "images", sample_set / "masks", out=tmp_path, settings=[setting], **length)


def test_images_with_border_weights_that_are_not_cached_can_be_handed_to_worker_processes(sample_set, tmp_path, tiny_settings, monkeypatch):
    """Where Python starts them afresh (forkserver, spawn), what they work on is pickled."""
    sent = []

    def first_step(self, images, labels, weights, rate):
        sent.append((pickle.loads(pickle.dumps(self.stream))[0][2], self.stream[0][2]))
        raise KeyboardInterrupt

    monkeypatch.setattr(Run, "train_step", first_step)
    settings = [*tiny_settings, "train.border_weights=true", "train.cache=false", "train.class_weights=median_frequency"]
    with contextlib.suppress(KeyboardInterrupt):
        train(sample_set / "images", sample_set / "masks", out=tmp_path, steps=2, settings=settings)
    there, here = sent[0]
    assert torch.equal(there, here)
