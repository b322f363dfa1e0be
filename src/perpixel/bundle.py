"""A bundle: one safetensors file with the weights and, as metadata, everything that prediction needs.

Nothing is unpickled, ever. The metadata is one JSON text under the key `perpixel`.
"""

import hashlib
import json
import math
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
from pydantic import BaseModel, ConfigDict, Field, ValidationError, ValidationInfo, field_validator
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from perpixel.data.images import FULL_SCALE
from perpixel.data.masks import IGNORE, LabelMap
from perpixel.data.transforms import Normalize
from perpixel.data.writing import replacing
from perpixel.models import build
from perpixel.models.encoders import fit_bands
from perpixel.models.importing import import_weights
from perpixel.models.model import SegmentationModel
from perpixel.paths import WRITTEN, refuse_no_bundle

__all__ = [
    "Bundle",
    "Card",
    "import_weights",
    "load_bundle",
    "read_card",
    "read_tensors",
    "save_bundle",
    "save_tensors",
    "start_from_bundle",
]

FORMAT = 1  # raised when an older perpixel could not read what this one writes
LINES = "watershed"  # a refiner that leaves scores as they are, but for thin lines
Byte = Annotated[int, Field(ge=0, le=255)]


class RefinerCard(BaseModel):
    """The refiner that tuning found for a model, and what it showed on the validation images; or one put there in Python."""

    model_config = ConfigDict(extra="ignore")

    name: str
    options: dict[str, Any] = {}
    gain: dict[str, Any] = {}  # the score before and after, and the interval of the difference


class TemperatureCard(BaseModel):
    """The number that scores are divided by before softmax, so that probabilities mean what they say; fitted on validation images."""

    model_config = ConfigDict(extra="ignore")

    value: float = Field(gt=0, allow_inf_nan=False)
    images: int = 0  # that it was fitted on


class Card(BaseModel):
    """The metadata of a bundle, in plain JSON types."""

    model_config = ConfigDict(extra="ignore")  # a newer minor version may say more; FORMAT guards what matters

    format: int = FORMAT
    perpixel: str = ""
    model: str
    encoder: str | None = None
    options: dict[str, Any] = {}
    bands: int
    dtype: Literal["uint8", "uint16", "float32"]
    mean: list[float]
    std: list[float]
    classes: list[str]
    colors: list[tuple[Byte, Byte, Byte]]
    label_map: dict[str, Any]
    tile: int = Field(ge=1)
    overlap: int | Literal["exact"]
    val_fraction: float = 0.2  # how a set without parts was split, so that it can be split alike for scoring
    split_seed: int = 0
    refiner: RefinerCard | None = None
    temperature: TemperatureCard | None = None  # of the scores as the refiner above leaves them, but for a watershed's lines

    @field_validator("colors")
    @classmethod
    def _of_every_class(cls, colors: list[tuple[int, int, int]], info: ValidationInfo) -> list[tuple[int, int, int]]:
        classes = info.data.get("classes", colors)  # missing where they are damaged themselves
        if len(colors) != len(classes):
            raise ValueError(f"{len(colors)} for {len(classes)} classes; legal is one for each")
        return colors

    @property
    def refiner_name(self) -> str:
        """Of the refiner that the bundle carries; "none" where it has none."""
        return "none" if self.refiner is None else self.refiner.name


@dataclass
class Bundle:
    """A model ready to predict, and what is known of its data."""

    model: SegmentationModel
    card: Card
    _digest: tuple[str, list[tuple[int, int]]] | None = field(default=None, init=False, repr=False, compare=False)

    def digest(self) -> str:
        """Of the weights as they are now, see `digest_of`; taken anew only where PyTorch has counted a change since."""
        tensors = self.model.state_dict()
        marks = [(tensor.data_ptr(), tensor._version) for tensor in tensors.values()]
        if self._digest is None or self._digest[1] != marks:
            self._digest = digest_of({name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}), marks
        return self._digest[0]

    @property
    def normalize(self) -> Normalize:
        return Normalize(FULL_SCALE[self.card.dtype], tuple(self.card.mean), tuple(self.card.std))

    @property
    def label_map(self) -> LabelMap:
        return LabelMap.from_dict(self.card.label_map)

    def saw_above(self, share: float) -> bool:
        """Whether the training images surely held values above `share` of their range.

        Of values in 0..m, mean + deviation is (1 + sqrt 2) / 2 * m at most: where (2 + sqrt 2) / 4 of them are m and all others 0. A
        deviation above half of the range stands for none (a band that never changed).
        """
        most = share * (1 + math.sqrt(2)) / 2
        return any(mean + (std if std <= 0.5 else 0) > most for mean, std in zip(self.card.mean, self.card.std, strict=True))

    def relabelled(self, labels: Mapping[int, int]) -> LabelMap:
        """The bundle's own label map, with `labels` (mask value -> class index, or 255 to ignore) over it; ValueError for another class."""
        own, last = self.label_map, len(self.card.classes) - 1
        for value, label in labels.items():
            if label not in (*range(last + 1), IGNORE, own.ignore):
                raise ValueError(
                    f"label {value}={label}: the bundle has no class {label}, only 0 to {last}. Give one of these, or 'ignore'."
                )
        given = {value: own.ignore if label == IGNORE and last < IGNORE else label for value, label in labels.items()}
        return LabelMap({**own.values, **given}, own.rgb, own.nearest, own.ignore)

    @property
    def full_scale(self) -> float:
        """The stored value that stands for 1.0 in this model's images; of floats that leave 0..1, four of their standard deviations."""
        card = self.card
        if card.dtype == "float32" and max(mean + std for mean, std in zip(card.mean, card.std, strict=True)) > 1:
            return 4 * max(card.std)
        return FULL_SCALE[card.dtype]

    def refiner(self, choice: str = "bundle") -> nn.Module | None:
        """The refiner for this model's scores, on its device.

        Args:
            choice: "bundle": the one that it carries, if any; "none"; or the name of one, with its default options.

        Raises:
            ValueError: for an unknown name, or a bundle whose refiner can't be built.
        """
        if choice == "none":
            return None
        if choice != "bundle":
            return self.built_refiner(choice, {})
        own = self.card.refiner
        return None if own is None else self.built_refiner(own.name, own.options)

    def built_refiner(self, name: str, options: Mapping[str, Any]) -> nn.Module:
        """Any refiner for this model's scores, on its device; options that are not given suit its images and its temperature.

        Raises:
            ValueError: for an unknown name or option, or an illegal value.
        """
        from perpixel.refinement.refiners import build_refiner  # its compiled loops take as long to load as a small prediction takes

        own = {"temperature": self.temperature(name)} if name == LINES else {}
        return build_refiner(name, {**own, **options}, self.full_scale).to(next(self.model.parameters()).device)

    def refiner_words(self, choice: str = "bundle") -> str:
        """What `refiner` gives, for people: "none", or its name and where its options come from."""
        if choice == "bundle" and self.card.refiner is not None:
            return f"{self.card.refiner.name}, as {'`perpixel tune` found it' if self.card.refiner.gain else 'the bundle has it'}"
        return "none" if choice in ("bundle", "none") else f"{choice}, with its defaults"

    def temperature(self, choice: str = "bundle") -> float:
        """What to divide scores by before softmax; 1 where nothing was fitted, or not for scores refined by `choice` (see `refiner`)."""
        fitted = choice == "bundle" or {choice, self.card.refiner_name} <= {"none", LINES}
        return self.card.temperature.value if fitted and self.card.temperature is not None else 1.0


def save_tensors(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> None:
    """Writes a safetensors file under a temporary name and renames it: a killed process leaves the old file whole."""
    own = {name: tensor.detach().cpu().contiguous().clone() for name, tensor in tensors.items()}
    with replacing(path) as temporary:
        try:
            save_file(own, temporary, dict(metadata))
        except SafetensorError as error:  # no OSError, and the system's error number only in its text
            number = re.search(r"os error (\d+)", str(error))
            raise OSError(int(number[1]) if number else 0, str(error), str(path)) from error


def save_bundle(path: Path, weights: Mapping[str, Tensor], card: Card) -> None:
    """Writes weights (a model's state dict) and card as one file, atomically; a link stays one, and what it leads to is replaced.

    Raises:
        ValueError: for a card with a value of the wrong kind, or more or fewer colours than classes; nothing is written then.
    """
    try:
        card = Card.model_validate(card.model_dump(warnings=False))  # it may have been changed in Python since it was checked
    except ValidationError as error:
        raise ValueError(f"{path}: not written: the card's {_first_of(error)}") from None
    own = {name: tensor.detach().cpu().contiguous() for name, tensor in weights.items()}  # once, for digest and file
    save_tensors(Path(os.path.realpath(path)), own, {"perpixel": card.model_dump_json(), "digest": digest_of(own)})


def _first_of(error: ValidationError) -> str:
    """The first thing wrong, with its key."""
    first = error.errors()[0]
    return f"{'.'.join(str(part) for part in first['loc'])}: {first['msg']}"


def start_from_bundle(model: SegmentationModel, path: Path) -> list[str]:
    """Gives `model` every weight of a bundle that it has in the same shape, in place; training goes on from there.

    A first convolution on 3 bands is averaged and rescaled for another number (`models.encoders.fit_bands`).

    Returns:
        Names of the model's tensors that the bundle does not have so, and that stay as they are: the classifier, where the number of
        classes differs, or parts that the bundle's model was built without.

    Raises:
        ValueError: as `load_bundle`; and if the bundle lacks a part of the encoder, so that it is another network's.
    """
    tensors = dict(load_bundle(path).model.state_dict())
    own = model.state_dict()
    for name, value in own.items():
        bands = name in tensors and value.ndim == 4 and tensors[name].shape[1] == 3 and tensors[name].shape[::2] == value.shape[::2]
        if name.startswith("encoder.") and bands:
            tensors[name] = fit_bands(tensors[name], value, name)
    stay = [name for name, value in own.items() if name not in tensors or tensors[name].shape != value.shape]
    if other := [name for name in stay if name.startswith("encoder.")]:
        there = f"{tuple(tensors[other[0]].shape)}" if other[0] in tensors else "nothing"
        raise ValueError(
            f"{path}: another encoder's weights: it has {there} where this model has {other[0]} of {tuple(own[other[0]].shape)}; "
            "leave model.name, model.encoder and model.options to the bundle"
        )
    with torch.no_grad():
        for name in own.keys() - set(stay):
            own[name].copy_(tensors[name])
    return stay


def digest_of(tensors: Mapping[str, Tensor]) -> str:
    """Of names and bytes of contiguous tensors on the CPU, in any order: the format sees a file cut short, not a changed byte."""
    digest = hashlib.blake2b(digest_size=16)
    for name in sorted(tensors):
        digest.update(name.encode())
        digest.update(tensors[name].reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def read_tensors(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Tensors and metadata of a safetensors file.

    Raises:
        ValueError: missing, truncated, or another kind of file (a pickle is refused, never executed).
    """
    refuse_no_bundle(path)
    try:
        with safe_open(path, framework="pt") as file:
            return {name: file.get_tensor(name) for name in file.keys()}, dict(file.metadata() or {})  # noqa: SIM118 safe_open is no dict
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{path}: not a bundle: it is damaged or cut short ({error}). {WRITTEN}") from None


def read_card(path: Path, metadata: Mapping[str, str]) -> Card:
    """The card in a bundle's metadata; ValueError where there is none, or a newer perpixel wrote it."""
    if "perpixel" not in metadata:
        raise ValueError(f"{path}: not a bundle: safetensors without perpixel's metadata. {WRITTEN}")
    try:
        raw = json.loads(metadata["perpixel"])
        made_by, number = raw.get("perpixel", "?"), int(raw.get("format", FORMAT))
        card = Card.model_validate(raw) if number <= FORMAT else None
    except ValidationError as error:
        raise ValueError(f"{path}: the bundle's metadata is damaged: {_first_of(error)}") from None
    except (ValueError, AttributeError, TypeError) as error:
        raise ValueError(f"{path}: the bundle's metadata is damaged: {error}") from None
    if card is None:
        raise ValueError(
            f"{path}: made by perpixel {made_by} (bundle format {number}); this one reads up to format {FORMAT}. "
            "Update perpixel: python -m pip install --upgrade perpixel"
        )
    return card


def load_bundle(path: Path, device: str | torch.device = "cpu") -> Bundle:
    """The model of a bundle in eval mode on `device`, with its card.

    Raises:
        ValueError: not a bundle, truncated, damaged, from a newer version, or weights that do not belong to its model.
    """
    tensors, metadata = read_tensors(Path(path))
    card = read_card(path, metadata)
    digest = digest_of(tensors)
    if metadata.get("digest", digest) != digest:
        raise ValueError(f"{path}: the weights are damaged: their bytes are not those that were written. Copy the file anew")
    if card.options.get("encoder_weights"):  # would open a file or download one
        raise ValueError(f"{path}: the bundle's metadata is damaged: options.encoder_weights: a bundle holds its weights itself")
    try:
        model = build(card.model, len(card.classes), encoder=card.encoder, in_channels=card.bands, **card.options)
        bundle = Bundle(model, card)
        _ = bundle.normalize, bundle.label_map  # refuse illegal values now, not in the middle of a folder of images
    except (ValueError, TypeError, RuntimeError) as error:
        raise ValueError(f"{path}: the model or data that the bundle describes can't be made: {error}") from None
    try:
        model.load_state_dict(tensors)
    except RuntimeError as error:
        told = " ".join(str(error).split())[:300]  # PyTorch lists every key
        raise ValueError(f"{path}: the weights do not belong to the model '{card.model}' that the bundle names: {told}") from None
    model.eval().to(device).to(memory_format=torch.channels_last)
    return bundle
