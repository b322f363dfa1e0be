"""The page: content in, HTML out. Whatever comes from files is escaped by jinja2 or JSON; only our own style, script and plots are not."""

import base64
import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from importlib.resources import files
from typing import Any, Protocol, TypeVar

import numpy as np

from perpixel import __version__
from perpixel.metrics.intervals import Interval
from perpixel.metrics.measures import COST, MEASURES
from perpixel.report import figures
from perpixel.report.atlas import Entry
from perpixel.report.confusions import Confusion
from perpixel.report.facts import RunFiles
from perpixel.report.label_next import Proposal
from perpixel.report.suspects import Suspect

LISTED = 50  # damaged files that are named
# Bytes of pictures before base64, which adds a third; with text and plots the page stays below 20 MB.
BUDGET = {"atlas": 8_000_000, "suspects": 2_000_000, "confusions": 1_200_000, "proposals": 1_500_000}
SET_SCORES = {
    "miou": "mIoU",
    "pixel_accuracy": "pixel accuracy",
    "mean_accuracy": "mean accuracy",
    "fwiou": "frequency-weighted IoU",
    "mean_dice": "mean Dice",
}


HALVED = {"v_rand": "V_rand", "v_info": "V_info"}  # each has a half for splits and one for mergers


class Sized(Protocol):
    @property
    def bytes(self) -> int:
        """Of its pictures."""


T = TypeVar("T", bound=Sized)


@dataclass
class Content:
    """Everything that a page shows.

    Attributes:
        scores: `Evaluation.to_json()`; intervals: `Evaluation.intervals()`.
        colors: of the classes, as the pictures have them.
        looked_at: in words, how many images without masks there were; "" where there were none.
    """

    title: str
    subtitle: str
    classes: Sequence[str]
    colors: Sequence[tuple[int, int, int]]
    scores: Mapping[str, Any]
    intervals: Mapping[str, Interval]
    facts: Sequence[tuple[str, str]]
    commands: Sequence[tuple[str, str]]
    run: RunFiles
    confusions: Sequence[Confusion] = ()
    atlas: Sequence[Entry] = ()
    suspects: Sequence[Suspect] = ()
    proposals: Sequence[Proposal] = ()
    looked_at: str = ""
    warnings: Sequence[str] = field(default_factory=list)


def render_page(content: Content) -> str:
    """One self-contained HTML file, below 20 MB whatever it shows."""
    from jinja2 import Environment, PackageLoader, StrictUndefined  # loaded where a page is made: few commands make one

    loader = PackageLoader("perpixel.report", "templates")
    pages = Environment(autoescape=True, loader=loader, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    pages.filters |= {"uri": _uri, "percent": percent, "compact": lambda value: json.dumps(value, separators=(",", ":"))}
    return pages.get_template("report.html").render(_variables(content))


def percent(value: float | None) -> str:
    """One decimal; a dash where there is no number."""
    return "–" if value is None or not math.isfinite(value) else f"{100 * value:.1f} %"


def _variables(content: Content) -> dict[str, Any]:
    scores, curves = content.scores, figures.learning_curves(content.run.rows)
    boundary, calibration = scores.get("boundary"), scores.get("calibration")
    atlas = _within(content.atlas, BUDGET["atlas"])
    damaged, holes = [*scores["damaged"].values()], [hole for found in scores["holes"].values() for hole in found]
    return {
        **_own("css", "js"),
        "version": __version__,
        "title": content.title,
        "subtitle": content.subtitle,
        "headline": _headline(content),
        "findings": _sentences(content),
        "warnings": [*content.warnings, *scores["warnings"]],
        "facts": content.facts,
        "commands": content.commands,
        "curves": _safe(curves),
        "reasons": content.run.reasons,
        "recipe": content.run.recipe,
        "damaged": damaged[:LISTED],
        "damaged_more": f" of {len(damaged)}" if len(damaged) > LISTED else "",
        "images": scores["images"],
        "absent_rule": scores["absent_rule"],
        "set_rows": _set_rows(content),
        "class_rows": _class_rows(content),
        "class_costs": "cost_shares" in scores,
        "classes": [{"name": name, "color": color} for name, color in zip(content.classes, content.colors, strict=True)],
        "class_names_by_color": _names_by_color(content),
        "matrix": _safe(figures.confusion_matrix(np.array(scores["confusion"]), content.classes)),
        "mistaken": _mistaken(content),
        "distances": _distance_rows(content),
        "holes": holes[:LISTED],
        "holes_more": f" of {len(holes)}" if len(holes) > LISTED else "",
        "confusions": _pruned(content.confusions, BUDGET["confusions"]),
        "trimap": _safe(figures.trimap_curve(**boundary["trimap"])) if boundary else "",
        "band": _band(scores),
        "reliability": _safe(_reliability(calibration)) if calibration and any(calibration["before"]["reliability"]["pixels"]) else "",
        "calibration": _calibration(calibration) if calibration else "",
        "atlas": atlas,
        "atlas_words": _atlas_words(len(atlas), scores["images"]),
        "board_words": _board_words(scores.get("neurite")),
        "objects": _object_rows(scores.get("neurite")),
        "loss_scale": max((entry.loss for entry in atlas if math.isfinite(entry.loss)), default=0.0) or 1.0,
        "suspects": _within(content.suspects, BUDGET["suspects"], lambda suspect: suspect.crop),
        "proposals": _within(content.proposals, BUDGET["proposals"]),
        "looked_at": content.looked_at,
    }


def _headline(content: Content) -> list[dict[str, str]]:
    scores = content.scores
    found = [
        {"words": SET_SCORES[key], "value": percent(scores[key]), "within": _between(content.intervals[key])}
        for key in ("miou", "pixel_accuracy", "mean_accuracy")
    ]
    if "boundary" in scores:
        found.append({"words": "boundary F (BF)", "value": percent(scores["boundary"]["bf"]), "within": _between(content.intervals["bf"])})
    cost = scores["cost"]
    ends = [float(content.intervals[COST.name].low), float(content.intervals[COST.name].high)]
    within = f"{ends[0]:.3f} – {ends[1]:.3f}" if all(map(math.isfinite, ends)) else ""
    found.append({"words": "cost (nats per pixel)", "value": "–" if cost is None else f"{cost:.3f}", "within": within})
    return [*found, {"words": "images", "value": f"{scores['images']:,}", "within": ""}]


def _sentences(content: Content) -> list[str]:
    """What the numbers come down to, in words."""
    known = sorted((row["iou"], row["name"]) for row in content.scores["classes"] if row["iou"] is not None and row["pixels"])
    words = []
    if len(known) > 1:
        count = 1 if len(known) < 6 else 3  # so that no class is in both
        weak = ", ".join(f"{name} ({percent(iou)})" for iou, name in known[:count])
        strong = ", ".join(f"{name} ({percent(iou)})" for iou, name in reversed(known[-count:]))
        words.append(f"Best in IoU: {strong}. Weakest: {weak}.")
    if content.confusions:
        worst = content.confusions[0]
        truth, guess = content.classes[worst.truth], content.classes[worst.guess]
        words.append(f"The costliest confusion is {truth} taken for {guess}: {percent(worst.share)} of the loss.")
    if band := _band(content.scores):
        words.append(band)
    return words


def _band(scores: Mapping[str, Any]) -> str:
    if "cost_shares" not in scores:
        return ""
    band = scores["cost_shares"]["boundary_band"]
    near = "Within 0.75 % of the diagonal of a boundary lie"
    return f"{near} {percent(band['pixels'])} of the pixels and {percent(band['cost'])} of the cost." if band["cost"] is not None else ""


def _set_rows(content: Content) -> list[dict[str, str]]:
    scores, intervals = content.scores, content.intervals
    rows = [
        {"words": words, "value": percent(scores[key]), "within": _between(intervals[key]), "images": percent(scores["image_means"][key])}
        for key, words in SET_SCORES.items()
    ]
    for name, measure in MEASURES.items():
        if name in intervals and name not in (*SET_SCORES, COST.name):
            found = intervals[name]
            unit = {"points": " %", "pixels": " px"}.get(measure.unit, "")
            value = percent(float(found.value)) if measure.unit == "points" else measure.text(float(found.value), dash="–") + unit
            bounds = [float(found.low), float(found.high)]
            ends = _between(found) if measure.unit == "points" else " – ".join(measure.text(bound) for bound in bounds)
            within = ends if all(map(math.isfinite, bounds)) else "–"
            rows.append({"words": measure.words, "value": value, "within": within, "images": ""})
            if measure.of_images:
                rows[-1] |= {"value": "", "images": value}
    return rows


def _atlas_words(shown: int, images: int) -> str:
    if not shown:
        return "No image has a loss."
    return f"All {shown} images, by their loss." if shown == images > 1 else f"The {shown} of {images:,} images with the largest loss."


def _board_words(neurite: Mapping[str, Any] | None) -> str:
    """Where the rows of the boards come from, and the threshold of each."""
    if not neurite:
        return ""
    best = neurite["board"]["best"]
    at = ", ".join(f"{name.replace('_', ' ')} {row['threshold']:g}" for name, row in best.items() if row["threshold"] is not None)
    rule = "The rows with a best threshold are as the boards of the EM challenge (ISBI 2012) have them, which is what papers state;"
    words = f"Best thresholds of the probability of {neurite['inside']}: {at or 'none'}."
    return f"{rule} those above them are of the most probable class. {words}"


def _object_rows(neurite: Mapping[str, Any] | None) -> list[tuple[str, str]]:
    """(words, value): the two halves of V_rand and V_info, and F1 of objects over the IoU that a match needs; they have no intervals."""
    if not neurite:
        return []
    halves = [(f"{words} {half}", neurite[f"{key}_{half}"]) for key, words in HALVED.items() for half in ("split", "merge")]
    rows = [*halves, *((f"F1 of objects at IoU {least}", value) for least, value in neurite["f1"].items())]
    return [(words, "–" if value is None else f"{value:.4f}") for words, value in rows]


def _mistaken(content: Content) -> list[dict[str, Any]]:
    """The confusion matrix in words: of each class what its pixels are predicted as, most first, down to one in a hundred."""
    counts = np.array(content.scores["confusion"], np.float64)
    rows = []
    for k, row in enumerate(counts):
        shares = row / max(row.sum(), 1)
        others = [j for j in np.argsort(-shares, kind="stable").tolist() if j != k and shares[j] >= 0.01]
        taken = ", ".join(f"{content.classes[j]} {percent(shares[j])}" for j in others) or ("nothing else" if row.sum() else "")
        rows.append(
            {"name": content.classes[k], "pixels": int(row.sum()), "right": percent(shares[k]) if row.sum() else "–", "taken": taken}
        )
    return rows


def _distance_rows(content: Content) -> list[dict[str, Any]]:
    """Surface distances of each class, and in how many images there is none because one of the two lacks it."""
    found = content.scores.get("surface")
    if not found:
        return []
    keys = ("assd", "hausdorff", "missed", "invented")
    columns = (found[f"{key}_classes"] for key in keys)
    rows = [dict(zip(("name", *keys), row, strict=True)) for row in zip(content.classes, *columns, strict=True)]
    return [row | {key: "–" if row[key] is None else f"{row[key]:.1f}" for key in ("assd", "hausdorff")} for row in rows]


def _class_rows(content: Content) -> list[dict[str, Any]]:
    found, pixels = content.intervals["iou"], max(1, content.scores["pixels"])
    costs = content.scores.get("cost_shares", {}).get("classes", {}).get("cost") or [None] * len(content.classes)
    rows = []
    for place, row in enumerate(content.scores["classes"]):
        low, high = float(np.asarray(found.low)[place]), float(np.asarray(found.high)[place])
        bounded = math.isfinite(low) and math.isfinite(high)
        within = f"{100 * low:.1f} – {100 * high:.1f}" if bounded else "–"
        ends = {"low": low if bounded else None, "high": high if bounded else None}
        rows.append({**row, **ends, "within": within, "pixels": row["pixels"] / pixels, "cost": costs[place]})
    return rows


def _reliability(found: Mapping[str, Any]) -> str:
    curves = {"as it is": found["before"]["reliability"]}
    if found["after"] is not None:
        curves["with the bundle's temperature"] = found["after"]["reliability"]
    drawn = {name: (curve["confidence"], curve["accuracy"]) for name, curve in curves.items()}
    return figures.reliability_curve(drawn, found["before"]["reliability"]["pixels"])


def _calibration(found: Mapping[str, Any]) -> str:
    before, after = found["before"], found["after"]
    if before["ece"] is None:
        return ""
    words = f"Expected calibration error {percent(before['ece'])}, Brier score {before['brier']:.4f}."
    if after is not None and after["ece"] is not None:
        words += f" With the bundle's temperature {found['temperature']:.3g}: {percent(after['ece'])}, {after['brier']:.4f}."
    return words


def _names_by_color(content: Content) -> dict[str, str]:
    """ "red,green,blue" -> the classes drawn so."""
    names: dict[str, str] = {}
    for name, color in zip(content.classes, content.colors, strict=True):
        key = ",".join(str(part) for part in color)
        names[key] = f"{names[key]} or {name}" if key in names else name
    return names


def _between(found: Interval) -> str:
    low, high = float(found.low), float(found.high)
    return f"{100 * low:.1f} – {100 * high:.1f}" if math.isfinite(low) and math.isfinite(high) else "–"


def _within(items: Sequence[Any], budget: int, sized: Any = lambda item: item) -> list[Any]:
    """The first items, as many as fit the budget."""
    kept, used = [], 0
    for item in items:
        used += sized(item).bytes
        if used > budget:
            break
        kept.append(item)
    return kept


def _pruned(confusions: Iterable[Confusion], budget: int) -> list[Confusion]:
    """The confusions, with crops as long as the budget lasts: first the best of each, so that none takes another's place."""
    found = list(confusions)
    kept: dict[int, int] = dict.fromkeys(range(len(found)), 0)
    used = 0
    for depth in range(max((len(item.crops) for item in found), default=0)):
        for place, item in enumerate(found):
            if depth == kept[place] < len(item.crops) and used + item.crops[depth].bytes <= budget:
                used += item.crops[depth].bytes
                kept[place] += 1
    return [replace(item, crops=item.crops[: kept[place]]) for place, item in enumerate(found)]


def _uri(picture: bytes) -> str:
    return "data:image/webp;base64," + base64.b64encode(picture).decode()


def _own(*kinds: str) -> dict[str, Any]:
    """Our style and script, as they stand in the package."""
    return {kind: _safe((files("perpixel.report") / "templates" / f"report.{kind}").read_text("utf-8")) for kind in kinds}


def _safe(text: str) -> Any:
    """Markup that is ours, or in which what is not has been escaped."""
    from markupsafe import Markup

    return Markup(text)
