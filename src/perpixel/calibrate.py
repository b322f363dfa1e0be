"""Calibrate: the temperature that makes a bundle's probabilities mean what they say (Guo et al. 2017, arXiv:1706.04599, section 4.2).

One number divides all scores before softmax, so the labels stay as they are. It is fitted on a few pixels of every validation image, in one
pass; what it brings is measured by halves, each with the temperature of the other, so no image is measured with what was fitted on it.
"""

import hashlib
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from rich.console import Console
from rich.markup import escape
from torch import Tensor

from perpixel.bundle import LINES, TemperatureCard, load_bundle, save_bundle
from perpixel.evaluate import Scored, evaluate
from perpixel.metrics.calibration import LIMITS, Calibration, fit_temperature
from perpixel.scores import plain

Progress = Callable[[int, int, str], None]  # (done, of, what)

PIXELS = 1000  # of an image, at most
SCORES = 2_000_000  # numbers kept in all: the fit takes a second, and memory does not grow with the number of images


class PixelSample:
    """Scores and labels of as many pixels of each image, drawn by its name; an observer of `evaluate.score` that merges.

    Where the images become many, fewer pixels of each are kept, so that all of them count alike in a bounded memory.
    """

    def __init__(self, pixels: int = PIXELS, scores: int = SCORES) -> None:
        self.pixels, self.scores = pixels, scores
        self.images: dict[str, tuple[Tensor, Tensor]] = {}  # name -> (n, K) float32 and (n,) int64

    def __call__(self, seen: Scored) -> None:
        """Draw pixels of one image, with replacement; none where none is labelled or a score is not finite."""
        places = (seen.labels != seen.ignore).flatten().nonzero()[:, 0]
        if not len(places):
            return
        name = f"{seen.path} {seen.name}"
        seed = int.from_bytes(hashlib.blake2b(name.encode("utf-8", "surrogateescape"), digest_size=7).digest(), "big")
        drawn = places[torch.randint(len(places), (self.pixels,), generator=torch.Generator().manual_seed(seed)).to(places.device)]
        scores = seen.logits.flatten(1)[:, drawn].T.cpu()
        if torch.isfinite(scores).all():
            self.images[name] = (scores, seen.labels.flatten()[drawn].cpu())
            self._thin()

    def merge(self, other: "PixelSample") -> None:
        """Add the images of another one with the same limits."""
        self.images |= other.images
        self._thin(always=True)

    def half(self, which: int | None) -> tuple[Tensor, Tensor]:
        """Scores (1, K, n, 1) and labels (1, n, 1) of the first (0) or second (1) half of the images by name; None: of all.

        Frames of a film and slices of a stack, which are much alike, so fall into the same half.
        """
        names = sorted(self.images)
        if which is not None:
            middle = (len(names) + 1) // 2
            names = names[middle:] if which else names[:middle]
        scores, labels = (torch.cat([self.images[name][part] for name in names]) for part in (0, 1))
        return scores.T[None, :, :, None], labels[None, :, None]

    def _thin(self, always: bool = False) -> None:
        """Half the pixels of each image, as often as there are too many; they lie in random order, so the first ones do."""
        classes = next(iter(self.images.values()))[0].shape[1] if self.images else 0
        fewer = self.pixels
        while fewer > 1 and len(self.images) * fewer * classes > self.scores:
            fewer //= 2
        if always or fewer < self.pixels:
            self.pixels = fewer
            self.images = {name: (scores[:fewer].clone(), labels[:fewer].clone()) for name, (scores, labels) in self.images.items()}


@dataclass(frozen=True)
class Calibrated:
    """A fitted temperature and what it brings on images that it was not fitted on: cost in nats, calibration error, Brier score."""

    temperature: float
    images: int
    cost_before: float
    cost_after: float
    ece_before: float
    ece_after: float
    brier_before: float
    brier_after: float
    present: float | None = field(default=None, kw_only=True)  # the temperature that the bundle had
    written: bool = field(default=False, kw_only=True)  # into the bundle: this one, or that there is none

    @property
    def at_limit(self) -> bool:
        """Whether the search ended where it had to: the scores are hopeless, or without a mistake, and no number mends them."""
        return not 1.001 * LIMITS[0] < self.temperature < 0.999 * LIMITS[1]

    @property
    def accepted(self) -> bool:
        """Whether the cross-entropy falls, by a temperature within the limits."""
        return self.cost_after < self.cost_before and not self.at_limit

    @property
    def card(self) -> TemperatureCard | None:
        """For the bundle; None where the probabilities are best as they are."""
        return TemperatureCard(value=self.temperature, images=self.images) if self.accepted else None

    def to_json(self) -> dict[str, Any]:
        """Plain types; None where there is no number."""
        numbers = {name: None if value is None else plain(value) for name, value in asdict(self).items() if name != "written"}
        return numbers | {"accepted": self.accepted, "written": self.written}


def fitted(sample: PixelSample) -> Calibrated:
    """The temperature of a sample, and what it brings by halves; of fewer than two images nothing can be said, or accepted."""
    if len(sample.images) < 2:
        return Calibrated(1.0, len(sample.images), *[float("nan")] * 6)
    before, after, costs = Calibration(), Calibration(), np.zeros(2)
    for which in (0, 1):
        temperature = fit_temperature([sample.half(1 - which)], ignore=-1)
        scores, labels = sample.half(which)
        for column, (found, divisor) in enumerate(((before, 1.0), (after, temperature))):
            found.update(scores / divisor, labels, ignore=-1)
            costs[column] += float(F.cross_entropy(scores / divisor, labels, reduction="sum"))
    costs /= before.pixels
    scaled = [float(costs[0]), float(costs[1]), before.error, after.error, before.brier, after.brier]
    return Calibrated(fit_temperature([sample.half(None)], ignore=-1), len(sample.images), *scaled)


def calibrate(
    bundle: Path | str,
    images: Path | str,
    masks: Path | str | None = None,
    *,
    split: str = "val",
    labels: Mapping[int, int] | None = None,
    write: bool = True,
    device: str | None = None,
    progress: Progress | None = None,
) -> Calibrated:
    """Fits the temperature of a bundle's scores, refined as the bundle says, and writes it there where the cross-entropy falls by it.

    A watershed's lines are left out: the scores between them are what probabilities are made of.

    Args:
        bundle: its path; rewritten in place. A temperature that it had is dropped where none helps.
        images, masks: any layout that `perpixel check` understands.
        split: the part to fit on; the part that the bundle was trained on would make it too sure of itself.
        labels: mask value -> class index or 255, over the bundle's own label map.
        write: False only reports.
        device: where to compute; None: on the GPU where there is one.

    Raises:
        ValueError: as `evaluate`; or only one image could be scored.
    """
    path, sample = Path(bundle), PixelSample()
    loaded = load_bundle(path, device or ("cuda" if torch.cuda.is_available() else "cpu"))
    # A watershed's lines would be fitted too: they are as steep as the temperature that the bundle has already.
    refine = "none" if loaded.card.refiner_name == LINES else "bundle"
    evaluate(loaded, images, masks, split=split, labels=labels, scores=(), refine=refine, observers=[sample], progress=progress)
    if len(sample.images) < 2:
        raise ValueError(
            f"{images}: {len(sample.images)} image with finite scores; a temperature needs at least 2 to be fitted and tried on. "
            "Images that are too large to be held whole are not sampled; give parts of them"
        )
    present = loaded.card.temperature
    found = replace(fitted(sample), present=None if present is None else present.value, written=write)
    if write:
        save_bundle(path, loaded.model.state_dict(), loaded.card.model_copy(update={"temperature": found.card}))
    return found


def render(found: Calibrated, console: Console) -> None:
    """What was found, for people."""
    for words, before, after in (
        ("cross-entropy, nats", f"{found.cost_before:.4f}", f"{found.cost_after:.4f}"),
        ("calibration error", f"{100 * found.ece_before:.2f} %", f"{100 * found.ece_after:.2f} %"),
        ("Brier score", f"{found.brier_before:.4f}", f"{found.brier_after:.4f}"),
    ):
        console.print(f"{words}: {before} without a temperature, {after} with one")
    console.print(f"[dim]A sample of the pixels of {found.images} images; each half with the temperature of the other.[/]", soft_wrap=True)
    if found.accepted:
        sure = "too sure of itself" if found.temperature > 1 else "not sure enough"
        console.print(f"temperature [bold]{found.temperature:.3f}[/]: the network was {escape(sure)}", soft_wrap=True)
    elif found.at_limit:
        why = "hardly tell the classes apart" if found.temperature > 1 else "are without a mistake here"
        console.print(f"no temperature from {LIMITS[0]:g} to {LIMITS[1]:g} mends scores that {why}: they stay as they are", soft_wrap=True)
    else:
        console.print("no temperature helps: the probabilities stay as they are", soft_wrap=True)
    if found.written and found.accepted:
        place = "" if found.present is None else f", in place of {found.present:.3f}"
        console.print(f"[bold]written into the bundle[/]{place}", soft_wrap=True)
    elif found.written and found.present is not None:
        console.print(f"[bold]taken out of the bundle[/]: its temperature of {found.present:.3f}", soft_wrap=True)
    else:
        console.print("the bundle stays as it is", soft_wrap=True)
