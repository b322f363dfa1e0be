"""Score a bundle on a set and write the report of it."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from perpixel.bundle import Bundle, load_bundle
from perpixel.data.images import Picture, find_pictures, read_image
from perpixel.data.layouts import find_layout
from perpixel.data.writing import replacing
from perpixel.evaluate import Evaluation, Scored, evaluate
from perpixel.predict import Segmenter
from perpixel.report.atlas import Atlas
from perpixel.report.confusions import Confusions
from perpixel.report.facts import commands, facts, read_run
from perpixel.report.label_next import LIMIT, Proposal, propose
from perpixel.report.page import Content, render_page
from perpixel.report.seen import look
from perpixel.report.suspects import Suspects
from perpixel.report.thumbnails import shown_colors
from perpixel.scores import DEFAULT_GROUPS

Progress = Callable[[int, int, str], None]  # (done, of, what)


class Findings:
    """Observer of `evaluate`: what a report shows of single images. Memory does not grow with their number."""

    def __init__(self, colors: Sequence[tuple[int, int, int]]) -> None:
        self.atlas, self.confusions, self.suspects = Atlas(colors), Confusions(colors), Suspects(colors)

    def __call__(self, scored: Scored) -> None:
        """Look at one image; one without labelled pixels, or whose scores overflowed, says nothing."""
        if not torch.isfinite(scored.logits).all() or not (scored.labels != scored.ignore).any():
            return
        seen = look(scored)
        for part in (self.atlas, self.confusions, self.suspects):
            part.add(seen)


def evaluate_with_report(
    bundle: Path | str,
    images: Path | str,
    masks: Path | str | None = None,
    *,
    report: Path,
    unlabelled: Path | str | None = None,
    split: str | None = None,
    labels: Mapping[int, int] | None = None,
    device: str | None = None,
    refine: str = "bundle",
    scores: Sequence[str] = DEFAULT_GROUPS,
    absent: str = "union",
    inside: str | None = None,
    progress: Progress | None = None,
) -> Evaluation:
    """Scores of a bundle on a set, as `evaluate` gives them, and a page about them.

    Args:
        report: the HTML file to write, whole or not at all.
        unlabelled: images without masks, to say what to label next; None: those of the set that have none.
        (the others as for `evaluate`)

    Raises:
        ValueError: as `evaluate`; there are no images in `unlabelled`; or jinja2 or matplotlib is missing.
        OSError: the disk is full.
    """
    path = Path(bundle)
    loaded = load_bundle(path, device or ("cuda" if torch.cuda.is_available() else "cpu"))
    pool = _pool(images, masks, unlabelled)  # first, so that a wrong folder is told before the work
    colors = shown_colors(loaded.card.colors)
    findings = Findings(colors)
    result = evaluate(
        loaded, images, masks, split=split, labels=labels, refine=refine, scores=scores, absent=absent, inside=inside,
        progress=progress, observers=[findings],
    )  # fmt: skip
    proposals, unread = _proposals(loaded, refine, pool, colors, progress)
    run = read_run(path.parent)
    part = split or ("val" if any(pair.split in ("train", "val") for pair in find_layout(images, masks).pairs) else "all")
    what = {"val": "validation images", "train": "training images", "test": "test images"}.get(part, "images")
    name = Path(images).stem or Path(images).absolute().stem
    card = loaded.card
    repeat = ["perpixel", "evaluate", str(path), str(images), *([str(masks)] if masks else [])]
    repeat += [*(["--split", split] if split else []), *(["--refine", refine] if refine != "bundle" else []), "--report", str(report)]
    content = Content(
        title=f"{name}: what {card.model} sees",
        subtitle=f"{card.model}{f' on {card.encoder}' if card.encoder else ''}, scored on {len(result.losses):,} {what} of {name}",
        classes=card.classes,
        colors=colors,
        scores=result.to_json(),
        intervals=result.intervals(),
        facts=facts(card, run, path, f"{images}{f', {masks}' if masks else ''} ({len(result.losses):,} {what})", _refined(loaded, refine)),
        commands=commands(run, path.parent, repeat),
        run=run,
        confusions=findings.confusions.worst(),
        atlas=findings.atlas.entries,
        suspects=findings.suspects.ranked(),
        proposals=proposals,
        looked_at=_looked_at(pool, unread),
    )
    page = render_page(content)
    with replacing(Path(report)) as temporary:
        temporary.write_text(page, "utf-8")
    return result


def _pool(images: Path | str, masks: Path | str | None, unlabelled: Path | str | None) -> list[Picture]:
    if unlabelled is not None:
        return find_pictures([unlabelled])
    return [pair.image for pair in find_layout(images, masks).pairs if pair.mask is None]


def _proposals(
    bundle: Bundle, refine: str, pool: Sequence[Picture], colors: Sequence[tuple[int, int, int]], progress: Progress | None
) -> tuple[list[Proposal], list[str]]:
    segmenter = Segmenter(bundle, refine)

    def read(index: int) -> tuple[np.ndarray, Tensor]:
        image = read_image(pool[index])
        return image, segmenter._logits(image, str(pool[index]))

    return propose([picture.name for picture in pool], read, colors, progress=progress)


def _looked_at(pool: Sequence[Picture], unread: Sequence[Any]) -> str:
    if not pool:
        return ""
    spread = f"{LIMIT} of {len(pool):,} images without masks, evenly spread, were looked at" if len(pool) > LIMIT else ""
    words = spread or f"{len(pool):,} images without masks were looked at"
    return f"{words}; {len(unread)} could not be read." if unread else f"{words}."


def _refined(bundle: Bundle, refine: str) -> str:
    if refine == "bundle" and bundle.card.refiner is not None:
        return f"{bundle.card.refiner.name}, as `perpixel tune` found it"
    return "none" if refine in ("bundle", "none") else refine
