"""The Gaussian CRF against scipy's conjugate gradient on the same matrix; writes benchmarks/results/speed-gcrf.json.

python benchmarks/speed_gcrf.py [--threads 2] [--repeats 15] [--size 213 320] [--classes 21] [--device cpu]

The released layer is Caffe for CUDA and cannot be built here, so scipy stands in: its matrix is written out beforehand, and only the
solving is timed, label by label, with the same preconditioner and tolerance. Ours includes everything from logits and image to logits.
Both see the same scores, in turns, and must agree. A refinement with four neighbours must take less than 0.2 s.
On a GPU there is no peer, and the ratio is to the processor.
"""

import argparse
import json
import sys
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from record import write
from scipy import sparse
from scipy.ndimage import gaussian_filter
from scipy.sparse.linalg import cg
from speed import Call, Setting, compare
from torch import Tensor

from perpixel.refinement import gaussian_solver
from perpixel.refinement.gaussian_crf import GaussianCRF

LIMIT_SECONDS = 0.2


def scene(classes: int, size: tuple[int, int]) -> tuple[Tensor, Tensor]:
    """Scores and a photograph's like: blobs of colour with noise, and scores that know the blobs roughly."""
    rng = np.random.default_rng(0)
    blobs = gaussian_filter(rng.normal(size=(classes, *size)), (0, 12, 12))
    truth = blobs.argmax(0)
    colours = rng.integers(30, 226, (classes, 3))[truth] + rng.normal(0, 12, (*size, 3))
    logits = 3 * (np.arange(classes)[:, None, None] == truth) + rng.normal(0, 1.5, (classes, *size))
    image = np.clip(colours, 0, 255).astype(np.uint8).transpose(2, 0, 1)
    return torch.from_numpy(logits).float()[None], torch.from_numpy(image)[None]


def written_out(crf: GaussianCRF, image: Tensor) -> sparse.csr_matrix:
    """The system of one label as a sparse matrix, float32."""
    edges = crf.pairwise(image.float()).detach()[0].numpy()
    height, width = edges.shape[1:]
    at = np.arange(height * width).reshape(height, width)
    rows, columns, values = [], [], []
    for (down, right), weight in zip(crf.offsets, edges, strict=True):
        left = max(-right, 0)
        near = np.s_[: height - down, left : width - max(right, 0)]
        far = at[down:, left + right : width + right if right < 0 else width]
        rows += [at[near].ravel(), far.ravel()]
        columns += [far.ravel(), at[near].ravel()]
        values += [weight[near].ravel()] * 2
    i, j, v = (np.concatenate(parts) for parts in (rows, columns, values))
    off = sparse.coo_matrix((v, (i, j)), shape=(at.size, at.size)).tocsr()
    lam = float(crf.log_lambda.detach().exp())
    return (off + sparse.diags(lam + np.asarray(abs(off).sum(1)).ravel())).tocsr().astype(np.float32)


def refinement(crf: GaussianCRF, logits: Tensor, image: Tensor) -> Callable[[], Tensor]:
    """From logits and image to logits."""

    def run() -> Tensor:
        with torch.inference_mode():
            refined: Tensor = crf(logits, image)
        return refined

    return run


def against_scipy(crf: GaussianCRF, logits: Tensor, image: Tensor) -> tuple[Call, Call]:
    """Ours and scipy's; ValueError where they differ."""
    matrix = written_out(crf, image)
    inverse = sparse.diags(1 / matrix.diagonal()).tocsr()
    scores = (logits - logits.mean(1, keepdim=True))[0].flatten(1).numpy()
    lam = float(crf.log_lambda.detach().exp())

    def theirs() -> Tensor:
        found = [cg(matrix, b, rtol=crf.tolerance, M=inverse)[0] for b in scores]
        return lam * torch.from_numpy(np.stack(found)).view_as(logits)

    ours = refinement(crf, logits, image)
    a, b = ours(), theirs()
    if (a - b).norm() > 1e-4 * b.norm():
        raise ValueError(f"the solutions differ by {(a - b).norm() / b.norm():.1e} of their size; the times would say nothing")
    return ours, theirs


def training_step(crf: GaussianCRF, logits: Tensor, image: Tensor) -> Call:
    """Forward and backward, to logits, weight and F."""
    scores = logits.clone().requires_grad_()

    def step() -> None:
        crf.zero_grad()
        scores.grad = None
        crf(scores, image).square().mean().backward()

    return step


def by_tensors(call: Call) -> Call:
    """The same with torch's operations in place of the compiled loops."""

    def run() -> object:
        loops = gaussian_solver._by_label
        gaussian_solver._by_label = gaussian_solver._by_tensors
        try:
            return call()
        finally:
            gaussian_solver._by_label = loops

    return run


def main() -> None:
    """Time every case, and write the file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--size", type=int, nargs=2, default=(213, 320), metavar=("HEIGHT", "WIDTH"))
    parser.add_argument("--classes", type=int, default=21)
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    setting = Setting(given.device, given.threads, "contiguous", "32", 1, (given.size[0], given.size[1]))
    logits, image = scene(given.classes, setting.size)
    rows: list[dict[str, Any]] = []
    for weight, neighbours in ((4.0, 4), (30.0, 4), (4.0, 24)):
        crf = GaussianCRF(weight=weight, neighbours=neighbours)
        with torch.inference_mode():
            report = crf.refine(logits, image)[1][0]
        moved = GaussianCRF(**crf.options()).to(given.device), logits.to(given.device), image.to(given.device)
        step = training_step(*moved)
        cases: dict[str, Callable[[], tuple[Call, Call]]]
        if given.device == "cuda":
            refine = refinement(*moved)
            cases = {"refinement, CUDA and processor": lambda crf=crf, fast=refine: (fast, refinement(crf, logits, image))}
        else:
            cases = {
                "refinement, ours and scipy's cg": lambda crf=crf: against_scipy(crf, logits, image),
                "training step, ours and torch's operations": lambda step=step: (step, by_tensors(step)),
            }
        for name, make in cases.items():
            times = compare(*make(), setting, given.repeats)
            rows.append({"name": name, "weight": weight, "neighbours": neighbours, "iterations": int(report.iterations.max()), **times})
            sys.stdout.write(json.dumps(rows[-1]) + "\n")
            sys.stdout.flush()
    result = {
        "device": given.device,
        "threads": given.threads,
        "clock": "processor" if setting.processor_time else "wall",
        "size": list(given.size),
        "classes": given.classes,
        "limit_seconds": LIMIT_SECONDS,
        "rows": rows,
    }
    write("speed-gcrf" if given.device == "cpu" else "speed-gcrf-cuda", result, ("torch", "numba", "scipy"), given.device)
    slow = [
        row for row in rows if row["name"].startswith("refinement") and row["neighbours"] == 4 and row["ours_ms"] > 1000 * LIMIT_SECONDS
    ]
    if slow:
        sys.exit(f"slower than {LIMIT_SECONDS} s: weights {', '.join(str(row['weight']) for row in slow)}")


if __name__ == "__main__":
    main()
