"""How long GridMRF takes and how near its labellings are to the best; writes benchmarks/results/speed-mrf.json.

python benchmarks/speed_mrf.py [--device cpu] [--threads 2] [--repeats 5] [--sizes 213x320 1024x1024] [--labels 21] [--only WORD ...]

Every method refines the same scores, Potts costs, contrast from the image: generated regions, seen through noise so strong that a third
of the pixels has a wrong label. `gap` is the energy above the lower bound, as a share of the bound. The cut of one two-label problem is
timed against scipy's maximum_flow, in turns. With one thread on the CPU the time is that of the processor, else that on the wall.
Fails where expansion takes 2 s or belief propagation 1 s on 213x320 pixels with 21 labels.
"""

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from record import write
from scipy.ndimage import gaussian_filter
from scipy.sparse import coo_array
from scipy.sparse.csgraph import maximum_flow
from torch import Tensor

from perpixel.refinement.grid_mrf import METHODS, GridMRF
from perpixel.refinement.max_flow import frame_index, max_flow, new_flow

LIMITS = {"expansion": 2.0, "min_sum": 1.0, "sum_product": 1.0}  # seconds, issue 4, at LIMIT_SIZE and LIMIT_LABELS
LIMIT_SIZE, LIMIT_LABELS = (213, 320), 21


def scene(height: int, width: int, labels: int) -> tuple[Tensor, Tensor]:
    """Scores (1, K, H, W) of which about a third are wrong, and the image (1, 3, H, W), 0..255, of the regions below them."""
    rng = np.random.default_rng(0)
    regions = np.stack([gaussian_filter(rng.standard_normal((height, width)), 20) for _ in range(labels)]).argmax(0)
    logits = 4 * np.eye(labels)[regions].transpose(2, 0, 1) + 1.75 * rng.standard_normal((labels, height, width))
    image = rng.integers(0, 256, (labels, 3))[regions].transpose(2, 0, 1) + 10 * rng.standard_normal((3, height, width))
    return torch.from_numpy(logits[None]).float(), torch.from_numpy(image.clip(0, 255)[None]).to(torch.uint8)


def seconds(call: Callable[[], Any], given: argparse.Namespace) -> float:
    """How long one call takes."""
    clock = time.process_time if given.device == "cpu" and given.threads == 1 else time.perf_counter
    start = clock()
    call()
    if given.device == "cuda":
        torch.cuda.synchronize()
    return clock() - start


def spread(times: list[float]) -> dict[str, Any]:
    low, middle, high = statistics.quantiles(times, n=4, method="inclusive") if len(times) > 1 else times * 3
    return {"seconds": round(middle, 4), "quartiles": [round(low, 4), round(high, 4)], "repeats": len(times)}


def refine(method: str, height: int, width: int, given: argparse.Namespace) -> dict[str, Any]:
    """Times of one method at one size, and how good what it finds is."""
    logits, image = (x.to(given.device) for x in scene(height, width, given.labels))
    mrf = GridMRF(2.0, method=method, neighbours=given.neighbours).to(given.device)
    with torch.inference_mode():
        mrf(logits[..., :8, :8], image[..., :8, :8])  # compiles
        times = [seconds(lambda: mrf(logits, image), given) for _ in range(given.repeats)]
        energy = mrf.energy(logits, image, mrf(logits, image).argmax(1)).item()
        bound = mrf.lower_bound(logits, image).item()
        unrefined = mrf.energy(logits, image, logits.argmax(1)).item()
    found = {"energy": round(energy, 1), "energy_unrefined": round(unrefined, 1), "gap": round((energy - bound) / bound, 6)}
    return {"kind": "refine", "name": method, "size": [height, width], "labels": given.labels, **spread(times), **found}


def bound_time(height: int, width: int, given: argparse.Namespace) -> dict[str, Any]:
    """Times of the lower bound at its default iterations."""
    logits, image = scene(height, width, given.labels)
    mrf = GridMRF(2.0, neighbours=given.neighbours)
    mrf.lower_bound(logits[..., :8, :8], image[..., :8, :8])
    times = [seconds(lambda: mrf.lower_bound(logits, image), given) for _ in range(given.repeats)]
    return {"kind": "bound", "name": "lower bound, 30 iterations", "size": [height, width], "labels": given.labels, **spread(times)}


def cut(height: int, width: int, given: argparse.Namespace) -> dict[str, Any]:
    """One minimum cut of an image, 4 neighbours, whole capacities: ours and scipy's in turns; ValueError where the flows differ."""
    rng = np.random.default_rng(1)
    terminal = (100 * gaussian_filter(rng.standard_normal((height, width)), 3) * 20 + 100 * rng.standard_normal((height, width))).astype(
        int
    )
    pixels, node = frame_index(height, width), np.arange(height * width).reshape(height, width)
    source, sink = height * width, height * width + 1
    sides = [(node[:, :-1], node[:, 1:]), (node[:, 1:], node[:, :-1]), (node[:-1], node[1:]), (node[1:], node[:-1])]
    links = [(np.full(node.size, source), node.ravel(), terminal.clip(min=0).ravel())]
    links += [(node.ravel(), np.full(node.size, sink), (-terminal).clip(min=0).ravel())]
    links += [(tail.ravel(), head.ravel(), np.full(tail.size, 80)) for tail, head in sides]
    tails, heads, capacities = (np.concatenate(column) for column in zip(*links, strict=True))
    graph = coo_array((capacities.astype(np.int32), (tails, heads)), shape=(sink + 1, sink + 1)).tocsr()

    def ours() -> float:
        flow = new_flow(height, width, 4)
        flow.terminal[pixels] = terminal
        for direction, here in enumerate((np.s_[:, :-1], np.s_[:, 1:], np.s_[:-1], np.s_[1:])):
            flow.residual[pixels[here], direction] = 80
        return max_flow(flow, pixels.ravel())

    def theirs() -> float:
        return float(maximum_flow(graph, source, sink).flow_value)

    if ours() != theirs():
        raise ValueError(f"the flows differ, {ours()} and {theirs()}; the times would say nothing")
    pairs = [(seconds(ours, given), seconds(theirs, given)) for _ in range(given.repeats)]
    times = {
        "scipy_seconds": round(statistics.median(b for _, b in pairs), 4),
        "ratio": round(statistics.median(a / b for a, b in pairs), 4),
    }
    return {
        "kind": "cut",
        "name": "one cut, scipy's maximum_flow",
        "size": [height, width],
        "labels": 2,
        **spread([a for a, _ in pairs]),
        **times,
    }


def main() -> None:
    """Run every method at every size, and write the file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--sizes", nargs="+", default=["213x320", "1024x1024"], metavar="HEIGHTxWIDTH")
    parser.add_argument("--labels", type=int, default=21)
    parser.add_argument("--neighbours", type=int, choices=[4, 8], default=4)
    parser.add_argument("--only", nargs="+", default=[], metavar="WORD", help="what has one of these in its name")
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    rows = []
    for height, width in (map(int, size.split("x")) for size in given.sizes):
        jobs: dict[str, Callable[..., dict[str, Any]]] = {name: lambda *a, name=name: refine(name, *a) for name in METHODS}
        jobs |= {"lower bound": bound_time, "cut": cut}
        for name, job in jobs.items():
            if not given.only or any(word in name for word in given.only):
                rows.append(job(height, width, given))
                sys.stdout.write(json.dumps(rows[-1]) + "\n")
                sys.stdout.flush()
    result = {
        "device": given.device,
        "threads": given.threads,
        "clock": "processor" if given.device == "cpu" and given.threads == 1 else "wall",
        "neighbours": given.neighbours,
        "limits": LIMITS,
        "rows": rows,
    }
    write("speed-mrf", result, ("torch", "numba", "scipy"), given.device)
    binding = [row for row in rows if tuple(row["size"]) == LIMIT_SIZE and row["labels"] == LIMIT_LABELS and row["kind"] == "refine"]
    slow = [row["name"] for row in binding if row["seconds"] > LIMITS.get(row["name"], float("inf"))]
    if slow:
        sys.exit(f"slower than the limit: {', '.join(slow)}")


if __name__ == "__main__":
    main()
