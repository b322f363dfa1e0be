"""What was asked and done: the files that a run leaves beside its bundle, versions, machine, the commands to repeat it."""

import csv
import math
import platform
import shlex
from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import date
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import yaml

from perpixel import __version__
from perpixel.bundle import Card
from perpixel.plan import this_machine
from perpixel.recipe import Recipe

STATED = {"batch", "crop", "optimizer", "lr", "loss", "seed"}  # of training, in every recipe that a run writes
LIBRARIES = ("torch", "torchvision", "timm", "numpy")


@dataclass(frozen=True)
class RunFiles:
    """What the folder of a run says of it; empty where a bundle lies alone."""

    recipe: str = ""  # YAML, without the reasons
    parts: dict[str, Any] = field(default_factory=dict)  # the same as mappings
    reasons: tuple[tuple[str, str], ...] = ()  # (key, value and reason)
    rows: tuple[dict[str, float], ...] = ()  # of metrics.csv, the numbers that each row has


def read_run(folder: Path) -> RunFiles:
    """The recipe and learning curves in a folder; what is missing or can't be read is left out, since a bundle may lie anywhere."""
    text = _text(folder / "recipe.yaml")
    comments = [line for line in text.splitlines() if line.startswith("# ")]
    reasons = [(key, why) for key, colon, why in (line[2:].partition(": ") for line in comments) if colon]
    recipe = "\n".join(line for line in text.splitlines() if not line.startswith("# "))
    parts = _of_a_run(recipe)
    rows = tuple(_numbers(row) for row in csv.DictReader(_text(folder / "metrics.csv").splitlines()))
    return RunFiles(recipe, parts, tuple(reasons), rows) if parts else RunFiles(rows=rows)


def _of_a_run(text: str) -> dict[str, Any]:
    """The sections of a run's recipe; empty where it is not legal, or does not state what is told of a run: defaults need not be what
    was done."""
    try:
        recipe = Recipe.model_validate(yaml.safe_load(text))
    except (yaml.YAMLError, ValueError):
        return {}
    stated = {"data", "model"} <= recipe.model_fields_set and recipe.train.model_fields_set >= STATED
    return recipe.model_dump(mode="json") if stated else {}


def _text(path: Path) -> str:
    try:
        return path.read_text("utf-8")
    except (OSError, UnicodeDecodeError):
        return ""


def _numbers(row: dict[str, str]) -> dict[str, float]:
    found = {}
    for key, text in row.items():
        try:
            number = float(text)
        except (TypeError, ValueError):  # an empty cell, or a row cut short
            continue
        if math.isfinite(number):
            found[key] = number
    return found


def commands(run: RunFiles, folder: Path, evaluated: Sequence[str]) -> list[tuple[str, str]]:
    """(words, command line) to train and to score again; training only where the folder has the recipe."""
    found = []
    if run.parts:
        data = [str(run.parts["data"][key]) for key in ("images", "masks") if run.parts["data"].get(key)]
        again = ["perpixel", "train", *data, "-o", f"{folder}-again", "--recipe", str(folder / "recipe.yaml")]
        found.append(("To train it again", shlex.join(again)))
    return [*found, ("To score it again", shlex.join(evaluated))]


def facts(card: Card, run: RunFiles, bundle: Path, data: str, refined: str) -> list[tuple[str, str]]:
    """(term, value): model, data, training, machine and versions."""
    name = f"{card.model}, encoder {card.encoder}" if card.encoder else card.model
    bands = "band" if card.bands == 1 else "bands"
    found = [
        ("Model", name),
        ("Bundle", str(bundle)),
        ("Scored on", data),
        ("Refinement", refined),
        ("Images", f"{card.bands} {bands} of {card.dtype}; windows of {card.tile}, overlap {card.overlap}"),
    ]
    if run.parts:
        found += _training(run)
    libraries = ", ".join(f"{name} {_version(name)}" for name in LIBRARIES)
    return [
        *found,
        ("Split", f"the set's own parts, else {100 * card.val_fraction:g} % for validation by seed {card.split_seed}"),
        ("Scored with", f"perpixel {__version__}, Python {platform.python_version()}, {libraries}"),
        ("Scored on machine", f"{this_machine().words}; {platform.system()} {platform.machine()}"),
        ("Date", date.today().isoformat()),
    ]


def _training(run: RunFiles) -> list[tuple[str, str]]:
    train, model = run.parts["train"], run.parts["model"]
    start = model.get("start_from") or model.get("encoder_weights")
    length = f"{train.get('steps')} steps" if train.get("steps") else f"{train.get('minutes')} minutes"
    if last := run.rows[-1:]:
        length += f" asked; {last[0].get('step', 0):.0f} steps in {last[0].get('seconds', 0) / 60:.1f} minutes done"
    crop = "x".join(str(side) for side in train.get("crop", []))
    losses = " + ".join(f"{term.get('weight', 1):g} {term.get('name')}" for term in train.get("loss", []))
    return [
        ("Start", "random weights" if start in (None, False) else "downloaded weights" if start is True else str(start)),
        ("Training", f"{length}; batches of {train.get('batch')} crops of {crop}; {train.get('optimizer')}, rate {train.get('lr'):g}"),
        ("Loss", losses),
        ("Seed", str(train.get("seed"))),
    ]


def _version(name: str) -> str:
    try:
        return version(name)
    except PackageNotFoundError:
        return "?"
