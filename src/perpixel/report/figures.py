"""Plots of a report as inline SVG, drawn by matplotlib, in the ink of the page around them.

Text stays text (the reader's font, searchable), and names are never read as mathematics.
"""

import io
import re
import warnings
import zlib
from collections.abc import Mapping, Sequence
from html import escape
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

INK = "#010203"  # stands for the page's text colour, which is dark or light as the reader likes it
BLUE, ORANGE = "#4c8dd6", "#d55e00"  # told apart by the colour-blind, and legible on white and on black
NUMBERED = 14  # classes up to which each cell of the confusion matrix shows its number
STYLE: dict[Any, Any] = {
    "svg.fonttype": "none",
    "svg.hashsalt": "perpixel",
    "text.parse_math": False,
    "font.size": 9,
    "lines.linewidth": 1.6,
    "axes.edgecolor": INK,
    "axes.labelcolor": INK,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.titlesize": 9,
    "text.color": INK,
    "xtick.color": INK,
    "ytick.color": INK,
    "grid.color": INK,
    "grid.alpha": 0.15,
    "axes.grid": True,
    "figure.facecolor": "none",
    "axes.facecolor": "none",
    "legend.frameon": False,
}


def learning_curves(rows: Sequence[Mapping[str, float]]) -> str:
    """Cost and cross-entropy on validation above, mIoU and pixel accuracy below, over the steps.

    `rows` as in metrics.csv, with the values that a row has; "" where there are none.
    """
    if not rows:
        return ""

    def series(key: str) -> tuple[list[float], list[float]]:
        points = [(row["step"], row[key]) for row in rows if key in row and "step" in row]
        return [step for step, _ in points], [value for _, value in points]

    def draw(figure: "Figure") -> None:
        from matplotlib.ticker import MaxNLocator

        upper, lower = figure.subplots(2, 1, sharex=True)
        upper.plot(*series("cost"), color=BLUE, alpha=0.8, label="cost of the training batches")
        upper.plot(*series("val_cross_entropy"), color=ORANGE, marker="o", markersize=3.5, label="cross-entropy on validation")
        upper.set_ylim(bottom=0)
        lower.plot(*series("val_miou"), color=ORANGE, marker="o", markersize=3.5, label="mIoU on validation")
        lower.plot(*series("val_pixel_accuracy"), color=BLUE, marker="s", markersize=3.5, linestyle="--", label="pixel accuracy")
        lower.set_ylim(-0.02, 1.02)  # points at 0 and 1 are drawn whole
        lower.set_xlabel("step")
        lower.xaxis.set_major_locator(MaxNLocator(integer=True))
        for axes in (upper, lower):
            axes.legend()

    return _svg(draw, (4.8, 4.6), "Learning curves: cost and scores over the steps of training")


def confusion_matrix(counts: np.ndarray, names: Sequence[str]) -> str:
    """Each true class's pixels by what they are predicted as, in shares of the row; names in full where they fit.

    Args:
        counts: (K, K) pixels [truth, prediction].
        names: of the K classes.
    """
    counts = np.asarray(counts, np.float64)
    total = counts.sum(1, keepdims=True)
    shares = np.divide(counts, total, out=np.full(counts.shape, np.nan), where=total > 0)
    classes, short = len(names), [name if len(name) <= 22 else f"{name[:21]}…" for name in names]

    def draw(figure: "Figure") -> None:
        from matplotlib.colors import PowerNorm

        axes = figure.subplots()
        axes.grid(visible=False)
        # The square root lets confusions of a few percent be seen beside a diagonal near 1.
        picture = axes.imshow(shares, cmap="cividis", norm=PowerNorm(0.5, 0, 1), interpolation="nearest")
        every = max(1, -(-classes // 60))  # beyond, names would lie on one another
        ticks = range(0, classes, every)
        axes.set_xticks(ticks, short[::every], rotation=90, fontsize=8 if classes <= 30 else 5)
        axes.set_yticks(ticks, short[::every], fontsize=8 if classes <= 30 else 5)
        axes.tick_params(length=0)
        axes.set_xlabel("predicted as")
        axes.set_ylabel("truth")
        for row, column in np.argwhere(shares >= 0.005) if classes <= NUMBERED else ():
            share = shares[row, column]
            axes.text(column, row, f"{100 * share:.0f}", ha="center", va="center", fontsize=7, color="black" if share > 0.3 else "white")
        bar = figure.colorbar(picture, ax=axes, shrink=0.6, ticks=[0, 0.01, 0.05, 0.2, 0.5, 1])
        bar.ax.set_yticklabels(["0", "1 %", "5 %", "20 %", "50 %", "100 %"])
        bar.outline.set_visible(False)

    side = 3.4 + min(classes, 40) * 0.13
    return _svg(draw, (side + 0.8, side), f"Confusion matrix of {classes} classes: rows are the truth, columns the prediction")


def trimap_curve(widths: Sequence[float], accuracy: Sequence[float | None], miou: Sequence[float | None]) -> str:
    """Accuracy and mIoU in bands along the true boundaries, over the width of the band in pixels."""

    def draw(figure: "Figure") -> None:
        axes = figure.subplots()
        axes.plot(widths, _gaps(accuracy), color=BLUE, linestyle="--", label="pixel accuracy")
        axes.plot(widths, _gaps(miou), color=ORANGE, label="mIoU")
        axes.set(ylim=(0, 1), xlim=(0, max(widths)), xlabel="width of the band along true boundaries (pixels)")
        axes.legend()

    return _svg(draw, (4.4, 3.2), "Trimap curve: accuracy and mIoU near boundaries, over the width of the band")


def reliability_curve(curves: Mapping[str, tuple[Sequence[float | None], Sequence[float | None]]], pixels: Sequence[int]) -> str:
    """Share of right pixels over their confidence; below, how many pixels have such a confidence.

    Args:
        curves: name -> mean confidence and accuracy of each bin; None where a bin is empty. At most two are drawn.
        pixels: in each bin of the first, evenly over 0 to 1.
    """

    def draw(figure: "Figure") -> None:
        upper, lower = figure.subplots(2, 1, sharex=True, height_ratios=[4, 1])
        upper.plot([0, 1], [0, 1], color=INK, linewidth=0.8, linestyle=":", label="as it should be")
        for (name, (confidence, right)), color, mark in zip(curves.items(), (ORANGE, BLUE), "os", strict=False):
            upper.plot(_gaps(confidence), _gaps(right), color=color, marker=mark, markersize=3.5, label=name)
        upper.set(xlim=(-0.02, 1.02), ylim=(-0.02, 1.02), ylabel="share of right pixels")
        upper.legend(loc="best")
        _bars(lower, pixels)
        lower.set(xlabel="confidence of the prediction", ylabel="pixels")

    return _svg(draw, (4.4, 3.6), "Reliability curve: how often predictions of a given confidence are right")


def _bars(axes: "Axes", pixels: Sequence[int]) -> None:
    shares = np.asarray(pixels, np.float64) / max(1, sum(pixels))
    axes.bar((np.arange(len(pixels)) + 0.5) / len(pixels), shares, width=0.9 / len(pixels), color=ORANGE)
    axes.set(ylim=(0, 1), yticks=[0, 1], yticklabels=["0", "all"])


def _gaps(values: Sequence[float | None]) -> list[float]:
    return [np.nan if value is None else value for value in values]


def _svg(draw: Any, size: tuple[float, float], title: str) -> str:
    """An SVG element that names itself to those who cannot see it. No pyplot: it keeps state, and looks for a screen."""
    import matplotlib
    from matplotlib.figure import Figure

    text = io.StringIO()
    with warnings.catch_warnings(), matplotlib.rc_context({**matplotlib.rcParamsDefault, "backend": "svg", **STYLE}):
        # The reader's browser draws the text: it does not matter that our font lacks a name's letters, as Chinese.
        warnings.filterwarnings("ignore", "Glyph .* missing from", UserWarning)
        figure = Figure(figsize=size, layout="constrained")
        draw(figure)
        figure.savefig(text, format="svg", metadata=dict.fromkeys(("Creator", "Date", "Format", "Type")))
    body = text.getvalue()
    body = body[body.index("<svg") :].replace(INK, "currentColor")
    own = f"f{zlib.crc32(text.getvalue().encode()):08x}-"  # ids are unique in the page
    body = re.sub(r'(id="|url\(#|href="#)', rf"\g<1>{own}", body)
    body = re.sub(r' xmlns(:xlink)?="[^"]*"| width="[^"]*pt"| height="[^"]*pt"', "", body, count=4)  # within HTML all three are needless
    return body.replace("<svg", f'<svg role="img" aria-label="{escape(title)}" style="max-width:{size[0] * 96:.0f}px"', 1)
