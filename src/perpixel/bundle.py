"""A bundle: one safetensors file with the weights and, as metadata, everything that prediction needs.

Nothing is unpickled, ever. The metadata is one JSON text under the key `perpixel`.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from pydantic import BaseModel, ConfigDict, ValidationError
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from perpixel.data.masks import LabelMap
from perpixel.data.transforms import Normalize
from perpixel.data.writing import replacing
from perpixel.models import build
from perpixel.models.model import SegmentationModel

FORMAT = 1  # raised when an older perpixel could not read what this one writes


class Card(BaseModel):
    """The metadata of a bundle, in plain JSON types."""

    model_config = ConfigDict(extra="ignore")  # a newer minor version may say more; FORMAT guards what matters

    format: int = FORMAT
    perpixel: str = ""
    model: str
    encoder: str | None = None
    options: dict[str, Any] = {}
    bands: int
    dtype: str
    mean: list[float]
    std: list[float]
    classes: list[str]
    colors: list[tuple[int, int, int]]
    label_map: dict[str, Any]
    tile: int
    overlap: int


@dataclass
class Bundle:
    """A model ready to predict, and what is known of its data."""

    model: SegmentationModel
    card: Card

    @property
    def normalize(self) -> Normalize:
        return Normalize(SCALE[self.card.dtype], tuple(self.card.mean), tuple(self.card.std))

    @property
    def label_map(self) -> LabelMap:
        return LabelMap.from_dict(self.card.label_map)


SCALE = {"uint8": 255.0, "uint16": 65535.0, "float32": 1.0}  # where an integer image becomes float, its full range becomes 0..1


def save_tensors(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> None:
    """Writes a safetensors file under a temporary name and renames it: a killed process leaves the old file whole."""
    own = {name: tensor.detach().cpu().contiguous().clone() for name, tensor in tensors.items()}
    with replacing(path) as temporary:
        save_file(own, temporary, dict(metadata))


def save_bundle(path: Path, weights: Mapping[str, Tensor], card: Card) -> None:
    """Writes weights (a model's state dict) and card as one file, atomically."""
    save_tensors(path, weights, {"perpixel": card.model_dump_json()})


def read_tensors(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Tensors and metadata of a safetensors file.

    Raises:
        ValueError: missing, truncated, or another kind of file (a pickle is refused, never executed).
    """
    if not path.is_file():
        raise ValueError(f"{path}: no such file. A bundle is written by `perpixel train` as RUN/best.safetensors.")
    try:
        with safe_open(path, framework="pt") as file:
            return {name: file.get_tensor(name) for name in file.keys()}, dict(file.metadata() or {})  # noqa: SIM118 safe_open is no dict
    except (SafetensorError, OSError) as error:
        with path.open("rb") as raw:
            head = raw.read(4)
        pickled = head[:2] in (b"\x80\x02", b"\x80\x03", b"\x80\x04", b"\x80\x05") or head == b"PK\x03\x04"
        why = "it looks like a pickle, which perpixel never executes" if pickled else f"it is damaged or cut short ({error})"
        raise ValueError(f"{path}: not a bundle: {why}. A bundle is written by `perpixel train` as RUN/best.safetensors.") from None


def read_card(path: Path, metadata: Mapping[str, str]) -> Card:
    """The card in a bundle's metadata; ValueError where there is none, or a newer perpixel wrote it."""
    if "perpixel" not in metadata:
        raise ValueError(f"{path}: not a bundle: safetensors without perpixel's metadata. A bundle is written by `perpixel train`.")
    try:
        raw = json.loads(metadata["perpixel"])
        if int(raw.get("format", 0)) > FORMAT:
            raise ValueError(
                f"{path}: made by perpixel {raw.get('perpixel', '?')} (bundle format {raw['format']}); this one reads up to format {FORMAT}. "
                "Update perpixel: python -m pip install --upgrade perpixel"
            )
        return Card.model_validate(raw)
    except (ValidationError, json.JSONDecodeError, AttributeError, TypeError) as error:
        raise ValueError(f"{path}: the bundle's metadata is damaged: {error}") from None


def load_bundle(path: Path, device: str | torch.device = "cpu") -> Bundle:
    """The model of a bundle in eval mode on `device`, with its card.

    Raises:
        ValueError: not a bundle, truncated, from a newer version, or weights that do not belong to its model.
    """
    tensors, metadata = read_tensors(Path(path))
    card = read_card(path, metadata)
    model = build(card.model, len(card.classes), encoder=card.encoder, in_channels=card.bands, **card.options)
    try:
        model.load_state_dict(tensors)
    except RuntimeError as error:
        raise ValueError(f"{path}: the weights do not belong to the model '{card.model}' that the bundle names: {error}") from None
    return Bundle(model.eval().to(device).to(memory_format=torch.channels_last), card)
