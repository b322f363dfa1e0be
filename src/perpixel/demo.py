"""The whole job on the built-in sample set: generate, check, train, evaluate, predict."""

import time
from pathlib import Path

from rich.console import Console
from rich.markup import escape

from perpixel.check import check
from perpixel.check import render as render_check
from perpixel.data.samples import write_samples
from perpixel.evaluate import Evaluation, evaluate
from perpixel.evaluate import render as render_scores
from perpixel.predict import Task, load, predict_files
from perpixel.train import train


def demo(out: Path, minutes: float, console: Console) -> Evaluation:
    """Writes the sample set, a run and predictions below `out`; returns the scores on the validation part.

    Args:
        out: a new folder, or one of an earlier demo, whose run is then replaced.
        minutes: wall-clock budget of the training.
    """
    started = time.monotonic()
    data, run, labels = out / "samples", out / "run", out / "labels"
    console.rule("1 of 5  sample set")
    console.print("sky, water and reeds; a bird and a fish of the same colour differ only by where they are")
    write_samples(data, train=96, val=24, height=96, width=128)  # small scenes: many updates in little time
    console.rule("2 of 5  perpixel check")
    render_check(check(data / "images", data / "masks"), console)
    console.rule("3 of 5  perpixel train")
    for old in ("resume.safetensors", "metrics.csv"):
        (run / old).unlink(missing_ok=True)
    train(data / "images", data / "masks", out=run, minutes=minutes, settings=["model.encoder=plain"], console=console)
    console.rule("4 of 5  perpixel evaluate")
    result = evaluate(run / "best.safetensors", data / "images", data / "masks", split="val")
    render_scores(result, console)
    console.rule("5 of 5  perpixel predict")
    predicted = predict_files(load(run / "best.safetensors"), [data / "images" / "val"], labels, Task(overlay=True))
    console.print(f"{len(predicted.written)} label images, in {time.monotonic() - started:.0f} seconds in all. Where it all lies:")
    for what, where in (
        ("images and masks", data),
        ("the model", run / "best.safetensors"),
        ("the plan", run / "recipe.yaml"),
        ("learning curves", run / "metrics.csv"),
        ("image | truth | prediction", run / "validation"),
        ("the report, for a browser", run / "report.html"),
        ("label images", labels),
        ("labels over images", labels / "overlays"),
    ):
        console.print(f"  {what:28}{escape(str(where))}")
    return result
