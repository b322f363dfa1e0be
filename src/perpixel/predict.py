"""From image files to label files, in the eight steps of docs/pipeline.md."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from perpixel.bundle import Bundle, load_bundle
from perpixel.data.dataset import conform
from perpixel.data.display import overlay
from perpixel.data.images import Picture, find_pictures, read_image
from perpixel.data.writing import write_array, write_labels, write_rgb
from perpixel.models.model import SegmentationModel
from perpixel.models.monte_carlo import MonteCarlo, active_dropouts, monte_carlo
from perpixel.tiling import predict_tiled

Progress = Callable[[int, int, str], None]  # (done, of, what)


class Segmenter:
    """A bundle in use: `perpixel.load("RUN/best.safetensors").predict("photo.jpg")`."""

    def __init__(self, bundle: Bundle, refine: str = "bundle") -> None:
        self.bundle, self.refiner, self.temperature = bundle, bundle.refiner(refine), bundle.temperature(refine)

    @property
    def classes(self) -> list[str]:
        """Names of the classes, in the order of the indices that `predict` returns."""
        return self.bundle.card.classes

    @property
    def colors(self) -> list[tuple[int, int, int]]:
        """RGB colours of the classes, 0..255."""
        return self.bundle.card.colors

    def logits(self, image: np.ndarray | Tensor | Path | str) -> Tensor:
        """(K, H, W) float32 real scores before softmax, at exactly the image's size, whatever its size; refined where there is a refiner.

        Args:
            image: a file; an array (H, W) or (H, W, C); or a tensor (C, H, W); uint8, uint16 or floats 0..1.

        Raises:
            ValueError: unreadable file, or bands that differ from those the model was trained on.
        """
        return self._logits(*_read(image))

    @torch.inference_mode()
    def _logits(self, pixels: np.ndarray, source: str) -> Tensor:
        """Logits of pixels (C, H, W) as `read_image` gives them (step 1); `source` names them in errors."""
        return self._refined(self._stitched(self.bundle.model, self._normalized(pixels, source)), pixels)

    def _refined(self, logits: Tensor, pixels: np.ndarray) -> Tensor:
        if self.refiner is None:
            return logits
        card = self.bundle.card
        image = torch.from_numpy(conform(pixels, card.bands, card.dtype, "image"))
        refined: Tensor = self.refiner(logits[None], image[None])[0]  # 6 refine
        return refined

    def _normalized(self, pixels: np.ndarray, source: str) -> Tensor:
        card, model = self.bundle.card, self.bundle.model
        pixels = conform(pixels, card.bands, card.dtype, source)
        return self.bundle.normalize(torch.from_numpy(pixels).to(next(model.parameters()).device))  # 2 normalise

    def _stitched(self, model: SegmentationModel, image: Tensor) -> Tensor:
        return predict_tiled(model, image, self.bundle.card.tile, self.bundle.card.overlap).float()  # 3 tile, 4 model, 5 stitch

    def monte_carlo(self, image: np.ndarray | Tensor | Path | str, samples: int, seed: int = 0) -> MonteCarlo:
        """Mean and variance of the probabilities, (K, H, W) each, over `samples` predictions with dropout on; see `models.monte_carlo`.

        They are not refined: a refiner works on scores, and what the samples disagree about would be smoothed away.

        Its `uncertainty` (H, W) is the mean of the variance over the classes.

        Raises:
            ValueError: as `logits`, and where the model has no dropout or `samples` is less than 1.
        """
        return self._monte_carlo(*_read(image), samples, seed)

    def _monte_carlo(self, pixels: np.ndarray, source: str, samples: int, seed: int = 0) -> MonteCarlo:
        return monte_carlo(self.bundle.model, self._normalized(pixels, source), samples, seed, self._stitched)  # not refined

    def probabilities(self, image: np.ndarray | Tensor | Path | str) -> np.ndarray:
        """(K, H, W) float32 softmax probabilities, at the temperature that the bundle was calibrated to; see `logits`."""
        return (self.logits(image) / self.temperature).softmax(0).cpu().numpy()

    def predict(self, image: np.ndarray | Tensor | Path | str, samples: int | None = None) -> np.ndarray:
        """(H, W) class indices, uint8 (uint16 above 255 classes); see `logits`, and `monte_carlo` for `samples`."""
        return self._labels(self.logits(image) if samples is None else self.monte_carlo(image, samples).mean)

    def _labels(self, scores: Tensor) -> np.ndarray:
        return scores.argmax(0).cpu().numpy().astype(np.uint8 if len(self.classes) <= 255 else np.uint16)  # 7 argmax


def load(bundle: Path | str, device: str | None = None, refine: str = "bundle") -> Segmenter:
    """A segmenter from a bundle file, on the GPU where there is one unless `device` says otherwise.

    `refine`: "bundle": its scores are refined as `perpixel tune` found best, if it did; "none"; or the name of a refiner.

    Raises:
        ValueError: not a bundle, truncated, a pickle, or from a newer perpixel.
    """
    return Segmenter(load_bundle(Path(bundle), device or ("cuda" if torch.cuda.is_available() else "cpu")), refine)


@dataclass
class Predicted:
    """What a run of `predict_files` wrote."""

    written: list[Path] = field(default_factory=list)
    damaged: dict[str, str] = field(default_factory=dict)  # file -> why there is no prediction for it


def predict_files(
    segmenter: Segmenter,
    inputs: Sequence[str | Path],
    out: Path,
    *,
    with_overlay: bool = False,
    with_probabilities: bool = False,
    samples: int | None = None,
    progress: Progress | None = None,
) -> Predicted:
    """Writes OUT/<name>.png with class indices and the classes' palette for each picture of files, folders, globs and stacks.

    Args:
        with_overlay: also OUT/overlays/<name>.jpg, the labels' colours over the image.
        with_probabilities: also OUT/probabilities/<name>.npy, (K, H, W) float16.
        samples: labels and probabilities from the mean of so many predictions with dropout on; also OUT/uncertainty/<name>.npy,
            (H, W) float16, the variance of the probabilities, mean over the classes.

    Returns:
        The label images written, and the damaged inputs, which are named and left out: one bad file does not stop the others.

    Raises:
        ValueError: no pictures, two that would be written to the same file, one that would overwrite an input, or `samples` of a
            model without dropout.
        OSError: the disk is full.
    """
    result = Predicted()
    if samples is not None:
        active_dropouts(segmenter.bundle.model)
    pictures = find_pictures(inputs)
    _refuse_collisions(pictures, out)
    for done, picture in enumerate(pictures, 1):
        try:
            image = read_image(picture)  # 1 read
            sampled = None if samples is None else segmenter._monte_carlo(image, str(picture), samples)
            scores = segmenter._logits(image, str(picture)) if sampled is None else sampled.mean
        except ValueError as error:
            result.damaged[str(picture)] = str(error)
        else:
            labels = segmenter._labels(scores)
            target = out / f"{picture.name}.png"
            write_labels(target, labels, segmenter.colors)  # 8 write
            if with_overlay:
                unseen = int(np.iinfo(labels.dtype).max)  # a prediction ignores nothing
                write_rgb(out / "overlays" / f"{picture.name}.jpg", overlay(image, labels, segmenter.colors, ignore=unseen))
            if with_probabilities:
                probabilities = (scores / segmenter.temperature).softmax(0) if sampled is None else scores
                write_array(out / "probabilities" / f"{picture.name}.npy", probabilities.half().cpu().numpy())
            if sampled is not None:
                write_array(out / "uncertainty" / f"{picture.name}.npy", sampled.uncertainty.half().cpu().numpy())
            result.written.append(target)
        if progress is not None:
            progress(done, len(pictures), picture.name)
    return result


def _read(image: np.ndarray | Tensor | Path | str) -> tuple[np.ndarray, str]:
    """Pixels (C, H, W), and what names them in errors."""
    if isinstance(image, str | Path):
        return read_image(Path(image)), str(image)
    return _as_bands(image), "image"


def _as_bands(image: np.ndarray | Tensor) -> np.ndarray:
    """(C, H, W) from an array (H, W) or (H, W, C), or a tensor (C, H, W)."""
    if isinstance(image, Tensor):
        if image.ndim != 3:
            raise ValueError(f"a tensor image must be (C, H, W), got {tuple(image.shape)}")
        array = image.cpu().numpy()
    elif image.ndim == 2:
        array = image[None]
    elif image.ndim == 3:
        array = np.moveaxis(image, -1, 0)
    else:
        raise ValueError(f"an array image must be (H, W) or (H, W, C), got {image.shape}")
    if 0 in array.shape:
        raise ValueError(f"the image has no pixels: its shape is {tuple(image.shape)}")
    if array.dtype == bool:
        array = array.astype(np.uint8) * 255
    if array.dtype not in (np.uint8, np.uint16):
        array = array.astype(np.float32)
        if not np.isfinite(array).all():
            raise ValueError(f"the image has {int((~np.isfinite(array)).sum())} values that are NaN or infinite; replace them first")
    return np.ascontiguousarray(array)


def _refuse_collisions(pictures: Sequence[Picture], out: Path) -> None:
    seen: dict[str, Picture] = {}
    inputs = {picture.path.resolve() for picture in pictures}
    for picture in pictures:
        if (out / f"{picture.name}.png").resolve() in inputs:
            raise ValueError(
                f"{out / picture.name}.png is an input, and the labels of {picture} would overwrite it; choose another folder."
            )
        if picture.name in seen:
            both = f"{seen[picture.name]} and {picture}"
            raise ValueError(f"{both} would both be written to {out / picture.name}.png; predict them into two folders.")
        seen[picture.name] = picture
