"""Memory of an evaluation while its images pass by; writes benchmarks/results/memory-evaluate-SIZE.json.

OMP_NUM_THREADS=1 python benchmarks/memory.py [--images 10000] [--size 512]

A small U-Net, trained for a minute on the sample set, is scored with everything that `perpixel evaluate` does unless told otherwise. The
images are 32 generated scenes that lie in the folder under as many names as asked for, so that each is found, read, predicted, scored and
kept count of by itself. Memory is what the process holds (resident) beyond what it held after its first image, with the model, its
activations and all compiled code in place.
"""

import argparse
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from record import write

from perpixel.data.samples import write_samples
from perpixel.evaluate import Scored, evaluate
from perpixel.scores import DEFAULT_GROUPS

SCENES = 32
LIMIT = 500.0  # MB
SMALL = ["model.name=unet", "model.encoder=plain", "model.options={width: 4}", "train.batch=4", "train.crop=[128, 128]"]


def resident() -> float:
    """MB that this process holds now."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 2**20


def many(folder: Path, images: int, size: int) -> Path:
    """A set of `images` names for `SCENES` scenes."""
    write_samples(folder / "scenes", train=1, val=SCENES, height=size, width=size)
    for kind in ("images", "masks"):
        (folder / "many" / kind).mkdir(parents=True)
        files = sorted((folder / "scenes" / kind / "val").iterdir())
        for number in range(images):
            (folder / "many" / kind / f"{number:06d}.png").hardlink_to(files[number % len(files)])
    return folder / "many"


def main() -> None:
    """Train, score, write the file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=10_000)
    parser.add_argument("--size", type=int, default=512)
    given = parser.parse_args()
    marks = {max(1, round(given.images * share / 10)) for share in range(11)}
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        write_samples(folder / "small", train=32, val=4, height=128, width=128)
        # In a process of its own: memory that training has freed would hide what the evaluation takes.
        pair = (folder / "small" / "images", folder / "small" / "masks")
        command = [sys.executable, "-m", "perpixel", "train", *pair, "-o", folder / "run", "--steps", "100"]
        settings = [word for setting in SMALL for word in ("--set", setting)]
        subprocess.run([*map(str, command), *settings], check=True, stdout=subprocess.DEVNULL)
        data = many(folder, given.images, given.size)
        held: list[float] = []
        rows: list[dict[str, float]] = []
        start = time.monotonic()

        def watch(_: Scored) -> None:
            held.append(resident())
            if len(held) in marks:
                rows.append({"images": len(held), "megabytes": round(held[-1] - held[0], 1), "seconds": round(time.monotonic() - start, 1)})
                sys.stdout.write(f"{rows[-1]}\n")
                sys.stdout.flush()

        result = evaluate(folder / "run" / "best.safetensors", data / "images", data / "masks", device="cpu", observers=[watch])
        result.to_file(folder / "scores.json")
        file = (folder / "scores.json").stat().st_size / 2**20
        write(
            f"memory-evaluate-{given.size}",
            {
                "images": given.images,
                "size": [given.size, given.size],
                "scores": ["region", *DEFAULT_GROUPS],
                "limit_megabytes": LIMIT,
                "first_image_megabytes": round(held[0], 1),
                "most_above_first_megabytes": round(max(held) - held[0], 1),
                "after_tables_above_first_megabytes": round(resident() - held[0], 1),
                "file_megabytes": round(file, 2),
                "seconds": round(result.seconds, 1),
                "rows": rows,
            },
            packages=("torch", "numpy", "numba"),
        )
    if max(held) - held[0] > LIMIT:
        sys.exit(f"{max(held) - held[0]:.0f} MB above the first image, more than {LIMIT:.0f}")


if __name__ == "__main__":
    main()
