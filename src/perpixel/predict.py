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
from perpixel.data.writing import replacing, write_labels, write_rgb
from perpixel.tiling import predict_tiled

Progress = Callable[[int, int, str], None]  # (done, of, what)


class Segmenter:
    """A bundle in use: `perpixel.load("RUN/best.safetensors").predict("photo.jpg")`."""

    def __init__(self, bundle: Bundle) -> None:
        self.bundle = bundle

    @property
    def classes(self) -> list[str]:
        """Names of the classes, in the order of the indices that `predict` returns."""
        return self.bundle.card.classes

    @property
    def colors(self) -> list[tuple[int, int, int]]:
        """RGB colours of the classes, 0..255."""
        return self.bundle.card.colors

    @torch.inference_mode()
    def logits(self, image: np.ndarray | Tensor | Path | str) -> Tensor:
        """(K, H, W) float32 real scores before softmax, at exactly the image's size, whatever its size.

        Args:
            image: a file; an array (H, W) or (H, W, C); or a tensor (C, H, W); uint8, uint16 or floats 0..1.

        Raises:
            ValueError: unreadable file, or bands that differ from those the model was trained on.
        """
        card = self.bundle.card
        pixels = read_image(Path(image)) if isinstance(image, str | Path) else _as_bands(image)  #                       1 read
        pixels = conform(pixels, card.bands, card.dtype, str(image) if isinstance(image, str | Path) else "image")
        device = next(self.bundle.model.parameters()).device
        normalized = self.bundle.normalize(torch.from_numpy(pixels).to(device))  #                                       2 normalise
        return predict_tiled(
            self.bundle.model, normalized, card.tile, card.overlap
        ).float()  #                          3-5 tile, model, stitch

    def probabilities(self, image: np.ndarray | Tensor | Path | str) -> np.ndarray:
        """(K, H, W) float32 softmax probabilities; see `logits`."""
        return self.logits(image).softmax(0).cpu().numpy()

    def predict(self, image: np.ndarray | Tensor | Path | str) -> np.ndarray:
        """(H, W) class indices, uint8 (uint16 above 255 classes); see `logits`."""
        return self._labels(self.logits(image))

    def _labels(self, logits: Tensor) -> np.ndarray:
        return logits.argmax(0).cpu().numpy().astype(np.uint8 if len(self.classes) <= 255 else np.uint16)  #             7 argmax


def load(bundle: Path | str, device: str | None = None) -> Segmenter:
    """A segmenter from a bundle file, on the GPU where there is one unless `device` says otherwise.

    Raises:
        ValueError: not a bundle, truncated, a pickle, or from a newer perpixel.
    """
    return Segmenter(load_bundle(Path(bundle), device or ("cuda" if torch.cuda.is_available() else "cpu")))


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
    progress: Progress | None = None,
) -> Predicted:
    """Writes OUT/<name>.png with class indices and the classes' palette for each picture of files, folders, globs and stacks.

    Args:
        with_overlay: also OUT/overlays/<name>.jpg, the labels' colours over the image.
        with_probabilities: also OUT/probabilities/<name>.npy, (K, H, W) float16.

    Returns:
        The label images written, and the damaged inputs, which are named and left out: one bad file does not stop the others.

    Raises:
        ValueError: no pictures, or two that would be written to the same file. OSError: the disk is full.
    """
    result = Predicted()
    pictures = find_pictures(inputs)
    _refuse_collisions(pictures, out)
    for done, picture in enumerate(pictures):
        try:
            image = read_image(picture)
            logits = segmenter.logits(torch.from_numpy(image))
        except ValueError as error:
            message = str(error)
            result.damaged[str(picture)] = message if str(picture) in message else f"{picture}: {message}"
            continue
        labels = segmenter._labels(logits)
        target = out / f"{picture.name}.png"
        target.parent.mkdir(parents=True, exist_ok=True)
        write_labels(target, labels, segmenter.colors)  #                                                                8 write
        if with_overlay:
            write_rgb(_beside(out, "overlays", picture, ".jpg"), overlay(image, labels, segmenter.colors))
        if with_probabilities:
            _write_array(_beside(out, "probabilities", picture, ".npy"), logits.softmax(0).half().cpu().numpy())
        result.written.append(target)
        if progress is not None:
            progress(done + 1, len(pictures), picture.name)
    return result


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
    for picture in pictures:
        if picture.name in seen:
            both = f"{seen[picture.name]} and {picture}"
            raise ValueError(f"{both} would both be written to {out / picture.name}.png; predict them into two folders.")
        seen[picture.name] = picture


def _beside(out: Path, folder: str, picture: Picture, suffix: str) -> Path:
    path = out / folder / f"{picture.name}{suffix}"
    path.parent.mkdir(parents=True, exist_ok=True)
    return path


def _write_array(path: Path, array: np.ndarray) -> None:
    with replacing(path) as temporary, temporary.open("wb") as file:
        np.save(file, array)
