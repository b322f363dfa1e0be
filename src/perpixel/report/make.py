"""Score a bundle on a set and write the report of it."""

from collections.abc import Callable, Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path

import torch

from perpixel.bundle import Bundle, load_bundle
from perpixel.data.images import Picture, find_pictures
from perpixel.data.layouts import find_layout
from perpixel.data.writing import replacing
from perpixel.evaluate import Evaluation, evaluate
from perpixel.predict import Segmenter
from perpixel.report.facts import commands, facts, read_run
from perpixel.report.findings import Findings
from perpixel.report.glance import glance
from perpixel.report.label_next import LIMIT, propose
from perpixel.report.page import Content, render_page
from perpixel.scores import DEFAULT_GROUPS

Progress = Callable[[int, int, str], None]  # (done, of, what)
PARTS = {"train": "training images", "val": "validation images", "test": "test images"}


def evaluate_and_report(
    bundle: Path | str,
    images: Path | str,
    masks: Path | str | None = None,
    *,
    report: Path | None = None,
    unlabelled: Path | str | None = None,
    split: str | None = None,
    labels: Mapping[int, int] | None = None,
    device: str | None = None,
    refine: str = "bundle",
    precision: str = "float32",
    augment: str = "",
    scores: Sequence[str] = DEFAULT_GROUPS,
    absent: str = "union",
    inside: str | None = None,
    progress: Progress | None = None,
) -> Evaluation:
    """Scores of a bundle on a set, as `evaluate` gives them, and a page about them.

    Args:
        report: the HTML file to write, whole or not at all; None: none.
        unlabelled: images without masks, to say what to label next; None: those of the set that have none.
        (the others as for `evaluate`)

    Raises:
        ValueError: as `evaluate`; no images in `unlabelled`, or no report for them; `report` is a folder; or a library is missing.
        OSError: the disk is full.
    """
    path, findings = Path(bundle), None
    loaded = load_bundle(path, device or ("cuda" if torch.cuda.is_available() else "cpu"))
    if report is None and unlabelled is not None:
        raise ValueError("--unlabelled says what to label next, in a report; add --report OUT.html")
    if report is not None:  # what can fail at once fails before the work
        if Path(report).is_dir():
            raise ValueError(f"{report} is a folder; give the name of a file, such as {Path(report) / 'report.html'}")
        if missing := [name for name in ("jinja2", "matplotlib") if find_spec(name) is None]:
            raise ValueError(f"a report needs {' and '.join(missing)}; install it: python -m pip install {' '.join(missing)}")
        pool, findings = unlabelled_images(images, masks, unlabelled), Findings(loaded.card.colors)
    result = evaluate(
        loaded, images, masks, split=split, labels=labels, refine=refine, precision=precision, augment=augment, scores=scores,
        absent=absent, inside=inside, progress=progress, observers=[] if findings is None else [findings],
    )  # fmt: skip
    if report is not None and findings is not None:
        split = split or _usual_part(images, masks)
        asked = [f"--label={value}={target}" for value, target in (labels or {}).items()]
        asked += [f"--scores={','.join(scores) or 'region'}"] if tuple(scores) != DEFAULT_GROUPS else []
        asked += [f"--absent={absent}"] if absent != "union" else []
        asked += [f"--inside={inside}"] if inside is not None else []
        asked += [f"--unlabelled={unlabelled}"] if unlabelled is not None else []
        write_report(
            Path(report), path, loaded, result, findings, images, masks, pool, split=split, refine=refine, asked=asked, progress=progress
        )  # fmt: skip
    return result


def _usual_part(images: Path | str, masks: Path | str | None) -> str | None:
    """The part that `evaluate` scores where none is asked for: "val" of a set that has parts, else None, everything."""
    parts = {pair.split for pair in find_layout(images, masks).pairs if pair.mask is not None}
    return "val" if parts & {"train", "val"} else None


def unlabelled_images(images: Path | str, masks: Path | str | None, unlabelled: Path | str | None = None) -> list[Picture]:
    """Images without masks: those of a folder of their own, else those of the set; ValueError where the folder has none."""
    if unlabelled is not None:
        return find_pictures([unlabelled])
    return [pair.image for pair in find_layout(images, masks).pairs if pair.mask is None]


def write_report(
    report: Path,
    path: Path,
    bundle: Bundle,
    result: Evaluation,
    findings: Findings,
    images: Path | str,
    masks: Path | str | None,
    unlabelled: Sequence[Picture],
    *,
    split: str | None,
    refine: str = "bundle",
    asked: Sequence[str] = (),
    limit: int = LIMIT,
    progress: Progress | None = None,
) -> None:
    """Writes the page, whole or not at all.

    Args:
        report: where to.
        path, bundle: what was scored, from where; recipe.yaml and metrics.csv beside it are shown.
        result, findings: what `evaluate` gave on `images` and `masks`, and what its observer found.
        unlabelled: images without masks, of which `limit` at most are looked at.
        split, refine: what `evaluate` was asked for; None: the whole set.
        asked: other options of the command that are not the usual ones.
    """
    card, run, count = bundle.card, read_run(path.parent), len(result.losses)
    name = Path(images).absolute().stem
    scored = f"{count:,} {PARTS.get(split or '', 'images')}"
    segmenter = Segmenter(bundle, refine, result.precision, result.augment)

    proposals, unread = propose(
        [picture.name for picture in unlabelled],
        lambda index: glance(segmenter, unlabelled[index]),
        findings.colors,
        limit=limit,
        progress=progress,
    )
    command = ["perpixel", "evaluate", str(path), str(images), *([str(masks)] if masks else []), *(["--split", split] if split else [])]
    command += ["--refine", refine] if refine != "bundle" else []
    command += ["--precision", result.precision] if result.precision != "float32" else []
    command += ["--tta", result.augment] if result.augment else []
    command += [*asked, "--report", str(report)]
    content = Content(
        title=f"{name}: what {card.model} sees",
        subtitle=f"{card.model}{f' on {card.encoder}' if card.encoder else ''}, scored on {scored} of {name}",
        classes=card.classes,
        colors=findings.colors,
        scores=result.to_json(),
        intervals=result.intervals(),
        facts=facts(
            card, run, path, f"{', '.join(str(part) for part in (images, masks) if part)} ({scored})", bundle.refiner_words(refine)
        ),
        commands=commands(run, path.parent, command),
        run=run,
        confusions=findings.confusions.worst(),
        atlas=findings.atlas.entries,
        suspects=findings.suspects.ranked(),
        proposals=proposals,
        looked_at=_looked_at(len(unlabelled), limit, len(unread)),
    )
    page = render_page(content)
    with replacing(report) as temporary:
        temporary.write_bytes(page.encode("utf-8", "replace"))  # a file's name may hold bytes that are no text


def _looked_at(count: int, limit: int, unread: int) -> str:
    if not count:
        return ""
    spread = f"{limit:,} of {count:,} images without masks, evenly spread, were looked at"
    words = spread if count > limit else f"{count:,} images without masks were looked at"
    return f"{words}; {unread} could not be read." if unread else f"{words}."
