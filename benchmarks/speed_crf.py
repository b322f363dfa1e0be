"""Our dense CRF on the processor against pydensecrf; writes benchmarks/results/speed-crf.json.

PYTHONPATH=FOLDER_WITH_PYDENSECRF python benchmarks/speed_crf.py [--threads 1 2] [--repeats 9] [--size 375 500] [--labels 21 2] [--data DIR]

pydensecrf is built from its repository (`pip install cython==0.29.36 git+https://github.com/lucasb-eyer/pydensecrf`); where it cannot be
imported only our own times are taken, and the file says so. Both sides get the same energies and image, in turns, and start from nothing:
lattices are built within the time. The figure is the median, over the pairs of calls, of its time divided by ours. Marginals must be within
1e-4, and labels the same but for one pixel in 10,000, or the run fails: of labels whose marginals differ by less than the two sides do,
either may come first.
"""

import argparse
import json
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from scipy.ndimage import gaussian_filter

from perpixel.plan import this_machine
from perpixel.refinement.mean_field_cpu import GaussianKernel, mean_field
from perpixel.refinement.permutohedral_cpu import lattices

try:
    from pydensecrf.densecrf import DenseCRF2D
except ImportError:
    DenseCRF2D = None

HERE = Path(__file__).parent
# Photographs below --data: folder, names, how many. The examples of Kraehenbuehl & Koltun's code, and MSRC-21.
PHOTOGRAPHS = (("crf_examples", "im*.png", 3), ("msrc21/JPEGImages", "*.jpg", 5))
# Share of pixels whose two likeliest labels may be tied.
TIES = 1e-4
# The settings of pydensecrf's own example: standard deviations in pixels and grey values, strengths, iterations.
PLACE, COLOUR, SMOOTH, APPEARANCE_WEIGHT, SMOOTH_WEIGHT, ITERATIONS = 80.0, 13.0, 3.0, 10.0, 3.0, 10
# Seconds until the first answer of a new process, with a small image: imports, and compiled code from the cache.
START = """
import time; start = time.perf_counter()
import numpy as np
from perpixel.refinement.mean_field_cpu import GaussianKernel, mean_field
kernel = GaussianKernel(np.zeros((100, 5), np.float32), np.float32(-1))
mean_field(np.zeros((LABELS, 100), np.float32), [kernel], 2)
print(time.perf_counter() - start)
"""
# Peak memory of a call above what the process had before it, in MB; VmHWM is the peak of resident memory.
MEMORY = """
import sys; sys.path.insert(0, HERE)
import numpy as np
from speed_crf import ours, peer, scene, energies
def peak():
    return int(next(line for line in open("/proc/self/status") if line.startswith("VmHWM")).split()[1]) / 1024
call = ours if SIDE == "ours" else peer
call(scene("smooth", (48, 64)), energies(LABELS, (48, 64), 0), 2)
image, unary = scene("smooth", SIZE), energies(LABELS, SIZE, 0)
open("/proc/self/clear_refs", "w").write("5")  # the peak counts from here
before = peak()
call(image, unary, 2)
print(peak() - before)
"""


def scene(texture: str, size: tuple[int, int]) -> np.ndarray:
    """(H, W, 3) uint8: smooth regions with sharp borders, under as much grain as the name says."""
    height, width = size
    rng = np.random.default_rng(0)
    if texture == "random":
        return rng.integers(0, 256, (height, width, 3), dtype=np.uint8)
    image = np.stack([gaussian_filter(rng.normal(size=size), 12) for _ in range(3)], -1)
    image = (image - image.min()) / np.ptp(image) * 255
    image = np.where((gaussian_filter(rng.normal(size=size), 20) > 0)[..., None], 255 - image, image)
    grain = {"smooth": 0, "fine": 4, "grainy": 12, "rough": 30}[texture]
    return (image + rng.normal(size=image.shape) * grain).clip(0, 255).astype(np.uint8)


def energies(labels: int, size: tuple[int, int], seed: int) -> np.ndarray:
    """(K, P) float32: -log of the softmax of smooth blobs and noise."""
    rng = np.random.default_rng(seed)
    scores = np.stack([40 * gaussian_filter(rng.normal(size=size), 6) + rng.normal(size=size) for _ in range(labels)])
    scores -= scores.max(0)
    found = np.log(np.exp(scores).sum(0)) - scores
    return np.ascontiguousarray(found.reshape(labels, -1), np.float32)


def features(image: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Of the appearance kernel (P, 5) and of the smoothness kernel (P, 2)."""
    height, width = image.shape[:2]
    place = np.stack(np.meshgrid(np.arange(width, dtype=np.float32), np.arange(height, dtype=np.float32)), -1).reshape(-1, 2)
    colour = image.reshape(-1, 3).astype(np.float32) / np.float32(COLOUR)
    return np.concatenate([place / np.float32(PLACE), colour], 1), place / np.float32(SMOOTH)


def ours(image: np.ndarray, unary: np.ndarray, threads: int, fast: bool = False) -> np.ndarray:
    """(K, P) marginals."""
    appearance, place = features(image)
    kernels = [GaussianKernel(appearance, np.float32(-APPEARANCE_WEIGHT)), GaussianKernel(place, np.float32(-SMOOTH_WEIGHT))]
    return mean_field(unary, kernels, ITERATIONS, threads=threads, fast=fast, width=image.shape[1])


def peer(image: np.ndarray, unary: np.ndarray, threads: int = 1) -> np.ndarray:
    """(K, P) marginals of pydensecrf, which has one thread."""
    model = DenseCRF2D(image.shape[1], image.shape[0], len(unary))
    model.setUnaryEnergy(unary)
    model.addPairwiseGaussian(sxy=SMOOTH, compat=SMOOTH_WEIGHT)
    model.addPairwiseBilateral(sxy=PLACE, srgb=COLOUR, rgbim=image, compat=APPEARANCE_WEIGHT)
    return np.array(model.inference(ITERATIONS))


def scenes(size: tuple[int, int], data: Path) -> Iterator[tuple[str, np.ndarray]]:
    """Names and images; photographs in equal steps through the names of their folder."""
    for texture in ("smooth", "fine", "grainy", "rough", "random"):
        yield texture, scene(texture, size)
    for folder, pattern, count in PHOTOGRAPHS:
        paths = sorted((data / folder).glob(pattern))
        for path in paths[:: max(1, len(paths) // count)][:count]:
            yield f"photograph {path.stem}", np.array(Image.open(path).convert("RGB"))


def seconds(call: Callable[[], object]) -> float:
    """How long a call takes on the wall."""
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def compare(image: np.ndarray, unary: np.ndarray, threads: int, fast: bool, repeats: int) -> dict[str, Any]:
    """Times in turns, the first of a pair changing from pair to pair; how far the results are from one another."""
    calls = [lambda: ours(image, unary, threads, fast)]
    row: dict[str, Any] = {}
    result = np.exp(calls[0]())
    if fast or DenseCRF2D:
        reference = peer(image, unary) if DenseCRF2D else np.exp(ours(image, unary, threads))
        row["labels_that_differ"] = int((result.argmax(0) != reference.argmax(0)).sum())
        row["largest_difference"] = float(f"{np.abs(result - reference).max():.1e}")
    if DenseCRF2D:
        calls.append(lambda: peer(image, unary))
    times: list[list[float]] = [[] for _ in calls]
    for number in range(repeats):
        for side in range(len(calls)) if number % 2 else reversed(range(len(calls))):
            times[side].append(seconds(calls[side]))
    row["ours_ms"] = round(1000 * statistics.median(times[0]), 1)
    if DenseCRF2D:
        ratios = [theirs / own for own, theirs in zip(*times, strict=True)]
        low, middle, high = statistics.quantiles(ratios, n=4, method="inclusive")
        row |= {"pydensecrf_ms": round(1000 * statistics.median(times[1]), 1), "times_faster": round(middle, 2)}
        row["quartiles"] = [round(low, 2), round(high, 2)]
    return row


def in_new_process(code: str, **names: object) -> float:
    """The number that a script prints, run by itself."""
    for name, value in names.items():
        code = code.replace(name, repr(value))
    return float(subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout)


def main() -> None:
    """Run every comparison and write the file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--size", type=int, nargs=2, default=(375, 500), metavar=("HEIGHT", "WIDTH"))
    parser.add_argument("--labels", type=int, nargs="+", default=[21, 2])
    parser.add_argument("--data", type=Path, default=Path("data"), help="holds crf_examples and msrc21; what is absent is left out")
    parser.add_argument("--only", nargs="+", default=[], metavar="SCENE")
    given = parser.parse_args()
    if not DenseCRF2D:
        sys.stdout.write("pydensecrf cannot be imported: only our own times\n")
    rows, wrong = [], []
    for name, image in scenes(tuple(given.size), given.data):
        if given.only and name not in given.only:
            continue
        size = image.shape[:2]
        pixels = size[0] * size[1]
        vertices = lattices([features(image)[0]], 1).starts[-1] - 1
        for labels in given.labels:
            unary = energies(labels, size, 1)
            for threads in given.threads:
                for fast in (False, True) if threads == max(given.threads) and labels == given.labels[0] else (False,):
                    row = {"scene": name, "size": list(size), "labels": labels, "threads": threads, "fast": fast}
                    row["vertices_per_pixel"] = round(float(vertices) / pixels, 3)
                    row |= compare(image, unary, threads, fast, given.repeats)
                    rows.append(row)
                    sys.stdout.write(json.dumps(row) + "\n")
                    sys.stdout.flush()
                    if not fast and DenseCRF2D and (row["labels_that_differ"] > pixels * TIES or row["largest_difference"] > 1e-4):
                        wrong.append(f"{name}, {labels} labels")
    result: dict[str, Any] = {
        "command": f"python benchmarks/speed_crf.py {' '.join(sys.argv[1:])}".strip(),
        "machine": this_machine().words,
        "peer": "pydensecrf, built from its repository" if DenseCRF2D else "pydensecrf could not be imported",
        "start_of_a_second_process_s": round(in_new_process(START, LABELS=given.labels[0]), 2),
        "versions": {"python": platform.python_version(), **{name: version(name) for name in ("numba", "numpy", "perpixel")}},
        "rows": rows,
    }
    if sys.platform == "linux":
        for side in ("ours", "pydensecrf") if DenseCRF2D else ("ours",):
            peak = in_new_process(MEMORY, HERE=str(HERE), SIDE=side, LABELS=given.labels[0], SIZE=tuple(given.size))
            result[f"peak_{side}_MB"] = round(peak, 1)
    (HERE / "results").mkdir(exist_ok=True)
    (HERE / "results" / "speed-crf.json").write_text(json.dumps(result, indent=1) + "\n")
    if wrong:
        sys.exit(f"results differ from pydensecrf's: {', '.join(wrong)}")


if __name__ == "__main__":
    main()
