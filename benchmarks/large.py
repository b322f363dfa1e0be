"""Prediction of very large images: peak memory, throughput, and U-Net of 2015 from file to file; writes benchmarks/results/large.json.

OMP_NUM_THREADS=1 python benchmarks/large.py [--sides 10000 30000 60000] [--minutes 5] [--agreement BUNDLE IMAGES] [--only memory ...]

Each part may be run by itself; the others' results stay. The images are synthetic tiled TIFFs whose tiles are a few encoded ones, the
networks narrow and untrained: what is measured is the machinery around them. Memory is the peak of a process of its own, `perpixel predict`
from its start, as the system counts it. A side whose prediction takes longer than --minutes is ended then, and its share says how far it
came; the peak is that of this part. Throughput is the processor's wall clock, the ratio the median over pairs of one run of `predict_files`
and one of the network alone on windows as many and as large.
"""

import argparse
import json
import os
import platform
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import time
import zlib
from collections.abc import Iterator
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import tifffile
import torch

from perpixel.budget import keep_freed_memory
from perpixel.bundle import Card, save_bundle
from perpixel.data.images import default_colors, read_image
from perpixel.data.layouts import find_layout
from perpixel.models import build
from perpixel.predict import Task, load, predict_files
from perpixel.tiling import Tiler

RESULT = Path(__file__).parent / "results" / "large.json"
TILE = 512  # of the synthetic images


def machine() -> str:
    """What one figure was measured on: parts are run on different days."""
    capability = torch.backends.cpu.get_cpu_capability()
    return f"{platform.machine()} {capability}, {os.cpu_count()} cores, {torch.get_num_threads()} threads of PyTorch {torch.__version__}"


def write_image(path: Path, side: int) -> None:
    """An RGB picture of soft spots, side x side pixels, from eight different encoded tiles."""
    random = np.random.default_rng(0)
    rows, columns = np.mgrid[:TILE, :TILE] / TILE
    tiles = []
    for _ in range(8):
        a, b, c = random.uniform(5, 40, 3)
        soft = np.stack([np.sin(a * rows + b * columns * columns), np.cos(c * columns - a * rows), np.sin(b * rows * columns)], -1)
        tiles.append(zlib.compress((127 + 100 * soft).astype(np.uint8).tobytes(), 6))

    def encoded() -> Iterator[bytes]:
        for row, column in product(range(-(-side // TILE)), repeat=2):
            yield tiles[(row * 5 + column * 3) % len(tiles)]

    shape = (side, side, 3)
    tifffile.imwrite(
        path, encoded(), shape=shape, dtype="uint8", tile=(TILE, TILE), compression="adobe_deflate", photometric="rgb", bigtiff=True
    )


def write_bundle(path: Path, model: str, options: dict[str, Any], bands: int, tile: int, overlap: int) -> None:
    """An untrained model of two classes."""
    torch.manual_seed(0)
    encoder = "plain" if model == "unet" else None
    network = build(model, 2, encoder=encoder, in_channels=bands, **options)
    card = Card(
        model=model, encoder=encoder, options=options, bands=bands, dtype="uint8", mean=[0.5] * bands, std=[0.25] * bands,
        classes=["ground", "spot"], colors=default_colors(2), label_map={"values": {"0": 0, "1": 1}, "ignore": 255},
        tile=tile, overlap=overlap,
    )  # fmt: skip
    save_bundle(path, network.state_dict(), card)


def memory(folder: Path, side: int, minutes: float) -> dict[str, Any]:
    """Peak resident memory of `perpixel predict` on a picture of side x side pixels, and how far it came in the time."""
    image, bundle, out = folder / f"{side}.tif", folder / "narrow.safetensors", folder / f"out-{side}"
    write_image(image, side)
    write_bundle(bundle, "unet", {"width": 1}, 3, 512, 32)
    start = time.monotonic()
    command = [sys.executable, "-m", "perpixel", "predict", str(bundle), str(image), "-o", str(out)]
    child = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    ended = False
    while True:
        pid, _, usage = os.wait4(child.pid, os.WNOHANG)
        if pid:
            break
        if time.monotonic() - start > 60 * minutes and not ended:
            ended = True
            child.send_signal(signal.SIGKILL)
        time.sleep(0.2)
    parts = list(out.glob(".perpixel-*/*/*.labels"))
    plan = (child.stdout.readline() if child.stdout else "").strip()
    blocks = int(plan.split("pixels: ")[1].split(" blocks")[0])
    found = {
        "side": side,
        "peak_mib": round(usage.ru_maxrss / 1024),
        "seconds": round(time.monotonic() - start, 1),
        "share": round(len(parts) / blocks, 3) if ended else 1.0,
        "input_mib": round(image.stat().st_size / 2**20),
        "plan": plan,
        "machine": machine(),
    }
    image.unlink()
    shutil.rmtree(out, ignore_errors=True)
    return found


def throughput(folder: Path, pairs: int, whole: int, words: list[str]) -> dict[str, Any]:
    """Prediction from file to file against the bare network on as many windows of the same size, in turns."""
    keep_freed_memory()  # as the command does
    images, found = [folder / "large.tif", folder / "quarter.tif"], {}
    for image, side in zip(images, (whole, whole // 4), strict=True):
        write_image(image, side)
    for name, model, options, tile, overlap in (
        ("unet of width 8, overlap 64", "unet", {"width": 8}, 512, 64),
        ("unet_paper of width 8, margin 92", "unet_paper", {"width": 8}, 512, 0),
        ("unet_paper as published", "unet_paper", {}, 512, 0),
    ):
        if words and not any(word in name for word in words):
            continue
        bundle = folder / f"{model}.safetensors"
        write_bundle(bundle, model, options, 3, tile, overlap)
        side, image = (whole, images[0]) if options else (whole // 4, images[1])
        segmenter = load(bundle, device="cpu")
        tiler = Tiler(segmenter.bundle.model, tile, overlap)
        count = tiler.windows((side, side))
        pixels = torch.from_numpy(tifffile.imread(image)[: tiler.window, : tiler.window].transpose(2, 0, 1).copy())
        window = segmenter.bundle.normalize(pixels)[None].contiguous(memory_format=torch.channels_last)
        ours, bare = [], []
        for number in range(pairs + 1):
            start = time.perf_counter()
            predict_files(segmenter, [image], folder / f"out{number}", Task(format="tif"))
            middle = time.perf_counter()
            with torch.inference_mode():
                for _ in range(count):
                    segmenter.bundle.model(window)
            if number:  # the first pair warms up
                ours.append(middle - start)
                bare.append(time.perf_counter() - middle)
        ratio = statistics.median(alone / whole for alone, whole in zip(bare, ours, strict=True))
        found[f"{name}, {side} pixels square"] = {
            "windows": count,
            "window": tiler.window,
            "predict_seconds": round(statistics.median(ours), 2),
            "network_seconds": round(statistics.median(bare), 2),
            "throughput_of_bare_network": round(ratio, 3),
            "pairs": pairs,
            "machine": machine(),
        }
    return found


def unet(folder: Path, repeats: int) -> dict[str, Any]:
    """U-Net of 2015 with 64 channels on a grey picture of 512x512 pixels: seconds from file to label file, warm."""
    image, bundle = folder / "cells.png", folder / "unet_paper.safetensors"
    from PIL import Image

    Image.fromarray(np.random.default_rng(0).integers(0, 256, (512, 512), dtype=np.uint8)).save(image)
    write_bundle(bundle, "unet_paper", {}, 1, 512, 0)
    found: dict[str, Any] = {"machine": machine()}
    for precision in ("bf16", "float32"):
        segmenter = load(bundle, device="cpu", precision=precision)
        times = []
        for _ in range(repeats + 2):
            start = time.perf_counter()
            predict_files(segmenter, [image], folder / "labels")
            times.append(time.perf_counter() - start)
        found[f"{precision}_seconds"] = round(statistics.median(times[2:]), 3)
    return found


def agreement(bundle: Path, images: Path) -> dict[str, Any]:
    """Share of pixels that bfloat16 and float32 label alike, over the set's images."""
    networks = [load(bundle, device="cpu", precision=precision, refine="none") for precision in ("float32", "bf16")]
    same = [
        float((networks[0].predict(pixels) == networks[1].predict(pixels)).mean())
        for pair in find_layout(images, None).pairs
        for pixels in [read_image(pair.image).transpose(1, 2, 0)]
    ]
    card = networks[0].bundle.card
    return {
        "model": f"{card.model} {card.options}",
        "images": len(same),
        "mean": float(np.mean(same)),
        "lowest": min(same),
        "machine": machine(),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--sides", type=int, nargs="+", default=[10_000, 30_000, 60_000])
    parser.add_argument("--minutes", type=float, default=120.0, help="for each side")
    parser.add_argument("--pairs", type=int, default=5)
    parser.add_argument("--throughput-side", type=int, default=4096, help="of the narrow nets; the published one takes a quarter")
    parser.add_argument("--nets", nargs="+", default=[], metavar="WORD", help="of throughput, those whose name has one of these")
    parser.add_argument("--agreement", type=Path, nargs=2, metavar=("BUNDLE", "IMAGES"))
    parser.add_argument("--only", nargs="+", choices=["memory", "throughput", "unet", "agreement"])
    given = parser.parse_args()
    results: dict[str, Any] = json.loads(RESULT.read_text("utf-8")) if RESULT.exists() else {}
    wanted = given.only or ["memory", "throughput", "unet", "agreement"]
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        for side in given.sides if "memory" in wanted else []:
            results.setdefault("memory", {})[str(side)] = memory(folder, side, given.minutes)
            _write(results)
        if "throughput" in wanted:
            results.setdefault("throughput", {}).update(throughput(folder, given.pairs, given.throughput_side, given.nets))
        if "unet" in wanted:
            results["unet_2015_512x512"] = unet(folder, given.pairs)
        if "agreement" in wanted and given.agreement:
            results["bf16_agreement"] = agreement(*given.agreement)
    _write(results)


def _write(results: dict[str, Any]) -> None:
    RESULT.write_text(json.dumps(results, indent=1) + "\n", "utf-8")
    print(json.dumps(results, indent=1))


if __name__ == "__main__":
    main()
