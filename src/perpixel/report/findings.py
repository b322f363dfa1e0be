"""What a report shows of single images, gathered while they are scored."""

from collections.abc import Sequence
from typing import Self

import torch

from perpixel.evaluate import Scored
from perpixel.report.atlas import Atlas
from perpixel.report.confusions import Confusions
from perpixel.report.seen import look
from perpixel.report.suspects import Suspects
from perpixel.report.thumbnails import shown_colors


class Findings:
    """Observer of `evaluate`. Memory does not grow with the number of images."""

    def __init__(self, colors: Sequence[tuple[int, int, int]]) -> None:
        """`colors` of the classes, 0..255, as the bundle has them."""
        self.colors = shown_colors(colors)
        self.atlas, self.confusions, self.suspects = Atlas(self.colors), Confusions(self.colors), Suspects(self.colors)

    def __call__(self, scored: Scored) -> None:
        """Look at one image; one without labelled pixels, or whose scores overflowed, says nothing."""
        if not torch.isfinite(scored.logits).all() or not (scored.labels != scored.ignore).any():
            return
        seen = look(scored)
        for part in (self.atlas, self.confusions, self.suspects):
            part.add(seen)

    def merge(self, other: Self) -> None:
        """Add what another process found with the same colours."""
        self.atlas.merge(other.atlas)
        self.confusions.merge(other.confusions)
        self.suspects.merge(other.suspects)
