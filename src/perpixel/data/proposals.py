"""What do the values of these masks mean? Counts them, weighs the evidence, proposes a label map with reasons."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from perpixel.data.images import Picture
from perpixel.data.masks import LabelMap


@dataclass(frozen=True)
class Proposal:
    """A label map and why."""

    label_map: LabelMap
    encoding: str
    reasons: tuple[str, ...]
    problems: tuple[str, ...]  # training cannot start; each says what to do
    names: tuple[str, ...]
    colors: tuple[tuple[int, int, int], ...]


def propose_label_map(
    counts: Mapping[int, int],
    *,
    rgb: bool = False,
    damaged: bool = False,
    names: Sequence[str] | None = None,
    colors: Sequence[tuple[int, int, int]] | None = None,
    overrides: Mapping[int, int] | None = None,
    palette: Sequence[tuple[int, int, int]] | None = None,
    thin: frozenset[int] = frozenset(),
    masks: Mapping[int, int] | None = None,
    sources: Mapping[int, str] | None = None,
) -> Proposal:
    """Prefer `ValueCounter.propose`, which passes the evidence on."""
    raise NotImplementedError


class ValueCounter:
    """Streaming count over masks; `add` may be called from many threads."""

    def __init__(self) -> None: ...

    def add(self, mask: np.ndarray, picture: Picture | Path | None = None) -> None:
        """`mask` from read_mask(picture)."""
        raise NotImplementedError

    @property
    def counts(self) -> dict[int, int]:
        """Value -> pixels (24-bit colours when `rgb`)."""
        raise NotImplementedError

    @property
    def masks(self) -> dict[int, int]:
        """Value -> number of masks that hold it."""
        raise NotImplementedError

    @property
    def rgb(self) -> bool:
        raise NotImplementedError

    def propose(
        self,
        names: Sequence[str] | None = None,
        colors: Sequence[tuple[int, int, int]] | None = None,
        overrides: Mapping[int, int] | None = None,
    ) -> Proposal:
        """What the values mean. `overrides`: the --label options, value -> class or IGNORE."""
        raise NotImplementedError
