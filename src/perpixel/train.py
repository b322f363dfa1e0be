"""Train: check the data, plan the run, fit the weights. The loop, `fit`, is one visible function on Lightning Fabric."""

import hashlib
import json
import logging
import math
import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from lightning.fabric import Fabric
from rich.console import Console
from rich.markup import escape
from torch import Tensor, nn
from torch.utils.data import DataLoader, Sampler

from perpixel import __version__
from perpixel.bundle import SCALE, Card, read_tensors, save_bundle, save_tensors
from perpixel.check import Check, check, render
from perpixel.data.dataset import LabelledImages, SampleStream, collate, sample_numbers
from perpixel.data.display import overlay, to_display
from perpixel.data.masks import LabelMap
from perpixel.data.transforms import Augmentation, Normalize
from perpixel.data.writing import replacing, write_rgb
from perpixel.evaluate import Evaluation, score
from perpixel.losses import CombinedLoss, border_weights, class_weights, combined, cost
from perpixel.models import build
from perpixel.models.batch_norm import freeze_batch_norm, unfold_batch_norm
from perpixel.models.model import SegmentationModel
from perpixel.optimisation import Average, Clock, learning_rate, make_optimizer
from perpixel.plan import plan, this_machine
from perpixel.progress import TrainingLog
from perpixel.recipe import Recipe, TrainSection, merge, read_recipe, read_settings, to_yaml

PICTURES = 6  # validation images drawn after each validation
SAVE_EVERY = 60.0  # seconds between checkpoints, so that a kill costs a minute at most


@dataclass
class Outcome:
    """What a finished run leaves: the folder with best.safetensors, and the scores of that bundle on the validation part."""

    out: Path
    recipe: Recipe
    step: int
    best_step: int
    scores: dict[str, Any]  # of best.safetensors, as in OUT/evaluation.json


@dataclass
class Place:
    """Where a run stands. All that a resumed run must know besides tensors."""

    step: int = 0
    seconds: float = 0.0  # of training so far, in all processes' wall-clock
    best_miou: float = -1.0
    best_step: int = 0
    data: str = ""  # names of the pairs, so that a changed data set is noticed
    scores: dict[str, Any] = field(default_factory=dict)  # of best.safetensors
    finished: list[float | None] = field(default_factory=list)  # the steps and minutes at which the run ended


def train(
    images: Path | str,
    masks: Path | str | None = None,
    *,
    out: Path | str,
    recipe: str | Path | None = None,
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
        settings: `key=value` texts that win over the recipe.
        steps, minutes: where the run ends; at most one. Minutes are wall-clock, counted from this call.
        resume: go on where a killed or interrupted run in `out` stood.
        classes, labels: as for `perpixel check`.

    Raises:
        ValueError: the data can't be trained on, the recipe is wrong, or `out` holds a run already and `resume` is False.
    """
    started, out = time.monotonic(), Path(out)
    console = console or Console(quiet=True)
    if os.environ.get("RANK", "0") != "0":
        console = Console(quiet=True)  # the first process of `torchrun` speaks for all
    if steps is not None and minutes is not None:
        raise ValueError("both steps and minutes are given; give one of them.")
    if not resume and (out / "resume.safetensors").exists():
        raise ValueError(f"{out} holds a run already. Add --resume to go on with it, or choose another folder.")
    again = resume and (out / "recipe.yaml").exists()
    given = merge(*([read_recipe(source)] if (source := out / "recipe.yaml" if again else recipe) else []), read_settings(settings))
    data = given.get("data", {})
    with console.status("reading every image and mask"):
        report = check(
            images,
            masks,
            classes=classes or data.get("classes"),
            labels=labels,
            label_map=LabelMap.from_dict(data["label_map"]) if data.get("label_map") else None,
            val_fraction=data.get("val_fraction", 0.2),
            seed=data.get("split_seed", 0),
        )
    if not report.ready:
        render(report, console)
        raise ValueError(f"{images}: training can't start: " + "; ".join(report.problems))
    given = merge(given, {"data": {"images": str(images), "masks": None if masks is None else str(masks)}})
    full, reasons = plan(report, this_machine(), given, steps=steps, minutes=minutes)
    if not again:
        _announce(report, reasons, console)
    return fit(full, report, out, console, started, reasons, resume)


def fit(recipe: Recipe, report: Check, out: Path, console: Console, started: float, reasons: Mapping[str, str], resume: bool) -> Outcome:
    """The loop: forward, backward, step; validate, keep the best, save the state. Each process of `torchrun` runs it.

    Sampling, augmentation and dropout are pure functions of (seed, step), so a resumed run ends with the weights of an uninterrupted one.
    """
    section = recipe.train
    fabric = _fabric(section)
    run = Run(fabric.broadcast(recipe), report, fabric, out, fresh=not (resume and (out / "resume.safetensors").exists()))
    if resume:
        run.restore()
    if fabric.is_global_zero and not (resume and (out / "recipe.yaml").exists()):
        _write_text(out / "recipe.yaml", to_yaml(recipe, reasons))
    place, clock = run.place, Clock(section, started, run.place.seconds)
    if place.finished == [section.steps, section.minutes]:
        return run.outcome()
    with TrainingLog(out, console, section, place.step, writes=fabric.is_global_zero) as log:
        for images, labels, weights in log.waiting(run.loader(place.step)):
            progress = fabric.broadcast(clock.progress(place.step))
            if progress >= 1:
                break
            rate = section.lr * learning_rate(section, progress)
            value = run.train_step(images, labels, weights, rate)
            place.step, place.seconds = place.step + 1, clock.elapsed
            after = fabric.broadcast(clock.progress(place.step))
            log.step(place.step, after, place.seconds, value, rate, clock.left(place.step))
            if math.floor(progress * section.validations) < math.floor(after * section.validations) and after < 1:
                clock.reserve = 1.2 * run.validate(log)
                run.save()
            elif fabric.broadcast(time.monotonic() - run.saved_at > max(SAVE_EVERY, 20 * run.save_seconds)):
                run.save()
        run.validate(log)
        place.seconds, place.finished = clock.elapsed, [section.steps, section.minutes]
        run.save()
    return run.outcome()


class Run:
    """The parts of a run on one process: model, optimiser, data, files."""

    def __init__(self, recipe: Recipe, report: Check, fabric: Fabric, out: Path, fresh: bool) -> None:
        section = recipe.train
        self.recipe, self.report, self.fabric, self.out, self.section = recipe, report, fabric, out, section
        self.label_map = LabelMap.from_dict(recipe.data.label_map)
        self.normalize = Normalize(SCALE[recipe.data.dtype], tuple(recipe.data.mean), tuple(recipe.data.std))
        self.class_weights = _class_weights(section.class_weights, report)
        self.train_images = self._images("train", self._pixel_weights if section.border_weights else None)
        self.val_images = self._images("val")
        self.criterion = self._criterion()
        self.place = Place(data=_fingerprint(self.train_images, self.val_images))
        torch.manual_seed(section.seed)
        self.bare = self._build(fresh)
        self.stream = self._stream()
        if fresh and getattr(self.bare.encoder, "batch_norm_folded", False):
            unfold_batch_norm(self.bare.encoder, self._first_images())
        self.average = Average(self.bare, section.ema) if section.ema else None
        self.model, self.optimizer = fabric.setup(self.bare, make_optimizer(self.bare, section))
        self.saved_at, self.save_seconds = time.monotonic(), 0.0

    def _build(self, fresh: bool) -> SegmentationModel:
        spec, data = self.recipe.model, self.recipe.data
        weights = spec.encoder_weights if fresh else None  # a resumed run has its own
        model = build(spec.name, len(data.classes), encoder=spec.encoder, encoder_weights=weights, in_channels=data.bands, **spec.options)
        model.to(self.fabric.device).to(memory_format=torch.channels_last)
        if self.fabric.world_size > 1 and self.fabric.device.type == "cuda":
            model = nn.SyncBatchNorm.convert_sync_batchnorm(model)  # PyTorch has no CPU form of it
        return model

    def _images(self, split: str, weigh: Callable[[np.ndarray], np.ndarray] | None = None) -> LabelledImages:
        data = self.recipe.data
        return LabelledImages(self.report.split(split), self.label_map, data.bands, data.dtype, weigh, self.section.cache)

    def _pixel_weights(self, labels: np.ndarray) -> np.ndarray:
        """(H, W) weights of U-Net's eq. 2: class weight plus border weight, a sum, so the loss gets no class weights of its own."""
        by_label = np.ones(self.label_map.ignore + 1, np.float32)
        if self.class_weights is not None:
            by_label[: len(self.class_weights)] = self.class_weights.numpy()
        return by_label[labels] + border_weights(labels, ignore=self.label_map.ignore)

    def _criterion(self) -> CombinedLoss:
        section = self.section
        terms = [(term.name, term.weight) for term in section.loss]
        weights = None if section.border_weights else self.class_weights
        return combined(terms, ignore=self.label_map.ignore, class_weights=weights, label_smoothing=section.label_smoothing)

    def _stream(self) -> SampleStream:
        section = self.section
        augmentation = Augmentation(
            crop=section.crop,
            margin=self.bare.geometry.margin,
            class_pixels=tuple(self.report.pixels["train"]),
            ignore=self.label_map.ignore,
            **section.augment.model_dump(),
        )
        return SampleStream(self.train_images, augmentation, section.seed)

    def _first_images(self, count: int = 32) -> Iterator[Tensor]:
        """The first augmented images, normalised, one by one."""
        for number in range(count):
            yield self.normalize(self.stream[number][0].to(self.fabric.device))[None]

    def loader(self, first_step: int) -> DataLoader[tuple[Tensor, Tensor, Tensor | None]]:
        """The endless stream of this process's shares of the batches from `first_step` on."""
        section = self.section
        numbers = sample_numbers(first_step, section.batch, self.fabric.global_rank, self.fabric.world_size)
        return DataLoader(
            self.stream,
            batch_sampler=_Endless(numbers),
            num_workers=section.workers,
            collate_fn=collate,
            pin_memory=self.fabric.device.type == "cuda",
        )

    def train_step(self, images: Tensor, labels: Tensor, weights: Tensor | None, rate: float) -> float:
        """One update; returns the cost of this process's share of the batch."""
        section, device = self.section, self.fabric.device
        torch.manual_seed((section.seed * 1_000_003 + self.place.step) * 1009 + self.fabric.global_rank)  # dropout
        for group in self.optimizer.param_groups:
            group["lr"] = rate * group["scale"]
        self.model.train()
        if section.freeze_batch_norm:
            freeze_batch_norm(self.bare.encoder)
        pixels = self.normalize(images.to(device, non_blocking=True)).contiguous(memory_format=torch.channels_last)
        logits = self.model(pixels)
        thin = _every(section.loss_stride, self.place.step)
        labels, weights = labels[thin].to(device), None if weights is None else weights[thin].to(device)
        value = cost(self.criterion(logits[thin], labels, weights))
        self.optimizer.zero_grad(set_to_none=True)
        self.fabric.backward(value)
        if section.clip is not None:
            self.fabric.clip_gradients(self.model, self.optimizer, max_norm=section.clip, error_if_nonfinite=False)
        self.optimizer.step()
        if self.average is not None:
            self.average.update(self.bare, self.place.step)
        number = value.item()
        if not math.isfinite(number):
            raise ValueError(
                f"the cost became {number} at step {self.place.step}. Try a lower learning rate (--set train.lr={section.lr / 3:.1g}); "
                f"the weights up to the last checkpoint are in {self.out}."
            )
        return number

    @property
    def scored(self) -> SegmentationModel:
        """The model that is validated and kept: the averaged weights where there are any."""
        return self.bare if self.average is None else self.average.model

    def validate(self, log: TrainingLog) -> float:
        """Scores on the validation part, keeps the best, draws pictures; returns the seconds it took.

        Each process scores its share; counts and losses are summed.
        """
        fabric, place, start = self.fabric, self.place, time.monotonic()
        model = self.scored.eval()
        if fabric.world_size > 1:
            for buffer in model.buffers():
                buffer.copy_(fabric.broadcast(buffer))
        share = range(fabric.global_rank, len(self.val_images), fabric.world_size)
        drawn: dict[int, np.ndarray] = {}
        keep = lambda index, labels: drawn.update({index: labels.cpu().numpy()}) if index < PICTURES else None  # noqa: E731
        names, tile = self.recipe.data.classes, self.recipe.predict
        with fabric.autocast():
            result = score(model, self.val_images, self.normalize, names, tile.tile, tile.overlap, share, log.validating, keep)
        result = _gathered(fabric, result)
        if fabric.is_global_zero:
            for index, predicted in drawn.items():
                self._draw(index, predicted)
        if not place.scores or result.confusion.miou > place.best_miou:
            place.best_miou, place.best_step, place.scores = result.confusion.miou, place.step, result.to_json()
            if fabric.is_global_zero:
                save_bundle(self.out / "best.safetensors", model.state_dict(), self._card())
                _write_text(self.out / "evaluation.json", json.dumps(place.scores, indent=1))
        log.validated(place.step, result)
        return time.monotonic() - start

    def _draw(self, index: int, predicted: np.ndarray) -> None:
        """Image, truth and prediction side by side, as OUT/validation/<name>.jpg."""
        example, colors = self.val_images[index], self.recipe.data.colors
        image = example.image.numpy()
        ignore = self.label_map.ignore
        both = [overlay(image, labels, colors, ignore=ignore) for labels in (example.labels.numpy(), predicted)]
        path = self.out / "validation" / f"{example.name}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        write_rgb(path, np.hstack([to_display(image), *both]))

    def _card(self) -> Card:
        data, spec, tile = self.recipe.data, self.recipe.model, self.recipe.predict
        return Card(
            perpixel=__version__,
            model=spec.name,
            encoder=spec.encoder,
            options=spec.options,
            bands=data.bands,
            dtype=data.dtype,
            mean=data.mean,
            std=data.std,
            classes=data.classes,
            colors=data.colors,
            label_map=data.label_map,
            tile=tile.tile,
            overlap=tile.overlap,
        )

    def save(self) -> None:
        """last.safetensors, a bundle, and resume.safetensors, all that a resumed run needs, each complete or not there."""
        self.fabric.barrier()
        start = time.monotonic()
        if self.fabric.is_global_zero:
            save_bundle(self.out / "last.safetensors", self.scored.state_dict(), self._card())
            tensors = {f"model.{name}": tensor for name, tensor in self.bare.state_dict().items()}
            if self.average is not None:
                tensors |= {f"average.{name}": tensor for name, tensor in self.average.model.state_dict().items()}
            for index, state in self.optimizer.state_dict()["state"].items():
                tensors |= {f"optimizer.{index}.{name}": value for name, value in state.items() if isinstance(value, Tensor)}
            save_tensors(self.out / "resume.safetensors", tensors, {"place": json.dumps(vars(self.place))})
        self.saved_at = time.monotonic()
        self.save_seconds = self.saved_at - start

    def restore(self) -> None:
        """Takes up the state that `save` left; a run that was killed before its first checkpoint starts from the beginning."""
        path = self.out / "resume.safetensors"
        if not path.exists():
            return
        tensors, metadata = read_tensors(path)
        place = Place(**json.loads(metadata["place"]))
        if place.data != self.place.data:
            raise ValueError(f"{self.out}: the images are not those that this run was started on. Train them into another folder.")
        self.place = place
        parts: dict[str, dict[str, Tensor]] = {"model": {}, "average": {}, "optimizer": {}}
        for name, tensor in tensors.items():
            part, _, rest = name.partition(".")
            parts[part][rest] = tensor
        self.bare.load_state_dict(parts["model"])
        if self.average is not None:
            self.average.model.load_state_dict(parts["average"])
        state: dict[int, dict[str, Tensor]] = {}
        parameters = [parameter for group in self.optimizer.param_groups for parameter in group["params"]]
        for name, tensor in parts["optimizer"].items():
            index, _, key = name.partition(".")
            parameter = parameters[int(index)]
            if tensor.shape == parameter.shape:  # files hold plain layout; fused optimisers want the parameter's, channels last
                tensor = torch.empty_like(parameter).copy_(tensor)
            state.setdefault(int(index), {})[key] = tensor
        self.optimizer.load_state_dict({"state": state, "param_groups": self.optimizer.state_dict()["param_groups"]})

    def outcome(self) -> Outcome:
        """The outcome, with the scores of best.safetensors."""
        return Outcome(self.out, self.recipe, self.place.step, self.place.best_step, self.place.scores)


class _Endless(Sampler[list[int]]):
    """An iterator of batches as DataLoader wants it."""

    def __init__(self, batches: Iterator[list[int]]) -> None:
        self.batches = batches

    def __iter__(self) -> Iterator[list[int]]:
        return self.batches


def _fabric(section: TrainSection) -> Fabric:
    """Fabric as `torchrun` started it, or on this machine's one device."""
    world, local = int(os.environ.get("WORLD_SIZE", "1")), int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    if section.batch % world:
        raise ValueError(f"train.batch is {section.batch}; it must be a multiple of the {world} processes. Try --set train.batch={world}.")
    many = {"devices": local, "num_nodes": world // local, "strategy": "ddp"} if world > 1 else {"devices": 1}
    logging.getLogger("lightning.fabric").setLevel(logging.WARNING)  # it announces what the plan has said already
    fabric = Fabric(accelerator="auto", precision=section.precision, **many)
    fabric.launch()
    return fabric


def _class_weights(kind: str, report: Check) -> Tensor | None:
    """(K,) weights of mean 1 over the training pixels, so that the learning rate and the other losses keep their meaning."""
    if kind == "none":
        return None
    pixels = report.pixels["train"]
    weights, share = (
        class_weights(kind, pixels, report.pixels_where_present["train"]),
        torch.tensor(pixels, dtype=torch.float64) / sum(pixels),
    )
    return weights / float((weights * share).sum())


def _every(stride: int, step: int) -> tuple[Any, ...]:
    """Every `stride`-th pixel in both directions, from an origin that moves on with each step until all pixels had their turn."""
    row, column = divmod(step % stride**2, stride)
    return (..., slice(row, None, stride), slice(column, None, stride))


def _gathered(fabric: Fabric, result: Evaluation) -> Evaluation:
    """The shares of all processes as one evaluation."""
    if fabric.world_size > 1:
        torch.distributed.all_reduce(result.confusion.counts)
        everyone: list[Any] = [None] * fabric.world_size
        torch.distributed.all_gather_object(everyone, (result.losses, result.damaged))
        result.losses = {name: loss for losses, _ in everyone for name, loss in losses.items()}
        result.damaged = {name: why for _, damaged in everyone for name, why in damaged.items()}
    return result


def _fingerprint(*parts: LabelledImages) -> str:
    names = "\n".join(f"{pair.image.name} {pair.split}" for part in parts for pair in part.pairs)
    return hashlib.sha256(names.encode()).hexdigest()


def _write_text(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with replacing(path) as temporary:
        temporary.write_text(text, "utf-8")


def _announce(report: Check, reasons: Mapping[str, str], console: Console) -> None:
    """What was found and what will be done, one reason per line."""
    for line in [*report.reasons, *report.warnings]:
        console.print(f"[dim]data[/]  {escape(line)}", soft_wrap=True)
    for key, reason in reasons.items():
        console.print(f"[cyan]{key}[/]  {escape(reason)}", soft_wrap=True)
