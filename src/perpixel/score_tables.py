"""Scores as tables for people."""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from perpixel.metrics import ABSENT_RULES
from perpixel.metrics.intervals import Interval

if TYPE_CHECKING:
    from perpixel.evaluate import Evaluation

LEFT_OUT = 8  # files named of those that could not be scored
TRIMAP_SHOWN = (1, 5, 10, 20, 40)  # widths, of those that JSON has


def render(result: "Evaluation", console: Console) -> None:
    """Scores of each class and of the set, the rule for absent classes, where the cost lies, and what was left out."""
    content, intervals = result.to_json(), result.intervals()
    console.print(_class_table(content, intervals["iou"]))
    console.print(_set_table(content, intervals))
    console.print(
        f"[dim]Set: one matrix over all images. Image mean: each image scored alone. Interval: 95 %, 1,000 bootstrap resamples of the "
        f"{content['images']} images. {ABSENT_RULES[result.absent]}[/]",
        soft_wrap=True,
    )
    if result.augment:
        console.print(f"scores averaged over several views of each image: {result.augment}", soft_wrap=True)
    if result.refined != "none":
        console.print(f"scores refined by {escape(result.refined)}; --refine none leaves it out", soft_wrap=True)
    for line in _group_lines(content):
        console.print(line, soft_wrap=True)
    cost = intervals["cost"]
    within = f", 95 % {cost.low:.4f} to {cost.high:.4f}" if np.isfinite(cost.low) else ""
    console.print(f"cost {result.cost:.4f} (mean of the images' cross-entropy, nats per pixel{within}). Largest losses:", soft_wrap=True)
    for name, loss in result.worst():
        console.print(f"  {loss:8.4f}  {escape(name)}", soft_wrap=True)
    for doubt in result.warnings:
        console.print(f"[yellow]warning:[/] {escape(doubt)}", soft_wrap=True)
    for hole in (hole for holes in result.holes.values() for hole in holes):
        console.print(f"[yellow]not counted[/] {escape(hole)}", soft_wrap=True)
    for why in list(result.damaged.values())[:LEFT_OUT]:
        console.print(f"[yellow]left out[/] {escape(why)}", soft_wrap=True)
    if len(result.damaged) > LEFT_OUT:
        console.print(f"[yellow]left out[/] and {len(result.damaged) - LEFT_OUT} more, {len(result.damaged)} in all; --json names them")


def percent(value: float | None) -> str:
    """One decimal; "-" where there is no number."""
    return "-" if value is None or value != value else f"{100 * value:.1f} %"


def _class_table(content: Mapping[str, Any], iou: Interval) -> Table:
    shares = content.get("cost_shares", {}).get("classes", {}).get("cost")
    columns = ["class", "accuracy", "IoU", "95 %", "Dice", "pixels", *(["cost"] if shares else [])]
    table = Table(*columns, title=f"{content['images']} images")
    pixels = max(1, content["pixels"])
    for place, row in enumerate(content["classes"]):
        table.add_row(
            escape(row["name"]),
            percent(row["accuracy"]),
            percent(row["iou"]),
            _between(np.asarray(iou.low)[place], np.asarray(iou.high)[place]),
            percent(row["dice"]),
            percent(row["pixels"] / pixels),
            *([percent(shares[place])] if shares else []),
        )
    return _numbers_right(table)


def _set_table(content: Mapping[str, Any], intervals: Mapping[str, Interval]) -> Table:
    table = Table("score", "set", "95 %", "image mean")
    rows = {
        "pixel accuracy": "pixel_accuracy",
        "mean accuracy": "mean_accuracy",
        "mIoU": "miou",
        "frequency-weighted IoU": "fwiou",
        "mean Dice": "mean_dice",
    }
    for words, key in rows.items():
        found = intervals[key]
        table.add_row(words, percent(content[key]), _between(found.low, found.high), percent(content["image_means"][key]))
    if "boundary" in content:  # BF is defined image by image
        found, bands = intervals["bf"], intervals["boundary_iou"]
        table.add_row("boundary F (BF)", "", _between(found.low, found.high), percent(content["boundary"]["bf"]))
        table.add_row("Boundary IoU", percent(content["boundary"]["boundary_iou"]), _between(bands.low, bands.high), "")
    return _numbers_right(table)


def _group_lines(content: Mapping[str, Any]) -> list[str]:
    lines = []
    if "boundary" in content:
        curve = content["boundary"]["trimap"]
        found = dict(zip(curve["widths"], curve["miou"], strict=True))
        shown = "   ".join(f"{width} px {percent(found[width])}" for width in TRIMAP_SHOWN)
        lines.append(f"mIoU in bands along true boundaries: {shown}")
    if "cost_shares" in content:
        band = content["cost_shares"]["boundary_band"]
        lines.append(
            f"within 0.75 % of the diagonal of a boundary: {percent(band['pixels'])} of the pixels, {percent(band['cost'])} of the cost"
        )
    if "calibration" in content:
        lines += _calibration_lines(content["calibration"])
    if "surface" in content:
        lines += _surface_lines(content)
    if "neurite" in content:
        found = content["neurite"]
        names = ("pixel_error", "warping_error", "rand_error", "v_rand", "v_info", "seg")
        numbers = "   ".join(f"{name.replace('_', ' ')} {_number(found[name], 6 if name == 'warping_error' else 4)}" for name in names)
        lines.append(f"segments of '{escape(found['inside'])}': {numbers}   F1 at IoU 0.5 {_number(found['f1']['0.5'])}")
        lines.append(f"as the boards of the EM challenge have them, best of thresholds: {_board_words(found['board']['best'])}")
    return lines


def _board_words(best: Mapping[str, Any]) -> str:
    words = []
    for name, row in best.items():
        at = "" if row["threshold"] is None else f" (at {row['threshold']:g})"
        words.append(f"{name.replace('_', ' ')} {_number(row['value'], 6 if name == 'warping_error' else 4)}{at}")
    return "   ".join(words)


def _calibration_lines(found: Mapping[str, Any]) -> list[str]:
    before, after = found["before"], found["after"]
    words = f"calibration error {percent(before['ece'])}, Brier {_number(before['brier'])}"
    if after is None:
        lines = [f"{words}; no temperature in use (see perpixel calibrate)"]
    else:
        scaled = f"{percent(after['ece'])}, Brier {_number(after['brier'])}"
        lines = [f"{words}; with the bundle's temperature {found['temperature']:.3g}: {scaled}"]
    if found["images_not_finite"]:
        lines.append(f"[yellow]warning:[/] scores of {found['images_not_finite']} images are not finite; calibration leaves them out")
    return lines


def _surface_lines(content: Mapping[str, Any]) -> list[str]:
    found = content["surface"]
    lines = [f"surface distances in pixels, mean over images (ASSD, {found['percentile']:g} % Hausdorff):"]
    columns = (found[f"{name}_classes"] for name in ("assd", "hausdorff", "missed", "invented"))
    for row, assd, far, missed, invented in zip(content["classes"], *columns, strict=True):
        alone = f"   missed in {missed}, invented in {invented} images" if missed or invented else ""
        lines.append(f"  {escape(row['name'])}: {_number(assd, 2)}, {_number(far, 2)}{alone}")
    return lines


def _between(low: Any, high: Any) -> str:
    return f"{100 * low:.1f} - {100 * high:.1f}" if np.isfinite(low) and np.isfinite(high) else "-"


def _number(value: float | None, digits: int = 4) -> str:
    return "-" if value is None else f"{value:.{digits}f}"


def _numbers_right(table: Table) -> Table:
    for column in table.columns[1:]:
        column.justify = "right"
    return table
