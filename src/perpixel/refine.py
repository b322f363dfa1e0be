"""Refine: scores from anywhere, together with their image, to better ones. Arrays in, arrays out; or files."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import tifffile
import torch

from perpixel.data.display import default_colors
from perpixel.data.images import read_image
from perpixel.data.writing import write_array, write_labels
from perpixel.refinement.refiners import build_refiner

KINDS = ("auto", "probabilities", "logits")
SMALLEST = 1e-8  # a probability below this counts as this: its logarithm would be infinite


def refine(
    image: np.ndarray, scores: np.ndarray, refiner: str = "dense_crf", options: Mapping[str, Any] | None = None, kind: str = "auto"
) -> np.ndarray:
    """Class probabilities of every pixel after neighbouring pixels have talked.

    Args:
        image: (H, W) or (H, W, C), on the scale of its file: white is 255, or 65535 in uint16, or 1 in floats that do not go beyond it.
        scores: (K, H, W) or (H, W, K), any real type.
        refiner, options: as in `perpixel.refinement.build_refiner`.
        kind: what the scores are: "probabilities", "logits" (real scores before softmax, or log-probabilities); "auto" takes them for
            probabilities where they lie in 0..1 and add up to 1 (to 1 %) at every pixel, or are uint8 or uint16 and add up to the
            highest value of their type (to K, for rounding).

    Returns:
        (K, H, W) float32 probabilities; those of the labelling's conditional energies where the refiner has no marginals.

    Raises:
        ValueError: if sizes differ, values are NaN or infinite, or the refiner or an option is unknown.
    """
    if image.ndim not in (2, 3):
        raise ValueError(f"image has shape {image.shape}; give (H, W) or (H, W, C)")
    size = image.shape[:2]
    logits = _logits(_classes_first(scores, size), kind)
    bands = image[None] if image.ndim == 2 else np.moveaxis(image, -1, 0)
    with torch.inference_mode():
        pixels = torch.from_numpy(np.ascontiguousarray(bands, bands.dtype.newbyteorder("=")))
        refined = build_refiner(refiner, options, _full_scale(bands))(torch.from_numpy(logits)[None], pixels[None])
    return refined[0].softmax(0).numpy()


def refine_files(
    image: Path,
    scores: Path,
    out: Path,
    refiner: str = "dense_crf",
    options: Mapping[str, Any] | None = None,
    kind: str = "auto",
    with_probabilities: bool = False,
) -> Path:
    """Writes OUT/<image name>.png with the class indices, and OUT/probabilities/<image name>.npy (float16) where asked; see `refine`."""
    pixels = np.moveaxis(read_image(image), 0, -1)
    try:
        probabilities = refine(pixels, read_scores(scores), refiner, options, kind)
    except ValueError as error:
        raise ValueError(f"{image} and {scores}: {error}") from None
    target = out / f"{image.stem}.png"
    if target.resolve() == image.resolve():
        raise ValueError(f"{target} is the image itself; choose another folder.")
    labels = probabilities.argmax(0)
    write_labels(target, labels.astype(np.uint8 if len(probabilities) <= 255 else np.uint16), default_colors(len(probabilities)))
    if with_probabilities:
        write_array(out / "probabilities" / f"{image.stem}.npy", probabilities.astype(np.float16))
    return target


def read_scores(path: Path) -> np.ndarray:
    """The one array in a .npy, .npz or multi-band TIFF file; nothing is unpickled.

    Raises:
        ValueError: naming the file, if it is missing, damaged, of another kind, or holds several arrays.
    """
    if not path.is_file():
        raise ValueError(f"{path}: no such file. Scores are a .npy, .npz or multi-band TIFF file")
    try:
        if path.suffix.lower() in (".tif", ".tiff"):
            return np.asarray(tifffile.imread(path))
        content = np.load(path, allow_pickle=False)
        if isinstance(content, np.ndarray):
            return content
        names = content.files
        if len(names) != 1:
            raise ValueError(f"it holds {len(names)} arrays ({', '.join(names)}), and scores are one")
        return np.asarray(content[names[0]])
    except Exception as error:  # whatever a damaged file makes of the readers
        raise ValueError(f"{path}: no scores could be read ({error}). Give a .npy, .npz or multi-band TIFF file of numbers") from None


def _classes_first(scores: np.ndarray, size: tuple[int, ...]) -> np.ndarray:
    if scores.ndim == 3 and scores.shape[1:] == size:
        return scores
    if scores.ndim == 3 and scores.shape[:2] == size:
        return np.moveaxis(scores, -1, 0)
    raise ValueError(
        f"the scores have shape {scores.shape} and the image {size[0]}x{size[1]} pixels; (K, H, W) or (H, W, K) of its size fit"
    )


def _full_scale(image: np.ndarray) -> float:
    if image.dtype.kind == "f":
        return 1.0 if image.max(initial=0) <= 1 else 255.0
    return 65535.0 if image.dtype.itemsize > 1 else 255.0


def _logits(scores: np.ndarray, kind: str) -> np.ndarray:
    """(K, H, W) float32 scores before softmax."""
    if kind not in KINDS:
        raise ValueError(f"unknown kind of scores {kind!r}. Known: {', '.join(KINDS)}")
    if scores.dtype.kind not in "fiu":
        raise ValueError(f"the scores are {scores.dtype}; give real numbers")
    if scores.dtype.kind == "u" and kind != "logits":
        whole = np.iinfo(scores.dtype).max
        if (abs(scores.sum(0, dtype=np.int64) - whole) > len(scores)).any():
            raise ValueError(
                f"the scores are {scores.dtype} and do not add up to {whole} at every pixel; say kind='logits' if they are logits"
            )
        scores = scores / scores.sum(0, dtype=np.float32)
    values = np.ascontiguousarray(scores, dtype=np.float32)
    if not np.isfinite(values).all():
        raise ValueError(f"{int((~np.isfinite(values)).sum())} scores are NaN or infinite; a refiner takes finite numbers")
    lie_within = values.min() >= 0 and values.max() <= 1.01
    if kind == "probabilities" and not lie_within:
        raise ValueError(f"the scores reach from {values.min():g} to {values.max():g}, which are no probabilities; say kind='logits'")
    if kind == "probabilities" or (kind == "auto" and lie_within and bool((abs(values.sum(0) - 1) <= 0.01).all())):
        return np.log(values.clip(SMALLEST))
    return values
