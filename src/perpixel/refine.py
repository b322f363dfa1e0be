"""Refine: scores from anywhere, together with their image, to better ones. Arrays in, arrays out; or files."""

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import tifffile
import torch
from torch import Tensor

from perpixel.data.display import default_colors
from perpixel.data.images import Picture, find_pictures, read_image
from perpixel.data.writing import refuse_foreign, write_array, write_labels
from perpixel.refinement.refiners import build_refiner

ARRAYS = (".npy", ".npz")
SUFFIXES = (*ARRAYS, ".tif", ".tiff")
KINDS = ("auto", "probabilities", "logits")
SMALLEST = 1e-8  # a probability below this counts as this: its logarithm would be infinite


def refine(
    image: np.ndarray | Path | str,
    scores: np.ndarray | Tensor | Path | str,
    refiner: str = "dense_crf",
    options: Mapping[str, Any] | None = None,
    kind: str = "auto",
) -> np.ndarray:
    """Class probabilities of every pixel after neighbouring pixels have talked.

    Args:
        image: (H, W) or (H, W, C), on the scale of its file: white is 255, or 65535 in uint16, or 1 in floats that do not go beyond it; or
            a file.
        scores: (K, H, W) or (H, W, K), any real type, of two classes or more; or a file, as `read_scores` takes it.
        refiner, options: as in `perpixel.refinement.build_refiner`.
        kind: what the scores are: "probabilities", "logits" (real scores before softmax, or log-probabilities); "auto" takes them for
            probabilities where they lie in 0..1 and add up to 1 (to 1 %) at every pixel, or are uint8 or uint16 and add up to the
            highest value of their type (to K, for rounding); and for logits where one is negative.

    Returns:
        (K, H, W) float32 probabilities; those of the labelling's conditional energies where the refiner has no marginals.

    Raises:
        ValueError: if sizes differ, values are NaN or infinite, their kind can't be told, or the refiner or an option is unknown.
    """
    pixels = np.moveaxis(read_image(Path(image)), 0, -1) if isinstance(image, str | Path) else np.asarray(image)
    given = read_scores(Path(scores)) if isinstance(scores, str | Path) else np.asarray(scores)
    if pixels.ndim not in (2, 3):
        raise ValueError(f"image has shape {pixels.shape}; give (H, W) or (H, W, C)")
    logits = _logits(_classes_first(given, pixels.shape[:2]), kind)
    bands = pixels[None] if pixels.ndim == 2 else np.moveaxis(pixels, -1, 0)
    with torch.inference_mode():
        tensor = torch.from_numpy(np.ascontiguousarray(bands, bands.dtype.newbyteorder("=")))
        refined = build_refiner(refiner, options, _full_scale(bands))(torch.from_numpy(logits)[None], tensor[None])
    return refined[0].softmax(0).numpy()


def refine_files(
    images: Path,
    scores: Path,
    out: Path,
    refiner: str = "dense_crf",
    options: Mapping[str, Any] | None = None,
    kind: str = "auto",
    with_probabilities: bool = False,
) -> list[Path]:
    """Writes OUT/<image name>.png with the class indices, and OUT/probabilities/<image name>.npy (float16) where asked; see `refine`.

    `images` and `scores` are a file each, or a folder each, whose files belong together by their names.

    Raises:
        ValueError: as `refine`; or scores are missing for an image, or two files of a folder have one name, up to its suffix.
    """
    pairs, written = _pairs(images, scores), []
    for image, belonging in pairs:  # all are looked at before the first is refined
        target, shares = _targets(image, out)
        if target.resolve() == image.resolve():
            raise ValueError(f"{target} is the image itself; choose another folder.")
        if with_probabilities and shares.resolve() == belonging.resolve():
            raise ValueError(f"{shares} are the scores themselves; choose another folder.")
        refuse_foreign(target)
    for image, belonging in pairs:
        target, shares = _targets(image, out)
        pixels, given = np.moveaxis(read_image(image), 0, -1), read_scores(belonging)
        try:
            probabilities = refine(pixels, given, refiner, options, kind)
        except ValueError as error:
            raise ValueError(f"{image} with {belonging}: {error}") from None
        labels = probabilities.argmax(0)
        labels = labels.astype(np.uint8 if len(probabilities) <= 255 else np.uint16)
        write_labels(target, labels, default_colors(len(probabilities)), predicted=True)
        if with_probabilities:
            write_array(shares, probabilities.astype(np.float16))
        written.append(target)
    return written


def _targets(image: Path, out: Path) -> tuple[Path, Path]:
    """Where labels and probabilities go."""
    return out / f"{image.stem}.png", out / "probabilities" / f"{image.stem}.npy"


def _pairs(images: Path, scores: Path) -> list[tuple[Path, Path]]:
    if images.suffix.lower() in ARRAYS:
        raise ValueError(f"{images} holds no image but numbers: swapped? The image comes first: perpixel refine {scores} {images}")
    if not images.is_dir() and not scores.is_dir():
        return [(images, scores)]
    if not (images.is_dir() and scores.is_dir()):
        if images.is_file():
            _refuse_pages(find_pictures([images]))
        raise ValueError(f"{images} and {scores}: give two files, or two folders whose files have the same names")
    pictures = find_pictures([images])
    _refuse_pages(pictures)
    by_name = _by_stem(picture.path for picture in pictures)
    scored = _by_stem(path for path in sorted(scores.iterdir()) if path.suffix.lower() in SUFFIXES)
    if missing := [path.name for stem, path in by_name.items() if stem not in scored]:
        raise ValueError(f"{scores}: no scores ({', '.join(SUFFIXES)}) for {len(missing)} of {len(by_name)} images, such as {missing[0]}")
    return [(path, scored[stem]) for stem, path in by_name.items()]


def _refuse_pages(pictures: Iterable[Picture]) -> None:
    if pages := [str(picture) for picture in pictures if picture.page is not None]:
        raise ValueError(f"{pages[0]} and {pages[1]} are pages of one file, and refine takes one image a file: save each page as its own")


def _by_stem(paths: Iterable[Path]) -> dict[str, Path]:
    found: dict[str, Path] = {}
    for path in paths:
        if (other := found.setdefault(path.stem, path)) != path:
            raise ValueError(f"{other} and {path} have one name, '{path.stem}', and files belong together by it: rename or remove one")
    return found


def read_scores(path: Path) -> np.ndarray:
    """The one array in a .npy, .npz or multi-band TIFF file; nothing is unpickled.

    Raises:
        ValueError: naming the file, if it is missing, damaged, of another kind, or holds several arrays.
    """
    if not path.is_file():
        raise ValueError(f"{path}: no such file. Scores are a .npy, .npz or multi-band TIFF file")
    kind = path.suffix.lower()
    if kind not in SUFFIXES:
        raise ValueError(f"{path}: scores are a .npy, .npz or multi-band TIFF file, not '{kind}'")
    try:
        content = tifffile.imread(path) if kind.startswith(".tif") else np.load(path, allow_pickle=False)
        if not isinstance(content, np.lib.npyio.NpzFile):
            return np.asarray(content)
        arrays = {name: content[name] for name in content.files}
    except Exception:  # whatever a damaged file makes of the readers; NumPy's advice is to unpickle it
        raise ValueError(f"{path}: no array of numbers could be read from it: it is damaged, cut short, or of another kind") from None
    if len(arrays) != 1:
        raise ValueError(f"{path}: it holds {len(arrays)} arrays ({', '.join(arrays)}), and scores are one")
    return next(iter(arrays.values()))


def _classes_first(scores: np.ndarray, size: tuple[int, ...]) -> np.ndarray:
    if scores.ndim == 3 and scores.shape[1:] == size:
        return scores
    if scores.ndim == 3 and scores.shape[:2] == size:
        return np.moveaxis(scores, -1, 0)
    way = "(K, H, W) or (H, W, K) of its size fit"
    if scores.shape == size:
        way = "scores of two classes are np.stack([1 - p, p])"
    elif scores.ndim == 3 and size[::-1] in (scores.shape[1:], scores.shape[:2]):
        way = "height and width are the wrong way round: transpose the scores"
    raise ValueError(f"the scores have shape {scores.shape} and the image {size[0]}x{size[1]} pixels (height x width); {way}")


def _full_scale(image: np.ndarray) -> float:
    if image.dtype.kind == "f":
        return 1.0 if image.max(initial=0) <= 1 else 255.0
    return 65535.0 if image.dtype.newbyteorder("=") == np.uint16 else 255.0


def _logits(scores: np.ndarray, kind: str) -> np.ndarray:
    """(K, H, W) float32 scores before softmax."""
    if kind not in KINDS:
        raise ValueError(f"unknown kind of scores {kind!r}. Known: {', '.join(KINDS)}")
    if scores.dtype.kind not in "fiu":
        raise ValueError(f"the scores are {scores.dtype}; give real numbers")
    if len(scores) < 2:
        raise ValueError("the scores are of one class, which leaves nothing to choose; scores of two classes are np.stack([1 - p, p])")
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
        raise ValueError(f"the scores reach from {values.min():g} to {values.max():g}, which are no probabilities; these lie in 0..1")
    if kind == "probabilities" or (kind == "auto" and lie_within and bool((abs(values.sum(0) - 1) <= 0.01).all())):
        return np.log(values.clip(SMALLEST))
    if kind == "auto" and values.min() >= 0:
        raise ValueError(
            f"the scores reach from {values.min():g} to {values.max():g} and are no probabilities, as they do not add up to 1 at every "
            "pixel: divide them by their sum, or say that they are logits (kind='logits', on the command line --kind logits)"
        )
    return values
