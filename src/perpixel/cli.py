"""The command line: one function per command, no logic. Everything heavy is imported inside, so that `--help` is instant."""

import os
import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from io import TextIOWrapper
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.markup import escape

from perpixel import __version__

if TYPE_CHECKING:
    from perpixel.train import Outcome

FEW_STEPS = 50  # updates; whoever trains for fewer should know what to expect
INTERRUPTED = 130  # exit code after Ctrl-C, as shells give it and typer does: 128 + SIGINT
app = typer.Typer(
    help="Semantic segmentation: every pixel of every image labelled, and how far to trust it.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    add_completion=False,
    rich_markup_mode="rich",
)
Images = Annotated[Path, typer.Argument(help="Folder of images, list file, TIFF stack or Pascal VOC folder.")]
Masks = Annotated[Path | None, typer.Argument(help="Folder of masks or TIFF stack; left out where IMAGES holds both.")]
Bundle = Annotated[Path, typer.Argument(help="A .safetensors file written by `perpixel train`.")]
Classes = Annotated[str | None, typer.Option(help="Class names: a file with one per line, or a,b,c.")]
Labels = Annotated[
    list[str] | None, typer.Option("--label", help="A mask value's meaning: 255=1, 255=ignore, '#ff0000=2'.", show_default=False)
]
Refine = Annotated[str, typer.Option(help="bundle: as `perpixel tune` found best; none; or dense_crf, grid_mrf, gaussian_crf, watershed.")]
Absent = Annotated[str, typer.Option(help="Classes absent from the truth, in means: union, truth or zero (docs/scores.md).")]
Precision = Annotated[str, typer.Option(help="float32, or bf16: faster; up to 5 labels in 1000 differ, SegNet's up to 3 in 100.")]
Views = Annotated[
    str, typer.Option(help="Mean of the scores of several views: flips,rotations,scales or some of them.", show_default=False)
]
Json = Annotated[bool, typer.Option("--json", help="Print JSON for programs instead of tables for people.")]


def _say_version(wanted: bool) -> None:
    if wanted:
        sys.stdout.write(f"perpixel {__version__}\n")
        raise typer.Exit


@app.callback()
def _all_commands(
    version: Annotated[bool, typer.Option("--version", help="Print the version and stop.", is_eager=True, callback=_say_version)] = False,
) -> None:
    pass


@app.command()
def check(images: Images, masks: Masks = None, classes: Classes = None, label: Labels = None, json: Json = False) -> None:
    """Diagnose images and masks before training. Exit code 0 where training can start, 2 where it cannot."""
    from perpixel.check import Check, render
    from perpixel.check import check as run

    try:
        with _live(json, "reading") as progress:
            report = run(images, masks, classes=classes, labels=_labels(label), progress=progress)
    except (ValueError, OSError) as error:
        if json:  # a program reads the same keys whatever is wrong; people read what `main` prints
            _print_json(Check("none", problems=[str(error)]).to_json())
        raise
    if json:
        _print_json(report.to_json())
    else:
        render(report, Console())
    if not report.ready:
        raise typer.Exit(2)


@app.command()
def train(
    images: Images,
    masks: Masks = None,
    out: Annotated[Path, typer.Option("--out", "-o", help="Folder of the run.", show_default=True)] = Path("run"),
    recipe: Annotated[
        str | None, typer.Option(help="A shipped recipe (a wrong name lists them), or a YAML file of any part of one.")
    ] = None,
    fast: Annotated[bool, typer.Option("--fast", help="The recipe's network with today's training in place of its own.")] = False,
    minutes: Annotated[float | None, typer.Option(min=0.01, help="Wall-clock budget; the schedule fits itself to it.")] = None,
    steps: Annotated[int | None, typer.Option(min=1, help="Number of updates.")] = None,
    set_: Annotated[list[str] | None, typer.Option("--set", help="key=value over the plan: train.lr=0.001", show_default=False)] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on with a run that was killed.")] = False,
    classes: Classes = None,
    label: Labels = None,
) -> None:
    """Check the data, plan the run and train. Writes OUT/best.safetensors and all that belongs to it."""
    from perpixel.data.layouts import refuse_missing
    from perpixel.recipe import stated_and_asked

    stated_and_asked(recipe, fast, set_ or (), steps, minutes)  # a slip of the hand is told before PyTorch is loaded
    refuse_missing(images, masks)
    from perpixel.train import train as run

    outcome = run(
        images,
        masks,
        out=out,
        recipe=recipe,
        fast=fast,
        settings=set_ or (),
        steps=steps,
        minutes=minutes,
        resume=resume,
        classes=classes,
        labels=_labels(label),
        console=Console(),
    )
    if os.environ.get("RANK", "0") == "0":  # the first process of `torchrun` speaks for all
        _summarise(outcome, Console())


@app.command()
def evaluate(
    bundle: Bundle,
    images: Images,
    masks: Masks = None,
    split: Annotated[str | None, typer.Option(help="Score only this part: train, val or test. Else val where there are parts.")] = None,
    label: Labels = None,
    refine: Refine = "bundle",
    scores: Annotated[
        str, typer.Option(help="Beside the region scores: cost, boundary, surface, calibration, neurite; or all, or region for none.")
    ] = "cost,boundary,calibration",
    absent: Absent = "union",
    inside: Annotated[
        str | None, typer.Option(help="Neurite scores: the class inside of cells. Default: the last.", show_default=False)
    ] = None,
    precision: Precision = "float32",
    tta: Views = "",
    json: Json = False,
    json_out: Annotated[
        Path | None, typer.Option("--json-out", help="Also write it all here, with the counts that `perpixel compare` reads.")
    ] = None,
    report: Annotated[Path | None, typer.Option(help="Also write a report here: one HTML file to look at and pass on.")] = None,
    unlabelled: Annotated[
        Path | None, typer.Option(help="In the report: which of these images to label next. Default: those of IMAGES without a mask.")
    ] = None,
) -> None:
    """Score a bundle on images with masks: per set and per image, with 95 % intervals, and the loss of each image."""
    _refuse_paths("evaluate", bundle, images, masks)
    from perpixel.evaluate import render
    from perpixel.report.make import evaluate_and_report
    from perpixel.scores import parse_groups

    with _live(json, "scoring") as progress:
        result = evaluate_and_report(
            bundle,
            images,
            masks,
            report=report,
            unlabelled=unlabelled,
            split=split,
            labels=_labels(label),
            refine=refine,
            precision=precision,
            augment=tta,
            scores=parse_groups(scores),
            absent=absent,
            inside=inside,
            progress=progress,
        )
    if json_out is not None:
        result.to_file(json_out)
    if json:
        _print_json(result.to_json())
    else:
        render(result, Console())
        if report is not None:
            Console().print(f"report: [bold]{escape(str(report))}[/]", soft_wrap=True)
    if result.damaged or result.holes:
        raise typer.Exit(2)


@app.command()
def predict(
    bundle: Bundle,
    inputs: Annotated[
        list[str], typer.Argument(metavar="INPUT...", help="Image files, folders, globs, TIFF stacks, OME-TIFF, .vrt, zarr.")
    ],
    out: Annotated[Path, typer.Option("--out", "-o", help="Folder for the label images.")] = Path("labels"),
    overlay: Annotated[bool, typer.Option("--overlay", help="Also OUT/overlays: the labels' colours over the images.")] = False,
    probabilities: Annotated[
        bool, typer.Option("--probabilities", help="Also OUT/probabilities: (classes, H, W) float16; .npy, or TIFF or zarr as the labels.")
    ] = False,
    samples: Annotated[
        int | None,
        typer.Option(min=1, help="Mean of so many predictions with dropout on; also OUT/uncertainty: (H, W) float16.", show_default=False),
    ] = None,
    refine: Refine = "bundle",
    entropy: Annotated[bool, typer.Option("--entropy", help="Also OUT/entropy: of the probabilities, in nats; float16, (H, W).")] = False,
    format_: Annotated[
        str, typer.Option("--format", help="png, tif, zarr; auto: zarr for zarr, tif for very large and georeferenced.")
    ] = "auto",
    strict: Annotated[bool, typer.Option("--strict", help="Stop at damage, instead of leaving it out.")] = False,
    max_ram: Annotated[str | None, typer.Option(help="Memory the process may take: 2G, 800M.", show_default=False)] = None,
    max_vram: Annotated[str | None, typer.Option(help="Memory of the GPU it may take.", show_default=False)] = None,
    precision: Precision = "float32",
    tta: Views = "",
    shard: Annotated[str | None, typer.Option(help="i/n: the i-th of n shares of the work, counted from 1.", show_default=False)] = None,
) -> None:
    """Label every pixel of the images; writes OUT/<image name>.png with class indices, at exactly the images' size.

    Very large and georeferenced images become tiled TIFF. An interrupted prediction goes on where it was with the same command.
    """
    _refuse_paths("predict", bundle, *inputs)
    from perpixel.budget import Limits, keep_freed_memory, parse_bytes, shard_of
    from perpixel.predict import Task, load, predict_files

    console = Console()
    ram, vram = (None if text is None else parse_bytes(text) for text in (max_ram, max_vram))
    if ram is None:
        keep_freed_memory()
    task = Task(overlay, probabilities, entropy, samples, format_, strict, Limits(ram, vram), shard_of(shard))
    with _live(False, "predicting") as progress:
        segmenter = load(bundle, refine=refine, precision=precision, augment=tta)
        result = predict_files(segmenter, inputs, out, task, progress, lambda plan: console.print(escape(plan), soft_wrap=True))
    before = f", {result.before} of them there already" if result.before else ""
    console.print(f"{len(result.written)} label image{'s' * (len(result.written) != 1)} in [bold]{escape(str(out))}[/]{before}")
    if result.shared:
        console.print(f"{result.shared} more wait for the other shares of the work")
    for why in result.damaged.values():
        console.print(f"[yellow]left out[/] {escape(why)}", soft_wrap=True)
    for hole in (hole for holes in result.holes.values() for hole in holes):
        console.print(f"[yellow]labelled as not known[/] {escape(hole)}", soft_wrap=True)
    if result.damaged or result.holes:
        raise typer.Exit(2)


@app.command()
def tune(
    bundle: Bundle,
    images: Images,
    masks: Masks = None,
    minutes: Annotated[float, typer.Option(min=0.01, help="Wall-clock budget.")] = 10.0,
    refiner: Annotated[list[str] | None, typer.Option(help="Search only this one; may be repeated.", show_default=False)] = None,
    between: Annotated[
        str | None, typer.Option(help="Watershed: the class between objects. Default: the bundle's, or the first.", show_default=False)
    ] = None,
    split: Annotated[str, typer.Option(help="The part to search on: val, or another.")] = "val",
    label: Labels = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only report; leave the bundle as it is.")] = False,
    json: Json = False,
) -> None:
    """Search a refiner (CRF, MRF; or watershed) for a bundle; it is written into it only where its gain is shown to be real."""
    _refuse_paths("tune", bundle, images, masks)
    from perpixel.tune import render
    from perpixel.tune import tune as run

    with _live(json, "tuning") as progress:
        result = run(
            bundle,
            images,
            masks,
            refiners=refiner,
            between=between,
            minutes=minutes,
            split=split,
            labels=_labels(label),
            write=not dry_run,
            progress=progress,
        )
    if json:
        _print_json(result.to_json())
    else:
        render(result, Console())


@app.command()
def compare(
    runs: Annotated[list[Path], typer.Argument(help="Folders of runs, or files written by `perpixel evaluate --json-out`.")],
    absent: Absent = "truth",
    json: Json = False,
    html: Annotated[Path | None, typer.Option(help="Also write it here as a page.")] = None,
) -> None:
    """Compare runs with the first, image by image: differences with 95 % intervals, and whether they are real."""
    from perpixel.compare import compare as run
    from perpixel.compare import render
    from perpixel.compare_page import write_page

    result = run(runs, absent)
    if html is not None:
        write_page(result, html)
    if json:
        _print_json([pairing.to_json() for pairing in result])
    else:
        render(result, Console())


@app.command()
def calibrate(
    bundle: Bundle,
    images: Images,
    masks: Masks = None,
    split: Annotated[str, typer.Option(help="The part to fit on: val, or another.")] = "val",
    label: Labels = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only report; leave the bundle as it is.")] = False,
    json: Json = False,
) -> None:
    """Fit the temperature that makes a bundle's probabilities mean what they say; labels stay as they are."""
    _refuse_paths("calibrate", bundle, images, masks)
    from perpixel.calibrate import calibrate as run
    from perpixel.calibrate import render

    with _live(json, "calibrating") as progress:
        result = run(bundle, images, masks, split=split, labels=_labels(label), write=not dry_run, progress=progress)
    if json:
        _print_json(result.to_json())
    else:
        render(result, Console())


@app.command()
def refine(
    image: Annotated[Path, typer.Argument(help="The image that the scores belong to, or a folder of images.")],
    scores: Annotated[
        Path,
        typer.Argument(help="Probabilities or logits: .npy, .npz or multi-band TIFF, (K, H, W) or (H, W, K); or a folder, by names."),
    ],
    out: Annotated[Path, typer.Option("--out", "-o", help="Folder for the label image.")] = Path("refined"),
    refiner: Annotated[str, typer.Option(help="dense_crf, grid_mrf, gaussian_crf or watershed.")] = "dense_crf",
    set_: Annotated[list[str] | None, typer.Option("--set", help="An option of the refiner: iterations=5", show_default=False)] = None,
    kind: Annotated[str, typer.Option(help="What the scores are: probabilities, logits, or auto.")] = "auto",
    probabilities: Annotated[bool, typer.Option("--probabilities", help="Also OUT/probabilities: float16 .npy, (K, H, W).")] = False,
) -> None:
    """Refine scores that come from elsewhere: writes OUT/<image name>.png with class indices. Options: docs/api.md."""
    from perpixel.recipe import parse_settings
    from perpixel.refine import refine_files

    written = refine_files(image, scores, out, refiner, parse_settings(set_ or ()), kind, probabilities)
    Console().print(f"{len(written)} label image{'s' * (len(written) != 1)} in [bold]{escape(str(out))}[/]")


@app.command()
def certify(
    bundle: Bundle,
    image: Annotated[Path | None, typer.Argument(help="An image file; left out: noise of an odd size.")] = None,
    tile: Annotated[int | None, typer.Option(min=1, help="Side of the parts in pixels.", show_default=False)] = None,
    json: Json = False,
) -> None:
    """Compare a prediction by parts with that of the whole image. Exit code 0 where they are the same, 2 where they can't be or aren't."""
    _refuse_paths("certify", bundle, image)
    from perpixel.certify import certify as run
    from perpixel.certify import render

    certificate = run(bundle, image, tile)
    if json:
        _print_json(certificate.to_json())
    else:
        render(certificate, Console())
    if not certificate.exact:
        raise typer.Exit(2)


@app.command()
def models(json: Json = False) -> None:
    """List what can be built: paper, parameters, output stride, receptive field, margin."""
    from perpixel.models.table import render, to_json

    if json:
        _print_json(to_json())
    else:
        render(Console() if sys.stdout.isatty() else Console(width=160))


@app.command()
def demo(
    out: Annotated[Path, typer.Option("--out", "-o", help="Folder for the sample set and the run.")] = Path("perpixel-demo"),
    minutes: Annotated[float, typer.Option(min=0.05, help="Wall-clock budget for training.")] = 1.75,
) -> None:
    """See it work: generate the sample set, check it, train, evaluate and predict, in under three minutes on two cores."""
    from perpixel.demo import demo as run

    run(out, minutes, Console())


def main() -> None:
    """The `perpixel` command. Bad input ends with one message and exit code 2, no traceback."""
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # threads that spin while they wait cost a third of the speed on a busy machine
    if isinstance(sys.stdout, TextIOWrapper):  # a file's name may hold bytes that are no text: as stderr shows them
        sys.stdout.reconfigure(errors="backslashreplace")
    console = Console(stderr=True, soft_wrap=True)
    warnings.showwarning = lambda message, *_: console.print(f"[yellow]warning:[/] {escape(str(message))}")
    try:
        app()
    except (ValueError, OSError) as error:
        console.print(f"[bold red]error:[/] {escape(str(error))}")
        sys.exit(2)
    except SystemExit as end:
        if end.code == INTERRUPTED:
            console.print("interrupted; `train` goes on with --resume, `predict` with the same command")
        raise


def _labels(options: list[str] | None) -> dict[int, int]:
    from perpixel.data.masks import parse_label

    found: dict[int, int] = {}
    for option in options or []:
        value, label = parse_label(option)
        if found.setdefault(value, label) != label:
            raise ValueError(f"--label {option}: the same mask value has another meaning already; give one of them")
    return found


def _refuse_paths(command: str, bundle: Path, *others: Path | str | None) -> None:
    from perpixel.paths import refuse_paths

    refuse_paths(command, bundle, *others)


def _print_json(content: object) -> None:
    import json

    sys.stdout.write(json.dumps(content, indent=1, allow_nan=False) + "\n")


def _summarise(outcome: "Outcome", console: Console) -> None:
    scores, out = outcome.scores, escape(str(outcome.out))
    console.print(
        f"best at step {outcome.best_step} of {outcome.step}: mIoU [bold]{scores['miou']:.3f}[/], "
        f"pixel accuracy [bold]{scores['pixel_accuracy']:.3f}[/] on {scores['images']} validation images",
        soft_wrap=True,
    )
    if outcome.step < FEW_STEPS:
        few = f"{outcome.step} steps teach a network next to nothing; give more --minutes or --steps"
        console.print(f"[yellow]warning:[/] {few}", soft_wrap=True)
    if outcome.recipe.train.report:
        console.print(f"[bold]{out}/report.html[/]  scores, worst images, suspected label errors: open it in a browser", soft_wrap=True)
    following = f"perpixel predict {out}/best.safetensors YOUR-IMAGES -o labels --overlay"
    console.print(f"[bold]{out}/best.safetensors[/]  next: {following}", soft_wrap=True)


@contextmanager
def _live(quiet: bool, what: str) -> Iterator[Callable[[float, int, str], None]]:
    """A progress bar on standard error; nothing where a program reads, or where no terminal shows it."""
    from rich.progress import Progress

    with Progress(console=Console(stderr=True, quiet=quiet or not sys.stderr.isatty()), transient=True) as bar:
        task = bar.add_task(what)
        yield lambda done, of, name: bar.update(task, completed=done, total=of, description=f"{what} {escape(name)}")
