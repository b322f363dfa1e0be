"""What a search for a refiner tries: coarse grids, and what lies around a good place."""

import itertools
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from perpixel.refinement.dense_crf import NETWORK_SCORES

Costs = list[list[float]]  # (K, K) label costs
SEARCHED = ("dense_crf", "grid_mrf", "gaussian_crf")  # the watershed only where it is asked for: its lines are too thin for mIoU


@dataclass(frozen=True)
class Candidate:
    """One refiner with the options that differ from its defaults."""

    name: str
    options: dict[str, Any]

    @property
    def words(self) -> str:
        """The options for people, label costs as a word."""
        shown = {key: "learned" if key == "compatibility" else value for key, value in self.options.items() if value is not None}
        return f"{self.name} {', '.join(f'{key}={value}' for key, value in shown.items())}".rstrip()

    @property
    def learned(self) -> bool:
        """Whether its label costs were learned from masks; else they are Potts'."""
        return self.options.get("compatibility") is not None

    @property
    def key(self) -> str:
        """Equal for equal candidates only."""
        return f"{self.name} {sorted(self.options.items())}"


def defaults(name: str, scale: float) -> Candidate:
    """A refiner as it comes, stated, so that the search can go on from there; `scale` brings bandwidths of colours to the image's type."""
    if name == "dense_crf":
        appearance, smoothness = NETWORK_SCORES
        return Candidate(
            name, {"kernels": [_appearance(appearance["xy"], appearance["colour"] * scale, appearance["weight"]), dict(smoothness)]}
        )
    if name == "grid_mrf":
        return Candidate(name, {"strength": 1.0, "floor": 0.0, "neighbours": 4})
    if name == "watershed":
        return Candidate(name, {"seed": 0.9, "smallest": 50})
    return Candidate(name, {"weight": 4.0, "sharpness": 1.0, "neighbours": 4})


def coarse_grid(name: str, scale: float) -> Iterator[Candidate]:
    """The first grid of a refiner; `scale` brings bandwidths of colours to the image's type."""
    if name == "dense_crf":
        # Around DeepLab's grids (xy 30 to 100, rgb 3 to 20): weights of 3 and 10, the smoothness kernel fixed at 3 and 3.
        for colour, xy, weight in itertools.product((5.0, 13.0, 30.0), (15.0, 50.0), (1.0, 4.0, 10.0)):
            yield Candidate(name, {"kernels": [_appearance(xy, colour * scale, weight), {"xy": 3.0, "weight": 1.0}]})
    elif name == "grid_mrf":
        for strength, floor in itertools.product((0.3, 1.0, 3.0, 10.0), (0.0, 0.3)):
            yield Candidate(name, {"strength": strength, "floor": floor, "neighbours": 8})
    elif name == "watershed":
        for seed, smallest in itertools.product((0.5, 0.7, 0.8, 0.9, 0.95, 0.98), (10, 50, 200)):
            yield Candidate(name, {"seed": seed, "smallest": smallest})
    else:
        for weight, sharpness in itertools.product((1.0, 4.0, 16.0, 64.0), (0.5, 1.0, 4.0)):
            yield Candidate(name, {"weight": weight, "sharpness": sharpness, "neighbours": 8})


def _appearance(xy: float, colour: float, weight: float) -> dict[str, float]:
    return {"xy": xy, "colour": colour, "weight": weight}


def with_costs(candidate: Candidate, costs: Costs) -> Candidate:
    """The candidate with the label costs of the training masks."""
    learned: dict[str, Any] = {"compatibility": costs}
    if candidate.name == "grid_mrf":
        learned["repair_metric"] = True
    if candidate.name == "gaussian_crf":
        learned |= {"labels": "full", "classes": len(costs)}
    return Candidate(candidate.name, {**candidate.options, **learned})


def neighbours(centre: Candidate, step: float, costs: Costs | None) -> Iterator[Candidate]:
    """What differs from a candidate in one number by a factor of `step`, and with the label costs of the training masks."""
    options = centre.options
    if costs is not None and not centre.learned:
        yield with_costs(centre, costs)
    if centre.name == "dense_crf":
        for place, key in itertools.product(range(len(options["kernels"])), ("weight", "colour", "xy")):
            for factor in (step, 1 / step):
                kernels = [dict(kernel) for kernel in options["kernels"]]
                if key in kernels[place]:
                    kernels[place][key] = _rounded(kernels[place][key] * factor)
                    yield Candidate(centre.name, {**options, "kernels": kernels})
        return
    if centre.name == "watershed":
        options = {**defaults(centre.name, 1.0).options, **options}  # a bundle's own need not state all
        for factor in (step, 1 / step):
            away = _rounded((1 - options["seed"]) * factor)  # not the seed itself, which would be rounded to 1
            yield Candidate(centre.name, {**options, "seed": max(0.0, 1 - away)})
            yield Candidate(centre.name, {**options, "smallest": max(1, round(options["smallest"] * factor))})
        return
    for key in ("strength", "floor", "weight", "sharpness"):
        for factor in (step, 1 / step):
            if options.get(key):
                yield Candidate(centre.name, {**options, key: _rounded(options[key] * factor)})


def _rounded(value: float) -> float:
    """To four digits, whatever the scale: bandwidths of colours are 5 for 8 bits and 0.02 for floats."""
    return float(f"{value:.4g}")
