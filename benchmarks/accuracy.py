"""Runs the README's commands on real sets and writes what they reached to benchmarks/results/accuracy-SET[-RECIPE].json.

python benchmarks/accuracy.py SET --data FOLDER [--recipe NAME] [--set KEY=VALUE] [--weights FILE] [--minutes M]

FOLDER holds camvid, msrc21 and isbi2012 in the layouts that `perpixel check` prints for them; `sample` needs no
folder. With --recipe, no scores are asked for.
"""

import argparse
import json
import platform
import subprocess
import sys
import tempfile
import time
from importlib.metadata import version
from pathlib import Path

import torch

from perpixel.plan import this_machine

RESULTS = Path(__file__).parent / "results"

# Set -> (images and masks below --data, minutes, least scores asked for).
SETS = {
    "sample": ([], 1.75, {"miou": 0.80, "bird": 0.60, "fish": 0.60}),
    # Value 0 of these masks is membrane.
    "isbi2012": (["isbi2012/train-volume.tif", "isbi2012/train-labels.tif"], 10, {"pixel_accuracy": 0.91, "value_0": 0.65}),
    "camvid": (["camvid"], 30, {"miou": 0.60, "pixel_accuracy": 0.89}),
    "msrc21": (["msrc21"], 30, {"miou": 0.53, "pixel_accuracy": 0.81}),
}


def command(name: str, data: Path, recipe: str | None, settings: list[str], weights: Path | None, minutes: float, out: Path) -> list[str]:
    """The command a person would type."""
    if name == "sample":
        return ["perpixel", "demo", "-o", str(out), "--minutes", str(minutes)]
    words = ["perpixel", "train", *(str(data / path) for path in SETS[name][0]), "-o", str(out), "--minutes", str(minutes)]
    words += ["--recipe", recipe] if recipe else []
    for setting in settings:
        words += ["--set", setting]
    return words + (["--set", f"model.encoder_weights={weights}"] if weights and name != "isbi2012" else [])


def main() -> None:
    """Run one set and write its file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("set", choices=SETS)
    parser.add_argument("--data", type=Path, default=Path("../shared/data"))
    parser.add_argument("--recipe", help="a shipped one, such as any name of `perpixel models`; the plan without it")
    parser.add_argument("--set", dest="settings", action="append", default=[], help="as for `perpixel train`")
    parser.add_argument("--weights", type=Path, help="a file of mobilenetv2_100 for camvid and msrc21")
    parser.add_argument("--minutes", type=float)
    parser.add_argument("--out", type=Path, help="folder of the run; a temporary one without it")
    given = parser.parse_args()
    minutes = given.minutes or SETS[given.set][1]
    out = given.out or Path(tempfile.mkdtemp()) / given.set
    words = command(given.set, given.data, given.recipe, given.settings, given.weights, minutes, out)
    asked: dict[str, float] = {} if given.recipe else SETS[given.set][2]
    start = time.monotonic()
    subprocess.run([sys.executable, "-m", *words], check=True)
    seconds = time.monotonic() - start
    scores = json.loads((out / ("run" if given.set == "sample" else "") / "evaluation.json").read_text())
    classes = {row["name"]: row["iou"] for row in scores["classes"]}
    reached = {key: classes[key] if key in classes else scores[key] for key in asked or ("miou", "pixel_accuracy")}
    result = {
        "set": given.set,
        "command": " ".join(words).replace(str(out), "RUN"),
        "minutes_asked": minutes,
        "seconds_whole_command": round(seconds, 1),
        "machine": this_machine().words,
        "versions": {"python": platform.python_version(), "torch": torch.__version__, "perpixel": version("perpixel")},
        "images_scored": scores["images"],
        "asked": asked,
        "reached": reached,
        "scores": {key: scores[key] for key in ("miou", "pixel_accuracy", "mean_accuracy", "fwiou", "mean_dice", "cost")},
        "iou": classes,
    }
    RESULTS.mkdir(exist_ok=True)
    name = "-".join(part for part in (given.set, given.recipe) if part)
    (RESULTS / f"accuracy-{name}.json").write_text(json.dumps(result, indent=1) + "\n")
    sys.stdout.write(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
