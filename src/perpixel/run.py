"""One process's part of a training run: model, optimiser and data, an update, a validation, and the files that keep them."""

import hashlib
import json
import math
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from inspect import signature
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from lightning.fabric import Fabric
from timm.layers import convert_sync_batchnorm
from torch import Tensor
from torch.utils.data import DataLoader, Sampler

from perpixel import __version__
from perpixel.bundle import Card, TemperatureCard, load_bundle, read_tensors, save_bundle, save_tensors, start_from_bundle
from perpixel.calibrate import PixelSample, fitted
from perpixel.check import Check
from perpixel.data.dataset import Batch, DevicePrefetcher, LabelledImages, SampleStream, collate, sample_numbers
from perpixel.data.display import overlay, to_display
from perpixel.data.images import FULL_SCALE
from perpixel.data.masks import LabelMap
from perpixel.data.transforms import Augmentation, Normalize
from perpixel.data.writing import replacing, write_rgb
from perpixel.evaluate import Evaluation, Observer, score
from perpixel.losses import CombinedLoss, combined, cost, labels_at
from perpixel.models import MODELS, build
from perpixel.models.batch_norm import batch_norms, freeze_batch_norm, is_frozen, measure_batch_norm, unfold_batch_norm
from perpixel.models.model import SegmentationModel
from perpixel.optimisation import Average, freeze, make_optimizer
from perpixel.progress import TrainingLog
from perpixel.recipe import Recipe
from perpixel.report.findings import Findings
from perpixel.report.make import unlabelled_images, write_report
from perpixel.scores import DEFAULT_GROUPS, Scores
from perpixel.weighting import pixel_weighing, training_class_weights

UNLABELLED = 100  # images without masks looked at for the report: a run's time is for training
PICTURES = 6  # validation images drawn with each best bundle
STATE_FORMAT = 3  # of resume.safetensors


@dataclass
class Place:
    """Where a run stands. All that a resumed run must know besides tensors."""

    step: int = 0
    seconds: float = 0.0  # of training so far, in all processes' wall-clock
    best_miou: float = -1.0
    best_step: int = 0
    validated: int = -1  # the step of the last validation
    rounds: int = 0  # validations that were due so far
    data: str = ""  # names of the pairs, so that a changed data set is noticed
    scores: dict[str, Any] = field(default_factory=dict)  # of best.safetensors
    finished: bool = False


class Run:
    """The parts of a run on one process: model, optimiser, data, files."""

    def __init__(self, recipe: Recipe, report: Check, fabric: Fabric, out: Path, fresh: bool) -> None:
        section = recipe.train
        self.recipe, self.report, self.fabric, self.out, self.section = recipe, report, fabric, out, section
        self.label_map = LabelMap.from_dict(recipe.data.label_map)
        self.normalize = Normalize(FULL_SCALE[recipe.data.dtype], tuple(recipe.data.mean), tuple(recipe.data.std))
        self.class_weights = training_class_weights(section.class_weights, report)
        weigh = pixel_weighing(self.class_weights, self.label_map.ignore) if section.border_weights else None
        self.train_images = self._images("train", weigh)
        self.val_images = self._images("val")
        self.criterion = self._criterion()
        self.place = Place(data=_fingerprint(report))
        torch.manual_seed(section.seed)
        self.bare = self._build(fresh)
        self.stream = self._stream()
        if fresh and getattr(self.bare.encoder, "batch_norm_folded", False):
            unfold_batch_norm(self.bare.encoder, self._first_images())
        self.average = Average(self.bare, section.ema) if section.ema else None
        self.model, self.optimizer = fabric.setup(self.bare, make_optimizer(self.bare, section))
        self.model.mark_forward_method("supervised")
        self.saved_at, self.save_seconds = time.monotonic(), 0.0

    def _build(self, fresh: bool) -> SegmentationModel:
        spec, data = self.recipe.model, self.recipe.data
        weights = None if spec.start_from or not fresh else spec.encoder_weights  # a bundle, like a resumed run, has its own
        options = spec.options.model_dump(exclude_none=True)
        model = build(spec.name, len(data.classes), encoder=spec.encoder, encoder_weights=weights, in_channels=data.bands, **options)
        self.stayed_new = start_from_bundle(model, Path(spec.start_from)) if spec.start_from and fresh else []
        freeze(model, self.section.frozen)
        model.to(self.fabric.device).to(memory_format=torch.channels_last)
        if self.fabric.world_size > 1 and self.fabric.device.type == "cuda":
            # PyTorch has no CPU form of it, and its own conversion would drop the activations within timm's norms.
            model = convert_sync_batchnorm(model)
        return model

    def _images(self, split: str, weigh: Callable[[np.ndarray], np.ndarray] | None = None) -> LabelledImages:
        data = self.recipe.data
        return LabelledImages(self.report.split(split), self.label_map, data.bands, data.dtype, weigh, self.section.cache)

    def _criterion(self) -> CombinedLoss:
        section = self.section
        terms = [(term.name, term.weight) for term in section.loss]
        weights = None if section.border_weights else self.class_weights
        return combined(
            terms,
            ignore=self.label_map.ignore,
            class_weights=weights,
            label_smoothing=section.label_smoothing,
            reduction=section.loss_reduction,
        )

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

    def _batch_norm_pass(self) -> None:
        """Statistics of batch norm of the scored model, from the first epoch's images in whole batches.

        Each process takes its share, and the averages of all are averaged. Where batch norm is not synchronised, a batch is a share of one.
        """
        torch.manual_seed(self.section.seed)  # dropout; each step of training sets its own
        batches = -(-len(self.train_images) // self.section.batch)
        kept = set(batch_norms(self.scored.encoder)) if self.section.freeze_batch_norm else set()
        pairs = zip(batch_norms(self.bare), batch_norms(self.scored), strict=True)
        kept |= {scored for own, scored in pairs if is_frozen(own)}  # averaged weights have no gradients to tell it by
        with self.fabric.autocast():
            images = (self._pixels(images) for images, _, _ in islice(self.batches(0), batches))
            measure_batch_norm(self.scored, images, kept)
        if self.fabric.world_size > 1:
            for norm in batch_norms(self.scored):
                for statistic in (norm.running_mean, norm.running_var):
                    if statistic is not None:
                        torch.distributed.all_reduce(statistic)
                        statistic /= self.fabric.world_size

    def _pixels(self, images: Tensor) -> Tensor:
        """Images of the stream as the model sees them."""
        return self.normalize(images.to(self.fabric.device, non_blocking=True)).contiguous(memory_format=torch.channels_last)

    def batches(self, first_step: int) -> Iterable[Batch]:
        """The endless stream of this process's shares of the batches from `first_step` on."""
        section, device = self.section, self.fabric.device
        numbers = sample_numbers(first_step, section.batch, self.fabric.global_rank, self.fabric.world_size)
        loader = DataLoader(
            self.stream.cuts() if section.augment_on_device else self.stream,
            batch_sampler=_Endless(numbers),
            num_workers=section.workers,
            collate_fn=collate,
            pin_memory=device.type == "cuda",
        )
        return DevicePrefetcher(loader, self.stream.augmentation, device) if section.augment_on_device else loader

    def train_step(self, images: Tensor, labels: Tensor, weights: Tensor | None, rate: float) -> float:
        """One update; returns the cost of this process's share of the batch."""
        section, device = self.section, self.fabric.device
        torch.manual_seed((section.seed * 1_000_003 + self.place.step) * 1009 + self.fabric.global_rank)  # dropout
        for group in self.optimizer.param_groups:
            group["lr"] = rate * group["scale"]
        self.model.train()
        if section.freeze_batch_norm:
            freeze_batch_norm(self.bare if section.freeze_batch_norm == "all" else self.bare.encoder)
        for layer in batch_norms(self.bare):
            if is_frozen(layer):
                layer.eval()
        with self.fabric.autocast():  # Fabric opens it around `forward` alone
            outputs = self.model.supervised(self._pixels(images))
        value = self._cost(outputs, labels.to(device), None if weights is None else weights.to(device))
        self.optimizer.zero_grad(set_to_none=True)
        self.fabric.backward(value)
        norm = float(torch.nn.utils.clip_grad_norm_(self.bare.parameters(), section.clip or math.inf))
        total = value.detach().clone()
        if self.fabric.world_size > 1:
            torch.distributed.all_reduce(total)
        number = float(total) / self.fabric.world_size
        if not math.isfinite(number) or not math.isfinite(norm):  # before the step, so that no checkpoint holds such weights
            raise ValueError(
                f"the cost became {number} and its gradient {norm} at step {self.place.step}. Try a lower learning rate "
                f"(--set train.lr={section.lr / 3:.1g}); the weights up to the last checkpoint are in {self.out}."
            )
        self.optimizer.step()
        if self.average is not None:
            self.average.update(self.bare, self.place.step)
        return number

    def _cost(self, outputs: list[Tensor], labels: Tensor, weights: Tensor | None) -> Tensor:
        """The weighted sum of the costs of the maps that the model is trained on."""
        thin = _every(self.section.loss_stride, self.place.step)
        total = torch.zeros((), device=labels.device)
        for share, logits in zip(self.bare.loss_weights, outputs, strict=True):
            size = (logits.shape[-2], logits.shape[-1])
            known, by_pixel = labels_at(labels, size), None if weights is None else labels_at(weights, size)
            losses = self.criterion(logits[thin], known[thin], None if by_pixel is None else by_pixel[thin])
            total = total + share * cost(losses)
        return total

    @property
    def scored(self) -> SegmentationModel:
        """The model that is validated and kept: the averaged weights where there are any."""
        return self.bare if self.average is None else self.average.model

    def validate(self, log: TrainingLog) -> float:
        """Scores on the validation part, keeps the best and its pictures; returns the seconds it took.

        Each process scores its share; counts and losses are summed.
        """
        fabric, place, start = self.fabric, self.place, time.monotonic()
        if self.section.batch_norm_pass:
            self._batch_norm_pass()
        model = self.scored.eval()
        if fabric.world_size > 1:
            for buffer in model.buffers():
                buffer.copy_(fabric.broadcast(buffer))
        drawn: dict[int, np.ndarray] = {}

        def keep(index: int, labels: Tensor) -> None:
            if len(drawn) < PICTURES:
                drawn[index] = labels.cpu().numpy()

        sample = PixelSample()
        result = self._scored_share(model, log, [sample], keep)
        sample = _merged(fabric, sample)
        place.validated = place.step
        if not result.confusion.miou <= place.best_miou:
            place.best_miou, place.best_step, place.scores = result.confusion.miou, place.step, result.to_json()
            if fabric.is_global_zero:
                save_bundle(self.out / "best.safetensors", model.state_dict(), self._card(fitted(sample).card))
                result.to_file(self.out / "evaluation.json")
                for index, predicted in drawn.items():
                    self._draw(index, predicted)
        log.validated(place.step, result)
        return time.monotonic() - start

    def conclude(self, log: TrainingLog) -> None:
        """All scores of best.safetensors on the validation part, into evaluation.json, and report.html.

        Validations during training have those of region.
        """
        self.fabric.barrier()  # until the first process has written it
        best = load_bundle(self.out / "best.safetensors", self.fabric.device)
        scores = Scores(DEFAULT_GROUPS, best.card.classes, best.temperature())
        findings = Findings(best.card.colors)
        result = self._scored_share(best.model, log, [scores, findings] if self.section.report else [scores])
        result.scores, findings = _merged(self.fabric, scores), _merged(self.fabric, findings)
        self.place.scores = result.to_json()
        if self.fabric.is_global_zero:
            result.to_file(self.out / "evaluation.json")
            if self.section.report:
                images, masks = self.recipe.data.images, self.recipe.data.masks
                pool = unlabelled_images(images, masks)
                path, bundle = self.out / "report.html", self.out / "best.safetensors"
                write_report(path, bundle, best, result, findings, images, masks, pool, split="val", limit=UNLABELLED)

    def _scored_share(
        self, model: SegmentationModel, log: TrainingLog, observers: Sequence[Observer], keep: Callable[[int, Tensor], None] | None = None
    ) -> Evaluation:
        """Region scores on the validation part, of which each process scores its share; observers see theirs only."""
        fabric, names, tile = self.fabric, self.recipe.data.classes, self.recipe.predict
        share = range(fabric.global_rank, len(self.val_images), fabric.world_size)
        with fabric.autocast():
            images, sizes = self.val_images, (tile.tile, tile.overlap)
            result = score(model, images, self.normalize, names, *sizes, share, log.validating, keep, observers=observers)
        result.precision = "bf16" if self.section.precision == "bf16-mixed" else "float32"
        return _gathered(fabric, result)

    def _draw(self, index: int, predicted: np.ndarray) -> None:
        """Image, truth and prediction side by side, as OUT/validation/<name>.jpg."""
        example, colors = self.val_images[index], self.recipe.data.colors
        image = example.image.numpy()
        ignore = self.label_map.ignore
        both = [overlay(image, labels, colors, ignore=ignore) for labels in (example.labels.numpy(), predicted)]
        path = self.out / "validation" / f"{example.name}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        write_rgb(path, np.hstack([to_display(image), *both]))

    def _card(self, temperature: TemperatureCard | None = None) -> Card:
        data, spec, tile = self.recipe.data, self.recipe.model, self.recipe.predict
        return Card(
            perpixel=__version__,
            model=spec.name,
            encoder=spec.encoder,
            options=self._options(),
            bands=data.bands,
            dtype=data.dtype,
            mean=data.mean,
            std=data.std,
            classes=data.classes,
            colors=data.colors,
            label_map=data.label_map,
            tile=tile.tile,
            overlap=tile.overlap,
            val_fraction=data.val_fraction,
            split_seed=data.split_seed,
            temperature=temperature,
        )

    def _options(self) -> dict[str, Any]:
        """Those of the recipe, and the output stride that the encoder came to, on which rates of atrous convolutions depend."""
        options = self.recipe.model.options.model_dump(exclude_none=True)
        option = signature(MODELS[self.recipe.model.name]).parameters.get("output_stride")
        stride: int = getattr(self.bare.encoder, "strides", [0])[-1]
        if option is not None and option.default is None and stride in (8, 16, 32):
            options["output_stride"] = stride
        return options

    def save(self) -> None:
        """last.safetensors, a bundle, and resume.safetensors, all that a resumed run needs, each complete or not there."""
        self.fabric.barrier()
        start = time.monotonic()
        if self.fabric.is_global_zero:
            save_bundle(self.out / "last.safetensors", self.scored.state_dict(), self._card())
            tensors = {f"model.{name}": tensor for name, tensor in self.bare.state_dict().items()}
            if self.average is not None:
                tensors |= {f"average.{name}": tensor for name, tensor in self.average.model.state_dict().items()}
            for name, parameter in self.bare.named_parameters():
                state = self.optimizer.state.get(parameter, {})
                tensors |= {f"optimizer.{name}.{key}": value for key, value in state.items() if isinstance(value, Tensor)}
            save_tensors(self.out / "resume.safetensors", tensors, {"format": str(STATE_FORMAT), "place": json.dumps(vars(self.place))})
        self.saved_at = time.monotonic()
        self.save_seconds = self.saved_at - start

    def restore(self) -> None:
        """Takes up the state that `save` left; a run that was killed before its first checkpoint starts from the beginning."""
        path = self.out / "resume.safetensors"
        if not path.exists():
            return
        tensors, metadata = read_tensors(path)
        if metadata.get("format") != str(STATE_FORMAT):
            raise ValueError(f"{path}: not the state of a run of this perpixel {__version__}. Train into another folder.")
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
        self._restore_optimizer(parts["optimizer"])

    def _restore_optimizer(self, tensors: Mapping[str, Tensor]) -> None:
        """Takes the optimiser's state of each parameter, by the parameter's name."""
        names = {id(parameter): name for name, parameter in self.bare.named_parameters()}
        parameters = [parameter for group in self.optimizer.param_groups for parameter in group["params"]]
        state: dict[int, dict[str, Tensor]] = {}
        for index, parameter in enumerate(parameters):
            prefix = f"{names[id(parameter)]}."
            for name in [name for name in tensors if name.startswith(prefix)]:
                tensor = tensors[name]
                if tensor.ndim:  # files hold plain layout; fused optimisers want the parameter's, channels last
                    tensor = torch.empty_like(parameter).copy_(tensor)
                state.setdefault(index, {})[name.removeprefix(prefix)] = tensor
        self.optimizer.load_state_dict({"state": state, "param_groups": self.optimizer.state_dict()["param_groups"]})


class _Endless(Sampler[list[int]]):
    """An iterator of batches as DataLoader wants it."""

    def __init__(self, batches: Iterator[list[int]]) -> None:
        self.batches = batches

    def __iter__(self) -> Iterator[list[int]]:
        return self.batches


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
        result.region.images = _merged(fabric, result.region.images)
    return result


def _merged(fabric: Fabric, own: Any) -> Any:
    """What all processes have gathered in objects with `merge`, in the order of their ranks, the same on each."""
    if fabric.world_size == 1:
        return own
    everyone: list[Any] = [None] * fabric.world_size
    torch.distributed.all_gather_object(everyone, own)
    for other in everyone[1:]:
        everyone[0].merge(other)
    return everyone[0]


def _fingerprint(report: Check) -> str:
    """Changes with the images' names and sizes, their parts, and what the masks hold."""
    names = [f"{pair.image.name} {pair.split}" for pair in report.pairs]
    return hashlib.sha256(repr((names, sorted(report.sizes.items()), report.pixels)).encode()).hexdigest()


def write_text(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with replacing(path) as temporary:
        temporary.write_text(text, "utf-8")
