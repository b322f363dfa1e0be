"""What moves the weights: the optimiser, the learning rate over the run, the averaged weights."""

import copy
import math
import time
from collections.abc import Sequence

import torch

from perpixel.models.model import SegmentationModel
from perpixel.recipe import TrainSection

PAUSE = 3.0  # times its own length between a validation and the next: they take a quarter of the time at most
ENDING = 3.0  # times a validation: the last one, all scores of the best weights, and the report
MOST_RESERVED = 0.5  # of the minutes: a run whose validation part is too large for them trains at least so long
FORWARD_SHARE = 1 / 3  # of a step; back-propagation takes twice the forward pass, once for the maps and once for the weights


def validation_seconds(step: float, section: TrainSection, pixels: float, images: int) -> float:
    """What a validation may take, before the first one shows it: the forward share of a step, by pixels.

    Args:
        step: seconds of one update.
        pixels: of the validation part.
        images: of the training part, through which a pass for batch norm goes first.
    """
    batches = pixels / (section.batch * math.prod(section.crop))
    return FORWARD_SHARE * step * (batches + (images / section.batch if section.batch_norm_pass else 0))


class Clock:
    """How far the run is, by steps or by minutes, and whether there is time for a validation.

    Args:
        started: `time.monotonic()` at the call of the command, so that reading the data counts too.
        before: seconds that an interrupted run had used.
    """

    def __init__(self, section: TrainSection, started: float, before: float) -> None:
        self.section, self.started, self.before = section, started, before
        self.reserve = 0.0  # seconds kept for the last validation, the final scores and the report
        self.validation = 0.0  # seconds that one takes: expected, then measured
        self.measured = False
        self.rested = time.monotonic()  # since then no validation
        self.scoring = 0.0  # seconds of all validations
        self.reached = 0.0
        self.first: tuple[int, float] | None = None  # the first step of this process, and when it was done

    @property
    def elapsed(self) -> float:
        """Seconds used so far, with those before an interruption."""
        return self.before + time.monotonic() - self.started

    def progress(self, step: int) -> float:
        """0 at the start, 1 at the end; never falls, also where `reserve` does."""
        if self.section.steps is not None:
            return min(1.0, step / self.section.steps)
        budget = max(1e-9, 60 * (self.section.minutes or 0) - self.reserve)
        self.reached = max(self.reached, min(1.0, self.elapsed / budget))
        return self.reached

    def expect(self, seconds: float) -> None:
        """Notes what a validation may take; where one was measured already, that holds."""
        if not self.measured:
            self._plan_end(seconds)

    def validated(self, seconds: float) -> None:
        """Notes what a validation took that ended now."""
        self.measured, self.rested, self.scoring = True, time.monotonic(), self.scoring + seconds
        self._plan_end(seconds)

    def _plan_end(self, validation: float) -> None:
        self.validation = validation
        self.reserve = min(ENDING * validation, MOST_RESERVED * 60 * (self.section.minutes or math.inf))

    @property
    def overrun(self) -> float:
        """Seconds that the end of the run may take beyond the minutes that were given."""
        return 0.0 if self.section.minutes is None else ENDING * self.validation - self.reserve

    def due(self, progress: float, rounds: int) -> int:
        """Validations due so far, after `rounds` ones; more than `rounds` where one should be made now.

        By steps a pure function of `progress`, so that a resumed run validates where an uninterrupted one does. By minutes one that would
        come too soon after the last waits, and the next takes its place.
        """
        due = math.floor(progress * self.section.validations)
        if due <= rounds or progress >= 1:
            return rounds
        if self.section.minutes is None:
            return due
        rested = time.monotonic() - self.rested >= PAUSE * self.validation
        fits = self.elapsed + self.validation <= 60 * self.section.minutes - self.reserve
        return due if rested and fits else rounds

    def left(self, step: int) -> float:
        """Seconds until the end, its scores included, as far as one can tell; by steps nan after the first, slower than the others."""
        if self.section.minutes is not None:
            return max(0.0, 60 * self.section.minutes - self.elapsed)
        now, steps = time.monotonic(), self.section.steps or 0
        if self.first is None:
            self.first = (step, now)
        if step == self.first[0]:
            return math.nan
        each = (now - self.first[1] - self.scoring) / (step - self.first[0])
        due = math.floor(self.progress(step - 1) * self.section.validations)  # that of this step is still to come
        return (steps - step) * each + (self.section.validations - due - 1 + ENDING) * self.validation


def learning_rate(section: TrainSection, progress: float) -> float:
    """Factor on the learning rate at `progress` 0..1: linear warm-up, then the schedule.

    "poly": (1 - t)^power (DeepLab v2, arXiv:1606.00915, section 4.1). "one_cycle": half a cosine down to 0 (Smith & Topin 2018,
    arXiv:1708.07120, in the annealed form that is common today). "step": a tenth after each third of the run (DeepLab v1, whose 6000
    iterations have steps of 2000). "constant": 1.
    """
    if progress < section.warmup:
        return 0.04 + 0.96 * progress / section.warmup
    if section.schedule == "constant":
        return 1.0
    t = (progress - section.warmup) / (1 - section.warmup)
    if section.schedule == "step":
        return float(0.1 ** min(int(3 * t), 2))
    return (1 - t) ** section.poly_power if section.schedule == "poly" else 0.5 * (1 + math.cos(math.pi * t))


def freeze(model: SegmentationModel, parts: Sequence[str]) -> None:
    """Keeps the weights of the parts named, such as "encoder" or "decoder.head", from being trained, in place.

    Raises:
        ValueError: if a name is that of no part, or nothing is left to train.
    """
    named = dict(model.named_parameters())
    for part in parts:
        chosen = [value for name, value in named.items() if name == part or name.startswith(f"{part}.")]
        if not chosen:
            known = ["encoder", "decoder", *(f"decoder.{name}" for name, _ in model.decoder.named_children())]
            raise ValueError(f"train.frozen: this model has no part {part!r}. Known: {', '.join(known)}, and the names below them")
        for parameter in chosen:
            parameter.requires_grad_(False)
    if not any(parameter.requires_grad for parameter in named.values()):
        raise ValueError(f"train.frozen: {', '.join(parts)} leave nothing to train")


def make_optimizer(model: SegmentationModel, section: TrainSection) -> torch.optim.Optimizer:
    """AdamW or SGD; the encoder at its own rate, biases and norms without weight decay, and the model's own `multipliers` on top.

    Each group carries `scale`, its factor on the learning rate of the run.
    """
    members: dict[tuple[float, float], list[torch.nn.Parameter]] = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            scale = section.encoder_lr_scale if name.startswith("encoder.") else 1.0
            rate, decay = model.multipliers.get(name, (1.0, float(parameter.ndim > 1)))
            members.setdefault((scale * rate, section.weight_decay * decay), []).append(parameter)
    groups = [{"params": chosen, "scale": scale, "weight_decay": decay} for (scale, decay), chosen in members.items()]
    if section.optimizer == "adamw":
        return torch.optim.AdamW(groups, lr=section.lr, fused=True)
    return torch.optim.SGD(groups, lr=section.lr, momentum=section.momentum, fused=True)


class Average:
    """Exponential moving average of weights and buffers; young averages forget faster, so short runs are not held back."""

    def __init__(self, model: SegmentationModel, decay: float) -> None:
        self.decay = decay
        self.model = copy.deepcopy(model).eval().requires_grad_(False)

    @torch.no_grad()
    def update(self, model: SegmentationModel, step: int) -> None:
        """Moves the average towards `model` after update number `step` (from 0)."""
        decay = min(self.decay, (1 + step) / (10 + step))
        own, new = list(self.model.state_dict().values()), list(model.state_dict().values())
        floating = [i for i, tensor in enumerate(own) if tensor.is_floating_point()]
        torch._foreach_lerp_([own[i] for i in floating], [new[i] for i in floating], 1 - decay)
        for i in set(range(len(own))) - set(floating):
            own[i].copy_(new[i])
