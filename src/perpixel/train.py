"""Train: check the data, plan the run, fit the weights. The loop, `fit`, is one visible function on Lightning Fabric."""

import logging
import os
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from lightning.fabric import Fabric
from rich.console import Console
from rich.markup import escape
from rich.progress import Progress

from perpixel.bundle import Card, read_card, read_tensors
from perpixel.check import Check, check, render
from perpixel.data.class_names import read_classes
from perpixel.data.masks import LabelMap
from perpixel.optimisation import Clock, learning_rate, validation_seconds
from perpixel.plan import plan, this_machine
from perpixel.progress import TrainingLog
from perpixel.recipe import Recipe, TrainSection, differing_keys, merge, read_recipe, stated_and_asked, to_yaml, value_at
from perpixel.run import Run, write_text

SAVE_EVERY = 60.0  # seconds between checkpoints, so that a kill costs a minute at most


@dataclass
class Outcome:
    """What a finished run leaves: the folder with best.safetensors, and the scores of that bundle on the validation part."""

    out: Path
    recipe: Recipe
    step: int
    best_step: int
    scores: dict[str, Any]  # of best.safetensors, as in OUT/evaluation.json


def train(
    images: Path | str,
    masks: Path | str | None = None,
    *,
    out: Path | str,
    recipe: str | Path | None = None,
    fast: bool = False,
    settings: Sequence[str] = (),
    steps: int | None = None,
    minutes: float | None = None,
    resume: bool = False,
    classes: str | None = None,
    labels: Mapping[int, int] | None = None,
    console: Console | None = None,
) -> Outcome:
    """Check, plan and train; writes everything below `out`.

    Args:
        images, masks: any layout that `perpixel check` understands.
        recipe: name of a shipped recipe, or a YAML file with any part of one; what it leaves out is planned.
        fast: of the recipe take the network and its input alone, and plan today's training for it: AdamW, one cycle, bf16 where the
            machine has it, averaged weights.
        settings: `key=value` texts that win over the recipe.
        steps, minutes: where the run ends; at most one. Minutes are wall-clock, counted from this call.
        resume: go on where a killed or interrupted run in `out` stood, with its recipe; the other arguments must not contradict it.
        classes, labels: as for `perpixel check`.

    Raises:
        ValueError: the data can't be trained on, the recipe is wrong, or `out` holds a run already and `resume` is False.
    """
    started, out = time.monotonic(), Path(out)
    console = console or Console(quiet=True)
    if os.environ.get("RANK", "0") != "0":
        console = Console(quiet=True)  # the first process of `torchrun` speaks for all
    if not resume and (out / "resume.safetensors").exists():
        raise ValueError(f"{out} holds a run already. Add --resume (in Python resume=True) to go on with it, or choose another folder.")
    stated, asked = stated_and_asked(recipe, fast, settings, steps, minutes)
    given, origins = merge(stated, asked), [("as you asked", asked), ("as the recipe says", stated)]
    resumed = resume and (out / "recipe.yaml").exists()
    if resumed:
        given = _resumed(out / "recipe.yaml", given, asked)
    _refuse_other_meaning(classes, labels, given.get("data", {}))
    start = None if resumed else given.get("model", {}).get("start_from")
    if start:
        if asked.get("model", {}).get("encoder_weights"):
            raise ValueError("model.start_from and model.encoder_weights both say where the encoder starts; give one of them")
        card = read_card(Path(start), read_tensors(Path(start))[1])
        own = _of_bundle(card)
        given = merge(own, given, {"model": {"encoder_weights": None}})
        origins.append((f"as {start} has it", own))
    if resume and not resumed:
        console.print(f"nothing to resume in {escape(str(out))}: a new run starts there", soft_wrap=True)
    report = _checked(images, masks, classes, labels, given.get("data", {}), console)
    if start:
        given = _fitting(given, start, card, report, console)
    given = merge(given, {"data": {"images": str(images), "masks": None if masks is None else str(masks)}})
    full, reasons = plan(report, this_machine(), given, origins)
    if not resumed:
        _announce(report, reasons, asked, console)
    return fit(full, report, out, console, started, None if resumed else reasons)


def fit(recipe: Recipe, report: Check, out: Path, console: Console, started: float, reasons: Mapping[str, str] | None) -> Outcome:
    """The loop: forward, backward, step; validate, keep the best, save the state. Each process of `torchrun` runs it.

    With `reasons` the recipe is written; without, the one in `out` stays, as it is that of the run to go on with.

    Sampling, augmentation and dropout are pure functions of (seed, step), so on a CPU a resumed run ends with the weights of an
    uninterrupted one, bit for bit. (Some of PyTorch's CUDA kernels add in no fixed order.)
    """
    section = recipe.train
    fabric = _fabric(section)
    run = Run(fabric.broadcast(recipe), report, fabric, out, fresh=not (out / "resume.safetensors").exists())
    run.restore()
    if run.stayed_new:
        console.print(f"not in {escape(str(recipe.model.start_from))}, so these start anew: {_briefly(run.stayed_new)}", soft_wrap=True)
    if fabric.is_global_zero and reasons is not None:
        write_text(out / "recipe.yaml", to_yaml(recipe, reasons))
    place, clock = run.place, Clock(section, started, run.place.seconds)
    if place.step and not place.finished:
        console.print(f"going on after step {place.step}")
    if place.finished:
        return Outcome(out, recipe, place.step, place.best_step, place.scores)
    with TrainingLog(out, console, section, place.step, writes=fabric.is_global_zero) as log:
        for images, labels, weights in log.waiting(run.batches(place.step)):
            progress = fabric.broadcast(clock.progress(place.step))
            if progress >= 1:
                break
            rate = section.lr * learning_rate(section, progress)
            value = run.train_step(images, labels, weights, rate)
            place.step, place.seconds = place.step + 1, clock.elapsed
            after = fabric.broadcast(clock.progress(place.step))
            log.step(place.step, after, place.seconds, value, rate, clock.left(place.step))
            clock.expect(validation_seconds(log.fastest, section, report.validation_pixels, len(run.train_images)))
            log.foresee(clock.overrun)
            due = fabric.broadcast(clock.due(after, place.rounds))
            if due > place.rounds:
                place.rounds = due
                seconds = run.validate(log)
                clock.validated(seconds)
                log.validated_for(seconds)
                run.save()
            elif fabric.broadcast(time.monotonic() - run.saved_at > max(SAVE_EVERY, 20 * run.save_seconds)):
                run.save()
        if place.step == 0:
            raise ValueError(
                f"{section.minutes} minutes were over before the first step: reading took {clock.elapsed:.0f} s. Give more minutes."
            )
        log.ending()
        if place.validated < place.step:
            run.validate(log)
        run.conclude(log)
        place.seconds, place.finished = clock.elapsed, True
        run.save()
        log.ended(clock.elapsed - clock.before)
    return Outcome(out, recipe, place.step, place.best_step, place.scores)


def _fabric(section: TrainSection) -> Fabric:
    """Fabric as `torchrun` started it, or on this machine's one device."""
    world, local = int(os.environ.get("WORLD_SIZE", "1")), int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    if section.batch % world:
        raise ValueError(f"train.batch is {section.batch}; it must be a multiple of the {world} processes. Try --set train.batch={world}.")
    many = {"devices": local, "num_nodes": world // local, "strategy": "ddp"} if world > 1 else {"devices": 1}
    for name in ("lightning.fabric", "lightning.pytorch"):  # they announce what the plan has said already
        logging.getLogger(name).setLevel(logging.WARNING)
    fabric = Fabric(accelerator="cuda" if torch.cuda.is_available() else "cpu", precision=section.precision, **many)
    fabric.launch()
    return fabric


def _briefly(names: Sequence[str]) -> str:
    """Names of tensors; where they are many, the parts of the model that they lie in."""
    if len(names) <= 8:
        return ", ".join(names)
    return ", ".join(f"{part}.*" for part in dict.fromkeys(".".join(name.split(".")[:2]) for name in names))


def _of_bundle(card: Card) -> dict[str, Any]:
    """The part of a recipe that a bundle stands for: its weights fit, mean the same, and see no validation image of theirs again."""
    model = {"name": card.model, "encoder": card.encoder, "options": card.options}
    data = {"mean": card.mean, "std": card.std, "val_fraction": card.val_fraction, "split_seed": card.split_seed}
    return {"model": model, "data": data}


def _fitting(given: Mapping[str, Any], path: str, card: Card, report: Check, console: Console) -> dict[str, Any]:
    """`given` without the bundle's normalisation where the images have other bands; says so where its classes have other names."""
    if len(card.classes) == len(report.classes) and card.classes != report.classes:
        old, new = ", ".join(card.classes), ", ".join(report.classes)
        console.print(f"the classifier of {escape(path)}, made for {escape(old)}, goes on as that of {escape(new)}", soft_wrap=True)
    own = card.bands != report.bands
    data = {key: value for key, value in given["data"].items() if not (own and key in ("mean", "std") and value == getattr(card, key))}
    return {**given, "data": data}


def _refuse_other_meaning(classes: str | None, labels: Mapping[int, int] | None, data: Mapping[str, Any]) -> None:
    """ValueError where classes or labels contradict a recipe that says what masks mean: it would win, and nobody be told."""
    other = "Leave the option out, or take data.{} out of the recipe."
    if classes and data.get("classes") and list(read_classes(classes).names) != list(data["classes"]):
        raise ValueError(f"--classes names other classes than the recipe: {', '.join(data['classes'])}. {other.format('classes')}")
    if values := (data.get("label_map") or {}).get("values"):
        for value, label in (labels or {}).items():
            if (stated := values.get(str(value), "nothing")) != label:
                raise ValueError(f"--label {value}={label}, but the recipe makes {stated} of {value}. {other.format('label_map')}")


def _resumed(path: Path, given: Mapping[str, Any], settings: Mapping[str, Any]) -> dict[str, Any]:
    """The recipe of a run to go on with; whatever else is given must not contradict it, or the run would be no longer one.

    The command that began the run does not: one number for all bands has become one for each, and a bundle to start from has taken the
    place of the weights that a shipped recipe names.
    """
    own = read_recipe(path)
    data = {
        key: value * len(own["data"][key]) if key in ("mean", "std") and len(value) == 1 else value
        for key, value in given.get("data", {}).items()
    }
    given = merge(given, {"data": data})
    if given.get("model", {}).get("start_from") and "encoder_weights" not in settings.get("model", {}):
        given = merge(given, {"model": {"encoder_weights": None}})
    before, after = (Recipe.model_validate(parts).model_dump() for parts in (own, merge(own, given)))
    if changed := differing_keys(before, after):
        raise ValueError(f"{path} says otherwise about {', '.join(changed)}. A resumed run keeps its recipe; train into another folder.")
    return own


def _checked(
    images: Path | str,
    masks: Path | str | None,
    classes: str | None,
    labels: Mapping[int, int] | None,
    data: Mapping[str, Any],
    console: Console,
) -> Check:
    """The diagnosis of the data, under the classes and label map of a recipe where it has them; ValueError where training can't start."""
    with Progress(console=console, transient=True) as bar:
        task = bar.add_task("reading images and masks")
        report = check(
            images,
            masks,
            classes=classes or data.get("classes"),
            labels=labels,
            label_map=LabelMap.from_dict(data["label_map"]) if data.get("label_map") else None,
            val_fraction=data.get("val_fraction", 0.2),
            seed=data.get("split_seed", 0),
            progress=lambda done, of, name: bar.update(task, completed=done, total=of),
        )
    if not report.ready:
        render(report, console)
        raise ValueError(f"{images}: training can't start: " + "; ".join(report.problems))
    return report


def _announce(report: Check, reasons: Mapping[str, str], settings: Mapping[str, Any], console: Console) -> None:
    """What was found, what will be done, and what was asked for beside the plan, one reason per line."""
    for line in [*report.reasons, *report.warnings]:
        console.print(f"[dim]data[/]  {escape(line)}", soft_wrap=True)
    for key, reason in reasons.items():
        console.print(f"[cyan]{key}[/]  {escape(reason)}", soft_wrap=True)
    for key in differing_keys(settings, {}):
        if not any(known == key or known.startswith(f"{key}.") for known in reasons):
            console.print(f"[cyan]{key}[/]  {escape(str(value_at(settings, key)))} - as you asked", soft_wrap=True)
