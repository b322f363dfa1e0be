"""The command line: what each command prints and writes, and its exit code."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from importlib import metadata

import numpy as np
import pytest
from PIL import Image

from perpixel import demo as demo_module
from perpixel.bundle import load_bundle
from perpixel.data.samples import write_samples
from perpixel.evaluate import evaluate
from perpixel.models import MODELS, build
from perpixel.recipe import Recipe, read_recipe


def options(settings) -> list[str]:
    return [part for setting in settings for part in ("--set", setting)]


# ---- check


def test_check_prints_a_table_for_people_and_ends_with_0(command, sample_set):
    said = command("check", sample_set / "images", sample_set / "masks")
    assert said.code == 0
    assert all(name in said.out for name in ("sky", "water", "reeds", "bird", "fish"))
    assert "ready to train on 8 images" in said.out


def test_check_prints_json_alone_for_programs(command, sample_set):
    said = command("check", sample_set / "images", sample_set / "masks", "--json")
    report = json.loads(said.out)
    assert (said.code, said.err) == (0, "")
    assert report["ready"]
    assert report["splits"] == {"train": 8, "val": 4}


def test_check_takes_classes_and_the_meaning_of_mask_values(command, sample_set, tmp_path):
    for part in ("images", "masks"):
        (tmp_path / part).symlink_to(sample_set / part)  # away from classes.txt
    said = command("check", tmp_path / "images", tmp_path / "masks", "--classes", "land,wet", "--label", "0=0", "--label", "1=1",
                   *("--label", "2=ignore", "--label", "3=ignore", "--label", "4=ignore", "--json"))  # fmt: skip
    report = json.loads(said.out)
    assert said.code == 0
    assert [row["name"] for row in report["classes"]] == ["land", "wet"]
    assert report["masks"]["label_map"]["values"] == {"0": 0, "1": 1, "2": 255, "3": 255, "4": 255}


def test_check_ends_with_2_where_training_cannot_start_in_json_too(command, sample_set):
    for more in ((), ("--json",)):
        said = command("check", sample_set / "images", sample_set / "masks", "--classes", "sky,water", *more)
        assert said.code == 2
        assert "say of each of the other 3 what it is" in said.out
    assert json.loads(said.out)["ready"] is False


@pytest.mark.parametrize("arguments", [(), ("--classes", "a"), ("--label", "255:1")])
def test_check_gives_a_program_the_same_keys_where_it_cannot_even_look(command, sample_set, tmp_path, arguments):
    sound = json.loads(command("check", sample_set, "--json").out)
    said = command("check", tmp_path, "--json", *arguments)
    report = json.loads(said.out)
    assert said.code == 2
    assert set(report) == set(sound)
    assert (report["format"], report["ready"], len(report["problems"])) == (1, False, 1)
    assert report["problems"][0] in said.err


# ---- train


def test_train_plans_trains_and_says_what_comes_next(command, sample_set, tmp_path, tiny_settings):
    said = command("train", sample_set / "images", sample_set / "masks", "-o", tmp_path / "run", "--steps", 3, *options(tiny_settings))
    assert said.code == 0
    assert "train.crop" in said.out
    assert re.search(r"best at step \d of 3: mIoU 0\.\d+", said.out)
    assert f"perpixel predict {tmp_path}/run/best.safetensors" in said.out
    recipe = Recipe.model_validate(read_recipe(tmp_path / "run" / "recipe.yaml"))
    assert (recipe.train.steps, recipe.train.crop) == (3, (64, 64))
    assert load_bundle(tmp_path / "run" / "best.safetensors").card.classes[3] == "bird"


def test_train_takes_a_recipe_file_and_resumes(command, sample_set, tmp_path, tiny_settings):
    (tmp_path / "short.yaml").write_text("train:\n  steps: 2\n  batch: 2\n")
    start = ["train", sample_set / "images", sample_set / "masks", "-o", tmp_path / "run"]
    assert command(*start, "--recipe", tmp_path / "short.yaml", *options(s for s in tiny_settings if "batch" not in s)).code == 0
    assert read_recipe(tmp_path / "run" / "recipe.yaml")["train"]["batch"] == 2
    refused = command(*start, "--steps", 2)
    assert (refused.code, "--resume" in refused.err) == (2, True)
    again = command(*start, "--resume")
    assert again.code == 0
    assert "best at step" in again.out


def test_interrupted_training_says_how_to_go_on_and_ends_with_130(sample_set, tmp_path, tiny_settings):
    arguments = ["train", str(sample_set / "images"), str(sample_set / "masks"), "-o", str(tmp_path), "--steps", "100000"]
    process = subprocess.Popen(
        [sys.executable, "-m", "perpixel", *arguments, *options(tiny_settings)],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        env=dict(os.environ, OMP_NUM_THREADS="1"),
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # a shell's background job would ignore it
    )
    while process.poll() is None and not (tmp_path / "metrics.csv").exists():
        time.sleep(0.02)
    process.send_signal(signal.SIGINT)
    try:
        _, err = process.communicate(timeout=300)
    finally:
        process.kill()
    assert process.returncode == 130
    assert "--resume" in err
    assert "Traceback" not in err


# ---- evaluate


def test_evaluate_prints_scores_for_people(command, run, sample_set):
    said = command("evaluate", run / "best.safetensors", sample_set / "images", sample_set / "masks")
    assert said.code == 0
    for words in ("pixel accuracy", "mean accuracy", "mIoU", "frequency-weighted IoU", "Dice", "cost", "val/0000.png", "fish"):
        assert words in said.out


def test_evaluate_prints_the_same_scores_as_json(command, run, sample_set):
    said = command("evaluate", run / "best.safetensors", sample_set / "images", sample_set / "masks", "--split", "train", "--json")
    told = json.loads(said.out, parse_constant=lambda word: pytest.fail(f"{word} is no JSON"))
    expected = evaluate(run / "best.safetensors", sample_set / "images", sample_set / "masks", split="train").to_json()
    assert (said.code, said.err) == (0, "")
    assert told["images"] == 8
    assert told["confusion"] == expected["confusion"]
    assert told["losses"] == pytest.approx(expected["losses"])


# ---- predict


def test_predict_writes_labels_overlays_and_probabilities(command, run, sample_set, tmp_path):
    said = command(
        "predict", run / "best.safetensors", sample_set / "images" / "val", "-o", tmp_path / "out", "--overlay", "--probabilities"
    )
    assert said.code == 0
    assert "4 label images in" in said.out
    written = sorted(str(path.relative_to(tmp_path / "out")) for path in (tmp_path / "out").rglob("*.*"))
    names = [f"{n:04d}" for n in range(4)]
    assert written == sorted([f"{n}.png" for n in names] + [f"overlays/{n}.jpg" for n in names] + [f"probabilities/{n}.npy" for n in names])
    labels = np.asarray(Image.open(tmp_path / "out" / "0002.png"))
    probabilities = np.load(tmp_path / "out" / "probabilities" / "0002.npy").astype(float)
    chosen = np.take_along_axis(probabilities, labels[None].astype(int), axis=0)
    assert (chosen > probabilities.max(axis=0) - 1e-3).all()  # float16 makes ties


# ---- the rest


def test_models_lists_everything_that_can_be_built_with_its_parameters(command):
    said = command("models")
    assert said.code == 0
    assert all(name in said.out for name in MODELS)
    assert "31,030,658" in said.out  # U-Net of 2015: counted from Fig. 1 in tests/papers
    parameters = sum(parameter.numel() for parameter in build("unet", 2).parameters())
    assert f"{parameters:,}" in said.out


def test_demo_goes_the_whole_way(command, tmp_path, monkeypatch):
    monkeypatch.setattr(demo_module, "write_samples", lambda folder, **_: write_samples(folder, train=4, val=2, height=64, width=96))
    said = command("demo", "-o", tmp_path / "demo", "--minutes", 0.15)
    assert said.code == 0
    assert "2 label images" in said.out
    for path in ("samples/images/val/0000.png", "run/best.safetensors", "labels/0000.png", "labels/overlays/0001.jpg"):
        assert (tmp_path / "demo" / path).is_file()
    for path in ("samples", "run/best.safetensors", "run/recipe.yaml", "run/metrics.csv", "labels", "labels/overlays"):
        assert f" {tmp_path}/demo/{path}\n" in said.out


def test_the_version_is_that_of_the_package(command):
    said = command("--version")
    assert (said.code, said.out) == (0, f"perpixel {metadata.version('perpixel')}\n")
    assert "Semantic segmentation: every pixel" in command("--help").out


@pytest.mark.parametrize("name", ["check", "train", "evaluate", "predict", "models", "demo"])
def test_every_command_explains_itself(command, name):
    said = command(name, "--help")
    assert said.code == 0
    assert "Usage" in said.out


@pytest.mark.parametrize(
    "arguments", [("chek",), ("predict",), ("train", "x", "--steps", "0"), ("train", "x", "--minutes", "soon"), ("check", "x", "--jsn")]
)
def test_a_command_that_cannot_be_understood_ends_with_2(command, arguments):
    assert command(*arguments).code == 2


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("check", "no/such/folder"), "no/such/folder: there is no such file or folder"),
        (("train", "no/such/folder", "--steps", 1), "no/such/folder: there is no such file or folder"),
        (("train", "x", "--recipe", "unet_papr"), "Did you mean 'unet_paper'"),
        (("train", "x", "--steps", 1, "--minutes", 1), "both steps and minutes are given"),
        (("check", "x", "--label", "255:1"), "--label 255:1: legal is VALUE=CLASS"),
        (("check", "x", "--label", "255=1", "--label", "255=0"), "--label 255=0: the same mask value has another meaning already"),
        (("refine", "scores.npy", "photo.jpg"), "swapped? The image comes first: perpixel refine photo.jpg scores.npy"),
        (("predict", "no.safetensors", "x"), "no.safetensors: no such file"),
        (("evaluate", "no.safetensors", "x"), "no.safetensors: no such file"),
        (("certify", "no.safetensors"), "no.safetensors: no such file. A bundle is written by"),
        (("predict", "a.png", "m.safetensors"), "swapped? The bundle comes first: perpixel predict m.safetensors a.png"),
        (("predict", "a.png", "b.png", "m.safetensors"), "perpixel predict m.safetensors a.png b.png"),
        (("evaluate", "images", "m.safetensors"), "perpixel evaluate m.safetensors images"),
        (("evaluate", "images", "masks", "m.safetensors"), "perpixel evaluate m.safetensors images masks"),
        (("calibrate", "images", "m.safetensors"), "perpixel calibrate m.safetensors images"),
        (("tune", "images", "masks", "m.safetensors"), "perpixel tune m.safetensors images masks"),
    ],
)
def test_bad_input_is_one_message_on_standard_error_and_exit_code_2(command, tmp_path, monkeypatch, arguments, message):
    monkeypatch.chdir(tmp_path)
    said = command(*arguments)
    assert (said.code, said.out.strip()) == (2, "")
    assert said.err.startswith("error: ")
    assert message in said.err
    assert len(said.err.strip().splitlines()) == 1
    assert list(tmp_path.iterdir()) == []


def test_a_message_is_shown_as_it_is_whatever_brackets_the_name_holds(command, tmp_path):
    folder = tmp_path / "[red]scans"
    folder.mkdir()
    assert str(folder) in command("check", folder).err


def test_as_a_program_it_ends_likewise(tmp_path):
    """Through `python -m perpixel`, as a shell would call it."""
    done = subprocess.run([sys.executable, "-m", "perpixel", "check", "no/such"], capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 2
    assert done.stdout == ""
    assert done.stderr.strip() == "error: no/such: there is no such file or folder. Correct the path."
