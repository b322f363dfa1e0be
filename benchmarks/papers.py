"""What the papers' comparisons give on small real sets; writes benchmarks/results/papers-GROUP.json.

python benchmarks/papers.py GROUP --data FOLDER --weights FILE [--steps N] [--runs FOLDER]

Each group trains nets that differ in one thing, by the same plan, seed and number of steps, so that a busy machine changes nothing but the
time. Scores are on the validation part. Each claim of the paper is a pair of rows: the gain in mIoU of the second over the first, with its
95 % interval over the same images (`perpixel compare`), says whether the claim shows with that budget. Rows that are there already, with
as many steps, are kept, so that a run that was stopped goes on. FOLDER holds the sets in the layouts that `perpixel check` prints, FILE is
that of mobilenetv2_100.
"""

import argparse
import json
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from record import RESULTS, write

from perpixel.compare import Pairing, compare


@dataclass(frozen=True)
class Claim:
    """The paper says that `better` has a higher mIoU than `worse`; `paper` holds its figures and where they stand."""

    worse: str
    better: str
    paper: str


@dataclass(frozen=True)
class Group:
    """Nets on a set: row -> settings of `perpixel train`."""

    data: str
    rows: dict[str, list[str]]
    claims: list[Claim]


FCN = {f"FCN-{stride}s": ["model.name=fcn", f"model.options={{head_stride: {stride}}}"] for stride in (32, 16, 8)}
FCN_CLAIMS = [
    Claim("FCN-32s", "FCN-16s", "59.4 to 62.4 on a subset of Pascal VOC 2011 val (arXiv:1411.4038, table 2)"),
    Claim("FCN-16s", "FCN-8s", "62.4 to 62.7 (table 2)"),
]
ATROUS = {
    "output stride 32": ["model.name=deeplab_v3", "model.options={output_stride: 32}"],
    "output stride 16": ["model.name=deeplab_v3", "model.options={output_stride: 16}"],
    "output stride 8": ["model.name=deeplab_v3", "model.options={output_stride: 8}"],
    "output stride 16, no image pooling": ["model.name=deeplab_v3", "model.options={output_stride: 16, image_pooling: false}"],
}
GROUPS = {
    "fcn-msrc21": Group("msrc21", FCN, FCN_CLAIMS),
    "fcn-camvid": Group("camvid", FCN, FCN_CLAIMS),
    "atrous-msrc21": Group(
        "msrc21",
        ATROUS,
        [
            Claim("output stride 32", "output stride 16", "70.06 to 73.88 on Pascal VOC 2012 val (arXiv:1706.05587, table 1)"),
            Claim("output stride 16", "output stride 8", "73.88 to 75.18 (table 1); 77.21 to 78.51 (table 6)"),
            Claim("output stride 16, no image pooling", "output stride 16", "76.58 to 77.21 (table 5)"),
        ],
    ),
}


def trained(group: Group, settings: list[str], given: argparse.Namespace, out: Path) -> dict[str, Any]:
    """One net, by the command a person would type."""
    words = [sys.executable, "-m", "perpixel", "train", str(given.data / group.data), "-o", str(out), "--steps", str(given.steps)]
    for setting in [*settings, "model.encoder=mobilenetv2_100", f"model.encoder_weights={given.weights}", "train.report=false"]:
        words += ["--set", setting]
    start = time.monotonic()
    subprocess.run(words, check=True)
    scores = json.loads((out / "evaluation.json").read_text())
    kept = {key: scores[key] for key in ("pixel_accuracy", "mean_accuracy", "miou", "fwiou")}
    boundary = scores.get("boundary", {})
    return {**kept, "bf": boundary.get("bf"), "trimap": boundary.get("trimap"), "minutes": round((time.monotonic() - start) / 60, 1)}


def verdict(found: Pairing) -> dict[str, Any]:
    """The gain in mIoU with its interval, and what it says of the claim."""
    gain = found.differences["miou"]
    words = "shown" if gain.above_zero else "contradicted" if gain.below_zero else "same sign" if gain.value > 0 else "other sign"
    return {"gain": round(float(gain.value), 4), "low": round(float(gain.low), 4), "high": round(float(gain.high), 4), "verdict": words}


def main() -> None:
    """Train what is missing, compare, write the file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("group", choices=GROUPS)
    parser.add_argument("--data", type=Path, default=Path("../shared/data"))
    parser.add_argument("--weights", type=Path, default=Path("../shared/weights/mobilenetv2_100.safetensors"))
    parser.add_argument("--steps", type=int, default=600)
    parser.add_argument("--runs", type=Path, help="where the runs stay; a temporary folder without it")
    given = parser.parse_args()
    group, runs = GROUPS[given.group], given.runs or Path(tempfile.mkdtemp())
    rows: dict[str, dict[str, Any]] = {}
    folders = {row: runs / f"{given.group} {row} {given.steps}".replace(" ", "-").replace(",", "") for row in group.rows}
    file = RESULTS / f"papers-{given.group}.json"
    before = json.loads(file.read_text()) if file.exists() else {}
    for row, settings in group.rows.items():
        out = folders[row]
        if before.get("steps") == given.steps and row in before["rows"] and (out / "evaluation.json").exists():
            rows[row] = before["rows"][row]
            continue
        rows[row] = {"settings": settings, **trained(group, settings, given, out)}
        claims = [
            {"worse": c.worse, "better": c.better, "paper": c.paper, **verdict(compare([folders[c.worse], folders[c.better]])[0])}
            for c in group.claims
            if c.worse in rows and c.better in rows
        ]
        content = {"set": group.data, "encoder": "mobilenetv2_100, ImageNet weights", "steps": given.steps, "rows": rows, "claims": claims}
        write(f"papers-{given.group}", content, packages=("torch", "timm"))


if __name__ == "__main__":
    main()
